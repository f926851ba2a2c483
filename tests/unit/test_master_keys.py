"""The master keys of an installation: rotations that go on wherever they were cut off, and what is dropped when."""

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import peewee
import pytest

from doorward_server import models
from doorward_server.audit import Audit
from doorward_server.crypto import KeyRing, MasterKey, Place
from doorward_server.database import Database
from doorward_server.errors import OperatorError
from doorward_server.master_keys import SEALED, KeyFile, MasterKeys, Rotation, SealedColumn
from doorward_server.models import ApiKey, AuditEvent, Connection, MasterKeyUse, User
from tests.unit.conftest import StoppedClock

FIRST, SECOND, THIRD = (MasterKey(bytes([fill]) * 32) for fill in (1, 2, 3))
HEADER = "# Doorward's master key. Back it up apart from the database."
# What no master key is needed for: fingerprints, a text, and the chain of the audit trail.
NOT_SEALED = {"secret_hash", "token_hash", "code_hash", "state", "hash"}


class Installation:
    """A key file and a database, as one process after the other meets them."""

    def __init__(self, database: Database, clock: StoppedClock, path: Path) -> None:
        self.database = database
        self.clock = clock
        self.file = path
        self._numbers = itertools.count()
        self.user = User.create(slug="ada", name="Ada", created_at=clock.now())

    @property
    def lines(self) -> list[str]:
        """The key file, with ids in place of keys."""
        lines = self.file.read_text().splitlines()
        return [line if line.startswith("#") or not line else MasterKey.parse(line).id for line in lines]

    def write(self, *keys: MasterKey, header: str = HEADER) -> None:
        self.file.write_text("\n".join([header, *map(str, keys)]) + "\n")
        self.file.chmod(0o600)

    def keys(self) -> MasterKeys:
        """The master keys as a new process meets them; a moment later than the one before."""
        self.clock.advance(timedelta(seconds=1))
        audit = Audit(self.database, self.clock)
        return MasterKeys(self.database, self.clock, KeyRing.read(self.file), KeyFile(self.file), audit)

    def of_variable(self, *keys: MasterKey) -> MasterKeys:
        """The same, with the keys in DOORWARD_MASTER_KEY."""
        self.clock.advance(timedelta(seconds=1))
        return MasterKeys(self.database, self.clock, KeyRing(keys), None, Audit(self.database, self.clock))

    def fill(self, count: int, ring: KeyRing | None = None) -> None:
        """Store so many values, sealed by the file's first key, unless a ring is given."""
        ring = ring or KeyRing.read(self.file)
        with self.database.writing():
            for _ in range(count):
                number = next(self._numbers)
                key = ApiKey.create(
                    user=self.user,
                    service="game",
                    label="main",
                    value=b"",
                    permissions=[],
                    created_at=self.clock.now(),
                )
                sealed = ring.seal(f"value {number}", SealedColumn("api_keys", "value").place(key.id))
                ApiKey.update(value=sealed).where(ApiKey.id == key.id).execute()

    def values(self, *keys: MasterKey) -> list[str]:
        """All values, opened with these keys alone."""
        ring, column = KeyRing(keys), SealedColumn("api_keys", "value")
        return [ring.open(row.value, column.place(row.id)) for row in ApiKey.select().order_by(ApiKey.id)]

    def key(self, key_id: str) -> MasterKey:
        """A key of the file."""
        lines = [line for line in self.file.read_text().splitlines() if line and not line.startswith("#")]
        [key] = {key for key in map(MasterKey.parse, lines) if key.id == key_id}
        return key

    def recorded(self) -> list[str]:
        """The ids on record, in the order in which they were used first."""
        return [row.key_id for row in MasterKeyUse.select().order_by(MasterKeyUse.first_used_at)]


@pytest.fixture
def installation(database: Database, clock: StoppedClock, tmp_path: Path) -> Installation:
    installation = Installation(database, clock, tmp_path / "master.key")
    installation.write(FIRST)
    return installation


def test_every_sealed_column_is_known() -> None:
    found = {
        (model._meta.table_name, field.column_name)
        for model in models._MODELS
        for field in model._meta.sorted_fields
        if isinstance(field, peewee.BlobField) and field.column_name not in NOT_SEALED
    }
    assert found == {(column.table, column.column) for column in SEALED}


