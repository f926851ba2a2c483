"""What engines do differently by themselves, and Doorward's do alike: times, letters, numbers, long texts, NUL."""

from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import pytest

from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.consents import Question
from doorward_server.database import Database, PostgresqlDatabase
from doorward_server.errors import EmailTaken, SlugTaken, UserNotFound
from doorward_server.models import ConsentRequest, Job, Session, User
from doorward_server.sessions import Sessions
from doorward_server.users import Users
from tests.engines import outside
from tests.unit.conftest import StoppedClock

# As long as a request for keys may be: of characters of four bytes, where any are allowed.
LONGEST_CALLBACK = "http://93.184.215.14/" + "c" * (2048 - len("http://93.184.215.14/"))
LONGEST_STATE = "🎉" * 2048


@pytest.fixture
def users(database: Database, clock: StoppedClock) -> Users:
    return Users(database, clock)


@pytest.fixture
def app(home: Path) -> App:
    return App(settings_module.load(home))


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/St_Johns"])
def test_times_are_what_they_are_in_any_zone(users: Users, database: Database, clock: StoppedClock, zone: str) -> None:
    """The server's own zone, and the one in which a time was given, change nothing."""
    if isinstance(database, PostgresqlDatabase):
        with outside(database) as other:
            other.execute(f"ALTER ROLE postgres SET timezone = '{zone}'")
        database.close()
    try:
        clock.time = datetime(2030, 3, 31, 1, 30, tzinfo=timezone(timedelta(hours=5, minutes=45)))
        user = users.create("Ada")
        sessions = Sessions(database, clock, timedelta(microseconds=1))
        _, cookie = sessions.create(user)
        assert sessions.find(cookie) is not None
        [stored] = Session.select()
        assert stored.expires_at == clock.time + timedelta(microseconds=1)
        assert stored.expires_at.tzinfo is UTC
        clock.advance(timedelta(microseconds=1))
        assert sessions.find(cookie) is None
    finally:
        if isinstance(database, PostgresqlDatabase):
            with outside(database) as other:
                other.execute("ALTER ROLE postgres RESET timezone")
            database.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [("ada@example.org", "ADA@EXAMPLE.ORG"), ("ärger@example.org", "ÄRGER@example.org"), ("ß@x.org", "SS@x.org")],
)
def test_an_address_is_one_in_any_case(users: Users, first: str, second: str) -> None:
    users.create("First", first)
    with pytest.raises(EmailTaken):
        users.create("Second", second)
    users.create("Third", f"not-{second}")


def test_a_slug_is_one(users: Users) -> None:
    users.create("Ada Lovelace")
    with pytest.raises(SlugTaken):
        users.create("ada LOVELACE")


def test_numbers_are_given_once(users: Users, database: Database) -> None:
    ids = [users.create(f"User {number}").id for number in range(3)]
    with database.writing():
        User.delete().where(User.id == ids[-1]).execute()
    assert users.create("Another").id == ids[-1] + 1


def test_a_change_that_failed_leaves_the_database_usable(users: Users) -> None:
    for number in range(3):
        users.create(f"User {number}")
        with pytest.raises(SlugTaken):
            users.create(f"User {number}")
    assert User.select().count() == 3


def test_texts_sort_by_their_bytes(database: Database) -> None:
    names = ["a", "B", "ä", "Z", "z", "_", "é", "🎉"]
    with database.writing():
        for number, name in enumerate(names):
            User.create(slug=f"user-{number}", name=name, created_at=datetime.now(UTC))
    assert [user.name for user in User.select().order_by(User.name)] == sorted(names, key=str.encode)


def test_the_longest_request_is_kept(app: App) -> None:
    """Longer than an index of PostgreSQL's can hold; another one that differs in the last character is another."""
    question = partial(Question, "Bot", "1", LONGEST_CALLBACK)
    first = app.consents.request(question(LONGEST_STATE), None, "192.0.2.1")
    assert app.consents.request(question(LONGEST_STATE), None, "192.0.2.1") == first
    other = app.consents.request(question(LONGEST_STATE[:-1] + "x"), None, "192.0.2.1")
    assert other != first
    assert app.consents.get(first).state == LONGEST_STATE.encode()
    app.database.close()


def test_nul_is_kept_where_anything_is_and_nothing_elsewhere(app: App) -> None:
    request_id = app.consents.request(Question("Bot", "1", LONGEST_CALLBACK, "a\0b"), None, "192.0.2.1")
    assert [bytes(row.state) for row in ConsentRequest.select()] == [b"a\0b"]
    assert app.consents.get(request_id).state == b"a\0b"
    with pytest.raises(UserNotFound):
        app.users.get("a\0b")
    with app.database.writing():
        app.jobs.queue("greet", {"nul": "a\0b"})
    [job] = Job.select().where(Job.kind == "greet")
    assert app.jobs.payload(job) == {"nul": "a\0b"}
    app.database.close()
