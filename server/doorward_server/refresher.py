"""The refresher: has connections refreshed before they run out. Imports `integrations`, `breaker` and below.

Each provider's connections are looked for by themselves, so one that is down holds up no other.
"""

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait

from doorward_server.breaker import Breakers
from doorward_server.errors import StorageUnavailable
from doorward_server.integrations import Integrations
from doorward_server.logs import Log, describe
from doorward_server.models import Connection
from doorward_server.provider_registry import ProviderRegistry
from doorward_server.providers import Provider
from doorward_server.upkeep import Routine


class Refresher:
    """Claims the connections that are due, and refreshes each by a thread of its own."""

    def __init__(
        self,
        integrations: Integrations,
        providers: ProviderRegistry,
        breakers: Breakers,
        *,
        poll: float,
        at_once: int,
        log: Log,
    ) -> None:
        """`poll` in seconds; at most `at_once` refreshes are under way, half of them at one provider."""
        self._integrations = integrations
        self._providers = providers
        self._breakers = breakers
        self._log = log
        self._at_once = at_once
        self._per_provider = max(1, at_once // 2)
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="refresh")
        self._routine = Routine("refresher", poll, self.look, log)
        # By provider; changed under the lock.
        self._under_way: Counter[str] = Counter()
        self._futures: set[Future[None]] = set()
        # Providers that more connections may be due at than were claimed.
        self._are_more: set[str] = set()
        self._lock = threading.Lock()

    def start(self, stop: threading.Event) -> None:
        """Go on until the event is set."""
        self._routine.start(stop)

    def finish(self, seconds: float) -> None:
        """Wait for the refreshes under way, at most so long: what the provider gives them cannot be had again."""
        with self._lock:
            futures = set(self._futures)
        wait(futures, max(0.0, seconds))

    def look(self, stop: threading.Event) -> None:
        """Begin what is due and may be begun."""
        for provider in self._providers.list():
            if provider.kind == "kai" and not stop.is_set():
                self._begin(provider, stop)

    def _begin(self, provider: Provider, stop: threading.Event) -> None:
        most = self._breakers.allowance(provider.id, self._free(provider))
        if not most:
            return
        due = self._integrations.claim_due(provider.id, most)
        if stop.is_set():  # nobody would wait for them: they are due again soon, for others
            return
        if due:
            self._breakers.begin(provider.id)
        for connection in due:
            self._submit(connection)
        if len(due) == most:
            self._are_more.add(provider.id)
        else:
            self._are_more.discard(provider.id)

    def _free(self, provider: Provider) -> int:
        with self._lock:
            return min(self._at_once - self._under_way.total(), self._per_provider - self._under_way[provider.id])

    def _submit(self, connection: Connection) -> None:
        with self._lock:
            self._under_way[connection.provider] += 1
            future = self._pool.submit(self._refresh, connection)
            self._futures.add(future)
        future.add_done_callback(lambda done: self._done(connection, done))

    def _refresh(self, connection: Connection) -> None:
        try:
            self._integrations.refresh_due(connection)
        except StorageUnavailable:
            self._log.warning("refresh failed", connection_id=connection.id, reason=StorageUnavailable.reason)
        except Exception as error:  # noqa: BLE001 - one bad connection must not hold up the others
            self._log.error("refresh failed", connection_id=connection.id, **describe(error))

    def _done(self, connection: Connection, future: Future[None]) -> None:
        with self._lock:
            self._under_way[connection.provider] -= 1
            self._futures.discard(future)
        if self._are_more:
            self._routine.hurry()
