"""The Identity routes of API clients, row by row of their contract, through a real Envoy and a real provider."""

import base64
import json
import secrets as randomness
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from doorward_server.models import OAuthIdentity
from doorward_server.providers import Provider
from tests.contract.test_integration import as_user, assert_error, get_status, revocations
from tests.processes import await_condition, free_port
from tests.stack import Client, Person, Stack, basic, rest

JSON = {"content-type": "application/json"}
USER = Draft202012Validator(json.loads(Path(__file__).with_name("identity.schema.json").read_text()))
User = dict[str, Any]
Headers = dict[str, str]


@dataclass(frozen=True)
class Route:
    """One route of a user's, with a body that could do its work."""

    method: str
    suffix: str = ""
    body: Any = None

    def ask(self, stack: Stack, handle: object, headers: Headers, body: Any = None) -> httpx.Response:
        content = json.dumps(self.body if body is None else body).encode() if self.body or body is not None else b""
        target = f"/api/users/{handle}{self.suffix}"
        return rest(stack, self.method, target, headers={**JSON, **headers}, content=content)


GET, DELETE = Route("GET"), Route("DELETE")
PATCH = Route("PATCH", body={"role": "teacher"})
LINK = Route("POST", "/o-auth-identities", {"provider": "sandbox", "accessToken": "unknown-token"})
UNLINK = Route("DELETE", "/o-auth-identities/sandbox/1")
ROUTES = {"get": GET, "patch": PATCH, "delete": DELETE, "link": LINK, "unlink": UNLINK}
EVERY_ROUTE = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def create(stack: Stack, client: Client, body: object) -> httpx.Response:
    content = json.dumps(body).encode()
    return rest(stack, "POST", "/api/users", headers={**JSON, **client.headers}, content=content)


def patch(stack: Stack, client: Client, user: Person, body: object) -> httpx.Response:
    return PATCH.ask(stack, user.id, client.headers, body)


def link(stack: Stack, client: Client, user: Person, provider: Any = "sandbox", **proof: Any) -> httpx.Response:
    return LINK.ask(stack, user.id, client.headers, {"provider": provider, **proof})


def unlink(stack: Stack, client: Client, user: Person, provider: str, subject: str) -> httpx.Response:
    return Route("DELETE", f"/o-auth-identities/{provider}/{subject}").ask(stack, user.id, client.headers)


def read_user(answer: httpx.Response) -> User:
    """The user of a 200, which is as the schema has it."""
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
    user = answer.json()
    USER.validate(user)
    assert isinstance(user, dict)
    return user


def get_user(stack: Stack, client: Client, user: Person) -> User:
    return read_user(GET.ask(stack, user.id, client.headers))


def identity(subject: str, provider: str = "sandbox") -> dict[str, str]:
    return {"provider": provider, "id": subject}


def lookups(stack: Stack) -> list[str]:
    """The access tokens that lookups came with."""
    return [request["query"]["access_token"] for request in stack.provider.requests("lookup")]


def asked(stack: Stack) -> int:
    """How often the provider was asked for anything."""
    return len(stack.provider.requests()) + len(stack.provider.requests("lookup"))


def token_of(stack: Stack, account: str) -> str:
    return stack.provider.access_token(account)


def any_name() -> str:
    """A name that nobody has."""
    return f"Ada {randomness.token_hex(6)}"


@pytest.fixture(scope="module")
def client(shared_stack: Stack) -> Client:
    return shared_stack.client()


@pytest.fixture(scope="module")
def other_client(shared_stack: Stack) -> Client:
    return shared_stack.client()


@pytest.fixture
def user(stack: Stack, client: Client) -> Person:
    return stack.person(client)


@pytest.fixture
def account(user: Person) -> str:
    """The name of an account at the provider that stands for nobody yet."""
    return f"account-{user.id}"


# Who may call

Credentials = Callable[[Client, Client], Headers]


def authorization(value: str) -> Headers:
    return {"authorization": value}


def encoded(pair: bytes) -> str:
    return base64.b64encode(pair).decode()


WRONG: dict[str, Credentials] = {
    "none": lambda *_: {},
    "empty": lambda *_: authorization(""),
    "scheme alone": lambda *_: authorization("Basic"),
    "not base64": lambda *_: authorization("Basic !!!!"),
    "cut base64": lambda client, _: authorization(basic(client.id, client.secret)[:-3]),
    "not utf-8": lambda *_: authorization(f"Basic {encoded(b'%c%c:x' % (255, 254))}"),
    "no colon": lambda client, _: authorization(f"Basic {encoded(client.secret.encode())}"),
    "two": lambda client, _: authorization(", ".join([basic(client.id, client.secret)] * 2)),
    "wrong secret": lambda client, _: authorization(basic(client.id, "dws_wrong")),
    "no secret": lambda client, _: authorization(basic(client.id, "")),
    "colon in the password": lambda client, _: authorization(basic(client.id, f"{client.secret}:x")),
    "colon before the password": lambda client, _: authorization(basic(client.id, f":{client.secret}")),
    "cut secret": lambda client, _: authorization(basic(client.id, client.secret[:-1])),
    "unknown id": lambda client, _: authorization(basic("dwc_0123456789abcdef", client.secret)),
    "no id": lambda client, _: authorization(basic("", client.secret)),
    "id in another case": lambda client, _: authorization(basic(client.id.upper(), client.secret)),
    "another client's secret": lambda client, other: authorization(basic(client.id, other.secret)),
    "swapped": lambda client, _: authorization(basic(client.secret, client.id)),
    "bearer secret": lambda client, _: authorization(f"Bearer {client.secret}"),
    "bearer pair": lambda client, _: authorization(basic(client.id, client.secret).replace("Basic", "Bearer")),
}


@EVERY_ROUTE
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_credentials(
    stack: Stack, client: Client, other_client: Client, user: Person, wrong: Credentials, route: Route
) -> None:
    headers = wrong(client, other_client)
    stack.secrets.update(value.split()[-1] for value in headers.values() if len(value) > 20)
    answer = route.ask(stack, user.id, headers)
    assert_error(answer, 401, "NO_API_CLIENT")
    assert answer.headers.get_list("www-authenticate") == ['Basic realm="doorward"']
    assert lookups(stack) == []


@pytest.mark.parametrize("route", [*ROUTES.values(), Route("POST", body={"name": "x"})], ids=[*ROUTES, "create"])
def test_a_session_is_no_api_client(stack: Stack, user: Person, route: Route) -> None:
    handle = "" if route.method == "POST" and not route.suffix else user.id
    answer = route.ask(stack, handle, as_user(user))
    assert_error(answer, 401, "NO_API_CLIENT")
    assert answer.headers.get_list("www-authenticate") == ['Basic realm="doorward"']
    assert get_status(stack, user) is False


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_credentials_create_nobody(
    stack: Stack, client: Client, other_client: Client, wrong: Credentials
) -> None:
    name, headers = any_name(), wrong(client, other_client)
    answer = rest(stack, "POST", "/api/users", headers=headers, json={"name": name})
    assert_error(answer, 401, "NO_API_CLIENT")
    assert answer.headers.get_list("www-authenticate") == ['Basic realm="doorward"']
    assert create(stack, client, {"name": name}).status_code == 200


@pytest.mark.parametrize("scheme", ["Basic", "BASIC", "basic", "bAsIc", "Basic "])
@pytest.mark.parametrize("cookie", [{}, {"cookie": "doorward_session=unknown"}], ids=["", "beside a cookie"])
def test_right_credentials(stack: Stack, client: Client, user: Person, scheme: str, cookie: Headers) -> None:
    value = basic(client.id, client.secret).replace("Basic", scheme)
    assert read_user(GET.ask(stack, user.id, {**authorization(value), **cookie}))["_id"] == str(user.id)


