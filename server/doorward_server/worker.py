"""The worker: does the due jobs, each by the handler of its kind. Imports `jobs`, `logs` and below."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from doorward_server.crypto import CannotOpen
from doorward_server.errors import CallError, StorageUnavailable
from doorward_server.jobs import Abandon, Action, Ending, Handler, Jobs, Payload, PutOff
from doorward_server.logs import Log, describe
from doorward_server.metrics import Metrics
from doorward_server.models import Job

# What is called inside a transaction: a handler, or an ending.
Step = Callable[[], Action | PutOff | None]

# Seconds. With all threads busy, to end several jobs at once is worth to wait so long.
_LINGER = 0.01
_QUICK_AT_ONCE = 32


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds between failures, in order; after the last one the job is abandoned."""

    schedule: Sequence[float]

    def delay(self, attempts: int) -> timedelta | None:
        """How long to wait after so many attempts (at least one); None: give up."""
        return timedelta(seconds=self.schedule[attempts - 1]) if attempts <= len(self.schedule) else None


class _Attempt(NamedTuple):
    """An action that returned, or failed."""

    job: Job
    ending: Ending | None = None
    failure: Exception | None = None

    def end(self) -> PutOff | None:
        return self.ending() if self.ending is not None else None


class Worker:
    """Does the due jobs: one thread talks to the database, for many jobs in a transaction, and others act.

    A job is opened only when there is a thread to act at once, so that it acts upon what is so now.
    """

    def __init__(
        self,
        jobs: Jobs,
        handlers: Mapping[str, Handler],
        *,
        when_abandoned: Mapping[str, Callable[[Payload], None]] = MappingProxyType({}),
        quick: Sequence[str] = (),
        retry: RetryPolicy,
        lease: timedelta,
        poll: float,
        threads: int,
        log: Log,
        metrics: Metrics,
    ) -> None:
        self._jobs = jobs
        self._handlers = handlers
        # Told of a job that is given up, inside the transaction that says so.
        self._when_abandoned = when_abandoned
        # Kinds that need no thread to act: they do not wait for one.
        self._quick = quick
        self._retry = retry
        self._lease = lease
        self._poll = poll
        self._log = log
        self._metrics = metrics
        self._stopping = threading.Event()
        self._threads = threads
        self._free = threads
        # Made, and not yet written down; a deque's operations are atomic.
        self._attempts: deque[_Attempt] = deque()
        self._several = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._writer = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._writer.start()

    def stop(self, grace: float) -> None:
        """Claim nothing more, and wait `grace` seconds for the jobs under way. Others run again later."""
        self._stopping.set()
        self._jobs.queued.set()
        if self._writer.is_alive():
            self._writer.join(grace)
        self._pool.shutdown(wait=False)

    def run_one(self) -> bool:
        """Do one due job; False when there is none."""
        jobs = self._jobs.claim_some(self._lease, 1)
        self._end([_attempt(job, action) for job, action in self._open(jobs)])
        return bool(jobs)

    # The thread that talks to the database

    def _run(self) -> None:
        while not self._stopping.is_set() or self._free < self._threads:
            self._wait()
            with self._logged_failures():
                self._end_attempts()
            with self._logged_failures():
                self._start_jobs()

    def _wait(self) -> None:
        """Until there is something to do; when all threads are busy, something for many jobs."""
        self._jobs.queued.wait(self._poll)
        self._jobs.queued.clear()
        if not self._free:
            self._several.wait(_LINGER)
            self._several.clear()

    def _end_attempts(self) -> None:
        attempts = [self._attempts.popleft() for _ in range(len(self._attempts))]
        self._free += len(attempts)
        self._end(attempts)

    def _start_jobs(self) -> None:
        if self._stopping.is_set():
            return
        for kind in self._quick:
            while jobs := self._jobs.claim_of_kind(kind, self._lease, _QUICK_AT_ONCE):
                self._open(jobs)
        if not self._free:
            return
        jobs = self._jobs.claim_some(self._lease, self._free)
        are_more = len(jobs) == self._free
        for job, action in self._open(jobs):
            self._free -= 1
            self._pool.submit(self._act, job, action)
        if are_more and self._free:
            self._jobs.queued.set()

    def _open(self, jobs: Sequence[Job]) -> list[tuple[Job, Action]]:
        """Returns what is to be done for those jobs that are not at their end with that."""
        return self._step([(job, partial(self._handle, job)) for job in jobs])

    def _handle(self, job: Job) -> Action | PutOff | None:
        handler = self._handlers.get(job.kind)
        if handler is None:
            raise Abandon("NO_HANDLER")
        return handler(self._jobs.payload(job))

    def _end(self, attempts: Sequence[_Attempt]) -> None:
        self._step([(attempt.job, attempt.end) for attempt in attempts if attempt.failure is None])
        for attempt in attempts:
            if attempt.failure is not None:
                with self._logged_failures():
                    self._fail(attempt.job, attempt.failure)

    def _step(self, steps: Sequence[tuple[Job, Step]]) -> list[tuple[Job, Action]]:
        """Take a step of each of the jobs, all in one transaction; returns the actions that come of them."""
        if not steps:
            return []
        changes = self._jobs.database.write_each([partial(self._write, job, step) for job, step in steps])
        actions = []
        for (job, _), change in zip(steps, changes, strict=True):
            if change.failure is not None:
                with self._logged_failures():
                    self._fail(job, change.failure)
            elif callable(outcome := change.outcome()):
                actions.append((job, outcome))
            else:
                self._tell(job, outcome)
        return actions

    def _write(self, job: Job, step: Step) -> Action | PutOff | None:
        outcome = step()
        if not callable(outcome):
            self._jobs.end(job, outcome)
        return outcome

    def _fail(self, job: Job, failure: Exception) -> None:
        match failure:
            case Abandon():
                self._give_up(job, str(failure))
            case CannotOpen():
                self._give_up(job, "CANNOT_OPEN")
            case CallError():
                self._retry_after(job, failure.reason)
            case _:
                self._log.error("job failed", job_id=job.id, kind=job.kind, **describe(failure))
                self._retry_after(job, "INTERNAL")

    def _retry_after(self, job: Job, reason: str) -> None:
        failures = job.failures + 1
        delay = self._retry.delay(failures)
        if delay is None:
            self._give_up(job, reason)
            return
        later = PutOff(delay, reason)
        self._jobs.put_off(job, later, failures=failures)
        self._tell(job, later)

    def _give_up(self, job: Job, reason: str) -> None:
        self._jobs.abandon(job, reason, also=partial(self._tell_abandoned, job))
        self._metrics.job_ended(job.kind, "abandoned")
        self._log.error("job abandoned", job_id=job.id, kind=job.kind, attempts=job.attempts, reason=reason)

    def _tell_abandoned(self, job: Job) -> None:
        handler = self._when_abandoned.get(job.kind)
        with contextlib.suppress(CannotOpen):
            if handler is not None:
                handler(self._jobs.payload(job))

    def _tell(self, job: Job, later: PutOff | None) -> None:
        told = {"job_id": job.id, "kind": job.kind, "attempts": job.attempts}
        if later is None:
            self._metrics.job_ended(job.kind, "done")
            self._log.info("job done", **told)
            return
        if not later.is_turn:
            self._metrics.job_ended(job.kind, "put_off")
        tell = self._log.debug if later.is_turn else self._log.warning
        tell("job put off", **told, reason=later.reason, seconds=later.delay.total_seconds())

    @contextlib.contextmanager
    def _logged_failures(self) -> Iterator[None]:
        try:
            yield
        except StorageUnavailable:
            self._log.warning("jobs wait for the database")
        except Exception as failure:  # noqa: BLE001 - the worker has to live on
            self._log.error("worker failed", **describe(failure))

    # The threads that act

    def _act(self, job: Job, action: Action) -> None:
        self._attempts.append(_attempt(job, action))
        if 2 * len(self._attempts) >= self._threads:
            self._several.set()
        self._jobs.queued.set()


def _attempt(job: Job, action: Action) -> _Attempt:
    try:
        return _Attempt(job, ending=action())
    except Exception as failure:  # noqa: BLE001 - one bad job must not end the worker
        return _Attempt(job, failure=failure)
