"""The database under load, under races, and when its storage fails."""

import concurrent.futures
import contextlib
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import peewee
import pytest
from playhouse.migrations import Runner

from doorward_server import migrations, models
from doorward_server.clock import Clock
from doorward_server.database import SqliteDatabase, open_database, storage_failures
from doorward_server.errors import CallError, EmailTaken, NoConnection, OperatorError, StorageUnavailable
from doorward_server.models import User
from doorward_server.users import Users
from tests.processes import clean_environment

MIGRATIONS = sorted(path.stem for path in Path(migrations.__path__[0]).glob("[0-9]*.py"))
pytestmark = pytest.mark.sqlite
_MIGRATIONS_FOLDER = Path(migrations.__path__[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "doorward.db"


@contextlib.contextmanager
def opened(path: Path, busy_timeout: float = 5) -> Iterator[SqliteDatabase]:
    """A database for the time of a `with` block."""
    database = SqliteDatabase(path, busy_timeout)
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
def database(path: Path) -> Iterator[SqliteDatabase]:
    with opened(path) as database:
        database.migrate()
        yield database


def insert(database: SqliteDatabase, name: str) -> None:
    sql = "INSERT INTO users (slug, name, created_at) VALUES (?, ?, 0)"
    database.engine.execute_sql(sql, (name, name))  # type: ignore[no-untyped-call]


def slugs(database: SqliteDatabase) -> list[str]:
    with contextlib.closing(sqlite3.connect(database.path)) as other:
        return [slug for (slug,) in other.execute("SELECT slug FROM users ORDER BY id")]


# Transactions


def test_every_thread_s_connection_is_made_durable(database: SqliteDatabase) -> None:
    pragmas = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}

    def ask(name: str) -> object:
        return database.engine.execute_sql(f"PRAGMA {name}").fetchone()[0]  # type: ignore[no-untyped-call]

    def ask_all() -> dict[str, object]:
        try:
            return {name: ask(name) for name in pragmas}
        finally:
            database.close()

    assert ask_all() == pragmas
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask_all).result(10) == pragmas


def test_fetch_one_only_reads(database: SqliteDatabase) -> None:
    sql = "INSERT INTO users (slug, name, created_at) VALUES ('ada', 'Ada', 0)"
    with pytest.raises(StorageUnavailable):
        database.fetch_one(sql, ())
    assert slugs(database) == []
    assert database.fetch_one("SELECT 1, 'a'", ()) == (1, "a")
    assert database.fetch_one("SELECT 1 WHERE 0", ()) is None


def test_fetch_one_sees_what_was_committed_last(database: SqliteDatabase) -> None:
    sql = "SELECT count(*) FROM users, (SELECT 1 UNION SELECT 2) WHERE slug = ?"
    assert database.fetch_one(sql, ("ada",)) == (0,)
    with database.writing():
        insert(database, "ada")
        assert database.fetch_one(sql, ("ada",)) == (0,)
    assert database.fetch_one(sql, ("ada",)) == (2,)
    assert database.fetch_one("SELECT id FROM users UNION SELECT 7", ()) is not None
    with database.writing():
        insert(database, "eve")
    assert database.fetch_one(sql, ("eve",)) == (2,)


def test_a_transaction_is_seen_whole_or_not_at_all(database: SqliteDatabase) -> None:
    with database.writing():
        insert(database, "ada")
        insert(database, "eve")
        assert slugs(database) == []
    assert slugs(database) == ["ada", "eve"]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        pytest.param(NoConnection(), NoConnection, id="of ours"),
        pytest.param(OperatorError("a sentence"), OperatorError, id="for the operator"),
        pytest.param(RuntimeError("unexpected"), RuntimeError, id="unexpected"),
        pytest.param(KeyboardInterrupt(), KeyboardInterrupt, id="Ctrl-C"),
        pytest.param(peewee.IntegrityError("x"), peewee.IntegrityError, id="constraint"),
        pytest.param(peewee.OperationalError("x"), StorageUnavailable, id="storage"),
        pytest.param(peewee.InterfaceError("x"), StorageUnavailable, id="connection"),
    ],
)
def test_an_exception_rolls_back(database: SqliteDatabase, raised: BaseException, seen: type[BaseException]) -> None:
    def fail() -> None:
        with database.writing():
            insert(database, "ada")
            raise raised

    with pytest.raises(seen):
        fail()
    assert slugs(database) == []
    with database.writing():
        insert(database, "eve")
    assert slugs(database) == ["eve"]