def test_a_disabled_client(stack: Stack) -> None:
    client = stack.client()
    user = stack.person(client)
    stack.app.clients.enable(client.id, enabled=False)
    assert_error(GET.ask(stack, user.id, client.headers), 401, "NO_API_CLIENT")
    stack.app.clients.enable(client.id, enabled=True)
    assert GET.ask(stack, user.id, client.headers).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_api_clients_have_no_origin_to_mind(stack: Stack, client: Client, user: Person, origin: str) -> None:
    assert GET.ask(stack, user.id, {**client.headers, "origin": origin}).status_code == 200


# Whose users


@EVERY_ROUTE
@pytest.mark.parametrize("owner", ["another client", "the operator"])
def test_users_of_others(stack: Stack, client: Client, other_client: Client, route: Route, owner: str) -> None:
    foreign = stack.person(other_client if owner == "another client" else None)
    bodies = [{}, {"provider": 1}, {"role": 1}] if route.body else [None]
    for handle in (foreign.id, foreign.slug):
        for body in (None, *bodies):
            assert_error(route.ask(stack, handle, client.headers, body), 403, "NOT_YOUR_USER")
    assert lookups(stack) == []
    assert stack.app.users.get(foreign.slug).role == ""
    assert get_status(stack, foreign) is False


@EVERY_ROUTE
@pytest.mark.parametrize("kind", ["id", "slug"])
def test_the_ways_to_name_a_user(stack: Stack, client: Client, user: Person, route: Route, kind: str) -> None:
    answer = route.ask(stack, {"id": user.id, "slug": user.slug}[kind], client.headers)
    if route is LINK:
        assert_error(answer, 400, "LOOKUP_REJECTED")
    elif route is UNLINK:
        assert_error(answer, 404, "IDENTITY_NOT_FOUND")
    else:
        assert answer.status_code == 200


UNKNOWN = [
    "nobody",
    "me",
    "{slug}%2F",
    "x%2F..%2F{slug}",
    "9223372036854775808",
]


@pytest.mark.parametrize(
    ("route", "handle"),
    [
        *[pytest.param(route, handle, id=f"{name} {handle}") for name, route in ROUTES.items() for handle in UNKNOWN],
        *[
            pytest.param(GET, handle, id=handle[:30])
            for handle in (
                *["ME", "999999999", "0{id}", "+{id}", "-{id}", "{id}.0", "{id}e0", "%20{id}", "{id}%20", "{id}%0A"],
                *["{id}%2F", "{slug}%2Fo-auth-identities", "%2F{slug}", "{upper}", "{slug}+", "{slug};x", "{slug}%3Fx"],
                *["{slug}%23x", "{slug}%25", "{slug}%252F", "{wide}", "ad%C3%A4", "%F0%9F%98%80", "-1"],
                *["9223372036854775807", "18446744073709551617", "1" * 5000, "a" * 5000],
            )
        ],
    ],
)
def test_unknown_handles(stack: Stack, client: Client, user: Person, route: Route, handle: str) -> None:
    wide = "".join(f"%EF%BC%{0x90 + int(digit):X}" for digit in str(user.id))  # the digits' full-width forms
    wanted = handle.format(id=user.id, slug=user.slug, upper=user.slug.upper(), wide=wide)
    assert_error(route.ask(stack, wanted, client.headers), 404, "USER_NOT_FOUND")
    assert lookups(stack) == []
    assert get_user(stack, client, user)["role"] == ""


@EVERY_ROUTE
@pytest.mark.parametrize("handle", ["%00", "{id}%00", "%00{slug}", "%ff", "{slug}%ff", "%c3%28", "%ed%a0%80", "%c0%af"])
def test_handles_that_are_no_text(stack: Stack, client: Client, user: Person, route: Route, handle: str) -> None:
    wanted = handle.format(id=user.id, slug=user.slug)
    assert_error(route.ask(stack, wanted, client.headers), 400, "MALFORMED_REQUEST")
    assert get_user(stack, client, user)["role"] == ""


OTHER_NAMES = ["handle", "%68andle", "user", "_id", "id", "provider"]


@EVERY_ROUTE
@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_query_does_not_override_the_path(
    stack: Stack, client: Client, user: Person, route: Route, name: str
) -> None:
    victim = stack.person(client)
    before = get_user(stack, client, victim)
    asked = Route(route.method, f"{route.suffix}?{name}={victim.slug}", route.body)
    assert_error(asked.ask(stack, "nobody", client.headers), 404, "USER_NOT_FOUND")
    asked.ask(stack, user.id, client.headers)
    assert get_user(stack, client, victim) == before


@EVERY_ROUTE
@pytest.mark.parametrize("name", ["handle", "hand\\u006ce", "Handle", "user", "_id", "id", "slug", "name"])
def test_a_body_does_not_override_the_path(stack: Stack, client: Client, user: Person, route: Route, name: str) -> None:
    victim = stack.person(client)
    before = get_user(stack, client, victim)
    members = json.dumps(route.body or {})[1:-1]
    body = f'{{"{name}": "{victim.slug}"{", " if members else ""}{members}}}'.encode()
    target, headers = f"/api/users/nobody{route.suffix}", {**JSON, **client.headers}
    answer = rest(stack, route.method, target, headers=headers, content=body)
    assert (answer.status_code, answer.json()["details"][0]["reason"]) in {
        (404, "USER_NOT_FOUND"),
        (400, "MALFORMED_REQUEST"),
    }
    rest(stack, route.method, target.replace("nobody", str(user.id)), headers=headers, content=body)
    assert get_user(stack, client, victim) == before


@pytest.mark.parametrize("place", ["query", "body"])
def test_nothing_but_the_path_says_which_identity(
    stack: Stack, client: Client, user: Person, account: str, place: str
) -> None:
    for provider in ("sandbox", "nested"):
        assert link(stack, client, user, provider, accessToken=token_of(stack, account)).status_code == 200
    number = str(zlib.crc32(account.encode()))
    other = {"provider": "nested", "id": number}
    where: dict[str, Any] = {"params": other} if place == "query" else {"json": other}
    target = f"/api/users/{user.id}/o-auth-identities/sandbox/nobody"
    answer = rest(stack, "DELETE", target, headers=client.headers, **where)
    assert answer.json()["details"][0]["reason"] in {"IDENTITY_NOT_FOUND", "MALFORMED_REQUEST"}
    assert get_user(stack, client, user)["oAuthIdentities"] == [identity(account), identity(number, "nested")]


# Linking


@pytest.mark.parametrize("handle", ["id", "slug"])
def test_link_by_access_token(stack: Stack, client: Client, user: Person, account: str, handle: str) -> None:
    before, token = get_user(stack, client, user), token_of(stack, account)
    exchanges = len(stack.provider.requests())
    body = {"provider": "sandbox", "accessToken": token}
    answer = LINK.ask(stack, {"id": user.id, "slug": user.slug}[handle], client.headers, body)
    assert read_user(answer) == before | {"oAuthIdentities": [identity(account)]}
    assert get_user(stack, client, user) == answer.json()
    [request] = stack.provider.requests("lookup")
    assert (request["method"], request["query"], request["body"]) == ("GET", {"access_token": token}, "")
    assert "authorization" not in request["headers"]
    assert len(stack.provider.requests()) == exchanges
    assert "set-cookie" not in answer.headers


def test_link_by_code(stack: Stack, client: Client, user: Person, account: str) -> None:
    before, code = get_user(stack, client, user), stack.provider.code("sandbox", account)
    answer = link(stack, client, user, code=code)
    assert read_user(answer) == before | {"oAuthIdentities": [identity(account)]}
    [request] = stack.provider.requests()
    assert (request["method"], request["headers"]["content-type"], request["query"]) == (
        "POST",
        "application/x-www-form-urlencoded",
        {},
    )
    assert request["form"] == {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": "http://127.0.0.1/app/callback",
        "client_id": "sandbox-client",
        "client_secret": "sandbox-secret",
    }
    [family] = stack.provider.families()
    assert lookups(stack) == [family["access_token"]]


