"""The only way out: every request to the outside world is made here. Imports only `errors`.

A request goes to a global unicast address unless the operator allowed the address, follows no
redirect, ignores the environment's proxies, ends within its total time whatever the peer does,
and reads at most 1 MiB. At most so many requests are under way at once; more are refused.
"""

import contextlib
import ipaddress
import json
import socket
import ssl
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LookupTimeout
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import certifi
import httpcore
import httpx

from doorward_server.errors import (
    Busy,
    CallError,
    OperatorError,
    ProviderMalformed,
    ProviderTimeout,
    ProviderUnavailable,
)

MAX_ANSWER_BYTES = 1 << 20
_JUDGING_SECONDS = 1.0
_JUDGING_LOOKUPS = 8
# Who is told of a request: the peer, the outcome, and the seconds that it took.
Observe = Callable[[str, str, float], None]
# Whoever a body is posted to, in metrics: hosts are no one's but the applications'.
_CALLBACKS = "(callbacks)"
T = TypeVar("T")
R = TypeVar("R", "Answer", "Receipt")
_HEADERS = {"user-agent": "doorward", "accept": "application/json", "accept-encoding": "identity"}
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, section 2.5.5.1
_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")  # 6to4 relay anycast, withdrawn by RFC 7526
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # the part of it that IANA has given out
_SPECIAL = ipaddress.IPv4Network("192.0.0.0/24")  # RFC 6890; some Pythons take parts of it for global
_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")  # RFC 9637, which older Pythons do not know


class NotConnectable(ProviderUnavailable):
    """No connection was made, so nothing of the request was seen by anyone."""


class ConnectTimeout(ProviderTimeout):
    """No connection was made in time, so nothing of the request was seen by anyone."""


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer; `body` is decoded and at most MAX_ANSWER_BYTES long."""

    status: int
    body: bytes

    def json_object(self) -> dict[str, Any] | None:
        """The body as a JSON object; None when it is anything else."""
        try:
            value = json.loads(self.body.decode())
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Receipt:
    """The head of an HTTP answer, whose body is nobody's business."""

    status: int
    retry_after: str | None
    date: str | None = None


@dataclass(frozen=True)
class Timeouts:
    """In seconds: for connecting, between two reads, and for everything together."""

    connect: float
    read: float
    total: float


# The monotonic time at which the request of this thread has to be over.
_deadline: ContextVar[float] = ContextVar("deadline")


def _left() -> float:
    return _deadline.get() - time.monotonic()


def _within_deadline(timeout: float | None, late: type[httpcore.TimeoutException] = httpcore.ReadTimeout) -> float:
    left = _left()
    if left <= 0:
        raise late("the total time is over")
    return left if timeout is None else min(timeout, left)


