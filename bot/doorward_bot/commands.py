"""What the slash commands share. Imports `broker`, `messages` and below."""

from collections.abc import Iterable
from typing import Any

import disnake
from disnake.ext import commands
from disnake.interactions.application_command import ApplicationCommandInteraction
from disnake.interactions.base import Interaction as AnyInteraction

from doorward_bot import messages
from doorward_bot.broker import Away, Broker, NotAdmitted, Refused

# In servers, in DMs with the bot, and wherever a user has installed it for themselves.
EVERYWHERE: dict[str, Any] = {
    "contexts": disnake.InteractionContextTypes.all(),
    "install_types": disnake.ApplicationInstallTypes.all(),
}
# Discord waits three seconds for the choices that complete an option.
_QUICK = 2.0
_MOST_CHOICES = 25
Interaction = ApplicationCommandInteraction[commands.InteractionBot]


class Commands(commands.Cog):
    """Commands that ask the server, and answer nobody but who gave them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def _ask(self, inter: AnyInteraction[Any], rpc: str, request: Any, timeout: float = 10.0) -> Any:
        """What the server answers; None when it does not, and the user is told so."""
        try:
            return await self._broker.call(rpc, request, timeout=timeout)
        except Refused as refused:
            await self._tell(inter, messages.refusal(refused.reason))
        except (Away, NotAdmitted):  # the latter ends the bot at the poller's next call
            await self._tell(inter, messages.AWAY_FOR_COMMANDS)
        return None

    async def _tell(self, inter: AnyInteraction[Any], text: str) -> None:
        await inter.edit_original_response(
            embed=disnake.Embed(description=text), allowed_mentions=disnake.AllowedMentions.none()
        )

    async def _choices(self, rpc: str, request: Any) -> Any:
        """What the server answers quickly; None when it does not."""
        try:
            return await self._broker.call(rpc, request, timeout=_QUICK)
        except (Refused, Away, NotAdmitted):
            return None


def matching(choices: Iterable[tuple[str, int]], typed: str) -> list[disnake.OptionChoice]:
    """The choices whose name holds what is typed, as many as Discord shows; their values are ids."""
    found = [(name, value) for name, value in choices if typed.casefold() in name.casefold()]
    return [disnake.OptionChoice(name, str(value)) for name, value in found[:_MOST_CHOICES]]


def parse_id(text: str) -> int:
    """The id that a choice stands for; 0, which is nothing's, when something else was typed."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0  # noqa: PLR2004 - 64 bits
