"""The stand-in for Discord as bots meet it: a real bot on disnake in its own process, and raw requests and frames."""

import asyncio
import json
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.processes import BIN, Process, running
from tests.sandbox.discord.client import (
    APPLICATION_ID,
    GUILD_ID,
    CannotDo,
    Discord,
    Interaction,
    Message,
    User,
    discord_stand_in,
)

Json = dict[str, Any]
MESSAGES = "/channels/{channel_id}/messages"
POST_MESSAGE = f"POST {MESSAGES}"
DIRECT_MESSAGES = 1 << 12


# With a real bot


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("discord")


@pytest.fixture(scope="module")
def inhabited(directory: Path) -> Iterator[Discord]:
    """A stand-in with a bot."""
    with discord_stand_in(directory / "inhabited.log") as discord, example_bot(discord, directory / "bot.log"):
        discord.await_connected()
        discord.await_commands("keys")
        yield discord


def example_bot(discord: Discord, log: Path) -> AbstractContextManager[Process]:
    command: list[str | Path] = [BIN / "python", "-m", "tests.sandbox.discord.example_bot"]
    return running(command, log, {"DISCORD_API_BASE": discord.api_base})


@pytest.fixture
def discord(inhabited: Discord) -> Iterator[Discord]:
    """The stand-in with a bot, which makes no mistakes."""
    inhabited.reset()
    inhabited.await_connected()
    yield inhabited
    assert inhabited.problems() == []


@pytest.fixture
def ada(discord: Discord) -> User:
    return discord.user("ada")


@pytest.fixture
def menu(ada: User) -> Message:
    """The example bot's message with a menu and buttons."""
    ada.say("menu")
    return ada.await_message("Share your keys?")


def test_a_message_is_shown_as_the_bot_sent_it(menu: Message) -> None:
    assert menu.text.splitlines() == [
        "Hello @everyone",
        "Share your keys?",
        "With **Example**",
        "To",
        "example.org",
        "Until",
        "10 minutes",
        "Soon",
    ]
    assert menu.menu.options == {"1": "First key", "2": "Second key"}
    assert menu.menu.descriptions == {"1": "ends in 1111", "2": "ends in 2222"}
    assert [button.label for button in menu.buttons if not button.disabled] == ["Share", "Later", "Change later", "Ask"]
    assert (menu.pings, menu.edited, menu.ephemeral, menu.enabled) == ([], False, False, True)


def test_a_choice_changes_the_message_and_is_followed_up(ada: User, menu: Message) -> None:
    outcome = ada.outcome(ada.select(menu, "2", "First key"))
    assert outcome.response_type == 7
    assert outcome.acknowledged_after is not None
    assert outcome.acknowledged_after < 3
    changed = ada.await_change(menu)
    assert (changed.content, changed.edited, changed.enabled) == ("Chosen: 2, 1", True, False)
    assert [before["content"] for before in changed.history] == ["Hello @everyone"]
    noted = ada.await_message("That is noted.")
    assert (noted.ephemeral, noted.reply_to) == (True, menu.id)


@pytest.mark.parametrize(
    ("button", "text", "kind", "ephemeral"),
    [
        pytest.param("Share", "Shared.", 4, False, id="message"),
        pytest.param("later", "Here it is.", 5, True, id="deferred-message"),
        pytest.param("Change later", "Changed.", 6, False, id="deferred-change"),
    ],
)
def test_a_click_is_answered(ada: User, menu: Message, button: str, text: str, kind: int, ephemeral: bool) -> None:
    clicked = ada.click(menu, button)
    answer = ada.answer(clicked)
    assert (answer.content, answer.ephemeral, answer.loading) == (text, ephemeral, False)
    outcome = ada.outcome(clicked)
    assert (outcome.response_type, outcome.deferred) == (kind, kind in (5, 6))
    assert (answer.id == menu.id) == (kind == 6)


def test_a_modal_is_filled_in_once(ada: User, menu: Message) -> None:
    asked = ada.outcome(ada.click(menu, "Ask"))
    assert asked.modal is not None
    assert asked.modal["title"] == "A key"
    for wrong in ("ab", "x" * 11, ""):
        with pytest.raises(CannotDo, match="takes 3 to 10"):
            ada.submit(asked, {"Key": wrong})
    with pytest.raises(CannotDo, match="no fields"):
        ada.submit(asked, {"Name": "abc"})
    got = ada.answer(ada.submit(asked, {"Key": "abc"}))
    assert (got.content, got.ephemeral) == ("Got abc", True)
    with pytest.raises(CannotDo, match="sent already"):
        ada.submit(asked, key="abc")


@pytest.mark.parametrize(
    ("guild", "where"), [pytest.param(False, "a DM", id="dm"), pytest.param(True, f"guild {GUILD_ID}", id="guild")]
)
def test_a_command_is_answered(ada: User, guild: bool, where: str) -> None:
    answer = ada.answer(ada.slash("keys add", guild=guild, service="gw2", default=True))
    assert (answer.content, answer.ephemeral) == (f"ada adds gw2 in {where}", True)
    assert answer.id in [message.id for message in ada.messages(guild=guild)]
    assert answer.id not in [message.id for message in ada.discord.user("grace").messages(guild=guild)]


def test_an_option_is_completed(ada: User) -> None:
    typed = ada.outcome(ada.autocomplete("keys add", "service", "GW", default=True))
    assert typed.choices == [{"name": "gw2", "value": "gw2"}, {"name": "gw2-eu", "value": "gw2-eu"}]


def test_a_typed_reply_reaches_the_bot_and_its_answer_replies(ada: User, menu: Message) -> None:
    said = ada.say("1, 2", reply_to=menu)
    answer = ada.await_message("You said: 1, 2")
    assert (said.reply_to, answer.reply_to, answer.pings) == (menu.id, said.id, [])


