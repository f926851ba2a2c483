"""What Discord remembers: the bot's application, users, channels, messages, interactions, and what went wrong.

Everything here is plain state in one event loop; whoever changes it calls `World.touch`, and whoever waits for a
change waits in `World.changed`. It knows nothing of HTTP.
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from .errors import Json
from .faults import Faults

NAME = "Discord stand-in"
DEFAULT_TOKEN = "sandbox-bot-token"
DEFAULT_USERS = {"ada": "80351110224678912", "grace": "80351110224678913"}
APPLICATION_ID = "157730590492196864"
GUILD_ID = "81384788765712384"
GUILD_CHANNEL_ID = "81384788765712385"
JOURNAL_LENGTH = 20_000
_EPOCH = 1_420_070_400_000  # the first millisecond of 2015, where snowflakes begin

EPHEMERAL = 1 << 6
LOADING = 1 << 7

COMMAND, COMPONENT, AUTOCOMPLETE, MODAL = 2, 3, 4, 5


class Settings(BaseModel):
    """What a test may change about Discord. Times are in seconds, but for the heartbeat's interval."""

    model_config = ConfigDict(strict=True, extra="forbid")

    # How long an interaction waits for its first answer, and how long its token lives.
    interaction_deadline: float = Field(default=3.0, gt=0)
    token_lifetime: float = Field(default=900.0, gt=0)
    # How long a nonce is remembered.
    nonce_memory: float = Field(default=180.0, ge=0)
    # In milliseconds, as HELLO has it; for connections opened from now on.
    heartbeat_interval: int = Field(default=41_250, gt=0)
    acknowledge_heartbeats: bool = True
    # Whether the bot is in the guild, which all users are in.
    guild: bool = True
    # More is answered 429; callbacks of interactions do not count.
    requests_per_second: int = Field(default=50, ge=1)


@dataclass(eq=False)
class User:
    """A person, or the bot."""

    id: str
    name: str
    bot: bool = False
    # The code with which Discord refuses the bot's DMs to them: 50007 or 50278.
    refuses: int | None = None


@dataclass(eq=False)
class Channel:
    """The bot's DM with a user, or (without one) the guild's only channel."""

    id: str
    recipient: User | None
    # The bot has asked for it, or been written to.
    opened: bool = False
    # Oldest first, deleted and ephemeral ones too.
    messages: "list[Message]" = field(default_factory=list)


@dataclass(eq=False)
class Message:
    """A message; `embeds` and `components` are as Discord answers them."""

    id: str
    channel: Channel
    author: User
    content: str = ""
    embeds: list[Json] = field(default_factory=list)
    components: list[Json] = field(default_factory=list)
    flags: int = 0
    type: int = 0
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))
    edited: datetime | None = None
    reply_to: "Message | None" = None
    nonce: str | int | None = None
    # Whom it notifies: `@everyone`, `@here`, `<@id>`, `<@&id>`.
    pings: list[str] = field(default_factory=list)
    interaction: "Interaction | None" = None
    deleted: bool = False
    # What it was before each edit, oldest first.
    history: list[Json] = field(default_factory=list)

    @property
    def ephemeral(self) -> bool:
        return bool(self.flags & EPHEMERAL)

    @property
    def loading(self) -> bool:
        return bool(self.flags & LOADING)

    def visible_to(self, user: User) -> bool:
        """Whether the user's client shows it, somewhere."""
        if self.deleted:
            return False
        if self.ephemeral:
            return self.interaction is not None and self.interaction.user is user
        return self.channel.recipient in (user, None)


@dataclass(eq=False)
class Interaction:
    """What a user did that the bot has to answer, and how it went."""

    id: str
    token: str
    type: int
    user: User
    channel: Channel
    data: Json
    message: Message | None = None
    # The interaction whose modal this one submits.
    parent: "Interaction | None" = None
    created: float = field(default_factory=time.monotonic)
    state: Literal["pending", "acknowledged", "failed"] = "pending"
    acknowledged_after: float | None = None
    response_type: int | None = None
    # Whether what was deferred has come.
    settled: bool = False
    original: Message | None = None
    followups: list[Message] = field(default_factory=list)
    modal: Json | None = None
    choices: list[Json] | None = None


