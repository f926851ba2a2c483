"""REST version 10: the routes a bot in DMs uses, a journal of all requests, and what the bot asks of itself."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from . import commands, interactions, messages, render
from .calls import Answer, Call, id_in_path
from .errors import INVALID_JSON, NO_METHOD, NO_ROUTE, REVOKED, UNAUTHORIZED, UNKNOWN_USER, DiscordError, invalid_form
from .faults import Fault, json_answer, rate_limited, spoil
from .gateway import GATEWAY, PATH
from .state import WORLD, Exchange, World

BASE = "/api/v10"

Handler = Callable[[Call], Answer]


@dataclass(frozen=True)
class Route:
    """One route. `query` are the parameters it takes; `secret` says that its token is in its path."""

    method: str
    path: str
    handler: Handler
    query: tuple[str, ...] = ()
    body: bool = False
    secret: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


# Serving


def add_routes(app: web.Application) -> None:
    """All routes, and a refusal for everything else below the base."""
    for route in ROUTES:
        app.router.add_route(route.method, BASE + route.path, _endpoint(route))
    app.router.add_route("*", "/api/{rest:.*}", _no_route)


def _endpoint(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def serve(request: web.Request) -> web.StreamResponse:
        world = request.app[WORLD]
        exchange = Exchange(route.method, route.path, request.path, query=dict(request.query))
        world.journal.append(exchange)
        world.touch()
        fault = world.faults.take(route.name)
        try:
            answer = await _answer_or_fault(request, route, exchange, fault)
        except asyncio.CancelledError:
            exchange.lost = True
            world.touch()
            raise
        exchange.status = answer.status
        body = answer.body
        exchange.answer = json.loads(body) if isinstance(body, bytes) and body else None
        world.touch()
        return answer

    return serve


async def _answer_or_fault(request: web.Request, route: Route, exchange: Exchange, fault: Fault | None) -> web.Response:
    if fault is None:
        return await _answer(request, route, exchange)
    exchange.fault = f"{fault.kind} {fault.phase}"
    if fault.phase == "before":
        exchange.body = _decoded(await request.read())
        spoilt = await spoil(request, fault)
        return spoilt or await _answer(request, route, exchange)
    answer = await _answer(request, route, exchange)
    return await spoil(request, fault) or answer


async def _answer(request: web.Request, route: Route, exchange: Exchange) -> web.Response:
    world = request.app[WORLD]
    try:
        if not route.secret:
            _authorize(request, world)
            if _over_limit(world):
                world.problem(f"{route.name}: more than {world.settings.requests_per_second} requests in a second")
                return rate_limited(1.0, "global")
        _check_query(request, route)
        exchange.body = await _read_body(request, route)
        answer = route.handler(Call(world, request.app[GATEWAY], request, exchange.body))
    except DiscordError as error:
        if error.refusal.violation:
            world.problem(f"{route.name}: {error}")
        return json_answer(error.refusal.status, error.as_json())
    if answer.body is None:
        return web.Response(status=204, headers=_limit_headers())
    return json_answer(answer.status, answer.body, _limit_headers())


def _limit_headers() -> dict[str, str]:
    """What is left of a limit, which Discord tells with every answer; here there always is some."""
    return {
        "X-RateLimit-Limit": "5",
        "X-RateLimit-Remaining": "4",
        "X-RateLimit-Reset": f"{time.time() + 1:.3f}",
        "X-RateLimit-Reset-After": "1.000",
        "X-RateLimit-Bucket": "sandbox",
    }


async def _no_route(request: web.Request) -> web.StreamResponse:
    """Nothing is there, or nothing with this method."""
    world = request.app[WORLD]
    path = request.path.removeprefix(BASE)
    refusal = NO_METHOD if any(_matches(route.path, path) for route in ROUTES) else NO_ROUTE
    world.problem(f"{request.method} {request.path}: {refusal.message}")
    answer = {"message": refusal.message, "code": refusal.code}
    world.journal.append(Exchange(request.method, "", request.path, status=refusal.status, answer=answer))
    return json_answer(refusal.status, answer)


def _matches(template: str, path: str) -> bool:
    pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
    return re.fullmatch(pattern, path) is not None


def _authorize(request: web.Request, world: World) -> None:
    known = request.headers.get("Authorization") == f"Bot {world.token}"
    if known and world.token_revoked:
        raise DiscordError(REVOKED)
    if not known:
        raise DiscordError(UNAUTHORIZED)


def _over_limit(world: World) -> bool:
    now, recent = time.monotonic(), world.recent_requests
    while recent and recent[0] <= now - 1:
        recent.popleft()
    if len(recent) >= world.settings.requests_per_second:
        return True
    recent.append(now)
    return False


def _check_query(request: web.Request, route: Route) -> None:
    for name in request.query:
        if name not in route.query:
            raise invalid_form(name, "UNKNOWN_FIELD", "The route takes no such parameter")


async def _read_body(request: web.Request, route: Route) -> object:
    raw = await request.read()
    if not route.body:
        if raw:
            raise invalid_form("", "BASE_TYPE_INVALID", "The route takes no body")
        return None
    if request.headers.get("Content-Type") != "application/json":
        wanted = "Expected \"Content-Type\" header to be one of {'application/json'}."
        raise invalid_form("", "CONTENT_TYPE_INVALID", wanted)
    try:
        return json.loads(raw)
    except ValueError:
        raise DiscordError(INVALID_JSON) from None


def _decoded(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except ValueError:
        return None


# The bot itself


def get_gateway(call: Call) -> Answer:
    return Answer({"url": f"ws://{call.request.host}{PATH}"})


def get_bot_gateway(call: Call) -> Answer:
    limit = {"total": 1000, "remaining": 999, "reset_after": 86_400_000, "max_concurrency": 1}
    return Answer({"url": f"ws://{call.request.host}{PATH}", "shards": 1, "session_start_limit": limit})


def get_own_user(call: Call) -> Answer:
    return Answer(render.own_user(call.world.bot))


def get_application(call: Call) -> Answer:
    return Answer(render.application(call.world))


def get_user(call: Call) -> Answer:
    user_id = id_in_path(call, "user_id")
    if user_id == call.world.bot.id:
        return Answer(render.user(call.world.bot))
    if user_id not in call.world.users:
        raise DiscordError(UNKNOWN_USER)
    return Answer(render.user(call.world.users[user_id]))


# All routes

_COMMANDS = "/applications/{application_id}/commands"
_GUILD_COMMANDS = "/applications/{application_id}/guilds/{guild_id}/commands"
_MESSAGES = "/channels/{channel_id}/messages"
_MESSAGE = "/channels/{channel_id}/messages/{message_id}"
_WEBHOOK = "/webhooks/{application_id}/{token}"
_ORIGINAL = f"{_WEBHOOK}/messages/@original"
_FOLLOWUP = f"{_WEBHOOK}/messages/{{message_id}}"
_CALLBACK = "/interactions/{interaction_id}/{token}/callback"

ROUTES = (
    Route("GET", "/gateway", get_gateway),
    Route("GET", "/gateway/bot", get_bot_gateway),
    Route("GET", "/users/@me", get_own_user),
    Route("GET", "/users/{user_id}", get_user),
    Route("GET", "/oauth2/applications/@me", get_application),
    Route("GET", "/applications/@me", get_application),
    Route("POST", "/users/@me/channels", messages.open_channel, body=True),
    Route("GET", "/channels/{channel_id}", messages.get_channel),
    Route("POST", "/channels/{channel_id}/typing", messages.type_in_channel),
    Route("GET", _MESSAGES, messages.list_messages, query=("around", "before", "after", "limit")),
    Route("POST", _MESSAGES, messages.create_message, body=True),
    Route("GET", _MESSAGE, messages.get_message),
    Route("PATCH", _MESSAGE, messages.edit_message, body=True),
    Route("DELETE", _MESSAGE, messages.delete_message),
    *(
        route
        for path in (_COMMANDS, _GUILD_COMMANDS)
        for route in (
            Route("GET", path, commands.list_commands, query=("with_localizations",)),
            Route("PUT", path, commands.replace_commands, body=True),
            Route("POST", path, commands.create_command, body=True),
            Route("GET", f"{path}/{{command_id}}", commands.get_command),
            Route("PATCH", f"{path}/{{command_id}}", commands.edit_command, body=True),
            Route("DELETE", f"{path}/{{command_id}}", commands.delete_command),
        )
    ),
    Route("POST", _CALLBACK, interactions.answer_interaction, query=("with_response",), body=True, secret=True),
    Route("POST", _WEBHOOK, interactions.follow_up, query=("wait", "with_components"), body=True, secret=True),
    *(
        route
        for path in (_ORIGINAL, _FOLLOWUP)
        for route in (
            Route("GET", path, interactions.get_reply, secret=True),
            Route("PATCH", path, interactions.edit_reply, query=("with_components",), body=True, secret=True),
            Route("DELETE", path, interactions.delete_reply, secret=True),
        )
    ),
)
