"""What the bot may send: one strict model for each body, and `check`, which refuses as Discord does.

The limits are those of Discord's documentation, the names of the errors those that it answers. One thing is stricter
than Discord: a field that it does not know, or that this stand-in does not play, is refused and not ignored.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import INVALID_FORM, DiscordError, Json

LONGEST_CONTENT = 2000
LONGEST_EMBEDS = 6000
LONGEST_NONCE = 25
BUTTON, STRING_SELECT = 2, 3
ROW, TEXT_DISPLAY = 1, 10
LINK_STYLE, PREMIUM_STYLE = 5, 6
SUBCOMMAND, SUBCOMMAND_GROUP = 1, 2
STRING_OPTION, INTEGER_OPTION, BOOLEAN_OPTION, USER_OPTION, NUMBER_OPTION = 3, 4, 5, 6, 10

Parsed = TypeVar("Parsed")


def check(form: type[Parsed], body: object, place: str = "") -> Parsed:
    """The body as its model has it; `place` is where it is within the form. Raises DiscordError."""
    try:
        return TypeAdapter(form).validate_python(body)
    except ValidationError as error:
        tree: Json = {}
        for detail in error.errors():
            path = place.split(".") if place else []
            _plant(tree, path + [str(part) for part in detail["loc"] if not str(part).startswith("<")], detail)
        raise DiscordError(INVALID_FORM, tree) from None


_CODES = {
    "missing": "BASE_TYPE_REQUIRED",
    "string_too_long": "BASE_TYPE_MAX_LENGTH",
    "string_too_short": "BASE_TYPE_BAD_LENGTH",
    "too_long": "BASE_TYPE_BAD_LENGTH",
    "too_short": "BASE_TYPE_BAD_LENGTH",
    "literal_error": "BASE_TYPE_CHOICES",
    "extra_forbidden": "UNKNOWN_FIELD",
    "greater_than_equal": "NUMBER_TYPE_MIN",
    "less_than_equal": "NUMBER_TYPE_MAX",
}


def _plant(tree: Json, path: list[str], detail: ErrorDetails) -> None:
    for name in path:
        tree = tree.setdefault(name, {})
    kind = detail["type"]
    code = kind if kind.isupper() else _CODES.get(kind, "BASE_TYPE_INVALID")
    tree.setdefault("_errors", []).append({"code": code, "message": detail["msg"]})


class Form(BaseModel):
    """The base of all of them."""

    model_config = ConfigDict(strict=True, extra="forbid")


# Scalars


def _as_snowflake(value: object) -> object:
    """disnake sends snowflakes as integers, which Discord takes."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_url(value: str) -> str:
    if not re.fullmatch(r"(https?|discord)://[^\s/]+\S*", value):
        raise PydanticCustomError("URL_TYPE_INVALID_URL", "Not a well formed URL.")
    return value


def _is_timestamp(value: str) -> str:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        message = "Could not parse {value}. Should be ISO8601."
        raise PydanticCustomError("DATE_TIME_TYPE_PARSE", message, {"value": value}) from None
    return value


def _is_not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("BASE_TYPE_REQUIRED", "This field is required")
    return value


def _is_command_name(value: str) -> str:
    """Discord's `^[-_'\\p{L}\\p{N}]{1,32}$`, in lower case where there is one."""
    if not all(letter in "-_'" or letter.isalnum() for letter in value) or value != value.lower():
        raise PydanticCustomError("APPLICATION_COMMAND_INVALID_NAME", "Command name is invalid")
    return value


def _is_nonce(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str) or len(str(value)) > LONGEST_NONCE:
        raise PydanticCustomError("NONCE_TYPE_INVALID", "A nonce is an integer or a string of up to 25 characters")
    return value


