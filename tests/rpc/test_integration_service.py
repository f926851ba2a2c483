"""GetAccessToken, as a backend calls it: over TCP, with a service token and a real provider."""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from tests.rpc.conftest import House, Metadata, Result, call, read_failure
from tests.sandbox.client import SandboxProvider
from tests.stack import Person

grpc_max_workers = 16

_METHOD = "/doorward.integration.v1.IntegrationService/GetAccessToken"
_CONNECT = "/doorward.integration.v1.IntegrationService/ConnectKai"
_INVALID_GRANT = '{"error":"invalid_grant"}'

Ask = Callable[..., Result]


@pytest.fixture(scope="module")
def grpc_stub_cls() -> type[stubs.IntegrationServiceStub]:
    return stubs.IntegrationServiceStub


@pytest.fixture
def person(house: House, provider: SandboxProvider) -> Person:
    return house.person()


@pytest.fixture(scope="module")
def of_backend(house: House) -> Metadata:
    return (("authorization", f"Bearer {house.service_token('backend')[1]}"),)


@pytest.fixture
def ask(over_tcp: grpc.Channel, of_backend: Metadata) -> Ask:
    """GetAccessToken of a user by slug, at flo unless another provider is named."""

    def ask(user: str, provider: str = "flo", min_ttl: int | None = None, metadata: Metadata = ()) -> Result:
        request = pb.GetAccessTokenRequest(user=user, provider=provider, min_ttl=min_ttl)
        return call(over_tcp, _METHOD, request, of_backend + metadata)

    return ask


def refreshes(house: House) -> list[dict[str, Any]]:
    """The refreshes that the provider has seen."""
    return house.provider.requests(grant_type="refresh_token")


def stored_pair(house: House, person: Person) -> Any:
    """The tokens as they are stored; sealed anew, they differ."""
    return house.app.database.fetch_one(
        "SELECT access_token, refresh_token, expires_at, obtained_at, needs_reauth FROM connections WHERE user_id = ?",
        (person.id,),
    )


# Tokens that live


@pytest.mark.parametrize("kai", ["flo", "min"])
def test_a_live_token_is_handed_out(house: House, person: Person, ask: Ask, kai: str) -> None:
    before = datetime.now(UTC)
    house.connect(person, kai)
    [family] = house.provider.families()
    for user in (person.slug, str(person.id)):
        result = ask(user, kai)
        assert (result.short, result.answer.access_token) == ("OK", family["access_token"])
        lives_until = result.answer.expire_time.ToDatetime(UTC)
        assert before <= lives_until - timedelta(seconds=3600) <= datetime.now(UTC)
    assert refreshes(house) == []


def test_the_generated_client(house: House, person: Person, over_tcp: grpc.Channel, of_backend: Metadata) -> None:
    house.connect(person)
    stub = stubs.IntegrationServiceStub(over_tcp)
    request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")
    assert stub.GetAccessToken(request, metadata=of_backend).access_token.startswith("access-")


def test_the_gateway_s_socket_is_no_way_in(
    grpc_stub: stubs.IntegrationServiceStub, house: House, person: Person, of_backend: Metadata
) -> None:
    house.connect(person)
    with pytest.raises(grpc.RpcError) as refusal:
        grpc_stub.GetAccessToken(pb.GetAccessTokenRequest(user=person.slug, provider="flo"), metadata=of_backend)
    assert read_failure(refusal.value).short == "UNAUTHENTICATED NO_SERVICE_TOKEN"


def test_a_token_without_a_stated_life(house: House, person: Person, ask: Ask) -> None:
    house.provider.configure(expires_in=None)
    house.connect(person)
    result = ask(person.slug, min_ttl=86400)
    assert result.code == "OK"
    assert not result.answer.HasField("expire_time")
    house.clock.ahead = timedelta(days=3000)
    assert ask(person.slug).answer == result.answer
    assert refreshes(house) == []


