"""The command line as operators meet it: real processes, their output, exit codes and files."""

import contextlib
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.cli.root import cli
from doorward_server.crypto import KeyRing, MasterKey
from doorward_server.database import SqliteDatabase
from tests.processes import BIN, await_condition, clean_environment, free_port, running
from tests.unit.command_line import Here, assert_tells, doorward, write_key

MIGRATIONS = sorted(
    path.name.removesuffix(".py")
    for path in (resources("doorward_server") / "migrations").iterdir()
    if path.name[:4].isdigit()
)


def files(home: Path) -> dict[str, tuple[int, int, bytes]]:
    """The files of a home: mode, time of the last change, content."""
    return {
        path.name: (stat.S_IMODE(path.stat().st_mode), path.stat().st_mtime_ns, path.read_bytes())
        for path in home.iterdir()
    }


# init


def test_init_makes_a_private_home_once(tmp_path: Path, here: Here) -> None:
    home = tmp_path / "deep" / "home"
    first = doorward(home, "init", "--json")
    assert (first.returncode, first.stderr) == (0, "")
    key_id = KeyRing.read(home / "master.key").sealing_id
    created = [home, home / "doorward.toml", home / "master.key"]
    assert json.loads(first.stdout) == {"id": key_id, "home": str(home), "created": [str(path) for path in created]}
    made = files(home)
    assert {name: mode for name, (mode, _, _) in made.items()} == {"doorward.toml": 0o600, "master.key": 0o600}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert str(KeyRing.read(home / "master.key").ids[0]) not in made["doorward.toml"][2].decode()

    again = here(home, "init")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"nothing to do: {home} has all it needs\n"
    assert files(home) == made


def test_init_names_what_it_made(tmp_path: Path, here: Here) -> None:
    home = tmp_path / "home"
    done = here(home, "init")
    [*created, ready] = done.stdout.splitlines()
    assert created == [f"created {path}" for path in (home, home / "doorward.toml", home / "master.key")]
    assert ready == f"ready: {home} (master key {KeyRing.read(home / 'master.key').sealing_id})"


@pytest.mark.parametrize("source", ["-", "file"])
def test_init_copies_settings(tmp_path: Path, source: str, here: Here) -> None:
    home, text = tmp_path / "home", "# é\n[grpc]\nport = 50052\n".encode()
    (tmp_path / "settings.toml").write_bytes(text)
    name = "-" if source == "-" else str(tmp_path / "settings.toml")
    done = here(home, "init", "--settings", name, stdin=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert (home / "doorward.toml").read_bytes() == text
    assert stat.S_IMODE((home / "doorward.toml").stat().st_mode) == 0o600


def test_init_keeps_what_is_there(home: Path, here: Here) -> None:
    (home / "doorward.toml").write_text("# mine\n")
    before = files(home)
    done = here(home, "init", "--settings", "-", stdin=b"# other\n")
    assert done.returncode == 0
    assert files(home) == before


def test_init_needs_no_key_file_when_the_environment_holds_the_key(tmp_path: Path, here: Here) -> None:
    key = MasterKey.generate()
    done = here(tmp_path / "home", "init", "--json", environment={"DOORWARD_MASTER_KEY": str(key)})
    assert json.loads(done.stdout)["id"] == key.id
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["doorward.toml"]


def open_when_read(fifo: Path) -> int:
    """The writing end of a FIFO, as soon as somebody reads it."""
    ends: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):
            ends.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    await_condition(is_read, f"a reader of {fifo}")
    return ends[0]