# rotate


@pytest.mark.parametrize("count", [0, 1, 49, 50, 51, 130])
def test_all_values_are_sealed_with_a_new_key(installation: Installation, count: int) -> None:
    installation.fill(count)
    told: list[tuple[int, int]] = []
    rotation = installation.keys().rotate(lambda done, total: told.append((done, total)))
    assert rotation == Rotation(rotation.key_id, count, 0, [], [FIRST.id])
    assert rotation.key_id != FIRST.id
    assert installation.lines == [HEADER, rotation.key_id, FIRST.id]
    assert installation.values(installation.key(rotation.key_id)) == [f"value {number}" for number in range(count)]
    assert installation.recorded() == [FIRST.id, rotation.key_id]
    assert all(total == count for _, total in told)
    assert [done for done, _ in told][-1:] == [count][: len(told)]


def test_every_column_is_sealed_anew(installation: Installation) -> None:
    """Both columns of a table, and values that are not set; the connection stays the same pair."""
    ring, now = KeyRing.read(installation.file), installation.clock.now()
    access, refresh = SealedColumn("connections", "access_token"), SealedColumn("connections", "refresh_token")
    for row_id, refresh_token in ((1, refresh.place(1)), (2, None)):
        Connection.create(
            id=row_id,
            user=installation.user,
            provider=f"p{row_id}",
            access_token=ring.seal("access", access.place(row_id)),
            refresh_token=ring.seal("refresh", refresh_token) if refresh_token else None,
            obtained_at=now,
            needs_reauth=False,
            lease_epoch=0,
            created_at=now,
        )
    rotation = installation.keys().rotate()
    assert rotation.resealed == 3
    new = KeyRing([installation.key(rotation.key_id)])
    one, other = Connection.select().order_by(Connection.id)
    assert [new.open(row.access_token, access.place(row.id)) for row in (one, other)] == ["access"] * 2
    assert one.refresh_token is not None
    assert (new.open(one.refresh_token, refresh.place(1)), other.refresh_token) == ("refresh", None)


def test_rotations_follow_one_another(installation: Installation) -> None:
    ids = [FIRST.id]
    for _ in range(3):
        installation.fill(2)
        ids.insert(0, installation.keys().rotate().key_id)
    assert installation.lines == [HEADER, *ids]
    assert len(set(ids)) == 4
    assert installation.values(installation.key(ids[0])) == [f"value {number}" for number in range(6)]
    assert [event.action for event in AuditEvent.select()] == ["master_key.rotated"] * 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("# mine\n\n{first}\n# below\n", ["# mine", "", "{new}", "{first}", "# below"], id="comments"),
        pytest.param("{first}", ["{new}", "{first}"], id="no line end"),
        pytest.param("{first}\r\n# x\r\n", ["{new}", "{first}", "# x"], id="CRLF"),
        pytest.param("  {first} ,{first}\n", ["{new}", "{first}", "{first}"], id="the same key twice, with a comma"),
    ],
)
def test_the_file_keeps_its_comments(installation: Installation, content: str, expected: list[str]) -> None:
    installation.file.write_text(content.format(first=FIRST))
    key_id = installation.keys().rotate().key_id
    assert installation.lines == [line.format(first=FIRST.id, new=key_id) for line in expected]
    assert installation.file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in installation.file.parent.iterdir() if "key" in path.name] == ["master.key"]


