"""Refreshing under fire: many callers, three processes, and refreshers that are killed at any instant."""

import concurrent.futures
import contextlib
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import grpc
import pytest

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from doorward_server.models import Connection, Job
from tests.processes import Process, await_condition, free_port
from tests.sandbox.client import SandboxProvider
from tests.stack import LEASE, Person, Stack, make_stack

THREADS = 32
STORM_ROUNDS = 50
KILL_ROUNDS = 30


class Client:
    """A backend that asks one server for access tokens."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = stubs.IntegrationServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),)

    def token(self, person: Person) -> str:
        request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")
        return self._stub.GetAccessToken(request, metadata=self._metadata, timeout=30).access_token

    def outcome(self, person: Person) -> str:
        """ "OK", or the gRPC code and message."""
        try:
            self.token(person)
        except grpc.RpcError as error:
            call = cast(grpc.Call, error)
            return f"{call.code().name} {call.details()}"
        return "OK"

    def close(self) -> None:
        self._channel.close()


@pytest.fixture
def fault_stack(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Stack:
    """A home of this test's own, with nothing running yet."""
    return make_stack(tmp_path / "home", logs, provider, secrets)


def clients(stack: Stack, ports: list[int], exit_stack: ExitStack) -> list[Client]:
    token = stack.service_token("backend")
    found = [Client(f"127.0.0.1:{port}", token) for port in ports]
    for client in found:
        exit_stack.callback(client.close)
    return found


@contextlib.contextmanager
def running_servers(stack: Stack) -> Iterator[list[Client]]:
    ports = [stack.grpc_port, free_port(), free_port()]
    with ExitStack() as exit_stack:
        for port in ports:
            exit_stack.enter_context(stack.server(port))
        yield clients(stack, ports, exit_stack)


@pytest.fixture
def servers(fault_stack: Stack) -> Iterator[list[Client]]:
    with running_servers(fault_stack) as found:
        yield found


@pytest.fixture
def patient_servers(fault_stack: Stack) -> Iterator[list[Client]]:
    """With a lease that outlasts a crowd on a busy machine."""
    fault_stack.environment["DOORWARD_REFRESH_LEASE"] = "10"
    with running_servers(fault_stack) as found:
        yield found


def connect_expired(stack: Stack) -> Person:
    """A person whose stored token has run out; the refreshed ones live long."""
    person = stack.person()
    stack.provider.configure(expires_in=0)
    stack.connect(person)
    stack.provider.configure(expires_in=3600)
    return person


