"""The bot under fire: bots and servers that are killed at any instant, two bots at once, and replies that overtake."""

import contextlib
import itertools
import json
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import pytest

from doorward_bot import messages
from doorward_server.consents import ERRORS, Status
from doorward_server.models import ApiKey, ConsentRequest, Delivery, to_micros
from tests.bot.conftest import Person, Scene
from tests.contract.test_request_api_key import AT_ONCE, NO_LIMITS
from tests.processes import Process, await_condition
from tests.sandbox.client import SandboxProvider
from tests.sandbox.discord.client import CannotDo, Discord, Interaction, Message, Request, discord_stand_in
from tests.sandbox.receiver import Callback, callback_receiver
from tests.stack import make_stack, rest

PEOPLE, SOAK_PEOPLE = 50, 500
# How many of them are at it at once.
AT_A_TIME = 5
SEED = 20_150_513
TIMEOUT = 5.0
# A dead worker's claims are free again after the lease, which has to be twice as long as an attempt may take.
ENVIRONMENT = AT_ONCE | {"DOORWARD_JOBS_LEASE": "1.2"}
SEND = "POST /channels/{channel_id}/messages"
READ = "GET /channels/{channel_id}/messages"
INVALID = messages.INVALID_CHOICE
LATE = "That request is already over"
TITLES = {"granted": "Shared", "canceled": "Canceled", "timed_out": "Too late", "blocked": "Closed"}
_settings = """\
{no_limits}[callbacks]
allow = ["{address}"]
schedule = {schedule}
timeout = 0.5
connect_timeout = 0.5
[consents]
timeout = {timeout}
"""
# Discord tells each of two bots of a click, and neither knows that the other has acknowledged it already.
_OF_TWO = "/callback: 40060 Interaction has already been acknowledged."
_names = itertools.count(1)


# Processes that come and go


class Service:
    """A process that is ended and started again."""

    def __init__(self, start: Callable[[], AbstractContextManager[Process]]) -> None:
        self._start = start
        self._until = ExitStack()
        self.process: Process | None = None

    def start(self) -> None:
        """Return once it is there; nothing happens if it is already."""
        if self.process is None:
            self.process = self._until.enter_context(self._start())

    def end(self, *, kill: bool = True) -> None:
        """By SIGKILL or SIGTERM."""
        if self.process is not None:
            if kill:
                self.process.kill()
            self.process = None
            self._until.close()


@dataclass
class Arena:
    """A scene whose server and bots come and go."""

    scene: Scene
    server: Service
    bot: Service
    other: Service

    @property
    def discord(self) -> Discord:
        return self.scene.discord

    def start(self) -> None:
        """The server, where the gateway finds it well, and one bot."""
        self.server.start()
        await_condition(
            lambda: rest(self.scene.stack, "GET", "/requestapikey").text == "missing parameters", "an answer"
        )
        self.other.end(kill=False)
        self.bot.start()

    def let_leases_end(self, *people: Person) -> None:
        """As if the minute were over for which a prompt is a bot's, who died with it."""
        app = self.scene.stack.app
        with app.database.writing():
            ConsentRequest.update(lease_expires_at=app.clock.now()).where(
                ConsentRequest.discord_user.in_([person.user.id for person in people])
            ).execute()


@contextlib.contextmanager
def make_arena(
    folder: Path, logs: Path, provider: SandboxProvider, secrets: set[str], timeout: float
) -> Iterator[Arena]:
    """Everything but the server and the bot. The receiver's log shows keys, so it is none of the logs."""
    with ExitStack() as opened:
        enter = opened.enter_context
        receiver = enter(callback_receiver(folder / "receiver.log"))
        discord = enter(discord_stand_in(folder / "discord.log"))
        schedule = [0.05] * 200
        settings = _settings.format(no_limits=NO_LIMITS, address=receiver.address, schedule=schedule, timeout=timeout)
        stack = make_stack(folder / "home", logs, provider, secrets, settings, **ENVIRONMENT)
        # Each bot keeps to Discord's pace; two, or one after the other, do not together.
        discord.configure(requests_per_second=100)
        scene = Scene(stack, discord, receiver, logs)
        token = stack.service_token("bot")
        name = f"faults-bot-{next(_names)}"
        bots = [Service(partial(_bot, scene, log, token)) for log in (name, f"{name}-other")]
        arena = Arena(scene, Service(stack.server), *bots)
        for service in (arena.server, arena.bot, arena.other):
            opened.callback(service.end, kill=False)
        arena.server.start()
        enter(stack.gateway())
        yield arena


