"""What people do: they write, click, choose and fill in, as far as a real client would let them.

What a client would not let them do raises CannotDo. `forged` stands for somebody with a client of their own making:
it sends what no real one would, such as a click on what is another's, disabled, or no longer there.
"""

from dataclasses import dataclass
from typing import Any

from aiohttp import web

from . import checks
from .errors import Json
from .gateway import GATEWAY, Gateway
from .render import DM_CONTEXT, GUILD_CONTEXT, interaction_event, member
from .render import user as render_user
from .state import (
    AUTOCOMPLETE,
    COMMAND,
    COMPONENT,
    GUILD_ID,
    MODAL,
    WORLD,
    Channel,
    Interaction,
    Message,
    User,
    World,
)

REPLY_TYPE = 19
LONGEST_VALUE = 6000
GUILD_INSTALL = 0


class CannotDo(Exception):
    """No real client could do that now; its text says why."""


@dataclass(frozen=True)
class Actor:
    """A user at their client."""

    user: User
    world: World
    gateway: Gateway

    @classmethod
    def named(cls, name: str, app: web.Application) -> "Actor | None":
        user = app[WORLD].user_named(name)
        return cls(user, app[WORLD], app[GATEWAY]) if user else None

    def messages(self, *, guild: bool = False) -> list[Message]:
        """What they see in the DM with the bot, or in the guild's channel."""
        channel = self._channel(guild)
        return [message for message in self.world.messages_in(channel) if message.visible_to(self.user)]

    def say(self, text: str, reply_to: str | None = None, *, guild: bool = False) -> Message:
        """Write to the bot, or into the guild's channel."""
        channel = self._channel(guild)
        if not 1 <= len(text.strip()) <= checks.LONGEST_CONTENT:
            raise CannotDo("a message has 1 to 2,000 characters")
        answered = self._visible(reply_to) if reply_to is not None else None
        if answered is not None and (answered.ephemeral or answered.channel is not channel):
            raise CannotDo("only a message of the same channel, and none that is ephemeral, can be replied to")
        message = Message(self.world.snowflake(), channel, self.user, text.strip(), reply_to=answered)
        message.type = REPLY_TYPE if answered else 0
        self.world.add_message(message)
        self.gateway.dispatch_message("MESSAGE_CREATE", message)
        return message

    def click(self, message_id: str, button: str, *, forged: bool = False) -> Interaction:
        """Click a button by its custom_id or label."""
        message = self._reachable(message_id, forged=forged)
        buttons = _components(message, checks.BUTTON)
        found = [each for each in buttons if button in (each.get("custom_id"), each.get("label"))]
        if forged and not found:
            found = [{"custom_id": button, "id": 0}]
        if len(found) != 1:
            shown = ", ".join(repr(each.get("label")) for each in buttons)
            raise CannotDo(f"the message shows {len(found)} buttons {button!r}, but {shown or 'none'}")
        if found[0].get("disabled") and not forged:
            raise CannotDo(f"the button {button!r} is disabled")
        if "custom_id" not in found[0]:
            raise CannotDo(f"the button {button!r} leads to a page and tells the bot nothing")
        return self._interact_with(message, checks.BUTTON, found[0])

    def select(
        self, message_id: str, values: list[str], custom_id: str | None = None, *, forged: bool = False
    ) -> Interaction:
        """Choose values (or labels) in the message's menu, which is named when there are several."""
        message = self._reachable(message_id, forged=forged)
        menus = [menu for menu in _components(message, checks.STRING_SELECT) if custom_id in (None, menu["custom_id"])]
        if forged and custom_id is not None and not menus:
            menus = [{"custom_id": custom_id, "id": 0, "options": []}]
        if len(menus) != 1:
            raise CannotDo(f"the message shows {len(menus)} such menus")
        chosen = values if forged else _choose(menus[0], values)
        return self._interact_with(message, checks.STRING_SELECT, menus[0], values=chosen)

    def slash(self, command: str, options: dict[str, Any], *, guild: bool = False) -> Interaction:
        """Use a command, as `keys add`, with all its options."""
        registered, path = self._command(command, guild)
        offered = {option["name"]: option for option in path[-1].get("options", [])}
        if unknown := set(options) - set(offered):
            raise CannotDo(f"/{command} has no options {', '.join(sorted(unknown))}")
        missing = [name for name, option in offered.items() if option.get("required") and name not in options]
        if missing:
            raise CannotDo(f"/{command} needs {', '.join(missing)}")
        given = [self._given(offered[name], value) for name, value in options.items()]
        return self._interact(COMMAND, self._channel(guild), self._invocation(registered, path, given, options, guild))

    def autocomplete(
        self, command: str, option: str, text: str, options: dict[str, Any], *, guild: bool = False
    ) -> Interaction:
        """Type into an option; `options` are those filled in already."""
        registered, path = self._command(command, guild)
        offered = {each["name"]: each for each in path[-1].get("options", [])}
        if not offered.get(option, {}).get("autocomplete"):
            raise CannotDo(f"/{command} completes no option {option!r}")
        if unknown := set(options) - set(offered) - {option}:
            raise CannotDo(f"/{command} has no options {', '.join(sorted(unknown))}")
        given = [self._given(offered[name], value) for name, value in options.items() if name != option]
        given.append({"type": offered[option]["type"], "name": option, "value": text, "focused": True})
        data = self._invocation(registered, path, given, {}, guild)
        return self._interact(AUTOCOMPLETE, self._channel(guild), data)

    def submit(self, interaction_id: str, values: dict[str, str | list[str]]) -> Interaction:
        """Send the modal that an interaction was answered with; texts by custom_id or label, choices as lists."""
        opener = self.world.interactions.get(interaction_id)
        if opener is None or opener.user is not self.user or opener.modal is None:
            raise CannotDo("no such modal is open")
        earlier = [each for each in self.world.interactions.values() if each.parent is opener]
        if any(each.state != "failed" for each in earlier):
            raise CannotDo("the modal was sent already")
        modal = opener.modal
        known = {name for part in modal["components"] for name in _names(part)}
        if unknown := set(values) - known:
            raise CannotDo(f"the modal has no fields {', '.join(sorted(unknown))}")
        components = [_submitted(part, values) for part in modal["components"]]
        data = {"custom_id": modal["custom_id"], "components": components}
        return self._interact(MODAL, opener.channel, data, message=opener.message, parent=opener)

    # Messages and their components

    def _channel(self, guild: bool) -> Channel:
        if not guild:
            return self.world.dm_with(self.user)
        if not self.world.settings.guild:
            raise CannotDo("the bot is in no guild")
        return self.world.guild_channel

    def _visible(self, message_id: str) -> Message:
        message = self.world.messages.get(message_id)
        if message is None or not message.visible_to(self.user):
            raise CannotDo(f"{self.user.name} sees no message {message_id}")
        return message

    def _reachable(self, message_id: str, *, forged: bool) -> Message:
        if not forged:
            return self._visible(message_id)
        if message_id not in self.world.messages:
            raise CannotDo(f"there is no message {message_id}")
        return self.world.messages[message_id]

    def _interact_with(
        self, message: Message, component_type: int, component: Json, values: list[str] | None = None
    ) -> Interaction:
        data = {"custom_id": component["custom_id"], "component_type": component_type, "id": component["id"]}
        if values is not None:
            data["values"] = values
        # Somebody else's client would be in its own DM with the bot.
        own = message.channel.recipient in (self.user, None)
        channel = message.channel if own else self.world.dm_with(self.user)
        return self._interact(COMPONENT, channel, data, message=message)

    # Commands

    def _command(self, command: str, guild: bool) -> tuple[Json, list[Json]]:
        """The command, and the way down to its sub-command. Raises CannotDo."""
        name, *subcommands = command.split()
        for scope in (GUILD_ID, None) if guild else (None,):
            for registered in self.world.commands[scope].values():
                if registered["name"] == name and _is_offered(registered, guild):
                    return registered, _way_down(command, registered, subcommands)
        raise CannotDo(f"there is no command /{name} here")

    def _given(self, option: Json, value: Any) -> Json:
        _check_value(option, value)
        if option["type"] == checks.USER_OPTION:
            user = self.world.user_named(value) or self.world.users.get(value)
            if user is None:
                raise CannotDo(f"there is no user {value!r}")
            value = user.id
        return {"type": option["type"], "name": option["name"], "value": value}

    def _invocation(
        self, registered: Json, path: list[Json], given: list[Json], options: dict[str, Any], guild: bool
    ) -> Json:
        for level in reversed(path[1:]):
            given = [{"type": level["type"], "name": level["name"], "options": given}]
        data: Json = {"id": registered["id"], "name": registered["name"], "type": 1, "options": given}
        if "guild_id" in registered:
            data["guild_id"] = registered["guild_id"]
        kinds = {option["name"]: option["type"] for option in path[-1].get("options", [])}
        people = [options[name] for name in options if kinds[name] == checks.USER_OPTION]
        if people:
            data["resolved"] = self._resolved(people, guild)
        return data

    def _resolved(self, people: list[str], guild: bool) -> Json:
        users = [self.world.user_named(name) or self.world.users[name] for name in people]
        resolved: Json = {"users": {user.id: render_user(user) for user in users}}
        if guild:
            unsaid = ("user", "mute", "deaf")
            resolved["members"] = {
                user.id: {name: value for name, value in member(user).items() if name not in unsaid} for user in users
            }
        return resolved

    def _interact(
        self,
        kind: int,
        channel: Channel,
        data: Json,
        message: Message | None = None,
        parent: Interaction | None = None,
    ) -> Interaction:
        world = self.world
        interaction = Interaction(world.snowflake(), world.new_token(), kind, self.user, channel, data, message, parent)
        world.add_interaction(interaction)
        self.gateway.dispatch("INTERACTION_CREATE", interaction_event(world, interaction))
        return interaction


