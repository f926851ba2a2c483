"""Users, sessions, service tokens, connections, code claims, jobs, and the master keys in use."""

import peewee
from playhouse.migrate import SchemaMigrator

from doorward_server.database import ddl

STATEMENTS = """
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    slug TEXT NOT NULL CONSTRAINT users_slug UNIQUE,
    name TEXT NOT NULL,
    email TEXT,
    created_at BIGINT NOT NULL
);
CREATE UNIQUE INDEX users_email ON users (lower(email));

CREATE TABLE sessions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    token_hash BLOB NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL
);
-- Holds all that authentication reads, on every call.
CREATE INDEX sessions_token ON sessions (token_hash, expires_at, user_id);
CREATE INDEX sessions_user ON sessions (user_id);
CREATE INDEX sessions_expiry ON sessions (expires_at);

CREATE TABLE service_tokens (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    token_hash BLOB NOT NULL UNIQUE,
    roles TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    last_used_at BIGINT
);

CREATE TABLE connections (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    provider TEXT NOT NULL,
    access_token BLOB NOT NULL,
    refresh_token BLOB,
    expires_at BIGINT,
    obtained_at BIGINT NOT NULL,
    needs_reauth BOOLEAN NOT NULL,
    lease_epoch INTEGER NOT NULL,
    lease_expires_at BIGINT,
    lease_failure TEXT,
    created_at BIGINT NOT NULL,
    UNIQUE (user_id, provider)
);
-- Holds all that the status of a connection is read from.
CREATE INDEX connections_status ON connections (user_id, provider, needs_reauth);

CREATE TABLE code_claims (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    provider TEXT NOT NULL,
    code_hash BLOB NOT NULL,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    outcome TEXT,
    oauth_error TEXT,
    created_at BIGINT NOT NULL,
    UNIQUE (provider, code_hash)
);
CREATE INDEX code_claims_user ON code_claims (user_id);
CREATE INDEX code_claims_age ON code_claims (created_at);

CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    payload BLOB NOT NULL,
    run_at BIGINT,
    attempts INTEGER NOT NULL,
    last_error TEXT,
    created_at BIGINT NOT NULL
);
CREATE INDEX jobs_due ON jobs (run_at) WHERE run_at IS NOT NULL;

CREATE TABLE master_keys (
    key_id TEXT PRIMARY KEY,
    first_used_at BIGINT NOT NULL
);
"""


def up(_migrator: SchemaMigrator, database: peewee.Database) -> None:
    ddl.run(database, STATEMENTS)