@contextlib.contextmanager
def _bot(scene: Scene, name: str, token: str) -> Iterator[Process]:
    with scene.starting_bot(name, DOORWARD_BOT_TOKEN=token) as process:
        process.await_output('"connected to Discord"')
        yield process


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Arena]:
    with make_arena(tmp_path_factory.mktemp("bots"), logs, shared_provider, secrets, 600) as arena:
        yield arena


@pytest.fixture
def arena(stage: Arena) -> Iterator[Arena]:
    """With a server and a bot, whatever the test before has left."""
    stage.start()
    stage.discord.forget_requests()
    yield stage
    stage.discord.heal()
    stage.discord.configure(nonce_memory=180.0, interaction_deadline=3.0)
    problems = stage.discord.problems()
    stage.discord.forget_problems()
    assert [problem for problem in problems if not problem.endswith(_OF_TWO)] == []


# People


def values_of(person: Person, count: int = 3) -> list[str]:
    """The values of so many keys, which nobody else has."""
    return [f"{person.user.name}-value-{number}-{random.getrandbits(64):016x}" for number in range(1, count + 1)]


def prompted(arena: Arena) -> tuple[Person, list[str], Message]:
    """Somebody with three keys, whom an application has asked, as the server knows."""
    person = arena.scene.person()
    person.keep(*(values := values_of(person)))
    person.ask("st")
    prompt = person.prompt()
    await_condition(lambda: [one.status for one in requests_of(person)] == ["prompted"], "MarkPrompted")
    return person, values, prompt


def requests_of(person: Person) -> list[ConsentRequest]:
    app = person.scene.stack.app
    query = ConsentRequest.select().where(ConsentRequest.discord_user == person.user.id)
    return app.database.fetch_all(query.order_by(ConsentRequest.id))


def prompts_of(person: Person) -> list[Message]:
    """Every message that is a prompt, or was one, as it is now."""
    return [
        message for message in person.user.messages() if message.by_bot and message.embeds and not message.ephemeral
    ]


def told(person: Person, typed: Message) -> list[str]:
    """What the bot replied to a message, once it did."""
    person.user.await_message(lambda message: message.reply_to == typed.id)
    return [message.text for message in person.user.messages() if message.by_bot and message.reply_to == typed.id]


def sends_to(person: Person, prompt: Message) -> list[Request]:
    """The bot's requests that send a prompt to somebody."""
    sent = person.scene.discord.requests(*SEND.split())
    own = [request for request in sent if f"/{prompt.channel_id}/" in request.path]
    return [request for request in own if isinstance(request.body, dict) and request.body.get("embeds")]


def assert_ended(person: Person, prompt: Message, title: str, values: Sequence[str] = ()) -> None:
    """One outcome, one callback, one message, which shows it."""
    callback = person.outcome()
    assert (callback.field("state"), callback.keys, callback.field("error")) == (
        "st",
        [*values],
        ERRORS[of_title(title)],
    )
    shown = person.user.await_change(prompt, lambda message: message.embeds[0]["title"] == title)
    assert not shown.components
    assert [message.id for message in prompts_of(person)] == [prompt.id]
    assert len(person.scene.receiver.callbacks(person.path)) == 1


def of_title(title: str) -> Status:
    return next(Status(status) for status in TITLES if TITLES[status] == title)


# Restarts


