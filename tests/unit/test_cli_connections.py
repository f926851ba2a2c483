"""`doorward connection list`: how each connection stands, why, and which are shown."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from doorward_server.crypto import Place
from doorward_server.errors import CallError
from doorward_server.models import Connection, User, to_micros
from tests.sandbox.client import SandboxProvider
from tests.stack import Stack
from tests.unit.command_line import Here, assert_tells, opened, result

TOKEN = "access-token-of-nobody-else"
HOUR, WEEK = timedelta(hours=1), timedelta(days=7)


def connect(home: Path, slug: str = "ada", provider: str = "flo", **columns: Any) -> int:
    """A user's connection; `ends_in` is how long the token lives, `refreshable` whether there is a refresh token."""
    ends_in, refreshable = columns.pop("ends_in", HOUR), columns.pop("refreshable", True)
    with opened(home) as app:
        app.record_key()
        user = User.get_or_none(User.slug == slug) or app.users.create(slug)
        now = app.clock.now()
        row = Connection.create(
            user=user.id,
            provider=provider,
            access_token=b"",
            expires_at=now + ends_in if ends_in is not None else None,
            obtained_at=now,
            lease_epoch=1,
            created_at=now,
            **{"needs_reauth": False, **columns},
        )
        sealed = app.keys.seal(TOKEN, Place("connections", row.id, "access_token"))
        again = app.keys.seal(TOKEN, Place("connections", row.id, "refresh_token")) if refreshable else None
        Connection.update(access_token=sealed, refresh_token=again).where(Connection.id == row.id).execute()
        return int(row.id)


def listed(here: Here, home: Path, *options: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result(here(home, "connection", "list", *options, "--json"))
    return rows


@pytest.mark.parametrize(
    ("columns", "status", "reason"),
    [
        pytest.param({}, "connected", None, id="valid"),
        pytest.param({"ends_in": None}, "connected", None, id="without an end"),
        pytest.param({"ends_in": None, "refreshable": False}, "connected", None, id="without an end, unrefreshable"),
        pytest.param({"ends_in": -HOUR}, "connected", None, id="a refresh gets another one"),
        pytest.param(
            {"ends_in": -HOUR, "lease_failure": "PROVIDER_TIMEOUT"}, "connected", "PROVIDER_TIMEOUT", id="failing"
        ),
        pytest.param({"ends_in": WEEK, "refreshable": False}, "connected", None, id="unrefreshable, for a week"),
        pytest.param({"refreshable": False}, "expiring", "NO_REFRESH_TOKEN", id="expiring"),
        pytest.param({"ends_in": -HOUR, "refreshable": False}, "expired", "NO_REFRESH_TOKEN", id="expired"),
        pytest.param({"needs_reauth": True}, "needs_reauth", "GRANT_REFUSED", id="refused"),
        pytest.param(
            {"needs_reauth": True, "ends_in": -HOUR, "refreshable": False},
            "needs_reauth",
            "NO_REFRESH_TOKEN",
            id="asked for after its end",
        ),
    ],
)
def test_how_a_connection_stands(
    here: Here, home: Path, columns: dict[str, Any], status: str, reason: str | None
) -> None:
    connection_id = connect(home, **columns)
    [row] = listed(here, home)
    assert (row["id"], row["user"], row["slug"], row["provider"]) == (connection_id, 1, "ada", "flo")
    assert (row["status"], row["reason"]) == (status, reason)
    assert (row["expires"] is None) == (columns.get("ends_in", HOUR) is None)
    assert listed(here, home, "--status", status) == [row]
    others = {"connected", "expiring", "expired", "needs_reauth"} - {status}
    assert [listed(here, home, "--status", other) for other in sorted(others)] == [[], [], []]


@pytest.fixture
def several(home: Path) -> Path:
    """The ids 1 to 4."""
    connect(home, "ada", "flo")
    connect(home, "ada", "min", needs_reauth=True)
    connect(home, "grace", "flo", needs_reauth=True)
    connect(home, "grace", "min")
    return home


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((), [4, 3, 2, 1]),
        (("--user", "ada"), [2, 1]),
        (("--user", "2"), [4, 3]),
        (("--provider", "flo"), [3, 1]),
        (("--provider", "nobody"), []),
        (("--status", "needs_reauth"), [3, 2]),
        (("--status", "needs_reauth", "--provider", "flo", "--user", "grace"), [3]),
        (("--limit", "2"), [4, 3]),
        (("--limit", "2", "--before", "3"), [2, 1]),
        (("--before", "1"), []),
    ],
    ids=lambda value: " ".join(map(str, value)) or "none",
)
def test_which_are_shown(here: Here, several: Path, options: tuple[str, ...], ids: list[int]) -> None:
    assert [row["id"] for row in listed(here, several, *options)] == ids


def test_the_table_shows_people_what_matters(here: Here, several: Path) -> None:
    done = here(several, "connection", "list", "--user", "ada")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["id", "user", "slug", "provider", "status", "reason", "expires", "obtained"]
    assert lines[0].split()[:6] == ["2", "1", "ada", "min", "needs_reauth", "GRANT_REFUSED"]


def test_no_token_is_shown(here: Here, several: Path) -> None:
    done = here(several, "connection", "list", "--json")
    assert TOKEN not in done.stdout
    assert set(listed(here, several)[0]) == {
        *("id", "user", "slug", "provider", "status", "reason", "expires", "obtained", "created")
    }


def test_an_unknown_user_is_told(here: Here, several: Path) -> None:
    assert_tells(here(several, "connection", "list", "--user", "nobody"), "there is no such user")


def test_what_a_provider_did_is_seen(stack: Stack, provider: SandboxProvider) -> None:
    """With real refreshes: first it fails, then it is refused."""
    person = stack.person()
    stack.connect(person)
    mine = ("connection", "list", "--user", person.slug)
    [row] = stack.cli_json(*mine)
    assert (row["status"], row["reason"]) == ("connected", None)
    stack.app.database.write(lambda: _expire(stack, person.id))
    for fault, status, reason in (
        ({"status": 503}, "connected", "PROVIDER_UNAVAILABLE"),
        ({"status": 400, "body": '{"error": "invalid_grant"}'}, "needs_reauth", "GRANT_REFUSED"),
    ):
        provider.fault("token", "status", **fault)
        with pytest.raises(CallError):
            stack.app.integrations.access_token(person.slug, "flo")
        [row] = stack.cli_json(*mine)
        assert (row["status"], row["reason"]) == (status, reason)


def _expire(stack: Stack, user_id: int) -> None:
    stack.app.database.execute_all(
        "UPDATE connections SET expires_at = ? WHERE user_id = ?", (to_micros(stack.app.clock.now()), user_id)
    )
