"""Several server processes under one supervisor: killed, replaced under load, failing, and never left behind."""

import contextlib
import itertools
import json
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.processes import BIN, Process, await_condition, clean_environment, free_ports, running
from tests.sandbox.client import SandboxProvider
from tests.stack import Person, Stack, make_stack, rest

STATUS = "/api/v1/users/me/integrations/kai/flo"
CALLBACK = f"{STATUS}/oauth2callback"
WORKERS = 2
# For tests without load, which need not wait for a gateway to notice.
AT_ONCE = {"DOORWARD_GATEWAY_DRAIN_WAIT": "0", "DOORWARD_GRPC_DRAIN_WAIT": "0"}
# Less than the provider's timeout in the stack's settings.
SLOW = 0.6
# The command line, but for a policy of restarts that ends soon.
IMPATIENT = """
import sys
from doorward_server.app import supervise
from doorward_server.errors import OperatorError
from doorward_server.settings import load
from doorward_server.supervisor import RestartPolicy
try:
    supervise(load(), works=True, policy=RestartPolicy(pauses=(0.0, 0.1)))
except OperatorError as error:
    sys.exit(f"doorward: {error}")
"""
# A supervisor of one worker, which is the program that its arguments name, and which it gives a second to come up.
SUPERVISES = """
import sys
from doorward_server.errors import OperatorError
from doorward_server.logs import make_log
from doorward_server.supervisor import Launch, RestartPolicy, Supervisor
policy = RestartPolicy(start_patience=1.0)
launch = Launch(1, sys.argv[1:], {})
supervisor = Supervisor([launch], policy=policy, stop_patience=1, replace_patience=1, settle=0, log=make_log("info"))
try:
    supervisor.run(lambda: None)
except OperatorError as error:
    sys.exit(f"doorward: {error}")
"""

Make = Callable[..., Stack]


