"""IdentityService, as the gateway and a backend call it: users, identities, sessions, and a real provider."""

import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass

from doorward_server.integrations import REVOCATION
from doorward_server.models import Job
from doorward_server.settings import LimitsSection
from tests.rpc.conftest import METHODS, House, Metadata, Result, SetClock, basic, bearer, call, cookie, opened, served
from tests.sandbox.client import SandboxProvider
from tests.stack import Client, Person

grpc_max_workers = 16

_SERVICE = "/doorward.identity.v1.IdentityService"
_STATUS = "/doorward.integration.v1.IntegrationService/GetKaiStatus"
_NO_CLIENT = "UNAUTHENTICATED NO_API_CLIENT"
_REQUIRED = "INVALID_ARGUMENT TOKEN_OR_CODE_REQUIRED"
_TOO_MANY = "RESOURCE_EXHAUSTED TOO_MANY_FAILURES"


@dataclass
class Caller:
    """A channel to a server with somebody's credentials."""

    channel: grpc.Channel
    metadata: Metadata = field(default=(), repr=False)
    address: str | None = None

    def __call__(self, rpc: str, more: Metadata = (), /, **fields: Any) -> Result:
        """One call; the fields are as in JSON."""
        method = METHODS[f"{_SERVICE}/{rpc}"]
        request = ParseDict(fields, GetMessageClass(method.input_type)())
        address = (("x-envoy-external-address", self.address),) if self.address else ()
        return call(self.channel, f"{_SERVICE}/{rpc}", request, self.metadata + more + address)

    def log_in(self, more: Metadata = (), /, **proof: Any) -> Result:
        return self("LogIn", more, **proof)


@pytest.fixture(scope="module")
def client(house: House) -> Client:
    return house.client()


@pytest.fixture
def as_client(over_socket: grpc.Channel, client: Client) -> Caller:
    return Caller(over_socket, basic(client))


@pytest.fixture
def anyone(over_socket: grpc.Channel) -> Caller:
    return Caller(over_socket)


@pytest.fixture
def person(house: House, client: Client, provider: SandboxProvider) -> Person:
    """A user of the client's."""
    return house.person(client)


@pytest.fixture
def account(person: Person) -> str:
    """An account at the provider that nobody has linked yet."""
    return f"account-{person.id}"


@pytest.fixture
def linked(as_client: Caller, house: House, person: Person, account: str) -> Person:
    """The person with that account linked."""
    token = house.provider.access_token(account)
    assert as_client("AddOAuthIdentity", handle=person.slug, provider="sandbox", accessToken=token).code == "OK"
    return person


def identities(result: Result) -> list[tuple[str, str]]:
    return [(identity.provider, identity.id) for identity in result.answer.o_auth_identities]


def requests(house: House) -> tuple[int, int]:
    """How often the provider was asked for tokens, and for accounts."""
    return len(house.provider.requests("token")), len(house.provider.requests("lookup"))


def cookie_of(result: Result) -> str:
    """The session cookie that an answer sets."""
    jar = SimpleCookie(str(result.headers["set-cookie"]))
    return jar["doorward_session"].value


def is_live(house: House, value: str) -> bool:
    return house.app.sessions.find(value) is not None


# Users


def test_a_user_s_life(as_client: Caller, house: House) -> None:
    made = as_client("CreateUser", name="Ada Lovelace", email="Ada@Example.org")
    assert made.code == "OK"
    number = made.answer.id
    expected: dict[str, Any] = {
        "_id": number,
        "slug": "ada-lovelace",
        "name": "Ada Lovelace",
        "email": "Ada@Example.org",
        "role": "",
        "oAuthIdentities": [],
        "license": {"active": False},
        "subscription": {"active": False},
        "stats": {"gamesCompleted": 0, "playTime": 0.0, "concepts": {}},
    }

    def shown(result: Result) -> Any:
        assert result.code == "OK"
        return MessageToDict(result.answer, always_print_fields_with_no_presence=True)

    assert shown(made) == expected
    for handle in (number, "ada-lovelace"):
        assert shown(as_client("GetUser", handle=handle)) == expected
    changes = {
        "role": "teacher",
        "license": {"active": True, "ends": "2031-05-06T09:08:09+02:00"},
        "stats": {"gamesCompleted": 3, "playTime": 12.5, "concepts": {"loops": {"seen": [1, "two", None, 1e300]}}},
    }
    expected |= changes | {"license": {"active": True, "ends": "2031-05-06T07:08:09.000Z"}}
    assert shown(as_client("UpdateUser", handle=number, **changes)) == expected
    assert shown(as_client("GetUser", handle=number)) == expected
    expected["license"] = {"active": False}
    assert shown(as_client("UpdateUser", handle=number, license=None)) == expected
    assert as_client("DeleteUser", handle=number).code == "OK"
    for rpc in ("GetUser", "UpdateUser", "DeleteUser"):
        assert as_client(rpc, handle=number).short == "NOT_FOUND USER_NOT_FOUND"
    assert as_client("CreateUser", name="Ada Lovelace", email="ada@example.org").code == "OK"