@pytest.mark.parametrize(
    "ended",
    [
        pytest.param(("bot",), id="bot"),
        pytest.param(("server",), id="server"),
        pytest.param(("server", "bot"), id="both"),
    ],
)
def test_a_prompt_outlives(arena: Arena, ended: tuple[str, ...]) -> None:
    """Its buttons work afterwards, and so do replies, also those that were typed meanwhile."""
    people = [prompted(arena) for _ in range(7)]
    clicks, cancels, selects, types, refuses, meanwhile, replies = people
    selects[0].user.select(selects[2], "3. key3", "1. key1")
    selected = selects[0].user.await_change(selects[2])
    for name in ended:
        getattr(arena, name).end()
    said = [meanwhile[0].user.say("3 2"), replies[0].user.say("all", replies[2])]
    if "bot" in ended:  # nobody is there to answer: the three seconds need not pass
        arena.discord.configure(interaction_deadline=0.1)
        lost = clicks[0].user.click(clicks[2], "Cancel")
        assert clicks[0].user.outcome(lost).state == "failed"
        arena.discord.configure(interaction_deadline=3.0)
    for name in ended:
        getattr(arena, name).start()
    arena.discord.await_connected()
    said += [types[0].user.say("2"), refuses[0].user.say("none of them", refuses[2])]
    clicks[0].user.click(clicks[2], "Share all")
    cancels[0].user.click(cancels[2], "Cancel")
    selects[0].user.click(selected, "Share selected (2)")
    shared = {0: (0, 1, 2), 2: (2, 0), 3: (1,), 5: (2, 1), 6: (0, 1, 2)}
    for number, (person, values, prompt) in enumerate(people):
        chosen = [values[index] for index in shared.get(number, ())]
        assert_ended(person, prompt, "Shared" if chosen else "Canceled", chosen)
        assert len(sends_to(person, prompt)) == 1
    replies_to = zip((meanwhile, replies, types, refuses), said, strict=True)
    answers = [told(person, typed) for (person, *_), typed in replies_to]
    assert answers == [
        ["You shared `key3`, `key2`. `/sharing revoke` ends that."],
        ["You shared `key1`, `key2`, `key3`. `/sharing revoke` ends that."],
        ["You shared `key2`. `/sharing revoke` ends that."],
        [
            INVALID,
        ],
    ]


# Between Discord and the server


@dataclass
class Orphan:
    """Somebody whose prompt Discord has stored, and the server does not know: its bot was killed in between."""

    person: Person
    values: list[str]
    prompt: Message


@contextlib.contextmanager
def orphan(arena: Arena, *, taken_over: bool) -> Iterator[Orphan]:
    """Afterwards, the restarted bot or (with `taken_over`) another one, that was there, goes on."""
    person = arena.scene.person()
    person.keep(*(values := values_of(person)))
    arena.discord.fault("hang", SEND, phase="after", times=1)
    person.ask("st")
    prompt = person.prompt()
    if taken_over:
        arena.other.start()
    arena.bot.end()
    arena.discord.await_connected(int(taken_over))
    assert [(one.status, one.message) for one in requests_of(person)] == [("pending", None)]
    yield Orphan(person, values, prompt)
    arena.let_leases_end(person)
    arena.other.start()


@pytest.mark.parametrize(
    ("taken_over", "nonce_memory", "typed"),
    [
        pytest.param(True, 180.0, "3, 1", id="by another"),
        pytest.param(True, 0.0, "neither", id="by another, long after"),
        pytest.param(False, 180.0, "all", id="after a restart"),
        pytest.param(False, 0.0, "3, 1", id="after a restart, long after"),
    ],
)
def test_a_killed_bots_prompt_is_adopted(arena: Arena, taken_over: bool, nonce_memory: float, typed: str) -> None:
    """No second prompt, whether Discord still knows the nonce or not; and what was typed in between counts."""
    arena.discord.configure(nonce_memory=nonce_memory)
    with orphan(arena, taken_over=taken_over) as left:
        said = left.person.user.say(typed, left.prompt if typed == "all" else None)
    shared = {"3, 1": [left.values[2], left.values[0]], "all": left.values, "neither": []}[typed]
    assert_ended(left.person, left.prompt, "Shared" if shared else "Canceled", shared)
    assert len(told(left.person, said)) == 1
    assert len(sends_to(left.person, left.prompt)) == 1


@pytest.mark.parametrize("before", [pytest.param(True, id="before"), pytest.param(False, id="after")])
def test_buttons_of_a_killed_bots_prompt(arena: Arena, before: bool) -> None:
    """They work before its lease ends, and after."""
    with orphan(arena, taken_over=True) as left:
        if before:
            left.person.user.click(left.prompt, "Share all")
            left.person.outcome()
    if not before:
        await_condition(lambda: requests_of(left.person)[0].status == "prompted", "MarkPrompted")
        left.person.user.click(left.prompt, "Share all")
    assert_ended(left.person, left.prompt, "Shared", left.values)
    assert len(sends_to(left.person, left.prompt)) == 1


def test_a_killed_bots_prompt_is_closed(arena: Arena) -> None:
    """Also when the request ends before anybody has told the server where its prompt is."""
    with orphan(arena, taken_over=False) as left:
        app = arena.scene.stack.app
        with app.database.writing():  # as the job at its deadline does
            app.consents.end({"request": requests_of(left.person)[0].id, "outcome": Status.TIMED_OUT})
    assert_ended(left.person, left.prompt, "Too late")


