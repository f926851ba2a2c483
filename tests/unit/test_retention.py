"""Retention: what is over goes when its time has come, and what anybody still needs stays."""

import concurrent.futures
import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from doorward_server.audit import Audit
from doorward_server.consents import Status
from doorward_server.database import Database
from doorward_server.errors import ConsentRequestNotFound, DeliveryNotFound
from doorward_server.jobs import PutOff
from doorward_server.logs import make_log
from doorward_server.models import (
    CodeClaim,
    Connection,
    ConsentRequest,
    Delivery,
    DeliveryAttempt,
    Grant,
    GrantKey,
    Job,
    Session,
)
from doorward_server.upkeep import Routine, Sweep, Sweeper
from tests.processes import await_condition
from tests.unit.conftest import StoppedClock
from tests.unit.test_consents import ALLOWED, CALLBACK, LIFETIME, NO_LIMITS, World, bring_to, make_world, world

__all__ = ["make_world", "world"]

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
INSTANT = timedelta(microseconds=1)
# By default.
REQUESTS, DELIVERIES, SESSIONS, JOBS, CLAIMS = 90 * DAY, 30 * DAY, DAY, 30 * DAY, 7 * DAY


def sweep(world: World) -> None:
    world.app.sweeper.run(threading.Event())


def kept(more: str) -> str:
    return f"{NO_LIMITS}{ALLOWED}[retention]\n{more}"


def is_there(world: World, request_id: int) -> bool:
    try:
        world.consents.get(request_id)
    except ConsentRequestNotFound:
        return False
    return True


def deliver(world: World) -> None:
    """All deliveries were sent; their jobs are done."""
    Delivery.update(status="sent", finished_at=world.clock.now()).where(Delivery.finished_at.is_null()).execute()
    Job.delete().execute()


def close_prompts(world: World) -> None:
    ConsentRequest.update(message_closed_at=world.clock.now()).where(
        ConsentRequest.finished_at.is_null(False)
    ).execute()


def finished(world: World, status: Status = Status.CANCELED) -> int:
    """A request that is over in every respect."""
    request_id = bring_to(world, status)
    deliver(world)
    close_prompts(world)
    return request_id


def goes_after(world: World, is_left: Callable[[], bool], age: timedelta) -> None:
    """It stays until it is so old, and goes then."""
    world.clock.advance(age - INSTANT)
    sweep(world)
    assert is_left(), "it went too early"
    world.clock.advance(INSTANT)
    sweep(world)
    assert not is_left(), "it stayed too long"


def stays(world: World, is_left: Callable[[], bool], age: timedelta = 3650 * DAY) -> None:
    world.clock.advance(age)
    sweep(world)
    assert is_left()


# What goes


def test_expired_sessions_go(world: World) -> None:
    world.app.sessions.create(world.user())
    world.clock.advance(timedelta(seconds=world.app.settings.sessions.lifetime))
    assert world.app.sessions.list() == []
    goes_after(world, Session.select().exists, SESSIONS)


def test_live_sessions_stay(world: World) -> None:
    _, cookie = world.app.sessions.create(world.user())
    stays(world, lambda: world.app.sessions.find(cookie) is not None, 364 * DAY)


def test_used_codes_go(world: World) -> None:
    CodeClaim.create(provider="flo", code_hash=b"hash", user=world.user(), created_at=world.clock.now())
    goes_after(world, CodeClaim.select().exists, CLAIMS)


def test_abandoned_jobs_go(world: World) -> None:
    jobs = world.app.jobs
    with world.app.database.writing():
        jobs.queue("greet", {})
    # The time since it was queued is nothing to the point.
    world.clock.advance(JOBS)
    job = jobs.claim(HOUR)
    assert job is not None
    jobs.abandon(job, "WHY")
    goes_after(world, Job.select().exists, JOBS)


@pytest.mark.parametrize("state", ["queued", "claimed", "put off"])
def test_other_jobs_stay(world: World, state: str) -> None:
    jobs = world.app.jobs
    with world.app.database.writing():
        jobs.queue("greet", {})
    if state != "queued":
        job = jobs.claim(HOUR)
        assert job is not None
        if state == "put off":
            jobs.put_off(job, PutOff(HOUR, "LATER"))
    stays(world, Job.select().exists)


