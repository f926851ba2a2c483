"""Peers for requests: real sockets, and a function that serves each connection."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from doorward_server.outbound import Bulkhead, Outbound

Serve = Callable[[socket.socket, threading.Event], None]


class Peer:
    """A listener and a thread that serves its connections one by one."""

    def __init__(self, serve: Serve, tls: ssl.SSLContext | None = None) -> None:
        self._serve = serve
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        self.connections = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Peer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        # Closing a listener does not end accept(); a connection does.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                if self._stopping.is_set():
                    return
                self.connections += 1
                connection.settimeout(10)
                with contextlib.suppress(OSError):
                    self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        if self._tls is None:
            self._serve(connection, self._stopping)
            return
        with self._tls.wrap_socket(connection, server_side=True) as secured:
            self._serve(secured, self._stopping)


def read_request(connection: socket.socket) -> bytes:
    """A request's head and the body that its Content-Length announces."""
    request = b""
    while b"\r\n\r\n" not in request:
        received = connection.recv(65536)
        if not received:
            raise ConnectionError
        request += received
    head, _, body = request.partition(b"\r\n\r\n")
    length = next(
        (int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")),
        0,
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answering(body: bytes = b"{}", *headers: str, status: str = "200 OK", seen: list[bytes] | None = None) -> Serve:
    """Serves one answer, and notes the request."""
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, ""))

    def serve(connection: socket.socket, _: threading.Event) -> None:
        request = read_request(connection)
        if seen is not None:
            seen.append(request)
        connection.sendall(head.encode() + body)

    return serve


@contextlib.contextmanager
def make_outbound(
    *allow: str, ca_file: Path | None = None, concurrency: int = 8, per_provider: int = 8
) -> Iterator[Outbound]:
    bulkhead = Bulkhead(threads=64, outbound=concurrency, per_provider=per_provider, waiting=8)
    outbound = Outbound(allow=allow, ca_file=ca_file, bulkhead=bulkhead, concurrency=concurrency)
    try:
        yield outbound
    finally:
        outbound.close()
