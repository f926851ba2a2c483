"""Jobs: done once while all goes well, again when a worker dies, and put away when nothing helps."""

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest

from doorward_server.clock import Clock
from doorward_server.crypto import CannotOpen, KeyRing, MasterKey
from doorward_server.database import Database
from doorward_server.errors import Busy, ProviderTimeout, StorageUnavailable
from doorward_server.jobs import Abandon, Handler, Jobs, Payload, PutOff, outside
from doorward_server.logs import make_log
from doorward_server.metrics import Metrics
from doorward_server.models import Job
from doorward_server.worker import RetryPolicy, Worker
from tests.processes import await_condition, clean_environment
from tests.unit.conftest import StoppedClock

KEY = MasterKey(b"k" * 32)
LEASE = timedelta(seconds=60)
SCHEDULE = (5.0, 30.0)


@pytest.fixture
def jobs(database: Database, clock: StoppedClock) -> Jobs:
    return Jobs(database, clock, KeyRing([KEY]))


def queue(jobs: Jobs, database: Database, kind: str = "greet", **payload: Any) -> None:
    with database.writing():
        jobs.queue(kind, payload)


def claim(jobs: Jobs) -> Job:
    job = jobs.claim(LEASE)
    assert job is not None
    return job


def rows(database: Database) -> list[dict[str, Any]]:
    return database.fetch_all(Job.select(Job.kind, Job.run_at, Job.attempts, Job.last_error).order_by(Job.id).dicts())


# The queue


def test_a_job_is_claimed_with_what_was_queued(jobs: Jobs, database: Database) -> None:
    payload: dict[str, Any] = {"token": "sekret-token-ключ", "user": 7, "none": None, "list": [1, "a\x00"]}
    queue(jobs, database, **payload)
    assert jobs.queued.is_set()
    job = claim(jobs)
    assert (job.kind, job.attempts, jobs.payload(job)) == ("greet", 1, payload)
    assert b"sekret" not in bytes(job.payload)


def test_a_payload_opens_in_its_own_row_only(jobs: Jobs, database: Database) -> None:
    queue(jobs, database, number=1)
    queue(jobs, database, number=2)
    one, other = claim(jobs), claim(jobs)
    one.payload, other.payload = other.payload, one.payload
    for job in (one, other):
        with pytest.raises(CannotOpen):
            jobs.payload(job)


