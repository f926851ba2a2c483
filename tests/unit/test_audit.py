"""The audit trail: what breaks its chain is found, appends race without harm, and reads of tokens are counted."""

import contextlib
import hashlib
import json
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import peewee
import psycopg
import pytest

from doorward_server import models
from doorward_server.audit import AccessReads, Audit
from doorward_server.database import Database, SqliteDatabase
from doorward_server.errors import OperatorError, StorageUnavailable
from doorward_server.models import AuditEvent, Connection, to_micros
from tests.engines import drop_triggers, outside
from tests.processes import clean_environment
from tests.unit.conftest import StoppedClock

MINUTE = timedelta(minutes=1)
REFUSALS = (sqlite3.IntegrityError, psycopg.IntegrityError)
NO_HEAD = "0" * 64
ZEROS = f"x'{NO_HEAD}'"
_APPENDING = """
import sys
from concurrent.futures import ThreadPoolExecutor
from doorward_server.audit import Audit
from doorward_server.clock import Clock
from doorward_server.database import open_database

name, threads, events = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
database = open_database(sys.argv[1], busy_timeout=30)
audit = Audit(database, Clock())

def append(thread):
    for number in range(events):
        if number % 2:
            database.write(lambda: audit.record(name, "raced", f"thread:{thread}", number=number))
        else:
            with database.writing():
                audit.record(name, "raced", f"thread:{thread}", number=number)

print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(threads) as pool:
    list(pool.map(append, range(threads)))
"""


@pytest.fixture
def audit(database: Database, clock: StoppedClock) -> Audit:
    return Audit(database, clock)


@pytest.fixture
def reads(database: Database, clock: StoppedClock, audit: Audit) -> AccessReads:
    return AccessReads(database, clock, audit)


def fill(audit: Audit, number: int, start: int = 1) -> None:
    with audit.database.writing():
        for one in range(start, start + number):
            audit.record(f"user:{one % 3}", f"action.{one % 2}", f"subject:{one}", number=one)


def intact(audit: Audit, rows: int) -> str:
    """The head of a trail that has to be intact."""
    verdict = audit.verify()
    assert (verdict.is_intact, verdict.rows, verdict.broken_at, verdict.problem) == (True, rows, None, None)
    return verdict.head


def tamper(database: Database, *statements: str) -> None:
    """What somebody with access to the file does, after dropping the triggers."""
    drop_triggers(database)
    with outside(database) as connection:
        for statement in statements:
            connection.execute(statement)


# Recording


def test_an_event_is_recorded_with_the_documented_hash(audit: Audit, clock: StoppedClock) -> None:
    with audit.database.writing():
        audit.record("user:1", "key.added", "key:1", service="gw2", label="Ünïcode 🎉")
        clock.advance(MINUTE)
        audit.record("operator", "key.removed", "key:1")
    previous = NO_HEAD
    with outside(audit.database) as connection:
        for row in connection.execute("SELECT id, at, actor, action, subject, details, hash FROM audit_events"):
            text = json.dumps([previous, *row[:-1]], separators=(",", ":"))
            assert row[-1] == hashlib.sha256(text.encode("ascii")).digest()
            previous = row[-1].hex()
    second, first = audit.list(10)
    assert (first.id, first.at, first.actor, first.action, first.subject, first.details) == (
        1,
        clock.now() - MINUTE,
        "user:1",
        "key.added",
        "key:1",
        {"service": "gw2", "label": "Ünïcode 🎉"},
    )
    assert (second.id, second.at, second.details) == (2, clock.now(), {})
    assert intact(audit, 2) == previous == second.hash.hex()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("Ada Lovelace", id="ASCII"),
        pytest.param("Zoë 日本語 🎉", id="beyond ASCII"),
        pytest.param("e\u0301", id="combining"),
        pytest.param("a\x00b", id="NUL", marks=pytest.mark.sqlite),  # nothing with a NUL gets so far
        pytest.param("a\nb\x1b[31m\u2028\u202e", id="controls"),
        pytest.param('","', id="quotes and commas"),
        pytest.param("\\u0041", id="looks like an escape"),
        pytest.param("x" * 100_000, id="long"),
    ],
)
def test_any_text(audit: Audit, text: str) -> None:
    with audit.database.writing():
        audit.record(text, text, text, text=text, **{text or "-": [text, {text: None}]})
    (event,) = audit.list(1)
    assert (event.actor, event.action, event.subject) == (text, text, text)
    assert event.details == {"text": text, text or "-": [text, {text: None}]}
    assert audit.list(1, actor=text, subject=text, action=text) == [event]
    intact(audit, 1)


