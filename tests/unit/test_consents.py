"""Consent: how requests stand, who may end them, and how; at a clock that the tests set."""

import concurrent.futures
import itertools
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from doorward_server.app import App
from doorward_server.applications import Registered
from doorward_server.consents import ERRORS, TRANSITIONS, Question, Status
from doorward_server.crypto import MasterKey
from doorward_server.errors import (
    CallbackRejected,
    CallError,
    ConsentRequestNotFound,
    GrantNotFound,
    KeyNotFound,
    LeaseLost,
    NameTaken,
    ParameterMissing,
    RequestFinished,
    TooManyRequests,
)
from doorward_server.models import AuditEvent, ConsentRequest, Delivery, Grant, GrantKey, Job, User
from doorward_server.settings import load
from tests.engines import ENGINES
from tests.unit.conftest import StoppedClock

# Nobody listens there; and no name has to be looked up.
NOWHERE = "127.0.0.1:9"
ALLOWED = f'[callbacks]\nallow = ["{NOWHERE}"]\n'
CALLBACK = f"http://{NOWHERE}/callback"
REGISTERED = "https://registered.invalid/hooks"
USER = "123456789012345678"
LIFETIME = timedelta(seconds=600)
LEASE = timedelta(seconds=60)
NO_LIMITS = "[limits]\nopen_per_user = 0\nrequests_per_address = 0\nrequests_per_application = 0\n"
_NUMBERS = itertools.count(1)


class World:
    """The domain in a home of its own, and what tests do with it."""

    def __init__(self, home: Path, clock: StoppedClock, settings: str) -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        (home / "doorward.toml").write_text(settings)
        if not (key_file := home / "master.key").exists():
            key_file.touch(mode=0o600)
            key_file.write_text(f"{MasterKey.generate()}\n")
        self.home = home
        self.clock = clock
        self.app = App(load(home), clock)
        self.consents = self.app.consents
        _ = self.app.database

    def ask(self, caller: Registered | None = None, address: str = "192.0.2.1", **changes: str) -> int:
        fields = {"name": "Bot", "user_id": USER, "callback": CALLBACK, "state": "xyz", **changes}
        return self.consents.request(Question(**fields), caller, address)

    def user(self, snowflake: str = USER) -> User:
        return self.app.discord_users.obtain(snowflake)

    def add_keys(self, *values: str, snowflake: str = USER) -> list[int]:
        user = self.user(snowflake)
        return [self.app.api_keys.add(user, "game", "Key", value, actor="test").id for value in values]

    def resolve(self, request_id: int, outcome: Status, *key_ids: int) -> Status:
        return self.consents.resolve(request_id, outcome, key_ids, actor="test").status

    def status(self, request_id: int) -> str:
        status: str = self.consents.get(request_id).status
        return status

    def lease(self, most: int = 100) -> list[int]:
        return [leased.request.id for leased in self.consents.lease(most, LEASE, 0.0)]

    def prompt(self, request_id: int) -> None:
        [leased] = [one for one in self.consents.lease(100, LEASE, 0.0) if one.request.id == request_id]
        self.consents.mark_prompted(request_id, leased.request.lease_epoch, "message")

    def end_overdue(self) -> None:
        """Do the deadline jobs that are due, and leave the deliveries alone."""
        now = self.clock.now()
        for job in self.app.database.fetch_all(Job.select().where(Job.kind == "consent-deadline", Job.run_at <= now)):
            with self.app.database.writing():
                self.consents.end(self.app.jobs.payload(job))
            Job.delete().where(Job.id == job.id).execute()

    def told(self, request_id: int) -> list[str | None]:
        """The errors of the deliveries of a request; None is for keys."""
        return [delivery.error for delivery in Delivery.select().where(Delivery.request == request_id)]

    def close(self) -> None:
        self.app.database.close()
        self.app.callback_outbound.close()
        self.app.outbound.close()


