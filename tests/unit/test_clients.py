"""API clients: whose id and secret are right, and for how long."""

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import pytest

from doorward_server.clients import ApiClients, Client
from doorward_server.crypto import fingerprint
from doorward_server.database import Database
from doorward_server.errors import ApiClientNotFound
from tests.unit.conftest import StoppedClock, in_files

HOUR = timedelta(hours=1)
MOMENT = timedelta(microseconds=1)


class Made(NamedTuple):
    """Two clients' ids and secrets."""

    one: str
    secret: str
    other: str
    theirs: str


@pytest.fixture
def clients(database: Database, clock: StoppedClock) -> ApiClients:
    return ApiClients(database, clock)


def valid(clients: ApiClients, client_id: str, secrets: list[str]) -> list[bool]:
    """Which of the secrets let the client in."""
    return [clients.find(client_id, secret) == Client(client_id) for secret in secrets]


def count_secrets(database: Database) -> int:
    row = database.fetch_one("SELECT count(*) FROM client_secrets", ())
    assert row is not None
    number: int = row[0]
    return number


# Creating and finding


def test_a_client_is_found_by_its_id_and_secret(clients: ApiClients, clock: StoppedClock) -> None:
    client, secret = clients.create("Classroom")
    assert (client.name, client.created_at, client.disabled_at) == ("Classroom", clock.now(), None)
    assert client.id.startswith("dwc_")
    assert secret.startswith("dws_")
    assert clients.find(client.id, secret) == Client(client.id)
    clock.advance(timedelta(days=5000))
    assert clients.find(client.id, secret) == Client(client.id)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda made: (made.one, made.theirs), id="another's secret"),
        pytest.param(lambda made: (made.other, made.secret), id="another's id"),
        pytest.param(lambda made: (made.secret, made.one), id="the wrong way round"),
        pytest.param(lambda made: ("dwc_unknown", made.secret), id="unknown id"),
        pytest.param(lambda made: ("", made.secret), id="no id"),
        pytest.param(lambda made: (made.one.upper(), made.secret), id="id in capitals"),
        pytest.param(lambda made: (made.one + " ", made.secret), id="blank after the id"),
        pytest.param(lambda made: (made.one[:-1], made.secret), id="shorter id"),
        pytest.param(lambda made: ("é" + made.one, made.secret), id="id beyond ASCII"),
        pytest.param(lambda made: (made.one, ""), id="no secret"),
        pytest.param(lambda made: (made.one, made.secret[:-1]), id="shorter secret"),
        pytest.param(lambda made: (made.one, made.secret + "\n"), id="line feed after the secret"),
        pytest.param(lambda made: (made.one, made.secret.swapcase()), id="secret in the other case"),
        pytest.param(lambda made: (made.one, made.secret[4:]), id="secret without its prefix"),
        pytest.param(lambda made: (made.one, fingerprint(made.secret).hex()), id="the stored hash"),
        pytest.param(lambda made: (made.one, "\x00"), id="NUL"),
        pytest.param(lambda made: (made.one, "\udcff"), id="lone surrogate"),
        pytest.param(lambda made: (made.one, "x" * 100_000), id="long secret"),
    ],
)
def test_nobody_else_is(clients: ApiClients, make: Callable[[Made], tuple[str, str]]) -> None:
    (one, secret), (other, theirs) = clients.create("One"), clients.create("Other")
    assert clients.find(*make(Made(one.id, secret, other.id, theirs))) is None


def test_clients_are_listed_in_the_order_of_their_making(clients: ApiClients, clock: StoppedClock) -> None:
    assert clients.list() == []
    made = []
    for name in ("B", "A", "A"):
        made.append(clients.create(name)[0])
        clock.advance(MOMENT)
    clients.enable(made[1].id, enabled=False)
    assert [(client.id, client.name) for client in clients.list()] == [(client.id, client.name) for client in made]
    assert len({client.id for client in made}) == 3
    assert clients.get(made[2].id).created_at == made[2].created_at


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda clients: clients.get("dwc_unknown"), id="get"),
        pytest.param(lambda clients: clients.rotate("dwc_unknown", HOUR), id="rotate"),
        pytest.param(lambda clients: clients.enable("dwc_unknown", enabled=True), id="enable"),
        pytest.param(lambda clients: clients.enable("dwc_unknown", enabled=False), id="disable"),
    ],
)
def test_an_unknown_client(clients: ApiClients, use: Callable[[ApiClients], object]) -> None:
    clients.create("Somebody")
    with pytest.raises(ApiClientNotFound):
        use(clients)