def test_a_lone_surrogate_in_the_details(audit: Audit) -> None:
    with audit.database.writing():
        audit.record("user:1", "named", "user:1", name="\udcff")
    assert audit.list(1)[0].details == {"name": "\udcff"}
    intact(audit, 1)


def test_fields_do_not_run_into_each_other(audit: Audit) -> None:
    """The same characters in other fields give other hashes."""
    fields = [("a", "b", "c"), ("ab", "", "c"), ("a", "bc", ""), ('a","b', "", "c"), ("", "ab", "c")]
    hashes = set()
    for actor, action, subject in fields:
        with contextlib.suppress(RuntimeError), audit.database.writing():
            audit.record(actor, action, subject)
            row = audit.database.execute("SELECT hash FROM audit_events", ())
            assert row is not None
            hashes.add(row[0])
            raise RuntimeError
    assert len(hashes) == len(fields)


@pytest.mark.parametrize(
    "details",
    [
        pytest.param({"value": b"bytes"}, id="bytes"),
        pytest.param({"value": float("nan")}, id="not a number"),
        pytest.param({"value": object()}, id="an object"),
    ],
)
def test_details_that_are_not_json_undo_the_change(audit: Audit, details: dict[str, Any]) -> None:
    fill(audit, 1)

    def change() -> None:
        audit.record("user:1", "one", "user:1")
        audit.record("user:1", "two", "user:1", **details)

    with pytest.raises((TypeError, ValueError)):
        audit.database.write(change)
    intact(audit, 1)


def test_an_event_shares_its_change_s_fate(audit: Audit) -> None:
    def change(number: int) -> None:
        audit.record("user:1", "changed", f"subject:{number}")
        if number == 2:
            raise StorageUnavailable

    for number in (1, 2, 3):
        with contextlib.suppress(StorageUnavailable):
            audit.database.write(partial(change, number))
    assert [(event.id, event.subject) for event in audit.list(9)] == [(2, "subject:3"), (1, "subject:1")]
    intact(audit, 2)


def test_nothing_is_recorded_outside_of_a_transaction(audit: Audit) -> None:
    with pytest.raises(RuntimeError, match="in the transaction"):
        audit.record("user:1", "one", "user:1")
    assert intact(audit, 0) == NO_HEAD


# Append-only


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("UPDATE audit_events SET actor = 'user:9'", id="update all"),
        pytest.param("UPDATE audit_events SET hash = hash WHERE id = 1", id="update one with what it has"),
        pytest.param(
            "UPDATE OR REPLACE audit_events SET id = 2 WHERE id = 1", id="update or replace", marks=pytest.mark.sqlite
        ),
        pytest.param("DELETE FROM audit_events", id="delete all"),
        pytest.param("DELETE FROM audit_events WHERE id = 3", id="delete the last"),
        pytest.param("INSERT INTO audit_events VALUES (0, 0, '', '', '', '{}', x'')", id="insert below"),
        pytest.param("INSERT INTO audit_events VALUES (9, 0, '', '', '', '{}', x'')", id="insert with a gap"),
        pytest.param("INSERT INTO audit_events VALUES (NULL, 0, '', '', '', '{}', x'')", id="insert without an id"),
        pytest.param(
            "REPLACE INTO audit_events VALUES (3, 0, '', '', '', '{}', x'')", id="replace", marks=pytest.mark.sqlite
        ),
        pytest.param(
            "INSERT INTO audit_events VALUES (3, 0, '', '', '', '{}', x'') ON CONFLICT (id) DO UPDATE SET actor = ''",
            id="upsert",
        ),
    ],
)
def test_the_database_only_appends(audit: Audit, statement: str) -> None:
    fill(audit, 3)
    head = intact(audit, 3)
    with outside(audit.database) as connection, pytest.raises(REFUSALS, match="audit_events is append-only"):
        connection.execute(statement)
    assert intact(audit, 3) == head


# Verifying


_COPY = "INSERT INTO audit_events SELECT {}, at, actor, action, subject, details, hash FROM audit_events WHERE id = {}"


