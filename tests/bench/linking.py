"""Linking identities: AddOAuthIdentity by token against the bare GET within it, and what Basic costs."""

import base64
import contextlib
import itertools
import json
import sqlite3
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from google.protobuf.struct_pb2 import Value

from doorward.identity.v1 import identity_service_pb2 as pb
from doorward.identity.v1 import identity_service_pb2_grpc as stubs
from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.rpc.interceptors import Authenticator
from doorward_server.rpc.peers import Peer
from doorward_server.rpc.policy import read_policies
from tests.bench import load, stack
from tests.bench.contenders import Contender, fetching_contender, server_contender
from tests.processes import free_port, running

_METHOD = "/doorward.identity.v1.IdentityService/AddOAuthIdentity"
_PROVIDER = "instant"
# More than are linked in all rounds: each call links a user who has no identity yet.
_USERS = 200_000
_INSERT = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :users)
INSERT INTO users (id, slug, name, created_at, client_id)
SELECT i, 'linked-' || i, 'Linked ' || i, 0, :client FROM n
"""
_SETTINGS = """
[outbound]
allow = ["127.0.0.1:{port}"]
concurrency = {calls}
per_provider = {calls}
[providers.{provider}]
kind = "identity"
lookup_url = "{url}"
"""
_BASIC_CALLS = 5_000


@contextlib.contextmanager
def contenders(
    folder: Path, server_core: int, load_core: int, *, connections: int, streams: int
) -> Iterator[tuple[Contender, Contender, float]]:
    """The bare GETs, the links, and the seconds that Basic takes a call; both at the same concurrency."""
    port, calls = free_port(), connections * streams
    url = f"http://127.0.0.1:{port}/lookup?t={{access_token}}"
    with contextlib.ExitStack() as opened:
        with stack.on_core(load_core):
            command = [sys.executable, "-m", "tests.bench.peers.provider", str(port)]
            provider = opened.enter_context(running(command, folder / "provider.log"))
        provider.await_output("serving")
        home = folder / "linking"
        settings = _SETTINGS.format(port=port, calls=calls, provider=_PROVIDER, url=url)
        stack.doorward(home, "init", "--settings", "-", text=settings)
        client = json.loads(stack.doorward(home, "client", "create", "--name", "bench", "--json"))
        with contextlib.closing(sqlite3.connect(home / "doorward.db")) as database, database:
            database.execute(_INSERT, {"users": _USERS, "client": client["id"]})
        basic = "Basic " + base64.b64encode(f"{client['id']}:{client['secret']}".encode()).decode()
        peer, _ = opened.enter_context(stack.server(stack.Home(home, ()), folder, server_core, access_log=False))
        users = itertools.count(1)

        def connect() -> Sequence[load.Connection]:
            requests = (
                load.GrpcRequest.build(_METHOD, {"authorization": basic}, _request(user).SerializeToString())
                for user in users
            )
            return [load.GrpcConnection(peer.socket, requests, _is_linked, streams) for _ in range(connections)]

        yield (
            fetching_contender("bare GET with httpx", url, calls, server_core),
            server_contender("AddOAuthIdentity", peer.cpu, lambda: _verify(peer.socket, basic, next(users)), connect),
            _basic_seconds(home, basic),
        )


def _request(user: int) -> pb.AddOAuthIdentityRequest:
    return pb.AddOAuthIdentityRequest(
        handle=str(user),
        provider=Value(string_value=_PROVIDER),
        access_token=Value(string_value=f"token-{user}"),
    )


def _is_linked(data: bytes) -> bool:
    return b"token-" in data


def _verify(socket: Path, basic: str, user: int) -> None:
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        add = stubs.IdentityServiceStub(channel).AddOAuthIdentity
        answer = add(_request(user), metadata=(("authorization", basic),), timeout=5)
        (identity,) = answer.o_auth_identities
        if (answer.id, identity.provider, identity.id) != (str(user), _PROVIDER, f"token-{user}"):
            raise load.WrongAnswer(f"{answer!r} for user {user}")


def _basic_seconds(home: Path, basic: str) -> float:
    """What the server does of its own for a call with Basic, before it knows what the call wants."""
    app = App(settings_module.load(home))
    policy = read_policies([pb.DESCRIPTOR.services_by_name["IdentityService"]], frozenset())[_METHOD]
    authenticator = Authenticator(app.sessions, app.service_tokens, app.clients, app.applications, app.basic_failures)
    metadata = {"authorization": basic}

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(_BASIC_CALLS):
            policy.authenticate(authenticator.credentials(policy, Peer("unix:", is_gateway=True), metadata))
        return (time.perf_counter() - started) / _BASIC_CALLS

    seconds = statistics.median(timed() for _ in range(5))
    app.database.close()
    return seconds