def test_a_killed_bots_prompt_is_adopted_for_those_who_share_it(arena: Arena) -> None:
    """Also when the request that it was sent for has ended: there is no second prompt."""
    with orphan(arena, taken_over=False) as left:
        left.person.ask("later")
        app = arena.scene.stack.app
        with app.database.writing():  # as the job at its deadline does
            app.consents.end({"request": requests_of(left.person)[0].id, "outcome": Status.TIMED_OUT})
        left.person.outcome()
    await_condition(lambda: requests_of(left.person)[1].status == "prompted", "MarkPrompted")
    assert [message.id for message in prompts_of(left.person)] == [left.prompt.id]
    left.person.user.click(left.prompt, "Share all")
    assert left.person.outcome(2).keys == left.values


# Replies that overtake


@pytest.mark.parametrize("replies", [pytest.param(True, id="reply"), pytest.param(False, id="message")])
def test_a_reply_overtakes_the_answer_to_its_prompt(arena: Arena, replies: bool) -> None:
    """Discord shows a prompt before it answers the bot that has sent it."""
    person = arena.scene.person()
    person.keep(*(values := values_of(person)))
    arena.discord.fault("delay", SEND, phase="after", seconds=1.0, times=1)
    person.ask("st")
    prompt = person.prompt()
    said = person.user.say("1", prompt if replies else None)
    assert [sent.status for sent in sends_to(person, prompt)] == [None]
    assert_ended(person, prompt, "Shared", values[:1])
    assert told(person, said) == ["You shared `key1`. `/sharing revoke` ends that."]


def test_what_was_typed_before_a_prompt_is_no_answer_to_it(arena: Arena) -> None:
    """Nobody shares anything with an application that they have not heard of."""
    person = arena.scene.person()
    person.keep(*values_of(person))
    arena.discord.fault("delay", SEND, phase="before", seconds=1.0, times=1)
    person.ask("st")
    arena.discord.await_request(*SEND.split(), answered=False)
    person.user.say("all")
    prompt = person.prompt()
    # The bot has taken what was typed before it answers what was typed later.
    later = person.user.say("no")
    told(person, later)
    assert_ended(person, prompt, "Canceled")


def test_what_was_typed_while_no_bot_was_there_is_no_answer_to_a_later_prompt(arena: Arena) -> None:
    """It answers the prompt that was there, even when another one has come before it is found."""
    person, values, prompt = prompted(arena)
    slow, _, _ = prompted(arena)  # whose DM is read first
    arena.bot.end()
    said = person.user.say("2")
    person.ask("later", "Another", f"{person.callback}/later")
    arena.discord.fault("delay", READ, seconds=1.0, times=1)
    arena.bot.start()
    later = person.prompt("Another")
    assert person.outcome().keys == [values[1]]
    assert told(person, said) == ["You shared `key2`. `/sharing revoke` ends that."]
    assert person.scene.receiver.callbacks(f"{person.path}/later") == []
    for other in (person, slow):
        other.user.click(later if other is person else slow.prompt(), "Cancel")
    assert person.user.await_change(prompt, lambda message: not message.components)
    [callback] = person.scene.receiver.await_callbacks(f"{person.path}/later")
    assert callback.field("error") == "user canceled"


# Two bots


def test_two_bots(arena: Arena) -> None:
    """Both are told of everything that people do; it is done once."""
    arena.other.start()
    arena.discord.await_connected(2)
    people = [arena.scene.person() for _ in range(20)]
    values = [values_of(person) for person in people]
    for person, own in zip(people, values, strict=True):
        person.keep(*own)
    for person in people:
        person.ask("st")
    prompts = [person.prompt() for person in people]
    await_condition(
        lambda: all(one.status == "prompted" for person in people for one in requests_of(person)), "MarkPrompted"
    )
    said: dict[int, Message] = {}
    for number, (person, prompt) in enumerate(zip(people, prompts, strict=True)):
        match number % 4:
            case 0:
                person.user.click(prompt, "Share all")
            case 1:
                person.user.click(prompt, "Cancel")
            case 2:
                said[number] = person.user.say("2, 1", prompt)
            case _:
                said[number] = person.user.say("not now")
    for number, (person, prompt) in enumerate(zip(people, prompts, strict=True)):
        title = "Shared" if number % 2 == 0 else "Canceled"
        shared = {0: values[number], 2: [values[number][1], values[number][0]]}.get(number % 4, [])
        assert_ended(person, prompt, title, shared)
        assert len(sends_to(person, prompt)) == 1
        if number in said:
            [answer] = told(person, said[number])
            expected = ("You shared `key2`, `key1`.", LATE) if shared else (INVALID, LATE)
            assert answer.startswith(expected)