@pytest.mark.parametrize("status", ["sent", "abandoned"])
def test_finished_deliveries_go_with_their_attempts(world: World, status: str) -> None:
    request_id = bring_to(world, Status.CANCELED)
    delivery = Delivery.get(Delivery.request == request_id)
    DeliveryAttempt.create(delivery=delivery, started_at=world.clock.now(), milliseconds=1, status=500)
    Delivery.update(status=status, finished_at=world.clock.now()).execute()
    goes_after(world, Delivery.select().exists, DELIVERIES)
    assert DeliveryAttempt.select().count() == 0
    assert is_there(world, request_id)
    with pytest.raises(DeliveryNotFound):
        world.app.deliveries.redeliver(delivery.id, actor="test")


def test_queued_deliveries_stay_with_their_requests(world: World) -> None:
    request_id = bring_to(world, Status.CANCELED)
    close_prompts(world)
    stays(world, lambda: bool(world.told(request_id)) and is_there(world, request_id))


def test_a_delivery_that_is_sent_again_stays(world: World) -> None:
    request_id = bring_to(world, Status.CANCELED)
    close_prompts(world)
    Delivery.update(status="abandoned", finished_at=world.clock.now()).execute()
    world.clock.advance(DELIVERIES - INSTANT)
    world.app.deliveries.redeliver(Delivery.get().id, actor="test")
    stays(world, lambda: bool(world.told(request_id)) and is_there(world, request_id))


@pytest.mark.parametrize("status", [Status.CANCELED, Status.TIMED_OUT, Status.BLOCKED])
def test_finished_requests_go(world: World, status: Status) -> None:
    request_id = finished(world, status)
    goes_after(world, lambda: is_there(world, request_id), REQUESTS)


@pytest.mark.parametrize("status", [Status.PENDING, Status.PROMPTED])
def test_open_requests_stay(world: World, status: Status) -> None:
    request_id = bring_to(world, status)
    stays(world, lambda: is_there(world, request_id))


@pytest.mark.parametrize(
    ("leases", "prompts"),
    [pytest.param(True, False, id="leased, perhaps sent"), pytest.param(True, True, id="sent")],
)
def test_a_prompt_that_does_not_show_its_outcome_stays(world: World, leases: bool, prompts: bool) -> None:
    """A bot that was away for long still has to find out how it ended."""
    request_id = world.ask()
    world.prompt(request_id) if prompts else world.lease()
    world.resolve(request_id, Status.CANCELED)
    deliver(world)
    stays(world, lambda: is_there(world, request_id))
    assert world.lease() == [request_id]
    world.consents.close_prompt(request_id)
    sweep(world)
    assert not is_there(world, request_id)


def test_one_that_nobody_was_asked_goes(world: World) -> None:
    """There is no prompt to close."""
    request_id = world.ask()
    world.clock.advance(LIFETIME)
    world.end_overdue()
    deliver(world)
    goes_after(world, lambda: is_there(world, request_id), REQUESTS)


# Grants


def granted(world: World) -> tuple[int, Grant]:
    request_id = finished(world, Status.GRANTED)
    return request_id, Grant.get(Grant.request == request_id)


def test_what_is_shared_stays_until_it_is_revoked(world: World) -> None:
    request_id, grant = granted(world)
    stays(world, lambda: is_there(world, request_id))
    assert [shared.id for shared, _ in world.consents.grants(world.user())] == [grant.id]
    world.consents.revoke_grant(world.user(), grant.id, actor="test")
    goes_after(world, lambda: is_there(world, request_id), REQUESTS)
    assert (Grant.select().count(), GrantKey.select().count()) == (0, 0)


def test_old_grants_go_when_the_operator_says_so(make_world: Callable[[str], World]) -> None:
    world = make_world(kept(f"grants = {(365 * DAY).total_seconds()}\n"))
    request_id, _ = granted(world)
    world.clock.advance(REQUESTS + HOUR)
    world.clock.time = Grant.get().created_at
    goes_after(world, lambda: is_there(world, request_id), 365 * DAY)
    assert world.consents.grants(world.user()) == []


