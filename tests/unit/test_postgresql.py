"""What is PostgreSQL's own: the writers' lock between processes, claims, news, the pool, and servers that go away."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count

import peewee
import psycopg
import pytest

from doorward_server import integrations, jobs
from doorward_server.database import PostgresqlDatabase, open_database
from doorward_server.errors import OperatorError, StorageUnavailable
from tests.engines import IN_TESTS, Postgresql, outside, postgresql_server
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


_JOB = "INSERT INTO jobs (kind, payload, run_at, attempts, created_at) VALUES ('kind', '', 0, 0, 0)"
_DUE_CONNECTION = """
INSERT INTO connections
    (user_id, provider, access_token, obtained_at, needs_reauth, lease_epoch, created_at, refresh_at)
SELECT id, 'flo', '', 0, FALSE, 0, 0, 0 FROM users ORDER BY id DESC LIMIT 1
"""


@pytest.mark.parametrize(
    ("table", "insert", "claim", "parameters"),
    [
        pytest.param("jobs", _JOB, jobs._CLAIM, (9, 1, 2), id="jobs"),
        pytest.param("jobs", _JOB, jobs._CLAIM_OF_KIND, (9, "kind", 1, 2), id="jobs of a kind"),
        pytest.param("connections", _DUE_CONNECTION, integrations._CLAIM_DUE, (9, "flo", 1, 2), id="connections"),
    ],
)
def test_claims_take_no_more_than_they_are_to(
    here: PostgresqlDatabase, url: str, table: str, insert: str, claim: str, parameters: tuple[object, ...]
) -> None:
    """Also where a table had one row when it was analyzed: PostgreSQL then runs a subselect once for each row."""

    def insert_one(number: int) -> None:
        add(here, f"user-{number}")
        here.write(partial(here.execute, insert, ()))

    insert_one(0)
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(f"VACUUM ANALYZE {table}".encode())
    for number in range(1, 20):
        insert_one(number)
    assert len(here.claim(claim, parameters)) == 2


def test_news_of_another_process(here: PostgresqlDatabase, there: PostgresqlDatabase) -> None:
    heard: list[str] = []
    numbers = count()
    for topic in ("jobs", "prompts"):
        there.subscribe(topic, partial(heard.append, topic))

    def announce(topic: str) -> None:
        with here.writing():
            here.announce(topic)

    def hear_all() -> None:
        """Wait until everything announced so far is heard: news come in the order of the commits."""
        last, topic = threading.Event(), f"last {next(numbers)}"
        there.subscribe(topic, last.set)
        announce(topic)
        assert last.wait(10)

    with there.listening():
        hear_all()  # when it begins to listen it wakes everybody, for there may have been news
        heard.clear()
        announce("jobs")
        hear_all()
        assert heard == ["jobs"]
        with pytest.raises(KeyError):
            announce_in_vain(here)
        hear_all()
        assert heard == ["jobs"]


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
    database = opened(url, busy_timeout=0.1, connections=4)
    sleeping_now = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT 1 FROM pg_sleep%' AND state = 'active'"
    )
    with ThreadPoolExecutor(2) as pool, outside(database) as other:
        sleeping = [pool.submit(database.fetch_one, "SELECT 1 FROM pg_sleep(?)", (1,)) for _ in range(2)]
        await_condition(lambda: other.execute(sleeping_now).fetchone() == (2,), "both connections")
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
        pytest.param("postgresql://127.0.0.1:1/doorward?password=hush", "start PostgreSQL", id="as a parameter"),
        pytest.param("postgresql://user:hush#1@127.0.0.1:1/doorward", "start PostgreSQL", id="with a # in it"),
        pytest.param("postgresql://user:x@hush@127.0.0.1:1/doorward", "%40 for @", id="with an @ in it"),
        pytest.param("postgresql://user:hush/x@127.0.0.1:1/doorward", "%2F for /", id="with a / in it"),
        pytest.param("postgresql://user:hush%zz@127.0.0.1:1/doorward", "cannot be read", id="with a % in it"),
        pytest.param("postgresql://[::1/doorward?password=hush", "cannot be read", id="half an address"),
        pytest.param("postgresql://user:hush@127.0.0.1:1/doorward?no=1", "parameters", id="an unknown parameter"),
        pytest.param("postgresql://nowhere.invalid/doorward", "mend the host", id="no such host"),
    ],
)
def test_a_server_that_cannot_be_reached(url: str, sentence: str) -> None:
    with pytest.raises(OperatorError, match=sentence) as failure:
        opened(url).check_schema()
    assert "hush" not in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_database_that_does_not_exist(server: Postgresql) -> None:
    with pytest.raises(OperatorError, match=r"does not exist.*createdb"):
        opened(server.url("nothing")).check_schema()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_does_not_hold_every_text(server: Postgresql, encoding: str) -> None:
    options = f"TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    database = opened(server.new_empty_database(options))
    with pytest.raises(OperatorError, match="createdb --encoding UTF8"):
        database.check_schema()
    database.close()


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
