"""The way out: where requests may go, how long they may take, how much they may bring back."""

import concurrent.futures
import contextlib
import gzip
import ipaddress
import select
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme

from doorward_server.errors import (
    Busy,
    CallError,
    OperatorError,
    ProviderMalformed,
    ProviderTimeout,
    ProviderUnavailable,
)
from doorward_server.outbound import (
    MAX_ANSWER_BYTES,
    Answer,
    Bulkhead,
    ConnectTimeout,
    NotConnectable,
    Outbound,
    Receipt,
    Timeouts,
    is_public,
    parse_allowed,
)
from tests.processes import await_condition, free_port
from tests.sandbox.client import SandboxProvider
from tests.unit.peers import Peer, Serve, answering, make_outbound, read_request

SHORT = Timeouts(connect=5, read=5, total=0.2)
AMPLE = Timeouts(connect=5, read=5, total=10)
# Room for a slow machine, far below what the peers of these tests would take.
SLACK = 2.0


# Addresses


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("1.1.1.1", True),
        ("172.15.255.255", True),
        ("172.32.0.0", True),
        ("100.63.255.255", True),
        ("100.128.0.0", True),
        ("223.255.255.255", True),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("10.0.0.1", False),
        ("10.255.255.255", False),
        ("100.64.0.1", False),
        ("100.127.255.255", False),
        ("127.0.0.1", False),
        ("127.255.255.254", False),
        ("169.254.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("192.0.0.1", False),
        ("192.0.0.170", False),
        ("192.0.2.1", False),
        ("192.168.0.1", False),
        ("198.18.0.1", False),
        ("198.19.255.255", False),
        ("198.51.100.1", False),
        ("203.0.113.1", False),
        ("224.0.0.1", False),
        ("239.255.255.255", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("2606:4700::1111", True),
        ("2001:4860:4860::8888", True),
        ("2a00::1", True),
        ("::", False),
        ("::1", False),
        ("::2", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("febf::1", False),
        ("fc00::1", False),
        ("fdff::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
        ("100::1", False),
        ("2001:db8::1", False),
        ("2001:2::1", False),
        ("2001:10::1", False),
        # IPv4 inside of IPv6
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:224.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("::7f00:1", False),
        ("::a00:1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::e000:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::1", False),
        ("64:ff9b:1::808:808", False),
        ("2002:7f00:1::", False),
        ("2002:a00:1::1", False),
        ("2002:e000:1::", False),
        ("2002:808:808::", True),
        # Teredo holds the client's address inverted: 7f00:1 is 80ff:fffe, 808:808 is f7f7:f7f7
        ("2001:0:808:808::80ff:fffe", False),
        ("2001:0:808:808::f5ff:fffe", False),
        ("2001:0:7f00:1::f7f7:f7f7", True),
        ("2001::", False),
        # Not assigned, or no longer
        ("fec0::1", False),
        ("5f00::1", False),
        ("4000::1", False),
        ("8000::1", False),
        ("::ffff:0:7f00:1", False),
        # Special purposes (RFC 6890), which Pythons judge differently
        ("192.0.0.8", False),
        ("192.0.0.192", False),
        ("192.0.1.1", True),
        # Documentation (RFC 9637), which Python knows since 3.12.8 and 3.13.1
        ("3fff::1", False),
    ],
)
def test_is_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


# The allow list


@pytest.mark.parametrize(
    ("entry", "address", "port"),
    [
        ("127.0.0.1:9100", "127.0.0.1", 9100),
        ("[::1]:9100", "::1", 9100),
        ("::1:9100", "::1", 9100),
        ("[fd00::2]:443", "fd00::2", 443),
        ("10.0.0.7:65535", "10.0.0.7", 65535),
    ],
)
def test_an_allowed_address(entry: str, address: str, port: int) -> None:
    assert parse_allowed([entry], "x") == {(ipaddress.ip_address(address), port)}


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param("127.0.0.1", id="no port"),
        pytest.param("127.0.0.1:", id="empty port"),
        pytest.param(":9100", id="no address"),
        pytest.param("localhost:9100", id="name"),
        pytest.param("10.0.0.0/8:443", id="network"),
        pytest.param("*:443", id="wildcard"),
        pytest.param("127.1:443", id="short"),
        pytest.param("127.0.0.1:http", id="service name"),
        pytest.param("http://127.0.0.1:80", id="URL"),
        pytest.param("", id="empty"),
        pytest.param("127.0.0.1:0", id="port 0"),
        pytest.param("127.0.0.1:-1", id="negative port"),
        pytest.param("127.0.0.1:65536", id="large port"),
    ],
)
def test_what_is_no_allowed_address_is_named_with_the_mend(entry: str) -> None:
    with pytest.raises(OperatorError) as failure:
        parse_allowed(["127.0.0.1:1", entry], "[outbound] allow")
    sentence = str(failure.value)
    assert [part for part in ("[outbound] allow", f'"{entry}"', "ip:port", "[::1]:9100") if part not in sentence] == []