def test_a_deleted_user_s_grants_keep_nothing(world: World) -> None:
    request_id, _ = granted(world)
    world.app.accounts.delete(world.user())
    goes_after(world, lambda: is_there(world, request_id), REQUESTS)


def test_the_keys_themselves_stay(world: World) -> None:
    request_id, grant = granted(world)
    world.consents.revoke_grant(world.user(), grant.id, actor="test")
    world.clock.advance(REQUESTS + HOUR)
    sweep(world)
    assert not is_there(world, request_id)
    assert len(world.app.api_keys.list(world.user())) == 1


# What is left


def test_nothing_else_is_touched(world: World) -> None:
    user = world.user()
    for number in range(3):
        request_id = world.ask(callback=f"{CALLBACK}/{number}")
        world.resolve(request_id, Status.CANCELED)
        world.consents.block(user, request_id, actor="test")
    Connection.create(
        user=user,
        provider="flo",
        access_token=b"",
        obtained_at=world.clock.now(),
        needs_reauth=True,
        lease_epoch=0,
        created_at=world.clock.now(),
    )
    deliver(world)
    tables = ("audit_events", "users", "application_blocks", "connections", "master_keys", "oauth_identities")
    count = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    before = world.app.database.fetch_one(count, ())
    assert before is not None
    assert before[0] >= 6
    stays(world, lambda: not ConsentRequest.select().exists())
    assert world.app.database.fetch_one(count, ()) == before
    assert Audit(world.app.database, world.clock).verify().problem is None


def test_a_blocked_application_stays_blocked(world: World) -> None:
    request_id = finished(world)
    request = world.consents.get(request_id)
    world.consents.block(world.user(), request_id, actor="test")
    stays(world, lambda: not is_there(world, request_id))
    again = world.ask(callback=request.callback)
    assert world.lease() == []
    assert is_there(world, again)


def abandon(world: World) -> None:
    with world.app.database.writing():
        world.app.jobs.queue("greet", {})
    job = world.app.jobs.claim(HOUR)
    assert job is not None
    world.app.jobs.abandon(job, "WHY")


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        pytest.param("sessions = 0\n", lambda world: world.app.sessions.create(world.user()), id="sessions"),
        pytest.param("jobs = 0\n", abandon, id="jobs"),
        pytest.param("deliveries = 0\nrequests = 0\n", finished, id="deliveries and requests"),
        pytest.param("requests = 0\n", finished, id="requests"),
    ],
)
def test_for_ever(make_world: Callable[[str], World], setting: str, make: Callable[[World], object]) -> None:
    world = make_world(kept(setting))
    make(world)
    tables = [line.split(" ")[0] for line in setting.splitlines()]
    models: dict[str, Any] = {"sessions": Session, "jobs": Job, "deliveries": Delivery, "requests": ConsentRequest}
    stays(world, lambda: all(models[table].select().exists() for table in tables), 3000 * DAY)
    assert Delivery.select().exists() == ("deliveries" in tables)


# How it is done


ABANDONED = Sweep("jobs", "abandoned_at <= ?", (DAY,))


def fill(database: Database, clock: StoppedClock, rows: int) -> None:
    with database.writing():
        for _ in range(rows):
            Job.create(kind="greet", payload=b"", attempts=8, abandoned_at=clock.now() - DAY, created_at=clock.now())


def make_sweeper(database: Database, clock: StoppedClock, *sweeps: Sweep, batch: int = 200) -> Sweeper:
    return Sweeper(database, clock, sweeps, batch, make_log("info"))


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("rows", "transactions"),
    [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (9, [4, 4, 1])],
    ids=["none", "one", "a batch", "one more", "three batches"],
)
def test_a_batch_a_transaction(
    capfd: pytest.CaptureFixture[str], database: Database, clock: StoppedClock, rows: int, transactions: list[int]
) -> None:
    fill(database, clock, rows)
    removed: list[int] = []
    counted = database.engine.connection()  # type: ignore[no-untyped-call]
    counted.set_trace_callback(
        lambda sql: removed.append(0) if sql.startswith("BEGIN") else removed.append(removed.pop() + ("DELETE" in sql))
    )
    make_sweeper(database, clock, ABANDONED, batch=4).run(threading.Event())
    counted.set_trace_callback(None)
    assert removed == transactions
    assert not Job.select().exists()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line["table"], line["rows"]) for line in lines] == [("swept", "jobs", rows)] * bool(rows)