@pytest.fixture(scope="module")
def taken(house: House) -> None:
    """Another client's user."""
    house.app.users.create("Taken", "täken@example.org", house.client().id)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        pytest.param({}, "INVALID_ARGUMENT INVALID_NAME", id="nothing"),
        pytest.param({"name": None}, "INVALID_ARGUMENT INVALID_NAME", id="null"),
        pytest.param({"name": 5}, "INVALID_ARGUMENT INVALID_NAME", id="number"),
        pytest.param({"name": ["x"]}, "INVALID_ARGUMENT INVALID_NAME", id="array"),
        pytest.param({"name": "me"}, "INVALID_ARGUMENT INVALID_NAME", id="me"),
        pytest.param({"name": "Taken twice", "email": 5}, "INVALID_ARGUMENT INVALID_EMAIL", id="email: number"),
        pytest.param({"name": "Taken twice", "email": "x"}, "INVALID_ARGUMENT INVALID_EMAIL", id="no address"),
        pytest.param({"name": "Taken"}, "ALREADY_EXISTS SLUG_TAKEN", id="slug"),
        pytest.param({"name": "TAKEN!"}, "ALREADY_EXISTS SLUG_TAKEN", id="another name, the same slug"),
        pytest.param({"name": "Free", "email": "TÄKEN@example.org"}, "ALREADY_EXISTS EMAIL_TAKEN", id="email"),
        pytest.param({"name": "Taken", "email": "x"}, "INVALID_ARGUMENT INVALID_EMAIL", id="the argument first"),
    ],
)
def test_users_that_are_not_created(as_client: Caller, fields: dict[str, Any], outcome: str) -> None:
    """Slugs and addresses are unique over all clients."""
    assert as_client("CreateUser", **fields).short == outcome


@pytest.mark.parametrize("number", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    ("rpc", "name"),
    [("CreateUser", "name"), ("UpdateUser", "stats"), ("AddOAuthIdentity", "provider"), ("LogIn", "code")],
)
def test_numbers_that_no_json_holds(as_client: Caller, person: Person, rpc: str, name: str, number: float) -> None:
    """A message can hold them all the same: they are a caller's mistake, not ours."""
    request = GetMessageClass(METHODS[f"{_SERVICE}/{rpc}"].input_type)(**{name: {"number_value": number}})
    if "handle" in request.DESCRIPTOR.fields_by_name:
        request.handle = person.slug  # type: ignore[attr-defined]
    assert call(as_client.channel, f"{_SERVICE}/{rpc}", request, as_client.metadata).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"role": 5}, "role"),
        ({"license": "x"}, "license"),
        ({"license": {"active": "x"}}, "license.active"),
        ({"subscription": {"ends": "2031-05-06"}}, "subscription.ends"),
        ({"stats": {"gamesCompleted": 1.5}}, "stats.gamesCompleted"),
        ({"stats": {"concepts": []}}, "stats.concepts"),
    ],
)
def test_a_refused_change_names_the_field(
    as_client: Caller, person: Person, changes: dict[str, Any], path: str
) -> None:
    before = as_client("GetUser", handle=person.slug)
    result = as_client("UpdateUser", handle=person.slug, **{"subscription": {"active": True}, **changes})
    assert (result.short, result.metadata) == ("INVALID_ARGUMENT INVALID_FIELD", {"field": path})
    assert as_client("GetUser", handle=person.slug).answer == before.answer


@pytest.mark.parametrize(
    ("rpc", "fields"),
    [
        ("GetUser", {}),
        ("UpdateUser", {"role": 5}),
        ("DeleteUser", {}),
        ("AddOAuthIdentity", {}),
        ("AddOAuthIdentity", {"provider": "nothing", "code": "x"}),
        ("RemoveOAuthIdentity", {"provider": "sandbox", "id": "x"}),
    ],
)
def test_other_clients_users(
    house: House, as_client: Caller, provider: SandboxProvider, rpc: str, fields: dict[str, Any]
) -> None:
    """They are judged before the arguments are, and nobody is asked about them."""
    for stranger in (house.person(house.client()), house.person()):
        for handle in (stranger.slug, str(stranger.id)):
            assert as_client(rpc, handle=handle, **fields).short == "PERMISSION_DENIED NOT_YOUR_USER"
    for handle in ("nobody", "999999", "", "me", "é", "x" * 5000):
        assert as_client(rpc, handle=handle, **fields).short == "NOT_FOUND USER_NOT_FOUND"
    assert provider.requests("token") == provider.requests("lookup") == []