def test_a_nested_id_that_is_a_number(stack: Stack, client: Client, user: Person, account: str) -> None:
    number = str(zlib.crc32(account.encode()))
    answer = link(stack, client, user, "nested", accessToken=token_of(stack, account))
    assert read_user(answer)["oAuthIdentities"] == [identity(number, "nested")]


@pytest.mark.parametrize("provider_id", ["sandbox", "nested"])
def test_the_access_token_wins(stack: Stack, client: Client, user: Person, account: str, provider_id: str) -> None:
    token, code = token_of(stack, account), stack.provider.code("sandbox", "somebody else")
    exchanges = len(stack.provider.requests())
    answer = link(stack, client, user, provider_id, accessToken=token, code=code)
    assert [linked["provider"] for linked in read_user(answer)["oAuthIdentities"]] == [provider_id]
    assert lookups(stack) == [token]
    assert len(stack.provider.requests()) == exchanges


@pytest.mark.parametrize("missing", [None, ""])
def test_a_code_beside_no_access_token(
    stack: Stack, client: Client, user: Person, account: str, missing: str | None
) -> None:
    answer = link(stack, client, user, accessToken=missing, code=stack.provider.code("sandbox", account))
    assert read_user(answer)["oAuthIdentities"] == [identity(account)]


ODD_TEXTS = pytest.mark.parametrize(
    "text",
    ["a&b=c#d", "/../?x", "a b", "é☃😀", "100%", "%2F%20%", "a+b", "'\"\\\n\t", "{access_token}<%= accessToken %>"],
)


@ODD_TEXTS
@pytest.mark.parametrize("provider_id", ["sandbox", "nested"])
def test_the_access_token_arrives_byte_for_byte(
    stack: Stack, client: Client, user: Person, provider_id: str, text: str
) -> None:
    mark = randomness.token_hex(12)
    stack.secrets.add(mark)
    token = mark + text
    assert_error(link(stack, client, user, provider_id, accessToken=token), 400, "LOOKUP_REJECTED")
    [request] = stack.provider.requests("lookup")
    assert request["query"] == {"access_token": token}


@ODD_TEXTS
def test_the_code_arrives_byte_for_byte(stack: Stack, client: Client, user: Person, account: str, text: str) -> None:
    code = randomness.token_hex(12) + text
    stack.secrets.add(code[:24])
    stack.provider.code("sandbox", account, literal=code)
    assert read_user(link(stack, client, user, code=code))["oAuthIdentities"] == [identity(account)]
    [request] = stack.provider.requests()
    assert request["form"]["code"] == code


@pytest.mark.parametrize("proof", ["accessToken", "code"])
@pytest.mark.parametrize("character", ["x", "%", "é"])
def test_the_longest_proof(stack: Stack, client: Client, user: Person, proof: str, character: str) -> None:
    text = character * (16384 // len(character.encode()))
    rejected = {"accessToken": "LOOKUP_REJECTED", "code": "CODE_REJECTED"}[proof]
    answer = link(stack, client, user, **{proof: text})
    metadata = {"error": "invalid_grant"} if proof == "code" else None
    assert_error(answer, 400, rejected, metadata)
    assert_error(link(stack, client, user, **{proof: text + "x"}), 400, "TOKEN_OR_CODE_TOO_LONG")
    assert len(stack.provider.requests({"accessToken": "lookup", "code": "token"}[proof])) == 1


@pytest.mark.parametrize(
    "subject", ["a/b c", "é☃😀", "'\"\\<b>", "0", "00", "-1", "me", "None", "null", " ", "x" * 247]
)
def test_ids_are_taken_as_they_are(stack: Stack, client: Client, user: Person, subject: str) -> None:
    wanted = f"{user.id}{subject}"
    stack.provider.code("sandbox", wanted)
    answer = link(stack, client, user, accessToken=token_of(stack, wanted))
    assert read_user(answer)["oAuthIdentities"] == [identity(wanted)]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("{id}", "{id}"),
        ("{id}.0", "{id}"),
        ("{id}.000", "{id}"),
        ("{id}e0", "{id}"),
        ("{id}0000E-4", "{id}"),
        ("-{id}", "-{id}"),
        ("{id}.25", "{id}.25"),
        ("{id}e3", "{id}000"),
        ("9007199254740993{id}", "9007199254740993{id}"),
        ("123456789012345678901234567890{id}", "123456789012345678901234567890{id}"),
    ],
)
def test_numbers_become_decimal_text(stack: Stack, client: Client, user: Person, number: str, text: str) -> None:
    stack.provider.fault("lookup", "status", status=200, body=f'{{"id": {number.format(id=user.id)}}}')
    answer = link(stack, client, user, accessToken="any-token")
    assert read_user(answer)["oAuthIdentities"] == [identity(text.format(id=user.id))]


def test_a_number_and_its_text_are_one_identity(stack: Stack, client: Client, user: Person) -> None:
    for body in (f'{{"id": {user.id}}}', f'{{"id": "{user.id}"}}', f'{{"id": {user.id}.0, "more": []}}'):
        stack.provider.fault("lookup", "status", status=200, body=body)
        answer = link(stack, client, user, accessToken="any-token")
        assert read_user(answer)["oAuthIdentities"] == [identity(str(user.id))]


def test_the_same_identity_again(stack: Stack, client: Client, user: Person, account: str) -> None:
    token = token_of(stack, account)
    answers = [
        link(stack, client, user, accessToken=token),
        link(stack, client, user, accessToken=token),
        link(stack, client, user, code=stack.provider.code("sandbox", account)),
    ]
    assert [read_user(answer)["oAuthIdentities"] for answer in answers] == [[identity(account)]] * 3


def test_identities_stand_in_the_order_in_which_they_were_added(
    stack: Stack, client: Client, user: Person, account: str
) -> None:
    for number in (2, 1, 3):
        token = token_of(stack, f"{account}-{number}")
        assert link(stack, client, user, accessToken=token).status_code == 200
    found = get_user(stack, client, user)["oAuthIdentities"]
    assert found == [identity(f"{account}-{number}") for number in (2, 1, 3)]


@pytest.mark.parametrize("owner", ["same client", "another client"])
@pytest.mark.parametrize("proof", ["accessToken", "code"])
def test_an_identity_of_another_user(
    stack: Stack, client: Client, other_client: Client, user: Person, account: str, owner: str, proof: str
) -> None:
    owning = client if owner == "same client" else other_client
    first = stack.person(owning)
    assert link(stack, owning, first, accessToken=token_of(stack, account)).status_code == 200
    given = token_of(stack, account) if proof == "accessToken" else stack.provider.code("sandbox", account)
    answer = link(stack, client, user, **{proof: given})
    assert_error(answer, 409, "IDENTITY_TAKEN")
    assert get_user(stack, client, user)["oAuthIdentities"] == []
    assert get_user(stack, owning, first)["oAuthIdentities"] == [identity(account)]


def test_one_account_id_at_two_providers(stack: Stack, client: Client, user: Person, account: str) -> None:
    second = stack.person(client)
    number = zlib.crc32(account.encode())
    stack.provider.fault("lookup", "status", status=200, body=f'{{"id": {number}, "profile": {{"id": {number}}}}}')
    assert link(stack, client, user, accessToken="any-token").status_code == 200
    answer = link(stack, client, second, "nested", accessToken="any-token")
    assert read_user(answer)["oAuthIdentities"] == [identity(str(number), "nested")]


# What a link request has to say


@pytest.mark.parametrize(
    "provider_id", [None, "", 1, True, [], {}, ["sandbox"], {"id": "sandbox"}, "missing"], ids=repr
)
def test_a_provider_is_required(stack: Stack, client: Client, user: Person, provider_id: Any) -> None:
    body = {"accessToken": "x", "code": "x"} | ({} if provider_id == "missing" else {"provider": provider_id})
    assert_error(LINK.ask(stack, user.id, client.headers, body), 400, "PROVIDER_REQUIRED")


