"""Deliveries: when they are tried again, what they carry by then, and where they never go."""

import itertools
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import pytest

from doorward_server.applications import Registered
from doorward_server.clock import Clock
from doorward_server.consents import Status
from doorward_server.delivery import Deliveries, Paces, Schedule
from doorward_server.errors import DeliveryNotAbandoned, DeliveryNotFound, NoKeyLeft
from doorward_server.jobs import Action, Ending, PutOff
from doorward_server.models import AuditEvent, ConsentRequest, Delivery, DeliveryAttempt, Job
from tests.engines import contents, held
from tests.processes import await_condition
from tests.unit.conftest import StoppedClock
from tests.unit.peers import Peer, Serve, answering, read_request
from tests.unit.test_consents import ALLOWED, CALLBACK, NO_LIMITS, NOWHERE, USER, World

SCHEDULE = (5, 300, 1800, 7200, 18000, 36000, 36000)
HOUR = timedelta(hours=1)
STATUS_LINES = {200: "200 OK", 302: "302 Found", 410: "410 Gone", 429: "429 Too Many", 500: "500 Oops", 503: "503 Busy"}
_NUMBERS = itertools.count(1)


def allowing(*addresses: str, more: str = "") -> str:
    return f"{NO_LIMITS}[callbacks]\nallow = {json.dumps([NOWHERE, *addresses])}\n{more}"


class Received(NamedTuple):
    """One POST."""

    webhook_id: str
    pairs: list[tuple[str, str]]

    @property
    def keys(self) -> list[str]:
        return [value for name, value in self.pairs if name == "api_keys"]

    @property
    def error(self) -> str | None:
        return dict(self.pairs).get("error")


class Application:
    """A receiver that answers as it is told, and a world that may connect to it."""

    def __init__(self, peer: Peer, seen: list[bytes], answers: list[Serve]) -> None:
        self.peer = peer
        self._seen = seen
        self._answers = answers
        self.world: World

    @property
    def callback(self) -> str:
        return f"{self.peer.url}/callback/{next(_NUMBERS)}"

    def answer(self, status: int, *headers: str) -> None:
        """How it answers from now on."""
        self.serve(answering(b"", *headers, status=STATUS_LINES[status], seen=self._seen))

    def serve(self, serve: Serve) -> None:
        self._answers.append(serve)

    @property
    def received(self) -> list[Received]:
        return [_read(request) for request in self._seen]

    def deliver(self, outcome: Status = Status.CANCELED, *key_ids: int) -> Delivery:
        """A request that has an outcome, to be delivered here."""
        request_id = self.world.ask(callback=self.callback)
        self.world.resolve(request_id, outcome, *key_ids)
        return Delivery.get(Delivery.request == request_id)

    def work(self) -> None:
        """Do all jobs that are due."""
        while self.world.app.worker.run_one():
            pass

    def wait_for_next(self, delivery: Delivery) -> timedelta:
        """Let the clock go on to the next attempt and make it; how long it was away."""
        due = Delivery.get_by_id(delivery.id).next_attempt_at
        delay: timedelta = due - self.world.clock.now()
        self.world.clock.advance(delay - timedelta(microseconds=1))
        before = len(self._seen)
        self.work()
        assert len(self._seen) == before, "an attempt came too early"
        self.world.clock.advance(timedelta(microseconds=1))
        self.work()
        return delay


