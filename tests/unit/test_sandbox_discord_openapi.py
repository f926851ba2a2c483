"""All routes of the stand-in for Discord, and whether they are as Discord's own description of its API has them.

For the latter, set DISCORD_OPENAPI to a copy of `specs/openapi.json`, from discord/discord-api-spec on GitHub.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.processes import BIN, running
from tests.sandbox.discord.client import APPLICATION_ID, GUILD_ID, Discord, Message, Request, discord_stand_in
from tests.sandbox.discord.rest import ROUTES

DESCRIPTION = os.environ.get("DISCORD_OPENAPI")
URI = "urn:discord"
# Beyond this, integers are snowflakes, which the description knows as strings; Discord takes both.
LARGEST_NUMBER = 1 << 53

Json = dict[str, Any]


class Description:
    """Discord's OpenAPI document, and what it says of a request."""

    def __init__(self, path: Path) -> None:
        self._document = json.loads(path.read_text())
        resource = DRAFT202012.create_resource(self._document)
        self._registry: Registry[Any] = Registry().with_resource(URI, resource)
        self._operations = {
            (method.upper(), _shape(path)): (path, method)
            for path, methods in self._document["paths"].items()
            for method in methods
            if method != "parameters"
        }

    def faults_of(self, request: Request) -> Iterator[str]:
        """Where a request of the bot's, or its answer, is not as described."""
        place = f"{request.method} {request.route} {request.status}"
        found = self._operations.get((request.method, _shape(request.route)))
        if found is None:
            yield f"{place}: there is no such operation"
            return
        path, method = found
        pointer = f"/paths/{_escaped(path)}/{method}"
        operation = self._document["paths"][path][method]
        known = {parameter["name"] for parameter in operation.get("parameters", [])}
        yield from (f"{place}: parameter {name}" for name in request.query if name not in known)
        if request.body is not None and request.status in (200, 201, 204):
            where = f"{pointer}/requestBody/content/application~1json/schema"
            yield from self._faults(f"{place} request", where, _with_snowflakes(request.body))
        yield from self._faults_of_answer(place, pointer, operation["responses"], request)

    def _faults_of_answer(self, place: str, pointer: str, responses: Json, request: Request) -> Iterator[str]:
        status = str(request.status)
        described = status if status in responses else f"{status[0]}XX"
        if described not in responses:
            yield f"{place}: there is no such status"
        elif "$ref" in responses[described]:
            name = responses[described]["$ref"].rpartition("/")[2]
            where = f"/components/responses/{name}/content/application~1json/schema"
            # The description takes the codes within `errors` for numbers, but they are names.
            answer = {name: value for name, value in request.answer.items() if name != "errors"}
            yield from self._faults(place, where, answer)
        elif "content" in responses[described]:
            yield from self._faults(
                place, f"{pointer}/responses/{described}/content/application~1json/schema", request.answer
            )
        elif request.answer is not None:
            yield f"{place}: an answer without need"

    def _faults(self, place: str, pointer: str, value: object) -> Iterator[str]:
        schema = {"$ref": f"{URI}#{pointer.replace('{', '%7B').replace('}', '%7D')}"}
        validator = Draft202012Validator(schema, registry=self._registry)
        for error in validator.iter_errors(value):
            deepest = _deepest(error)
            yield f"{place}: {deepest.json_path} {deepest.message[:200]}"


def _deepest(error: ValidationError) -> ValidationError:
    """The reason within the alternatives."""
    found: ValidationError | None = best_match([error])
    assert found is not None
    return found


def _shape(path: str) -> str:
    """The path with its parameters nameless."""
    return re.sub(r"\{\w+\}", "{}", path)


def _escaped(path: str) -> str:
    return path.replace("~", "~0").replace("/", "~1")