def test_one_refresh_however_many_ask(fault_stack: Stack, patient_servers: list[Client], soaking: bool) -> None:
    """3 processes with 32 threads each ask at once: the rotating provider sees one refresh per round."""
    provider = fault_stack.provider
    for round_number in range(STORM_ROUNDS if soaking else STORM_ROUNDS // 10):
        person = connect_expired(fault_stack)
        provider.configure(latency=random.choice([0.0, 0.05, 0.2]))
        start = threading.Barrier(len(patient_servers) * THREADS)

        def ask(client: Client, person: Person = person, start: threading.Barrier = start) -> str:
            start.wait()
            return client.token(person)

        with concurrent.futures.ThreadPoolExecutor(start.parties) as pool:
            tokens = {future.result() for future in [pool.submit(ask, client) for client in patient_servers * THREADS]}
        provider.configure(latency=0.0)
        assert len(provider.requests(grant_type="refresh_token")) == round_number + 1
        family = provider.families()[-1]
        assert tokens == {family["access_token"]}
        assert (family["refreshes"], family["reused"], family["revoked"]) == (1, False, False)


def test_losers_share_the_winners_failure(fault_stack: Stack, servers: list[Client]) -> None:
    """A provider that is down is asked once, not once per waiting caller; the pair stays."""
    person = connect_expired(fault_stack)
    fault_stack.provider.fault("token", "hang")
    callers = servers * 8
    with concurrent.futures.ThreadPoolExecutor(len(callers)) as pool:
        outcomes = list(pool.map(lambda client: client.outcome(person), callers))
    assert {outcome.split()[0] for outcome in outcomes} == {"DEADLINE_EXCEEDED"}
    assert len(fault_stack.provider.requests(grant_type="refresh_token")) == 1
    fault_stack.provider.heal()
    assert servers[0].outcome(person) == "OK"


def test_a_killed_refresher(fault_stack: Stack, soaking: bool) -> None:
    """SIGKILL at a random instant of a refresh: another process takes over.

    The connection works afterwards. It may say NEEDS_REAUTH only when the provider had already
    spent the refresh token for the killed process: then nobody can have the new pair.
    """
    survivor_port = free_port()
    lost = 0
    rounds = KILL_ROUNDS if soaking else KILL_ROUNDS // 10
    with ExitStack() as exit_stack:
        exit_stack.enter_context(fault_stack.server(survivor_port))
        [survivor] = clients(fault_stack, [survivor_port], exit_stack)
        for _ in range(rounds):
            person = connect_expired(fault_stack)
            with fault_stack.server() as process, ExitStack() as round_stack:
                [victim] = clients(fault_stack, [fault_stack.grpc_port], round_stack)
                refreshed = _kill_during_refresh(fault_stack, process, victim, person)
            outcome = survivor.outcome(person)
            if outcome == "OK":
                continue
            assert outcome.startswith("FAILED_PRECONDITION"), outcome
            assert "connect again" in outcome
            assert refreshed, "NEEDS_REAUTH although the provider had not answered the killed process"
            lost += 1
    print(f"killed refreshers: {rounds}; connections lost with the provider's answer: {lost}")


def _kill_during_refresh(stack: Stack, process: Process, victim: Client, person: Person) -> bool:
    """Kill a server somewhere in a refresh; whether the provider had spent the token by then."""
    stack.provider.configure(latency=random.choice([0.0, 0.2]))
    assert victim.outcome(stack.person()).startswith("NOT_FOUND")  # the channel is up
    asking = threading.Thread(target=victim.outcome, args=(person,))
    asking.start()
    threading.Event().wait(random.uniform(0.0, 0.05))  # the instant is the point, not a condition
    process.kill()
    asking.join()
    stack.provider.configure(latency=0.0)
    refreshes: int = stack.provider.families()[-1]["refreshes"]
    return refreshes > 0


def test_a_slow_refresher_cannot_overwrite(fault_stack: Stack, servers: list[Client]) -> None:
    """A refresher that answers after its lease: the user has connected anew meanwhile, and that stays."""
    person = connect_expired(fault_stack)
    provider = fault_stack.provider
    provider.configure(latency=0.5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(servers[0].token, person)
        await_condition(lambda: len(provider.requests(grant_type="refresh_token")) == 1, "the slow refresh")
        provider.configure(latency=0.0)
        fault_stack.connect(person)
        newest = provider.families()[-1]
        assert slow.result() == newest["access_token"]
    assert servers[1].token(person) == newest["access_token"]
    assert (newest["refreshes"], newest["reused"]) == (0, False)


def test_disconnected_during_a_refresh(fault_stack: Stack, servers: list[Client]) -> None:
    """The pair that arrives after the user has disconnected is revoked, not kept."""
    person = connect_expired(fault_stack)
    provider = fault_stack.provider
    provider.configure(latency=0.5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(servers[0].outcome, person)
        await_condition(lambda: len(provider.requests(grant_type="refresh_token")) == 1, "the refresh")
        fault_stack.app.integrations.revoke(person.id, "flo")
        assert asking.result().startswith("NOT_FOUND")
    await_condition(lambda: provider.families()[-1]["revoked"], "the revocation")
    assert servers[1].outcome(person).startswith("NOT_FOUND")


def test_a_dead_holders_lease_runs_out(fault_stack: Stack, servers: list[Client]) -> None:
    """A lease whose holder is gone delays the next refresh by what is left of it, no more."""
    person = connect_expired(fault_stack)
    app = fault_stack.app
    assert app.integrations.lease.total_seconds() == LEASE
    lease_end = app.clock.now() + app.integrations.lease
    with app.database.writing():
        holding = Connection.update(lease_epoch=Connection.lease_epoch + 1, lease_expires_at=lease_end)
        assert holding.where(Connection.user == person.id).execute() == 1
    assert servers[0].outcome(person) == "OK"
    assert app.clock.now() >= lease_end
    assert len(fault_stack.provider.requests(grant_type="refresh_token")) == 1


@pytest.mark.parametrize("signal_name", ["kill", "stop"])
def test_a_revocation_survives_the_server(fault_stack: Stack, signal_name: str) -> None:
    """What was answered OK is done, although the process that answered is gone."""
    provider = fault_stack.provider
    with fault_stack.server() as process:
        person = connect_expired(fault_stack)
        provider.fault("revoke", "hang")
        fault_stack.app.integrations.revoke(person.id, "flo")
        await_condition(lambda: len(provider.requests("revoke")) >= 1, "the first attempt")
        process.kill() if signal_name == "kill" else process.stop()
    provider.heal()
    # The dead worker's claim has to run out first: make that soon, not in a minute.
    app = fault_stack.app
    with app.database.writing():
        assert Job.update(run_at=app.clock.now()).execute() == 1
    with fault_stack.server():
        await_condition(lambda: provider.families()[-1]["revoked"], "the revocation after the restart")
