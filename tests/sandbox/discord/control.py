"""The control plane of the tests: `/_sandbox/`, JSON in and out.

Every answer to a GET carries `Sandbox-Version`, which grows with every change; `changes` waits until it is past one.
What a real client could not do is refused with 409 and the reason.
"""

from typing import Any, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import render
from .actors import Actor, CannotDo
from .errors import DM_REFUSALS, Json
from .faults import Fault
from .gateway import AUTHENTICATION_FAILED, GATEWAY, Gateway
from .state import WORLD, Exchange, Interaction, Message, Settings, User, World

Model = TypeVar("Model", bound=BaseModel)
Refusal = Literal[50007, 50278]
VERSION = "Sandbox-Version"
LONGEST_WAIT = 30.0

routes = web.RouteTableDef()


class Order(BaseModel):
    """The base of what may be asked for."""

    model_config = ConfigDict(strict=True, extra="forbid")


class NewUser(Order):
    name: str = Field(min_length=1, max_length=32)
    id: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,19}$")
    refuses: Refusal | None = None


class Refusing(Order):
    refuses: Refusal | None


class Saying(Order):
    text: str
    reply_to: str | None = None
    guild: bool = False


class Click(Order):
    message: str
    button: str
    forged: bool = False


class Selection(Order):
    message: str
    values: list[str]
    custom_id: str | None = None
    forged: bool = False


class Slash(Order):
    command: str = Field(min_length=1)
    options: dict[str, str | int | float | bool] = {}
    guild: bool = False


class Typing(Slash):
    option: str
    text: str


class Submission(Order):
    interaction: str
    values: dict[str, str | list[str]] = {}


class Invalidation(Order):
    resumable: bool


class Closure(Order):
    code: int = Field(ge=1000, le=4999)


# State


@routes.get("/_sandbox/changes")
async def await_change(request: web.Request) -> web.Response:
    """Answers when the version is past `after`, or after `patience` seconds."""
    after, patience = int(request.query["after"]), float(request.query.get("patience", "10"))
    await request.app[WORLD].changed(after, min(patience, LONGEST_WAIT))
    return _json(request, None)


@routes.get("/_sandbox/users")
async def list_users(request: web.Request) -> web.Response:
    return _json(request, [_user(user) for user in request.app[WORLD].users.values()])


@routes.post("/_sandbox/users")
async def create_user(request: web.Request) -> web.Response:
    world, wish = request.app[WORLD], await _parse(NewUser, request)
    user_id = wish.id or world.snowflake()
    if world.user_named(wish.name) or user_id in world.users or user_id == world.bot.id:
        raise _conflict("there is such a user already")
    user = User(user_id, wish.name, refuses=wish.refuses)
    world.add_user(user)
    return _json(request, _user(user))


@routes.patch("/_sandbox/users/{name}")
async def change_user(request: web.Request) -> web.Response:
    actor = _actor(request)
    actor.user.refuses = (await _parse(Refusing, request)).refuses
    assert actor.user.refuses is None or actor.user.refuses in DM_REFUSALS
    return _json(request, _user(actor.user))


@routes.get("/_sandbox/users/{name}/messages")
async def list_messages(request: web.Request) -> web.Response:
    shown = _actor(request).messages(guild=request.query.get("guild") == "1")
    return _json(request, [message_view(request.app[WORLD], message) for message in shown])


@routes.get("/_sandbox/messages/{id}")
async def show_message(request: web.Request) -> web.Response:
    message = request.app[WORLD].messages.get(request.match_info["id"])
    if message is None:
        raise web.HTTPNotFound(text="there is no such message\n")
    return _json(request, message_view(request.app[WORLD], message))


@routes.get("/_sandbox/interactions")
async def list_interactions(request: web.Request) -> web.Response:
    world = request.app[WORLD]
    return _json(request, [interaction_view(world, each) for each in world.interactions.values()])


