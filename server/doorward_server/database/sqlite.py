"""SQLite: a file, for processes of one machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peewee

from doorward_server.database.base import Database, Row
from doorward_server.errors import OperatorError, StorageUnavailable

# Pages in KiB that each connection may cache: the operating system caches the file once for all.
_CACHE_KIB = 512
# Pages: between two such steps of a copy, its progress is told, and Ctrl-C counts.
_COPIED_AT_ONCE = 1000


class SqliteDatabase(Database):
    """A SQLite file: WAL, every commit synced.

    A thread that uses the ORM or writes has a connection of its own, kept open. Hot reads share a
    few connections instead: the one that was used last is the warmest.
    """

    driver_error = sqlite3.Error
    advice = (
        ("readonly", "make the file and its folder writable, or set DOORWARD_DATABASE_URL to another place"),
        ("unable to open", "make its folder (`doorward init` makes the home), or set DOORWARD_DATABASE_URL"),
        ("full", "free some disk space"),
        ("disk I/O", "free some disk space, or look after the disk"),
        ("malformed", "it is damaged: look after the disk, and restore a backup"),
        ("not a database", "it is another program's file or damaged: restore a backup, or set DOORWARD_DATABASE_URL"),
        ("locked", "another program holds it: stop that one first"),
    )

    def __init__(self, path: Path, busy_timeout: float) -> None:
        pragmas = {
            "journal_mode": "wal",
            "synchronous": "full",
            "foreign_keys": 1,
            "cache_size": -_CACHE_KIB,
        }
        self.path = path
        engine = peewee.SqliteDatabase(str(path), pragmas=pragmas, timeout=busy_timeout, lock_type="IMMEDIATE")
        super().__init__(engine, f"sqlite:///{path}", str(path), busy_timeout)
        # Every process that uses the database has locked a file; this lets go of it.
        self._leave: Callable[[], object] = lambda: None
        # Taken from and returned to the end; list operations are atomic.
        self._readers: list[sqlite3.Connection] = []

    @staticmethod
    def path_of(url: str) -> Path:
        """The file at `sqlite:///path`."""
        return Path(url.removeprefix("sqlite:///"))

    @classmethod
    def prepared(cls, url: str, busy_timeout: float) -> SqliteDatabase:
        """The file at `sqlite:///path`, in WAL. Raises OperatorError while it is being moved."""
        return cls._locked(url, busy_timeout, fcntl.LOCK_SH, "wait until `doorward migrate-data` is done")

    @classmethod
    def alone(cls, url: str, busy_timeout: float) -> SqliteDatabase:
        """As `prepared`, for a process that nobody else may be beside. Raises OperatorError when somebody is."""
        return cls._locked(url, busy_timeout, fcntl.LOCK_EX, "stop all that runs on it first (serve, work, commands)")

    @classmethod
    def _locked(cls, url: str, busy_timeout: float, lock: int, else_: str) -> SqliteDatabase:
        database = cls(cls.path_of(url), busy_timeout)
        database.prepare()
        # A file of its own: SQLite loses its locks when a process closes the database's file.
        users = os.open(f"{database.path}-users", os.O_RDWR | os.O_CREAT, 0o600)
        database._leave = weakref.finalize(database, os.close, users)
        try:
            fcntl.flock(users, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            database._leave()
            raise OperatorError(f"the database {database.place} is in use: {else_}") from None
        return database

    def _transaction(self) -> Any:
        return self.engine.atomic()

    def _text(self, sql: str) -> str:
        return _text(sql)

    def claim(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        return self.write(lambda: self.execute_all(sql, parameters))

    def fetch_rows(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        try:
            try:
                reader = self._readers.pop()
            except IndexError:
                reader = self._open_reader()
            rows: list[Row] = reader.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise StorageUnavailable from error
        self._readers.append(reader)
        return rows

    def _open_reader(self) -> sqlite3.Connection:
        reader = sqlite3.connect(self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False)
        reader.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        reader.execute("PRAGMA query_only = 1")
        return reader

    def close(self) -> None:
        self.engine.close()
        while self._readers:
            self._readers.pop().close()
        self._leave()

    @property
    def files(self) -> list[Path]:
        names = (self.path.name + suffix for suffix in ("", "-wal", "-shm"))
        return [path for name in names if (path := self.path.with_name(name)).exists()]

    def find_damage(self) -> list[str]:
        with self.operators_view(), contextlib.closing(self._open_reader()) as reader:
            found = [" ".join(row[0].split()) for row in reader.execute("PRAGMA quick_check(5)")]
        return [] if found == ["ok"] else found

    def copy_to(self, path: Path, progress: Callable[[int, int], None]) -> dict[str, int]:
        try:
            with (
                contextlib.closing(self._open_reader()) as source,
                contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy,
            ):
                # In one transaction: else every change by another connection would start the copy anew.
                source.execute("BEGIN")
                source.execute("SELECT 1 FROM sqlite_master").fetchone()
                copy.execute("PRAGMA journal_mode = off")  # nobody goes on with half a copy
                source.backup(
                    copy, pages=_COPIED_AT_ONCE, progress=lambda _, left, total: progress(total - left, total)
                )
                copy.execute("PRAGMA journal_mode = delete")
                # Without a callback now and then, Ctrl-C would wait for the end.
                copy.set_progress_handler(lambda: 0, 1_000_000)
                (verdict,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
                if verdict != "ok":
                    told = " ".join(verdict.split())
                    raise OperatorError(
                        f"the database {self.place} is damaged ({told}): look after the disk, and restore a backup"
                    )
                return _count_rows(copy)
        except sqlite3.Error as error:
            raise OperatorError(f"cannot copy the database {self.place} to {path}: {self.explain(error)}") from None

    def prepare(self) -> None:
        """Switch the file to WAL, which it then stays in. SQLite does not wait for other processes to do that."""
        deadline = time.monotonic() + self._busy_timeout
        with self.operators_view(), contextlib.closing(sqlite3.connect(self.path)) as connection:
            while True:
                try:
                    connection.execute("PRAGMA journal_mode = wal")
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
                else:
                    return


def _count_rows(connection: sqlite3.Connection) -> dict[str, int]:
    """How many rows each table has."""
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return {
        table: connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]  # noqa: S608 - our own names
        for (table,) in tables.fetchall()
    }


@cache
def _text(sql: str) -> str:
    return sql.replace("FOR UPDATE SKIP LOCKED", "")
