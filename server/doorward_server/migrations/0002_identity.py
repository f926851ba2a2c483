"""API clients, OAuth identities, providers added by command; users belong to clients and have a profile."""

import unicodedata

import peewee
from playhouse.migrate import SchemaMigrator

from doorward_server.database import ddl

STATEMENTS = """
CREATE TABLE api_clients (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    disabled_at BIGINT
);

CREATE TABLE client_secrets (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    client_id TEXT NOT NULL REFERENCES api_clients (id) ON DELETE CASCADE,
    secret_hash BLOB NOT NULL UNIQUE,
    created_at BIGINT NOT NULL,
    expires_at BIGINT
);
CREATE INDEX client_secrets_client ON client_secrets (client_id);

ALTER TABLE users ADD COLUMN client_id TEXT REFERENCES api_clients (id);
ALTER TABLE users ADD COLUMN email_key TEXT;
ALTER TABLE users ADD COLUMN role TEXT NOT NULL DEFAULT '';
ALTER TABLE users ADD COLUMN license_active BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE users ADD COLUMN license_ends_at BIGINT;
ALTER TABLE users ADD COLUMN subscription_active BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE users ADD COLUMN subscription_ends_at BIGINT;
ALTER TABLE users ADD COLUMN stats_games_completed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN stats_play_time REAL NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN stats_concepts TEXT NOT NULL DEFAULT '{}';
CREATE INDEX users_client ON users (client_id);

CREATE TABLE oauth_identities (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    provider TEXT NOT NULL,
    subject TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (provider, subject)
);
CREATE INDEX oauth_identities_user ON oauth_identities (user_id);

CREATE TABLE providers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    provider TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL,
    client_secret BLOB,
    created_at BIGINT NOT NULL
);
"""


def up(_migrator: SchemaMigrator, database: peewee.Database) -> None:
    ddl.run(database, STATEMENTS)
    # SQLite's lower() knows ASCII only. Two addresses that differ in the case of other letters may
    # stand here: the older user keeps the key, the newer one's address stays, and blocks nobody.
    taken = set()
    users = database.execute_sql("SELECT id, email FROM users WHERE email IS NOT NULL ORDER BY id")  # type: ignore[no-untyped-call]
    for user_id, email in users.fetchall():
        key = unicodedata.normalize("NFC", email.casefold())
        if key not in taken:
            taken.add(key)
            database.execute_sql("UPDATE users SET email_key = ? WHERE id = ?", (key, user_id))  # type: ignore[no-untyped-call]
    ddl.run(database, "DROP INDEX users_email; CREATE UNIQUE INDEX users_email ON users (email_key)")
