"""The command line of `doorward`. Imports `app` and the domain."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from doorward_server import settings as settings_module
from doorward_server.app import App, Server
from doorward_server.crypto import MasterKey
from doorward_server.database import open_database
from doorward_server.errors import DoorwardError, OperatorError
from doorward_server.models import ServiceToken, Session, User
from doorward_server.service_tokens import Role

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
_HELP: Any = {"context_settings": {"help_option_names": ["-h", "--help"]}, "no_args_is_help": True}

cli = typer.Typer(
    help="Doorward connects users to other services and keeps their tokens.",
    epilog="Settings: doorward.toml in the home, or DOORWARD_* in the environment.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **_HELP,
)
user_cli = typer.Typer(help="The people whose connections are kept.", **_HELP)
session_cli = typer.Typer(help="What a browser's cookie stands for.", **_HELP)
token_cli = typer.Typer(help="Service tokens: what backends and the bot present on the gRPC port.", **_HELP)
cli.add_typer(user_cli, name="user")
cli.add_typer(session_cli, name="session")
cli.add_typer(token_cli, name="token")


def run() -> None:
    """The console script: errors are one line on stderr, exit code 1."""
    os.umask(0o077)  # whatever Doorward creates is its owner's alone
    if not all(map(_is_text, sys.argv)):
        sys.exit("doorward: an argument is not UTF-8")
    try:
        cli(prog_name="doorward")
    except DoorwardError as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        sys.exit(f"doorward: {error}{cause}")
    except OSError as error:
        sys.exit(f"doorward: {error.filename or ''}: {error.strerror or error}".replace(": : ", ": "))


def _is_text(argument: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"doorward {version('doorward')}")
        raise typer.Exit


@cli.callback()
def _options(
    ctx: typer.Context,
    home: Annotated[Path | None, typer.Option(help="The home. \\[default: $DOORWARD_HOME, or var/]")] = None,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    ctx.obj = home


def _app(ctx: typer.Context) -> App:
    return App(settings_module.load(ctx.obj))


# The server


@cli.command(epilog="Example: doorward init")
def init(
    ctx: typer.Context,
    settings: Annotated[
        Path | None,
        typer.Option(help="Start with a copy of this settings file (`-`: standard input).", allow_dash=True),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make what is missing: the home, the settings file, the master key. Changes nothing that exists."""
    home, config = settings_module.places(ctx.obj)
    created = []
    if not home.exists():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        created.append(home)
    if not home.is_dir():
        raise OperatorError(f"the home {home} is a file: set DOORWARD_HOME or --home to a folder")
    if not config.exists():
        _create(config, _starter_settings(settings), check=partial(settings_module.load, ctx.obj))
        created.append(config)
    app = App(settings_module.load(ctx.obj))
    key_file = app.settings.key_file
    if app.settings.master_key is None and not key_file.exists():
        _create(
            key_file,
            f"# Doorward's master key. Back it up apart from the database.\n{MasterKey.generate()}\n",
        )
        created.append(key_file)
    key_id = app.keys.sealing_id
    if as_json:
        _print_json({"id": key_id, "home": str(home), "created": [str(path) for path in created]})
        return
    for path in created:
        typer.echo(f"created {path}")
    typer.echo(f"ready: {home} (master key {key_id})" if created else f"nothing to do: {home} has all it needs")


@cli.command(epilog="Example: doorward serve")
def serve(ctx: typer.Context, as_json: Json = False) -> None:
    """Run the gRPC server until SIGTERM or Ctrl-C. The log goes to stderr."""
    Server(_app(ctx)).run(on_ready=_print_json if as_json else None)
    # A call that outlived the drain still holds a thread, which Python would wait for. What is cut
    # off here is cut off as by SIGKILL, which costs nothing that was answered.
    sys.stdout.flush()
    os._exit(0)


@cli.command(epilog="Example: doorward migrate")
def migrate(ctx: typer.Context, as_json: Json = False) -> None:
    """Bring the database's schema up to date."""
    settings = settings_module.load(ctx.obj)
    database = open_database(settings.database_url, settings.database.busy_timeout)
    database.check_schema()
    applied = database.migrate()
    if as_json:
        _print_json({"applied": applied})
    else:
        typer.echo("\n".join(f"applied {name}" for name in applied) or "the schema is up to date")


# Users


@user_cli.command("create", epilog='Example: doorward user create --name "Ada Lovelace" --email ada@example.org')
def create_user(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="The user's name; the slug is made of it.")],
    email: Annotated[str | None, typer.Option(help="The user's e-mail address.")] = None,
    as_json: Json = False,
) -> None:
    """Add a user."""
    user = _app(ctx).users.create(name, email)
    if as_json:
        _print_json(_user(user))
    else:
        typer.echo(f"created user {user.id} ({user.slug})")


