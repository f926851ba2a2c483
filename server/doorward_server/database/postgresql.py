"""PostgreSQL: a server, for processes of several machines."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import peewee
import psycopg
from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase
from psycopg.conninfo import conninfo_to_dict

from doorward_server.database.base import Database, Row, storage_failures
from doorward_server.errors import OperatorError

# Whoever writes holds this advisory lock until the end of its transaction. (The number is "doorward", in ASCII.)
WRITERS_LOCK = int.from_bytes(b"doorward")
_LOCK = f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})"
_CHANNEL = "doorward"
# Seconds. A server that does not answer is given up, and not asked again by everyone in turn.
_CONNECT_TIMEOUT, _REST_AFTER_FAILURE = 3, 0.25
_LISTEN_AGAIN, _HEED_STOP = 1.0, 0.5
# libpq's words: a dead peer is noticed although it never says so. Those of the URL win.
_CONNECTION = {
    "connect_timeout": _CONNECT_TIMEOUT,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "doorward",
}
_WORDS = (
    ("%", "%%"),
    (r"\?", "%s"),
    (r"INDEXED BY \w+", ""),
    (r"CAST\((\w+) AS BLOB\)", r"convert_to(\1, 'UTF8')"),
)
T = TypeVar("T")


class PostgresqlDatabase(Database):
    """A PostgreSQL database, by a pool of connections.

    A thread has a connection for the time of a statement or of a transaction. Transactions that write hold one lock,
    as on SQLite: what was read inside stays true until the end. Claims need no lock.
    """

    driver_error = psycopg.Error
    advice = (
        ('role "', "make the user (`createuser`), or correct it in the URL"),
        ("does not exist", "make it (`createdb`), or correct the URL"),
        ("no password supplied", "put the password into the URL, or into PGPASSWORD"),
        ("authentication", "correct the user and the password in the URL"),
        ("no pg_hba.conf entry", "let the user in by PostgreSQL's pg_hba.conf"),
        ("permission denied", "let the user own the database (`ALTER DATABASE ... OWNER TO ...`)"),
        ("too many clients", "raise PostgreSQL's max_connections or lower [database] connections"),
        ("connection", "start PostgreSQL, or correct the host and the port in the URL"),
        ("resolve host", "correct the host in the URL"),
    )

    def __init__(self, url: str, busy_timeout: float, connections: int) -> None:
        _check(url)
        self._engine = _Engine(url, busy_timeout, connections)
        super().__init__(self._engine, url, _without_password(url), busy_timeout)

    def migrate(self) -> list[str]:
        with self.operators_view():
            (encoding,) = self.fetch_one("SHOW server_encoding", ()) or (None,)
        if encoding != "UTF8":
            raise OperatorError(
                f"the database {self.place} cannot hold every character, for its encoding is {encoding}: make another "
                "one by `createdb --encoding UTF8 --template template0`"
            )
        return super().migrate()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self.engine.in_transaction():  # a savepoint of the one under way
            with self.engine.atomic():
                yield
            return
        try:
            with self.engine.atomic():
                self._engine.execute_sql(_LOCK)
                yield
        finally:
            self._engine.release()

    def _text(self, sql: str) -> str:
        return _text(sql)

    def claim(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        with storage_failures():
            return self.execute_all(sql, parameters)

    def fetch_rows(self, sql: str, parameters: Sequence[object]) -> list[Row]:
        with storage_failures():
            return self.execute_all(sql, parameters)

    def announce(self, topic: str) -> None:
        super().announce(topic)
        self.execute("SELECT pg_notify(?, ?)", (_CHANNEL, topic))

    @contextmanager
    def listening(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._listen, args=(stop,), name="listener", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _listen(self, stop: threading.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(psycopg.Error), self._connect_alone() as other:
                other.execute(f"LISTEN {_CHANNEL}")
                for topic in self._subscribers:
                    self._wake(topic)  # there may have been news meanwhile
                while not stop.is_set():
                    for notice in other.notifies(timeout=_HEED_STOP, stop_after=1):
                        self._wake(notice.payload)
            stop.wait(_LISTEN_AGAIN)

    def _connect_alone(self) -> psycopg.Connection:
        return psycopg.connect(self.url, autocommit=True, **_options(self.url, self._busy_timeout))

    def now(self) -> datetime | None:
        row = self.fetch_one("SELECT clock_timestamp()", ())
        return row[0] if row else None

    def copy_to(self, path: Path, progress: Callable[[int, int], None]) -> dict[str, int]:  # noqa: ARG002
        raise OperatorError("this database is PostgreSQL's: make a backup of it by `pg_dump --format custom`")

    def close(self) -> None:
        self._engine.release()
        self._engine.close_idle()


class _Server(peewee.PostgresqlDatabase):
    """New connections. They are made one at a time: a server that is away is not asked by everyone in turn."""

    _failed_at = float("-inf")
    _failure: Exception | None = None

    def _connect(self) -> Any:
        if self._failure is not None and time.monotonic() < self._failed_at + _REST_AFTER_FAILURE:
            raise psycopg.OperationalError(str(self._failure))
        try:
            connection = super()._connect()  # type: ignore[misc]
        except psycopg.OperationalError as failure:
            self._failed_at, self._failure = time.monotonic(), failure
            raise
        self._failure = None
        return connection


class _Engine(PooledPostgresqlDatabase, _Server):  # type: ignore[misc]
    """peewee's pool, with a connection in a thread's hands for no longer than it is used."""

    def __init__(self, url: str, busy_timeout: float, connections: int) -> None:
        options = _options(url, busy_timeout)
        super().__init__(url, prefer_psycopg3=True, max_connections=connections, timeout=busy_timeout, **options)

    def connect(self, reuse_if_open: bool = False) -> bool:
        try:
            return bool(super().connect(reuse_if_open))
        except MaxConnectionsExceeded as failure:
            raise peewee.OperationalError("all connections of [database] connections are in use") from failure

    def execute_sql(self, sql: str, params: Sequence[object] | None = None) -> Any:
        if self.in_transaction():
            return super().execute_sql(sql, params)  # type: ignore[no-untyped-call]
        try:
            # The rows are all here when it returns, so the connection may go to another thread.
            run = super().execute_sql
            return self._on_live_connection(lambda: run(sql, params), sql)  # type: ignore[no-untyped-call]
        finally:
            self.release()

    def begin(self, isolation_level: Any = None) -> None:
        begin = super().begin
        self._on_live_connection(lambda: begin(isolation_level))

    def release(self) -> None:
        """Give this thread's connection back."""
        if not self.is_closed():
            self.close()

    def _on_live_connection(self, run: Callable[[], T], sql: str = "SELECT") -> T:
        """Run what changes nothing; once more if the server has closed the connection since its last use."""
        try:
            return run()
        except (peewee.OperationalError, peewee.InterfaceError):
            if self.is_closed() or not self._is_closed(self._state.conn) or not sql.lstrip().startswith("SELECT"):
                raise
            self.manual_close()
            self.close_idle()  # the others were closed with it, most likely
            return run()

    def _is_closed(self, conn: Any) -> bool:
        # To ask the server each time, as the pool would, doubles the time of a read.
        return bool(conn.closed)