def test_racing_inits_agree_on_one_key(tmp_path: Path) -> None:
    """All read their settings from FIFOs, so that all have found neither settings nor key."""
    home = tmp_path / "home"
    home.mkdir()
    fifos = [tmp_path / f"fifo{number}" for number in range(3)]
    with contextlib.ExitStack() as stack:
        racers = []
        for fifo in fifos:
            os.mkfifo(fifo)
            command: list[str | Path] = [BIN / "doorward", "--home", home, "init", "--json", "--settings", fifo]
            pipe = subprocess.PIPE
            racers.append(
                stack.enter_context(
                    subprocess.Popen(command, env=clean_environment({}), stdout=pipe, stderr=pipe, text=True)
                )
            )
        for end in [open_when_read(fifo) for fifo in fifos]:
            os.close(end)
        outcomes = [racer.communicate(timeout=60) for racer in racers]
    assert [(racer.returncode, errors) for racer, (_, errors) in zip(racers, outcomes, strict=True)] == [(0, "")] * 3
    assert {json.loads(output)["id"] for output, _ in outcomes} == {KeyRing.read(home / "master.key").sealing_id}
    assert sorted(path.name for path in home.iterdir()) == ["doorward.toml", "master.key"]


def test_init_with_wrong_settings_can_be_repeated_with_right_ones(tmp_path: Path, here: Here) -> None:
    home = tmp_path / "home"
    assert_tells(here(home, "init", "--settings", "-", stdin=b"[grpc]\nprot = 1\n"), "[grpc] prot")
    assert here(home, "init", "--settings", "-", stdin=b"[grpc]\nport = 1\n").returncode == 0


@pytest.mark.parametrize(
    ("source", "stdin_errors", "sentence"),
    [
        pytest.param("{folder}/missing.toml", "strict", "cannot read {source}: No such file", id="missing"),
        pytest.param("{folder}", "strict", "cannot read {source}: Is a directory", id="directory"),
        pytest.param("{folder}/binary.toml", "strict", "{source} is not UTF-8 text", id="binary"),
        pytest.param("-", "strict", "standard input is not UTF-8 text", id="binary stdin"),
        # What Python does with standard input where the locale is C, POSIX or C.UTF-8.
        pytest.param("-", "surrogateescape", "standard input is not UTF-8 text", id="binary stdin, C locale"),
    ],
)
def test_init_with_settings_that_cannot_be_read(
    tmp_path: Path, source: str, stdin_errors: str, sentence: str, here: Here
) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    name = source.format(folder=tmp_path)
    done = here(tmp_path / "home", "init", "--settings", name, stdin=b"\xff\xfe", stdin_errors=stdin_errors)
    assert_tells(done, f"--settings: {sentence.format(source=name)}")
    assert [path.name for path in (tmp_path / "home").iterdir()] == []


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("file", ("the home {home} is a file", "set DOORWARD_HOME or --home")),
        ("file/home", ("{home}: Not a directory",)),
    ],
    ids=["file", "below"],
)
def test_init_where_a_file_is(tmp_path: Path, place: str, parts: tuple[str, ...], here: Here) -> None:
    (tmp_path / "file").write_text("mine")
    home = tmp_path / place
    assert_tells(here(home, "init"), *(part.format(home=home) for part in parts))
    assert (tmp_path / "file").read_text() == "mine"


# The whole tree of commands


def commands() -> Iterator[tuple[str, ...]]:
    """The words of every command."""
    tree: list[tuple[tuple[str, ...], Any]] = [((), get_command(cli))]
    while tree:
        words, command = tree.pop()
        if children := getattr(command, "commands", None):
            tree += [((*words, name), child) for name, child in children.items()]
        else:
            yield words


COMMANDS = sorted(commands())


def test_the_commands() -> None:
    assert {words[0] for words in COMMANDS} >= {
        "init",
        "serve",
        "migrate",
        "user",
        "session",
        "client",
        "provider",
        "token",
        "app",
        "key",
        "consent",
        "delivery",
        "audit",
        "master-key",
        "work",
        "backup",
        "doctor",
        "connection",
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_json_and_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit) as end:
            cli([*words, option], prog_name="doorward")
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "--json" in shown
        assert "Example: " in shown
        assert " ".join(("doorward", *words)) in shown.partition("Example: ")[2]