# Sessions


@session_cli.command("create", epilog="Example: COOKIE=$(doorward session create --user ada)")
def create_session(
    ctx: typer.Context,
    user: Annotated[str, typer.Option(help="The user's id or slug.")],
    as_json: Json = False,
) -> None:
    """Start a session and print the value of its cookie, doorward_session. It is shown only now."""
    app = _app(ctx)
    session, cookie = app.sessions.create(app.users.get(user))
    if as_json:
        _print_json({**_session(session), "cookie": cookie})
    else:
        typer.echo(cookie)


@session_cli.command("list", epilog="Example: doorward session list --user ada")
def list_sessions(
    ctx: typer.Context,
    user: Annotated[str | None, typer.Option(help="Only this user's (id or slug).")] = None,
    as_json: Json = False,
) -> None:
    """List the live sessions."""
    app = _app(ctx)
    sessions = app.sessions.list(app.users.get(user) if user else None)
    _print_list(
        [_session(session) for session in sessions],
        ("id", "user", "slug", "created", "expires"),
        as_json=as_json,
    )


@session_cli.command("revoke", epilog="Example: doorward session revoke 3")
def revoke_session(
    ctx: typer.Context,
    session_id: Annotated[int, typer.Argument(help="Its id.")],
    as_json: Json = False,
) -> None:
    """End a session at once."""
    _app(ctx).sessions.revoke(session_id)
    _print_revoked("session", session_id, as_json=as_json)


# Service tokens


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
    token, value = _app(ctx).service_tokens.create(
        (str(one) for one in role), name, timedelta(days=days) if days else None
    )
    if as_json:
        _print_json({**_token(token), "token": value})
    else:
        typer.echo(value)


@token_cli.command("list", epilog="Example: doorward token list")
def list_tokens(ctx: typer.Context, as_json: Json = False) -> None:
    """List the service tokens that were not revoked."""
    tokens = _app(ctx).service_tokens.list()
    columns = ("id", "name", "roles", "created", "expires", "last_used")
    _print_list([_token(token) for token in tokens], columns, as_json=as_json)


@token_cli.command("revoke", epilog="Example: doorward token revoke 2")
def revoke_token(
    ctx: typer.Context,
    token_id: Annotated[int, typer.Argument(help="Its id.")],
    as_json: Json = False,
) -> None:
    """End a service token at once."""
    _app(ctx).service_tokens.revoke(token_id)
    _print_revoked("service token", token_id, as_json=as_json)


# What is shown


def _user(user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "slug": user.slug,
        "name": user.name,
        "email": user.email,
        "created": _time(user.created_at),
    }


def _session(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "user": session.user.id,
        "slug": session.user.slug,
        "created": _time(session.created_at),
        "expires": _time(session.expires_at),
    }


def _token(token: ServiceToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "roles": token.roles.split(","),
        "created": _time(token.created_at),
        "expires": _time(token.expires_at),
        "last_used": _time(token.last_used_at),
    }


def _time(time: datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


def _print_revoked(what: str, row_id: int, *, as_json: bool) -> None:
    if as_json:
        _print_json({"id": row_id})
    else:
        typer.echo(f"revoked {what} {row_id}")


def _print_list(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        _print_json(list(rows))
        return
    table = Table(*(Column(column.replace("_", " "), overflow="fold") for column in columns))
    for row in rows:
        table.add_row(*(Text(_cell(row[column])) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(value) if isinstance(value, list) else str(value)


# Files


def _starter_settings(source: Path | None) -> str:
    if source is None:
        return (files("doorward_server") / "starter.toml").read_text()
    try:
        read = sys.stdin.buffer.read if str(source) == "-" else source.read_bytes
        return read().decode()
    except OSError as error:
        raise OperatorError(f"--settings: cannot read {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OperatorError(f"--settings: {source} is not a text file") from None


def _create(path: Path, text: str, check: Callable[[Path], object] = lambda _: None) -> None:
    """Write a file of mode 0600 that is whole and checked from the first moment; one that exists stays as it is."""
    try:
        # Its name is unlike any other process's, on whatever machine.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OperatorError(f"cannot write {path}: {error.strerror}. Make its folder, and make it writable") from None
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        check(draft)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    except OSError as error:
        raise OperatorError(f"cannot write {path}: {error.strerror}") from None
    except OperatorError as error:
        raise OperatorError(str(error).replace(name, str(path))) from None
    finally:
        draft.unlink(missing_ok=True)
