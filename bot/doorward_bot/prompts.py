"""Prompts: what a request looks like in a user's DM, and what the user's answers mean. Imports only `messages`.

All that a prompt needs later stands in the `custom_id` of its components and in what the server keeps of its place,
so that a bot that was restarted, or another one, goes on with it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import disnake
from disnake.ui.select.string import StringSelect

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_bot import messages

PAGE = 25
_VERSION = "dw1"
_BUTTON = re.compile(
    rf"{_VERSION}:(?:(pick|page):([0-9]{{1,19}}):([0-9]{{1,4}})|(share|all|cancel):([0-9]{{1,19}}):([0-9A-Za-z_-]*))"
)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-"
_LONGEST_ID = 100
_LARGEST_ID = 2**63 - 1
_NUMBERS = re.compile(r"[0-9]{1,9}(?:[, ]+[0-9]{1,9})*")
_OPEN_COLOUR, _ENDED_COLOUR, _GRANTED_COLOUR = 0x5865F2, 0x80848E, 0x248046
Components = list[Any]


class Press(NamedTuple):
    """What the `custom_id` of a component says."""

    action: str
    prompt_id: int
    argument: str

    @classmethod
    def parse(cls, custom_id: str | None) -> Self | None:
        """None: it is not of a prompt."""
        match = _BUTTON.fullmatch(custom_id or "")
        if match is None:
            return None
        action, prompt_id, argument = (part for part in match.groups() if part is not None)
        return cls(action, int(prompt_id), argument) if int(prompt_id) <= _LARGEST_ID else None


class Place(NamedTuple):
    """Where a prompt was put, and the ids of the keys that it shows, by their numbers."""

    channel_id: int
    message_id: int
    key_ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.channel_id}/{self.message_id}/{','.join(map(str, self.key_ids))}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None: it is nothing that a bot has written."""
        try:
            channel_id, message_id, key_ids = text.split("/")
            return cls(int(channel_id), int(message_id), tuple(int(one) for one in key_ids.split(",") if one))
        except ValueError:
            return None