def get(outbound: Outbound, url: str, timeouts: Timeouts = AMPLE, provider_id: str = "flo") -> Answer:
    return outbound.request("GET", url, provider_id=provider_id, timeouts=timeouts)


# What is sent


def test_a_request_and_its_answer() -> None:
    seen: list[bytes] = []
    with Peer(answering(b'{"a": 1}', status="201 Created", seen=seen)) as peer, make_outbound(peer.address) as outbound:
        answer = outbound.request(
            "POST",
            f"{peer.url}/token?x=1",
            provider_id="flo",
            timeouts=AMPLE,
            headers={"authorization": "Basic eDp5"},
            form={"code": "a b&c=d", "state": "é"},
        )
    assert answer == Answer(201, b'{"a": 1}')
    head, _, body = seen[0].partition(b"\r\n\r\n")
    request_line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert request_line == "POST /token?x=1 HTTP/1.1"
    assert body == b"code=a+b%26c%3Dd&state=%C3%A9"
    assert {name: value for name, value in headers.items() if name != "connection"} == {
        "host": peer.address,
        "user-agent": "doorward",
        "accept": "application/json",
        "accept-encoding": "identity",
        "authorization": "Basic eDp5",
        "content-type": "application/x-www-form-urlencoded",
        "content-length": str(len(body)),
    }


def test_a_query_joins_that_of_the_url() -> None:
    seen: list[bytes] = []
    with Peer(answering(seen=seen)) as peer, make_outbound(peer.address) as outbound:
        for query in ({"code": "a b&c"}, {}, None):
            outbound.request("GET", f"{peer.url}/token?x=1", provider_id="flo", timeouts=AMPLE, query=query)
    lines = [request.split(b"\r\n")[0] for request in seen]
    assert lines == [b"GET /token?x=1&code=a+b%26c HTTP/1.1", *[b"GET /token?x=1 HTTP/1.1"] * 2]


def test_each_request_has_a_connection_of_its_own() -> None:
    with Peer(answering()) as peer, make_outbound(peer.address) as outbound:
        for _ in range(3):
            assert get(outbound, peer.url).status == 200
        assert peer.connections == 3


def test_no_cookie_is_carried_from_one_request_to_the_next() -> None:
    seen: list[bytes] = []
    serve = answering(b"{}", "Set-Cookie: sid=1; Path=/", seen=seen)
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        get(outbound, peer.url)
        get(outbound, peer.url)
    assert [b"cookie" in request.lower() for request in seen] == [False, False]


def test_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login ada password sekret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    seen: list[bytes] = []
    with Peer(answering(seen=seen)) as peer, Peer(answering(b"proxied")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        with make_outbound(peer.address, proxy.address) as outbound:
            assert get(outbound, peer.url).body == b"{}"
            with pytest.raises(NotConnectable):
                get(outbound, f"https://127.0.0.1:{free_port()}/")
        assert proxy.connections == 0
    assert b"authorization" not in seen[0].lower()


def test_what_a_peer_sends_in_advance_answers_nobody() -> None:
    """Else a second answer on a kept connection would be taken for that to the next user's request."""

    def answer_twice(connection: socket.socket, _: threading.Event) -> None:
        read_request(connection)
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
        connection.sendall(answer + b"mine" + answer + b"evil")
        with contextlib.suppress(OSError):
            connection.recv(1)

    with Peer(answer_twice) as peer, make_outbound(peer.address) as outbound:
        assert [get(outbound, peer.url).body for _ in range(3)] == [b"mine"] * 3
        assert peer.connections == 3


def test_a_redirect_is_an_answer() -> None:
    with Peer(answering()) as elsewhere:
        location = f"Location: {elsewhere.url}/"
        serve = answering(b"", location, status="302 Found")
        with Peer(serve) as peer, make_outbound(peer.address, elsewhere.address) as outbound:
            assert get(outbound, peer.url) == Answer(302, b"")
        assert elsewhere.connections == 0


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "400 Bad", "418 Teapot", "503 Gone fishing"])
def test_every_status_is_an_answer(status: str) -> None:
    with Peer(answering(b"", status=status)) as peer, make_outbound(peer.address) as outbound:
        assert get(outbound, peer.url).status == int(status[:3])


def test_the_sandbox_provider_answers(provider: SandboxProvider) -> None:
    with make_outbound(provider.address) as outbound:
        assert get(outbound, f"{provider.url}/lookup?access_token=x").status == 401


# Where requests may go


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A listener on every address of this machine that accepts nothing."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        yield listener


def assert_untouched(listener: socket.socket) -> None:
    """No connection waits to be accepted: what was made is there before connect() returns."""
    assert select.select([listener], [], [], 0)[0] == []


@pytest.fixture(scope="module")
def guarded() -> Iterator[Outbound]:
    """One that allows no address."""
    with make_outbound() as outbound:
        yield outbound


