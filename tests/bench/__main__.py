"""`make bench`: runs the contenders in turn and prints one table. Owns the targets.

The machine may be noisy, so every ratio is taken within a round, in which all contenders have their
turn shortly after each other; what is shown is the median of the rounds. CPU time per answer does
not suffer from other processes on the core, and is shown beside.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
from rich.console import Console
from rich.table import Table

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from doorward_server.sessions import COOKIE
from doorward_server.settings import GrpcSection, JobsSection
from tests.bench import claiming, consenting, delivering, linking, load, prompting, stack
from tests.bench.contenders import Contender, connected, server_contender

_METHOD = "/doorward.integration.v1.IntegrationService/GetKaiStatus"
_ROUTE = f"/api/v1/users/me/integrations/kai/{stack.KAI}"
_REQUEST = pb.GetKaiStatusRequest(user_id="me", kai_type=stack.KAI)
_ANSWER = pb.GetKaiStatusResponse(auth_status=True)

_THREADS = GrpcSection().threads
_CONNECTIONS, _STREAMS = 4, 8  # 32 calls at once
_HTTP_CONNECTIONS = 32

_LEAST_OF_ECHO = 0.75
_LEAST_OF_ECHO_LOGGING = 0.60
_LEAST_OF_GET = 0.5
_LEAST_OF_INSERT = 0.7
_LEAST_OF_POST = 0.6
_LEAST_OF_SMALL = 1 / 1.5
_MOST_FOR_BASIC = 60e-6
_MOST_TO_PROMPT = 30.0, 150.0  # milliseconds: p50, p99
_MOST_AMONG_OTHERS = 1.2
_MOST_BOT_MEMORY = 150_000_000
_FLAT_WITHIN = 1.2
_MOST_MEMORY = 120_000_000

# What it looks like when something does not start, or answers wrongly or not at all.
_FAILURES = (
    load.WrongAnswer,
    AssertionError,
    OSError,
    subprocess.SubprocessError,
    psutil.Error,
    grpc.RpcError,
    httpx.HTTPError,
)


@dataclass(frozen=True)
class Options:
    """How much is measured; see `--help`."""

    few: int
    many: int
    rounds: int
    seconds: float
    prompting: float


# The contenders


def _grpc_contender(name: str, peer: stack.Peer, cookies: Sequence[str], *, bare: bool = False) -> Contender:
    return server_contender(
        name,
        peer.cpu,
        lambda: _verify(peer.socket, random.choice(cookies), bare=bare),
        lambda: _grpc_connections(peer.socket, cookies, _STREAMS),
    )


def _grpc_connections(socket: Path, cookies: Sequence[str], streams: int) -> Sequence[load.Connection]:
    message = _REQUEST.SerializeToString()
    requests = itertools.cycle(
        [load.GrpcRequest.build(_METHOD, {"cookie": f"{COOKIE}={cookie}"}, message) for cookie in cookies]
    )
    expected = load.grpc_data(_ANSWER.SerializeToString())
    return [load.GrpcConnection(socket, requests, expected.__eq__, streams) for _ in range(_CONNECTIONS)]


def _verify(socket: Path, cookie: str, *, bare: bool) -> None:
    """Ask through the generated client; of Doorward also what has to be answered otherwise."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        ask = stubs.IntegrationServiceStub(channel).GetKaiStatus
        metadata = (("cookie", f"{COOKIE}={cookie}"),)
        _expect(ask(_REQUEST, metadata=metadata, timeout=5), _ANSWER)
        if bare:
            return
        unconnected = pb.GetKaiStatusRequest(user_id="me", kai_type=stack.UNCONNECTED)
        _expect(ask(unconnected, metadata=metadata, timeout=5), pb.GetKaiStatusResponse(auth_status=False))
        try:
            ask(_REQUEST, timeout=5)
        except grpc.RpcError as refusal:
            _expect(refusal.code(), grpc.StatusCode.UNAUTHENTICATED)
        else:
            raise load.WrongAnswer("a call without a session was answered")


def _expect(answer: object, expected: object) -> None:
    if answer != expected:
        raise load.WrongAnswer(f"{answer!r} instead of {expected!r}")


def _rest_contender(gateway: stack.Gateway, peer: stack.Peer, cookies: Sequence[str]) -> Contender:
    bodies: list[bytes] = []

    def verify() -> None:
        url = f"http://{gateway.address[0]}:{gateway.address[1]}{_ROUTE}"
        header = {"cookie": f"{COOKIE}={random.choice(cookies)}"}
        response = httpx.get(url, headers=header, trust_env=False)
        _expect((response.status_code, json.loads(response.content)), (200, {"authStatus": True}))
        bodies[:] = [response.content]

    def connect() -> Sequence[load.Connection]:
        requests = itertools.cycle([_http_request(cookie) for cookie in cookies])
        return [load.HttpConnection(gateway.address, requests, bodies[0]) for _ in range(_HTTP_CONNECTIONS)]

    return server_contender("REST through Envoy, access logs", peer.cpu, verify, connect)