def test_a_violated_constraint_is_no_failure_of_the_storage(database: SqliteDatabase) -> None:
    def fail() -> None:
        with database.writing():
            insert(database, "ada")
            insert(database, "ada")

    with pytest.raises(peewee.IntegrityError):
        fail()
    assert slugs(database) == []


def test_storage_failures_decorates(database: SqliteDatabase) -> None:
    @storage_failures()
    def fail() -> None:
        database.engine.execute_sql("SELECT 1 FROM nowhere")  # type: ignore[no-untyped-call]

    with pytest.raises(StorageUnavailable):
        fail()
    with pytest.raises(StorageUnavailable):
        database.fetch_one("SELECT 1 FROM nowhere", ())


# Load


def test_many_writers_all_get_their_turn(path: Path) -> None:
    threads, rounds = 32, 30
    start = threading.Barrier(2 * threads)
    with opened(path) as one, opened(path) as other:
        one.migrate()

        def write(database: SqliteDatabase, writer: int) -> None:
            try:
                start.wait(10)
                for turn in range(rounds):
                    with database.writing():
                        assert database.fetch_one("SELECT count(*) FROM users", ()) is not None
                        insert(database, f"{id(database)}-{writer}-{turn}")
            finally:
                database.close()

        with concurrent.futures.ThreadPoolExecutor(2 * threads) as pool:
            done = [pool.submit(write, database, writer) for writer in range(threads) for database in (one, other)]
            for future in done:
                future.result(60)
        assert len(slugs(one)) == 2 * threads * rounds


def test_readers_do_not_wait_for_a_writer(database: SqliteDatabase) -> None:
    with database.writing():
        insert(database, "ada")

        def read() -> tuple[object, ...] | None:
            try:
                return database.fetch_one("SELECT count(*) FROM users", ())
            finally:
                database.close()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(read).result(10) == (0,)


def test_a_writer_waits_for_another_program_only_so_long(path: Path) -> None:
    with opened(path, busy_timeout=0.1) as database, contextlib.closing(sqlite3.connect(path)) as other:
        database.migrate()
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable), database.writing():
            insert(database, "ada")
        assert database.fetch_one("SELECT count(*) FROM users", ()) == (0,)
        other.rollback()
        with database.writing():
            insert(database, "ada")
        assert slugs(database) == ["ada"]


def test_a_writer_waits_for_another_thread_only_so_long(path: Path) -> None:
    with opened(path, busy_timeout=0.1) as database:
        database.migrate()

        def write() -> None:
            try:
                with database.writing():
                    insert(database, "eve")
            finally:
                database.close()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with database.writing():
                insert(database, "ada")
                with pytest.raises(StorageUnavailable):
                    pool.submit(write).result(10)
            pool.submit(write).result(10)
        assert slugs(database) == ["ada", "eve"]


# The schema


def test_migrate_is_done_once(path: Path) -> None:
    with opened(path) as database:
        assert database.check_schema() == MIGRATIONS
        assert database.migrate() == MIGRATIONS
        assert database.check_schema() == []
        assert database.migrate() == []