@pytest.fixture
def make(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Make:
    """Makes a home of this test's own, with nothing running yet."""

    def make(**environment: str) -> Stack:
        stack = make_stack(tmp_path / "home", logs, provider, secrets)
        return replace(stack, workers=WORKERS, grpc_port=free_ports(WORKERS), environment=environment)

    return make


@contextlib.contextmanager
def impatient(stack: Stack) -> Iterator[Process]:
    """Workers whose supervisor gives up soon."""
    log = stack.logs / f"impatient-{stack.grpc_port}.log"
    with running([sys.executable, "-c", IMPATIENT], log, stack.environment) as process:
        process.await_output('"all workers serve"')
        yield process


def lines_of(process: Process, event: str) -> list[dict[str, Any]]:
    """The log lines of an event, and their fields."""
    lines = [json.loads(line) for line in process.output().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


def sentences_of(process: Process) -> list[str]:
    """What is no log line."""
    return [line for line in process.output().splitlines() if not line.startswith("{")]


def workers_of(supervisor: Process) -> dict[int, psutil.Process]:
    """By their ports, which their command lines show."""
    found = {}
    for child in psutil.Process(supervisor.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess, StopIteration, ValueError):
            place = next(word for word in child.cmdline() if word.startswith("worker="))
            found[int(place.removeprefix("worker="))] = child
    return found


def await_event(process: Process, event: str, count: int = 1) -> list[dict[str, Any]]:
    await_condition(lambda: len(lines_of(process, event)) >= count, f"{count} times {event!r}")
    return lines_of(process, event)


def await_gone(processes: list[psutil.Process], patience: float) -> None:
    def gone() -> bool:
        # An orphan stays a zombie where nobody collects it.
        return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)

    await_condition(gone, f"the end of {processes}", patience)


def await_healthy(stack: Stack) -> None:
    await_condition(lambda: rest(stack, "GET", "/healthz").status_code == 200, "a server behind the gateway")


def as_user(person: Person) -> dict[str, str]:
    return {"cookie": f"doorward_session={person.cookie}"}


class Load:
    """Callers that send one request after the other, and account for every one of them.

    Of each three, one reads over a kept connection, one over a fresh one a request, one connects with fresh codes.
    """

    def __init__(self, stack: Stack, callers: int) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.answers: Counter[tuple[str, str]] = Counter()
        self._pool = ThreadPoolExecutor(callers)
        kinds = itertools.islice(itertools.cycle((self._read, self._read_afresh, self._connect)), callers)
        self._runs = [self._pool.submit(self._call, kind, stack.person()) for kind in kinds]

    @property
    def failures(self) -> Counter[tuple[str, str]]:
        """Whatever is not the answer that it has to be: by method, and what it was."""
        return Counter({one: count for one, count in self.answers.items() if one[1] != "as it has to be"})

    def await_answers(self, count: int) -> None:
        """Until so many more requests are answered."""
        wanted = self.answers.total() + count
        await_condition(lambda: self.answers.total() >= wanted, f"{count} answers")

    def stop(self) -> None:
        self._stop.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()

    def _call(self, kind: Callable[[httpx.Client, Person], httpx.Response], person: Person) -> None:
        stack = self._stack
        with httpx.Client(
            base_url=stack.url, trust_env=False, verify=False, timeout=30, headers=as_user(person)
        ) as client:
            while not self._stop.is_set():
                method = "POST" if kind == self._connect else "GET"
                try:
                    answer = kind(client, person)
                    right = answer.status_code == 200 and set(answer.json()) <= {"authStatus"}
                    result = "as it has to be" if right else f"{answer.status_code} {answer.text}"
                except httpx.TransportError as error:
                    result = repr(error)
                with self._lock:
                    self.answers[method, result] += 1

    def _read(self, client: httpx.Client, person: Person) -> httpx.Response:
        return client.get(STATUS)

    def _read_afresh(self, client: httpx.Client, person: Person) -> httpx.Response:
        return rest(self._stack, "GET", STATUS, headers=as_user(person))

    def _connect(self, client: httpx.Client, person: Person) -> httpx.Response:
        return client.post(CALLBACK, json={"code": self._stack.provider.code()})


@contextlib.contextmanager
def loaded(stack: Stack, callers: int = 6) -> Iterator[Load]:
    load = Load(stack, callers)
    try:
        yield load
    finally:
        load.stop()


# Under load, through the gateway


def test_all_are_replaced_and_no_request_fails(make: Make, soaking: bool) -> None:
    stack, rounds = make(), 5 if soaking else 1
    with stack.server() as supervisor, stack.gateway():
        await_healthy(stack)
        with loaded(stack, callers=12 if soaking else 6) as load:
            for number in range(1, rounds + 1):
                before = workers_of(supervisor)
                load.await_answers(50)
                supervisor.signal(signal.SIGHUP)
                await_event(supervisor, "all workers replaced", number)
                after = workers_of(supervisor)
                assert before.keys() == after.keys() == {stack.grpc_port, stack.grpc_port + 1}
                assert not {one.pid for one in before.values()} & {one.pid for one in after.values()}
            load.await_answers(50)
        assert load.failures == {}
        assert {method for method, _ in load.answers} == {"GET", "POST"}
        assert lines_of(supervisor, "worker ended") == []
    print(f"{rounds} times all workers replaced: {load.answers.total()} requests, no failure")


def test_a_killed_worker_takes_only_what_it_was_doing(make: Make, soaking: bool) -> None:
    stack, kills, callers = make(), 20 if soaking else 2, 6
    # Whoever is killed again and again is not waited for longer and longer here.
    with impatient(stack) if soaking else stack.server() as supervisor, stack.gateway():
        await_healthy(stack)
        with loaded(stack, callers) as load:
            await_answers_of_all(stack)
            for number in range(1, kills + 1):
                victim = random.choice(list(workers_of(supervisor).values()))
                victim.kill()
                await_event(supervisor, "worker ended", number)
                await_event(supervisor, "serving", WORKERS + number)
                await_answers_of_all(stack)
        # Reads are asked of the other worker; a caller of the rest has one request under way.
        assert load.failures.total() <= kills * callers // 3
        assert {method for method, _ in load.failures} <= {"POST"}
        assert {line["how"] for line in lines_of(supervisor, "worker ended")} == {"SIGKILL"}
        assert len(lines_of(supervisor, "worker started")) == WORKERS + kills
    print(f"{kills} workers killed: {load.answers.total()} requests, failures: {dict(load.failures)}")


def upstreams_of(stack: Stack) -> dict[str, tuple[bool, int]]:
    """By their sockets: whether Envoy sends requests there, and how many were answered."""
    url = f"http://127.0.0.1:{stack.environment['DOORWARD_GATEWAY_ADMIN_PORT']}/clusters?format=json"
    [cluster] = httpx.get(url, trust_env=False).json()["cluster_statuses"]
    return {
        host["address"]["pipe"]["path"]: (
            host["health_status"] == {"eds_health_status": "HEALTHY"},
            sum(int(one.get("value", 0)) for one in host["stats"] if one["name"] == "rq_success"),
        )
        for host in cluster["host_statuses"]
    }


def await_answers_of_all(stack: Stack) -> None:
    """Until Envoy takes every worker for healthy, and every one has answered since."""
    await_condition(lambda: all(healthy for healthy, _ in upstreams_of(stack).values()), "healthy workers")
    before = upstreams_of(stack)
    assert len(before) == WORKERS

    def all_answered() -> bool:
        return all(count > before[path][1] for path, (_, count) in upstreams_of(stack).items())

    await_condition(all_answered, "answers of all workers")


def test_calls_under_way_are_given_their_time(make: Make, provider: SandboxProvider) -> None:
    """Those that a drain for SIGTERM would cut off at once, here."""
    stack = make(**AT_ONCE, DOORWARD_GRPC_DRAIN_GRACE="0")
    with stack.server() as supervisor, stack.gateway():
        await_healthy(stack)
        calls = [(stack.person(), provider.code()) for _ in range(8)]
        provider.configure(latency=SLOW)
        with ThreadPoolExecutor(len(calls)) as pool:
            runs = [
                pool.submit(rest, stack, "POST", CALLBACK, json={"code": code}, headers=as_user(person))
                for person, code in calls
            ]
            await_condition(lambda: len(provider.requests()) == len(calls), "the requests at the provider")
            supervisor.signal(signal.SIGHUP)
            assert {(run.result().status_code, run.result().text) for run in runs} == {(200, "{}")}
        await_event(supervisor, "all workers replaced")


# Starting


def test_the_command_line_beats_the_setting(make: Make) -> None:
    """And a supervisor that is killed leaves nobody."""
    stack = make(**AT_ONCE)
    log = stack.logs / f"json-{stack.grpc_port}.log"
    command: list[str | Path] = [BIN / "doorward", "serve", "--workers", "3", "--no-work", "--json"]
    environment = stack.environment | {"DOORWARD_GRPC_PORT": str(free_ports(3))}
    with running(command, log, environment) as supervisor:
        await_event(supervisor, "all workers serve")
        await_condition(lambda: '{"home"' in supervisor.output(), "the one value on standard output")
        [told] = [json.loads(line) for line in supervisor.output().splitlines() if '"event"' not in line]
        first = int(environment["DOORWARD_GRPC_PORT"])
        assert told == {
            "home": str(stack.home),
            "workers": [
                {"port": port, "socket": f"{stack.home}/doorward-{port}.sock"} for port in range(first, first + 3)
            ],
        }
        workers = workers_of(supervisor)
        assert workers.keys() == set(range(first, first + 3))
        assert all("--no-work" in one.cmdline() for one in workers.values())
        supervisor.kill()
        await_gone(list(workers.values()), patience=10)


# Replacing


def test_one_more_signal_begins_anew(make: Make) -> None:
    stack = make(**AT_ONCE)
    with stack.server() as supervisor:
        supervisor.signal(signal.SIGHUP)
        # The second worker's turn: the first one is replaced already.
        await_condition(lambda: len(lines_of(supervisor, "draining")) == WORKERS, "the second worker's turn")
        supervisor.signal(signal.SIGHUP)
        await_event(supervisor, "all workers replaced")
        drained = [line["port"] - stack.grpc_port for line in lines_of(supervisor, "draining")]
        # The second one was on its way out: it is not drained twice unless its successor was there already.
        assert drained in ([0, 1, 0], [0, 1, 0, 1])


def test_a_successor_that_does_not_come_up_stops_the_replacing(make: Make) -> None:
    stack = make(**AT_ONCE)
    key = stack.home / "master.key"
    with impatient(stack) as supervisor, stack.gateway():
        await_healthy(stack)
        second = workers_of(supervisor)[stack.grpc_port + 1]
        key.rename(key.with_suffix(".away"))
        supervisor.signal(signal.SIGHUP)
        [stopped] = await_event(supervisor, "replacing stopped: the new worker does not come up, see its lines")
        assert stopped["worker"] == 1
        # However often it fails, the other one goes on.
        await_event(supervisor, "a worker keeps ending: see its lines")
        assert any("master.key" in line for line in sentences_of(supervisor))
        assert workers_of(supervisor)[stack.grpc_port + 1] == second
        person = stack.person()
        await_condition(lambda: get_status(stack, person) == 200, "the other worker")
        key.with_suffix(".away").rename(key)
        supervisor.signal(signal.SIGHUP)
        await_event(supervisor, "all workers replaced")
        assert len(workers_of(supervisor)) == WORKERS


def get_status(stack: Stack, person: Person) -> int:
    return rest(stack, "GET", STATUS, headers=as_user(person)).status_code


# Failing


def test_when_none_stays_up_the_supervisor_gives_up(make: Make) -> None:
    stack = make(**AT_ONCE)
    with impatient(stack) as supervisor:
        (stack.home / "master.key").unlink()
        for worker in workers_of(supervisor).values():
            worker.kill()
        assert supervisor.wait() == 1
        [line] = lines_of(supervisor, "giving up: no worker stays up, see their lines")
        assert line["level"] == "error"
        *workers_own, last = sentences_of(supervisor)
        assert last.startswith(
            f"doorward: worker {line['worker']} (port {stack.grpc_port + line['worker'] - 1}) ended "
        )
        assert "start again" in last
        assert all("master.key" in one for one in workers_own)


@pytest.mark.parametrize("worker", [1, 2])
def test_a_port_in_use_is_one_sentence(make: Make, worker: int) -> None:
    stack = make(**AT_ONCE)
    port = stack.grpc_port + worker - 1
    with socket.create_server(("127.0.0.1", port)):
        log = stack.logs / f"refused-{port}.log"
        with running([BIN / "doorward", "serve"], log, stack.environment) as supervisor:
            assert supervisor.wait() == 1
            sentence = f"doorward: cannot listen on 127.0.0.1:{port}: the port is in use or not allowed."
            assert supervisor.output() == f"{sentence} Stop its owner or set DOORWARD_GRPC_PORT\n"


def test_a_worker_s_port_is_its_own_while_it_is_away(make: Make) -> None:
    """An outgoing connection that has it would keep the successor from listening."""
    stack = make(**AT_ONCE)
    with stack.server() as supervisor:
        os.kill(supervisor.pid, signal.SIGSTOP)  # so that there is no successor at once
        try:
            worker = workers_of(supervisor)[stack.grpc_port]
            worker.kill()
            await_condition(lambda: worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
            # What Linux does for an outgoing connection, at a port of its choice.
            with socket.socket() as outgoing, pytest.raises(OSError, match="Address already in use"):
                outgoing.bind(("127.0.0.1", stack.grpc_port))
        finally:
            os.kill(supervisor.pid, signal.SIGCONT)
        await_event(supervisor, "serving", WORKERS + 1)
        assert sentences_of(supervisor) == []


@pytest.mark.parametrize(
    ("program", "how"),
    [
        pytest.param(["/nowhere/python"], "No such file or directory", id="there is none"),
        pytest.param([sys.executable, "-c", "import os; os.abort()"], "SIGABRT", id="it crashes"),
        pytest.param(
            [sys.executable, "-c", "import os; os.kill(os.getpid(), 40)"], "signal 40", id="a nameless signal"
        ),
        pytest.param([sys.executable, "-c", ""], "exit code 0", id="it ends"),
        pytest.param([sys.executable, "-c", "input()"], "exit code 1", id="it tells by its exit code"),
        pytest.param([sys.executable, "-c", "import signal; signal.pause()"], "SIGKILL", id="it hangs"),
    ],
)
def test_a_program_that_does_not_come_up(logs: Path, program: list[str], how: str) -> None:
    log = logs / f"program-{how.replace(' ', '-')}.log"
    with running([sys.executable, "-c", SUPERVISES, *program], log) as supervisor:
        assert supervisor.wait() == 1
        sentences = [line for line in sentences_of(supervisor) if line.startswith("doorward: ")]
    # Exit code 1 is a worker's that has told what is wrong.
    told = [f"doorward: worker 1 (port 1) ended at the start ({how}): mend what its lines above tell of"]
    assert sentences == ([] if how == "exit code 1" else told)


# The end


@pytest.mark.parametrize("during", ["serving", "replacing"])
def test_it_is_told_to_stop(make: Make, during: str) -> None:
    """Once and many times more, with the default times."""
    stack = make()
    with stack.server() as supervisor:
        workers = list(workers_of(supervisor).values())
        if during == "replacing":
            supervisor.signal(signal.SIGHUP)
            await_event(supervisor, "draining")
        started = time.monotonic()
        for number in [signal.SIGTERM, signal.SIGINT, signal.SIGHUP] * 5:
            supervisor.signal(number)
        assert supervisor.wait() == 0
        assert time.monotonic() - started < 5
    await_gone(workers, patience=0.1)
    assert not list(stack.home.glob("*.sock"))


def test_a_supervisor_that_is_killed_at_the_start_leaves_nobody(make: Make) -> None:
    stack = make(**AT_ONCE)
    log = stack.logs / f"killed-{stack.grpc_port}.log"
    with running([BIN / "doorward", "serve"], log, stack.environment) as supervisor:
        supervisor.await_output('"worker started"')
        workers = psutil.Process(supervisor.pid).children()
        assert len(workers) == 1
        supervisor.kill()
        await_gone(workers, patience=10)


def test_the_terminal_s_end_is_the_end(make: Make) -> None:
    """A SIGHUP, too, but nobody asked to replace anybody."""
    stack = make(**AT_ONCE)
    master, slave = pty.openpty()
    log = stack.logs / f"terminal-{stack.grpc_port}.log"
    takes_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", takes_terminal, str(BIN / "doorward"), "serve"],
            env=clean_environment(stack.environment),
            stdin=slave,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    os.close(slave)
    try:
        await_condition(lambda: "all workers serve" in log.read_text(), "the workers")
        workers = psutil.Process(supervisor.pid).children()
        os.close(master)
        assert supervisor.wait(10) == 0
        await_gone(workers, patience=1)
    finally:
        supervisor.kill()
        supervisor.wait()
    assert "replacing" not in log.read_text()