def _drop(discord: Discord) -> None:
    discord.drop_connections()


def _invalidate_for_now(discord: Discord) -> None:
    discord.invalidate_sessions(resumable=True)


def _close_for_now(discord: Discord) -> None:
    discord.close_connections(4000)


def _reconnect(discord: Discord) -> None:
    discord.ask_to_reconnect()


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(_drop, id="dropped"),
        pytest.param(_reconnect, id="op-7"),
        pytest.param(_invalidate_for_now, id="op-9-resumable"),
        pytest.param(_close_for_now, id="close-code"),
    ],
)
def test_a_session_is_resumed_with_what_was_missed(
    discord: Discord, ada: User, interrupt: Callable[[Discord], None]
) -> None:
    [before] = [session for session in discord.sessions() if session.connected]
    interrupt(discord)
    ada.say("meanwhile")
    ada.await_message("You said: meanwhile")
    [after] = discord.await_connected()
    assert (after.id, after.resumes) == (before.id, before.resumes + 1)


def test_an_invalid_session_is_begun_anew(discord: Discord, ada: User) -> None:
    [before] = discord.sessions()
    discord.invalidate_sessions(resumable=False)
    [after] = discord.until(
        discord.sessions, lambda found: [each.connected and each.id != before.id for each in found] == [True], "another"
    )
    assert after.resumes == 0
    ada.say("again")
    ada.await_message("You said: again")


@pytest.mark.parametrize("scope", ["user", "global", "shared"])
def test_a_bot_waits_out_a_limit(discord: Discord, ada: User, scope: str) -> None:
    discord.fault("rate_limit", POST_MESSAGE, times=1, seconds=0.01, scope=scope)
    ada.say("one")
    ada.await_message("You said: one")
    limited, sent = discord.await_request("POST", MESSAGES, count=2)
    assert (limited.status, limited.answer["retry_after"], limited.answer["global"]) == (429, 0.01, scope == "global")
    assert sent.status == 200
    assert len([message for message in ada.messages() if message.by_bot]) == 1


@pytest.mark.parametrize("code", [50007, 50278])
def test_a_user_refuses_dms(discord: Discord, ada: User, code: int) -> None:
    ada.refuse(code)
    ada.say("one")
    [refused] = discord.await_request("POST", MESSAGES)
    assert (refused.status, refused.answer["code"]) == (403, code)
    ada.refuse(None)
    ada.say("two")
    assert ada.await_message().content == "You said: two"


def test_a_bot_sends_again_what_had_no_answer(discord: Discord, ada: User) -> None:
    discord.fault("reset", POST_MESSAGE, times=1, phase="after")
    ada.say("one")
    lost, sent = discord.await_request("POST", MESSAGES, count=2)
    assert (lost.fault, lost.lost, lost.status) == ("reset after", True, None)
    assert (sent.body, sent.status) == (lost.body, 200)
    assert [message.content for message in ada.messages() if message.by_bot] == ["You said: one"] * 2


def test_a_revoked_token_ends_the_bot(directory: Path) -> None:
    log = directory / "revoked.log"
    with (
        discord_stand_in(directory / "revoking.log") as discord,
        example_bot(discord, log) as bot,
        _as_bot(discord) as rest,
    ):
        discord.await_connected()
        discord.revoke_token()
        assert bot.wait() == 1
        assert "4004" in bot.output()
        assert rest.get("/users/@me").status_code == 401
        discord.restore_token()
        assert rest.get("/users/@me").status_code == 200
        assert discord.problems() == []


# Without a bot: what it may send


@pytest.fixture(scope="module")
def deserted(directory: Path) -> Iterator[Discord]:
    """A stand-in without a bot."""
    with discord_stand_in(directory / "deserted.log") as discord:
        yield discord


@pytest.fixture
def alone(deserted: Discord) -> Discord:
    deserted.reset()
    return deserted


@pytest.fixture
def rest(alone: Discord) -> Iterator[httpx.Client]:
    """What the bot's requests go through."""
    with _as_bot(alone) as client:
        yield client


def _as_bot(discord: Discord) -> httpx.Client:
    headers = {"Authorization": f"Bot {discord.token}"}
    return httpx.Client(base_url=discord.api_base, headers=headers, trust_env=False)


@pytest.fixture
def channel(alone: Discord, rest: httpx.Client) -> str:
    """The path of the DM with ada."""
    opened = rest.post("/users/@me/channels", json={"recipient_id": int(alone.user("ada").id)}).raise_for_status()
    return f"/channels/{opened.json()['id']}"


def _button(**fields: Any) -> Json:
    return {"type": 2, "style": 1, "label": "Go", "custom_id": "go"} | fields


def _select(*values: str, **fields: Any) -> Json:
    options = [{"label": value, "value": value} for value in values or ("1", "2")]
    return {"type": 3, "custom_id": "menu", "options": options} | fields


def _rows(*rows: list[Json]) -> Json:
    return {"components": [{"type": 1, "components": row} for row in rows], "content": "x"}


def _embed(**fields: Any) -> Json:
    return {"embeds": [{"title": "x"} | fields]}


def _without(component: Json, name: str) -> Json:
    return {key: value for key, value in component.items() if key != name}


