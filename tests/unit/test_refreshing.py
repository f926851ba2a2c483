"""Refreshing unasked: when a connection is due, who gets it, and what becomes of one that fails."""

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from doorward_server import models
from doorward_server.app import App
from doorward_server.crypto import MasterKey
from doorward_server.errors import CallError, NeedsReauth
from doorward_server.integrations import _CLAIM_DUE, _NEXT_DUE, Ahead
from doorward_server.models import Connection, User, to_micros
from doorward_server.settings import load
from tests.engines import ENGINES
from tests.unit.conftest import StoppedClock
from tests.unit.peers import Peer, answering

LEASE = timedelta(seconds=10)
AHEAD = Ahead(300, 60, LEASE)
LIFE = timedelta(hours=1)
START = datetime(2030, 1, 1, tzinfo=UTC)


# When


@pytest.mark.parametrize(
    ("life", "luck", "before"),
    [
        pytest.param(3600, 0.0, 300, id="an hour"),
        pytest.param(3600, 0.5, 330, id="half of the jitter"),
        pytest.param(3600, 1.0, 360, id="the whole jitter"),
        pytest.param(600, 0.0, 300, id="half of its life"),
        pytest.param(600, 1.0, 300, id="never in the first half"),
        pytest.param(300, 0.0, 150, id="as long as ahead"),
        pytest.param(60, 1.0, 30, id="shorter than ahead"),
        pytest.param(20, 0.0, 10, id="two leases"),
        pytest.param(19.999999, 0.0, None, id="less than two leases"),
        pytest.param(1, 0.0, None, id="a second"),
        pytest.param(0, 0.0, None, id="born dead"),
    ],
)
def test_when_a_pair_is_due(life: float, luck: float, before: float | None) -> None:
    expires_at = START + timedelta(seconds=life)
    expected = None if before is None else expires_at - timedelta(seconds=before)
    assert AHEAD.due_at(START, expires_at, luck) == expected


@pytest.mark.parametrize(
    ("waited", "longest", "luck", "seconds"),
    [
        pytest.param(0, 3600, 0.0, 20, id="at least a claim"),
        pytest.param(-50, 3600, 0.0, 20, id="before its time"),
        pytest.param(100, 3600, 0.0, 100, id="as long again"),
        pytest.param(200, 3600, 0.5, 225, id="and some jitter"),
        pytest.param(1e6, 3600, 0.0, 3600, id="at most so long"),
    ],
)
def test_how_long_a_failure_is_put_off(waited: float, longest: float, luck: float, seconds: float) -> None:
    pause = AHEAD.pause(timedelta(seconds=waited), timedelta(seconds=longest), luck)
    assert pause == timedelta(seconds=seconds)


# With a provider


class House:
    """The domain, and providers flo and min that answer as they are told."""

    def __init__(self, home: Path, clock: StoppedClock, peer: Peer, seen: list[bytes], engine: str, more: str) -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        sections = [
            f'[providers.{kai}]\nkind = "kai"\ntoken_url = "{peer.url}/{kai}"\nclient_id = "doorward"\n'
            'client_secret = "sekret"\nredirect_uri = "https://app.example/connected"\n'
            for kai in ("flo", "min")
        ]
        sections.append(f'[outbound]\nallow = ["{peer.address}"]\n')
        (home / "doorward.toml").write_text("".join([more, engine, *sections]))
        if not (home / "master.key").exists():
            (home / "master.key").touch(mode=0o600)
            (home / "master.key").write_text(f"{MasterKey.generate()}\n")
        self.clock = clock
        self.app = App(load(home), clock)
        self.seen = seen
        self.answer: dict[str, Any] = {"access_token": "a", "refresh_token": "r", "expires_in": LIFE.total_seconds()}
        self.status = "200 OK"
        _ = self.app.database

    def connect(self, kai: str = "flo", **answer: Any) -> Connection:
        """A new user's connection."""
        number = User.select().count()
        user = self.app.users.create(f"Ada {number}x")
        before, self.answer = self.answer, {**self.answer, **answer}
        self.app.integrations.connect(user.id, kai, f"code {number}")
        self.answer = before
        self.seen.clear()
        return Connection.get(Connection.user == user.id)

    def fail(self, status: str, error: str = "") -> None:
        self.status, self.answer = status, {"error": error}

    def claim(self, kai: str = "flo", most: int = 100) -> list[Connection]:
        return self.app.integrations.claim_due(kai, most)

    def refresh(self, claimed: Connection) -> Connection:
        """The row after its refresh."""
        self.app.integrations.refresh_due(claimed)
        return Connection.get_by_id(claimed.id)

    def go_to(self, time: datetime) -> None:
        self.clock.time = time

    def close(self) -> None:
        self.app.database.close()
        self.app.outbound.close()


