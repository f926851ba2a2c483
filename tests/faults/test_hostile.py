"""What hostile or unlucky peers must not achieve: to hold the server's threads, or to make it forget its work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest

from tests.processes import BIN, await_condition, clean_environment
from tests.sandbox.client import SandboxProvider
from tests.stack import Person, Stack, make_stack, rest

# More than the server has threads.
CROWD = 70
STATUS = "/api/v1/users/me/integrations/kai/flo"


@pytest.fixture
def hostile_stack(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Stack:
    """A home of this test's own, with nothing running yet."""
    return make_stack(tmp_path / "home", logs, provider, secrets)


def messages_behind(gate: threading.Semaphore) -> Iterator[bytes]:
    """A message that is not sent before the gate opens."""
    gate.acquire()
    yield b""


def assert_quick(stack: Stack, person: Person) -> None:
    answer = rest(stack, "GET", STATUS, headers={"cookie": f"doorward_session={person.cookie}"})
    assert (answer.status_code, answer.content) == (200, b'{"authStatus":false}')
    assert answer.elapsed.total_seconds() < 2


def test_bodies_that_never_come_hold_no_thread(stack: Stack) -> None:
    """A crowd announces bodies at the gateway and sends three bytes of each."""
    head = (
        b"POST /api/v1/users/me/integrations/kai/flo/oauth2callback HTTP/1.1\r\nhost: doorward\r\n"
        b'content-type: application/json\r\ncontent-length: 20\r\n\r\n{"c'
    )
    with ExitStack() as exit_stack:
        for _ in range(CROWD):
            connection = exit_stack.enter_context(socket.create_connection(("127.0.0.1", stack.gateway_port)))
            connection.sendall(head)
        for _ in range(3):
            assert_quick(stack, stack.person())


def test_messages_that_never_come_hold_no_thread(stack: Stack) -> None:
    """A crowd without credentials starts calls on the TCP port and never sends the message."""
    gate = threading.Semaphore(0)
    with grpc.insecure_channel(f"127.0.0.1:{stack.grpc_port}") as channel:
        call: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            "/doorward.integration.v1.IntegrationService/GetAccessToken"
        )
        pending = [call.future(messages_behind(gate)) for _ in range(CROWD)]
        for one in pending:
            assert one.code() is grpc.StatusCode.UNAUTHENTICATED
        assert_quick(stack, stack.person())
        gate.release(CROWD)


def test_idle_streams_on_the_tcp_port_leave_the_gateway_alone(stack: Stack) -> None:
    """A crowd holds the threads of the TCP port by health checks that it never sends; the gateway has its own."""
    gate = threading.Semaphore(0)
    with grpc.insecure_channel(f"127.0.0.1:{stack.grpc_port}") as channel:
        call: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/grpc.health.v1.Health/Check")
        pending = [call.future(messages_behind(gate)) for _ in range(CROWD)]
        for _ in range(3):
            assert_quick(stack, stack.person())
        assert rest(stack, "GET", "/healthz").status_code == 200
        for one in pending:
            one.cancel()
        gate.release(CROWD)


def test_large_headers_are_no_error_of_the_server(stack: Stack) -> None:
    person = stack.person()
    cookies = f"other={'x' * 40_000}; doorward_session={person.cookie}"
    answer = rest(stack, "GET", STATUS, headers={"cookie": cookies})
    assert (answer.status_code, answer.content) == (200, b'{"authStatus":false}')


def test_a_log_that_nobody_reads(hostile_stack: Stack) -> None:
    """The reader of stderr is gone: calls are served and jobs are done all the same."""
    stack = hostile_stack
    reader, writer = os.pipe()
    server = subprocess.Popen([BIN / "doorward", "serve"], env=clean_environment(stack.environment), stderr=writer)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as log:
            assert b'"serving"' in log.readline()
        with stack.gateway():
            person = stack.person()
            await_condition(lambda: rest(stack, "GET", "/healthz").status_code == 200, "the server")
            assert_quick(stack, person)
            stack.connect(person)
            answer = rest(stack, "DELETE", STATUS, headers={"cookie": f"doorward_session={person.cookie}"})
            assert (answer.status_code, answer.content) == (200, b"{}")
            await_condition(lambda: stack.provider.families()[-1]["revoked"], "the revocation")
    finally:
        server.terminate()
        assert server.wait(10) == 0


@pytest.mark.parametrize("program", ["server", "gateway"])
def test_a_burst_of_signals_is_one(hostile_stack: Stack, program: str) -> None:
    """Supervisors signal a process and its group: many signals at once stop it as one does."""
    with hostile_stack.server() if program == "server" else hostile_stack.gateway() as process:
        for number in [signal.SIGTERM, signal.SIGINT] * 20:
            process.signal(number)
        assert process.wait() == 0


def test_a_successor_keeps_its_socket(hostile_stack: Stack) -> None:
    """A server that starts while the one before still drains has the socket to itself afterwards."""
    stack = hostile_stack
    with stack.server() as old:
        person = stack.person()
        with stack.gateway():
            await_condition(lambda: rest(stack, "GET", "/healthz").status_code == 200, "the server")
            old.signal(15)
            with ExitStack() as exit_stack:

                def successor_serves() -> bool:
                    try:
                        exit_stack.enter_context(stack.server())
                    except AssertionError as refused:
                        assert "the port is in use" in str(refused)  # noqa: PT017
                        return False
                    return True

                await_condition(successor_serves, "the successor")
                assert old.wait() == 0
                assert (stack.home / f"doorward-{stack.grpc_port}.sock").exists()
                await_condition(lambda: rest(stack, "GET", "/healthz").status_code == 200, "the successor")
                assert_quick(stack, person)


def test_threads_that_wake_up_wait_for_their_turn(hostile_stack: Stack) -> None:
    """Those of the server and of Envoy; else they interrupt each other all the time."""
    with hostile_stack.server() as server, hostile_stack.gateway() as gateway:
        (envoy,) = psutil.Process(gateway.pid).children()
        threads = [thread.id for pid in (server.pid, envoy.pid) for thread in psutil.Process(pid).threads()]
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}