@pytest.fixture
def make_world(tmp_path: Path, clock: StoppedClock) -> Iterator[Callable[[str], World]]:
    worlds: list[World] = []
    engine = ENGINES.settings()

    def make(settings: str = NO_LIMITS + ALLOWED) -> World:
        worlds.append(World(tmp_path / "home", clock, f"{settings}\n{engine}"))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    for url in {world.app.settings.database_url for world in worlds}:
        ENGINES.forget(url)


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:
    return make_world()


# The state machine


def bring_to(world: World, status: Status) -> int:
    """A request in a state, on the way that it gets there."""
    request_id = world.ask(callback=f"{CALLBACK}/{next(_NUMBERS)}")
    match status:
        case Status.PENDING:
            pass
        case Status.PROMPTED:
            world.prompt(request_id)
        case Status.GRANTED:
            world.resolve(request_id, status, *world.add_keys(f"key-{request_id}"))
        case Status.TIMED_OUT:
            world.clock.advance(LIFETIME)
            world.end_overdue()
        case _:
            world.resolve(request_id, status)
    assert world.status(request_id) == status
    return request_id


def move_to(world: World, request_id: int, status: Status) -> None:
    """Try the one way that leads to a state; raises what it raises."""
    match status:
        case Status.PROMPTED:
            epoch = world.consents.get(request_id).lease_epoch
            world.consents.mark_prompted(request_id, epoch, "message")
        case Status.GRANTED:
            world.resolve(request_id, status, *world.add_keys(f"other-{request_id}"))
        case Status.TIMED_OUT:
            with world.app.database.writing():
                world.consents.end({"request": request_id, "outcome": status})
        case _:
            world.resolve(request_id, status)


OPEN = {Status.PENDING, Status.PROMPTED}
STEPS = {
    (Status.PENDING, Status.PROMPTED),
    *itertools.product(OPEN, [Status.GRANTED, Status.CANCELED, Status.TIMED_OUT, Status.BLOCKED]),
    (Status.PROMPTED, Status.PROMPTED),  # the bot says so again
}


@pytest.mark.parametrize("end", [status for status in Status if status is not Status.PENDING])
@pytest.mark.parametrize("start", Status)
def test_the_state_machine(world: World, start: Status, end: Status) -> None:
    """Every pair. Nothing leads back to pending, which has no operation."""
    request_id = bring_to(world, start)
    if start not in OPEN and end is Status.PROMPTED:
        with pytest.raises(RequestFinished):
            move_to(world, request_id, end)
    else:
        move_to(world, request_id, end)
    expected = end if (start, end) in STEPS else start
    assert world.status(request_id) == expected
    assert world.told(request_id) == ([] if expected in OPEN else [ERRORS[expected]])
    assert Grant.select().count() == (expected is Status.GRANTED)
    outcomes = AuditEvent.select().where(AuditEvent.action.in_([f"consent.{status}" for status in Status]))
    assert outcomes.count() == (expected not in OPEN)


def test_the_table_of_transitions() -> None:
    stated = {(start, end) for start, ends in TRANSITIONS.items() for end in ends}
    assert stated == STEPS - {(Status.PROMPTED, Status.PROMPTED)}
    assert {status: ERRORS.get(status) for status in Status} == {
        Status.PENDING: None,
        Status.PROMPTED: None,
        Status.GRANTED: None,
        Status.CANCELED: "user canceled",
        Status.TIMED_OUT: "timeout",
        Status.BLOCKED: "user blocked verification dm",
    }


def test_what_is_returned_is_the_first_outcome(world: World) -> None:
    request_id = world.ask()
    assert world.resolve(request_id, Status.BLOCKED) is Status.BLOCKED
    assert world.resolve(request_id, Status.CANCELED) is Status.BLOCKED
    assert world.told(request_id) == ["user blocked verification dm"]


