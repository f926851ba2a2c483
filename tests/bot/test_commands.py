"""The slash commands: what they do, what they refuse, and that only who gave them sees the answer."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from doorward_bot import messages
from doorward_server.delivery import Status as DeliveryStatus
from doorward_server.models import ApiKey
from tests.bot.conftest import Person, Scene
from tests.processes import await_condition, free_port
from tests.sandbox.client import SandboxProvider
from tests.sandbox.discord.client import Interaction, Message, discord_stand_in
from tests.sandbox.receiver import callback_receiver
from tests.stack import Stack, make_stack, sandbox_provider

# A delivery that failed is tried again just late enough for a user to do something before.
_RETRY = 2.0
_SETTINGS = """\
[callbacks]
allow = ["{receiver}"]
schedule = [{retry}, 0.1]
[limits]
requests_per_address = 0
open_per_user = 0
[validators.checked]
tokeninfo_url = "{validator}/lookup"
account_url = "{validator}/lookup"
timeout = 1
"""
_AWAY = "Doorward cannot be reached right now. Please try again in a minute."
_NO_KEY = "You have no such key. Please pick one from the list."
_NO_GRANT = "You share no such keys."
_NO_APPLICATION = "There is no such application."
_LIKE_A_BACKTICK = "\N{MODIFIER LETTER GRAVE ACCENT}"
_COMPLETED = {"keys remove": "key", "sharing revoke": "grant", "sharing block": "application"}


@dataclass
class BotServer:
    """The server that the bot talks to; another one on the same home serves the gateway."""

    stack: Stack
    port: int = field(default_factory=free_port)
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self) -> None:
        process = self._running.enter_context(self.stack.server(self.port))
        self._running.callback(process.kill)  # it would wait for the bot's call, which waits for requests

    def stop(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def validator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProvider]:
    """The service that knows its keys: they are its access tokens."""
    with sandbox_provider(tmp_path_factory.mktemp("validator") / "validator.log") as validator:
        yield validator


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, validator: SandboxProvider) -> Iterator[tuple[Scene, BotServer]]:
    # The values of all keys, which nothing that is logged or sent to Discord may hold.
    secrets: set[str] = set()
    folder, outside = tmp_path_factory.mktemp("bot"), tmp_path_factory.mktemp("outside")
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        receiver = enter(callback_receiver(outside / "receiver.log"))
        discord = enter(discord_stand_in(outside / "discord.log"))
        more = _SETTINGS.format(receiver=receiver.address, validator=validator.url, retry=_RETRY)
        stack = make_stack(folder / "home", folder, validator, secrets, more)
        enter(stack.server())
        enter(stack.gateway())
        server = BotServer(stack)
        opened.callback(server.stop)
        server.start()
        scene = Scene(stack, discord, receiver, folder)
        enter(scene.bot(DOORWARD_BOT_SERVER=f"127.0.0.1:{server.port}", DOORWARD_LOG_LEVEL="debug"))
        discord.await_commands("keys", "sharing")
        yield scene, server
        assert discord.problems() == []
        said = json.dumps([[each.path, each.body] for each in discord.requests()], ensure_ascii=False)
        assert [value for value in secrets if value in said] == []
    logs = {path.name: path.read_text() for path in folder.glob("*.log")}
    assert {name for name, text in logs.items() if any(value in text for value in secrets | {discord.token})} == set()
    assert "Traceback" not in logs["bot.log"]


@pytest.fixture(scope="module")
def scene(places: tuple[Scene, BotServer]) -> Scene:
    return places[0]


@pytest.fixture
def user(person: Person) -> "CommandUser":
    return CommandUser(person)


@dataclass
class CommandUser:
    """Somebody who gives commands, and expects that nobody else sees the answers."""

    person: Person

    def said(self, interaction: Interaction) -> str:
        """The answer, which nobody else sees and which pings nobody."""
        answer: Message = self.person.user.answer(interaction)
        assert answer.ephemeral
        assert answer.pings == []
        return answer.text

    def choose(self, command: str, typed: str) -> str:
        """A command whose only option is this, whatever was offered."""
        option: dict[str, Any] = {_COMPLETED[command]: typed}
        return self.said(self.person.user.slash(command, **option))

    def command(self, command: str, /, *, guild: bool = False, **options: str) -> str:
        return self.said(self.person.user.slash(command, guild=guild, **options))

    def form(self, *, guild: bool = False) -> Interaction:
        """The form of `/keys add`, open."""
        return self.person.user.outcome(self.person.user.slash("keys add", guild=guild))

    def add(self, service: str, label: str, value: str, *, guild: bool = False) -> str:
        if value.strip():
            self.person.scene.stack.secrets.add(value.strip())
        fields: dict[str, str | list[str]] = {"Service": service, "Label": label, "Key": value}
        return self.said(self.person.user.submit(self.form(guild=guild), fields))

    def keys(self) -> list[tuple[str, str]]:
        """What the server keeps: services and labels."""
        app = self.person.scene.stack.app
        user = app.discord_users.find(self.person.user.id)
        return [(listed.key.service, listed.key.label) for listed in app.api_keys.list(user)] if user else []

    def choices(self, command: str, typed: str = "", *, guild: bool = False) -> list[str]:
        """The names that complete a command's only option."""
        return [choice["name"] for choice in self._choices(command, typed, guild)]

    def choice(self, command: str, typed: str = "") -> str:
        """The value of the only choice."""
        [choice] = self._choices(command, typed, False)
        value: str = choice["value"]
        return value

    def _choices(self, command: str, typed: str, guild: bool) -> list[dict[str, str]]:
        user = self.person.user
        seen = user.outcome(user.autocomplete(command, _COMPLETED[command], typed, guild=guild))
        assert seen.state == "acknowledged"
        assert seen.choices is not None
        assert len(seen.choices) <= 25
        return seen.choices

    def share(self, name: str = "My super bot!", callback: str | None = None) -> None:
        """Let an application ask, and share everything."""
        self.person.ask(name=name, callback=callback)
        self.person.user.click(self.person.prompt(name), "Share all")

    def cancel(self, name: str, callback: str) -> None:
        """Let an application ask, and share nothing."""
        self.person.ask(name=name, callback=callback)
        self.person.user.click(self.person.prompt(name), "Cancel")