def test_help_as_a_process() -> None:
    done = doorward(None, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Settings: doorward.toml" in done.stdout


def test_version() -> None:
    done = doorward(None, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"doorward {version('doorward')}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="no command"),
        pytest.param(("nothing",), id="unknown command"),
        pytest.param(("user",), id="half a command"),
        pytest.param(("user", "create"), id="missing option"),
        pytest.param(("user", "create", "--nam", "x", "--nope"), id="unknown option"),
        pytest.param(("session", "revoke", "x"), id="not a number"),
        pytest.param(("token", "create", "--role", "king"), id="unknown choice"),
        pytest.param(("token", "create", "--role", "bot", "--days", "0"), id="out of range"),
        pytest.param(("serve", "more"), id="too many arguments"),
        *(pytest.param(("serve", "--workers", number), id=f"{number} workers") for number in ("0", "65", "two")),
        pytest.param(("client", "create"), id="client without a name"),
        *(
            pytest.param(("client", "rotate", "dwc_x", "--overlap-hours", hours), id=f"overlap of {hours} hours")
            for hours in ("-1", "8761", "nan", "inf", "soon")
        ),
        pytest.param(("provider", "add", "--lookup-url", "https://x.example/{access_token}"), id="provider without id"),
        pytest.param(("provider", "add", "x", "--kind", "king"), id="unknown kind"),
        pytest.param(("provider", "add", "x", "--token-auth", "magic"), id="unknown token auth"),
        pytest.param(("provider", "add", "x", "--token-method", "put"), id="unknown token method"),
        pytest.param(("provider", "add", "x", "--timeout", "soon"), id="timeout that is no number"),
        pytest.param(("provider", "add", "x", "--client-secret", "x"), id="secret as an argument"),
        pytest.param(("user", "export", "ada", "--output", "/"), id="export to a folder"),
    ],
)
def test_wrong_usage_exits_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli(["--home", str(tmp_path), *words], prog_name="doorward")
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert (shown.out + shown.err).strip()
    assert list(tmp_path.iterdir()) == []


# What is printed


def test_json_prints_one_value_and_errors_go_to_stderr(home: Path, here: Here) -> None:
    user = here(home, "user", "create", "--name", "Ada Lovelace", "--email", "ada@example.org", "--json")
    assert user.stderr == ""
    made = json.loads(user.stdout)
    assert user.stdout.count("\n") == 1
    assert {**made, "created": None} == {
        "id": 1,
        "slug": "ada-lovelace",
        "name": "Ada Lovelace",
        "email": "ada@example.org",
        "created": None,
    }
    assert_tells(here(home, "user", "create", "--name", "ada lovelace", "--json"), "the same slug")
    assert json.loads(here(home, "session", "list", "--json").stdout) == []


@pytest.mark.sqlite
def test_the_home_given_beats_the_environment(home: Path, tmp_path: Path, here: Here) -> None:
    other = tmp_path / "other"
    done = here(other, "--home", str(home), "migrate", "--json")
    assert json.loads(done.stdout) == {"applied": MIGRATIONS}
    assert (home / "doorward.db").is_file()
    assert not other.exists()


@pytest.mark.sqlite
def test_migrate_once(home: Path, here: Here) -> None:
    assert here(home, "migrate").stdout == "".join(f"applied {name}\n" for name in MIGRATIONS)
    assert here(home, "migrate").stdout == "the schema is up to date\n"
    assert json.loads(here(home, "migrate", "--json").stdout) == {"applied": []}


def test_any_token_name_can_be_listed(home: Path, here: Here) -> None:
    name = "[/b] [red]shop"
    assert here(home, "token", "create", "--role", "bot", "--name", name).returncode == 0
    done = here(home, "token", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert name in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("user", "create", "--name", "Ada", "--email", "\udcff@example.org"),
        ("session", "create", "--user", "\udcff"),
        ("token", "create", "--role", "bot", "--name", "\udcff"),
        ("client", "create", "--name", "\udcff"),
        ("client", "rotate", "\udcff"),
        ("provider", "add", "\udcff", "--lookup-url", "https://x.example/{access_token}"),
        ("provider", "show", "\udcff"),
        ("user", "create", "--name", "\udcff"),
        ("user", "show", "\udcff"),
        ("user", "delete", "--yes", "\udcff"),
    ],
    ids=" ".join,
)
def test_arguments_that_are_no_utf_8(home: Path, words: tuple[str, ...], here: Here) -> None:
    assert_tells(here(home, *words))


# serve, when it cannot


