"""Receivers that are not what they seem: their certificates, their addresses, names that change, and one that hangs.

A delivery goes through a real gateway and a real server. The first half has receivers on this machine, which the
settings allow. The second half allows none, and runs the server on an island: in namespaces of its own (Linux's user,
mount and network ones, made by an unprivileged `unshare`), in which every address of the world is the island itself.
So there is somebody at 10.0.0.1 and at 169.254.169.254 who could be connected to, and a name server of the test's
that may answer one thing at the check and another at the connect. Nothing of ours is patched, and the libc resolver is
the real one. The island's sockets are served by threads of the test; this module is also what opens them in there.
"""

import contextlib
import ipaddress
import itertools
import json
import os
import select
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from doorward_server.consents import Status
from doorward_server.models import AuditEvent, ConsentRequest, Delivery, DeliveryAttempt
from tests.contract.test_request_api_key import (
    AT_ONCE,
    NO_LIMITS,
    NOWHERE,
    Bot,
    assert_answer,
    assert_ok,
    bot_of,
    by_form,
    fields_of,
    requests_of,
    snowflake,
)
from tests.processes import BIN, Process, await_condition, running
from tests.sandbox.client import SandboxProvider
from tests.sandbox.receiver import Receiver, callback_receiver
from tests.stack import Stack, make_stack
from tests.unit.peers import Peer, Serve, answering, read_request

_NUMBERS = itertools.count(1)
# How attempts end: a status, or the reason why there is none.
Outcome = tuple[int | None, str | None]
SENT: Outcome = (200, None)
NOT_CONNECTED: Outcome = (None, "NOT_CONNECTABLE")
NOT_CONNECTED_IN_TIME: Outcome = (None, "CONNECT_TIMEOUT")
NOT_ANSWERED_IN_TIME: Outcome = (None, "TIMEOUT")


@dataclass(frozen=True)
class Sender:
    """A server and a gateway, and what is asked there and decided in the bot's place."""

    stack: Stack

    def ask(self, callback: str, **changes: str) -> int:
        """A stranger's request that was answered OK."""
        fields = fields_of(callback=callback, **changes)
        assert_ok(by_form(self.stack, fields))
        return int(requests_of(self.stack, fields["userid"])[0].id)

    def assert_refused(self, callback: str) -> None:
        fields = fields_of(callback=callback)
        assert_answer(by_form(self.stack, fields), 400, "invalid callback")
        assert requests_of(self.stack, fields["userid"]) == []

    def cancel(self, request: int) -> None:
        consents = self.stack.app.consents
        consents.resolve(request, Status.CANCELED, actor="test")
        assert consents.get(request).status == Status.CANCELED

    def send(self, callback: str) -> int:
        """A request and its outcome; the delivery is under way."""
        request = self.ask(callback)
        self.cancel(request)
        return request

    def send_to_unasked(self, callback: str, accepted: str) -> int:
        """As if a callback that is not acceptable had been accepted, long ago."""
        request = self.ask(accepted)
        self.set_callback(request, callback)
        self.cancel(request)
        return request

    def set_callback(self, request: int, callback: str) -> None:
        with self.stack.app.database.writing():
            ConsentRequest.update(callback=callback).where(ConsentRequest.id == request).execute()

    def delivery(self, request: int) -> Delivery:
        _ = self.stack.app  # its models
        return Delivery.get(Delivery.request == request)

    def await_status(self, request: int, status: str) -> Delivery:
        await_condition(lambda: self.delivery(request).status != "queued", f"the delivery to be {status}")
        assert self.delivery(request).status == status, self.outcomes(request)
        return self.delivery(request)

    def attempts(self, request: int) -> list[DeliveryAttempt]:
        return self.stack.app.deliveries.attempts(self.delivery(request).id)

    def outcomes(self, request: int) -> list[Outcome]:
        """Of each attempt."""
        return [(attempt.status, attempt.error) for attempt in self.attempts(request)]

    def keys_sent(self, request: int) -> int:
        """How often the audit trail says that keys went out."""
        subject = f"delivery:{self.delivery(request).id}"
        return int(AuditEvent.select().where(AuditEvent.action == "keys.sent", AuditEvent.subject == subject).count())


# Receivers on this machine

RETRIES = [0.05]
CONNECT_TIMEOUT = 0.4
TIMEOUT = 1.0
PER_HOST = 2