def fill(person: Person, count: int, service: str = "game", label: str = "key{}") -> list[ApiKey]:
    """Keys of one service."""
    app = person.scene.stack.app
    owner = app.discord_users.obtain(person.user.id)
    values = [f"{person.user.name}-{service}-{number:04}" for number in range(1, count + 1)]
    person.scene.stack.secrets |= set(values)
    return [
        app.api_keys.add(owner, service, label.format(number), value, actor="test")
        for number, value in enumerate(values, 1)
    ]


# /keys add


@pytest.mark.parametrize("guild", [False, True], ids=["DM", "guild"])
def test_add(user: CommandUser, guild: bool) -> None:
    form = user.form(guild=guild)
    assert form.modal is not None
    assert form.modal["title"] == "Add an API key"
    assert [part["label"] for part in form.modal["components"]] == ["Service", "Label", "Key"]
    said = user.add(" Game ", " main account ", " the-secret-value-1234 ", guild=guild)
    assert said == "Added `main account` for `game`, ending in `1234`."
    assert user.keys() == [("game", "main account")]
    assert "main account" in user.command("keys list", guild=guild)


def test_the_first_command_of_a_user_leaves_no_trace(user: CommandUser) -> None:
    """Only a key makes somebody known."""
    user.command("keys list")
    user.command("sharing list")
    user.command("keys remove", key="1")
    assert user.person.scene.stack.app.discord_users.find(user.person.user.id) is None


_SERVICE = "Nothing was stored: a service is named by"
_LABEL = "Nothing was stored: a label has 1 to 80 visible characters."
_KEY = "Nothing was stored: a key has no spaces in it."


