"""Logging in and out: cookies, origins, whose users, and how often one may fail. Through a real Envoy."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.contract.test_identity import AWAY, WRONG, Credentials, failure, identity, lookups, read_user, without_id
from tests.contract.test_integration import as_user, assert_error
from tests.processes import free_port
from tests.stack import Client, Person, Stack, basic, rest

LOG_IN = "/api/auth/login-o-auth"
SESSION, SESSIONS = "/api/auth/session", "/api/auth/sessions"
STATUS = "/api/v1/users/me/integrations/kai/flo"
PUBLIC_URL = "https://door.example"
ATTRIBUTES = {"HttpOnly", "Path=/", "SameSite=Lax", "Max-Age=31536000"}
Headers = dict[str, str]
Body = dict[str, Any]


def log_in(stack: Stack, headers: Headers | None = None, **body: Any) -> httpx.Response:
    return rest(stack, "POST", LOG_IN, headers=headers, json={"provider": "sandbox", **body})


def read_cookie(answer: httpx.Response) -> tuple[str, set[str]]:
    """Value and attributes of the one cookie that an answer sets, which is ours."""
    [header] = answer.headers.get_list("set-cookie")
    pair, *attributes = header.split("; ")
    name, _, value = pair.partition("=")
    assert name == "doorward_session"
    assert len(attributes) == len(set(attributes))
    return value, set(attributes)


def log_in_as(stack: Stack, account: str, headers: Headers | None = None) -> str:
    """Log in with a code; the session's cookie."""
    answer = log_in(stack, headers, code=stack.provider.code("sandbox", account))
    read_user(answer)
    cookie, _ = read_cookie(answer)
    stack.secrets.add(cookie)
    return cookie


def with_cookie(value: str) -> Headers:
    return {"cookie": f"doorward_session={value}"}


def is_live(stack: Stack, cookie: str) -> bool:
    """Whether a cookie is accepted."""
    answer = rest(stack, "GET", STATUS, headers=with_cookie(cookie))
    if answer.status_code == 200:
        return True
    assert_error(answer, 401, "NO_SESSION")
    return False


def member_of(stack: Stack, client: Client) -> Person:
    """A client's user with an identity; its account is named like its slug."""
    person = stack.person(client)
    proof = {"provider": "sandbox", "accessToken": stack.provider.access_token(person.slug)}
    target = f"/api/users/{person.id}/o-auth-identities"
    assert rest(stack, "POST", target, headers=client.headers, json=proof).status_code == 200
    return person


@pytest.fixture(scope="module")
def client(shared_stack: Stack) -> Client:
    return shared_stack.client()


@pytest.fixture(scope="module")
def other_client(shared_stack: Stack) -> Client:
    return shared_stack.client()


@pytest.fixture
def member(stack: Stack, client: Client) -> Person:
    return member_of(stack, client)


# Logging in


def test_log_in_with_a_code(stack: Stack, client: Client, member: Person) -> None:
    code = stack.provider.code("sandbox", member.slug)
    before, looked_up = len(stack.provider.requests()), len(lookups(stack))
    answer = log_in(stack, code=code)
    user = read_user(answer)
    assert user == read_user(rest(stack, "GET", f"/api/users/{member.id}", headers=client.headers))
    assert (user["_id"], user["oAuthIdentities"]) == (str(member.id), [identity(member.slug)])
    cookie, attributes = read_cookie(answer)
    stack.secrets.add(cookie)
    assert re.fullmatch(r"[\w-]{43}", cookie)  # 256 bits
    assert attributes == ATTRIBUTES
    assert is_live(stack, cookie)
    assert is_live(stack, member.cookie)
    [request] = stack.provider.requests()[before:]
    assert request["form"]["code"] == code
    assert lookups(stack)[looked_up:] == [stack.provider.families()[-1]["access_token"]]