LOOPBACK = [
    "127.0.0.1",
    "127.0.0.2",
    "127.1",
    "0.0.0.0",
    "0",
    "2130706433",
    "017700000001",
    "0x7f000001",
    "0x7f.1",
    "0x7f.0x0.0x0.0x1",
    "localhost",
    "localhost.",
    "LOCALHOST",
    "LocalHost.",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[::1%25lo]",
    "[::1%lo]",
    "[::ffff:127.0.0.1%lo]",
    "[fe80::1%25lo]",
]


@pytest.mark.parametrize("host", LOOPBACK)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_private_address_is_not_connected_to(
    guarded: Outbound, silent: socket.socket, scheme: str, host: str
) -> None:
    with pytest.raises(NotConnectable):
        get(guarded, f"{scheme}://{host}:{silent.getsockname()[1]}/")
    assert_untouched(silent)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "017700000001", "0x7f.1", "localhost", "LOCALHOST"]
)
def test_an_allowed_address_is_connected_to_however_it_is_spelled(host: str) -> None:
    with Peer(answering()) as peer, make_outbound(peer.address) as outbound:
        assert get(outbound, f"http://{host}:{peer.port}/").status == 200


@pytest.mark.parametrize(
    "allowed",
    [
        pytest.param("127.0.0.1:{other}", id="other port"),
        pytest.param("127.0.0.2:{port}", id="other address"),
        pytest.param("[::1]:{port}", id="other family"),
        pytest.param("[::ffff:127.0.0.1]:{port}", id="mapped"),
    ],
)
def test_an_allowed_address_is_a_pair(silent: socket.socket, allowed: str) -> None:
    port = silent.getsockname()[1]
    entry = allowed.format(port=port, other=port - 1)
    with make_outbound(entry) as outbound, pytest.raises(NotConnectable):
        get(outbound, f"http://127.0.0.1:{port}/")
    assert_untouched(silent)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://does-not-exist.invalid/", id="name that does not resolve"),
        pytest.param(f"http://{'x' * 64}.example/", id="label too long"),
        pytest.param(f"http://{'x.' * 200}example/", id="name too long"),
        pytest.param("http://0177.0.0.1/", id="octal"),
        pytest.param("http://127.0.0.1./", id="address with a dot"),
        pytest.param("http://ⓛocalhost/", id="circled letter"),
        pytest.param("http://\uff11\uff12\uff17.0.0.1/", id="full-width digits"),
        pytest.param("http://xn--a/", id="bad punycode"),
        pytest.param("http://a..b/", id="empty label"),
        pytest.param("http://[::1/", id="open bracket"),
        pytest.param("http://a b/", id="blank"),
        pytest.param("http://127.0.0.1:99999/", id="port too large"),
    ],
)
def test_what_names_no_host_is_not_connected_to(guarded: Outbound, url: str) -> None:
    with pytest.raises(NotConnectable):
        get(guarded, url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "file:///etc/passwd", "/token", "http://", ""])
def test_what_is_no_http_url_is_refused(guarded: Outbound, url: str) -> None:
    with pytest.raises(ProviderUnavailable):
        get(guarded, url)


def test_a_port_that_nobody_listens_on() -> None:
    port = free_port()
    with make_outbound(f"127.0.0.1:{port}") as outbound, pytest.raises(NotConnectable):
        get(outbound, f"http://127.0.0.1:{port}/")


# How long they may take


def silence(_: socket.socket, stopping: threading.Event) -> None:
    stopping.wait(10)


def trickle(first: bytes, step: bytes) -> Serve:
    """Says something and then a little, again and again, often enough for any read timeout."""

    def serve(connection: socket.socket, stopping: threading.Event) -> None:
        connection.sendall(first)
        for _ in range(500):  # 10 s: too long for every test, but not for ever
            if stopping.wait(0.02):
                return
            connection.sendall(step)

    return serve


_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
# The head of a handshake record of 16 KiB: the handshake goes on while its bytes drip in.
_RECORD = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"