def _components(message: Message, kind: int) -> list[Json]:
    return [component for component in checks.walk_components(message.components) if component["type"] == kind]


def _choose(menu: Json, wanted: list[str]) -> list[str]:
    """The values of what was chosen by value or label. Raises CannotDo."""
    if menu.get("disabled"):
        raise CannotDo("the menu is disabled")
    offered = {option["label"]: option["value"] for option in menu["options"]}
    offered |= {value: value for value in offered.values()}
    if unknown := [value for value in wanted if value not in offered]:
        raise CannotDo(f"the menu does not offer {', '.join(unknown)}")
    chosen = [offered[value] for value in wanted]
    least, most = menu.get("min_values", 1), menu.get("max_values", 1)
    if not least <= len(chosen) <= most or len(set(chosen)) < len(chosen):
        raise CannotDo(f"the menu takes {least} to {most} different values, not {len(chosen)}")
    return chosen


def _is_offered(command: Json, guild: bool) -> bool:
    """Whether the command is there in a guild, or in the bot's DM."""
    if GUILD_INSTALL not in command["integration_types"]:
        return False
    if command["contexts"] is not None:
        return (GUILD_CONTEXT if guild else DM_CONTEXT) in command["contexts"]
    return guild or command["dm_permission"]


def _way_down(command: str, registered: Json, subcommands: list[str]) -> list[Json]:
    path = [registered]
    for name in subcommands:
        inner = [option for option in path[-1].get("options", []) if option["name"] == name and _is_group(option)]
        if not inner:
            raise CannotDo(f"there is no command /{command}")
        path.append(inner[0])
    if any(_is_group(option) for option in path[-1].get("options", [])):
        raise CannotDo(f"/{command} is a group of commands")
    return path


