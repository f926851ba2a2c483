"""What a scrape reads from the database: what it says, and what it costs when the tables are large."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from doorward_server import consents, delivery, integrations, jobs
from doorward_server.app import App
from doorward_server.consents import Question, Status
from doorward_server.database import Database
from doorward_server.models import Connection, Delivery, User
from doorward_server.monitoring import StateCollector
from tests.processes import await_condition
from tests.unit.command_line import opened


@pytest.fixture
def app(home: Path) -> Iterator[App]:
    with opened(home) as app:
        app.record_key()
        yield app


@pytest.fixture
def state(app: App) -> StateCollector:
    return StateCollector(app.clock, app.jobs, app.deliveries, app.consents, app.integrations)


def read(state: StateCollector) -> dict[tuple[str, ...], float]:
    """The samples, by the metric's name and its labels' values."""
    return {
        (sample.name.removeprefix("doorward_"), *sample.labels.values()): sample.value
        for family in state.collect()
        for sample in family.samples
    }


def connect(user: User, provider: str = "flo", *, needs_reauth: bool = False) -> None:
    now = user.created_at
    Connection.create(
        user=user.id,
        provider=provider,
        access_token=b"",
        obtained_at=now,
        needs_reauth=needs_reauth,
        lease_epoch=0,
        created_at=now,
    )


def ask(app: App, state: str) -> int:
    return app.consents.request(Question("Bot", "7", f"http://93.184.215.14/{state}", ""), None, "192.0.2.1")


def test_what_waits(app: App, state: StateCollector) -> None:
    assert read(state)["jobs_due",] == 0
    requests = [ask(app, "a"), ask(app, "b"), ask(app, "c")]
    app.consents.lease(1, timedelta(minutes=1), 0)
    app.consents.mark_prompted(requests[0], 1, "1/2/")
    app.consents.resolve(requests[2], Status.CANCELED, actor="test")
    with app.database.writing():
        app.jobs.queue("revoke-token", {}, app.clock.now() - timedelta(minutes=5))
        app.jobs.queue("revoke-token", {}, app.clock.now() + timedelta(minutes=5))
    seen = read(state)
    assert seen["database_up",] == 1
    assert seen["jobs_due",] == 2  # one is the delivery
    assert 300 <= seen["jobs_oldest_due_seconds",] < 360
    assert (seen["consent_requests_open", "pending"], seen["consent_requests_open", "prompted"]) == (1, 1)
    assert (seen["deliveries", "queued"], seen["deliveries", "abandoned"]) == (1, 0)
    with app.database.writing():
        Delivery.update(status="abandoned").execute()
    seen = read(state)
    assert (seen["deliveries", "queued"], seen["deliveries", "abandoned"]) == (0, 1)


def test_connections_are_counted_once_a_minute(app: App, state: StateCollector) -> None:
    user = app.users.create("Ada")
    with app.database.writing():
        connect(user)
        connect(user, "min", needs_reauth=True)
    await_condition(lambda: ("connections", "flo", "connected") in read(state), "a count")
    seen = read(state)
    assert (seen["connections", "flo", "connected"], seen["connections", "min", "needs_reauth"]) == (1, 1)
    another = app.users.create("Grace")
    with app.database.writing():
        connect(another)
    assert read(state)["connections", "flo", "connected"] == 1


@pytest.mark.sqlite
def test_a_damaged_database_is_told_and_nothing_else(state: StateCollector, home: Path) -> None:
    for path in home.glob("doorward.db*"):
        path.write_bytes(b"garbage" * 999)
    assert read(state) == {("database_up",): 0}


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "sql",
    [
        pytest.param(jobs._BACKLOG.replace("?", "0"), id="jobs that are due"),
        pytest.param(delivery._UNSENT, id="deliveries that were not sent"),
        pytest.param(consents._COUNT_OPEN, id="open requests"),
        pytest.param(integrations._COUNT, id="connections"),
    ],
)
def test_no_table_is_read_whole(database: Database, sql: str) -> None:
    plan = [row[3] for row in database.fetch_rows(f"EXPLAIN QUERY PLAN {sql}", ())]
    assert [step for step in plan if "INDEX" in step]
    assert [step for step in plan if step.startswith("SCAN") and "INDEX" not in step and "CONSTANT" not in step] == []