@pytest.mark.parametrize("proof", ["accessToken", "code", "both"])
@pytest.mark.parametrize("scheme", ["Basic", "BASIC"])
def test_log_in_by_an_api_client(stack: Stack, client: Client, member: Person, proof: str, scheme: str) -> None:
    body = {
        "accessToken": {"accessToken": stack.provider.access_token(member.slug)},
        "code": {"code": stack.provider.code("sandbox", member.slug)},
        "both": {"accessToken": stack.provider.access_token(member.slug), "code": "unused"},
    }[proof]
    before = len(stack.provider.requests())
    headers = {"authorization": client.headers["authorization"].replace("Basic", scheme)}
    answer = log_in(stack, headers, **body)
    assert read_user(answer)["_id"] == str(member.id)
    cookie, attributes = read_cookie(answer)
    stack.secrets.add(cookie)
    assert (attributes, is_live(stack, cookie)) == (ATTRIBUTES, True)
    assert len(stack.provider.requests()) == before + (proof == "code")


def test_the_session_is_the_user_s(stack: Stack, member: Person) -> None:
    cookie = log_in_as(stack, member.slug)
    stack.connect(member)
    for handle in ("me", str(member.id), member.slug):
        answer = rest(stack, "GET", STATUS.replace("me", handle), headers=with_cookie(cookie))
        assert (answer.status_code, answer.content) == (200, b'{"authStatus":true}')


def test_every_log_in_is_a_session_of_its_own(stack: Stack, member: Person) -> None:
    cookies = [log_in_as(stack, member.slug) for _ in range(3)]
    assert len({*cookies, member.cookie}) == 4
    assert [is_live(stack, cookie) for cookie in (*cookies, member.cookie)] == [True] * 4


@pytest.mark.parametrize("whose", ["own", "somebody else's"])
def test_the_presented_session_ends(stack: Stack, member: Person, whose: str) -> None:
    presented = log_in_as(stack, member.slug) if whose == "own" else stack.person().cookie
    cookie = log_in_as(stack, member.slug, with_cookie(presented))
    assert cookie != presented
    live = [is_live(stack, value) for value in (presented, cookie, member.cookie)]
    assert live == [False, True, True]


def test_an_api_client_may_hand_on_a_cookie(stack: Stack, client: Client, member: Person) -> None:
    headers = {**client.headers, **as_user(member)}
    answer = log_in(stack, headers, accessToken=stack.provider.access_token(member.slug))
    cookie, _ = read_cookie(answer)
    stack.secrets.add(cookie)
    assert (is_live(stack, cookie), is_live(stack, member.cookie)) == (True, False)


@pytest.mark.parametrize("presented", ["", "unknown", '"quoted"', "a=b", "x" * 5000])
def test_cookies_that_are_no_session_do_not_matter(stack: Stack, member: Person, presented: str) -> None:
    assert is_live(stack, log_in_as(stack, member.slug, with_cookie(presented)))


def test_a_cookie_is_never_adopted(stack: Stack, member: Person) -> None:
    """Whoever plants a cookie does not get the session that is started later (session fixation)."""
    planted = "x" * 43
    assert log_in_as(stack, member.slug, with_cookie(planted)) != planted
    assert not is_live(stack, planted)


# Who may log in whom