@pytest.mark.parametrize("wrong", [1, 0, True, False, [], {}, ["x"], {"a": "b"}], ids=repr)
@pytest.mark.parametrize("proof", ["accessToken", "code"])
def test_proofs_of_a_wrong_type(stack: Stack, client: Client, user: Person, proof: str, wrong: Any) -> None:
    assert_error(link(stack, client, user, **{proof: wrong}), 400, "TOKEN_OR_CODE_REQUIRED")
    assert asked(stack) == 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"accessToken": None},
        {"accessToken": ""},
        {"code": None},
        {"code": ""},
        {"accessToken": None, "code": ""},
        {"accessToken": "", "code": None},
        {"token": "x"},
        {"AccessToken": "x", "Code": "x"},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("provider_id", ["sandbox", "nested"])
def test_a_token_or_a_code_is_required(
    stack: Stack, client: Client, user: Person, body: dict[str, Any], provider_id: str
) -> None:
    assert_error(link(stack, client, user, provider_id, **body), 400, "TOKEN_OR_CODE_REQUIRED")
    assert asked(stack) == 0


@pytest.mark.parametrize("provider_id", ["nobody", "Sandbox", "sandbox ", "flo", "a/b", "é", "x" * 1000])
@pytest.mark.parametrize("proof", ["accessToken", "code"])
def test_unknown_providers(stack: Stack, client: Client, user: Person, provider_id: str, proof: str) -> None:
    assert_error(link(stack, client, user, provider_id, **{proof: "x"}), 404, "PROVIDER_NOT_FOUND")
    assert asked(stack) == 0


def test_a_provider_without_a_token_url(stack: Stack, client: Client, user: Person) -> None:
    assert_error(link(stack, client, user, "nested", code="x"), 400, "PROVIDER_HAS_NO_TOKEN_URL")
    assert asked(stack) == 0


def test_unknown_fields_are_ignored(stack: Stack, client: Client, user: Person, account: str) -> None:
    more = {"unknown": {"deep": [None, {"a": 1}]}, "@type": "x", "Provider": 1, "redirect_uri": "https://evil.example"}
    answer = link(stack, client, user, **more, code=stack.provider.code("sandbox", account))
    assert read_user(answer)["oAuthIdentities"] == [identity(account)]
    [request] = stack.provider.requests()
    assert request["form"]["redirect_uri"] == "http://127.0.0.1/app/callback"


@EVERY_ROUTE
@pytest.mark.parametrize(
    "body",
    [b"{bad", b"[]", b'"x"', b"null", b'{"role":"\xff"}', b'{"role":"\\ud800"}', b'{"role":1e999}', b'{"role":' * 5000],
    ids=["syntax", "array", "string", "null", "not utf-8", "surrogate", "overflow", "deep"],
)
def test_malformed_bodies(stack: Stack, client: Client, user: Person, route: Route, body: bytes) -> None:
    target = f"/api/users/{user.id}{route.suffix}"
    answer = rest(stack, route.method, target, headers={**JSON, **client.headers}, content=body)
    if route.body:
        assert_error(answer, 400, "MALFORMED_REQUEST")
        assert get_user(stack, client, user)["role"] == ""
    else:  # where no body is awaited, none is read
        assert answer.status_code in {200, 400, 404}


@pytest.mark.parametrize(
    "body",
    [
        {"provider": "a\0b", "accessToken": "x"},
        {"provider": "sandbox", "accessToken": "a\0b"},
        {"provider": "sandbox", "code": "a\0b"},
        {"provider": "sandbox", "accessToken": "x", "code": {"a\0": 1}},
    ],
    ids=["provider", "token", "code", "name"],
)
def test_nul(stack: Stack, client: Client, user: Person, body: dict[str, Any]) -> None:
    assert_error(LINK.ask(stack, user.id, client.headers, body), 400, "MALFORMED_REQUEST")
    assert asked(stack) == 0


@pytest.mark.parametrize(
    ("credentials", "handle", "body", "status", "reason"),
    [
        pytest.param(False, "nobody", {}, 401, "NO_API_CLIENT", id="401 before 404"),
        pytest.param(False, "foreign", {}, 401, "NO_API_CLIENT", id="401 before 403"),
        pytest.param(False, "own", {}, 401, "NO_API_CLIENT", id="401 before 400"),
        pytest.param(True, "nobody", {}, 404, "USER_NOT_FOUND", id="404 before 400"),
        pytest.param(True, "nobody", {"provider": "nobody", "code": "x"}, 404, "USER_NOT_FOUND", id="user first"),
        pytest.param(True, "foreign", {}, 403, "NOT_YOUR_USER", id="403 before 400"),
        pytest.param(True, "own", {"code": "x"}, 400, "PROVIDER_REQUIRED", id="400 before the provider"),
        pytest.param(True, "own", {"provider": "sandbox"}, 400, "TOKEN_OR_CODE_REQUIRED", id="400 without a call"),
    ],
)
def test_the_order_of_checks(
    stack: Stack,
    client: Client,
    other_client: Client,
    user: Person,
    credentials: bool,
    handle: str,
    body: dict[str, Any],
    status: int,
    reason: str,
) -> None:
    named = {"own": str(user.id), "foreign": stack.person(other_client).slug}.get(handle, handle)
    assert_error(LINK.ask(stack, named, client.headers if credentials else {}, body), status, reason)
    assert asked(stack) == 0


# Providers that fail


def failure(name: str, told: int, reason: str, error: str | None = None, kind: str = "status", **fault: Any) -> Any:
    """A row: what an endpoint does, and what the caller is told."""
    return pytest.param({"kind": kind, **fault}, told, reason, {"error": error} if error else {}, id=name)


def without_id(name: str, body: str) -> Any:
    return failure(name, 400, "LOOKUP_WITHOUT_ID", status=200, body=body)


AWAY = [
    failure("500", 503, "PROVIDER_UNAVAILABLE", status=500, body='{"id": "x", "access_token": "x"}'),
    failure("503", 503, "PROVIDER_UNAVAILABLE", status=503),
    failure("cut connection", 503, "PROVIDER_UNAVAILABLE", kind="cut"),
    failure("cut body", 503, "PROVIDER_UNAVAILABLE", kind="cut_body"),
    failure("not http", 503, "PROVIDER_UNAVAILABLE", kind="not_http"),
    failure("redirect", 503, "PROVIDER_MALFORMED", kind="redirect"),
    failure("over 1 MiB", 503, "PROVIDER_MALFORMED", kind="huge"),
    failure("gzip bomb", 503, "PROVIDER_MALFORMED", kind="gzip_bomb"),
    failure("hang", 504, "PROVIDER_TIMEOUT", kind="hang"),
]