_FIELD = {"name": "n", "value": "v"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        pytest.param({"content": "x" * 2001}, "content", id="content-too-long"),
        pytest.param({"content": 5}, "content", id="content-no-string"),
        pytest.param([], "", id="no-object"),
        pytest.param({"content": "x", "color": 1}, "color", id="unknown-field"),
        pytest.param({"content": "x", "nonce": "n" * 26}, "nonce", id="nonce-too-long"),
        pytest.param({"content": "x", "flags": 1 << 6}, "flags", id="ephemeral-dm"),
        pytest.param({"content": "x", "message_reference": {"message_id": "1"}}, "message_reference", id="reference"),
        pytest.param(
            {"content": "x", "allowed_mentions": {"parse": ["users"], "users": ["1"]}},
            "allowed_mentions",
            id="mentions",
        ),
        pytest.param({"content": "x", "allowed_mentions": {"parse": ["all"]}}, "allowed_mentions.parse.0", id="parse"),
        pytest.param({"embeds": [{}]}, "embeds.0", id="embed-empty"),
        pytest.param({"embeds": [{"title": "x"}] * 11}, "embeds", id="embeds-too-many"),
        pytest.param(_embed(title="x" * 257), "embeds.0.title", id="embed-title"),
        pytest.param(_embed(description="x" * 4097), "embeds.0.description", id="embed-description"),
        pytest.param(_embed(color=1 << 24), "embeds.0.color", id="embed-color"),
        pytest.param(_embed(url="example.org"), "embeds.0.url", id="embed-url"),
        pytest.param(_embed(timestamp="now"), "embeds.0.timestamp", id="embed-timestamp"),
        pytest.param(_embed(fields=[_FIELD] * 26), "embeds.0.fields", id="embed-fields"),
        pytest.param(_embed(fields=[{"name": "n"}]), "embeds.0.fields.0.value", id="field-without-value"),
        pytest.param(_embed(fields=[_FIELD | {"value": " "}]), "embeds.0.fields.0.value", id="field-blank"),
        pytest.param(_embed(fields=[_FIELD | {"name": "x" * 257}]), "embeds.0.fields.0.name", id="field-name"),
        pytest.param(_embed(fields=[_FIELD | {"value": "x" * 1025}]), "embeds.0.fields.0.value", id="field-value"),
        pytest.param(_embed(footer={"text": "x" * 2049}), "embeds.0.footer.text", id="embed-footer"),
        pytest.param({"embeds": [{"description": "x" * 3001}] * 2}, "embeds", id="embeds-too-long"),
        pytest.param(_rows(*[[_button(custom_id=str(row))] for row in range(6)]), "components", id="rows"),
        pytest.param(_rows([]), "components.0.components", id="row-empty"),
        pytest.param(_rows([_button(custom_id=str(n)) for n in range(6)]), "components.0.components", id="row-of-six"),
        pytest.param(_rows([_select(), _button()]), "components.0", id="row-too-wide"),
        pytest.param(_rows([_button()], [_button()]), "components", id="custom-id-twice"),
        pytest.param(_rows([{"type": 99}]), "components.0.components.0", id="no-such-component"),
        pytest.param({"components": [_button()], "content": "x"}, "components.0.type", id="no-row"),
        pytest.param(_rows([_button(custom_id="x" * 101)]), "components.0.components.0.custom_id", id="custom-id"),
        pytest.param(_rows([_button(custom_id="")]), "components.0.components.0.custom_id", id="custom-id-empty"),
        pytest.param(_rows([_without(_button(), "custom_id")]), "components.0.components.0", id="custom-id-missing"),
        pytest.param(_rows([_without(_button(), "style")]), "components.0.components.0.style", id="style-missing"),
        pytest.param(_rows([_without(_button(), "label")]), "components.0.components.0", id="label-missing"),
        pytest.param(_rows([_button(label="x" * 81)]), "components.0.components.0.label", id="label"),
        pytest.param(_rows([_button(style=5)]), "components.0.components.0", id="link-with-custom-id"),
        pytest.param(_rows([_button(url="https://example.org")]), "components.0.components.0", id="button-with-url"),
        pytest.param(_rows([_button(disabled="no")]), "components.0.components.0.disabled", id="disabled"),
        pytest.param(_rows([_select(*map(str, range(26)))]), "components.0.components.0.options", id="options"),
        pytest.param(_rows([_select(options=[])]), "components.0.components.0.options", id="no-options"),
        pytest.param(_rows([_select("x" * 101)]), "components.0.components.0.options.0.label", id="option"),
        pytest.param(_rows([_select("1", "1")]), "components.0.components.0", id="option-twice"),
        pytest.param(
            _rows([_select(placeholder="x" * 151)]), "components.0.components.0.placeholder", id="placeholder"
        ),
        pytest.param(_rows([_select(max_values=3)]), "components.0.components.0", id="more-values-than-options"),
        pytest.param(_rows([_select(min_values=2, max_values=1)]), "components.0.components.0", id="min-above-max"),
        pytest.param(_rows([_select(min_values=26)]), "components.0.components.0.min_values", id="min-values"),
    ],
)
def test_an_invalid_message_is_refused(
    alone: Discord, rest: httpx.Client, channel: str, body: object, place: str
) -> None:
    answer = rest.post(f"{channel}/messages", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 50035)
    assert _errors_at(answer.json(), place)
    [problem] = alone.problems()
    assert problem.startswith(f"{POST_MESSAGE}: 50035 Invalid Form Body: {place or 'body'}")
    assert alone.user("ada").messages() == []


def _errors_at(answer: Json, place: str) -> list[Json]:
    tree = answer["errors"]
    for name in place.split(".") if place else []:
        tree = tree[name]
    errors: list[Json] = tree["_errors"]
    assert all(set(error) == {"code", "message"} for error in errors)
    return errors


def test_the_longest_message_is_taken(alone: Discord, rest: httpx.Client, channel: str) -> None:
    options = [{"label": "l" * 100, "value": f"{n:0100}", "description": "d" * 100} for n in range(25)]
    menu = _select(options=options, placeholder="p" * 150, min_values=0, max_values=25, custom_id="c" * 100)
    buttons = [_button(label="l" * 80, custom_id=f"{n:0100}") for n in range(20)]
    rows = [[menu], *(buttons[start : start + 5] for start in range(0, 20, 5))]
    fields = [{"name": "n" * 4, "value": "v" * 2, "inline": True}] * 25
    embed = {"title": "t" * 256, "description": "d" * 4096, "fields": fields, "footer": {"text": "f" * 1498}}
    answer = rest.post(f"{channel}/messages", json=_rows(*rows) | {"content": "x" * 2000, "embeds": [embed]})
    assert answer.status_code == 200, answer.json()
    assert answer.headers["Content-Type"] == "application/json"
    [message] = alone.user("ada").messages()
    assert (message.raw, len(message.buttons), len(message.menu.options)) == (answer.json(), 20, 25)
    assert alone.problems() == []