@pytest.mark.parametrize(
    "body",
    [
        {"accessToken": "{token}"},
        {"access_token": "{token}"},
        {"accessToken": "{token}", "code": "{code}"},
        {"access_token": "{token}", "code": "{code}"},
        {"accessToken": 1, "code": "{code}"},
        {"accessToken": {"a": "b"}},
        {"accessToken": "{token}", "provider": "nobody"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("session", [False, True], ids=["stranger", "own session"])
def test_a_token_is_nothing_without_an_api_client(stack: Stack, member: Person, body: Body, session: bool) -> None:
    proofs = {"{token}": stack.provider.access_token(member.slug), "{code}": stack.provider.code("sandbox")}
    body = {name: proofs.get(value, value) if isinstance(value, str) else value for name, value in body.items()}
    exchanges, looked_up = len(stack.provider.requests()), len(lookups(stack))
    answer = log_in(stack, as_user(member) if session else None, **body)
    assert_error(answer, 401, "NO_API_CLIENT")
    assert answer.headers.get_list("www-authenticate") == ['Basic realm="doorward"']
    assert "set-cookie" not in answer.headers
    assert (len(stack.provider.requests()), len(lookups(stack))) == (exchanges, looked_up)
    assert is_live(stack, member.cookie)


@pytest.mark.parametrize("proof", ["accessToken", "code"])
@pytest.mark.parametrize("wrong", [wrong for name, wrong in WRONG.items() if name != "none"], ids=[*WRONG][1:])
def test_wrong_credentials(stack: Stack, client: Client, other_client: Client, wrong: Credentials, proof: str) -> None:
    headers = wrong(client, other_client)
    stack.secrets.update(value.split()[-1] for value in headers.values() if len(value) > 20)
    answer = log_in(stack, headers, **{proof: "any-proof"})
    assert_error(answer, 401, "NO_API_CLIENT")
    assert answer.headers.get_list("www-authenticate") == ['Basic realm="doorward"']
    assert (stack.provider.requests(), lookups(stack)) == ([], [])


@pytest.mark.parametrize("missing", [None, ""])
def test_a_code_beside_no_token(stack: Stack, member: Person, missing: str | None) -> None:
    answer = log_in(stack, accessToken=missing, code=stack.provider.code("sandbox", member.slug))
    assert read_user(answer)["_id"] == str(member.id)


@pytest.mark.parametrize("proof", ["accessToken", "code"])
def test_users_of_another_client(
    stack: Stack, client: Client, other_client: Client, member: Person, proof: str
) -> None:
    makers = {"accessToken": stack.provider.access_token, "code": lambda user: stack.provider.code("sandbox", user)}
    headers = {**other_client.headers, **as_user(member)}
    answer = log_in(stack, headers, **{proof: makers[proof](member.slug)})
    assert_error(answer, 403, "NOT_YOUR_USER")
    assert "set-cookie" not in answer.headers
    assert is_live(stack, member.cookie)


@pytest.mark.parametrize("caller", ["anyone", "client"])
@pytest.mark.parametrize("account", ["nobody", "{upper}", "{slug} ", "{id}", "a/b c"])
def test_identities_of_nobody(stack: Stack, client: Client, member: Person, caller: str, account: str) -> None:
    wanted = account.format(upper=member.slug.upper(), slug=member.slug, id=member.id)
    headers = as_user(member) | (client.headers if caller == "client" else {})
    answer = log_in(stack, headers, code=stack.provider.code("sandbox", wanted))
    assert_error(answer, 404, "NO_SUCH_IDENTITY")
    assert "set-cookie" not in answer.headers
    assert is_live(stack, member.cookie)


def test_the_same_id_at_another_provider(stack: Stack, client: Client, member: Person) -> None:
    body = f'{{"id": "x", "profile": {{"id": "{member.slug}"}}}}'
    stack.provider.fault("lookup", "status", status=200, body=body)
    answer = log_in(stack, client.headers, provider="nested", accessToken="any-token")
    assert_error(answer, 404, "NO_SUCH_IDENTITY")


def test_after_unlinking(stack: Stack, client: Client, member: Person) -> None:
    cookie = log_in_as(stack, member.slug)
    target = f"/api/users/{member.id}/o-auth-identities/sandbox/{member.slug}"
    assert rest(stack, "DELETE", target, headers=client.headers).status_code == 200
    answer = log_in(stack, code=stack.provider.code("sandbox", member.slug))
    assert_error(answer, 404, "NO_SUCH_IDENTITY")
    assert is_live(stack, cookie)


# What a log-in has to say, and providers that fail


@pytest.mark.parametrize("caller", ["anyone", "client"])
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        pytest.param({"provider": None, "code": "x"}, 400, "PROVIDER_REQUIRED", id="null provider"),
        pytest.param({"provider": "", "code": "x"}, 400, "PROVIDER_REQUIRED", id="empty provider"),
        pytest.param({"provider": 1, "code": "x"}, 400, "PROVIDER_REQUIRED", id="number for provider"),
        pytest.param({}, 400, "TOKEN_OR_CODE_REQUIRED", id="neither"),
        pytest.param({"code": ""}, 400, "TOKEN_OR_CODE_REQUIRED", id="empty code"),
        pytest.param({"code": None, "accessToken": None}, 400, "TOKEN_OR_CODE_REQUIRED", id="nulls"),
        pytest.param({"code": 1}, 400, "TOKEN_OR_CODE_REQUIRED", id="number for code"),
        pytest.param({"code": ["x"]}, 400, "TOKEN_OR_CODE_REQUIRED", id="list for code"),
        pytest.param({"code": "x" * 16385}, 400, "TOKEN_OR_CODE_TOO_LONG", id="long code"),
        pytest.param({"code": "a\0b"}, 400, "MALFORMED_REQUEST", id="NUL"),
        pytest.param({"provider": "nobody", "code": "x"}, 404, "PROVIDER_NOT_FOUND", id="unknown provider"),
        pytest.param({"provider": "flo", "code": "x"}, 404, "PROVIDER_NOT_FOUND", id="kai provider"),
        pytest.param({"provider": "nested", "code": "x"}, 400, "PROVIDER_HAS_NO_TOKEN_URL", id="no token URL"),
    ],
)
def test_requests_that_name_no_account(
    stack: Stack, client: Client, caller: str, body: Body, status: int, reason: str
) -> None:
    answer = log_in(stack, client.headers if caller == "client" else None, **body)
    assert_error(answer, status, reason)
    assert "set-cookie" not in answer.headers
    assert (stack.provider.requests(), lookups(stack)) == ([], [])


@pytest.mark.parametrize("endpoint", ["lookup", "token"])
@pytest.mark.parametrize(
    ("fault", "status", "reason", "metadata"),
    [
        *[row for row in AWAY if row.id in {"500", "cut connection", "redirect", "hang"}],
        failure("4xx", 400, "REJECTED", "invalid_grant", body='{"error":"invalid_grant"}', status=403),
        without_id("nothing of use", "{}"),
    ],
)
def test_providers_that_fail(
    stack: Stack, member: Person, endpoint: str, fault: Body, status: int, reason: str, metadata: Mapping[str, str]
) -> None:
    looked_up = len(lookups(stack))
    stack.provider.fault(endpoint, **fault)
    answer = log_in(stack, as_user(member), code=stack.provider.code("sandbox", member.slug))
    if status == 400 and endpoint == "token":
        assert_error(answer, 400, "CODE_REJECTED", metadata)
    else:
        assert_error(answer, status, "LOOKUP_REJECTED" if reason == "REJECTED" else reason)
    assert "set-cookie" not in answer.headers
    # A connection that was kept from an earlier lookup may be found dead, and then the GET goes out once more.
    most = (2 if fault["kind"] == "cut" else 1) if endpoint == "lookup" else 0
    assert min(most, 1) <= len(lookups(stack)) - looked_up <= most
    assert stack.provider.requests("elsewhere") == []
    assert is_live(stack, member.cookie)


# Logging out


def assert_taken_back(answer: httpx.Response, *more: str) -> None:
    """The answer is `{}`, and ends the browser's cookie."""
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"{}", "application/json")
    value, attributes = read_cookie(answer)
    assert (value, attributes) == ("", {*ATTRIBUTES, *more, "Max-Age=0"} - {"Max-Age=31536000"})


