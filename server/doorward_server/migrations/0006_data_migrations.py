"""What was moved where: on both sides of a copy from one engine to another."""

import peewee
from playhouse.migrate import SchemaMigrator

from doorward_server.database import ddl

STATEMENTS = """
CREATE TABLE data_migrations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    place TEXT NOT NULL,
    is_source BOOLEAN NOT NULL,
    started_at BIGINT NOT NULL,
    finished_at BIGINT
)
"""


def up(_migrator: SchemaMigrator, database: peewee.Database) -> None:
    ddl.run(database, STATEMENTS)
