"""`/keys`: a user's own keys. Imports `commands`, `consent` and below."""

from typing import Any

import disnake
from disnake.ext import commands
from disnake.interactions.modal import ModalInteraction

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_bot import messages
from doorward_bot.broker import Broker
from doorward_bot.commands import EVERYWHERE, Commands, Interaction, matching, parse_id
from doorward_bot.consent import Consent

_MODAL = "dw1:key"
# The service that checks a key has ten seconds.
_CHECKED = 25.0


class Keys(Commands):
    """Add, list, remove. The value of a key is never shown, and never logged."""

    def __init__(self, broker: Broker, consent: Consent) -> None:
        super().__init__(broker)
        self._consent = consent

    @commands.slash_command(name="keys", **EVERYWHERE)
    async def keys(self, inter: Interaction) -> None:
        """Your API keys, which applications may ask for."""

    @keys.sub_command(name="add")
    async def add(self, inter: Interaction) -> None:
        """Add a key."""
        await inter.response.send_modal(
            title=messages.MODAL_TITLE,
            custom_id=_MODAL,
            components=[
                _field("service", messages.SERVICE, messages.SERVICE_HINT, 40),
                _field("label", messages.LABEL, messages.LABEL_HINT, 80),
                _field("value", messages.KEY, messages.KEY_HINT, 4000),
            ],
        )

    @commands.Cog.listener()
    async def on_modal_submit(self, inter: ModalInteraction[Any]) -> None:
        """The form of `/keys add` was filled in."""
        if inter.custom_id != _MODAL:
            return
        await inter.response.defer(ephemeral=True, with_message=True)
        fields = {name: value.strip() for name, value in inter.text_values.items()}
        request = pb.AddApiKeyRequest(
            discord_user_id=str(inter.author.id),
            service=fields["service"].lower(),
            label=fields["label"],
            value=fields["value"],
        )
        answer = await self._ask(inter, "AddApiKey", request, _CHECKED)
        if answer is not None:
            await self._tell(inter, messages.added(answer.key))
            await self._consent.refresh(inter.author.id)

    @keys.sub_command(name="list")
    async def list_(self, inter: Interaction) -> None:
        """Show your keys; of each, only the end."""
        await inter.response.defer(ephemeral=True)
        answer = await self._ask(inter, "ListApiKeys", pb.ListApiKeysRequest(discord_user_id=str(inter.author.id)))
        if answer is not None:
            lines = [f"- {messages.key_line(key)}" for key in answer.keys]
            await self._tell(inter, messages.listed(lines) or messages.NO_KEYS)

    @keys.sub_command(name="remove")
    async def remove(self, inter: Interaction, key: str) -> None:
        """Remove a key.

        Parameters
        ----------
        key: Which one
        """
        await inter.response.defer(ephemeral=True)
        request = pb.DeleteApiKeyRequest(discord_user_id=str(inter.author.id), key_id=parse_id(key))
        if await self._ask(inter, "DeleteApiKey", request) is not None:
            await self._tell(inter, messages.REMOVED)

    @remove.autocomplete("key")
    async def complete_key(self, inter: Interaction, typed: str) -> list[disnake.OptionChoice]:
        """The user's keys."""
        answer = await self._choices("ListApiKeys", pb.ListApiKeysRequest(discord_user_id=str(inter.author.id)))
        keys = answer.keys if answer is not None else ()
        return matching(((messages.key_choice(key), key.id) for key in keys), typed)


def _field(name: str, label: str, hint: str, longest: int) -> "disnake.ui.Label":
    field = disnake.ui.TextInput(custom_id=name, min_length=1, max_length=longest)
    return disnake.ui.Label(label, field, description=hint)
