"""`doorward migrate-data`."""

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from doorward_server import settings as settings_module
from doorward_server.cli.base import Json, bar_of, print_json, print_list
from doorward_server.clock import Clock
from doorward_server.database import PostgresqlDatabase, SqliteDatabase, open_database
from doorward_server.database.transfer import Transfer
from doorward_server.errors import OperatorError
from doorward_server.models import to_micros


def migrate_data(
    ctx: typer.Context,
    to: Annotated[str, typer.Option(help="The database to move to: postgresql://USER:PASSWORD@HOST/DATABASE, empty.")],
    as_json: Json = False,
) -> None:
    """Copy all data of this home from SQLite into PostgreSQL, and compare. Stop everything on the home first."""
    settings = settings_module.load(ctx.obj)
    section = settings.database
    if not settings.database_url.startswith("sqlite:"):
        raise OperatorError("the data are in PostgreSQL already: [database] url (or DOORWARD_DATABASE_URL) says so")
    if not to.startswith("postgresql://"):
        raise OperatorError("--to has to be postgresql://USER:PASSWORD@HOST/DATABASE")
    source = SqliteDatabase.alone(settings.database_url, section.busy_timeout)
    target = open_database(to, section.busy_timeout, section.connections)
    assert isinstance(target, PostgresqlDatabase)  # noqa: S101 - by its URL
    for database in (source, target):
        if database.check_schema():
            database.migrate()
    with bar_of(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()) as bar:
        task = bar.add_task("")
        copied = Transfer(source, target, to_micros(Clock().now())).run(
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        )
    rows = [table._asdict() for table in copied]
    if as_json:
        print_json({"to": target.place, "tables": rows})
        return
    print_list([{**row, "sha256": row["sha256"][:16]} for row in rows], ("table", "rows", "sha256"), as_json=False)
    typer.echo(f"all rows are in {target.place}, and the same. Now set DOORWARD_DATABASE_URL, and start again")