@pytest.mark.parametrize(
    ("scheme", "serve", "timeouts", "late"),
    [
        pytest.param("http", silence, Timeouts(5, 0.2, 5), ProviderTimeout, id="no byte: read timeout"),
        pytest.param("http", silence, SHORT, ProviderTimeout, id="no byte: total"),
        pytest.param("http", trickle(b"", b"H"), SHORT, CallError, id="slow status line"),
        pytest.param("http", trickle(b"HTTP/1.1 200 OK\r\nX: ", b"x"), SHORT, CallError, id="slow header"),
        pytest.param("http", trickle(b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"), SHORT, CallError, id="more headers"),
        pytest.param("http", trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), SHORT, CallError, id="100s"),
        pytest.param("http", trickle(_LONG, b"x"), SHORT, CallError, id="slow body"),
        pytest.param("http", trickle(_CHUNKED, b"1\r\nx\r\n"), SHORT, CallError, id="slow chunks"),
        pytest.param("http", trickle(_CHUNKED + b"0\r\n", b"X: x\r\n"), SHORT, CallError, id="slow trailers"),
        pytest.param("https", silence, Timeouts(0.2, 5, 5), ConnectTimeout, id="no TLS: connect timeout"),
        pytest.param("https", silence, SHORT, ConnectTimeout, id="no TLS: total"),
        pytest.param("https", trickle(_RECORD, b"\0"), SHORT, ConnectTimeout, id="slow TLS"),
    ],
)
def test_no_peer_outlasts_the_timeouts(scheme: str, serve: Serve, timeouts: Timeouts, late: type[CallError]) -> None:
    late = ProviderTimeout if late is CallError else late
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        start = time.monotonic()
        with pytest.raises(late) as failure:
            get(outbound, f"{scheme}://{peer.address}/", timeouts)
        taken = time.monotonic() - start
        assert peer.connections == 1
    assert type(failure.value) is late
    assert 0.19 < taken < 0.2 + SLACK


@pytest.mark.parametrize("timeouts", [Timeouts(0.2, 5, 5), SHORT], ids=["connect timeout", "total"])
def test_a_connection_that_is_not_made_in_time(timeouts: Timeouts) -> None:
    """A listener whose queue is full answers no further connection."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address, port = listener.getsockname()
        full = False
        while not full:
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address, port))
            full = select.select([], [waiting], [], 0.1)[1] == []
        outbound = stack.enter_context(make_outbound(f"{address}:{port}"))
        start = time.monotonic()
        with pytest.raises(ConnectTimeout):
            get(outbound, f"http://{address}:{port}/", timeouts)
        assert 0.19 < time.monotonic() - start < 0.2 + SLACK


def test_no_time_at_all_connects_to_nobody(silent: socket.socket) -> None:
    port = silent.getsockname()[1]
    with make_outbound(f"127.0.0.1:{port}") as outbound:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(ConnectTimeout):
                get(outbound, f"http://{host}:{port}/", Timeouts(5, 5, 0))
    assert_untouched(silent)


# What they may bring back


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


ENCODINGS: dict[str, tuple[str | None, Callable[[bytes], bytes]]] = {
    "plain": (None, bytes),
    "identity": ("identity", bytes),
    "gzip": ("gzip", gzip.compress),
    "GZIP": (" GZIP ", gzip.compress),
    "deflate": ("deflate", zlib.compress),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("more", [0, 1, 5_000_000], ids=["1 MiB", "1 MiB + 1", "much more"])
def test_an_answer_of_1_mib_is_the_largest(encoding: str, more: int) -> None:
    name, encode = ENCODINGS[encoding]
    body = b"x" * (MAX_ANSWER_BYTES + more)
    headers = [] if name is None else [f"Content-Encoding: {name}"]
    with Peer(answering(encode(body), *headers)) as peer, make_outbound(peer.address) as outbound:
        if more:
            with pytest.raises(ProviderMalformed):
                get(outbound, peer.url)
        else:
            assert get(outbound, peer.url).body == body


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_empty_answer(encoding: str) -> None:
    name, encode = ENCODINGS[encoding]
    headers = [] if name is None else [f"Content-Encoding: {name}"]
    with Peer(answering(encode(b""), *headers)) as peer, make_outbound(peer.address) as outbound:
        assert get(outbound, peer.url).body == b""


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_inflated_to_the_limit_only(encoding: str) -> None:
    bomb = ENCODINGS[encoding][1](bytes(64 << 20))
    serve = answering(bomb, f"Content-Encoding: {encoding}")
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        tracemalloc.start()
        try:
            with pytest.raises(ProviderMalformed):
                get(outbound, peer.url)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 << 20


def test_an_endless_answer_is_read_to_the_limit_only() -> None:
    serve = trickle(_CHUNKED, b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    with Peer(serve) as peer, make_outbound(peer.address) as outbound, pytest.raises(ProviderMalformed):
        get(outbound, peer.url)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        pytest.param("br", b"{}", id="br"),
        pytest.param("zstd", b"{}", id="zstd"),
        pytest.param("compress", b"{}", id="compress"),
        pytest.param("gzip, gzip", gzip.compress(gzip.compress(b"{}")), id="twice"),
        pytest.param("gzip, br", gzip.compress(b"{}"), id="a list"),
        pytest.param("gzip", b"{}", id="not gzip"),
        pytest.param("gzip", b"\x1f\x8b" + b"\xff" * 50, id="bad gzip header"),
        pytest.param("gzip", gzip.compress(b"x" * 100)[:-6] + b"\0\0\0\0\0\0", id="bad checksum"),
        pytest.param("deflate", b"\x78\x9c" + b"\xff" * 50, id="bad deflate"),
        pytest.param("deflate", raw_deflate(b'{"a": "bcdef"}'), id="deflate without the zlib header"),
        pytest.param("gzip", gzip.compress(b"{}" + b" " * 100)[:-10], id="truncated gzip"),
    ],
)
def test_what_cannot_be_decoded_is_malformed(encoding: str, body: bytes) -> None:
    serve = answering(body, f"Content-Encoding: {encoding}")
    with Peer(serve) as peer, make_outbound(peer.address) as outbound, pytest.raises(ProviderMalformed):
        get(outbound, peer.url)


def says(text: bytes) -> Serve:
    """Reads the request, says this, and hangs up."""

    def serve(connection: socket.socket, _: threading.Event) -> None:
        read_request(connection)
        connection.sendall(text)

    return serve


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200", id="half a status line"),
        pytest.param(b"SSH-2.0-OpenSSH_9\r\n\r\n", id="other protocol"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", id="half a body"),
        pytest.param(_CHUNKED + b"zz\r\n", id="bad chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", id="bad header"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", id="long header"),
    ],
)
def test_a_broken_answer_may_have_been_to_a_request_that_was_seen(text: bytes) -> None:
    with Peer(says(text)) as peer, make_outbound(peer.address) as outbound:
        with pytest.raises(ProviderUnavailable) as failure:
            get(outbound, peer.url)
        assert peer.connections == 1
    assert type(failure.value) is ProviderUnavailable


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def server_tls(certificate: trustme.LeafCert, names: list[str | None] | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    if names is not None:
        context.sni_callback = lambda _socket, name, _context: names.append(name)
    return context


def test_a_certificate_of_a_named_authority_is_trusted(authority: trustme.CA, ca_file: Path) -> None:
    """The connection goes to the address that was judged; certificate and Host are those of the name."""
    names: list[str | None] = []
    seen: list[bytes] = []
    tls = server_tls(authority.issue_cert("localhost"), names)
    with Peer(answering(seen=seen), tls) as peer, make_outbound(peer.address, ca_file=ca_file) as outbound:
        assert get(outbound, f"https://localhost:{peer.port}/x").status == 200
    assert names == ["localhost"]
    assert f"\r\nhost: localhost:{peer.port}\r\n".encode() in seen[0].lower()


def test_a_certificate_of_an_address(authority: trustme.CA, ca_file: Path) -> None:
    tls = server_tls(authority.issue_cert("127.0.0.1"))
    with Peer(answering(), tls) as peer, make_outbound(peer.address, ca_file=ca_file) as outbound:
        assert get(outbound, f"https://127.0.0.1:{peer.port}/").status == 200


@pytest.mark.parametrize("case", ["wrong name", "address for a name", "expired", "untrusted", "other authority"])
def test_a_bad_certificate_ends_the_request_before_it_is_sent(case: str, authority: trustme.CA, ca_file: Path) -> None:
    seen: list[bytes] = []
    match case:
        case "wrong name":
            certificate = authority.issue_cert("other.example")
        case "address for a name":
            certificate = authority.issue_cert("127.0.0.1")
        case "expired":
            certificate = authority.issue_cert("localhost", not_after=datetime(2020, 1, 1, tzinfo=UTC))
        case "untrusted":
            certificate = authority.issue_cert("localhost")
        case _:
            certificate = trustme.CA().issue_cert("localhost")
    trusted = None if case == "untrusted" else ca_file
    with Peer(answering(seen=seen), server_tls(certificate)) as peer:
        with make_outbound(peer.address, ca_file=trusted) as outbound, pytest.raises(ProviderUnavailable):
            get(outbound, f"https://localhost:{peer.port}/")
        assert peer.connections == 1
    assert seen == []


def test_https_to_a_plain_server() -> None:
    serve = trickle(b"HTTP/1.1 400 Bad\r\n\r\n", b"x")
    with Peer(serve) as peer, make_outbound(peer.address) as outbound, pytest.raises(ProviderUnavailable):
        get(outbound, f"https://{peer.address}/")


@pytest.mark.parametrize("case", ["missing", "not PEM", "directory"])
def test_a_ca_file_that_cannot_be_read_is_named(case: str, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if case == "not PEM":
        path.write_text("hunter2")
    elif case == "directory":
        path.mkdir()
    bulkhead = Bulkhead(threads=8, outbound=1, per_provider=1, waiting=1)
    with pytest.raises(OperatorError) as failure:
        Outbound(allow=(), ca_file=path, bulkhead=bulkhead, concurrency=1)
    assert [part for part in ("[outbound] ca_file", str(path)) if part not in str(failure.value)] == []


# Posting, where only the head of the answer counts


def post(outbound: Outbound, url: str, timeouts: Timeouts = AMPLE, body: bytes = b"a=1", peer: str = "app") -> Receipt:
    headers = {"content-type": "application/x-www-form-urlencoded", "webhook-id": "msg_1"}
    return outbound.post(url, peers=[peer], timeouts=timeouts, headers=headers, body=body)


def test_what_is_posted() -> None:
    seen: list[bytes] = []
    with Peer(answering(seen=seen)) as peer, make_outbound(peer.address) as outbound:
        assert post(outbound, f"{peer.url}/cb?x=%20y", body=b"\xff\0a=1\r\n") == Receipt(200, None)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    request_line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert request_line == "POST /cb?x=%20y HTTP/1.1"
    assert body == b"\xff\0a=1\r\n"
    assert {name: value for name, value in headers.items() if name not in ("connection", "accept")} == {
        "host": peer.address,
        "user-agent": "doorward",
        "accept-encoding": "identity",
        "content-type": "application/x-www-form-urlencoded",
        "content-length": str(len(body)),
        "webhook-id": "msg_1",
    }


def gushing(connection: socket.socket, _: threading.Event) -> None:
    """1 GB, or as much of it as is read."""
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    megabyte = b"x" * 1_000_000
    for _megabyte in range(1000):
        connection.sendall(megabyte)


def hanging(connection: socket.socket, stopping: threading.Event) -> None:
    """A head, and then nothing."""
    read_request(connection)
    connection.sendall(_LONG)
    stopping.wait(10)


def before_the_body(connection: socket.socket, _: threading.Event) -> None:
    """Answers without having read what was sent."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with contextlib.suppress(OSError):
        connection.recv(1 << 20)


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(gushing, id="1 GB"),
        pytest.param(trickle(_LONG, b"x"), id="slow body"),
        pytest.param(trickle(_CHUNKED, b"1\r\nx\r\n"), id="slow chunks"),
        pytest.param(hanging, id="no body after all"),
        pytest.param(says(_LONG + b"x"), id="half a body"),
        pytest.param(says(_CHUNKED + b"zz\r\n"), id="bad chunk"),
        pytest.param(says(b"HTTP/1.1 200 OK\r\n\r\n"), id="body until the end of the connection"),
        pytest.param(answering(b"x", "Content-Encoding: br"), id="unknown encoding"),
        pytest.param(answering(b"\xff" * 50, "Content-Encoding: gzip"), id="not gzip"),
        pytest.param(answering(b"x" * (MAX_ANSWER_BYTES + 1)), id="larger than answers may be"),
        pytest.param(before_the_body, id="answer before the body"),
    ],
)
def test_a_receipt_is_the_head_alone(serve: Serve) -> None:
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        tracemalloc.start()
        start = time.monotonic()
        try:
            assert post(outbound, peer.url) == Receipt(200, None)
            taken, (_, peak) = time.monotonic() - start, tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peer.connections == 1
        assert taken < SLACK
    assert peak < 8 << 20


