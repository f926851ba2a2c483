"""`doorward user`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from doorward_server.cli.base import (
    HELP,
    Json,
    UserHandle,
    Yes,
    app_of,
    confirm,
    iso,
    print_done,
    print_json,
    print_one,
)
from doorward_server.cli.files import create as create_file
from doorward_server.errors import OperatorError
from doorward_server.models import User

cli = typer.Typer(help="The people whose connections, identities and sessions are kept.", **HELP)


@cli.command(epilog='Example: doorward user create --name "Ada Lovelace" --email ada@example.org')
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="The user's name; the slug is made of it.")],
    email: Annotated[str | None, typer.Option(help="The user's e-mail address.")] = None,
    as_json: Json = False,
) -> None:
    """Add a user of the operator's own. (API clients add theirs by POST /api/users.)"""
    user = app_of(ctx).users.create(name, email)
    if as_json:
        print_json(_user(user))
    else:
        typer.echo(f"created user {user.id} ({user.slug})")


@cli.command(epilog="Example: doorward user show ada")
def show(ctx: typer.Context, user: UserHandle, as_json: Json = False) -> None:
    """Show a user with the identities, connections and sessions. No secrets."""
    app = app_of(ctx)
    print_one(app.accounts.export(app.users.get(user)), as_json=as_json)


@cli.command(epilog="Example: doorward user export ada --output ada.json")
def export(
    ctx: typer.Context,
    user: UserHandle,
    output: Annotated[
        Path | None,
        typer.Option(help="A new file for it. \\[default: standard output]", allow_dash=True, dir_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write all that is known of a user as one JSON object, without the secrets."""
    app = app_of(ctx)
    found = app.users.get(user)
    exported = app.accounts.export(found)
    if output is None or str(output) == "-":
        typer.echo(json.dumps(exported, indent=None if as_json else 2))
        return
    try:
        if not create_file(output, json.dumps(exported, indent=2) + "\n"):
            raise OperatorError(f"{output} exists already: choose another name, or remove it")
    except OperatorError as error:
        raise OperatorError(f"--output: {error}") from None
    if as_json:
        print_json({"id": found.id, "output": str(output)})
    else:
        typer.echo(f"wrote {output}")


@cli.command(epilog="Example: doorward user delete ada --yes")
def delete(ctx: typer.Context, user: UserHandle, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a user with all that hangs on it; a running server revokes the tokens at the providers."""
    app = app_of(ctx)
    found = app.users.get(user)
    if not yes:
        confirm(f"Delete user {found.id} ({found.slug}) with all connections and sessions?")
    app.accounts.delete(found)
    print_done("deleted user", found.id, as_json=as_json)


def _user(user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "slug": user.slug,
        "name": user.name,
        "email": user.email,
        "created": iso(user.created_at),
    }