@pytest.mark.parametrize("command", ["serve", "work"])
def test_serve_without_a_key(home: Path, here: Here, command: str) -> None:
    (home / "master.key").unlink()
    assert_tells(here(home, command), f"{home}/master.key", "DOORWARD_MASTER_KEY", "`doorward init`")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param(b"hunter2\n", "not a master key", id="foreign"),
        pytest.param(str(MasterKey(b"\1" * 32)).replace(":AQEB", ":AQEC").encode(), "damaged", id="damaged"),
        pytest.param(b"\xff\xfe\x00", "not a master key", id="binary"),
        pytest.param(b"", "holds no master key", id="empty"),
    ],
)
def test_serve_with_a_corrupt_key(home: Path, content: bytes, part: str, here: Here) -> None:
    (home / "master.key").write_bytes(content)
    done = here(home, "serve")
    assert_tells(done, f"{home}/master.key", part, "backup")
    assert "hunter2" not in done.stderr


def test_serve_with_a_key_that_others_can_read(home: Path, here: Here) -> None:
    (home / "master.key").chmod(0o644)
    assert_tells(here(home, "serve"), f"`chmod 600 {home}/master.key`")


def test_serve_with_another_key_than_before(home: Path, here: Here) -> None:
    """The server writes down its key before it listens; that its port is taken ends it thereafter."""
    used, other = KeyRing.read(home / "master.key").sealing_id, MasterKey.generate()
    with taken_port() as environment:
        assert_tells(doorward(home, "serve", environment=environment), "the port is in use")
        add_key = ("key", "add", "--discord-user", "1", "--service", "forum", "--label", "main", "--value-stdin")
        assert here(home, *add_key, stdin=b"value").returncode == 0
        write_key(home, other)
        refused = here(home, "serve", environment=environment)
    place = App(settings_module.load(home)).database.place
    assert_tells(refused, place, f"master key {used}", other.id, "backup", "key file")


