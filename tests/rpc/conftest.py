"""A real server of pytest-grpc's for the RPC tests: on a Unix socket, as for the gateway, and on a TCP port."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import SERVICES, App
from doorward_server.applications import CallbackFormat
from doorward_server.clock import Clock
from doorward_server.settings import Settings
from tests.sandbox.client import SandboxProvider
from tests.stack import Client, Person, make_stack
from tests.unit.peers import Peer, read_request

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}
Metadata = tuple[tuple[str, str | bytes], ...]


class SetClock(Clock):
    """The system's clock, put forward."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.ahead


@dataclass(frozen=True)
class Result:
    """How a call ended. `reason`, `error` and `metadata` are of the ErrorInfo; without one "", None and nothing."""

    code: str
    message: str
    reason: str
    error: str | None
    domain: str
    trailers: dict[str, str | bytes]
    answer: Any = None
    headers: dict[str, str | bytes] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """`OK`, or the code and the reason."""
        return f"{self.code} {self.reason}".strip()


def call(
    channel: grpc.Channel, method: str, request: Message | bytes, metadata: Metadata = (), timeout: float = 20
) -> Result:
    """One call, by the RPC's full name; a message as bytes goes out as it is."""
    described = METHODS.get(method)
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    rpc: Any = channel.unary_unary(method)
    try:
        answer, finished = rpc.with_call(payload, metadata=metadata, timeout=timeout)
    except grpc.RpcError as failure:
        return read_failure(failure)
    parsed = GetMessageClass(described.output_type).FromString(answer) if described else answer
    headers = dict(finished.initial_metadata())
    return Result("OK", "", "", None, "", dict(finished.trailing_metadata()), parsed, headers)


def read_failure(failure: Any) -> Result:
    """What a failed call says."""
    trailers = dict(failure.trailing_metadata())
    status, info = Status.FromString(trailers.pop("grpc-status-details-bin", b"")), ErrorInfo()
    if status.details:
        assert (status.code, status.message) == (failure.code().value[0], failure.details())
        [detail] = status.details
        assert detail.Unpack(info)
    return Result(
        failure.code().name,
        failure.details(),
        info.reason,
        info.metadata.get("error"),
        info.domain,
        trailers,
        headers=dict(failure.initial_metadata()),
        metadata=dict(info.metadata),
    )


