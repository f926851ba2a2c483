"""What tests do with the stand-in: people act, tests look at what came of it, and things go wrong on demand.

Nothing here sleeps: `await_` methods return as soon as what they wait for has happened, and fail when it does not.
What a real client could not do raises CannotDo.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

from tests.sandbox.serving import started

from .actors import CannotDo
from .control import VERSION
from .state import APPLICATION_ID, DEFAULT_TOKEN, GUILD_ID, NAME

__all__ = [
    "APPLICATION_ID",
    "GUILD_ID",
    "Button",
    "CannotDo",
    "Discord",
    "Interaction",
    "Menu",
    "Message",
    "Request",
    "Session",
    "User",
    "discord_stand_in",
]

Json = dict[str, Any]
T = TypeVar("T")
PATIENCE = 20.0
_ONE_WAIT = 5.0


@dataclass(frozen=True)
class Button:
    """A button as it is shown; without custom_id, it is a link."""

    label: str | None
    custom_id: str | None
    disabled: bool
    style: int


@dataclass(frozen=True)
class Menu:
    """A select menu as it is shown: `options` are value and label, in order."""

    custom_id: str
    options: dict[str, str]
    descriptions: dict[str, str]
    min_values: int
    max_values: int
    disabled: bool
    placeholder: str | None


@dataclass(frozen=True)
class Message:
    """A message as it was when it was asked for. `raw` and each of `history` are Discord's JSON."""

    id: str
    channel_id: str
    author: str
    by_bot: bool
    content: str
    embeds: list[Json]
    components: list[Json] = field(repr=False)
    ephemeral: bool
    # A deferred answer that is not there yet: "Doorward is thinking...".
    loading: bool
    deleted: bool
    edited: bool
    reply_to: str | None
    # The interaction it answers.
    interaction: str | None
    nonce: str | int | None
    # Whom it notifies: `@everyone`, `@here`, `<@id>`, `<@&id>`.
    pings: list[str]
    # What it was before each edit, oldest first.
    history: list[Json] = field(repr=False)
    raw: Json = field(repr=False)

    @property
    def text(self) -> str:
        """All that is to be read, raw: the content, and each embed's texts, a line each."""
        lines = [self.content]
        for embed in self.embeds:
            lines += [embed.get("author", {}).get("name", ""), embed.get("title", ""), embed.get("description", "")]
            lines += [text for field in embed.get("fields", []) for text in (field["name"], field["value"])]
            lines.append(embed.get("footer", {}).get("text", ""))
        return "\n".join(line for line in lines if line)

    @property
    def buttons(self) -> list[Button]:
        return [
            Button(each.get("label"), each.get("custom_id"), each.get("disabled", False), each["style"])
            for each in self._all_of(2)
        ]

    @property
    def menus(self) -> list[Menu]:
        return [
            Menu(
                custom_id=each["custom_id"],
                options={option["value"]: option["label"] for option in each["options"]},
                descriptions={option["value"]: option.get("description", "") for option in each["options"]},
                min_values=each["min_values"],
                max_values=each["max_values"],
                disabled=each.get("disabled", False),
                placeholder=each.get("placeholder"),
            )
            for each in self._all_of(3)
        ]

    @property
    def menu(self) -> Menu:
        """The only one."""
        [menu] = self.menus
        return menu

    @property
    def enabled(self) -> bool:
        """Whether there is anything to click or choose."""
        return any(not each.get("disabled") for row in self.components for each in row["components"])

    def _all_of(self, kind: int) -> list[Json]:
        return [each for row in self.components for each in row["components"] if each["type"] == kind]


@dataclass(frozen=True)
class Interaction:
    """What a user did, and how it stood when it was asked for; `refreshed` asks again.

    `state` is `pending`, `acknowledged` or `failed` ("This interaction failed"). `reply` is the message that answers
    it: a new one, or that whose component was used, when the answer is to change it.
    """

    id: str
    token: str = field(repr=False)
    type: int
    user: str
    state: Literal["pending", "acknowledged", "failed"]
    # In seconds.
    acknowledged_after: float | None
    # Discord's: 4 a message, 5 a message later, 6 nothing now, 7 a change, 8 choices, 9 a modal.
    response_type: int | None
    # Whether a deferred answer has come, if it was deferred.
    settled: bool
    reply: Message | None
    followups: list[Message]
    # Discord's JSON: `custom_id`, `title` and `components`.
    modal: Json | None
    choices: list[Json] | None

    @property
    def deferred(self) -> bool:
        """Whether the first answer was that another would follow."""
        return self.response_type in (5, 6)


