"""REST version 10: the routes a bot in DMs uses, each checked as Discord checks it, and a journal of all requests."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from aiohttp import web

from . import checks, render
from .checks import (
    AllowedMentions,
    Callback,
    Choices,
    Command,
    Commands,
    MessageEdit,
    Modal,
    NewChannel,
    NewMessage,
    Reply,
    check,
)
from .errors import (
    ALREADY_ACKNOWLEDGED,
    DM_REFUSALS,
    EMPTY_MESSAGE,
    INVALID_JSON,
    INVALID_RECIPIENT,
    INVALID_WEBHOOK_TOKEN,
    NO_ACCESS,
    NO_METHOD,
    NO_ROUTE,
    NOT_FOR_CHANNEL_TYPE,
    NOT_THE_AUTHOR,
    REVOKED,
    TOO_MANY_COMMANDS,
    UNAUTHORIZED,
    UNKNOWN_APPLICATION,
    UNKNOWN_CHANNEL,
    UNKNOWN_COMMAND,
    UNKNOWN_GUILD,
    UNKNOWN_INTERACTION,
    UNKNOWN_MESSAGE,
    UNKNOWN_USER,
    UNKNOWN_WEBHOOK,
    DiscordError,
    Json,
    Refusal,
    invalid_form,
)
from .faults import Fault, json_answer, rate_limited, spoil
from .gateway import GATEWAY, PATH, Gateway
from .state import (
    APPLICATION_ID,
    AUTOCOMPLETE,
    COMMAND,
    COMPONENT,
    EPHEMERAL,
    GUILD_ID,
    LOADING,
    MODAL,
    WORLD,
    Channel,
    Exchange,
    Interaction,
    Message,
    World,
)

BASE = "/api/v10"
MOST_COMMANDS = 100
MOST_MESSAGES = 100
SUPPRESS_EMBEDS, SUPPRESS_NOTIFICATIONS = 1 << 2, 1 << 12

# Types of messages.
REPLY_TYPE, COMMAND_REPLY_TYPE = 19, 20

# Types of answers to interactions, and to which of them each may be one.
MESSAGE_ANSWER, DEFERRED_MESSAGE, DEFERRED_UPDATE, UPDATE, AUTOCOMPLETION, MODAL_ANSWER = 4, 5, 6, 7, 8, 9
ANSWERS = {
    COMMAND: {MESSAGE_ANSWER, DEFERRED_MESSAGE, MODAL_ANSWER},
    COMPONENT: {MESSAGE_ANSWER, DEFERRED_MESSAGE, DEFERRED_UPDATE, UPDATE, MODAL_ANSWER},
    AUTOCOMPLETE: {AUTOCOMPLETION},
    MODAL: {MESSAGE_ANSWER, DEFERRED_MESSAGE, DEFERRED_UPDATE, UPDATE},
}


@dataclass(frozen=True)
class Answer:
    """What a handler answers; without a body: 204."""

    body: object = None
    status: int = 200


@dataclass(frozen=True)
class Call:
    """One authorized request, as its handler gets it."""

    world: World
    gateway: Gateway
    request: web.Request
    body: object

    def part(self, name: str) -> str:
        """A part of the path."""
        return self.request.match_info[name]


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
    user_id = _id_in_path(call, "user_id")
    if user_id == call.world.bot.id:
        return Answer(render.user(call.world.bot))
    if user_id not in call.world.users:
        raise DiscordError(UNKNOWN_USER)
    return Answer(render.user(call.world.users[user_id]))


# Channels and messages


def open_channel(call: Call) -> Answer:
    """The DM with a user: the same for ever. A user who refuses DMs refuses the message only."""
    wish = check(NewChannel, call.body)
    user = call.world.users.get(wish.recipient_id)
    if user is None:
        raise DiscordError(INVALID_RECIPIENT)
    channel = call.world.dm_with(user)
    channel.opened = True
    return Answer(render.channel(channel, _last_message_id(call.world, channel)))


def get_channel(call: Call) -> Answer:
    channel = _channel(call)
    return Answer(render.channel(channel, _last_message_id(call.world, channel)))


def type_in_channel(call: Call) -> Answer:
    _refuse_unwanted(_channel(call))
    return Answer()


def list_messages(call: Call) -> Answer:
    """The newest, or those nearest to one, always newest first."""
    places = [name for name in ("around", "before", "after") if name in call.request.query]
    if len(places) > 1:
        raise invalid_form(places[1], "MUTUALLY_EXCLUSIVE", "around, before and after are mutually exclusive")
    limit = _number_in_query(call, "limit", 50)
    if not 1 <= limit <= MOST_MESSAGES:
        raise invalid_form("limit", "NUMBER_TYPE_MIN", "int value should be from 1 to 100.")
    found = [message for message in call.world.messages_in(_channel(call)) if not message.ephemeral]
    place = _number_in_query(call, places[0], 0) if places else 0
    chosen = _nearest(found, places[0] if places else None, place, limit)
    return Answer([render.message(call.world, message) for message in reversed(chosen)])


def _nearest(found: list[Message], place: str | None, message_id: int, limit: int) -> list[Message]:
    older = [message for message in found if int(message.id) < message_id]
    newer = [message for message in found if int(message.id) > message_id]
    if place == "after":
        return newer[:limit]
    if place == "before":
        return older[-limit:]
    if place == "around":
        itself = [message for message in found if int(message.id) == message_id]
        half = limit // 2
        return older[len(older) - min(half, len(older)) :] + itself + newer[: limit - half - len(itself)]
    return found[-limit:]


def get_message(call: Call) -> Answer:
    return Answer(render.message(call.world, _message(call)))


def create_message(call: Call) -> Answer:
    world, channel = call.world, _channel(call)
    wish = check(NewMessage, call.body)
    if channel.recipient is None and not world.settings.guild:
        raise DiscordError(NO_ACCESS)
    _refuse_unwanted(channel)
    _check_flags(wish.flags, SUPPRESS_EMBEDS | SUPPRESS_NOTIFICATIONS)
    if wish.enforce_nonce and wish.nonce is not None:
        earlier = world.message_with_nonce(channel, wish.nonce)
        if earlier is not None:
            return Answer(render.message(world, earlier))
    message = Message(world.snowflake(), channel, world.bot, nonce=wish.nonce, flags=wish.flags or 0)
    message.reply_to = _referenced(call, channel, wish)
    message.type = REPLY_TYPE if message.reply_to else 0
    _fill(message, wish, notifies=True)
    _publish(call, message)
    return Answer(render.message(world, message))


def _referenced(call: Call, channel: Channel, wish: NewMessage) -> Message | None:
    reference = wish.message_reference
    if reference is None:
        return None
    if reference.channel_id not in (None, channel.id):
        raise invalid_form("message_reference", "REPLIES_CANNOT_REFERENCE_OTHER_CHANNEL", "Not in this channel")
    message = call.world.messages.get(reference.message_id)
    if message is not None and message.channel is channel and not message.deleted and not message.ephemeral:
        return message
    if reference.fail_if_not_exists is False:
        return None
    raise invalid_form("message_reference", "REPLIES_UNKNOWN_MESSAGE", "Unknown message")


def edit_message(call: Call) -> Answer:
    message = _message(call)
    wish = check(MessageEdit, call.body)
    if message.author is not call.world.bot:
        raise DiscordError(NOT_THE_AUTHOR)
    _edit(call, message, wish)
    return Answer(render.message(call.world, message))


def delete_message(call: Call) -> Answer:
    message = _message(call)
    if message.author is not call.world.bot:
        raise DiscordError(NOT_FOR_CHANNEL_TYPE)
    _delete(call, message)
    return Answer()


def _channel(call: Call) -> Channel:
    channel = call.world.channels.get(_id_in_path(call, "channel_id"))
    if channel is None or not channel.opened:
        raise DiscordError(UNKNOWN_CHANNEL)
    return channel


def _message(call: Call) -> Message:
    channel = _channel(call)
    message = call.world.messages.get(_id_in_path(call, "message_id"))
    if message is None or message.channel is not channel or message.deleted or message.ephemeral:
        raise DiscordError(UNKNOWN_MESSAGE)
    return message


def _last_message_id(world: World, channel: Channel) -> str | None:
    return max((message.id for message in world.messages_in(channel)), key=int, default=None)


def _refuse_unwanted(channel: Channel) -> None:
    if channel.recipient is not None and channel.recipient.refuses is not None:
        raise DiscordError(DM_REFUSALS[channel.recipient.refuses])


def _check_flags(flags: int | None, allowed: int) -> None:
    if flags is not None and flags & ~allowed:
        raise invalid_form("flags", "MESSAGE_FLAGS_INVALID", f"Of these flags, {flags & ~allowed} may not be set here")


def _fill(message: Message, wish: MessageEdit, *, notifies: bool) -> None:
    """Put in what the bot sent; what it did not send stays. Nobody is notified of a change."""
    content = (wish.content or "").strip() if "content" in wish.model_fields_set else message.content
    embeds, components = message.embeds, message.components
    if "embeds" in wish.model_fields_set:
        embeds = [embed.as_answered() for embed in wish.embeds or []]
    if "components" in wish.model_fields_set:
        components = checks.answered_components(wish.components or [])
    if not (content or embeds or components):
        raise DiscordError(EMPTY_MESSAGE)
    message.content, message.embeds, message.components = content, embeds, components
    if notifies:
        message.pings = _pings(message, wish.allowed_mentions)


_MENTION = re.compile(r"@everyone|@here|<@!?(?P<user>\d+)>|<@&(?P<role>\d+)>")


def _pings(message: Message, allowed: AllowedMentions | None) -> list[str]:
    """Whom the message notifies: those its content mentions, as far as the bot allows it (by default all)."""
    kinds = ["users", "roles", "everyone"] if allowed is None else allowed.parse or []
    users = (allowed and allowed.users) or []
    roles = (allowed and allowed.roles) or []
    found = set()
    for mention in _MENTION.finditer(message.content):
        user, role = mention["user"], mention["role"]
        if user and ("users" in kinds or user in users):
            found.add(f"<@{user}>")
        elif role and ("roles" in kinds or role in roles):
            found.add(f"<@&{role}>")
        elif not user and not role and "everyone" in kinds:
            found.add(mention[0])
    replied_user = allowed is None or allowed.replied_user
    if message.reply_to is not None and replied_user and message.interaction is None:
        found.add(f"<@{message.reply_to.author.id}>")
    return sorted(found)


def _publish(call: Call, message: Message) -> None:
    call.world.add_message(message)
    call.gateway.dispatch_message("MESSAGE_CREATE", message)


def _edit(call: Call, message: Message, wish: MessageEdit) -> None:
    """Change it; the first edit of a deferred answer is that answer."""
    _check_flags(wish.flags, SUPPRESS_EMBEDS | message.flags)
    before = render.message(call.world, message)
    _fill(message, wish, notifies=message.loading)
    message.history.append(before)
    message.edited = None if message.loading else datetime.now(UTC)
    message.flags &= ~LOADING
    call.world.touch()
    call.gateway.dispatch_message("MESSAGE_UPDATE", message)


def _delete(call: Call, message: Message) -> None:
    message.deleted = True
    call.world.touch()
    call.gateway.dispatch_deletion(message)


# Commands


def list_commands(call: Call) -> Answer:
    full = call.request.query.get("with_localizations") in ("1", "true", "True")
    return Answer([_with_localizations(command, full) for command in _commands(call).values()])


def _with_localizations(command: Json, full: bool) -> Json:
    hidden = () if full else ("name_localizations", "description_localizations")
    return {name: value for name, value in command.items() if name not in hidden}


def replace_commands(call: Call) -> Answer:
    """Those that keep their name keep their id."""
    wishes = check(Commands, call.body)
    if len(wishes) > MOST_COMMANDS:
        raise DiscordError(TOO_MANY_COMMANDS)
    registered = _commands(call)
    before = {command["name"]: command for command in registered.values()}
    replaced = [_registered(call, wish, before.get(wish.name)) for wish in wishes]
    registered.clear()
    registered.update({command["id"]: command for command in replaced})
    call.world.touch()
    return Answer(replaced)


def create_command(call: Call) -> Answer:
    wish = check(Command, call.body)
    registered = _commands(call)
    before = next((command for command in registered.values() if command["name"] == wish.name), None)
    if before is None and len(registered) >= MOST_COMMANDS:
        raise DiscordError(TOO_MANY_COMMANDS)
    command = _registered(call, wish, before)
    registered[command["id"]] = command
    call.world.touch()
    return Answer(command, status=200 if before else 201)


def get_command(call: Call) -> Answer:
    return Answer(_command(call))


def edit_command(call: Call) -> Answer:
    before = _command(call)
    body = call.body if isinstance(call.body, dict) else {}
    known = {name: before[name] for name in Command.model_fields if name in before}
    command = _registered(call, check(Command, known | body), before)
    _commands(call)[command["id"]] = command
    call.world.touch()
    return Answer(command)


def delete_command(call: Call) -> Answer:
    del _commands(call)[_command(call)["id"]]
    call.world.touch()
    return Answer()


def _commands(call: Call) -> dict[str, Json]:
    _own_application(call, "application_id", UNKNOWN_APPLICATION)
    guild_id = call.request.match_info.get("guild_id")
    if guild_id is not None and (guild_id != GUILD_ID or not call.world.settings.guild):
        raise DiscordError(NO_ACCESS if guild_id == GUILD_ID else UNKNOWN_GUILD)
    return call.world.commands[guild_id]


def _command(call: Call) -> Json:
    commands = _commands(call)
    command_id = _id_in_path(call, "command_id")
    if command_id not in commands:
        raise DiscordError(UNKNOWN_COMMAND)
    return commands[command_id]


def _registered(call: Call, wish: Command, before: Json | None) -> Json:
    guild_id = call.request.match_info.get("guild_id")
    ids = {"id": before["id"] if before else call.world.snowflake(), "application_id": APPLICATION_ID}
    return ids | {"version": call.world.snowflake()} | wish.as_answered() | ({"guild_id": guild_id} if guild_id else {})


# Interactions


def answer_interaction(call: Call) -> Answer:
    world = call.world
    interaction = world.interactions.get(_id_in_path(call, "interaction_id"))
    if interaction is None or interaction.token != call.part("token") or interaction.state == "failed":
        raise DiscordError(UNKNOWN_INTERACTION)
    if interaction.state == "acknowledged":
        raise DiscordError(ALREADY_ACKNOWLEDGED)
    callback = check(Callback, call.body)
    _check_answer_type(interaction, callback.type)
    _ANSWERS[callback.type](call, interaction, callback.data)
    interaction.state = "acknowledged"
    interaction.response_type = callback.type
    interaction.acknowledged_after = time.monotonic() - interaction.created
    interaction.settled = callback.type not in (DEFERRED_MESSAGE, DEFERRED_UPDATE)
    world.touch()
    with_response = call.request.query.get("with_response") in ("1", "true", "True")
    return Answer(render.interaction_callback(world, interaction)) if with_response else Answer()


def _check_answer_type(interaction: Interaction, kind: int) -> None:
    allowed = set(ANSWERS[interaction.type])
    if interaction.type == MODAL and interaction.message is None:
        allowed -= {UPDATE, DEFERRED_UPDATE}
    if kind not in allowed:
        raise invalid_form("type", "INTERACTION_CALLBACK_TYPE_INVALID", f"Not an answer to type {interaction.type}")


def _answer_message(call: Call, interaction: Interaction, data: Json | None) -> None:
    wish = check(Reply, data if data is not None else {}, "data")
    interaction.original = _reply(call, interaction, wish)


def _answer_later(call: Call, interaction: Interaction, data: Json | None) -> None:
    wish = check(Reply, data if data is not None else {}, "data")
    if wish.model_fields_set - {"flags"}:
        raise invalid_form("data", "UNKNOWN_FIELD", "A deferred answer has flags only")
    _check_flags(wish.flags, EPHEMERAL)
    message = _new_reply(call, interaction)
    message.flags = LOADING | (wish.flags or 0)
    _publish(call, message)
    interaction.original = message


def _answer_silently(_call: Call, interaction: Interaction, data: Json | None) -> None:
    if data:
        raise invalid_form("data", "UNKNOWN_FIELD", "A deferred update has no data")
    interaction.original = interaction.message


def _answer_update(call: Call, interaction: Interaction, data: Json | None) -> None:
    assert interaction.message is not None
    _edit(call, interaction.message, check(Reply, data if data is not None else {}, "data"))
    interaction.original = interaction.message


def _answer_choices(call: Call, interaction: Interaction, data: Json | None) -> None:
    wish = check(Choices, data, "data")
    option = next(option for option in _walk_options(interaction.data["options"]) if option.get("focused"))
    for number, choice in enumerate(wish.choices):
        if isinstance(choice.value, str) != (option["type"] == checks.STRING_OPTION):
            raise invalid_form(f"data.choices.{number}.value", "BASE_TYPE_INVALID", "Not of the option's type")
    interaction.choices = [choice.model_dump(exclude_none=True) for choice in wish.choices]


def _walk_options(options: list[Json]) -> list[Json]:
    return [inner for option in options for inner in (option, *_walk_options(option.get("options", [])))]


def _answer_modal(_call: Call, interaction: Interaction, data: Json | None) -> None:
    interaction.modal = check(Modal, data, "data").as_shown()


_ANSWERS: dict[int, Callable[[Call, Interaction, Json | None], None]] = {
    MESSAGE_ANSWER: _answer_message,
    DEFERRED_MESSAGE: _answer_later,
    DEFERRED_UPDATE: _answer_silently,
    UPDATE: _answer_update,
    AUTOCOMPLETION: _answer_choices,
    MODAL_ANSWER: _answer_modal,
}


def _new_reply(call: Call, interaction: Interaction) -> Message:
    message = Message(call.world.snowflake(), interaction.channel, call.world.bot, interaction=interaction)
    if interaction.type == COMPONENT:
        message.type, message.reply_to = REPLY_TYPE, interaction.message
    elif interaction.type == COMMAND:
        message.type = COMMAND_REPLY_TYPE
    return message


def _reply(call: Call, interaction: Interaction, wish: Reply) -> Message:
    message = _new_reply(call, interaction)
    _check_flags(wish.flags, EPHEMERAL | SUPPRESS_EMBEDS | SUPPRESS_NOTIFICATIONS)
    message.flags = wish.flags or 0
    _fill(message, wish, notifies=True)
    _publish(call, message)
    return message


def follow_up(call: Call) -> Answer:
    """Another answer; the first one after a deferred answer is that answer."""
    interaction = _answered_interaction(call)
    wish = check(Reply, call.body)
    interaction.settled = True
    if interaction.original is not None and interaction.original.loading and not interaction.original.deleted:
        edit = wish.model_copy(update={"flags": None})
        _edit(call, interaction.original, edit)
        return Answer(render.message(call.world, interaction.original))
    message = _reply(call, interaction, wish)
    interaction.followups.append(message)
    call.world.touch()
    return Answer(render.message(call.world, message))


def get_reply(call: Call) -> Answer:
    return Answer(render.message(call.world, _reply_of(call)))


def edit_reply(call: Call) -> Answer:
    message = _reply_of(call)
    _edit(call, message, check(Reply, call.body))
    _answered_interaction(call).settled = True
    return Answer(render.message(call.world, message))


def delete_reply(call: Call) -> Answer:
    _delete(call, _reply_of(call))
    return Answer()


def _answered_interaction(call: Call) -> Interaction:
    _own_application(call, "application_id", UNKNOWN_WEBHOOK)
    interaction = call.world.interaction_with_token(call.part("token"))
    if interaction is None or interaction.state != "acknowledged" or interaction.type == AUTOCOMPLETE:
        raise DiscordError(UNKNOWN_WEBHOOK)
    if time.monotonic() > interaction.created + call.world.settings.token_lifetime:
        raise DiscordError(INVALID_WEBHOOK_TOKEN)
    return interaction


def _reply_of(call: Call) -> Message:
    interaction = _answered_interaction(call)
    wanted = call.request.match_info.get("message_id")
    candidates = [interaction.original] if wanted is None else [interaction.original, *interaction.followups]
    for message in candidates:
        if message is not None and not message.deleted and wanted in (None, message.id):
            return message
    raise DiscordError(UNKNOWN_MESSAGE)


# Parts of requests


def _id_in_path(call: Call, name: str) -> str:
    value = call.part(name)
    if not (value.isascii() and value.isdecimal() and int(value) < 1 << 64):
        raise invalid_form(name, "NUMBER_TYPE_COERCE", f'Value "{value}" is not snowflake.')
    return value


def _own_application(call: Call, name: str, otherwise: Refusal) -> None:
    if _id_in_path(call, name) != APPLICATION_ID:
        raise DiscordError(otherwise)


def _number_in_query(call: Call, name: str, default: int) -> int:
    value = call.request.query.get(name, str(default))
    if not (value.isascii() and value.isdecimal()):
        raise invalid_form(name, "NUMBER_TYPE_COERCE", f'Value "{value}" is not int.')
    return int(value)


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
    Route("POST", "/users/@me/channels", open_channel, body=True),
    Route("GET", "/channels/{channel_id}", get_channel),
    Route("POST", "/channels/{channel_id}/typing", type_in_channel),
    Route("GET", _MESSAGES, list_messages, query=("around", "before", "after", "limit")),
    Route("POST", _MESSAGES, create_message, body=True),
    Route("GET", _MESSAGE, get_message),
    Route("PATCH", _MESSAGE, edit_message, body=True),
    Route("DELETE", _MESSAGE, delete_message),
    *(
        route
        for path in (_COMMANDS, _GUILD_COMMANDS)
        for route in (
            Route("GET", path, list_commands, query=("with_localizations",)),
            Route("PUT", path, replace_commands, body=True),
            Route("POST", path, create_command, body=True),
            Route("GET", f"{path}/{{command_id}}", get_command),
            Route("PATCH", f"{path}/{{command_id}}", edit_command, body=True),
            Route("DELETE", f"{path}/{{command_id}}", delete_command),
        )
    ),
    Route("POST", _CALLBACK, answer_interaction, query=("with_response",), body=True, secret=True),
    Route("POST", _WEBHOOK, follow_up, query=("wait", "with_components"), body=True, secret=True),
    *(
        route
        for path in (_ORIGINAL, _FOLLOWUP)
        for route in (
            Route("GET", path, get_reply, secret=True),
            Route("PATCH", path, edit_reply, query=("with_components",), body=True, secret=True),
            Route("DELETE", path, delete_reply, secret=True),
        )
    ),
)
