"""The database: connections, write transactions, and the schema's version, on SQLite or PostgreSQL.

Statements are written once, in words that both engines know but for these, which each engine's class sees to:
parameters are `?`; `INDEXED BY` is for SQLite, `FOR UPDATE SKIP LOCKED` for PostgreSQL, and taken out for the other;
`CAST(... AS BLOB)` gives a text's bytes.
Imports only `errors`.
"""

from doorward_server.database.base import Change, Database, storage_failures
from doorward_server.database.postgresql import PostgresqlDatabase
from doorward_server.database.sqlite import SqliteDatabase

__all__ = ["Change", "Database", "PostgresqlDatabase", "SqliteDatabase", "is_made", "open_database", "storage_failures"]


def open_database(url: str, busy_timeout: float, connections: int = 16) -> Database:
    """The database at `sqlite:///path` or `postgresql://...`, with at most so many connections to a server."""
    if url.startswith("postgresql://"):
        return PostgresqlDatabase(url, busy_timeout, connections)
    return SqliteDatabase.prepared(url, busy_timeout)


def is_made(url: str) -> bool:
    """False: opening the database at a URL would make a new file."""
    return url.startswith("postgresql://") or SqliteDatabase.path_of(url).exists()
