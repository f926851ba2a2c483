"""Changes of a profile: which fields an object sets, what null does, and what is refused."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from doorward_server.database import Database
from doorward_server.errors import InvalidField, UserNotFound
from doorward_server.models import User
from doorward_server.users import Users
from tests.unit.conftest import StoppedClock

FIELDS = (
    "role",
    "license_active",
    "license_ends_at",
    "subscription_active",
    "subscription_ends_at",
    "stats_games_completed",
    "stats_play_time",
    "stats_concepts",
)
DEFAULTS: dict[str, Any] = dict(zip(FIELDS, ("", False, None, False, None, 0, 0.0, {}), strict=True))
ENDS = datetime(2031, 5, 6, 7, 8, 9, 123000, tzinfo=UTC)
# Every field differs from its default.
SET: dict[str, Any] = {
    "role": "teacher",
    "license": {"active": True, "ends": "2031-05-06T07:08:09.123Z"},
    "subscription": {"active": True, "ends": "2031-05-06T09:08:09.123+02:00"},
    "stats": {"gamesCompleted": 3, "playTime": 12.5, "concepts": {"loops": {"seen": [1, "two", None]}}},
}
STORED: dict[str, Any] = {
    "role": "teacher",
    "license_active": True,
    "license_ends_at": ENDS,
    "subscription_active": True,
    "subscription_ends_at": ENDS,
    "stats_games_completed": 3,
    "stats_play_time": 12.5,
    "stats_concepts": {"loops": {"seen": [1, "two", None]}},
}


@pytest.fixture
def users(database: Database, clock: StoppedClock) -> Users:
    return Users(database, clock)


@pytest.fixture
def user(users: Users) -> User:
    """A user with every field set; another one stands beside it."""
    users.create("Bystander")
    user = users.create("Ada", "ada@example.org")
    users.update(user, SET)
    return users.get("ada")


def profile(users: Users, handle: str = "ada") -> dict[str, Any]:
    user = users.get(handle)
    return {field: getattr(user, field) for field in FIELDS}


def test_all_fields_at_once(users: Users, user: User) -> None:
    assert profile(users) == STORED
    assert (user.name, user.slug, user.email, user.client_id) == ("Ada", "ada", "ada@example.org", None)
    assert profile(users, "bystander") == DEFAULTS


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param({"role": "student"}, {"role": "student"}, id="role"),
        pytest.param({"role": ""}, {"role": ""}, id="no role"),
        pytest.param({"role": "x" * 64}, {"role": "x" * 64}, id="longest role"),
        pytest.param({"role": "учитель 🎓"}, {"role": "учитель 🎓"}, id="role beyond ASCII"),
        pytest.param({"license": {}}, {}, id="empty object"),
        pytest.param({"license": {"active": False}}, {"license_active": False}, id="license.active"),
        pytest.param(
            {"license": {"ends": "2032-01-01T00:00:00Z"}},
            {"license_ends_at": datetime(2032, 1, 1, tzinfo=UTC)},
            id="license.ends",
        ),
        pytest.param({"subscription": {"active": False}}, {"subscription_active": False}, id="subscription.active"),
        pytest.param({"stats": {"gamesCompleted": 0}}, {"stats_games_completed": 0}, id="stats.gamesCompleted"),
        pytest.param({"stats": {"gamesCompleted": 7.0}}, {"stats_games_completed": 7}, id="7.0 games"),
        pytest.param(
            {"stats": {"gamesCompleted": 2**31 - 1}}, {"stats_games_completed": 2**31 - 1}, id="the most games"
        ),
        pytest.param({"stats": {"playTime": 7}}, {"stats_play_time": 7.0}, id="stats.playTime"),
        pytest.param({"stats": {"playTime": 1e300}}, {"stats_play_time": 1e300}, id="long playTime"),
        pytest.param({"stats": {"concepts": {"a": 1}}}, {"stats_concepts": {"a": 1}}, id="concepts are replaced"),
        pytest.param({"stats": {"concepts": {}}}, {"stats_concepts": {}}, id="no concepts"),
        pytest.param(
            {"stats": {"concepts": {"": {"x": [[], {}, 1e300, "é😀", True]}}}},
            {"stats_concepts": {"": {"x": [[], {}, 1e300, "é😀", True]}}},
            id="any object",
        ),
        pytest.param(
            {"role": "student", "stats": {"playTime": 0}, "license": {"active": False}},
            {"role": "student", "stats_play_time": 0.0, "license_active": False},
            id="of several objects",
        ),
        # null
        pytest.param({"role": None}, {"role": ""}, id="role: null"),
        pytest.param({"license": None}, {"license_active": False, "license_ends_at": None}, id="license: null"),
        pytest.param({"license": {"active": None}}, {"license_active": False}, id="license.active: null"),
        pytest.param({"license": {"ends": None}}, {"license_ends_at": None}, id="license.ends: null"),
        pytest.param(
            {"stats": None},
            {"stats_games_completed": 0, "stats_play_time": 0.0, "stats_concepts": {}},
            id="stats: null",
        ),
        pytest.param({"stats": {"concepts": None}}, {"stats_concepts": {}}, id="concepts: null"),
        pytest.param({"stats": {"gamesCompleted": None}}, {"stats_games_completed": 0}, id="gamesCompleted: null"),
        pytest.param(dict.fromkeys(SET), DEFAULTS, id="everything: null"),
        pytest.param(
            {key: dict.fromkeys(value) if isinstance(value, dict) else None for key, value in SET.items()},
            DEFAULTS,
            id="every member: null",
        ),
        # Unknown members
        pytest.param({"name": "Eve", "slug": "eve", "email": "eve@example.org"}, {}, id="not of the profile"),
        pytest.param({"_id": "1", "id": 1, "client_id": "x", "oAuthIdentities": []}, {}, id="not to be changed"),
        pytest.param({"unknown": {"role": "x"}, "Role": "x", "ROLE": None}, {}, id="unknown"),
        pytest.param({"license": {"active": False, "x": 1}}, {"license_active": False}, id="unknown within"),
        pytest.param({"stats": {"games_completed": 1, "play_time": 1}}, {}, id="names of ours"),
        pytest.param({"license_active": False, "licenseActive": False}, {}, id="columns' names"),
        pytest.param({"license": {"ends_at": None, "endsAt": None}}, {}, id="ends of another name"),
        pytest.param({"license.active": False}, {}, id="a dotted name"),
    ],
)
def test_what_changes(users: Users, user: User, changes: Mapping[str, object], changed: dict[str, Any]) -> None:
    before = users.get("ada")
    users.update(user, changes)
    assert profile(users) == STORED | changed
    after = users.get("ada")
    for field in ("id", "name", "slug", "email", "client_id", "created_at"):
        assert getattr(after, field) == getattr(before, field)
    assert profile(users, "bystander") == DEFAULTS


@pytest.mark.parametrize(
    ("text", "time"),
    [
        pytest.param("2031-05-06T07:08:09.123Z", ENDS, id="milliseconds"),
        pytest.param("2031-05-06T07:08:09.123456Z", ENDS.replace(microsecond=123456), id="microseconds"),
        pytest.param("2031-05-06T07:08:09.1234567Z", ENDS.replace(microsecond=123456), id="more digits"),
        pytest.param("2031-05-06T07:08:09Z", ENDS.replace(microsecond=0), id="seconds"),
        pytest.param("2031-05-06T07:08Z", ENDS.replace(second=0, microsecond=0), id="minutes"),
        pytest.param("2031-05-06 07:08:09.123+00:00", ENDS, id="a blank"),
        pytest.param("2031-05-06T01:38:09.123-05:30", ENDS, id="offset"),
        pytest.param("20310506T070809.123Z", ENDS, id="basic format"),
        pytest.param("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC), id="first day"),
        pytest.param(
            "9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), id="last moment"
        ),
        pytest.param("1969-12-31T23:59:59.999Z", datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC), id="old"),
    ],
)
@pytest.mark.parametrize("term", ["license", "subscription"])
def test_times(users: Users, user: User, term: str, text: str, time: datetime) -> None:
    users.update(user, {term: {"ends": text}})
    assert profile(users) == STORED | {f"{term}_ends_at": time}


_NO_TIMES = {
    "empty": "",
    "no time": "never",
    "naive": "2031-05-06T07:08:09",
    "a day": "2031-05-06",
    "a time of day": "07:08:09Z",
    "no such day": "2031-02-30T00:00:00Z",
    "hour 25": "2031-01-01T25:00:00Z",
    "leap second": "2031-12-31T23:59:60Z",
    "year 0": "0000-01-01T00:00:00Z",
    "year 10000": "10000-01-01T00:00:00Z",
    "before the first day": "0001-01-01T00:00:00+01:00",
    "after the last day": "9999-12-31T23:59:59-01:00",
    "offset of a day": "2031-01-01T00:00:00+24:00",
    "blanks": " 2031-05-06T07:08:09Z ",
    "digits beyond ASCII": "\uff12\uff10\uff13\uff11-05-06T07:08:09Z",
    "long": "2031-05-06T07:08:09Z" * 1000,
    "number": 1_936_000_000,
    "true": True,
    "array": ["2031-05-06T07:08:09Z"],
    "object": {"$date": "2031-05-06T07:08:09Z"},
}
_NO_COUNTS = {
    "text": "3",
    "fraction": 3.5,
    "negative": -1,
    "too many": 2**31,
    "beyond 64 bits": 10**300,
    "infinite": math.inf,
    "not a number": math.nan,
    "true": True,
    "array": [3],
    "object": {},
}
_NO_TIMESPANS = {
    "text": "3",
    "negative": -0.1,
    "infinite": math.inf,
    "not a number": math.nan,
    "too large": 10**400,
    "true": True,
    "array": [],
}
_NO_OBJECTS = {"text": "x", "number": 1, "true": True, "false": False, "array": [], "array of pairs": [["a", 1]]}


def refused(path: str, values: Mapping[str, object]) -> list[Any]:
    """Rows: an object that holds each of the values at a path."""
    first, _, second = path.partition(".")
    return [
        pytest.param({first: {second: value} if second else value}, path, id=f"{path}: {name}")
        for name, value in values.items()
    ]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        *refused("role", {"number": 1, "true": True, "array": ["x"], "object": {}, "too long": "x" * 65}),
        *refused("license", _NO_OBJECTS),
        *refused("subscription", _NO_OBJECTS),
        *refused("stats", _NO_OBJECTS),
        *refused("stats.concepts", _NO_OBJECTS),
        *refused("license.active", {"text": "true", "one": 1, "zero": 0, "array": [], "object": {}}),
        *refused("subscription.active", {"text": "yes", "fraction": 1.0}),
        *refused("license.ends", _NO_TIMES),
        *refused("subscription.ends", {"naive": "2031-05-06T07:08:09"}),
        *refused("stats.gamesCompleted", _NO_COUNTS),
        *refused("stats.playTime", _NO_TIMESPANS),
    ],
)
def test_what_is_refused_is_named(users: Users, user: User, changes: Mapping[str, object], path: str) -> None:
    with pytest.raises(InvalidField) as refusal:
        users.update(user, {"role": "student", **changes})
    assert refusal.value.metadata == {"field": path}
    assert profile(users) == STORED  # not even what was right


def test_a_user_who_is_gone(users: Users, user: User) -> None:
    User.delete().where(User.id == user.id).execute()
    with pytest.raises(UserNotFound):
        users.update(user, {"role": "student"})