def _read(request: bytes) -> Received:
    head, _, body = request.decode().partition("\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:])
    return Received(headers["webhook-id"], parse_qsl(body, keep_blank_values=True, strict_parsing=True))


@pytest.fixture
def make_application(tmp_path: Path, clock: StoppedClock) -> Iterator[Callable[..., Application]]:
    with ExitStack() as exit_stack:

        def make(more: str = "", clock: Clock = clock) -> Application:
            seen: list[bytes] = []
            answers: list[Serve] = [answering(b"", seen=seen)]

            def serve(connection: socket.socket, stopping: threading.Event) -> None:
                answers[-1](connection, stopping)

            peer = exit_stack.enter_context(Peer(serve))
            application = Application(peer, seen, answers)
            home = tmp_path / f"home-{next(_NUMBERS)}"
            application.world = World(home, clock, allowing(peer.address, more=more))  # type: ignore[arg-type]
            exit_stack.callback(application.world.close)
            return application

        yield make


@pytest.fixture
def application(make_application: Callable[[], Application]) -> Application:
    return make_application()


def state_of(delivery: Delivery) -> tuple[str, int, bool]:
    row = Delivery.get_by_id(delivery.id)
    return row.status, row.attempts, row.next_attempt_at is not None


# The schedule


@pytest.mark.parametrize(("attempts", "seconds"), [*enumerate(SCHEDULE, 1)])
@pytest.mark.parametrize("retry_after", [None, 0.0, -5.0])
def test_delays(attempts: int, seconds: int, retry_after: float | None) -> None:
    """Never earlier, up to a tenth later, and not always the same."""
    delays = [Schedule(SCHEDULE).delay(attempts, retry_after) for _ in range(200)]
    found = [delay.total_seconds() for delay in delays if delay is not None]
    assert len(found) == 200
    assert seconds <= min(found) < max(found) <= seconds * 1.1


@pytest.mark.parametrize("retry_after", [None, 10.0])
def test_after_the_schedule_there_is_nothing(retry_after: float | None) -> None:
    assert Schedule(SCHEDULE).delay(8, retry_after) is None
    assert Schedule(()).delay(1, retry_after) is None


@pytest.mark.parametrize(
    ("asked", "expected"), [(4.0, 5.0), (60.0, 60.0), (86400.0, 86400.0), (86401.0, 86400.0), (1e10, 86400.0)]
)
def test_what_the_receiver_asks_for(asked: float, expected: float) -> None:
    delay = Schedule(SCHEDULE).delay(1, asked)
    assert delay is not None
    assert expected <= delay.total_seconds() <= max(expected, 5.5)


def test_28_hours(application: Application) -> None:
    """The whole schedule at a receiver that never gets well; then it is abandoned, and stays visible."""
    application.answer(500)
    delivery = application.deliver()
    started = application.world.clock.now()
    application.work()
    delays = [application.wait_for_next(delivery).total_seconds() for _ in SCHEDULE]
    for delay, seconds in zip(delays, SCHEDULE, strict=True):
        assert seconds <= delay <= seconds * 1.1
    assert state_of(delivery) == ("abandoned", 8, False)
    assert 27.5 * HOUR < application.world.clock.now() - started < 30.5 * HOUR
    assert len(set(map(repr, application.received))) == 1
    assert len(application.received) == 8
    attempts = application.world.app.deliveries.attempts(delivery.id)
    assert [(attempt.status, attempt.error) for attempt in attempts] == [(500, None)] * 8
    application.world.clock.advance(24 * 365 * HOUR)
    application.work()
    assert len(application.received) == 8
    [shown] = application.world.app.deliveries.latest()
    assert shown.id == delivery.id


@pytest.mark.parametrize("failures", range(1, 8))
def test_success_ends_it(application: Application, failures: int) -> None:
    application.answer(500)
    delivery = application.deliver()
    application.work()
    for _ in range(failures - 1):
        application.wait_for_next(delivery)
    application.answer(200)
    application.wait_for_next(delivery)
    assert state_of(delivery) == ("sent", failures + 1, False)
    assert Job.select().where(Job.kind == "delivery").count() == 0


@pytest.mark.parametrize(
    ("status", "after", "ended"), [(200, 0, "sent"), (410, 0, "abandoned"), (302, 1, "queued"), (500, 1, "queued")]
)
def test_what_an_answer_means(application: Application, status: int, after: int, ended: str) -> None:
    application.answer(status, "Location: /elsewhere")
    delivery = application.deliver()
    application.work()
    assert state_of(delivery) == (ended, 1, bool(after))
    assert len(application.received) == 1


def test_410_after_a_failure(application: Application) -> None:
    application.answer(500)
    delivery = application.deliver()
    application.work()
    application.answer(410)
    application.wait_for_next(delivery)
    assert state_of(delivery) == ("abandoned", 2, False)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        pytest.param("60", 60, 60, id="seconds"),
        pytest.param("3", 5, 5.5, id="less than the schedule"),
        pytest.param("999999999999999999999", 86400, 86400, id="ages"),
        pytest.param("Tue, 01 Jan 2030 01:00:00 GMT", 3600, 3600, id="date"),
        pytest.param("Tuesday, 01-Jan-30 01:00:00 GMT", 3600, 3600, id="date of RFC 850"),
        pytest.param("Sun, 01 Jan 2017 00:00:00 GMT", 5, 5.5, id="date gone by"),
        pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", 86400, 86400, id="date far away"),
        pytest.param("", 5, 5.5, id="empty"),
        pytest.param("soon", 5, 5.5, id="word"),
        pytest.param("-60", 5, 5.5, id="negative"),
        pytest.param("60.5", 5, 5.5, id="fraction"),
        pytest.param("Tue, 01 Jan 2030 01:00:00", 5, 5.5, id="date without a zone"),
        pytest.param("Tue, 01 Jan 2030 99999999999999999999:00:00 GMT", 5, 5.5, id="hour that no integer holds"),
        pytest.param("Tue, 01 Jan 99999999999999999999 01:00:00 GMT", 5, 5.5, id="year that no integer holds"),
        pytest.param("Tue, 01 Jan 2030 01:00:00 +99999999999999", 5, 5.5, id="zone that no integer holds"),
    ],
)
def test_retry_after(application: Application, header: str, least: float, most: float) -> None:
    application.answer(503, f"Retry-After: {header}")
    delivery = application.deliver()
    application.work()
    assert state_of(delivery) == ("queued", 1, True)
    assert least <= application.wait_for_next(delivery).total_seconds() <= most


