"""Real processes for tests: started on free ports, logged to files, always stopped."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
_PATIENCE = 30.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection gets by itself."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of so many such ports in a row."""
    while True:
        # Not by the random numbers that tests in other processes have, too.
        first = secrets.choice(range(20_000, 32_000))
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def await_condition(condition: Callable[[], bool], what: str, patience: float = _PATIENCE) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain waited for: {what}")
        time.sleep(0.01)


class Process:
    """One child process with its output in a file."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("ab") as output:
            self._start = output.tell()  # an earlier process may have written before
            self._popen = subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, env=environment, stdout=output, stderr=output
            )
        self.pid = self._popen.pid

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_bytes()[self._start :].decode()

    def await_output(self, text: str) -> None:
        """Return when the process has printed the text; fail when it ends first."""

        def printed() -> bool:
            if text in self.output():
                return True
            assert self._popen.poll() is None, f"{self._popen.args!r} ended:\n{self.output()}"
            return False

        await_condition(printed, f"{text!r} from {self._popen.args!r}")

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, patience: float = _PATIENCE) -> int:
        return self._popen.wait(patience)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for the end; returns the exit code."""
        if self._popen.poll() is None:
            self._popen.terminate()
        try:
            return self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """A process for the time of a `with` block."""
    process = Process(command, log, clean_environment(environment or {}))
    try:
        yield process
    finally:
        process.stop()


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of Doorward's, and with the given ones."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOORWARD_")}
    # Python 3.13 calls a thread's own connection unclosed when the process ends; a pool goes with its process, too.
    ignored = ("unclosed database", "<psycopg.Connection object")
    warnings = ",".join(["error", *(f"ignore:{words}:ResourceWarning" for words in ignored)])
    return {**inherited, "PYTHONWARNINGS": warnings, **extra}
