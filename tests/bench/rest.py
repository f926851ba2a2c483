"""GetKaiStatus over REST by two workers: against FastAPI with SQLAlchemy, and against an ideal handler.

All share the same two cores with the load generator, and read the same database. Nobody logs calls but
the gateway, which always does: in front of Doorward and of the ideal handler, not of FastAPI. Envoy has
one thread: two, on cores that the workers need, make an answer dearer (633 instead of 552 µs in one run).

Where other programs use these cores too, several processes in a row lose more by it than one: then
the rates tell little, and the ratio by CPU time is the one to read.
"""

import contextlib
import itertools
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from doorward_server.sessions import COOKIE
from tests.bench import load, stack
from tests.bench.contenders import WARM_UP, Contender, Sample, connected
from tests.processes import BIN, await_condition, free_port, running

ROUTE = f"/api/v1/users/me/integrations/kai/{stack.KAI}"
_WORKERS = 2
_CONNECTIONS = 32
_PATIENCE = 5.0


@dataclass
class Site:
    """What answers at an address, and the CPU seconds that its parts have spent on answers."""

    name: str
    address: tuple[str, int]
    parts: Mapping[str, Sequence[psutil.Process]]
    cookies: Sequence[str]
    spent: dict[str, float] = field(default_factory=dict)
    answers: int = 0

    def contender(self) -> Contender:
        return Contender(self.name, self._run)

    def run_at_rate(self, per_second: float, seconds: float) -> load.Result:
        """The latencies at a rate that is given."""
        with self._warm() as connections:
            return load.run_at_rate(connections, per_second, seconds)

    def cpu_per_answer(self) -> dict[str, float]:
        """Seconds, by part, at the rate that there is when every connection is busy."""
        return {part: seconds / self.answers for part, seconds in self.spent.items()}

    def _run(self, seconds: float) -> Sample:
        with self._warm() as connections:
            before = self._cpu()
            result = load.run(connections, seconds)
            spent = {part: cpu - before[part] for part, cpu in self._cpu().items()}
        for part, cpu in {**spent, "load": result.own_cpu}.items():
            self.spent[part] = self.spent.get(part, 0.0) + cpu
        self.answers += result.answers
        return Sample(result, sum(spent.values()))

    @contextlib.contextmanager
    def _warm(self) -> Iterator[Sequence[load.HttpConnection]]:
        body = self._verified_body()
        with connected(lambda: self._connect(body)) as connections:
            load.run(connections, WARM_UP)
            yield connections

    def _cpu(self) -> dict[str, float]:
        return {part: sum(map(stack.cpu_seconds, processes)) for part, processes in self.parts.items()}

    def _verified_body(self) -> bytes:
        """What is answered for an account that is connected; WrongAnswer when it says something else."""
        self._ask(ROUTE.replace(stack.KAI, stack.UNCONNECTED), is_connected=False)
        return self._ask(ROUTE, is_connected=True)

    def _ask(self, route: str, *, is_connected: bool) -> bytes:
        headers = {"cookie": f"{COOKIE}={random.choice(self.cookies)}"}
        # No TLS is spoken: reading the authorities' certificates would only take time.
        url = f"http://{self.address[0]}:{self.address[1]}{route}"
        answer = httpx.get(url, headers=headers, trust_env=False, verify=False)
        if answer.status_code != 200 or json.loads(answer.content) != {"authStatus": is_connected}:
            raise load.WrongAnswer(f"{self.name}: {answer.status_code} {answer.text!r}")
        return answer.content

    def _connect(self, body: bytes) -> Sequence[load.HttpConnection]:
        requests = itertools.cycle([http_request(cookie) for cookie in self.cookies])
        return [load.HttpConnection(self.address, requests, body) for _ in range(_CONNECTIONS)]


def http_request(cookie: str) -> bytes:
    return f"GET {ROUTE} HTTP/1.1\r\nhost: localhost\r\ncookie: {COOKIE}={cookie}\r\n\r\n".encode()


@contextlib.contextmanager
def sites(home: stack.Home, folder: Path, *cores: int, threads: int) -> Iterator[tuple[Site, Site, Site]]:
    """FastAPI, the ideal handler, and Doorward; for the time of the `with` block, the load has their cores too."""
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        enter(stack.on_core(*cores))
        workers = [enter(stack.server(home, folder, *cores, access_log=False))[0] for _ in range(_WORKERS)]
        ideals = [enter(_ideal(home, folder / f"ideal-{number}.sock", threads)) for number in range(_WORKERS)]
        yield (
            enter(_fastapi(home, folder)),
            enter(_behind_gateway("REST, ideal handler", home, ideals, folder, *cores)),
            enter(_behind_gateway("REST, Doorward", home, workers, folder, *cores)),
        )


@contextlib.contextmanager
def _behind_gateway(
    name: str, home: stack.Home, servers: Sequence[stack.Peer], folder: Path, *cores: int
) -> Iterator[Site]:
    with stack.gateway(home, [server.socket for server in servers], folder, *cores) as gateway:
        parts = {"Envoy": [gateway.envoy], "server": [server.process for server in servers]}
        yield Site(name, gateway.address, parts, home.cookies)


@contextlib.contextmanager
def _ideal(home: stack.Home, socket: Path, threads: int) -> Iterator[stack.Peer]:
    command = [sys.executable, "-m", "tests.bench.peers.ideal", str(home.database), str(socket)]
    command += ["--threads", str(threads)]
    with running(command, socket.with_suffix(".log")) as process:
        process.await_output("serving")
        yield stack.Peer(psutil.Process(process.pid), socket)


@contextlib.contextmanager
def _fastapi(home: stack.Home, folder: Path) -> Iterator[Site]:
    port = free_port()
    command = [str(BIN / "uvicorn"), "--factory", "tests.bench.peers.fastapi_app:make_app", "--port", str(port)]
    command += ["--workers", str(_WORKERS), "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    # PYTHONWARNINGS: those of other projects are none of ours.
    environment = {"PEER_DATABASE": str(home.database), "PYTHONWARNINGS": "default"}
    workers: list[psutil.Process] = []
    with contextlib.ExitStack() as opened:
        opened.callback(_end, workers)  # whatever becomes of their parent
        process = opened.enter_context(running(command, folder / "fastapi.log", environment))
        await_condition(lambda: process.output().count("startup complete") == _WORKERS, "uvicorn's workers")
        workers += psutil.Process(process.pid).children(recursive=True)
        yield Site("REST, FastAPI", ("127.0.0.1", port), {"server": workers}, home.cookies)


def _end(processes: Sequence[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, _PATIENCE)
    for process in left:
        process.kill()