def _is_group(option: Json) -> bool:
    return option["type"] in (checks.SUBCOMMAND, checks.SUBCOMMAND_GROUP)


def _check_value(option: Json, value: Any) -> None:
    name, kind = option["name"], option["type"]
    python_type = {checks.INTEGER_OPTION: int, checks.BOOLEAN_OPTION: bool, checks.NUMBER_OPTION: (int, float)}
    wanted = python_type.get(kind, str)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != checks.BOOLEAN_OPTION):  # type: ignore[arg-type]
        raise CannotDo(f"{name} takes no {type(value).__name__}")
    if "choices" in option and value not in [choice["value"] for choice in option["choices"]]:
        raise CannotDo(f"{name} does not offer {value!r}")
    if isinstance(value, str):
        _check_range(name, len(value), option.get("min_length", 1), option.get("max_length", LONGEST_VALUE))
    elif not isinstance(value, bool):
        _check_range(name, value, option.get("min_value", -(1 << 53)), option.get("max_value", 1 << 53))


def _check_range(name: str, measure: float, least: float, most: float) -> None:
    if not least <= measure <= most:
        raise CannotDo(f"{name} takes {least} to {most}, not {measure}")


# Modals


def _names(part: Json) -> list[str]:
    """By what a field of a modal may be called: its custom_id or label."""
    fields = part.get("components") or [part.get("component", part)]
    names = [field["custom_id"] for field in fields if "custom_id" in field]
    return names + [field["label"] for field in [part, *fields] if "label" in field]


def _submitted(part: Json, values: dict[str, str | list[str]]) -> Json:
    """What a client sends for a part of a modal. Raises CannotDo."""
    sent: Json = {"type": part["type"], "id": part["id"]}
    if part["type"] == checks.TEXT_DISPLAY:
        return sent
    given = next((values[name] for name in _names(part) if name in values), None)
    if part["type"] == checks.ROW:
        return sent | {"components": [_filled(field, field["label"], given) for field in part["components"]]}
    return sent | {"component": _filled(part["component"], part["label"], given)}


def _filled(field: Json, label: str, given: str | list[str] | None) -> Json:
    sent: Json = {"type": field["type"], "id": field["id"], "custom_id": field["custom_id"]}
    if field["type"] == checks.STRING_SELECT:
        defaults = [option["value"] for option in field["options"] if option.get("default")]
        chosen = given if isinstance(given, list) else [given] if given else defaults
        required = field.get("required", True)
        return sent | {"values": _choose(field, chosen) if chosen or required else []}
    text = given if given is not None else field.get("value", "")
    if not isinstance(text, str):
        raise CannotDo(f"{label!r} takes a text")
    least = field.get("min_length", 0)
    if field.get("required", True):
        least = max(least, 1)
    elif not text:
        least = 0
    _check_range(repr(label), len(text), least, field.get("max_length", 4000))
    return sent | {"value": text}