@pytest.mark.parametrize(
    ("service", "label", "value", "sentence"),
    [
        pytest.param("   ", "label", "refused-value", _SERVICE, id="service: blank"),
        pytest.param("my game", "label", "refused-value", _SERVICE, id="service: two words"),
        pytest.param("spiel-für-alle", "label", "refused-value", _SERVICE, id="service: umlaut"),
        pytest.param("../../etc", "label", "refused-value", _SERVICE, id="service: path"),
        pytest.param("-game", "label", "refused-value", _SERVICE, id="service: begins with a hyphen"),
        pytest.param("<@80351110224678912>", "label", "refused-value", _SERVICE, id="service: mention"),
        pytest.param("game", "   ", "refused-value", _LABEL, id="label: blank"),
        pytest.param("game", "two\nlines", "refused-value", _LABEL, id="label: newline"),
        pytest.param("game", "tab\there", "refused-value", _LABEL, id="label: tab"),
        pytest.param("game", "\u202eesrever", "refused-value", _LABEL, id="label: bidirectional"),
        pytest.param("game", "a\u200bb", "refused-value", _LABEL, id="label: zero width"),
        pytest.param("game", "label", "   ", _KEY, id="key: blank"),
        pytest.param("game", "label", "refused value", _KEY, id="key: two words"),
        pytest.param("game", "label", "refused\nvalue", _KEY, id="key: newline"),
        pytest.param("game", "label", "refused\u00a0value", _KEY, id="key: no-break space"),
        pytest.param("game", "label", "refused\u202evalue", _KEY, id="key: bidirectional"),
    ],
)
def test_refused(user: CommandUser, service: str, label: str, value: str, sentence: str) -> None:
    assert user.add(service, label, value).startswith(sentence)
    assert user.keys() == []


def test_longest(user: CommandUser) -> None:
    value = "v" * 3996 + "last"
    assert user.add("s" * 40, "l" * 80, value) == f"Added `{'l' * 80}` for `{'s' * 40}`, ending in `last`."
    assert user.choices("keys remove") == [f"{'l' * 80} ({'s' * 40} …last)"[:100]]


def test_the_same_key_twice(user: CommandUser) -> None:
    user.add("game", "one", "twice-the-same-1")
    assert user.add("game", "two", "twice-the-same-1") == "You have this key already."
    assert user.add("other", "two", "twice-the-same-1").startswith("Added")
    assert user.keys() == [("game", "one"), ("other", "two")]


def test_the_16th_key_of_a_service(user: CommandUser) -> None:
    fill(user.person, 15)
    assert user.add("game", "one more", "the-16th-value").startswith(
        "You have 15 keys for this service, or 200 in all;"
    )
    assert user.add("other", "one more", "the-16th-value").startswith("Added")
    key = user.choice("keys remove", "key15 ")
    assert user.command("keys remove", key=key).startswith("Removed.")
    assert user.add("game", "one more", "the-16th-value").startswith("Added")


def test_a_form_that_was_sent_too_late_is_sent_again(user: CommandUser) -> None:
    """What Discord shows as failed has not been stored, so that the user may send it again."""
    discord = user.person.scene.discord
    form = user.form()
    fields: dict[str, str | list[str]] = {"Service": "game", "Label": "late", "Key": "late-value-1"}
    user.person.scene.stack.secrets.add("late-value-1")
    discord.configure(interaction_deadline=0.2)
    try:
        discord.fault("delay", "POST /interactions/{interaction_id}/{token}/callback", times=1, seconds=0.5)
        late = user.person.user.submit(form, fields)
        assert user.person.user.outcome(late).state == "failed"
        discord.await_request("POST", "/interactions/{interaction_id}/{token}/callback")
    finally:
        discord.configure(interaction_deadline=3.0)
    assert user.keys() == []
    assert user.said(user.person.user.submit(form, fields)).startswith("Added `late`")
    discord.forget_problems()  # it answered late, which was the point


