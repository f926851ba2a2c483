"""Rotation of the master key under fire: beside servers at work, killed at any instant, and two at once."""

import concurrent.futures
import contextlib
import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward_server.crypto import KeyRing
from doorward_server.errors import OperatorError
from doorward_server.master_keys import SEALED
from doorward_server.models import Delivery
from tests.contract.test_request_api_key import AT_ONCE, NO_LIMITS, Bot, bot_of, by_form, fields_of, snowflake
from tests.processes import BIN, Process, await_condition, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.sandbox.receiver import Receiver, callback_receiver
from tests.stack import LEASE, TIMEOUT, Person, Stack, make_stack, rest

VALUES = 200
ROTATIONS, SOAK_ROTATIONS = 2, 20
KILLS, SOAK_KILLS = 4, 60


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with callback_receiver(tmp_path / "receiver.log") as receiver:
        yield receiver


@pytest.fixture
def fault_stack(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str], receiver: Receiver) -> Stack:
    """A home of this test's own, with nothing running yet. No call may fail here, so none is short of time."""
    more = f"{NO_LIMITS}[callbacks]\nallow = [{json.dumps(receiver.address)}]\nschedule = {[0.1] * 50}\n"
    stack = make_stack(tmp_path / "home", logs, provider, secrets, more, **AT_ONCE)
    settings = stack.home / "doorward.toml"
    patient = settings.read_text().replace(f"timeout = {TIMEOUT}\n", "timeout = 6\n")
    settings.write_text(patient.replace(f"lease = {LEASE}\n", "lease = 9\n"))
    return stack


# What is stored


def fill(stack: Stack, count: int = VALUES) -> None:
    """Store so many keys of one user each."""
    app = stack.app
    app.record_key()
    for number in range(count):
        value = f"stored-key-{number}"
        stack.secrets.add(value)
        owner = app.discord_users.obtain(snowflake())
        app.api_keys.add(owner, "game", "Key", value, actor="test")


def ids(stack: Stack) -> list[str]:
    """The keys of the file; it is whole at every instant."""
    return KeyRing.read(stack.home / "master.key").ids


def open_all(stack: Stack, key_ids: list[str]) -> list[str]:
    """All sealed values, opened with these keys of the file alone."""
    lines = (stack.home / "master.key").read_text().splitlines()
    chosen = [line for line in lines if any(f":{key_id}:" in line for key_id in key_ids)]
    ring = KeyRing.parse("\n".join(chosen), "the test")
    return [
        ring.open(bytes(sealed), column.place(row_id))
        for column in SEALED
        for row_id, sealed in stack.app.database.fetch_rows(
            f"SELECT id, {column.column} FROM {column.table} WHERE {column.column} IS NOT NULL", ()
        )
    ]


def rotating(stack: Stack, name: str = "rotate") -> contextlib.AbstractContextManager[Process]:
    """A `doorward master-key rotate` that has just been started."""
    return running([BIN / "doorward", "master-key", "rotate", "--json"], stack.logs / f"{name}.log", stack.environment)


# While others work


class Clients:
    """Threads that do the same call again and again until the end; the first failure of any is kept."""

    def __init__(self, *calls: Callable[[], None]) -> None:
        self._calls = calls
        self._end = threading.Event()
        self.counts = [0] * len(calls)

    def _repeat(self, number: int) -> None:
        while not self._end.is_set():
            self._calls[number]()
            self.counts[number] += 1

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """For the time of a `with` block, in which each call is made at least once more; raises what one raised."""
        with concurrent.futures.ThreadPoolExecutor(len(self._calls)) as pool:
            threads = [pool.submit(self._repeat, number) for number in range(len(self._calls))]
            try:
                self.await_more(1, threads)
                yield
                self.await_more(2, threads)
            finally:
                self._end.set()
        for thread in threads:
            thread.result()

    def await_more(self, times: int, threads: "list[concurrent.futures.Future[None]]") -> None:
        wanted = [count + times for count in self.counts]

        def made() -> bool:
            if any(thread.done() for thread in threads):
                return True  # it has failed
            return all(count >= least for count, least in zip(self.counts, wanted, strict=True))

        await_condition(made, f"{times} more calls of each", patience=120)


def refreshing(stack: Stack, port: int, token: str, person: Person) -> Callable[[], None]:
    """Asks for an access token, which has always run out."""

    def ask() -> None:
        request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")
        metadata = (("authorization", f"Bearer {token}"),)
        with stack.stub(port) as stub:
            assert stub.GetAccessToken(request, metadata=metadata, timeout=30).access_token.startswith("access-")

    return ask