@pytest.mark.parametrize(
    ("statements", "broken_at", "problem"),
    [
        *(
            pytest.param(
                [f"UPDATE audit_events SET {change} WHERE id = 5"], 5, "altered", id=change, marks=pytest.mark.sqlite
            )
            for change in (  # values of other types than the columns'
                "at = 'noon'",
                "at = 1.5",
                "at = 9e999",
                "at = x'00'",
                "actor = CAST(x'ff' AS TEXT)",
                "actor = x'ff'",
                "actor = 5",
                "hash = hex(hash)",
                "hash = 0",
            )
        ),
        *(
            pytest.param([f"UPDATE audit_events SET {change} WHERE id = 5"], 5, "altered", id=change)
            for change in (
                "at = at + 1",
                "actor = 'user:9'",
                "actor = actor || ' '",
                "action = upper(action)",
                "subject = ''",
                "details = '{\"number\":6}'",
                "details = '{\"number\": 5}'",
                "details = 'no JSON'",
                "hash = x'00'",
                f"hash = {ZEROS}",
                "actor = action, action = actor",
            )
        ),
        pytest.param(["UPDATE audit_events SET actor = 'x' WHERE id = 1"], 1, "altered", id="the first"),
        pytest.param(["UPDATE audit_events SET actor = 'x' WHERE id = 10"], 10, "altered", id="the last"),
        pytest.param(["UPDATE audit_events SET actor = 'x' WHERE id IN (4, 7)"], 4, "altered", id="two"),
        pytest.param(["DELETE FROM audit_events WHERE id = 1"], 2, "event 1 is missing", id="the first removed"),
        pytest.param(["DELETE FROM audit_events WHERE id = 5"], 6, "event 5 is missing", id="one removed"),
        pytest.param(["DELETE FROM audit_events WHERE id < 9"], 9, "event 1 is missing", id="a start removed"),
        pytest.param(
            [
                "DELETE FROM audit_events WHERE id = 5",
                *(f"UPDATE audit_events SET id = {n - 1} WHERE id = {n}" for n in range(6, 11)),
            ],
            5,
            "altered",
            id="removed and renumbered",
        ),
        pytest.param(
            [
                "UPDATE audit_events SET id = -1 WHERE id = 5",
                "UPDATE audit_events SET id = 5 WHERE id = 6",
                "UPDATE audit_events SET id = 6 WHERE id = -1",
            ],
            5,
            "moved",
            id="two in the other order",
        ),
        pytest.param(
            [_COPY.format(0, 1)],
            0,
            "inserted",
            id="inserted at id 0",
        ),
        pytest.param(
            [f"INSERT INTO audit_events VALUES ({-(2**63)}, 0, '', '', '', '{{}}', {ZEROS})"],
            -(2**63),
            "inserted",
            id="inserted at the lowest id",
        ),
        pytest.param(
            [f"INSERT INTO audit_events VALUES (11, 0, '', '', '', '{{}}', {ZEROS})"], 11, "inserted", id="appended"
        ),
        pytest.param(
            [f"INSERT INTO audit_events VALUES ({2**63 - 1}, 0, '', '', '', '{{}}', {ZEROS})"],
            2**63 - 1,
            "event 11 is missing",
            id="appended at the highest id",
        ),
        pytest.param(
            [_COPY.format(11, 10)],
            11,
            "inserted",
            id="the last one twice",
        ),
    ],
)
def test_tampering_is_found_where_it_begins(audit: Audit, statements: list[str], broken_at: int, problem: str) -> None:
    fill(audit, 10)
    heads = [NO_HEAD, *(event.hash.hex() for event in reversed(audit.list(10)))]
    tamper(audit.database, *statements)
    verdict = audit.verify()
    assert (verdict.is_intact, verdict.broken_at) == (False, broken_at)
    assert problem in (verdict.problem or "")
    unbroken = int(problem.split()[1]) - 1 if "missing" in problem else max(broken_at - 1, 0)
    assert (verdict.rows, verdict.head) == (unbroken, heads[unbroken])


@pytest.mark.parametrize("rows", [0, 1, 999, 1000, 1001, 2500])
def test_the_walk_in_batches(audit: Audit, rows: int) -> None:
    fill(audit, rows)
    seen: list[tuple[int, int]] = []
    verdict = audit.verify(on_progress=lambda *numbers: seen.append(numbers))
    assert (verdict.is_intact, verdict.rows) == (True, rows)
    assert seen == [(min(done, rows), rows) for done in range(1000, rows + 1000, 1000)]
    if rows:
        tamper(audit.database, f"UPDATE audit_events SET subject = 'x' WHERE id = {rows}")
        assert audit.verify().broken_at == rows