Make = Callable[..., House]


@pytest.fixture
def make_house(tmp_path: Path, clock: StoppedClock) -> Iterator[Make]:
    with contextlib.ExitStack() as exit_stack:
        houses: list[House] = []
        seen: list[bytes] = []
        engine = ENGINES.settings()

        def serve(connection: socket.socket, stopping: threading.Event) -> None:
            house = houses[-1]
            answering(json.dumps(house.answer).encode(), status=house.status, seen=seen)(connection, stopping)

        peer = exit_stack.enter_context(Peer(serve))

        def make(more: str = "") -> House:
            houses.append(House(tmp_path / "home", clock, peer, seen, engine, more))
            exit_stack.callback(houses[-1].close)
            return houses[-1]

        yield make
        url = houses[-1].app.settings.database_url
    ENGINES.forget(url)


@pytest.fixture
def house(make_house: Make) -> House:
    return make_house()


def due_time(connection: Connection) -> datetime:
    refresh_at: datetime = connection.refresh_at
    return refresh_at


@pytest.mark.parametrize(
    ("answer", "is_due"),
    [
        pytest.param({}, True, id="a pair that ends"),
        pytest.param({"expires_in": None}, False, id="no end"),
        pytest.param({"refresh_token": None}, False, id="no refresh token"),
        pytest.param({"expires_in": 5}, False, id="a life too short"),
        pytest.param({"expires_in": 0}, False, id="no life"),
    ],
)
def test_what_is_due_ever(house: House, answer: dict[str, Any], is_due: bool) -> None:
    connection = house.connect(**answer)
    assert (connection.refresh_at is not None) == is_due
    house.clock.advance(timedelta(days=365))
    assert [claimed.id for claimed in house.claim()] == [connection.id] * is_due


def test_when_a_connection_is_due(house: House) -> None:
    connections = [house.connect() for _ in range(20)]
    ends = house.clock.now() + LIFE
    times = [ends - due_time(connection) for connection in connections]
    assert timedelta(seconds=300) <= min(times) < max(times) <= timedelta(seconds=360)
    house.go_to(due_time(connections[0]) - timedelta(microseconds=1))
    assert connections[0].id not in {claimed.id for claimed in house.claim()}
    house.clock.advance(timedelta(microseconds=1))
    assert [claimed.id for claimed in house.claim()] == [connections[0].id]


def test_those_that_are_due_for_longest_come_first(house: House) -> None:
    ids = []
    for _ in range(5):
        ids.append(house.connect().id)
        house.clock.advance(timedelta(minutes=2))
    house.clock.advance(LIFE)
    claims = [{claimed.id for claimed in house.claim(most=2)} for _ in range(4)]
    assert claims == [set(ids[:2]), set(ids[2:4]), set(ids[4:]), set()]


def test_a_claim_ends_by_itself(house: House) -> None:
    """What a process that died has claimed is due again soon."""
    connection = house.connect()
    house.go_to(due_time(connection))
    [claimed] = house.claim()
    assert due_time(claimed) == house.clock.now() + 2 * LEASE
    house.clock.advance(2 * LEASE - timedelta(microseconds=1))
    assert house.claim() == []
    house.clock.advance(timedelta(microseconds=1))
    assert [again.id for again in house.claim()] == [connection.id]