@dataclass(frozen=True)
class Request:
    """A REST request of the bot's: `route` has the names of its parameters, `at` is by a monotonic clock."""

    method: str
    route: str
    path: str
    at: float
    query: dict[str, str]
    body: Any
    # None as long as it has no answer.
    status: int | None
    answer: Any
    # The connection ended without one.
    lost: bool
    fault: str | None


@dataclass(frozen=True)
class Session:
    """A gateway session, connected or waiting for a RESUME."""

    id: str
    intents: int
    sequence: int
    resumes: int
    connected: bool


class Discord:
    """A running stand-in, at its URL."""

    token = DEFAULT_TOKEN

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=f"{url}/_sandbox", trust_env=False, timeout=60)

    @property
    def api_base(self) -> str:
        """What the bot is pointed at."""
        return f"{self.url}/api/v10"

    # People

    def user(self, name: str) -> "User":
        """A user that is there: `ada` and `grace` are from the start."""
        return next(user for user in self.users() if user.name == name)

    def users(self) -> list["User"]:
        return [User(self, entry["name"], entry["id"]) for entry in self._get("users")]

    def create_user(self, name: str, user_id: str | None = None, refuses: int | None = None) -> "User":
        """A new user; `refuses` as in User.refuse."""
        entry = self._post("users", {"name": name, "id": user_id, "refuses": refuses})
        return User(self, entry["name"], entry["id"])

    # What happened

    def problems(self) -> list[str]:
        """Everything the bot did that Discord would refuse as a mistake; a test expects `[]`."""
        problems: list[str] = self._get("problems")
        return problems

    def forget_problems(self) -> None:
        self._send("DELETE", "problems")

    def requests(self, method: str | None = None, route: str | None = None) -> list[Request]:
        """The bot's REST requests, in order; a route is as `/channels/{channel_id}/messages`."""
        return [
            Request(**entry)
            for entry in self._get("requests")
            if method in (None, entry["method"]) and route in (None, entry["route"])
        ]

    def await_request(self, method: str, route: str, *, count: int = 1, answered: bool = True) -> list[Request]:
        """The requests to a route, once there are so many, and each has an answer or has lost it."""
        return self.until(
            lambda: self.requests(method, route),
            lambda found: len(found) >= count and all(each.status or each.lost or not answered for each in found),
            f"{count} requests {method} {route}",
        )

    def forget_requests(self) -> None:
        self._send("DELETE", "requests")

    def commands(self) -> list[Json]:
        """The registered commands, as Discord has them."""
        commands: list[Json] = self._get("commands")
        return commands

    def await_commands(self, *names: str) -> list[Json]:
        """The commands, once these are among them."""
        return self.until(
            self.commands,
            lambda found: set(names) <= {command["name"] for command in found},
            f"commands {', '.join(names)}",
        )

    def message(self, message_id: str) -> Message:
        """Any message, deleted ones too."""
        return _message(self._get(f"messages/{message_id}"))

    def interaction(self, interaction_id: str) -> Interaction:
        return _interaction(self._get(f"interactions/{interaction_id}"))

    def interactions(self) -> list[Interaction]:
        return [_interaction(entry) for entry in self._get("interactions")]

    def sessions(self) -> list[Session]:
        return [Session(**entry) for entry in self._get("gateway")["sessions"]]

    def identified(self) -> int:
        """How many sessions were begun, ever."""
        count: int = self._get("gateway")["identified"]
        return count

    def await_connected(self, count: int = 1) -> list[Session]:
        """The sessions, once so many are connected."""
        return self.until(
            self.sessions,
            lambda found: sum(session.connected for session in found) == count,
            f"{count} connected sessions",
        )

    def until(self, look: Callable[[], T], holds: Callable[[T], bool], what: str, patience: float = PATIENCE) -> T:
        """What there is to see, once a condition holds for it. Looks again whenever something has changed."""
        deadline = time.monotonic() + patience
        while True:
            version = self._version()
            seen = look()
            if holds(seen):
                return seen
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"in vain waited for: {what}; there is: {seen}; problems: {self.problems()}")
            self._send("GET", "changes", params={"after": version, "patience": min(left, _ONE_WAIT)})

    # How Discord behaves

    def configure(self, **settings: float | bool) -> None:
        """Change some of `state.Settings`: deadlines, the heartbeat, the guild, the limit of requests."""
        self._send("PUT", "settings", settings)

    def fault(self, kind: str, route: str = "*", **options: Any) -> None:
        """Make the next requests to a route fail, as `POST /channels/{channel_id}/messages`; see faults.Fault."""
        self._send("POST", "faults", {"kind": kind, "route": route, **options})

    def heal(self) -> None:
        """End all faults."""
        self._send("DELETE", "faults")

    def drop_connections(self) -> None:
        """Cut the gateway's connections without a word; the sessions can be resumed."""
        self._send("POST", "gateway/drop")

    def ask_to_reconnect(self) -> None:
        """Op 7 to all."""
        self._send("POST", "gateway/reconnect")

    def invalidate_sessions(self, *, resumable: bool) -> None:
        """Op 9 to all."""
        self._send("POST", "gateway/invalidate", {"resumable": resumable})

    def close_connections(self, code: int) -> None:
        """Close the gateway's connections with a code, as 4000 (resumable) or 4004."""
        self._send("POST", "gateway/close", {"code": code})

    def revoke_token(self) -> None:
        """From now on the token is refused: by REST with 401, by the gateway with 4004."""
        self._send("POST", "token/revoke")

    def restore_token(self) -> None:
        self._send("POST", "token/restore")

    def reset(self) -> None:
        """Forget messages, interactions, requests, problems, faults and settings, and who refuses DMs.

        Users, channels, commands and the bot's sessions stay, for the bot remembers them.
        """
        self._send("POST", "reset")

    def close(self) -> None:
        self._http.close()

    def _version(self) -> int:
        return int(self._send("GET", "changes", params={"after": -1}).headers[VERSION])

    def _get(self, path: str, **params: Any) -> Any:
        return self._send("GET", path, params=params).json()

    def _post(self, path: str, body: Json) -> Any:
        return self._send("POST", path, body).json()

    def _send(self, method: str, path: str, json: Any = None, params: Any = None) -> httpx.Response:
        response = self._http.request(method, f"/{path}", json=json, params=params)
        if response.status_code == httpx.codes.CONFLICT:
            raise CannotDo(response.text.strip())
        if response.is_error:
            raise ValueError(f"{method} {path}: {response.status_code} {response.text.strip()}")
        return response


