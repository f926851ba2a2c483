"""The load generator: closed loops and a fixed rate, over raw sockets. Imports nothing of the project.

A gRPC client in Python costs as much CPU as the server and would hide what is measured. So the
frames are made once, and a response costs a few comparisons. Every answer is compared with the
one that is expected; the first that differs ends the run with WrongAnswer.
"""

import itertools
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# RFC 9113: frame types and flags.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_INITIAL_WINDOW_SIZE = 4
_LARGEST_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65535
_FRAME = struct.Struct(">IBI")  # length and type together, flags, stream
_PREFIX = struct.Struct(">BI")  # gRPC: compressed or not, length
_WORD = struct.Struct(">I")
_READ = 1 << 16
_PATIENCE = 5.0


class WrongAnswer(Exception):
    """A peer answered something else than it should, or nothing."""


@dataclass(frozen=True)
class Result:
    """What one run of a load came to. `latencies` are in seconds."""

    answers: int
    seconds: float
    own_cpu: float
    latencies: Sequence[float]


class Connection(Protocol):
    """A socket with requests under way."""

    socket: socket.socket
    latencies: list[float]

    def start(self) -> None:
        """Send the first requests."""

    def receive(self, *, more: bool) -> int:
        """Read what has come, answer each response with a new request if `more`; returns how many responses."""

    def is_idle(self) -> bool:
        """Whether every request has its response."""


def run(connections: Sequence[Connection], seconds: float) -> Result:
    """Keep every connection busy for so long, then await the last responses."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        cpu, started = time.process_time(), time.perf_counter()
        for connection in connections:
            connection.latencies.clear()
            connection.start()
        answers, elapsed = 0, 0.0
        while elapsed < seconds or not all(connection.is_idle() for connection in connections):
            events = selector.select(_PATIENCE)
            elapsed = time.perf_counter() - started
            if not events or elapsed > seconds + _PATIENCE:
                raise WrongAnswer(f"no answer within {_PATIENCE:g} s")
            for key, _ in events:
                answers += key.data.receive(more=elapsed < seconds)
        return Result(
            answers,
            time.perf_counter() - started,
            time.process_time() - cpu,
            sorted(itertools.chain.from_iterable(connection.latencies for connection in connections)),
        )


def run_at_rate(connections: Sequence["HttpConnection"], per_second: float, seconds: float) -> Result:
    """Send so many requests a second, whether or not earlier ones have been answered.

    A latency counts from when its request was due, even if all connections were busy then: else a
    stall would hide all the requests that it holds up.
    """
    idle, wanted, sent, answers = deque(connections), round(per_second * seconds), 0, 0
    # Epoll counts in milliseconds, select in microseconds.
    with selectors.SelectSelector() as selector:
        for connection in connections:
            connection.latencies.clear()
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        cpu, started = time.process_time(), time.perf_counter()
        while answers < wanted:
            now = time.perf_counter()
            while idle and sent < wanted and (due := started + sent / per_second) <= now:
                idle.popleft().send(due)
                sent += 1
            waits = sent == wanted or not idle  # for nothing but answers
            events = selector.select(_PATIENCE if waits else max(0.0, started + sent / per_second - now))
            if waits and not events:
                raise WrongAnswer(f"no answer within {_PATIENCE:g} s")
            for key, _ in events:
                if key.data.receive(more=False):
                    answers += 1
                    idle.append(key.data)
        return Result(
            answers,
            time.perf_counter() - started,
            time.process_time() - cpu,
            sorted(itertools.chain.from_iterable(connection.latencies for connection in connections)),
        )


# gRPC over HTTP/2


@dataclass(frozen=True)
class GrpcRequest:
    """A unary call, ready but for its stream's number."""

    _head: bytes
    _middle: bytes
    _tail: bytes

    @classmethod
    def build(cls, path: str, metadata: Mapping[str, str], message: bytes) -> "GrpcRequest":
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            **metadata,
        }
        headers = b"".join(_literal(name, value) for name, value in fields.items())
        data = grpc_data(message)
        head = _frame(_HEADERS, _END_HEADERS, 0, headers)
        tail = _frame(_DATA, _END_STREAM, 0, data)
        # A frame's last four header bytes are the stream.
        return cls(head[:5], head[9:] + tail[:5], tail[9:])

    def on_stream(self, number: int) -> bytes:
        stream = _WORD.pack(number)
        return b"".join((self._head, stream, self._middle, stream, self._tail))


def grpc_data(message: bytes) -> bytes:
    """A message as it stands in DATA frames."""
    return _PREFIX.pack(0, len(message)) + message


