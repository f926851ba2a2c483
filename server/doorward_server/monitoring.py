"""Monitoring: what the database holds, for metrics, at the time of a scrape. Imports the domain.

A scrape never fails, and never waits for much: what an index answers is read at once, and what takes a walk through
an index is counted beside the scrapes, in a hundredth of the time at most.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from doorward_server.clock import Clock
from doorward_server.consents import Consents
from doorward_server.delivery import Deliveries
from doorward_server.errors import StorageUnavailable
from doorward_server.integrations import Integrations
from doorward_server.jobs import Jobs

# Seconds for which a count is kept, at least, and how many times as long as it took.
_KEPT, _TIMES = 60.0, 100.0


@dataclass
class _Connections:
    """The connections by provider, counted in a thread of its own when somebody asks and the last count is old."""

    integrations: Integrations
    counts: list[tuple[str, bool, int]] = field(default_factory=list)
    _due: float = 0.0
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def ask(self) -> None:
        """Have them counted, if it is time for that; `counts` holds the last result."""
        if time.monotonic() >= self._due and self._counting.acquire(blocking=False):
            threading.Thread(target=self._count, name="counting", daemon=True).start()

    def _count(self) -> None:
        started = time.monotonic()
        try:
            self.counts = self.integrations.count_by_provider()
        except StorageUnavailable:
            pass  # the gauge of the database tells
        finally:
            now = time.monotonic()
            self._due = now + max(_KEPT, _TIMES * (now - started))
            self._counting.release()


class StateCollector(Collector):
    """Gauges of what waits, and of what is kept."""

    def __init__(
        self, clock: Clock, jobs: Jobs, deliveries: Deliveries, consents: Consents, integrations: Integrations
    ) -> None:
        self._clock = clock
        self._jobs = jobs
        self._deliveries = deliveries
        self._consents = consents
        self._connections = _Connections(integrations)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """While the database is away: that alone."""
        try:
            families = [*self._jobs_due(), self._unsent(), self._open_requests(), self._connected()]
        except StorageUnavailable:
            families = []
        yield GaugeMetricFamily("doorward_database_up", "1 while the database answers.", value=bool(families))
        yield from families

    def _jobs_due(self) -> Iterator[GaugeMetricFamily]:
        due = self._jobs.backlog()
        age = (self._clock.now() - due.since).total_seconds() if due.since else 0.0
        yield GaugeMetricFamily("doorward_jobs_due", "Jobs that wait for a worker.", value=due.jobs)
        yield GaugeMetricFamily("doorward_jobs_oldest_due_seconds", "How long the first has waited.", value=age)

    def _unsent(self) -> GaugeMetricFamily:
        counts = self._deliveries.count_unsent().items()
        return _family("deliveries", "Deliveries that were not sent.", ("status",), (((s,), n) for s, n in counts))

    def _open_requests(self) -> GaugeMetricFamily:
        counts = self._consents.count_open().items()
        samples = (((status,), count) for status, count in counts)
        return _family("consent_requests_open", "Requests for keys without an outcome.", ("status",), samples)

    def _connected(self) -> GaugeMetricFamily:
        self._connections.ask()
        samples = (
            ((provider, "needs_reauth" if needs_reauth else "connected"), count)
            for provider, needs_reauth, count in self._connections.counts
        )
        told = "Connections, counted every minute or less often."
        return _family("connections", told, ("provider", "status"), samples)


def _family(
    name: str, told: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], int]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"doorward_{name}", told, labels=labels)
    for values, count in samples:
        family.add_metric(values, count)
    return family