def test_a_deleted_user_s_tokens_are_revoked(house: House, as_client: Caller, linked: Person, account: str) -> None:
    for kai in ("flo", "min"):
        house.connect(linked, kai)
    token = house.provider.access_token(account)
    assert as_client("DeleteUser", handle=linked.slug).code == "OK"
    # What is left is the work to do, sealed.
    jobs = house.app.database.fetch_all(Job.select())
    assert [job.kind for job in jobs] == [REVOCATION] * 2
    assert house.provider.requests("revoke") == []
    while house.app.worker.run_one():
        pass
    families = {family["client_id"]: family["revoked"] for family in house.provider.families()}
    assert families == {"flo-client": True, "min-client": True, "sandbox-client": False}
    assert not is_live(house, linked.cookie)
    assert as_client.log_in(provider="sandbox", accessToken=token).short == "NOT_FOUND NO_SUCH_IDENTITY"


# Identities


@pytest.mark.parametrize("handle", ["slug", "id"])
@pytest.mark.parametrize("means", ["accessToken", "code", "both"])
def test_an_account_is_linked(
    house: House, as_client: Caller, person: Person, account: str, means: str, handle: str
) -> None:
    provider = house.provider
    code = provider.code("sandbox", account)
    proof = {"accessToken": provider.access_token(account)} if means != "code" else {}
    before = len(provider.requests("token"))
    proof |= {"code": code} if means != "accessToken" else {}
    for _ in range(2 if means == "accessToken" else 1):  # again: it stays as it is
        result = as_client("AddOAuthIdentity", handle=str(getattr(person, handle)), provider="sandbox", **proof)
        assert (result.code, identities(result)) == ("OK", [("sandbox", account)])
    assert len(provider.requests("token")) - before == (1 if means == "code" else 0)
    assert len(provider.requests("lookup")) == (2 if means == "accessToken" else 1)
    assert identities(as_client("GetUser", handle=person.slug)) == [("sandbox", account)]
    removed = as_client("RemoveOAuthIdentity", handle=person.slug, provider="sandbox", id=account)
    assert (removed.code, identities(removed)) == ("OK", [])
    again = as_client("RemoveOAuthIdentity", handle=person.slug, provider="sandbox", id=account)
    assert again.short == "NOT_FOUND IDENTITY_NOT_FOUND"


def test_accounts_are_listed_in_the_order_of_their_linking(
    house: House, as_client: Caller, person: Person, account: str
) -> None:
    numeric = str(zlib.crc32(account.encode()))
    others = [f"{account}-{letter}" for letter in "ba"]
    for name, user in (("sandbox", others[0]), ("nested", account), ("sandbox", others[1])):
        token = house.provider.access_token(user)
        assert as_client("AddOAuthIdentity", handle=person.slug, provider=name, accessToken=token).code == "OK"
    expected = [("sandbox", others[0]), ("nested", numeric), ("sandbox", others[1])]
    assert identities(as_client("GetUser", handle=person.slug)) == expected
    # Of a pair only the whole counts.
    for name, subject in (("sandbox", numeric), ("nested", others[0]), ("", numeric), ("nested", "")):
        result = as_client("RemoveOAuthIdentity", handle=person.slug, provider=name, id=subject)
        assert result.short == "NOT_FOUND IDENTITY_NOT_FOUND"
    assert identities(as_client("GetUser", handle=person.slug)) == expected


