"""Jobs: work that must be done at least once, whatever dies meanwhile. Imports `models` and below.

A job is queued in the transaction of the change that causes it. A worker claims it by moving its
`run_at` to the end of a lease, so the job of a worker that died is due again by itself; `attempts`
counts the claims and fences them: only the latest claim may finish or put off the job.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from doorward_server.clock import Clock
from doorward_server.crypto import CannotOpen, KeyRing, Place
from doorward_server.database import Database
from doorward_server.errors import CallError, DoorwardError, StorageUnavailable
from doorward_server.logs import Log, describe
from doorward_server.models import Job, to_micros

Payload = dict[str, Any]
Handler = Callable[[Payload], None]
_INSERT = "INSERT INTO jobs (kind, payload, run_at, attempts, created_at) VALUES (?, x'', ?, 0, ?) RETURNING id"
_SET_PAYLOAD = "UPDATE jobs SET payload = ? WHERE id = ?"
_NEXT_DUE = "SELECT id FROM jobs WHERE run_at <= ? ORDER BY run_at LIMIT 1"


class Abandon(DoorwardError):
    """Raised by a handler: no further attempt can help. The argument says why."""


class PutOff(DoorwardError):
    """Raised by a handler that knows itself when to try again."""

    def __init__(self, delay: timedelta, reason: str) -> None:
        super().__init__(reason)
        self.delay = delay
        self.reason = reason


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds between attempts, in order; after the last one the job is abandoned."""

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
        now = self._clock.now()
        if self._database.fetch_one(_NEXT_DUE, (to_micros(now),)) is None:
            return None
        with self._database.writing():
            # Looked for again inside the transaction: another worker may have been faster.
            job: Job | None = Job.select().where(Job.run_at <= now).order_by(Job.run_at).first()
            if job is None:
                return None
            job.run_at, job.attempts = now + lease, job.attempts + 1
            Job.update(run_at=job.run_at, attempts=job.attempts).where(Job.id == job.id).execute()
            return job

    def payload(self, job: Job) -> Payload:
        opened: Payload = json.loads(self._keys.open(job.payload, _payload_of(job.id)))
        return opened

    def finish(self, job: Job) -> None:
        """The job is done."""
        with self._database.writing():
            Job.delete().where(Job.id == job.id, Job.attempts == job.attempts).execute()

    def put_off(self, job: Job, delay: timedelta | None, reason: str) -> None:
        """Try again after the delay; None: abandon the job, but keep it for the operator to see."""
        run_at = self._clock.now() + delay if delay is not None else None
        with self._database.writing():
            changes = Job.update(run_at=run_at, last_error=reason)
            changes.where(Job.id == job.id, Job.attempts == job.attempts).execute()


class Worker:
    """Threads that do the due jobs, each by the handler of its kind."""

    def __init__(
        self,
        jobs: Jobs,
        handlers: Mapping[str, Handler],
        *,
        retry: RetryPolicy,
        lease: timedelta,
        poll: float,
        threads: int,
        log: Log,
    ) -> None:
        self._jobs = jobs
        self._handlers = handlers
        self._retry = retry
        self._lease = lease
        self._poll = poll
        self._log = log
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"worker-{n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, grace: float) -> None:
        """Claim nothing more, and wait `grace` seconds for the jobs under way. Others run again later."""
        self._stopping.set()
        self._jobs.queued.set()
        for thread in self._threads:
            thread.join(grace / len(self._threads))

    def run_one(self) -> bool:
        """Do one due job; False when there is none."""
        job = self._jobs.claim(self._lease)
        if job is None:
            return False
        handler = self._handlers.get(job.kind)
        if handler is None:
            self._give_up(job, "NO_HANDLER")
            return True
        try:
            handler(self._jobs.payload(job))
        except Abandon as reason:
            self._give_up(job, str(reason))
        except PutOff as later:
            self._put_off(job, later.delay, later.reason)
        except CannotOpen:
            self._give_up(job, "CANNOT_OPEN")
        except CallError as failure:
            self._fail(job, failure.reason)
        except Exception as failure:  # noqa: BLE001 - one bad job must not end the worker
            self._log.error("job failed", job_id=job.id, kind=job.kind, **describe(failure))
            self._fail(job, "INTERNAL")
        else:
            self._jobs.finish(job)
            self._log.info("job done", job_id=job.id, kind=job.kind, attempts=job.attempts)
        return True

    def _fail(self, job: Job, reason: str) -> None:
        delay = self._retry.delay(job.attempts)
        if delay is None:
            self._give_up(job, reason)
        else:
            self._put_off(job, delay, reason)

    def _put_off(self, job: Job, delay: timedelta, reason: str) -> None:
        self._jobs.put_off(job, delay, reason)
        self._log.warning(
            "job put off",
            job_id=job.id,
            kind=job.kind,
            attempts=job.attempts,
            reason=reason,
            seconds=delay.total_seconds(),
        )

    def _give_up(self, job: Job, reason: str) -> None:
        self._jobs.put_off(job, None, reason)
        self._log.error("job abandoned", job_id=job.id, kind=job.kind, attempts=job.attempts, reason=reason)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self.run_one():
                    continue
            except StorageUnavailable:
                self._log.warning("jobs wait for the database")
            except Exception as failure:  # noqa: BLE001 - the thread has to live on
                self._log.error("worker failed", **describe(failure))
            self._jobs.queued.wait(self._poll)
            if not self._stopping.is_set():
                self._jobs.queued.clear()


def _payload_of(job_id: int) -> Place:
    return Place("jobs", job_id, "payload")
