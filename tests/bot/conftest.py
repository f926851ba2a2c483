"""The real bot, the real server behind the real gateway, and stand-ins for Discord and for the callbacks."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from doorward_server.models import ApiKey
from tests.processes import BIN, Process, running
from tests.sandbox.discord.client import Discord, Message, User, discord_stand_in
from tests.sandbox.receiver import Callback, Receiver, callback_receiver
from tests.stack import Stack, make_stack, rest, sandbox_provider

_SETTINGS = """\
[callbacks]
allow = ["{address}"]
[limits]
requests_per_address = 0
open_per_user = {open_per_user}
[consents]
timeout = {timeout}
"""
_numbers = itertools.count(1)


@dataclass
class Scene:
    """Everything that takes part."""

    stack: Stack
    discord: Discord
    receiver: Receiver
    logs: Path
    people: "list[Person]" = field(default_factory=list)

    @contextlib.contextmanager
    def bot(self, name: str = "bot", **environment: str) -> Iterator[Process]:
        """A bot, once it is connected."""
        with self.starting_bot(name, **environment) as process:
            process.await_output('"connected to Discord"')
            self.discord.await_connected()
            yield process

    @contextlib.contextmanager
    def starting_bot(self, name: str = "bot", **environment: str) -> Iterator[Process]:
        environment = {
            "DISCORD_TOKEN": self.discord.token,
            "DISCORD_API_BASE": self.discord.api_base,
            "DOORWARD_BOT_TOKEN": self.stack.service_token("bot"),
            "DOORWARD_BOT_SERVER": f"127.0.0.1:{self.stack.grpc_port}",
            **environment,
        }
        with running([BIN / "doorward-bot"], self.logs / f"{name}.log", environment) as process:
            yield process

    def person(self) -> "Person":
        """Somebody on Discord whom nobody knows yet."""
        number = next(_numbers)
        return Person(self, self.discord.create_user(f"person{number}"), f"/cb/{number}")


@dataclass
class Person:
    """A user of Discord, and where the answers to requests for their keys go."""

    scene: Scene
    user: User
    path: str

    @property
    def callback(self) -> str:
        return self.scene.receiver.url + self.path

    def keep(self, *values: str, service: str = "game", labels: Sequence[str] = ()) -> list[ApiKey]:
        """Give this person keys, labelled key1 and so on."""
        app = self.scene.stack.app
        self.scene.stack.secrets |= set(values)
        owner = app.discord_users.obtain(str(self.user.id))
        return [
            app.api_keys.add(owner, service, label, value, actor="test")
            for value, label in zip(
                values, labels or [f"key{number + 1}" for number in range(len(values))], strict=True
            )
        ]

    def ask(self, state: str = "", name: str = "My super bot!", callback: str | None = None) -> None:
        """An application asks for this person's keys."""
        fields = {"name": name, "userid": str(self.user.id), "callback": callback or self.callback, "state": state}
        answer = rest(self.scene.stack, "POST", "/requestapikey", data=fields)
        assert (answer.status_code, answer.text) == (200, "OK")

    def prompt(self, name: str = "My super bot!", *, after: Message | None = None) -> Message:
        """The prompt, once it is there."""

        def is_prompt(message: Message) -> bool:
            return name in json.dumps(message.embeds, ensure_ascii=False) and bool(message.buttons) and message != after

        return self.user.await_message(is_prompt)

    def outcome(self, count: int = 1) -> Callback:
        """The last of so many callbacks."""
        return self.scene.receiver.await_callbacks(self.path, count)[-1]


@contextlib.contextmanager
def make_scene(folder: Path, *, timeout: float = 600, open_per_user: int = 0) -> Iterator[Scene]:
    """A server behind a gateway, a receiver and a Discord; no bot yet."""
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        provider = enter(sandbox_provider(folder / "provider.log"))
        receiver = enter(callback_receiver(folder / "receiver.log"))
        discord = enter(discord_stand_in(folder / "discord.log"))
        settings = _SETTINGS.format(address=receiver.address, timeout=timeout, open_per_user=open_per_user)
        stack = make_stack(folder / "home", folder, provider, set(), settings)
        enter(stack.server())
        enter(stack.gateway())
        yield Scene(stack, discord, receiver, folder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scene with a bot, for a module's tests."""
    with make_scene(tmp_path_factory.mktemp("bot")) as made, made.bot():
        made.discord.await_commands("keys", "sharing")
        yield made
        assert made.discord.problems() == []


@pytest.fixture
def person(scene: Scene) -> Person:
    return scene.person()