def test_two_forms_with_the_same_key(user: CommandUser) -> None:
    user.person.scene.stack.secrets.add("sent-twice-1")
    forms = [user.form(), user.form()]
    fields: dict[str, str | list[str]] = {"Service": "game", "Label": "twice", "Key": "sent-twice-1"}
    sent = [user.person.user.submit(form, fields) for form in forms]
    said = sorted(user.said(each) for each in sent)
    assert said == ["Added `twice` for `game`, ending in `ce-1`.", "You have this key already."]
    assert user.keys() == [("game", "twice")]


def test_a_key_appears_in_an_open_prompt(user: CommandUser) -> None:
    user.person.ask()
    prompt = user.person.prompt()
    assert user.add("game", "just added", "just-added-1").startswith("Added")
    changed = user.person.user.await_change(prompt, lambda message: "just added" in message.text)
    user.person.user.click(changed, "Share all")
    assert user.person.outcome().keys == ["just-added-1"]


# /keys add, of a service that knows its keys


def test_a_key_that_its_service_knows(user: CommandUser, validator: SandboxProvider) -> None:
    value = validator.access_token("grace")
    assert user.add("checked", "main", value).endswith(" It belongs to the account `Grace`.")


def test_a_key_that_its_service_does_not_know(user: CommandUser) -> None:
    said = user.add("checked", "main", "unknown-to-the-service")
    assert said == "The service does not accept this key, so it was not stored."
    assert user.keys() == []


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"kind": "status", "status": 503}, id="503"),
        pytest.param({"kind": "status", "status": 429}, id="429"),
        pytest.param({"kind": "hang"}, id="hangs"),
        pytest.param({"kind": "not_http"}, id="no HTTP"),
    ],
)
def test_the_service_is_away(user: CommandUser, validator: SandboxProvider, fault: Mapping[str, str]) -> None:
    value = validator.access_token("ada")
    validator.fault("lookup", **fault)
    try:
        said = user.add("checked", "main", value)
    finally:
        validator.heal()
    assert said.startswith("The service that checks this key cannot be reached.")
    assert user.keys() == []
    assert user.add("checked", "main", value).startswith("Added")


# Hostile labels


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        pytest.param("**bold** _it_ ~~no~~ ||who||", "`**bold** _it_ ~~no~~ ||who||`", id="markdown"),
        pytest.param("[here](https://evil.example)", "`[here](https://evil.example)`", id="link"),
        pytest.param("@everyone @here", "`@everyone @here`", id="everyone"),
        pytest.param("<@80351110224678912> <@&1>", "`<@80351110224678912> <@&1>`", id="mentions"),
        pytest.param("```", f"`{_LIKE_A_BACKTICK * 3}`", id="only backticks"),
        pytest.param("a`b @everyone", f"`a{_LIKE_A_BACKTICK}b @everyone`", id="backtick inside"),
        pytest.param("ends with \\", "`ends with \\`", id="backslash"),
        pytest.param("😀 Ünï ключ 鍵", "`😀 Ünï ключ 鍵`", id="emoji"),
        pytest.param("<t:0:R> <a:x:1> </keys add:1>", "`<t:0:R> <a:x:1> </keys add:1>`", id="Discord's own"),
        pytest.param("# big", "`# big`", id="heading"),
        pytest.param("😀" * 80, f"`{'😀' * 80}`", id="80 emoji"),
    ],
)
def test_hostile_labels(user: CommandUser, label: str, shown: str) -> None:
    assert user.add("game", label, "hostile-label-1234") == f"Added {shown} for `game`, ending in `1234`."
    assert user.command("keys list", guild=True) == f"- {shown} for `game`, ending in `1234`"
    assert user.choices("keys remove") == [f"{label} (game …1234)"[:100]]
    user.share()
    assert user.person.outcome().keys == ["hostile-label-1234"]
    assert shown in user.command("sharing list", guild=True)
    assert user.choice("sharing revoke")
    assert [message.pings for message in user.person.user.messages() if message.by_bot and message.pings] == []


