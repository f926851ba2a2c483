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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from tests.bench import claiming, consenting, delivering, linking, load, postgresql, prompting, rest, stack
from tests.bench.contenders import Contender, connected, server_contender

_METHOD = "/doorward.integration.v1.IntegrationService/GetKaiStatus"
_REQUEST = pb.GetKaiStatusRequest(user_id="me", kai_type=stack.KAI)
_ANSWER = pb.GetKaiStatusResponse(auth_status=True)

_THREADS = GrpcSection().threads
_CONNECTIONS, _STREAMS = 4, 8  # 32 calls at once
_HTTP_CONNECTIONS = 32

_LEAST_OF_ECHO = 0.75
_LEAST_OF_ECHO_LOGGING = 0.60
_LEAST_OF_FASTAPI = 2.5
_LEAST_OF_IDEAL = 0.8
_MOST_AT_HALF_RATE = 15.0  # milliseconds: p99
_LEAST_OF_SQLITE = 0.5
_SOME, _MOST_OF_MANY = 10_000, 1.3
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
    most: int  # in PostgreSQL
    rounds: int
    seconds: float
    prompting: float
    parts: Sequence[str]


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
        url = f"http://{gateway.address[0]}:{gateway.address[1]}{rest.ROUTE}"
        header = {"cookie": f"{COOKIE}={random.choice(cookies)}"}
        response = httpx.get(url, headers=header, trust_env=False)
        _expect((response.status_code, json.loads(response.content)), (200, {"authStatus": True}))
        bodies[:] = [response.content]

    def connect() -> Sequence[load.Connection]:
        requests = itertools.cycle([rest.http_request(cookie) for cookie in cookies])
        return [load.HttpConnection(gateway.address, requests, bodies[0]) for _ in range(_HTTP_CONNECTIONS)]

    return server_contender("REST through Envoy, access logs", peer.cpu, verify, connect)


# The parts


@dataclass(frozen=True)
class Run:
    """What the parts share, and the table that they add to."""

    options: Options
    folder: Path
    cores: tuple[int, int]  # of what is measured, and of the load
    say: Callable[[str], None]
    table: Table

    @cached_property
    def many(self) -> stack.Home:
        """A home with many connections."""
        self.say(f"making {self.options.many:,} rows")
        return stack.make_home(self.folder / "many", self.options.many, random.Random())


def _status(run: Run) -> None:
    options, say, folder, (server_core, load_core) = run.options, run.say, run.folder, run.cores
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        many = run.many
        few = stack.make_home(folder / "few", options.few, random.Random())
        echo_peer = enter(stack.echo(folder, server_core, _THREADS))
        few_peer, _ = enter(stack.server(few, folder, server_core, access_log=False))
        many_peer, _ = enter(stack.server(many, folder, server_core, access_log=False))
        log_peer, _ = enter(stack.server(many, folder, server_core, access_log=True))
        contenders = echo, status, logging, in_few = (
            _grpc_contender("bare grpcio echo", echo_peer, many.cookies, bare=True),
            _grpc_contender(f"GetKaiStatus, {options.many:,} rows", many_peer, many.cookies),
            _grpc_contender("  with the access log", log_peer, many.cookies),
            _grpc_contender(f"GetKaiStatus, {options.few:,} rows", few_peer, few.cookies),
        )
        _measure_rounds(contenders, run)
        # Every thread has its own connection to the database, with its own cache.
        say("all threads at once")
        with connected(lambda: _grpc_connections(many_peer.socket, many.cookies, _THREADS)) as busy:
            load.run(busy, options.seconds)
        resident = many_peer.resident()
        say("REST through Envoy")
        gateway = enter(stack.gateway(many, [log_peer.socket], folder, load_core))
        through_envoy = _rest_contender(gateway, log_peer, many.cookies)
        envoy_cpu_per_answer = _measure_rest(through_envoy, gateway, options)
    table = run.table
    _add(table, echo, "", "", None, "")
    for contender, least in ((status, _LEAST_OF_ECHO), (logging, _LEAST_OF_ECHO_LOGGING)):
        _add_ratio(table, contender, echo, "echo", least)
    ratio = in_few.ratio(status)
    flat = 1 / _FLAT_WITHIN <= ratio <= _FLAT_WITHIN
    _add(table, in_few, f"{ratio:.2f} of many", f"≤ {_FLAT_WITHIN}", flat, f"{in_few.cpu_ratio(status):.2f}")
    ratio = through_envoy.rate / logging.rate
    _add(table, through_envoy, f"{ratio:.2f} of gRPC", "", None, f"{through_envoy.cpu_ratio(logging):.2f}")
    median, worst = _percentiles(through_envoy.samples[0].result.latencies)
    table.add_row("  p50 / p99", f"{median:.1f} / {worst:.1f} ms")
    table.add_row("  Envoy's share", *[""] * 5, _micros(envoy_cpu_per_answer))
    few_enough = resident <= _MOST_MEMORY
    table.add_row("resident memory after it all", f"{resident / 2**20:.0f} MiB", "", "≤ 120 MB", _mark(few_enough))


