"""The database: connections, write transactions, and the schema's version. Imports only `errors`."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import peewee
from playhouse.migrations import Runner

from doorward_server.errors import DoorwardError, OperatorError, StorageUnavailable

_MIGRATIONS = Path(__file__).parent / "migrations"


# Pages in KiB that each connection may cache: the operating system caches the file once for all.
_CACHE_KIB = 512
_LONGEST_QUEUE = 48
T = TypeVar("T")


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


class Database:
    """A SQLite file: WAL, every commit synced.

    A thread that uses the ORM or writes has a connection of its own, kept open. Hot reads share a
    few connections instead: the one that was used last is the warmest.

    Failures of the storage itself (full, locked for too long, read-only, damaged) are raised as
    StorageUnavailable; violations of a constraint stay peewee.IntegrityError, for the caller knows
    what they mean.
    """

    def __init__(self, path: Path, busy_timeout: float) -> None:
        pragmas = {
            "journal_mode": "wal",
            "synchronous": "full",
            "foreign_keys": 1,
            "cache_size": -_CACHE_KIB,
        }
        self.path = path
        self.engine = peewee.SqliteDatabase(str(path), pragmas=pragmas, timeout=busy_timeout, lock_type="IMMEDIATE")
        self._busy_timeout = busy_timeout
        # BEGIN IMMEDIATE queues unfairly between threads: under load some starve until they see
        # "database is locked". So threads queue here, and only processes meet in SQLite.
        self._writer = threading.Lock()
        # While the file is held by another program, some threads have to stay free for reads.
        self._queue = threading.BoundedSemaphore(_LONGEST_QUEUE)
        # What waits to be written; a deque's operations are atomic.
        self._changes: deque[Change[Any]] = deque()
        # Taken from and returned to the end; list operations are atomic.
        self._readers: list[sqlite3.Connection] = []

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction. Never do network calls inside."""
        with self._as_writer(), storage_failures(), self.engine.atomic():
            yield

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
            with storage_failures(), self.engine.atomic():
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
            with storage_failures(), self.engine.atomic():
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

    def execute(self, sql: str, parameters: Sequence[object]) -> tuple[Any, ...] | None:
        """Run a constant statement inside the caller's transaction, without peewee; returns the first row, if any."""
        row: tuple[Any, ...] | None = self.engine.execute_sql(sql, parameters).fetchone()  # type: ignore[no-untyped-call]
        return row

    def fetch_one(self, sql: str, parameters: Sequence[object]) -> tuple[Any, ...] | None:
        """The first row of a constant statement, without peewee: for hot reads, outside of transactions."""
        rows = self.fetch_rows(sql, parameters)
        return rows[0] if rows else None

    def fetch_rows(self, sql: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """All rows of a constant statement, as `fetch_one` reads one."""
        try:
            try:
                reader = self._readers.pop()
            except IndexError:
                reader = self._open_reader()
            rows: list[tuple[Any, ...]] = reader.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise StorageUnavailable from error
        self._readers.append(reader)
        return rows

    def _open_reader(self) -> sqlite3.Connection:
        reader = sqlite3.connect(self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False)
        reader.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        reader.execute("PRAGMA query_only = 1")
        return reader

    def fetch_all(self, query: peewee.ModelSelect[Any]) -> list[Any]:
        """All rows of a query."""
        with storage_failures():
            return list(query)

    def execute_all(self, sql: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """As `execute`; returns all rows."""
        rows: list[tuple[Any, ...]] = self.engine.execute_sql(sql, parameters).fetchall()  # type: ignore[no-untyped-call]
        return rows

    def migrate(self) -> list[str]:
        """Bring an empty or older schema up to date; returns the names of the migrations applied."""
        with self._operators_view(), self.writing():
            return list(self._runner().up())

    def check_schema(self) -> list[str]:
        """The names of the migrations that are due; OperatorError when the schema is newer than this program."""
        with self._operators_view():
            status = self._runner().status()
        if newer := [step.name for step in status if step.path is None]:
            raise OperatorError(
                f"the database {self.path} has a newer schema ({newer[-1]}) than this version of Doorward knows: "
                "upgrade Doorward, or restore a backup from before the upgrade"
            )
        return [step.name for step in status if not step.applied]

    def close(self) -> None:
        """Close this thread's connection and those of the hot reads."""
        self.engine.close()
        while self._readers:
            self._readers.pop().close()

    def _runner(self) -> Runner:
        return Runner(self.engine, str(_MIGRATIONS))

    @contextmanager
    def _operators_view(self) -> Iterator[None]:
        try:
            yield
        except (StorageUnavailable, peewee.DatabaseError, sqlite3.Error) as failure:
            reason = str(_root(failure))
            raise OperatorError(f"cannot use the database {self.path}: {reason}{_advice(reason)}") from None

    def prepare(self) -> None:
        """Switch the file to WAL, which it then stays in. SQLite does not wait for other processes to do that."""
        deadline = time.monotonic() + self._busy_timeout
        with self._operators_view(), contextlib.closing(sqlite3.connect(self.path)) as connection:
            while True:
                try:
                    connection.execute("PRAGMA journal_mode = wal")
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
                else:
                    return


def _root(failure: BaseException) -> BaseException:
    """What went wrong first: a rollback after a failure fails too."""
    while (earlier := failure.__cause__ or failure.__context__) is not None:
        failure = earlier
    return failure


def _advice(reason: str) -> str:
    for symptom, advice in (
        ("readonly", "make the file and its folder writable, or set DOORWARD_DATABASE_URL to another place"),
        ("unable to open", "make its folder (`doorward init` makes the home), or set DOORWARD_DATABASE_URL"),
        ("full", "free some disk space"),
        ("disk I/O", "free some disk space, or look after the disk"),
        ("not a database", "it is another program's file or damaged: restore a backup, or set DOORWARD_DATABASE_URL"),
        ("locked", "another program holds it: stop that one first"),
    ):
        if symptom in reason:
            return f". Mend: {advice}"
    return ""


@contextmanager
def storage_failures() -> Iterator[None]:
    """Turns failures of the storage into StorageUnavailable; a decorator, too."""
    try:
        yield
    except (peewee.IntegrityError, DoorwardError):
        raise
    except (peewee.DatabaseError, peewee.InterfaceError) as error:
        raise StorageUnavailable from error


def open_database(url: str, busy_timeout: float) -> Database:
    """The database at `sqlite:///path`."""
    database = Database(Path(url.removeprefix("sqlite:///")), busy_timeout)
    database.prepare()
    return database