def test_redelivery(application: Application) -> None:
    deliveries = application.world.app.deliveries
    application.answer(410)
    delivery = application.deliver()
    with pytest.raises(DeliveryNotAbandoned):
        deliveries.redeliver(delivery.id, actor="test")
    application.work()
    application.answer(500)
    deliveries.redeliver(delivery.id, actor="test")
    application.work()
    assert state_of(delivery) == ("queued", 1, True)
    application.answer(200)
    assert 5 <= application.wait_for_next(delivery).total_seconds() <= 5.5
    with pytest.raises(DeliveryNotAbandoned):
        deliveries.redeliver(delivery.id, actor="test")
    with pytest.raises(DeliveryNotFound):
        deliveries.redeliver(9999, actor="test")
    assert {received.webhook_id for received in application.received} == {delivery.webhook_id}


# What an attempt carries


def take_away(application: Application, way: str, key_id: int) -> None:
    """Remove a key, or revoke the grant with all of them."""
    world = application.world
    if way == "removed":
        world.app.api_keys.remove(world.user(), key_id, actor="test")
    else:
        for grant, _ in world.consents.grants(world.user()):
            world.consents.revoke_grant(world.user(), grant.id, actor="test")


def test_the_order_chosen(application: Application) -> None:
    one, two, three = application.world.add_keys("key-1", "key-2", "key-3")
    application.deliver(Status.GRANTED, two, three, one)
    application.work()
    [received] = application.received
    assert (received.keys, received.error) == (["key-2", "key-3", "key-1"], None)


@pytest.mark.parametrize("sent_before", [False, True])
def test_removed_keys_are_left_out(application: Application, sent_before: bool) -> None:
    ids = application.world.add_keys("key-1", "key-2", "key-3")
    application.answer(500)
    delivery = application.deliver(Status.GRANTED, *ids)
    if sent_before:
        application.work()
    take_away(application, "removed", ids[1])
    application.answer(200)
    if sent_before:
        application.wait_for_next(delivery)
    application.work()
    assert application.received[-1].keys == ["key-1", "key-3"]
    assert state_of(delivery)[0] == "sent"


@pytest.mark.parametrize("way", ["removed", "revoked"])
def test_none_left_before_anything_was_sent(application: Application, way: str) -> None:
    [key_id] = application.world.add_keys("key-1")
    delivery = application.deliver(Status.GRANTED, key_id)
    take_away(application, way, key_id)
    application.answer(500)
    application.work()
    application.answer(200)
    application.wait_for_next(delivery)
    assert [(received.keys, received.error) for received in application.received] == [([], "user canceled")] * 2
    assert state_of(delivery)[0] == "sent"


@pytest.mark.parametrize("way", ["removed", "revoked"])
def test_none_left_after_keys_went_out(application: Application, way: str) -> None:
    """Abandoned: an error now would contradict what the application may have got."""
    [key_id] = application.world.add_keys("key-1")
    application.answer(500)
    delivery = application.deliver(Status.GRANTED, key_id)
    application.work()
    take_away(application, way, key_id)
    application.world.clock.advance(HOUR)
    application.work()
    assert [received.keys for received in application.received] == [["key-1"]]
    assert state_of(delivery)[0] == "abandoned"
    log = application.world.app.deliveries.attempts(delivery.id)
    assert [(attempt.status, attempt.error) for attempt in log] == [(500, None), (None, "NO_KEY_LEFT")]
    with pytest.raises(NoKeyLeft):
        application.world.app.deliveries.redeliver(delivery.id, actor="test")
    assert len(application.received) == 1


