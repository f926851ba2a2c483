"""One authorized request as its handler gets it, its parts, and what the handler answers."""

from dataclasses import dataclass

from aiohttp import web

from .errors import DiscordError, Refusal, invalid_form
from .gateway import Gateway
from .state import APPLICATION_ID, World


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


def id_in_path(call: Call, name: str) -> str:
    value = call.part(name)
    if not (value.isascii() and value.isdecimal() and int(value) < 1 << 64):
        raise invalid_form(name, "NUMBER_TYPE_COERCE", f'Value "{value}" is not snowflake.')
    return value


def require_own_application(call: Call, name: str, otherwise: Refusal) -> None:
    if id_in_path(call, name) != APPLICATION_ID:
        raise DiscordError(otherwise)


def number_in_query(call: Call, name: str, default: int) -> int:
    value = call.request.query.get(name, str(default))
    if not (value.isascii() and value.isdecimal()):
        raise invalid_form(name, "NUMBER_TYPE_COERCE", f'Value "{value}" is not int.')
    return int(value)
