"""A bare grpcio server that inserts the row of a request durably, and nothing else. Imports nothing of Doorward's.

Each thread has its connection; writers queue at one lock, for without it SQLite tells some that the database is locked.
"""

import argparse
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.api.httpbody_pb2 import HttpBody

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward.keybroker.v1 import keybroker_service_pb2_grpc as stubs
from tests.bench.peers.echo import OPTIONS

_TABLE = """
CREATE TABLE consent_requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT, prompt_id INTEGER, discord_user TEXT, application_id TEXT, name TEXT,
    callback TEXT, state BLOB, address TEXT, status TEXT, lease_epoch INTEGER, lease_expires_at BIGINT, message TEXT,
    deadline_at BIGINT, created_at BIGINT, finished_at BIGINT
)
"""
_INSERT = """
INSERT INTO consent_requests (discord_user, name, callback, state, address, status, lease_epoch, lease_expires_at,
                              deadline_at, created_at) VALUES (?, ?, ?, ?, ?, 'pending', 0, ?, ?, ?)
"""


class Insert(stubs.KeyBrokerServiceServicer):
    """Says OK once the row is durable."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._own = threading.local()
        self._writer = threading.Lock()

    def RequestApiKeyForm(  # noqa: N802 - the generated base class names the methods
        self, request: pb.RequestApiKeyFormRequest, context: grpc.ServicerContext
    ) -> HttpBody:
        now = time.time_ns() // 1000
        row = ("80351110224678912", "bench", "http://127.0.0.1/callback", request.form.data, "127.0.0.1", now, now, now)
        connection = self._connection()
        with self._writer:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_INSERT, row)
            connection.execute("COMMIT")
        return HttpBody(content_type="text/plain; charset=utf-8", data=b"OK")

    def _connection(self) -> sqlite3.Connection:
        if not hasattr(self._own, "connection"):
            self._own.connection = sqlite3.connect(self._path, isolation_level=None)
            self._own.connection.execute("PRAGMA synchronous = FULL")
        connection: sqlite3.Connection = self._own.connection
        return connection


def main() -> None:
    """Serve on a Unix socket until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", help="the path of the Unix socket")
    parser.add_argument("database", help="the path of the database, which is made")
    parser.add_argument("--threads", type=int, required=True, help="the size of the thread pool")
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with sqlite3.connect(options.database) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(_TABLE)
    server = grpc.server(ThreadPoolExecutor(options.threads), options=OPTIONS)
    stubs.add_KeyBrokerServiceServicer_to_server(Insert(options.database), server)  # type: ignore[abstract]  # in its .pyi only
    server.add_insecure_port(f"unix:{options.socket}")
    server.start()
    print("serving", flush=True)
    signal.sigwait({signal.SIGTERM})
    server.stop(0).wait()


if __name__ == "__main__":
    main()