@pytest.mark.parametrize("rounds", range(3))
def test_racing_outcomes(world: World, rounds: int) -> None:
    request_id = world.ask()
    key_ids = world.add_keys("racing-key")

    def decide(outcome: Status) -> Status:
        try:
            return world.resolve(request_id, outcome, *(key_ids if outcome is Status.GRANTED else ()))
        finally:
            world.app.database.engine.close()

    outcomes = [Status.GRANTED, Status.CANCELED, Status.BLOCKED] * 4
    with concurrent.futures.ThreadPoolExecutor(len(outcomes)) as pool:
        returned = set(pool.map(decide, outcomes))
    assert len(returned) == 1
    assert world.told(request_id) == [ERRORS[returned.pop()]]


def test_nobody_s_request(world: World) -> None:
    for ask in (
        lambda: world.consents.get(7),
        lambda: world.resolve(7, Status.CANCELED),
        lambda: world.consents.mark_prompted(7, 1, "message"),
        lambda: world.consents.block(world.user(), 7, actor="test"),
    ):
        with pytest.raises(ConsentRequestNotFound):
            ask()
    with world.app.database.writing():
        world.consents.end({"request": 7, "outcome": "timed_out"})


# Deadlines


def test_the_deadline(world: World) -> None:
    request_id = world.ask()
    world.clock.advance(LIFETIME - timedelta(microseconds=1))
    world.end_overdue()
    assert world.status(request_id) == "pending"
    world.clock.advance(timedelta(microseconds=1))
    world.end_overdue()
    assert (world.status(request_id), world.told(request_id)) == ("timed_out", ["timeout"])
    assert world.lease() == []


def test_a_joined_request_has_the_name_that_the_user_was_shown(world: World) -> None:
    world.ask(name="Shown", state="one")
    joined = world.ask(name="Never shown", state="two")
    assert world.consents.get(joined).name == "Shown"


def test_not_for_ever_do_requests_join_a_prompt(world: World) -> None:
    """Else its user would be asked without end, and its buttons would outlive what it says."""
    for number in range(10):
        world.ask(state=str(number))
    with pytest.raises(TooManyRequests):
        world.ask(state="10")
    world.ask(callback=f"{CALLBACK}/other", state="10")


def test_a_joined_request_has_its_own_deadline(world: World) -> None:
    first = world.ask(state="one")
    world.clock.advance(timedelta(seconds=300))
    second = world.ask(state="two")
    world.clock.advance(timedelta(seconds=300))
    world.end_overdue()
    assert (world.status(first), world.status(second)) == ("timed_out", "pending")
    world.clock.advance(timedelta(seconds=300))
    world.end_overdue()
    assert world.told(second) == ["timeout"]


def test_an_answer_after_the_first_one_s_deadline(world: World) -> None:
    """The prompt's button holds the first request's id; who joined later is still waiting for the answer."""
    first = world.ask(state="one")
    world.prompt(first)
    world.clock.advance(timedelta(seconds=300))
    second = world.ask(state="two")
    world.clock.advance(timedelta(seconds=301))
    world.end_overdue()
    key_ids = world.add_keys("late-key")
    assert world.resolve(first, Status.GRANTED, *key_ids) is Status.GRANTED
    assert (world.status(first), world.status(second)) == ("timed_out", "granted")
    assert (world.told(first), world.told(second)) == (["timeout"], [None])


def test_a_prompt_sent_after_the_first_one_s_deadline(world: World) -> None:
    first = world.ask(state="one")
    world.clock.advance(timedelta(seconds=300))
    second = world.ask(state="two")
    [leased] = world.consents.lease(10, timedelta(seconds=400), 0.0)
    world.clock.advance(timedelta(seconds=301))
    world.end_overdue()
    world.consents.mark_prompted(leased.request.id, leased.request.lease_epoch, "message")
    assert (world.status(first), world.status(second)) == ("timed_out", "prompted")


# Leases


