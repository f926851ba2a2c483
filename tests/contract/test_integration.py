"""The Integration routes, row by row of their contract, through a real Envoy and a real provider."""

import base64
import concurrent.futures
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from tests.processes import await_condition
from tests.stack import Person, Stack, rest

JSON = {"content-type": "application/json"}


def path(user: str = "me", kai: str = "flo", callback: bool = False) -> str:
    return f"/api/v1/users/{user}/integrations/kai/{kai}" + ("/oauth2callback" if callback else "")


def as_user(person: Person) -> dict[str, str]:
    return {"cookie": f"doorward_session={person.cookie}"}


def post_code(stack: Stack, person: Person, code: Any, kai: str = "flo", **headers: str) -> httpx.Response:
    body = json.dumps({"code": code}).encode()
    return rest(
        stack,
        "POST",
        path(kai=kai, callback=True),
        content=body,
        headers={**as_user(person), **JSON, **headers},
    )


def get_status(stack: Stack, person: Person, kai: str = "flo") -> bool:
    answer = rest(stack, "GET", path(kai=kai), headers=as_user(person))
    assert answer.status_code == 200, answer.text
    status: bool = answer.json()["authStatus"]
    return status


def revocations(stack: Stack, token: str) -> list[dict[str, Any]]:
    """The attempts to revoke a token; earlier tests' retries may come in between."""
    return [request for request in stack.provider.requests("revoke") if request["form"]["token"] == token]


