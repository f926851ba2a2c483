"""API keys, applications, consent requests with their grants and deliveries, blocks, and the audit trail."""

import peewee
from playhouse.migrate import SchemaMigrator

from doorward_server.database import ddl

STATEMENTS = """
CREATE TABLE api_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    service TEXT NOT NULL,
    label TEXT NOT NULL,
    value BLOB NOT NULL,
    account TEXT,
    permissions TEXT NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX api_keys_user ON api_keys (user_id, service);

CREATE TABLE applications (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    name_key TEXT NOT NULL UNIQUE,
    callback_prefixes TEXT NOT NULL,
    callback_format TEXT NOT NULL,
    enabled BOOLEAN NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE TABLE application_secrets (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    application_id TEXT NOT NULL REFERENCES applications (id) ON DELETE CASCADE,
    secret_hash BLOB NOT NULL UNIQUE,
    created_at BIGINT NOT NULL,
    expires_at BIGINT
);
CREATE INDEX application_secrets_application ON application_secrets (application_id);
CREATE TABLE signing_secrets (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    application_id TEXT NOT NULL REFERENCES applications (id) ON DELETE CASCADE,
    secret BLOB NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT
);
CREATE INDEX signing_secrets_application ON signing_secrets (application_id);
ALTER TABLE jobs ADD COLUMN failures INTEGER NOT NULL DEFAULT 0;
ALTER TABLE service_tokens ADD COLUMN application_id TEXT REFERENCES applications (id) ON DELETE CASCADE;

CREATE TABLE consent_requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    prompt_id INTEGER,
    discord_user TEXT NOT NULL,
    application_id TEXT REFERENCES applications (id),
    name TEXT NOT NULL,
    callback TEXT NOT NULL,
    state BLOB NOT NULL,
    address TEXT NOT NULL,
    status TEXT NOT NULL,
    lease_epoch INTEGER NOT NULL,
    lease_expires_at BIGINT NOT NULL,
    message TEXT,
    deadline_at BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    finished_at BIGINT
);
CREATE INDEX consent_requests_prompt ON consent_requests (prompt_id);
CREATE INDEX consent_requests_leasable ON consent_requests (lease_expires_at) WHERE status = 'pending';
CREATE INDEX consent_requests_user ON consent_requests (discord_user, id);
CREATE INDEX consent_requests_address ON consent_requests (address, created_at);
CREATE INDEX consent_requests_application ON consent_requests (application_id, created_at);

CREATE TABLE grants (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id INTEGER NOT NULL UNIQUE REFERENCES consent_requests (id) ON DELETE CASCADE,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL,
    revoked_at BIGINT
);
CREATE INDEX grants_user ON grants (user_id);
CREATE TABLE grant_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    grant_id INTEGER NOT NULL REFERENCES grants (id) ON DELETE CASCADE,
    key_id INTEGER NOT NULL REFERENCES api_keys (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    UNIQUE (grant_id, key_id)
);
CREATE INDEX grant_keys_key ON grant_keys (key_id);

CREATE TABLE application_blocks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    application TEXT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id INTEGER NOT NULL UNIQUE REFERENCES consent_requests (id) ON DELETE CASCADE,
    webhook_id TEXT NOT NULL UNIQUE,
    error TEXT,
    status TEXT NOT NULL,
    carried_keys BOOLEAN NOT NULL,
    attempts INTEGER NOT NULL,
    next_attempt_at BIGINT,
    created_at BIGINT NOT NULL,
    finished_at BIGINT
);
CREATE INDEX deliveries_status ON deliveries (status, id);
CREATE TABLE delivery_attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    delivery_id INTEGER NOT NULL REFERENCES deliveries (id) ON DELETE CASCADE,
    started_at BIGINT NOT NULL,
    milliseconds INTEGER NOT NULL,
    status INTEGER,
    error TEXT
);
CREATE INDEX delivery_attempts_delivery ON delivery_attempts (delivery_id);

CREATE TABLE audit_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    details TEXT NOT NULL,
    hash BLOB NOT NULL
);
-- Counted here until the minute is over. No references: what was read counts, whatever became of it.
CREATE TABLE access_reads (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    minute BIGINT NOT NULL,
    caller TEXT NOT NULL,
    connection_id INTEGER NOT NULL,
    user_id INTEGER NOT NULL,
    provider TEXT NOT NULL,
    count INTEGER NOT NULL,
    UNIQUE (minute, caller, connection_id)
);
"""
# The same request again is the same request, while it is open; and who is blocked is so once.
INDEXES = """
CREATE UNIQUE INDEX consent_requests_open ON consent_requests (discord_user, {callback}, {state})
    WHERE finished_at IS NULL;
CREATE UNIQUE INDEX application_blocks_sender ON application_blocks (user_id, {application})
"""
# PostgreSQL's indexes hold no texts as long as these. Its encoding of a text is not called immutable, for others'
# may change; UTF-8 does not.
DIGEST = """
CREATE FUNCTION text_digest(value text) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT
AS $$ SELECT sha256(convert_to(value, 'UTF8')) $$
"""
_ENTRIES = {"callback": "callback", "state": "state", "application": "application"}
_POSTGRESQL_ENTRIES = {
    "callback": "text_digest(callback)",
    "state": "sha256(state)",
    "application": "text_digest(application)",
}
# Apart, for they hold semicolons. The third one also stops INSERT OR REPLACE, which deletes without a trigger.
SQLITE_TRIGGERS = (
    """
CREATE TRIGGER audit_events_update BEFORE UPDATE ON audit_events
BEGIN SELECT RAISE(ABORT, 'audit_events is append-only'); END
""",
    """
CREATE TRIGGER audit_events_delete BEFORE DELETE ON audit_events
BEGIN SELECT RAISE(ABORT, 'audit_events is append-only'); END
""",
    """
CREATE TRIGGER audit_events_insert BEFORE INSERT ON audit_events
WHEN NEW.id IS NOT (SELECT ifnull(max(id), 0) + 1 FROM audit_events)
BEGIN SELECT RAISE(ABORT, 'audit_events is append-only: the next id is the last one plus 1'); END
""",
)
POSTGRESQL_TRIGGERS = (
    """
CREATE FUNCTION audit_events_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'audit_events is append-only' USING ERRCODE = 'integrity_constraint_violation'; END $$
""",
    """
CREATE FUNCTION audit_events_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.id IS DISTINCT FROM (SELECT coalesce(max(id), 0) + 1 FROM audit_events) THEN
        RAISE EXCEPTION 'audit_events is append-only: the next id is the last one plus 1'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$
""",
    """
CREATE TRIGGER audit_events_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
FOR EACH STATEMENT EXECUTE FUNCTION audit_events_refuse()
""",
    """
CREATE TRIGGER audit_events_insert BEFORE INSERT ON audit_events
FOR EACH ROW EXECUTE FUNCTION audit_events_follow()
""",
)


def up(_migrator: SchemaMigrator, database: peewee.Database) -> None:
    ddl.run(database, STATEMENTS)
    is_postgresql = ddl.is_postgresql(database)
    if is_postgresql:
        ddl.run_one(database, DIGEST)
    ddl.run(database, INDEXES.format(**(_POSTGRESQL_ENTRIES if is_postgresql else _ENTRIES)))
    for trigger in POSTGRESQL_TRIGGERS if is_postgresql else SQLITE_TRIGGERS:
        ddl.run_one(database, trigger)
