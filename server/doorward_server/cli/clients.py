"""`doorward client`."""

from datetime import timedelta
from typing import Annotated, Any

import typer

from doorward_server.cli.base import (
    HELP,
    Json,
    OverlapHours,
    app_of,
    iso,
    print_done,
    print_json,
    print_list,
    print_rotated,
)
from doorward_server.models import ApiClient

cli = typer.Typer(help="API clients: programs that keep their users here, over REST with HTTP Basic.", **HELP)
ClientId = Annotated[str, typer.Argument(metavar="ID", help="The client's id; see `doorward client list`.")]


@cli.command(epilog="Example: doorward client create --name shop")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="Who it is, for your own records.")],
    as_json: Json = False,
) -> None:
    """Add an API client; print its id (the user name of HTTP Basic) and its secret, which is shown only this once."""
    client, secret = app_of(ctx).clients.create(name)
    if as_json:
        print_json({**_client(client), "secret": secret})
    else:
        typer.echo(f"id: {client.id}\nsecret: {secret}")


@cli.command("list", epilog="Example: doorward client list")
def list_clients(ctx: typer.Context, as_json: Json = False) -> None:
    """List the API clients, disabled ones too."""
    clients = app_of(ctx).clients.list()
    print_list([_client(client) for client in clients], ("id", "name", "created", "disabled"), as_json=as_json)


@cli.command(epilog="Example: doorward client rotate dwc_0123456789abcdef --overlap-hours 1")
def rotate(
    ctx: typer.Context,
    client_id: ClientId,
    overlap_hours: OverlapHours = 24,
    as_json: Json = False,
) -> None:
    """Make a new secret and print it; it is shown only this once. The one before the last ends at once."""
    app = app_of(ctx)
    overlap = timedelta(hours=overlap_hours)
    secret = app.clients.rotate(client_id, overlap)
    print_rotated(app, client_id, "secret", secret, overlap, as_json=as_json)


@cli.command(epilog="Example: doorward client disable dwc_0123456789abcdef")
def disable(ctx: typer.Context, client_id: ClientId, as_json: Json = False) -> None:
    """Refuse a client's calls from now on. Its users stay, and can still log in by code."""
    app_of(ctx).clients.enable(client_id, enabled=False)
    print_done("disabled client", client_id, as_json=as_json)


@cli.command(epilog="Example: doorward client enable dwc_0123456789abcdef")
def enable(ctx: typer.Context, client_id: ClientId, as_json: Json = False) -> None:
    """Let a disabled client call again, with the secrets that it had."""
    app_of(ctx).clients.enable(client_id, enabled=True)
    print_done("enabled client", client_id, as_json=as_json)


def _client(client: ApiClient) -> dict[str, Any]:
    return {
        "id": client.id,
        "name": client.name,
        "created": iso(client.created_at),
        "disabled": iso(client.disabled_at),
    }
