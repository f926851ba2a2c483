"""`doorward audit` as operators meet it: output, exit codes, and what the commands leave in the trail."""

import json
import os
import pty
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from doorward_server import settings
from doorward_server.app import App
from doorward_server.crypto import Place
from doorward_server.errors import StorageUnavailable
from doorward_server.models import Connection, User
from tests.engines import drop_triggers, outside
from tests.processes import BIN, clean_environment
from tests.unit.command_line import Here, assert_tells, opened, result
from tests.unit.conftest import StoppedClock

TOKEN = "hunter2-sekret"


def fill(home: Path, number: int) -> list[str]:
    """Record some events; returns the heads, from the empty trail's on."""
    with opened(home) as app:
        heads = [app.audit.verify().head]
        for one in range(1, number + 1):
            with app.database.writing():
                app.audit.record(f"user:{one % 2}", "key.added", f"key:{one}", label=f"Ünï {one}", keys=[one, None])
            heads.append(app.audit.verify().head)
    return heads


def tamper(home: Path, statement: str) -> None:
    """What somebody with access to the file does."""
    with opened(home) as app:
        drop_triggers(app.database)
        with outside(app.database) as other:
            other.execute(statement)


# list


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param((), [5, 4, 3, 2, 1], id="all"),
        pytest.param(("--limit", "2"), [5, 4], id="the newest"),
        pytest.param(("--limit", "2", "--before", "4"), [3, 2], id="the next page"),
        pytest.param(("--before", "1"), [], id="nothing more"),
        pytest.param(("--actor", "user:1"), [5, 3, 1], id="by actor"),
        pytest.param(("--subject", "key:4"), [4], id="by subject"),
        pytest.param(("--action", "key.added", "--actor", "user:0"), [4, 2], id="by action and actor"),
        pytest.param(("--action", "key.removed"), [], id="none of this action"),
        pytest.param(("--actor", "é"), [], id="an actor beyond ASCII"),
    ],
)
def test_list(home: Path, here: Here, options: tuple[str, ...], expected: list[int]) -> None:
    fill(home, 5)
    listed = result(here(home, "audit", "list", *options, "--json"))
    assert [event["id"] for event in listed] == expected
    table = here(home, "audit", "list", *options)
    assert (table.returncode, table.stderr) == (0, "")
    assert [one for one in range(1, 6) if f"key:{one}" in table.stdout] == sorted(expected)


def test_an_event_in_the_list(home: Path, here: Here) -> None:
    assert result(here(home, "audit", "list", "--json")) == []
    *_, head = fill(home, 1)
    (event,) = result(here(home, "audit", "list", "--json"))
    assert event.pop("at").endswith("+00:00")
    assert event == {
        "id": 1,
        "actor": "user:1",
        "action": "key.added",
        "subject": "key:1",
        "details": {"keys": [1, None], "label": "Ünï 1"},
        "hash": head,
    }
    assert "keys: 1, -, label: Ünï 1" in here(home, "audit", "list").stdout


def test_texts_of_others_do_not_steer_the_terminal(home: Path, here: Here) -> None:
    with opened(home) as app, app.database.writing():
        app.audit.record("user:1", "key.added", "key:1\x1b[31m", label="\u202e\x9b[red]x[/b]")
    shown = here(home, "audit", "list").stdout
    assert not {"\x1b", "\u202e", "\x9b"} & set(shown)
    assert "[red]x[/b]" in shown


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--limit", "0"), id="no events"),
        pytest.param(("--limit", "10001"), id="too many"),
        pytest.param(("--limit", "x"), id="not a number"),
        pytest.param(("--before", "0"), id="before the first"),
        pytest.param(("--before", str(2**63)), id="no id"),
    ],
)
def test_options_that_cannot_be(home: Path, here: Here, options: tuple[str, ...]) -> None:
    done = here(home, "audit", "list", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert options[0] in done.stderr


# verify


@pytest.mark.parametrize(
    ("events", "noted"),
    [
        pytest.param(0, None, id="empty"),
        pytest.param(3, None, id="three"),
        pytest.param(3, 3, id="with the head"),
        pytest.param(3, 1, id="with an earlier head"),
        pytest.param(3, 0, id="with the head of nothing"),
    ],
)
def test_an_intact_trail(home: Path, here: Here, events: int, noted: int | None) -> None:
    heads = fill(home, events)
    options = () if noted is None else ("--head", heads[noted])
    done = here(home, "audit", "verify", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{events} events in an unbroken chain\nhead: {heads[-1]}\n"
    assert result(here(home, "audit", "verify", *options, "--json")) == {
        "intact": True,
        "rows": events,
        "head": heads[-1],
        "broken_at": None,
        "problem": None,
        "has_head": True,
    }


@pytest.mark.parametrize(
    ("statement", "noted", "rows", "broken_at", "words"),
    [
        pytest.param("UPDATE audit_events SET actor = 'x' WHERE id = 3", None, 2, 3, "broken at event 3", id="altered"),
        pytest.param("DELETE FROM audit_events WHERE id = 3", None, 2, 4, "event 3 is missing", id="removed"),
        pytest.param("DELETE FROM audit_events WHERE id > 3", 5, 3, None, "its end was cut off", id="cut off"),
        pytest.param("DELETE FROM audit_events", 5, 0, None, "its end was cut off", id="emptied"),
        pytest.param("UPDATE audit_events SET actor = 'x' WHERE id = 3", 1, 2, 3, "broken at event 3", id="both"),
    ],
)
def test_a_broken_trail(
    home: Path, here: Here, statement: str, noted: int | None, rows: int, broken_at: int | None, words: str
) -> None:
    heads = fill(home, 5)
    tamper(home, statement)
    options = () if noted is None else ("--head", heads[noted])
    assert_tells(here(home, "audit", "verify", *options), words, heads[rows])
    done = here(home, "audit", "verify", *options, "--json")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["intact"], verdict["rows"]) == (1, False, rows)
    assert (verdict["head"], verdict["broken_at"]) == (heads[rows], broken_at)
    assert words in done.stderr


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("", id="empty"),
        pytest.param("ab", id="short"),
        pytest.param("ab" * 33, id="long"),
        pytest.param("xy" * 32, id="not hexadecimal"),
        pytest.param("ab " * 21 + "a", id="with blanks"),
        pytest.param("٣" * 64, id="other digits"),
    ],
)
def test_heads_that_are_none(home: Path, here: Here, head: str) -> None:
    fill(home, 1)
    assert_tells(here(home, "audit", "verify", "--head", head), "--head", "64 hexadecimal digits")