@dataclass
class Receiver:
    """What listens at the callbacks: answers `status` (a line as in HTTP), and keeps what it was sent."""

    seen: list[bytes] = field(default_factory=list)
    status: str = "200 OK"
    address: str = ""

    def __call__(self, connection: socket.socket, _: threading.Event) -> None:
        """Serve one connection."""
        self.seen.append(read_request(connection))
        connection.sendall(f"HTTP/1.1 {self.status}\r\nContent-Length: 0\r\n\r\n".encode())

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@dataclass
class House:
    """A home, the app on it, and the addresses at which it is served."""

    only_app: App
    clock: SetClock
    provider: SandboxProvider
    receiver: Receiver
    secrets: set[str]
    log: Path
    socket: str
    ports: list[int] = field(default_factory=list)
    _people: int = 0
    _applications: int = 0

    @property
    def app(self) -> App:
        """The app, after other tests' apps have bound the models to their own databases."""
        models.bind(self.only_app.database)
        return self.only_app

    def person(self, client: Client | None = None) -> Person:
        """A new user with a session: an API client's, or else the operator's own."""
        self._people += 1
        user = self.app.users.create(f"Person {self._people}", client_id=client.id if client else None)
        _, cookie = self.app.sessions.create(user)
        self.secrets.add(cookie)
        return Person(user.id, user.slug, cookie)

    def client(self) -> Client:
        """A new API client."""
        row, secret = self.app.clients.create("Client")
        return self.known(Client(row.id, secret))

    def application(self, *prefixes: str, name: str = "", form: CallbackFormat = "form") -> Client:
        """A new registered application, with the id and the secret of its Basic credentials."""
        self._applications += 1
        number = self._applications
        made = self.app.applications.create(
            name or f"Application {number}", prefixes or [f"https://app-{number}.example/cb"], form
        )
        self.secrets.add(made.signing_secret)
        return self.known(Client(made.application.id, made.secret))

    def known(self, client: Client) -> Client:
        """The same client, whose secret no log may hold."""
        self.secrets |= {client.secret, client.headers["authorization"].removeprefix("Basic ")}
        return client

    def service_token(
        self, *roles: str, lifetime: timedelta | None = None, application_id: str | None = None
    ) -> tuple[int, str]:
        """A token's id and value."""
        token, value = self.app.service_tokens.create(roles, lifetime=lifetime, application_id=application_id)
        self.secrets.add(value)
        return token.id, value

    def connect(self, person: Person, kai: str = "flo") -> None:
        self.app.integrations.connect(person.id, kai, self.provider.code(kai))

    def lines(self, text: str) -> list[dict[str, Any]]:
        """The log's lines that hold a text."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if text in line]


def cookie(value: str) -> Metadata:
    return (("cookie", f"doorward_session={value}"),)


def bearer(value: str) -> Metadata:
    return (("authorization", f"Bearer {value}"),)


def basic(client: Client) -> Metadata:
    return (("authorization", client.headers["authorization"]),)


@contextlib.contextmanager
def opened(settings: Settings, log: Path, clock: Clock | None = None) -> Iterator[App]:
    """An app that logs to a file, for the time of a `with` block."""
    app = App(settings, clock)
    with log.open("a") as stream:
        # The logger writes to what is stderr when it is first asked for.
        with contextlib.redirect_stderr(stream):
            assert app.log
        yield app
        app.outbound.close()
        app.callback_outbound.close()
        app.database.close()


@contextlib.contextmanager
def served(
    app: App, folder: Path, add: Callable[[grpc.Server], object] | None = None, *, over_tcp: bool = False
) -> Iterator[grpc.Channel]:
    """A server of its own behind the app's interceptor, with four threads, on a Unix socket or TCP; a channel to it."""
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[app.interceptor])
    (add or app.add_services)(server)
    address = f"unix:{folder}/own.sock"
    port = server.add_insecure_port("127.0.0.1:0" if over_tcp else address)
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}" if over_tcp else address) as channel:
            yield channel
    finally:
        server.stop(0).wait()


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("rpc")
    log, clock, receiver = logs / f"{folder.name}.log", SetClock(), Receiver()
    with Peer(receiver) as peer:
        receiver.address = peer.address
        # The tests of a house fail as often as they like.
        more = f'[limits]\nauth_failures = 0\n[callbacks]\nallow = ["{peer.address}"]\n'
        make_stack(folder / "home", logs, shared_provider, secrets, more)
        with opened(settings_module.load(folder / "home"), log, clock) as app:
            yield House(app, clock, shared_provider, receiver, secrets, log, f"unix:{folder}/rpc.sock")


@pytest.fixture(autouse=True)
def _as_new(request: pytest.FixtureRequest) -> None:
    """The models bound to the house, and its clock at the real time."""
    if "house" in request.fixturenames:
        house: House = request.getfixturevalue("house")
        assert house.app
        house.clock.ahead = timedelta(0)


# What pytest-grpc asks for; its own `grpc_addr` leaves a socket open.


@pytest.fixture(scope="module")
def grpc_addr(house: House) -> str:
    return house.socket


@pytest.fixture(scope="module")
def grpc_interceptors(house: House) -> list[grpc.ServerInterceptor]:
    return [house.app.interceptor]


@pytest.fixture(scope="module")
def grpc_servicer(house: House) -> App:
    """The app, which adds its services itself."""
    return house.app


@pytest.fixture(scope="module")
def grpc_add_to_server(house: House) -> Callable[[App, grpc.Server], None]:
    def add(app: App, server: grpc.Server) -> None:
        app.add_services(server)
        house.ports.append(server.add_insecure_port("127.0.0.1:0"))

    return add


@pytest.fixture(scope="module")
def over_socket(grpc_channel: grpc.Channel) -> grpc.Channel:
    """As the gateway calls."""
    return grpc_channel


@pytest.fixture(scope="module")
def over_tcp(house: House, grpc_server: grpc.Server) -> Iterator[grpc.Channel]:
    """As a backend calls."""
    with grpc.insecure_channel(f"127.0.0.1:{house.ports[-1]}") as channel:
        yield channel