def _http_request(cookie: str) -> bytes:
    return f"GET {_ROUTE} HTTP/1.1\r\nhost: localhost\r\ncookie: {COOKIE}={cookie}\r\n\r\n".encode()


# The run


@dataclass(frozen=True)
class Outcome:
    """Everything that the table shows."""

    echo: Contender
    many: Contender
    many_logging: Contender
    few: Contender
    rest: Contender
    envoy_cpu_per_answer: float
    resident: int
    get: Contender
    link: Contender
    basic: float
    insert: Contender
    accept: Contender
    post: Contender
    deliver: Contender
    claims: Sequence[Contender]
    prompts: prompting.Outcome


def _run(options: Options, say: Callable[[str], None]) -> Outcome:
    dice = random.Random()
    server_core, load_core = stack.cores()
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="doorward-bench-")))
        enter(stack.on_core(load_core))
        say(f"making {options.many:,} rows")
        few = stack.make_home(folder / "few", options.few, dice)
        many = stack.make_home(folder / "many", options.many, dice)
        say("starting")
        echo = enter(stack.echo(folder, server_core, _THREADS))
        few_peer, _ = enter(stack.server(few, folder, server_core, access_log=False))
        many_peer, _ = enter(stack.server(many, folder, server_core, access_log=False))
        log_peer, log_port = enter(stack.server(many, folder, server_core, access_log=True))
        contenders = (
            _grpc_contender("bare grpcio echo", echo, many.cookies, bare=True),
            _grpc_contender(f"GetKaiStatus, {options.many:,} rows", many_peer, many.cookies),
            _grpc_contender("  with the access log", log_peer, many.cookies),
            _grpc_contender(f"GetKaiStatus, {options.few:,} rows", few_peer, few.cookies),
        )
        _measure_rounds(contenders, options, say)
        # Every thread has its own connection to the database, with its own cache.
        say("all threads at once")
        with connected(lambda: _grpc_connections(many_peer.socket, many.cookies, _THREADS)) as busy:
            load.run(busy, options.seconds)
        resident = many_peer.resident()
        say("REST through Envoy")
        gateway = enter(stack.gateway(many, log_port, folder, load_core))
        rest = _rest_contender(gateway, log_peer, many.cookies)
        envoy_cpu_per_answer = _measure_rest(rest, gateway, options)
        say("linking")
        get, link, basic = enter(
            linking.contenders(folder, server_core, load_core, connections=_CONNECTIONS, streams=_STREAMS)
        )
        _measure_rounds((get, link), options, say)
        say("requests for keys")
        insert, accept = enter(
            consenting.accepting(folder, server_core, connections=_CONNECTIONS, streams=_STREAMS, threads=_THREADS)
        )
        _measure_rounds((insert, accept), options, say)
        say("deliveries")
        post, deliver = enter(delivering.contenders(folder, server_core, load_core, threads=JobsSection().threads))
        _measure_rounds((post, deliver), options, say)
        say("claims")
        claims = enter(claiming.contenders(folder, finished=options.many, waiting=options.many // 10))
        _measure_rounds(claims, options, say)
        say("prompts")
        prompts = prompting.measure(folder, server_core, load_core, say=say, seconds=options.prompting)
        return Outcome(
            *contenders,
            rest,
            envoy_cpu_per_answer,
            resident,
            get,
            link,
            basic,
            insert,
            accept,
            post,
            deliver,
            claims,
            prompts,
        )


def _measure_rounds(contenders: Sequence[Contender], options: Options, say: Callable[[str], None]) -> None:
    for number in range(options.rounds):
        for contender in contenders:
            say(f"round {number + 1} of {options.rounds}: {contender.name}")
            contender.measure(options.seconds)


def _measure_rest(rest: Contender, gateway: stack.Gateway, options: Options) -> float:
    """Measure once, for as long as two rounds; returns Envoy's CPU seconds per answer, warm-up included."""
    before = stack.cpu_seconds(gateway.envoy)
    sample = rest.measure(options.seconds * 2)
    return (stack.cpu_seconds(gateway.envoy) - before) / sample.result.answers


# The table


def _facts() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return (
        f"{psutil.cpu_count()} cores ({model}), {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, grpcio {grpc.__version__}, {_CONNECTIONS * _STREAMS} calls at once"
    )


def _table(outcome: Outcome) -> Table:
    table = Table("measured")
    for column in ("per s", "ratio", "target", "", "by CPU time", "CPU/answer", "its core", "load's core"):
        table.add_column(column, justify="right")
    echo, many, logging, few, rest = (
        outcome.echo,
        outcome.many,
        outcome.many_logging,
        outcome.few,
        outcome.rest,
    )
    _add(table, echo, "", "", None, "")
    for contender, least in ((many, _LEAST_OF_ECHO), (logging, _LEAST_OF_ECHO_LOGGING)):
        ratio = contender.ratio(echo)
        by_cpu = f"{contender.cpu_ratio(echo):.2f}"
        _add(table, contender, f"{ratio:.2f} of echo", f"≥ {least:.2f}", ratio >= least, by_cpu)
    ratio = few.ratio(many)
    flat = 1 / _FLAT_WITHIN <= ratio <= _FLAT_WITHIN
    _add(table, few, f"{ratio:.2f} of many", f"≤ {_FLAT_WITHIN}", flat, f"{few.cpu_ratio(many):.2f}")
    ratio = rest.rate / logging.rate
    _add(table, rest, f"{ratio:.2f} of gRPC", "", None, f"{rest.cpu_ratio(logging):.2f}")
    median, worst = _percentiles(rest.samples[0].result.latencies)
    table.add_row("  p50 / p99", f"{median:.1f} / {worst:.1f} ms")
    table.add_row("  Envoy's share", *[""] * 5, _micros(outcome.envoy_cpu_per_answer))
    memory = f"{outcome.resident / 2**20:.0f} MiB"
    few_enough = outcome.resident <= _MOST_MEMORY
    table.add_row("resident memory after it all", memory, "", "≤ 120 MB", _mark(few_enough))
    _compare(table, outcome.link, outcome.get, "GET", _LEAST_OF_GET)
    quick_enough = outcome.basic <= _MOST_FOR_BASIC
    table.add_row("  Basic", "", _micros(outcome.basic), f"≤ {_micros(_MOST_FOR_BASIC)}", _mark(quick_enough))
    _compare(table, outcome.accept, outcome.insert, "insert", _LEAST_OF_INSERT)
    _compare(table, outcome.deliver, outcome.post, "POST", _LEAST_OF_POST)
    for small, large in zip(outcome.claims[::2], outcome.claims[1::2], strict=True):
        _compare(table, large, small, "small", _LEAST_OF_SMALL)
    _add_prompts(table, outcome.prompts)
    return table


def _add_prompts(table: Table, prompts: prompting.Outcome) -> None:
    median, worst = prompting.percentiles(prompts.alone)
    in_time = median <= _MOST_TO_PROMPT[0] and worst <= _MOST_TO_PROMPT[1]
    target = "≤ {:.0f} / {:.0f} ms".format(*_MOST_TO_PROMPT)
    table.add_row("OK to the prompt, p50 / p99", f"{median:.0f} / {worst:.0f} ms", "", target, _mark(in_time))
    flat = prompts.ratio <= _MOST_AMONG_OTHERS
    table.add_row(
        "  among 10,000 open ones", "", f"{prompts.ratio:.2f} of alone", f"≤ {_MOST_AMONG_OTHERS}", _mark(flat)
    )
    memory = f"{prompts.memory_after / 2**20:.0f} MiB"
    small = prompts.memory_after <= _MOST_BOT_MEMORY
    table.add_row(f"the bot's memory after {prompts.consents:,}", memory, "", "≤ 150 MB", _mark(small))


def _compare(table: Table, contender: Contender, reference: Contender, called: str, least: float) -> None:
    """Two rows: what is compared to, and what is compared."""
    _add(table, reference, "", "", None, "")
    ratio, by_cpu = contender.ratio(reference), f"{contender.cpu_ratio(reference):.2f}"
    _add(table, contender, f"{ratio:.2f} of {called}", f"≥ {least:.2f}", ratio >= least, by_cpu)


def _add(table: Table, contender: Contender, ratio: str, target: str, met: bool | None, by_cpu: str) -> None:
    table.add_row(
        contender.name,
        f"{contender.rate:,.0f}",
        ratio,
        target,
        _mark(met),
        by_cpu,
        _micros(contender.cpu_per_answer),
        f"{contender.utilisation:.0%}",
        f"{contender.generators_utilisation:.0%}",
    )


def _mark(met: bool | None) -> str:
    return "" if met is None else "[green]ok[/]" if met else "[red]short[/]"


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def _percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    return cuts[49] * 1000, cuts[98] * 1000


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure, and print a table.")
    parser.add_argument("--quick", action="store_true", help="100,000 connections, 3 short rounds")
    parser.add_argument("--seconds", type=float, help="the length of a contender's turn in a round")
    given = parser.parse_args()
    many, rounds, seconds, prompting_seconds = (100_000, 3, 1.0, 10.0) if given.quick else (1_000_000, 9, 3.0, 60.0)
    return Options(1_000, many, rounds, given.seconds or seconds, prompting_seconds)


def main() -> int:
    """Print the facts and the table; non-zero only when something could not be measured."""
    # So that whatever runs is stopped and the homes are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_facts(), highlight=False, soft_wrap=True)
    progress = Console(stderr=True)
    try:
        with progress.status("") as status:
            outcome = _run(options, status.update)
    except _FAILURES as failure:
        progress.print(f"could not measure: {failure}", markup=False)
        return 1
    console.print(_table(outcome))
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