def test_a_linked_file_stays_a_link(installation: Installation, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    installation.file.rename(folder / "real.key")
    installation.file.symlink_to(folder / "real.key")
    installation.keys().rotate()
    assert installation.file.is_symlink()
    assert len(installation.lines) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_file_stays_its_owner_s(installation: Installation) -> None:
    os.chown(installation.file, 4711, 4712)
    installation.keys().rotate()
    status = installation.file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (4711, 4712, 0o600)


def test_what_a_killed_command_left_is_no_hindrance(installation: Installation) -> None:
    installation.file.with_name(".master.key.new").write_text("half a")
    installation.keys().rotate()
    assert not installation.file.with_name(".master.key.new").exists()


def test_a_folder_that_cannot_be_written_is_told_of(installation: Installation) -> None:
    installation.fill(1)
    installation.file.with_name(".master.key.new").mkdir()  # root may write anywhere, but not over this
    with pytest.raises(OperatorError, match=r"cannot write the master key .*master\.key: .*folder has to be writable"):
        installation.keys().rotate()
    assert installation.values(FIRST) == ["value 0"]
    assert installation.lines == [HEADER, FIRST.id]


# A rotation that was cut off


class Cut(BaseException):
    """The process ends here."""


def cut_after(batches: int) -> Callable[[int, int], None]:
    """Ends the process after so many batches."""
    left = itertools.count(batches, -1)

    def progress(_done: int, _total: int) -> None:
        if next(left) <= 1:
            raise Cut

    return progress


def appended(installation: Installation) -> None:
    """The new key stands in the file, and is not on record."""
    installation.keys().record()
    installation.write(FIRST, SECOND)


def recorded(installation: Installation) -> None:
    """It is on record, and not the first one."""
    appended(installation)
    MasterKeyUse.create(key_id=SECOND.id, first_used_at=installation.clock.now() + timedelta(seconds=1))


def put_first(installation: Installation) -> None:
    """It seals, and nothing is sealed anew."""
    recorded(installation)
    installation.write(SECOND, FIRST)


def put_first_by_hand(installation: Installation) -> None:
    """As operators do who know the file: it is not on record."""
    installation.keys().record()
    installation.write(SECOND, FIRST)


def half_done(installation: Installation) -> None:
    put_first(installation)
    with pytest.raises(Cut):
        installation.keys().rotate(cut_after(1))
    assert {row.value[1:5].hex() for row in ApiKey.select()} == {FIRST.id, SECOND.id}


@pytest.mark.parametrize("cut_off", [appended, recorded, put_first, put_first_by_hand, half_done])
def test_a_rotation_goes_on_with_its_key(installation: Installation, cut_off: Callable[[Installation], None]) -> None:
    installation.fill(130)
    cut_off(installation)
    rotation = installation.keys().rotate()
    assert (rotation.key_id, rotation.needed) == (SECOND.id, [])
    assert installation.lines == [HEADER, SECOND.id, FIRST.id]
    assert installation.recorded() == [FIRST.id, SECOND.id]
    assert installation.values(SECOND) == [f"value {number}" for number in range(130)]


def test_a_rotation_that_began_meanwhile_is_joined(installation: Installation) -> None:
    """The second of two that begin together makes no key, even when the first has finished by its turn."""
    installation.fill(3)
    second = installation.keys()
    key_id = installation.keys().rotate().key_id
    assert second.rotate().key_id == key_id
    assert installation.lines == [HEADER, key_id, FIRST.id]


class Meddling(KeyRing):
    """A ring that lets somebody else change values between the moments when one is read and stored."""

    changes: ClassVar[dict[int, Callable[[], object]]] = {}

    def rewrap(self, sealed: bytes, place: Place) -> bytes:
        self.changes.pop(place.row_id, lambda: None)()
        return super().rewrap(sealed, place)


def test_a_value_that_changes_meanwhile_is_left_alone(installation: Installation) -> None:
    """The newer value stays; one that is under the old key still is sealed anew after all."""
    installation.fill(120)
    column, old = SealedColumn("api_keys", "value"), KeyRing([FIRST])

    def change(row_id: int, ring: KeyRing) -> None:
        with installation.database.writing():
            sealed = ring.seal(f"newer {row_id}", column.place(row_id))
            ApiKey.update(value=sealed).where(ApiKey.id == row_id).execute()

    keys = replace(installation.keys(), keys=Meddling.read(installation.file))
    Meddling.changes = {
        10: lambda: change(10, old),
        60: lambda: change(60, KeyRing.read(installation.file)),
        120: lambda: ApiKey.delete().where(ApiKey.id == 120).execute(),
    }
    rotation = keys.rotate()
    assert Meddling.changes == {}
    assert (rotation.resealed, rotation.needed, rotation.unneeded) == (118, [], [FIRST.id])
    values = installation.values(installation.key(rotation.key_id))
    assert (values[9], values[59], len(values)) == ("newer 10", "newer 60", 119)


def test_what_is_sealed_with_the_old_key_behind_the_rotation_is_told_of(installation: Installation) -> None:
    """By a process that follows another key file: what it does cannot be known, but is found."""
    installation.fill(60)
    column, old = SealedColumn("api_keys", "value"), KeyRing([FIRST])

    def change(done: int, _total: int) -> None:
        if done == 50:
            ApiKey.update(value=old.seal("late", column.place(10))).where(ApiKey.id == 10).execute()

    rotation = installation.keys().rotate(change)
    assert (rotation.resealed, rotation.needed, rotation.unneeded) == (60, [FIRST.id], [])
    again = installation.keys().rotate()
    assert (again.key_id, again.resealed, again.needed) == (rotation.key_id, 1, [])
    assert installation.values(installation.key(rotation.key_id))[9] == "late"


def test_damaged_values_hold_up_nothing(installation: Installation) -> None:
    installation.fill(3)
    ApiKey.update(value=peewee.fn.substr(ApiKey.value, 1, 70)).where(ApiKey.id == 1).execute()
    ApiKey.update(value=b"\x01").where(ApiKey.id == 2).execute()
    rotation = installation.keys().rotate()
    assert (rotation.resealed, rotation.damaged, rotation.needed, rotation.unneeded) == (1, 1, [], [FIRST.id])
    installation.keys().drop(FIRST.id)


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(days=1)], ids=["stopped clock", "clock that went back"])
def test_the_newest_key_is_told_whatever_the_clock_says(installation: Installation, ahead: timedelta) -> None:
    installation.fill(1)
    installation.clock.advance(ahead)
    second = installation.keys().rotate().key_id
    installation.clock.advance(-ahead - timedelta(seconds=2))
    third = installation.keys().rotate().key_id
    assert installation.lines == [HEADER, third, second, FIRST.id]
    assert installation.keys().rotate().key_id not in (third, second, FIRST.id)


