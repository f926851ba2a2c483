"""`doorward connection`."""

from typing import Annotated, Any

import typer

from doorward_server.cli.base import HELP, Before, Json, Limit, app_of, iso, print_list
from doorward_server.integrations import ListedConnection, Status

cli = typer.Typer(help="Users' connections to the services whose tokens are kept.", **HELP)
_MOST_SHOWN = 100
_COLUMNS = ("id", "user", "slug", "provider", "status", "reason", "expires", "obtained")


@cli.command("list", epilog="Example: doorward connection list --provider flo --status needs_reauth")
def list_connections(  # noqa: PLR0917 - an option for each
    ctx: typer.Context,
    user: Annotated[str | None, typer.Option(help="Only this user's (id or slug).")] = None,
    provider: Annotated[str | None, typer.Option(metavar="ID", help="Only those at this provider.")] = None,
    status: Annotated[Status | None, typer.Option(help="Only those with this status.")] = None,
    limit: Limit = _MOST_SHOWN,
    before: Before = None,
    as_json: Json = False,
) -> None:
    """List connections, the latest first; never their tokens.

    connected: the token is valid, or a refresh gets another one. expiring, expired: it ends within a day, or has
    ended, and there is no refresh token. needs_reauth: the user has to connect again.

    The reason tells why it is not in order (GRANT_REFUSED: by the provider, at a refresh), or why the last refresh
    of one that is connected failed. The token itself is valid until `expires`, and is as old as `obtained`.
    """
    app = app_of(ctx)
    user_id = app.users.get(user).id if user is not None else None
    found = app.integrations.latest(limit, user_id=user_id, provider=provider, status=status, before=before)
    print_list([_connection(one) for one in found], _COLUMNS, as_json=as_json)


def _connection(connection: ListedConnection) -> dict[str, Any]:
    return {
        "id": connection.id,
        "user": connection.user_id,
        "slug": connection.slug,
        "provider": connection.provider,
        "status": connection.status,
        "reason": connection.reason,
        "expires": iso(connection.expires_at),
        "obtained": iso(connection.obtained_at),
        "created": iso(connection.created_at),
    }
