"""TLS between hosts and to the public, and proxies in front: a real server and a real Envoy, on this machine."""

import concurrent.futures
import contextlib
import itertools
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from grpc_health.v1 import health, health_pb2_grpc

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from tests.certificates import GATEWAY, SERVER, Authority, Certificate, public_tls, upstream_tls
from tests.processes import BIN, ROOT, await_condition, free_port, running
from tests.rpc.conftest import read_failure
from tests.sandbox.client import SandboxProvider
from tests.sandbox.discord.client import discord_stand_in
from tests.stack import Person, Stack, make_stack, rest

STATUS = "/api/v1/users/me/integrations/kai/flo"
AT_ONCE = {"DOORWARD_GATEWAY_DRAIN_WAIT": "0", "DOORWARD_GRPC_DRAIN_WAIT": "0"}
OTHER = "backend.doorward.test"
_MUTUAL = """\
[grpc]
tls_cert_file = "{cert_file}"
tls_key_file = "{key_file}"
client_ca_file = "{ca_file}"
gateway_name = "{gateway}"
[callbacks]
allow = ["127.0.0.1:9"]
[limits]
auth_failures = 2
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    logs: Path,
    shared_provider: SandboxProvider,
    secrets: set[str],
    authority: Authority,
) -> Iterator[Stack]:
    """A server that asks for certificates, and knows the gateway by its own."""
    certificate = authority.issue(SERVER, "127.0.0.1")
    more = _MUTUAL.format(
        cert_file=certificate.cert_file, key_file=certificate.key_file, ca_file=authority.ca_file, gateway=GATEWAY
    )
    folder = tmp_path_factory.mktemp("tls") / "home"
    stack = make_stack(folder, logs, shared_provider, secrets, more, **AT_ONCE)
    with stack.server():
        yield stack


def front(home: Stack, environment: Mapping[str, str]) -> Stack:
    """The same home behind a gateway of its own, which calls the TCP port."""
    upstream = {"DOORWARD_GATEWAY_UPSTREAMS": f"127.0.0.1:{home.grpc_port}"}
    return replace(home, gateway_port=free_port(), environment={**AT_ONCE, **upstream, **environment})


@contextlib.contextmanager
def gateway(home: Stack, environment: Mapping[str, str], health: int = 200) -> Iterator[Stack]:
    """A gateway, once its health is as expected."""
    stack = front(home, environment)
    with stack.gateway():
        await_condition(lambda: rest(stack, "GET", "/healthz").status_code == health, f"health to be {health}")
        yield stack


def as_user(person: Person) -> dict[str, str]:
    return {"cookie": f"doorward_session={person.cookie}"}


def reason(answer: httpx.Response) -> tuple[int, str]:
    """The status and the reason of an error."""
    return answer.status_code, answer.json()["details"][0]["reason"]


# A gateway on another machine


@pytest.fixture(scope="module")
def mutual(home: Stack, authority: Authority) -> Iterator[Stack]:
    """A gateway that the server knows by its certificate, which an intermediate authority has issued."""
    with gateway(home, upstream_tls(authority, authority.issue(GATEWAY, through=1))) as stack:
        yield stack


def test_cookies_count_over_mutual_tls(home: Stack, mutual: Stack, provider: SandboxProvider) -> None:
    person = home.person()
    code = {"code": provider.code()}
    assert rest(mutual, "GET", STATUS, headers=as_user(person)).json() == {"authStatus": False}
    assert rest(mutual, "POST", f"{STATUS}/oauth2callback", headers=as_user(person), json=code).json() == {}
    assert rest(mutual, "GET", STATUS, headers=as_user(person)).json() == {"authStatus": True}
    assert reason(rest(mutual, "GET", STATUS)) == (401, "NO_SESSION")
    other = as_user(person) | {"origin": "https://other.example"}
    assert reason(rest(mutual, "GET", STATUS, headers=other)) == (403, "ORIGIN_NOT_ALLOWED")


def test_basic_credentials_count_over_mutual_tls(mutual: Stack) -> None:
    client = mutual.client()
    made = rest(mutual, "POST", "/api/users", headers=client.headers, json={"name": "Over TLS"})
    assert (made.status_code, made.json()["slug"]) == (200, "over-tls")
    assert reason(rest(mutual, "GET", "/api/users/over-tls")) == (401, "NO_API_CLIENT")


def test_what_envoy_says_counts_over_mutual_tls(mutual: Stack) -> None:
    """The query of this route stands in metadata of Envoy's."""
    fields = {"name": "App", "userid": "80351110224678912", "callback": "http://127.0.0.1:9/cb"}
    answer = rest(mutual, "GET", "/requestapikey", params=fields)
    assert (answer.status_code, answer.text) == (200, "OK")
    assert rest(mutual, "GET", "/requestapikey").text == "missing parameters"


