"""Settings: what is accepted, which source wins, and what the operator is told about a wrong one."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from doorward_server import settings as settings_module
from doorward_server.errors import OperatorError
from doorward_server.settings import Settings

# Stands wherever a value may be secret; no sentence may show it.
SECRET = "hunter2sekret"
KAI = f"""\
kind = "kai"
token_url = "https://flo.example/token"
client_id = "doorward"
client_secret = "{SECRET}"
redirect_uri = "https://app.example/connected"
"""
FLO = f"[providers.flo]\n{KAI}"
IDENTITY = "kind = 'identity'\nlookup_url = 'https://login.example/me?t={access_token}'\n"
_MUTUAL = "[grpc]\ntls_cert_file = 'a.pem'\ntls_key_file = 'a.key'\nclient_ca_file = 'ca.pem'\n"
LOGIN = f"[providers.login]\n{IDENTITY}token_url = 'https://login.example/token'\n"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DOORWARD_")]:
        monkeypatch.delenv(name)


def load(home: Path, text: str | bytes = "") -> Settings:
    (home / "doorward.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return settings_module.load(home)


def complaint(home: Path, text: str | bytes = "") -> str:
    """What the operator is told of these settings."""
    with pytest.raises(OperatorError) as failure:
        load(home, text)
    return str(failure.value)


def assert_tells(sentence: str, *parts: str) -> None:
    """The sentence is one line, holds all of the parts, and no secret."""
    assert "\n" not in sentence
    assert [part for part in parts if part not in sentence] == [], sentence
    assert SECRET not in sentence


def without(key: str, text: str = FLO) -> str:
    """The settings without the line of a key."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key} ="))


def with_line(line: str) -> str:
    """The provider with one line replaced."""
    return without(line.partition(" =")[0]) + line + "\n"


# What is accepted


def test_nothing_is_required(tmp_path: Path) -> None:
    settings = settings_module.load(tmp_path)
    assert settings.home == tmp_path
    assert settings.database_url == f"sqlite:///{tmp_path}/doorward.db"
    assert settings.socket == tmp_path / "doorward-50051.sock"
    assert settings.key_file == tmp_path / "master.key"
    assert settings.origins == {"http://127.0.0.1:8080"}
    assert settings.providers == {}
    assert settings.limits.auth_failures == 30
    assert not settings.is_https


def test_a_provider(tmp_path: Path) -> None:
    provider = load(tmp_path, FLO).providers["flo"]
    assert (provider.id, provider.kind, provider.secret) == ("flo", "kai", SECRET)
    assert SECRET not in repr(provider)
    assert (provider.token_auth, provider.token_method, provider.timeout) == ("client_secret_post", "post", 5)


def test_an_identity_provider(tmp_path: Path) -> None:
    provider = load(tmp_path, LOGIN).providers["login"]
    assert (provider.id, provider.kind, provider.secret) == ("login", "identity", "")
    assert (provider.lookup_id_property, provider.timeout, provider.longest_call) == ("id", 5, 10)


@pytest.mark.parametrize("names", ["'a.example, b.example'", "['a.example', 'b.example']"], ids=["text", "list"])
def test_names_of_the_gateway(tmp_path: Path, names: str) -> None:
    assert load(tmp_path, f"{_MUTUAL}gateway_name = {names}\n").grpc.gateway_name == ("a.example", "b.example")


def test_a_gateway_that_speaks_tls(tmp_path: Path) -> None:
    settings = load(tmp_path, "[gateway]\ntls_cert_file = 'a.pem'\ntls_key_file = 'a.key'\n")
    assert settings.is_https
    assert settings.origins == {"https://127.0.0.1:8080"}


@pytest.mark.parametrize(
    ("url", "https"),
    [("https://doorward.example", True), ("HTTPS://doorward.example", True), ("http://https.example", False)],
)
def test_whether_browsers_come_by_tls(tmp_path: Path, url: str, https: bool) -> None:
    assert load(tmp_path, f"public_url = '{url}'\n").is_https is https


