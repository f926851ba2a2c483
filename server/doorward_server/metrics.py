"""Metrics: what is counted while a process runs, and where Prometheus reads it. Imports only `errors`.

Names follow https://prometheus.io/docs/practices/naming/. A label holds what the code or the operator has named
(a method, a code, a provider's id, a kind of job, an outcome), never what a caller sends: so there are only so many
series, and none tells of a user, a token or a callback.
"""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, Info, PlatformCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from doorward_server.errors import OperatorError

# Seconds: most calls are answered from the database, others wait for a provider.
_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 30)
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counted: dict[str, Any] = {"namespace": "doorward", "registry": self.registry}
        self._calls = Counter("calls", "Calls that were answered.", ("method", "code"), **counted)
        self._call_seconds = Histogram(
            "call_seconds", "How long calls took.", ("method",), buckets=_CALL_BUCKETS, **counted
        )
        # A thread serves one call at a time. A set's operations are atomic, and quicker than a gauge's.
        self._serving: set[int] = set()
        under_way = Gauge("calls_under_way", "Calls that are being served.", **counted)
        under_way.set_function(lambda: len(self._serving))
        self._requests = Histogram(
            "outbound_request_seconds",
            "Requests to providers, to validators of keys, and to callbacks.",
            ("peer", "outcome"),
            buckets=_REQUEST_BUCKETS,
            **counted,
        )
        self._refreshes = Counter("refreshes", "Refreshes of access tokens.", ("provider", "outcome"), **counted)
        self._jobs = Counter("jobs", "Attempts at jobs.", ("kind", "outcome"), **counted)
        Info("build", "The version that runs.", **counted).info({"version": version("doorward")})
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def calls_of(self, method: str) -> "CallMetrics":
        """Where the calls of a method, `/package.Service/Method`, are counted."""
        name = method.rpartition(".")[2]
        return CallMetrics(name, self._calls, self._call_seconds, self._serving)

    def request_ended(self, peer: str, outcome: str, seconds: float) -> None:
        """A request to the outside world got an answer, or none."""
        self._requests.labels(peer, outcome).observe(seconds)

    def refresh_ended(self, provider_id: str, outcome: str) -> None:
        """An access token was refreshed, or not."""
        self._refreshes.labels(provider_id, outcome).inc()

    def job_ended(self, kind: str, outcome: str) -> None:
        """An attempt at a job is over; "done", "put_off", or "abandoned" when there is none after it."""
        self._jobs.labels(kind, outcome).inc()


class CallMetrics:
    """The calls of one method. It is on the path of every call, so the children are looked up once."""

    def __init__(self, name: str, calls: Counter, seconds: Histogram, serving: set[int]) -> None:
        self._name = name
        self._calls = calls
        self._by_code: dict[str, Counter] = {}
        self._seconds = seconds.labels(name)
        self._serving = serving

    def begin(self) -> None:
        """This thread serves a call."""
        self._serving.add(threading.get_ident())

    def end(self, code: str, seconds: float) -> None:
        """It was answered with the gRPC code of this name."""
        self._serving.discard(threading.get_ident())
        self._seconds.observe(seconds)
        count = self._by_code.get(code)
        if count is None:
            count = self._by_code[code] = self._calls.labels(self._name, code)
        count.inc()


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics."""

    registry: ClassVar[CollectorRegistry]
    timeout = 5.0  # seconds without a byte, then the connection is closed
    server_version = "doorward"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        encode, content_type = choose_encoder(self.headers.get("accept", ""))
        body = encode(self.registry)
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - what the base class calls
        """Nothing: a line per scrape tells nobody anything."""


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: whoever scrapes has left."""


@contextlib.contextmanager
def served(registry: CollectorRegistry, host: str, port: int | None) -> Iterator[None]:
    """Answer GET /metrics meanwhile; port None: nowhere. Raises OperatorError."""
    if port is None:
        yield
        return
    handler = type("Handler", (_Handler,), {"registry": registry})
    kind = type("Server", (_Server,), {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
    try:
        server = kind((host, port), handler)
    except OSError as error:
        raise OperatorError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror}. Stop its owner, or mend [metrics] host or "
            "port (DOORWARD_METRICS_PORT)"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