# The storm


class Weather:
    """Ends the bot and the server at random instants, and lets the time of leases pass faster."""

    def __init__(self, arena: Arena, dice: random.Random) -> None:
        self._arena = arena
        self._dice = dice
        self._is_calm, self._is_over = threading.Event(), threading.Event()
        self._strikes = threading.Thread(target=self._guarded, args=(self._strike,))
        self._time = threading.Thread(target=self._guarded, args=(self._pass_time,))
        self.failures: list[BaseException] = []
        self.strikes: Counter[str] = Counter()

    def __enter__(self) -> "Weather":
        self._arena.start()
        self._strikes.start()
        self._time.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.calm()
        self._is_over.set()
        self._time.join()

    def calm(self) -> None:
        """Nothing is ended any more, and everything is there; the time still passes faster."""
        self._is_calm.set()
        self._strikes.join()

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as failure:  # noqa: BLE001 - the test raises it
            self.failures.append(failure)
        finally:
            self._arena.scene.stack.app.database.engine.close()

    def _strike(self) -> None:
        kinds = itertools.cycle(["bot, -9", "server, -9", "bot, -9", "server, TERM"])
        outage = 0.0
        # The instant is the point, not a condition; and everything is there for half of the time.
        while not self._is_calm.wait(self._dice.uniform(0.0, 0.8) + outage):
            began = time.monotonic()
            kind = next(kinds)
            name, _, how = kind.partition(", ")
            service: Service = getattr(self._arena, name)
            service.end(kill=how == "-9")
            service.start()
            self.strikes[kind] += 1
            outage = time.monotonic() - began

    def _pass_time(self) -> None:
        """What a process that was killed had leased is free when its time is over: after 3 seconds, not 60 (or 30)."""
        app = self._arena.scene.stack.app
        while not self._is_over.wait(0.2):
            with app.database.writing():
                app.database.execute(_PASS_TIME, (to_micros(app.clock.now()),))


# How long a prompt is whose it is: a bot's that sends or closes it; and a bot's that was told of the decision.
_PASS_TIME = """
UPDATE consent_requests SET lease_expires_at = ?1
WHERE lease_expires_at > ?1
  AND lease_expires_at - iif(lease_expires_at <= finished_at + 30000000, 30000000, 60000000) < ?1 - 3000000
"""


@dataclass(frozen=True)
class Asked:
    """A request, by its state, and how it may end: the keys that are shared, by the status."""

    state: str
    person: Person
    way: str
    ends: Mapping[str, Sequence[str]]


