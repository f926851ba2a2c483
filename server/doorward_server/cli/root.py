"""`doorward` itself: its options, and the commands that are about an installation."""

import io
import os
import sys
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from doorward_server import settings as settings_module
from doorward_server.app import App, Server, run_worker, supervise
from doorward_server.cli.base import HELP, Json, app_of, print_json
from doorward_server.cli.files import create, read_text
from doorward_server.crypto import MasterKey
from doorward_server.database import open_database
from doorward_server.errors import DoorwardError, OperatorError

cli = typer.Typer(
    help="Doorward connects users to other services, keeps their tokens and keys, and shares what they allow.",
    epilog="Settings: doorward.toml in the home, or DOORWARD_* in the environment.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **HELP,
)


def run() -> None:
    """The console script: errors are one line on stderr, exit code 1."""
    os.umask(0o077)  # whatever Doorward creates is its owner's alone
    if not all(map(_is_text, sys.argv)):
        sys.exit("doorward: an argument is not UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show must not stop a command
            stream.reconfigure(errors="backslashreplace")
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
        create(config, _starter_settings(settings), check=partial(settings_module.load, ctx.obj))
        created.append(config)
    app = App(settings_module.load(ctx.obj))
    key_file = app.settings.key_file
    if app.settings.master_key is None and not key_file.exists():
        create(
            key_file,
            f"# Doorward's master key. Back it up apart from the database.\n{MasterKey.generate()}\n",
        )
        created.append(key_file)
    key_id = app.keys.sealing_id
    if as_json:
        print_json({"id": key_id, "home": str(home), "created": [str(path) for path in created]})
        return
    for path in created:
        typer.echo(f"created {path}")
    typer.echo(f"ready: {home} (master key {key_id})" if created else f"nothing to do: {home} has all it needs")


@cli.command(epilog="Example: doorward serve --workers 2")
def serve(
    ctx: typer.Context,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Server processes, on as many ports from DOORWARD_GRPC_PORT on; the gateway has to know by "
            "DOORWARD_WORKERS. SIGHUP replaces one after the other. \\[default: $DOORWARD_WORKERS, or 1]",
            min=1,
            max=64,
        ),
    ] = None,
    work: Annotated[
        bool, typer.Option("--work/--no-work", help="Also do the work in the background: deliveries, revocations.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Run the gRPC server until SIGTERM or Ctrl-C. The log goes to stderr."""
    settings, on_ready = settings_module.load(ctx.obj, workers=workers), print_json if as_json else None
    if settings.workers > 1:
        supervise(settings, works=work, on_ready=on_ready)
        return
    Server(App(settings), works=work).run(on_ready)
    _end_at_once()


@cli.command(epilog="Example: doorward work")
def work(ctx: typer.Context, as_json: Json = False) -> None:
    """Do the work in the background until SIGTERM or Ctrl-C, beside servers that run with --no-work."""
    run_worker(app_of(ctx), on_ready=print_json if as_json else None)
    _end_at_once()


@cli.command(epilog="Example: doorward migrate")
def migrate(ctx: typer.Context, as_json: Json = False) -> None:
    """Bring the database's schema up to date."""
    settings = settings_module.load(ctx.obj)
    database = open_database(settings.database_url, settings.database.busy_timeout)
    database.check_schema()
    applied = database.migrate()
    if as_json:
        print_json({"applied": applied})
    else:
        typer.echo("\n".join(f"applied {name}" for name in applied) or "the schema is up to date")


def _starter_settings(source: Path | None) -> str:
    if source is None:
        return (files("doorward_server") / "starter.toml").read_text()
    return read_text(source, "--settings")


def _end_at_once() -> None:
    # A call that outlived the drain still holds a thread, which Python would wait for. What is cut
    # off here is cut off as by SIGKILL, which costs nothing that was answered.
    sys.stdout.flush()
    os._exit(0)