def test_log_out(stack: Stack, member: Person) -> None:
    cookie, other = log_in_as(stack, member.slug), log_in_as(stack, member.slug)
    assert_taken_back(rest(stack, "DELETE", SESSION, headers=with_cookie(cookie)))
    assert [is_live(stack, value) for value in (cookie, other, member.cookie)] == [False, True, True]
    again = rest(stack, "DELETE", SESSION, headers=with_cookie(cookie))
    assert_error(again, 401, "NO_SESSION")


def test_log_out_everywhere(stack: Stack, client: Client, member: Person) -> None:
    stranger = member_of(stack, client)
    cookies = [log_in_as(stack, member.slug) for _ in range(2)]
    assert_taken_back(rest(stack, "DELETE", SESSIONS, headers=with_cookie(cookies[0])))
    assert [is_live(stack, value) for value in (*cookies, member.cookie, stranger.cookie)] == [False] * 3 + [True]
    assert_error(rest(stack, "DELETE", SESSIONS, headers=with_cookie(cookies[1])), 401, "NO_SESSION")
    assert is_live(stack, log_in_as(stack, member.slug))


@pytest.mark.parametrize("target", [SESSION, SESSIONS])
@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        pytest.param({}, 401, "NO_SESSION", id="no cookie"),
        pytest.param({"cookie": "doorward_session=unknown"}, 401, "NO_SESSION", id="unknown session"),
        pytest.param({"cookie": "doorward_session="}, 401, "NO_SESSION", id="empty cookie"),
        pytest.param({"authorization": "Bearer x"}, 403, "SESSION_REQUIRED", id="bearer"),
        pytest.param({"authorization": basic("a", "b")}, 403, "SESSION_REQUIRED", id="basic"),
    ],
)
def test_only_a_session_can_be_ended(stack: Stack, target: str, headers: Headers, status: int, reason: str) -> None:
    answer = rest(stack, "DELETE", target, headers=headers)
    assert_error(answer, status, reason)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("target", [SESSION, SESSIONS])
