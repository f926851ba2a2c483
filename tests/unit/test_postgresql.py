"""What is PostgreSQL's own: the writers' lock between processes, claims, news, the pool, and servers that go away."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import peewee
import psycopg
import pytest

from doorward_server.database import PostgresqlDatabase, open_database
from doorward_server.errors import OperatorError, StorageUnavailable
from tests.engines import IN_TESTS, Postgresql, postgresql_server
from tests.processes import await_condition

_USERS = "SELECT slug FROM users ORDER BY id"
_ADD = "INSERT INTO users (slug, name, created_at) VALUES (?, ?, 0) RETURNING id"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgresql]:
    with postgresql_server(*IN_TESTS) as server:
        yield server


@pytest.fixture
def url(server: Postgresql) -> str:
    return server.new_database()


def opened(url: str, busy_timeout: float = 5, connections: int = 16) -> PostgresqlDatabase:
    database = open_database(url, busy_timeout, connections)
    assert isinstance(database, PostgresqlDatabase)
    return database


@pytest.fixture
def here(url: str) -> Iterator[PostgresqlDatabase]:
    database = opened(url)
    yield database
    database.close()


@pytest.fixture
def there(url: str) -> Iterator[PostgresqlDatabase]:
    """As another process has it."""
    database = opened(url)
    yield database
    database.close()


def add(database: PostgresqlDatabase, slug: str) -> None:
    with database.writing():
        database.execute(_ADD, (slug, slug))


def test_who_writes_does_so_alone(here: PostgresqlDatabase, there: PostgresqlDatabase) -> None:
    """What was counted stays true until the end of the transaction, although another process is at it, too."""
    limit = 5

    def add_below_limit(database: PostgresqlDatabase) -> None:
        with database.writing():
            (count,) = database.execute("SELECT count(*) FROM users", ()) or (0,)
            if count < limit:
                database.execute(_ADD, (f"user-{count}", "x"))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(add_below_limit, [here, there] * 16))
    assert [slug for (slug,) in here.fetch_rows(_USERS, ())] == [f"user-{number}" for number in range(limit)]


def test_who_waits_too_long_is_told(url: str, there: PostgresqlDatabase) -> None:
    here = opened(url, busy_timeout=0.1)
    with there.writing():
        with pytest.raises(StorageUnavailable):
            add(here, "ada")
        assert here.fetch_rows(_USERS, ()) == []  # reads need no turn
    add(here, "ada")
    here.close()


def test_a_frozen_writer_is_cut_off(url: str, there: PostgresqlDatabase) -> None:
    frozen, thawed = opened(url, busy_timeout=0.2), threading.Event()
    held = threading.Event()

    def freeze() -> None:
        with frozen.writing():
            frozen.execute(_ADD, ("frozen", "x"))
            held.set()
            thawed.wait(20)

    with ThreadPoolExecutor(1) as pool:
        freezing = pool.submit(freeze)
        held.wait(5)
        add(there, "ada")  # as soon as PostgreSQL has ended the other one's session
        thawed.set()
        with pytest.raises(StorageUnavailable):
            freezing.result()
    assert there.fetch_rows(_USERS, ()) == [("ada",)]
    frozen.close()


def test_claims_pass_by_what_others_hold(here: PostgresqlDatabase, url: str) -> None:
    for slug in ("ada", "grace"):
        add(here, slug)
    claim = (
        "UPDATE users SET name = ? WHERE id IN (SELECT id FROM users ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) "
        "RETURNING slug"
    )
    with psycopg.connect(url) as other:
        other.execute("SELECT 1 FROM users WHERE slug = 'ada' FOR UPDATE")
        assert here.claim(claim, ("mine",)) == [("grace",)]
    assert here.claim(claim, ("mine",)) == [("ada",)]


def test_news_of_another_process(here: PostgresqlDatabase, there: PostgresqlDatabase) -> None:
    woken, other_topic = threading.Event(), threading.Event()
    with there.listening():
        there.subscribe("jobs", woken.set)
        there.subscribe("prompts", other_topic.set)

        def announced() -> bool:
            """Until the listener, which has just started, hears it."""
            with here.writing():
                here.announce("jobs")
            return woken.wait(0.05)

        await_condition(announced, "the news")
        # By now it listens; before, it wakes everybody, for there may have been news.
        other_topic.clear()
        woken.clear()
        assert announced()
        assert not other_topic.is_set()
        woken.clear()
        with pytest.raises(KeyError):
            announce_in_vain(here)
        assert not woken.wait(0.2)


def announce_in_vain(database: PostgresqlDatabase) -> None:
    with database.writing():
        database.announce("jobs")
        raise KeyError


def test_more_threads_than_connections(url: str) -> None:
    database = opened(url, connections=2)
    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(lambda _: database.fetch_one("SELECT 1", ()), range(200))] == [(1,)] * 200
    database.close()


def test_all_connections_in_use(url: str) -> None:
    database = opened(url, busy_timeout=0.1, connections=2)
    with ThreadPoolExecutor(2) as pool:
        sleeping = [pool.submit(database.fetch_one, "SELECT 1 FROM pg_sleep(?)", (1,)) for _ in range(2)]
        await_condition(lambda: len(database._engine._in_use) == 2, "both connections")
        with pytest.raises(StorageUnavailable):
            database.fetch_one("SELECT 1", ())
        assert [one.result() for one in sleeping] == [(1,)] * 2
    database.close()


def end_sessions(url: str) -> None:
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid) {others}".encode())
        left = f"SELECT count(*) {others}".encode()
        await_condition(lambda: connection.execute(left).fetchone() == (0,), "the end of the sessions")


def test_a_session_that_the_server_has_ended(here: PostgresqlDatabase, url: str) -> None:
    """Reads and transactions begin anew on a fresh connection: nobody has to notice."""
    add(here, "ada")
    end_sessions(url)
    assert here.fetch_rows(_USERS, ()) == [("ada",)]
    end_sessions(url)
    add(here, "grace")
    assert here.fetch_rows(_USERS, ()) == [("ada",), ("grace",)]


def test_a_violation_is_told_as_one(here: PostgresqlDatabase) -> None:
    add(here, "ada")
    with pytest.raises(peewee.IntegrityError):
        add(here, "ada")
    add(here, "grace")


def test_a_failed_change_undoes_itself_alone(here: PostgresqlDatabase) -> None:
    def change(slug: str) -> None:
        here.execute(_ADD, (slug, "x"))

    outcomes = here.write_each([partial(change, slug) for slug in ("ada", "ada", "grace")])
    assert [type(outcome.failure).__name__ for outcome in outcomes] == ["NoneType", "IntegrityError", "NoneType"]
    assert here.fetch_rows(_USERS, ()) == [("ada",), ("grace",)]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        pytest.param("postgresql://127.0.0.1:1/doorward", "start PostgreSQL", id="nobody there"),
        pytest.param("postgresql://user:hush@127.0.0.1:1/doorward", "start PostgreSQL", id="with a password"),
        pytest.param("postgresql://127.0.0.1:1/doorward?user=u&password=hush", "start PostgreSQL", id="behind the ?"),
        pytest.param(
            "postgresql://user:hush?hush#hush@127.0.0.1:1/doorward", "start PostgreSQL", id="a ? in the password"
        ),
        pytest.param("postgresql://nowhere.invalid/doorward", "correct the host", id="no such host"),
    ],
)
def test_a_server_that_cannot_be_reached(url: str, sentence: str) -> None:
    with pytest.raises(OperatorError, match=sentence) as failure:
        opened(url).check_schema()
    assert "hush" not in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql://user:hu sh@127.0.0.1/doorward", id="a space"),
        pytest.param("postgresql://user:hu%sh@127.0.0.1/doorward", id="a percent sign"),
        pytest.param("postgresql://user:hu/sh@127.0.0.1/doorward", id="a slash in the password"),
        pytest.param("postgresql://user:hu@sh@127.0.0.1/doorward", id="an at sign in the password"),
        pytest.param("postgresql://user:hush@127.0.0.1/doorward?hush=1", id="no parameter of libpq"),
    ],
)
def test_a_url_that_cannot_be_read(url: str) -> None:
    with pytest.raises(OperatorError, match="has to be percent-encoded") as failure:
        opened(url)
    assert [part for part in ("hu", "sh@", "\n") if part in str(failure.value)] == []


def test_a_database_of_another_encoding(server: Postgresql) -> None:
    url = server.new_empty_database("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(OperatorError, match=r"LATIN1.*createdb --encoding UTF8"):
        opened(url).migrate()


def test_a_user_that_does_not_exist(server: Postgresql) -> None:
    with pytest.raises(OperatorError, match="createuser"):
        opened(server.url("postgres").replace("postgres@", "nobody@")).check_schema()


def test_a_database_that_does_not_exist(server: Postgresql) -> None:
    with pytest.raises(OperatorError, match=r"does not exist.*createdb"):
        opened(server.url("nothing")).check_schema()


def test_a_server_that_is_away_is_not_asked_by_everyone(server: Postgresql, here: PostgresqlDatabase) -> None:
    """While it is away everybody is told so at once; and soon after it is back, nobody is."""
    server.stop()
    try:
        started = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            failures = [pool.submit(here.fetch_rows, _USERS, ()).exception() for _ in range(200)]
        assert {type(failure) for failure in failures} == {StorageUnavailable}
        assert time.monotonic() - started < 5
    finally:
        server.start()

    def answers() -> bool:
        try:
            return here.fetch_rows(_USERS, ()) == []
        except StorageUnavailable:
            return False

    await_condition(answers, "an answer", patience=5)
