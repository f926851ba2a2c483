"""Several server processes under one supervisor: kept running, replaced one after the other, stopped together.

The supervisor is one thread that waits for signals. It opens no database and speaks no gRPC, so whatever
befalls the workers, it stays up. Imports `errors` and `logs`.
"""

import ctypes
import enum
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from doorward_server.errors import OperatorError
from doorward_server.logs import Log

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SI_KERNEL = 0x80  # asm-generic/siginfo.h
# To stop, to replace all workers, or that a worker has ended.
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD}
_POLL = 0.05
_TOLD_TO_FAIL = 1  # the exit code of a command that has told on stderr what is wrong


@dataclass(frozen=True)
class RestartPolicy:
    """When a worker that has ended is started again; all in seconds."""

    # Before the first restart in a row, the second, and so on; thereafter the last one.
    pauses: Sequence[float] = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
    # Whoever has served for so long has no failures behind it.
    steady: float = 60.0
    # A worker that does not serve by then is killed, and counts as ended.
    start_patience: float = 60.0

    def pause(self, failures: int) -> float:
        """How long to wait after so many failures in a row, at least one."""
        return self.pauses[min(failures, len(self.pauses)) - 1]

    def has_had_enough(self, failures: int) -> bool:
        """Whether a worker has failed more often than there are pauses."""
        return failures > len(self.pauses)


@dataclass(frozen=True)
class Launch:
    """How a worker is started: a `doorward serve` that prints one line when it serves, and is told from `port`."""

    port: int
    command: Sequence[str]
    environment: Mapping[str, str]


class _State(enum.Enum):
    AWAY = "no process; `until`: when one is started"
    STARTING = "does not serve yet; `until`: when it is killed"
    SERVING = "`until`: since when"
    DRAINING = "told to end; `until`: when it is killed"


class WorkerProcess:
    """One worker's place, and the process that fills it at the moment."""

    def __init__(self, number: int, launch: Launch, due: float) -> None:
        self.number = number
        self.launch = launch
        self.failures = 0  # in a row
        self.state = _State.AWAY
        self.until = due
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """As sentences name it."""
        return f"worker {self.number} (port {self.launch.port})"

    @property
    def fields(self) -> dict[str, int | None]:
        """As log lines name it."""
        return {"worker": self.number, "port": self.launch.port, "pid": self._process.pid if self._process else None}

    def start(self, patience: float) -> None:
        supervisor = os.getpid()
        # The death signal belongs to the thread that forks, and has to find no thread's locks held:
        # the supervisor has this one thread. A session of its own: Ctrl-C is for the supervisor.
        self._process = subprocess.Popen(  # noqa: S603
            self.launch.command,
            env=self.launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=lambda: _prepare_child(supervisor),  # noqa: PLW1509
        )
        assert self._process.stdout is not None  # noqa: S101
        os.set_blocking(self._process.stdout.fileno(), False)
        self.state, self.until = _State.STARTING, time.monotonic() + patience

    def has_printed(self) -> bool:
        """Whether something is on its standard output, which is the line that tells that it serves."""
        return self._process is not None and bool(self._process.stdout and self._process.stdout.read())

    def serve(self) -> None:
        self.state, self.until = _State.SERVING, time.monotonic()

    def drain(self, number: signal.Signals, patience: float) -> None:
        """Tell it to end, for which it has so many seconds: SIGQUIT with the time that calls need, SIGTERM without."""
        if self._process is not None:
            self._process.send_signal(number)
            self.state, self.until = _State.DRAINING, time.monotonic() + patience

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.until = float("inf")

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """As of `subprocess`, once the process has ended; None while it runs, or if there is none."""
        return self._process.poll() if self._process is not None else None

    def clear(self, due: float) -> None:
        """Forget the process, which has ended or will at once; the next one is due then."""
        if self._process is not None:
            with self._process:  # waits, and closes the pipe
                self._process = None
        self.state, self.until = _State.AWAY, due


