"""Backups: made while servers write, restored into a new home, with nothing lost that was answered before."""

import contextlib
import json
import os
import pty
import random
import signal
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from doorward_server.crypto import MasterKey
from tests.engines import Engines
from tests.processes import BIN, Process, await_condition, clean_environment, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.stack import Person, Stack, make_stack
from tests.unit.command_line import Here, assert_tells, doorward, opened, result, within, write_key


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    return within(capfd, monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a database of some 12 MB, so that a copy has many steps."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "doorward.toml").write_text("")
    write_key(home, MasterKey.generate())
    assert doorward(home, "user", "create", "--name", "Ada").returncode == 0
    with contextlib.closing(sqlite3.connect(home / "doorward.db")) as database:
        database.execute("CREATE TABLE ballast (noise BLOB)")
        database.executemany("INSERT INTO ballast VALUES (?)", ((random.randbytes(1 << 20),) for _ in range(12)))
        database.commit()
    return home


class Writers:
    """Threads that change a stack's database all the time, and know what they were told is done."""

    def __init__(self, stack: Stack) -> None:
        self._app = stack.app
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(4)]
        self.created: list[int] = []

    def _write(self, number: int) -> None:
        count = 0
        while not self._stopping.is_set():
            count += 1
            user = self._app.users.create(f"Writer {number} {count}")
            self.created.append(user.id)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join()


def restored(backup: Path, stack: Stack, home: Path, logs: Path, secrets: set[str]) -> Stack:
    """A new home that is made as docs/operating.md says: settings, the key, and the copy as the database."""
    home.mkdir(mode=0o700)
    for name in ("doorward.toml", "master.key"):
        (home / name).write_bytes((stack.home / name).read_bytes())
        (home / name).chmod(0o600)
    (home / "doorward.db").write_bytes(backup.read_bytes())
    return Stack(home, logs, stack.provider, secrets, _people=100)


@pytest.mark.sqlite
def test_what_was_answered_before_a_backup_is_in_it(
    tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]
) -> None:
    stack = make_stack(tmp_path / "home", logs, provider, secrets)
    backup = tmp_path / "backup.db"
    with stack.server():
        people = [stack.person() for _ in range(5)]
        for person in people:
            stack.connect(person)
        tokens = {person.slug: stack.app.integrations.access_token(person.slug, "flo").value for person in people}
        writers = Writers(stack)
        with writers.writing():
            await_condition(lambda: len(writers.created) > 50, "some writes")
            before = list(writers.created)
            made = stack.cli_json("backup", str(backup))
            after_end = len(writers.created)
            await_condition(lambda: len(writers.created) > after_end, "writes after the backup")
    assert made["bytes"] == backup.stat().st_size
    assert made["rows"]["connections"] == len(people)
    assert len(before) < made["rows"]["users"] <= len(writers.created) + len(people)

    new = restored(backup, stack, tmp_path / "new", logs, secrets)
    with new.server():
        known = {row[0] for row in new.app.database.fetch_rows("SELECT id FROM users", ())}
        assert set(before) <= known
        for person in people:
            assert_as_before(new, person, tokens[person.slug])
        verdict = new.cli_json("audit", "verify")
        assert verdict["intact"]
        assert verdict["rows"] == made["rows"]["audit_events"] > 0
        person = new.person()  # and it goes on
        new.connect(person)
        assert new.app.integrations.status(person.id, "flo")


def assert_as_before(stack: Stack, person: Person, token: str) -> None:
    assert stack.app.integrations.status(person.id, "flo")
    assert stack.app.integrations.access_token(person.slug, "flo").value == token
    assert stack.app.sessions.find(person.cookie) is not None


@pytest.mark.sqlite
def test_a_restore_needs_the_key(here: Here, home: Path, tmp_path: Path) -> None:
    with opened(home) as app:
        app.record_key()
        app.applications.create("Bot", ["https://bot.example/callback"], "form")
    assert here(home, "backup", str(tmp_path / "copy.db")).returncode == 0
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    write_key(other, MasterKey.generate())
    (other / "doorward.db").write_bytes((tmp_path / "copy.db").read_bytes())
    done = doorward(other, "serve", environment={"DOORWARD_GRPC_PORT": str(free_port())})
    assert_tells(done, "master key", "not at hand", "restore")