@pytest.mark.parametrize(
    ("fault", "status", "reason", "metadata"),
    [
        *AWAY,
        failure("trickling headers", 504, "PROVIDER_TIMEOUT", kind="trickle_headers"),
        failure("trickling body", 504, "PROVIDER_TIMEOUT", kind="trickle_body"),
        *[
            failure(str(status), 400, "LOOKUP_REJECTED", status=status, body='{"id": "x"}')
            for status in (400, 401, 403, 404, 429, 499)
        ],
        failure("garbage", 400, "LOOKUP_WITHOUT_ID", kind="garbage"),
        failure("not utf-8", 400, "LOOKUP_WITHOUT_ID", kind="not_utf8"),
        failure("nested brackets", 400, "LOOKUP_WITHOUT_ID", kind="nested"),
        failure("no content", 400, "LOOKUP_WITHOUT_ID", status=204),
        without_id("empty", ""),
        without_id("cut json", '{"id": "x"'),
        without_id("trailing text", '{"id": "x"} x'),
        without_id("bare string", '"x"'),
        without_id("null answer", "null"),
        without_id("array", '[{"id": "x"}]'),
        without_id("missing", '{"ID": "x", "data": {"id": "x"}}'),
        without_id("null", '{"id": null}'),
        without_id("empty id", '{"id": ""}'),
        without_id("0", '{"id": 0}'),
        without_id("0.0", '{"id": 0.0}'),
        without_id("-0", '{"id": -0}'),
        without_id("0e9", '{"id": 0e9}'),
        without_id("true", '{"id": true}'),
        without_id("false", '{"id": false}'),
        without_id("object", '{"id": {"id": "x"}}'),
        without_id("list", '{"id": ["x"]}'),
        without_id("NaN", '{"id": NaN}'),
        without_id("Infinity", '{"id": Infinity}'),
        without_id("1e999999999", '{"id": 1e999999999}'),
        without_id("1e-999999999", '{"id": 1e-999999999}'),
        without_id("10,000 digits", '{"id": %s}' % ("1" * 10_000)),
        without_id("256 characters", '{"id": "%s"}' % ("x" * 256)),
        without_id("NUL", '{"id": "a\\u0000b"}'),
        without_id("surrogate", '{"id": "\\ud800"}'),
        without_id("line break", '{"id": "a\\nb"}'),
    ],
)
def test_lookups_that_fail(
    stack: Stack, client: Client, user: Person, fault: dict[str, Any], status: int, reason: str, metadata: Headers
) -> None:
    before = get_user(stack, client, user)
    stack.provider.fault("lookup", **fault)
    assert_error(link(stack, client, user, accessToken="any-token"), status, reason, metadata)
    assert set(lookups(stack)) == {"any-token"}
    if fault["kind"] not in BROKEN:
        assert len(lookups(stack)) == 1
    assert stack.provider.requests("elsewhere") == []
    assert get_user(stack, client, user) == before


BROKEN = {"cut": 2, "cut_body": 1, "not_http": 1}


@pytest.mark.parametrize(("kind", "most"), BROKEN.items(), ids=BROKEN)
def test_connections_that_break(stack: Stack, client: Client, user: Person, kind: str, most: int) -> None:
    """Only a kept connection that ends before any answer may have been dead: then the GET goes out once more."""
    assert_error(link(stack, client, user, accessToken="first-token"), 400, "LOOKUP_REJECTED")
    stack.provider.fault("lookup", kind)
    assert_error(link(stack, client, user, accessToken="second-token"), 503, "PROVIDER_UNAVAILABLE")
    assert 1 <= lookups(stack).count("second-token") <= most


@pytest.mark.parametrize(
    "body",
    [
        '{"id": 7}',
        '{"profile.id": 7}',
        '{"profile": null}',
        '{"profile": 7}',
        '{"profile": "id"}',
        '{"profile": {}}',
        '{"profile": {"id": null}}',
        '{"profile": {"id": {"id": 7}}}',
        '{"profile": [{"id": 7}]}',
    ],
)
def test_lookups_without_a_nested_id(stack: Stack, client: Client, user: Person, body: str) -> None:
    stack.provider.fault("lookup", "status", status=200, body=body)
    assert_error(link(stack, client, user, "nested", accessToken="any-token"), 400, "LOOKUP_WITHOUT_ID")
    assert get_user(stack, client, user)["oAuthIdentities"] == []


@pytest.mark.parametrize(
    ("fault", "status", "reason", "metadata"),
    [
        *AWAY,
        failure("oauth error", 400, "CODE_REJECTED", "invalid_grant", body='{"error":"invalid_grant"}', status=400),
        failure("401", 400, "CODE_REJECTED", "invalid_client", body='{"error":"invalid_client"}', status=401),
        failure("no oauth error", 400, "CODE_REJECTED", body="nothing here", status=404),
        failure("unprintable error", 400, "CODE_REJECTED", body='{"error":"\\u0000\\n"}', status=400),
        failure("429", 400, "CODE_REJECTED", body="{}", status=429),
        failure("error in a 200", 400, "CODE_REJECTED", "bad_code", body='{"error":"bad_code"}', status=200),
        failure("no access token", 400, "CODE_REJECTED", kind="no_access_token"),
        failure("token is a number", 400, "CODE_REJECTED", kind="token_not_string"),
        failure("token is null", 400, "CODE_REJECTED", body='{"access_token":null}', status=200),
        failure("empty token", 400, "CODE_REJECTED", body='{"access_token":""}', status=200),
        failure("surrogate in token", 400, "CODE_REJECTED", body='{"access_token":"\\ud800"}', status=200),
        failure("array", 400, "CODE_REJECTED", kind="not_object"),
        failure("garbage", 400, "CODE_REJECTED", kind="garbage"),
        failure("not utf-8", 400, "CODE_REJECTED", kind="not_utf8"),
        failure("nested brackets", 400, "CODE_REJECTED", kind="nested"),
        failure("empty", 400, "CODE_REJECTED", body="", status=200),
    ],
)
def test_token_endpoints_that_fail(
    stack: Stack, client: Client, user: Person, fault: dict[str, Any], status: int, reason: str, metadata: Headers
) -> None:
    before = get_user(stack, client, user)
    stack.provider.fault("token", **fault)
    assert_error(link(stack, client, user, code=stack.provider.code("sandbox")), status, reason, metadata)
    assert len(stack.provider.requests()) == 1
    assert (lookups(stack), stack.provider.requests("elsewhere")) == ([], [])
    assert get_user(stack, client, user) == before


def test_a_used_code(stack: Stack, client: Client, user: Person, account: str) -> None:
    code = stack.provider.code("sandbox", account)
    assert link(stack, client, user, code=code).status_code == 200
    assert link(stack, client, stack.person(client), code=code).status_code in {400, 409}
    assert get_user(stack, client, user)["oAuthIdentities"] == [identity(account)]


def test_a_lookup_that_fails_after_the_exchange(stack: Stack, client: Client, user: Person, account: str) -> None:
    stack.provider.fault("lookup", "status", status=500, times=1)
    answer = link(stack, client, user, code=stack.provider.code("sandbox", account))
    assert_error(answer, 503, "PROVIDER_UNAVAILABLE")
    assert get_user(stack, client, user)["oAuthIdentities"] == []
    answer = link(stack, client, user, code=stack.provider.code("sandbox", account))
    assert read_user(answer)["oAuthIdentities"] == [identity(account)]


# Providers that were added by command, with other settings

Adding = Callable[..., str]


@pytest.fixture
def added(stack: Stack) -> Iterator[Adding]:
    """Adds a provider for the time of a test; returns its id."""
    names = []

    def add(**settings: Any) -> str:
        name = f"added-{randomness.token_hex(4)}"
        usual = {"kind": "identity", "lookup_url": f"{stack.provider.url}/lookup?access_token={{access_token}}"}
        client = {"client_id": "sandbox-client", "client_secret": "sandbox-secret"}
        where = {"redirect_uri": "http://127.0.0.1/app/callback", "token_url": f"{stack.provider.url}/token"}
        stack.app.providers.add(Provider.model_validate({"id": name, **usual, **client, **where, **settings}))
        names.append(name)
        return name

    yield add
    for name in names:
        stack.app.providers.remove(name, unlink=True)


@pytest.mark.parametrize(
    ("method", "auth", "sent"),
    [
        ("post", "client_secret_post", {"client_id", "client_secret"}),
        ("post", "client_secret_basic", set()),
        ("get", "client_secret_post", {"client_id", "client_secret"}),
        ("get", "client_secret_basic", set()),
    ],
)
def test_the_ways_to_exchange_a_code(
    stack: Stack, client: Client, user: Person, account: str, added: Adding, method: str, auth: str, sent: set[str]
) -> None:
    code = f"{randomness.token_hex(12)}&a=b#c %2B+é😀"
    stack.secrets.add(code[:24])
    stack.provider.code("sandbox", account, literal=code)
    provider = added(token_method=method, token_auth=auth)
    answer = link(stack, client, user, provider, code=code)
    assert read_user(answer)["oAuthIdentities"] == [identity(account, provider)]
    [request] = stack.provider.requests()
    fields, none = (request["form"], request["query"]) if method == "post" else (request["query"], request["form"])
    assert (request["method"], set(fields), none) == (
        method.upper(),
        {"grant_type", "code", "redirect_uri"} | sent,
        {},
    )
    assert fields["code"] == code
    basic_pair = basic("sandbox-client", "sandbox-secret")
    assert request["headers"].get("authorization") == (basic_pair if auth == "client_secret_basic" else None)


