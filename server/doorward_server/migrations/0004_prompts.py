"""Prompts whose message does not show their outcome yet; attempts that fence off earlier ones; jobs by kind."""

import peewee
from playhouse.migrate import SchemaMigrator

from doorward_server.database import ddl

STATEMENTS = """
ALTER TABLE consent_requests ADD COLUMN message_closed_at BIGINT;
UPDATE consent_requests SET message_closed_at = finished_at;
CREATE INDEX consent_requests_closable ON consent_requests (lease_expires_at)
    WHERE finished_at IS NOT NULL AND (message IS NOT NULL OR lease_epoch > 0) AND message_closed_at IS NULL;
CREATE INDEX consent_requests_prompted ON consent_requests (id) WHERE status = 'prompted';
ALTER TABLE deliveries ADD COLUMN begun INTEGER NOT NULL DEFAULT 0;
ALTER TABLE deliveries ADD COLUMN under_way BOOLEAN NOT NULL DEFAULT FALSE;
CREATE INDEX jobs_kind_due ON jobs (kind, run_at) WHERE run_at IS NOT NULL
"""


def up(_migrator: SchemaMigrator, database: peewee.Database) -> None:
    ddl.run(database, STATEMENTS)
