"""Jobs: work that must be done at least once, whatever dies meanwhile. Imports `models` and below.

A job is queued in the transaction of the change that causes it. A worker claims it by moving its
`run_at` to the end of a lease, so the job of a worker that died is due again by itself; `attempts`
counts the claims and fences them: only the latest claim may finish or put off the job.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from doorward_server.clock import Clock
from doorward_server.crypto import CannotOpen, KeyRing, Place
from doorward_server.database import Database
from doorward_server.errors import CallError, DoorwardError, StorageUnavailable
from doorward_server.logs import Log, describe
from doorward_server.models import Job, to_micros

Payload = dict[str, Any]
_INSERT = "INSERT INTO jobs (kind, payload, run_at, attempts, created_at) VALUES (?, x'', ?, 0, ?) RETURNING id"
_SET_PAYLOAD = "UPDATE jobs SET payload = ? WHERE id = ?"
_NEXT_DUE = "SELECT id FROM jobs WHERE run_at <= ? ORDER BY run_at LIMIT 1"
_CLAIM = f"""
UPDATE jobs SET run_at = ?, attempts = attempts + 1
WHERE id IN (SELECT id FROM jobs WHERE run_at <= ? ORDER BY run_at LIMIT ?) RETURNING {Job.columns_sql()}
"""  # noqa: S608 - constants only
_FINISH = "DELETE FROM jobs WHERE id = ? AND attempts = ?"
_PUT_OFF = "UPDATE jobs SET run_at = ?, last_error = ?, failures = ? WHERE id = ? AND attempts = ? RETURNING id"


class Abandon(DoorwardError):
    """Raised by a handler: no further attempt can help. The argument says why."""


class PutOff(NamedTuple):
    """When to try again, and why."""

    delay: timedelta
    reason: str


# What a handler leaves to be written in the transaction that ends its attempt: the job is done, or put off.
Ending = Callable[[], PutOff | None]
Handler = Callable[[Payload], Ending | None]


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds between failures, in order; after the last one the job is abandoned."""

    schedule: Sequence[float]

    def delay(self, attempts: int) -> timedelta | None:
        """How long to wait after so many attempts (at least one); None: give up."""
        return timedelta(seconds=self.schedule[attempts - 1]) if attempts <= len(self.schedule) else None


class Jobs:
    """Owns the table `jobs`."""

    def __init__(self, database: Database, clock: Clock, keys: KeyRing) -> None:
        self._database = database
        self._clock = clock
        self._keys = keys
        # Only a hint to look sooner: other processes' jobs are found by looking.
        self.queued = threading.Event()

    def queue(self, kind: str, payload: Payload, run_at: datetime | None = None) -> None:
        """Add a job, inside the caller's transaction: for now, or for later."""
        now = self._clock.now()
        row = self._database.execute(_INSERT, (kind, to_micros(run_at or now), to_micros(now)))
        assert row is not None  # noqa: S101 - what RETURNING is for
        (job_id,) = row
        sealed = self._keys.seal(json.dumps(payload), _payload_of(job_id))
        self._database.execute(_SET_PAYLOAD, (sealed, job_id))
        self._database.engine.after_commit(self.queued.set)

    def claim(self, lease: timedelta) -> Job | None:
        """Take the job that has been due for longest, for the time of the lease."""
        return next(iter(self.claim_some(lease, 1)), None)

    def claim_some(self, lease: timedelta, most: int) -> list[Job]:
        """Take at most so many of the jobs that have been due for longest."""
        now = self._clock.now()
        # Idle workers look again and again: a read is nothing to anybody.
        if self._database.fetch_one(_NEXT_DUE, (to_micros(now),)) is None:
            return []
        parameters = (to_micros(now + lease), to_micros(now), most)
        rows = self._database.write(partial(self._database.execute_all, _CLAIM, parameters))
        return [Job.from_row(row) for row in rows]

    def payload(self, job: Job) -> Payload:
        opened: Payload = json.loads(self._keys.open(job.payload, _payload_of(job.id)))
        return opened

    def end(self, job: Job, ending: Ending | None = None) -> PutOff | None:
        """Write what the handler left to be written: then the job is done, unless that returns when to try again."""

        def change() -> PutOff | None:
            later = ending() if ending is not None else None
            if later is None:
                self._database.execute(_FINISH, (job.id, job.attempts))
            else:
                self._put_off(job, later, 0)
            return later

        return self._database.write(change)

    def put_off(self, job: Job, later: PutOff, *, failures: int = 0) -> None:
        """Try again later; so many attempts have failed since one went as it should."""
        self._database.write(partial(self._put_off, job, later, failures))

    def _put_off(self, job: Job, later: PutOff, failures: int) -> None:
        run_at = to_micros(self._clock.now() + later.delay)
        self._database.execute(_PUT_OFF, (run_at, later.reason, failures, job.id, job.attempts))

    def abandon(self, job: Job, reason: str, also: Callable[[], None] = lambda: None) -> None:
        """Try no more, but keep the job for the operator to see; what else follows is done in the same transaction."""

        def change() -> None:
            parameters = (None, reason, job.failures + 1, job.id, job.attempts)
            if self._database.execute(_PUT_OFF, parameters) is not None:
                also()

        self._database.write(change)