def test_no_secret_stands_in_the_files(clients: ApiClients, database: Database) -> None:
    client, first = clients.create("Classroom")
    second = clients.rotate(client.id, HOUR)
    assert in_files(database, client.id)
    assert [in_files(database, secret) for secret in (first, second, first[4:], second[4:])] == [False] * 4


# Another secret


@pytest.mark.parametrize(
    ("overlap", "later", "expected"),
    [
        pytest.param(HOUR, timedelta(0), [True, True], id="at once"),
        pytest.param(HOUR, HOUR - MOMENT, [True, True], id="until its last moment"),
        pytest.param(HOUR, HOUR, [False, True], id="over"),
        pytest.param(HOUR, timedelta(days=5000), [False, True], id="long over"),
        pytest.param(timedelta(0), timedelta(0), [False, True], id="no overlap"),
    ],
)
def test_the_secret_before_is_valid_for_the_overlap(
    clients: ApiClients, clock: StoppedClock, overlap: timedelta, later: timedelta, expected: list[bool]
) -> None:
    client, first = clients.create("Classroom")
    second = clients.rotate(client.id, overlap)
    assert second != first
    clock.advance(later)
    assert valid(clients, client.id, [first, second]) == expected


@pytest.mark.parametrize(
    ("overlaps", "pause", "expected"),
    [
        pytest.param((HOUR, HOUR), timedelta(0), [False, True, True], id="two are valid at most"),
        pytest.param((HOUR, HOUR), 2 * HOUR, [False, True, True], id="the older had expired"),
        pytest.param((HOUR, timedelta(0)), timedelta(0), [False, False, True], id="without overlap"),
        pytest.param((HOUR, HOUR, HOUR), timedelta(0), [False, False, True, True], id="three in a row"),
    ],
)
def test_a_further_secret_ends_the_oldest(
    clients: ApiClients,
    clock: StoppedClock,
    database: Database,
    overlaps: tuple[timedelta, ...],
    pause: timedelta,
    expected: list[bool],
) -> None:
    client, first = clients.create("Classroom")
    bystander, theirs = clients.create("Bystander")
    secrets = [first]
    for overlap in overlaps:
        secrets.append(clients.rotate(client.id, overlap))
        if overlap is not overlaps[-1]:
            clock.advance(pause)
    assert valid(clients, client.id, secrets) == expected
    assert valid(clients, bystander.id, [theirs]) == [True]
    assert count_secrets(database) == 3  # nothing heaps up: two of the one and one of the other
    clock.advance(HOUR)
    assert valid(clients, client.id, secrets) == [False] * len(overlaps) + [True]


# Disabled clients


def test_a_disabled_client_is_not_found_until_it_is_enabled(clients: ApiClients, clock: StoppedClock) -> None:
    client, first = clients.create("Classroom")
    second = clients.rotate(client.id, HOUR)
    bystander, theirs = clients.create("Bystander")
    for _ in range(2):  # doing it twice is no error
        clients.enable(client.id, enabled=False)
    assert valid(clients, client.id, [first, second]) == [False, False]
    assert valid(clients, bystander.id, [theirs]) == [True]
    assert clients.get(client.id).disabled_at == clock.now()
    clock.advance(HOUR / 2)
    for _ in range(2):
        clients.enable(client.id, enabled=True)
    assert clients.get(client.id).disabled_at is None
    assert valid(clients, client.id, [first, second]) == [True, True]
    clock.advance(HOUR / 2)
    assert valid(clients, client.id, [first, second]) == [False, True]  # that time went on


def test_a_new_secret_enables_nobody(clients: ApiClients) -> None:
    client, _ = clients.create("Classroom")
    clients.enable(client.id, enabled=False)
    secret = clients.rotate(client.id, HOUR)
    assert clients.find(client.id, secret) is None
    clients.enable(client.id, enabled=True)
    assert clients.find(client.id, secret) == Client(client.id)
