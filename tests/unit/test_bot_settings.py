"""The bot's settings: what is taken, and the sentence that tells what is not; and its command line."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from doorward_bot import settings
from doorward_bot.errors import BotError
from doorward_bot.tls import read_credentials
from tests.certificates import Authority
from tests.processes import BIN, clean_environment

DISCORD_TOKEN = "MTU3NzMwNTkwNDkyMTk2ODY0.secret.of-discord"
BOT_TOKEN = "doorward-secret-of-the-bot"
TOKENS = {"DISCORD_TOKEN": DISCORD_TOKEN, "DOORWARD_BOT_TOKEN": BOT_TOKEN}
FILES = {name: f"{name}_FILE" for name in TOKENS}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith(("DOORWARD_", "DISCORD_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> "Environment":
    return Environment(monkeypatch)


class Environment:
    """Settings of an environment that has both tokens, but for what is given; None: not set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def load(self, given: Mapping[str, str | None]) -> settings.Settings:
        for name, value in {**TOKENS, **given}.items():
            if value is not None:
                self._monkeypatch.setenv(name, value)
        return settings.load(dict(os.environ))

    def refusal(self, given: Mapping[str, str | None]) -> str:
        """The sentence with which the bot ends."""
        with pytest.raises(BotError) as refused:
            self.load(given)
        sentence = str(refused.value)
        assert "\n" not in sentence
        assert not any(secret in sentence for secret in TOKENS.values())
        # Nor in what led to it, should somebody print that.
        assert refused.value.__suppress_context__ or refused.value.__context__ is None
        return sentence


def tokens(loaded: settings.Settings) -> dict[str, str]:
    return {name: getattr(loaded, name.lower()).get_secret_value() for name in TOKENS}


def test_least_of_all(environment: Environment) -> None:
    loaded = environment.load({})
    assert tokens(loaded) == TOKENS
    assert loaded.discord_api_base == "https://discord.com/api/v10"
    assert loaded.server == "127.0.0.1:50051"
    assert loaded.doorward_bot_health_port == 0
    assert loaded.doorward_log_level == "info"
    assert not any(secret in f"{loaded!r} {loaded}" for secret in TOKENS.values())


def test_everything(environment: Environment) -> None:
    loaded = environment.load(
        {
            "DISCORD_API_BASE": "https://discord.example/api/v10/",
            "DOORWARD_BOT_SERVER": "doorward.internal:6000",
            "DOORWARD_BOT_CA_FILE": "/etc/doorward/ca.pem",
            "DOORWARD_BOT_CERT_FILE": "/etc/doorward/bot.pem",
            "DOORWARD_BOT_KEY_FILE": "/etc/doorward/bot.key",
            "DOORWARD_GRPC_PORT": "7000",
            "DOORWARD_BOT_HEALTH_PORT": "8000",
            "DOORWARD_LOG_LEVEL": "debug",
        }
    )
    assert loaded.discord_api_base == "https://discord.example/api/v10"
    assert (loaded.server, loaded.doorward_bot_health_port) == ("doorward.internal:6000", 8000)
    assert loaded.doorward_log_level == "debug"


def test_the_server_is_where_its_own_variable_says(environment: Environment) -> None:
    assert environment.load({"DOORWARD_GRPC_PORT": "7000"}).server == "127.0.0.1:7000"


def test_what_is_empty_is_not_set(environment: Environment) -> None:
    given = {"DISCORD_API_BASE": "", "DOORWARD_GRPC_PORT": "", "DISCORD_TOKEN_FILE": "", "DOORWARD_BOT_TOKEN_FILE": ""}
    assert environment.load(given).server == "127.0.0.1:50051"


# Tokens


@pytest.mark.parametrize("empty", [None, ""], ids=["not set", "empty"])
@pytest.mark.parametrize(
    ("name", "source"),
    [("DISCORD_TOKEN", "developer portal"), ("DOORWARD_BOT_TOKEN", "doorward token create --role bot")],
)
def test_a_token_is_missing(environment: Environment, name: str, source: str, empty: str | None) -> None:
    sentence = environment.refusal({name: empty})
    assert f"{name} is not set" in sentence
    assert source in sentence


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("in_file", [False, True], ids=["variable", "file"])
@pytest.mark.parametrize(
    "form", ["{}", "{}\n", "{}\r\n", " {}\n\n"], ids=["alone", "newline", "Windows' newline", "blanks"]
)
def test_blanks_around_a_token(environment: Environment, tmp_path: Path, name: str, form: str, in_file: bool) -> None:
    value = form.format(TOKENS[name])
    path = tmp_path / "token"
    path.write_bytes(value.encode())
    assert tokens(environment.load({name: None, FILES[name]: str(path)} if in_file else {name: value})) == TOKENS