@dataclass(eq=False)
class Exchange:
    """One REST request and its answer; `status` is None as long as there is none, `lost` when there will be none."""

    method: str
    route: str
    path: str
    at: float = field(default_factory=time.monotonic)
    query: dict[str, str] = field(default_factory=dict)
    body: object = None
    status: int | None = None
    answer: object = None
    lost: bool = False
    fault: str | None = None


class World:
    """All of it, and the one notification of changes."""

    def __init__(self, users: dict[str, str], token: str = DEFAULT_TOKEN) -> None:
        self.bot = User(APPLICATION_ID, "Doorward", bot=True)
        self.users: dict[str, User] = {}
        self.guild_channel = Channel(GUILD_CHANNEL_ID, None, opened=True)
        self.channels: dict[str, Channel] = {GUILD_CHANNEL_ID: self.guild_channel}
        self._dms: dict[str, Channel] = {}
        # By the guild they are registered in; None: everywhere.
        self.commands: dict[str | None, dict[str, Json]] = {None: {}, GUILD_ID: {}}
        self.token = token
        self.version = 0
        self._changed = asyncio.Event()
        self._last_snowflake = 0
        self.reset()
        for name, user_id in users.items():
            self.add_user(User(user_id, name))

    def reset(self) -> None:
        """Forget what happened. Users, channels, commands and connections stay, for the bot remembers them."""
        self.settings = Settings()
        self.faults = Faults()
        self.token_revoked = False
        self.messages: dict[str, Message] = {}
        self.interactions: dict[str, Interaction] = {}
        self._interactions_by_token: dict[str, Interaction] = {}
        self.journal: deque[Exchange] = deque(maxlen=JOURNAL_LENGTH)
        self.problems: list[str] = []
        self.recent_requests: deque[float] = deque()
        for user in self.users.values():
            user.refuses = None
        for channel in self.channels.values():
            channel.messages.clear()
        self.touch()

    def touch(self) -> None:
        """Tell whoever waits that something has changed."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, after: int, patience: float) -> None:
        """Return once the version is past the given one, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self.version <= after:
                    await self._changed.wait()

    def problem(self, what: str) -> None:
        self.problems.append(what)
        self.touch()

    # Identities

    def snowflake(self) -> str:
        """An id greater than all before it, with the time in its upper 42 bits."""
        now = (time.time_ns() // 1_000_000 - _EPOCH) << 22
        self._last_snowflake = max(now, self._last_snowflake + 1)
        return str(self._last_snowflake)

    def add_user(self, user: User) -> None:
        self.users[user.id] = user
        channel = Channel(self.snowflake(), user)
        self.channels[channel.id] = self._dms[user.id] = channel
        self.touch()

    def user_named(self, name: str) -> User | None:
        return next((user for user in self.users.values() if user.name == name), None)

    def dm_with(self, user: User) -> Channel:
        return self._dms[user.id]

    # Messages

    def add_message(self, message: Message) -> None:
        message.channel.opened = True
        message.channel.messages.append(message)
        self.messages[message.id] = message
        self.touch()

    def messages_in(self, channel: Channel) -> Iterator[Message]:
        """Those that are not deleted, oldest first, ephemeral ones too."""
        return (message for message in channel.messages if not message.deleted)

    def message_with_nonce(self, channel: Channel, nonce: str | int) -> Message | None:
        """The bot's message that already came with this nonce, a short while ago."""
        since = datetime.now(UTC) - timedelta(seconds=self.settings.nonce_memory)
        recent = itertools.takewhile(lambda message: message.timestamp > since, reversed(channel.messages))
        return next((message for message in recent if message.author is self.bot and message.nonce == nonce), None)

    # Interactions

    def add_interaction(self, interaction: Interaction) -> None:
        """Have it fail unless it is acknowledged in time."""
        self.interactions[interaction.id] = interaction
        self._interactions_by_token[interaction.token] = interaction
        loop = asyncio.get_running_loop()
        loop.call_later(self.settings.interaction_deadline, self._fail_unanswered, interaction)
        self.touch()

    def _fail_unanswered(self, interaction: Interaction) -> None:
        if interaction.state == "pending":
            interaction.state = "failed"
            self.touch()

    def interaction_with_token(self, token: str) -> Interaction | None:
        return self._interactions_by_token.get(token)

    @staticmethod
    def new_token() -> str:
        """An interaction's: it goes into addresses, and is a secret."""
        return secrets.token_urlsafe(64)


WORLD = web.AppKey("world", World)