def _rest(run: Run) -> None:
    with rest.sites(run.many, run.folder, *run.cores, threads=_THREADS) as sites:
        fastapi, ideal, doorward = contenders = [site.contender() for site in sites]
        _measure_rounds(contenders, run)
        rate = doorward.rate / 2
        run.say(f"REST at {rate:,.0f} a second")
        latencies = sites[-1].run_at_rate(rate, run.options.seconds * 3).latencies
    table = run.table
    _add(table, fastapi, "", "", None, "")
    _add_shares(table, sites[0])
    _add(table, ideal, "", "", None, "")
    _add_shares(table, sites[1])
    _add_ratio(table, doorward, fastapi, "FastAPI", _LEAST_OF_FASTAPI)
    ratio = doorward.ratio(ideal)
    of_ideal = f"{ratio:.2f} of the ideal", f"≥ {_LEAST_OF_IDEAL:.2f}", _mark(ratio >= _LEAST_OF_IDEAL)
    table.add_row("  and", "", *of_ideal, f"{doorward.cpu_ratio(ideal):.2f}")
    _add_shares(table, sites[2])
    median, worst = _percentiles(latencies)
    in_time = worst <= _MOST_AT_HALF_RATE
    target = f"p99 ≤ {_MOST_AT_HALF_RATE:.0f} ms"
    table.add_row(f"  p50 / p99 at {rate:,.0f} a second", f"{median:.1f} / {worst:.1f} ms", "", target, _mark(in_time))


def _add_shares(table: Table, site: rest.Site) -> None:
    shares = site.cpu_per_answer()
    told = " / ".join(f"{share * 1e6:.0f}" for share in shares.values())
    table.add_row(f"  {' / '.join(shares)}", *[""] * 5, f"{told} µs")


def _engines(run: Run) -> None:
    """Everything has both cores: PostgreSQL's own processes work, too."""
    options, dice = run.options, random.Random()
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        enter(stack.on_core(*run.cores))
        postgres = enter(postgresql.served())
        run.say(f"making {options.most:,} rows in PostgreSQL")
        most, bytes_each = postgresql.make_home(run.folder / "most", postgres, options.most, dice)
        some, _ = postgresql.make_home(run.folder / "some", postgres, _SOME, dice)
        peers = [
            enter(stack.server(home, run.folder, *run.cores, access_log=False))[0] for home in (run.many, most, some)
        ]
        contenders = sqlite, in_most, in_some = [
            _grpc_contender(name, peer, home.cookies)
            for name, peer, home in (
                (f"SQLite, {options.many:,} rows", peers[0], run.many),
                (f"PostgreSQL, {options.most:,} rows", peers[1], most),
                (f"PostgreSQL, {_SOME:,} rows", peers[2], some),
            )
        ]
        _measure_rounds(contenders, run)
        asking = consenting.requesting(_CONNECTIONS, _STREAMS)
        writing = server_contender(
            "RequestApiKey, PostgreSQL", peers[2].cpu, lambda: None, lambda: asking(peers[2].socket)
        )
        _measure_rounds([writing], run)
    table = run.table
    _add(table, sqlite, "", "", None, "")
    _add_ratio(table, in_most, sqlite, "SQLite", _LEAST_OF_SQLITE)
    ratio = in_some.ratio(in_most)
    _add(table, in_some, f"{ratio:.2f} of most", f"≤ {_MOST_OF_MANY}", ratio <= _MOST_OF_MANY, "")
    _add(table, writing, "", "", None, "")
    table.add_row("  storage per connection", f"{bytes_each:.0f} B", "PostgreSQL, with its indexes")
    table.add_row("", f"{stack.bytes_per_connection(run.many, options.many):.0f} B", "SQLite, likewise")


