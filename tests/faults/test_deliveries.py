"""Deliveries under fire: servers and dispatchers that are killed at any instant, and two dispatchers at once."""

import contextlib
import itertools
import json
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import httpx
import pytest

from doorward_server.consents import ERRORS, Question, Status
from doorward_server.models import ConsentRequest, Delivery
from tests.contract.test_request_api_key import AT_ONCE, NO_LIMITS, Bot, bot_of, by_form, fields_of, snowflake
from tests.processes import BIN, Process, await_condition, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.sandbox.receiver import Callback, Receiver, callback_receiver
from tests.stack import Stack, make_stack

SERVERS, DISPATCHERS = 3, 2
REQUESTS, KILLS = 20, 5
SOAK_REQUESTS, SOAK_KILLS = 200, 100
# A dead worker's claims are free again after the lease, which has to be twice as long as an attempt may take.
ENVIRONMENT = AT_ONCE | {"DOORWARD_JOBS_LEASE": "1.2"}
ASKERS = 4
KEYS = ["fault-key-1", "fault-key-2"]


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with callback_receiver(tmp_path / "receiver.log") as receiver:
        yield receiver


@pytest.fixture
def fault_stack(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str], receiver: Receiver) -> Stack:
    """A home of this test's own, with nothing running yet."""
    schedule = [0.05] * 100
    more = (
        f"{NO_LIMITS}[callbacks]\nallow = [{json.dumps(receiver.address)}]\n"
        f"schedule = {schedule}\ntimeout = 0.5\nconnect_timeout = 0.5\n[consents]\ntimeout = 3\n"
    )
    stack = make_stack(tmp_path / "home", logs, provider, secrets, more, **ENVIRONMENT)
    ports = [stack.grpc_port, *(free_port() for _ in range(SERVERS - 1))]
    upstreams = [f"unix:{stack.home}/doorward-{port}.sock" for port in ports]
    stack.environment["DOORWARD_GATEWAY_UPSTREAMS"] = ",".join(upstreams)
    return stack


def ports_of(stack: Stack) -> list[int]:
    """The servers' ports; the first is the one that the bot knows."""
    sockets = stack.environment["DOORWARD_GATEWAY_UPSTREAMS"].split(",")
    return [int(socket.rpartition("-")[2].removesuffix(".sock")) for socket in sockets]


@contextlib.contextmanager
def running_role(stack: Stack, role: str, number: int = 0) -> Iterator[Process]:
    """A server that does no jobs, on the port of its number, or a dispatcher."""
    arguments, ready = (["serve", "--no-work"], '"serving"') if role == "serve" else (["work"], '"working"')
    environment = stack.environment | {"DOORWARD_GRPC_PORT": str(ports_of(stack)[number])} if role == "serve" else {}
    log = stack.logs / f"{role}-{number}.log"
    with running([BIN / "doorward", *arguments], log, stack.environment | environment) as process:
        process.await_output(ready)
        yield process


class Killer:
    """Keeps servers and dispatchers running, and kills one of them at random instants."""

    def __init__(self, stack: Stack, kills: int) -> None:
        self._stack = stack
        self._kills = kills
        self._thread = threading.Thread(target=self._run)
        self._finished = threading.Event()
        self.failure: BaseException | None = None
        self.done = 0

    def __enter__(self) -> "Killer":
        roles = [
            *(("serve", number) for number in range(SERVERS)),
            *(("work", number) for number in range(DISPATCHERS)),
        ]
        self._exits = {role: self._start(*role) for role in roles}
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._finished.set()
        self._thread.join()
        for _, running_until in self._exits.values():
            running_until.close()

    @property
    def has_finished(self) -> bool:
        return not self._thread.is_alive()

    def _start(self, role: str, number: int) -> tuple[Process, ExitStack]:
        exit_stack = ExitStack()
        return exit_stack.enter_context(running_role(self._stack, role, number)), exit_stack

    def _run(self) -> None:
        try:
            while self.done < self._kills:
                if self._finished.wait(random.uniform(0.0, 0.4)):  # the instant is the point, not a condition
                    return
                role = random.choice([*self._exits])
                process, running_until = self._exits[role]
                process.kill()
                running_until.close()
                self.done += 1
                self._exits[role] = self._start(*role)
        except BaseException as failure:  # noqa: BLE001 - the test raises it
            self.failure = failure


class Asker:
    """An application and its user: asks until the answer is OK, and decides until the decision is answered."""

    def __init__(self, stack: Stack, receiver: Receiver, bot: Bot, user: str, key_ids: list[int]) -> None:
        self._stack = stack
        self._receiver = receiver
        self._bot = bot
        self._user = user
        self._key_ids = key_ids
        # By state: what the bot was told the outcome is; None when it decided nothing.
        self.outcomes: dict[str, str | None] = {}

    def ask(self, state: str) -> None:
        fields = fields_of(userid=self._user, state=state, callback=f"{self._receiver.url}/{state}")

        def answered_ok() -> bool:
            with contextlib.suppress(httpx.TransportError):
                answer = by_form(self._stack, fields)
                assert answer.status_code in (200, 503), answer.text
                return answer.status_code == 200
            return False

        await_condition(answered_ok, "OK")
        request = ConsentRequest.select().where(ConsentRequest.state == state.encode()).get()
        self.outcomes[state] = self._decide(request.id, random.choice(["grant", "grant", "cancel", "block", "wait"]))

    def _decide(self, request_id: int, decision: str) -> str | None:
        if decision == "wait":
            return None
        told: list[str] = []

        def decided() -> bool:
            with contextlib.suppress(grpc.RpcError):
                match decision:
                    case "grant":
                        told.append(self._bot.grant(request_id, *self._key_ids))
                    case "cancel":
                        told.append(self._bot.cancel(request_id))
                    case _:
                        told.append(self._bot.report_blocked(request_id))
            return bool(told)

        await_condition(decided, "the outcome")
        return told[0]


