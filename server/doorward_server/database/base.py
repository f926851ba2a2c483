"""What both engines share: writing in turn, shared commits, news, and migrations."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import peewee
from playhouse.migrations import Runner

from doorward_server.errors import DoorwardError, OperatorError, StorageUnavailable

_MIGRATIONS = Path(__file__).parents[1] / "migrations"
_LONGEST_QUEUE = 48
T = TypeVar("T")
Row = tuple[Any, ...]


@dataclass(eq=False)
class Change(Generic[T]):
    """What a thread wants to write, and what became of it."""

    run: Callable[[], T]
    is_done: bool = False
    result: T | None = None
    failure: Exception | None = None

    def outcome(self) -> T:
        if self.failure is not None:
            raise self.failure
        return cast(T, self.result)


class Database(ABC):
    """One database, for many threads. Whoever writes does so alone: no other transaction writes meanwhile.

    Failures of the storage itself (away, full, locked for too long, read-only, damaged) are raised as
    StorageUnavailable; violations of a constraint stay peewee.IntegrityError, for the caller knows what they mean.
    """

    # What a failure's words hold, and what the operator can do about it.
    advice: ClassVar[Sequence[tuple[str, str]]]
    # Failures of the driver itself, which peewee has not seen.
    driver_error: ClassVar[type[Exception]]

    def __init__(self, engine: peewee.Database, url: str, place: str, busy_timeout: float) -> None:
        """`place` names the database to people; it holds no password."""
        self.engine = engine
        self.url = url
        self.place = place
        self._busy_timeout = busy_timeout
        # Engines queue writers unfairly, or hold a connection for each: so threads queue here, and only
        # processes meet in the database.
        self._writer = threading.Lock()
        # While another program holds the database, some threads have to stay free for reads.
        self._queue = threading.BoundedSemaphore(_LONGEST_QUEUE)
        # What waits to be written; a deque's operations are atomic.
        self._changes: deque[Change[Any]] = deque()
        self._subscribers: dict[str, list[Callable[[], None]]] = defaultdict(list)

    # Writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction in which nobody else writes. Never do network calls inside."""
        with self._as_writer(), storage_failures(), self._transaction():
            yield

    @abstractmethod
    def _transaction(self) -> Any:
        """A context in which everything is done by this thread alone, and committed at the end."""

    @contextmanager
    def _as_writer(self) -> Iterator[None]:
        with self._queued():
            if not self._writer.acquire(timeout=self._busy_timeout):
                raise StorageUnavailable
            try:
                yield
            finally:
                self._writer.release()

    def write(self, run: Callable[[], T]) -> T:
        """Run a change in a transaction that it may share with other threads' changes; returns what it returns.

        Under load one commit, which waits for the disk, is then one for many. The change runs in whichever of
        the threads commits, perhaps a second time, so it does nothing but use this database. When it raises, it
        alone is undone.
        """
        change = Change(run)
        with self._queued():
            self._changes.append(change)
            if not self._writer.acquire(timeout=self._busy_timeout):
                try:
                    self._changes.remove(change)
                except ValueError:  # another thread is at it
                    self._writer.acquire()
                else:
                    raise StorageUnavailable
            try:
                if not change.is_done:
                    self._run_changes([self._changes.popleft() for _ in range(len(self._changes))])
            finally:
                self._writer.release()
        return change.outcome()

    def write_each(self, runs: Iterable[Callable[[], T]]) -> list[Change[T]]:
        """Run changes, each as `write` runs one, in a transaction; returns what became of each."""
        changes = [Change(run) for run in runs]
        with self._as_writer():
            self._run_changes(changes)
        return changes

    def _run_changes(self, changes: Sequence[Change[Any]]) -> None:
        """Run changes together; or, if one of them fails, each by itself."""
        try:
            with storage_failures(), self._transaction():
                for change in changes:
                    change.result = change.run()
        except StorageUnavailable as failure:
            for change in changes:
                change.failure = failure
        except Exception:  # noqa: BLE001 - each thread is told its own
            for change in changes:
                self._run_alone(change)
        for change in changes:
            change.is_done = True

    def _run_alone(self, change: Change[Any]) -> None:
        try:
            with storage_failures(), self._transaction():
                change.result = change.run()
        except Exception as failure:  # noqa: BLE001 - its thread raises it
            change.failure = failure

    @contextmanager
    def _queued(self) -> Iterator[None]:
        """A place in the queue of those who write."""
        if not self._queue.acquire(blocking=False):
            raise StorageUnavailable
        try:
            yield
        finally:
            self._queue.release()

    def execute(self, sql: str, parameters: Sequence[object]) -> Row | None:
        """Run a constant statement inside the caller's transaction, without peewee; returns the first row, if any."""
        rows = self.execute_all(sql, parameters)
        return rows[0] if rows else None

    def execute_all(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        """As `execute`; returns all rows."""
        cursor = self.engine.execute_sql(self._text(sql), parameters)  # type: ignore[no-untyped-call]
        return cursor.fetchall() if cursor.description is not None else []

    @abstractmethod
    def claim(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        """Take rows by one conditional UPDATE ... RETURNING, outside of transactions.

        Its subselect ends with FOR UPDATE SKIP LOCKED: where others may claim at the same time, each takes its own.
        It stands in a WITH ... AS MATERIALIZED: else PostgreSQL may run it once for each row, and claim them all.
        """

    # Reading

    @abstractmethod
    def _text(self, sql: str) -> str:
        """A constant statement in this engine's words."""

    def fetch_one(self, sql: str, parameters: Sequence[object]) -> Row | None:
        """The first row of a constant statement, without peewee: for hot reads, outside of transactions."""
        rows = self.fetch_rows(sql, parameters)
        return rows[0] if rows else None

    @abstractmethod
    def fetch_rows(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        """All rows of a constant statement, as `fetch_one` reads one."""

    def fetch_all(self, query: peewee.ModelSelect[Any]) -> list[Any]:
        """All rows of a query."""
        with storage_failures():
            return list(query)

    # News: a hint to look sooner; what is to be done is found by looking, too

    def subscribe(self, topic: str, wake: Callable[[], None]) -> None:
        """Call `wake`, which must not block, soon after a change that was announced under the topic."""
        self._subscribers[topic].append(wake)

    def announce(self, topic: str) -> None:
        """Wake the topic's subscribers once the caller's transaction is committed."""
        self.engine.after_commit(partial(self._wake, topic))

    def _wake(self, topic: str) -> None:
        for wake in self._subscribers.get(topic, ()):
            wake()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For the time of a `with` block, hear other processes' news too, where the engine carries them."""
        yield

    # The schema

    def migrate(self) -> list[str]:
        """Bring an empty or older schema up to date; returns the names of the migrations applied."""
        with self.operators_view(), self.writing():
            return list(self._runner().up())

    def check_schema(self) -> list[str]:
        """The names of the migrations that are due; OperatorError when the schema is newer than this program."""
        with self.operators_view():
            status = self._runner().status()
        if newer := [step.name for step in status if step.path is None]:
            raise OperatorError(
                f"the database {self.place} has a newer schema ({newer[-1]}) than this version of Doorward knows: "
                "upgrade Doorward, or restore a backup from before the upgrade"
            )
        return [step.name for step in status if not step.applied]

    def _runner(self) -> Runner:
        return Runner(self.engine, str(_MIGRATIONS))

    @contextmanager
    def operators_view(self) -> Iterator[None]:
        """Failures of the storage, as sentences for the operator."""
        try:
            yield
        except (StorageUnavailable, peewee.DatabaseError, peewee.InterfaceError, self.driver_error) as failure:
            raise OperatorError(f"cannot use the database {self.place}: {self.explain(failure)}") from None

    def explain(self, failure: BaseException) -> str:
        """What went wrong first, on one line, and what the operator can do about it."""
        reason = " ".join(str(_root(failure)).split())
        end = "" if reason.endswith("?") else "."
        mend = next((f"{end} Mend: {advice}" for symptom, advice in self.advice if symptom in reason), "")
        return reason + mend

    # For operators

    @property
    def files(self) -> list[Path]:
        """What it consists of at the moment, the database itself first; nothing of a server's."""
        return []

    def find_damage(self) -> list[str]:
        """What is wrong with the files, as far as one reading of them tells; a server sees to its own."""
        return []

    def now(self) -> datetime | None:
        """A server's time; None where it is this machine's."""
        return None

    @abstractmethod
    def copy_to(self, path: Path, progress: Callable[[int, int], None]) -> dict[str, int]:
        """Copy all, as it is at one moment, into a file, while others write; returns how many rows each table has.

        `progress` is told how many pages are copied, and of how many. The copy is checked, and needs no file beside it.
        Raises OperatorError.
        """

    @abstractmethod
    def close(self) -> None:
        """Close this thread's connection and those that nobody uses."""


def _root(failure: BaseException) -> BaseException:
    """What went wrong first: a rollback after a failure fails too."""
    while (earlier := failure.__cause__ or failure.__context__) is not None:
        failure = earlier
    return failure


@contextmanager
def storage_failures() -> Iterator[None]:
    """Turns failures of the storage into StorageUnavailable; a decorator, too."""
    try:
        yield
    except (peewee.IntegrityError, DoorwardError):
        raise
    except (peewee.DatabaseError, peewee.InterfaceError) as error:
        raise StorageUnavailable from error
