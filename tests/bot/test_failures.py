"""What the bot does when Discord, the server or the user fails: it goes on, or it ends with one clear sentence."""

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from doorward_server.models import ConsentRequest
from tests.bot.conftest import Person, Scene, make_scene
from tests.processes import Process, await_condition, free_port
from tests.sandbox.discord.client import Discord, Message, User
from tests.sandbox.discord.state import NAME
from tests.sandbox.serving import started

_CHANNELS = "POST /users/@me/channels"
_MESSAGES = "POST /channels/{channel_id}/messages"
_BLOCKED = "user blocked verification dm"
_DEBUG = {"DOORWARD_LOG_LEVEL": "debug"}
# How soon a bot that is told to stop, or that cannot go on, has to be gone.
_SOON = 5.0


@dataclass
class Running:
    """A scene and its bot."""

    scene: Scene
    process: Process

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """What happens meanwhile, the bot notices afterwards, all at once."""
        self.process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def with_bot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A scene whose bot has to outlive everything that happens to it."""
    with make_scene(tmp_path_factory.mktemp("bot")) as made, made.bot(**_DEBUG) as process:
        made.discord.await_commands("keys", "sharing")
        yield Running(made, process)
        assert made.discord.problems() == []
        process.signal(0)
    assert_nothing_leaked(made)


@pytest.fixture(scope="module")
def without_bot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scene for tests that start bots of their own."""
    with make_scene(tmp_path_factory.mktemp("bots")) as made:
        yield made
    assert_nothing_leaked(made)


@pytest.fixture
def scene(with_bot: Running) -> Scene:
    return with_bot.scene


@pytest.fixture(autouse=True)
def nothing_planned(request: pytest.FixtureRequest) -> Iterator[None]:
    """No fault outlives its test."""
    yield
    for name in {"with_bot", "without_bot"} & set(request.fixturenames):
        place = request.getfixturevalue(name)
        discord = place.discord if isinstance(place, Scene) else place.scene.discord
        discord.heal()
        discord.restore_token()


def assert_nothing_leaked(scene: Scene) -> None:
    logs = {path.name: path.read_text() for path in scene.logs.glob("*.log") if path.name.startswith(("bot", "server"))}
    secrets = scene.stack.secrets | {scene.discord.token}
    assert {name for name, text in logs.items() if any(secret in text for secret in secrets)} == set()
    assert {name for name, text in logs.items() if "Traceback" in text} == set()


def prompts(person: Person, name: str = "My super bot!") -> list[Message]:
    """Every prompt that a person was ever sent, as it looks now."""
    return [message for message in person.user.messages() if message.by_bot and name in json.dumps(message.embeds)]


def share(person: Person) -> None:
    """Ask for a person's keys, and let them click: the whole way still works."""
    person.keep(value := f"{person.user.name}-value-1234")
    person.ask()
    person.user.click(person.prompt(), "Share all")
    assert person.outcome().keys == [value]


def last_request(person: Person) -> ConsentRequest:
    consents = person.scene.stack.app.consents
    [request] = consents.latest(person.user.id, 1)
    return request


def let_the_lease_end(person: Person) -> None:
    """As if the minute were over after which a prompt that could not be sent is given out again."""
    app, request = person.scene.stack.app, last_request(person)
    bot_log = person.scene.logs / "bot.log"
    gave_up = re.compile(rf'"request_id": {request.id}\b.*"prompt failed"')
    await_condition(lambda: gave_up.search(bot_log.read_text()) is not None, "a prompt that could not be sent")
    with app.database.writing():
        ConsentRequest.update(lease_expires_at=app.clock.now() - timedelta(seconds=1)).where(
            ConsentRequest.id == request.id
        ).execute()


# Users who cannot be asked