def _with_snowflakes(value: object) -> object:
    if isinstance(value, dict):
        return {name: _with_snowflakes(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_snowflakes(inner) for inner in value]
    large = isinstance(value, int) and value > LARGEST_NUMBER
    return str(value) if large else value


@pytest.fixture(scope="module")
def description() -> Description:
    if DESCRIPTION is None:
        pytest.skip("DISCORD_OPENAPI names no description of Discord's API")
    return Description(Path(DESCRIPTION))


@pytest.fixture(scope="module")
def by_a_bot(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """The requests of a real bot that does all it can."""
    directory = tmp_path_factory.mktemp("bot")
    command: list[str | Path] = [BIN / "python", "-m", "tests.sandbox.discord.example_bot"]
    with (
        discord_stand_in(directory / "discord.log") as discord,
        running(command, directory / "bot.log", {"DISCORD_API_BASE": discord.api_base}),
    ):
        discord.await_connected()
        discord.await_commands("keys")
        _use_everything(discord)
        assert discord.problems() == []
        return discord.requests()


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """Requests to every route, and some that are refused."""
    with discord_stand_in(tmp_path_factory.mktemp("hand") / "discord.log") as discord:
        headers = {"Authorization": f"Bot {discord.token}"}
        with httpx.Client(base_url=discord.api_base, headers=headers, trust_env=False) as rest:
            _ask_for_everything(discord, rest)
            assert discord.problems() == []
            _be_refused(discord, rest)
        return discord.requests()


def test_every_route_answers(by_hand: list[Request]) -> None:
    answered = {f"{request.method} {request.route}" for request in by_hand if request.status in (200, 201, 204)}
    assert answered == {route.name for route in ROUTES}
    assert {request.status for request in by_hand} == {200, 201, 204, 400, 401, 403, 404, 429}


@pytest.mark.parametrize("traffic", ["by_a_bot", "by_hand"])
def test_the_traffic_is_as_described(request: pytest.FixtureRequest, description: Description, traffic: str) -> None:
    requests: list[Request] = request.getfixturevalue(traffic)
    faults = {fault for each in requests for fault in description.faults_of(each)}
    assert "\n".join(sorted(faults)) == ""


def test_what_is_not_as_described_is_found(description: Description, by_hand: list[Request]) -> None:
    message = next(each for each in by_hand if each.route == "/channels/{channel_id}/messages" and each.status == 200)
    without_author = {name: value for name, value in message.answer.items() if name != "author"}
    [fault] = description.faults_of(replace(message, answer=without_author))
    assert fault.endswith("'author' is a required property")
    assert list(description.faults_of(replace(message, body=message.body | {"content": 5})))
    assert list(description.faults_of(replace(message, status=418)))


def _use_everything(discord: Discord) -> None:
    ada = discord.user("ada")
    ada.say("hello")
    ada.await_message("You said: hello")
    ada.say("menu")
    menu = ada.await_message("Share your keys?")
    asked = ada.outcome(ada.click(menu, "Ask"))
    ada.answer(ada.submit(asked, {"Key": "abc"}))
    ada.answer(ada.slash("keys add", service="gw2"))
    ada.answer(ada.slash("keys add", guild=True, service="gw2"))
    ada.outcome(ada.autocomplete("keys add", "service", "g"))
    for button in ("Share", "Later", "Change later"):
        ada.answer(ada.click(menu, button))
    ada.say("menu")
    ada.answer(ada.select(ada.await_message("Share your keys?", after=menu), "1"))
    ada.await_message("That is noted.")


_EMBED = {
    "title": "A title",
    "url": "https://example.org/",
    "description": "A description",
    "color": 0x5865F2,
    "timestamp": "2030-01-01T00:00:00+00:00",
    "author": {"name": "Somebody", "icon_url": "https://example.org/icon.png"},
    "footer": {"text": "The end"},
    "image": {"url": "https://example.org/image.png"},
    "thumbnail": {"url": "https://example.org/thumbnail.png"},
    "fields": [{"name": "n", "value": "v"}, {"name": "n", "value": "v", "inline": True}],
}
_OPTIONS = [
    {"label": "One", "value": "1", "description": "The first", "emoji": {"name": "1"}, "default": True},
    {"label": "Two", "value": "2"},
]
_ROWS = [
    {"type": 1, "components": [{"type": 3, "custom_id": "menu", "options": _OPTIONS, "placeholder": "Choose"}]},
    {
        "type": 1,
        "components": [
            {"type": 2, "style": 1, "label": "Go", "custom_id": "go"},
            {"type": 2, "style": 4, "emoji": {"name": "x"}, "custom_id": "stop", "disabled": True},
            {"type": 2, "style": 5, "label": "Page", "url": "https://example.org/"},
        ],
    },
]
_MESSAGE = {"content": "Hello <@80351110224678912>", "embeds": [_EMBED], "components": _ROWS, "nonce": "1"}
_COMMAND = {
    "name": "keys",
    "description": "Your keys",
    "contexts": [0, 1],
    "integration_types": [0],
    "options": [
        {"type": 3, "name": "text", "description": "d", "required": True, "autocomplete": True},
        {"type": 4, "name": "number", "description": "d", "choices": [{"name": "One", "value": 1}]},
        {"type": 5, "name": "truth", "description": "d"},
        {"type": 6, "name": "who", "description": "d"},
        {"type": 10, "name": "measure", "description": "d", "min_value": 0.5, "max_value": 2},
    ],
}
_MODAL = {
    "custom_id": "modal",
    "title": "A title",
    "components": [
        {"type": 10, "content": "Read this"},
        {"type": 18, "label": "Text", "component": {"type": 4, "custom_id": "text", "style": 2, "value": "v"}},
        {"type": 18, "label": "Kind", "component": {"type": 3, "custom_id": "kind", "options": _OPTIONS}},
        {"type": 1, "components": [{"type": 4, "custom_id": "old", "style": 1, "label": "Old", "required": False}]},
    ],
}


def _ask_for_everything(discord: Discord, rest: httpx.Client) -> None:
    for path in ("/gateway", "/gateway/bot", "/users/@me", "/oauth2/applications/@me", "/applications/@me"):
        rest.get(path)
    rest.get(f"/users/{discord.user('ada').id}")
    for commands in ("commands", f"guilds/{GUILD_ID}/commands"):
        _register_everything(rest, f"/applications/{APPLICATION_ID}/{commands}")
    _interact(discord, rest, _send_everything(discord, rest))


def _register_everything(rest: httpx.Client, path: str) -> None:
    command = rest.post(path, json=_COMMAND).json()["id"]
    rest.get(f"{path}/{command}")
    rest.patch(f"{path}/{command}", json={"description": "All your keys"})
    rest.delete(f"{path}/{command}")
    rest.put(path, json=[_COMMAND])
    rest.get(path, params={"with_localizations": "true"})


def _send_everything(discord: Discord, rest: httpx.Client) -> Message:
    """The message that stays."""
    ada = discord.user("ada")
    channel = f"/channels/{rest.post('/users/@me/channels', json={'recipient_id': ada.id}).json()['id']}"
    rest.get(channel)
    rest.post(f"{channel}/typing")
    first = rest.post(f"{channel}/messages", json=_MESSAGE).json()["id"]
    rest.patch(f"{channel}/messages/{first}", json={"content": "Changed"})
    ada.say("a reply", reply_to=discord.message(first))
    again = rest.post(f"{channel}/messages", json=_MESSAGE | {"message_reference": {"message_id": first}}).json()["id"]
    rest.get(f"{channel}/messages", params={"after": "1", "limit": "10"})
    rest.delete(f"{channel}/messages/{first}")
    rest.get(f"{channel}/messages/{again}")
    return discord.message(again)


def _interact(discord: Discord, rest: httpx.Client, message: Message) -> None:
    ada = discord.user("ada")

    def answer(interaction: Any, kind: int, data: Json | None = None) -> str:
        body = {"type": kind} | ({"data": data} if data else {})
        path = f"/interactions/{interaction.id}/{interaction.token}/callback"
        rest.post(path, json=body, params={"with_response": "true"} if kind != 9 else {})
        return f"/webhooks/{APPLICATION_ID}/{interaction.token}"

    answer(ada.autocomplete("keys", "text", "t", number=1), 8, {"choices": [{"name": "n", "value": "v"}]})
    webhook = answer(ada.slash("keys", text="t", who="grace", truth=True, measure=1.5, guild=True), 5)
    rest.patch(f"{webhook}/messages/@original", json={"content": "x", "components": _ROWS, "embeds": [_EMBED]})
    rest.get(f"{webhook}/messages/@original")
    follow_up = rest.post(webhook, json={"content": "more", "flags": 64}, params={"wait": "1"}).json()["id"]
    rest.get(f"{webhook}/messages/{follow_up}")
    rest.patch(f"{webhook}/messages/{follow_up}", json={"content": "changed"})
    rest.delete(f"{webhook}/messages/{follow_up}")
    rest.delete(f"{webhook}/messages/@original")
    opened = ada.click(message, "Go")
    answer(opened, 9, _MODAL)
    answer(ada.submit(opened, {"Text": "t", "Kind": ["Two"]}), 4, _MESSAGE_IN_ANSWER)
    answer(ada.select(message, "Two"), 7, {"components": []})


_MESSAGE_IN_ANSWER = {name: _MESSAGE[name] for name in ("content", "embeds", "components")}


def _be_refused(discord: Discord, rest: httpx.Client) -> None:
    ada = discord.user("ada")
    channel = f"/channels/{rest.post('/users/@me/channels', json={'recipient_id': ada.id}).json()['id']}"
    rest.post(f"{channel}/messages", json={"content": "x" * 2001, "embeds": [{}]})
    rest.get("/users/1")
    rest.get("/users/@me", headers={"Authorization": "x"})
    ada.refuse()
    rest.post(f"{channel}/messages", json={"content": "x"})
    discord.fault("rate_limit", "GET /users/@me", times=1, seconds=0.5)
    rest.get("/users/@me")