class Supervisor:
    """Keeps a worker in each place until SIGTERM or SIGINT; SIGHUP replaces one after the other.

    `stop_patience`, `replace_patience`: seconds after which a worker is killed that was told to end, by SIGTERM and
    by SIGQUIT. `settle`: seconds that the gateway needs to notice that a worker serves again; only then the next
    one is replaced.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        *,
        policy: RestartPolicy,
        stop_patience: float,
        replace_patience: float,
        settle: float,
        log: Log,
    ) -> None:
        self._policy = policy
        self._stop_patience = stop_patience
        self._replace_patience = replace_patience
        self._settle = settle
        self._log = log
        # The first one is started alone: what keeps all from starting, it tells alone.
        self._workers = [
            WorkerProcess(number, launch, due=float("inf") if number > 1 else 0.0)
            for number, launch in enumerate(launches, 1)
        ]
        self._all_have_served = False
        # Those that are to be replaced yet; None: nothing is being replaced.
        self._outdated: list[WorkerProcess] | None = None

    def run(self, on_ready: Callable[[], None]) -> None:
        """Returns after a stop signal, all workers gone. `on_ready` is called once all serve.

        OperatorError when a worker does not come up at the start, or later none stays up.
        """
        # Waited for, not handled: a handler that interrupts itself, by a second signal, may deadlock.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            while not self._is_told_to_stop():
                for worker in self._workers:
                    self._tend(worker)
                if not self._all_have_served and self._all_serve_for(0):
                    self._all_have_served = True
                    self._log.info("all workers serve", workers=len(self._workers))
                    on_ready()
                self._replace_next()
        finally:
            self._stop_all()

    def _is_told_to_stop(self) -> bool:
        """Wait for a signal or until there may be something to do; take in what the signal says."""
        if self._outdated is None and all(worker.state is _State.SERVING for worker in self._workers):
            received: signal.struct_siginfo | None = signal.sigwaitinfo(_SIGNALS)
        else:
            received = signal.sigtimedwait(_SIGNALS, _POLL)
        if received is None or received.si_signo == signal.SIGCHLD:
            return False
        if received.si_signo == signal.SIGHUP and not _terminal_is_gone(received):
            self._replace_all()
            return False
        return True

    def _tend(self, worker: WorkerProcess) -> None:
        now = time.monotonic()
        if (code := worker.exit_code) is not None:
            self._has_ended(worker, code)
        elif worker.state is _State.AWAY and now >= worker.until:
            self._start(worker)
        elif worker.state is _State.STARTING and worker.has_printed():
            worker.serve()
            self._call_the_others()
        elif worker.state in {_State.STARTING, _State.DRAINING} and now >= worker.until:
            self._log.warning("worker killed: it took too long", **worker.fields)
            worker.kill()

    def _start(self, worker: WorkerProcess) -> None:
        try:
            worker.start(self._policy.start_patience)
        except (OSError, subprocess.SubprocessError) as error:  # no memory, or the program is just being replaced
            self._has_failed(worker, getattr(error, "strerror", None) or type(error).__name__)
            return
        self._log.info("worker started", **worker.fields)

    def _call_the_others(self) -> None:
        """After the first one, all may start at once."""
        if not self._all_have_served:
            for worker in self._workers:
                if worker.state is _State.AWAY:
                    worker.until = 0.0

    def _has_ended(self, worker: WorkerProcess, code: int) -> None:
        now = time.monotonic()
        if worker.state is _State.DRAINING:  # as it was told; its successor follows at once
            worker.clear(due=now)
            return
        if worker.state is _State.SERVING and now - worker.until >= self._policy.steady:
            worker.failures = 0
        if not self._all_have_served and code == _TOLD_TO_FAIL:
            raise SystemExit(code)  # it has told why, in a sentence of its own
        self._has_failed(worker, f"exit code {code}" if code >= 0 else _name_of(-code))

    def _has_failed(self, worker: WorkerProcess, how: str) -> None:
        worker.failures += 1
        self._log.warning("worker ended", **worker.fields, how=how, failures=worker.failures)
        if not self._all_have_served:
            raise OperatorError(f"{worker.name} ended at the start ({how}): mend what its lines above tell of")
        if worker.state is not _State.SERVING and self._outdated is not None:
            self._outdated = None
            self._log.error("replacing stopped: the new worker does not come up, see its lines", **worker.fields)
        pause = self._policy.pause(worker.failures)
        worker.clear(due=time.monotonic() + pause)
        if self._policy.has_had_enough(worker.failures):
            self._give_up_or_warn(worker, pause)

    def _give_up_or_warn(self, worker: WorkerProcess, pause: float) -> None:
        """As long as another one serves, half of the service is better than none."""
        if any(other.state is _State.SERVING for other in self._workers):
            self._log.error("a worker keeps ending: see its lines", worker=worker.number, again_in=pause)
            return
        self._log.error("giving up: no worker stays up, see their lines", worker=worker.number)
        raise OperatorError(
            f"{worker.name} ended {worker.failures} times in a row and no other one serves: "
            "mend what its lines above tell of, and start again"
        )

    def _replace_all(self) -> None:
        """From the first one on, also if they are being replaced: some may not know what changed since."""
        self._log.info("replacing all workers", workers=len(self._workers))
        for worker in self._workers:
            if worker.state is _State.AWAY:
                worker.failures, worker.until = 0, 0.0
        up = {_State.STARTING, _State.SERVING}
        self._outdated = [worker for worker in self._workers if worker.state in up]

    def _replace_next(self) -> None:
        """Drain the next one, once all serve and the gateway knows it."""
        if self._outdated is None or not self._all_serve_for(self._settle):
            return
        if self._outdated:
            self._outdated.pop(0).drain(signal.SIGQUIT, self._replace_patience)
            return
        self._outdated = None
        self._log.info("all workers replaced", workers=len(self._workers))

    def _all_serve_for(self, seconds: float) -> bool:
        latest = time.monotonic() - seconds
        return all(worker.state is _State.SERVING and worker.until <= latest for worker in self._workers)

    def _stop_all(self) -> None:
        for worker in self._workers:
            worker.drain(signal.SIGTERM, self._stop_patience)
        deadline = time.monotonic() + self._stop_patience
        while any(worker.is_running for worker in self._workers) and time.monotonic() < deadline:
            signal.sigtimedwait(_SIGNALS, _POLL)
        for worker in self._workers:
            if worker.is_running:
                self._log.warning("worker killed: it took too long", **worker.fields)
                worker.kill()
            worker.clear(due=float("inf"))


def _name_of(number: int) -> str:
    """A signal's name; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _terminal_is_gone(received: signal.struct_siginfo) -> bool:
    """Whether a SIGHUP is the kernel's word that the terminal has gone, and nobody has said `nohup`."""
    return received.si_code == _SI_KERNEL and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def _prepare_child(supervisor: int) -> None:
    """In the child: let signals through, and have the kernel stop it when the supervisor dies, even by SIGKILL."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:  # it has died before it could be watched
            os._exit(1)