_COMMAND = {"name": "keys", "description": "Your keys"}


def _options(*options: Json) -> Json:
    return _COMMAND | {"options": [{"type": 3, "name": "o", "description": "d"} | option for option in options]}


@pytest.mark.parametrize(
    ("command", "place"),
    [
        pytest.param({"name": "keys"}, "description", id="no-description"),
        pytest.param(_COMMAND | {"name": "Keys"}, "name", id="upper-case"),
        pytest.param(_COMMAND | {"name": "my keys"}, "name", id="blank"),
        pytest.param(_COMMAND | {"name": "k" * 33}, "name", id="long-name"),
        pytest.param(_COMMAND | {"description": "d" * 101}, "description", id="long-description"),
        pytest.param(_COMMAND | {"contexts": []}, "contexts", id="no-contexts"),
        pytest.param(_options({"name": "O"}), "options.0.name", id="option-name"),
        pytest.param(_options({}, {}), "options", id="option-twice"),
        pytest.param(_options({}, {"name": "p", "required": True}), "options", id="required-last"),
        pytest.param(_options({}, {"name": "p", "type": 1}), "options", id="mixed-with-sub-command"),
        pytest.param(
            _options({"type": 1, "options": [{"type": 3, "name": "o"}]}), "options.0.options.0.description", id="in"
        ),
        pytest.param(_options({"options": []} | {"type": 2, "required": True}), "options.0", id="required-group"),
        pytest.param(_options(*({"name": f"o{n}"} for n in range(26))), "options", id="options"),
        pytest.param(_options({"choices": [{"name": "", "value": "v"}]}), "options.0.choices.0.name", id="choice-name"),
        pytest.param(_options({"choices": [{"name": "n", "value": 1}]}), "options.0", id="choice-type"),
        pytest.param(
            _options({"choices": [{"name": "n", "value": "v"}], "autocomplete": True}), "options.0", id="autocomplete"
        ),
        pytest.param(_options({"type": 5, "min_length": 1}), "options.0", id="length-of-boolean"),
    ],
)
def test_an_invalid_command_is_refused(alone: Discord, rest: httpx.Client, command: Json, place: str) -> None:
    path = f"/applications/{APPLICATION_ID}/commands"
    assert _errors_at(rest.post(path, json=command).json(), place)
    assert _errors_at(rest.put(path, json=[command]).json(), f"0.{place}")
    assert len(alone.problems()) == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "violation"),
    [
        pytest.param("GET", "/channels/1", None, 404, 10003, False, id="channel"),
        pytest.param("GET", "{channel}/messages/1", None, 404, 10008, False, id="message"),
        pytest.param("GET", "/users/1", None, 404, 10013, False, id="user"),
        pytest.param("POST", "/users/@me/channels", {"recipient_id": "1"}, 400, 50033, False, id="recipient"),
        pytest.param("POST", "/interactions/1/token/callback", {"type": 6}, 404, 10062, True, id="interaction"),
        pytest.param("POST", "/webhooks/{application}/token", {"content": "x"}, 404, 10015, True, id="webhook"),
        pytest.param("PUT", "/applications/1/commands", [], 404, 10002, True, id="application"),
        pytest.param("GET", "/applications/{application}/commands/1", None, 404, 10063, True, id="command"),
        pytest.param("POST", "{channel}/messages", {}, 400, 50006, True, id="empty"),
        pytest.param("POST", "{channel}/messages", {"content": " \n"}, 400, 50006, True, id="blank"),
        pytest.param("PATCH", "{said}", {"content": "x"}, 403, 50005, True, id="edit-of-anothers"),
        pytest.param("DELETE", "{said}", None, 403, 50003, True, id="deletion-of-anothers"),
        pytest.param("PATCH", "{sent}", {"content": "", "embeds": []}, 400, 50006, True, id="emptied"),
        pytest.param("GET", "{channel}/messages?limit=101", None, 400, 50035, True, id="limit"),
        pytest.param("GET", "{channel}/messages?after=1&before=2", None, 400, 50035, True, id="after-and-before"),
        pytest.param("GET", "{channel}/messages?page=2", None, 400, 50035, True, id="parameter"),
        pytest.param("GET", "/channels/x", None, 400, 50035, True, id="no-snowflake"),
        pytest.param("GET", "/guilds/1", None, 404, 0, True, id="no-route"),
        pytest.param("PUT", "{channel}/messages", {}, 405, 0, True, id="no-method"),
    ],
)
def test_a_request_is_refused_by_discords_code(
    alone: Discord,
    rest: httpx.Client,
    channel: str,
    method: str,
    path: str,
    body: Any,
    status: int,
    code: int,
    violation: bool,
) -> None:
    said = alone.user("ada").say("hello").id
    sent = rest.post(f"{channel}/messages", json={"content": "hello"}).json()["id"]
    messages = f"{channel}/messages"
    path = path.format(
        channel=channel, application=APPLICATION_ID, said=f"{messages}/{said}", sent=f"{messages}/{sent}"
    )
    answer = rest.request(method, path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.json()
    assert len(alone.problems()) == violation


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        pytest.param({"Authorization": "Bot x"}, b"{}", 401, id="wrong-token"),
        pytest.param({"Authorization": "sandbox-bot-token"}, b"{}", 401, id="not-a-bots"),
        pytest.param({"Content-Type": "text/plain"}, b"{}", 400, id="wrong-type"),
        pytest.param({"Content-Type": "application/json"}, b"{", 400, id="no-json"),
    ],
)
def test_a_malformed_request_is_refused(
    alone: Discord, rest: httpx.Client, channel: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    answer = rest.post(f"{channel}/messages", headers=headers, content=content)
    assert answer.status_code == status
    assert len(alone.problems()) == 1


def test_too_many_requests_are_limited(alone: Discord, rest: httpx.Client) -> None:
    alone.configure(requests_per_second=2)
    answers = [rest.get("/users/@me") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["Via"]
    assert (answers[2].json()["retry_after"], answers[2].json()["global"]) == (1.0, True)
    assert len(alone.problems()) == 1


def test_a_nonce_makes_a_message_once(alone: Discord, rest: httpx.Client, channel: str) -> None:
    def send(nonce: str, **fields: Any) -> str:
        body = {"content": "x", "nonce": nonce, "enforce_nonce": True} | fields
        message_id: str = rest.post(f"{channel}/messages", json=body).json()["id"]
        return message_id

    first = send("1")
    assert send("1") == first
    assert len({first, send("2"), send("1", enforce_nonce=False)}) == 3
    alone.configure(nonce_memory=0)
    assert send("2") not in (first, send("2"))


@pytest.mark.parametrize(
    ("content", "allowed", "pings"),
    [
        pytest.param("@everyone <@1> <@&2>", None, ["<@&2>", "<@1>", "@everyone"], id="by-default-all"),
        pytest.param("@everyone <@1> <@&2>", {"parse": []}, [], id="nobody"),
        pytest.param("@here <@1>", {"parse": ["users"]}, ["<@1>"], id="users"),
        pytest.param("<@1> <@!3>", {"users": ["3"]}, ["<@3>"], id="one-user"),
    ],
)
def test_pings_are_those_allowed(
    alone: Discord, rest: httpx.Client, channel: str, content: str, allowed: Json | None, pings: list[str]
) -> None:
    sent = rest.post(f"{channel}/messages", json={"content": content, "allowed_mentions": allowed}).json()["id"]
    assert alone.message(sent).pings == pings
    rest.patch(f"{channel}/messages/{sent}", json={"content": "@everyone"}).raise_for_status()
    assert alone.message(sent).pings == pings


@pytest.mark.parametrize(
    ("query", "found"),
    [
        pytest.param({}, "54321", id="newest-first"),
        pytest.param({"limit": "2"}, "54", id="limit"),
        pytest.param({"after": "2"}, "543", id="after"),
        pytest.param({"after": "1", "limit": "2"}, "32", id="after-nearest"),
        pytest.param({"before": "3"}, "21", id="before"),
        pytest.param({"around": "3", "limit": "3"}, "432", id="around"),
    ],
)
def test_history_is_read(alone: Discord, rest: httpx.Client, channel: str, query: dict[str, str], found: str) -> None:
    ada = alone.user("ada")
    ids = {text: ada.say(text).id for text in "12345"}
    params = {name: value if name == "limit" else ids[value] for name, value in query.items()}
    answer = rest.get(f"{channel}/messages", params=params).json()
    assert "".join(message["content"] for message in answer) == found


# Without a bot: faults


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        pytest.param({"kind": "status", "status": 403, "code": 50007}, 403, 50007, id="403"),
        pytest.param({"kind": "status", "status": 503}, 503, 0, id="503"),
        pytest.param({"kind": "rate_limit", "seconds": 2.5}, 429, 0, id="429"),
        pytest.param({"kind": "delay", "seconds": 0.01}, 200, None, id="delay"),
    ],
)
def test_a_fault_shows_before_or_after(
    alone: Discord, rest: httpx.Client, channel: str, fault: Json, status: int, code: int | None, phase: str
) -> None:
    alone.fault(**fault, route=POST_MESSAGE, times=1, phase=phase)
    answer = rest.post(f"{channel}/messages", json={"content": "x"})
    assert (answer.status_code, answer.json().get("code")) == (status, code)
    stored = len(alone.user("ada").messages())
    assert stored == (1 if phase == "after" or status == 200 else 0)
    assert rest.post(f"{channel}/messages", json={"content": "x"}).status_code == 200
    assert alone.problems() == []


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("kind", ["hang", "reset"])
def test_a_fault_leaves_without_an_answer(
    alone: Discord, rest: httpx.Client, channel: str, kind: str, phase: str
) -> None:
    alone.fault(kind, "* /channels/*", phase=phase)
    with pytest.raises(httpx.ReadTimeout if kind == "hang" else httpx.ReadError):
        rest.post(f"{channel}/messages", json={"content": "x"}, timeout=0.1)
    assert len(alone.user("ada").messages()) == (phase == "after")
    alone.heal()
    assert rest.post(f"{channel}/messages", json={"content": "x"}).status_code == 200


