"""PostgreSQL: a server, for processes of several machines."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import peewee
import psycopg
from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase
from psycopg.conninfo import conninfo_to_dict

from doorward_server.database.base import Database, Row, storage_failures
from doorward_server.errors import OperatorError, StorageUnavailable

# Whoever writes holds this advisory lock until the end of its transaction. (The number is "doorward", in ASCII.)
WRITERS_LOCK = int.from_bytes(b"doorward")
_LOCK = f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})"
# As bytes, for in a database without an encoding texts are that.
_ENCODING = "SELECT pg_encoding_to_char(encoding)::text::bytea FROM pg_database WHERE datname = current_database()"
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
    as on SQLite: what was read inside stays true until the end. Claims need no lock. Hot reads have half of the
    connections to themselves, and go past peewee: the one that was used last is the warmest.
    """

    driver_error = psycopg.Error
    advice = (
        ("already exists", "there is something of another program's: give Doorward a database of its own"),
        ("column", "there is something of another program's: give Doorward a database of its own"),
        ("does not exist", "make it (`createdb`), or mend DOORWARD_DATABASE_URL"),
        ("authentication", "mend the user and the password in DOORWARD_DATABASE_URL"),
        ("permission denied", "let the user own the database (`ALTER DATABASE ... OWNER TO ...`)"),
        ("too many clients", "raise PostgreSQL's max_connections or lower [database] connections"),
        ("connection", "start PostgreSQL, or mend the host and port in DOORWARD_DATABASE_URL"),
        ("resolve host", "mend the host in DOORWARD_DATABASE_URL"),
    )

    def __init__(self, url: str, busy_timeout: float, connections: int) -> None:
        given = _read(url)
        options = _options(given, busy_timeout)
        self._engine = _Engine(url, busy_timeout, connections - connections // 2, options)
        super().__init__(self._engine, url, _place(given), busy_timeout)
        # Taken from and returned to the end; list operations are atomic.
        self._readers: list[psycopg.Connection] = []
        self._reading = threading.BoundedSemaphore(connections // 2)

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
        if self._engine.in_transaction():
            with storage_failures():
                return self.execute_all(sql, parameters)
        if not self._reading.acquire(timeout=self._busy_timeout):
            raise StorageUnavailable
        try:
            return self._read(_text(sql), parameters)
        except psycopg.Error as error:
            raise StorageUnavailable from error
        finally:
            self._reading.release()

    def _read(self, text: str, parameters: Sequence[object]) -> list[Row]:
        """On a connection that is open; if the server has closed it since its last use, once more on a new one."""
        reader = self._take_reader()
        try:
            rows = reader.execute(text.encode(), parameters).fetchall()
        except psycopg.OperationalError:
            if not reader.closed:
                self._readers.append(reader)
                raise
            self._close_readers()  # the others were closed with it, most likely
            reader = self._engine.open_connection()
            rows = reader.execute(text.encode(), parameters).fetchall()
        except psycopg.Error:
            self._readers.append(reader)
            raise
        self._readers.append(reader)
        return rows

    def _take_reader(self) -> psycopg.Connection:
        with contextlib.suppress(IndexError):
            return self._readers.pop()
        return self._engine.open_connection()

    def _close_readers(self) -> None:
        while self._readers:
            self._readers.pop().close()

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
            with contextlib.suppress(psycopg.Error), self._engine.open_connection() as other:
                other.execute(f"LISTEN {_CHANNEL}")
                for topic in [*self._subscribers]:  # more may subscribe meanwhile
                    self._wake(topic)  # there may have been news meanwhile
                while not stop.is_set():
                    for notice in other.notifies(timeout=_HEED_STOP, stop_after=1):
                        self._wake(notice.payload)
            stop.wait(_LISTEN_AGAIN)

    def check_schema(self) -> list[str]:
        with self.operators_view():
            (encoding,) = self.fetch_one(_ENCODING, ()) or ("",)
        if encoding != b"UTF8":
            raise OperatorError(
                f"the database {self.place} does not hold every text: make one by "
                "`createdb --encoding UTF8 --template template0`, and set DOORWARD_DATABASE_URL"
            )
        return super().check_schema()

    def now(self) -> datetime | None:
        row = self.fetch_one("SELECT clock_timestamp()", ())
        return row[0] if row else None

    def copy_to(self, path: Path, progress: Callable[[int, int], None]) -> dict[str, int]:  # noqa: ARG002
        raise OperatorError("this database is PostgreSQL's: make a backup of it by `pg_dump --format custom`")

    def close(self) -> None:
        self._engine.release()
        self._engine.close_idle()
        self._close_readers()


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

    def __init__(self, url: str, busy_timeout: float, connections: int, options: Mapping[str, Any]) -> None:
        super().__init__(url, prefer_psycopg3=True, max_connections=connections, timeout=busy_timeout, **options)

    def connect(self, reuse_if_open: bool = False) -> bool:
        try:
            return bool(super().connect(reuse_if_open))
        except MaxConnectionsExceeded as failure:
            raise peewee.OperationalError("all connections of [database] connections are in use") from failure

    def open_connection(self) -> psycopg.Connection:
        """A new one, which is none of the pool's."""
        connection: psycopg.Connection = _Server._connect(self)
        return connection

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


def _read(url: str) -> dict[str, Any]:
    """What a URL says, as libpq reads it. Raises OperatorError, without the URL: there may be a password in it."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        given = {"host": "@"}
    # What stands where the host is to be, or the port, is a password with an `@` or a `/` of its own.
    port = str(given.get("port", ""))
    if "@" in str(given.get("host", "")) or not all(one.isdigit() for one in port.split(",") if one):
        raise OperatorError(
            "the URL of the database cannot be read: write postgresql://USER:PASSWORD@HOST/DATABASE, and in the "
            "password %40 for @, %2F for / and so on, and mend its parameters, if it has any"
        )
    return given


def _options(given: Mapping[str, Any], busy_timeout: float) -> dict[str, Any]:
    """What connections are made with, but for what the URL says."""
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


def _place(given: Mapping[str, Any]) -> str:
    """The URL, of nothing but the user, the host, the port and the database: parameters may hold a password, too."""
    user, host, port, name = (quote(str(given.get(part, "")), safe=",:") for part in ("user", "host", "port", "dbname"))
    return f"postgresql://{user}{user and '@'}{host}{port and ':'}{port}/{name}"


@cache
def _text(sql: str) -> str:
    for pattern, theirs in _WORDS:
        sql = re.sub(pattern, theirs, sql)
    return sql