@dataclass(frozen=True)
class User:
    """A person who uses Discord; `id` is their snowflake."""

    discord: Discord
    name: str
    id: str

    def refuse(self, code: int | None = 50007) -> None:
        """Refuse the bot's DMs, with 50007 or 50278; None: take them again."""
        self.discord._send("PATCH", f"users/{self.name}", {"refuses": code})

    def messages(self, *, guild: bool = False) -> list[Message]:
        """What they see in the DM (or in the guild's channel), oldest first, with ephemeral replies to them."""
        return [_message(entry) for entry in self.discord._get(f"users/{self.name}/messages", guild=int(guild))]

    def await_message(
        self,
        matching: str | Callable[[Message], bool] = "",
        *,
        after: Message | None = None,
        guild: bool = False,
        patience: float = PATIENCE,
    ) -> Message:
        """The newest message of the bot's that matches a condition, or holds a text; newer than another."""

        def matches(message: Message) -> bool:
            newer = after is None or int(message.id) > int(after.id)
            fits = matching in message.text if isinstance(matching, str) else matching(message)
            return message.by_bot and newer and fits

        what = f"a message to {self.name} with {matching!r}"
        found = self.discord.until(
            lambda: self.messages(guild=guild), lambda seen: any(map(matches, seen)), what, patience
        )
        return next(message for message in reversed(found) if matches(message))

    def await_change(
        self, message: Message, holds: Callable[[Message], bool] | None = None, patience: float = PATIENCE
    ) -> Message:
        """The message, once a condition holds; without one, once it was edited or deleted after it was asked for."""

        def changed(now: Message) -> bool:
            return holds(now) if holds else len(now.history) > len(message.history) or now.deleted

        return self.discord.until(
            lambda: self.discord.message(message.id), changed, f"a change of message {message.id}", patience
        )

    def say(self, text: str, reply_to: Message | None = None, *, guild: bool = False) -> Message:
        """Write to the bot, or into the guild's channel."""
        answered = reply_to.id if reply_to else None
        return _message(self._act("say", text=text, reply_to=answered, guild=guild))

    def click(self, message: Message, button: str, *, forged: bool = False) -> Interaction:
        """Click a button by its label or custom_id. `forged`: even if no real client would let them."""
        return _interaction(self._act("click", message=message.id, button=button, forged=forged))

    def select(self, message: Message, *values: str, custom_id: str | None = None, forged: bool = False) -> Interaction:
        """Choose values (or labels) of a menu, which is named when there are several."""
        wish = {"message": message.id, "values": list(values), "custom_id": custom_id, "forged": forged}
        return _interaction(self._act("select", **wish))

    def slash(self, command: str, /, *, guild: bool = False, **options: str | float | bool) -> Interaction:
        """Use a command, as `slash("keys add", service="gw2")`."""
        return _interaction(self._act("slash", command=command, options=options, guild=guild))

    def autocomplete(
        self, command: str, option: str, text: str, /, *, guild: bool = False, **options: str | float | bool
    ) -> Interaction:
        """Type into an option, as `autocomplete("keys remove", "key", "gu")`; `options` are filled in already."""
        wish = {"command": command, "option": option, "text": text, "options": options, "guild": guild}
        return _interaction(self._act("autocomplete", **wish))

    def submit(
        self, modal: Interaction, values: dict[str, str | list[str]] | None = None, /, **more: str
    ) -> Interaction:
        """Send the modal that an interaction was answered with: texts by custom_id or label."""
        return _interaction(self._act("submit", interaction=modal.id, values={**(values or {}), **more}))

    def outcome(self, interaction: Interaction, patience: float = PATIENCE) -> Interaction:
        """The interaction, once it is acknowledged, or has failed."""
        return self.await_interaction(interaction, lambda seen: seen.state != "pending", patience)

    def answer(self, interaction: Interaction, patience: float = PATIENCE) -> Message:
        """The message that answers an interaction, once it is there, however long it was deferred.

        That is a new one or the changed one; after a deferred change, the first that followed, if there is one.
        """

        def answered(seen: Interaction) -> bool:
            assert seen.state != "failed", f"the interaction failed: {seen}"
            return seen.settled

        seen = self.await_interaction(interaction, answered, patience)
        message = seen.followups[0] if seen.response_type == 6 and seen.followups else seen.reply
        assert message is not None, f"no message answers the interaction: {seen}"
        return message

    def await_interaction(
        self, interaction: Interaction, holds: Callable[[Interaction], bool], patience: float = PATIENCE
    ) -> Interaction:
        """The interaction, once a condition holds for it."""
        return self.discord.until(
            lambda: self.discord.interaction(interaction.id), holds, f"interaction {interaction.id}", patience
        )

    def _act(self, action: str, **wish: Any) -> Json:
        answer: Json = self.discord._post(f"users/{self.name}/{action}", wish)
        return answer