@pytest.mark.parametrize("property_path", ["name", "profile.id"])
def test_other_places_of_the_id(
    stack: Stack, client: Client, user: Person, account: str, added: Adding, property_path: str
) -> None:
    provider = added(lookup_id_property=property_path)
    answer = link(stack, client, user, provider, accessToken=token_of(stack, account))
    subject = {"name": account.capitalize(), "profile.id": str(zlib.crc32(account.encode()))}[property_path]
    assert read_user(answer)["oAuthIdentities"] == [identity(subject, provider)]


def test_a_lookup_at_an_address_that_may_not_be_asked(
    stack: Stack, client: Client, user: Person, added: Adding
) -> None:
    provider = added(lookup_url=f"http://127.0.0.1:{free_port()}/?t={{access_token}}")
    assert_error(link(stack, client, user, provider, accessToken="any-token"), 503, "PROVIDER_UNAVAILABLE")


# Creating


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Ada Lovelace {n}", "ada-lovelace-{n}"),
        ("Ünïcödé ß {n}", "unicode-ss-{n}"),
        ("日本 {n}", "ri-ben-{n}"),
        ('<b>&amp; "x" \\ {n}</b>', None),
        ("😀 me {n}", "me-{n}"),
        ("123 {n}", "123-{n}"),
        ("x" * 87 + " {n}", "x" * 87 + "-{n}"),
    ],
)
def test_create(stack: Stack, client: Client, name: str, slug: str | None) -> None:
    number = f"x{randomness.token_hex(6)[1:]}"
    given = name.format(n=number)
    user = read_user(create(stack, client, {"name": given}))
    assert user == {
        "_id": user["_id"],
        "slug": slug.format(n=number) if slug else user["slug"],
        "name": given,
        "email": "",
        "role": "",
        "oAuthIdentities": [],
        "license": {"active": False},
        "subscription": {"active": False},
        "stats": {"gamesCompleted": 0, "playTime": 0, "concepts": {}},
    }
    for handle in (user["_id"], user["slug"]):
        assert read_user(GET.ask(stack, handle, client.headers)) == user


@pytest.mark.parametrize(
    "name",
    [
        *[None, 1, 1.5, True, [], {}, ["Ada"], {"name": "Ada"}],
        *["", " ", "\u3000", "---", "...", "!?", "😀", "'", "123", "0", "-0", " 7 ", "\uff11\uff12\uff13", "٣٤٥", "²"],
        *["me", "ME", "Me!", " me ", "mé", "-me-"],
        *["x" * 101, "😀" * 101 + "x", "a\nb", "a\tb", "a\u007fb", "a\u0085b", "a\u200bb", "a\u202eb", "a\u2028b"],
    ],
    ids=lambda name: ascii(name)[:30],
)
def test_invalid_names(stack: Stack, client: Client, name: Any) -> None:
    assert_error(create(stack, client, {"name": name}), 400, "INVALID_NAME")


@pytest.mark.parametrize("body", [b"", b"{}", b'{"Name":"Ada"}'])
def test_a_name_is_required(stack: Stack, client: Client, body: bytes) -> None:
    answer = rest(stack, "POST", "/api/users", headers={**JSON, **client.headers}, content=body)
    assert_error(answer, 400, "INVALID_NAME")


def test_the_longest_name(stack: Stack, client: Client) -> None:
    name = any_name()
    assert read_user(create(stack, client, {"name": name + "x" * (100 - len(name))}))["name"].endswith("x")


@pytest.mark.parametrize("owner", ["own", "another client", "the operator"])
@pytest.mark.parametrize("again", ["{name}", "{upper}", "  {name}!", "{slug}"])
def test_names_that_are_taken(stack: Stack, client: Client, other_client: Client, owner: str, again: str) -> None:
    name = any_name()
    slug = name.lower().replace(" ", "-")
    if owner == "the operator":
        stack.app.users.create(name)
    else:
        assert create(stack, client if owner == "own" else other_client, {"name": name}).status_code == 200
    wanted = again.format(name=name, upper=name.upper(), slug=slug)
    assert_error(create(stack, client, {"name": wanted}), 409, "SLUG_TAKEN")


@pytest.mark.parametrize("missing", [{}, {"email": None}, {"email": ""}], ids=repr)
def test_users_without_an_address(stack: Stack, client: Client, missing: dict[str, Any]) -> None:
    for _ in range(2):
        assert read_user(create(stack, client, {"name": any_name(), **missing}))["email"] == ""


@pytest.mark.parametrize(
    "address",
    ["Ada.{n}@Example.ORG", "ä+{n}@bücher.example", "{n}@localhost", "a'{n}@[192.0.2.1]", "x" * 52 + "{n}@x.example"],
)
def test_addresses_stay_as_they_are_written(stack: Stack, client: Client, address: str) -> None:
    given = address.format(n=randomness.token_hex(6))
    assert read_user(create(stack, client, {"name": any_name(), "email": given}))["email"] == given


@pytest.mark.parametrize(
    "address",
    [
        *[0, 1, True, False, [], {}, ["a@b.example"]],
        *[" ", "x", "@", "a@", "@b", "a b@c", "a@b c", "a@b@c", "a@b\n", "a\t@b", " a@b", "a@b ", "a@b\u00a0"],
        *["a@b\x7f", "x" * 65 + "@b", "a@" + "b" * 256],
    ],
    ids=lambda address: ascii(address)[:30],
)
def test_invalid_addresses(stack: Stack, client: Client, address: Any) -> None:
    name = any_name()
    assert_error(create(stack, client, {"name": name, "email": address}), 400, "INVALID_EMAIL")
    assert create(stack, client, {"name": name}).status_code == 200


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ada{n}@example.org", "ada{n}@example.org"),
        ("ada{n}@example.org", "ADA{n}@Example.ORG"),
        ("äöü{n}@example.org", "ÄÖÜ{n}@example.org"),
        ("ада{n}@example.org", "АДА{n}@example.org"),
        ("straße{n}@example.org", "STRASSE{n}@example.org"),
        ("ὀδυσσεύς{n}@example.org", "ὈΔΥΣΣΕΎΣ{n}@example.org"),
        ("\u00e9{n}@example.org", "e\u0301{n}@example.org"),
        ("\u00c9{n}@example.org", "e\u0301{n}@example.org"),
        ("{n}@bücher.example", "{n}@BÜCHER.example"),
    ],
)
@pytest.mark.parametrize("owner", ["own", "another client", "the operator"])
def test_addresses_that_are_taken(
    stack: Stack, client: Client, other_client: Client, first: str, second: str, owner: str
) -> None:
    number = randomness.token_hex(6)
    email = first.format(n=number)
    if owner == "the operator":
        stack.app.users.create(any_name(), email)
    else:
        body = {"name": any_name(), "email": email}
        assert create(stack, client if owner == "own" else other_client, body).status_code == 200
    name = any_name()
    answer = create(stack, client, {"name": name, "email": second.format(n=number)})
    assert_error(answer, 409, "EMAIL_TAKEN")
    assert create(stack, client, {"name": name}).status_code == 200


def test_create_ignores_what_it_does_not_know(stack: Stack, client: Client) -> None:
    more = {"_id": "1", "id": "1", "slug": "x", "role": "teacher", "client": "x", "license": {"active": True}}
    user = read_user(create(stack, client, {"name": any_name(), **more}))
    assert (user["role"], user["license"], user["_id"] == "1") == ("", {"active": False}, False)