def test_failures_count_by_the_client_s_address_over_mutual_tls(home: Stack, authority: Authority) -> None:
    """And not by the gateway's, which everybody shares."""
    client = home.client()
    wrong = httpx.BasicAuth(client.id, "wrong")
    tls = upstream_tls(authority, authority.issue(GATEWAY))
    with gateway(home, tls | {"DOORWARD_GATEWAY_TRUSTED_HOPS": "1"}) as stack:

        def fail(address: str) -> int:
            return rest(stack, "GET", "/api/users/x", auth=wrong, headers={"x-forwarded-for": address}).status_code

        assert [fail("192.0.2.1") for _ in range(3)] == [401, 401, 429]
        assert fail("192.0.2.2") == 401


# Who is not the gateway


def outcome(call: Callable[[], object]) -> str:
    """What becomes of a call: `OK`, or the code and the reason."""
    try:
        call()
    except grpc.RpcError as failure:
        return read_failure(failure).short
    return "OK"


def channel_to(port: int, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel over TLS, or in clear."""
    address = f"127.0.0.1:{port}"
    return grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)


def with_cookie(port: int, credentials: grpc.ChannelCredentials | None, cookie: str) -> str:
    """What becomes of a call with what only a gateway may send."""
    request = pb.GetKaiStatusRequest(user_id="me", kai_type="flo")
    metadata = (("cookie", f"doorward_session={cookie}"), ("x-envoy-external-address", "192.0.2.1"))
    with channel_to(port, credentials) as channel:
        rpc = stubs.IntegrationServiceStub(channel).GetKaiStatus
        return outcome(lambda: rpc(request, metadata=metadata, timeout=10))


def with_token(port: int, credentials: grpc.ChannelCredentials | None, token: str, user: str) -> str:
    """What becomes of a backend's call."""
    request = pb.GetAccessTokenRequest(user=user, provider="flo")
    with channel_to(port, credentials) as channel:
        rpc = stubs.IntegrationServiceStub(channel).GetAccessToken
        return outcome(lambda: rpc(request, metadata=(("authorization", f"Bearer {token}"),), timeout=10))


Issue = Callable[[Authority], Certificate]
_GATEWAY_S: dict[str, Issue] = {
    "its name": lambda authority: authority.issue(GATEWAY),
    "one of several names": lambda authority: authority.issue("127.0.0.1", OTHER, GATEWAY),
    "capitals": lambda authority: authority.issue_for(x509.DNSName(GATEWAY.upper())),
    "an intermediate authority": lambda authority: authority.issue(GATEWAY, through=2),
}
_OTHERS: dict[str, Issue] = {
    "another name": lambda authority: authority.issue(OTHER),
    "the server's name": lambda authority: authority.issue(SERVER),
    "the common name": lambda authority: authority.issue(OTHER, common_name=GATEWAY),
    "no alternative name": lambda authority: authority.issue(common_name=GATEWAY),
    "a wildcard": lambda authority: authority.issue("*.doorward.test"),
    "a name below it": lambda authority: authority.issue(f"x.{GATEWAY}"),
    "a name above it": lambda authority: authority.issue("doorward.test"),
    "an e-mail address": lambda authority: authority.issue(f"gateway@{GATEWAY}"),
    "a URI of the same text": lambda authority: authority.issue_for(x509.UniformResourceIdentifier(GATEWAY)),
    "an e-mail address of the same text": lambda authority: authority.issue_for(x509.RFC822Name(GATEWAY)),
}


@pytest.mark.parametrize("issue", _GATEWAY_S.values(), ids=_GATEWAY_S)
def test_whoever_has_the_gateway_s_name_is_the_gateway(home: Stack, authority: Authority, issue: Issue) -> None:
    assert with_cookie(home.grpc_port, authority.credentials(issue(authority)), home.person().cookie) == "OK"


@pytest.mark.parametrize("issue", _OTHERS.values(), ids=_OTHERS)
def test_whoever_has_not_is_a_caller_like_any(home: Stack, authority: Authority, issue: Issue) -> None:
    """Cookies do not count, service tokens do."""
    credentials, person = authority.credentials(issue(authority)), home.person()
    assert with_cookie(home.grpc_port, credentials, person.cookie) == "UNAUTHENTICATED NO_SESSION"
    token = home.service_token("backend")
    assert with_token(home.grpc_port, credentials, token, person.slug) == "NOT_FOUND NOT_CONNECTED"


@dataclass(frozen=True)
class Authorities:
    """The one that is trusted, and another one."""

    ours: Authority
    strange: Authority


@pytest.fixture(scope="module")
def authorities(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    return Authorities(authority, Authority(tmp_path_factory.mktemp("tls") / "strange"))


Connect = Callable[[Authorities], "grpc.ChannelCredentials | None"]
_REFUSED: dict[str, Connect] = {
    "in clear": lambda _: None,
    "no certificate": lambda of: of.ours.credentials(),
    "another authority": lambda of: of.ours.credentials(of.strange.issue(GATEWAY)),
    "self-signed": lambda of: of.ours.credentials(of.ours.issue_for(x509.DNSName(GATEWAY), self_signed=True)),
    "expired": lambda of: of.ours.credentials(of.ours.issue(GATEWAY, not_after=datetime(2020, 1, 1, tzinfo=UTC))),
    "a client that trusts another authority": lambda of: of.strange.credentials(of.ours.issue(GATEWAY)),
}


@pytest.mark.parametrize("connect", _REFUSED.values(), ids=_REFUSED)
def test_who_is_not_even_connected(home: Stack, authorities: Authorities, connect: Connect) -> None:
    assert with_cookie(home.grpc_port, connect(authorities), home.person().cookie) == "UNAVAILABLE"


def test_a_gateway_of_another_name_brings_no_cookies(home: Stack, authority: Authority) -> None:
    with gateway(home, upstream_tls(authority, authority.issue(OTHER))) as stack:
        assert reason(rest(stack, "GET", STATUS, headers=as_user(home.person()))) == (401, "NO_SESSION")
        assert reason(rest(stack, "GET", "/api/users/x", headers=home.client().headers)) == (401, "NO_API_CLIENT")


Variables = Callable[[Authorities], Mapping[str, str]]
_APART: dict[str, Variables] = {
    "no certificate": lambda of: upstream_tls(of.ours, None),
    "a gateway that trusts another authority": lambda of: upstream_tls(of.strange, of.ours.issue(GATEWAY)),
    "a gateway that wants another name": lambda of: upstream_tls(of.ours, of.ours.issue(GATEWAY), OTHER),
}


@pytest.mark.parametrize("variables", _APART.values(), ids=_APART)
def test_a_gateway_and_a_server_that_do_not_trust_each_other(
    home: Stack, authorities: Authorities, variables: Variables
) -> None:
    with gateway(home, variables(authorities), 503) as stack:
        assert reason(rest(stack, "GET", STATUS, headers=as_user(home.person()))) == (503, "UNAVAILABLE")


def test_tls_without_clients_certificates(home: Stack, authority: Authority) -> None:
    """Service tokens are safe in it; there is nothing to tell a gateway by."""
    config = home.home / "tls-alone.toml"
    mutual = ("client_ca_file", "gateway_name")
    lines = (home.home / "doorward.toml").read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith(mutual)))
    stack = replace(home, environment={**home.environment, "DOORWARD_CONFIG": str(config)})
    port, person, token = free_port(), home.person(), home.service_token("backend")
    with stack.server(port):
        assert with_token(port, authority.credentials(), token, person.slug) == "NOT_FOUND NOT_CONNECTED"
        for credentials in (authority.credentials(), authority.credentials(authority.issue(GATEWAY))):
            assert with_cookie(port, credentials, person.cookie) == "UNAUTHENTICATED NO_SESSION"
        assert with_cookie(port, None, person.cookie) == "UNAVAILABLE"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_the_docs_certificates_and_settings(
    tmp_path: Path, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> None:
    """As they stand there, but for the addresses."""
    page = (ROOT / "docs" / "tls.md").read_text()
    commands, for_server, for_gateway = re.findall(r"```(?:sh|toml)\n(.*?)```", page, re.DOTALL)[:3]
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    stack = make_stack(
        tmp_path / "home", logs, shared_provider, secrets, for_server.replace("10.0.0.5", "127.0.0.1"), **AT_ONCE
    )
    (tmp_path / "gateway.toml").write_text(for_gateway.replace("10.0.0.5:50051", f"127.0.0.1:{stack.grpc_port}"))
    for name in ("ca.pem", "server.pem", "server.key"):
        shutil.copy(tmp_path / name, stack.home)
    elsewhere = replace(stack, environment={**stack.environment, "DOORWARD_CONFIG": str(tmp_path / "gateway.toml")})
    with stack.server(), elsewhere.gateway():
        await_condition(lambda: rest(stack, "GET", "/healthz").status_code == 200, "the gateway's health")
        answer = rest(stack, "GET", STATUS, headers=as_user(stack.person()))
        assert (answer.status_code, answer.json()) == (200, {"authStatus": False})


# TLS to the public


@pytest.fixture(scope="module")
def public(home: Stack, authority: Authority) -> Iterator[tuple[Stack, ssl.SSLContext]]:
    """A gateway that speaks TLS on both sides, and what a browser trusts."""
    tls = public_tls(authority.issue("127.0.0.1")) | upstream_tls(authority, authority.issue(GATEWAY))
    stack, trust = front(home, tls), ssl.create_default_context(cafile=str(authority.ca_file))
    with stack.gateway() as process:
        assert f"gateway on https://127.0.0.1:{stack.gateway_port}" in process.output()
        await_condition(lambda: ask(stack, trust, "/healthz").status_code == 200, "the gateway's health")
        yield stack, trust


def ask(stack: Stack, trust: ssl.SSLContext, path: str, **options: Any) -> httpx.Response:
    """One request over TLS and HTTP/1.1."""
    url = f"https://127.0.0.1:{stack.gateway_port}{path}"
    return httpx.get(url, verify=trust, trust_env=False, timeout=30, **options)


def test_rest_over_tls(home: Stack, public: tuple[Stack, ssl.SSLContext]) -> None:
    stack, trust = public
    answer = ask(stack, trust, STATUS, headers=as_user(home.person()))
    assert (answer.status_code, answer.json(), answer.http_version) == (200, {"authStatus": False}, "HTTP/1.1")
    with pytest.raises(httpx.ConnectError):
        ask(stack, ssl.create_default_context(), "/healthz")
    with pytest.raises(httpx.RemoteProtocolError):
        rest(stack, "GET", "/healthz")


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(["h2", "http/1.1"], "h2"), (["http/1.1", "h2"], "h2"), (["http/1.1"], "http/1.1"), ([], None)],
    ids=["both", "both, the other way round", "HTTP/1.1", "nothing"],
)
def test_which_http_is_spoken_over_tls(
    public: tuple[Stack, ssl.SSLContext], authority: Authority, offered: list[str], chosen: str | None
) -> None:
    stack, _ = public
    trust = ssl.create_default_context(cafile=str(authority.ca_file))
    if offered:
        trust.set_alpn_protocols(offered)
    with connection(stack, trust) as tls:
        assert tls.selected_alpn_protocol() == chosen