def test_a_prompt_is_one_bot_s_at_a_time(world: World) -> None:
    request_id = world.ask()
    [leased] = world.consents.lease(10, LEASE, 0.0)
    assert (leased.request.id, leased.request.lease_epoch, world.lease()) == (request_id, 1, [])
    world.clock.advance(LEASE)
    [again] = world.consents.lease(10, LEASE, 0.0)
    assert again.request.lease_epoch == 2
    with pytest.raises(LeaseLost):
        world.consents.mark_prompted(request_id, 1, "late")
    for _ in range(2):  # idempotent
        world.consents.mark_prompted(request_id, 2, "message")
    world.clock.advance(LEASE)
    assert (world.lease(), world.consents.get(request_id).message) == ([], "message")


def test_joined_requests_are_one_prompt(world: World) -> None:
    ids = [world.ask(state=str(number)) for number in range(3)]
    [leased] = world.consents.lease(10, LEASE, 0.0)
    assert leased.request.id == ids[0]
    ids.append(world.ask(state="joins a leased one"))
    assert world.lease() == []
    world.consents.mark_prompted(ids[0], leased.request.lease_epoch, "message")
    ids.append(world.ask(state="joins a prompted one"))
    assert world.lease() == []
    assert {world.status(one) for one in ids} == {"prompted"}
    world.resolve(ids[2], Status.CANCELED)
    assert [world.told(one) for one in ids] == [["user canceled"]] * 5


def test_the_oldest_come_first(world: World) -> None:
    ids = []
    for number in range(5):
        ids.append(world.ask(callback=f"{CALLBACK}/{number}"))
        world.clock.advance(timedelta(seconds=1))
    assert world.lease(2) == ids[:2]
    assert world.lease() == ids[2:]


def test_the_bot_is_shown_no_values(world: World) -> None:
    [key_id] = world.add_keys("secret-key-wxyz")
    world.ask()
    [leased] = world.consents.lease(1, LEASE, 0.0)
    [listed] = leased.keys
    assert (listed.key.id, listed.last_four) == (key_id, "wxyz")
    assert "secret" not in repr(leased)


def test_who_has_no_keys_is_asked_all_the_same(world: World) -> None:
    request_id = world.ask()
    [leased] = world.consents.lease(1, LEASE, 0.0)
    assert (leased.request.id, leased.keys) == (request_id, [])
    assert User.select().count() == 0  # a stranger's request makes nobody


# Grants


def test_grants_keep_their_order(world: World) -> None:
    one, two, three = world.add_keys("key-1", "key-2", "key-3")
    request_id = world.ask()
    assert world.resolve(request_id, Status.GRANTED, three, one, three, two) is Status.GRANTED
    [(grant, key_ids)] = world.consents.grants(world.user())
    assert (grant.request_id, key_ids) == (request_id, [three, one, two])


@pytest.mark.parametrize("choice", ["none", "another's", "removed", "own and another's", "no such key"])
def test_keys_that_cannot_be_granted(world: World, choice: str) -> None:
    [own, removed] = world.add_keys("own-key", "removed-key")
    [others] = world.add_keys("other-key", snowflake="7")
    world.app.api_keys.remove(world.user(), removed, actor="test")
    chosen = {
        "none": (),
        "another's": (others,),
        "removed": (removed,),
        "own and another's": (own, others),
        "no such key": (9999,),
    }[choice]
    request_id = world.ask()
    with pytest.raises(KeyNotFound):
        world.resolve(request_id, Status.GRANTED, *chosen)
    assert (world.status(request_id), world.told(request_id), GrantKey.select().count()) == ("pending", [], 0)


def test_revoking_a_grant(world: World) -> None:
    key_ids = world.add_keys("key-1")
    world.resolve(world.ask(), Status.GRANTED, *key_ids)
    [(grant, _)] = world.consents.grants(world.user())
    with pytest.raises(GrantNotFound):
        world.consents.revoke_grant(world.user("7"), grant.id, actor="test")
    world.consents.revoke_grant(world.user(), grant.id, actor="test")
    assert world.consents.grants(world.user()) == []
    with pytest.raises(GrantNotFound):
        world.consents.revoke_grant(world.user(), grant.id, actor="test")