def test_providers_are_looked_at_by_themselves(house: House) -> None:
    ids = {kai: house.connect(kai).id for kai in ("flo", "min")}
    house.clock.advance(LIFE)
    assert {kai: [claimed.id for claimed in house.claim(kai)] for kai in ids} == {
        kai: [one] for kai, one in ids.items()
    }


@pytest.mark.parametrize("late", [timedelta(0), timedelta(days=30)], ids=["in time", "long after its end"])
def test_a_refresh(house: House, late: timedelta) -> None:
    connection = house.connect()
    house.go_to(due_time(connection) + late)
    [claimed] = house.claim()
    house.answer |= {"access_token": "new", "refresh_token": "new"}
    refreshed = house.refresh(claimed)
    assert len(house.seen) == 1
    assert (refreshed.obtained_at, refreshed.expires_at) == (house.clock.now(), house.clock.now() + LIFE)
    assert timedelta(seconds=300) <= refreshed.expires_at - refreshed.refresh_at <= timedelta(seconds=360)
    assert (refreshed.lease_expires_at, refreshed.needs_reauth) == (None, False)
    assert house.app.integrations.access_token(str(refreshed.user_id), "flo").value == "new"
    assert len(house.seen) == 1


def test_a_refresh_token_that_stays_is_used_again(house: House) -> None:
    house.connect()
    for _ in range(3):
        house.clock.advance(LIFE)
        [claimed] = house.claim()
        house.answer |= {"refresh_token": None}
        assert house.refresh(claimed).refresh_at is not None
    assert len(house.seen) == 3


def test_nothing_is_sent_when_a_call_was_faster(house: House) -> None:
    connection = house.connect()
    house.clock.advance(LIFE)
    [claimed] = house.claim()
    house.app.integrations.access_token(str(connection.user_id), "flo")
    before = Connection.get_by_id(connection.id)
    after = house.refresh(claimed)
    assert len(house.seen) == 1
    assert (after.access_token, after.refresh_at) == (before.access_token, before.refresh_at)


def test_nothing_is_sent_while_a_call_is_at_it(house: House) -> None:
    connection = house.connect()
    house.clock.advance(LIFE)
    Connection.update(lease_epoch=1, lease_expires_at=house.clock.now() + LEASE).execute()
    [claimed] = house.claim()
    house.refresh(claimed)
    assert house.seen == []
    # Should the other one be dead, its lease is over when this claim is.
    house.clock.advance(2 * LEASE)
    [claimed] = house.claim()
    assert claimed.id == connection.id
    house.refresh(claimed)
    assert len(house.seen) == 1


def test_one_that_is_disconnected_meanwhile(house: House) -> None:
    connection = house.connect()
    house.clock.advance(LIFE)
    [claimed] = house.claim()
    house.app.integrations.revoke(connection.user_id, "flo")
    house.app.integrations.refresh_due(claimed)
    assert house.seen == []


def test_a_grant_that_is_over_needs_the_user(house: House) -> None:
    connection = house.connect()
    house.clock.advance(LIFE)
    [claimed] = house.claim()
    house.fail("400 Bad Request", "invalid_grant")
    refused = house.refresh(claimed)
    assert (refused.needs_reauth, refused.refresh_at) == (True, None)
    assert not house.app.integrations.status(connection.user_id, "flo")
    house.clock.advance(timedelta(days=365))
    assert house.claim() == []
    # Connected anew, it is due again some time.
    house.status, house.answer = "200 OK", {"access_token": "a", "refresh_token": "r", "expires_in": 3600}
    house.app.integrations.connect(connection.user_id, "flo", "another code")
    assert Connection.get_by_id(connection.id).refresh_at is not None


def test_a_grant_that_a_call_finds_over_is_due_no_more(house: House) -> None:
    connection = house.connect()
    house.clock.advance(LIFE)
    house.fail("400 Bad Request", "invalid_grant")
    with pytest.raises(NeedsReauth):
        house.app.integrations.access_token(str(connection.user_id), "flo")
    assert house.claim() == []


