"""Jobs: work that must be done at least once, whatever dies meanwhile. Imports `models` and below.

A job is queued in the transaction of the change that causes it. A worker claims it by moving its
`run_at` to the end of a lease, so the job of a worker that died is due again by itself; `attempts`
counts the claims and fences them: only the latest claim may finish or put off the job.
"""

import json
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from doorward_server.clock import Clock
from doorward_server.crypto import KeyRing, Place
from doorward_server.database import Database
from doorward_server.errors import DoorwardError
from doorward_server.models import Job, from_micros, to_micros
from doorward_server.upkeep import Sweep

Payload = dict[str, Any]
_TOPIC = "jobs"
_INSERT = "INSERT INTO jobs (kind, payload, run_at, attempts, created_at) VALUES (?, ?, ?, 0, ?) RETURNING id"
_SET_PAYLOAD = "UPDATE jobs SET payload = ? WHERE id = ?"
_NEXT_DUE = "SELECT id FROM jobs WHERE run_at <= ? ORDER BY run_at LIMIT 1"
_NEXT_DUE_OF_KIND = "SELECT id FROM jobs WHERE kind = ? AND run_at <= ? ORDER BY run_at LIMIT 1"
_CLAIM = f"""
UPDATE jobs SET run_at = ?, attempts = attempts + 1
WHERE id IN (
    WITH due AS MATERIALIZED (
        SELECT id FROM jobs WHERE run_at <= ? ORDER BY run_at LIMIT ? FOR UPDATE SKIP LOCKED
    ) SELECT id FROM due
)
RETURNING {Job.columns_sql()}
"""  # noqa: S608 - constants only
_CLAIM_OF_KIND = f"""
UPDATE jobs SET run_at = ?, attempts = attempts + 1
WHERE id IN (
    WITH due AS MATERIALIZED (
        SELECT id FROM jobs WHERE kind = ? AND run_at <= ? ORDER BY run_at LIMIT ? FOR UPDATE SKIP LOCKED
    ) SELECT id FROM due
)
RETURNING {Job.columns_sql()}
"""  # noqa: S608 - constants only
_BACKLOG = "SELECT count(*), min(run_at) FROM jobs WHERE run_at <= ?"
_ABANDONED = "SELECT kind, count(*) FROM jobs WHERE run_at IS NULL GROUP BY kind ORDER BY kind"
_FINISH = "DELETE FROM jobs WHERE id = ? AND attempts = ?"
_PUT_OFF = "UPDATE jobs SET run_at = ?, last_error = ?, failures = ? WHERE id = ? AND attempts = ?"
_ABANDON = """
UPDATE jobs SET run_at = NULL, abandoned_at = ?, last_error = ?, failures = ? WHERE id = ? AND attempts = ? RETURNING id
"""


class PutOff(NamedTuple):
    """When to try again, and why; one who only waits for a turn makes no noise."""

    delay: timedelta
    reason: str
    is_turn: bool = False


# A handler is called inside a transaction. With nothing more to do, the job is done, or put off, in that transaction.
# Else it returns an action. That is called outside of transactions, and may leave an ending to be called inside one
# again, in which the job is done or put off. The transactions are shared with other jobs: see `Database.write`.
Ending = Callable[[], PutOff | None]
Action = Callable[[], Ending | None]
Handler = Callable[[Payload], Action | PutOff | None]


class Backlog(NamedTuple):
    """How many jobs are due that nobody has claimed, and since when the oldest of them."""

    jobs: int
    since: datetime | None


class Abandon(DoorwardError):
    """Raised by a handler, an action or an ending: no further attempt can help. The argument says why."""


def outside(act: Callable[[Payload], None]) -> Handler:
    """A handler that does nothing inside the shared transactions."""
    return lambda payload: partial(act, payload)