def test_once_an_error_always_an_error(application: Application) -> None:
    """Keys that come back to the user do not come into a delivery that has said `user canceled`."""
    [key_id] = application.world.add_keys("key-1")
    application.answer(500)
    delivery = application.deliver(Status.GRANTED, key_id)
    take_away(application, "removed", key_id)
    application.work()
    application.world.add_keys("key-1")
    application.wait_for_next(delivery)
    assert [received.error for received in application.received] == ["user canceled"] * 2


def test_waiting_for_a_turn_sends_nothing(make_application: Callable[..., Application]) -> None:
    """While others have all turns no attempt is made: neither counted, nor taken for one with keys."""
    application = make_application(more="[jobs]\nthreads = 1\n")
    [key_id] = application.world.add_keys("key-1")
    delivery = application.deliver(Status.GRANTED, key_id)
    with application.world.app.callback_outbound.bulkhead.requesting("another"):
        application.work()
    assert (application.received, state_of(delivery)) == ([], ("queued", 0, True))
    take_away(application, "removed", key_id)
    application.world.clock.advance(timedelta(seconds=2))
    application.work()
    assert [received.error for received in application.received] == ["user canceled"]


def test_what_was_opened_long_ago_is_not_sent(application: Application) -> None:
    """The machine slept, or the process was stopped: what may be shared is found out anew."""
    [key_id] = application.world.add_keys("key-1")
    delivery = application.deliver(Status.GRANTED, key_id)
    app = application.world.app
    forgetful = replace(app.deliveries, fresh=0.0)
    action = app.database.write(lambda: forgetful.begin({"delivery": delivery.id}))
    assert callable(action)
    ending = action()
    assert ending is not None
    assert app.database.write(ending) is not None
    assert (application.received, state_of(delivery)) == ([], ("queued", 0, True))
    take_away(application, "removed", key_id)
    application.work()
    assert [received.error for received in application.received] == ["user canceled"]


def test_a_late_attempt_that_sent_nothing_undoes_nothing(application: Application) -> None:
    """Another worker has sent the keys meanwhile: an error would contradict them."""
    [key_id] = application.world.add_keys("key-1")
    delivery = application.deliver(Status.GRANTED, key_id)
    app = application.world.app

    def begin(deliveries: Deliveries) -> Ending:
        action = app.database.write(lambda: deliveries.begin({"delivery": delivery.id}))
        assert callable(action)
        ending = action()
        assert ending is not None
        return ending

    late = begin(replace(app.deliveries, fresh=0.0))
    begin(app.deliveries)  # this worker dies before it records its attempt
    app.database.write(late)
    take_away(application, "removed", key_id)
    application.work()
    assert [(received.keys, received.error) for received in application.received] == [(["key-1"], None)]
    assert state_of(delivery)[0] == "abandoned"
    events = [event.details for event in AuditEvent.select().where(AuditEvent.action == "keys.sent")]
    assert events == [{"status": "unknown"}] * 2


@pytest.mark.parametrize(("status", "ends"), [(200, "sent"), (410, "abandoned"), (500, "abandoned")])
def test_what_a_late_attempt_may_still_say(application: Application, status: int, ends: str) -> None:
    """That the delivery was sent, but not that it was not."""
    delivery = application.deliver()
    app = application.world.app
    application.answer(status)
    action = app.database.write(lambda: app.deliveries.begin({"delivery": delivery.id}))
    assert callable(action)
    ending = action()
    assert ending is not None
    application.answer(410)
    application.work()
    assert state_of(delivery)[0] == "abandoned"
    app.database.write(ending)
    assert (state_of(delivery)[0], state_of(delivery)[2]) == (ends, False)


def test_a_disabled_application_hears_nothing(make_application: Callable[..., Application]) -> None:
    """Until it is enabled again."""
    application = make_application()
    app = application.world.app
    made = app.applications.create("Registered", [f"{application.peer.url}/registered"])
    caller = Registered(made.application.id)
    request_id = application.world.ask(caller, callback=f"{application.peer.url}/registered/cb")
    app.applications.enable(made.application.id, enabled=False)
    application.world.resolve(request_id, Status.CANCELED)
    application.work()
    application.world.clock.advance(timedelta(minutes=10))
    application.work()
    assert application.received == []
    app.applications.enable(made.application.id, enabled=True)
    application.world.clock.advance(timedelta(minutes=1))
    application.work()
    assert [received.error for received in application.received] == ["user canceled"]


