"""An ideal handler: GetKaiStatus with its two reads and nothing else. Imports nothing of Doorward's.

Whatever Doorward's REST answers cost more than this one's, behind the same gateway, is Doorward's own work.
"""

import argparse
import hashlib
import os
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from tests.bench.peers.echo import OPTIONS

_SESSION = "SELECT user_id FROM sessions WHERE token_hash = ? AND expires_at > ?"
_STATUS = "SELECT needs_reauth FROM connections INDEXED BY connections_status WHERE user_id = ? AND provider = ?"


class Ideal(stubs.IntegrationServiceServicer):
    """Answers from the database, on a few connections of which the one that was used last is taken first."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._idle: list[sqlite3.Connection] = []

    def GetKaiStatus(  # noqa: N802 - the generated base class names the methods
        self, request: pb.GetKaiStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetKaiStatusResponse:
        cookie = dict(context.invocation_metadata())["cookie"]
        assert isinstance(cookie, str)
        token_hash = hashlib.sha256(cookie.partition("=")[2].encode()).digest()
        try:
            database = self._idle.pop()
        except IndexError:
            database = sqlite3.connect(self._database, isolation_level=None, check_same_thread=False)
        (user,) = database.execute(_SESSION, (token_hash, time.time_ns() // 1000)).fetchone()
        row = database.execute(_STATUS, (user, request.kai_type)).fetchone()
        self._idle.append(database)
        return pb.GetKaiStatusResponse(auth_status=row is not None and not row[0])


def main() -> None:
    """Serve on a Unix socket until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", help="the path of the SQLite file")
    parser.add_argument("socket", help="the path of the Unix socket")
    parser.add_argument("--threads", type=int, required=True, help="the size of the thread pool")
    arguments = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # as Doorward's servers do
    server = grpc.server(ThreadPoolExecutor(arguments.threads), options=OPTIONS)
    ideal = Ideal(arguments.database)  # type: ignore[abstract]  # in its .pyi only
    stubs.add_IntegrationServiceServicer_to_server(ideal, server)
    # The gateway sends nothing to a server that does not say that it is healthy.
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.add_insecure_port(f"unix:{arguments.socket}")
    server.start()
    print("serving", flush=True)
    stop.wait()
    server.stop(None).wait()


if __name__ == "__main__":
    main()