def is_public(address: IpAddress) -> bool:
    """Whether an address is global unicast, an IPv6 one that embeds an IPv4 one judged by that.

    Python's `is_global` alone passes multicast, 64:ff9b::/96 and 2002::/16.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address in _LOCAL_NAT64:
            return False
        if (embedded := _embedded(address)) is not None:
            return is_public(embedded)
        if address not in _GLOBAL_UNICAST or address in _DOCUMENTATION:
            return False
    return address.is_global and not address.is_multicast and address not in _RELAYS and address not in _SPECIAL


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64 or address in _COMPATIBLE:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.teredo is not None:
        return address.teredo[1]
    return address.ipv4_mapped or address.sixtofour


def parse_allowed(entries: Iterable[str], setting: str) -> frozenset[tuple[IpAddress, int]]:
    """Read an allow list of `ip:port` entries; `setting` names it in the error."""
    allowed = set()
    for entry in entries:
        host, _, port = entry.rpartition(":")
        try:
            if not port.isdecimal() or not 0 < int(port) < 65536:  # noqa: PLR2004
                raise ValueError(port)
            allowed.add((ipaddress.ip_address(host.strip("[]")), int(port)))
        except ValueError:
            raise OperatorError(
                f'{setting}: "{entry}" has to be ip:port, such as 127.0.0.1:9100 or [::1]:9100'
            ) from None
    return frozenset(allowed)


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every step ends by the deadline, so that no peer can trickle past it."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _within_deadline(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _within_deadline(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        within = _within_deadline(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, within))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _GuardedBackend(httpcore.NetworkBackend):
    """Connects to the very address that it judged, so that a name cannot change in between."""

    def __init__(self, allowed: frozenset[tuple[IpAddress, int]], lookups: int) -> None:
        self._allowed = allowed
        self._backend = httpcore.SyncBackend()
        # getaddrinfo takes no timeout, so it runs beside the thread that waits for it.
        self._resolver = ThreadPoolExecutor(lookups, thread_name_prefix="resolver")

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = [address for address in self._resolve(host, port) if self._may_connect(address, port)]
        if not addresses:
            raise httpcore.ConnectError("the address is not allowed")
        failure: Exception | None = None
        for address in addresses:
            try:
                within = _within_deadline(timeout, httpcore.ConnectTimeout)
                stream = self._backend.connect_tcp(str(address), port, within, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _TimedStream(stream)
        raise failure or httpcore.ConnectError("no address")

    def may_connect(self, host: str, port: int) -> bool:
        try:
            addresses = self._resolve(host, port)
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
            return True
        return all(self._may_connect(address, port) for address in addresses)

    def _may_connect(self, address: IpAddress, port: int) -> bool:
        return is_public(address) or (address, port) in self._allowed

    def _resolve(self, host: str, port: int) -> list[IpAddress]:
        with contextlib.suppress(ValueError):
            return [ipaddress.ip_address(host)]
        lookup = self._resolver.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = lookup.result(max(_left(), 0))
        except LookupTimeout:
            lookup.cancel()  # or dead lookups would queue up before live ones
            raise httpcore.ConnectTimeout("the name was not resolved in time") from None
        except (OSError, UnicodeError):
            raise httpcore.ConnectError("the name does not resolve") from None
        # A scoped address (fe80::1%eth0) is link-local, so dropping the scope changes no verdict.
        return [ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]) for *_, sockaddr in found]

    def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)


class _GuardedTransport(httpx.HTTPTransport):
    """Makes a connection for each request and keeps none.

    On a kept one, a request that fails may or may not have been seen, and what a peer sends in advance would
    answer the next user's request.
    """

    def __init__(self, backend: _GuardedBackend, tls: ssl.SSLContext) -> None:
        super().__init__(verify=tls, trust_env=False)
        # httpx has no parameter for the network backend, so the pool is made anew with ours.
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls,
            max_connections=1,
            max_keepalive_connections=0,
            network_backend=backend,
        )


class _Transports:
    """Transports for one request at a time each, never more than the bulkhead lets requests through at once.

    One pool for all would walk all of its connections, under a lock, at the start and the end of each request.
    """

    def __init__(self, backend: _GuardedBackend, tls: ssl.SSLContext) -> None:
        self._make = partial(_GuardedTransport, backend, tls)
        # Taken from and returned to the end; list operations are atomic.
        self._idle: list[_GuardedTransport] = []

    def send(self, request: httpx.Request, read: Callable[[httpx.Response], T]) -> T:
        """Send a request and read the answer."""
        try:
            transport = self._idle.pop()
        except IndexError:
            transport = self._make()
        try:
            with contextlib.closing(transport.handle_request(request)) as response:
                return read(response)
        finally:
            self._idle.append(transport)

    def close(self) -> None:
        for transport in self._idle:
            transport.close()


class Bulkhead:
    """Caps on slow calls, so that some threads always stay free for quick ones.

    Never a queue: when a cap is reached, the call is refused with Busy.
    """

    def __init__(
        self, *, threads: int, outbound: int, per_provider: int, waiting: int, peers: Mapping[str, int] | None = None
    ) -> None:
        """`peers` are those with a cap other than `per_provider`."""
        self._limits = {"outbound": outbound, "waiting": waiting}
        self._limits |= {f"peer {peer}": cap for peer, cap in (peers or {}).items()}
        self._per_provider = per_provider
        self._total = threads - max(1, threads // 8)
        self._lock = threading.Lock()
        self._held = 0
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def requesting(self, *peers: str) -> Iterator[None]:
        """Held by a call that makes a request to a provider, or whoever else has a cap."""
        with self._slot("outbound", *(f"peer {peer}" for peer in peers)):
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Held by a call that waits for another call's result."""
        with self._slot("waiting"):
            yield

    @contextlib.contextmanager
    def _slot(self, *names: str) -> Iterator[None]:
        with self._lock:
            full = any(self._taken[name] >= self._limits.get(name, self._per_provider) for name in names)
            if full or self._held >= self._total:
                raise Busy
            self._held += 1
            self._taken.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                self._taken.subtract(names)


