"""Discord users: what a snowflake is, and that one is one user."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from doorward_server.clients import ApiClients
from doorward_server.database import Database
from doorward_server.discord_users import DiscordUsers, parse_snowflake
from doorward_server.errors import InvalidUserId
from doorward_server.models import OAuthIdentity, User
from doorward_server.users import Users
from tests.unit.conftest import StoppedClock

SNOWFLAKE = "123456789012345678"


@pytest.fixture
def discord_users(database: Database, clock: StoppedClock) -> DiscordUsers:
    return DiscordUsers(database, clock)


def count(database: Database) -> tuple[int, int]:
    """The numbers of users and of identities."""
    row = database.fetch_one("SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM oauth_identities)", ())
    assert row is not None
    return row[0], row[1]


@pytest.mark.parametrize(
    ("text", "snowflake"),
    [
        pytest.param(SNOWFLAKE, SNOWFLAKE, id="usual"),
        pytest.param("1", "1", id="one digit"),
        pytest.param("0", "0", id="zero"),
        pytest.param("007", "7", id="leading zeros"),
        pytest.param("0" * 20, "0", id="20 zeros"),
        pytest.param("18446744073709551615", "18446744073709551615", id="2^64 - 1"),
    ],
)
def test_a_snowflake(text: str, snowflake: str) -> None:
    assert parse_snowflake(text) == snowflake


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("18446744073709551616", id="2^64"),
        pytest.param("9" * 20, id="20 nines"),
        pytest.param("0" * 21, id="21 zeros"),
        pytest.param("1" * 100_000, id="100,000 digits"),
        pytest.param("-1", id="minus"),
        pytest.param("+1", id="plus"),
        pytest.param("1.0", id="dot"),
        pytest.param("1e5", id="exponent"),
        pytest.param("1_0", id="underscore"),
        pytest.param("0x1", id="hexadecimal"),
        pytest.param(" 1", id="blank before"),
        pytest.param("1 ", id="blank after"),
        pytest.param("1\n", id="line feed"),
        pytest.param("1\x00", id="NUL"),
        pytest.param("ada", id="letters"),
        pytest.param("<@123>", id="mention"),
        pytest.param("\uff11\uff12", id="full-width digits"),
        pytest.param("\u0661", id="Arabic digit"),
        pytest.param("\u00b2", id="superscript"),
        pytest.param("\udcff", id="lone surrogate"),
    ],
)
def test_no_snowflake(text: str) -> None:
    with pytest.raises(InvalidUserId):
        parse_snowflake(text)


def test_nobody_is_made_by_looking(discord_users: DiscordUsers, database: Database) -> None:
    assert discord_users.find(SNOWFLAKE) is None
    assert count(database) == (0, 0)


def test_the_first_own_action_makes_user_and_identity(
    discord_users: DiscordUsers, database: Database, clock: StoppedClock
) -> None:
    user = discord_users.obtain(SNOWFLAKE)
    assert (user.slug, user.name) == (f"discord-{SNOWFLAKE}", f"Discord user {SNOWFLAKE}")
    assert (user.client_id, user.email, user.created_at) == (None, None, clock.now())
    [identity] = database.fetch_all(OAuthIdentity.select())
    assert (identity.user_id, identity.provider, identity.subject) == (user.id, "discord", SNOWFLAKE)
    assert identity.created_at == clock.now()
    for again in (discord_users.obtain(SNOWFLAKE), discord_users.find(SNOWFLAKE)):
        assert again is not None
        assert (again.id, again.slug, again.client_id) == (user.id, user.slug, None)
    assert count(database) == (1, 1)


def test_everybody_is_another_user(discord_users: DiscordUsers, database: Database) -> None:
    ids = [discord_users.obtain(snowflake).id for snowflake in ("1", "11", "2")]
    assert len(set(ids)) == 3
    found = [discord_users.find(snowflake) for snowflake in ("1", "11", "2", "12", "")]
    assert [user and user.id for user in found] == [*ids, None, None]
    assert count(database) == (3, 3)


def test_an_identity_that_a_client_linked_is_found(
    discord_users: DiscordUsers, database: Database, clock: StoppedClock
) -> None:
    client, _ = ApiClients(database, clock).create("shop")
    ada = Users(database, clock).create("Ada", None, client.id)
    with database.writing():
        OAuthIdentity.create(user=ada, provider="other", subject="1", created_at=clock.now())
        OAuthIdentity.create(user=ada, provider="discord", subject="2", created_at=clock.now())
    assert discord_users.find("1") is None
    assert discord_users.obtain("2").id == ada.id
    assert discord_users.obtain("1").id != ada.id


@pytest.mark.parametrize("name", ["Discord 7", "discord-7"])
def test_a_slug_that_is_taken_is_not_in_the_way(
    discord_users: DiscordUsers, database: Database, clock: StoppedClock, name: str
) -> None:
    taken = Users(database, clock).create(name)
    assert taken.slug == "discord-7"
    user = discord_users.obtain("7")
    assert user.id != taken.id
    assert user.slug.startswith("discord-7-")
    assert discord_users.obtain("7").id == user.id


def test_a_user_who_was_deleted_starts_anew(discord_users: DiscordUsers, database: Database) -> None:
    user = discord_users.obtain("7")
    with database.writing():
        User.delete().where(User.id == user.id).execute()
    assert discord_users.find("7") is None
    assert discord_users.obtain("7").id != user.id


def at_once(act: Callable[[], User], times: int) -> list[User]:
    barrier = threading.Barrier(times)

    def run(_: int) -> User:
        barrier.wait(10)
        return act()

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(run, range(times)))


def test_who_acts_twice_at_once_is_one_user(discord_users: DiscordUsers, database: Database) -> None:
    """Threads; processes are in test_cli_keys.py."""
    for snowflake in map(str, range(10)):
        assert len({user.id for user in at_once(partial(discord_users.obtain, snowflake), 8)}) == 1
    assert count(database) == (10, 10)