@pytest.mark.parametrize("user", ["nobody", "999999", "", "me", "-1", "1e3", "x" * 5000, "%00", "é"])
@pytest.mark.parametrize("provider_id", ["flo", "nothing"])
def test_unknown_users(ask: Ask, user: str, provider_id: str) -> None:
    assert ask(user, provider_id).short == "NOT_FOUND NOT_CONNECTED"


@pytest.mark.parametrize("provider_id", ["flo", "eag", "nothing", "", "FLO", "flo "])
def test_providers_without_a_connection(house: House, person: Person, ask: Ask, provider_id: str) -> None:
    house.connect(person, "min")
    assert ask(person.slug, provider_id).short == "NOT_FOUND NOT_CONNECTED"


@pytest.mark.parametrize(
    ("min_ttl", "outcome"),
    [
        (0, "OK"),
        (1, "OK"),
        (86400, "OK"),
        (-1, "INVALID_ARGUMENT INVALID_MIN_TTL"),
        (86401, "INVALID_ARGUMENT INVALID_MIN_TTL"),
        (2**31 - 1, "INVALID_ARGUMENT INVALID_MIN_TTL"),
        (-(2**31), "INVALID_ARGUMENT INVALID_MIN_TTL"),
    ],
)
def test_the_bounds_of_min_ttl(house: House, person: Person, ask: Ask, min_ttl: int, outcome: str) -> None:
    assert ask(person.slug, min_ttl=min_ttl).short == "NOT_FOUND NOT_CONNECTED"  # which is told first
    house.connect(person)
    assert ask(person.slug, min_ttl=min_ttl).short == outcome


# Refreshing


@pytest.mark.parametrize(
    ("age", "min_ttl", "refreshed"),
    [
        pytest.param(0, None, False, id="new"),
        pytest.param(85, None, False, id="longer than 10 s are left"),
        pytest.param(95, None, True, id="less than 10 s are left"),
        pytest.param(95, 0, False, id="no life is asked for"),
        pytest.param(101, 0, True, id="expired"),
        pytest.param(45, 50, False, id="enough"),
        pytest.param(55, 50, True, id="not enough"),
        pytest.param(45, 86400, False, id="more than a whole life, half is left"),
        pytest.param(55, 86400, True, id="more than a whole life, less than half is left"),
    ],
)
def test_when_it_is_refreshed(
    house: House, person: Person, ask: Ask, age: int, min_ttl: int | None, refreshed: bool
) -> None:
    house.provider.configure(expires_in=100)
    house.connect(person)
    old = house.provider.families()[0]["access_token"]
    house.clock.ahead = timedelta(seconds=age)
    result = ask(person.slug, min_ttl=min_ttl)
    new = house.provider.families()[0]["access_token"]
    assert result.short == "OK"
    assert result.answer.access_token == new
    assert ((new != old), len(refreshes(house))) == (refreshed, int(refreshed))
    if refreshed:
        life = result.answer.expire_time.ToDatetime(UTC) - house.clock.now()
        assert timedelta(seconds=90) < life <= timedelta(seconds=100)
    # The result is stored: the next call needs no refresh.
    assert ask(person.slug, min_ttl=min_ttl).answer == result.answer
    assert len(refreshes(house)) == int(refreshed)


def test_racing_callers_cause_one_refresh(house: House, person: Person, ask: Ask) -> None:
    house.provider.configure(expires_in=0)
    house.connect(person)
    house.provider.configure(expires_in=3600, latency=0.2)
    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda _: ask(person.slug), range(12)))
    assert {(result.short, result.answer.access_token) for result in results} == {
        ("OK", house.provider.families()[0]["access_token"])
    }
    assert len(refreshes(house)) == 1


@pytest.mark.parametrize("rotate", [True, False], ids=["new refresh token", "no refresh token"])
def test_the_refresh_token_of_the_next_refresh(house: House, person: Person, ask: Ask, rotate: bool) -> None:
    house.provider.configure(expires_in=0, rotate=rotate)
    house.connect(person)
    tokens = []
    for _ in range(3):
        tokens.append(house.provider.families()[0]["refresh_token"])
        assert ask(person.slug).short == "OK"
    assert [request["form"]["refresh_token"] for request in refreshes(house)] == tokens
    assert len(set(tokens)) == (3 if rotate else 1)


