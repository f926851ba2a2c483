"""What every command needs: the app, the common options, and how results are shown."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.prompt import Confirm
from rich.table import Column, Table
from rich.text import Text

from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.errors import OperatorError

HELP: Any = {"context_settings": {"help_option_names": ["-h", "--help"]}, "no_args_is_help": True}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
# What a row's id may be: larger numbers are no ids in any database.
ROW_ID: Any = {"min": 1, "max": 2**63 - 1}
Before = Annotated[int | None, typer.Option(help="Only those before the one with this id: the next page.", **ROW_ID)]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")]
OverlapHours = Annotated[
    float, typer.Option(help="Hours that the previous secret stays valid; 0: it ends at once.", min=0, max=8760)
]
_PIPE_WIDTH = 10_000
# A time of ours, which people need not read to the microsecond: always UTC.
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}\+00:00")
UserHandle = Annotated[str, typer.Argument(metavar="USER", help="The user's id or slug.")]


def app_of(ctx: typer.Context) -> App:
    """The app on the home that the command line names."""
    return App(settings_module.load(ctx.obj))


def iso(time: datetime | None) -> str | None:
    """A time to the second; None stays None."""
    return time.isoformat(timespec="seconds") if time else None


def has_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()


def confirm(question: str) -> None:
    """Go on only if whoever sits at the terminal says so."""
    if not has_terminal():
        raise OperatorError("there is nobody to ask: give --yes, or run this in a terminal")
    if not Confirm.ask(question, console=Console(stderr=True), default=False):
        raise typer.Exit(1)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


def print_done(what: str, row_id: object, *, as_json: bool) -> None:
    """Tell what was done to what, such as `revoked session` 3."""
    if as_json:
        print_json({"id": row_id})
    else:
        typer.echo(f"{what} {row_id}")


def print_rotated(app: App, owner_id: str, what: str, secret: str, overlap: timedelta, *, as_json: bool) -> None:
    """A new secret, and when the one before ends."""
    until = iso(app.clock.now() + overlap)
    if as_json:
        print_json({"id": owner_id, what: secret, f"old_{what}_expires": until})
    else:
        typer.echo(f"id: {owner_id}\n{what}: {secret}")
        ends = f"is valid until {until}" if overlap else "has ended"
        typer.echo(f"the previous {what.replace('_', ' ')} {ends}", err=True)


def bar_of(*columns: ProgressColumn) -> Progress:
    """A bar on stderr, if that is a terminal that can draw one."""
    console = Console(stderr=True)
    is_dull = not console.is_terminal or console.is_dumb_terminal
    return Progress(*columns, console=console, transient=True, disable=is_dull)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told how much is done, and of how much."""
    with bar_of(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_list(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool) -> None:
    """Rows as a table of some of their members, or as JSON with all of them."""
    if as_json:
        print_json(list(rows))
        return
    console = Console()
    # Into a pipe goes a line for each row, whatever its width.
    look: Any = {} if console.is_terminal else {"box": None, "pad_edge": False}
    table = Table(*(Column(column.replace("_", " "), overflow="fold") for column in columns), **look)
    for row in rows:
        table.add_row(*(Text(_cell(row[column])) for column in columns))
    console.print(table, width=None if console.is_terminal else _PIPE_WIDTH, crop=False)


def print_one(row: Mapping[str, Any], *, as_json: bool) -> None:
    """One thing, a line for each of its members, or as JSON."""
    if as_json:
        print_json(row)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in row.items():
        table.add_row(name.replace("_", " "), Text(_cell(value), overflow="fold"))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, str) and _ISO.fullmatch(value):
        return value[:19].replace("T", " ")
    match value:
        case None | [] | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ("\n" if isinstance(value[0], dict) else ", ").join(map(_cell, value))
        case dict():
            return (
                "-"
                if not value
                else ", ".join(f"{name.replace('_', ' ')}: {_cell(inner)}" for name, inner in value.items())
            )
        case _:
            # Much of it was set by others, and must not steer the terminal.
            return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(value))