def _literal(name: str, value: str) -> bytes:
    """A header field as an HPACK literal without indexing, which depends on nothing sent before."""
    return b"\x00" + _hpack_string(name) + _hpack_string(value)


def _hpack_string(text: str) -> bytes:
    data = text.encode()
    if len(data) >= 127:  # from here on a length takes several bytes
        raise ValueError("a header field is too long for this client")
    return bytes([len(data)]) + data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


@dataclass
class GrpcConnection:
    """An HTTP/2 connection with a fixed number of calls under way.

    Responses' headers are not decoded: a failed call shows in having no DATA, for a unary server
    sends its message only when all went well.
    """

    path: Path
    requests: Iterator[GrpcRequest]
    accepts: Callable[[bytes], bool]  # told an answer's DATA
    streams: int
    latencies: list[float] = field(default_factory=list)
    _next: int = 1
    _open: int = 0
    _rest: bytes = b""
    _answered: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(_PATIENCE)
        self.socket.connect(str(self.path))
        # Windows that no run exhausts: a response is under a hundred bytes. The server's own need no
        # care either, as a few short requests are under way at once.
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        window = _WORD.pack(_LARGEST_WINDOW - _DEFAULT_WINDOW)
        self.socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, window))

    def start(self) -> None:
        self.socket.sendall(b"".join(self._request() for _ in range(self.streams)))

    def is_idle(self) -> bool:
        return self._open == 0

    def receive(self, *, more: bool) -> int:
        received = self.socket.recv(_READ)
        if not received:
            raise WrongAnswer("the server closed the connection")
        data = self._rest + received
        at, end, done = 0, len(data), 0
        out: list[bytes] = []
        while at + 9 <= end:
            word, flags, stream = _FRAME.unpack_from(data, at)
            after = at + 9 + (word >> 8)
            if after > end:
                break
            kind = word & 0xFF
            if kind == _DATA:
                self._check_data(stream, data[at + 9 : after])
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    self._finish(stream)
                    done += 1
                    if more:
                        out.append(self._request())
            else:
                out.append(self._control(kind, flags, data[at + 9 : after]))
            at = after
        self._rest = data[at:]
        if out:
            self.socket.sendall(b"".join(out))
        return done

    def _request(self) -> bytes:
        number = self._next
        self._next += 2
        self._open += 1
        return next(self.requests).on_stream(number)

    def _check_data(self, stream: int, payload: bytes) -> None:
        if stream in self._answered or not self.accepts(payload):
            raise WrongAnswer(f"the server answered {payload!r}")
        self._answered.add(stream)

    def _finish(self, stream: int) -> None:
        if stream not in self._answered:
            raise WrongAnswer("a call ended without a message: its status is an error")
        self._answered.remove(stream)
        self._open -= 1

    @staticmethod
    def _control(kind: int, flags: int, payload: bytes) -> bytes:
        if kind in (_RST_STREAM, _GOAWAY):
            raise WrongAnswer(f"the server sent RST_STREAM or GOAWAY: {payload!r}")
        if kind == _PING and not flags & _ACK:
            return _frame(_PING, _ACK, 0, payload)
        if kind == _SETTINGS and not flags & _ACK:
            return _frame(_SETTINGS, _ACK, 0, b"")
        return b""


# HTTP/1.1


@dataclass
class HttpConnection:
    """A kept-alive HTTP/1.1 connection with one request under way."""

    address: tuple[str, int]
    requests: Iterator[bytes]
    body: bytes
    latencies: list[float] = field(default_factory=list)
    _since: float | None = None
    _data: bytes = b""

    def __post_init__(self) -> None:
        self.socket = socket.create_connection(self.address, _PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        self.send(time.perf_counter())

    def send(self, since: float) -> None:
        """Send a request whose latency counts from then (of `time.perf_counter`)."""
        self._since = since
        self.socket.sendall(next(self.requests))

    def is_idle(self) -> bool:
        return self._since is None

    def receive(self, *, more: bool) -> int:
        received = self.socket.recv(_READ)
        if not received or self._since is None:
            raise WrongAnswer("the gateway closed the connection, or spoke without being asked")
        self._data += received
        head, separator, body = self._data.partition(b"\r\n\r\n")
        if not separator or (len(body) < len(self.body) and head.startswith(b"HTTP/1.1 200 ")):
            return 0
        if not head.startswith(b"HTTP/1.1 200 ") or body != self.body:
            raise WrongAnswer(f"the gateway answered {self._data[:300]!r}")
        self.latencies.append(time.perf_counter() - self._since)
        self._data, self._since = b"", None
        if more:
            self.start()
        return 1


def close(connections: Iterable[Connection]) -> None:
    """Close the sockets."""
    for connection in connections:
        connection.socket.close()
