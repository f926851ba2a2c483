"""`doorward consent` and `doorward delivery` as operators meet them: output, exit codes, and what was decided."""

from pathlib import Path
from typing import Any

import pytest

from doorward_server.consents import Question
from tests.unit.command_line import Here, assert_tells, opened, result
from tests.unit.test_cli_keys import ADD, SNOWFLAKE, VALUE, WHOSE

CALLBACK = "http://93.184.215.14/callback"
TOO_LARGE = "99999999999999999999999"


def ask(home: Path, state: str = "", user: str = SNOWFLAKE) -> int:
    with opened(home) as app:
        app.record_key()
        return app.consents.request(Question("Bot", user, CALLBACK, state), None, "192.0.2.1")


def add_key(here: Here, home: Path) -> int:
    key: int = result(here(home, *ADD, "--value-stdin", "--json", stdin=VALUE.encode()))["id"]
    return key


def shown(here: Here, home: Path, request_id: int) -> dict[str, Any]:
    row: dict[str, Any] = result(here(home, "consent", "show", str(request_id), "--json"))
    return row


def test_a_grant_is_shown_with_all_that_came_of_it(here: Here, home: Path) -> None:
    key, request_id = add_key(here, home), ask(home, "st")
    done = here(home, "consent", "grant", str(request_id), "--keys", str(key))
    assert (done.returncode, done.stdout) == (0, f"granted request {request_id}\n")
    row = shown(here, home, request_id)
    assert (row["status"], row["keys"], row["callback"], row["state"]) == ("granted", [key], CALLBACK, "st")
    delivery = result(here(home, "delivery", "show", str(row["delivery"]), "--json"))
    assert (delivery["request"], delivery["outcome"], delivery["status"]) == (request_id, "keys", "queued")
    [listed] = result(here(home, "delivery", "list", "--request", str(request_id), "--json"))
    assert listed["id"] == row["delivery"]


@pytest.mark.parametrize("again", [("grant", "--keys", "1"), ("cancel",), ("block",)])
def test_what_is_decided_stays_so(here: Here, home: Path, again: tuple[str, ...]) -> None:
    request_id = ask(home)
    assert here(home, "consent", "cancel", str(request_id)).returncode == 0
    command, *options = again
    assert_tells(here(home, "consent", command, str(request_id), *options), "was canceled at 20", "nothing was changed")


def test_all_that_share_a_prompt_are_named(here: Here, home: Path) -> None:
    first, second = ask(home, "one"), ask(home, "two")
    assert shown(here, home, second)["prompt"] == first
    done = here(home, "consent", "cancel", str(second))
    assert (done.returncode, done.stdout) == (0, f"canceled requests {first}, {second} (one prompt)\n")


def test_one_that_ended_decides_no_other(here: Here, home: Path) -> None:
    """They share a prompt, but each has a deadline of its own."""
    first, second = ask(home, "one"), ask(home, "two")
    with opened(home) as app, app.database.writing():
        app.consents.end({"request": first, "outcome": "timed_out"})
    assert_tells(
        here(home, "consent", "cancel", str(first)), f"request {first} was timed out at", "nothing was changed"
    )
    assert shown(here, home, second)["status"] == "pending"


def test_requests_are_listed(here: Here, home: Path) -> None:
    first, second = ask(home), ask(home, user="42")

    def listed(*options: str) -> list[int]:
        return [row["id"] for row in result(here(home, "consent", "list", *options, "--json"))]

    assert listed() == [second, first]
    assert listed(*WHOSE) == [first]
    assert listed("--limit", "1") == [second]
    assert listed("--before", str(second)) == [first]
    assert here(home, "consent", "cancel", str(first)).returncode == 0
    assert listed("--status", "pending") == [second]
    assert_tells(here(home, "consent", "list", "--discord-user", "bob"), "--discord-user has to be a Discord user's id")


@pytest.mark.parametrize(
    "command",
    [
        ("consent", "show", TOO_LARGE),
        ("consent", "cancel", TOO_LARGE),
        ("consent", "show", "0"),
        ("consent", "list", "--before", "0"),
        ("delivery", "show", TOO_LARGE),
        ("delivery", "retry", TOO_LARGE),
        ("delivery", "list", "--before", TOO_LARGE),
        ("token", "revoke", TOO_LARGE),
        ("session", "revoke", TOO_LARGE),
    ],
    ids=" ".join,
)
def test_numbers_that_are_no_ids(here: Here, home: Path, command: tuple[str, ...]) -> None:
    done = here(home, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Input should be" in done.stderr


@pytest.mark.parametrize("keys", ["", "x", "1,,2", "-1", "0", TOO_LARGE, "1;2"])
def test_what_are_no_keys(here: Here, home: Path, keys: str) -> None:
    request_id = ask(home)
    assert_tells(here(home, "consent", "grant", str(request_id), f"--keys={keys}"), "--keys: it has to be ids of keys")
    assert shown(here, home, request_id)["status"] == "pending"


def test_somebody_else_s_key(here: Here, home: Path) -> None:
    key, request_id = add_key(here, home), ask(home, user="42")
    assert_tells(here(home, "consent", "grant", str(request_id), "--keys", str(key)), "no such key")
    assert shown(here, home, request_id)["status"] == "pending"
