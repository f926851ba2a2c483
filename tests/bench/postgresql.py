"""Homes whose data are in PostgreSQL, filled by its own means: ten million connections in a few minutes."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import psycopg

from doorward_server.crypto import fingerprint, make_secret
from tests.bench import consenting, stack
from tests.engines import Postgresql, postgresql_server

# Twice as many connections as users, as in `stack`. Tokens are of the size that sealed ones have.
_TOKEN = "decode(left(repeat(md5(i::text), 10), 300), 'hex')"
_SEED = f"""
SET session_replication_role = replica;
INSERT INTO users (id, slug, name, email, created_at)
SELECT i, 'person-' || i, 'Person ' || i, 'person-' || i || '@example.org', {{now}}
FROM generate_series(1, {{users}}) i;
INSERT INTO connections (user_id, provider, access_token, refresh_token, expires_at, obtained_at, needs_reauth,
                         lease_epoch, created_at)
SELECT i, provider, {_TOKEN}, {_TOKEN}, {{now}}, {{now}}, FALSE, 0, {{now}}
FROM generate_series(1, {{users}}) i, unnest(ARRAY['{stack.KAI}', 'min']) provider;
INSERT INTO sessions (user_id, token_hash, created_at, expires_at)
SELECT i, sha256(i::text::bytea), {{now}}, {{expiry}} FROM generate_series(1, {{users}}) i;
"""
_SIZE = "SELECT pg_total_relation_size('connections')"


@contextlib.contextmanager
def served() -> Iterator[Postgresql]:
    """A server with its usual durability, and memory for the rows that are asked for often."""
    with postgresql_server("shared_buffers=1GB", "max_wal_size=8GB", "maintenance_work_mem=512MB") as server:
        yield server


def make_home(path: Path, server: Postgresql, connections: int, dice: random.Random) -> tuple[stack.Home, float]:
    """A home with so many connections; and how many bytes each of them takes, with its indexes."""
    stack.doorward(path, "init", "--settings", "-", text=consenting.SETTINGS)
    url = server.new_database()
    users = connections // 2
    cookies = [make_secret() for _ in range(min(stack.SESSIONS, users))]
    now, expiry = stack.now_and_expiry()
    with psycopg.connect(url, autocommit=True) as database:
        database.execute(_SEED.format(now=now, expiry=expiry, users=users).encode())
        for cookie, user in zip(cookies, dice.sample(range(1, users + 1), len(cookies)), strict=True):
            database.execute("UPDATE sessions SET token_hash = %s WHERE user_id = %s", (fingerprint(cookie), user))
        # So that an index answers by itself.
        database.execute("VACUUM ANALYZE")
        (size,) = database.execute(_SIZE).fetchone() or (0,)
    return stack.Home(path, cookies, url), size / connections