def test_a_head_in_capitals(home: Path, here: Here) -> None:
    *_, head = fill(home, 2)
    assert here(home, "audit", "verify", "--head", head.upper()).returncode == 0


@pytest.mark.parametrize(
    ("terminal", "is_drawn"),
    [pytest.param("xterm", True, id="a terminal"), pytest.param("dumb", False, id="a dumb one")],
)
def test_a_bar_at_a_terminal(home: Path, terminal: str, is_drawn: bool) -> None:
    fill(home, 2)
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [BIN / "doorward", "audit", "verify"],
            env=clean_environment({"DOORWARD_HOME": str(home), "TERM": terminal, "COLUMNS": "80"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=slave,
            timeout=60,
            check=False,
        )
        os.write(slave, b"\n")  # so that there is something to read
        shown = os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 0
    assert done.stdout.startswith(b"2 events in an unbroken chain\n")
    assert ("checking" in shown and "2/2" in shown) == is_drawn
    assert is_drawn or not shown.strip()


# What other commands leave


def test_deleting_a_user_is_recorded_without_the_name(home: Path, here: Here) -> None:
    # A name that no hash can hold by chance.
    user = result(here(home, "user", "create", "--name", "Grace Hopper", "--email", "grace@example.org", "--json"))
    here(home, "user", "delete", "grace-hopper", "--yes")
    (event,) = result(here(home, "audit", "list", "--json"))
    assert (event["actor"], event["action"], event["subject"]) == ("operator", "user.deleted", f"user:{user['id']}")
    assert "grace" not in json.dumps(event).lower()
    assert here(home, "audit", "verify").returncode == 0


def connect(app: App, user: User) -> Connection:
    """A connection as it stands after a code was exchanged."""
    now = app.clock.now()
    made: Connection = Connection.create(
        user=user, provider="flo", access_token=b"", obtained_at=now, needs_reauth=False, lease_epoch=0, created_at=now
    )
    sealed = app.keys.seal(TOKEN, Place("connections", made.id, "access_token"))
    Connection.update(access_token=sealed).where(Connection.id == made.id).execute()
    return made


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        pytest.param(
            lambda app, user: app.integrations.revoke(user.id, "flo"), [("user:1", "connection.revoked")], id="revoked"
        ),
        pytest.param(
            lambda app, user: app.accounts.delete(user),
            [("operator", "connection.revoked"), ("operator", "user.deleted")],
            id="the user deleted by the operator",
        ),
        pytest.param(
            lambda app, user: app.accounts.delete(user, actor="client:dwc_1"),
            [("client:dwc_1", "connection.revoked"), ("client:dwc_1", "user.deleted")],
            id="the user deleted by a client",
        ),
    ],
)
def test_the_end_of_a_connection_and_its_reads(
    home: Path, end: Callable[[App, User], None], expected: list[tuple[str, str]]
) -> None:
    clock = StoppedClock()
    app = App(settings.load(home), clock)
    user = app.users.create("Ada", None)
    made = connect(app, user)
    for reader in ("service:4", "service:4", "service:5"):
        assert app.integrations.access_token("ada", "flo", reader=reader).value == TOKEN
    end(app, user)
    clock.advance(timedelta(minutes=1))
    assert app.access_reads.flush() == 2  # what was read counts, though the connection is gone
    events = app.audit.list(9)[::-1]
    assert [(event.actor, event.action) for event in events] == [
        *expected,
        ("service:4", "access_token.read"),
        ("service:5", "access_token.read"),
    ]
    assert {event.subject for event in events} - {f"user:{user.id}"} == {f"connection:{made.id}"}
    assert [event.details["count"] for event in events[-2:]] == [2, 1]
    assert TOKEN not in str([event.details for event in events])
    assert app.audit.verify().is_intact
    app.database.close()


def test_no_token_is_handed_out_unrecorded(home: Path) -> None:
    with opened(home) as app:
        connect(app, app.users.create("Ada", None))
        with outside(app.database) as other:
            other.execute("DROP TABLE access_reads")
        with pytest.raises(StorageUnavailable):
            app.integrations.access_token("ada", "flo")


@pytest.mark.parametrize("words", [("audit",), ("audit", "list", "--help"), ("audit", "verify", "--help")])
def test_help(home: Path, here: Here, words: tuple[str, ...]) -> None:
    done = here(home, *words)
    assert "Usage: doorward audit" in done.stdout + done.stderr
    assert len(words) == 1 or "Example: doorward audit" in done.stdout
