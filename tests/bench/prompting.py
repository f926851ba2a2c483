"""The bot: how soon somebody is asked after the application's `OK`, and what many consents leave in its memory.

How many other consents are open should make no difference, so the rounds with and without them alternate.
"""

import contextlib
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import App
from tests.bench import load, stack
from tests.processes import BIN, free_port, running
from tests.sandbox.discord.client import Discord, Message, User, discord_stand_in

_SEND, _OPEN = "/channels/{channel_id}/messages", "/users/@me/channels"
_WARM_UP = 40
_ROUNDS = 2
_AT_ONCE = 4
_SETTINGS = """
[callbacks]
allow = ["127.0.0.1:{port}"]
[limits]
open_per_user = 0
requests_per_address = 0
"""
_OTHERS = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?)
INSERT INTO consent_requests (prompt_id, discord_user, name, callback, state, address, status, lease_epoch,
                              lease_expires_at, message, deadline_at, created_at)
SELECT -i, 'other-' || i, 'bench', 'https://example.com/callback', x'', '192.0.2.1', 'prompted', 1,
       0, '1/' || i || '/1', 4102444800000000, 0 FROM n
"""
_NO_OTHERS = "DELETE FROM consent_requests WHERE discord_user LIKE 'other-%'"


@dataclass(frozen=True)
class Outcome:
    """Seconds from `OK` to the prompt at Discord; and the bot's memory, in bytes."""

    alone: Sequence[float]
    among_others: Sequence[float]
    consents: int
    memory_before: int
    memory_halfway: int
    memory_after: int

    @property
    def ratio(self) -> float:
        """The median among others, as a multiple of that alone."""
        return percentiles(self.among_others)[0] / percentiles(self.alone)[0]

    @property
    def growth(self) -> float:
        """Bytes per 1,000 consents, all of them counted."""
        return (self.memory_after - self.memory_before) / self.consents * 1000

    @property
    def late_growth(self) -> float:
        """Bytes per 1,000 consents, those of the second half."""
        return (self.memory_after - self.memory_halfway) / (self.consents / 2) * 1000


def percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    return cuts[49] * 1000, cuts[98] * 1000