@dataclass(frozen=True)
class Prompt:
    """A request that waits for its user; `keys` are by their numbers, those that are gone are None."""

    request: pb.ConsentRequest
    keys: Sequence[pb.ApiKey | None]
    page: int = 0
    selection: tuple[int, ...] = ()  # indexes of keys, in the order of the choice

    def payload(self) -> dict[str, Any]:
        """The message, as Discord's API takes it."""
        return message(self._embeds(), self._components())

    @property
    def _shown(self) -> list[tuple[int, pb.ApiKey]]:
        """The keys of the page, with their indexes."""
        first = self.page * PAGE
        keys = enumerate(self.keys[first : first + PAGE], first)
        return [(index, key) for index, key in keys if key is not None]

    @property
    def _has_keys(self) -> bool:
        """Whether there is anything to share, on whatever page."""
        return any(key is not None for key in self.keys)

    @property
    def _pages(self) -> int:
        return max(1, -(-len(self.keys) // PAGE))

    def _embeds(self) -> list[disnake.Embed]:
        """Two, for who asks comes first, and the description of one holds no more than the keys of a page."""
        lines = [
            _line(messages.ASKS, messages.who(self.request)),
            _line(messages.SENT_TO, messages.plain(self.request.callback_host)),
        ]
        who = disnake.Embed(title=messages.TITLE, description="\n".join(lines), colour=_OPEN_COLOUR)
        what = disnake.Embed(colour=_OPEN_COLOUR)
        if self._shown:
            keys = [f"**{index + 1}.** {messages.key_line(key)}" for index, key in self._shown]
            what.description = messages.listed([f"**{messages.page_of(self.page, self._pages)}**", *keys])
        step = messages.next_step(self.request.deadline_time.seconds, has_keys=self._has_keys)
        what.add_field(messages.NEXT_STEP, step, inline=False)
        return [who, what]

    def _components(self) -> Components:
        rows: list[list[Any]] = [[self._select()]] if self._shown else []
        rows.append([*self._share_buttons(), self._button("cancel", messages.CANCEL, disnake.ButtonStyle.danger)])
        if self._pages > 1:
            rows.append(
                [self._page_button(self.page - 1, messages.PREVIOUS), self._page_button(self.page + 1, messages.NEXT)]
            )
        return [disnake.ui.ActionRow(*row).to_component_dict() for row in rows]

    def _select(self) -> "StringSelect[None]":
        options = [
            disnake.SelectOption(
                label=f"{index + 1}. {key.label}"[:100],
                description=f"{key.service} …{key.last_four}"[:100],
                value=str(key.id),
                default=index in self.selection,
            )
            for index, key in self._shown
        ]
        return StringSelect(
            custom_id=self._id("pick", str(self.page)),
            placeholder=messages.CHOOSE,
            min_values=0,
            max_values=len(options),
            options=options,
        )

    def _share_buttons(self) -> list["disnake.ui.Button[None]"]:
        if not self._has_keys:
            return []
        selected = disnake.ui.Button(
            style=disnake.ButtonStyle.success,
            label=messages.share(len(self.selection)),
            custom_id=self._id("share", encode(self.selection)),
            disabled=not self.selection,
        )
        return [selected, self._button("all", messages.SHARE_ALL, disnake.ButtonStyle.secondary)]

    def _page_button(self, page: int, label: str) -> "disnake.ui.Button[None]":
        button = self._button("page", label, disnake.ButtonStyle.secondary, str(max(page, 0)))
        button.disabled = not 0 <= page < self._pages
        return button

    def _button(
        self, action: str, label: str, style: disnake.ButtonStyle, argument: str = ""
    ) -> "disnake.ui.Button[None]":
        return disnake.ui.Button(style=style, label=label, custom_id=self._id(action, argument))

    def _id(self, action: str, argument: str) -> str:
        return f"{_VERSION}:{action}:{self.request.prompt_id}:{argument}"


def ended(request: pb.ConsentRequest, status: pb.ConsentStatus.ValueType, labels: Sequence[str] = ()) -> dict[str, Any]:
    """The message of a prompt that has ended."""
    is_granted = status == pb.CONSENT_STATUS_GRANTED
    colour = _GRANTED_COLOUR if is_granted else _ENDED_COLOUR
    who = _line(messages.ASKED, messages.who(request))
    where = [_line(messages.WERE_SENT_TO, messages.plain(request.callback_host))] if is_granted else []
    text = "\n".join([who, *where, "", messages.end(status, labels)])
    return message([disnake.Embed(title=messages.end_title(status), description=text, colour=colour)], [])


def message(embeds: Sequence[disnake.Embed], components: Components) -> dict[str, Any]:
    """A message that pings nobody, as Discord's API takes it."""
    return {
        "embeds": [embed.to_dict() for embed in embeds],
        "components": components,
        "allowed_mentions": {"parse": []},
    }


def _line(name: str, text: str) -> str:
    return f"**{name}:** {text}"


# Selections


def choose(prompt: Prompt, chosen_ids: Sequence[int]) -> tuple[int, ...]:
    """The selection when these keys of the prompt's page are chosen: who stays keeps the place in the order."""
    index_of = {key.id: index for index, key in enumerate(prompt.keys) if key is not None}
    chosen = [index_of[key_id] for key_id in chosen_ids if key_id in index_of]
    first = prompt.page * PAGE
    stays = [index for index in prompt.selection if index in chosen or not first <= index < first + PAGE]
    return tuple(dict.fromkeys([*stays, *chosen]))


def encode(selection: Sequence[int]) -> str:
    """A selection as the end of a `custom_id`: how many digits an index has, and the indexes.

    It tells that itself: a button that was pressed may be older than the keys that there are now.
    """
    width = 1 if max(selection, default=0) < len(_DIGITS) else 2
    digits = (_DIGITS[index // 64] * (width - 1) + _DIGITS[index % 64] for index in selection)
    return f"{width}{''.join(digits)}" if selection else ""


def decode(text: str, keys: int) -> tuple[int, ...]:
    """What `encode` made, as far as there are so many keys."""
    if text[:1] not in {"1", "2"}:
        return ()
    width = int(text[0])
    parts = [text[at : at + width] for at in range(1, len(text), width)]
    indexes = (sum(_DIGITS.index(digit) * 64**power for power, digit in enumerate(reversed(part))) for part in parts)
    return tuple(index for index in indexes if index < keys)


def fits(selection: Sequence[int]) -> bool:
    """Whether a selection can stand in a `custom_id`."""
    return len(f"{_VERSION}:share:{2**63}:{encode(selection)}") <= _LONGEST_ID


# Typed answers


def parse_answer(text: str, keys: Sequence[pb.ApiKey | None]) -> list[pb.ApiKey] | None:
    """The keys that a typed answer means, by their numbers; None: it is not a valid choice.

    Valid are `all`, and numbers from 1 separated by commas or blanks. Keys that are gone are None.
    """
    text = text.strip()
    if text.lower() == "all":
        return [key for key in keys if key is not None] or None
    if not _NUMBERS.fullmatch(text):
        return None
    chosen: list[pb.ApiKey] = []
    for number in dict.fromkeys(int(one) for one in re.findall("[0-9]+", text)):
        key = keys[number - 1] if 1 <= number <= len(keys) else None
        if key is None:
            return None
        chosen.append(key)
    return chosen
