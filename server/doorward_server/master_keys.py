"""The master keys of an installation: which are in use, and how another one takes the place of the first.

Imports `audit`, `crypto`, `models` and below.

A rotation may be killed at any instant: the next one goes on with the same key. The new key stands in the key file,
as its last line, before it is on record as used, and is on record before it becomes the first line, which seals. What
is sealed is then sealed anew in small transactions. A key is dropped from the file before its record goes; a record
of a key that nothing needs and that is not at hand is what a drop that was killed has left.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from doorward_server.audit import Audit
from doorward_server.clock import Clock
from doorward_server.crypto import (
    KEY_ID_BYTES,
    KEY_ID_FROM,
    CannotOpen,
    KeyRing,
    MasterKey,
    Place,
    is_key,
    key_lines,
    read_key_file,
)
from doorward_server.database import Database
from doorward_server.errors import OperatorError
from doorward_server.models import from_micros, to_micros

VARIABLE = "DOORWARD_MASTER_KEY"
_OPERATOR = "operator"
# Others wait for the database while a batch is written, which takes some milliseconds with its commit. SQLite has no
# queue: whoever waits looks again after up to 100 ms, and has to find it free, so it is left alone for longer.
_BATCH = 50
_PAUSE = 3  # times as long as the batch took
_USED = "SELECT key_id, first_used_at FROM master_keys"
_RECORD = "INSERT INTO master_keys (key_id, first_used_at) VALUES (?, ?)"
_FORGET = "DELETE FROM master_keys WHERE key_id = ?"
Progress = Callable[[int, int], None]


class SealedColumn(NamedTuple):
    """A column of sealed values, whose places are named for it; the statements are about those under some key."""

    table: str
    column: str

    @property
    def count_by_key(self) -> str:
        """The id of each key, and how many values are under it."""
        return f"SELECT {self._key_id}, count(*) FROM {self.table} WHERE {self._is_whole} GROUP BY {self._key_id}"  # noqa: S608 - constants only

    @property
    def select_others(self) -> str:
        """Some values that are not under a key: after a row's id, not under this key, so many."""
        return self._select(f"{self._key_id} <> ?")

    @property
    def select_under(self) -> str:
        """Some values that are under a key, as `select_others`."""
        return self._select(f"{self._key_id} = ?")

    @property
    def replace(self) -> str:
        """Put a value in the place of another, if that is still there."""
        return f"UPDATE {self.table} SET {self.column} = ? WHERE id = ? AND {self.column} = ? RETURNING id"  # noqa: S608 - constants only

    def place(self, row_id: int) -> Place:
        return Place(self.table, row_id, self.column)

    def _select(self, condition: str) -> str:
        return (
            f"SELECT id, {self.column} FROM {self.table} "  # noqa: S608 - constants only
            f"WHERE id > ? AND {self._is_whole} AND {condition} ORDER BY id LIMIT ?"
        )

    @property
    def _key_id(self) -> str:
        return f"substr({self.column}, {KEY_ID_FROM}, {KEY_ID_BYTES})"

    @property
    def _is_whole(self) -> str:
        """Whether there is a key's id at all, in a value that is neither unset nor cut off."""
        return f"length({self.column}) >= {KEY_ID_FROM + KEY_ID_BYTES - 1}"


# Every column whose values are sealed.
SEALED = (
    SealedColumn("providers", "client_secret"),
    SealedColumn("signing_secrets", "secret"),
    SealedColumn("api_keys", "value"),
    SealedColumn("connections", "access_token"),
    SealedColumn("connections", "refresh_token"),
    SealedColumn("jobs", "payload"),
)


@dataclass(frozen=True)
class KeyStatus:
    """What is known of a master key; `values` counts by table what is sealed with it."""

    id: str
    seals: bool
    is_at_hand: bool
    first_used_at: datetime | None
    values: Mapping[str, int]

    @property
    def is_missing(self) -> bool:
        """Whether values need it in vain."""
        return bool(self.values) and not self.is_at_hand