# Blocking


def waiting_seconds(world: World, request_id: int) -> float:
    """How long until a request's job ends it."""
    for job in Job.select().where(Job.kind == "consent-deadline"):
        if world.app.jobs.payload(job)["request"] == request_id:
            return float((job.run_at - world.clock.now()).total_seconds())
    raise AssertionError(f"nothing ends request {request_id}")


@pytest.mark.parametrize("registered", [False, True], ids=["stranger", "registered"])
def test_whoever_is_blocked_seems_to_be_turned_down(world: World, registered: bool) -> None:
    caller, callback = None, CALLBACK
    if registered:
        made = world.app.applications.create("Registered", [REGISTERED])
        caller, callback = Registered(made.application.id), f"{REGISTERED}/1"
    world.consents.block(world.user(), world.ask(caller, callback=callback), actor="test")
    world.resolve(1, Status.CANCELED)
    waits = []
    for number in range(12):
        target = f"{REGISTERED}/{number}" if registered else CALLBACK
        request_id = world.ask(caller, callback=target, state=f"again {number}")
        assert world.lease() == []
        waits.append(waiting_seconds(world, request_id))
        assert 5 <= waits[-1] <= 60
        world.clock.advance(timedelta(seconds=waits[-1]) - timedelta(microseconds=1))
        world.end_overdue()
        assert world.status(request_id) == "pending"
        world.clock.advance(timedelta(microseconds=2))
        world.end_overdue()
        assert (world.status(request_id), world.told(request_id)) == ("canceled", ["user canceled"])
    assert max(waits) - min(waits) > 5


def test_a_stranger_with_the_longest_callback_is_blocked(world: World) -> None:
    """It has more bytes than an entry of PostgreSQL's indexes, and no pattern that would shorten it there."""
    path = "".join(random.Random(7).choices([chr(code) for code in range(0x20000, 0x2A000)], k=2000))
    callback = f"{CALLBACK}/{path}"
    world.consents.block(world.user(), world.ask(callback=callback), actor="test")
    world.consents.block(world.user(), world.ask(callback=callback, state="other"), actor="test")
    assert waiting_seconds(world, world.ask(callback=callback, state="third")) <= 60
    assert waiting_seconds(world, world.ask(callback=f"{callback[:-1]}x")) > 60


def test_only_the_blocked_one_is_blocked(world: World) -> None:
    first = world.ask()
    world.consents.block(world.user(), first, actor="test")
    world.consents.block(world.user(), first, actor="test")  # idempotent
    world.resolve(first, Status.CANCELED)
    others = [world.ask(callback=f"{CALLBACK}/other"), world.ask(user_id="7"), world.ask(callback=f"{CALLBACK}?x")]
    blocked = world.ask(name="Another name")
    assert world.lease() == others
    assert waiting_seconds(world, blocked) <= 60


# Limits and strangers


def limit(name: str, most: int) -> str:
    return NO_LIMITS.replace(f"{name} = 0", f"{name} = {most}") + ALLOWED


def test_open_prompts_of_a_user(make_world: Callable[[str], World]) -> None:
    world = make_world(limit("open_per_user", 2))
    made = world.app.applications.create("Registered", [REGISTERED])
    caller = Registered(made.application.id)
    ids = [world.ask(callback=f"{CALLBACK}/{number}") for number in (1, 2)]
    with pytest.raises(TooManyRequests) as refusal:
        world.ask(callback=f"{CALLBACK}/3")
    assert int(refusal.value.metadata["retry_after"]) >= 1
    assert world.ask(callback=f"{CALLBACK}/1") == ids[0]
    assert world.ask(callback=f"{CALLBACK}/1", state="joins") not in ids
    assert world.ask(callback=f"{CALLBACK}/3", user_id="7")
    for number in (1, 2):
        assert world.ask(caller, callback=f"{REGISTERED}/{number}")
    with pytest.raises(TooManyRequests):
        world.ask(caller, callback=f"{REGISTERED}/3")
    world.resolve(ids[0], Status.CANCELED)
    assert world.ask(callback=f"{CALLBACK}/3")