def test_http_2_over_tls(public: tuple[Stack, ssl.SSLContext], authority: Authority) -> None:
    """A gRPC client speaks it, and is told that no gRPC is served here."""
    stack, _ = public
    with (
        grpc.secure_channel(f"127.0.0.1:{stack.gateway_port}", authority.credentials()) as channel,
        pytest.raises(grpc.RpcError) as failure,
    ):
        stubs.IntegrationServiceStub(channel).GetKaiStatus(pb.GetKaiStatusRequest(), timeout=10)
    assert read_failure(failure.value).code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("version", "spoken"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
)
# That the oldest one is old is the point.
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_which_tls_is_spoken(
    public: tuple[Stack, ssl.SSLContext], authority: Authority, version: ssl.TLSVersion, spoken: bool
) -> None:
    stack, _ = public
    trust = ssl.create_default_context(cafile=str(authority.ca_file))
    trust.set_ciphers("ALL:@SECLEVEL=0")  # else this side would not speak the old ones
    trust.minimum_version = trust.maximum_version = version
    if spoken:
        with connection(stack, trust) as tls:
            assert tls.version() == version.name.replace("_", ".")
    else:
        with pytest.raises(ssl.SSLError), connection(stack, trust):
            pass


@contextlib.contextmanager
def connection(stack: Stack, trust: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("127.0.0.1", stack.gateway_port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        yield tls


# Proxies in front


class Upstream:
    """A gRPC server that keeps what the gateway tells it of a call."""

    def __init__(self) -> None:
        self.metadata: dict[str, str | bytes] = {}
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        handler: grpc.RpcMethodHandler[bytes, pb.GetKaiStatusResponse] = grpc.unary_unary_rpc_method_handler(
            self._answer, response_serializer=pb.GetKaiStatusResponse.SerializeToString
        )
        name = pb.DESCRIPTOR.services_by_name["IntegrationService"].full_name
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"GetKaiStatus": handler}),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> "Upstream":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> pb.GetKaiStatusResponse:
        self.metadata = dict(context.invocation_metadata())
        return pb.GetKaiStatusResponse()


