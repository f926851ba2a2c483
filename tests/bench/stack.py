"""What is measured: homes with many connections, and the processes on them, each on its core.

Owns the processes' lives and their CPU time. It fills the tables by SQL of its own: a million
connections made one by one through the domain would take hours.
"""

import contextlib
import math
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from doorward_server.crypto import fingerprint, make_secret
from tests.processes import BIN, clean_environment, free_port, running

KAI = "flo"
# Each user has a connection to both, and none to the third.
_PROVIDERS = (KAI, "min")
UNCONNECTED = "eag"
SESSIONS = 200
_YEAR = 365 * 86400 * 10**6

_USERS = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :users)
INSERT INTO users (id, slug, name, email, created_at)
SELECT i, 'person-' || i, 'Person ' || i, 'person-' || i || '@example.org', :now FROM n
"""
_CONNECTIONS = """
INSERT INTO connections (user_id, provider, access_token, refresh_token, expires_at, obtained_at,
                         needs_reauth, lease_epoch, created_at)
SELECT users.id, providers.value, randomblob(150), randomblob(150), :now, :now, 0, 0, :now
FROM users, json_each(:providers) AS providers
"""
_OTHER_SESSIONS = """
INSERT INTO sessions (user_id, token_hash, created_at, expires_at)
SELECT id, randomblob(32), :now, :expiry FROM users
"""
_SESSION = "UPDATE sessions SET token_hash = ? WHERE user_id = ?"


@dataclass(frozen=True)
class Home:
    """A home whose database holds so many connections; the cookies are sessions of some of its users."""

    path: Path
    cookies: Sequence[str]
    url: str | None = None  # of its database, if that is no file in it

    @property
    def database(self) -> Path:
        return self.path / "doorward.db"


@dataclass(frozen=True)
class Peer:
    """A running process that answers on a Unix socket."""

    process: psutil.Process
    socket: Path

    def cpu(self) -> float:
        return cpu_seconds(self.process)

    def resident(self) -> int:
        """Its memory, in bytes."""
        return int(self.process.memory_info().rss)


@dataclass(frozen=True)
class Gateway:
    """A running gateway; `envoy` is the process that serves."""

    envoy: psutil.Process
    address: tuple[str, int]


def cpu_seconds(process: psutil.Process) -> float:
    """The CPU time that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cores() -> tuple[int, int]:
    """The core of what is measured, and the core of the load generator; OSError when there are no two."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(usable) < 2:
        raise OSError("measuring needs Linux and two cores: one for the server, one for the load")
    return usable[0], usable[1]


@contextlib.contextmanager
def on_core(*cores: int) -> Iterator[None]:
    """Run this thread, and the processes that it starts meanwhile, on one core, or on these."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def doorward(home: Path, *arguments: str, text: str = "") -> str:
    """Run `doorward` on a home; what it prints."""
    done = subprocess.run(
        [BIN / "doorward", *arguments],
        env=clean_environment({"DOORWARD_HOME": str(home)}),
        input=text,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


def make_home(path: Path, connections: int, dice: random.Random) -> Home:
    """A home with a settings file, a key, and a database with so many connections."""
    for command in ("init", "migrate"):
        doorward(path, command)
    return Home(path, _seed(path / "doorward.db", connections // len(_PROVIDERS), dice))


def bytes_per_connection(home: Home, connections: int) -> float:
    """What a connection takes in a home's SQLite file, with its indexes; NaN if this SQLite cannot tell."""
    statement = "SELECT sum(pgsize) FROM dbstat WHERE name IN (SELECT name FROM sqlite_master WHERE tbl_name = ?)"
    with contextlib.closing(sqlite3.connect(home.database)) as database:
        try:
            (size,) = database.execute(statement, ("connections",)).fetchone()
        except sqlite3.OperationalError:
            return math.nan
    return float(size) / connections


def now_and_expiry() -> tuple[int, int]:
    """The time, and that at which sessions end, as they are stored."""
    now = time.time_ns() // 1000
    return now, now + _YEAR


def _seed(path: Path, users: int, dice: random.Random) -> list[str]:
    now, expiry = now_and_expiry()
    values = {
        "users": users,
        "now": now,
        "expiry": expiry,
        "providers": "[" + ",".join(f'"{name}"' for name in _PROVIDERS) + "]",
    }
    cookies = [make_secret() for _ in range(min(SESSIONS, users))]
    chosen = dice.sample(range(1, users + 1), len(cookies))
    with contextlib.closing(sqlite3.connect(path)) as database:
        # Nobody minds when this database is lost.
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -262144")
        with database:
            for statement in (_USERS, _CONNECTIONS, _OTHER_SESSIONS):
                database.execute(statement, values)
            sessions = ((fingerprint(cookie), user) for cookie, user in zip(cookies, chosen, strict=True))
            database.executemany(_SESSION, sessions)
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return cookies


@contextlib.contextmanager
def echo(folder: Path, core: int, threads: int) -> Iterator[Peer]:
    """The bare grpcio server."""
    socket = folder / "echo.sock"
    command = [sys.executable, "-m", "tests.bench.peers.echo", str(socket), "--threads", str(threads)]
    with contextlib.ExitStack() as stack:
        with on_core(core):
            process = stack.enter_context(running(command, folder / "echo.log"))
        process.await_output("serving")
        yield Peer(psutil.Process(process.pid), socket)


@contextlib.contextmanager
def server(home: Home, logs: Path, *cores: int, access_log: bool) -> Iterator[tuple[Peer, int]]:
    """A server on a home; with its port."""
    port = free_port()
    environment = {
        "DOORWARD_HOME": str(home.path),
        "DOORWARD_GRPC_PORT": str(port),
        "DOORWARD_GRPC_DRAIN_WAIT": "0",
        "DOORWARD_LOG_ACCESS": str(access_log).lower(),
        **({"DOORWARD_DATABASE_URL": home.url} if home.url else {}),
    }
    with contextlib.ExitStack() as stack:
        with on_core(*cores):
            process = stack.enter_context(
                running([BIN / "doorward", "serve"], logs / f"server-{port}.log", environment)
            )
        process.await_output('"serving"')
        yield Peer(psutil.Process(process.pid), home.path / f"doorward-{port}.sock"), port


@contextlib.contextmanager
def gateway(home: Home, sockets: Iterable[Path], logs: Path, *cores: int) -> Iterator[Gateway]:
    """The gateway in front of the servers with these sockets. It has one thread."""
    port = free_port()
    environment = {
        "DOORWARD_HOME": str(home.path),
        "DOORWARD_GATEWAY_UPSTREAMS": ",".join(f"unix:{socket}" for socket in sockets),
        "DOORWARD_GATEWAY_PORT": str(port),
        "DOORWARD_GATEWAY_ADMIN_PORT": str(free_port()),
        "DOORWARD_GATEWAY_RATE_LIMIT": "0",
        "DOORWARD_GATEWAY_CONCURRENCY": "1",
        "DOORWARD_GATEWAY_DRAIN_WAIT": "0",
    }
    with contextlib.ExitStack() as stack:
        with on_core(*cores):
            process = stack.enter_context(
                running([BIN / "doorward-gateway"], logs / f"gateway-{port}.log", environment)
            )
        process.await_output("gateway on")
        (envoy,) = psutil.Process(process.pid).children()
        yield Gateway(envoy, ("127.0.0.1", port))