@routes.get("/_sandbox/interactions/{id}")
async def show_interaction(request: web.Request) -> web.Response:
    interaction = request.app[WORLD].interactions.get(request.match_info["id"])
    if interaction is None:
        raise web.HTTPNotFound(text="there is no such interaction\n")
    return _json(request, interaction_view(request.app[WORLD], interaction))


@routes.get("/_sandbox/commands")
async def list_commands(request: web.Request) -> web.Response:
    commands = request.app[WORLD].commands
    return _json(request, [command for registered in commands.values() for command in registered.values()])


@routes.get("/_sandbox/requests")
async def list_requests(request: web.Request) -> web.Response:
    return _json(request, [_exchange(exchange) for exchange in request.app[WORLD].journal])


@routes.delete("/_sandbox/requests")
async def forget_requests(request: web.Request) -> web.Response:
    request.app[WORLD].journal.clear()
    return web.Response(status=204)


@routes.get("/_sandbox/problems")
async def list_problems(request: web.Request) -> web.Response:
    return _json(request, request.app[WORLD].problems)


@routes.delete("/_sandbox/problems")
async def forget_problems(request: web.Request) -> web.Response:
    request.app[WORLD].problems.clear()
    return web.Response(status=204)


@routes.get("/_sandbox/gateway")
async def show_gateway(request: web.Request) -> web.Response:
    return _json(request, _gateway(request.app[GATEWAY]))


@routes.post("/_sandbox/reset")
async def reset(request: web.Request) -> web.Response:
    request.app[WORLD].reset()
    return web.Response(status=204)


@routes.put("/_sandbox/settings")
async def change_settings(request: web.Request) -> web.Response:
    world = request.app[WORLD]
    world.settings = _validated(Settings, world.settings.model_dump() | await _json_object(request))
    world.touch()
    return _json(request, world.settings.model_dump())


# Actors


@routes.post("/_sandbox/users/{name}/say")
async def say(request: web.Request) -> web.Response:
    wish = await _parse(Saying, request)
    message = _actor(request).say(wish.text, wish.reply_to, guild=wish.guild)
    return _json(request, message_view(request.app[WORLD], message))


@routes.post("/_sandbox/users/{name}/click")
async def click(request: web.Request) -> web.Response:
    wish = await _parse(Click, request)
    return _interaction(request, _actor(request).click(wish.message, wish.button, forged=wish.forged))


@routes.post("/_sandbox/users/{name}/select")
async def select(request: web.Request) -> web.Response:
    wish = await _parse(Selection, request)
    actor = _actor(request)
    return _interaction(request, actor.select(wish.message, wish.values, wish.custom_id, forged=wish.forged))


@routes.post("/_sandbox/users/{name}/slash")
async def slash(request: web.Request) -> web.Response:
    wish = await _parse(Slash, request)
    return _interaction(request, _actor(request).slash(wish.command, wish.options, guild=wish.guild))


@routes.post("/_sandbox/users/{name}/autocomplete")
async def autocomplete(request: web.Request) -> web.Response:
    wish = await _parse(Typing, request)
    actor = _actor(request)
    interaction = actor.autocomplete(wish.command, wish.option, wish.text, wish.options, guild=wish.guild)
    return _interaction(request, interaction)


@routes.post("/_sandbox/users/{name}/submit")
async def submit(request: web.Request) -> web.Response:
    wish = await _parse(Submission, request)
    return _interaction(request, _actor(request).submit(wish.interaction, wish.values))


# Faults


@routes.post("/_sandbox/faults")
async def plan_fault(request: web.Request) -> web.Response:
    request.app[WORLD].faults.plan(await _parse(Fault, request))
    return web.Response(status=204)


@routes.delete("/_sandbox/faults")
async def heal(request: web.Request) -> web.Response:
    request.app[WORLD].faults.clear()
    return web.Response(status=204)


@routes.post("/_sandbox/gateway/drop")
async def drop(request: web.Request) -> web.Response:
    request.app[GATEWAY].drop()
    return web.Response(status=204)