def test_an_api_client_cannot_log_out(stack: Stack, client: Client, member: Person, target: str) -> None:
    assert_error(rest(stack, "DELETE", target, headers=client.headers), 403, "SESSION_REQUIRED")
    assert is_live(stack, member.cookie)


# Pages of other origins

ORIGINS = pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://evil.example", False),
        ("null", False),
        ("", False),
        ("https://app.example.evil.example", False),
        ("http://app.example", False),
        ("https://app.example:8443", False),
        ("https://app.example", True),
        ("own", True),
    ],
)


@ORIGINS
@pytest.mark.parametrize("caller", ["anyone", "client"])
def test_log_in_from_pages(
    stack: Stack, client: Client, member: Person, origin: str, allowed: bool, caller: str
) -> None:
    headers = {**as_user(member), "origin": stack.url if origin == "own" else origin}
    headers |= client.headers if caller == "client" else {}
    answer = log_in(stack, headers, code=stack.provider.code("sandbox", member.slug))
    if allowed:
        assert read_user(answer)["_id"] == str(member.id)
        stack.secrets.add(read_cookie(answer)[0])
    else:
        assert_error(answer, 403, "ORIGIN_NOT_ALLOWED")
        assert "set-cookie" not in answer.headers
        assert stack.provider.requests()[1:] == []  # but for that of the fixture
    assert is_live(stack, member.cookie) is not allowed


@ORIGINS
@pytest.mark.parametrize("target", [SESSION, SESSIONS])
def test_log_out_from_pages(stack: Stack, member: Person, target: str, origin: str, allowed: bool) -> None:
    headers = {**as_user(member), "origin": stack.url if origin == "own" else origin}
    answer = rest(stack, "DELETE", target, headers=headers)
    if allowed:
        assert_taken_back(answer)
    else:
        assert_error(answer, 403, "ORIGIN_NOT_ALLOWED")
    assert is_live(stack, member.cookie) is not allowed


# A public URL with https, and a limit of failures

LIMIT = 3


@pytest.fixture(scope="module")
def strict_front(shared_stack: Stack) -> Iterator[Stack]:
    """The same home behind a server and a gateway that say https, and take three failures a minute."""
    environment = {
        "DOORWARD_PUBLIC_URL": PUBLIC_URL,
        "DOORWARD_LIMITS_AUTH_FAILURES": str(LIMIT),
        "DOORWARD_GATEWAY_DRAIN_WAIT": "0",
        "DOORWARD_GRPC_DRAIN_WAIT": "0",
    }
    front = replace(shared_stack, grpc_port=free_port(), gateway_port=free_port(), environment=environment)
    with ExitStack() as exit_stack:
        exit_stack.enter_context(front.server())
        exit_stack.enter_context(front.gateway())
        yield front


@pytest.fixture
def strict(stack: Stack, strict_front: Stack) -> Stack:
    """That front, with a provider in its initial state. Users come from `stack`, which counts them."""
    return strict_front


