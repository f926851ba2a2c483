"""`doorward key`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from doorward_server.api_keys import ListedKey
from doorward_server.cli.base import HELP, ROW_ID, Json, app_of, has_terminal, iso, print_done, print_list
from doorward_server.cli.files import read_text
from doorward_server.discord_users import parse_snowflake
from doorward_server.errors import InvalidUserId, KeyNotFound, OperatorError

cli = typer.Typer(help="Users' own keys at other services, which applications may ask them for.", **HELP)
DiscordUser = Annotated[str, typer.Option("--discord-user", metavar="ID", help="The user's id at Discord, a number.")]
_ACTOR = "operator"


@cli.command(
    epilog="Example: doorward key add --discord-user 123456789012345678 --service gw2 --label main "
    "--value-stdin < key.txt"
)
def add(  # noqa: PLR0917 - an option for each setting
    ctx: typer.Context,
    discord_user: DiscordUser,
    service: Annotated[str, typer.Option(help="What the key is for, such as gw2 (a-z, 0-9, -, _).")],
    label: Annotated[str, typer.Option(help="What its owner knows it by.")],
    value_stdin: Annotated[
        bool,
        typer.Option(
            "--value-stdin", help="Read the key from standard input, less a final newline. \\[default: a prompt]"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Add a key of a Discord user's; it is kept sealed. If the service has a validator, that has to know the key."""
    app = app_of(ctx)
    snowflake = read_snowflake(discord_user)
    value = read_text(Path("-"), "--value-stdin").removesuffix("\n") if value_stdin else _ask_value()
    app.record_key()  # the value is sealed with it
    key = app.api_keys.add(app.discord_users.obtain(snowflake), service, label, value, actor=_ACTOR)
    print_done("added key", key.id, as_json=as_json)


@cli.command("list", epilog="Example: doorward key list --discord-user 123456789012345678")
def list_keys(ctx: typer.Context, discord_user: DiscordUser, as_json: Json = False) -> None:
    """List a Discord user's keys, but not their values."""
    app = app_of(ctx)
    user = app.discord_users.find(read_snowflake(discord_user))
    rows = [_key(listed) for listed in app.api_keys.list(user)] if user else []
    columns = ("id", "service", "label", "last_four", "account", "permissions", "created")
    print_list(rows, columns, as_json=as_json)


@cli.command(epilog="Example: doorward key remove --discord-user 123456789012345678 7")
def remove(
    ctx: typer.Context,
    discord_user: DiscordUser,
    key_id: Annotated[int, typer.Argument(metavar="KEY_ID", help="The key's id; see `doorward key list`.", **ROW_ID)],
    as_json: Json = False,
) -> None:
    """Remove a key of a Discord user's; no application gets it any more."""
    app = app_of(ctx)
    user = app.discord_users.find(read_snowflake(discord_user))
    if user is None:
        raise KeyNotFound
    app.api_keys.remove(user, key_id, actor=_ACTOR)
    print_done("removed key", key_id, as_json=as_json)


def read_snowflake(text: str) -> str:
    """What --discord-user was given."""
    try:
        return parse_snowflake(text)
    except InvalidUserId:
        raise OperatorError("--discord-user has to be a Discord user's id, a number of at most 20 digits") from None


def _ask_value() -> str:
    if not has_terminal():
        raise OperatorError("the key is missing: give --value-stdin, or run this in a terminal to be asked for it")
    value: str = typer.prompt("Key", hide_input=True, err=True)
    return value


def _key(listed: ListedKey) -> dict[str, Any]:
    key, last_four = listed
    return {
        "id": key.id,
        "service": key.service,
        "label": key.label,
        "last_four": last_four,
        "account": key.account,
        "permissions": key.permissions,
        "created": iso(key.created_at),
    }