def test_the_first_connection_waits_for_another_program_too(path: Path) -> None:
    def migrate() -> list[str]:
        with contextlib.closing(open_database(f"sqlite:///{path}", 5)) as database:
            return database.migrate()

    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        contextlib.closing(sqlite3.connect(path)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        migrating = pool.submit(migrate)
        concurrent.futures.wait([migrating], timeout=0.2)  # a failure would come at once
        other.rollback()
        assert migrating.result(10) == MIGRATIONS


@pytest.fixture
def no_schema(path: Path) -> Path:
    """A database in WAL mode that holds nothing."""
    with opened(path) as database:
        assert database.check_schema() == MIGRATIONS
    return path


def test_of_racing_threads_one_migrates(no_schema: Path) -> None:
    racers = 4
    start = threading.Barrier(racers)

    def race(_: int) -> list[str]:
        with opened(no_schema) as database:
            start.wait(10)
            database.check_schema()
            return database.migrate()

    with concurrent.futures.ThreadPoolExecutor(racers) as pool:
        outcomes = list(pool.map(race, range(racers)))
    assert sorted(outcomes) == [[], [], [], MIGRATIONS]


_MIGRATE = """
import sys
from pathlib import Path
from doorward_server.database import SqliteDatabase
database = SqliteDatabase(Path(sys.argv[1]), 5)
print("ready", flush=True)
sys.stdin.readline()
database.check_schema()
print(database.migrate())
"""


def piped(command: list[str]) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=clean_environment({}), stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_of_racing_processes_one_migrates(no_schema: Path) -> None:
    command = [sys.executable, "-c", _MIGRATE, str(no_schema)]
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(piped(command)) for _ in range(4)]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:  # all stand ready: now they go
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        outcomes = [racer.communicate(timeout=30) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, outcomes
    assert sorted(out for out, _ in outcomes) == sorted([f"{MIGRATIONS}\n"] + ["[]\n"] * 3)


def test_a_newer_schema_is_refused(database: SqliteDatabase) -> None:
    with database.writing():
        sql = "INSERT INTO schema_migration (name, applied) VALUES ('9999_future', '2099-01-01')"
        database.engine.execute_sql(sql)  # type: ignore[no-untyped-call]
    with pytest.raises(OperatorError) as failure:
        database.check_schema()
    assert_tells(failure, str(database.path), "9999_future", "upgrade Doorward", "backup")


def test_a_migration_that_fails_leaves_nothing(path: Path) -> None:
    """A table of the same name is in the way: neither other tables nor the record stay behind."""
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE jobs (id INTEGER)")
        other.commit()
    with opened(path) as database:
        with pytest.raises(OperatorError) as failure:
            database.migrate()
        assert_tells(failure, str(path), "jobs")
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("jobs",)]


@pytest.fixture
def first_schema(path: Path, tmp_path: Path) -> Iterator[SqliteDatabase]:
    """A database that an earlier version has made."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    shutil.copy(_MIGRATIONS_FOLDER / f"{MIGRATIONS[0]}.py", folder)
    with opened(path) as database:
        assert Runner(database.engine, str(folder)).up() == MIGRATIONS[:1]
        yield database


EMAILS = {
    "ada": "Ada@Example.org",
    "older": "Ärger@example.org",
    "newer": "ärger@example.org",
    "sharp": "straße@example.org",
    "double": "STRASSE@example.org",
    "composed": "ren\u00e9@example.org",
    "decomposed": "rene\u0301@example.org",
    "nobody": None,
    "no one": None,
}


def test_users_of_the_first_schema(first_schema: SqliteDatabase) -> None:
    """SQLite's lower() has let addresses pass that differ in the case of letters beyond ASCII."""
    insert_user = "INSERT INTO users (slug, name, email, created_at) VALUES (?, ?, ?, 0)"
    with contextlib.closing(sqlite3.connect(first_schema.path)) as other:
        for slug, email in EMAILS.items():
            other.execute(insert_user, (slug, slug.title(), email))
        other.execute("INSERT INTO sessions (user_id, token_hash, created_at, expires_at) VALUES (2, x'00', 0, 1)")
        other.commit()
    assert first_schema.check_schema() == first_schema.migrate() == MIGRATIONS[1:]
    assert first_schema.check_schema() == []

    models.bind(first_schema)
    users = Users(first_schema, Clock())
    found = {user.slug: user for user in User.select()}
    assert {slug: user.email for slug, user in found.items()} == EMAILS
    assert {slug: user.email_key for slug, user in found.items()} == {
        "ada": "ada@example.org",
        "older": "ärger@example.org",
        "newer": None,
        "sharp": "strasse@example.org",
        "double": None,
        "composed": "ren\u00e9@example.org",
        "decomposed": None,
        "nobody": None,
        "no one": None,
    }
    assert {(user.client_id, user.role, user.license_active, str(user.stats_concepts)) for user in found.values()} == {
        (None, "", False, "{}")
    }
    assert first_schema.fetch_one("SELECT user_id FROM sessions", ()) == (2,)
    for email in ("ADA@example.org", "ÄRGER@example.org", "Strasse@example.org", "RENÉ@example.org"):
        with pytest.raises(EmailTaken):
            users.create("Somebody", email)
    assert users.create("Somebody", "somebody@example.org").email_key == "somebody@example.org"


def test_a_second_migration_that_fails_leaves_the_first_schema(first_schema: SqliteDatabase) -> None:
    with contextlib.closing(sqlite3.connect(first_schema.path)) as other:
        other.execute("CREATE TABLE providers (id INTEGER)")
        other.commit()
        before = other.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
        with pytest.raises(OperatorError) as failure:
            first_schema.migrate()
        assert_tells(failure, str(first_schema.path), "providers")
        assert other.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == before
        assert other.execute("SELECT name FROM schema_migration").fetchall() == [(MIGRATIONS[0],)]