@pytest.mark.parametrize("body", [{"name": "a\0b"}, {"name": any_name(), "email": "a\0@b"}], ids=["name", "email"])
def test_nul_in_a_new_user(stack: Stack, client: Client, body: dict[str, Any]) -> None:
    assert_error(create(stack, client, body), 400, "MALFORMED_REQUEST")


# Updating

FULL: dict[str, Any] = {
    "role": "teacher",
    "license": {"active": True, "ends": "2027-01-31T00:00:00.000Z"},
    "subscription": {"active": True, "ends": "2030-12-31T23:59:59.999Z"},
    "stats": {
        "gamesCompleted": 7,
        "playTime": 12.5,
        "concepts": {"loops": 3, "deep": {"list": [1, None, "x", True, {}], "half": 0.5}},
    },
}


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param({"role": "student"}, {"role": "student"}, id="role"),
        pytest.param({"role": ""}, {"role": ""}, id="no role"),
        pytest.param({"role": None}, {"role": ""}, id="null role"),
        pytest.param({"role": "é😀" + "x" * 62}, {"role": "é😀" + "x" * 62}, id="64 characters"),
        pytest.param({"license": {}}, {}, id="empty object"),
        pytest.param(
            {"license": {"active": False}}, {"license": {**FULL["license"], "active": False}}, id="one member"
        ),
        pytest.param({"license": {"ends": None}}, {"license": {"active": True}}, id="null date"),
        pytest.param({"license": {"active": None}}, {"license": {**FULL["license"], "active": False}}, id="null flag"),
        pytest.param({"license": None}, {"license": {"active": False}}, id="null object"),
        pytest.param({"subscription": None}, {"subscription": {"active": False}}, id="another null object"),
        pytest.param({"stats": {"playTime": 3}}, {"stats": {**FULL["stats"], "playTime": 3}}, id="play time"),
        pytest.param({"stats": {"gamesCompleted": 8.0}}, {"stats": {**FULL["stats"], "gamesCompleted": 8}}, id="8.0"),
        pytest.param(
            {"stats": {"gamesCompleted": 2**31 - 1, "playTime": 1e15}},
            {"stats": {**FULL["stats"], "gamesCompleted": 2**31 - 1, "playTime": 1e15}},
            id="large numbers",
        ),
        pytest.param(
            {"stats": {"concepts": {"new": None}}},
            {"stats": {**FULL["stats"], "concepts": {"new": None}}},
            id="concepts are replaced",
        ),
        pytest.param(
            {"stats": {"concepts": None, "playTime": None}},
            {"stats": {"gamesCompleted": 7, "playTime": 0, "concepts": {}}},
            id="null members",
        ),
        pytest.param({"stats": None}, {"stats": {"gamesCompleted": 0, "playTime": 0, "concepts": {}}}, id="null stats"),
        pytest.param(
            {"role": "student", "stats": {"gamesCompleted": 0}, "license": {"active": False}},
            {
                "role": "student",
                "stats": {**FULL["stats"], "gamesCompleted": 0},
                "license": {**FULL["license"], "active": False},
            },
            id="several",
        ),
        pytest.param(
            {"name": "x", "email": "x@y.example", "slug": "x", "_id": "1", "oAuthIdentities": [], "unknown": {"a": 1}},
            {},
            id="what cannot be set",
        ),
        pytest.param({"license": {"unknown": 1, "activ": True}}, {}, id="unknown members"),
    ],
)
def test_update(stack: Stack, client: Client, user: Person, changes: dict[str, Any], after: dict[str, Any]) -> None:
    before = get_user(stack, client, user)
    assert read_user(patch(stack, client, user, FULL)) == before | FULL
    for _ in range(2):  # the second time it changes nothing
        assert read_user(patch(stack, client, user, changes)) == before | FULL | after
    assert get_user(stack, client, user) == before | FULL | after


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("2027-01-31T00:00:00Z", "2027-01-31T00:00:00.000Z"),
        ("2027-01-31T00:00:00.000Z", "2027-01-31T00:00:00.000Z"),
        ("2027-01-31T00:00:00.1Z", "2027-01-31T00:00:00.100Z"),
        ("2027-01-31T00:00:00.123456Z", "2027-01-31T00:00:00.123Z"),
        ("2027-01-31T00:00:00.999999Z", "2027-01-31T00:00:00.999Z"),
        ("2027-01-31T00:30:00+02:00", "2027-01-30T22:30:00.000Z"),
        ("2027-12-31T23:30:00-01:00", "2028-01-01T00:30:00.000Z"),
        ("1969-12-31T23:59:59.999Z", "1969-12-31T23:59:59.999Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
        ("9999-12-31T23:59:59.999Z", "9999-12-31T23:59:59.999Z"),
        ("2028-02-29T00:00:00Z", "2028-02-29T00:00:00.000Z"),
    ],
)
@pytest.mark.parametrize("term", ["license", "subscription"])
def test_dates(stack: Stack, client: Client, user: Person, term: str, given: str, shown: str) -> None:
    answer = patch(stack, client, user, {term: {"ends": given}})
    assert read_user(answer)[term] == {"active": False, "ends": shown}
    assert get_user(stack, client, user)[term] == {"active": False, "ends": shown}


def invalid(field: str, *values: Any) -> list[Any]:
    """Rows: values that a field cannot have."""
    rows = []
    for value in values:
        body = value
        for name in reversed(field.split(".")):
            body = {name: body}
        rows.append(pytest.param(body, field, id=f"{field} {ascii(value)[:30]}"))
    return rows


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *invalid("role", 1, True, [], {}, "x" * 65),
        *invalid("license", 1, True, "x", [], [{}]),
        *invalid("license.active", 1, 0, "true", "", [], {}),
        *invalid("license.ends", 0, 1, True, [], {}, "", "x", "2027", "2027-01-31", "2027-01-31T00:00:00"),
        *invalid("license.ends", "2027-02-29T00:00:00Z", "2027-01-31T25:00:00Z", "10000-01-01T00:00:00Z", "Z" * 9999),
        *invalid("license.ends", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "\uff12027-01-31T00:00:00Z"),
        *invalid("subscription", 1, [], "x"),
        *invalid("subscription.active", 1, "false"),
        *invalid("subscription.ends", 1, "x"),
        *invalid("stats", 1, [], "x"),
        *invalid("stats.gamesCompleted", -1, 0.5, 2**31, 1e300, "1", True, [], {}),
        *invalid("stats.playTime", -1, -0.5, "1", True, [], {}),
        *invalid("stats.concepts", 1, [], "x", True),
    ],
)
def test_invalid_fields(stack: Stack, client: Client, user: Person, changes: dict[str, Any], field: str) -> None:
    before = read_user(patch(stack, client, user, FULL))
    # Nothing of a request is done when a part of it is wrong.
    good = {"role": "other", "license": {"active": False}, "stats": {"playTime": 1}}
    mixed = {**good, **changes}
    assert_error(patch(stack, client, user, mixed), 400, "INVALID_FIELD", {"field": field})
    assert get_user(stack, client, user) == before


def test_nul_in_a_field(stack: Stack, client: Client, user: Person) -> None:
    for body in ({"role": "a\0b"}, {"stats": {"concepts": {"a\0": 1}}}, {"stats": {"concepts": {"a": ["\0"]}}}):
        assert_error(patch(stack, client, user, body), 400, "MALFORMED_REQUEST")


def test_an_empty_update(stack: Stack, client: Client, user: Person) -> None:
    answer = rest(stack, "PATCH", f"/api/users/{user.id}", headers=client.headers)
    assert read_user(answer) == get_user(stack, client, user)


# Deleting and unlinking