@pytest.mark.parametrize("code", [50007, 50278], ids=["50007 no DMs", "50278 no mutual servers"])
def test_a_user_who_refuses(person: Person, code: int) -> None:
    person.user.refuse(code)
    person.keep(f"{code}-refused-value")
    person.ask("a state")
    outcome = person.outcome()
    assert (outcome.field("error"), outcome.field("state"), outcome.keys) == (_BLOCKED, "a state", [])
    assert last_request(person).status == "blocked"
    assert prompts(person) == []
    # That was for this time.
    person.user.refuse(None)
    person.ask("another")
    person.user.click(person.prompt(), "Cancel")
    assert person.outcome(2).field("error") == "user canceled"


@pytest.mark.parametrize("user_id", ["81384788765712999", "1", str(2**64 - 1)], ids=["nobody's", "1", "largest"])
def test_a_user_who_is_not_there(scene: Scene, user_id: str) -> None:
    nobody = Person(scene, User(scene.discord, "nobody", user_id), f"/cb/nobody/{user_id}")
    nobody.ask()
    assert nobody.outcome().field("error") == _BLOCKED
    assert last_request(nobody).status == "blocked"


@pytest.mark.parametrize("route", [_CHANNELS, _MESSAGES], ids=["channel", "message"])
@pytest.mark.parametrize("code", [10013, 50033, 50007, 50278])
def test_discord_says_that_a_user_cannot_be_asked(person: Person, route: str, code: int) -> None:
    person.scene.discord.fault("status", route, status=404 if code == 10013 else 403, code=code, times=1)
    person.ask()
    assert person.outcome().field("error") == _BLOCKED
    assert prompts(person) == []


# Discord fails

RETRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "channel: 500": (_CHANNELS, {"kind": "status", "status": 500}),
    "channel: 429 of all routes": (_CHANNELS, {"kind": "rate_limit", "seconds": 0.3, "scope": "global"}),
    "message: 502": (_MESSAGES, {"kind": "status", "status": 502}),
    "message: 500, but it was sent": (_MESSAGES, {"kind": "status", "status": 500, "phase": "after"}),
    "message: reset, but it was sent": (_MESSAGES, {"kind": "reset", "phase": "after"}),
    "message: 429": (_MESSAGES, {"kind": "rate_limit", "seconds": 0.3}),
    "message: 429 of all routes": (_MESSAGES, {"kind": "rate_limit", "seconds": 0.3, "scope": "global"}),
    "message: slow": (_MESSAGES, {"kind": "delay", "seconds": 0.5}),
}
GIVEN_UP: dict[str, tuple[str, dict[str, Any]]] = {
    "channel: 403": (_CHANNELS, {"kind": "status", "status": 403}),
    "channel: 40003 too fast": (_CHANNELS, {"kind": "status", "status": 400, "code": 40003}),
    "channel: 503": (_CHANNELS, {"kind": "status", "status": 503}),
    "message: 403 no access": (_MESSAGES, {"kind": "status", "status": 403, "code": 50001}),
    "message: 403": (_MESSAGES, {"kind": "status", "status": 403}),
    "message: 404 unknown channel": (_MESSAGES, {"kind": "status", "status": 404, "code": 10003}),
    "message: 40003 too fast": (_MESSAGES, {"kind": "status", "status": 400, "code": 40003}),
    "message: 503, but it was sent": (_MESSAGES, {"kind": "status", "status": 503, "phase": "after"}),
}


@pytest.mark.parametrize(("route", "fault"), RETRIED.values(), ids=RETRIED)
def test_a_prompt_is_tried_again(person: Person, route: str, fault: Mapping[str, Any]) -> None:
    person.keep(f"{person.user.name}-value")
    person.scene.discord.fault(route=route, times=1, **fault)
    person.ask()
    person.user.click(person.prompt(), "Share all")
    assert person.outcome().keys == [f"{person.user.name}-value"]
    assert len(prompts(person)) == 1