@pytest.mark.parametrize(
    ("text", "option", "ports"),
    [
        pytest.param("", None, [50051], id="one"),
        pytest.param("workers = 3\n", None, [50051, 50052, 50053], id="several"),
        pytest.param("workers = 3\n[grpc]\nport = 65533\n", None, [65533, 65534, 65535], id="up to the last port"),
        pytest.param("workers = 3\n", 1, [50051], id="the command line wins"),
        pytest.param("", 2, [50051, 50052], id="the command line alone"),
    ],
)
def test_each_worker_has_a_port_and_a_socket(tmp_path: Path, text: str, option: int | None, ports: list[int]) -> None:
    (tmp_path / "doorward.toml").write_text(text)
    settings = settings_module.load(tmp_path, workers=option)
    assert list(settings.ports) == ports
    assert [settings.socket_at(port).name for port in settings.ports] == [f"doorward-{port}.sock" for port in ports]


def test_a_worker_of_several_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a supervisor gives its workers beats what it has been given itself, in the file and in the environment."""
    monkeypatch.setenv("DOORWARD_LOG_LEVEL", "error")
    several = load(tmp_path, "workers = 4\n")
    for name, value in settings_module.worker_environment(several, 50053).items():
        monkeypatch.setenv(name, value)
    one = load(tmp_path, "workers = 4\n[grpc]\nport = 50051\nsocket = '/x.sock'\n")
    assert (one.workers, one.grpc.port, one.socket, one.log.level) == (1, 50053, several.socket_at(50053), "error")


def test_another_settings_file_can_be_tried(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("[limits]\nauth_failures = 7\n")
    load(tmp_path, "[limits]\nauth_failures = 5\n")
    settings = settings_module.load(tmp_path, other)
    assert (settings.home, settings.limits.auth_failures) == (tmp_path, 7)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("# nothing\n", id="comment"),
        pytest.param("[callbacks]\nallow = ['127.0.0.1:9100']\nschedule = [5, 300]\nper_host = 1\n", id="callbacks"),
        pytest.param("[callbacks]\ntimeout = 29.9\n", id="longest timeout of callbacks"),
        pytest.param("[consents]\ntimeout = 60\nallow_unregistered = false\n", id="consents"),
        pytest.param("[limits]\nopen_per_user = 0\nrequests_per_address = 0\n", id="no limits of requests"),
        pytest.param("[gateway]\nanything = 'the launcher reads it'\n", id="the gateway's own"),
        pytest.param(f"[providers.login]\n{IDENTITY}", id="identity"),
        pytest.param(f"[providers.a-b_c9]\n{IDENTITY}", id="id"),
        pytest.param(f"{LOGIN}timeout = 7.4\n", id="longest timeout with a token URL"),
        pytest.param(f"[providers.login]\n{IDENTITY}timeout = 9.9\n", id="longest timeout without a token URL"),
        pytest.param(f"{LOGIN}timeout = 9\n[gateway]\ntimeout = 18.1\n", id="longer gateway's timeout"),
        pytest.param(f"{LOGIN}token_method = 'get'\nlookup_id_property = 'data.user.id'\n", id="of other services"),
        pytest.param("[limits]\nauth_failures = 0\n", id="no limit"),
        pytest.param(FLO.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(without("client_secret") + "token_auth = 'none'\n", id="public client"),
        pytest.param(FLO + "timeout = 9.9\n", id="longest timeout"),
        pytest.param(FLO + "timeout = 14\n[refresh]\nlease = 15\n", id="longer lease"),
        pytest.param("[grpc]\nport = 65535\n", id="largest port"),
        pytest.param("[metrics]\nport = 9464\nhost = '::1'\n", id="metrics"),
        pytest.param("[refresh]\nahead = 0\nat_once = 64\npoll = 3600\n", id="nothing refreshed ahead"),
        pytest.param("[refresh]\nahead = 25.1\njitter = 0\n", id="shortest ahead"),
        pytest.param("[refresh]\nat_once = 48\n", id="most refreshes at once"),
        pytest.param("[retention]\nrequests = 0\ndeliveries = 0\nsessions = 0\njobs = 0\n", id="all kept for ever"),
        pytest.param("[retention]\nrequests = 3600\ndeliveries = 3600\ngrants = 1\n", id="shortest retention"),
        pytest.param("[retention]\nrequests = 0\n", id="requests kept for ever"),
        pytest.param("public_url = 'https://doorward.example/'\n", id="public URL"),
    ],
)
def test_accepted(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).home == tmp_path


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        pytest.param(b"s3cret\n", "s3cret", id="line feed"),
        pytest.param(b"s3cret", "s3cret", id="no line feed"),
        pytest.param(b"s3cret\r\n", "s3cret", id="CRLF"),
        pytest.param(b" s3cret \n", " s3cret ", id="blanks are part of it"),
        pytest.param("ключ\n".encode(), "ключ", id="not ASCII"),
    ],
)
@pytest.mark.parametrize("name", ["flo.secret", "{home}/flo.secret"], ids=["relative", "absolute"])
def test_a_secret_in_a_file(tmp_path: Path, content: bytes, secret: str, name: str) -> None:
    (tmp_path / "flo.secret").write_bytes(content)
    line = f'client_secret_file = "{name.format(home=tmp_path)}"\n'
    assert load(tmp_path, without("client_secret") + line).providers["flo"].secret == secret


def test_a_secret_file_is_relative_to_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "flo.secret").write_text("s3cret\n")
    (folder / "x.toml").write_text(without("client_secret") + 'client_secret_file = "flo.secret"\n')
    monkeypatch.setenv("DOORWARD_CONFIG", str(folder / "x.toml"))
    assert settings_module.load(tmp_path).providers["flo"].secret == "s3cret"


# The environment


@pytest.mark.parametrize(
    ("variables", "read", "value"),
    [
        pytest.param({"DOORWARD_GRPC_PORT": "6000"}, lambda s: s.grpc.port, 6000, id="wins over the file"),
        pytest.param({"DOORWARD_GRPC_PORT": ""}, lambda s: s.grpc.port, 5000, id="empty is unset"),
        pytest.param({}, lambda s: s.grpc.port, 5000, id="the file alone"),
        pytest.param({"DOORWARD_GRPC_HOST": "::1"}, lambda s: (s.grpc.host, s.grpc.port), ("::1", 5000), id="merged"),
        pytest.param({"DOORWARD_GRPC_REFLECTION": "true"}, lambda s: s.grpc.reflection, True, id="true"),
        pytest.param({"DOORWARD_GRPC_REFLECTION": "0"}, lambda s: s.grpc.reflection, False, id="0"),
        pytest.param({"DOORWARD_DATABASE_BUSY_TIMEOUT": "1.5"}, lambda s: s.database.busy_timeout, 1.5, id="two words"),
        pytest.param(
            {"DOORWARD_OUTBOUND_ALLOW": "127.0.0.1:1, [::1]:2,"},
            lambda s: s.outbound.allow,
            ("127.0.0.1:1", "[::1]:2"),
            id="list",
        ),
        pytest.param(
            {"DOORWARD_ALLOWED_ORIGINS": "https://a.example,https://B.example/"},
            lambda s: s.origins,
            {"http://127.0.0.1:8080", "https://a.example", "https://b.example"},
            id="list without a section",
        ),
        pytest.param({"DOORWARD_MASTER_KEY_FILE": "/k"}, lambda s: s.key_file, Path("/k"), id="key file"),
        pytest.param({"DOORWARD_GATEWAY_ANYTHING": "1"}, lambda s: s.gateway.port, 8080, id="the launcher's"),
        pytest.param({"DOORWARD_BOT_TOKEN": "1"}, lambda s: s.gateway.port, 8080, id="the bot's"),
        pytest.param({"DOORWARD_LIMITS_OPEN_PER_USER": "1"}, lambda s: s.limits.open_per_user, 1, id="limits"),
        pytest.param({"DOORWARD_LIMITS_AUTH_FAILURES": "7"}, lambda s: s.limits.auth_failures, 7, id="three words"),
        pytest.param({"DOORWARD_CLIENT_SECRET": SECRET}, lambda s: s.gateway.port, 8080, id="a command's secret"),
        pytest.param({"DOORWARD_CALLBACKS_PER_HOST": "9"}, lambda s: s.callbacks.per_host, 9, id="callbacks"),
        pytest.param(
            {"DOORWARD_CALLBACKS_ALLOW": "127.0.0.1:1,[::1]:2"},
            lambda s: s.callbacks.allow,
            ("127.0.0.1:1", "[::1]:2"),
            id="allowed callbacks",
        ),
        pytest.param(
            {"DOORWARD_CONSENTS_ALLOW_UNREGISTERED": "false"},
            lambda s: s.consents.allow_unregistered,
            False,
            id="consents",
        ),
        pytest.param({"DOORWARD_JOBS_SCHEDULE": "5,30"}, lambda s: s.jobs.schedule, (5, 30), id="list of numbers"),
    ],
)
def test_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: Mapping[str, str],
    read: Callable[[Settings], object],
    value: object,
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert read(load(tmp_path, "[grpc]\nport = 5000\n")) == value


def test_the_home_given_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("DOORWARD_HOME", str(tmp_path / "other"))
    assert settings_module.load(tmp_path).home == tmp_path
    assert settings_module.load().home == tmp_path / "other"


def test_a_home_that_is_missing_is_named_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"there is no home .*/x: run `doorward init`"):
        settings_module.load(tmp_path / "x")


def test_a_relative_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert settings_module.load(Path("x")).home == tmp_path / "x"
    assert settings_module.places(Path("x")) == (tmp_path / "x", tmp_path / "x" / "doorward.toml")


def test_the_secret_of_a_setting_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOORWARD_MASTER_KEY", SECRET)
    assert SECRET not in repr(load(tmp_path, FLO))


# What is refused: text of the file, and what the sentence has to say

_REQUIRED = ("token_url", "client_id", "client_secret", "redirect_uri")
_LONG = "/tmp/" + "x" * 103


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # Names
        pytest.param("[grpc]\nprot = 1\n", ("[grpc] prot", "did you mean port?", "remove it"), id="unknown key"),
        pytest.param("[grpc]\nzzz = 1\n", ("[grpc] zzz", "is not a setting", "remove it"), id="unlike any key"),
        pytest.param("[grcp]\nport = 1\n", ("grcp", "did you mean grpc?", "remove it"), id="unknown section"),
        pytest.param("publc_url = 'x'\n", ("publc_url", "did you mean public_url?"), id="unknown key without section"),
        pytest.param(
            FLO + "tokenurl = 'x'\n", ("[providers.flo] tokenurl", "did you mean token_url?"), id="provider's key"
        ),
        pytest.param(
            FLO + f"client_secrett = '{SECRET}'\n",
            ("[providers.flo] client_secrett", "did you mean client_secret?"),
            id="misspelled secret",
        ),
        pytest.param("home = '/x'\n", ("home", "DOORWARD_HOME"), id="home in the file"),
        # Types and ranges
        pytest.param("[grpc]\nport = 'http'\n", ("[grpc] port", "DOORWARD_GRPC_PORT", "integer"), id="port: text"),
        pytest.param("[grpc]\nport = 1.5\n", ("[grpc] port", "DOORWARD_GRPC_PORT", "integer"), id="port: fraction"),
        pytest.param("[grpc]\nport = [1]\n", ("[grpc] port", "DOORWARD_GRPC_PORT", "integer"), id="port: list"),
        pytest.param("[grpc]\nport = 0\n", ("[grpc] port", "equal to 1"), id="port 0"),
        pytest.param("[grpc]\nport = -1\n", ("[grpc] port", "equal to 1"), id="negative port"),
        pytest.param("[grpc]\nport = 65536\n", ("[grpc] port", "equal to 65535"), id="large port"),
        pytest.param("[gateway]\nport = 65536\n", ("[gateway] port", "equal to 65535"), id="gateway's port"),
        pytest.param("[grpc]\nport = true\n", ("[grpc] port", "has to be a number"), id="port: true"),
        pytest.param("[grpc]\nthreads = 1\n", ("[grpc] threads", "equal to 2"), id="one thread"),
        pytest.param("[log]\nlevel = 'loud'\n", ("[log] level", "'debug'", "'error'"), id="choice"),
        pytest.param("[refresh]\nlease = 0\n", ("[refresh] lease", "greater than 0"), id="no lease"),
        pytest.param("[refresh]\nlease = nan\n", ("[refresh] lease", "finite"), id="lease: nan"),
        pytest.param("[refresh]\nlease = inf\n", ("[refresh] lease", "finite"), id="lease: inf"),
        pytest.param(
            "[sessions]\nlifetime = 1e300\n",
            ("[sessions] lifetime", "less than"),
            id="lifetime beyond all time",
        ),
        pytest.param("[jobs]\nschedule = [5, -1]\n", ("schedule", "greater than 0"), id="schedule"),
        pytest.param("[callbacks]\nschedule = [0]\n", ("[callbacks] schedule", "greater than 0"), id="callbacks"),
        pytest.param("[callbacks]\nper_host = 0\n", ("[callbacks] per_host", "equal to 1"), id="none per host"),
        pytest.param("[callbacks]\nurl = 'x'\n", ("[callbacks] url", "not a setting"), id="callbacks: unknown"),
        pytest.param("[callbacks]\ntimeout = 60\n", ("[callbacks] timeout", "[jobs] lease"), id="callbacks: lease"),
        pytest.param("[consents]\ntimeout = 0\n", ("[consents] timeout", "greater than 0"), id="consents"),
        pytest.param("[limits]\ncalls = 5\n", ("[limits] calls", "not a setting"), id="limits: unknown"),
        pytest.param(
            "[limits]\nopen_per_user = -1\n", ("[limits] open_per_user", "equal to 0"), id="limits: less than none"
        ),
        pytest.param("[outbound]\nallow = [5]\n", ("outbound", "allow", "string"), id="list of numbers"),
        pytest.param("grpc = 5\n", ("grpc",), id="section: number"),
        pytest.param(f"[providers]\nflo = '{SECRET}'\n", ("[providers.flo]",), id="provider: text"),
        pytest.param(
            "[grpc]\ntls_cert_file = 'a'\n",
            ("[grpc] tls_cert_file and tls_key_file", "set both"),
            id="TLS without a key",
        ),
        pytest.param(
            "[grpc]\ntls_key_file = 'a'\n",
            ("[grpc] tls_cert_file and tls_key_file", "set both"),
            id="TLS without a certificate",
        ),
        pytest.param(
            "[grpc]\nclient_ca_file = 'a'\n",
            ("[grpc] client_ca_file needs TLS", "tls_cert_file"),
            id="clients without TLS",
        ),
        pytest.param(
            "[grpc]\ntls_cert_file = 'a'\ntls_key_file = 'a'\ngateway_name = 'gateway.example'\n",
            ("[grpc] gateway_name needs client_ca_file", "set it"),
            id="a gateway's name without an authority",
        ),
        *(
            pytest.param(
                f"{_MUTUAL}gateway_name = ['gateway.example', '{name}']\n",
                (f'[grpc] gateway_name: "{name}" is not a DNS name', "without a wildcard"),
                id=f"a gateway's name: {name or 'empty'}",
            )
            for name in (
                "*.example",
                "*",
                "",
                "10.0.0.7",
                "::1",
                "a..example",
                "https://a.example",
                "a b",
                f"{'a' * 64}.b",
            )
        ),
        pytest.param("[grpc]\nallow_plaintext = 'sure'\n", ("[grpc] allow_plaintext", "boolean"), id="plaintext: text"),
        pytest.param("[grpc]\ndrain_wait = 2\ndrain_grace = 2.5\n", ("drain_wait", "drain_grace", "4 s"), id="drain"),
        pytest.param(
            f"[database]\nurl = 'postgres://ada:{SECRET}@db/x'\n", ("[database] url", "sqlite:///"), id="database"
        ),
        pytest.param(
            "[database]\nurl = 'sqlite:///doorward.db'\n",
            ("[database] url", "absolute"),
            id="relative database",
        ),
        pytest.param(
            "[database]\nurl = 'sqlite:///:memory:'\n",
            ("[database] url", "absolute"),
            id="database in memory",
        ),
        pytest.param(f"[grpc]\nsocket = '{_LONG}'\n", (_LONG, "107", "[grpc] socket", "shorter"), id="long socket"),
        pytest.param("workers = 0\n", ("workers (or DOORWARD_WORKERS)", "equal to 1"), id="no worker"),
        pytest.param("workers = 65\n", ("workers (or DOORWARD_WORKERS)", "equal to 64"), id="many workers"),
        pytest.param(
            "workers = 3\n[grpc]\nport = 65534\n",
            ("workers (3)", "[grpc] port (65534)", "65536"),
            id="ports beyond all",
        ),
        pytest.param(
            "workers = 2\n[grpc]\nsocket = '/x.sock'\n",
            ("[grpc] socket", "DOORWARD_GRPC_SOCKET", "remove it", "workers to 1"),
            id="one socket for two",
        ),
        pytest.param("[limits]\nauth_failures = -1\n", ("[limits] auth_failures", "equal to 0"), id="negative limit"),
        # Refreshing and retention
        pytest.param(
            "[refresh]\nahead = 25\n",
            ("[refresh] ahead (25 s)", "two leases and a poll (25 s)", "raise it, or lower [refresh] lease or poll"),
            id="ahead too short for another process",
        ),
        pytest.param("[refresh]\nahead = -1\n", ("[refresh] ahead", "equal to 0"), id="negative ahead"),
        pytest.param("[refresh]\njitter = -1\n", ("[refresh] jitter", "equal to 0"), id="negative jitter"),
        pytest.param("[refresh]\npoll = 0\n", ("[refresh] poll", "greater than 0"), id="no poll"),
        pytest.param("[refresh]\nat_once = 0\n", ("[refresh] at_once", "equal to 1"), id="no refreshes at once"),
        pytest.param(
            "[outbound]\nconcurrency = 7\n",
            ("[refresh] at_once (8)", "[outbound] concurrency (7)", "lower the one or raise the other"),
            id="more refreshes than requests",
        ),
        pytest.param(
            "[retention]\nrequests = 3599\n",
            ("[retention] requests (3599 s)", "3600 s"),
            id="short requests",
        ),
        pytest.param(
            "[retention]\ndeliveries = 60\n", ("[retention] deliveries (60 s)", "3600 s"), id="short deliveries"
        ),
        pytest.param(
            "[retention]\nrequests = 86400\n",
            ("[retention] requests (86400 s)", "deliveries (2592000 s)", "raise the one or lower the other"),
            id="requests shorter than deliveries",
        ),
        pytest.param(
            "[retention]\ndeliveries = 0\n",
            ("[retention] requests", "deliveries (for ever)", "raise the one or lower the other"),
            id="deliveries for ever, requests not",
        ),
        pytest.param(
            "[retention]\nrequests = 0\ngrants = 86400\n",
            ("[retention] grants", "requests are kept for ever", "set requests, too, or remove it"),
            id="grants without requests",
        ),
        pytest.param("[retention]\nbatch = 0\n", ("[retention] batch", "equal to 1"), id="empty batches"),
        # Providers
        *(pytest.param(without(key), ("[providers.flo]", f"needs {key}:", "add"), id=f"no {key}") for key in _REQUIRED),
        pytest.param("[providers.flo]\nkind = 'kai'\n", ("[providers.flo]", *_REQUIRED), id="nothing but a kind"),
        pytest.param("[providers.x]\nkind = 'identity'\n", ("[providers.x]", "needs lookup_url:"), id="no lookup_url"),
        pytest.param(
            f"[providers.x]\n{IDENTITY.replace('{access_token}', SECRET)}",
            ("[providers.x] lookup_url", "{access_token}", "path or query"),
            id="lookup_url without a place for the token",
        ),
        pytest.param(
            f"{LOGIN}lookup_id_property = 'data..id'\n",
            ("[providers.login] lookup_id_property", "member's name"),
            id="empty name in lookup_id_property",
        ),
        pytest.param(f"{LOGIN}token_method = 'put'\n", ("[providers.login] token_method", "'get'"), id="token method"),
        pytest.param(without("kind"), ("[providers.flo] kind", "is missing: add it"), id="no kind"),
        pytest.param(with_line("kind = 'kay'"), ("[providers.flo] kind", "'kai' or 'identity'"), id="unknown kind"),
        pytest.param(
            FLO.replace("flo]", "goo]"), ("[providers.goo]", "flo, min and eag", "identity"), id="kai, foreign id"
        ),
        pytest.param(FLO.replace("flo]", "Flo]"), ("[providers.Flo]", "a-z, 0-9, `-` and `_`"), id="capital in id"),
        pytest.param(
            FLO + "client_secret_file = 'x'\n",
            ("[providers.flo]", "client_secret", "client_secret_file", "keep one"),
            id="two secrets",
        ),
        pytest.param(
            without("client_secret") + "client_secret = 5\n", ("[providers.flo] client_secret",), id="secret: 5"
        ),
        pytest.param(
            without("client_secret") + "client_secret = ''\n",
            ("[providers.flo]", "client_secret"),
            id="empty secret",
        ),
        pytest.param(FLO + "timeout = 0\n", ("[providers.flo] timeout", "greater than 0"), id="no timeout"),
        pytest.param(FLO + "timeout = 61\n", ("[providers.flo] timeout", "equal to 60"), id="long timeout"),
        pytest.param(
            FLO + "timeout = 10\n", ("[providers.flo] timeout (10 s)", "[refresh] lease (10 s)", "lower"), id="lease"
        ),
        pytest.param(
            FLO + "timeout = 15\n[refresh]\nlease = 20\n",
            ("[providers.flo] timeout (15 s)", "[gateway] timeout (15 s)", "raise"),
            id="gateway's timeout",
        ),
        pytest.param(
            f"{LOGIN}timeout = 7.5\n",
            (
                "[providers.login] timeout (7.5 s), 15 s for the exchange and the lookup together,",
                "[gateway] timeout (15 s)",
                "raise",
            ),
            id="gateway's timeout, exchange and lookup",
        ),
        pytest.param(
            f"[providers.login]\n{IDENTITY}timeout = 8\n[gateway]\ntimeout = 8\n",
            ("[providers.login] timeout (8 s) has to", "[gateway] timeout (8 s)"),
            id="gateway's timeout, lookup",
        ),
        pytest.param(
            "[metrics]\nport = 50051\n",
            ("[metrics] port (DOORWARD_METRICS_PORT) is that of [grpc], 50051", "choose another"),
            id="metrics on the server's port",
        ),
        pytest.param(
            "[metrics]\nport = 8081\n[gateway]\nport = 8081\n",
            ("[metrics] port (DOORWARD_METRICS_PORT) is that of [gateway], 8081", "choose another"),
            id="metrics on the gateway's port",
        ),
        pytest.param("[metrics]\nport = 0\n", ("[metrics] port", "greater than or equal to 1"), id="no port"),
        pytest.param(
            FLO + "timeout = 5\n[jobs]\nlease = 4\n",
            ("[providers.flo] timeout (5 s)", "[jobs] lease (4 s)", "lower"),
            id="lease of jobs",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_the_mend(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    assert_tells(complaint(tmp_path, text), str(tmp_path / "doorward.toml"), *parts)


_URLS = ("authorize_url", "token_url", "revocation_url", "redirect_uri", "public_url")
_BAD_URLS = {
    "no scheme": ("flo.example/token", "absolute http or https URL"),
    "other scheme": ("ftp://flo.example/", "absolute http or https URL"),
    "script": ("javascript:alert(1)", "absolute http or https URL"),
    "no host": ("https:///token", "absolute http or https URL"),
    "port 0": ("https://flo.example:0/", "absolute http or https URL"),
    "large port": ("https://flo.example:65536/", "absolute http or https URL"),
    "open bracket": ("https://[::1/", "absolute http or https URL"),
    "user": (f"https://ada:{SECRET}@flo.example/", "user information"),
    "fragment": (f"https://flo.example/#{SECRET}", "fragment"),
    "empty": ("", "absolute http or https URL"),
}


@pytest.mark.parametrize("key", _URLS)
@pytest.mark.parametrize(("url", "part"), _BAD_URLS.values(), ids=_BAD_URLS)
def test_a_bad_url_is_named_with_the_mend(tmp_path: Path, key: str, url: str, part: str) -> None:
    if key == "public_url":
        assert_tells(complaint(tmp_path, f"public_url = '{url}'\n"), "public_url (or DOORWARD_PUBLIC_URL)", part)
    else:
        assert_tells(complaint(tmp_path, with_line(f"{key} = '{url}'")), f"[providers.flo] {key}", part)


@pytest.mark.parametrize(
    "url", ["https://a b/", "https://a..b/", "https://xn--a/", "https://flo.example/\t", "https://0177.0.0.1/"]
)
def test_a_url_that_nothing_can_be_asked_at_is_refused(tmp_path: Path, url: str) -> None:
    assert_tells(
        complaint(tmp_path, with_line(f'token_url = "{url}"'.replace("\t", "\\t"))), "[providers.flo] token_url"
    )


def test_every_wrong_setting_is_told_on_a_line_of_its_own(tmp_path: Path) -> None:
    lines = complaint(tmp_path, f"[grpc]\nport = 0\nprot = 1\n[log]\nlevel = '{SECRET}'\n").splitlines()
    assert [line.split(": ")[1] for line in sorted(lines)] == [
        "[grpc] port (or DOORWARD_GRPC_PORT)",
        "[grpc] prot",
        "[log] level (or DOORWARD_LOG_LEVEL)",
    ]
    assert SECRET not in "".join(lines)


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        pytest.param(
            {"DOORWARD_GRPC_PRT": SECRET},
            ("DOORWARD_GRPC_PRT", "did you mean DOORWARD_GRPC_PORT?", "unset it"),
            id="misspelled",
        ),
        pytest.param({"DOORWARD_ZZZ": SECRET}, ("DOORWARD_ZZZ", "is not a setting", "unset it"), id="unlike any"),
        pytest.param({"DOORWARD_GRPC": SECRET}, ("DOORWARD_GRPC ", "unset it"), id="a section"),
        pytest.param({"DOORWARD_": SECRET}, ("DOORWARD_ ", "unset it"), id="nothing but the prefix"),
        pytest.param({"DOORWARD_GRPC_PORT": SECRET}, ("DOORWARD_GRPC_PORT", "[grpc] port", "integer"), id="port: text"),
        pytest.param({"DOORWARD_GRPC_PORT": "65536"}, ("DOORWARD_GRPC_PORT", "equal to 65535"), id="large port"),
        pytest.param({"DOORWARD_GRPC_REFLECTION": SECRET}, ("DOORWARD_GRPC_REFLECTION", "boolean"), id="switch"),
        pytest.param({"DOORWARD_LOG_LEVEL": SECRET}, ("DOORWARD_LOG_LEVEL", "'debug'"), id="choice"),
        pytest.param({"DOORWARD_DATABASE_URL": SECRET}, ("[database] url", "sqlite:///"), id="database"),
        pytest.param(
            {"DOORWARD_PUBLIC_URL": f"https://ada:{SECRET}@x/"}, ("DOORWARD_PUBLIC_URL", "user information"), id="URL"
        ),
        pytest.param({"DOORWARD_LIMITS": SECRET}, ("DOORWARD_LIMITS ", "unset it"), id="limits"),
        pytest.param(
            {"DOORWARD_LIMITS_AUTH_FAILURES": SECRET}, ("DOORWARD_LIMITS_AUTH_FAILURES", "integer"), id="failures"
        ),
        pytest.param({"DOORWARD_JOBS_SCHEDULE": SECRET}, ("DOORWARD_JOBS_SCHEDULE",), id="schedule"),
        pytest.param(
            {"DOORWARD_PROVIDERS_FLO_CLIENT_SECRET": SECRET},
            ("DOORWARD_PROVIDERS_FLO_CLIENT_SECRET",),
            id="provider's secret",
        ),
    ],
)
def test_a_wrong_variable_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], parts: tuple[str, ...]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_tells(complaint(tmp_path), *parts)


# Files


@pytest.mark.parametrize(
    ("text", "part"),
    [
        pytest.param(f"client_secret = {SECRET}\n".encode(), "not valid TOML: ", id="no quotes"),
        pytest.param(f"[grpc\nx = '{SECRET}'\n".encode(), "not valid TOML: ", id="open bracket"),
        pytest.param(f"x = '{SECRET}\n".encode(), "not valid TOML: ", id="open quote"),
        pytest.param(b"[grpc]\n[grpc]\n", "not valid TOML: ", id="twice"),
        pytest.param(b"\xff\xfe\x00\x01" * 100, "not a text file: the settings are TOML", id="binary"),
        pytest.param(b"\x00", "not valid TOML: ", id="NUL"),
    ],
)
def test_what_is_no_toml_is_named(tmp_path: Path, text: bytes, part: str) -> None:
    assert_tells(complaint(tmp_path, text), f"{tmp_path}/doorward.toml is {part}")


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "doorward.toml").mkdir()
    with pytest.raises(OperatorError) as failure:
        settings_module.load(tmp_path)
    assert_tells(str(failure.value), f"{tmp_path}/doorward.toml is not a file", "the settings file belongs there")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("missing", ("there is no settings file {config}", "DOORWARD_CONFIG", "`doorward init`")),
        ("directory", ("{config} is not a file", "the settings file belongs there")),
    ],
    ids=["missing", "directory"],
)
def test_a_config_that_is_no_file_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, parts: tuple[str, ...]
) -> None:
    config = tmp_path / "x.toml"
    if kind == "directory":
        config.mkdir()
    monkeypatch.setenv("DOORWARD_CONFIG", str(config))
    assert_tells(complaint(tmp_path), *(part.format(config=config) for part in parts))


def test_an_empty_config_variable_is_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOORWARD_CONFIG", "")
    assert load(tmp_path, "[grpc]\nport = 5000\n").grpc.port == 5000


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param("missing", "No such file", id="missing"),
        pytest.param("directory", "Is a directory", id="directory"),
        pytest.param("binary", "it is not text", id="binary"),
        pytest.param("empty", "empty", id="empty"),
    ],
)
def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str, part: str) -> None:
    path = tmp_path / "flo.secret"
    match kind:
        case "directory":
            path.mkdir()
        case "binary":
            path.write_bytes(b"\xff\xfe" + SECRET.encode())
        case "empty":
            path.touch()
    sentence = complaint(tmp_path, without("client_secret") + "client_secret_file = 'flo.secret'\n")
    assert_tells(sentence, "[providers.flo] client_secret_file", str(path), part)
