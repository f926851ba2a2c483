"""The audit trail: who did what, each event chained to the one before by its hash.

Owns the tables `audit_events`, which triggers keep append-only, and `access_reads`. Imports `models` and below.

Actors and subjects are `KIND:ID`: `user:7`, `client:dwc_...`, `application:...`, `service:3` (a service token),
`connection:5`; the operator at the command line is `operator`.
"""

import builtins
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import OperatorError
from doorward_server.models import AuditEvent, Connection, from_micros, to_micros

# What the first event is chained to, and the head of an empty trail.
_START = bytes(32)
_HEAD = "SELECT id, hash FROM audit_events ORDER BY id DESC LIMIT 1"
_APPEND = "INSERT INTO audit_events (id, at, actor, action, subject, details, hash) VALUES (?, ?, ?, ?, ?, ?, ?)"
_LAST_ID = "SELECT max(id) FROM audit_events"
# As bytes: what somebody wrote past us need not be UTF-8.
_WALK = """
SELECT id, at, CAST(actor AS BLOB), CAST(action AS BLOB), CAST(subject AS BLOB), CAST(details AS BLOB), hash
FROM audit_events WHERE id >= ? ORDER BY id LIMIT ?
"""
_WALK_ROWS = 1000
_LOWEST_ID = -(2**63)

_COUNT = """
INSERT INTO access_reads (minute, caller, connection_id, user_id, provider, count) VALUES (?, ?, ?, ?, ?, 1)
ON CONFLICT (minute, caller, connection_id) DO UPDATE SET count = access_reads.count + 1
"""
_OVER = """
SELECT id, minute, caller, connection_id, user_id, provider, count FROM access_reads WHERE minute < ?
ORDER BY minute, id LIMIT 1
"""
_FORGET = "DELETE FROM access_reads WHERE id = ?"
_MINUTE = 60_000_000
# Others wait for the database meanwhile.
_FLUSH_ROWS = 100

_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verdict:
    """What a walk along the chain found; hashes are hexadecimal.

    `rows` is how many events stand in an unbroken chain from the first one, `head` the hash of the last of these.
    `broken_at` is the id of the first row that is not the next event, `problem` says why. `has_head` tells whether
    the chain holds the head that was asked for; it is true when none was.
    """

    rows: int
    head: str
    broken_at: int | None
    problem: str | None
    has_head: bool

    @property
    def is_intact(self) -> bool:
        return self.broken_at is None and self.has_head


@dataclass(frozen=True)
class Audit:
    """Appends to the trail, and tells what is in it."""

    database: Database
    clock: Clock

    def record(self, actor: str, action: str, subject: str, **details: Any) -> None:
        """Append an event, inside the caller's transaction: it is recorded if, and only if, the change is made.

        `details` are JSON values and never hold a secret; the callers see to it. The hash is the SHA-256 of the
        JSON array [hash of the event before in hexadecimal, id, at in microseconds, actor, action, subject, details
        as the stored JSON text], in ASCII and without blanks; the first event follows 64 zeros. Ids have no gaps.
        """
        if not self.database.engine.in_transaction():
            raise RuntimeError("an event is recorded in the transaction of what it tells of")
        last_id, previous = self.database.execute(_HEAD, ()) or (0, _START)
        event = (last_id + 1, to_micros(self.clock.now()), actor, action, subject, _encode(details))
        self.database.execute(_APPEND, (*event, _link(previous, event)))

    def list(
        self,
        limit: int,
        before: int | None = None,
        actor: str | None = None,
        subject: str | None = None,
        action: str | None = None,
    ) -> builtins.list[AuditEvent]:
        """The newest events, newest first; those with ids below `before` are the next page."""
        query = AuditEvent.select().order_by(AuditEvent.id.desc()).limit(limit)
        for column, wanted in (
            (AuditEvent.actor, actor),
            (AuditEvent.subject, subject),
            (AuditEvent.action, action),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if before is not None:
            query = query.where(AuditEvent.id < before)
        try:
            return self.database.fetch_all(query)
        except ValueError:  # its details are not JSON any more
            raise OperatorError("one of these events was altered: `doorward audit verify` tells which") from None

    def verify(self, head: str | None = None, on_progress: Progress | None = None) -> Verdict:
        """Walk the chain from its start, in batches; events may be appended meanwhile.

        A trail whose end was cut off is unbroken: who noted its `head` earlier finds that it is gone.
        `on_progress` is told how many rows were seen and how many there are, about.
        """
        wanted = bytes.fromhex(head) if head is not None else None
        (last_id,) = self.database.fetch_one(_LAST_ID, ()) or (None,)
        rows, previous, has_head = 0, _START, wanted in (None, _START)
        first = _LOWEST_ID  # an event may have been slipped in below the first one
        while batch := self.database.fetch_rows(_WALK, (first, _WALK_ROWS)):
            for row in batch:
                if problem := _problem(row, rows + 1, previous):
                    return Verdict(rows, previous.hex(), row[0], problem, has_head)
                rows, previous = rows + 1, row[-1]
                has_head = has_head or previous == wanted
            first = rows + 1
            if on_progress is not None:
                on_progress(rows, max(rows, last_id or 0))
        return Verdict(rows, previous.hex(), None, None, has_head)


@dataclass(frozen=True)
class AccessReads:
    """Counts who is given which connection's access token, by the minute: an event for each would drown the rest."""

    database: Database
    clock: Clock
    audit: Audit

    def count(self, caller: str, connection: Connection) -> None:
        """Count a read, durably, before the token is handed out.

        When it fails (StorageUnavailable), so does the call: no token leaves here unrecorded.
        """
        what = (connection.id, connection.user_id, connection.provider)
        # The minute is judged in the transaction, as `flush` does: nobody counts for one that was moved.
        self.database.write(lambda: self.database.execute(_COUNT, (self._minute(), caller, *what)))

    def flush(self) -> int:
        """Move the counts of the minutes that are over into the trail; returns how many."""
        moved = 0
        while self.database.fetch_one(_OVER, (self._minute(),)) is not None:
            moved += self.database.write(self._move)
        return moved

    def _move(self) -> int:
        """Move some, inside the caller's transaction."""
        for moved in range(_FLUSH_ROWS):
            row = self.database.execute(_OVER, (self._minute(),))
            if row is None:
                return moved
            row_id, minute, caller, connection_id, user_id, provider, count = row
            self.database.execute(_FORGET, (row_id,))
            self.audit.record(
                caller,
                "access_token.read",
                f"connection:{connection_id}",
                user=user_id,
                provider=provider,
                count=count,
                minute=from_micros(minute).isoformat(timespec="minutes"),
            )
        return _FLUSH_ROWS

    def _minute(self) -> int:
        """The start of the current minute, as it is stored."""
        now = to_micros(self.clock.now())
        return now - now % _MINUTE


def _link(previous: bytes, event: tuple[Any, ...]) -> bytes:
    """The hash of an event: its columns in order, but for the hash."""
    return hashlib.sha256(_encode([previous.hex(), *event]).encode()).digest()


def _problem(row: tuple[Any, ...], next_id: int, previous: bytes) -> str | None:
    """Why a row is not the event that follows the one with that hash; None: it is."""
    row_id, at, *texts, stored = row
    if row_id > next_id:
        return f"event {next_id} is missing before it"
    try:
        link = _link(previous, (row_id, at, *(text.decode() for text in texts)))
    except (TypeError, ValueError):  # of another type, or not UTF-8
        link = None
    return None if row_id == next_id and link == stored else "it was altered, inserted or moved"
