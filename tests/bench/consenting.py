"""Requests for keys: accepting them, against a bare insert that is as durable."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlencode

import psutil
from google.api.httpbody_pb2 import HttpBody

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from tests.bench import load, stack
from tests.bench.contenders import Contender, server_contender
from tests.processes import running

_METHOD = "/doorward.keybroker.v1.KeyBrokerService/RequestApiKeyForm"
_OK = load.grpc_data(HttpBody(content_type="text/plain; charset=utf-8", data=b"OK").SerializeToString())
# Any public address will do: nothing is delivered here.
_CALLBACK = "http://93.184.215.14/callback"
SETTINGS = "[limits]\nopen_per_user = 0\nrequests_per_address = 0\n"


@contextlib.contextmanager
def accepting(
    folder: Path, server_core: int, *, connections: int, streams: int, threads: int
) -> Iterator[tuple[Contender, Contender]]:
    """The bare insert, and the request; both at the same concurrency."""
    asking = requesting(connections, streams)
    with contextlib.ExitStack() as opened:
        socket = folder / "insert.sock"
        command = [sys.executable, "-m", "tests.bench.peers.insert", str(socket), str(folder / "insert.db")]
        with stack.on_core(server_core):
            bare = opened.enter_context(running([*command, "--threads", str(threads)], folder / "insert.log"))
        bare.await_output("serving")
        home = folder / "consenting"
        stack.doorward(home, "init", "--settings", "-", text=SETTINGS)
        peer, _ = opened.enter_context(stack.server(stack.Home(home, ()), folder, server_core, access_log=False))
        bare_process = psutil.Process(bare.pid)
        yield (
            server_contender(
                "bare durable insert", lambda: stack.cpu_seconds(bare_process), lambda: None, lambda: asking(socket)
            ),
            server_contender("RequestApiKey", peer.cpu, lambda: None, lambda: asking(peer.socket)),
        )


def requesting(connections: int, streams: int) -> Callable[[Path], Sequence[load.Connection]]:
    """What connects to a server's socket, to ask for another user's keys each time."""
    users = itertools.count(10**17)

    def connect_to(socket: Path) -> Sequence[load.Connection]:
        requests = (load.GrpcRequest.build(_METHOD, {}, _request(user).SerializeToString()) for user in users)
        return [load.GrpcConnection(socket, requests, _OK.__eq__, streams) for _ in range(connections)]

    return connect_to


def _request(user: int) -> pb.RequestApiKeyFormRequest:
    fields = {"name": "bench", "userid": str(user), "callback": _CALLBACK, "state": "xyz"}
    form = HttpBody(content_type="application/x-www-form-urlencoded", data=urlencode(fields).encode())
    return pb.RequestApiKeyFormRequest(form=form)
