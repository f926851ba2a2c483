"""The command line of the bot. Imports `bot`, `settings` and `errors`."""

import asyncio
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from doorward_bot import bot, settings
from doorward_bot.errors import BotError

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"doorward-bot {version('doorward')}")
        raise typer.Exit


@app.command()
def serve(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run the Discord bot, until it is told to stop.

    It is set up by environment variables:

    DISCORD_TOKEN: the bot's token of Discord's developer portal; or DISCORD_TOKEN_FILE, a file that holds it.

    DOORWARD_BOT_TOKEN: a service token of role bot (`doorward token create --role bot`); or DOORWARD_BOT_TOKEN_FILE.

    DOORWARD_BOT_SERVER: the server's gRPC port as host:port; by default on this machine, at DOORWARD_GRPC_PORT.

    DOORWARD_BOT_CA_FILE: TLS to the server: a PEM file of the authorities that its certificate has to come from.

    DOORWARD_BOT_CERT_FILE, DOORWARD_BOT_KEY_FILE: what the bot presents to a server that asks for a certificate.

    DOORWARD_BOT_ALLOW_PLAINTEXT: true lets the bot call a server on another machine without TLS.

    DOORWARD_BOT_HEALTH_PORT: where GET /healthz on 127.0.0.1 tells whether Discord and the server are reached, and
    GET /metrics the rest, to Prometheus.

    DISCORD_API_BASE: another Discord, such as a stand-in for tests.

    DOORWARD_LOG_LEVEL: debug, info, warning or error.
    """
    try:
        asyncio.run(bot.run(settings.load(dict(os.environ))))
    except BotError as error:
        sys.exit(f"doorward-bot: {error}")


def run() -> None:
    """The console script."""
    app(prog_name="doorward-bot")