@pytest.mark.parametrize("of", ["address", "application"])
def test_requests_an_hour(make_world: Callable[[str], World], of: str) -> None:
    world = make_world(limit(f"requests_per_{of}", 3))
    made = world.app.applications.create("Registered", [REGISTERED])
    caller = Registered(made.application.id) if of == "application" else None
    options: dict[str, Any] = {"callback": REGISTERED if caller else CALLBACK}
    for number in range(3):
        assert world.ask(caller, user_id=str(number), **options)
    with pytest.raises(TooManyRequests):
        world.ask(caller, user_id="3", **options)
    if of == "address":
        assert world.ask(caller, address="192.0.2.2", user_id="3", **options)
    else:
        assert world.ask(user_id="3")
    world.clock.advance(timedelta(hours=1))
    assert world.ask(caller, user_id="4", **options)


@pytest.mark.parametrize(
    ("callback", "registered", "refusal"),
    [
        pytest.param(CALLBACK, False, CallbackRejected, id="stranger"),
        pytest.param(REGISTERED, True, None, id="registered"),
        pytest.param(REGISTERED, False, CallbackRejected, id="prefix without credentials"),
        pytest.param(CALLBACK, True, CallbackRejected, id="credentials without prefix"),
    ],
)
def test_strangers_may_be_kept_out(
    make_world: Callable[[str], World], callback: str, registered: bool, refusal: type[CallError] | None
) -> None:
    world = make_world(f"{NO_LIMITS}{ALLOWED}[consents]\nallow_unregistered = false\n")
    made = world.app.applications.create("Registered", [REGISTERED])
    caller = Registered(made.application.id) if registered else None
    if refusal is None:
        assert world.ask(caller, callback=callback)
        return
    with pytest.raises(refusal):
        world.ask(caller, callback=callback)
    assert ConsentRequest.select().count() == 0


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        pytest.param({"name": "reGIStered "}, NameTaken, id="name of another"),
        pytest.param({"name": "\u202e"}, ParameterMissing, id="name of nothing"),
        pytest.param({"name": "\u200b \u2060"}, ParameterMissing, id="name of nothing visible"),
    ],
)
def test_what_is_refused_leaves_nothing(world: World, changes: dict[str, str], refusal: type[CallError]) -> None:
    world.app.applications.create("Registered", [REGISTERED])
    with pytest.raises(refusal):
        world.ask(None, **changes)
    assert (ConsentRequest.select().count(), Job.select().count()) == (0, 0)


def test_a_repeat_is_the_same_request(world: World) -> None:
    first = world.ask()
    world.prompt(first)
    world.clock.advance(LIFETIME - timedelta(seconds=1))
    assert world.ask(name="Another") == first
    assert Job.select().count() == 1
    world.clock.advance(timedelta(seconds=1))
    world.end_overdue()
    assert world.ask() != first


def test_racing_repeats(world: World) -> None:
    def ask(_: int) -> int:
        try:
            return world.ask()
        finally:
            world.app.database.engine.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(16)))) == 1
    assert ConsentRequest.select().count() == 1


def test_an_unending_stream_of_states_is_asked_again(world: World) -> None:
    """Who asks with a new state every five minutes must not keep a dead prompt open for ever."""
    first = world.ask(state="0")
    world.prompt(first)
    for number in range(1, 5):
        world.clock.advance(timedelta(seconds=300))
        world.end_overdue()
        latest = world.ask(state=str(number))
    # The bot's button holds the prompt's id.
    assert world.resolve(world.consents.get(latest).prompt_id or latest, Status.CANCELED) is Status.CANCELED
    assert world.status(latest) == "canceled"