class Outbound:
    """Makes requests. Thread-safe."""

    def __init__(
        self,
        *,
        allow: Iterable[str],
        setting: str = "[outbound] allow",
        ca_file: Path | None,
        bulkhead: Bulkhead,
        concurrency: int,
        observe: Observe = lambda *_: None,
    ) -> None:
        """`setting` is what the allow list is called, for the error when it is wrong."""
        self._observe = observe
        self.bulkhead = bulkhead
        allowed = parse_allowed(allow, setting)
        self._backend = _GuardedBackend(allowed, concurrency)
        # Whoever asks about names that resolve slowly must not hold up requests.
        self._judge = _GuardedBackend(allowed, _JUDGING_LOOKUPS)
        self._judging = threading.BoundedSemaphore(_JUDGING_LOOKUPS)
        # Transports and no client: they know no redirects, no cookies that could travel with another
        # user's request, and no environment; and a request takes them half of the time.
        tls = _tls(ca_file)
        self._transports = _Transports(self._backend, tls)

    def request(
        self,
        method: str,
        url: str,
        *,
        provider_id: str,
        timeouts: Timeouts,
        headers: Mapping[str, str] | None = None,
        form: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request and read its whole answer, whatever its status.

        Raises Busy, NotConnectable, ConnectTimeout, ProviderUnavailable (not HTTP, too), ProviderTimeout,
        or ProviderMalformed (an answer that is too large or does not decode).
        """

        def make() -> httpx.Request:
            whole = httpx.URL(url).copy_merge_params(query) if query else url
            return httpx.Request(method, whole, headers={**_HEADERS, **(headers or {})}, data=form)

        return self._send(make, _answer, provider_id, [provider_id], timeouts)

    def post(
        self, url: str, *, peers: Sequence[str], timeouts: Timeouts, headers: Mapping[str, str], body: bytes
    ) -> Receipt:
        """Send a body, and read no more than the head of the answer. `peers` are whose caps count.

        Raises what `request` raises, but for ProviderMalformed.
        """

        def make() -> httpx.Request:
            return httpx.Request("POST", url, headers={**_HEADERS, **headers}, content=body)

        return self._send(make, _receipt, _CALLBACKS, peers, timeouts)

    def probe(self, url: str, *, peer: str, timeouts: Timeouts) -> Receipt:
        """Ask for the head of a page alone, which changes nothing at the peer. Raises what `post` raises."""

        def make() -> httpx.Request:
            return httpx.Request("HEAD", url, headers=_HEADERS)

        return self._send(make, _receipt, peer, [peer], timeouts)

    def _send(
        self,
        make: Callable[[], httpx.Request],
        read: Callable[[httpx.Response], R],
        name: str,
        peers: Sequence[str],
        timeouts: Timeouts,
    ) -> R:
        """Make a request, send it and read the answer, and tell how it went; `name` is what the peer is called."""
        started = time.monotonic()
        outcome = "failed"
        try:
            with self._sending(peers, timeouts) as extensions:
                request = make()
                request.extensions.update(extensions)
                answer = self._transports.send(request, read)
        except CallError as error:
            outcome = _outcome(error)
            raise
        else:
            outcome = f"{answer.status // 100}xx"
            return answer
        finally:
            self._observe(name, outcome, time.monotonic() - started)

    @contextlib.contextmanager
    def _sending(self, peers: Sequence[str], timeouts: Timeouts) -> Iterator[dict[str, Any]]:
        """A slot, a deadline, and failures as ours; yields the request's extensions."""
        token = _deadline.set(time.monotonic() + timeouts.total)
        try:
            with self.bulkhead.requesting(*peers), _failures():
                yield {"timeout": httpx.Timeout(timeouts.read, connect=timeouts.connect).as_dict()}
        finally:
            _deadline.reset(token)

    def may_connect(self, host: str, port: int) -> bool:
        """Whether requests to a host would be made as its name resolves now; one that does not resolve may later.

        So may one for which there is no time: too many look up names that resolve slowly.
        """
        if _is_address(host):
            return self._judge.may_connect(host, port)
        if not self._judging.acquire(blocking=False):
            return True
        token = _deadline.set(time.monotonic() + _JUDGING_SECONDS)
        try:
            return self._judge.may_connect(host, port)
        finally:
            _deadline.reset(token)
            self._judging.release()

    def close(self) -> None:
        self._transports.close()
        self._backend.close()
        self._judge.close()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, _read(response))


def _receipt(response: httpx.Response) -> Receipt:
    headers = response.headers
    return Receipt(response.status_code, headers.get("retry-after"), headers.get("date"))


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certifi.where())
    context.hostname_checks_common_name = False  # RFC 9525, section 2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            raise OperatorError(f"[outbound] ca_file: cannot read {ca_file}: {error.strerror or error}") from None
    return context


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise ConnectTimeout(cause=_cause(error)) from error
    except httpx.TimeoutException as error:
        raise ProviderTimeout(cause=_cause(error)) from error
    except (httpx.ConnectError, httpx.InvalidURL, UnicodeError) as error:
        # Nothing of the request was sent: the text can tell of the address and of TLS only.
        raise NotConnectable(cause=str(error)) from error
    except httpx.TransportError as error:
        raise ProviderUnavailable(cause=_cause(error)) from error


def _outcome(error: CallError) -> str:
    """Why there was no answer, in one word."""
    if isinstance(error, NotConnectable | ConnectTimeout):
        return "not_connected"
    return error.reason.removeprefix("PROVIDER_").lower()


def _cause(error: Exception) -> str:
    return type(error).__name__


def _read(response: httpx.Response) -> bytes:
    """The decoded body. It inflates no further than the limit, unlike httpx's own decoders."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise ProviderMalformed
    inflater = None if encoding == "identity" else zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    body = bytearray()
    for chunk in response.iter_raw():
        try:
            body += inflater.decompress(chunk, MAX_ANSWER_BYTES + 1 - len(body)) if inflater else chunk
        except zlib.error:
            raise ProviderMalformed from None
        if len(body) > MAX_ANSWER_BYTES:
            raise ProviderMalformed
        if inflater is not None and inflater.eof:
            break  # zlib would keep whatever follows
    if inflater is not None and body and not inflater.eof:
        raise ProviderMalformed
    return bytes(body)