def _message(entry: Json) -> Message:
    raw = entry["message"]
    return Message(
        id=raw["id"],
        channel_id=raw["channel_id"],
        author=entry["author"],
        by_bot=entry["by_bot"],
        content=raw["content"],
        embeds=raw["embeds"],
        components=raw["components"],
        ephemeral=entry["ephemeral"],
        loading=entry["loading"],
        deleted=entry["deleted"],
        edited=raw["edited_timestamp"] is not None,
        reply_to=entry["reply_to"],
        interaction=entry["interaction"],
        nonce=raw.get("nonce"),
        pings=entry["pings"],
        history=entry["history"],
        raw=raw,
    )


def _interaction(entry: Json) -> Interaction:
    shown = {name: entry[name] for name in entry if name not in ("original", "followups")}
    reply = _message(entry["original"]) if entry["original"] else None
    return Interaction(**shown, reply=reply, followups=[_message(message) for message in entry["followups"]])


@contextlib.contextmanager
def discord_stand_in(log: Path, *options: str) -> Iterator[Discord]:
    """A stand-in in a process of its own, on a free port; `options` are those of its command line."""
    with started(NAME, "tests.sandbox.discord", log, *options) as url:
        discord = Discord(url)
        try:
            yield discord
        finally:
            discord.close()
