"""`doorward` itself: its options, and the commands that are about an installation."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from doorward_server import settings as settings_module
from doorward_server.app import App, Server, run_worker, supervise
from doorward_server.cli.base import HELP, Json, app_of, print_json, print_list, progress
from doorward_server.cli.files import create, create_by, read_text
from doorward_server.crypto import MasterKey
from doorward_server.database import Database, is_made, open_database
from doorward_server.doctor import Finding, Verdict, examine
from doorward_server.errors import DoorwardError, OperatorError

# Of the tables in a backup, those whose rows are told to people.
_TOLD = ("users", "connections", "api_keys", "audit_events")

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
        bool,
        typer.Option("--work/--no-work", help="Also do the work in the background: deliveries, refreshes."),
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


@cli.command(epilog="Example: doorward doctor")
def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Look at everything: settings, key, database, what waits, providers, server and gateway. Changes nothing.

    What is not in order is told together with what to do about it. Exit code 1 if there is a problem; warnings are
    none. Providers are asked for the heads of their pages, by the rules for all requests ([outbound]).
    """
    findings = list(examine(ctx.obj))
    if as_json:
        print_json({"problems": _count(findings, Verdict.PROBLEM), "findings": [one._asdict() for one in findings]})
    else:
        rows = [{**one._asdict(), "finding": one.told + (f": {one.mend}" if one.mend else "")} for one in findings]
        print_list(rows, ("verdict", "check", "finding"), as_json=False)
    if _count(findings, Verdict.PROBLEM):
        raise typer.Exit(1)


@cli.command(epilog="Example: doorward backup /backups/doorward-$(date +%F).db")
def backup(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file for the copy.", dir_okay=False)],
    as_json: Json = False,
) -> None:
    """Copy the database into a file, while servers go on writing: all of it, as it is at one moment.

    The file appears when it is whole and checked; one that exists is never overwritten. The master key is not in
    it: keep that in another place. docs/operating.md tells how to restore.
    """
    database = _existing_database(settings_module.load(ctx.obj))
    taken = f"{file} exists already: choose another name, or remove it"
    if os.path.lexists(file):
        raise OperatorError(taken)
    rows: dict[str, int] = {}
    with _interrupted_by_sigterm(), progress("copying") as tell:
        is_new = create_by(file, lambda draft: rows.update(database.copy_to(draft, tell)))
    if not is_new:
        raise OperatorError(taken)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(file.absolute()), "bytes": size, "rows": rows})
    else:
        counts = ", ".join(f"{rows.get(table, 0)} {table.replace('_', ' ')}" for table in _TOLD)
        typer.echo(f"wrote {file}: {decimal(size)}, {counts}")


def _count(findings: Sequence[Finding], verdict: Verdict) -> int:
    return sum(one.verdict is verdict for one in findings)


def _starter_settings(source: Path | None) -> str:
    if source is None:
        return (files("doorward_server") / "starter.toml").read_text()
    return read_text(source, "--settings")


def _end_at_once() -> None:
    # A call that outlived the drain still holds a thread, which Python would wait for. What is cut
    # off here is cut off as by SIGKILL, which costs nothing that was answered.
    sys.stdout.flush()
    os._exit(0)


def _existing_database(settings: settings_module.Settings) -> Database:
    """The database, with whatever schema it has: a backup may be made to be able to go back to that."""
    if not is_made(settings.database_url):
        raise OperatorError("there is no database yet, so there is nothing to copy: `doorward serve` makes it")
    return open_database(settings.database_url, settings.database.busy_timeout)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that nothing half is left."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
