"""A bare grpcio server: GetKaiStatus through the generated stubs, and nothing else. Imports nothing of Doorward's.

Whatever Doorward's server costs more than this one is Doorward's own work.
"""

import argparse
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs

# The same as those of Doorward's server, which has them in app.py.
OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.max_metadata_size", 96 << 10),
    ("grpc.absolute_max_metadata_size", 128 << 10),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
]


class Echo(stubs.IntegrationServiceServicer):
    """Says that everybody is connected."""

    def GetKaiStatus(  # noqa: N802 - the generated base class names the methods
        self, request: pb.GetKaiStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetKaiStatusResponse:
        return pb.GetKaiStatusResponse(auth_status=True)


def main() -> None:
    """Serve on a Unix socket until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", help="the path of the Unix socket")
    parser.add_argument("--threads", type=int, required=True, help="the size of the thread pool")
    arguments = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = grpc.server(ThreadPoolExecutor(arguments.threads), options=OPTIONS)
    stubs.add_IntegrationServiceServicer_to_server(Echo(), server)  # type: ignore[abstract]  # in its .pyi only
    server.add_insecure_port(f"unix:{arguments.socket}")
    server.start()
    print("serving", flush=True)
    stop.wait()
    server.stop(None).wait()


if __name__ == "__main__":
    main()