@pytest.mark.parametrize("status", ["200 OK", "202 Accepted", "204 No Content", "304 Same", "410 Gone", "500 Oops"])
def test_every_status_is_a_receipt(status: str) -> None:
    serve = says(f"HTTP/1.1 {status}\r\n\r\n".encode())
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        assert post(outbound, peer.url).status == int(status[:3])


@pytest.mark.parametrize(
    ("header", "retry_after"),
    [
        ("Retry-After: 120", "120"),
        ("RETRY-AFTER:  120 ", "120"),
        ("Retry-After: Fri, 31 Dec 2099 23:59:59 GMT", "Fri, 31 Dec 2099 23:59:59 GMT"),
        ("Retry-After: soon", "soon"),
        ("Retry-After:", ""),
        ("X: 1", None),
    ],
)
def test_when_a_receiver_wants_the_next(header: str, retry_after: str | None) -> None:
    serve = answering(b"", header, status="503 Later")
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        assert post(outbound, peer.url) == Receipt(503, retry_after)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_a_receipt(status: str) -> None:
    with Peer(answering()) as elsewhere:
        serve = answering(b"", f"Location: {elsewhere.url}/", status=status)
        with Peer(serve) as peer, make_outbound(peer.address, elsewhere.address) as outbound:
            assert post(outbound, peer.url) == Receipt(int(status[:3]), None)
        assert elsewhere.connections == 0