def test_a_rolled_back_transaction_queues_nothing(jobs: Jobs, database: Database) -> None:
    def fail() -> None:
        with database.writing():
            jobs.queue("greet", {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not jobs.queued.is_set()
    assert jobs.claim(LEASE) is None
    assert rows(database) == []
    queue(jobs, database)
    assert jobs.queued.is_set()
    assert len(rows(database)) == 1


def test_a_job_is_not_seen_before_its_transaction_ends(jobs: Jobs, database: Database) -> None:
    def look() -> Job | None:
        try:
            return jobs.claim(LEASE)
        finally:
            database.close()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with database.writing():
            jobs.queue("greet", {})
            assert not jobs.queued.is_set()
            assert pool.submit(look).result(10) is None
        assert jobs.queued.is_set()
        assert pool.submit(look).result(10) is not None


def test_the_job_that_is_due_for_longest_comes_first(jobs: Jobs, database: Database, clock: StoppedClock) -> None:
    for number in (1, 2, 3):
        queue(jobs, database, number=number)
        clock.advance(timedelta(seconds=1))
    first = claim(jobs)
    jobs.put_off(first, PutOff(timedelta(seconds=10), "LATER"))
    clock.advance(timedelta(seconds=10))
    assert [jobs.payload(claim(jobs))["number"] for _ in range(3)] == [2, 3, 1]
    assert jobs.claim(LEASE) is None


@pytest.mark.parametrize("seconds", [0.000001, 600, 10 * 365 * 24 * 3600.0], ids=["next", "minutes", "years"])
def test_a_job_for_later_waits_for_its_time(
    jobs: Jobs, database: Database, clock: StoppedClock, seconds: float
) -> None:
    wait = timedelta(seconds=seconds)
    with database.writing():
        jobs.queue("greet", {"number": 1}, run_at=clock.now() + wait)
    assert jobs.claim(LEASE) is None
    queue(jobs, database, number=2)
    assert jobs.payload(claim(jobs)) == {"number": 2}
    clock.advance(wait - timedelta(microseconds=1))
    assert seconds > 1 or jobs.claim(LEASE) is None
    clock.advance(timedelta(microseconds=1))
    due = [jobs.payload(claim(jobs))["number"] for _ in range(1 if wait < LEASE else 2)]
    assert sorted(due) == ([1] if wait < LEASE else [1, 2])  # the other one's lease has ended, too


@pytest.mark.parametrize("late", [timedelta(0), timedelta(days=1)], ids=["now", "long ago"])
def test_a_job_whose_time_has_come_is_due(jobs: Jobs, database: Database, clock: StoppedClock, late: timedelta) -> None:
    with database.writing():
        jobs.queue("greet", {}, run_at=clock.now() - late)
    assert claim(jobs).attempts == 1


def test_jobs_come_in_the_order_of_their_times(jobs: Jobs, database: Database, clock: StoppedClock) -> None:
    times: list[datetime] = [clock.now() + timedelta(seconds=seconds) for seconds in (30, 10, 20)]
    with database.writing():
        for number, run_at in enumerate(times):
            jobs.queue("greet", {"number": number}, run_at=run_at)
    clock.advance(timedelta(seconds=30))
    assert [jobs.payload(claim(jobs))["number"] for _ in times] == [1, 2, 0]


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 5 + [0]), (2, [2, 2, 1, 0]), (5, [5, 0]), (100, [5, 0])])
def test_many_are_claimed_at_once(jobs: Jobs, database: Database, most: int, sizes: list[int]) -> None:
    for _ in range(5):
        queue(jobs, database)
    claimed = [jobs.claim_some(LEASE, most) for _ in sizes]
    assert [len(some) for some in claimed] == sizes
    assert len({job.id for some in claimed for job in some}) == 5
    assert {job.attempts for some in claimed for job in some} == {1}


# Leases


def test_a_claimed_job_is_its_worker_s_until_the_lease_ends(
    jobs: Jobs, database: Database, clock: StoppedClock
) -> None:
    queue(jobs, database)
    assert claim(jobs).attempts == 1
    clock.advance(LEASE - timedelta(microseconds=1))
    assert jobs.claim(LEASE) is None
    clock.advance(timedelta(microseconds=1))
    assert claim(jobs).attempts == 2
    assert jobs.claim(LEASE) is None


@pytest.mark.parametrize(
    "late",
    [
        pytest.param(lambda jobs, job: jobs.database.write(partial(jobs.end, job)), id="finish"),
        pytest.param(lambda jobs, job: jobs.put_off(job, PutOff(timedelta(0), "LATE")), id="put off"),
        pytest.param(lambda jobs, job: jobs.abandon(job, "LATE"), id="abandon"),
    ],
)
@pytest.mark.parametrize("ending", ["under way", "put off", "finished", "abandoned"])
def test_a_claim_that_ran_out_changes_nothing_any_more(
    jobs: Jobs, database: Database, clock: StoppedClock, late: Callable[[Jobs, Job], None], ending: str
) -> None:
    queue(jobs, database)
    slow = claim(jobs)
    clock.advance(LEASE)
    quick = claim(jobs)
    match ending:
        case "put off":
            jobs.put_off(quick, PutOff(timedelta(seconds=5), "QUICK"))
        case "finished":
            database.write(partial(jobs.end, quick))
        case "abandoned":
            jobs.abandon(quick, "QUICK")
    before = rows(database)
    late(jobs, slow)
    assert rows(database) == before