# Without a bot: interactions


@pytest.fixture
def prompt(alone: Discord, rest: httpx.Client, channel: str) -> Message:
    """A message with all that can be clicked."""
    row = [
        _button(label="Go", custom_id="go"),
        _button(label="Off", custom_id="off", disabled=True),
        _without(_button(label="Page", style=5, url="https://example.org"), "custom_id"),
    ]
    body = _rows(row, [_select("1", "2", "3", min_values=2, max_values=2)])
    message_id = rest.post(f"{channel}/messages", json=body).json()["id"]
    return alone.message(message_id)


@pytest.fixture
def clicked(alone: Discord, prompt: Message) -> Interaction:
    return alone.user("ada").click(prompt, "go")


def _answer(rest: httpx.Client, interaction: Interaction, kind: int, **data: Any) -> httpx.Response:
    body = {"type": kind} | ({"data": data} if data else {})
    return rest.post(f"/interactions/{interaction.id}/{interaction.token}/callback", json=body)


def test_an_interaction_is_answered_once(alone: Discord, rest: httpx.Client, clicked: Interaction) -> None:
    assert _answer(rest, clicked, 6).status_code == 204
    again = _answer(rest, clicked, 6)
    assert (again.status_code, again.json()["code"]) == (400, 40060)
    assert len(alone.problems()) == 1