def test_no_cookie_goes_with_the_next_post() -> None:
    seen: list[bytes] = []
    serve = answering(b"", "Set-Cookie: sid=1; Path=/", seen=seen)
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        post(outbound, peer.url)
        post(outbound, peer.url)
    assert [b"cookie" in request.lower() for request in seen] == [False, False]


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        pytest.param(b"", ProviderUnavailable, id="nothing"),
        pytest.param(b"HTTP/1.1 200", ProviderUnavailable, id="half a status line"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: 1", ProviderUnavailable, id="half a head"),
        pytest.param(b"SSH-2.0-OpenSSH_9\r\n\r\n", ProviderUnavailable, id="other protocol"),
        pytest.param(b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", ProviderUnavailable, id="bad header"),
    ],
)
def test_no_head_is_no_receipt(text: bytes, failure: type[CallError]) -> None:
    with Peer(says(text)) as peer, make_outbound(peer.address) as outbound, pytest.raises(CallError) as raised:
        post(outbound, peer.url)
    assert type(raised.value) is failure


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(silence, id="no byte"),
        pytest.param(trickle(b"", b"H"), id="slow status line"),
        pytest.param(trickle(b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"), id="more headers"),
        pytest.param(trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="100s"),
    ],
)
def test_no_receiver_outlasts_the_total_time(serve: Serve) -> None:
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        start = time.monotonic()
        with pytest.raises(ProviderTimeout):
            post(outbound, peer.url, SHORT)
        assert 0.19 < time.monotonic() - start < 0.2 + SLACK


