"""Moving a home from SQLite to PostgreSQL: all of it, once, whatever dies meanwhile."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.consents import Question, Status
from doorward_server.database import SqliteDatabase
from doorward_server.models import Connection
from tests.contract.test_request_api_key import ALLOWED, CALLBACK
from tests.engines import IN_TESTS, Postgresql, postgresql_server
from tests.processes import BIN, Process, await_condition, clean_environment
from tests.sandbox.client import SandboxProvider
from tests.stack import Stack, make_stack

pytestmark = pytest.mark.sqlite
USERS = 12_000  # three batches
KEY = "transfer-key-1"
DISCORD_USER = "80351110224678912"


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Postgresql]:
    with postgresql_server(*IN_TESTS) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Iterator[Stack]:
    """A home with something in every corner: a connection, keys, a grant, a delivery, jobs, an audit trail."""
    stack = make_stack(tmp_path / "home", logs, provider, secrets, ALLOWED)
    secrets.add(KEY)
    app = stack.app
    stack.connect(stack.person(stack.client()))
    owner = app.discord_users.obtain(DISCORD_USER)
    key = app.api_keys.add(owner, "game", "Schlüssel ✓", KEY, actor="test")
    app.applications.create("Registered", ["https://registered.invalid/hooks"])
    request_id = app.consents.request(Question("Bot", DISCORD_USER, CALLBACK, "a\0b"), None, "192.0.2.1")
    app.consents.resolve(request_id, Status.GRANTED, [key.id], actor="test")
    app.users.create("Leaves again")
    app.accounts.delete(app.users.get("leaves-again"))
    yield stack
    app.database.close()


def move(stack: Stack, url: str) -> subprocess.CompletedProcess[str]:
    stack.app.database.close()
    return stack.cli("migrate-data", "--to", url, "--json")


def moved(stack: Stack, url: str) -> App:
    """The app on the other side."""
    settings = settings_module.load(stack.home)
    database = settings.database.model_copy(update={"url": url})
    app = App(settings.model_copy(update={"database": database}))
    models.bind(app.database)
    return app


def test_everything_is_moved(home: Stack, postgresql: Postgresql) -> None:
    head = home.app.audit.verify().head
    last_user = max(user_id for (user_id,) in home.app.database.fetch_rows("SELECT id FROM users", ())) + 1
    url = postgresql.new_empty_database()
    done = move(home, url)
    assert done.returncode == 0, done.stderr
    tables = {table["table"]: table["rows"] for table in json.loads(done.stdout)["tables"]}
    for table in ("users", "connections", "api_keys", "consent_requests", "grant_keys", "deliveries", "jobs"):
        assert tables[table] >= 1, table
    there = moved(home, url)
    try:
        assert there.audit.verify(head).is_intact
        owner = there.discord_users.find(DISCORD_USER)
        assert owner is not None
        [listed] = there.api_keys.list(owner)
        assert (listed.key.label, there.api_keys.values([listed.key.id])) == ("Schlüssel ✓", {listed.key.id: KEY})
        [connection] = Connection.select()
        assert there.integrations.access_token(str(connection.user_id), "flo").value.startswith("access-")
        assert there.consents.latest(None, 1)[0].state == b"a\0b"
        # No number is given twice, not even that of a user who is gone.
        assert there.users.create("New").id == last_user + 1
    finally:
        there.database.close()
    refused = home.cli("user", "create", "--name", "Late")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "were moved to" in refused.stderr
    assert "DOORWARD_DATABASE_URL" in refused.stderr


def has_grown(count: Callable[[], int], before: int) -> bool:
    return count() > before


def test_killed_again_and_again(home: Stack, postgresql: Postgresql) -> None:
    """It goes on where it was: what is there is not copied again, and at the end all is there once."""
    with home.app.database.writing():
        for number in range(USERS):
            row = (f"many-{number}", f"Many {number}", 0)
            home.app.database.execute("INSERT INTO users (slug, name, created_at) VALUES (?, ?, ?)", row)
    home.app.database.close()
    url = postgresql.new_empty_database()
    with psycopg.connect(url, autocommit=True) as there:

        def copied() -> int:
            try:
                [count] = there.execute("SELECT count(*) FROM users").fetchone() or [0]
            except psycopg.errors.UndefinedTable:
                return 0
            return int(count)

        for attempt in range(2):
            before = copied()
            command: list[str | Path] = [BIN / "doorward", "migrate-data", "--to", url]
            process = Process(command, home.logs / "transfer.log", clean_environment(home.environment))
            await_condition(partial(has_grown, copied, before), "a batch")
            process.kill()
            made = home.cli("user", "create", "--name", f"Meanwhile {attempt}")
            assert made.returncode == 0, "the source may be used until all is moved"
    working = subprocess.run(
        [BIN / "doorward", "session", "list"],
        env=clean_environment({**home.environment, "DOORWARD_DATABASE_URL": url}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (working.returncode, "run `doorward migrate-data` again" in working.stderr) == (1, True), working.stderr
    done = move(home, url)
    assert done.returncode == 0, done.stderr


def test_nobody_else_may_use_the_home(home: Stack, postgresql: Postgresql) -> None:
    url = postgresql.new_empty_database()
    home.app.database.close()
    with home.server():
        refused = home.cli("migrate-data", "--to", url)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "in use: stop all that runs on it first" in refused.stderr
    alone = SqliteDatabase.alone(f"sqlite:///{home.home}/doorward.db", 5)
    refused = home.cli("session", "list")
    alone.close()
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "wait until `doorward migrate-data` is done" in refused.stderr


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        pytest.param("sqlite:////tmp/other.db", "--to has to be postgresql://", id="another engine"),
        pytest.param("postgresql://127.0.0.1:1/nothing", "start PostgreSQL", id="nobody there"),
    ],
)
def test_targets_that_are_none(home: Stack, to: str, sentence: str) -> None:
    refused = move(home, to)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert sentence in refused.stderr


def test_a_target_that_is_not_empty(home: Stack, postgresql: Postgresql) -> None:
    url = postgresql.new_database()
    there = moved(home, url)
    there.users.create("Somebody")
    there.database.close()
    refused = move(home, url)
    assert refused.returncode == 1
    assert "is not empty (there are rows in users)" in refused.stderr


def test_a_home_that_was_left_already(home: Stack, postgresql: Postgresql) -> None:
    """What happened on the other side since then would be missing."""
    assert move(home, postgresql.new_empty_database()).returncode == 0
    refused = move(home, postgresql.new_empty_database())
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "were moved to" in refused.stderr


def test_a_target_that_another_home_is_being_copied_to(home: Stack, postgresql: Postgresql) -> None:
    """Also while the other one has not copied a row yet."""
    url = postgresql.new_database()
    with psycopg.connect(url, autocommit=True) as there:
        there.execute("INSERT INTO data_migrations (place, is_source, started_at) VALUES ('/other.db', FALSE, 0)")
    refused = move(home, url)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "holds a part of /other.db" in refused.stderr


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        pytest.param("CREATE TABLE users (id INT)", "of another program's", id="a table of the same name"),
        pytest.param("CREATE TABLE schema_migration (id INT)", "of another program's", id="migrations of its own"),
        pytest.param("CREATE ROLE weak LOGIN", "own the database", id="a user without rights"),
    ],
)
def test_a_target_of_another_program(home: Stack, postgresql: Postgresql, statement: str, sentence: str) -> None:
    url = postgresql.new_empty_database()
    with psycopg.connect(url, autocommit=True) as there:
        there.execute(statement.encode())
    refused = move(home, url.replace("postgres@", "weak@") if "ROLE" in statement else url)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert sentence in refused.stderr


def test_a_target_in_a_schema_of_its_own(home: Stack, postgresql: Postgresql) -> None:
    url = f"{postgresql.new_empty_database()}&options=-csearch_path%3Ddoors"
    with psycopg.connect(url, autocommit=True) as there:
        there.execute("CREATE SCHEMA doors")
        assert move(home, url).returncode == 0
        assert there.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
        assert there.execute("SELECT count(*) > 0 FROM doors.users").fetchone() == (True,)


def test_moved_already(home: Stack, postgresql: Postgresql) -> None:
    url = postgresql.new_empty_database()
    assert move(home, url).returncode == 0
    for words in (("migrate-data", "--to", url), ("session", "list"), ("doctor", "--json")):
        told = home.cli(*words)
        assert told.returncode == 1, words
        assert "were moved to" in told.stdout + told.stderr, words
        assert "set DOORWARD_DATABASE_URL" in told.stdout + told.stderr, words


def test_killed_at_the_very_end(home: Stack, postgresql: Postgresql) -> None:
    """The old database is left, the new one is not yet ready: neither can be used, and the same command ends it."""
    head = home.app.audit.verify().head
    url = postgresql.new_empty_database()
    assert move(home, url).returncode == 0
    with psycopg.connect(url, autocommit=True) as there:
        there.execute("UPDATE data_migrations SET finished_at = NULL")
    assert home.cli("session", "list").returncode == 1
    assert move(home, url).returncode == 0
    app = moved(home, url)
    assert app.audit.verify(head).is_intact
    app.database.close()


def test_a_copy_that_was_changed(home: Stack, postgresql: Postgresql) -> None:
    """What is there and differs is found out, not taken for good."""
    url = postgresql.new_empty_database()
    assert move(home, url).returncode == 0
    with psycopg.connect(url, autocommit=True) as there:
        there.execute("UPDATE data_migrations SET finished_at = NULL")
        there.execute("UPDATE users SET name = name || ' '")
    source = SqliteDatabase(home.home / "doorward.db", 5)
    with source.writing():
        source.execute("DELETE FROM data_migrations", ())
    source.close()
    refused = move(home, url)
    assert refused.returncode == 1
    assert "the copy of users differs" in refused.stderr
