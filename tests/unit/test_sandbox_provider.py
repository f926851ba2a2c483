"""The stand-in provider as its clients meet it: a real process, asked over real sockets."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

ROOT = Path(__file__).parents[2]
REDIRECT_URI = "http://127.0.0.1:9100/app/callback"
CREDENTIALS = {"client_id": "flo-client", "client_secret": "sandbox-secret"}
CONSENT = {"client_id": "flo-client", "redirect_uri": REDIRECT_URI, "state": "a&b"}


@dataclass(frozen=True)
class Provider:
    """A running provider and one client of it."""

    process: subprocess.Popen[str]
    url: str
    client: httpx.Client
    log: Path

    def code(self, **order: str) -> str:
        order = {"client_id": "flo-client", "redirect_uri": REDIRECT_URI, "user": "ada"} | order
        code: str = self.client.post("/_sandbox/codes", json=order).json()["code"]
        return code

    def redeem(self, code: str, /, **form: str | list[str]) -> httpx.Response:
        grant = {"grant_type": "authorization_code", "code": code, "redirect_uri": REDIRECT_URI}
        return self.client.post("/token", data=CREDENTIALS | grant | form)

    def tokens(self) -> dict[str, Any]:
        tokens: dict[str, Any] = self.redeem(self.code()).json()
        return tokens

    def refresh(self, refresh_token: str, timeout: float = 10) -> httpx.Response:
        grant = {"grant_type": "refresh_token", "refresh_token": refresh_token}
        return self.client.post("/token", data=CREDENTIALS | grant, timeout=timeout)

    def lookup(self, access_token: str) -> httpx.Response:
        return self.client.get("/lookup", params={"access_token": access_token})

    def configure(self, **settings: object) -> None:
        assert self.client.put("/_sandbox/settings", json=settings).status_code == 200

    def fail(self, endpoint: str, kind: str, **options: object) -> None:
        fault = {"kind": kind, **options}
        assert self.client.put(f"/_sandbox/faults/{endpoint}", json=fault).status_code == 204

    def requests(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = self.client.get("/_sandbox/requests").json()
        return calls

    def families(self) -> list[dict[str, Any]]:
        families: list[dict[str, Any]] = self.client.get("/_sandbox/families").json()
        return families

    @contextmanager
    def post_raw(self, path: str) -> Iterator[socket.socket]:
        """A connection over which a request went out and nothing was read yet."""
        address = urlsplit(self.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            yield connection


@contextmanager
def running(log: Path, *options: str) -> Iterator[Provider]:
    command = [sys.executable, "-m", "tests.sandbox.provider", "--port", "0", *options]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().rpartition(" ")[2].strip()
            with httpx.Client(base_url=url, verify=False, trust_env=False) as client:
                yield Provider(process, url, client, log)
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    with running(tmp_path_factory.mktemp("sandbox") / "log") as provider:
        yield provider


@pytest.fixture
def provider(shared_provider: Provider) -> Provider:
    assert shared_provider.client.post("/_sandbox/reset").status_code == 204
    return shared_provider


# Consent


def test_consent_page_escapes_what_it_repeats(provider: Provider) -> None:
    parameters = CONSENT | {"response_type": "code", "state": '"><b>', "scope": "<i> read"}
    page = provider.client.get("/authorize", params=parameters)
    assert page.status_code == 200
    assert '"><b>' not in page.text
    assert 'value="&quot;&gt;&lt;b&gt;"' in page.text
    assert "<code>&lt;i&gt;</code>" in page.text
    assert 'value="ada"' in page.text


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"client_id": "nobody"}, id="unknown-client"),
        pytest.param({"redirect_uri": ""}, id="no-redirect-uri"),
        pytest.param({"redirect_uri": "http://example.com/"}, id="foreign-host"),
        pytest.param({"redirect_uri": "http://127.0.0.1.example.com/"}, id="lookalike-host"),
        pytest.param({"redirect_uri": "javascript://127.0.0.1/%0aalert(1)"}, id="other-scheme"),
        pytest.param({"redirect_uri": "http://127.0.0.1/#here"}, id="fragment"),
        pytest.param({"redirect_uri": "http://127.0.0.1/\r\nX: y"}, id="line-break"),
        pytest.param({"redirect_uri": "http://[::1/"}, id="malformed"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_dubious_requests_get_a_page_and_no_redirect(provider: Provider, method: str, wrong: dict[str, str]) -> None:
    parameters = CONSENT | {"response_type": "code", "decision": "allow"} | wrong
    carrier: dict[str, Any] = {"params" if method == "GET" else "data": parameters}
    answer = provider.client.request(method, "/authorize", **carrier)
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("decision", "answer"),
    [
        pytest.param({"decision": "allow"}, "code", id="allow"),
        pytest.param({"decision": "deny"}, "error", id="deny"),
        pytest.param({}, "error", id="neither"),
    ],
)
def test_decision_goes_back_to_the_application(provider: Provider, decision: dict[str, str], answer: str) -> None:
    redirect_uri = "http://localhost:1234/back?kept=1"
    form = CONSENT | decision | {"redirect_uri": redirect_uri}
    redirect = provider.client.post("/authorize", data=form)
    assert redirect.status_code == 303
    location = redirect.headers["location"]
    assert location.startswith(redirect_uri)
    assert parse_qs(urlsplit(location).query).keys() == {"kept", "state", answer}
    assert parse_qs(urlsplit(location).query)["state"] == ["a&b"]


def test_other_response_types_are_refused_by_redirect(provider: Provider) -> None:
    redirect = provider.client.get("/authorize", params=CONSENT | {"response_type": "token"})
    assert "error=unsupported_response_type" in redirect.headers["location"]


def test_callback_gives_scripts_the_bare_code(provider: Provider) -> None:
    redirect_uri = f"{provider.url}/app/callback"
    form = CONSENT | {"decision": "allow", "user": "grace", "redirect_uri": redirect_uri}
    callback = provider.client.post("/authorize", data=form, follow_redirects=True)
    assert callback.headers["content-type"] == "text/plain; charset=utf-8"
    code = callback.text.removesuffix("\n")
    tokens = provider.redeem(code, redirect_uri=redirect_uri).json()
    assert provider.lookup(tokens["access_token"]).json()["id"] == "grace"


def test_callback_gives_people_a_command(provider: Provider) -> None:
    page = provider.client.get("/app/callback", params={"code": "it's<b>"}, headers={"Accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert "it's<b>" not in page.text
    assert "integrations/kai/flo/oauth2callback" in page.text


@pytest.mark.parametrize(
    ("query", "text"),
    [
        pytest.param("error=access_denied", "access_denied\n", id="denied"),
        pytest.param("", "there is no code in this address\n", id="bare"),
    ],
)
def test_callback_without_a_code(provider: Provider, query: str, text: str) -> None:
    answer = provider.client.get(f"/app/callback?{query}")
    assert (answer.status_code, answer.text) == (400, text)


# Tokens


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"method": "POST", "auth": ("flo-client", "sandbox%2Dsecret")}, id="basic"),
        pytest.param({"method": "POST", "data": CREDENTIALS}, id="post"),
        pytest.param({"method": "GET", "params": CREDENTIALS}, id="get"),
        pytest.param({"method": "GET", "auth": ("flo-client", "sandbox-secret")}, id="get-basic"),
    ],
)
def test_code_buys_tokens(provider: Provider, way: dict[str, Any]) -> None:
    carrier = "params" if way["method"] == "GET" else "data"
    grant = {"grant_type": "authorization_code", "redirect_uri": REDIRECT_URI}
    parameters = way.get(carrier, {}) | grant | {"code": provider.code(scope="read")}
    answer = provider.client.request(url="/token", **(way | {carrier: parameters}))
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    tokens = answer.json()
    assert tokens.keys() == {
        "access_token",
        "token_type",
        "expires_in",
        "refresh_token",
        "scope",
    }
    by_query = provider.lookup(tokens["access_token"])
    bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert by_query.json() == provider.client.get("/lookup", headers=bearer).json()
    assert (by_query.json()["id"], type(by_query.json()["profile"]["id"])) == ("ada", int)


@pytest.mark.parametrize("client_id", ["flo-client", "min-client", "eag-client", "sandbox-client"])
def test_every_application_links_accounts(provider: Provider, client_id: str) -> None:
    code = provider.code(client_id=client_id, user="grace")
    answer = provider.redeem(code, client_id=client_id)
    assert answer.status_code == 200
    assert provider.lookup(answer.json()["access_token"]).json()["id"] == "grace"
    assert [family["client_id"] for family in provider.families()] == [client_id]


@pytest.mark.parametrize(
    ("change", "status", "error"),
    [
        pytest.param({"client_secret": "wrong"}, 401, "invalid_client", id="wrong-secret"),
        pytest.param({"client_secret": "gehéim"}, 401, "invalid_client", id="unicode-secret"),
        pytest.param({"client_id": "nobody"}, 401, "invalid_client", id="unknown-client"),
        pytest.param({"client_id": "min-client"}, 400, "invalid_grant", id="other-client"),
        pytest.param({"client_id": "sandbox-client"}, 400, "invalid_grant", id="log-in-client"),
        pytest.param({"redirect_uri": "http://127.0.0.1/"}, 400, "invalid_grant", id="other-uri"),
        pytest.param({"code": "guess"}, 400, "invalid_grant", id="unknown-code"),
        pytest.param({"code": ""}, 400, "invalid_request", id="no-code"),
        pytest.param({"code": ["one", "two"]}, 400, "invalid_request", id="two-codes"),
        pytest.param({"grant_type": ""}, 400, "invalid_request", id="no-grant-type"),
        pytest.param({"grant_type": "password"}, 400, "unsupported_grant_type", id="password"),
    ],
)
def test_token_refusals(provider: Provider, change: dict[str, Any], status: int, error: str) -> None:
    answer = provider.redeem(provider.code(), **change)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert provider.requests()[-1]["outcome"] == error
    assert provider.families() == []


@pytest.mark.parametrize(
    ("authorization", "form", "status", "error"),
    [
        pytest.param("Basic ///", {}, 401, "invalid_client", id="malformed"),
        pytest.param("Basic Zmxv", {}, 401, "invalid_client", id="no-colon"),
        pytest.param("Basic Zmxv", CREDENTIALS, 400, "invalid_request", id="two-ways-at-once"),
    ],
)
def test_basic_refusals(provider: Provider, authorization: str, form: dict[str, str], status: int, error: str) -> None:
    headers = {"Authorization": authorization}
    answer = provider.client.post("/token", data=form, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (status, error)


def test_reused_code_ends_its_family(provider: Provider) -> None:
    code = provider.code()
    tokens = provider.redeem(code).json()
    again = provider.redeem(code)
    assert (again.status_code, again.json()["error"]) == (400, "invalid_grant")
    assert provider.lookup(tokens["access_token"]).status_code == 401
    assert provider.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"


def test_refresh_rotates(provider: Provider) -> None:
    first = provider.tokens()
    second = provider.refresh(first["refresh_token"]).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert provider.lookup(second["access_token"]).status_code == 200
    [family] = provider.families()
    assert family == {
        "family": 1,
        "client_id": "flo-client",
        "user": "ada",
        "refreshes": 1,
        "revoked": False,
        "reused": False,
        "access_token": second["access_token"],
        "refresh_token": second["refresh_token"],
    }


def test_reused_refresh_token_ends_its_family_only(provider: Provider) -> None:
    first, bystander = provider.tokens(), provider.tokens()
    second = provider.refresh(first["refresh_token"]).json()
    reuse = provider.refresh(first["refresh_token"])
    assert (reuse.status_code, reuse.json()["error"]) == (400, "invalid_grant")
    assert provider.refresh(second["refresh_token"]).status_code == 400
    assert provider.lookup(second["access_token"]).status_code == 401
    assert provider.lookup(bystander["access_token"]).status_code == 200
    assert [(f["revoked"], f["reused"]) for f in provider.families()] == [
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
def test_revocation_ends_the_family(provider: Provider, kind: str) -> None:
    tokens = provider.tokens()
    answer = provider.client.post("/revoke", data=CREDENTIALS | {"token": tokens[kind]})
    assert answer.status_code == 200
    assert provider.lookup(tokens["access_token"]).status_code == 401
    assert provider.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"
    assert [(f["revoked"], f["reused"]) for f in provider.families()] == [(True, False)]


@pytest.mark.parametrize(
    ("form", "status"),
    [
        pytest.param(CREDENTIALS | {"token": "unknown"}, 200, id="unknown-token"),
        pytest.param(CREDENTIALS, 400, id="no-token"),
        pytest.param({"token": "unknown"}, 401, id="no-client"),
    ],
)
def test_revocation_answers(provider: Provider, form: dict[str, str], status: int) -> None:
    assert provider.client.post("/revoke", data=form).status_code == status


def test_revocation_is_for_the_own_client(provider: Provider) -> None:
    tokens = provider.tokens()
    form = CREDENTIALS | {"client_id": "min-client", "token": tokens["access_token"]}
    assert provider.client.post("/revoke", data=form).status_code == 400
    assert provider.lookup(tokens["access_token"]).status_code == 200


# Control plane


def test_settings_shape_the_answers(provider: Provider) -> None:
    provider.configure(expires_in=None, issue_refresh_token=False)
    assert provider.tokens().keys() == {"access_token", "token_type"}
    provider.configure(expires_in=0)
    expired = provider.tokens()
    assert expired["expires_in"] == 0
    assert provider.lookup(expired["access_token"]).status_code == 401


def test_without_rotation_a_refresh_token_stays(provider: Provider) -> None:
    provider.configure(rotate=False)
    tokens = provider.tokens()
    for _ in range(2):
        assert "refresh_token" not in provider.refresh(tokens["refresh_token"]).json()
    assert provider.families()[0]["refreshes"] == 2


def test_latency_follows_the_effect(provider: Provider) -> None:
    tokens = provider.tokens()
    provider.configure(latency=3600)
    with pytest.raises(httpx.ReadTimeout):
        provider.refresh(tokens["refresh_token"], timeout=0.2)
    assert provider.families()[0]["refreshes"] == 1


@pytest.mark.parametrize("code", ["4/0A+b%2B c&=", "קוד 🔑", "x" * 5000], ids=["odd", "wide", "long"])
def test_literal_codes_and_the_journal(provider: Provider, code: str) -> None:
    assert provider.code(code=code) == code
    assert provider.redeem(code, extra="").status_code == 200
    [call] = provider.requests()
    assert (call["endpoint"], call["method"], call["outcome"]) == ("token", "POST", 200)
    assert (call["form"]["code"], call["form"]["extra"]) == (code, "")
    assert call["headers"]["content-type"] == "application/x-www-form-urlencoded"
    assert parse_qs(call["body"])["code"] == [code]


def test_journal_can_be_cleared(provider: Provider) -> None:
    provider.client.get("/lookup", params=[("a", "1"), ("a", "2")])
    assert provider.requests()[0]["query"] == {"a": "1"}
    provider.client.delete("/_sandbox/requests")
    assert provider.requests() == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        pytest.param("PUT", "settings", {"expires_in": "1"}, id="type"),
        pytest.param("PUT", "settings", {"lifetime": 1}, id="unknown-setting"),
        pytest.param("PUT", "settings", [], id="no-object"),
        pytest.param("PUT", "faults/token", {"kind": "boredom"}, id="unknown-kind"),
        pytest.param("PUT", "faults/token", {"kind": "hang", "times": 0}, id="no-times"),
        pytest.param("PUT", "faults/authorize", {"kind": "hang"}, id="other-endpoint"),
        pytest.param("POST", "codes", {"client_id": "x", "redirect_uri": "y"}, id="client"),
    ],
)
def test_control_plane_refuses_nonsense(provider: Provider, method: str, path: str, body: object) -> None:
    assert provider.client.request(method, f"/_sandbox/{path}", json=body).status_code == 400


# Faults


def _is_not_json(response: httpx.Response) -> bool:
    try:
        json.loads(response.content)
    except (ValueError, RecursionError):
        return True
    return False


@pytest.mark.parametrize(
    ("fault", "holds"),
    [
        pytest.param({"kind": "status"}, lambda r: r.status_code == 500, id="status"),
        pytest.param(
            {"kind": "status", "status": 429, "body": "é", "content_type": "text/x"}
            | {"headers": {"Retry-After": "7"}},
            lambda r: (
                (r.status_code, r.content, r.headers["content-type"], r.headers["retry-after"])
                == (429, "é".encode(), "text/x", "7")
            ),
            id="status-in-full",
        ),
        pytest.param({"kind": "garbage"}, _is_not_json, id="garbage"),
        pytest.param({"kind": "not_object"}, lambda r: isinstance(r.json(), list), id="not_object"),
        pytest.param({"kind": "no_access_token"}, lambda r: r.json() == {}, id="no_access_token"),
        pytest.param(
            {"kind": "token_not_string"},
            lambda r: isinstance(r.json()["access_token"], int),
            id="token_not_string",
        ),
        pytest.param({"kind": "huge"}, lambda r: len(r.json()["access_token"]) == 10 << 20, id="huge"),
        pytest.param(
            {"kind": "gzip_bomb"},
            lambda r: int(r.headers["content-length"]) < 1 << 20 and len(r.json()["access_token"]) == 100 << 20,
            id="gzip_bomb",
        ),
        pytest.param({"kind": "nested"}, _is_not_json, id="nested"),
        pytest.param(
            {"kind": "redirect"},
            lambda r: (r.status_code, r.headers["location"]) == (302, "/elsewhere"),
            id="redirect",
        ),
    ],
)
@pytest.mark.parametrize(("endpoint", "method"), [("token", "POST"), ("revoke", "POST"), ("lookup", "GET")])
def test_faulty_answers(
    provider: Provider,
    endpoint: str,
    method: str,
    fault: dict[str, Any],
    holds: Callable[[httpx.Response], bool],
) -> None:
    provider.fail(endpoint, **fault, times=1)
    assert holds(provider.client.request(method, f"/{endpoint}"))
    assert provider.client.request(method, f"/{endpoint}").status_code == 401
    assert provider.requests()[0]["outcome"] == fault["kind"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        pytest.param("cut", httpx.ReadError, id="cut"),
        pytest.param("cut_body", httpx.RemoteProtocolError, id="cut_body"),
        pytest.param("not_http", httpx.RemoteProtocolError, id="not_http"),
        pytest.param("hang", httpx.ReadTimeout, id="hang"),
        pytest.param("trickle_headers", httpx.ReadTimeout, id="trickle_headers"),
        pytest.param("trickle_body", httpx.ReadTimeout, id="trickle_body"),
    ],
)
def test_faulty_connections(provider: Provider, kind: str, error: type[Exception]) -> None:
    provider.fail("token", kind)
    with pytest.raises(error):
        provider.client.post("/token", timeout=0.1)


def test_cut_resets_the_connection(provider: Provider) -> None:
    provider.fail("token", "cut")
    with provider.post_raw("/token") as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        pytest.param("trickle_headers", rb"HTTP", id="headers"),
        pytest.param("trickle_body", rb"HTTP/1\.1 200 .*\r\n\r\n1\r\n \r\n1\r\n \r\n", id="body"),
    ],
)
def test_trickles_come_byte_by_byte(provider: Provider, kind: str, start: bytes) -> None:
    provider.fail("token", kind)
    received = b""
    with provider.post_raw("/token") as connection:
        while not re.match(start, received, re.DOTALL):
            chunk = connection.recv(1000)
            assert chunk
            received += chunk


@pytest.mark.parametrize("kind", ["hang", "trickle_headers", "trickle_body"])
def test_endless_faults_block_nobody_and_end_with_their_client(provider: Provider, kind: str) -> None:
    provider.fail("token", kind)
    line = f"POST /token {kind}"
    ended_before = provider.log.read_text().count(line)
    with provider.post_raw("/token"):
        wait_until(lambda: [call["outcome"] for call in provider.requests()] == [kind])
        assert provider.client.get("/healthz").text == "ok"
        assert provider.log.read_text().count(line) == ended_before
    wait_until(lambda: provider.log.read_text().count(line) == ended_before + 1)


@pytest.mark.parametrize(("phase", "refreshes"), [("before", 0), ("after", 1)])
def test_phase_decides_whether_the_grant_is_processed(provider: Provider, phase: str, refreshes: int) -> None:
    tokens = provider.tokens()
    provider.fail("token", "status", phase=phase, status=503)
    assert provider.refresh(tokens["refresh_token"]).status_code == 503
    assert provider.families()[0]["refreshes"] == refreshes


def test_faults_last_until_cleared(provider: Provider) -> None:
    provider.fail("lookup", "status", status=502, times=None)
    assert {provider.lookup("x").status_code for _ in range(3)} == {502}
    provider.client.delete("/_sandbox/faults")
    assert provider.lookup("x").status_code == 401


def test_following_the_redirect_shows_in_the_journal(provider: Provider) -> None:
    provider.fail("token", "redirect")
    provider.client.post("/token", follow_redirects=True)
    assert [call["endpoint"] for call in provider.requests()] == ["token", "elsewhere"]


# The process


def test_many_clients_at_once(provider: Provider) -> None:
    refresh_tokens = [provider.tokens()["refresh_token"] for _ in range(64)]

    def refresh_often(refresh_token: str) -> None:
        with httpx.Client(base_url=provider.url, trust_env=False, verify=False) as client:
            for _ in range(10):
                form = CREDENTIALS | {"grant_type": "refresh_token", "refresh_token": refresh_token}
                refresh_token = client.post("/token", data=form).json()["refresh_token"]

    with ThreadPoolExecutor(64) as clients:
        list(clients.map(refresh_often, refresh_tokens))
    assert {family["refreshes"] for family in provider.families()} == {10}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stops_cleanly_under_hanging_requests(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path / "log") as provider:
        provider.fail("token", "hang")
        with provider.post_raw("/token"):
            wait_until(lambda: len(provider.requests()) == 1)
            provider.process.send_signal(number)
            assert provider.process.wait(timeout=10) == 0
    assert "Traceback" not in provider.log.read_text()


def test_port_in_use_is_one_line(provider: Provider) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.sandbox.provider"],
        cwd=ROOT,
        env=os.environ | {"DOORWARD_SANDBOX_PORT": str(urlsplit(provider.url).port)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr.count("\n") == 1
    assert "address already in use" in outcome.stderr


def test_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    options = ("--tls", "--tls-name", "localhost", "--ca-out", str(ca))
    with running(tmp_path / "log", *options) as provider:
        assert provider.url.startswith("https://127.0.0.1:")
        port = urlsplit(provider.url).port
        trusted = ssl.create_default_context(cafile=ca)
        answer = httpx.get(f"https://localhost:{port}/healthz", verify=trusted, trust_env=False)
        assert answer.text == "ok"
        provider.fail("token", "cut")
        with pytest.raises(httpx.TransportError):
            provider.client.post("/token")


def test_log_keeps_secrets(provider: Provider) -> None:
    tokens = provider.redeem(provider.code(code="code-to-keep")).json()
    provider.lookup(tokens["access_token"])
    provider.client.get("/app/callback", params={"code": "code-to-keep"})
    provider.client.get("/nowhere/code-to-keep")
    with provider.post_raw("/token?code-to-keep\x00") as connection:
        assert connection.recv(1000)
    log = provider.log.read_text()
    assert "GET /lookup 200" in log
    secrets = tokens["access_token"], tokens["refresh_token"], "code-to-keep", "sandbox-secret"
    assert [secret for secret in secrets if secret in log] == []
    assert "?" not in log