# The storage


def assert_tells(failure: pytest.ExceptionInfo[OperatorError], *parts: str) -> None:
    """The sentence is one line and holds all of the parts."""
    sentence = str(failure.value)
    assert "\n" not in sentence
    assert [part for part in parts if part not in sentence] == [], sentence


def _garbage(path: Path) -> None:
    path.write_bytes(b"this was a database" * 1000)


def _below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("a file")


@pytest.mark.parametrize(
    ("prepare", "parts"),
    [
        pytest.param(_garbage, ("not a database", "restore a backup", "DOORWARD_DATABASE_URL"), id="garbage"),
        pytest.param(Path.mkdir, ("unable to open", "DOORWARD_DATABASE_URL"), id="directory"),
        pytest.param(lambda path: path.parent.rmdir(), ("`doorward init`", "DOORWARD_DATABASE_URL"), id="no folder"),
        pytest.param(_below_a_file, ("unable to open", "DOORWARD_DATABASE_URL"), id="below a file"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_with_the_mend(
    prepare: Callable[[Path], object], parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "doorward.db"
    path.parent.mkdir()
    prepare(path)
    for use in (SqliteDatabase.check_schema, SqliteDatabase.migrate):
        with opened(path) as database, pytest.raises(OperatorError) as failure:
            use(database)
        assert_tells(failure, f"cannot use the database {path}", "Mend: ", *parts)


def test_a_database_that_another_program_holds_is_named_with_the_mend(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other, opened(path, busy_timeout=0.1) as database:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OperatorError) as failure:
            database.migrate()
    assert_tells(failure, str(path), "Mend: another program holds it: stop that one first")


def test_a_database_that_turned_into_garbage_is_a_failure_of_the_storage(path: Path) -> None:
    with opened(path) as database:
        database.migrate()
    _garbage(path)
    with opened(path) as database:
        models.bind(database)
        users = Users(database, Clock())
        for use in (lambda: users.create("Ada"), lambda: users.get("ada"), lambda: database.fetch_one("SELECT 1", ())):
            with pytest.raises(StorageUnavailable):
                use()


# A process may write files of a limited size only: what SQLite meets on a full disk.
_FULL = """
import contextlib, resource, sys
from pathlib import Path
from doorward_server import models
from doorward_server.clock import Clock
from doorward_server.database import SqliteDatabase
from doorward_server.users import Users

database = SqliteDatabase(Path(sys.argv[1]), 5)
models.bind(database)
users = Users(database, Clock())

def attempt(do):
    try:
        print("did", do())
    except Exception as failure:
        print(type(failure).__name__)

attempt(lambda: users.create("Ada").slug)
wal = Path(sys.argv[1] + "-wal")
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + int(sys.argv[2]), hard))
attempt(lambda: users.create("Eve").slug)
attempt(lambda: users.create("Eve").slug)
attempt(lambda: users.get("ada").slug)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
attempt(lambda: users.create("Eve").slug)
database.close()
"""


@pytest.mark.parametrize("room", [0, 100, 5000], ids=["none", "half a page", "a page and more"])
def test_a_full_disk_is_a_failure_of_the_storage_until_there_is_room(database: SqliteDatabase, room: int) -> None:
    command = [sys.executable, "-c", _FULL, str(database.path), str(room)]
    done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    assert done.stdout.split("\n") == [
        "did ada",
        "StorageUnavailable",
        "StorageUnavailable",
        "did ada",
        "did eve",
        "",
    ]
    assert slugs(database) == ["ada", "eve"]


# Urls


def test_a_url_names_an_absolute_path(path: Path) -> None:
    database = open_database(f"sqlite:///{path}", 1)
    assert isinstance(database, SqliteDatabase)
    assert database.path == path
    database.migrate()
    database.close()
    assert path.is_file()


def test_models_store_times_to_the_microsecond(database: SqliteDatabase) -> None:
    models.bind(database)
    now = Clock().now()
    user = Users(database, Clock()).create("Ada")
    assert now <= User.get_by_id(user.id).created_at == user.created_at <= Clock().now()
    assert models.from_micros(models.to_micros(now)) == now
    assert issubclass(StorageUnavailable, CallError)