def test_the_cookie_of_https_is_secure(strict: Stack, member: Person) -> None:
    answer = log_in(strict, code=strict.provider.code("sandbox", member.slug))
    cookie, attributes = read_cookie(answer)
    strict.secrets.add(cookie)
    assert attributes == {*ATTRIBUTES, "Secure"}
    assert is_live(strict, cookie)
    assert_taken_back(rest(strict, "DELETE", SESSION, headers=with_cookie(cookie)), "Secure")
    assert_taken_back(rest(strict, "DELETE", SESSIONS, headers=as_user(member)), "Secure")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (PUBLIC_URL, True),
        ("https://app.example", True),
        ("http://door.example", False),
        ("https://door.example:8443", False),
        ("own", False),
    ],
)
def test_the_public_url_is_the_origin(strict: Stack, member: Person, origin: str, allowed: bool) -> None:
    headers = {"origin": strict.url if origin == "own" else origin}
    answer = log_in(strict, headers, code=strict.provider.code("sandbox", member.slug))
    if allowed:
        assert read_user(answer)["_id"] == str(member.id)
        strict.secrets.add(read_cookie(answer)[0])
    else:
        assert_error(answer, 403, "ORIGIN_NOT_ALLOWED")


# Addresses of this machine; a test that fails as nobody in particular has one of its own.