@pytest.mark.parametrize("rpc", ["AddOAuthIdentity", "LogIn"])
@pytest.mark.parametrize(
    ("proof", "outcome"),
    [
        ({}, "INVALID_ARGUMENT PROVIDER_REQUIRED"),
        ({"provider": None, "accessToken": "x"}, "INVALID_ARGUMENT PROVIDER_REQUIRED"),
        ({"provider": "", "accessToken": "x"}, "INVALID_ARGUMENT PROVIDER_REQUIRED"),
        ({"provider": 5, "accessToken": "x"}, "INVALID_ARGUMENT PROVIDER_REQUIRED"),
        ({"provider": ["sandbox"], "accessToken": "x"}, "INVALID_ARGUMENT PROVIDER_REQUIRED"),
        ({"provider": "sandbox"}, _REQUIRED),
        ({"provider": "nothing"}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": None, "code": None}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": "", "code": ""}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": 5}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": 0}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": False}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": ["x"]}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": {}}, _REQUIRED),
        ({"provider": "sandbox", "code": 5}, _REQUIRED),
        ({"provider": "sandbox", "code": {"x": 1}}, _REQUIRED),
        ({"provider": "sandbox", "accessToken": "x" * 16385}, "INVALID_ARGUMENT TOKEN_OR_CODE_TOO_LONG"),
        ({"provider": "sandbox", "accessToken": "é" * 8193}, "INVALID_ARGUMENT TOKEN_OR_CODE_TOO_LONG"),
        ({"provider": "sandbox", "code": "x" * 16385}, "INVALID_ARGUMENT TOKEN_OR_CODE_TOO_LONG"),
        ({"provider": "nothing", "code": "x"}, "NOT_FOUND PROVIDER_NOT_FOUND"),
        ({"provider": "SANDBOX", "code": "x"}, "NOT_FOUND PROVIDER_NOT_FOUND"),
        ({"provider": "flo", "code": "x"}, "NOT_FOUND PROVIDER_NOT_FOUND"),  # nobody logs in with it
        ({"provider": "nested", "code": "x"}, "INVALID_ARGUMENT PROVIDER_HAS_NO_TOKEN_URL"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_proof_that_nobody_is_asked_about(
    house: House, as_client: Caller, person: Person, rpc: str, proof: dict[str, Any], outcome: str
) -> None:
    handle = {"handle": person.slug} if rpc == "AddOAuthIdentity" else {}
    assert as_client(rpc, **handle, **proof).short == outcome
    assert house.provider.requests("token") == house.provider.requests("lookup") == []


def failure(name: str, outcome: str, endpoint: str = "lookup", error: str | None = None, **fault: Any) -> Any:
    """A row: what an endpoint does, and what the caller is told."""
    return pytest.param(endpoint, {"kind": "status", **fault}, outcome, error, id=f"{endpoint}: {name}")


_CODE_REJECTED = "INVALID_ARGUMENT CODE_REJECTED"
_WITHOUT_ID = "INVALID_ARGUMENT LOOKUP_WITHOUT_ID"
_UNAVAILABLE = "UNAVAILABLE PROVIDER_UNAVAILABLE"
_MALFORMED = "UNAVAILABLE PROVIDER_MALFORMED"
_TIMEOUT = "DEADLINE_EXCEEDED PROVIDER_TIMEOUT"


@pytest.mark.parametrize(
    ("endpoint", "fault", "outcome", "error"),
    [
        failure("400", _CODE_REJECTED, "token", "invalid_grant", status=400, body='{"error":"invalid_grant"}'),
        failure("404", _CODE_REJECTED, "token", status=404, body="<html>"),
        failure("no token", _CODE_REJECTED, "token", kind="no_access_token"),
        failure("a refusal as a success", _CODE_REJECTED, "token", "x_y", status=200, body='{"error":"x_y"}'),
        failure("not JSON", _CODE_REJECTED, "token", kind="garbage"),
        failure("500", _UNAVAILABLE, "token", status=500),
        failure("redirect", _MALFORMED, "token", kind="redirect"),
        failure("over 1 MiB", _MALFORMED, "token", kind="huge"),
        failure("hang", _TIMEOUT, "token", kind="hang"),
        failure("401", "INVALID_ARGUMENT LOOKUP_REJECTED", status=401, body='{"error":"invalid_token"}'),
        failure("no id", _WITHOUT_ID, status=200, body="{}"),
        failure("0", _WITHOUT_ID, status=200, body='{"id":0}'),
        failure("NUL", _WITHOUT_ID, status=200, body='{"id":"a\\u0000b"}'),
        failure("not JSON", _WITHOUT_ID, kind="garbage"),
        failure("500", _UNAVAILABLE, status=500),
        failure("cut", _UNAVAILABLE, kind="cut"),
        failure("redirect", _MALFORMED, kind="redirect"),
        failure("over 1 MiB", _MALFORMED, kind="huge"),
        failure("hang", _TIMEOUT, kind="hang"),
    ],
)
def test_a_failed_lookup_changes_nothing(
    house: House,
    as_client: Caller,
    linked: Person,
    account: str,
    endpoint: str,
    fault: dict[str, Any],
    outcome: str,
    error: str | None,
) -> None:
    house.provider.fault(endpoint, **fault)
    for rpc, fields in (("AddOAuthIdentity", {"handle": linked.slug}), ("LogIn", {})):
        result = as_client(rpc, provider="sandbox", code=house.provider.code("sandbox", "eve"), **fields)
        assert (result.short, result.error, result.headers.get("set-cookie")) == (outcome, error, None)
    assert identities(as_client("GetUser", handle=linked.slug)) == [("sandbox", account)]
    assert len(house.app.sessions.list(house.app.users.get(linked.slug))) == 1
    assert house.provider.requests("elsewhere") == []


@pytest.mark.parametrize("of_same_client", [True, False], ids=["of the same client", "of another client"])
def test_an_account_is_one_user_s(
    house: House, over_socket: grpc.Channel, client: Client, linked: Person, account: str, of_same_client: bool
) -> None:
    client = client if of_same_client else house.client()
    caller, other = Caller(over_socket, basic(client)), house.person(client)
    token = house.provider.access_token(account)
    result = caller("AddOAuthIdentity", handle=other.slug, provider="sandbox", accessToken=token)
    assert result.short == "ALREADY_EXISTS IDENTITY_TAKEN"
    assert identities(caller("GetUser", handle=other.slug)) == []


def test_of_racing_calls_one_links_the_account(
    house: House, as_client: Caller, client: Client, provider: SandboxProvider
) -> None:
    people = [house.person(client) for _ in range(8)]
    token = provider.access_token(f"raced-{people[0].id}")

    def link(person: Person) -> str:
        return as_client("AddOAuthIdentity", handle=person.slug, provider="sandbox", accessToken=token).short

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(link, [person for person in people for _ in range(2)]))
    owners = [person for person in people if identities(as_client("GetUser", handle=person.slug))]
    assert len(owners) == 1
    # Both calls for the one whose it is succeed.
    assert sorted(outcomes) == ["ALREADY_EXISTS IDENTITY_TAKEN"] * 14 + ["OK"] * 2


