"""Changes of several threads in one commit: each is told its own result, and a failing one undoes nobody else's."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import peewee
import pytest

from doorward_server import models
from doorward_server.database import Database, SqliteDatabase
from doorward_server.errors import SlugTaken, StorageUnavailable
from doorward_server.models import User
from tests.processes import await_condition

_MANY = 8


def insert(slug: str) -> tuple[str, int]:
    """Add a user; returns the slug and the thread that did it."""
    User.create(slug=slug, name=slug, created_at=models.from_micros(0))
    return slug, threading.get_ident()


def slugs() -> set[str]:
    return {user.slug for user in User.select()}


class Together:
    """Threads whose changes wait for the writers' lock, and then come at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.futures: list[Future[Any]] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Submit changes inside; they run when the block ends."""
        with ThreadPoolExecutor(_MANY) as self._pool, self._database.writing():
            yield
            waiting = self._database._changes
            await_condition(lambda: len(waiting) == len(self.futures), "all changes in the queue")

    def submit(self, change: Callable[[], object]) -> None:
        self.futures.append(self._pool.submit(self._database.write, change))


@pytest.fixture
def together(database: Database) -> Together:
    return Together(database)


def test_a_change_alone(database: Database) -> None:
    assert database.write(lambda: insert("ada")) == ("ada", threading.get_ident())
    assert slugs() == {"ada"}


def test_those_who_wait_share_a_transaction(together: Together) -> None:
    with together.held():
        for number in range(_MANY):
            together.submit(partial(insert, f"user-{number}"))
    results = [future.result() for future in together.futures]
    assert [slug for slug, _ in results] == [f"user-{number}" for number in range(_MANY)]
    assert len({thread for _, thread in results}) == 1
    assert slugs() == {f"user-{number}" for number in range(_MANY)}


def test_a_failing_change_undoes_itself_alone(together: Together) -> None:
    def insert_and_fail() -> None:
        insert("undone")
        raise SlugTaken

    with together.held():
        together.submit(lambda: insert("first"))
        together.submit(insert_and_fail)
        together.submit(lambda: insert("first"))
        together.submit(lambda: insert("last"))
    first, failing, second, last = together.futures
    assert last.result()[0] == "last"
    assert type(failing.exception()) is SlugTaken
    # Which of the two was first in the queue is for the threads to decide.
    assert {type(one.exception()) for one in (first, second)} == {type(None), peewee.IntegrityError}
    assert slugs() == {"first", "last"}


def test_a_failing_storage_fails_them_all(together: Together) -> None:
    def fail() -> None:
        insert("undone")
        raise peewee.OperationalError("database or disk is full")

    with together.held():
        together.submit(lambda: insert("first"))
        together.submit(fail)
    assert [type(one.exception()) for one in together.futures] == [StorageUnavailable] * 2
    assert slugs() == set()


def test_who_waits_for_too_long_leaves_nothing_behind(tmp_path: Path) -> None:
    """What the caller was told to have failed must not happen later."""
    database = SqliteDatabase(tmp_path / "doorward.db", busy_timeout=0.05)
    database.migrate()
    models.bind(database)
    with ThreadPoolExecutor(1) as pool:
        with database.writing():
            late = pool.submit(database.write, lambda: insert("late"))
            assert isinstance(late.exception(10), StorageUnavailable)
        assert database.write(lambda: insert("next"))[0] == "next"
        assert slugs() == {"next"}
        pool.submit(database.engine.close).result()
    database.close()


def test_many_threads(database: Database) -> None:
    def change(number: int) -> str:
        try:
            return database.write(lambda: insert(f"user-{number % 50}"))[0]
        except peewee.IntegrityError:
            return "taken"

    with ThreadPoolExecutor(_MANY) as pool:
        results = [*pool.map(change, range(200))]
    assert sorted(one for one in results if one != "taken") == sorted(f"user-{number}" for number in range(50))
    assert results.count("taken") == 150
    assert len(slugs()) == 50


def test_changes_of_one_thread(database: Database) -> None:
    """Each is told of by itself, in order; a failing one undoes itself alone."""

    def insert_and_fail() -> tuple[str, int]:
        insert("undone")
        raise SlugTaken

    runs: list[Callable[[], tuple[str, int]]] = [partial(insert, "first"), insert_and_fail, partial(insert, "last")]
    changes = database.write_each(runs)
    assert [type(change.failure) for change in changes] == [type(None), SlugTaken, type(None)]
    assert [changes[place].outcome()[0] for place in (0, 2)] == ["first", "last"]
    with pytest.raises(SlugTaken):
        changes[1].outcome()
    assert slugs() == {"first", "last"}


def test_changes_of_one_thread_in_a_failing_storage(database: Database) -> None:
    database.engine.execute_sql("ALTER TABLE users RENAME TO users_away")  # type: ignore[no-untyped-call]
    changes = database.write_each([partial(insert, "first"), partial(insert, "last")])
    database.engine.execute_sql("ALTER TABLE users_away RENAME TO users")  # type: ignore[no-untyped-call]
    assert [type(change.failure) for change in changes] == [StorageUnavailable] * 2
