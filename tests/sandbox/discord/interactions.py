"""The answers to interactions: the first one, what follows, and changes of both."""

import time
from collections.abc import Callable

from . import checks, render
from .calls import Answer, Call, id_in_path, require_own_application
from .checks import Callback, Choices, Modal, Reply, check
from .errors import (
    ALREADY_ACKNOWLEDGED,
    INVALID_WEBHOOK_TOKEN,
    UNKNOWN_INTERACTION,
    UNKNOWN_MESSAGE,
    UNKNOWN_WEBHOOK,
    DiscordError,
    Json,
    invalid_form,
)
from .messages import REPLY_TYPE, SUPPRESS_EMBEDS, SUPPRESS_NOTIFICATIONS, check_flags, delete, edit, fill, publish
from .state import AUTOCOMPLETE, COMMAND, COMPONENT, EPHEMERAL, LOADING, MODAL, Interaction, Message

COMMAND_REPLY_TYPE = 20

# Types of answers to interactions, and to which of them each may be one.
MESSAGE_ANSWER, DEFERRED_MESSAGE, DEFERRED_UPDATE, UPDATE, AUTOCOMPLETION, MODAL_ANSWER = 4, 5, 6, 7, 8, 9
ANSWERS = {
    COMMAND: {MESSAGE_ANSWER, DEFERRED_MESSAGE, MODAL_ANSWER},
    COMPONENT: {MESSAGE_ANSWER, DEFERRED_MESSAGE, DEFERRED_UPDATE, UPDATE, MODAL_ANSWER},
    AUTOCOMPLETE: {AUTOCOMPLETION},
    MODAL: {MESSAGE_ANSWER, DEFERRED_MESSAGE, DEFERRED_UPDATE, UPDATE},
}


def answer_interaction(call: Call) -> Answer:
    world = call.world
    interaction = world.interactions.get(id_in_path(call, "interaction_id"))
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
    check_flags(wish.flags, EPHEMERAL)
    message = _new_reply(call, interaction)
    message.flags = LOADING | (wish.flags or 0)
    publish(call, message)
    interaction.original = message


def _answer_silently(_call: Call, interaction: Interaction, data: Json | None) -> None:
    if data:
        raise invalid_form("data", "UNKNOWN_FIELD", "A deferred update has no data")
    interaction.original = interaction.message


def _answer_update(call: Call, interaction: Interaction, data: Json | None) -> None:
    assert interaction.message is not None
    edit(call, interaction.message, check(Reply, data if data is not None else {}, "data"))
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
    check_flags(wish.flags, EPHEMERAL | SUPPRESS_EMBEDS | SUPPRESS_NOTIFICATIONS)
    message.flags = wish.flags or 0
    fill(message, wish, notifies=True)
    publish(call, message)
    return message


def follow_up(call: Call) -> Answer:
    """Another answer; the first one after a deferred answer is that answer."""
    interaction = _answered_interaction(call)
    wish = check(Reply, call.body)
    interaction.settled = True
    if interaction.original is not None and interaction.original.loading and not interaction.original.deleted:
        edit(call, interaction.original, wish.model_copy(update={"flags": None}))
        return Answer(render.message(call.world, interaction.original))
    message = _reply(call, interaction, wish)
    interaction.followups.append(message)
    call.world.touch()
    return Answer(render.message(call.world, message))


def get_reply(call: Call) -> Answer:
    return Answer(render.message(call.world, _reply_of(call)))


def edit_reply(call: Call) -> Answer:
    message = _reply_of(call)
    edit(call, message, check(Reply, call.body))
    _answered_interaction(call).settled = True
    return Answer(render.message(call.world, message))


def delete_reply(call: Call) -> Answer:
    delete(call, _reply_of(call))
    return Answer()


def _answered_interaction(call: Call) -> Interaction:
    require_own_application(call, "application_id", UNKNOWN_WEBHOOK)
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
