"""`doorward session` and `doorward token`."""

from datetime import timedelta
from typing import Annotated, Any

import typer

from doorward_server.cli.base import HELP, ROW_ID, Json, app_of, iso, print_done, print_json, print_list
from doorward_server.models import ServiceToken, Session
from doorward_server.service_tokens import Role

session_cli = typer.Typer(help="What a browser's cookie stands for.", **HELP)
token_cli = typer.Typer(help="Service tokens: what backends, applications and the bot present over gRPC.", **HELP)


@session_cli.command("create", epilog="Example: COOKIE=$(doorward session create --user ada)")
def create_session(
    ctx: typer.Context,
    user: Annotated[str, typer.Option(help="The user's id or slug.")],
    as_json: Json = False,
) -> None:
    """Start a session and print the value of its cookie, doorward_session. It is shown only now."""
    app = app_of(ctx)
    session, cookie = app.sessions.create(app.users.get(user))
    if as_json:
        print_json({**_session(session), "cookie": cookie})
    else:
        typer.echo(cookie)


@session_cli.command("list", epilog="Example: doorward session list --user ada")
def list_sessions(
    ctx: typer.Context,
    user: Annotated[str | None, typer.Option(help="Only this user's (id or slug).")] = None,
    as_json: Json = False,
) -> None:
    """List the live sessions."""
    app = app_of(ctx)
    sessions = app.sessions.list(app.users.get(user) if user else None)
    print_list(
        [_session(session) for session in sessions],
        ("id", "user", "slug", "created", "expires"),
        as_json=as_json,
    )


@session_cli.command("revoke", epilog="Example: doorward session revoke 3")
def revoke_session(
    ctx: typer.Context,
    session_id: Annotated[
        int, typer.Argument(metavar="SESSION_ID", help="The session's id; see `doorward session list`.", **ROW_ID)
    ],
    as_json: Json = False,
) -> None:
    """End a session at once."""
    app_of(ctx).sessions.revoke(session_id)
    print_done("revoked session", session_id, as_json=as_json)


@token_cli.command("create", epilog="Example: TOKEN=$(doorward token create --role backend --name shop --days 90)")
def create_token(
    ctx: typer.Context,
    role: Annotated[list[Role], typer.Option(help="What it may be used for; may be repeated.")],
    name: Annotated[str, typer.Option(help="Who has it, for your own records.")] = "",
    days: Annotated[
        int | None,
        typer.Option(help="It expires after so many days. \\[default: never]", min=1, max=36500),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a service token and print its value. It is shown only now."""
    token, value = app_of(ctx).service_tokens.create(
        (str(one) for one in role), name, timedelta(days=days) if days else None
    )
    if as_json:
        print_json({**_token(token), "token": value})
    else:
        typer.echo(value)


@token_cli.command("list", epilog="Example: doorward token list")
def list_tokens(ctx: typer.Context, as_json: Json = False) -> None:
    """List the service tokens that were not revoked."""
    tokens = app_of(ctx).service_tokens.list()
    columns = ("id", "name", "roles", "application", "created", "expires", "last_used")
    print_list([_token(token) for token in tokens], columns, as_json=as_json)


@token_cli.command("revoke", epilog="Example: doorward token revoke 2")
def revoke_token(
    ctx: typer.Context,
    token_id: Annotated[
        int, typer.Argument(metavar="TOKEN_ID", help="The token's id; see `doorward token list`.", **ROW_ID)
    ],
    as_json: Json = False,
) -> None:
    """End a service token at once."""
    app_of(ctx).service_tokens.revoke(token_id)
    print_done("revoked service token", token_id, as_json=as_json)


def _session(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "user": session.user.id,
        "slug": session.user.slug,
        "created": iso(session.created_at),
        "expires": iso(session.expires_at),
    }


def _token(token: ServiceToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "roles": [role for role in token.roles.split(",") if role],
        "application": token.application_id,
        "created": iso(token.created_at),
        "expires": iso(token.expires_at),
        "last_used": iso(token.last_used_at),
    }