def _linking(run: Run) -> None:
    with linking.contenders(run.folder, *run.cores, connections=_CONNECTIONS, streams=_STREAMS) as (get, link, basic):
        _measure_rounds((get, link), run)
    _compare(run.table, link, get, "GET", _LEAST_OF_GET)
    quick_enough = basic <= _MOST_FOR_BASIC
    run.table.add_row("  Basic", "", _micros(basic), f"≤ {_micros(_MOST_FOR_BASIC)}", _mark(quick_enough))


def _requests(run: Run) -> None:
    server_core, _ = run.cores
    with consenting.accepting(
        run.folder, server_core, connections=_CONNECTIONS, streams=_STREAMS, threads=_THREADS
    ) as (insert, accept):
        _measure_rounds((insert, accept), run)
    _compare(run.table, accept, insert, "insert", _LEAST_OF_INSERT)


def _deliveries(run: Run) -> None:
    with delivering.contenders(run.folder, *run.cores, threads=JobsSection().threads) as (post, deliver):
        _measure_rounds((post, deliver), run)
    _compare(run.table, deliver, post, "POST", _LEAST_OF_POST)


def _claims(run: Run) -> None:
    many = run.options.many
    with claiming.contenders(run.folder, finished=many, waiting=many // 10) as claims:
        _measure_rounds(claims, run)
    for small, large in zip(claims[::2], claims[1::2], strict=True):
        _compare(run.table, large, small, "small", _LEAST_OF_SMALL)


def _prompts(run: Run) -> None:
    prompts = prompting.measure(run.folder, *run.cores, say=run.say, seconds=run.options.prompting)
    table = run.table
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


_PARTS: Mapping[str, Callable[[Run], None]] = {
    "status": _status,
    "rest": _rest,
    "engines": _engines,
    "linking": _linking,
    "requests": _requests,
    "deliveries": _deliveries,
    "claims": _claims,
    "prompts": _prompts,
}


def _run(options: Options, table: Table, say: Callable[[str], None]) -> None:
    """Add what the chosen parts measure to the table."""
    cores = stack.cores()
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="doorward-bench-")))
        opened.enter_context(stack.on_core(cores[1]))
        run = Run(options, folder, cores, say, table)
        for part in options.parts:
            say(f"starting: {part}")
            _PARTS[part](run)


def _measure_rounds(contenders: Sequence[Contender], run: Run) -> None:
    rounds = run.options.rounds
    for number in range(rounds):
        for contender in contenders:
            run.say(f"round {number + 1} of {rounds}: {contender.name}")
            contender.measure(run.options.seconds)


def _measure_rest(contender: Contender, gateway: stack.Gateway, options: Options) -> float:
    """Measure once, for as long as two rounds; returns Envoy's CPU seconds per answer, warm-up included."""
    before = stack.cpu_seconds(gateway.envoy)
    sample = contender.measure(options.seconds * 2)
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


def _empty_table() -> Table:
    table = Table("measured")
    for column in ("per s", "ratio", "target", "", "by CPU time", "CPU/answer", "its core", "load's core"):
        table.add_column(column, justify="right")
    return table


def _compare(table: Table, contender: Contender, reference: Contender, called: str, least: float) -> None:
    """Two rows: what is compared to, and what is compared."""
    _add(table, reference, "", "", None, "")
    _add_ratio(table, contender, reference, called, least)


def _add_ratio(table: Table, contender: Contender, reference: Contender, called: str, least: float) -> None:
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
    parser.add_argument("--quick", action="store_true", help="a tenth of the connections, 3 short rounds")
    parser.add_argument("--seconds", type=float, help="the length of a contender's turn in a round")
    parser.add_argument("--only", nargs="+", choices=_PARTS, metavar="PART", help=f"of {', '.join(_PARTS)}")
    given = parser.parse_args()
    many, rounds, seconds, prompting_seconds = (100_000, 3, 1.0, 10.0) if given.quick else (1_000_000, 9, 3.0, 60.0)
    most = 10 * many
    parts = [part for part in _PARTS if part in (given.only or _PARTS)]
    return Options(1_000, many, most, rounds, given.seconds or seconds, prompting_seconds, parts)


def main() -> int:
    """Print the facts and the table; non-zero only when something could not be measured."""
    # So that whatever runs is stopped and the homes are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_facts(), highlight=False, soft_wrap=True)
    progress = Console(stderr=True)
    table = _empty_table()
    try:
        with progress.status("") as status:
            _run(options, table, status.update)
    except _FAILURES as failure:
        progress.print(f"could not measure: {failure}", markup=False)
        return 1
    console.print(table)
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