class Guest:
    """Somebody in the storm, who does the same with all requests: click, type, or nothing."""

    WAYS = ("share all", "select", "cancel", "type", "mistype", "stay silent", "refuse", "remove one", "remove all")

    def __init__(self, arena: Arena, number: int) -> None:
        self._arena = arena
        self._dice = random.Random(f"{SEED}-{number}")
        self._way = self.WAYS[number % len(self.WAYS)] if number < len(self.WAYS) else self._dice.choice(self.WAYS)
        self._person = arena.scene.person()
        self._values = values_of(self._person, self._dice.randint(1, 3))
        self._chosen = self._dice.sample(range(len(self._values)), self._dice.randint(1, len(self._values)))

    def visit(self) -> list[Asked]:
        """Be asked, once or more often, and answer; returns what was asked."""
        keys = self._person.keep(*self._values)
        if self._way == "refuse":
            self._person.user.refuse(self._dice.choice([50007, 50278]))
        asked: dict[str, list[str]] = {}
        for number in range(1 if self._way.startswith("remove") else self._dice.choice([1, 1, 1, 2, 3])):
            # States that are asked for together share a prompt.
            states = [f"{self._person.user.name}-{number}-{each}" for each in range(self._dice.choice([1, 1, 1, 2]))]
            for state in states:
                self._ask(f"App {number}", f"{self._person.callback}/{number}", state)
            asked[f"App {number}"] = states
        for name, states in asked.items():
            prompt = self._await_prompt(name, states)
            if prompt is not None:
                self._answer(prompt, keys, has_several=len(asked) > 1)
        ends = self._ends()
        return [Asked(state, self._person, self._way, ends) for states in asked.values() for state in states]

    def _ends(self) -> dict[str, Sequence[str]]:
        """An answer may always come too late."""
        ends: dict[str, Sequence[str]] = {"timed_out": []}
        match self._way:
            case "share all":
                ends["granted"] = self._values
            case "select" | "type":
                ends["granted"] = [self._values[index] for index in self._chosen]
            case "remove one":
                ends |= {"granted": self._values[1:]} if len(self._values) > 1 else {"canceled": []}
            case "cancel" | "mistype" | "remove all":
                ends["canceled"] = []
            case "refuse":
                ends["blocked"] = []
        return ends

    def _ask(self, name: str, callback: str, state: str) -> None:
        """Until it is recorded; an application that is not answered asks again."""
        fields = {"name": name, "userid": self._person.user.id, "callback": callback, "state": state}

        def is_recorded() -> bool:
            with contextlib.suppress(httpx.TransportError):
                answer = rest(self._arena.scene.stack, "POST", "/requestapikey", data=fields)
                # 499 is what a call gets whose server is told to end and waits for none.
                assert answer.status_code in (200, 499, 503), answer.text
                if answer.status_code == 200:
                    return True
            return any(request.state == state.encode() for request in requests_of(self._person))

        await_condition(is_recorded, "OK")

    def _await_prompt(self, name: str, states: Sequence[str]) -> Message | None:
        """The prompt; None when all who share it have ended before it came."""

        def look() -> tuple[Message | None, bool]:
            is_over = all(one.finished_at for one in requests_of(self._person) if bytes(one.state).decode() in states)
            found = [message for message in prompts_of(self._person) if name in json.dumps(message.embeds)]
            return found[0] if found else None, is_over

        return self._arena.discord.until(look, lambda seen: bool(seen[0]) or seen[1], f"a prompt of {name}", 60)[0]

    def _answer(self, prompt: Message, keys: Sequence[ApiKey], *, has_several: bool) -> None:
        match self._way:
            case "share all":
                self._insist(prompt, lambda shown: self._click(shown, "Share all"))
            case "select":
                self._insist(prompt, self._select)
            case "cancel":
                self._insist(prompt, lambda shown: self._click(shown, "Cancel"))
            case "type" | "mistype":
                typed = ", ".join(str(index + 1) for index in self._chosen) if self._way == "type" else "who is this?"
                self._type(prompt, typed, replies=has_several or self._dice.random() < 0.5)
            case "remove one" | "remove all":
                for key in keys[:1] if self._way == "remove one" else keys:
                    self._arena.scene.stack.app.api_keys.remove(key.user, key.id, actor="test")
                # Where all are gone, that button goes with the first click.
                self._insist(prompt, lambda shown: self._click(shown, "Share all", "Cancel"))

    def _insist(self, prompt: Message, act: Callable[[Message], Interaction]) -> None:
        """Do it until the prompt shows an outcome, as people do when an interaction fails, or changes nothing."""
        discord = self._arena.discord
        for _ in range(20):
            shown = discord.message(prompt.id)
            if not shown.components:
                return
            with contextlib.suppress(CannotDo):  # it has changed at this very moment
                done = act(shown)
                self._is_seen(partial(self._is_answered, done, shown), patience=4)
        raise AssertionError(f"nothing helps: {discord.message(prompt.id)}")

    def _is_answered(self, done: Interaction, shown: Message) -> bool:
        discord = self._arena.discord
        has_changed = len(discord.message(shown.id).history) > len(shown.history)
        return has_changed or discord.interaction(done.id).state == "failed"

    def _click(self, shown: Message, *labels: str) -> Interaction:
        """The first of these buttons that is there."""
        there = {button.label for button in shown.buttons}
        return self._person.user.click(shown, next((label for label in labels if label in there), labels[0]))

    def _select(self, shown: Message) -> Interaction:
        button = f"Share selected ({len(self._chosen)})"
        if button in {each.label for each in shown.buttons}:
            return self._click(shown, button)
        return self._person.user.select(shown, *(f"{index + 1}. key{index + 1}" for index in self._chosen))

    def _type(self, prompt: Message, text: str, *, replies: bool) -> None:
        """Once: a typed answer is not lost, whoever is killed."""
        said = self._person.user.say(text, prompt if replies else None)
        is_taken = self._is_seen(
            lambda: (
                not self._arena.discord.message(prompt.id).components
                or any(message.reply_to == said.id for message in self._person.user.messages())
            ),
            patience=60,
        )
        assert is_taken, f"{text!r} was lost"

    def _is_seen(self, holds: Callable[[], bool], patience: float) -> bool:
        """Whether something happens in time."""
        try:
            return self._arena.discord.until(holds, bool, "it", patience)
        except AssertionError:
            return False