def test_both_tokens_in_files(environment: Environment, tmp_path: Path) -> None:
    given: dict[str, str | None] = {}
    for name, value in TOKENS.items():
        (tmp_path / name).write_text(value)
        given |= {name: None, FILES[name]: str(tmp_path / name)}
    assert tokens(environment.load(given)) == TOKENS


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b" \n\t\n", "is empty", id="blank"),
        pytest.param(b"\xff\xfe\x00\x80", "not a text", id="binary"),
    ],
)
def test_a_wrong_file(environment: Environment, tmp_path: Path, name: str, content: bytes | None, what: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    sentence = environment.refusal({name: None, FILES[name]: str(path)})
    assert FILES[name] in sentence
    assert str(path) in sentence
    assert what in sentence


@pytest.mark.parametrize("name", TOKENS)
def test_a_folder_is_no_file(environment: Environment, tmp_path: Path, name: str) -> None:
    sentence = environment.refusal({name: None, FILES[name]: str(tmp_path)})
    assert FILES[name] in sentence
    assert "directory" in sentence


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_in_two_places(environment: Environment, tmp_path: Path, name: str) -> None:
    path = tmp_path / "token"
    path.write_text("another")
    sentence = environment.refusal({FILES[name]: str(path)})
    assert f"{name} and {FILES[name]} are both set" in sentence
    assert "another" not in sentence


# What no header can hold would otherwise end in a traceback, at the first request.
@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("in_file", [False, True], ids=["variable", "file"])
@pytest.mark.parametrize("value", ["two\nlines", "two words", "tökén", "a\x7fb", "a\x1bb"], ids=repr)
def test_what_is_no_token(environment: Environment, tmp_path: Path, name: str, value: str, in_file: bool) -> None:
    path = tmp_path / "token"
    path.write_text(value)
    given = {name: None, FILES[name]: str(path)} if in_file else {name: value}
    sentence = environment.refusal(given)
    assert name in sentence
    assert value not in sentence


# Discord's address


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://discord.com/api/v10", "https://discord.com/api/v10"),
        ("https://discord.com/api/v10/", "https://discord.com/api/v10"),
        ("https://10.0.0.1:8443/api/v10", "https://10.0.0.1:8443/api/v10"),
        ("http://127.0.0.1:9300/api/v10", "http://127.0.0.1:9300/api/v10"),
        ("http://127.8.8.8:9300/api/v10", "http://127.8.8.8:9300/api/v10"),
        ("http://[::1]:9300/api/v10", "http://[::1]:9300/api/v10"),
        ("http://localhost:9300/api/v10", "http://localhost:9300/api/v10"),
        ("http://LOCALHOST/api/v10", "http://LOCALHOST/api/v10"),
    ],
)
def test_where_discord_is(environment: Environment, url: str, base: str) -> None:
    assert environment.load({"DISCORD_API_BASE": url}).discord_api_base == base


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/api/v10",
        "http://example.com/api/v10",
        "http://discord.com/api/v10",
        "http://localhost.example.com/api/v10",
        "http://127.0.0.1.example.com/api/v10",
        "http://127.0.0.1@example.com/api/v10",
        "http://0.0.0.0:9300/api/v10",
        "http://[::]:9300/api/v10",
        "http://2130706433/api/v10",
        "ftp://127.0.0.1/api/v10",
        "file:///etc/passwd",
        "discord.com/api/v10",
        "//discord.com/api/v10",
        "https://",
        "https:///api/v10",
        "https://discord.com:99999/api/v10",
        "https://discord.com:port/api/v10",
        "https://user:password@discord.com/api/v10",
        "https://discord.com/api/v10?x=1",
        "https://discord.com/api/v10#x",
        "http://[::1/api/v10",
        "garbage",
        "two words",
    ],
)
def test_where_discord_is_not(environment: Environment, url: str) -> None:
    sentence = environment.refusal({"DISCORD_API_BASE": url})
    assert sentence.startswith("DISCORD_API_BASE: ")
    assert "https" in sentence  # how it has to be


# The others


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("DOORWARD_GRPC_PORT", value) for value in ("0", "-1", "65536", "grpc", "1.5")],
        *[("DOORWARD_BOT_HEALTH_PORT", value) for value in ("-1", "65536", "http", "127.0.0.1:80")],
        *[("DOORWARD_LOG_LEVEL", value) for value in ("verbose", "10", "trace")],
        *[("DOORWARD_BOT_SERVER", value) for value in ("no-port", "host:port", "host:0", "host:65536", "http://h:1")],
    ],
)
def test_a_wrong_setting(environment: Environment, name: str, value: str) -> None:
    assert environment.refusal({name: value}).startswith(f"{name}: ")