def test_a_body_that_nobody_reads_ends_in_time(silent: socket.socket) -> None:
    allowed = f"127.0.0.1:{silent.getsockname()[1]}"
    with make_outbound(allowed) as outbound, pytest.raises(CallError) as failure:
        post(outbound, f"http://{allowed}/", SHORT, bytes(64 << 20))
    assert type(failure.value) in (ProviderTimeout, ProviderUnavailable)


@pytest.mark.parametrize("host", LOOPBACK)
def test_nothing_is_posted_to_a_private_address(guarded: Outbound, silent: socket.socket, host: str) -> None:
    with pytest.raises(NotConnectable):
        post(guarded, f"http://{host}:{silent.getsockname()[1]}/")
    assert_untouched(silent)


def test_posts_count_by_peer() -> None:
    with (
        Peer(hanging) as peer,
        make_outbound(peer.address, per_provider=1) as outbound,
        outbound.bulkhead.requesting("app"),
    ):
        with pytest.raises(Busy):
            post(outbound, peer.url)
        assert peer.connections == 0
        assert post(outbound, peer.url, peer="other").status == 200


# Whether a request would be made


@pytest.mark.parametrize(
    ("host", "port", "may"),
    [
        pytest.param("8.8.8.8", 443, True, id="public"),
        pytest.param("2606:4700::1111", 80, True, id="public IPv6"),
        pytest.param("127.0.0.1", 9100, True, id="allowed"),
        pytest.param("127.0.0.1", 9101, False, id="other port than allowed"),
        pytest.param("127.0.0.2", 9100, False, id="other address than allowed"),
        pytest.param("10.0.0.1", 443, False, id="private"),
        pytest.param("169.254.169.254", 80, False, id="link-local"),
        pytest.param("::1", 9100, False, id="loopback IPv6"),
        pytest.param("::ffff:127.0.0.1", 9100, False, id="mapped"),
        pytest.param("64:ff9b::a9fe:a9fe", 80, False, id="NAT64"),
        pytest.param("localhost", 9101, False, id="private name"),
        pytest.param("does-not-exist.invalid", 443, True, id="name that does not resolve"),
        pytest.param("x" * 64 + ".example", 443, True, id="label too long"),
        pytest.param("a..b", 443, True, id="empty label"),
    ],
)
def test_may_connect(host: str, port: int, may: bool) -> None:
    with make_outbound("127.0.0.1:9100") as outbound:
        assert outbound.may_connect(host, port) is may


PUBLIC, PRIVATE, ALLOWED = "93.184.215.14", "10.0.0.1", "127.0.0.1"


@pytest.mark.parametrize(
    ("addresses", "may"),
    [
        pytest.param([PUBLIC], True, id="public"),
        pytest.param([PUBLIC, "2606:4700::1111"], True, id="public, both families"),
        pytest.param([PRIVATE], False, id="private"),
        pytest.param([PUBLIC, PRIVATE], False, id="private, too"),
        pytest.param([PRIVATE, PUBLIC], False, id="private first"),
        pytest.param([PUBLIC, "fe80::1%eth0"], False, id="link-local with a scope"),
        pytest.param([ALLOWED], True, id="allowed"),
        pytest.param([ALLOWED, PUBLIC], True, id="allowed and public"),
        pytest.param([ALLOWED, PRIVATE], False, id="allowed and private"),
    ],
)
def test_all_addresses_of_a_name_count(monkeypatch: pytest.MonkeyPatch, addresses: list[str], may: bool) -> None:
    resolve_to(monkeypatch, lambda: addresses)
    with make_outbound(f"{ALLOWED}:9100") as outbound:
        assert outbound.may_connect("app.example", 9100) is may


def resolve_to(monkeypatch: pytest.MonkeyPatch, resolve: Callable[[], list[str]]) -> None:
    """Stand in for the resolver, which is the outside world."""

    def getaddrinfo(_: str, port: int, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in resolve()]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_name_that_takes_long_is_judged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def resolve() -> list[str]:
        answer.wait(10)
        return [PRIVATE]

    resolve_to(monkeypatch, resolve)
    with make_outbound() as outbound:
        start = time.monotonic()
        assert outbound.may_connect("app.example", 443)
        assert 0.99 < time.monotonic() - start < 1 + SLACK
        answer.set()