# Logging in


@pytest.mark.parametrize("means", ["code", "accessToken"])
def test_a_log_in(house: House, anyone: Caller, as_client: Caller, linked: Person, account: str, means: str) -> None:
    if means == "code":
        result = anyone.log_in(provider="sandbox", code=house.provider.code("sandbox", account))
    else:
        result = as_client.log_in(provider="sandbox", accessToken=house.provider.access_token(account))
    assert (result.code, result.answer.id, identities(result)) == ("OK", str(linked.id), [("sandbox", account)])
    header = str(result.headers["set-cookie"])
    assert header.split("; ", 1)[1] == "Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax"
    house.secrets.add(cookie_of(result))
    session = house.app.sessions.find(cookie_of(result))
    assert session is not None
    assert session.user_id == linked.id
    assert is_live(house, linked.cookie)  # another browser's
    assert cookie_of(result) not in str(result.answer)


def test_the_cookie_is_for_tls_only_where_there_is_tls(
    house: House, tmp_path: Path, logs: Path, linked: Person, account: str
) -> None:
    settings = house.app.settings.model_copy(update={"public_url": "https://doorward.example"})
    with opened(settings, logs / f"{tmp_path.name}.log") as app, served(app, tmp_path) as channel:
        anyone = Caller(channel)
        result = anyone.log_in(provider="sandbox", code=house.provider.code("sandbox", account))
        assert str(result.headers["set-cookie"]).endswith("; SameSite=Lax; Secure")
        result = anyone("LogOut", cookie(cookie_of(result)))
        assert str(result.headers["set-cookie"]).endswith("; SameSite=Lax; Secure")


@pytest.mark.parametrize("means", ["code", "accessToken"])
@pytest.mark.parametrize("presented", ["own", "another's", "unknown"])
def test_a_log_in_ends_the_session_that_it_came_with(
    house: House, anyone: Caller, as_client: Caller, linked: Person, account: str, presented: str, means: str
) -> None:
    """Who logs in from a browser where somebody is logged in takes that one's place."""
    bystander = house.person()
    value = {"own": linked.cookie, "another's": house.person().cookie, "unknown": "unknown"}[presented]
    caller = anyone if means == "code" else as_client
    provider = house.provider
    proof = provider.code("sandbox", account) if means == "code" else provider.access_token(account)
    result = caller.log_in(cookie(value), provider="sandbox", **{means: proof})
    assert result.code == "OK"
    assert cookie_of(result) != value
    assert is_live(house, cookie_of(result))
    assert not is_live(house, value)
    assert is_live(house, bystander.cookie)
    assert is_live(house, linked.cookie) == (presented != "own")


def test_a_failed_log_in_ends_no_session(house: House, anyone: Caller, linked: Person, account: str) -> None:
    session = cookie(linked.cookie)
    for proof, outcome in (
        ({"code": "unknown"}, _CODE_REJECTED),
        ({"code": house.provider.code("sandbox", f"not-{account}")}, "NOT_FOUND NO_SUCH_IDENTITY"),
        ({"accessToken": house.provider.access_token(account)}, _NO_CLIENT),
        ({}, _REQUIRED),
    ):
        assert anyone.log_in(session, provider="sandbox", **proof).short == outcome
    foreign = (*session, ("origin", "https://evil.example"))
    code = house.provider.code("sandbox", account)
    assert anyone.log_in(foreign, provider="sandbox", code=code).short == "PERMISSION_DENIED ORIGIN_NOT_ALLOWED"
    assert is_live(house, linked.cookie)


def test_nobody_logs_in_over_the_port_of_the_services(
    house: House, over_tcp: grpc.Channel, linked: Person, account: str
) -> None:
    code, before = house.provider.code("sandbox", account), requests(house)
    result = Caller(over_tcp).log_in(cookie(linked.cookie), provider="sandbox", code=code)
    assert result.short == "PERMISSION_DENIED SERVICE_TOKEN_REQUIRED"
    assert is_live(house, linked.cookie)
    assert requests(house) == before


def test_all_presented_sessions_end(house: House, anyone: Caller, linked: Person, account: str) -> None:
    """A browser may hold two cookies of the name, of different paths."""
    other = house.app.sessions.create(house.app.users.get(linked.slug))[1]
    house.secrets.add(other)
    both = (("cookie", f"doorward_session={linked.cookie}; doorward_session={other}"),)
    assert anyone.log_in(both, provider="sandbox", code=house.provider.code("sandbox", account)).code == "OK"
    assert [is_live(house, one) for one in (linked.cookie, other)] == [False, False]