def connecting(stack: Stack, person: Person) -> Callable[[], None]:
    """Connects, and now and then disconnects, through the gateway."""
    path, numbers = "/api/v1/users/me/integrations/kai/min", itertools.count(1)
    headers = {"cookie": f"doorward_session={person.cookie}"}

    def connect() -> None:
        body = {"code": stack.provider.code("min")}
        answer = rest(stack, "POST", f"{path}/oauth2callback", headers=headers, json=body)
        assert (answer.status_code, answer.json()) == (200, {})
        if next(numbers) % 3 == 0:
            assert rest(stack, "DELETE", path, headers=headers).status_code == 200

    return connect


def sharing(stack: Stack, receiver: Receiver, bot: Bot) -> Callable[[], None]:
    """Adds a key, asks for it, grants it, and waits until it has come."""
    numbers = itertools.count()

    def share() -> None:
        number, user = next(numbers), snowflake()
        value = f"shared-key-{number}"
        key_ids = bot.add_keys(user, value)
        assert by_form(stack, fields_of(userid=user, callback=f"{receiver.url}/{user}")).text == "OK"
        [request] = stack.app.consents.latest(user, 1)
        assert bot.grant(request.id, *key_ids) == "granted"
        [callback] = receiver.await_callbacks(f"/{user}")
        assert callback.keys == [value]

    return share


def test_no_call_fails(fault_stack: Stack, receiver: Receiver, soaking: bool) -> None:
    """Two servers refresh, connect, disconnect, take requests and deliver, while key after key takes the place."""
    fill(fault_stack)
    [first] = ids(fault_stack)
    fault_stack.provider.configure(expires_in=0)  # every call refreshes
    second_port, token = free_port(), fault_stack.service_token("backend")
    people = [fault_stack.person() for _ in range(3)]
    for person in people[:2]:
        fault_stack.connect(person)
    rotations = []
    with (
        fault_stack.server() as one,
        fault_stack.server(second_port) as other,
        fault_stack.gateway(),
        bot_of(fault_stack) as bot,
    ):
        clients = Clients(
            refreshing(fault_stack, fault_stack.grpc_port, token, people[0]),
            refreshing(fault_stack, second_port, token, people[0]),
            refreshing(fault_stack, second_port, token, people[1]),
            connecting(fault_stack, people[2]),
            sharing(fault_stack, receiver, bot),
        )
        with clients.calling():
            for _ in range(SOAK_ROTATIONS if soaking else ROTATIONS):
                rotations.append(fault_stack.cli_json("master-key", "rotate", "--drop"))
        await_condition(lambda: not Delivery.select().where(Delivery.status != "sent").count(), "all deliveries")
        assert not [line for server in (one, other) for line in server.output().splitlines() if '"error"' in line]
    assert [rotation["needed"] for rotation in rotations] == [[]] * len(rotations)
    assert [rotation["dropped"] for rotation in rotations] == [
        [before] for before in [first, *(rotation["id"] for rotation in rotations[:-1])]
    ]
    assert ids(fault_stack) == [rotations[-1]["id"]]
    assert len(open_all(fault_stack, ids(fault_stack))) > VALUES
    assert not [family for family in fault_stack.provider.families() if family["reused"]]
    print(f"rotations: {len(rotations)}; calls that all succeeded: {clients.counts}")


def test_a_slow_refresh_during_a_rotation_is_kept(fault_stack: Stack) -> None:
    """The pair is sealed anew while its successor is on the way: it stays the pair that the successor follows."""
    person, provider = fault_stack.person(), fault_stack.provider
    provider.configure(expires_in=0)
    fault_stack.connect(person)
    provider.configure(expires_in=3600)
    token = fault_stack.service_token("backend")
    request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")
    metadata = (("authorization", f"Bearer {token}"),)
    with fault_stack.server(), fault_stack.stub() as stub:
        provider.configure(latency=2.0)
        asking = stub.GetAccessToken.future(request, metadata=metadata, timeout=30)
        waiting = stub.GetAccessToken.future(request, metadata=metadata, timeout=30)
        await_condition(lambda: len(provider.requests(grant_type="refresh_token")) == 1, "the slow refresh")
        rotation = fault_stack.app.master_keys.rotate()
        assert rotation.resealed == 2
        assert not asking.done()  # the provider still thinks
        tokens = {call.result().access_token for call in (asking, waiting)}
        family = provider.families()[-1]
        assert tokens == {family["access_token"]}
        assert stub.GetAccessToken(request, metadata=metadata, timeout=30).access_token == family["access_token"]
    assert (family["refreshes"], family["reused"]) == (1, False)
    assert len(provider.requests(grant_type="refresh_token")) == 1
    assert len(open_all(fault_stack, [rotation.key_id])) == 2