# The bulkhead


def take(bulkhead: Bulkhead, stack: contextlib.ExitStack, slot: str) -> None:
    """Hold a slot for as long as the stack: `waiting`, or a provider's id."""
    stack.enter_context(bulkhead.waiting() if slot == "waiting" else bulkhead.requesting(slot))


@pytest.mark.parametrize(
    ("taken", "refused", "free"),
    [
        pytest.param(["flo"] * 2, ["flo"], ["min", "waiting"], id="per provider"),
        pytest.param(["flo", "flo", "min"], ["flo", "min", "eag"], ["waiting"], id="outbound"),
        pytest.param(["waiting"] * 4, ["waiting"], ["flo", "min"], id="waiting"),
        pytest.param([], [], ["flo", "min", "waiting"], id="nothing taken"),
    ],
)
def test_a_cap_refuses_at_once(taken: list[str], refused: list[str], free: list[str]) -> None:
    bulkhead = Bulkhead(threads=64, outbound=3, per_provider=2, waiting=4)
    with contextlib.ExitStack() as stack:
        for slot in taken:
            take(bulkhead, stack, slot)
        for slot in refused:
            with pytest.raises(Busy), contextlib.ExitStack() as inner:
                take(bulkhead, inner, slot)
        for slot in free:
            with contextlib.ExitStack() as inner:
                take(bulkhead, inner, slot)
    # All is free again.
    with contextlib.ExitStack() as stack:
        for slot in ["flo", "flo", "min", *["waiting"] * 4]:
            take(bulkhead, stack, slot)


@pytest.mark.parametrize(
    ("threads", "slots", "most"),
    [
        pytest.param(64, ["waiting"], 56, id="waiting"),
        pytest.param(64, ["flo"], 56, id="requests"),
        pytest.param(64, ["flo", "waiting"], 56, id="both"),
        pytest.param(8, ["waiting"], 7, id="few threads"),
        pytest.param(2, ["waiting"], 1, id="fewest threads"),
        pytest.param(2, ["flo"], 1, id="fewest threads, request"),
    ],
)
def test_some_threads_always_stay_free(threads: int, slots: list[str], most: int) -> None:
    bulkhead = Bulkhead(threads=threads, outbound=1000, per_provider=1000, waiting=1000)
    with contextlib.ExitStack() as stack:
        held = 0
        with contextlib.suppress(Busy):
            while held < 1000:
                take(bulkhead, stack, slots[held % len(slots)])
                held += 1
        assert held == most


def test_the_default_caps_can_be_reached() -> None:
    bulkhead = Bulkhead(threads=64, outbound=48, per_provider=32, waiting=48)
    with contextlib.ExitStack() as stack:
        for slot in ["flo"] * 32 + ["min"] * 16:
            take(bulkhead, stack, slot)
        with pytest.raises(Busy):
            take(bulkhead, stack, "eag")


def test_a_slot_is_free_again_after_an_exception() -> None:
    bulkhead = Bulkhead(threads=2, outbound=1, per_provider=1, waiting=1)

    def fail(slot: str) -> None:
        with contextlib.ExitStack() as stack:
            take(bulkhead, stack, slot)
            raise RuntimeError

    for _ in range(3):
        for slot in ("flo", "waiting"):
            with pytest.raises(RuntimeError):
                fail(slot)


def test_a_busy_bulkhead_sends_nothing_and_is_free_when_the_request_ends() -> None:
    answer = threading.Event()

    def serve(connection: socket.socket, stopping: threading.Event) -> None:
        read_request(connection)
        answer.wait(10)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with (
        Peer(serve) as peer,
        make_outbound(peer.address, concurrency=2, per_provider=1) as outbound,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        under_way = pool.submit(get, outbound, peer.url)
        await_condition(lambda: peer.connections == 1, "the first request")
        start = time.monotonic()
        with pytest.raises(Busy):
            get(outbound, peer.url)
        assert time.monotonic() - start < 1
        answer.set()
        assert under_way.result(10).status == 200
        assert peer.connections == 1
        assert get(outbound, peer.url).status == 200


@pytest.mark.parametrize("failure", ["refused", "malformed", "late"])
def test_a_failed_request_gives_its_slot_back(failure: str, silent: socket.socket) -> None:
    late = f"127.0.0.1:{silent.getsockname()[1]}"
    with (
        Peer(answering(b"x", "Content-Encoding: br")) as peer,
        make_outbound(peer.address, late, concurrency=1, per_provider=1) as outbound,
    ):
        url, error, timeouts = {
            "refused": ("http://10.0.0.1/", NotConnectable, AMPLE),
            "malformed": (peer.url, ProviderMalformed, AMPLE),
            "late": (f"http://{late}/", ProviderTimeout, Timeouts(5, 5, 0.05)),
        }[failure]
        for _ in range(3):
            with pytest.raises(error):
                get(outbound, url, timeouts)