@pytest.mark.parametrize(("route", "fault"), GIVEN_UP.values(), ids=GIVEN_UP)
def test_a_prompt_is_tried_again_under_another_lease(person: Person, route: str, fault: Mapping[str, Any]) -> None:
    person.keep(f"{person.user.name}-value")
    person.scene.discord.fault(route=route, times=1, **fault)
    person.ask()
    let_the_lease_end(person)
    await_condition(lambda: last_request(person).status == "prompted", "a prompt")
    assert len(prompts(person)) == 1
    person.user.click(person.prompt(), "Share all")
    assert person.outcome().keys == [f"{person.user.name}-value"]
    assert last_request(person).lease_epoch == 2


def test_the_failure_of_one_is_nobody_elses(person: Person, scene: Scene) -> None:
    person.scene.discord.fault("delay", _MESSAGES, times=1, seconds=1.0)
    person.ask()
    person.scene.discord.await_request(*_MESSAGES.split(), answered=False)
    share(scene.person())
    person.prompt()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"kind": "status", "status": 500}, id="500"),
        pytest.param({"kind": "rate_limit", "seconds": 0.3}, id="429"),
    ],
)
def test_the_outcome_is_shown_at_last(person: Person, fault: Mapping[str, Any]) -> None:
    person.keep(f"{person.user.name}-value")
    person.ask()
    prompt = person.prompt()
    person.scene.discord.fault(route="PATCH /channels/{channel_id}/messages/{message_id}", times=1, **fault)
    person.user.click(prompt, "Share all")
    assert person.outcome().keys == [f"{person.user.name}-value"]
    assert not person.user.await_change(prompt, lambda message: not message.enabled).enabled


# The gateway fails


def _close(code: int) -> Callable[[Discord], None]:
    return lambda discord: discord.close_connections(code)


GATEWAY: dict[str, Callable[[Discord], None]] = {
    "dropped": lambda discord: discord.drop_connections(),
    "op 7": lambda discord: discord.ask_to_reconnect(),
    "op 9, resumable": lambda discord: discord.invalidate_sessions(resumable=True),
    "op 9": lambda discord: discord.invalidate_sessions(resumable=False),
    "closed: 1000": _close(1000),
    "closed: 4000 unknown error": _close(4000),
}


@pytest.mark.parametrize("failure", GATEWAY.values(), ids=GATEWAY)
def test_nothing_is_lost_with_a_connection(
    with_bot: Running, person: Person, failure: Callable[[Discord], None]
) -> None:
    discord, clicker = with_bot.scene.discord, with_bot.scene.person()
    for one in (person, clicker):
        one.keep(f"{one.user.name}-value")
        one.ask()
        one.prompt()
    before = {(session.id, session.resumes) for session in discord.sessions()}
    with with_bot.frozen():
        failure(discord)
        person.user.say("1")
    assert person.outcome().keys == [f"{person.user.name}-value"]
    discord.until(
        discord.sessions,
        lambda found: any(each.connected and (each.id, each.resumes) not in before for each in found),
        "another connection",
    )
    clicker.user.click(clicker.prompt(), "Share all")
    assert clicker.outcome().keys == [f"{clicker.user.name}-value"]
    assert [len(prompts(one)) for one in (person, clicker)] == [1, 1]
    # The reply was taken once, and told of once.
    person.user.await_message(lambda message: message.reply_to is not None)
    assert sum(message.reply_to is not None for message in person.user.messages()) == 1


@pytest.mark.soak
def test_heartbeats_are_not_acknowledged(tmp_path: Path, soaking: bool) -> None:
    """A connection that stays silent for a minute is given up."""
    if not soaking:
        pytest.skip("takes more than a minute")
    with make_scene(tmp_path) as scene:
        scene.discord.configure(heartbeat_interval=2000)
        with scene.bot():
            person = scene.person()
            person.keep(f"{person.user.name}-value")
            person.ask()
            prompt = person.prompt()
            scene.discord.configure(acknowledge_heartbeats=False)
            scene.discord.until(
                scene.discord.sessions, lambda found: any(each.resumes for each in found), "a RESUME", patience=150
            )
            scene.discord.configure(acknowledge_heartbeats=True)
            scene.discord.await_connected()
            person.user.say("1", reply_to=prompt)
            assert person.outcome().keys == [f"{person.user.name}-value"]
            share(scene.person())
            assert scene.discord.problems() == []


