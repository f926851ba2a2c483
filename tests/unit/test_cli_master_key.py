"""`doorward master-key` as operators meet it: output, exit codes, and no keys."""

import os
import pty
import subprocess
from pathlib import Path

import pytest

from doorward_server.crypto import KeyRing, MasterKey
from tests.processes import BIN, clean_environment
from tests.unit.command_line import (
    Done,
    Here,
    assert_tells,
    at_terminal,
    doorward,
    opened,
    result,
    write_key,
)

VALUE = "hunter2-sekret-value"


def ids(home: Path) -> list[str]:
    return KeyRing.read(home / "master.key").ids


def fill(home: Path, count: int = 1) -> None:
    """Store so many values; they are sealed with the first key."""
    with opened(home) as app:
        app.record_key()
        user = app.discord_users.obtain("123456789012345678")
        for number in range(count):
            app.api_keys.add(user, f"service-{number}", "main", f"{VALUE}-{number}", actor="test")


def values(home: Path) -> list[str]:
    with opened(home) as app:
        rows = app.database.fetch_rows("SELECT id FROM api_keys ORDER BY id", ())
        with app.database.writing():
            return list(app.api_keys.values([row_id for (row_id,) in rows]).values())


def assert_no_key(home: Path, done: Done) -> None:
    """What a command prints may end in a log."""
    lines = (home / "master.key").read_text().splitlines()
    assert not [line for line in lines if not line.startswith("#") and line in done.stdout + done.stderr]
    assert "doorward-key-1" not in done.stdout + done.stderr


# rotate


def test_rotate(home: Path, here: Here) -> None:
    fill(home, 3)
    [old] = ids(home)
    done = here(home, "master-key", "rotate")
    new, kept = ids(home)
    assert (done.returncode, kept) == (0, old)
    assert done.stdout == f"the master key {new} seals; values sealed anew: 3\n"
    assert f"`doorward master-key drop {old}`" in done.stderr
    assert_no_key(home, done)
    done = here(home, "master-key", "drop", old, "--yes")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dropped master key {old}\n", "")
    assert (ids(home), values(home)) == ([new], [f"{VALUE}-{number}" for number in range(3)])


def test_rotate_and_drop(home: Path, here: Here) -> None:
    fill(home)
    [old] = ids(home)
    done = here(home, "master-key", "rotate", "--drop")
    [new] = ids(home)
    assert (done.returncode, new == old) == (0, False)
    assert done.stderr == f"dropped master key {old}; keep it as long as backups from before the rotation\n"
    assert values(home) == [f"{VALUE}-0"]


@pytest.mark.parametrize("options", [(), ("--drop",)], ids=["keep", "drop"])
def test_rotate_as_json(home: Path, here: Here, options: tuple[str, ...]) -> None:
    fill(home, 2)
    [old] = ids(home)
    told = result(here(home, "master-key", "rotate", *options, "--json"))
    new = ids(home)[0]
    assert told == {
        "id": new,
        "resealed": 2,
        "damaged": 0,
        "needed": [],
        "unneeded": [old],
        "dropped": [old] if options else [],
    }


def test_damaged_values_are_told_of(home: Path, here: Here) -> None:
    fill(home, 2)
    with opened(home) as app, app.database.writing():
        app.database.execute("UPDATE api_keys SET value = substr(value, 1, 40) WHERE id = 1 RETURNING id", ())
    done = here(home, "master-key", "rotate")
    assert done.returncode == 0
    assert "values sealed anew: 1" in done.stdout
    assert "values that no key opens, for they are damaged: 1" in done.stderr


@pytest.mark.parametrize(
    ("terminal", "is_drawn"),
    [pytest.param("xterm", True, id="a terminal"), pytest.param("dumb", False, id="a dumb one")],
)
def test_a_bar_at_a_terminal(home: Path, terminal: str, is_drawn: bool) -> None:
    fill(home)
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [BIN / "doorward", "master-key", "rotate", "--json"],
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
        os.close(slave)
        os.close(master)
    assert done.returncode == 0
    assert ("sealing anew" in shown) == is_drawn


# A variable