class Worker:
    """Does the due jobs, each by the handler of its kind: one thread claims as many as others are free to do."""

    def __init__(
        self,
        jobs: Jobs,
        handlers: Mapping[str, Handler],
        *,
        when_abandoned: Mapping[str, Callable[[Payload], None]] = MappingProxyType({}),
        retry: RetryPolicy,
        lease: timedelta,
        poll: float,
        threads: int,
        log: Log,
    ) -> None:
        self._jobs = jobs
        self._handlers = handlers
        # Told of a job that is given up, inside the transaction that says so.
        self._when_abandoned = when_abandoned
        self._retry = retry
        self._lease = lease
        self._poll = poll
        self._log = log
        self._stopping = threading.Event()
        # Twice the threads, so that jobs are at hand when one is done: then many are claimed at once. What
        # waits here starts within one job's time, long before its lease ends.
        self._places = 2 * threads
        self._free = threading.Semaphore(self._places)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._claimer = threading.Thread(target=self._run, name="claimer", daemon=True)

    def start(self) -> None:
        self._claimer.start()

    def stop(self, grace: float) -> None:
        """Claim nothing more, and wait `grace` seconds for the jobs under way. Others run again later."""
        deadline = time.monotonic() + grace
        self._stopping.set()
        self._jobs.queued.set()
        if self._claimer.is_alive():
            self._claimer.join(grace)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if taken := self._take_places(self._places, deadline):
            self._free.release(taken)

    def run_one(self) -> bool:
        """Do one due job; False when there is none."""
        job = self._jobs.claim(self._lease)
        if job is not None:
            self._do(job)
        return job is not None

    def _do(self, job: Job) -> None:
        handler = self._handlers.get(job.kind)
        if handler is None:
            self._give_up(job, "NO_HANDLER")
            return
        try:
            later = self._jobs.end(job, handler(self._jobs.payload(job)))
        except Abandon as reason:
            self._give_up(job, str(reason))
        except CannotOpen:
            self._give_up(job, "CANNOT_OPEN")
        except CallError as failure:
            self._fail(job, failure.reason)
        except Exception as failure:  # noqa: BLE001 - one bad job must not end the worker
            self._log.error("job failed", job_id=job.id, kind=job.kind, **describe(failure))
            self._fail(job, "INTERNAL")
        else:
            if later is not None:
                self._tell_put_off(job, later)
            else:
                self._log.info("job done", job_id=job.id, kind=job.kind, attempts=job.attempts)

    def _fail(self, job: Job, reason: str) -> None:
        failures = job.failures + 1
        delay = self._retry.delay(failures)
        if delay is None:
            self._give_up(job, reason)
        else:
            later = PutOff(delay, reason)
            self._jobs.put_off(job, later, failures=failures)
            self._tell_put_off(job, later)

    def _tell_put_off(self, job: Job, later: PutOff) -> None:
        self._log.warning(
            "job put off",
            job_id=job.id,
            kind=job.kind,
            attempts=job.attempts,
            reason=later.reason,
            seconds=later.delay.total_seconds(),
        )

    def _give_up(self, job: Job, reason: str) -> None:
        self._jobs.abandon(job, reason, also=partial(self._tell_abandoned, job))
        self._log.error("job abandoned", job_id=job.id, kind=job.kind, attempts=job.attempts, reason=reason)

    def _tell_abandoned(self, job: Job) -> None:
        handler = self._when_abandoned.get(job.kind)
        with contextlib.suppress(CannotOpen):
            if handler is not None:
                handler(self._jobs.payload(job))

    def _run(self) -> None:
        least = 1
        while not self._stopping.is_set():
            free = self._take_places(least, time.monotonic() + self._poll)
            jobs: list[Job] = []
            with self._logged_failures():
                jobs = self._jobs.claim_some(self._lease, free) if free else []
            for job in jobs:
                self._pool.submit(self._do_safely, job).add_done_callback(lambda _: self._free.release())
            if free > len(jobs):
                self._free.release(free - len(jobs))
            # As many as there was room for: there are more, so it is worth to wait for more room.
            least = self._places // 4 if free and len(jobs) == free else 1
            if free and not jobs:
                self._jobs.queued.wait(self._poll)
                if not self._stopping.is_set():
                    self._jobs.queued.clear()

    def _take_places(self, least: int, deadline: float) -> int:
        """All the places that are free, once there are so many or the time has come."""
        taken = 0
        while taken < self._places and self._free.acquire(
            timeout=max(0.0, deadline - time.monotonic()) if taken < least else 0
        ):
            taken += 1
        return taken

    def _do_safely(self, job: Job) -> None:
        with self._logged_failures():
            self._do(job)

    @contextlib.contextmanager
    def _logged_failures(self) -> Iterator[None]:
        try:
            yield
        except StorageUnavailable:
            self._log.warning("jobs wait for the database")
        except Exception as failure:  # noqa: BLE001 - the worker has to live on
            self._log.error("worker failed", **describe(failure))


def _payload_of(job_id: int) -> Place:
    return Place("jobs", job_id, "payload")