@routes.post("/_sandbox/gateway/reconnect")
async def ask_to_reconnect(request: web.Request) -> web.Response:
    request.app[GATEWAY].ask_to_reconnect()
    return web.Response(status=204)


@routes.post("/_sandbox/gateway/invalidate")
async def invalidate(request: web.Request) -> web.Response:
    request.app[GATEWAY].invalidate(resumable=(await _parse(Invalidation, request)).resumable)
    return web.Response(status=204)


@routes.post("/_sandbox/gateway/close")
async def close(request: web.Request) -> web.Response:
    request.app[GATEWAY].close((await _parse(Closure, request)).code)
    return web.Response(status=204)


@routes.post("/_sandbox/token/revoke")
async def revoke_token(request: web.Request) -> web.Response:
    request.app[WORLD].token_revoked = True
    request.app[GATEWAY].close(AUTHENTICATION_FAILED)
    return web.Response(status=204)


@routes.post("/_sandbox/token/restore")
async def restore_token(request: web.Request) -> web.Response:
    request.app[WORLD].token_revoked = False
    return web.Response(status=204)


# How things are shown


def message_view(world: World, message: Message) -> Json:
    """Discord's message, and what only the stand-in knows of it."""
    return {
        "message": render.message(world, message),
        "author": message.author.name,
        "by_bot": message.author.bot,
        "ephemeral": message.ephemeral,
        "loading": message.loading,
        "deleted": message.deleted,
        "reply_to": message.reply_to.id if message.reply_to else None,
        "interaction": message.interaction.id if message.interaction else None,
        "pings": message.pings,
        "history": message.history,
    }


def interaction_view(world: World, interaction: Interaction) -> Json:
    original = interaction.original
    return {
        "id": interaction.id,
        "token": interaction.token,
        "type": interaction.type,
        "user": interaction.user.name,
        "state": interaction.state,
        "acknowledged_after": interaction.acknowledged_after,
        "response_type": interaction.response_type,
        "settled": interaction.settled,
        "original": message_view(world, original) if original else None,
        "followups": [message_view(world, message) for message in interaction.followups],
        "modal": interaction.modal,
        "choices": interaction.choices,
    }


def _user(user: User) -> Json:
    return {"id": user.id, "name": user.name, "refuses": user.refuses}


def _exchange(exchange: Exchange) -> Json:
    return vars(exchange)


def _gateway(gateway: Gateway) -> Json:
    return {
        "bot": gateway.world.bot.name,
        "connections": len(gateway.connections),
        "identified": gateway.identified,
        "sessions": [
            {
                "id": session.id,
                "intents": session.intents,
                "sequence": session.sequence,
                "resumes": session.resumes,
                "connected": session.connection is not None,
            }
            for session in gateway.sessions.values()
        ],
    }


def _interaction(request: web.Request, interaction: Interaction) -> web.Response:
    return _json(request, interaction_view(request.app[WORLD], interaction))


def _json(request: web.Request, body: Any) -> web.Response:
    return web.json_response(body, headers={VERSION: str(request.app[WORLD].version)})


# What is asked for


@web.middleware
async def refuse_the_impossible(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except CannotDo as reason:
        raise _conflict(str(reason)) from None
    return response


def _actor(request: web.Request) -> Actor:
    actor = Actor.named(request.match_info["name"], request.app)
    if actor is None:
        raise web.HTTPNotFound(text="there is no such user\n")
    return actor


async def _parse(model: type[Model], request: web.Request) -> Model:
    return _validated(model, await _json_object(request))


def _validated(model: type[Model], value: dict[str, Any]) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise web.HTTPBadRequest(text="; ".join(problems) + "\n") from None


async def _json_object(request: web.Request) -> dict[str, Any]:
    try:
        value = await request.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object\n")
    return value


def _conflict(reason: str) -> web.HTTPConflict:
    return web.HTTPConflict(text=reason + "\n")