@contextlib.contextmanager
def taken_port() -> Iterator[dict[str, str]]:
    """The environment with a port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield {"DOORWARD_GRPC_PORT": str(listener.getsockname()[1])}


def test_serve_on_a_taken_port(home: Path) -> None:
    with taken_port() as environment:
        done = doorward(home, "serve", environment=environment)
    port = environment["DOORWARD_GRPC_PORT"]
    assert_tells(done, f"127.0.0.1:{port}", "in use", "DOORWARD_GRPC_PORT")
    assert not list(home.glob("*.sock"))


def test_serve_on_a_taken_socket(home: Path) -> None:
    path = home / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        environment = {"DOORWARD_GRPC_PORT": str(free_port()), "DOORWARD_GRPC_SOCKET": str(path)}
        done = doorward(home, "serve", environment=environment)
    assert_tells(done, str(path), "another server", "DOORWARD_GRPC_SOCKET")
    assert path.exists()


def test_serve_on_a_socket_in_no_folder(home: Path) -> None:
    environment = {"DOORWARD_GRPC_PORT": str(free_port()), "DOORWARD_GRPC_SOCKET": str(home / "no" / "x.sock")}
    done = doorward(home, "serve", environment=environment)
    assert_tells(done, f"{home}/no/x.sock", "DOORWARD_GRPC_SOCKET")


def test_serve_with_wrong_settings(home: Path, here: Here) -> None:
    (home / "doorward.toml").write_text("[grpc]\nprot = 1\n")
    assert_tells(here(home, "serve"), f"{home}/doorward.toml", "did you mean port?")


@pytest.mark.parametrize(
    ("words", "variable"),
    [(("--workers", "2"), ""), ((), "2"), (("--workers", "2"), "1")],
    ids=["option", "setting", "option over setting"],
)
def test_serve_with_several_workers_on_one_socket(
    home: Path, here: Here, words: tuple[str, ...], variable: str
) -> None:
    environment = {"DOORWARD_GRPC_SOCKET": str(home / "x.sock"), "DOORWARD_WORKERS": variable}
    assert_tells(here(home, "serve", *words, environment=environment), "DOORWARD_GRPC_SOCKET", "set workers to 1")


def test_serve_with_one_worker_is_an_ordinary_server(home: Path) -> None:
    with taken_port() as environment:
        done = doorward(home, "serve", "--workers", "1", environment=environment | {"DOORWARD_WORKERS": "2"})
    assert_tells(done, "the port is in use")


# The work, by whom it is done


def test_the_work_is_left_to_those_who_do_it(home: Path, tmp_path: Path, here: Here) -> None:
    """A server that is told not to leaves a job alone, and a worker does it."""
    assert here(home, "init").returncode == 0
    app = App(settings_module.load(home))
    with app.database.writing():
        app.jobs.queue("unknown", {})
    app.database.close()
    environment = {"DOORWARD_HOME": str(home), "DOORWARD_GRPC_PORT": str(free_port())}
    logs = [tmp_path / "serve.log", tmp_path / "work.log"]
    with running([BIN / "doorward", "serve", "--no-work"], logs[0], environment) as server:
        server.await_output('"serving"')
        with running([BIN / "doorward", "work", "--json"], logs[1], environment) as worker:
            worker.await_output('"job abandoned"')
            assert worker.stop() == 0
        assert server.stop() == 0
    assert ["job" in log.read_text() for log in logs] == [False, True]
    assert json.loads(next(line for line in logs[1].read_text().splitlines() if '"event"' not in line)) == {
        "home": str(home)
    }


# The database, when it cannot be used


def newer_schema(home: Path) -> None:
    with contextlib.closing(SqliteDatabase(home / "doorward.db", busy_timeout=5)) as database:
        database.migrate()
    with contextlib.closing(sqlite3.connect(home / "doorward.db")) as other:
        other.execute("INSERT INTO schema_migration (name, applied) VALUES ('9999_future', '2099-01-01')")
        other.commit()


@pytest.mark.sqlite
@pytest.mark.parametrize("words", [("serve",), ("migrate",), ("session", "list")], ids=" ".join)
def test_a_newer_schema(home: Path, words: tuple[str, ...], here: Here) -> None:
    newer_schema(home)
    assert_tells(here(home, *words), f"{home}/doorward.db", "9999_future", "upgrade Doorward", "backup")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("directory", ("unable to open", "Mend: ", "DOORWARD_DATABASE_URL"), id="directory"),
        pytest.param("foreign", ("not a database", "Mend: ", "backup"), id="foreign file"),
        pytest.param("no folder", ("unable to open", "Mend: ", "`doorward init`"), id="no folder"),
    ],
)
@pytest.mark.parametrize("words", [("serve",), ("migrate",)], ids=" ".join)
def test_a_database_that_cannot_be_opened(
    home: Path, words: tuple[str, ...], kind: str, parts: tuple[str, ...], here: Here
) -> None:
    path = home / "other.db"
    match kind:
        case "directory":
            path.mkdir()
        case "foreign":
            path.write_bytes(b"mine " * 1000)
        case _:
            path = home / "no" / "other.db"
    environment = {"DOORWARD_DATABASE_URL": f"sqlite:///{path}"}
    assert_tells(here(home, *words, environment=environment), str(path), *parts)


# A full disk: files of a limited size are what comes nearest


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("command", "limit"), [("migrate", 0), ("migrate", 1), ("migrate", 16), ("serve", 1), ("serve", 16)]
)
def test_a_full_disk_is_one_clear_line(home: Path, command: str, limit: int) -> None:
    done = doorward(home, command, limit=limit)
    assert_tells(done, f"cannot use the database {home}/doorward.db", "Mend: free some disk space")


def test_init_on_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert_tells(doorward(home, "init", limit=0), f"{home}/doorward.toml: File too large")
    assert list(home.iterdir()) == []


# An installation without the extra


@pytest.mark.parametrize("module", ["typer", "peewee", "grpc_health"])
def test_a_missing_extra_is_named(module: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['doorward', 'init']; "
        "from doorward_server.__main__ import main; main()"
    )
    environment = clean_environment({"DOORWARD_HOME": str(tmp_path)})
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert_tells(done, module, 'pip install "doorward[server]"')
    assert list(tmp_path.iterdir()) == []
