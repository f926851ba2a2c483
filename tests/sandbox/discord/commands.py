"""The registration of slash commands, everywhere or in the guild."""

from .calls import Answer, Call, id_in_path, require_own_application
from .checks import Command, Commands, check
from .errors import (
    NO_ACCESS,
    TOO_MANY_COMMANDS,
    UNKNOWN_APPLICATION,
    UNKNOWN_COMMAND,
    UNKNOWN_GUILD,
    DiscordError,
    Json,
)
from .state import APPLICATION_ID, GUILD_ID

MOST_COMMANDS = 100


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
    require_own_application(call, "application_id", UNKNOWN_APPLICATION)
    guild_id = call.request.match_info.get("guild_id")
    if guild_id is not None and (guild_id != GUILD_ID or not call.world.settings.guild):
        raise DiscordError(NO_ACCESS if guild_id == GUILD_ID else UNKNOWN_GUILD)
    return call.world.commands[guild_id]


def _command(call: Call) -> Json:
    commands = _commands(call)
    command_id = id_in_path(call, "command_id")
    if command_id not in commands:
        raise DiscordError(UNKNOWN_COMMAND)
    return commands[command_id]


def _registered(call: Call, wish: Command, before: Json | None) -> Json:
    guild_id = call.request.match_info.get("guild_id")
    ids = {"id": before["id"] if before else call.world.snowflake(), "application_id": APPLICATION_ID}
    return ids | {"version": call.world.snowflake()} | wish.as_answered() | ({"guild_id": guild_id} if guild_id else {})
