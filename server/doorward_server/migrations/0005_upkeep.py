"""When connections are to be refreshed; since when jobs are abandoned; how to find what is past its time."""

import time

import peewee
from playhouse.migrate import SchemaMigrator

from doorward_server.database import ddl

STATEMENTS = """
ALTER TABLE connections ADD COLUMN refresh_at BIGINT;
CREATE INDEX connections_refresh ON connections (provider, refresh_at) WHERE refresh_at IS NOT NULL;
ALTER TABLE jobs ADD COLUMN abandoned_at BIGINT;
CREATE INDEX jobs_abandoned ON jobs (abandoned_at) WHERE abandoned_at IS NOT NULL;
CREATE INDEX deliveries_finished ON deliveries (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX consent_requests_finished ON consent_requests (finished_at) WHERE finished_at IS NOT NULL
"""
# As a pair is stored with the settings that are the default: 300 s before its end, but no more than half of its life
# before, and never when it lives for less than 20 s.
_DUE = """
UPDATE connections SET refresh_at = expires_at - CASE
    WHEN expires_at - obtained_at > 600000000 THEN 300000000 ELSE (expires_at - obtained_at) / 2 END
WHERE refresh_token IS NOT NULL AND needs_reauth = FALSE AND expires_at - obtained_at >= 20000000
"""
# Those that ran out long ago are many: they are refreshed within an hour, not all at once.
_LATE = "UPDATE connections SET refresh_at = {now} + (id - id / 3600 * 3600) * 1000000 WHERE refresh_at < {now}"
# Since when is not on record: they are kept for the whole time from now on.
_ABANDONED = "UPDATE jobs SET abandoned_at = {now} WHERE run_at IS NULL"


def up(_migrator: SchemaMigrator, database: peewee.Database) -> None:
    now = time.time_ns() // 1000
    ddl.run(database, STATEMENTS)
    for statement in (_DUE, _LATE.format(now=now), _ABANDONED.format(now=now)):
        ddl.run_one(database, statement)