def test_what_runs_survives_a_broken_key_file(fault_stack: Stack) -> None:
    """It says so, and goes on with the keys that it has; and takes up the file when it is mended."""
    person, path = fault_stack.person(), fault_stack.home / "master.key"
    token, content = fault_stack.service_token("backend"), path.read_bytes()
    fault_stack.provider.configure(expires_in=0)
    fault_stack.connect(person)
    ask = refreshing(fault_stack, fault_stack.grpc_port, token, person)
    with fault_stack.server() as server:
        ask()
        path.write_bytes(content[:-20])
        ask()
        server.await_output("key file cannot be used; the keys at hand stay")
        path.write_bytes(content)
        new = fault_stack.cli_json("master-key", "rotate", "--drop")["id"]
        ask()
    assert len(open_all(fault_stack, [new])) == 2


# Killed


def test_killed_rotations_go_on(fault_stack: Stack, soaking: bool) -> None:
    """SIGKILL at random instants: everything opens at any time, and there is one new key, however many were killed."""
    fill(fault_stack)
    kills, finished = SOAK_KILLS if soaking else KILLS, 0
    [old] = ids(fault_stack)
    for _ in range(kills):
        with rotating(fault_stack, "killed") as process:
            await_random_instant(fault_stack, process)
            process.kill()
        now = ids(fault_stack)
        assert len(now) <= 2, "another key was made"
        assert old in now
        assert len(open_all(fault_stack, now)) == VALUES
        fault_stack.app.record_key()  # as a server that starts: it has all that it needs
        if now[0] != old and not left(fault_stack):
            # All was done, so the next rotation makes a key of its own.
            fault_stack.app.master_keys.drop(old)
            [old] = ids(fault_stack)
            finished += 1
    rotation = fault_stack.cli_json("master-key", "rotate")
    assert ids(fault_stack) == [rotation["id"], old]
    assert len(open_all(fault_stack, [rotation["id"]])) == VALUES
    print(f"killed rotations: {kills}; had sealed everything anew by then: {finished}")


def left(stack: Stack) -> int:
    """How many values are not under the first key."""
    _, *others = stack.app.master_keys.status()
    return sum(sum(other.values.values()) for other in others)


def await_random_instant(stack: Stack, process: Process) -> None:
    """Somewhere from its start to its end: half of the time while it starts, else while it seals anew."""
    if random.random() < 0.5:
        threading.Event().wait(random.uniform(0.2, 1.5))  # the instant is the point, not a condition
        return
    await_condition(lambda: left(stack) > 0 or bool(process.output()), "the rotation")
    target = random.randrange(max(1, left(stack)))
    await_condition(lambda: left(stack) <= target or bool(process.output()), f"{target} values left")


# Two at once


def test_two_rotations_at_once(fault_stack: Stack) -> None:
    """The second one, which had begun before the first one made its key, helps with that key."""
    fill(fault_stack)
    [first] = ids(fault_stack)
    app = fault_stack.app
    assert app.keys.ids == [first]
    with rotating(fault_stack, "first") as process:
        await_condition(lambda: len(ids(fault_stack)) == 2, "the new key")
        second = app.master_keys.rotate()
        assert process.wait() == 0
        told = json.loads(process.output())
    assert ids(fault_stack) == [told["id"], first]
    assert (second.key_id, told["needed"], second.needed) == (told["id"], [], [])
    assert second.resealed + told["resealed"] == VALUES
    assert len(open_all(fault_stack, [told["id"]])) == VALUES


def test_a_key_is_dropped_the_moment_that_nothing_needs_it(fault_stack: Stack) -> None:
    """Tried again and again while a rotation is under way."""
    fill(fault_stack)
    [first] = ids(fault_stack)
    refusals: list[str] = []
    with rotating(fault_stack, "dropped") as process:
        await_condition(lambda: ids(fault_stack)[0] != first, "the new key")
        while len(ids(fault_stack)) == 2:
            try:
                fault_stack.app.master_keys.drop(first)
            except OperatorError as refusal:
                refusals.append(str(refusal))
        assert process.wait() == 0
    assert {f"values need the master key {first}" in refusal for refusal in refusals} == {True}
    assert len(open_all(fault_stack, ids(fault_stack))) == VALUES
    print(f"refused while it was needed: {len(refusals)} times")