@pytest.mark.parametrize(
    ("status", "error", "longest"),
    [
        pytest.param("503 Busy", "", timedelta(minutes=1), id="down"),
        pytest.param("429 Too Many", "", timedelta(minutes=1), id="too many"),
        pytest.param("200 OK", "", timedelta(minutes=1), id="nonsense"),
        pytest.param("401 Unauthorized", "invalid_client", timedelta(hours=6), id="refusal"),
        pytest.param("400 Bad Request", "temporarily_unavailable", timedelta(hours=6), id="another refusal"),
    ],
)
def test_a_failure_is_put_off_for_longer_and_longer(house: House, status: str, error: str, longest: timedelta) -> None:
    connection = house.connect()
    house.go_to(due_time(connection))
    house.fail(status, error)
    pauses: list[timedelta] = []
    for _ in range(16):
        [claimed] = house.claim()
        failed = house.refresh(claimed)
        assert (failed.access_token, failed.needs_reauth) == (connection.access_token, False)
        assert failed.lease_expires_at is None
        pauses.append(failed.refresh_at - house.clock.now())
        house.go_to(due_time(failed))
    assert len(house.seen) == len(pauses)
    assert 2 * LEASE <= pauses[0] <= timedelta(seconds=75)
    assert pauses[-1] >= longest
    assert max(pauses) <= longest * 1.25
    shorter = [pause for pause in pauses if pause < longest]
    assert all(later >= 1.5 * earlier for earlier, later in itertools.pairwise(shorter[2:]))


def test_a_sealed_value_that_does_not_open_is_put_off(house: House) -> None:
    connection = house.connect()
    Connection.update(refresh_token=b"garbage").execute()
    house.clock.advance(LIFE)
    [claimed] = house.claim()
    assert due_time(house.refresh(claimed)) > house.clock.now() + 2 * LEASE
    assert (house.seen, Connection.get_by_id(connection.id).needs_reauth) == ([], False)


def test_a_late_failure_puts_nothing_off(house: House) -> None:
    """Another process has claimed and refreshed it meanwhile."""
    house.connect()
    house.clock.advance(LIFE)
    [slow] = house.claim()
    house.clock.advance(2 * LEASE)
    [quick] = house.claim()
    refreshed = house.refresh(quick)
    house.fail("503 Busy")
    assert due_time(house.refresh(slow)) == due_time(refreshed)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(3000, 300, id="later than it was"), pytest.param(0, 300, id="switched on")],
)
def test_the_setting_is_changed(make_house: Make, before: float, after: float) -> None:
    """A pair that was stored under other settings is refreshed once, when it is due by those of now, or soon after."""
    old = make_house(f"[refresh]\nahead = {before}\njitter = 0\n")
    old.connect()
    house = make_house(f"[refresh]\nahead = {after}\njitter = 0\n")
    [ends] = [row.expires_at for row in Connection.select()]
    while not house.seen:
        row = Connection.get()
        house.go_to(due_time(row))
        for claimed in house.claim():
            house.refresh(claimed)
    assert ends - timedelta(seconds=after) <= house.clock.now() <= ends
    assert len(house.seen) == 1


def test_errors_of_calls_stay_as_they_are(house: House) -> None:
    """However often a provider has failed, callers are let through to it."""
    connection = house.connect()
    house.clock.advance(LIFE)
    house.fail("503 Busy")
    for number in range(20):
        with pytest.raises(CallError) as failure:
            house.app.integrations.access_token(str(connection.user_id), "flo")
        assert (failure.value.reason, len(house.seen)) == ("PROVIDER_UNAVAILABLE", number + 1)
    assert house.app.breakers.allowance("flo", 1) == 0
    house.status, house.answer = "200 OK", {"access_token": "a", "refresh_token": "r", "expires_in": 3600}
    house.app.integrations.access_token(str(connection.user_id), "flo")
    assert house.app.breakers.allowance("flo", 1) == 1