def test_hostile_names(user: CommandUser) -> None:
    fill(user.person, 1)
    name = "@everyone <@80351110224678912> **free** ||gift||"
    user.share(name)
    user.person.outcome()
    assert user.command("sharing list", guild=True).startswith(f"- `{name}` (not verified) at ")
    assert user.choices("sharing revoke") == [f"{name} at 127.0.0.1: key1"]
    assert user.choices("sharing block") == [f"{name} at 127.0.0.1"]


# /keys list


def test_list_of_none(user: CommandUser) -> None:
    assert user.command("keys list") == "You have no keys yet. `/keys add` adds one, for any service."


def test_list_is_ones_own(user: CommandUser, scene: Scene) -> None:
    fill(user.person, 2)
    other = CommandUser(scene.person())
    fill(other.person, 1, "other")
    assert user.command("keys list").splitlines() == [
        "- `key1` for `game`, ending in `0001`",
        "- `key2` for `game`, ending in `0002`",
    ]
    assert other.command("keys list").splitlines() == ["- `key1` for `other`, ending in `0001`"]


def test_a_long_list(user: CommandUser) -> None:
    for service in ("one", "two", "three", "four"):
        fill(user.person, 15, service)
    lines = user.command("keys list").splitlines()
    assert len(lines) == 60
    assert lines[-1] == "- `key15` for `four`, ending in `0015`"


def test_a_list_that_does_not_fit_says_so(user: CommandUser) -> None:
    for service in ("one", "two", "three", "four"):
        fill(user.person, 15, service, label="{:02}" + "x" * 78)
    *lines, last = user.command("keys list").splitlines()
    assert last == f"… and {60 - len(lines)} more"
    assert 30 < len(lines) < 60


# /keys remove


def test_remove(user: CommandUser) -> None:
    fill(user.person, 3)
    assert user.command("keys remove", key=user.choice("keys remove", "KEY2")).startswith("Removed.")
    assert user.keys() == [("game", "key1"), ("game", "key3")]


@pytest.mark.parametrize(
    ("typed", "labels"),
    [
        pytest.param("", ["Main", "main two", "Größe", "other"], id="nothing"),
        pytest.param("MAIN", ["Main", "main two"], id="case"),
        pytest.param("GRÖSSE", ["Größe"], id="case beyond ASCII"),
        pytest.param("steam", ["other"], id="service"),
        pytest.param("…0003", ["Größe"], id="end of the key"),
        pytest.param("zzz", [], id="nobody's"),
        pytest.param("%' OR 1=1 --", [], id="SQL"),
        pytest.param("*", [], id="wildcard"),
        pytest.param("x" * 6000, [], id="long"),
        pytest.param("@everyone `\n\u202e", [], id="hostile"),
    ],
)
@pytest.mark.parametrize("guild", [False, True], ids=["DM", "guild"])
def test_completion_of_keys(user: CommandUser, scene: Scene, typed: str, labels: list[str], guild: bool) -> None:
    fill(scene.person(), 1, label="main: of somebody else")
    app, owner = scene.stack.app, scene.stack.app.discord_users.obtain(user.person.user.id)
    kept = [("game", "Main"), ("game", "main two"), ("game", "Größe"), ("steam", "other")]
    for number, (service, label) in enumerate(kept, 1):
        app.api_keys.add(owner, service, label, f"completed-value-{number:04}", actor="test")
    found = user.choices("keys remove", typed, guild=guild)
    assert [name.rpartition(" (")[0] for name in found] == labels


def test_completion_shows_25(user: CommandUser) -> None:
    fill(user.person, 15, "one")
    fill(user.person, 15, "two")
    assert len(user.choices("keys remove")) == 25
    assert len(user.choices("keys remove", "two")) == 15