def test_it_stops_between_batches(database: Database, clock: StoppedClock) -> None:
    fill(database, clock, 50)
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def run() -> None:
            make_sweeper(database, clock, ABANDONED, batch=1).run(stop)
            database.engine.close()

        running = pool.submit(run)
        await_condition(lambda: Job.select().count() < 50, "the first batch")
        stop.set()
        running.result(10)
    left = Job.select().count()
    assert 0 < left < 50


def test_many_sweep_at_once(database: Database, clock: StoppedClock) -> None:
    fill(database, clock, 40)
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        make_sweeper(database, clock, ABANDONED, batch=7).run(threading.Event())
        database.engine.close()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(run) for _ in range(4)]:
            running.result(30)
    assert not Job.select().exists()


def test_a_table_that_fails_does_not_hold_up_the_others(
    capfd: pytest.CaptureFixture[str], database: Database, clock: StoppedClock
) -> None:
    fill(database, clock, 1)
    broken = Sweep("no_such_table", "created_at <= ?", (DAY,))
    make_sweeper(database, clock, broken, ABANDONED).run(threading.Event())
    assert not Job.select().exists()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line["table"]) for line in lines] == [("sweep failed", "no_such_table"), ("swept", "jobs")]


def test_a_row_that_is_needed_again_stays(database: Database, clock: StoppedClock) -> None:
    """What was found is judged again in the transaction that removes it."""
    fill(database, clock, 3)
    ids = [job.id for job in Job.select()]
    times = ABANDONED.times(clock.now())
    Job.update(abandoned_at=None, run_at=clock.now()).where(Job.id == ids[1]).execute()
    with database.writing():
        gone = [database.execute(ABANDONED.remove, (job_id, *times)) for job_id in ids]
    assert gone == [(ids[0],), None, (ids[2],)]


@pytest.mark.sqlite
def test_what_is_due_is_found_by_an_index(world: World) -> None:
    """No sweep reads a table from end to end, with statistics or without."""
    indexes = {
        "code_claims": "code_claims_age",
        "sessions": "sessions_expiry",
        "jobs": "jobs_abandoned",
        "deliveries": "deliveries_finished",
        "consent_requests": "consent_requests_finished",
    }
    finished(world)
    database = world.app.database
    assert {one.table for one in world.app.sweeper.sweeps} == set(indexes)
    for statistics in (False, True):
        if statistics:
            database.engine.execute_sql("ANALYZE")  # type: ignore[no-untyped-call]
        for one in world.app.sweeper.sweeps:
            times = one.times(world.clock.now())
            for sql, parameters in ((one.find, (*times, 100)), (one.remove, (1, *times))):
                rows = database.fetch_rows(f"EXPLAIN QUERY PLAN {sql}", parameters)
                plan = [row[-1] for row in rows]
                assert [step for step in plan if "SCAN" in step or "TEMP" in step] == [], plan
            plan = [row[-1] for row in database.fetch_rows(f"EXPLAIN QUERY PLAN {one.find}", (*times, 100))]
            assert indexes[one.table] in plan[0], plan


# Routines


def test_a_routine_goes_on_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    rounds: list[int] = []
    stop = threading.Event()

    def act(_: threading.Event) -> None:
        rounds.append(1)
        raise RuntimeError("a secret")

    Routine("greeter", 0.01, act, make_log("info")).start(stop)
    await_condition(lambda: len(rounds) >= 3, "three rounds")
    stop.set()
    printed = capfd.readouterr().err
    line = json.loads(printed.splitlines()[0])
    assert (line["event"], line["routine"], line["exception"]) == ("routine failed", "greeter", "RuntimeError")
    assert "secret" not in printed


def test_a_routine_can_be_hurried() -> None:
    rounds: list[int] = []
    stop = threading.Event()
    routine = Routine("greeter", 3600, lambda _: rounds.append(1), make_log("info"))
    routine.start(stop)
    for number in range(1, 4):
        routine.hurry()
        await_condition(lambda number=number: len(rounds) >= number, "a round")  # type: ignore[misc]
    stop.set()
    routine.hurry()