def _is_choice(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 100:
        raise PydanticCustomError("BASE_TYPE_INVALID", "A choice is a number or a string of up to 100 characters")
    return value


Nonce = Annotated[Any, AfterValidator(_is_nonce)]
ChoiceValue = Annotated[Any, AfterValidator(_is_choice)]
Snowflake = Annotated[str, BeforeValidator(_as_snowflake), Field(pattern=r"^[1-9][0-9]{0,19}$")]
Url = Annotated[str, Field(max_length=2048), AfterValidator(_is_url)]
Timestamp = Annotated[str, AfterValidator(_is_timestamp)]
CustomId = Annotated[str, Field(min_length=1, max_length=100)]
ComponentId = Annotated[int, Field(ge=0, lt=1 << 31)]
CommandName = Annotated[str, Field(min_length=1, max_length=32), AfterValidator(_is_command_name)]
Description = Annotated[str, Field(min_length=1, max_length=100)]
Localizations = dict[str, Description] | None


# Embeds


class EmbedAuthor(Form):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    url: Url | None = None
    icon_url: Url | None = None


class EmbedImage(Form):
    url: Url


class EmbedFooter(Form):
    text: Annotated[str, Field(min_length=1, max_length=2048)]
    icon_url: Url | None = None


class EmbedField(Form):
    name: Annotated[str, Field(max_length=256), AfterValidator(_is_not_blank)]
    value: Annotated[str, Field(max_length=1024), AfterValidator(_is_not_blank)]
    inline: bool | None = None


class Embed(Form):
    type: Literal["rich"] | None = None
    title: Annotated[str, Field(max_length=256)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    url: Url | None = None
    color: Annotated[int, Field(ge=0, le=0xFFFFFF)] | None = None
    timestamp: Timestamp | None = None
    author: EmbedAuthor | None = None
    footer: EmbedFooter | None = None
    image: EmbedImage | None = None
    thumbnail: EmbedImage | None = None
    fields: Annotated[list[EmbedField], Field(max_length=25)] | None = None

    @model_validator(mode="after")
    def _shows_something(self) -> "Embed":
        if not any((self.title, self.description, self.author, self.footer, self.image, self.thumbnail, self.fields)):
            raise PydanticCustomError("BASE_TYPE_REQUIRED", "This field is required")
        return self

    @property
    def length(self) -> int:
        """The characters that count towards the sum of all embeds of a message."""
        texts = [self.title, self.description, self.author and self.author.name, self.footer and self.footer.text]
        texts += [text for field in self.fields or [] for text in (field.name, field.value)]
        return sum(len(text) for text in texts if text)

    def as_answered(self) -> Json:
        """As Discord has it in a message."""
        embed: Json = {"type": "rich"} | self.model_dump(exclude_none=True, exclude={"type"})
        embed |= {"fields": [{"inline": False} | field for field in embed["fields"]]} if "fields" in embed else {}
        return embed


def _embeds_fit(embeds: list[Embed]) -> list[Embed]:
    if sum(embed.length for embed in embeds) > LONGEST_EMBEDS:
        raise PydanticCustomError("MAX_EMBED_SIZE_EXCEEDED", "Embed size exceeds maximum size of 6000")
    return embeds


Embeds = Annotated[list[Embed], Field(max_length=10), AfterValidator(_embeds_fit)]


# Components


class Emoji(Form):
    name: Annotated[str, Field(max_length=32)]
    id: Snowflake | None = None
    animated: bool | None = None


class Button(Form):
    type: Literal[2]
    style: Literal[1, 2, 3, 4, 5, 6]
    id: ComponentId | None = None
    label: Annotated[str, Field(max_length=80)] | None = None
    emoji: Emoji | None = None
    custom_id: CustomId | None = None
    url: Annotated[str, Field(max_length=512), AfterValidator(_is_url)] | None = None
    sku_id: Snowflake | None = None
    disabled: bool | None = None

    @model_validator(mode="after")
    def _has_what_its_style_needs(self) -> "Button":
        own = {LINK_STYLE: "url", PREMIUM_STYLE: "sku_id"}.get(self.style, "custom_id")
        for name in ("url", "sku_id", "custom_id"):
            if (getattr(self, name) is not None) != (name == own):
                message = f"A button of style {self.style} has a {own}, and none of the others"
                raise PydanticCustomError("BUTTON_COMPONENT_INVALID", "{why}", {"why": message})
        if self.style != PREMIUM_STYLE and not self.label and self.emoji is None:
            raise PydanticCustomError("BUTTON_COMPONENT_INVALID_LABEL", "A label or emoji is required")
        return self


class SelectOption(Form):
    label: Annotated[str, Field(min_length=1, max_length=100)]
    value: Annotated[str, Field(min_length=1, max_length=100)]
    description: Annotated[str, Field(max_length=100)] | None = None
    emoji: Emoji | None = None
    default: bool | None = None


class StringSelect(Form):
    type: Literal[3]
    custom_id: CustomId
    options: Annotated[list[SelectOption], Field(min_length=1, max_length=25)]
    id: ComponentId | None = None
    placeholder: Annotated[str, Field(max_length=150)] | None = None
    min_values: Annotated[int, Field(ge=0, le=25)] | None = None
    max_values: Annotated[int, Field(ge=1, le=25)] | None = None
    disabled: bool | None = None
    required: bool | None = None

    @model_validator(mode="after")
    def _can_be_answered(self) -> "StringSelect":
        least, most = self.range
        if least > most or most > len(self.options):
            why = f"min_values {least}, max_values {most} and {len(self.options)} options do not fit"
            raise PydanticCustomError("SELECT_COMPONENT_INVALID_VALUES", "{why}", {"why": why})
        if len({option.value for option in self.options}) < len(self.options):
            message = "The specified option value is already used"
            raise PydanticCustomError("SELECT_COMPONENT_OPTION_VALUE_DUPLICATED", "{why}", {"why": message})
        if sum(bool(option.default) for option in self.options) > most:
            raise PydanticCustomError("SELECT_COMPONENT_TOO_MANY_DEFAULT_VALUES", "Too many default values")
        return self

    @property
    def range(self) -> tuple[int, int]:
        """How many values may be chosen."""
        return (1 if self.min_values is None else self.min_values, self.max_values or 1)


def _type_of(value: Any) -> str:
    """A tag in angle brackets, which does not appear in the place of an error."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


class ActionRow(Form):
    type: Literal[1]
    id: ComponentId | None = None
    components: Annotated[
        list[
            Annotated[
                Annotated[Button, Tag("<2>")] | Annotated[StringSelect, Tag("<3>")],
                Discriminator(_type_of),
            ]
        ],
        Field(min_length=1, max_length=5),
    ]

    @model_validator(mode="after")
    def _is_not_too_wide(self) -> "ActionRow":
        if len(self.components) > 1 and any(component.type == STRING_SELECT for component in self.components):
            message = "The specified component exceeds the maximum width"
            raise PydanticCustomError("COMPONENT_LAYOUT_WIDTH_EXCEEDED", "{why}", {"why": message})
        return self


def _custom_ids_differ(rows: list[ActionRow]) -> list[ActionRow]:
    _must_differ([component.custom_id for row in rows for component in row.components])
    return rows


def _must_differ(custom_ids: list[str | None]) -> None:
    known = [custom_id for custom_id in custom_ids if custom_id is not None]
    if len(set(known)) < len(known):
        message = "Component custom id cannot be duplicated"
        raise PydanticCustomError("COMPONENT_CUSTOM_ID_DUPLICATED", "{why}", {"why": message})


Rows = Annotated[list[ActionRow], Field(max_length=5), AfterValidator(_custom_ids_differ)]


def answered_components(rows: list[ActionRow]) -> list[Json]:
    """As Discord has them in a message: without nulls, and each with a number."""
    answered = [row.model_dump(exclude_none=True) for row in rows]
    number_components(answered)
    for component in (component for row in answered for component in row["components"]):
        if component["type"] == STRING_SELECT:
            component.setdefault("min_values", 1)
            component.setdefault("max_values", 1)
            component.pop("required", None)
    return answered


def number_components(components: list[Json]) -> None:
    """Give an id to each that came without (or with 0), in order."""
    everything = list(walk_components(components))
    taken = {component["id"] for component in everything if component.get("id")}
    free = (number for number in range(1, 1000) if number not in taken)
    for component in everything:
        component["id"] = component.get("id") or next(free)


def walk_components(components: list[Json]) -> Iterator[Json]:
    """Each of them, and each within them."""
    for component in components:
        yield component
        yield from walk_components(component.get("components", []))
        yield from walk_components([component["component"]] if "component" in component else [])


# Messages


class AllowedMentions(Form):
    parse: list[Literal["users", "roles", "everyone"]] | None = None
    users: Annotated[list[Snowflake], Field(max_length=100)] | None = None
    roles: Annotated[list[Snowflake], Field(max_length=100)] | None = None
    replied_user: bool | None = None

    @model_validator(mode="after")
    def _says_it_once(self) -> "AllowedMentions":
        for name in ("users", "roles"):
            if getattr(self, name) and name in (self.parse or []):
                why = f"parse:[{name}] and {name}: [ids...] are mutually exclusive."
                raise PydanticCustomError("MESSAGE_ALLOWED_MENTIONS_PARSE_EXCLUSIVE", "{why}", {"why": why})
        return self


class MessageReference(Form):
    message_id: Snowflake
    channel_id: Snowflake | None = None
    guild_id: Snowflake | None = None
    fail_if_not_exists: bool | None = None
    type: Literal[0] | None = None


Content = Annotated[str, Field(max_length=LONGEST_CONTENT)]
NoFiles = Annotated[list[Json], Field(max_length=0)]


class MessageEdit(Form):
    """A PATCH: only what is there changes."""

    content: Content | None = None
    embeds: Embeds | None = None
    components: Rows | None = None
    allowed_mentions: AllowedMentions | None = None
    flags: int | None = None
    attachments: NoFiles | None = None


class NewMessage(MessageEdit):
    """A message to a channel."""

    tts: Literal[False] | None = None
    nonce: Nonce | None = None
    enforce_nonce: bool | None = None
    message_reference: MessageReference | None = None


class Reply(MessageEdit):
    """An answer to an interaction, or a change of one."""

    tts: Literal[False] | None = None


class NewChannel(Form):
    recipient_id: Snowflake


# Modals


class TextInput(Form):
    type: Literal[4]
    custom_id: CustomId
    style: Literal[1, 2]
    id: ComponentId | None = None
    label: Annotated[str, Field(min_length=1, max_length=45)] | None = None
    min_length: Annotated[int, Field(ge=0, le=4000)] | None = None
    max_length: Annotated[int, Field(ge=1, le=4000)] | None = None
    required: bool | None = None
    value: Annotated[str, Field(max_length=4000)] | None = None
    placeholder: Annotated[str, Field(max_length=100)] | None = None

    @model_validator(mode="after")
    def _can_be_answered(self) -> "TextInput":
        least, most = self.min_length or 0, self.max_length or 4000
        if least > most:
            raise PydanticCustomError("TEXT_INPUT_COMPONENT_INVALID_LENGTH", "min_length is above max_length")
        if self.value and not least <= len(self.value) <= most:
            raise PydanticCustomError("TEXT_INPUT_COMPONENT_INVALID_VALUE", "The value is too short or too long")
        return self


class TextInputRow(Form):
    type: Literal[1]
    id: ComponentId | None = None
    components: Annotated[list[TextInput], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _has_a_label(self) -> "TextInputRow":
        if self.components[0].label is None:
            raise PydanticCustomError("BASE_TYPE_REQUIRED", "This field is required: the text input's label")
        return self


class Label(Form):
    type: Literal[18]
    label: Annotated[str, Field(min_length=1, max_length=45)]
    id: ComponentId | None = None
    description: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    component: Annotated[
        Annotated[TextInput, Tag("<4>")] | Annotated[StringSelect, Tag("<3>")], Discriminator(_type_of)
    ]

    @model_validator(mode="after")
    def _is_the_only_label(self) -> "Label":
        if isinstance(self.component, TextInput) and self.component.label is not None:
            raise PydanticCustomError("TEXT_INPUT_COMPONENT_INVALID_LABEL", "The label has it already")
        if isinstance(self.component, StringSelect) and self.component.disabled:
            raise PydanticCustomError("SELECT_COMPONENT_INVALID_DISABLED", "Not in a modal")
        return self


class TextDisplay(Form):
    type: Literal[10]
    content: Annotated[str, Field(min_length=1, max_length=4000)]
    id: ComponentId | None = None


ModalPart = Annotated[
    Annotated[TextInputRow, Tag("<1>")] | Annotated[Label, Tag("<18>")] | Annotated[TextDisplay, Tag("<10>")],
    Discriminator(_type_of),
]


class Modal(Form):
    custom_id: CustomId
    title: Annotated[str, Field(min_length=1, max_length=45)]
    components: Annotated[list[ModalPart], Field(min_length=1, max_length=5)]

    @model_validator(mode="after")
    def _custom_ids_differ(self) -> "Modal":
        _must_differ([component.get("custom_id") for component in walk_components(self.model_dump()["components"])])
        return self

    def as_shown(self) -> Json:
        """As a client gets it: without nulls, and each component with a number."""
        modal: Json = self.model_dump(exclude_none=True)
        number_components(modal["components"])
        return modal


# Commands


class Choice(Form):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    value: ChoiceValue
    name_localizations: Localizations = None


class Choices(Form):
    """What autocompletion offers."""

    choices: Annotated[list[Choice], Field(max_length=25)]


class Option(Form):
    type: Literal[1, 2, 3, 4, 5, 6, 10]
    name: CommandName
    description: Description
    name_localizations: Localizations = None
    description_localizations: Localizations = None
    required: bool | None = None
    choices: Annotated[list[Choice], Field(max_length=25)] | None = None
    options: "Options | None" = None
    min_value: int | float | None = None
    max_value: int | float | None = None
    min_length: Annotated[int, Field(ge=0, le=6000)] | None = None
    max_length: Annotated[int, Field(ge=1, le=6000)] | None = None
    autocomplete: bool | None = None

    @model_validator(mode="after")
    def _is_of_a_piece(self) -> "Option":
        if why := "; ".join(self._contradictions()):
            raise PydanticCustomError("APPLICATION_COMMAND_OPTION_INVALID", "{why}", {"why": why})
        return self

    def _contradictions(self) -> Iterator[str]:
        groups, text = self.type in (SUBCOMMAND, SUBCOMMAND_GROUP), self.type == STRING_OPTION
        number = self.type in (INTEGER_OPTION, NUMBER_OPTION)
        if self.options and not groups:
            yield "only sub-commands have options"
        if self.type == SUBCOMMAND_GROUP and any(option.type != SUBCOMMAND for option in self.options or []):
            yield "a group holds sub-commands only"
        if self.required and groups:
            yield "a sub-command is not required"
        if (self.choices or self.autocomplete) and not (text or number):
            yield "only strings and numbers have choices"
        if self.choices and self.autocomplete:
            yield "choices and autocomplete are mutually exclusive"
        if (self.min_length, self.max_length) != (None, None) and not text:
            yield "only strings have lengths"
        if (self.min_value, self.max_value) != (None, None) and not number:
            yield "only numbers have bounds"
        if any(isinstance(choice.value, str) != text for choice in self.choices or []):
            yield "a choice is of another type"


def _options_fit(options: list[Option]) -> list[Option]:
    if len({option.name for option in options}) < len(options):
        message = "Option names must be unique"
        raise PydanticCustomError("APPLICATION_COMMAND_OPTIONS_NAME_ALREADY_EXISTS", "{why}", {"why": message})
    groups = [option.type in (SUBCOMMAND, SUBCOMMAND_GROUP) for option in options]
    if any(groups) and not all(groups):
        message = "Sub-command and sub-command group option types are mutually exclusive to all other types"
        raise PydanticCustomError("APPLICATION_COMMAND_OPTIONS_TYPE_INVALID", "{why}", {"why": message})
    required = [bool(option.required) for option in options]
    if required != sorted(required, reverse=True):
        message = "Required options must be placed before non-required options"
        raise PydanticCustomError("APPLICATION_COMMAND_OPTIONS_REQUIRED_INVALID", "{why}", {"why": message})
    return options


Options = Annotated[list[Option], Field(max_length=25), AfterValidator(_options_fit)]


def _as_bits(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Command(Form):
    """A slash command; the other kinds are not played."""

    name: CommandName
    description: Description
    type: Literal[1] | None = None
    id: Snowflake | None = None
    name_localizations: Localizations = None
    description_localizations: Localizations = None
    options: Options | None = None
    default_member_permissions: Annotated[int, BeforeValidator(_as_bits), Field(ge=0)] | None = None
    # Deprecated, but disnake sends the first with every command.
    default_permission: bool | None = None
    dm_permission: bool | None = None
    nsfw: bool | None = None
    contexts: Annotated[list[Literal[0, 1, 2]], Field(min_length=1)] | None = None
    integration_types: Annotated[list[Literal[0, 1]], Field(min_length=1)] | None = None

    def as_answered(self) -> Json:
        """As Discord has it, but for its ids."""
        permissions = self.default_member_permissions
        command: Json = self.model_dump(exclude_none=True, exclude={"id", "dm_permission", "default_permission"})
        fixed: Json = {
            "type": 1,
            "default_member_permissions": None if permissions is None else str(permissions),
            "name_localizations": self.name_localizations,
            "description_localizations": self.description_localizations,
            "dm_permission": self.dm_permission is not False,
            "contexts": self.contexts,
            "integration_types": self.integration_types or [0],
            "nsfw": bool(self.nsfw),
        }
        return command | fixed


def _commands_differ(commands: list[Command]) -> list[Command]:
    if len({command.name for command in commands}) < len(commands):
        message = "Application command names must be unique"
        raise PydanticCustomError("APPLICATION_COMMANDS_DUPLICATE_NAME", "{why}", {"why": message})
    return commands


Commands = Annotated[list[Command], AfterValidator(_commands_differ)]


# Interactions


class Callback(Form):
    """The first answer to an interaction; what `data` is depends on the type."""

    type: Literal[4, 5, 6, 7, 8, 9]
    data: Json | None = None


# The gateway


class IdentifyProperties(Form):
    os: str
    browser: str
    device: str


class Presence(Form):
    since: int | None
    activities: list[Json] | tuple[Json, ...]
    status: Literal["online", "dnd", "idle", "invisible", "offline"]
    afk: bool


class Identify(Form):
    token: str
    properties: IdentifyProperties
    intents: Annotated[int, Field(ge=0)]
    compress: bool | None = None
    large_threshold: Annotated[int, Field(ge=50, le=250)] | None = None
    shard: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    presence: Presence | None = None


class Resume(Form):
    token: str
    session_id: str
    seq: int