GARBAGE = {
    "words": "main account",
    "zero": "0",
    "negative": "-1",
    "signed": "+1",
    "decimal": "1.0",
    "blanks": " 1 ",
    "underscore": "1_0",
    "hexadecimal": "0x1",
    "no such id": "999999999",
    "largest id": str(2**63 - 1),
    "beyond 64 bits": str(2**63),
    "huge": "9" * 5000,
    "full width": "\N{FULLWIDTH DIGIT ONE}",
    "other digits": "\N{ARABIC-INDIC DIGIT ONE}",
    "superscript": "¹",
    "hostile": "@everyone `'; DROP TABLE api_keys --",
}


@pytest.mark.parametrize("typed", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize(
    ("command", "sentence"),
    [("keys remove", _NO_KEY), ("sharing revoke", _NO_GRANT), ("sharing block", _NO_APPLICATION)],
)
def test_what_is_no_choice(user: CommandUser, command: str, sentence: str, typed: str) -> None:
    """Discord lets users send what they typed, whatever the choices are."""
    fill(user.person, 1)
    assert user.choose(command, typed) == sentence
    assert len(user.keys()) == 1


def test_somebody_elses_key(user: CommandUser, scene: Scene) -> None:
    fill(user.person, 1)
    other = CommandUser(scene.person())
    [key] = fill(other.person, 1)
    assert user.command("keys remove", key=str(key.id)) == _NO_KEY
    assert other.keys() == [("game", "key1")]


def test_removed_twice(user: CommandUser) -> None:
    [key] = fill(user.person, 1)
    given = [user.person.user.slash("keys remove", key=str(key.id)) for _ in range(2)]
    assert sorted(user.said(each)[:8] for each in given) == ["Removed.", _NO_KEY[:8]]


# /sharing


def test_nothing_is_shared(user: CommandUser) -> None:
    assert user.command("sharing list") == "You share no keys with anybody."
    assert user.choices("sharing revoke") == []
    assert user.choices("sharing block") == []


@pytest.mark.parametrize("guild", [False, True], ids=["DM", "guild"])
def test_sharing(user: CommandUser, scene: Scene, guild: bool) -> None:
    fill(user.person, 2)
    user.share()
    user.person.outcome()
    shown = user.command("sharing list", guild=guild)
    assert shown.startswith("- `My super bot!` (not verified) at `127.0.0.1`: `key1`, `key2`, <t:")
    assert user.choices("sharing revoke", guild=guild) == ["My super bot! at 127.0.0.1: key1, key2"]
    assert user.choices("sharing revoke", "SUPER", guild=guild) != []
    assert user.choices("sharing revoke", "nobody's", guild=guild) == []
    other = CommandUser(scene.person())
    grant = user.choice("sharing revoke")
    assert other.choices("sharing revoke", guild=guild) == []
    assert other.command("sharing revoke", guild=guild, grant=grant) == _NO_GRANT
    assert user.command("sharing revoke", guild=guild, grant=grant).startswith("Revoked.")
    assert user.command("sharing revoke", guild=guild, grant=grant) == _NO_GRANT
    assert user.command("sharing list", guild=guild) == "You share no keys with anybody."


def test_a_removed_key_is_shared_no_more(user: CommandUser) -> None:
    fill(user.person, 1)
    user.share()
    user.person.outcome()
    user.command("keys remove", key=user.choice("keys remove"))
    assert ": keys that you removed since, <t:" in user.command("sharing list")


def test_more_grants_than_choices(user: CommandUser) -> None:
    fill(user.person, 1)
    for number in range(26):
        user.person.ask(name=f"Application {number:02}", callback=f"{user.person.callback}/{number}")
    for number in range(26):
        user.person.user.click(user.person.prompt(f"Application {number:02}"), "Share all")
    for number in range(26):
        user.person.scene.receiver.await_callbacks(f"{user.person.path}/{number}")
    assert len(user.command("sharing list").splitlines()) == 26
    for command in ("sharing revoke", "sharing block"):
        assert len(user.choices(command)) == 25
        assert len(user.choices(command, "application 0")) == 10


def test_what_was_revoked_is_not_delivered(user: CommandUser, scene: Scene) -> None:
    """Not even to a receiver that has seen it once: what comes later goes without it."""
    fill(user.person, 1)
    scene.receiver.fault(user.person.path, status=503, times=1)
    user.share()
    user.person.outcome()
    assert user.command("sharing revoke", grant=user.choice("sharing revoke")).startswith("Revoked.")
    deliveries = scene.stack.app.deliveries

    def status() -> str:
        [status] = [each.status for each in deliveries.latest() if each.request.discord_user == user.person.user.id]
        return str(status)

    await_condition(lambda: status() != DeliveryStatus.QUEUED, "the end of the delivery")
    assert status() == DeliveryStatus.ABANDONED
    assert [callback.status for callback in scene.receiver.callbacks(user.person.path)] == [503]


def test_a_blocked_application_asks_no_more(user: CommandUser, scene: Scene) -> None:
    fill(user.person, 1)
    blocked, other = f"{user.person.callback}/blocked", f"{user.person.callback}/other"
    user.cancel("Nuisance", blocked)
    user.cancel("Friend", other)
    scene.receiver.await_callbacks(f"{user.person.path}/blocked")
    scene.receiver.await_callbacks(f"{user.person.path}/other")
    assert user.choices("sharing block") == ["Friend at 127.0.0.1", "Nuisance at 127.0.0.1"]
    assert user.choices("sharing block", "friend") == ["Friend at 127.0.0.1"]
    application = user.choice("sharing block", "nuis")
    said = messages.BLOCKED
    assert [user.command("sharing block", application=application) for _ in range(2)] == [said, said]
    user.person.ask("again", "Nuisance", blocked)
    user.person.ask("again", "Friend", other)
    first = next(message for message in user.person.user.messages() if "Friend" in message.text)
    assert user.person.prompt("Friend", after=first).enabled
    # The poller takes the oldest first, and waits for nothing in between.
    assert sum("Nuisance" in message.text for message in user.person.user.messages()) == 1
    # To others it may go on.
    somebody = scene.person()
    somebody.ask(name="Nuisance", callback=blocked)
    somebody.prompt("Nuisance")


def test_somebody_elses_request_blocks_nobody(user: CommandUser, scene: Scene) -> None:
    other = CommandUser(scene.person())
    other.cancel("Nuisance", other.person.callback)
    other.person.outcome()
    application = other.choice("sharing block")
    assert user.choices("sharing block") == []
    assert user.command("sharing block", application=application) == _NO_APPLICATION


# The server is away


@pytest.fixture
def server_down(places: tuple[Scene, BotServer], user: CommandUser) -> Iterator[None]:
    """The server that the bot talks to is not there during a test."""
    _, server = places
    server.stop()
    yield
    server.start()
    await_condition(lambda: user.command("keys list") != _AWAY, "a bot that has found the server again")


@pytest.mark.usefixtures("server_down")
@pytest.mark.parametrize("guild", [False, True], ids=["DM", "guild"])
def test_commands_without_a_server(user: CommandUser, guild: bool) -> None:
    """Each has an answer, and it is soon there."""
    commands: dict[str, Callable[[], str]] = {
        "keys add": lambda: user.add("game", "main", "added-in-vain", guild=guild),
        "keys list": lambda: user.command("keys list", guild=guild),
        "keys remove": lambda: user.command("keys remove", key="1", guild=guild),
        "sharing list": lambda: user.command("sharing list", guild=guild),
        "sharing revoke": lambda: user.command("sharing revoke", grant="1", guild=guild),
        "sharing block": lambda: user.command("sharing block", application="1", guild=guild),
    }
    assert {name: ask() for name, ask in commands.items()} == dict.fromkeys(commands, _AWAY)


@pytest.mark.usefixtures("server_down")
def test_completion_without_a_server(user: CommandUser) -> None:
    assert {command: user.choices(command) for command in _COMPLETED} == {command: [] for command in _COMPLETED}
