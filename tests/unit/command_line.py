"""What tests of the command line share: running it, at a terminal too, and judging what it printed."""

import contextlib
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from doorward_server import settings
from doorward_server.app import App
from doorward_server.cli.root import run
from doorward_server.crypto import MasterKey
from tests.engines import ENGINES, contents
from tests.processes import BIN, await_condition, clean_environment

Done = subprocess.CompletedProcess[str]
Here = Callable[..., Done]
# Makes its standard input the controlling terminal, and becomes the command.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def doorward(
    home: Path | None,
    *arguments: str,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Done:
    """Run `doorward` to its end; `limit` is the size of the largest file it may write, in blocks of 512 bytes."""
    home_variable = {} if home is None else {"DOORWARD_HOME": str(home)}
    command: Sequence[str | Path] = [BIN / "doorward", *arguments]
    if limit is not None:
        command = ["sh", "-c", f'ulimit -f {limit} && exec "$@"', "sh", *command]
    done = subprocess.run(
        command,
        env=clean_environment({**home_variable, "COLUMNS": "200", **(environment or {})}),
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return Done(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def within(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs `doorward` within this process, which is much quicker."""

    def call(
        home: Path,
        *arguments: str,
        stdin: bytes = b"",
        stdin_errors: str = "strict",
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        for name in [name for name in os.environ if name.startswith("DOORWARD_")]:
            monkeypatch.delenv(name)
        for name, value in {"DOORWARD_HOME": str(home), "COLUMNS": "200", **(environment or {})}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["doorward", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8", stdin_errors))
        mask = os.umask(0o022)
        code: Any = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.umask(mask)
        out, err = capfd.readouterr()
        if isinstance(code, str):  # what Python does with it at the end of a process
            code, err = 1, f"{err}{code}\n"
        return Done(arguments, code, out, err)

    return call


def assert_tells(done: Done, *parts: str) -> None:
    """It ended with exit code 1 and one line on stderr that holds all of the parts."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("doorward: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr


def make_home(tmp_path: Path) -> Path:
    """A home as `doorward init` makes it."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "doorward.toml").write_text(ENGINES.settings())
    write_key(home, MasterKey.generate())
    return home


def write_key(home: Path, *keys: MasterKey) -> None:
    path = home / "master.key"
    path.write_text("".join(f"{key}\n" for key in keys))
    path.chmod(0o600)


def at_terminal(home: Path, *arguments: str, prompt: str, typed: str, hidden: bool = False) -> Done:
    """Run `doorward` at a real terminal, standard output aside; `typed` is typed when the prompt is shown.

    `hidden`: and when the terminal does not echo any more, for what was typed before is dropped.

    What the terminal showed, echoes too, is the result's stderr.
    """
    master, slave = pty.openpty()
    shown = b""
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, str(BIN / "doorward"), *arguments],
        env=clean_environment({"DOORWARD_HOME": str(home), "TERM": "dumb"}),
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        waiting = True
        while more := _read_terminal(master):
            shown += more
            if waiting and prompt.encode() in shown:
                if hidden:
                    await_condition(lambda: not termios.tcgetattr(master)[3] & termios.ECHO, "no echo")
                os.write(master, typed.encode())
                waiting = False
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
        os.close(master)
    assert not waiting, f"{prompt!r} was not asked: {shown!r}"
    return Done(arguments, process.returncode, output.decode(), shown.decode().replace("\r\n", "\n"))


def _read_terminal(master: int) -> bytes:
    """What the terminal shows next; nothing when no process has it open any more."""
    assert select.select([master], [], [], 30)[0], "nothing happens at the terminal"
    try:
        return os.read(master, 4096)
    except OSError:  # EIO is how Linux tells it
        return b""


# On the same home


@contextlib.contextmanager
def opened(home: Path) -> Iterator[App]:
    """A second app on the home, as a server would be."""
    app = App(settings.load(home))
    yield app
    app.database.close()


def in_database(home: Path, text: str) -> bool:
    """Whether a text stands in clear in the database's files."""
    with opened(home) as app:
        return text.encode() in contents(app.database)


def result(done: Done) -> Any:
    """The one JSON value that a command printed, and nothing beside it."""
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert done.stdout == json.dumps(value) + "\n"
    return value


def printed(done: Done) -> dict[str, str]:
    """The lines `name: value` that a command printed."""
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())