def from_address(address: str, stack: Stack, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to the gateway from an address of its own."""
    transport = httpx.HTTPTransport(verify=False, trust_env=False, local_address=address)
    with httpx.Client(transport=transport, base_url=stack.url, timeout=30) as http:
        return http.request(method, path, **options)


def assert_too_many(answer: httpx.Response) -> None:
    """A 429 that says when to try again."""
    seconds = answer.headers["retry-after"]
    assert 0 < int(seconds) <= 60
    assert_error(answer, 429, "TOO_MANY_FAILURES", {"retry_after": seconds})
    assert answer.headers.get_list("retry-after") == [seconds]
    assert "www-authenticate" not in answer.headers


def wrong(client: Client) -> Headers:
    return {"authorization": basic(client.id, "dws_wrong")}


@pytest.fixture
def fresh_client(stack: Stack) -> Client:
    """A client that has not failed yet."""
    return stack.client()


def exhaust(stack: Stack, client: Client, path: str = "/api/users/1") -> None:
    """Fail as a client as often as is allowed."""
    for _ in range(LIMIT):
        assert_error(rest(stack, "GET", path, headers=wrong(client)), 401, "NO_API_CLIENT")


def test_too_many_wrong_credentials(stack: Stack, strict: Stack, fresh_client: Client) -> None:
    user = stack.person(fresh_client)
    exhaust(strict, fresh_client, f"/api/users/{user.id}")
    for _ in range(2):
        assert_too_many(rest(strict, "GET", f"/api/users/{user.id}", headers=wrong(fresh_client)))
    assert_too_many(log_in(strict, wrong(fresh_client), code="x"))
    # Who has the right credentials gets in as ever.
    answer = rest(strict, "GET", f"/api/users/{user.id}", headers=fresh_client.headers)
    assert read_user(answer)["_id"] == str(user.id)


def test_others_failures_keep_no_client_from_logging_users_in(
    stack: Stack, strict: Stack, fresh_client: Client
) -> None:
    member = member_of(stack, fresh_client)
    exhaust(strict, fresh_client)
    answer = log_in(strict, fresh_client.headers, accessToken=strict.provider.access_token(member.slug))
    assert read_user(answer)["_id"] == str(member.id)
    stack.secrets.add(read_cookie(answer)[0])


def test_failures_count_per_client_and_address(stack: Stack, strict: Stack, fresh_client: Client) -> None:
    exhaust(strict, fresh_client)
    assert_too_many(rest(strict, "GET", "/api/users/1", headers=wrong(fresh_client)))
    assert_error(rest(strict, "GET", "/api/users/1", headers=wrong(stack.client())), 401, "NO_API_CLIENT")
    elsewhere = from_address("127.0.0.2", strict, "GET", "/api/users/1", headers=wrong(fresh_client))
    assert_error(elsewhere, 401, "NO_API_CLIENT")


@pytest.mark.parametrize(
    "name", ["x-forwarded-for", "x-envoy-external-address", "x-real-ip", "forwarded", "true-client-ip"]
)
def test_an_address_cannot_be_forged(strict: Stack, fresh_client: Client, name: str) -> None:
    for number in range(LIMIT):
        headers = {**wrong(fresh_client), name: f"198.51.100.{number}"}
        assert_error(rest(strict, "GET", "/api/users/1", headers=headers), 401, "NO_API_CLIENT")
    headers = {**wrong(fresh_client), name: "198.51.100.99"}
    assert_too_many(rest(strict, "GET", "/api/users/1", headers=headers))


def test_too_many_malformed_credentials(strict: Stack, member: Person) -> None:
    def ask(value: str) -> httpx.Response:
        return from_address("127.0.0.3", strict, "GET", "/api/users/1", headers={"authorization": value})

    for value in ("Bearer x", "Basic !", "x"):
        assert_error(ask(value), 401, "NO_API_CLIENT")
    assert_too_many(ask("Bearer y"))
    # They keep nobody at that address from logging in.
    proof = {"provider": "sandbox", "code": strict.provider.code("sandbox", member.slug)}
    answer = from_address("127.0.0.3", strict, "POST", LOG_IN, json=proof)
    assert read_user(answer)["_id"] == str(member.id)
    strict.secrets.add(read_cookie(answer)[0])


def test_requests_without_credentials_do_not_count(strict: Stack) -> None:
    for _ in range(LIMIT + 2):
        assert_error(from_address("127.0.0.4", strict, "GET", "/api/users/1"), 401, "NO_API_CLIENT")


@pytest.mark.parametrize(
    ("address", "status", "reason", "body"),
    [
        pytest.param("127.0.1.1", 400, "CODE_REJECTED", {"code": "unknown-code"}, id="refused codes"),
        pytest.param("127.0.1.2", 401, "NO_API_CLIENT", {"accessToken": "any-token"}, id="tokens from anyone"),
        pytest.param("127.0.1.3", 404, "NO_SUCH_IDENTITY", {}, id="unknown identities"),
    ],
)
def test_too_many_failed_log_ins(
    stack: Stack,
    strict: Stack,
    fresh_client: Client,
    address: str,
    status: int,
    reason: str,
    body: Body,
) -> None:
    member = member_of(stack, fresh_client)

    def attempt(account: str = "nobody") -> httpx.Response:
        proof = body or {"code": stack.provider.code("sandbox", account)}
        return from_address(address, strict, "POST", LOG_IN, json={"provider": "sandbox", **proof})

    for _ in range(LIMIT):
        answer = attempt()
        assert (answer.status_code, answer.json()["details"][0]["reason"]) == (status, reason)
    for _ in range(2):
        assert_too_many(attempt())
    # Whoever has a right proof logs in as ever, from this address, too.
    right = {"provider": "sandbox", "code": strict.provider.code("sandbox", member.slug)}
    stack.secrets.add(read_cookie(from_address(address, strict, "POST", LOG_IN, json=right))[0])
    proof = {"provider": "sandbox", "accessToken": strict.provider.access_token(member.slug)}
    answer = from_address(address, strict, "POST", LOG_IN, headers=fresh_client.headers, json=proof)
    assert read_user(answer)["_id"] == str(member.id)
    stack.secrets.add(read_cookie(answer)[0])
    assert is_live(strict, log_in_as(strict, member.slug))


def test_failed_log_ins_of_an_api_client(stack: Stack, strict: Stack, fresh_client: Client) -> None:
    for _ in range(LIMIT):
        assert_error(log_in(strict, fresh_client.headers, accessToken="unknown-token"), 400, "LOOKUP_REJECTED")
    assert_too_many(log_in(strict, fresh_client.headers, accessToken="unknown-token"))
    # Right proofs, and what is no log-in, go on.
    user = member_of(stack, fresh_client)
    answer = log_in(strict, fresh_client.headers, accessToken=strict.provider.access_token(user.slug))
    stack.secrets.add(read_cookie(answer)[0])
    assert rest(strict, "GET", f"/api/users/{user.id}", headers=fresh_client.headers).status_code == 200


def test_what_nobody_is_to_blame_for_does_not_count(strict: Stack, fresh_client: Client) -> None:
    strict.provider.fault("lookup", "status", status=503)
    for _ in range(LIMIT + 2):
        answer = log_in(strict, fresh_client.headers, accessToken="any-token")
        assert_error(answer, 503, "PROVIDER_UNAVAILABLE")
    for _ in range(LIMIT + 2):
        assert_error(log_in(strict, fresh_client.headers), 400, "TOKEN_OR_CODE_REQUIRED")