def test_a_turn_takes_as_long_as_the_host(clock: StoppedClock) -> None:
    paces = Paces()
    for seconds, expected in ((None, 1.0), (0.001, 0.2), (8.0, 8.0)):
        if seconds is not None:
            paces.note("example.com", seconds)
        turns = [paces.turn("example.com").total_seconds() for _ in range(100)]
        assert expected / 2 <= min(turns) < max(turns) <= expected * 1.5
        assert paces.is_quick("example.com") is (expected < 1)


def test_keys_sent_are_on_record(application: Application) -> None:
    ids = application.world.add_keys("key-1", "key-2")
    application.deliver(Status.GRANTED, *ids)
    application.work()
    [event] = AuditEvent.select().where(AuditEvent.action == "keys.sent")
    assert "key-1" not in str(event.details)
    assert str(ids[0]) in str(event.details)


def test_no_value_stands_in_the_database(application: Application) -> None:
    ids = application.world.add_keys("canary-key-7f3a")
    application.answer(500)
    application.deliver(Status.GRANTED, *ids)
    application.work()
    assert b"canary-key-7f3a" not in contents(application.world.app.database)


# Nothing is lost


def test_a_database_that_is_away_for_a_while(make_application: Callable[..., Application]) -> None:
    """Late in the schedule an attempt cannot be recorded: the delivery goes on all the same."""
    application = make_application(more="[database]\nbusy_timeout = 0.2\n")
    application.answer(500)
    delivery = application.deliver()
    application.work()
    for _ in SCHEDULE[:-1]:
        application.wait_for_next(delivery)
    assert state_of(delivery) == ("queued", 7, True)
    locked, database = threading.Event(), application.world.app.database

    def lock_and_answer(connection: socket.socket, _: threading.Event) -> None:
        """The database is another's from before the answer until just after the worker has given up to record it."""
        read_request(connection)
        with held(database):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            locked.set()
            threading.Event().wait(busy_timeout + 0.2)

    busy_timeout = application.world.app.settings.database.busy_timeout
    application.serve(lock_and_answer)
    application.world.clock.advance(24 * HOUR)
    application.work()
    assert locked.is_set()
    application.answer(200)
    application.world.clock.advance(24 * HOUR)
    application.work()
    assert (state_of(delivery)[0], Job.select().where(Job.run_at.is_null()).count()) == ("sent", 0)


def test_an_attempt_that_ends_when_another_worker_has_the_delivery(application: Application) -> None:
    """It is on record all the same, and the other one sends only when it is time for the next attempt."""
    application.answer(500)
    delivery = application.deliver()
    database, jobs = application.world.app.database, application.world.app.jobs
    slow, lease = jobs.claim(timedelta(seconds=60)), timedelta(seconds=60)
    assert slow is not None

    def begin() -> Action | PutOff | None:
        return application.world.app.deliveries.begin(jobs.payload(slow))

    action = database.write(begin)
    assert callable(action)
    ending = action()
    application.world.clock.advance(lease)
    quick = jobs.claim(lease)
    assert quick is not None
    assert ending is not None
    database.write(lambda: jobs.end(slow, ending()))
    later = database.write(begin)
    assert isinstance(later, PutOff)
    assert (later.reason, len(application.received)) == ("TOO_EARLY", 1)
    database.write(lambda: jobs.end(quick, later))
    assert state_of(delivery) == ("queued", 1, True)
    assert 5 <= application.wait_for_next(delivery).total_seconds() <= 5.5
    assert len(application.received) == 2


# Where they never go


class Listener(NamedTuple):
    """Something that listens on all of this machine's addresses, and sees who comes."""

    socket: socket.socket
    port: int

    @property
    def saw_somebody(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])


@pytest.fixture
def listener() -> Iterator[Listener]:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    dual = family is socket.AF_INET6
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as listening:
        yield Listener(listening, listening.getsockname()[1])