@contextlib.contextmanager
def behind(home: Stack, hops: str, rate_limit: str = "0") -> Iterator[tuple[Stack, Upstream]]:
    """A gateway before that server, with so many trusted proxies in front."""
    with Upstream() as upstream:
        variables = {
            "DOORWARD_GATEWAY_UPSTREAMS": f"127.0.0.1:{upstream.port}",
            "DOORWARD_GATEWAY_TRUSTED_HOPS": hops,
            "DOORWARD_GATEWAY_RATE_LIMIT": rate_limit,
        }
        with gateway(home, variables) as stack:
            yield stack, upstream


_CHAINS = {
    "nothing": [],
    "one": [("x-forwarded-for", "198.51.100.1")],
    "two": [("x-forwarded-for", "203.0.113.9, 198.51.100.1")],
    "three": [("x-forwarded-for", "192.0.2.5, 203.0.113.9, 198.51.100.1")],
    "two headers": [("x-forwarded-for", "203.0.113.9"), ("x-forwarded-for", "198.51.100.1")],
    "a private address": [("x-forwarded-for", "203.0.113.9, 10.0.0.7")],
    "IPv6": [("x-forwarded-for", "203.0.113.9, 2001:db8::1")],
    "forged directly": [("x-envoy-external-address", "203.0.113.9")],
    "no address": [("x-forwarded-for", "203.0.113.9, unknown")],
    "empty": [("x-forwarded-for", "")],
}
_SEEN = {
    "0": dict.fromkeys(_CHAINS, "127.0.0.1"),
    "1": {
        "nothing": "127.0.0.1",
        "one": "198.51.100.1",
        "two": "198.51.100.1",
        "three": "198.51.100.1",
        "two headers": "198.51.100.1",
        "a private address": "10.0.0.7",
        "IPv6": "2001:db8::1",
        "forged directly": "127.0.0.1",
        "no address": "127.0.0.1",
        "empty": "127.0.0.1",
    },
    "2": {"two": "203.0.113.9", "three": "203.0.113.9", "two headers": "203.0.113.9", "one": "127.0.0.1"},
}


