"""Moving from SQLite to PostgreSQL: all rows are copied, and then compared.

A copy goes on where an earlier one was cut off: rows are copied in the order of their keys, a batch in a transaction,
so the largest key on the other side tells how far it came. What is being copied, or was, says so in its table
`data_migrations`: nobody works on a half copy, or goes on with what was left behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import psycopg

from doorward_server.database.base import Database, Row
from doorward_server.database.postgresql import PostgresqlDatabase
from doorward_server.database.sqlite import SqliteDatabase
from doorward_server.errors import OperatorError

_BATCH = 5000
# What each side has of its own.
_NOT_COPIED = {"schema_migration", "sqlite_sequence", "data_migrations"}
_BEGUN = "INSERT INTO data_migrations (place, is_source, started_at) VALUES (?, FALSE, ?)"
_ENDED = "UPDATE data_migrations SET finished_at = ? WHERE finished_at IS NULL"
_LEFT = "INSERT INTO data_migrations (place, is_source, started_at, finished_at) VALUES (?, TRUE, ?, ?)"
_STATE = "SELECT place, is_source, finished_at FROM data_migrations ORDER BY id DESC LIMIT 1"

# Told of the table, how many of its rows are done, and how many there are.
Progress = Callable[[str, int, int], None]


class Copied(NamedTuple):
    """What a table holds: on both sides the same."""

    table: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class _Table:
    name: str
    key: str
    columns: Sequence[str]
    # Positions of truth values, which SQLite keeps as numbers.
    booleans: Sequence[int]

    def row(self, values: Row) -> Row:
        """As PostgreSQL has it."""
        row = list(values)
        for position in self.booleans:
            row[position] = None if row[position] is None else bool(row[position])
        return tuple(row)


def refuse_moved(database: Database) -> None:
    """Raise OperatorError on a database that was left for another one, or that holds half a copy."""
    row = database.fetch_one(_STATE, ())
    if row is None:
        return
    place, is_source, finished_at = row
    if is_source:
        raise OperatorError(
            f"the data of {database.place} were moved to {place}: set DOORWARD_DATABASE_URL. To go on here all the "
            "same, without what happened there, empty the table data_migrations"
        )
    if finished_at is None:
        raise OperatorError(
            f"{database.place} holds a part of {place}: run `doorward migrate-data` again, which goes on with it"
        )


@dataclass(frozen=True)
class Transfer:
    """Copies a SQLite database that nobody else uses into an empty PostgreSQL database of the same schema."""

    source: SqliteDatabase
    target: PostgresqlDatabase
    now: int  # microseconds

    def run(self, on_progress: Progress) -> list[Copied]:
        """Copy, compare, and leave the source to rest. Raises OperatorError."""
        tables = self._tables()
        with self.target.operators_view():
            self._begin(tables)
            for table in tables:
                self._copy(table, on_progress)
                self._set_sequence(table)
            copied = [self._compare(table, on_progress) for table in tables]
        # In this order there is no moment at which both can be used.
        with self.source.operators_view(), self.source.writing():
            self.source.execute(_LEFT, (self.target.place, self.now, self.now))
        with self.target.operators_view(), self.target.writing():
            self.target.execute(_ENDED, (self.now,))
        return copied

    def _tables(self) -> list[_Table]:
        """Those that others refer to come first."""
        engine = self.source.engine
        names = [name for name in engine.get_tables() if name not in _NOT_COPIED]
        # A table may refer to itself, which says nothing of the order.
        references = {name: {key.dest_table for key in engine.get_foreign_keys(name)} - {name} for name in names}
        return [self._table(name) for name in TopologicalSorter(references).static_order()]

    def _table(self, name: str) -> _Table:
        types = {column.name: column.data_type for column in self.target.engine.get_columns(name)}
        columns = [column.name for column in self.source.engine.get_columns(name)]
        [key] = self.source.engine.get_primary_keys(name)
        booleans = [position for position, column in enumerate(columns) if types[column] == "boolean"]
        return _Table(name, key, columns, booleans)

    def _begin(self, tables: Sequence[_Table]) -> None:
        """Write down that a copy is being made; refuse what holds anything else than the beginning of this one."""
        with self.target.writing():
            state = self.target.execute(_STATE, ())
            if state is not None and state[2] is None:
                if state[0] == self.source.place:
                    return
                raise OperatorError(
                    f"{self.target.place} holds a part of {state[0]}, or will: make a new database, and give that"
                )
            refuse_moved(self.source)  # what happened since it was left would be missing
            for table in tables:
                if self.target.execute(f"SELECT 1 FROM {table.name} LIMIT 1", ()) is not None:  # noqa: S608
                    raise OperatorError(
                        f"{self.target.place} is not empty (there are rows in {table.name}): make a new database, "
                        "and give that"
                    )
            self.target.execute(_BEGUN, (self.source.place, self.now))

    def _copy(self, table: _Table, on_progress: Progress) -> None:
        total, done = _count(self.source, table), _count(self.target, table)
        (last,) = self.target.fetch_one(f"SELECT max({table.key}) FROM {table.name}", ()) or (None,)  # noqa: S608
        for batch in _batches(self.source, table, after=last):
            self._insert(table, [table.row(row) for row in batch])
            done += len(batch)
            on_progress(f"copying {table.name}", done, total)

    def _insert(self, table: _Table, rows: Sequence[Row]) -> None:
        statement = f"COPY {table.name} ({', '.join(table.columns)}) FROM STDIN"
        with self.target.writing():
            cursor: psycopg.Cursor = self.target.engine.cursor()  # type: ignore[no-untyped-call]
            with cursor.copy(statement.encode()) as copy:
                for row in rows:
                    copy.write_row(row)

    def _set_sequence(self, table: _Table) -> None:
        """New rows get the numbers that they would have got: none is given twice, not even a deleted row's."""
        row = self.source.fetch_one("SELECT seq FROM sqlite_sequence WHERE name = ?", (table.name,))
        if row is not None and row[0]:
            self.target.fetch_one("SELECT setval(pg_get_serial_sequence(?, ?), ?)", (table.name, table.key, row[0]))

    def _compare(self, table: _Table, on_progress: Progress) -> Copied:
        ours, theirs = (self._digest(database, table, on_progress) for database in (self.source, self.target))
        if ours != theirs:
            raise OperatorError(
                f"the copy of {table.name} differs ({ours.rows} rows here, {theirs.rows} there): make a new database, "
                "and try again"
            )
        return ours

    def _digest(self, database: Database, table: _Table, on_progress: Progress) -> Copied:
        total, rows, digest = _count(database, table), 0, hashlib.sha256()
        for batch in _batches(database, table):
            for row in batch:
                digest.update(repr(table.row(row)).encode("utf-8", "surrogatepass"))
            rows += len(batch)
            on_progress(f"comparing {table.name}", rows, total)
        return Copied(table.name, rows, digest.hexdigest())


def _count(database: Database, table: _Table) -> int:
    (count,) = database.fetch_one(f"SELECT count(*) FROM {table.name}", ()) or (0,)  # noqa: S608
    return int(count)


def _batches(database: Database, table: _Table, after: Any = None) -> Iterator[list[Row]]:
    """All rows with keys above `after`, in the order of their keys, which is the same on both engines."""
    select = f"SELECT {', '.join(table.columns)} FROM {table.name}"  # noqa: S608
    order, position = f"ORDER BY {table.key} LIMIT ?", list(table.columns).index(table.key)
    while True:
        where, parameters = ("", (_BATCH,)) if after is None else (f"WHERE {table.key} > ?", (after, _BATCH))
        rows = database.fetch_rows(f"{select} {where} {order}", parameters)
        if not rows:
            return
        yield rows
        after = rows[-1][position]