def test_an_interaction_fails_in_the_end(alone: Discord, rest: httpx.Client, prompt: Message) -> None:
    alone.configure(interaction_deadline=0.01)
    ada = alone.user("ada")
    failed = ada.outcome(ada.click(prompt, "go"))
    assert (failed.state, failed.acknowledged_after) == ("failed", None)
    late = _answer(rest, failed, 6)
    assert (late.status_code, late.json()["code"]) == (404, 10062)
    assert len(alone.problems()) == 1


def test_a_token_lives_so_long(alone: Discord, rest: httpx.Client, clicked: Interaction) -> None:
    webhook = f"/webhooks/{APPLICATION_ID}/{clicked.token}"
    assert rest.post(webhook, json={"content": "early"}).json()["code"] == 10015
    _answer(rest, clicked, 6)
    assert rest.post(webhook, json={"content": "in time"}).status_code == 200
    alone.configure(token_lifetime=0.001)
    late = rest.post(webhook, json={"content": "late"})
    assert (late.status_code, late.json()["code"]) == (401, 50027)


def _field(**fields: Any) -> Json:
    return {"type": 18, "label": "Key", "component": {"type": 4, "custom_id": "k", "style": 1} | fields}


def _modal(*components: Json, **fields: Any) -> Json:
    return {"custom_id": "m", "title": "A key", "components": list(components) or [_field()]} | fields


@pytest.mark.parametrize(
    ("kind", "data", "place"),
    [
        pytest.param(1, {}, "type", id="pong"),
        pytest.param(8, {"choices": []}, "type", id="choices-for-a-click"),
        pytest.param(4, {"content": "x" * 2001}, "data.content", id="content"),
        pytest.param(4, {"content": "x", "nonce": "1"}, "data.nonce", id="nonce"),
        pytest.param(5, {"content": "x"}, "data", id="deferred-content"),
        pytest.param(5, {"flags": 1}, "flags", id="deferred-flags"),
        pytest.param(7, {"components": [{"type": 1}]}, "data.components.0.components", id="row-without-components"),
        pytest.param(9, _modal(title="t" * 46), "data.title", id="modal-title"),
        pytest.param(9, _modal(custom_id=""), "data.custom_id", id="modal-custom-id"),
        pytest.param(9, {"custom_id": "m", "title": "t"}, "data.components", id="modal-components"),
        pytest.param(9, _modal(*[_field(custom_id=str(n)) for n in range(6)]), "data.components", id="modal-of-six"),
        pytest.param(9, _modal(_field(), _field()), "data", id="modal-custom-id-twice"),
        pytest.param(9, _modal(_field() | {"label": "l" * 46}), "data.components.0.label", id="label"),
        pytest.param(
            9, _modal(_field(placeholder="p" * 101)), "data.components.0.component.placeholder", id="placeholder"
        ),
        pytest.param(9, _modal(_field(min_length=2, max_length=1)), "data.components.0.component", id="lengths"),
        pytest.param(
            9, _modal({"type": 1, "components": [_field()["component"]]}), "data.components.0", id="input-without-label"
        ),
    ],
)
def test_an_invalid_answer_is_refused(
    alone: Discord, rest: httpx.Client, clicked: Interaction, kind: int, data: Json, place: str
) -> None:
    answer = _answer(rest, clicked, kind, **data)
    assert (answer.status_code, answer.json()["code"]) == (400, 50035)
    assert _errors_at(answer.json(), place)
    assert alone.interaction(clicked.id).state == "pending"
    assert len(alone.problems()) == 1


@pytest.mark.parametrize(
    ("choices", "place"),
    [
        pytest.param([{"name": str(n), "value": str(n)} for n in range(26)], "data.choices", id="too-many"),
        pytest.param([{"name": "n" * 101, "value": "v"}], "data.choices.0.name", id="long-name"),
        pytest.param([{"name": "", "value": "v"}], "data.choices.0.name", id="no-name"),
        pytest.param([{"name": "n", "value": 1}], "data.choices.0.value", id="wrong-type"),
    ],
)
def test_invalid_choices_are_refused(alone: Discord, rest: httpx.Client, choices: list[Json], place: str) -> None:
    rest.put(f"/applications/{APPLICATION_ID}/commands", json=[_options({"autocomplete": True})]).raise_for_status()
    typed = alone.user("ada").autocomplete("keys", "o", "t")
    assert _errors_at(_answer(rest, typed, 8, choices=choices).json(), place)