# Tokens


def assert_ended(process: Process, *parts: str) -> None:
    """With exit code 1 and one line for people on stderr, that names what to mend; the others are the log's."""
    assert process.wait(_SOON) == 1
    spoken = [line for line in process.output().splitlines() if not line.startswith("{")]
    assert len(spoken) == 1, process.output()
    assert spoken[0].startswith("doorward-bot: ")
    assert [part for part in parts if part not in spoken[0]] == [], spoken[0]


def assert_discord_token_refused(process: Process) -> None:
    assert_ended(process, "DISCORD_TOKEN", "developer portal")


def test_the_discord_token_is_wrong(without_bot: Scene) -> None:
    wrong = "MTU3NzMwNTkwNDkyMTk2ODY0.not.the-token"
    with without_bot.starting_bot("bot-wrong", DISCORD_TOKEN=wrong, **_DEBUG) as process:
        assert_discord_token_refused(process)
        assert wrong not in process.output()


def test_the_discord_token_is_refused_at_log_in(without_bot: Scene) -> None:
    """By one request after it was taken by another."""
    without_bot.discord.forget_requests()
    without_bot.discord.fault("delay", "GET /gateway/bot", seconds=0.5, times=1)
    with without_bot.starting_bot("bot-revoked", **_DEBUG) as process:
        without_bot.discord.await_request("GET", "/gateway/bot", answered=False)
        without_bot.discord.revoke_token()
        assert_discord_token_refused(process)


def test_the_discord_token_is_revoked(without_bot: Scene) -> None:
    with without_bot.bot("bot-revoked", **_DEBUG) as process:
        without_bot.discord.revoke_token()
        assert_discord_token_refused(process)


def test_the_discord_token_is_revoked_during_a_prompt(without_bot: Scene) -> None:
    """The request is not lost: another bot asks later."""
    person = without_bot.person()
    with without_bot.bot("bot-revoked", **_DEBUG) as process:
        without_bot.discord.forget_requests()
        without_bot.discord.fault("delay", _MESSAGES, seconds=0.5, times=1)
        person.ask()
        without_bot.discord.await_request(*_MESSAGES.split(), answered=False)
        without_bot.discord.revoke_token()
        assert_discord_token_refused(process)
    assert last_request(person).status == "pending"


@pytest.mark.parametrize("roles", [(), ("operator", "identity")], ids=["no role", "others"])
def test_the_bots_token_is_of_another_role(without_bot: Scene, roles: tuple[str, ...]) -> None:
    token = without_bot.stack.service_token(*roles)
    with without_bot.starting_bot("bot-role", DOORWARD_BOT_TOKEN=token, **_DEBUG) as process:
        assert_ended(process, "DOORWARD_BOT_TOKEN", "`doorward token create --role bot`")


def test_the_bots_token_is_unknown(without_bot: Scene) -> None:
    token = "doorward_st_unknown.0123456789abcdefghijklmnop"
    with without_bot.starting_bot("bot-unknown", DOORWARD_BOT_TOKEN=token, **_DEBUG) as process:
        assert_ended(process, "DOORWARD_BOT_TOKEN", "`doorward token create --role bot`")
        assert token not in process.output()