@pytest.mark.parametrize("token", ["right", "wrong", 5, 0, False, [], {}], ids=repr)
def test_nobody_logs_in_by_a_token_without_being_a_client(
    house: House, anyone: Caller, linked: Person, account: str, token: Any
) -> None:
    """Else whoever holds a user's token, any application, could become that user."""
    code = house.provider.code("sandbox", account)
    token = house.provider.access_token(account) if token == "right" else token
    before = requests(house)
    proofs: list[dict[str, Any]] = [{}, {"code": code}]
    for more in proofs:
        for metadata in ((), cookie(linked.cookie)):
            result = anyone.log_in(metadata, provider="sandbox", accessToken=token, **more)
            assert result.short == _NO_CLIENT
            assert result.trailers["www-authenticate"] == 'Basic realm="doorward"'
    assert requests(house) == before
    # null and "" are none.
    for nothing in (None, ""):
        code = house.provider.code("sandbox", account)
        assert anyone.log_in(provider="sandbox", accessToken=nothing, code=code).code == "OK"


@pytest.mark.parametrize("means", ["code", "accessToken"])
@pytest.mark.parametrize("owner", ["another client", "the operator"])
def test_a_client_logs_in_its_own_users_only(
    house: House, anyone: Caller, as_client: Caller, provider: SandboxProvider, means: str, owner: str
) -> None:
    client = house.client()
    stranger = house.person(client)
    account = f"stranger-{stranger.id}"
    token = provider.access_token(account)
    other = Caller(anyone.channel, basic(client))
    assert other("AddOAuthIdentity", handle=stranger.slug, provider="sandbox", accessToken=token).code == "OK"
    if owner == "the operator":
        with house.app.database.writing():
            user = house.app.users.get(stranger.slug)
            user.client = None
            user.save()

    def log_in(caller: Caller) -> Result:
        proof = provider.code("sandbox", account) if means == "code" else token
        return caller.log_in(provider="sandbox", **{means: proof})

    result = log_in(as_client)
    assert (result.short, result.headers.get("set-cookie")) == ("PERMISSION_DENIED NOT_YOUR_USER", None)
    assert log_in(other).short == ("OK" if owner == "another client" else "PERMISSION_DENIED NOT_YOUR_USER")
    assert anyone.log_in(provider="sandbox", code=provider.code("sandbox", account)).code == "OK"


def test_an_unlinked_account_logs_nobody_in(house: House, as_client: Caller, linked: Person, account: str) -> None:
    token = house.provider.access_token(account)
    result = as_client.log_in(provider="sandbox", accessToken=token)
    assert result.code == "OK"
    as_client("RemoveOAuthIdentity", handle=linked.slug, provider="sandbox", id=account)
    assert as_client.log_in(provider="sandbox", accessToken=token).short == "NOT_FOUND NO_SUCH_IDENTITY"
    # The account's id at another provider is another account.
    assert as_client.log_in(provider="nested", accessToken=token).short == "NOT_FOUND NO_SUCH_IDENTITY"
    assert is_live(house, cookie_of(result))  # live sessions go on


# Logging out


def test_a_log_out_ends_the_session_that_it_came_with(house: House, anyone: Caller) -> None:
    person, bystander = house.person(), house.person()
    _, elsewhere = house.app.sessions.create(house.app.users.get(person.slug))
    result = anyone("LogOut", cookie(person.cookie))
    assert result.code == "OK"
    assert result.headers["set-cookie"] == "doorward_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"
    assert [is_live(house, value) for value in (person.cookie, elsewhere, bystander.cookie)] == [False, True, True]
    again = anyone("LogOut", cookie(person.cookie))
    assert (again.short, again.headers.get("set-cookie")) == ("UNAUTHENTICATED NO_SESSION", None)


def test_a_log_out_everywhere_ends_all_of_the_user_s(house: House, anyone: Caller) -> None:
    person, bystander = house.person(), house.person()
    user = house.app.users.get(person.slug)
    others = [house.app.sessions.create(user)[1] for _ in range(3)]
    result = anyone("LogOutEverywhere", cookie(others[1]))
    assert result.code == "OK"
    assert result.headers["set-cookie"] == "doorward_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"
    assert [is_live(house, value) for value in (person.cookie, *others)] == [False] * 4
    assert is_live(house, bystander.cookie)
    assert anyone("LogOutEverywhere", cookie(person.cookie)).short == "UNAUTHENTICATED NO_SESSION"


def test_of_racing_log_outs_each_succeeds_or_finds_nobody(house: House, anyone: Caller) -> None:
    person = house.person()
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: anyone("LogOut", cookie(person.cookie)).short, range(8)))
    assert "OK" in outcomes
    assert set(outcomes) <= {"OK", "UNAUTHENTICATED NO_SESSION"}
    assert not is_live(house, person.cookie)