@dataclass
class Listening:
    """Listens on 127.0.0.1, whatever host its callback names, and notes the requests that get through."""

    host: str
    peer: Peer
    seen: list[bytes]

    @property
    def callback(self) -> str:
        return f"https://{self.host}:{self.peer.port}/callback/{next(_NUMBERS)}"


Issue = Callable[[trustme.CA], ssl.SSLContext]


def issuing(*names: str, **options: Any) -> Issue:
    """A server's TLS with a certificate of the authority's."""
    return lambda authority: _serving(authority.issue_cert(*names, **options))


def _serving(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def _self_signed(_: trustme.CA) -> ssl.SSLContext:
    """An authority's own certificate is signed with its own key."""
    other = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with other.private_key_pem.tempfile() as key, other.cert_pem.tempfile() as certificate:
        context.load_cert_chain(certificate, key)
    return context


def _renewed(authority: trustme.CA) -> ssl.SSLContext:
    """Expired at the first handshake, in order from the second on."""
    context, in_order = _expired(authority), issuing("127.0.0.1")(authority)
    handshakes = itertools.count()

    def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        if next(handshakes):
            connection.context = in_order

    context.sni_callback = choose
    return context


_expired = issuing("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC))

# By name: the host of the callback, and what the receiver shows.
GOOD: dict[str, tuple[str, Issue]] = {
    "address": ("127.0.0.1", issuing("127.0.0.1")),
    "name": ("localhost", issuing("localhost")),
    "name in capitals": ("LocalHost", issuing("localhost")),
    "one of several": ("127.0.0.1", issuing("receiver.example", "127.0.0.1")),
    "intermediate authority": (
        "127.0.0.1",
        lambda authority: _serving(authority.create_child_ca().issue_cert("127.0.0.1")),
    ),
}
BAD: dict[str, tuple[str, Issue]] = {
    "another name": ("localhost", issuing("receiver.example")),
    "name below": ("localhost", issuing("*.localhost")),
    "name for an address": ("127.0.0.1", issuing("localhost")),
    "address for a name": ("localhost", issuing("127.0.0.1")),
    "another address": ("127.0.0.1", issuing("127.0.0.2")),
    "unknown authority": ("127.0.0.1", lambda _: issuing("127.0.0.1")(trustme.CA())),
    "self-signed": ("127.0.0.1", _self_signed),
    "expired": ("127.0.0.1", _expired),
    "not yet valid": (
        "127.0.0.1",
        issuing("127.0.0.1", not_before=datetime(2090, 1, 1, tzinfo=UTC), not_after=datetime(2091, 1, 1, tzinfo=UTC)),
    ),
}


def _trickling_once(seen: list[bytes]) -> Serve:
    """The head of the first answer never ends; the others come at once."""
    at_once = answering(b"", seen=seen)

    def serve(connection: socket.socket, stopping: threading.Event) -> None:
        if seen:
            at_once(connection, stopping)
            return
        seen.append(read_request(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not stopping.wait(0.02):
            connection.sendall(b"x")

    return serve


def _mute(connection: socket.socket, _: threading.Event) -> None:
    """Says nothing until the other one is gone."""
    while connection.recv(65536):
        pass


def _no_tls(connection: socket.socket, _: threading.Event) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def receivers(authority: trustme.CA) -> Iterator[dict[str, Listening]]:
    """Those of the tables, and a few whose certificate is in order; all that the settings have to allow."""
    with contextlib.ExitStack() as exit_stack:

        def make(host: str, tls: ssl.SSLContext | None, serve: Callable[[list[bytes]], Serve]) -> Listening:
            seen: list[bytes] = []
            return Listening(host, exit_stack.enter_context(Peer(serve(seen), tls)), seen)

        def in_full(seen: list[bytes]) -> Serve:
            return answering(b"", seen=seen)

        address = "127.0.0.1"
        yield {
            **{name: make(host, issue(authority), in_full) for name, (host, issue) in (GOOD | BAD).items()},
            "renewed": make(address, _renewed(authority), in_full),
            "trickles": make(address, issuing(address)(authority), _trickling_once),
            "mute": make(address, None, lambda _: _mute),
            "no TLS": make(address, None, lambda _: _no_tls),
            "instant": make(address, None, in_full),
        }


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with callback_receiver(tmp_path_factory.mktemp("hanging") / "receiver.log") as receiver:
        receiver.fault(kind="hang")
        yield receiver


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory,
    logs: Path,
    shared_provider: SandboxProvider,
    secrets: set[str],
    authority: trustme.CA,
    receivers: dict[str, Listening],
    hanging: Receiver,
) -> Iterator[Sender]:
    """Few threads for deliveries, which may go to the receivers only."""
    ports = [*(receiver.peer.port for receiver in receivers.values()), hanging.address.rpartition(":")[2]]
    # `localhost` may be both.
    allowed = [NOWHERE, *(f"{address}:{port}" for address in ("127.0.0.1", "[::1]") for port in ports)]
    more = (
        f"{NO_LIMITS}[callbacks]\nallow = {json.dumps(allowed)}\nschedule = {RETRIES}\n"
        f"timeout = {TIMEOUT}\nconnect_timeout = {CONNECT_TIMEOUT}\nper_host = {PER_HOST}\n"
    )
    folder = tmp_path_factory.mktemp("receivers")
    ca_file = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    environment = {
        **AT_ONCE,
        "DOORWARD_OUTBOUND_CA_FILE": str(ca_file),
        "DOORWARD_JOBS_THREADS": "4",
        "DOORWARD_JOBS_POLL": "0.01",
    }
    stack = make_stack(folder / "home", logs, shared_provider, secrets, more, **environment)
    with stack.server(), stack.gateway():
        yield Sender(stack)


@pytest.fixture(scope="module")
def bot(house: Sender) -> Iterator[Bot]:
    with bot_of(house.stack) as bot:
        yield bot


def grant(house: Sender, bot: Bot, callback: str) -> tuple[int, str]:
    """A request that a key was granted to; the request, and the key."""
    user, key = snowflake(), f"receiver-key-{next(_NUMBERS)}-A1b2C3"
    [key_id] = bot.add_keys(user, key)
    request = house.ask(callback, userid=user)
    assert bot.grant(request, key_id) == "granted"
    return request, key


# Certificates


@pytest.mark.parametrize("case", GOOD)
def test_certificates_in_order(house: Sender, bot: Bot, receivers: dict[str, Listening], case: str) -> None:
    receiver = receivers[case]
    callback = receiver.callback
    request, key = grant(house, bot, callback)
    house.await_status(request, "sent")
    assert house.outcomes(request) == [SENT]
    [received] = receiver.seen
    assert received.startswith(f"POST /callback/{callback.rpartition('/')[2]} HTTP/1.1\r\n".encode())
    assert received.endswith(f"&api_keys={key}".encode())


def test_by_the_command_line(house: Sender, bot: Bot, receivers: dict[str, Listening]) -> None:
    receiver = receivers["address"]
    user = snowflake()
    [key_id] = bot.add_keys(user, "command-line-key")
    granted, canceled = (house.ask(receiver.callback, userid=user, state=state) for state in ("granted", "canceled"))
    for command in (["grant", str(granted), "--keys", str(key_id)], ["cancel", str(canceled)]):
        done = house.stack.cli("consent", *command)
        assert done.returncode == 0, done.stderr
    for request in (granted, canceled):
        house.await_status(request, "sent")
    bodies = {received.rpartition(b"\r\n")[2].decode() for received in receiver.seen[-2:]}
    assert bodies == {
        f"userid={user}&state=granted&api_keys=command-line-key",
        f"userid={user}&state=canceled&error=user+canceled",
    }
    receiver.seen.clear()


@pytest.mark.parametrize("case", [*BAD, "no TLS", "mute"])
def test_bad_certificates(house: Sender, bot: Bot, receivers: dict[str, Listening], case: str) -> None:
    """No request is ever seen, so no key is; every attempt is on record, and made when the schedule says."""
    receiver = receivers[case]
    request, _ = grant(house, bot, receiver.callback)
    delivery = house.await_status(request, "abandoned")
    assert house.outcomes(request) == [NOT_CONNECTED_IN_TIME if case == "mute" else NOT_CONNECTED] * (1 + len(RETRIES))
    attempts = house.attempts(request)
    for before, after, delay in zip(attempts, attempts[1:], RETRIES, strict=False):
        assert (after.started_at - before.started_at).total_seconds() >= delay + before.milliseconds / 1000 - 0.001
    assert receiver.peer.connections == len(attempts)
    assert (receiver.seen, house.keys_sent(request), delivery.carried_keys) == ([], 0, False)


def test_a_renewed_certificate(house: Sender, bot: Bot, receivers: dict[str, Listening]) -> None:
    """What could not be sent before is sent then."""
    receiver = receivers["renewed"]
    request, key = grant(house, bot, receiver.callback)
    house.await_status(request, "sent")
    assert house.outcomes(request) == [NOT_CONNECTED, SENT]
    [received] = receiver.seen
    assert received.endswith(f"&api_keys={key}".encode())
    assert house.keys_sent(request) == 1


def test_a_head_that_trickles_over_tls(house: Sender, receivers: dict[str, Listening]) -> None:
    receiver = receivers["trickles"]
    request = house.send(receiver.callback)
    house.await_status(request, "sent")
    assert house.outcomes(request) == [NOT_ANSWERED_IN_TIME, SENT]
    assert TIMEOUT <= house.attempts(request)[0].milliseconds / 1000 < 2 * TIMEOUT
    first, second = receiver.seen
    assert first == second


# Addresses in disguise


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


DISGUISED = {
    "decimal": "2130706433",
    "octal": "0177.0.0.1",
    "one octal number": "017700000001",
    "hexadecimal": "0x7f.0.0.1",
    "one hexadecimal number": "0x7f000001",
    "short": "127.1",
    "zeros before": "127.000.000.001",
    "dot behind": "127.0.0.1.",
    "circled digits": "①②⑦.0.0.1",
}


@pytest.fixture(scope="module")
def abandoned(house: Sender) -> dict[str, int]:
    """Requests whose deliveries were abandoned, for nobody was there."""
    requests = {case: house.send(f"http://{NOWHERE}/{next(_NUMBERS)}") for case in DISGUISED}
    for request in requests.values():
        house.await_status(request, "abandoned")
    return requests


@pytest.mark.parametrize("case", DISGUISED)
def test_disguised_addresses(house: Sender, abandoned: dict[str, int], listener: socket.socket, case: str) -> None:
    """Refused when asked. Had one been accepted once, its deliveries would fail, and be there to be seen."""
    callback = f"http://{DISGUISED[case]}:{listener.getsockname()[1]}/callback"
    house.assert_refused(callback)
    request = abandoned[case]
    before = house.outcomes(request)
    house.set_callback(request, callback)
    house.stack.app.deliveries.redeliver(house.delivery(request).id, actor="test")
    delivery = house.await_status(request, "abandoned")
    assert not select.select([listener], [], [], 0)[0]
    assert house.outcomes(request)[len(before) :] == [NOT_CONNECTED] * (1 + len(RETRIES))
    assert delivery.attempts == 1 + len(RETRIES)


def test_a_disguised_address_is_in_nobody_s_way(house: Sender) -> None:
    """A request with such a callback has its outcome, and is shown, like any other."""
    request = house.ask(f"http://{NOWHERE}/{next(_NUMBERS)}")
    house.set_callback(request, f"http://{DISGUISED['short']}:9/callback")
    house.cancel(request)
    done = house.stack.cli("delivery", "show", str(house.delivery(request).id))
    assert done.returncode == 0, done.stderr


# One receiver that hangs


def test_a_hanging_receiver_holds_up_nobody(house: Sender, hanging: Receiver, receivers: dict[str, Listening]) -> None:
    """It gets its share of the server's few threads; the others are sent to before any attempt there has ended."""

    def under_way() -> int:
        return sum(not callback.ended for callback in hanging.callbacks())

    instant, port = receivers["instant"], hanging.address.rpartition(":")[2]
    slow = [house.send(f"http://localhost:{port}/{number}") for number in range(2 * PER_HOST)]
    await_condition(lambda: under_way() == PER_HOST, "the hanging receiver to have its share")
    for number in range(3):
        house.await_status(house.send(f"{instant.peer.url}/{number}"), "sent")
    assert len(instant.seen) == 3
    attempts = [len(house.attempts(request)) for request in slow]
    assert (attempts, under_way()) == ([0] * len(slow), PER_HOST)
    hanging.heal()
    for request in slow:
        house.await_status(request, "sent")
    outcomes = Counter(outcome for request in slow for outcome in house.outcomes(request))
    assert outcomes[SENT] == len(slow)
    assert outcomes[NOT_ANSWERED_IN_TIME] >= PER_HOST


# The island

HTTP_PORT, DNS_PORT = 80, 53
# Any two of the public addresses: at the one is the receiver, at the other nobody.
PUBLIC, DESERTED = "93.184.215.14", "93.184.215.15"
# On the island, all of them lead to a listener.
FORBIDDEN = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "169.254.169.254",
    "10.0.0.1",
    "10.255.255.254",
    "100.64.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "192.0.2.1",
    "::1",
    "::",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "fc00::1",
]
# One of each kind.
KINDS = ["127.0.0.1", "169.254.169.254", "10.0.0.1", "100.64.0.1", "::1", "64:ff9b::7f00:1"]
# As they are bound: the others are other ways to say 127.0.0.1, or IPv6.
TRAPS = [address for address in FORBIDDEN if ":" not in address and address != "0.0.0.0"]
ISLAND_RETRIES = [0.02, 0.02]
ISLAND_TIMEOUT = 0.5
# $1 holds the files that stand in for those of /etc; the rest is run on the island.
_SETTLE = """\
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
ip route add local 0.0.0.0/0 dev lo
ip -6 route add local ::/0 dev lo
shift
exec "$@"
"""
_FILES = {
    "resolv.conf": "nameserver 127.0.0.1\noptions timeout:2 attempts:1\n",
    "nsswitch.conf": "hosts: files dns\n",
}


def _settled(files: Path, *command: str | Path) -> list[str]:
    """A command, to be run on an island of its own, by anybody."""
    within = ["sh", "-ec", _SETTLE, "sh", str(files), *map(str, command)]
    return ["unshare", "--map-root-user", "--mount", "--net", *within]


def open_sockets() -> None:
    """On the island: give the test its sockets, prove that they can be reached, and become the server."""
    traps = [socket.create_server((address, HTTP_PORT)) for address in TRAPS]
    traps.append(socket.create_server(("::", HTTP_PORT), family=socket.AF_INET6))
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", DNS_PORT))
    opened = [names, socket.create_server((PUBLIC, HTTP_PORT)), *traps]
    with socket.socket(socket.AF_UNIX) as test:
        test.connect(sys.argv[1])
        socket.send_fds(test, [b"sockets"], [one.fileno() for one in opened])
    for address in FORBIDDEN:
        socket.create_connection((address, HTTP_PORT), timeout=5).close()
    os.execv(BIN / "doorward", ["doorward", "serve"])


Addresses = list[str] | None


class Names(socketserver.UDPServer):
    """A name server. Every lookup gets the next answer of the name's plan, the last one ever after; None is silence.

    A lookup asks for both kinds of addresses, for IPv4 (A) first.
    """

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(("", 0), _Query, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.lookups: Counter[str] = Counter()
        self._plans: dict[str, list[Addresses]] = {}

    def plan(self, *answers: Addresses) -> str:
        """A new name."""
        name = f"receiver-{next(_NUMBERS)}.example"
        self._plans[name] = list(answers)
        return name

    def find(self, name: str, kind: int) -> Addresses:
        if kind == _A:
            self.lookups[name] += 1
        plan = self._plans[name]
        found = plan[min(self.lookups[name], len(plan)) - 1]
        return found and [address for address in found if (":" in address) == (kind == _AAAA)]


_A, _AAAA, _IN = 1, 28, 1
_RESPONSE = 0x8580  # QR, AA, RD, RA (RFC 1035, section 4.1.1)
_NAME_OF_THE_QUESTION = 0xC00C  # a pointer to it (section 4.1.4)


class _Query(socketserver.BaseRequestHandler):
    server: Names

    def handle(self) -> None:
        query, respond_by = self.request
        labels, position = [], 12
        while length := query[position]:
            labels.append(query[position + 1 : position + 1 + length].decode())
            position += 1 + length
        question = query[12 : position + 5]
        (kind,) = struct.unpack("!H", question[-4:-2])
        addresses = self.server.find(".".join(labels).lower(), kind)
        if addresses is None:
            return
        response = query[:2] + struct.pack("!5H", _RESPONSE, 1, len(addresses), 0, 0) + question
        for address in addresses:
            packed = ipaddress.ip_address(address).packed
            response += struct.pack("!3HIH", _NAME_OF_THE_QUESTION, kind, _IN, 0, len(packed)) + packed
        respond_by.sendto(response, self.client_address)


class PublicReceiver(HTTPServer):
    """At a public address; notes what is posted, and answers 200 or what is planned for the path."""

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(("", 0), _Post, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.paths: list[str] = []
        # A status and a Location, for one answer each.
        self.plans: dict[str, list[tuple[int, str]]] = {}


class _Post(BaseHTTPRequestHandler):
    server: PublicReceiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.append(self.path)
        plan = self.server.plans.get(self.path)
        status, location = plan.pop(0) if plan else (200, "")
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """The test knows."""


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True)
class Island(Sender):
    """A server that may connect to public addresses only, and what is there to be connected to."""

    names: Names
    receiver: PublicReceiver
    traps: list[socket.socket] = field(repr=False)

    def visitors(self) -> list[str]:
        """The forbidden addresses that were connected to since the last call. A connection waits until it is taken."""
        visited = []
        while ready := select.select(self.traps, [], [], 0)[0]:
            for trap in ready:
                connection, _ = trap.accept()
                with connection:
                    visited.append(str(connection.getsockname()[0]))
        return visited

    def send_to_forbidden(self, callback: str) -> int:
        return self.send_to_unasked(callback, f"http://{PUBLIC}/asked/{next(_NUMBERS)}")

    def await_failure(self, request: int) -> None:
        """All attempts were made and are on record; none had a status, and nobody was connected to."""
        self.await_status(request, "abandoned")
        assert self.outcomes(request) == [NOT_CONNECTED] * (1 + len(ISLAND_RETRIES))
        assert self.visitors() == []


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the island's files, if this machine lets anybody have an island."""
    files = tmp_path_factory.mktemp("etc")
    for name, text in _FILES.items():
        (files / name).write_text(text)
    if shutil.which("unshare") is None:
        pytest.skip("no `unshare`, so no network of our own to put forbidden addresses and a name server into")
    done = subprocess.run(_settled(files, "true"), capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"no network of our own to put forbidden addresses and a name server into: {done.stderr.strip()}")
    return files


@contextlib.contextmanager
def _server_on_the_island(stack: Stack, files: Path) -> Iterator[tuple[Process, list[socket.socket]]]:
    """The server's process, and its island's sockets."""
    path = files / "test.sock"
    command = _settled(files, BIN / "python", "-m", __name__, path)
    log = stack.logs / f"island-{stack.grpc_port}.log"
    with contextlib.ExitStack() as exit_stack:
        door = exit_stack.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(str(path))
        door.listen()
        process = exit_stack.enter_context(running(command, log, stack.environment))
        process.await_output('"serving"')
        connection, _ = door.accept()
        with connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 64, 3 + len(TRAPS))
        opened = [exit_stack.enter_context(socket.socket(fileno=descriptor)) for descriptor in descriptors]
        yield process, opened


@pytest.fixture(scope="module")
def module_island(
    tmp_path_factory: pytest.TempPathFactory,
    logs: Path,
    shared_provider: SandboxProvider,
    secrets: set[str],
    settled: Path,
) -> Iterator[Island]:
    more = f"{NO_LIMITS}[callbacks]\nschedule = {ISLAND_RETRIES}\ntimeout = {ISLAND_TIMEOUT}\n"
    environment = {**AT_ONCE, "DOORWARD_JOBS_POLL": "0.01"}
    home = tmp_path_factory.mktemp("island") / "home"
    stack = make_stack(home, logs, shared_provider, secrets, more, **environment)
    # The gateway is outside: the way to the server is a Unix socket.
    with _server_on_the_island(stack, settled) as (_, (names, receiver, *traps)), stack.gateway():
        island = Island(stack, Names(names), PublicReceiver(receiver), traps)
        with serving(island.names), serving(island.receiver):
            assert len(island.visitors()) == len(FORBIDDEN), "what may not be connected to could not be"
            yield island


@pytest.fixture
def island(module_island: Island) -> Island:
    module_island.visitors()  # another test's
    module_island.receiver.paths.clear()
    return module_island


def host_of(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def test_a_public_receiver(island: Island) -> None:
    """The island's own check: by address and by name, a callback gets where it should."""
    name = island.names.plan([PUBLIC])
    for host in (PUBLIC, name):
        request = island.send(f"http://{host}/{host}")
        island.await_status(request, "sent")
        assert island.outcomes(request) == [SENT]
    assert island.receiver.paths == [f"/{PUBLIC}", f"/{name}"]
    assert (island.names.lookups[name], island.visitors()) == (2, [])


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden_addresses(island: Island, address: str) -> None:
    callback = f"http://{host_of(address)}/callback"
    island.assert_refused(callback)
    island.await_failure(island.send_to_forbidden(callback))


@pytest.mark.parametrize("address", FORBIDDEN)
def test_names_of_forbidden_addresses(island: Island, address: str) -> None:
    """Refused when asked; a name that means one only later is accepted, and connected to no more than that."""
    island.assert_refused(f"http://{island.names.plan([address])}/callback")
    turned = island.names.plan([PUBLIC], [address])
    island.await_failure(island.send(f"http://{turned}/callback"))
    assert island.receiver.paths == []


REDIRECTS = [
    *[pytest.param(status, "127.0.0.1", id=str(status)) for status in (301, 302, 303, 307, 308)],
    *[pytest.param(302, address, id=f"302 {address}") for address in KINDS[1:]],
]


@pytest.mark.parametrize(("status", "address"), REDIRECTS)
def test_redirects_to_forbidden_addresses(island: Island, status: int, address: str) -> None:
    path = f"/callback/{next(_NUMBERS)}"
    every = 1 + len(ISLAND_RETRIES)
    island.receiver.plans[path] = [(status, f"http://{host_of(address)}/callback")] * every
    request = island.send(f"http://{PUBLIC}{path}")
    island.await_status(request, "abandoned")
    assert island.outcomes(request) == [(status, None)] * every
    assert (island.receiver.paths, island.visitors()) == ([path] * every, [])


@pytest.mark.parametrize("address", KINDS)
def test_a_name_that_changes_between_check_and_connect(island: Island, address: str) -> None:
    """DNS rebinding: the answers alternate, so who asked twice for one attempt would connect to the second answer.

    The server is told the public address when it is asked for keys, and at the first attempt. Its connection goes
    there, and the name server saw one lookup for each attempt: what is connected to is the very answer that was judged.
    """
    name = island.names.plan([PUBLIC], [PUBLIC], [address], [PUBLIC], [address])
    path = f"/callback/{next(_NUMBERS)}"
    island.receiver.plans[path] = [(503, "")]
    request = island.send(f"http://{name}{path}")
    island.await_status(request, "sent")
    assert island.outcomes(request) == [(503, None), NOT_CONNECTED, SENT]
    assert (island.receiver.paths, island.names.lookups[name]) == ([path] * 2, 4)
    assert island.visitors() == []


MIXED = [
    pytest.param([PUBLIC, "127.0.0.1"], [SENT], id="public too"),
    pytest.param(["10.0.0.1", PUBLIC], [SENT], id="public last"),
    pytest.param(["::1", PUBLIC], [SENT], id="both families"),
    pytest.param([DESERTED, "127.0.0.1"], [NOT_CONNECTED] * (1 + len(ISLAND_RETRIES)), id="nobody at the public one"),
    pytest.param([DESERTED, "::1"], [NOT_CONNECTED] * (1 + len(ISLAND_RETRIES)), id="nobody, both families"),
    pytest.param([], [NOT_CONNECTED] * (1 + len(ISLAND_RETRIES)), id="none"),
]


@pytest.mark.parametrize(("addresses", "outcomes"), MIXED)
def test_names_of_several_addresses(island: Island, addresses: list[str], outcomes: list[Outcome]) -> None:
    """Who asks with one is refused for any forbidden address; a delivery tries the public ones and no other."""
    if addresses:
        island.assert_refused(f"http://{island.names.plan(addresses)}/callback")
    request = island.send(f"http://{island.names.plan([PUBLIC], addresses)}/callback")
    island.await_status(request, "sent" if SENT in outcomes else "abandoned")
    assert (island.outcomes(request), island.visitors()) == (outcomes, [])


def test_a_name_that_takes_long_is_judged_at_delivery(island: Island) -> None:
    """Nobody who asks waits for it longer than a second, nor does a delivery outlast its timeout."""
    island.await_failure(island.send(f"http://{island.names.plan(None, ['127.0.0.1'])}/callback"))
    name = island.names.plan([PUBLIC], None, [PUBLIC])
    request = island.send(f"http://{name}/callback")
    island.await_status(request, "sent")
    assert island.outcomes(request) == [NOT_CONNECTED_IN_TIME, SENT]
    assert island.attempts(request)[0].milliseconds / 1000 < 2 * ISLAND_TIMEOUT
    assert island.visitors() == []


if __name__ == "__main__":
    open_sockets()