@pytest.mark.sqlite
def test_the_file_is_the_owners_and_whole_by_itself(here: Here, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    done = here(home, "backup", str(folder / "copy.db"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {folder / 'copy.db'}: 12.")
    assert "1 users, 0 connections" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["copy.db"]
    assert stat.S_IMODE((folder / "copy.db").stat().st_mode) == 0o600
    (folder / "copy.db").chmod(0o400)
    folder.chmod(0o500)
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'copy.db'}?mode=ro", uri=True)) as copy:
        assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert copy.execute("SELECT count(*) FROM ballast").fetchone() == (12,)
    folder.chmod(0o700)


@pytest.mark.sqlite
def test_the_master_key_is_not_in_it(here: Here, home: Path, tmp_path: Path) -> None:
    key = (home / "master.key").read_text().strip().rpartition(":")[2]
    with opened(home) as app:
        app.record_key()
    assert here(home, "backup", str(tmp_path / "copy.db")).returncode == 0
    assert key.encode() not in (tmp_path / "copy.db").read_bytes()


@pytest.mark.sqlite
@pytest.mark.parametrize("there", ["a file", "a link to nowhere"])
def test_what_exists_is_not_overwritten(here: Here, home: Path, tmp_path: Path, there: str) -> None:
    file = tmp_path / "copy.db"
    if there == "a file":
        file.write_text("precious")
    else:
        file.symlink_to(tmp_path / "nowhere")
    assert_tells(here(home, "backup", str(file)), f"{file} exists already: choose another name, or remove it")
    assert there != "a file" or file.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.sqlite
def test_a_name_that_is_taken_meanwhile_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "copies" / "copy.db"
    file.parent.mkdir()
    with copying(home, file, tmp_path / "log") as process:
        file.write_text("precious")
        process.signal(signal.SIGCONT)
        assert process.wait() == 1
    assert f"{file} exists already" in process.output()
    assert [path.name for path in file.parent.iterdir()] == ["copy.db"]
    assert file.read_text() == "precious"


@pytest.mark.sqlite
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_nothing_half_is_left(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "copies" / "copy.db"
    file.parent.mkdir()
    with copying(home, file, tmp_path / "log") as process:
        process.signal(number)
        process.signal(signal.SIGCONT)
        assert process.wait() != 0
    assert list(file.parent.iterdir()) == []
    assert "Traceback" not in process.output()


@contextlib.contextmanager
def copying(home: Path, file: Path, log: Path) -> Iterator[Process]:
    """A backup that is stopped in its midst: SIGSTOP as soon as a draft is there."""
    with running([BIN / "doorward", "backup", str(file)], log, {"DOORWARD_HOME": str(home)}) as process:
        await_condition(lambda: any(file.parent.iterdir()) or process.output() != "", "a draft")
        process.signal(signal.SIGSTOP)
        assert not file.exists(), "the copy was too quick to be stopped"
        try:
            yield process
        finally:
            process.signal(signal.SIGCONT)


@pytest.mark.sqlite
def test_a_full_disk_is_told(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    done = doorward(home, "backup", str(folder / "copy.db"), limit=2048)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        pytest.param("none", ("there is no database yet", "`doorward serve` makes it"), id="no database"),
        pytest.param("garbage", ("not a database", "restore a backup"), id="not a database"),
        pytest.param("torn", ("is damaged (", "restore a backup"), id="a page is torn"),
    ],
)
def test_what_cannot_be_copied_is_told(
    here: Here, home: Path, tmp_path: Path, spoil: str, parts: tuple[str, ...]
) -> None:
    database, folder = home / "doorward.db", tmp_path / "copies"
    folder.mkdir()
    if spoil == "none":
        database.unlink()
    elif spoil == "garbage":
        database.write_bytes(b"garbage" * 1000)
    else:
        with database.open("r+b") as file:
            for page in range(2, 12):
                file.seek(4096 * page)
                file.write(os.urandom(4096))
    assert_tells(here(home, "backup", str(folder / "copy.db")), *parts)
    assert list(folder.iterdir()) == []
    assert spoil != "none" or not database.exists()


@pytest.mark.sqlite
def test_a_folder_that_is_missing_is_told(here: Here, home: Path, tmp_path: Path) -> None:
    assert_tells(here(home, "backup", str(tmp_path / "no" / "copy.db")), "No such file or directory", "Make its folder")


@pytest.mark.sqlite
def test_an_older_schema_is_copied_as_it_is(here: Here, home: Path, tmp_path: Path) -> None:
    """So that one may go back to the version before."""
    with contextlib.closing(sqlite3.connect(home / "doorward.db")) as database:
        newest = database.execute("DELETE FROM schema_migration WHERE name LIKE '0004%'")
        assert newest.rowcount == 1
        [(left,)] = database.execute("SELECT count(*) FROM schema_migration")
        database.commit()
    made = result(here(home, "backup", str(tmp_path / "copy.db"), "--json"))
    assert made["rows"]["schema_migration"] == left


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("terminal", "is_drawn"),
    [
        pytest.param("xterm", True, id="a terminal"),
        pytest.param("dumb", False, id="a dumb one"),
        pytest.param(None, False, id="none"),
    ],
)
def test_a_bar_at_a_terminal(home: Path, tmp_path: Path, terminal: str | None, is_drawn: bool) -> None:
    master, slave = pty.openpty()
    try:
        done = subprocess.run(
            [BIN / "doorward", "backup", str(tmp_path / "copy.db"), "--json"],
            env=clean_environment({"DOORWARD_HOME": str(home), "TERM": terminal or "xterm", "COLUMNS": "80"}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=slave if terminal else subprocess.STDOUT,
            timeout=60,
            check=True,
        )
        os.write(slave, b"\n")  # so that there is something to read
        shown = os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert json.loads(done.stdout)["file"] == str(tmp_path / "copy.db")
    assert ("copying" in shown) == is_drawn
    assert is_drawn or not shown.strip()


def test_a_server_has_a_program_of_its_own_for_that(here: Here, home: Path, tmp_path: Path, engines: Engines) -> None:
    url = {"DOORWARD_DATABASE_URL": engines.server.new_database()}
    file = tmp_path / "copy.db"
    assert_tells(here(home, "backup", str(file), environment=url), "PostgreSQL", "pg_dump")
    assert not file.exists()