def test_without_a_refresh_token(house: House, person: Person, ask: Ask) -> None:
    house.provider.configure(expires_in=100, issue_refresh_token=False)
    house.connect(person)
    assert ask(person.slug).short == "OK"
    house.clock.ahead = timedelta(seconds=95)
    assert ask(person.slug).short == "FAILED_PRECONDITION NEEDS_REAUTH"
    assert ask(person.slug, min_ttl=0).short == "OK"  # it still does for those who ask for less
    house.clock.ahead = timedelta(seconds=101)
    assert ask(person.slug, min_ttl=0).short == "FAILED_PRECONDITION NEEDS_REAUTH"
    assert refreshes(house) == []


def test_after_the_provider_has_refused_for_good(
    house: House, person: Person, ask: Ask, over_socket: grpc.Channel
) -> None:
    provider = house.provider
    provider.configure(expires_in=0)
    house.connect(person)
    provider.fault("token", "status", status=400, body=_INVALID_GRANT, times=1)
    for _ in range(3):
        assert ask(person.slug).short == "FAILED_PRECONDITION NEEDS_REAUTH"
    assert ask(person.slug, min_ttl=0).short == "FAILED_PRECONDITION NEEDS_REAUTH"
    assert len(refreshes(house)) == 1  # it is not asked again

    provider.configure(expires_in=3600)
    request = pb.ConnectKaiRequest(user_id="me", kai_type="flo")
    request.code.string_value = provider.code()
    assert call(over_socket, _CONNECT, request, (("cookie", f"doorward_session={person.cookie}"),)).short == "OK"
    result = ask(person.slug)
    assert (result.short, result.answer.access_token) == ("OK", provider.families()[-1]["access_token"])
    assert len(refreshes(house)) == 1


def failure(name: str, outcome: str, error: str | None = None, kind: str = "status", **fault: Any) -> Any:
    """A row: what the token endpoint does, and what the caller is told."""
    return pytest.param({"kind": kind, **fault}, outcome, error, id=name)


_REJECTED = "FAILED_PRECONDITION REFRESH_REJECTED"
_UNAVAILABLE = "UNAVAILABLE PROVIDER_UNAVAILABLE"
_MALFORMED = "UNAVAILABLE PROVIDER_MALFORMED"
_TIMEOUT = "DEADLINE_EXCEEDED PROVIDER_TIMEOUT"


@pytest.mark.parametrize(
    ("fault", "outcome", "error"),
    [
        failure("400", _REJECTED, "invalid_request", body='{"error":"invalid_request"}', status=400),
        failure("401", _REJECTED, "invalid_client", body='{"error":"invalid_client"}', status=401),
        failure("403", _REJECTED, body="<html>", status=403),
        failure("404", _REJECTED, body="", status=404),
        failure("unprintable error", _REJECTED, body='{"error":"\\u0000\\n"}', status=400),
        failure("invalid_grant in an array", _REJECTED, body=f"[{_INVALID_GRANT}]", status=400),
        failure("429", _UNAVAILABLE, body=_INVALID_GRANT, status=429),
        failure("500", _UNAVAILABLE, body=_INVALID_GRANT, status=500),
        failure("503", _UNAVAILABLE, status=503),
        failure("invalid_grant as a success", _MALFORMED, body=_INVALID_GRANT, status=200),
        failure("cut", _UNAVAILABLE, kind="cut"),
        failure("cut body", _UNAVAILABLE, kind="cut_body"),
        failure("not http", _UNAVAILABLE, kind="not_http"),
        failure("hang", _TIMEOUT, kind="hang"),
        failure("trickling headers", _TIMEOUT, kind="trickle_headers"),
        failure("trickling body", _TIMEOUT, kind="trickle_body"),
        failure("garbage", _MALFORMED, kind="garbage"),
        failure("array", _MALFORMED, kind="not_object"),
        failure("no access token", _MALFORMED, kind="no_access_token"),
        failure("token is a number", _MALFORMED, kind="token_not_string"),
        failure("NUL in the token", _MALFORMED, body='{"access_token":"a\\u0000b"}', status=200),
        failure("nested", _MALFORMED, kind="nested"),
        failure("over 1 MiB", _MALFORMED, kind="huge"),
        failure("gzip bomb", _MALFORMED, kind="gzip_bomb"),
        failure("redirect", _MALFORMED, kind="redirect"),
    ],
)
def test_a_failed_refresh_changes_nothing(
    house: House, person: Person, ask: Ask, fault: dict[str, Any], outcome: str, error: str | None
) -> None:
    house.provider.configure(expires_in=0)
    house.connect(person)
    house.provider.configure(expires_in=3600)
    before = stored_pair(house, person)
    house.provider.fault("token", times=1, **fault)
    result = ask(person.slug)
    assert (result.short, result.error, result.domain) == (outcome, error, "doorward")
    assert stored_pair(house, person) == before
    assert len(refreshes(house)) == 1
    again = ask(person.slug)
    assert (again.short, again.answer.access_token) == ("OK", house.provider.families()[0]["access_token"])
    assert len(refreshes(house)) == 2
    assert house.provider.requests("elsewhere") == []