@pytest.mark.parametrize(
    ("noted_at", "cut_to", "again", "has_head"),
    [
        pytest.param(10, None, 0, True, id="nothing happened"),
        pytest.param(4, None, 0, True, id="noted earlier"),
        pytest.param(0, None, 0, True, id="noted when there was nothing"),
        pytest.param(10, None, 5, True, id="more events since"),
        pytest.param(10, 9, 0, False, id="the last one is gone"),
        pytest.param(10, 9, 1, False, id="the last one was replaced"),
        pytest.param(10, 9, 3, False, id="and more appended"),
        pytest.param(10, 0, 0, False, id="all gone"),
        pytest.param(4, 6, 0, True, id="cut off after what was noted"),
    ],
)
def test_a_noted_head_shows_that_the_end_was_cut_off(
    audit: Audit, noted_at: int, cut_to: int | None, again: int, has_head: bool
) -> None:
    fill(audit, noted_at)
    head = intact(audit, noted_at)
    fill(audit, 10 - noted_at, noted_at + 1)
    if cut_to is not None:
        tamper(audit.database, f"DELETE FROM audit_events WHERE id > {cut_to}")
    fill(audit, again, 100)
    rows = (10 if cut_to is None else cut_to) + again
    intact(audit, rows)
    for spelling in (head, head.upper()):
        verdict = audit.verify(spelling)
        assert (verdict.is_intact, verdict.has_head, verdict.rows, verdict.broken_at) == (
            has_head,
            has_head,
            rows,
            None,
        )


def test_a_head_of_another_trail(audit: Audit) -> None:
    fill(audit, 3)
    assert not audit.verify("ab" * 32).is_intact


# Listing


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"limit": 3}, [9, 8, 7], id="the newest"),
        pytest.param({"limit": 3, "before": 7}, [6, 5, 4], id="the next page"),
        pytest.param({"limit": 3, "before": 2}, [1], id="the last page"),
        pytest.param({"limit": 3, "before": 1}, [], id="nothing more"),
        pytest.param({"limit": 99}, [9, 8, 7, 6, 5, 4, 3, 2, 1], id="all"),
        pytest.param({"limit": 9, "actor": "user:0"}, [9, 6, 3], id="by actor"),
        pytest.param({"limit": 2, "actor": "user:0", "before": 9}, [6, 3], id="a page by actor"),
        pytest.param({"limit": 9, "subject": "subject:4"}, [4], id="by subject"),
        pytest.param({"limit": 9, "action": "action.1"}, [9, 7, 5, 3, 1], id="by action"),
        pytest.param({"limit": 9, "action": "action.1", "actor": "user:0"}, [9, 3], id="by both"),
        pytest.param({"limit": 9, "actor": ""}, [], id="an empty actor is one"),
        pytest.param({"limit": 9, "subject": "subject:%"}, [], id="no wildcards"),
    ],
)
def test_list(audit: Audit, options: dict[str, Any], expected: list[int]) -> None:
    fill(audit, 9)
    assert [event.id for event in audit.list(**options)] == expected


def test_a_damaged_event_in_the_list(audit: Audit) -> None:
    fill(audit, 3)
    tamper(audit.database, "UPDATE audit_events SET details = 'no JSON' WHERE id = 2")
    assert [event.id for event in audit.list(1)] == [3]
    with pytest.raises(OperatorError, match="doorward audit verify"):
        audit.list(2)


# Races