def test_delete(stack: Stack, client: Client, account: str) -> None:
    name, email = any_name(), f"{randomness.token_hex(6)}@example.org"
    created = read_user(create(stack, client, {"name": name, "email": email}))
    _, cookie = stack.app.sessions.create(stack.app.users.get(created["slug"]))
    stack.secrets.add(cookie)
    user = Person(int(created["_id"]), created["slug"], cookie)
    token = token_of(stack, account)
    assert link(stack, client, user, accessToken=token).status_code == 200
    stack.connect(user)
    assert get_status(stack, user) is True
    [family] = [family for family in stack.provider.families() if family["client_id"] == "flo-client"]

    answer = DELETE.ask(stack, user.slug, client.headers)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"{}", "application/json")
    for route in ROUTES.values():
        for handle in (user.id, user.slug):
            assert_error(route.ask(stack, handle, client.headers), 404, "USER_NOT_FOUND")
    me = rest(stack, "GET", "/api/v1/users/me/integrations/kai/flo", headers=as_user(user))
    assert_error(me, 401, "NO_SESSION")
    await_condition(lambda: len(revocations(stack, family["refresh_token"])) == 1, "the revocation at the provider")

    # Name, address and identity are free again; the number is not given twice.
    again = read_user(create(stack, client, {"name": name, "email": email}))
    assert again["_id"] != created["_id"]
    successor = Person(int(again["_id"]), again["slug"], "")
    assert read_user(link(stack, client, successor, accessToken=token))["oAuthIdentities"] == [identity(account)]


@pytest.mark.parametrize("kind", ["hang", "cut"])
def test_a_failing_revocation_neither_delays_nor_fails_the_answer(
    stack: Stack, client: Client, user: Person, kind: str
) -> None:
    stack.connect(user)
    stack.provider.fault("revoke", kind)
    answer = DELETE.ask(stack, user.id, client.headers)
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert answer.elapsed.total_seconds() < 0.7  # less than the provider's timeout


def test_unlink(stack: Stack, client: Client, user: Person, account: str) -> None:
    before = get_user(stack, client, user)
    for name in (account, f"{account}-2"):
        assert link(stack, client, user, accessToken=token_of(stack, name)).status_code == 200
    answer = unlink(stack, client, user, "sandbox", account)
    assert read_user(answer) == before | {"oAuthIdentities": [identity(f"{account}-2")]}
    assert_error(unlink(stack, client, user, "sandbox", account), 404, "IDENTITY_NOT_FOUND")
    assert get_status(stack, user) is False  # the session goes on
    second = stack.person(client)
    answer = link(stack, client, second, accessToken=token_of(stack, account))
    assert read_user(answer)["oAuthIdentities"] == [identity(account)]


@pytest.mark.parametrize(
    ("subject", "path"),
    [
        ("a/b c", "a%2Fb%20c"),
        ("/a//b/", "%2Fa%2F%2Fb%2F"),
        ("a%2Fb", "a%252Fb"),
        ("100%", "100%25"),
        ("a+b", "a+b"),
        ("a+b", "a%2Bb"),
        ("a:b", "a:b"),
        ("a?b#c&d=e;f", "a%3Fb%23c%26d%3De%3Bf"),
        ("é☃😀", "%C3%A9%E2%98%83%F0%9F%98%80"),
        ("'\"\\<>", "%27%22%5C%3C%3E"),
        (" ", "%20"),
        ("a/../../b", "a%2F..%2F..%2Fb"),
        ("...", "..."),
        ("me", "me"),
    ],
)
def test_unlink_by_odd_ids(stack: Stack, client: Client, user: Person, subject: str, path: str) -> None:
    account = f"{subject}{user.id}{subject}"
    assert link(stack, client, user, accessToken=token_of(stack, account)).status_code == 200
    assert get_user(stack, client, user)["oAuthIdentities"] == [identity(account)]
    answer = unlink(stack, client, user, "sandbox", f"{path}{user.id}{path}")
    assert read_user(answer)["oAuthIdentities"] == []


@pytest.mark.parametrize("subject", [".", "..", "...", " ", " . ", "a\u202eb", "a\u200bb", "a\nb", "a\x9bb"], ids=ascii)
def test_ids_that_no_path_could_name_or_nobody_could_see(
    stack: Stack, client: Client, user: Person, subject: str
) -> None:
    """A URL's dot segments are resolved before anyone sees them (RFC 3986, section 5.2.4), encoded ones, too."""
    stack.provider.fault("lookup", "status", status=200, body=json.dumps({"id": subject}))
    assert_error(link(stack, client, user, accessToken="any-token"), 400, "LOOKUP_WITHOUT_ID")
    assert get_user(stack, client, user)["oAuthIdentities"] == []


def test_the_largest_user(stack: Stack, client: Client, user: Person) -> None:
    """With 50 identities and all concepts there may be, every answer still goes through; and there is no 51st."""
    with stack.app.database.writing():
        for number in range(49):
            subject = f"{user.id}-{number}-".ljust(255, "🎉")
            OAuthIdentity.create(user=user.id, provider="sandbox", subject=subject, created_at=stack.app.clock.now())
    concepts = {"x": "🎉" * (32 * 1024 // 4 - 3)}
    changed = rest(
        stack, "PATCH", f"/api/users/{user.id}", headers=client.headers, json={"stats": {"concepts": concepts}}
    )
    assert len(changed.content) > 65536
    assert read_user(changed)["stats"]["concepts"] == concepts
    account = f"last-of-{user.id}"
    assert link(stack, client, user, accessToken=token_of(stack, account)).status_code == 200
    assert len(get_user(stack, client, user)["oAuthIdentities"]) == 50
    assert link(stack, client, user, accessToken=token_of(stack, account)).status_code == 200
    answer = link(stack, client, user, accessToken=token_of(stack, f"one-more-of-{user.id}"))
    assert_error(answer, 400, "TOO_MANY_IDENTITIES")
    assert len(get_user(stack, client, user)["oAuthIdentities"]) == 50


def test_concepts_that_are_too_large(stack: Stack, client: Client, user: Person) -> None:
    body = {"role": "teacher", "stats": {"concepts": {"x": "y" * 32 * 1024}}}
    answer = rest(stack, "PATCH", f"/api/users/{user.id}", headers=client.headers, json=body)
    assert_error(answer, 400, "INVALID_FIELD", {"field": "stats.concepts"})
    assert get_user(stack, client, user)["role"] == ""


@pytest.mark.parametrize(
    ("provider_id", "subject"),
    [
        ("sandbox", "{other}"),
        ("sandbox", "{upper}"),
        ("sandbox", "{account}%20"),
        ("sandbox", "nobody"),
        ("nested", "{account}"),
        ("Sandbox", "{account}"),
        ("nobody", "{account}"),
        ("sandbox%2F{account}", "x"),
    ],
)
def test_unlink_what_the_user_has_not(
    stack: Stack, client: Client, user: Person, account: str, provider_id: str, subject: str
) -> None:
    second = stack.person(client)
    others = f"other-of-{user.id}"
    for person, name in ((user, account), (second, others)):
        assert link(stack, client, person, accessToken=token_of(stack, name)).status_code == 200
    names = {"account": account, "other": others, "upper": account.upper()}
    answer = unlink(stack, client, user, provider_id.format(**names), subject.format(**names))
    assert_error(answer, 404, "IDENTITY_NOT_FOUND")
    assert get_user(stack, client, user)["oAuthIdentities"] == [identity(account)]
    assert get_user(stack, client, second)["oAuthIdentities"] == [identity(others)]


@pytest.mark.parametrize("path", ["sandbox/%00", "sandbox/%ff", "%00/x", "%ff/x"])
def test_unlink_what_is_no_text(stack: Stack, client: Client, user: Person, path: str) -> None:
    answer = Route("DELETE", f"/o-auth-identities/{path}").ask(stack, user.id, client.headers)
    assert_error(answer, 400, "MALFORMED_REQUEST")