class Jobs:
    """Owns the table `jobs`."""

    def __init__(self, database: Database, clock: Clock, keys: KeyRing) -> None:
        self.database = database
        self._clock = clock
        self._keys = keys
        # Only a hint to look sooner: jobs are found by looking.
        self.queued = threading.Event()
        database.subscribe(_TOPIC, self.queued.set)

    def queue(self, kind: str, payload: Payload, run_at: datetime | None = None) -> None:
        """Add a job, inside the caller's transaction: for now, or for later."""
        now = self._clock.now()
        row = self.database.execute(_INSERT, (kind, b"", to_micros(run_at or now), to_micros(now)))
        assert row is not None  # noqa: S101 - what RETURNING is for
        (job_id,) = row
        sealed = self._keys.seal(json.dumps(payload), _payload_of(job_id))
        self.database.execute(_SET_PAYLOAD, (sealed, job_id))
        self.database.announce(_TOPIC)

    def claim(self, lease: timedelta) -> Job | None:
        """Take the job that has been due for longest, for the time of the lease."""
        return next(iter(self.claim_some(lease, 1)), None)

    def claim_some(self, lease: timedelta, most: int) -> list[Job]:
        """Take at most so many of the jobs that have been due for longest."""
        return self._claim(_NEXT_DUE, _CLAIM, (), lease, most)

    def claim_of_kind(self, kind: str, lease: timedelta, most: int) -> list[Job]:
        """As `claim_some`, of one kind."""
        return self._claim(_NEXT_DUE_OF_KIND, _CLAIM_OF_KIND, (kind,), lease, most)

    def _claim(self, next_due: str, claim: str, which: tuple[str, ...], lease: timedelta, most: int) -> list[Job]:
        now = self._clock.now()
        # Idle workers look again and again: a read is nothing to anybody.
        if self.database.fetch_one(next_due, (*which, to_micros(now))) is None:
            return []
        parameters = (to_micros(now + lease), *which, to_micros(now), most)
        return [Job.from_row(row) for row in self.database.claim(claim, parameters)]

    def backlog(self) -> Backlog:
        """What is due now."""
        row = self.database.fetch_one(_BACKLOG, (to_micros(self._clock.now()),))
        jobs, since = row or (0, None)
        return Backlog(jobs, None if since is None else from_micros(since))

    def abandoned(self) -> dict[str, int]:
        """How many jobs were given up, by kind. Reads the whole table."""
        return dict(self.database.fetch_rows(_ABANDONED, ()))

    def payload(self, job: Job) -> Payload:
        opened: Payload = json.loads(self._keys.open(job.payload, _payload_of(job.id)))
        return opened

    def end(self, job: Job, later: PutOff | None = None) -> None:
        """The job is done, or put off; inside the caller's transaction."""
        if later is None:
            self.database.execute(_FINISH, (job.id, job.attempts))
        else:
            self._put_off(job, later)

    def put_off(self, job: Job, later: PutOff, *, failures: int = 0) -> None:
        """Try again later; so many attempts have failed since one went as it should."""
        self.database.write(partial(self._put_off, job, later, failures))

    def _put_off(self, job: Job, later: PutOff, failures: int = 0) -> None:
        run_at = to_micros(self._clock.now() + later.delay)
        self.database.execute(_PUT_OFF, (run_at, later.reason, failures, job.id, job.attempts))

    def abandon(self, job: Job, reason: str, also: Callable[[], None] = lambda: None) -> None:
        """Try no more, but keep the job for the operator to see; what else follows is done in the same transaction."""

        def change() -> None:
            parameters = (to_micros(self._clock.now()), reason, job.failures + 1, job.id, job.attempts)
            if self.database.execute(_ABANDON, parameters) is not None:
                also()

        self.database.write(change)


def abandoned_jobs(kept: timedelta) -> Sweep:
    """Those that the operator has had so long to see."""
    return Sweep("jobs", "abandoned_at <= ?", (kept,))


def _payload_of(job_id: int) -> Place:
    return Place("jobs", job_id, "payload")