# The statements


@pytest.mark.sqlite
def test_the_claim_uses_its_index_at_100_000_rows(house: House) -> None:
    """Of a database that nobody has analyzed, and of one with statistics."""
    now = to_micros(house.clock.now())
    database = house.app.database
    with database.writing():
        for sql in (
            """
            WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000)
            INSERT INTO users (slug, name, created_at) SELECT 'user-' || i, 'User', 0 FROM n
            """,
            f"""
            INSERT INTO connections (user_id, provider, access_token, refresh_token, expires_at, obtained_at,
                                     needs_reauth, lease_epoch, created_at, refresh_at)
            SELECT id, CASE id % 2 WHEN 0 THEN 'flo' ELSE 'min' END, x'', x'', {now}, 0, FALSE, 0, 0,
                   CASE WHEN id % 10 < 8 THEN {now} + id - 1000 END FROM users
            """,
        ):
            database.execute(sql, ())
    claim = _CLAIM_DUE.replace("FOR UPDATE SKIP LOCKED", "")
    statements = ((_NEXT_DUE, ("flo", now)), (claim, (now, "flo", now, 10)))
    for statistics in (False, True):
        if statistics:
            database.engine.execute_sql("ANALYZE")  # type: ignore[no-untyped-call]
        for sql, parameters in statements:
            plan = [row[-1] for row in database.fetch_rows(f"EXPLAIN QUERY PLAN {sql}", parameters)]
            used = [step for step in plan if "connections_refresh (provider=? AND refresh_at<?)" in step]
            assert used, (statistics, plan)
            read = [step for step in plan if step != "SCAN due"]  # which holds what is claimed
            assert [step for step in read if "SCAN" in step or "TEMP B-TREE" in step] == [], (statistics, plan)
    assert len(house.claim(most=300)) == 300


# From before


@pytest.mark.sqlite  # the schema is altered, which a database that is used again must not be
def test_connections_of_before_become_due(house: House, clock: StoppedClock) -> None:
    """The migration fills what is refreshed; those that ran out long ago do not all come at once."""
    house.connect()
    rows: dict[str, Any] = {
        "ends": {},
        "no end": {"expires_at": None},
        "no refresh token": {"refresh_token": None},
        "over": {"needs_reauth": True},
        "short": {"expires_at": clock.now() + timedelta(seconds=10)},
        "half": {"expires_at": clock.now() + timedelta(seconds=60)},
        "long over": {
            "obtained_at": datetime(2020, 1, 1, tzinfo=UTC),
            "expires_at": datetime(2020, 1, 2, tzinfo=UTC),
        },
    }
    template = Connection.get()
    for name, changes in rows.items():
        user = house.app.users.create(name)
        values = {**template.__data__, "user": user.id, "refresh_at": None, **changes}
        del values["id"]
        Connection.create(**values)
    database = house.app.database
    with database.writing():
        for index in ("connections_refresh", "jobs_abandoned", "deliveries_finished", "consent_requests_finished"):
            database.execute(f"DROP INDEX {index}", ())
        database.execute("ALTER TABLE connections DROP COLUMN refresh_at", ())
        database.execute("ALTER TABLE jobs DROP COLUMN abandoned_at", ())
        database.execute("DELETE FROM schema_migration WHERE name = '0005_upkeep'", ())
    started = datetime.now(UTC)
    assert database.migrate() == ["0005_upkeep"]
    models.bind(database)
    found = {row.user.name: row.refresh_at for row in Connection.select(Connection, User).join(User)}
    assert {name: found[name] for name in ("no end", "no refresh token", "over", "short")} == dict.fromkeys(
        ("no end", "no refresh token", "over", "short")
    )
    assert found["ends"] == clock.now() + LIFE - timedelta(seconds=300)
    assert found["half"] == clock.now() + timedelta(seconds=30)
    assert timedelta(0) <= found["long over"] - started <= timedelta(hours=1, minutes=1)