@pytest.mark.parametrize(
    ("headers", "live"),
    [
        pytest.param(["a=1", "doorward_session={}"], True, id="in the second header"),
        pytest.param(["doorward_session={}", "b=2"], True, id="in the first header"),
        pytest.param(["doorward_session=x", "doorward_session={}"], False, id="the first one counts"),
    ],
)
def test_several_cookie_headers(house: House, anyone: Caller, headers: list[str], live: bool) -> None:
    person = house.person()
    metadata = tuple(("cookie", header.format(person.cookie)) for header in headers)
    assert anyone("LogOut", metadata).short == ("OK" if live else "UNAUTHENTICATED NO_SESSION")
    assert is_live(house, person.cookie) is not live


# Sessions for backends


@pytest.mark.parametrize("handle", ["slug", "id"])
def test_a_backend_makes_sessions(house: House, over_tcp: grpc.Channel, over_socket: grpc.Channel, handle: str) -> None:
    """For anybody's users: it has authenticated them by means of its own."""
    backend = Caller(over_tcp, bearer(house.service_token("backend")[1]))
    for person in (house.person(), house.person(house.client())):
        before = house.clock.now()
        first, second = (backend("CreateSession", user=str(getattr(person, handle))) for _ in range(2))
        assert (first.code, second.code, first.headers.get("set-cookie")) == ("OK", "OK", None)
        house.secrets |= {first.answer.cookie, second.answer.cookie}
        assert first.answer.cookie != second.answer.cookie
        life = first.answer.expire_time.ToDatetime(UTC) - before
        assert timedelta(days=365) <= life <= timedelta(days=365, seconds=60)
        status = GetMessageClass(METHODS[_STATUS].input_type)(user_id=person.slug, kai_type="flo")
        for value in (first.answer.cookie, second.answer.cookie, person.cookie):
            assert call(over_socket, _STATUS, status, cookie(value)).short == "OK"
        house.clock.ahead = timedelta(days=366)
        assert call(over_socket, _STATUS, status, cookie(first.answer.cookie)).short == "UNAUTHENTICATED NO_SESSION"
        house.clock.ahead = timedelta(0)


@pytest.mark.parametrize("user", ["nobody", "999999", "", "me", "-1", "é", "x" * 5000])
def test_sessions_of_unknown_users(house: House, over_tcp: grpc.Channel, user: str) -> None:
    backend = Caller(over_tcp, bearer(house.service_token("backend")[1]))
    assert backend("CreateSession", user=user).short == "NOT_FOUND USER_NOT_FOUND"


# Failures are limited


@dataclass
class Limited:
    """A server that lets three failures a minute pass."""

    channel: grpc.Channel
    clock: SetClock
    client: Client
    provider: SandboxProvider
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1000)))

    def caller(self, metadata: Metadata = (), address: str | None = None) -> Caller:
        """Somebody at an address of their own, unless another is given."""
        return Caller(self.channel, metadata, address or f"192.0.2.{next(self._numbers)}")

    def code(self, account: str = "ada") -> str:
        return self.provider.code("sandbox", account)


@pytest.fixture
def limited(house: House, provider: SandboxProvider, tmp_path: Path, logs: Path) -> Iterator[Limited]:
    settings = house.app.settings
    database = settings.database.model_copy(update={"url": f"sqlite:///{tmp_path}/doorward.db"})
    limits = LimitsSection(auth_failures=3)
    settings = settings.model_copy(update={"database": database, "limits": limits})
    clock = SetClock()
    with opened(settings, logs / f"{tmp_path.name}.log", clock) as app, served(app, tmp_path) as channel:
        row, secret = app.clients.create("Client")
        limited = Limited(channel, clock, house.known(Client(row.id, secret)), provider)
        app.users.create("Ada", client_id=row.id)
        right = limited.caller(basic(limited.client))
        token = provider.access_token()
        assert right("AddOAuthIdentity", handle="ada", provider="sandbox", accessToken=token).code == "OK"
        yield limited


def test_failed_log_ins_are_limited(limited: Limited) -> None:
    caller = limited.caller()
    for _ in range(3):
        assert caller.log_in(provider="sandbox", code="wrong").short == _CODE_REJECTED
    result = caller.log_in(provider="sandbox", code="wrong")
    assert result.short == _TOO_MANY
    assert result.trailers["retry-after"] == result.metadata["retry_after"]
    assert 50 <= int(result.metadata["retry_after"]) <= 60
    assert caller.log_in(provider="sandbox", code=limited.code()).code == "OK"  # the owner is never locked out
    assert limited.caller().log_in(provider="sandbox", code=limited.code()).code == "OK"
    limited.clock.ahead = timedelta(seconds=61)
    assert caller.log_in(provider="sandbox", code="wrong").short == _CODE_REJECTED