def test_the_latest_claim_finishes_the_job(jobs: Jobs, database: Database, clock: StoppedClock) -> None:
    queue(jobs, database)
    claim(jobs)
    clock.advance(LEASE)
    database.write(partial(jobs.end, claim(jobs)))
    assert rows(database) == []


# Retries


@pytest.mark.parametrize(
    ("schedule", "attempts", "seconds"),
    [
        pytest.param((5, 30), 1, 5, id="first"),
        pytest.param((5, 30), 2, 30, id="second"),
        pytest.param((5, 30), 3, None, id="exhausted"),
        pytest.param((5, 30), 1000, None, id="long exhausted"),
        pytest.param((), 1, None, id="no retries"),
        pytest.param((0.25,), 1, 0.25, id="fraction"),
    ],
)
def test_retry_policy(schedule: tuple[float, ...], attempts: int, seconds: float | None) -> None:
    expected = None if seconds is None else timedelta(seconds=seconds)
    assert RetryPolicy(schedule).delay(attempts) == expected


# Workers


def make_worker(jobs: Jobs, handlers: dict[str, Handler], threads: int = 1, quick: Sequence[str] = ()) -> Worker:
    return Worker(
        jobs,
        handlers,
        quick=quick,
        retry=RetryPolicy(SCHEDULE),
        lease=LEASE,
        poll=0.01,
        threads=threads,
        log=make_log("info"),
        metrics=Metrics(),
    )


Work = Callable[[Payload], PutOff | None]
Place = Callable[[Work], Handler]


def handling(work: Work) -> Handler:
    """Work that is done in the transaction in which the job is begun."""
    return work


def acting(work: Work) -> Handler:
    """Work that is done between the transactions."""

    def act(payload: Payload) -> None:
        work(payload)

    return outside(act)


def ending(work: Work) -> Handler:
    """Work that is done in the transaction in which the job ends."""
    return lambda payload: lambda: partial(work, payload)


everywhere = pytest.mark.parametrize("place", [handling, acting, ending])


def failing(failure: Exception) -> Work:
    def work(_: Payload) -> None:
        raise failure

    return work


@everywhere
def test_a_job_that_is_done_is_gone(jobs: Jobs, database: Database, place: Place) -> None:
    seen: list[Payload] = []
    worker = make_worker(jobs, {"greet": place(seen.append)})
    queue(jobs, database, name="ada")
    assert worker.run_one()
    assert not worker.run_one()
    assert seen == [{"name": "ada"}]
    assert rows(database) == []


@everywhere
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        pytest.param(Abandon("PROVIDER_GONE"), "PROVIDER_GONE", id="the handler gives up"),
        pytest.param(CannotOpen(), "CANNOT_OPEN", id="a value that does not open"),
    ],
)
def test_a_hopeless_job_is_abandoned_at_once_and_kept(
    jobs: Jobs, database: Database, clock: StoppedClock, place: Place, failure: Exception, reason: str
) -> None:
    worker = make_worker(jobs, {"greet": place(failing(failure))})
    queue(jobs, database)
    assert worker.run_one()
    abandoned = [{"kind": "greet", "run_at": None, "attempts": 1, "last_error": reason}]
    assert rows(database) == abandoned
    clock.advance(timedelta(days=3650))
    assert not worker.run_one()
    assert rows(database) == abandoned


def test_a_job_of_an_unknown_kind_is_abandoned_and_kept(jobs: Jobs, database: Database) -> None:
    worker = make_worker(jobs, {"greet": lambda _: None})
    queue(jobs, database, kind="other")
    assert worker.run_one()
    assert rows(database) == [{"kind": "other", "run_at": None, "attempts": 1, "last_error": "NO_HANDLER"}]