def _options(url: str, busy_timeout: float) -> dict[str, Any]:
    """What connections are made with, but for what the URL says."""
    given = conninfo_to_dict(url)
    milliseconds = round(busy_timeout * 1000)
    session = {
        "lock_timeout": milliseconds,
        # Whoever freezes in the middle of a transaction must not hold the writers' lock for ever.
        "idle_in_transaction_session_timeout": 2 * milliseconds,
        "default_transaction_isolation": "read\\ committed",
    }
    options = " ".join(f"-c {name}={value}" for name, value in session.items())
    ours = {name: value for name, value in _CONNECTION.items() if name not in given}
    return {**ours, "options": f"{options} {given.get('options') or ''}".strip()}


def _check(url: str) -> None:
    """Refuse a URL that libpq cannot read, or that it reads otherwise than it is meant: it ends a password at `@`."""
    with contextlib.suppress(psycopg.ProgrammingError):  # its text may hold a part of the password
        given = conninfo_to_dict(url)
        if not any("@" in str(given.get(word, "")).removeprefix("@") for word in ("host", "dbname")):
            return
    raise OperatorError(
        "the database's URL cannot be read: its form is postgresql://USER:PASSWORD@HOST:PORT/DATABASE, behind it "
        "perhaps ? and libpq's parameters, and in a user or a password all but letters and digits has to be "
        "percent-encoded (@ is %40, / is %2F)"
    )


def _without_password(url: str) -> str:
    url = re.sub("://([^:@/]*):[^@/]*@", r"://\1@", url)
    return re.sub("([?&](?:ssl)?password)=[^&]*", r"\1=...", url)


@cache
def _text(sql: str) -> str:
    for pattern, theirs in _WORDS:
        sql = re.sub(pattern, theirs, sql)
    return sql