# Around the call


@pytest.mark.parametrize("given", ["abc-123", "A.b_c-9", "x" * 64, str(uuid.UUID(int=7))])
@pytest.mark.parametrize("connected", [True, False], ids=["answer", "failure"])
def test_a_fit_request_id_comes_back(house: House, person: Person, ask: Ask, given: str, connected: bool) -> None:
    if connected:
        house.connect(person)
    result = ask(person.slug, metadata=(("x-request-id", given),))
    assert (result.code, result.trailers["x-request-id"]) == ("OK" if connected else "NOT_FOUND", given)
    line = house.lines(f'"request_id": "{given}"')[-1]
    assert (line["event"], line["code"], line["method"]) == ("call", result.code, _METHOD)


@pytest.mark.parametrize("given", [None, "", "x" * 65, "a b", " a", "a/b", 'a"b', "{}", "a,b"])
def test_an_unfit_request_id_is_replaced(house: House, person: Person, ask: Ask, given: str | None) -> None:
    result = ask(person.slug, metadata=() if given is None else (("x-request-id", given),))
    request_id = result.trailers["x-request-id"]
    assert isinstance(request_id, str)
    assert uuid.UUID(request_id)
    assert request_id != given
    [line] = house.lines(request_id)
    assert (line["code"], line["reason"]) == ("NOT_FOUND", "NOT_CONNECTED")


def test_the_log_names_the_token_by_its_id(house: House, person: Person, over_tcp: grpc.Channel) -> None:
    token_id, value = house.service_token("backend")
    request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")
    result = call(over_tcp, _METHOD, request, (("authorization", f"Bearer {value}"),))
    [line] = house.lines(str(result.trailers["x-request-id"]))
    assert line["caller"] == f"service:{token_id}"
    assert house.lines(value) == []


def test_the_last_use_of_a_token_is_recorded(house: House, person: Person, over_tcp: grpc.Channel) -> None:
    token_id, value = house.service_token("backend")
    metadata: Metadata = (("authorization", f"Bearer {value}"),)
    request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")

    def use_at(ahead: timedelta) -> datetime:
        house.clock.ahead = ahead
        assert call(over_tcp, _METHOD, request, metadata).short == "NOT_FOUND NOT_CONNECTED"
        [token] = [token for token in house.app.service_tokens.list() if token.id == token_id]
        assert isinstance(token.last_used_at, datetime)
        return token.last_used_at

    [unused] = [token for token in house.app.service_tokens.list() if token.id == token_id]
    assert unused.last_used_at is None
    before = house.clock.now()
    first = use_at(timedelta(0))
    assert before <= first.astimezone(UTC) <= house.clock.now()
    assert use_at(timedelta(seconds=30)) == first  # to the minute is enough
    assert use_at(timedelta(seconds=61)) > first