# Several hosts


def test_an_added_key_waits_until_it_is_rotated_to(installation: Installation) -> None:
    key_id = installation.keys().add()
    assert installation.keys().add() == key_id  # the one that waits
    assert installation.lines == [HEADER, FIRST.id, key_id]
    installation.fill(2)
    assert installation.values(FIRST) == ["value 0", "value 1"]
    assert installation.keys().rotate().key_id == key_id
    assert installation.lines == [HEADER, key_id, FIRST.id]
    assert installation.keys().add() != key_id


def test_two_hosts(installation: Installation, tmp_path: Path) -> None:
    """Each has a key file: the new key comes to both before it seals, and the old one leaves both in the end."""
    here, there = installation.file, tmp_path / "there.key"
    key_id = installation.keys().add()
    there.write_bytes(here.read_bytes())
    there.chmod(0o600)
    ring_there = KeyRing.read(there)
    installation.fill(3)
    assert installation.keys().rotate().unneeded == [FIRST.id]
    installation.fill(1, ring_there)  # the other host knows both, and seals with the old one
    assert len(installation.values(FIRST, installation.key(key_id))) == 4
    with pytest.raises(OperatorError, match=f"values need the master key {FIRST.id}"):
        installation.keys().drop(FIRST.id)
    installation.file = there
    assert installation.keys().rotate().key_id == key_id  # not back to its own first one
    assert installation.lines == [HEADER, key_id, FIRST.id]
    for file in (there, here):
        installation.file = file
        installation.keys().drop(FIRST.id)
        assert installation.lines == [HEADER, key_id]
        installation.keys().record()
    assert installation.values(installation.key(key_id)) == [f"value {number}" for number in range(4)]


def test_a_host_without_the_key_that_another_one_seals_with_does_not_start(
    installation: Installation, tmp_path: Path
) -> None:
    """Even before a value needs it: the next one may."""
    here, there = installation.file, tmp_path / "there.key"
    there.write_bytes(here.read_bytes())
    there.chmod(0o600)
    key_id = installation.keys().rotate().key_id
    installation.file = there
    with pytest.raises(OperatorError, match=f"master key {key_id}, which is not at hand"):
        installation.keys().record()
    assert installation.recorded() == [FIRST.id, key_id]


# A variable