@pytest.mark.parametrize("hops", _SEEN)
def test_whose_word_counts(home: Stack, hops: str) -> None:
    with behind(home, hops) as (stack, upstream):
        seen = {}
        for name in _SEEN[hops]:
            assert rest(stack, "GET", STATUS, headers=_CHAINS[name]).status_code == 200
            seen[name] = upstream.metadata.get("x-envoy-external-address")
        assert seen == _SEEN[hops]
        assert rest(stack, "GET", STATUS, headers={"x-forwarded-proto": "https"}).status_code == 200
        assert upstream.metadata["x-forwarded-proto"] == ("http" if hops == "0" else "https")


def test_each_client_of_a_trusted_proxy_has_its_own_limit(home: Stack) -> None:
    with behind(home, "1", rate_limit="1") as (stack, _):

        def ask_as(client: str, claims: str) -> int:
            return rest(stack, "GET", STATUS, headers={"x-forwarded-for": f"{claims}, {client}"}).status_code

        await_condition(lambda: ask_as("198.51.100.1", "203.0.113.9") == 429, "the limit of one client")
        assert {ask_as(f"198.51.100.{number}", "203.0.113.9") for number in range(2, 6)} == {200}
        # Whatever it says of itself.
        claims = (f"203.0.113.{number % 250}" for number in itertools.count())
        await_condition(lambda: ask_as("198.51.100.6", next(claims)) == 429, "the limit of another one")


# The bot on another machine


def test_a_bot_on_another_machine(home: Stack, authority: Authority, logs: Path) -> None:
    certificate, health_port = authority.issue("bot.doorward.test"), free_port()
    with discord_stand_in(logs / "discord-tls.log") as discord:
        environment = {
            "DISCORD_TOKEN": discord.token,
            "DISCORD_API_BASE": discord.api_base,
            "DOORWARD_BOT_TOKEN": home.service_token("bot"),
            "DOORWARD_BOT_SERVER": f"127.0.0.1:{home.grpc_port}",
            "DOORWARD_BOT_HEALTH_PORT": str(health_port),
            "DOORWARD_BOT_CA_FILE": str(authority.ca_file),
            "DOORWARD_BOT_CERT_FILE": str(certificate.cert_file),
            "DOORWARD_BOT_KEY_FILE": str(certificate.key_file),
        }
        with running([BIN / "doorward-bot"], logs / "bot-tls.log", environment) as bot:
            bot.await_output('"connected to Discord"')
            url = f"http://127.0.0.1:{health_port}/healthz"
            await_condition(lambda: httpx.get(url, trust_env=False).status_code == 200, "the bot to reach the server")