# Without a bot: what a real client cannot do


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        pytest.param(lambda ada, _: ada.say(""), "1 to 2,000", id="nothing"),
        pytest.param(lambda ada, _: ada.say(" \n "), "1 to 2,000", id="blank"),
        pytest.param(lambda ada, _: ada.say("x" * 2001), "1 to 2,000", id="too-long"),
        pytest.param(lambda ada, prompt: ada.click(prompt, "Stop"), "0 buttons", id="no-button"),
        pytest.param(lambda ada, prompt: ada.click(prompt, "Off"), "disabled", id="disabled"),
        pytest.param(lambda ada, prompt: ada.click(prompt, "Page"), "leads to a page", id="link"),
        pytest.param(lambda ada, prompt: ada.select(prompt, "1"), "takes 2 to 2", id="too-few"),
        pytest.param(lambda ada, prompt: ada.select(prompt, "1", "2", "3"), "takes 2 to 2", id="too-many"),
        pytest.param(lambda ada, prompt: ada.select(prompt, "1", "1"), "different", id="twice"),
        pytest.param(lambda ada, prompt: ada.select(prompt, "1", "4"), "does not offer 4", id="not-offered"),
        pytest.param(lambda ada, prompt: ada.select(prompt, "1", custom_id="other"), "0 such menus", id="no-menu"),
        pytest.param(lambda ada, _: ada.slash("nothing"), "no command", id="no-command"),
        pytest.param(lambda ada, _: ada.slash("keys"), "group of commands", id="group"),
        pytest.param(lambda ada, _: ada.slash("keys list"), "no command", id="no-sub-command"),
        pytest.param(lambda ada, _: ada.slash("here"), "no command", id="not-in-dms"),
        pytest.param(lambda ada, _: ada.slash("keys add"), "needs service", id="option-missing"),
        pytest.param(lambda ada, _: ada.slash("keys add", service=1), "takes no int", id="option-type"),
        pytest.param(lambda ada, _: ada.slash("keys add", service="s" * 5), "takes 2 to 4", id="option-length"),
        pytest.param(lambda ada, _: ada.slash("keys add", service="abc", x=1), "no options x", id="no-option"),
        pytest.param(lambda ada, _: ada.slash("keys add", service="abc", kind="c"), "not offer 'c'", id="choice"),
        pytest.param(lambda ada, _: ada.autocomplete("keys add", "kind", "a"), "completes no", id="no-completion"),
    ],
)
def test_what_a_client_cannot_do_is_refused(
    alone: Discord, rest: httpx.Client, prompt: Message, act: Callable[[User, Message], object], reason: str
) -> None:
    service = {"type": 3, "name": "service", "description": "d", "required": True, "min_length": 2, "max_length": 4}
    kind = {"type": 3, "name": "kind", "description": "d", "choices": [{"name": "A", "value": "a"}]}
    add = {"type": 1, "name": "add", "description": "d", "options": [service, kind]}
    here = {"name": "here", "description": "d", "contexts": [0]}
    commands = [_COMMAND | {"options": [add]}, here]
    rest.put(f"/applications/{APPLICATION_ID}/commands", json=commands).raise_for_status()
    with pytest.raises(CannotDo, match=reason):
        act(alone.user("ada"), prompt)
    assert alone.interactions() == []
    assert alone.user("ada").slash("here", guild=True).state == "pending"


def test_what_is_edited_away_or_anothers_is_out_of_reach(
    alone: Discord, rest: httpx.Client, channel: str, prompt: Message
) -> None:
    ada, grace = alone.user("ada"), alone.user("grace")
    with pytest.raises(CannotDo, match="grace sees no message"):
        grace.click(prompt, "go")
    with pytest.raises(CannotDo, match="grace sees no message"):
        grace.say("1", reply_to=prompt)
    assert grace.click(prompt, "go", forged=True).user == "grace"
    rest.patch(f"{channel}/messages/{prompt.id}", json={"components": []}).raise_for_status()
    with pytest.raises(CannotDo, match="0 buttons"):
        ada.click(prompt, "go")
    assert ada.click(prompt, "go", forged=True).state == "pending"
    rest.delete(f"{channel}/messages/{prompt.id}").raise_for_status()
    with pytest.raises(CannotDo, match="ada sees no message"):
        ada.say("1", reply_to=prompt)
    assert alone.message(prompt.id).deleted


def test_an_ephemeral_reply_is_the_users_alone(
    alone: Discord, rest: httpx.Client, channel: str, clicked: Interaction
) -> None:
    _answer(rest, clicked, 4, content="only you", flags=64)
    ada = alone.user("ada")
    reply = ada.answer(clicked)
    assert reply.ephemeral
    assert rest.get(f"{channel}/messages/{reply.id}").json()["code"] == 10008
    assert reply.id not in [message["id"] for message in rest.get(f"{channel}/messages").json()]
    with pytest.raises(CannotDo, match="ephemeral"):
        ada.say("1", reply_to=reply)


# Without a bot: the gateway