def test_a_variable_s_first_key_is_rotated_to(installation: Installation) -> None:
    installation.of_variable(FIRST).record()
    installation.fill(3)
    rotation = installation.of_variable(SECOND, FIRST).rotate()
    assert rotation == Rotation(SECOND.id, 3, 0, [], [FIRST.id])
    assert installation.values(SECOND) == ["value 0", "value 1", "value 2"]
    installation.of_variable(SECOND, FIRST).drop(FIRST.id)
    assert installation.recorded() == [SECOND.id]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        pytest.param(MasterKeys.rotate, ["DOORWARD_MASTER_KEY", "generate`", "before it", "restart"], id="rotate"),
        pytest.param(MasterKeys.add, ["DOORWARD_MASTER_KEY", "generate`", "to the end"], id="add"),
    ],
)
def test_what_a_variable_makes_impossible_is_told(
    installation: Installation, command: Callable[[MasterKeys], object], words: list[str]
) -> None:
    installation.fill(1)
    with pytest.raises(OperatorError) as failure:
        command(installation.of_variable(FIRST))
    assert [word for word in words if word not in str(failure.value)] == []


# record, status, drop


def test_a_missing_key_is_named(installation: Installation) -> None:
    installation.fill(1)
    installation.keys().record()
    installation.write(SECOND)
    for attempt in (MasterKeys.record, MasterKeys.rotate, MasterKeys.add):
        with pytest.raises(OperatorError, match=f"master key {FIRST.id}, which is not at hand .*restore that key"):
            attempt(installation.keys())
    keys = installation.keys()
    [here, missing] = keys.status()
    assert (here.id, here.seals, here.is_at_hand, here.values, here.is_missing) == (SECOND.id, True, True, {}, False)
    assert (missing.id, missing.is_at_hand, missing.values, missing.is_missing) == (
        FIRST.id,
        False,
        {"api_keys": 1},
        True,
    )
    with pytest.raises(OperatorError, match=f"master key {FIRST.id}, which is not at hand"):
        keys.check([here, missing])
    with pytest.raises(OperatorError, match=f"master key {FIRST.id}, which is not at hand"):
        keys.drop(FIRST.id)


def test_a_drop_that_was_killed_is_finished_by_whoever_comes_next(installation: Installation) -> None:
    """The key is gone from the file, and still on record: nothing needs it, so nothing is missing."""
    installation.fill(1)
    key_id = installation.keys().rotate().key_id
    KeyFile(installation.file).remove(FIRST.id)
    installation.keys().record()
    assert installation.recorded() == [key_id]


def test_the_status_tells_what_each_key_is_needed_for(installation: Installation) -> None:
    installation.fill(3)
    installation.keys().record()
    with pytest.raises(Cut):
        installation.keys().rotate(cut_after(1))
    installation.fill(2)
    statuses = installation.keys().status()
    assert [(one.seals, one.is_at_hand, one.values) for one in statuses] == [
        (True, True, {"api_keys": 5}),
        (False, True, {}),
    ]
    assert all(one.first_used_at is not None for one in statuses)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        pytest.param(lambda new: new, "is the one that seals: `doorward master-key rotate`", id="the sealing one"),
        pytest.param(lambda _: FIRST.id, "values need the master key .* rotate`", id="a needed one"),
        pytest.param(lambda _: THIRD.id, "there is no master key .*`doorward master-key status`", id="an unknown one"),
        pytest.param(lambda _: "nonsense", "there is no master key", id="no id at all"),
    ],
)
def test_no_key_is_dropped_that_something_needs(
    installation: Installation, which: Callable[[str], str], words: str
) -> None:
    installation.fill(60)
    with pytest.raises(Cut):
        installation.keys().rotate(cut_after(1))
    new, _ = installation.keys().keys.ids
    with pytest.raises(OperatorError, match=words):
        installation.keys().drop(which(new))
    assert installation.lines == [HEADER, new, FIRST.id]
    assert installation.recorded() == [FIRST.id, new]


def test_an_unneeded_key_is_dropped(installation: Installation) -> None:
    installation.fill(1)
    key_id = installation.keys().rotate().key_id
    installation.keys().drop(FIRST.id)
    assert (installation.lines, installation.recorded()) == ([HEADER, key_id], [key_id])
    event = AuditEvent.select().order_by(AuditEvent.id.desc()).get()
    assert (event.actor, event.action, event.subject) == ("operator", "master_key.dropped", f"master_key:{FIRST.id}")
    assert installation.values(installation.key(key_id)) == ["value 0"]