def assert_error(answer: httpx.Response, status: int, reason: str, metadata: Mapping[str, str] | None = None) -> None:
    """The answer is an error in the documented shape."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    body = answer.json()
    assert set(body) == {"code", "message", "details"}
    assert isinstance(body["code"], int)
    assert body["message"]
    detail = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": "doorward",
        "metadata": dict(metadata or {}),
    }
    assert body["details"] == [detail]
    assert answer.headers["x-request-id"]


@pytest.fixture
def person(stack: Stack) -> Person:
    return stack.person()


# Who may call

_BASIC = "Basic " + base64.b64encode(b"client:secret").decode()
ROUTES = [("GET", False), ("DELETE", False), ("POST", True)]


@pytest.mark.parametrize(("method", "callback"), ROUTES, ids=["status", "revoke", "connect"])
@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        pytest.param({}, 401, "NO_SESSION", id="no cookie"),
        pytest.param({"cookie": "doorward_session=unknown"}, 401, "NO_SESSION", id="unknown session"),
        pytest.param({"cookie": "doorward_session="}, 401, "NO_SESSION", id="empty cookie"),
        pytest.param({"cookie": "other=1; session=2"}, 401, "NO_SESSION", id="other cookies"),
        pytest.param({"authorization": "Bearer token"}, 403, "SESSION_REQUIRED", id="bearer"),
        pytest.param({"authorization": _BASIC}, 403, "SESSION_REQUIRED", id="basic"),
        pytest.param({"authorization": "Negotiate x"}, 403, "SESSION_REQUIRED", id="other scheme"),
    ],
)
def test_only_a_session_counts(
    stack: Stack, method: str, callback: bool, headers: dict[str, str], status: int, reason: str
) -> None:
    answer = rest(stack, method, path(callback=callback), headers={**headers, **JSON}, content=b'{"code":"x"}')
    assert_error(answer, status, reason)
    assert stack.provider.requests() == []


@pytest.mark.parametrize(("method", "callback"), ROUTES, ids=["status", "revoke", "connect"])
def test_other_users_are_refused_whether_they_exist_or_not(
    stack: Stack, person: Person, method: str, callback: bool
) -> None:
    other = stack.person()
    handles = [
        str(other.id),
        other.slug,
        "999999",
        "nobody",
        f"0{person.id}",
        person.slug.upper(),
        "ME",
        "%20me",
        "a%2Fb",
    ]
    bodies = set()
    for handle in handles:
        answer = rest(
            stack,
            method,
            path(handle, callback=callback),
            headers={**as_user(person), **JSON},
            content=b'{"code":"x"}',
        )
        assert_error(answer, 403, "NOT_SELF")
        bodies.add(answer.content)
    assert len(bodies) == 1
    assert stack.provider.requests() == []


def test_a_service_token_is_no_session(stack: Stack) -> None:
    token = stack.service_token("backend", "operator")
    answer = rest(stack, "GET", path("1"), headers={"authorization": f"Bearer {token}"})
    assert_error(answer, 403, "SESSION_REQUIRED")


def test_a_cookie_counts_beside_an_authorization_header(stack: Stack, person: Person) -> None:
    answer = rest(stack, "GET", path(), headers={**as_user(person), "authorization": _BASIC})
    assert (answer.status_code, answer.content) == (200, b'{"authStatus":false}')


def test_expired_and_revoked_sessions(stack: Stack, person: Person) -> None:
    [session] = stack.cli_json("session", "list", "--user", str(person.id))
    assert get_status(stack, person) is False
    assert stack.cli_json("session", "revoke", str(session["id"])) == {"id": session["id"]}
    assert_error(rest(stack, "GET", path(), headers=as_user(person)), 401, "NO_SESSION")


@pytest.mark.parametrize("handle", ["me", "id", "slug"])
def test_the_ways_to_name_oneself(stack: Stack, person: Person, handle: str) -> None:
    name = {"me": "me", "id": str(person.id), "slug": person.slug}[handle]
    answer = rest(stack, "GET", path(name), headers=as_user(person))
    assert (answer.status_code, answer.content) == (200, b'{"authStatus":false}')
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("method", "callback"), ROUTES, ids=["status", "revoke", "connect"])
@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        ("https://app.example.evil.example", False),
        ("http://app.example", False),
        ("https://app.example", True),
        ("own", True),
    ],
)
def test_pages_of_other_origins(
    stack: Stack, person: Person, method: str, callback: bool, origin: str, allowed: bool
) -> None:
    headers = {**as_user(person), **JSON, "origin": stack.url if origin == "own" else origin}
    answer = rest(stack, method, path(callback=callback), headers=headers, content=b"{}")
    if allowed:
        assert answer.status_code != 403
    else:
        assert_error(answer, 403, "ORIGIN_NOT_ALLOWED")


# The routes


def test_connect_status_revoke(stack: Stack, person: Person) -> None:
    provider = stack.provider
    assert get_status(stack, person) is False

    code = provider.code()
    answer = post_code(stack, person, code)
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert answer.headers["content-type"] == "application/json"
    answer = rest(stack, "GET", path(kai="FLO"), headers=as_user(person))
    assert (answer.status_code, answer.content) == (200, b'{"authStatus":true}')

    [request] = provider.requests()
    assert (request["method"], request["headers"]["content-type"]) == (
        "POST",
        "application/x-www-form-urlencoded",
    )
    assert request["form"] == {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": "http://127.0.0.1/app/callback",
        "client_id": "flo-client",
        "client_secret": "sandbox-secret",
    }

    [family] = provider.families()
    answer = rest(stack, "DELETE", path(), headers=as_user(person))
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert get_status(stack, person) is False
    await_condition(lambda: provider.families()[0]["revoked"], "the revocation at the provider")
    [request] = revocations(stack, family["refresh_token"])
    assert request["form"]["token_type_hint"] == "refresh_token"

    assert_error(rest(stack, "DELETE", path(), headers=as_user(person)), 409, "NOT_CONNECTED")


def test_client_secret_basic(stack: Stack, person: Person) -> None:
    assert post_code(stack, person, stack.provider.code("min"), kai="min").status_code == 200
    [request] = stack.provider.requests()
    credentials = base64.b64encode(b"min-client:sandbox-secret").decode()
    assert request["headers"]["authorization"] == f"Basic {credentials}"
    assert set(request["form"]) == {"grant_type", "code", "redirect_uri"}


@pytest.mark.parametrize("code", ["a b", "a&b=c#d", "%2F/+", "é☃😀", "'\"\\\n\t", "x" * 2000])
def test_the_code_arrives_byte_for_byte(stack: Stack, person: Person, code: str) -> None:
    unique = f"{code}{person.id}"
    stack.provider.code(literal=unique)
    assert post_code(stack, person, unique).status_code == 200
    [request] = stack.provider.requests()
    assert request["form"]["code"] == unique


def test_another_code_replaces_the_connection(stack: Stack, person: Person) -> None:
    for _ in range(2):
        assert post_code(stack, person, stack.provider.code()).status_code == 200
    count = stack.app.database.fetch_one("SELECT count(*) FROM connections WHERE user_id = ?", (person.id,))
    assert count == (1,)
    assert get_status(stack, person) is True
    newest = max(stack.provider.families(), key=lambda family: int(family["family"]))
    assert stack.app.integrations.access_token(str(person.id), "flo").value == newest["access_token"]


def test_answers_without_refresh_token_and_expiry(stack: Stack, person: Person) -> None:
    stack.provider.configure(expires_in=None, issue_refresh_token=False)
    assert post_code(stack, person, stack.provider.code()).status_code == 200
    assert get_status(stack, person) is True
    [family] = stack.provider.families()
    token = stack.app.integrations.access_token(person.slug, "flo")
    assert (token.value, token.expires_at) == (family["access_token"], None)


@pytest.mark.parametrize(("method", "callback"), ROUTES, ids=["status", "revoke", "connect"])
@pytest.mark.parametrize("kai", ["foo", "flo2", "fl%C3%B6", "%20flo"])
def test_unknown_kai_types(stack: Stack, person: Person, method: str, callback: bool, kai: str) -> None:
    answer = rest(
        stack,
        method,
        path(kai=kai, callback=callback),
        headers={**as_user(person), **JSON},
        content=b'{"code":"x"}',
    )
    assert_error(answer, 400, "UNKNOWN_KAI_TYPE")
    assert all(name in answer.json()["message"] for name in ("flo", "min", "eag"))


def test_a_kind_that_is_not_configured(stack: Stack, person: Person) -> None:
    assert_error(post_code(stack, person, "x", kai="eag"), 400, "PROVIDER_NOT_CONFIGURED")
    assert get_status(stack, person, kai="eag") is False
    assert_error(rest(stack, "DELETE", path(kai="eag"), headers=as_user(person)), 409, "NOT_CONNECTED")


def test_after_the_provider_refused_the_refresh_token(stack: Stack, person: Person) -> None:
    stack.provider.configure(expires_in=0)
    assert post_code(stack, person, stack.provider.code()).status_code == 200
    stack.provider.fault("token", "status", status=400, body='{"error":"invalid_grant"}')
    with pytest.raises(Exception, match="connect again"):
        stack.app.integrations.access_token(person.slug, "flo")
    assert get_status(stack, person) is False
    answer = rest(stack, "DELETE", path(), headers=as_user(person))
    assert (answer.status_code, answer.content) == (200, b"{}")


# Codes


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        "",
        '{"code":null}',
        '{"code":""}',
        '{"code":1}',
        '{"code":true}',
        '{"code":["x"]}',
        '{"code":{"a":"b"}}',
        '{"kode":"x"}',
    ],
)
def test_a_code_is_required(stack: Stack, person: Person, body: str) -> None:
    answer = rest(stack, "POST", path(callback=True), headers={**as_user(person), **JSON}, content=body.encode())
    assert_error(answer, 400, "CODE_REQUIRED")
    assert stack.provider.requests() == []


@pytest.mark.parametrize(
    "body",
    [
        b"{bad",
        b"[]",
        b'"x"',
        b"null",
        b'{"code":"a"} trailing',
        b'{"code":"\xff\xfe"}',
        b'{"code":"\\ud800"}',
        b'{"code":"a\\u0000b"}',
        b'{"code":1e999}',
        b'{"code":' + b"[" * 5000,
    ],
    ids=[
        "syntax",
        "array",
        "string",
        "null",
        "trailing",
        "not utf-8",
        "surrogate",
        "nul",
        "overflow",
        "deep",
    ],
)
def test_malformed_bodies(stack: Stack, person: Person, body: bytes) -> None:
    answer = rest(stack, "POST", path(callback=True), headers={**as_user(person), **JSON}, content=body)
    assert_error(answer, 400, "MALFORMED_REQUEST")
    assert stack.provider.requests() == []


def failure(name: str, told: int, reason: str, error: str | None = None, kind: str = "status", **fault: Any) -> Any:
    """A row: what the token endpoint does, and what the caller is told."""
    return pytest.param({"kind": kind, **fault}, told, reason, {"error": error} if error else {}, id=name)


@pytest.mark.parametrize(
    ("fault", "status", "reason", "metadata"),
    [
        failure("oauth error", 400, "CODE_REJECTED", "invalid_grant", body='{"error":"invalid_grant"}', status=400),
        failure("401", 400, "CODE_REJECTED", "invalid_client", body='{"error":"invalid_client"}', status=401),
        failure("no oauth error", 400, "CODE_REJECTED", body="nothing here", status=404),
        failure("unprintable error", 400, "CODE_REJECTED", body='{"error":"\\u0000\\n"}', status=400),
        failure("429", 400, "CODE_REJECTED", body="{}", status=429),
        failure("500", 503, "PROVIDER_UNAVAILABLE", status=500),
        failure("503", 503, "PROVIDER_UNAVAILABLE", body='{"error":"x"}', status=503),
        failure("cut connection", 503, "PROVIDER_UNAVAILABLE", kind="cut"),
        failure("cut body", 503, "PROVIDER_UNAVAILABLE", kind="cut_body"),
        failure("not http", 503, "PROVIDER_UNAVAILABLE", kind="not_http"),
        failure("hang", 504, "PROVIDER_TIMEOUT", kind="hang"),
        failure("trickling headers", 504, "PROVIDER_TIMEOUT", kind="trickle_headers"),
        failure("trickling body", 504, "PROVIDER_TIMEOUT", kind="trickle_body"),
        failure("garbage", 503, "PROVIDER_MALFORMED", kind="garbage"),
        failure("array", 503, "PROVIDER_MALFORMED", kind="not_object"),
        failure("no access token", 503, "PROVIDER_MALFORMED", kind="no_access_token"),
        failure("token is a number", 503, "PROVIDER_MALFORMED", kind="token_not_string"),
        failure("empty token", 503, "PROVIDER_MALFORMED", body='{"access_token":""}', status=200),
        failure("surrogate in token", 503, "PROVIDER_MALFORMED", body='{"access_token":"\\ud800"}', status=200),
        failure("nested brackets", 503, "PROVIDER_MALFORMED", kind="nested"),
        failure("over 1 MiB", 503, "PROVIDER_MALFORMED", kind="huge"),
        failure("gzip bomb", 503, "PROVIDER_MALFORMED", kind="gzip_bomb"),
        failure("redirect", 503, "PROVIDER_MALFORMED", kind="redirect"),
    ],
)
def test_provider_failures(
    stack: Stack, person: Person, fault: dict[str, Any], status: int, reason: str, metadata: dict[str, str]
) -> None:
    provider = stack.provider
    assert post_code(stack, person, provider.code()).status_code == 200
    before = stack.app.integrations.access_token(person.slug, "flo")
    provider.fault("token", **fault)
    code = provider.code()
    assert_error(post_code(stack, person, code), status, reason, metadata)
    assert provider.requests("elsewhere") == []
    # The old connection stays as it was.
    assert get_status(stack, person) is True
    assert stack.app.integrations.access_token(person.slug, "flo") == before
    # The code was sent once, and is not sent again, for the provider may have taken it.
    provider.heal()
    sent = len(provider.requests())
    again = post_code(stack, person, code)
    if reason == "CODE_REJECTED":
        assert_error(again, 400, "CODE_REJECTED", metadata)
    else:
        assert_error(again, 409, "CODE_ALREADY_USED")
    assert len(provider.requests()) == sent


def test_a_used_code_again(stack: Stack, person: Person) -> None:
    code = stack.provider.code()
    assert post_code(stack, person, code).status_code == 200
    assert post_code(stack, person, code).status_code == 200  # a client's retry
    assert_error(post_code(stack, stack.person(), code), 409, "CODE_ALREADY_USED")
    assert rest(stack, "DELETE", path(), headers=as_user(person)).status_code == 200
    assert_error(post_code(stack, person, code), 409, "CODE_ALREADY_USED")
    assert len(stack.provider.requests()) == 1


def test_racing_requests_exchange_a_code_once(stack: Stack, person: Person) -> None:
    stack.provider.configure(latency=0.2)
    code = stack.provider.code()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post_code(stack, person, code), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(stack.provider.requests()) == 1
    assert get_status(stack, person) is True


def test_racing_codes_leave_one_consistent_pair(stack: Stack, person: Person) -> None:
    codes = [stack.provider.code() for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda code: post_code(stack, person, code), codes))
    assert {answer.status_code for answer in answers} == {200}
    stack.provider.configure(expires_in=3600)
    pairs = {family["access_token"]: family["refresh_token"] for family in stack.provider.families()}
    token = stack.app.integrations.access_token(person.slug, "flo").value
    assert token in pairs
    assert rest(stack, "DELETE", path(), headers=as_user(person)).status_code == 200
    await_condition(lambda: len(revocations(stack, pairs[token])) == 1, "the revocation of that pair")


# Revocation at the provider


@pytest.mark.parametrize("kind", ["hang", "cut", "garbage"])
def test_a_failing_revocation_neither_delays_nor_fails_the_answer(stack: Stack, person: Person, kind: str) -> None:
    assert post_code(stack, person, stack.provider.code()).status_code == 200
    stack.provider.fault("revoke", kind)
    answer = rest(stack, "DELETE", path(), headers=as_user(person))
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert answer.elapsed.total_seconds() < 0.7  # less than the provider's timeout
    token = stack.provider.families()[-1]["refresh_token"]
    await_condition(lambda: len(revocations(stack, token)) >= 1, "an attempt")


def test_a_failed_revocation_is_tried_again(stack: Stack, person: Person) -> None:
    assert post_code(stack, person, stack.provider.code()).status_code == 200
    # Earlier tests' revocations would take the faults for theirs.
    waiting = "SELECT count(*) FROM jobs WHERE kind = 'revoke-token' AND run_at IS NOT NULL"
    await_condition(lambda: stack.app.database.fetch_one(waiting, ()) == (0,), "the end of earlier revocations")
    stack.provider.fault("revoke", "status", status=503, times=2)
    assert rest(stack, "DELETE", path(), headers=as_user(person)).status_code == 200
    await_condition(lambda: stack.provider.families()[-1]["revoked"], "the third attempt")
    assert len(revocations(stack, stack.provider.families()[-1]["refresh_token"])) == 3