def test_a_payload_of_a_lost_key_is_abandoned_and_kept(jobs: Jobs, database: Database, clock: StoppedClock) -> None:
    queue(jobs, database)
    worker = make_worker(Jobs(database, clock, KeyRing([MasterKey(b"o" * 32)])), {"greet": lambda _: None})
    assert worker.run_one()
    assert rows(database) == [{"kind": "greet", "run_at": None, "attempts": 1, "last_error": "CANNOT_OPEN"}]


@everywhere
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        pytest.param(ProviderTimeout(), "PROVIDER_TIMEOUT", id="provider"),
        pytest.param(Busy(), "BUSY", id="busy"),
        pytest.param(StorageUnavailable(), "STORAGE_UNAVAILABLE", id="storage"),
        pytest.param(RuntimeError("sekret"), "INTERNAL", id="unexpected"),
        pytest.param(KeyError("sekret"), "INTERNAL", id="payload without a key"),
        pytest.param(TimeoutError("sekret"), "INTERNAL", id="system"),
    ],
)
def test_a_failing_job_is_tried_on_schedule_and_then_abandoned(
    jobs: Jobs,
    database: Database,
    clock: StoppedClock,
    capfd: pytest.CaptureFixture[str],
    place: Place,
    failure: Exception,
    reason: str,
) -> None:
    worker = make_worker(jobs, {"greet": place(failing(failure))})
    queue(jobs, database, token="sekret")
    for attempts, seconds in enumerate(SCHEDULE, start=1):
        assert worker.run_one()
        due = clock.now() + timedelta(seconds=seconds)
        assert rows(database) == [{"kind": "greet", "run_at": due, "attempts": attempts, "last_error": reason}]
        clock.advance(timedelta(seconds=seconds, microseconds=-1))
        assert not worker.run_one()
        clock.advance(timedelta(microseconds=1))
    assert worker.run_one()
    assert rows(database) == [{"kind": "greet", "run_at": None, "attempts": 3, "last_error": reason}]
    clock.advance(timedelta(days=3650))
    assert not worker.run_one()
    log = capfd.readouterr().err
    assert "sekret" not in log
    events = [line["event"] for line in map(json.loads, log.splitlines()) if line["event"] != "job failed"]
    assert events == ["job put off", "job put off", "job abandoned"]


@pytest.mark.parametrize("place", [handling, ending])
def test_a_job_whose_handler_knows_when_to_try_again_is_never_given_up(
    jobs: Jobs, database: Database, clock: StoppedClock, capfd: pytest.CaptureFixture[str], place: Place
) -> None:
    """By its own times, not by the schedule, which has long ended."""
    delays = [timedelta(seconds=seconds) for seconds in (0.2, 7, 100, 36000, 5)]
    left = [PutOff(delay, f"TURN_{number}") for number, delay in enumerate(delays)]

    worker = make_worker(jobs, {"greet": place(lambda _: left.pop(0) if left else None)})
    queue(jobs, database, token="sekret")
    for number, delay in enumerate(delays):
        assert worker.run_one()
        row = {"kind": "greet", "run_at": clock.now() + delay, "attempts": number + 1, "last_error": f"TURN_{number}"}
        assert rows(database) == [row]
        clock.advance(delay - timedelta(microseconds=1))
        assert not worker.run_one()
        clock.advance(timedelta(microseconds=1))
    assert worker.run_one()
    assert rows(database) == []
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["job put off"] * len(delays) + ["job done"]
    assert [line["seconds"] for line in lines[:-1]] == [delay.total_seconds() for delay in delays]
    assert [line["reason"] for line in lines[:-1]] == [f"TURN_{number}" for number in range(len(delays))]


