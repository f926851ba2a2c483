"""A small bot on disnake: what the stand-in's own tests prove the protocol with, and a person may try the page with.

It knows one thing by one name: the text `menu` sends buttons and a menu, `/keys add` answers, and the rest is echoed.
"""

import os
from typing import Any

import disnake
from disnake.ext import commands
from disnake.interactions.application_command import ApplicationCommandInteraction
from disnake.interactions.message import MessageInteraction
from disnake.interactions.modal import ModalInteraction
from disnake.ui.select.string import StringSelect

from .state import DEFAULT_TOKEN

SERVICES = ("flo", "gw2", "gw2-eu")
_NOBODY = disnake.AllowedMentions.none()


class ExampleBot(commands.InteractionBot):
    """One that does not wait 5 seconds before each IDENTIFY but the first, which is for the real Discord's sake."""

    async def before_identify_hook(self, _shard_id: int | None, *, initial: bool = False) -> None:
        pass


bot = ExampleBot(intents=disnake.Intents(dm_messages=True), allowed_mentions=_NOBODY)


def menu() -> list[disnake.ui.ActionRow[Any]]:
    """Two to choose from, and every kind of answer to a click."""
    options = [
        disnake.SelectOption(label="First key", value="1", description="ends in 1111"),
        disnake.SelectOption(label="Second key", value="2", description="ends in 2222"),
    ]
    select = StringSelect(custom_id="keys", placeholder="Choose keys", max_values=2, options=options)
    buttons = [
        disnake.ui.Button(label="Share", custom_id="share", style=disnake.ButtonStyle.green),
        disnake.ui.Button(label="Later", custom_id="later"),
        disnake.ui.Button(label="Change later", custom_id="change"),
        disnake.ui.Button(label="Ask", custom_id="ask"),
        disnake.ui.Button(label="Never", custom_id="never", disabled=True),
    ]
    return [disnake.ui.ActionRow(select), disnake.ui.ActionRow(*buttons)]


@bot.listen()
async def on_message(message: disnake.Message) -> None:
    if message.author.bot:
        return
    try:
        if message.content == "menu":
            embed = disnake.Embed(title="Share your keys?", description="With **Example**").set_footer(text="Soon")
            embed.add_field("To", "example.org").add_field("Until", "10 minutes")
            await message.author.send("Hello @everyone", embed=embed, components=menu())
        else:
            await message.author.send(f"You said: {message.content}", reference=message)
    except disnake.Forbidden as error:
        print(f"refused with {error.code}", flush=True)


@bot.listen()
async def on_dropdown(event: MessageInteraction[disnake.Client]) -> None:
    await event.response.edit_message(content=f"Chosen: {', '.join(event.values or [])}", components=[])
    await event.followup.send("That is noted.", ephemeral=True)


@bot.listen()
async def on_button_click(event: MessageInteraction[disnake.Client]) -> None:
    what = event.component.custom_id
    if what == "share":
        await event.response.send_message("Shared.")
    elif what == "later":
        await event.response.defer(with_message=True, ephemeral=True)
        await event.edit_original_response("Here it is.")
    elif what == "change":
        await event.response.defer()
        await event.edit_original_response("Changed.", components=[])
    elif what == "ask":
        field = disnake.ui.TextInput(custom_id="key", min_length=3, max_length=10)
        await event.response.send_modal(title="A key", custom_id="key", components=[disnake.ui.Label("Key", field)])


@bot.listen()
async def on_modal_submit(event: ModalInteraction[disnake.Client]) -> None:
    await event.response.send_message(f"Got {event.text_values['key']}", ephemeral=True)


@bot.slash_command()
async def keys(event: ApplicationCommandInteraction[disnake.Client]) -> None:
    """Your keys."""


@keys.sub_command()
async def add(event: ApplicationCommandInteraction[disnake.Client], service: str, default: bool = False) -> None:
    """Add a key.

    Parameters
    ----------
    service: The service that it is for
    default: Whether it is the first to be offered
    """
    where = "a DM" if event.guild_id is None else f"guild {event.guild_id}"
    await event.response.send_message(f"{event.author.name} adds {service} in {where}", ephemeral=True)


@add.autocomplete("service")
async def complete(event: ApplicationCommandInteraction[disnake.Client], text: str) -> list[str]:
    return [service for service in SERVICES if text.lower() in service]


def main() -> None:
    disnake.http.Route.BASE = os.environ["DISCORD_API_BASE"]
    bot.run(os.environ.get("DISCORD_TOKEN", DEFAULT_TOKEN))


if __name__ == "__main__":
    main()