def test_the_bots_token_is_revoked(without_bot: Scene) -> None:
    """Noticed at the next call, which a request of somebody's brings about."""
    service_tokens = without_bot.stack.app.service_tokens
    row, token = service_tokens.create(("bot",))
    without_bot.stack.secrets.add(token)
    person = without_bot.person()
    with without_bot.bot("bot-revoked", DOORWARD_BOT_TOKEN=token, **_DEBUG) as process:
        without_bot.discord.await_commands("keys")
        service_tokens.revoke(row.id)
        said = person.user.answer(person.user.slash("keys list"))
        assert said.text == "Doorward cannot be reached right now. Please try again in a minute."
        assert said.ephemeral
        assert person.user.outcome(person.user.autocomplete("keys remove", "key", "")).choices == []
        person.ask()
        assert_ended(process, "DOORWARD_BOT_TOKEN", "`doorward token create --role bot`")


# What is away, at the start and later


@dataclass
class Health:
    """What GET /healthz tells."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {"DOORWARD_BOT_HEALTH_PORT": str(self.port)}

    def now(self) -> tuple[int, dict[str, bool]] | None:
        """None: nobody is there."""
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.port}/healthz", trust_env=False, verify=False, timeout=10)
        except httpx.TransportError:
            return None
        return answer.status_code, answer.json()

    def await_state(self, *, discord: bool, server: bool) -> None:
        wanted = (200 if discord and server else 503, {"discord": discord, "server": server})
        await_condition(lambda: self.now() == wanted, f"{wanted} from the bot")


@pytest.fixture
def health() -> Health:
    return Health(free_port())


@contextlib.contextmanager
def discord_at(port: int, log: Path) -> Iterator[Discord]:
    """A stand-in at a port that is known before."""
    arguments = (NAME, "tests.sandbox.discord", log, "--port", str(port))
    with started(*arguments) as url, contextlib.closing(Discord(url)) as discord:
        yield discord


def test_discord_is_not_there_yet_and_then_goes_away(without_bot: Scene, health: Health) -> None:
    port, log = free_port(), without_bot.logs / "discord-late.log"
    place = replace(without_bot, discord=Discord(f"http://127.0.0.1:{port}"))
    with contextlib.closing(place.discord), place.starting_bot("bot-discord", **_DEBUG, **health.environment) as bot:
        bot.await_output('"Discord away"')
        health.await_state(discord=False, server=False)
        with discord_at(port, log):
            health.await_state(discord=True, server=True)
            share(place.person())
        health.await_state(discord=False, server=True)
        with discord_at(port, log):
            health.await_state(discord=True, server=True)
            share(place.person())
            assert place.discord.problems() == []
            assert bot.stop() == 0


@pytest.mark.parametrize(
    ("route", "fault"),
    [
        pytest.param("GET /users/@me", {"kind": "status", "status": 502}, id="user: 502"),
        pytest.param("GET /users/@me", {"kind": "status", "status": 503}, id="user: 503"),
        pytest.param("GET /gateway/bot", {"kind": "status", "status": 503}, id="gateway: 503"),
        pytest.param("GET /gateway/bot", {"kind": "reset"}, id="gateway: reset"),
    ],
)
def test_discord_fails_at_log_in(without_bot: Scene, route: str, fault: Mapping[str, Any]) -> None:
    without_bot.discord.fault(route=route, times=1, **fault)
    with without_bot.bot("bot-log-in", **_DEBUG) as bot:
        without_bot.discord.await_commands("keys", "sharing")
        share(without_bot.person())
        assert bot.stop() == 0


def test_the_server_is_not_there_yet_and_then_goes_away(without_bot: Scene, health: Health) -> None:
    port = free_port()
    person = without_bot.person()
    person.keep(f"{person.user.name}-value")
    environment = {"DOORWARD_BOT_SERVER": f"127.0.0.1:{port}", **health.environment, **_DEBUG}
    with without_bot.bot("bot-server", **environment):
        health.await_state(discord=True, server=False)
        person.ask()
        with without_bot.stack.server(port) as server:
            prompt = person.prompt()
            health.await_state(discord=True, server=True)
            server.kill()
        health.await_state(discord=True, server=False)
        person.user.click(prompt, "Share all")
        with without_bot.stack.server(port):
            assert person.outcome().keys == [f"{person.user.name}-value"]
            person.user.await_change(prompt, lambda message: not message.enabled)
            health.await_state(discord=True, server=True)
            assert len(prompts(person)) == 1


def test_a_server_that_hangs_is_noticed(without_bot: Scene, health: Health) -> None:
    port = free_port()
    person = without_bot.person()
    person.keep(f"{person.user.name}-value")
    environment = {"DOORWARD_BOT_SERVER": f"127.0.0.1:{port}", **health.environment, **_DEBUG}
    with without_bot.stack.server(port) as server, without_bot.bot("bot-hang", **environment):
        health.await_state(discord=True, server=True)
        without_bot.discord.await_commands("keys")
        person.ask()
        prompt = person.prompt()
        server.signal(signal.SIGSTOP)
        try:
            completed = person.user.outcome(person.user.autocomplete("keys remove", "key", ""))
            person.user.click(prompt, "Share all")
            health.await_state(discord=True, server=False)
        finally:
            server.signal(signal.SIGCONT)
        assert (completed.state, completed.choices) == ("acknowledged", [])
        assert person.outcome().keys == [f"{person.user.name}-value"]
        health.await_state(discord=True, server=True)
        share(without_bot.person())


def test_the_port_for_health_is_taken(without_bot: Scene, health: Health) -> None:
    with (
        without_bot.bot("bot-first", **health.environment),
        without_bot.starting_bot("bot-second", **health.environment) as second,
    ):
        assert_ended(second, "DOORWARD_BOT_HEALTH_PORT", str(health.port))


# The end


@pytest.mark.parametrize(
    ("number", "awaited"),
    [
        pytest.param(signal.SIGTERM, '"connected to Discord"', id="SIGTERM, connected"),
        pytest.param(signal.SIGINT, '"connected to Discord"', id="SIGINT, connected"),
        pytest.param(signal.SIGTERM, '"Discord away"', id="SIGTERM, Discord away"),
        pytest.param(signal.SIGINT, '"server away"', id="SIGINT, server away"),
    ],
)
def test_a_signal_ends_the_bot(without_bot: Scene, number: signal.Signals, awaited: str) -> None:
    away: dict[str, dict[str, str]] = {
        '"Discord away"': {"DISCORD_API_BASE": f"http://127.0.0.1:{free_port()}/api/v10"},
        '"server away"': {"DOORWARD_BOT_SERVER": f"127.0.0.1:{free_port()}"},
    }
    with without_bot.starting_bot("bot-signal", **away.get(awaited, {}), **_DEBUG) as process:
        process.await_output(awaited)
        process.signal(number)
        assert process.wait(_SOON) == 0
        assert [line for line in process.output().splitlines() if not line.startswith("{")] == []
        assert '"stopped"' in process.output().splitlines()[-1]


def test_a_bot_that_has_stopped_takes_no_request_with_it(without_bot: Scene) -> None:
    """The server would give it out for a minute to somebody who does not listen any more."""
    person = without_bot.person()
    with without_bot.bot("bot-first", **_DEBUG) as first:
        share(without_bot.person())
        first.kill()
        person.ask()
        with without_bot.bot("bot-second", **_DEBUG):
            person.prompt()


def test_a_signal_ends_the_bot_amid_a_prompt(without_bot: Scene) -> None:
    """What it was about to ask, another asks later."""
    person = without_bot.person()
    with without_bot.bot("bot-signal", **_DEBUG) as process:
        without_bot.discord.forget_requests()
        without_bot.discord.fault("hang", _MESSAGES, times=1)
        person.ask()
        without_bot.discord.await_request(*_MESSAGES.split(), answered=False)
        process.signal(signal.SIGTERM)
        assert process.wait(_SOON) == 0
        assert [line for line in process.output().splitlines() if not line.startswith("{")] == []
    assert last_request(person).status == "pending"
