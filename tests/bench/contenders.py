"""What is measured once a round, and what comes of it. Owns the statistics."""

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.bench import load, stack

WARM_UP = 0.3
C = TypeVar("C", bound=load.Connection)


@dataclass(frozen=True)
class Sample:
    """One run of the load, and the CPU seconds that it took whoever is measured."""

    result: load.Result
    cpu: float

    @property
    def rate(self) -> float:
        return self.result.answers / self.result.seconds


@dataclass
class Contender:
    """Something that is measured once a round."""

    name: str
    run: Callable[[float], Sample]  # for so many seconds
    samples: list[Sample] = field(default_factory=list)

    def measure(self, seconds: float) -> Sample:
        sample = self.run(seconds)
        self.samples.append(sample)
        return sample

    @property
    def rate(self) -> float:
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def cpu_per_answer(self) -> float:
        return sum(one.cpu for one in self.samples) / sum(one.result.answers for one in self.samples)

    @property
    def utilisation(self) -> float:
        """The part of its core that it used."""
        return sum(one.cpu for one in self.samples) / self._seconds

    @property
    def generators_utilisation(self) -> float:
        """The part of its core that the load generator used."""
        return sum(one.result.own_cpu for one in self.samples) / self._seconds

    @property
    def _seconds(self) -> float:
        return sum(one.result.seconds for one in self.samples)

    def ratio(self, other: "Contender") -> float:
        """Its rate as a multiple of another's."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine.rate / its.rate for mine, its in pairs)

    def cpu_ratio(self, other: "Contender") -> float:
        """The rate as a multiple of another's, by the CPU time that an answer takes."""
        return other.cpu_per_answer / self.cpu_per_answer


def server_contender(
    name: str,
    cpu: Callable[[], float],
    verify: Callable[[], None],
    connect: Callable[[], Sequence[load.Connection]],
) -> Contender:
    """A server under load; an answer is verified in full first."""

    def run(seconds: float) -> Sample:
        verify()
        with connected(connect) as connections:
            load.run(connections, WARM_UP)
            before = cpu()
            result = load.run(connections, seconds)
            return Sample(result, cpu() - before)

    return Contender(name, run)


def fetching_contender(name: str, url: str, threads: int, core: int, *options: str) -> Contender:
    """A process that makes bare GETs, of a URL that holds {access_token}, or with `--post` POSTs."""

    def run(seconds: float) -> Sample:
        command = [sys.executable, "-m", "tests.bench.peers.fetch", url, "--threads", str(threads)]
        command += ["--warm-up", str(WARM_UP), "--seconds", str(seconds), *options]
        with stack.on_core(core):
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 60)
        told = json.loads(done.stdout)
        return Sample(load.Result(told["answers"], told["seconds"], 0.0, ()), told["cpu"])

    return Contender(name, run)


@contextlib.contextmanager
def connected(connect: Callable[[], Sequence[C]]) -> Iterator[Sequence[C]]:
    """Connections for the time of a `with` block."""
    connections = connect()
    try:
        yield connections
    finally:
        load.close(connections)