@dataclass(frozen=True)
class Rotation:
    """How a rotation ended.

    `needed` are the ids of the other keys that values still need, `unneeded` of those that nothing needs; `damaged`
    counts the values that no key opens, which stay as they are.
    """

    key_id: str
    resealed: int
    damaged: int
    needed: list[str]
    unneeded: list[str]


@dataclass(frozen=True)
class KeyFile:
    """Changes the key file: one whole file takes the place of another. Comments stay.

    Whoever changes it holds the database's writers' lock, so that no change is lost.
    """

    path: Path

    def append(self, key: MasterKey) -> None:
        """Add a key that opens, but does not seal."""
        self._write([*self._lines(), str(key)])

    def put_first(self, key_id: str) -> None:
        """Make a key of the file the one that seals."""
        lines = self._lines()
        [line, *_] = [line for line in lines if _is(line, key_id)]
        rest = [line for line in lines if not _is(line, key_id)]
        first = next((number for number, line in enumerate(rest) if is_key(line)), len(rest))
        self._write([*rest[:first], line, *rest[first:]])

    def remove(self, key_id: str) -> None:
        """Remove a key, if it is there."""
        lines = self._lines()
        rest = [line for line in lines if not _is(line, key_id)]
        if rest != lines:
            self._write(rest)

    def _lines(self) -> list[str]:
        text = read_key_file(self.path)
        KeyRing.parse(text, str(self.path))  # what is broken is not made worse
        return key_lines(text)

    def _write(self, lines: list[str]) -> None:
        """Durable before it returns. A link stays a link; an owner stays the owner, whoever runs the command."""
        target = self.path.resolve()
        # Its name is always the same, so that a killed command leaves no more than one behind.
        draft = target.with_name(f".{target.name}.new")
        try:
            owner = target.stat()
            draft.unlink(missing_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                if os.geteuid() != owner.st_uid:
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(descriptor)
            draft.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            raise OperatorError(
                f"cannot write the master key {self.path}: {error.strerror}. Its folder has to be writable, for a new "
                "file takes the place of the old one"
            ) from None


@dataclass(frozen=True)
class MasterKeys:
    """Owns the table `master_keys`, and changes the key file; `file` is None when the keys come from a variable."""

    database: Database
    clock: Clock
    keys: KeyRing
    file: KeyFile | None
    audit: Audit

    def record(self) -> None:
        """Write down that values are sealed with the first key; refuse to go on without a key that values need."""
        with self.database.writing():
            self.keys.follow()
            used = self._used()
            present = used.get(self.keys.sealing_id, self.clock.now())
            for key_id in sorted(used.keys() - set(self.keys.ids)):
                # A newer key than the one that seals here is another host's, which may seal with it at any moment.
                if used[key_id] > present or self._is_needed(key_id):
                    raise OperatorError(self._missing(key_id))
                self.database.execute(_FORGET, (key_id,))
            if self.keys.sealing_id not in used:
                self._record(self.keys.sealing_id, used)

    def status(self) -> list[KeyStatus]:
        """The keys that are at hand, were used or are needed: those at hand first, in order."""
        self.keys.follow()
        counts, used = self._count(), self._used()
        others = sorted((used.keys() | counts.keys()) - set(self.keys.ids))
        return [
            KeyStatus(
                id=key_id,
                seals=key_id == self.keys.sealing_id,
                is_at_hand=key_id in self.keys.ids,
                first_used_at=used.get(key_id),
                values=counts.get(key_id, {}),
            )
            for key_id in (*self.keys.ids, *others)
        ]

    def check(self, statuses: list[KeyStatus]) -> None:
        """Raise OperatorError when values need a key that is not at hand."""
        for status in statuses:
            if status.is_missing:
                raise OperatorError(self._missing(status.id))

    def add(self) -> str:
        """Add a key that does not seal yet, unless one waits already; returns its id."""
        if self.file is None:
            raise OperatorError(
                f"the master keys come from {VARIABLE}, which no command can change: add a key that "
                "`doorward master-key generate` prints to the end of it, after a comma"
            )
        self.record()
        with self.database.writing():
            self.keys.follow()
            last = self.keys.ids[-1]
            return last if last not in self._used() else self._append(self.file)

    def rotate(self, on_progress: Progress = lambda _done, _total: None) -> Rotation:
        """Seal with the newest key from now on, and seal anew what is under another one, while others go on.

        A key is made, unless one waits that has not sealed yet, or an earlier rotation has not ended. `on_progress`
        is told how many values were sealed anew, and about how many there are to be.
        """
        before = self.keys.ids
        self.record()
        self._begin(before)
        total = self._count_others()
        resealed = 0

        def progress(values: int) -> None:
            nonlocal resealed
            resealed += values
            on_progress(resealed, max(resealed, total))

        while self._reseal(progress):
            pass
        return self._outcome(resealed)

    def drop(self, key_id: str) -> None:
        """Forget a key that nothing needs. Raises OperatorError when values need it, or it seals."""
        self.keys.follow()
        self._check_unneeded(key_id)  # before anybody has to wait
        with self.database.writing():
            self.keys.follow()
            self._check_unneeded(key_id)
            if self.file is not None:
                self.file.remove(key_id)
            self.database.execute(_FORGET, (key_id,))
            self.audit.record(_OPERATOR, "master_key.dropped", f"master_key:{key_id}")

    def _check_unneeded(self, key_id: str) -> None:
        if key_id == self.keys.sealing_id:
            raise OperatorError(
                f"the master key {key_id} is the one that seals: `doorward master-key rotate` makes another one"
            )
        if key_id not in self.keys.ids and key_id not in self._used():
            raise OperatorError(f"there is no master key {key_id}: `doorward master-key status` lists them")
        if self._is_needed(key_id):
            if key_id not in self.keys.ids:
                raise OperatorError(self._missing(key_id))
            raise OperatorError(
                f"values need the master key {key_id}: `doorward master-key rotate` seals them with the first one"
            )

    # Rotation

    def _begin(self, before: list[str]) -> None:
        """Make the newest key the first one, after it was written down that it is used; these were at hand before."""
        is_settled = not self._count_others()
        with self.database.writing():
            self.keys.follow()
            newest = self._newest()
            # If the file is another one by now, another rotation has begun: this one helps it.
            if newest == self.keys.sealing_id and is_settled and self.keys.ids == before:
                newest = self._append(self._changeable())
            if newest not in (used := self._used()):
                self._record(newest, used)
                self.audit.record(_OPERATOR, "master_key.rotated", f"master_key:{newest}")
        # Inside the writers' lock: whoever sealed with the key before has committed, and all others see the new one.
        with self.database.writing():
            self.keys.follow()
            newest = self._newest()
            if self.file is not None and newest != self.keys.sealing_id:
                self.file.put_first(newest)
                self.keys.follow()

    def _newest(self) -> str:
        """The last key of the file, if it has not sealed yet; else the one that began to seal last."""
        ids, used = self.keys.ids, self._used()
        if self.file is None:
            return ids[0]
        if ids[-1] not in used:
            return ids[-1]
        return max((key_id for key_id in ids if key_id in used), key=lambda key_id: used[key_id])

    def _changeable(self) -> KeyFile:
        if self.file is None:
            raise OperatorError(
                f"all values are sealed with the first key of {VARIABLE}, which no command can change: put a key that "
                "`doorward master-key generate` prints before it, keep this one behind it, after a comma, restart all "
                "that runs, and do this again"
            )
        return self.file

    def _append(self, file: KeyFile) -> str:
        key = MasterKey.generate()
        file.append(key)
        self.keys.follow()
        return key.id

    def _reseal(self, progress: Callable[[int], None]) -> bool:
        """Seal anew what is not under the first key; whether there may be more, for some of it changed meanwhile."""
        changed = False
        for column in SEALED:
            for batch in self._batches(column.select_others, self.keys.sealing_id):
                anew = [
                    (resealed, row_id, sealed)
                    for row_id, sealed in batch
                    if (resealed := self._rewrapped(column, row_id, sealed)) is not None
                ]
                done = self._replace(column, anew)
                changed = changed or done < len(anew)
                progress(done)
        return changed

    def _replace(self, column: SealedColumn, anew: list[tuple[bytes, int, bytes]]) -> int:
        """Store values anew, but those that are not what they were; returns how many."""
        began = time.monotonic()
        with self.database.writing():
            done = sum(self.database.execute(column.replace, values) is not None for values in anew)
        time.sleep(_PAUSE * (time.monotonic() - began))
        return done

    def _rewrapped(self, column: SealedColumn, row_id: int, sealed: bytes) -> bytes | None:
        """The value under the first key; None if it does not open, and so cannot be helped."""
        try:
            return self.keys.rewrap(sealed, column.place(row_id))
        except CannotOpen:
            return None

    def _batches(self, select: str, key_id: str) -> Iterator[list[tuple[int, bytes]]]:
        last = 0
        while rows := self.database.fetch_rows(select, (last, bytes.fromhex(key_id), _BATCH)):
            yield [(row_id, bytes(sealed)) for row_id, sealed in rows]
            last = rows[-1][0]

    def _outcome(self, resealed: int) -> Rotation:
        counts, used = self._count(), self._used()
        others = sorted((used.keys() | counts.keys() | set(self.keys.ids)) - {self.keys.sealing_id})
        needed = [key_id for key_id in others if self._is_needed(key_id)]
        unneeded = [key_id for key_id in others if key_id not in needed]
        damaged = sum(sum(counts.get(key_id, {}).values()) for key_id in unneeded)
        return Rotation(self.keys.sealing_id, resealed, damaged, needed, unneeded)

    # What is needed

    def _count(self) -> dict[str, dict[str, int]]:
        """By key and by table, how many values are sealed with it."""
        counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for column in SEALED:
            for key_id, number in self.database.fetch_rows(column.count_by_key, ()):
                counts[bytes(key_id).hex()][column.table] += number
        return {key_id: dict(tables) for key_id, tables in counts.items()}

    def _count_others(self) -> int:
        """How many values are not under the first key."""
        counts = self._count()
        return sum(sum(tables.values()) for key_id, tables in counts.items() if key_id != self.keys.sealing_id)

    def _is_needed(self, key_id: str) -> bool:
        """Whether a value opens with a key, or might, were it at hand."""
        is_at_hand = key_id in self.keys.ids
        return any(
            not is_at_hand or self._rewrapped(column, row_id, sealed) is not None
            for column in SEALED
            for batch in self._batches(column.select_under, key_id)
            for row_id, sealed in batch
        )

    def _used(self) -> dict[str, datetime]:
        """The keys that values were sealed with, and since when."""
        return {key_id: from_micros(at) for key_id, at in self.database.fetch_rows(_USED, ())}

    def _record(self, key_id: str, used: Mapping[str, datetime]) -> None:
        """Write down that a key is used, later than all others: clocks may go back."""
        latest = max(used.values(), default=None)
        now = self.clock.now()
        at = now if latest is None else max(now, latest + timedelta(microseconds=1))
        self.database.execute(_RECORD, (key_id, to_micros(at)))

    def _missing(self, key_id: str) -> str:
        return (
            f"values in the database {self.database.place} are sealed with the master key {key_id}, which is "
            f"not at hand (there is {', '.join(self.keys.ids)}): restore that key from a backup, as a further "
            "line of the key file"
        )


def _is(line: str, key_id: str) -> bool:
    return is_key(line) and MasterKey.parse(line).id == key_id


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