def test_killed_servers_and_dispatchers(fault_stack: Stack, receiver: Receiver, soaking: bool) -> None:
    """Each request answered OK ends in exactly one outcome, which is delivered; none carries keys and an error."""
    requests, kills = (SOAK_REQUESTS, SOAK_KILLS) if soaking else (REQUESTS, KILLS)
    user = snowflake()
    fault_stack.secrets.update(KEYS)
    owner = fault_stack.app.discord_users.obtain(user)
    key_ids = [fault_stack.app.api_keys.add(owner, "game", "Key", key, actor="test").id for key in KEYS]
    numbers, lock, failures = itertools.count(), threading.Lock(), list[BaseException]()
    with Killer(fault_stack, kills) as killer, fault_stack.gateway(), bot_of(fault_stack) as bot:
        asker = Asker(fault_stack, receiver, bot, user, key_ids)

        def ask_on() -> None:
            """At least so many requests, and on until the last kill."""
            try:
                while True:
                    with lock:
                        number = next(numbers)
                    if number >= requests and killer.has_finished:
                        return
                    if number % 7 == 0:
                        receiver.fault(status=500, times=3)
                    asker.ask(f"state-{number}")
                    # Spread over the time that the kills take.
                    threading.Event().wait(random.uniform(0.0, 0.5))
            except BaseException as failure:  # noqa: BLE001 - the test raises it
                failures.append(failure)
            finally:
                fault_stack.app.database.engine.close()

        threads = [threading.Thread(target=ask_on) for _ in range(ASKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (failures, killer.failure, killer.done) == ([], None, kills)
        await_condition(all_delivered, "all deliveries", patience=60)
    came = by_state(receiver)
    assert set(came) == set(asker.outcomes)
    assert len(asker.outcomes) >= requests
    for state, told in asker.outcomes.items():
        check_outcome(state, told, came[state])
    assert not any(callback.overlaps for callbacks in came.values() for callback in callbacks)
    # The receiver refuses some, and those come again as they should.
    duplicates = sum(max(0, sum(one.status == 200 for one in callbacks) - 1) for callbacks in came.values())
    print(f"requests: {len(came)}; kills: {killer.done}; duplicates under the same webhook-id: {duplicates}")


def all_delivered() -> bool:
    unfinished = ConsentRequest.select().where(ConsentRequest.finished_at.is_null()).count()
    return not unfinished and not Delivery.select().where(Delivery.status != "sent").count()


def by_state(receiver: Receiver) -> dict[str, list[Callback]]:
    came = defaultdict(list)
    for callback in receiver.callbacks():
        came[str(callback.field("state"))].append(callback)
    return dict(came)


def check_outcome(state: str, told: str | None, callbacks: list[Callback]) -> None:
    """One request, one outcome, one delivery, however often it came."""
    [request] = ConsentRequest.select().where(ConsentRequest.state == state.encode())
    assert request.status == (told or "timed_out")
    [delivery] = Delivery.select().where(Delivery.request == request.id)
    expected = KEYS if request.status == "granted" else []
    for callback in callbacks:
        assert callback.webhook_id == delivery.webhook_id
        assert (callback.keys, callback.field("error")) == (expected, ERRORS[Status(request.status)])
    assert any(callback.status == 200 for callback in callbacks)


def test_two_dispatchers(fault_stack: Stack, receiver: Receiver) -> None:
    """A delivery is never under way twice, also when it is slow and has to be tried again."""
    receiver.fault(status=500, delay=0.03, times=30)
    app, count = fault_stack.app, 40
    with running_role(fault_stack, "work", 1), running_role(fault_stack, "work", 2):
        for number in range(count):
            question = Question("Bot", str(number), f"{receiver.url}/{number % 5}", f"state-{number}")
            request_id = app.consents.request(question, None, "192.0.2.1")
            app.consents.resolve(request_id, Status.CANCELED, actor="test")
        await_condition(all_delivered, "all deliveries")
    came = receiver.callbacks()
    assert not [callback for callback in came if callback.overlaps]
    assert sum(callback.status == 500 for callback in came) == 30
    delivered = [callback.webhook_id for callback in came if callback.status == 200]
    assert len(delivered) == len(set(delivered)) == count


def test_a_killed_dispatcher_s_attempt_is_made_again(fault_stack: Stack, receiver: Receiver) -> None:
    """Killed while the application thinks: it hears of the same delivery once more."""
    receiver.fault(kind="hang")
    app = fault_stack.app
    question = Question("Bot", snowflake(), f"{receiver.url}/killed", "state")
    with running_role(fault_stack, "work", 3) as dispatcher:
        app.consents.resolve(app.consents.request(question, None, "192.0.2.1"), Status.CANCELED, actor="test")
        await_condition(lambda: bool(receiver.callbacks("/killed")), "the first attempt")
        dispatcher.kill()
    receiver.heal()
    assert Delivery.get().status == "queued"
    with running_role(fault_stack, "work", 4):
        await_condition(all_delivered, "the delivery after the restart")
    first, *_, last = receiver.callbacks("/killed")
    assert (first.webhook_id, first.pairs) == (last.webhook_id, last.pairs)
    assert last.status == 200