class Frames:
    """A connection to the gateway, frame by frame."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self._unpacker = zlib.decompressobj()

    async def send(self, op: int, d: object) -> None:
        await self.socket.send_str(json.dumps({"op": op, "d": d}))

    async def receive(self) -> Any:
        """The next frame; a close code, when there is none."""
        message = await self.socket.receive(timeout=5)
        if message.type is aiohttp.WSMsgType.BINARY:
            return json.loads(self._unpacker.decompress(message.data))
        return json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else self.socket.close_code

    async def identify(self, **changes: Any) -> Any:
        """IDENTIFY, and what answers."""
        properties = {"os": "linux", "browser": "raw", "device": "raw"}
        wish = {"token": Discord.token, "properties": properties, "intents": DIRECT_MESSAGES}
        await self.send(2, wish | changes)
        return await self.receive()


@asynccontextmanager
async def _connection(discord: Discord, query: str = "v=10&encoding=json") -> AsyncIterator[Frames]:
    """A connection that has said HELLO."""
    address = f"{discord.url.replace('http', 'ws')}/gateway?{query}"
    async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
        frames = Frames(socket)
        hello = await frames.receive()
        assert hello["op"] == 10
        yield frames


async def _identify_twice(frames: Frames) -> Any:
    await frames.identify()
    return await frames.identify()


async def _say_nothing_known(frames: Frames) -> Any:
    await frames.send(99, None)
    return await frames.receive()


async def _send_rubbish(frames: Frames) -> Any:
    await frames.socket.send_str("rubbish")
    return await frames.receive()


async def _beat_ahead(frames: Frames) -> Any:
    await frames.identify()
    await frames.send(1, 99)
    return await frames.receive()


async def _present_unknown(frames: Frames) -> Any:
    await frames.send(3, {"since": None, "activities": [], "status": "online", "afk": False})
    return await frames.receive()


async def _talk_too_much(frames: Frames) -> Any:
    for _ in range(121):
        await frames.send(1, None)
    answers = [await frames.receive() for _ in range(121)]
    return answers[-1]


Talk = Callable[[Frames], Awaitable[Any]]


@pytest.mark.parametrize(
    ("talk", "code"),
    [
        pytest.param(lambda frames: frames.identify(token="x"), 4004, id="token"),
        pytest.param(lambda frames: frames.identify(intents=DIRECT_MESSAGES | 1 << 15), 4014, id="privileged-intents"),
        pytest.param(lambda frames: frames.identify(intents=1 << 40), 4013, id="unknown-intents"),
        pytest.param(lambda frames: frames.identify(shard=[1, 1]), 4010, id="shard"),
        pytest.param(lambda frames: frames.identify(properties={}), 4002, id="properties"),
        pytest.param(_identify_twice, 4005, id="identify-twice"),
        pytest.param(_say_nothing_known, 4001, id="opcode"),
        pytest.param(_send_rubbish, 4002, id="rubbish"),
        pytest.param(_beat_ahead, 4007, id="sequence"),
        pytest.param(_present_unknown, 4003, id="not-identified"),
        pytest.param(_talk_too_much, 4008, id="too-many-frames"),
    ],
)
def test_a_connection_is_closed_by_discords_code(alone: Discord, talk: Talk, code: int) -> None:
    async def run() -> None:
        async with _connection(alone) as frames:
            assert await talk(frames) == code

    asyncio.run(run())
    [problem] = alone.problems()
    assert problem.startswith(f"gateway: {code} ")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "zlib-stream"])
def test_each_connection_gets_each_event(alone: Discord, packed: bool) -> None:
    query = "v=10&encoding=json" + "&compress=zlib-stream" * packed

    async def run() -> None:
        async with _connection(alone, query) as one, _connection(alone, query) as two:
            for frames in (one, two):
                ready = await frames.identify()
                assert (ready["t"], ready["d"]["user"]["id"]) == ("READY", APPLICATION_ID)
            await asyncio.to_thread(alone.user("ada").say, "hello")
            for frames in (one, two):
                event = await frames.receive()
                assert (event["t"], event["s"], event["d"]["content"]) == ("MESSAGE_CREATE", 2, "hello")

    asyncio.run(run())
    assert alone.problems() == []


@pytest.mark.parametrize(
    ("intents", "events"),
    [
        pytest.param(DIRECT_MESSAGES, ["READY", "MESSAGE_CREATE dm"], id="direct-messages"),
        pytest.param(1 << 9, ["READY", "MESSAGE_CREATE "], id="guild-messages-without-content"),
        pytest.param(1, ["READY", "GUILD_CREATE"], id="guilds"),
    ],
)
def test_a_session_gets_what_it_asked_for(alone: Discord, intents: int, events: list[str]) -> None:
    async def run() -> None:
        async with _connection(alone) as frames:
            got = [await frames.identify(intents=intents)]
            ada = alone.user("ada")
            await asyncio.to_thread(lambda: (ada.say("dm"), ada.say("guild", guild=True)))
            got += [await frames.receive() for _ in events[1:]]
            shown = [f"{each['t']} {each['d']['content']}" if "content" in each["d"] else each["t"] for each in got]
            assert shown == events
            await frames.send(1, 1)
            assert (await frames.receive())["op"] == 11

    asyncio.run(run())


def test_heartbeats_may_go_unacknowledged(alone: Discord) -> None:
    async def run() -> None:
        async with _connection(alone) as frames:
            await frames.send(1, None)
            assert await frames.receive() == {"op": 11, "d": None, "s": None, "t": None}
            alone.configure(acknowledge_heartbeats=False)
            await frames.send(1, None)
            alone.configure(acknowledge_heartbeats=True)
            await frames.send(2, {})
            assert await frames.receive() == 4002

    asyncio.run(run())


def test_a_silent_connection_is_closed(alone: Discord) -> None:
    alone.configure(heartbeat_interval=10)

    async def run() -> None:
        async with _connection(alone) as frames:
            await frames.identify()
            assert await frames.receive() == 4009

    asyncio.run(run())


@pytest.mark.parametrize(
    ("session", "sequence", "answer"),
    [
        pytest.param(None, 1, "RESUMED", id="known"),
        pytest.param("x", 1, {"op": 9, "d": False, "s": None, "t": None}, id="unknown"),
        pytest.param(None, 99, 4007, id="ahead"),
    ],
)
def test_a_session_is_resumed_by_its_id(alone: Discord, session: str | None, sequence: int, answer: object) -> None:
    async def run() -> None:
        async with _connection(alone) as frames:
            ready = await frames.identify()
            await frames.socket.close(code=4000)
        async with _connection(alone) as frames:
            session_id = session or ready["d"]["session_id"]
            await frames.send(6, {"token": Discord.token, "session_id": session_id, "seq": sequence})
            got = await frames.receive()
            assert (got["t"] if answer == "RESUMED" else got) == answer

    asyncio.run(run())


def test_a_bot_that_says_good_bye_cannot_come_back(alone: Discord) -> None:
    async def run() -> None:
        async with _connection(alone) as frames:
            await frames.identify()
            before = alone.sessions()
            await frames.socket.close(code=1000)
        gone = alone.until(alone.sessions, lambda found: len(found) < len(before), "the end of the session")
        assert all(not session.connected for session in gone)

    asyncio.run(run())


# The page


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js"])
def test_the_page_needs_nobody_else(deserted: Discord, path: str) -> None:
    answer = httpx.get(f"{deserted.url}{path}", trust_env=False).raise_for_status()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"https?:|innerHTML|insertAdjacentHTML|<script>|style=", answer.text)