def test_keys_of_a_variable(home: Path, here: Here) -> None:
    """The whole way: a new key is made, put first, rotated to, and the old one is dropped."""
    (home / "master.key").unlink()
    old = MasterKey.generate()

    def run(*words: str, keys: str) -> Done:
        return here(home, *words, environment={"DOORWARD_MASTER_KEY": keys})

    add = ("key", "add", "--discord-user", "1", "--service", "forum", "--label", "main", "--value-stdin")
    stored = here(home, *add, stdin=VALUE.encode(), environment={"DOORWARD_MASTER_KEY": str(old)})
    assert stored.returncode == 0
    for command in ("rotate", "add"):
        assert_tells(run("master-key", command, keys=str(old)), "DOORWARD_MASTER_KEY", "`doorward master-key generate`")
    new = run("master-key", "generate", keys=str(old)).stdout.strip()
    both = f"{new},{old}"
    assert_tells(run("master-key", "drop", old.id, "--yes", keys=both), f"values need the master key {old.id}")
    told = result(run("master-key", "rotate", "--json", keys=both))
    assert (told["id"], told["resealed"], told["unneeded"]) == (MasterKey.parse(new).id, 1, [old.id])
    assert run("master-key", "drop", old.id, "--yes", keys=both).returncode == 0
    listed = run("key", "list", "--discord-user", "1", keys=new)
    assert (listed.returncode, VALUE[-4:] in listed.stdout) == (0, True)
    assert not (home / "master.key").exists()


def test_a_generated_key_is_kept_nowhere(home: Path, here: Here) -> None:
    before = (home / "master.key").read_bytes()
    made = result(here(home, "master-key", "generate", "--json"))
    assert MasterKey.parse(made["key"]).id == made["id"]
    assert ((home / "master.key").read_bytes(), made["id"] in ids(home)) == (before, False)


# status


def test_status(home: Path, here: Here) -> None:
    fill(home, 2)
    [old] = ids(home)
    added = here(home, "master-key", "add")
    _, new = ids(home)
    assert added.stdout == f"added master key {new}\n"
    seals, waits = result(here(home, "master-key", "status", "--json"))
    assert {**seals, "first_used": None} == {
        "id": old,
        "seals": True,
        "at_hand": True,
        "first_used": None,
        "values": {"api_keys": 2},
    }
    assert waits == {"id": new, "seals": False, "at_hand": True, "first_used": None, "values": {}}
    done = here(home, "master-key", "status")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["id", old, new]
    assert "api keys: 2" in done.stdout
    assert_no_key(home, done)


def test_status_of_a_new_home(home: Path, here: Here) -> None:
    [key_id] = ids(home)
    expected = [{"id": key_id, "seals": True, "at_hand": True, "first_used": None, "values": {}}]
    assert result(here(home, "master-key", "status", "--json")) == expected


def test_a_key_that_is_needed_and_missing(home: Path, here: Here) -> None:
    fill(home)
    [lost] = ids(home)
    write_key(home, MasterKey.generate())
    done = here(home, "master-key", "status")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["id", *ids(home), lost]
    assert f"master key {lost}, which is not at hand" in done.stderr
    assert done.stderr.count("\n") == 1
    for command in (("rotate",), ("add",), ("drop", lost, "--yes")):
        assert_tells(here(home, "master-key", *command), f"master key {lost}, which is not at hand", "backup")


# drop


@pytest.mark.parametrize(
    ("which", "words"),
    [
        pytest.param("old", "values need the master key", id="a needed one"),
        pytest.param("new", "the one that seals", id="the sealing one"),
        pytest.param("00000000", "there is no master key 00000000", id="an unknown one"),
    ],
)
def test_no_key_is_dropped_that_something_needs(home: Path, here: Here, which: str, words: str) -> None:
    fill(home)
    [old] = ids(home)
    new = MasterKey.generate()
    text = (home / "master.key").read_text()
    (home / "master.key").write_text(f"{new}\n{text}")
    key_id = {"old": old, "new": new.id}.get(which, which)
    assert_tells(here(home, "master-key", "drop", key_id, "--yes"), words)
    assert ids(home) == [new.id, old]


def test_drop_asks_first(home: Path) -> None:
    fill(home)
    [old] = ids(home)
    assert doorward(home, "master-key", "rotate").returncode == 0
    assert_tells(doorward(home, "master-key", "drop", old), "--yes")
    drop = ("master-key", "drop", old)
    assert at_terminal(home, *drop, prompt="[y/n]", typed="n\n").returncode == 1
    assert len(ids(home)) == 2
    done = at_terminal(home, *drop, prompt="[y/n]", typed="y\n")
    assert (done.returncode, done.stdout) == (0, f"dropped master key {old}\n")
    assert len(ids(home)) == 1


def test_a_file_that_cannot_be_used_is_not_made_worse(home: Path, here: Here) -> None:
    fill(home)
    path = home / "master.key"
    path.chmod(0o640)
    before = path.read_bytes()
    for command in (("status",), ("rotate",), ("add",), ("drop", "00000000", "--yes")):
        assert_tells(here(home, "master-key", *command), f"`chmod 600 {path}`")
    assert path.read_bytes() == before


def test_a_key_that_was_added_waits(home: Path, here: Here) -> None:
    """Adding again adds no other one."""
    for _ in range(2):
        told = result(here(home, "master-key", "add", "--json"))
        assert [told["id"]] == ids(home)[1:]