def test_the_storm(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str], soaking: bool) -> None:
    """Each request ends in one outcome, which its callback tells, and no prompt is left open."""
    people = SOAK_PEOPLE if soaking else PEOPLE
    numbers, asked, failures = iter(range(people)), list[Asked](), list[BaseException]()

    with make_arena(tmp_path, logs, provider, secrets, TIMEOUT) as arena:
        app = arena.scene.stack.app

        def visit() -> None:
            try:
                for number in numbers:  # shared by all: each takes the next
                    asked.extend(Guest(arena, number).visit())
            except BaseException as failure:  # noqa: BLE001 - the test raises it
                failures.append(failure)
            finally:
                app.database.engine.close()

        with Weather(arena, random.Random(SEED)) as weather:
            threads = [threading.Thread(target=visit) for _ in range(AT_A_TIME)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            weather.calm()
            assert (failures, weather.failures) == ([], [])
            await_condition(all_over, "every outcome", patience=60)
            with contextlib.suppress(AssertionError):  # what is left open is told below
                await_condition(lambda: not wrong_prompts_of(asked), "closed prompts", patience=10)
        assert weather.failures == []
        came = defaultdict(list)
        for callback in arena.scene.receiver.callbacks():
            came[str(callback.field("state"))].append(callback)
        found = [wrong for one in asked for wrong in wrong_callbacks(ended(one), came.pop(one.state, []))]
        found += wrong_prompts_of(asked) + [f"{state} was never asked" for state in came]
        statuses = Counter(ended(one).status for one in asked)
        late = Counter(one.way for one in asked if ended(one).status == "timed_out" and one.way != "stay silent")
        told = arena.scene.receiver.callbacks()
        again = len(told) - len({callback.webhook_id for callback in told})
        print(f"seed: {SEED}; people: {people}; requests: {len(asked)}; ends: {dict(statuses)}; too late: {dict(late)}")
        print(f"ended: {dict(weather.strikes)}; duplicates under the same webhook-id: {again}")
        assert found == []
        assert arena.discord.problems() == []
        assert set(statuses) == set(TITLES)


def all_over() -> bool:
    """Every request has ended, its application knows, and so does its user."""
    unfinished = ConsentRequest.select().where(ConsentRequest.finished_at.is_null())
    unshown = ConsentRequest.select().where(
        ConsentRequest.message.is_null(False), ConsentRequest.message_closed_at.is_null()
    )
    unsent = Delivery.select().where(Delivery.status != "sent")
    return not any(query.exists() for query in (unfinished, unshown, unsent))


# What is checked in the end


@dataclass(frozen=True)
class Ended:
    """How a request has ended, as the server has it, and how it may have: the keys shared, by the status."""

    state: str
    status: str
    webhook_ids: Sequence[str]
    ends: Mapping[str, Sequence[str]]


def ended(asked: Asked) -> Ended:
    [request] = [one for one in requests_of(asked.person) if bytes(one.state).decode() == asked.state]
    deliveries = Delivery.select().where(Delivery.request == request.id)
    return Ended(asked.state, request.status, [delivery.webhook_id for delivery in deliveries], asked.ends)


def wrong_callbacks(ended: Ended, callbacks: Sequence[Callback]) -> list[str]:
    """One outcome, which is one of those that may be; told in one delivery, however often that came."""
    wrong = [] if ended.status in ended.ends else [f"ended as {ended.status}"]
    if len(ended.webhook_ids) != 1:
        wrong.append(f"{len(ended.webhook_ids)} deliveries")
    if {callback.webhook_id for callback in callbacks} != {*ended.webhook_ids}:
        wrong.append("callbacks that are not the delivery")
    if not any(callback.status == 200 for callback in callbacks):
        wrong.append("never told")
    expected = ([*ended.ends.get(ended.status, [])], ERRORS[Status(ended.status)])
    for callback in callbacks:
        if callback.keys and callback.field("error") is not None:
            wrong.append("keys and an error")
        if (callback.keys, callback.field("error")) != expected:
            wrong.append(f"told {len(callback.keys)} keys and {callback.field('error')!r}")
    return [f"{ended.state}, {ended.status}: {what}" for what in wrong]


def wrong_prompts_of(asked: Sequence[Asked]) -> list[str]:
    people = {one.person.path: one.person for one in asked}.values()
    return [wrong for person in people for wrong in wrong_prompts(prompts_of(person), requests_of(person))]


def wrong_prompts(messages: Sequence[Message], requests: Sequence[ConsentRequest]) -> list[str]:
    """A prompt is sent once, and shows how one of the requests that share it has ended."""
    prompt_of = {request.id: request.prompt_id for request in requests}
    sent = Counter[int | None]()
    wrong = []
    for message in messages:
        match = re.search(r'"dw1:cancel:(\d+):"', json.dumps([*message.history, message.raw]))
        prompt_id = prompt_of.get(int(match[1])) if match else None
        sent[prompt_id] += 1
        titles = {TITLES.get(request.status) for request in requests if request.prompt_id == prompt_id}
        if message.components:
            wrong.append(f"prompt {prompt_id} is open")
        elif message.embeds[0]["title"] not in titles:
            wrong.append(f"prompt {prompt_id} shows {message.embeds[0]['title']}")
    return wrong + [f"prompt {prompt_id} came {times} times" for prompt_id, times in sent.items() if times > 1]


def callback_of(*pairs: tuple[str, str], webhook_id: str = "msg_1", status: int = 200) -> Callback:
    headers = {"webhook-id": webhook_id}
    return Callback("/", headers, "", [("userid", "1"), ("state", "s"), *pairs], {}, 0.0, False, status, True)


_SHARED, _CANCELED = ("api_keys", "one"), ("error", "user canceled")
_ENDED = Ended("s", "granted", ["msg_1"], {"granted": ["one"], "timed_out": []})


@pytest.mark.parametrize(
    ("ended", "callbacks", "wrong"),
    [
        pytest.param(_ENDED, [callback_of(_SHARED)], [], id="right"),
        pytest.param(_ENDED, [callback_of(_SHARED, status=500), callback_of(_SHARED)], [], id="right, and twice"),
        pytest.param(_ENDED, [], ["callbacks that are not the delivery", "never told"], id="nothing"),
        pytest.param(_ENDED, [callback_of(_SHARED, status=500)], ["never told"], id="only refused"),
        pytest.param(
            _ENDED,
            [callback_of(_SHARED), callback_of(_CANCELED)],
            ["told 0 keys and 'user canceled'"],
            id="both outcomes",
        ),
        pytest.param(
            _ENDED,
            [callback_of(_SHARED, _CANCELED)],
            ["keys and an error", "told 1 keys and 'user canceled'"],
            id="both outcomes at once",
        ),
        pytest.param(
            _ENDED,
            [callback_of(_SHARED), callback_of(_SHARED, webhook_id="msg_2")],
            ["callbacks that are not the delivery"],
            id="another id",
        ),
        pytest.param(_ENDED, [callback_of(("api_keys", "two"))], ["told 1 keys and None"], id="another key"),
        pytest.param(
            replace(_ENDED, webhook_ids=["msg_1", "msg_2"]),
            [callback_of(_SHARED), callback_of(_SHARED, webhook_id="msg_2")],
            ["2 deliveries"],
            id="two deliveries",
        ),
        pytest.param(
            replace(_ENDED, status="canceled"), [callback_of(_CANCELED)], ["ended as canceled"], id="another outcome"
        ),
    ],
)
def test_the_check_of_callbacks(ended: Ended, callbacks: Sequence[Callback], wrong: Sequence[str]) -> None:
    assert wrong_callbacks(ended, callbacks) == [f"s, {ended.status}: {what}" for what in wrong]


def test_the_check_of_prompts(arena: Arena) -> None:
    """One that is open, one that shows another end, and one that came twice are found."""
    person, _, prompt = prompted(arena)
    assert wrong_prompts(prompts_of(person), requests_of(person)) == [
        f"prompt {requests_of(person)[0].prompt_id} is open"
    ]
    person.user.click(prompt, "Cancel")
    person.user.await_change(prompt)
    [shown], [request] = prompts_of(person), requests_of(person)
    assert wrong_prompts([shown], [request]) == []
    assert wrong_prompts([shown, shown], [request]) == [f"prompt {request.prompt_id} came 2 times"]
    request.status = "granted"
    assert wrong_prompts([shown], [request]) == [f"prompt {request.prompt_id} shows Canceled"]
