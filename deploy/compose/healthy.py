#!/usr/bin/env python3
"""Ends with 0 when what is at an address is well: GET http://..., or a server's gRPC health at unix:PATH."""

import sys
import urllib.request

_SECONDS = 4


def is_healthy(address: str) -> bool:
    """Raises when there is no answer."""
    if address.startswith("http:"):
        # Not through the environment's proxy: the address is this container's own.
        http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with http.open(address, timeout=_SECONDS) as answer:
            return bool(answer.status == 200)  # noqa: PLR2004
    import grpc  # noqa: PLC0415 - a server's image part; half a second that the others need not wait
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS).status
    return bool(status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    try:
        sys.exit(not is_healthy(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - whatever it is, Docker keeps this line
        sys.exit(f"{sys.argv[1]}: {type(error).__name__}")