@pytest.mark.parametrize("place", [handling, ending])
def test_what_is_written_is_written_with_the_end_of_the_job(
    jobs: Jobs, database: Database, clock: StoppedClock, capfd: pytest.CaptureFixture[str], place: Place
) -> None:
    """Both or neither."""
    failures = ["x"]

    def work(_: Payload) -> None:
        jobs.queue("next", {})
        for failure in failures:
            raise ZeroDivisionError(failure)

    queue(jobs, database)
    worker = make_worker(jobs, {"greet": place(work)})
    assert worker.run_one()
    assert [(row["kind"], row["last_error"]) for row in rows(database)] == [("greet", "INTERNAL")]
    failures.clear()
    clock.advance(timedelta(hours=1))
    assert worker.run_one()
    assert [(row["kind"], row["last_error"]) for row in rows(database)] == [("next", None)]
    assert [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()] == [
        "job failed",
        "job put off",
        "job done",
    ]


def test_a_worker_does_what_was_queued_for_later_when_its_time_comes(jobs: Jobs, database: Database) -> None:
    """Nothing but looking tells that it is due."""
    done = threading.Event()
    clock = Clock()
    jobs = Jobs(database, clock, KeyRing([KEY]))
    with started(make_worker(jobs, {"greet": outside(lambda _: done.set())})):
        begun = clock.now()
        with database.writing():
            jobs.queue("greet", {}, run_at=begun + timedelta(seconds=0.3))
        assert done.wait(10)
        assert clock.now() - begun >= timedelta(seconds=0.3)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_no_more_jobs_at_once_than_threads(jobs: Jobs, database: Database, threads: int) -> None:
    at_once, most, lock, done = 0, 0, threading.Lock(), Counter[int]()

    def handle(payload: Payload) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        with lock:
            at_once -= 1
            done[payload["number"]] += 1

    with database.writing():
        for number in range(100):
            jobs.queue("greet", {"number": number})
    with started(make_worker(jobs, {"greet": outside(handle)}, threads)):
        await_condition(lambda: len(done) == 100, "all jobs")
    assert set(done.values()) == {1}
    assert 1 <= most <= threads
    assert rows(database) == []


def test_a_quick_job_waits_for_no_thread(jobs: Jobs, database: Database) -> None:
    begun, may_end, done = threading.Event(), threading.Event(), threading.Event()

    def hang(_: Payload) -> None:
        begun.set()
        may_end.wait(10)

    handlers: dict[str, Handler] = {"hang": outside(hang), "greet": lambda _: done.set()}
    for _ in range(3):
        queue(jobs, database, kind="hang")
    with started(make_worker(jobs, handlers, quick=["greet"])):
        try:
            assert begun.wait(10)
            for _ in range(50):
                queue(jobs, database)
            assert done.wait(10)
            await_condition(lambda: {row["kind"] for row in rows(database)} == {"hang"}, "all quick jobs")
        finally:
            may_end.set()


def test_a_job_that_heals_is_done(jobs: Jobs, database: Database, clock: StoppedClock) -> None:
    failures: list[Exception] = [ProviderTimeout()]

    def handle(_: Payload) -> None:
        if failures:
            raise failures.pop()

    worker = make_worker(jobs, {"greet": outside(handle)})
    queue(jobs, database)
    worker.run_one()
    clock.advance(timedelta(seconds=SCHEDULE[0]))
    worker.run_one()
    assert rows(database) == []


@contextlib.contextmanager
def started(worker: Worker) -> Iterator[None]:
    worker.start()
    try:
        yield
    finally:
        worker.stop(10)
        await_condition(lambda: not workers(), "the worker's threads to end")