def test_threads_of_two_processes_append(audit: Audit, tmp_path: Path) -> None:
    threads, events = 8, 25
    arguments = [sys.executable, "-c", _APPENDING, audit.database.url]
    processes = [
        subprocess.Popen(
            [*arguments, name, str(threads), str(events)],
            env=clean_environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        while any(process.poll() is None for process in processes):
            assert audit.verify().is_intact  # at any moment
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    intact(audit, 2 * threads * events)
    recorded = [(event.actor, event.subject, event.details["number"]) for event in AuditEvent.select()]
    assert len(set(recorded)) == 2 * threads * events
    for actor in ("one", "other"):
        for thread in range(threads):
            numbers = [number for who, where, number in recorded if (who, where) == (actor, f"thread:{thread}")]
            assert numbers == [*range(events)]


# Reads of access tokens


def connection(connection_id: int = 1, user_id: int = 7, provider: str = "flo") -> Connection:
    return Connection(id=connection_id, user_id=user_id, provider=provider)


def told(audit: Audit) -> list[tuple[str, str, int, int, str, str]]:
    """The counts in the trail, oldest first."""
    return [
        (
            event.actor,
            event.subject,
            event.details["count"],
            event.details["user"],
            event.details["provider"],
            event.details["minute"],
        )
        for event in reversed(audit.list(10_000, action="access_token.read"))
    ]


def test_reads_are_told_by_caller_connection_and_minute(reads: AccessReads, audit: Audit, clock: StoppedClock) -> None:
    for _ in range(3):
        reads.count("service:1", connection())
    reads.count("service:2", connection())
    reads.count("service:1", connection(2, 8, "min"))
    assert (reads.flush(), told(audit)) == (0, [])  # the minute is not over
    clock.advance(MINUTE)
    reads.count("service:1", connection())
    noon = "2030-01-01T00:00+00:00"
    expected = [
        ("service:1", "connection:1", 3, 7, "flo", noon),
        ("service:2", "connection:1", 1, 7, "flo", noon),
        ("service:1", "connection:2", 1, 8, "min", noon),
    ]
    assert (reads.flush(), told(audit)) == (3, expected)
    assert (reads.flush(), told(audit)) == (0, expected)
    clock.advance(MINUTE)
    assert reads.flush() == 1
    assert told(audit) == [*expected, ("service:1", "connection:1", 1, 7, "flo", "2030-01-01T00:01+00:00")]
    intact(audit, 4)
    with outside(audit.database) as other:
        assert other.execute("SELECT count(*) FROM access_reads").fetchone() == (0,)


@pytest.mark.parametrize(
    ("later", "over"),
    [
        pytest.param(timedelta(0), 0, id="at once"),
        pytest.param(MINUTE - timedelta(microseconds=1), 0, id="its last moment"),
        pytest.param(MINUTE, 1, id="over"),
        pytest.param(timedelta(days=40), 1, id="long over"),
        pytest.param(-timedelta(days=1), 0, id="the clock was put back"),
    ],
)
def test_when_a_minute_is_over(reads: AccessReads, clock: StoppedClock, later: timedelta, over: int) -> None:
    reads.count("service:1", connection())
    clock.advance(later)
    assert reads.flush() == over


@pytest.mark.parametrize("callers", [1, 99, 100, 101, 250])
def test_many_counts_are_moved_in_several_transactions(
    reads: AccessReads, audit: Audit, clock: StoppedClock, callers: int
) -> None:
    for number in range(callers):
        reads.count(f"service:{number}", connection())
    clock.advance(MINUTE)
    assert reads.flush() == callers
    assert [count[0] for count in told(audit)] == [f"service:{number}" for number in range(callers)]
    intact(audit, callers)


@pytest.mark.sqlite
def test_a_count_that_cannot_be_moved_is_kept(reads: AccessReads, audit: Audit, clock: StoppedClock) -> None:
    reads.count("service:1", connection())
    clock.advance(MINUTE)
    with outside(audit.database) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON audit_events BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(peewee.IntegrityError):
        reads.flush()
    with outside(audit.database) as other:
        other.execute("DROP TRIGGER full")
    assert reads.flush() == 1
    assert [count[2] for count in told(audit)] == [1]


@pytest.mark.sqlite
def test_a_read_that_cannot_be_counted_fails(tmp_path: Path, clock: StoppedClock) -> None:
    database = SqliteDatabase(tmp_path / "locked.db", busy_timeout=0.05)
    database.migrate()
    models.bind(database)
    reads = AccessReads(database, clock, Audit(database, clock))
    with outside(database) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable):
            reads.count("service:1", connection())
    clock.advance(MINUTE)
    assert reads.flush() == 0
    database.close()


def test_none_is_lost_or_told_twice_while_counts_are_moved(
    reads: AccessReads, audit: Audit, clock: StoppedClock
) -> None:
    threads, each = 6, 60

    def read(thread: int) -> None:
        for number in range(each):
            reads.count("service:1", connection(thread % 2 + 1))
            if thread == 0 and number % 10 == 9:
                clock.advance(MINUTE)

    with ThreadPoolExecutor(threads + 2) as pool:
        reading = [pool.submit(read, thread) for thread in range(threads)]
        moving = [pool.submit(lambda: [reads.flush() for _ in range(30)]) for _ in range(2)]
        for one in reading:
            one.result(60)
        assert sum(moved for one in moving for moved in one.result(60)) <= threads * each
    clock.advance(MINUTE)
    reads.flush()
    counts = told(audit)
    assert sum(count[2] for count in counts) == threads * each
    assert len({(who, what, minute) for who, what, _, _, _, minute in counts}) == len(counts)
    assert to_micros(clock.now()) % 60_000_000 == 0
    intact(audit, len(counts))
