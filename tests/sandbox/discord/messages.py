"""Channels and messages: what REST does to them, and whom a message notifies."""

import re
from datetime import UTC, datetime

from . import checks, render
from .calls import Answer, Call, id_in_path, number_in_query
from .checks import AllowedMentions, MessageEdit, NewChannel, NewMessage, check
from .errors import (
    DM_REFUSALS,
    EMPTY_MESSAGE,
    INVALID_RECIPIENT,
    NO_ACCESS,
    NOT_FOR_CHANNEL_TYPE,
    NOT_THE_AUTHOR,
    UNKNOWN_CHANNEL,
    UNKNOWN_MESSAGE,
    DiscordError,
    invalid_form,
)
from .state import LOADING, Channel, Message, World

MOST_MESSAGES = 100
SUPPRESS_EMBEDS, SUPPRESS_NOTIFICATIONS = 1 << 2, 1 << 12
REPLY_TYPE = 19


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
    limit = number_in_query(call, "limit", 50)
    if not 1 <= limit <= MOST_MESSAGES:
        raise invalid_form("limit", "NUMBER_TYPE_MIN", "int value should be from 1 to 100.")
    found = [message for message in call.world.messages_in(_channel(call)) if not message.ephemeral]
    place = number_in_query(call, places[0], 0) if places else 0
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
    check_flags(wish.flags, SUPPRESS_EMBEDS | SUPPRESS_NOTIFICATIONS)
    if wish.enforce_nonce and wish.nonce is not None:
        earlier = world.message_with_nonce(channel, wish.nonce)
        if earlier is not None:
            return Answer(render.message(world, earlier))
    message = Message(world.snowflake(), channel, world.bot, nonce=wish.nonce, flags=wish.flags or 0)
    message.reply_to = _referenced(call, channel, wish)
    message.type = REPLY_TYPE if message.reply_to else 0
    fill(message, wish, notifies=True)
    publish(call, message)
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
    edit(call, message, wish)
    return Answer(render.message(call.world, message))


def delete_message(call: Call) -> Answer:
    message = _message(call)
    if message.author is not call.world.bot:
        raise DiscordError(NOT_FOR_CHANNEL_TYPE)
    delete(call, message)
    return Answer()


def _channel(call: Call) -> Channel:
    channel = call.world.channels.get(id_in_path(call, "channel_id"))
    if channel is None or not channel.opened:
        raise DiscordError(UNKNOWN_CHANNEL)
    return channel


def _message(call: Call) -> Message:
    channel = _channel(call)
    message = call.world.messages.get(id_in_path(call, "message_id"))
    if message is None or message.channel is not channel or message.deleted or message.ephemeral:
        raise DiscordError(UNKNOWN_MESSAGE)
    return message


def _last_message_id(world: World, channel: Channel) -> str | None:
    return max((message.id for message in world.messages_in(channel)), key=int, default=None)


def _refuse_unwanted(channel: Channel) -> None:
    if channel.recipient is not None and channel.recipient.refuses is not None:
        raise DiscordError(DM_REFUSALS[channel.recipient.refuses])


def check_flags(flags: int | None, allowed: int) -> None:
    if flags is not None and flags & ~allowed:
        raise invalid_form("flags", "MESSAGE_FLAGS_INVALID", f"Of these flags, {flags & ~allowed} may not be set here")


def fill(message: Message, wish: MessageEdit, *, notifies: bool) -> None:
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


def publish(call: Call, message: Message) -> None:
    call.world.add_message(message)
    call.gateway.dispatch_message("MESSAGE_CREATE", message)


def edit(call: Call, message: Message, wish: MessageEdit) -> None:
    """Change it; the first edit of a deferred answer is that answer."""
    check_flags(wish.flags, SUPPRESS_EMBEDS | message.flags)
    before = render.message(call.world, message)
    fill(message, wish, notifies=message.loading)
    message.history.append(before)
    message.edited = None if message.loading else datetime.now(UTC)
    message.flags &= ~LOADING
    call.world.touch()
    call.gateway.dispatch_message("MESSAGE_UPDATE", message)


def delete(call: Call, message: Message) -> None:
    message.deleted = True
    call.world.touch()
    call.gateway.dispatch_deletion(message)
