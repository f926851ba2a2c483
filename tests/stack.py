"""A whole Doorward for tests: servers, a gateway, a stand-in provider, and ways to talk to them."""

import base64
import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.cli.files import create
from doorward_server.crypto import MasterKey
from tests.engines import ENGINES
from tests.processes import BIN, Process, clean_environment, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.sandbox.provider import NAME as PROVIDER
from tests.sandbox.serving import started

# Short, so that tests of faults are quick; a provider's timeout has to be shorter than a lease. Most tests count
# refreshes, so none is made unasked, unless DOORWARD_REFRESH_AHEAD says so.
TIMEOUT = 0.8
LEASE = 1.0

_SETTINGS = """\
[outbound]
allow = ["{address}"]
[refresh]
lease = {lease}
ahead = 0
[jobs]
schedule = [0.1, 0.1, 0.1]
poll = 0.05
"""
_PROVIDER = """
[providers.{kai}]
kind = "kai"
token_url = "{url}/token"
revocation_url = "{url}/revoke"
client_id = "{kai}-client"
client_secret = "sandbox-secret"
redirect_uri = "http://127.0.0.1/app/callback"
token_auth = "{auth}"
timeout = {timeout}
"""
# `nested` takes access tokens only, and its ids are numbers.
_IDENTITY_PROVIDERS = """
[providers.sandbox]
kind = "identity"
token_url = "{url}/token"
lookup_url = "{url}/lookup?access_token={{access_token}}"
client_id = "sandbox-client"
client_secret = "sandbox-secret"
redirect_uri = "http://127.0.0.1/app/callback"
timeout = {timeout}
[providers.nested]
kind = "identity"
lookup_url = "{url}/lookup?access_token=<%= accessToken %>"
lookup_id_property = "profile.id"
timeout = {timeout}
"""


def settings_text(provider: SandboxProvider, more: str = "") -> str:
    """Settings with flo, min (which authenticates by Basic) and two to log in with at the provider; eag is left out."""
    sections = [
        _PROVIDER.format(kai=kai, url=provider.url, auth=auth, timeout=TIMEOUT)
        for kai, auth in (("flo", "client_secret_post"), ("min", "client_secret_basic"))
    ]
    sections.append(_IDENTITY_PROVIDERS.format(url=provider.url, timeout=TIMEOUT))
    settings = _SETTINGS.format(address=provider.address, lease=LEASE)
    database = "" if "[database]" in more else ENGINES.settings()
    return more + settings + database + "".join(sections)


@dataclass(frozen=True)
class Client:
    """An API client."""

    id: str
    secret: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What it authenticates with."""
        return {"authorization": basic(self.id, self.secret)}


def basic(user: str, password: str) -> str:
    """The value of an Authorization header (RFC 7617, section 2)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@dataclass(frozen=True)
class Person:
    """A user with a live session."""

    id: int
    slug: str
    cookie: str = field(repr=False)


@dataclass
class Stack:
    """One home and the processes that serve it."""

    home: Path
    logs: Path
    provider: SandboxProvider
    secrets: set[str]
    # Server processes under one supervisor, on as many ports from `grpc_port` on.
    workers: int = 1
    grpc_port: int = field(default_factory=free_port)
    gateway_port: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=dict)
    _people: int = 0
    _app: App | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.environment = {
            "DOORWARD_HOME": str(self.home),
            "DOORWARD_GRPC_PORT": str(self.grpc_port),
            "DOORWARD_WORKERS": str(self.workers),
            "DOORWARD_GATEWAY_PORT": str(self.gateway_port),
            "DOORWARD_GATEWAY_ADMIN_PORT": str(free_port()),
            "DOORWARD_GATEWAY_RATE_LIMIT": "0",
            "DOORWARD_GATEWAY_CONCURRENCY": "1",
            **self.environment,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    @property
    def app(self) -> App:
        """The domain on the same home, as the command line uses it beside a running server."""
        if self._app is None:
            self._app = App(settings_module.load(self.home))
        models.bind(self._app.database)  # it may be another stack's at the moment
        return self._app

    def cli(self, *arguments: str, home: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run `doorward` to its end."""
        environment = clean_environment(self.environment if home else {})
        command = [str(BIN / "doorward"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def cli_json(self, *arguments: str) -> Any:
        """Run `doorward ... --json`; its value."""
        done = self.cli(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def person(self, client: Client | None = None) -> Person:
        """A new user with a session: an API client's, or else the operator's own."""
        self._people += 1
        app = self.app
        user = app.users.create(f"Person {self._people}", client_id=client.id if client else None)
        _, cookie = app.sessions.create(user)
        self.secrets.add(cookie)
        return Person(user.id, user.slug, cookie)

    def client(self) -> Client:
        """A new API client."""
        row, secret = self.app.clients.create("Client")
        client = Client(row.id, secret)
        self.secrets |= {secret, client.headers["authorization"].removeprefix("Basic ")}
        return client

    def service_token(self, *roles: str) -> str:
        _, value = self.app.service_tokens.create(roles)
        self.secrets.add(value)
        return value

    def connect(self, person: Person, kai: str = "flo") -> None:
        """Connect a person with a fresh code, without the gateway."""
        self.app.integrations.connect(person.id, kai, self.provider.code(kai))

    @contextlib.contextmanager
    def server(self, port: int | None = None) -> Iterator[Process]:
        """A server process; several may serve one home, each on its port."""
        environment = self.environment | {"DOORWARD_GRPC_PORT": str(port or self.grpc_port)}
        log = self.logs / f"server-{port or self.grpc_port}.log"
        with running([BIN / "doorward", "serve"], log, environment) as process:
            process.await_output('"serving"' if self.workers == 1 else '"all workers serve"')
            yield process

    @contextlib.contextmanager
    def gateway(self) -> Iterator[Process]:
        """The gateway, with a server behind it that answers."""
        log = self.logs / f"gateway-{self.gateway_port}.log"
        with running([BIN / "doorward-gateway"], log, self.environment) as process:
            process.await_output("gateway on")
            yield process

    @contextlib.contextmanager
    def stub(self, port: int | None = None) -> Iterator[stubs.IntegrationServiceStub]:
        """The generated client on a server's TCP port."""
        with grpc.insecure_channel(f"127.0.0.1:{port or self.grpc_port}") as channel:
            yield stubs.IntegrationServiceStub(channel)


@contextlib.contextmanager
def sandbox_provider(log: Path, *options: str) -> Iterator[SandboxProvider]:
    """A stand-in provider in a process of its own."""
    with started(PROVIDER, "tests.sandbox.provider", log, *options) as url:
        provider = SandboxProvider(url)
        try:
            yield provider
        finally:
            provider.close()


def make_stack(
    home: Path, logs: Path, provider: SandboxProvider, secrets: set[str], more: str = "", **environment: str
) -> Stack:
    """A home with settings and a key; nothing runs yet."""
    stack = Stack(home, logs, provider, secrets, environment=environment)
    home.mkdir(mode=0o700)
    (home / "doorward.toml").write_text(settings_text(provider, more))
    # As `doorward init` does, which takes a second.
    create(home / "master.key", f"{MasterKey.generate()}\n")
    return stack


def rest(stack: Stack, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to the gateway."""
    # No TLS is spoken: reading the authorities' certificates would take longer than the request.
    return httpx.request(method, stack.url + path, trust_env=False, verify=False, timeout=30, **options)