HERE = ["127.0.0.1", "127.1.2.3", "localhost", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"]
ELSEWHERE = ["169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "224.0.0.1", "[fe80::1]"]


def deliver_to(world: World, callback: str, outcome: Status = Status.CANCELED, *key_ids: int) -> None:
    """An outcome for any callback, as if its name had meant another address when it was asked."""
    request_id = world.ask(callback=f"{CALLBACK}/{next(_NUMBERS)}")
    world.resolve(request_id, outcome, *key_ids)
    ConsentRequest.update(callback=callback).where(ConsentRequest.id == request_id).execute()


@pytest.mark.parametrize("host", [*HERE, *ELSEWHERE])
def test_forbidden_addresses_are_not_connected_to(application: Application, listener: Listener, host: str) -> None:
    world = application.world
    deliver_to(world, f"http://{host}:{listener.port}/callback", Status.GRANTED, *world.add_keys("key-1"))
    application.work()
    assert not listener.saw_somebody
    [attempt] = DeliveryAttempt.select()
    assert (attempt.status, attempt.error) == (None, "NOT_CONNECTABLE")
    assert attempt.milliseconds < 1000


@pytest.mark.parametrize(
    ("status", "host"),
    [
        *[("302 Found", host) for host in (*HERE, *ELSEWHERE)],
        *[(status, HERE[0]) for status in ("301 Moved", "303 See Other", "307 Temporary", "308 Permanent")],
    ],
)
def test_redirects_are_not_followed(application: Application, listener: Listener, status: str, host: str) -> None:
    target = f"Location: http://{host}:{listener.port}/callback"
    application.serve(answering(b"", target, status=status))
    delivery = application.deliver()
    application.work()
    assert not listener.saw_somebody
    assert state_of(delivery) == ("queued", 1, True)
    [attempt] = DeliveryAttempt.select()
    assert attempt.status == int(status[:3])


def test_the_provider_s_list_is_not_for_callbacks(tmp_path: Path, clock: StoppedClock, listener: Listener) -> None:
    settings = f'{NO_LIMITS}{ALLOWED}[outbound]\nallow = ["127.0.0.1:{listener.port}"]\n'
    world = World(tmp_path / "home", clock, settings)
    try:
        deliver_to(world, f"http://127.0.0.1:{listener.port}/")
        while world.app.worker.run_one():
            pass
        assert not listener.saw_somebody
    finally:
        world.close()


def test_the_environment_s_proxies_are_ignored(
    application: Application, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.port}")
    delivery = application.deliver()
    application.work()
    assert (state_of(delivery)[0], listener.saw_somebody) == ("sent", False)


# One slow receiver


SPELLINGS = {
    "same": ["{host}:{port}"],
    "capitals": ["{host}:{port}", "{capitals}:{port}", "{mixed}:{port}"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_slow_receiver_holds_up_nobody(tmp_path: Path, spelling: str) -> None:
    """It takes its share of the threads, however its name is written, and the others have the rest."""
    seen: list[bytes] = []
    hanging = threading.Event()
    together, most, lock = 0, 0, threading.Lock()

    def hang(connection: socket.socket) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        hanging.wait(10)
        with lock:
            together -= 1
        connection.close()

    def serve(connection: socket.socket, _: threading.Event) -> None:
        held = connection.dup()
        threads.append(threading.Thread(target=hang, args=(held,)))
        threads[-1].start()

    threads: list[threading.Thread] = []
    with Peer(serve) as slow, Peer(answering(b"", seen=seen)) as quick:
        more = "per_host = 2\ntimeout = 5\n[jobs]\nthreads = 4\npoll = 0.02\n"
        world = World(tmp_path / "home", Clock(), allowing(slow.address, quick.address, more=more))  # type: ignore[arg-type]
        names = {"host": "localhost", "capitals": "LOCALHOST", "mixed": "LocalHost", "port": slow.port}
        hosts = [spelled.format(**names) for spelled in SPELLINGS[spelling]]
        try:
            for number in range(12):
                host = hosts[number % len(hosts)]
                deliver_to(world, f"http://{host}/{number}")
            world.app.worker.start()
            await_condition(lambda: most >= 2, "the slow receiver to be held")
            for number in range(5):
                request_id = world.ask(callback=f"{quick.url}/{number}", user_id=USER)
                world.resolve(request_id, Status.CANCELED)
            await_condition(lambda: len(seen) == 5, "the quick receiver's callbacks", patience=4)
            assert most == 2
        finally:
            hanging.set()
            world.app.worker.stop(2)
            for thread in threads:
                thread.join(10)
            world.close()