def measure(
    folder: Path,
    work_core: int,
    load_core: int,
    *,
    say: Callable[[str], None],
    requests: int = 200,
    per_second: float = 20.0,
    others: int = 10_000,
    seconds: float = 60.0,
) -> Outcome:
    """The server and the bot share a core, everything else has the other one."""
    with _opened(folder, work_core, load_core) as bench:
        bench.latencies(_WARM_UP, per_second)
        alone: list[float] = []
        among_others: list[float] = []
        for number in range(1, _ROUNDS + 1):
            say(f"round {number} of {_ROUNDS}: prompts")
            alone += bench.latencies(requests // _ROUNDS, per_second)
            say(f"round {number} of {_ROUNDS}: prompts, {others:,} other consents open")
            with bench.others_open(others):
                among_others += bench.latencies(requests // _ROUNDS, per_second)
        before = bench.resident()
        say("whole consents")
        first = bench.consents(seconds / 2)
        halfway = bench.resident()
        second = bench.consents(seconds / 2)
        return Outcome(alone, among_others, first + second, before, halfway, bench.resident())


@dataclass(frozen=True)
class _Bench:
    """A running bot with all that it needs."""

    app: App
    discord: Discord
    bot: psutil.Process
    http: httpx.Client  # an application's
    callback: str
    numbers: "itertools.count[int]"

    def resident(self) -> int:
        return int(self.bot.memory_info().rss)

    def person(self) -> User:
        """Somebody new, who keeps a key."""
        user = self.discord.create_user(f"bench{next(self.numbers)}")
        owner = self.app.discord_users.obtain(user.id)
        self.app.api_keys.add(owner, "game", "main", f"EXAMPLE-KEY-{user.id}", actor="bench")
        return user

    def ask(self, user: User) -> float:
        """When the application had its `OK`."""
        fields = {"name": "bench", "userid": user.id, "callback": self.callback, "state": "xyz"}
        answer = self.http.post("/requestapikey", data=fields)
        now = time.monotonic()
        if (answer.status_code, answer.text) != (200, "OK"):
            raise load.WrongAnswer(f"{answer.status_code} {answer.text!r} instead of OK")
        return now

    def latencies(self, requests: int, per_second: float) -> list[float]:
        """Seconds from each `OK` to the prompt; the stand-in has the same clock."""
        people = [self.person() for _ in range(requests)]
        self.discord.forget_requests()
        told: dict[str, float] = {}
        started = time.monotonic()
        for number, user in enumerate(people):
            time.sleep(max(0.0, started + number / per_second - time.monotonic()))
            told[user.id] = self.ask(user)
        sent = self.discord.await_request("POST", _SEND, count=requests)
        opened = self.discord.requests("POST", _OPEN)
        user_of = {request.answer["id"]: request.body["recipient_id"] for request in opened}
        # The path ends in the channel's id, and `messages`.
        arrived = {str(user_of[request.path.split("/")[-2]]): request.at for request in sent}
        return [arrived[user_id] - at for user_id, at in told.items()]

    @contextlib.contextmanager
    def others_open(self, number: int) -> Iterator[None]:
        """Prompts of others that wait for their answers."""
        self._execute(_OTHERS, number)
        try:
            yield
        finally:
            self._execute(_NO_OTHERS)

    def _execute(self, statement: str, *parameters: object) -> None:
        with self.app.database.writing():
            self.app.database.execute(statement, parameters)

    def consents(self, seconds: float) -> int:
        """Ask, click, and see the outcome, a few at once, for so many seconds; returns how many."""
        ends = time.monotonic() + seconds
        done: list[User] = []
        failures: list[BaseException] = []

        def consent() -> None:
            try:
                while time.monotonic() < ends:
                    user = self.person()
                    self.ask(user)
                    prompt = user.await_message(_is_open)
                    user.click(prompt, "Share all")
                    user.await_change(prompt, lambda message: not _is_open(message))
                    done.append(user)
            except BaseException as failure:  # noqa: BLE001 - raised below
                failures.append(failure)
            finally:
                self.app.database.engine.close()

        threads = [threading.Thread(target=consent) for _ in range(_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for failure in failures:
            raise failure
        if problems := self.discord.problems():
            raise load.WrongAnswer(problems[0])
        return len(done)


def _is_open(message: Message) -> bool:
    return bool(message.components)


@contextlib.contextmanager
def _opened(folder: Path, work_core: int, load_core: int) -> Iterator[_Bench]:
    port, home = free_port(), stack.Home(folder / "prompting", ())
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        with stack.on_core(load_core):
            command = [sys.executable, "-m", "tests.bench.peers.receiver", str(port)]
            receiver = enter(running(command, folder / "prompting-receiver.log"))
            discord = enter(discord_stand_in(folder / "discord.log"))
        receiver.await_output("serving")
        stack.doorward(home.path, "init", "--settings", "-", text=_SETTINGS.format(port=port))
        peer, server_port = enter(stack.server(home, folder, work_core, access_log=False))
        gateway = enter(stack.gateway(home, [peer.socket], folder, load_core))
        app = App(settings_module.load(home.path))
        models.bind(app.database)
        opened.callback(app.database.close)
        opened.callback(app.callback_outbound.close)
        environment = {
            "DISCORD_TOKEN": discord.token,
            "DISCORD_API_BASE": discord.api_base,
            "DOORWARD_BOT_TOKEN": app.service_tokens.create(("bot",))[1],
            "DOORWARD_BOT_SERVER": f"127.0.0.1:{server_port}",
        }
        with stack.on_core(work_core):
            bot = enter(running([BIN / "doorward-bot"], folder / "bot.log", environment))
        discord.await_connected()
        url = f"http://{gateway.address[0]}:{gateway.address[1]}"
        # No TLS is spoken: reading the authorities' certificates would only take time.
        http = enter(httpx.Client(base_url=url, trust_env=False, verify=False, timeout=30))
        callback = f"http://127.0.0.1:{port}/callback"
        yield _Bench(app, discord, psutil.Process(bot.pid), http, callback, itertools.count(1))