def workers() -> set[str]:
    """The worker's threads that live."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith(("worker", "jobs"))}


@everywhere
def test_a_worker_survives_every_failure(jobs: Jobs, database: Database, place: Place) -> None:
    done: list[int] = []
    failures = [Abandon("x"), ProviderTimeout(), RuntimeError("x"), StorageUnavailable(), CannotOpen()]
    handlers = {f"fail{number}": place(failing(failure)) for number, failure in enumerate(failures)}
    worker = make_worker(jobs, {**handlers, "greet": outside(lambda payload: done.append(payload["number"]))})
    with started(worker):
        for number in range(10):
            queue(jobs, database, kind=f"fail{number % len(failures)}")
            queue(jobs, database, kind="unknown")
            queue(jobs, database, number=number)
        await_condition(lambda: len(done) == 10, "the good jobs between the bad ones")
    assert sorted(done) == list(range(10))


def test_a_worker_survives_a_database_that_fails(
    jobs: Jobs, database: Database, capfd: pytest.CaptureFixture[str]
) -> None:
    done = threading.Event()
    log: list[str] = []

    def is_logged() -> bool:
        log.append(capfd.readouterr().err)
        return "jobs wait for the database" in "".join(log)

    worker = make_worker(jobs, {"greet": outside(lambda _: done.set())})
    database.engine.execute_sql("ALTER TABLE jobs RENAME TO jobs_away")  # type: ignore[no-untyped-call]
    with started(worker):
        await_condition(is_logged, "the worker to meet the failure")
        database.engine.execute_sql("ALTER TABLE jobs_away RENAME TO jobs")  # type: ignore[no-untyped-call]
        queue(jobs, database)
        assert done.wait(10)


def test_stop_waits_for_the_job_under_way(jobs: Jobs, database: Database) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def handle(_: Payload) -> None:
        begun.set()
        may_end.wait(10)
        ended.set()

    worker = make_worker(jobs, {"greet": outside(handle)})
    queue(jobs, database)
    worker.start()
    assert begun.wait(10)
    worker.stop(0.01)  # not long enough
    assert not ended.is_set()
    may_end.set()
    worker.stop(10)
    assert ended.is_set()
    assert rows(database) == []


# Many workers

_WORKER = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from doorward_server import models
from doorward_server.clock import Clock
from doorward_server.crypto import KeyRing, MasterKey
from doorward_server.database import open_database
from doorward_server.jobs import Jobs

database = open_database(sys.argv[1], 20)
models.bind(database)
jobs = Jobs(database, Clock(), KeyRing([MasterKey(b"k" * 32)]))
done = []
start = threading.Barrier(4)

def work(_):
    start.wait(10)
    while (job := jobs.claim(timedelta(seconds=60))) is not None:
        done.append(jobs.payload(job)["number"])
        database.write(partial(jobs.end, job))
    database.close()

print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))
print(json.dumps(done))
"""


def piped(command: list[str]) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=clean_environment({}), stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_each_job_is_done_once_by_threads_of_two_processes(jobs: Jobs, database: Database) -> None:
    count = 200
    with database.writing():
        for number in range(count):
            jobs.queue("greet", {"number": number})
    command = [sys.executable, "-c", _WORKER, database.url]
    # The jobs are queued by a clock of 2030; the workers' clock is the system's.
    with database.writing():
        Job.update(run_at=Clock().now()).execute()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(piped(command)) for _ in range(2)]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        outcomes = [worker.communicate(timeout=60) for worker in workers]
    assert [(worker.returncode, errors) for worker, (_, errors) in zip(workers, outcomes, strict=True)] == [(0, "")] * 2
    done = Counter(number for output, _ in outcomes for number in json.loads(output))
    assert done == Counter(range(count))
    assert rows(database) == []


def test_each_job_is_claimed_once_by_threads(jobs: Jobs, database: Database) -> None:
    count, threads = 100, 8
    with database.writing():
        for number in range(count):
            jobs.queue("greet", {"number": number})
    start = threading.Barrier(threads)

    def work(_: int) -> list[int]:
        claimed = []
        start.wait(10)
        try:
            while (job := jobs.claim(LEASE)) is not None:
                claimed.append(job.id)
        finally:
            database.close()
        return claimed

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        claimed = Counter(job_id for ids in pool.map(work, range(threads)) for job_id in ids)
    assert len(claimed) == count
    assert set(claimed.values()) == {1}
    assert {row["attempts"] for row in rows(database)} == {1}