@pytest.mark.parametrize(
    ("prove", "fault", "counts"),
    [
        pytest.param(lambda _: {"code": "wrong"}, None, True, id="wrong code"),
        pytest.param(lambda _: {"accessToken": "x"}, None, True, id="token, but no client"),
        pytest.param(lambda limited: {"code": limited.code("stranger")}, None, True, id="nobody's account"),
        pytest.param(lambda limited: {"code": limited.code()}, {"status": 401}, True, id="lookup refused"),
        pytest.param(
            lambda limited: {"code": limited.code()}, {"status": 200, "body": "{}"}, True, id="lookup without an id"
        ),
        pytest.param(lambda limited: {"code": limited.code()}, {"status": 500}, False, id="the provider's failure"),
        pytest.param(lambda limited: {"code": limited.code()}, {"kind": "cut"}, False, id="the provider is away"),
        pytest.param(lambda _: {"code": 5}, None, False, id="malformed"),
        pytest.param(lambda _: {}, None, False, id="nothing"),
    ],
)
def test_which_failures_count(
    limited: Limited, prove: Callable[[Limited], dict[str, Any]], fault: dict[str, Any] | None, counts: bool
) -> None:
    caller = limited.caller()
    if fault:
        limited.provider.fault("lookup", **{"kind": "status", **fault})
    outcomes = [caller.log_in(provider="sandbox", **prove(limited)).short for _ in range(4)]
    assert "OK" not in outcomes
    assert len(set(outcomes[:3])) == 1
    assert (outcomes[3] == _TOO_MANY) is counts
    assert outcomes[0] != _TOO_MANY


def test_wrong_credentials_are_limited_and_right_ones_pass(limited: Limited) -> None:
    wrong = limited.caller(basic(Client(limited.client.id, "dws_wrong")))
    right = limited.caller(basic(limited.client), wrong.address)
    for _ in range(3):
        result = wrong("GetUser", handle="ada")
        assert (result.short, "retry-after" in result.trailers) == (_NO_CLIENT, False)
    for rpc in ("GetUser", "DeleteUser", "LogIn"):
        result = wrong(rpc, **({} if rpc == "LogIn" else {"handle": "ada"}))
        assert result.short == _TOO_MANY
        assert int(str(result.trailers["retry-after"])) <= 60
    # Whoever has the credentials is never asked.
    assert right("GetUser", handle="ada").code == "OK"
    # At another address, or with another id, one has failures of one's own.
    assert limited.caller(wrong.metadata)("GetUser", handle="ada").short == _NO_CLIENT
    other = limited.caller(basic(Client("dwc_unknown", "dws_wrong")), wrong.address)
    assert other("GetUser", handle="ada").short == _NO_CLIENT
    limited.clock.ahead = timedelta(seconds=61)
    assert wrong("GetUser", handle="ada").short == _NO_CLIENT


def test_others_wrong_credentials_lock_no_client_out_of_logging_in(limited: Limited) -> None:
    """They know its id, which is no secret, and share its address."""
    wrong = limited.caller(basic(Client(limited.client.id, "dws_wrong")))
    for _ in range(4):
        wrong("GetUser", handle="ada")
    right = limited.caller(basic(limited.client), wrong.address)
    assert right.log_in(provider="sandbox", accessToken=limited.provider.access_token()).code == "OK"


def test_a_client_s_failed_log_ins_are_its_own(limited: Limited) -> None:
    client = limited.caller(basic(limited.client))
    anyone = limited.caller((), client.address)
    for _ in range(3):
        assert client.log_in(provider="sandbox", accessToken="wrong").short == "INVALID_ARGUMENT LOOKUP_REJECTED"
    assert client.log_in(provider="sandbox", accessToken="wrong").short == _TOO_MANY
    assert client.log_in(provider="sandbox", code=limited.code()).code == "OK"
    assert client("GetUser", handle="ada").code == "OK"
    assert anyone.log_in(provider="sandbox", code="wrong").short == _CODE_REJECTED


def test_sessions_are_not_limited(limited: Limited) -> None:
    caller = limited.caller()
    for _ in range(6):
        assert caller("LogOut", cookie("unknown")).short == "UNAUTHENTICATED NO_SESSION"


# The log


def test_the_log_names_the_client(house: House, as_client: Caller, client: Client, person: Person) -> None:
    more: Metadata = (("x-request-id", f"of-client-{person.id}"),)
    assert as_client("GetUser", more, handle=person.slug).code == "OK"
    [line] = house.lines(f"of-client-{person.id}")
    assert (line["caller"], line["code"], line["reason"]) == (f"client:{client.id}", "OK", None)
    assert house.lines(client.secret) == []


def test_the_log_of_a_log_in_holds_no_secret(house: House, as_client: Caller, linked: Person, account: str) -> None:
    token, code = house.provider.access_token(account), house.provider.code("sandbox", account)
    results = [as_client.log_in(provider="sandbox", **proof) for proof in ({"accessToken": token}, {"code": code})]
    for secret in (token, code, *map(cookie_of, results)):
        assert house.lines(secret) == []