_HERE = ["127.0.0.1:50051", "127.8.8.8:1", "localhost:1", "LOCALHOST:1", "[::1]:65535"]
_ELSEWHERE = [
    "10.0.0.7:50051",
    "0.0.0.0:50051",
    "[::]:50051",
    "[2001:db8::1]:1",
    "server.internal:50051",
    "localhost.x:1",
]


@pytest.mark.parametrize("server", _HERE)
def test_where_the_server_is(environment: Environment, server: str) -> None:
    loaded = environment.load({"DOORWARD_BOT_SERVER": server})
    assert (loaded.server, read_credentials(loaded)) == (server, None)


# TLS


@pytest.mark.parametrize("server", _ELSEWHERE)
def test_a_server_elsewhere(environment: Environment, server: str) -> None:
    sentence = environment.refusal({"DOORWARD_BOT_SERVER": server})
    assert sentence.startswith(f"DOORWARD_BOT_SERVER: {server} may be another machine")
    assert "set DOORWARD_BOT_CA_FILE, or DOORWARD_BOT_ALLOW_PLAINTEXT=true" in sentence
    for variable, value in (("DOORWARD_BOT_CA_FILE", "ca.pem"), ("DOORWARD_BOT_ALLOW_PLAINTEXT", "true")):
        assert environment.load({"DOORWARD_BOT_SERVER": server, variable: value}).server == server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


def tls(**files: Path) -> dict[str, str | None]:
    return {f"DOORWARD_BOT_{name.upper()}_FILE": str(path) for name, path in files.items()}


def test_tls(environment: Environment, authority: Authority) -> None:
    bot = authority.issue("bot.example")
    assert read_credentials(environment.load(tls(ca=authority.ca_file))) is not None
    assert (
        read_credentials(environment.load(tls(ca=authority.ca_file, cert=bot.cert_file, key=bot.key_file))) is not None
    )


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        pytest.param(("ca", "cert"), ("CERT_FILE and DOORWARD_BOT_KEY_FILE", "set both"), id="no key"),
        pytest.param(("ca", "key"), ("CERT_FILE and DOORWARD_BOT_KEY_FILE", "set both"), id="no certificate"),
        pytest.param(("cert", "key"), ("DOORWARD_BOT_CERT_FILE needs TLS", "DOORWARD_BOT_CA_FILE"), id="no authority"),
    ],
)
@pytest.mark.parametrize("plaintext", ["true", "false"])
def test_half_of_tls(
    environment: Environment, tmp_path: Path, files: Sequence[str], parts: Sequence[str], plaintext: str
) -> None:
    given = tls(**{name: tmp_path / name for name in files})
    sentence = environment.refusal({**given, "DOORWARD_BOT_ALLOW_PLAINTEXT": plaintext})
    assert [part for part in parts if part not in sentence] == [], sentence


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *((name, None, "cannot read {path}: No such file") for name in ("ca", "cert", "key")),
        *((name, "", "{path}") for name in ("ca", "cert", "key")),
        *((name, "a secret", "{path}") for name in ("ca", "cert", "key")),
        ("key", "another's", "the private key that belongs to it"),
    ],
    ids=lambda value: "missing" if value is None else value or "empty",
)
def test_a_wrong_file_of_tls(
    environment: Environment, authority: Authority, tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    bot, path = authority.issue("bot.example"), tmp_path / "wrong.pem"
    if content == "another's":
        path.write_bytes(authority.issue("bot.example").key_file.read_bytes())
    elif content is not None:
        path.write_text(content)
    files = {"ca": authority.ca_file, "cert": bot.cert_file, "key": bot.key_file, name: path}
    loaded = environment.load(tls(**files))
    with pytest.raises(BotError) as refused:
        read_credentials(loaded)
    sentence = str(refused.value)
    assert f"DOORWARD_BOT_{name.upper()}_FILE" in sentence
    assert words.format(path=path) in sentence
    assert "\n" not in sentence
    assert "a secret" not in sentence


# The command line


def doorward_bot(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [BIN / "doorward-bot", *arguments],
        env=clean_environment({"COLUMNS": "100", **environment}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_variable() -> None:
    done = doorward_bot("--help")
    assert (done.returncode, done.stderr) == (0, "")
    names = [*[name.upper() for name in settings.Settings.model_fields], *FILES.values()]
    assert [name for name in names if name not in done.stdout] == []


def test_version() -> None:
    done = doorward_bot("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"doorward-bot {version('doorward')}\n", "")


def test_a_wrong_setting_ends_the_bot() -> None:
    done = doorward_bot(DISCORD_TOKEN=DISCORD_TOKEN)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("doorward-bot: DOORWARD_BOT_TOKEN is not set")
    assert done.stderr.count("\n") == 1
    assert DISCORD_TOKEN not in done.stderr
