"""Breakers: whether a provider is worth asking when nobody waits for the answer. Imports `clock`, `logs`, `errors`.

They hold back what is sent unasked, never a caller's own request, though callers' requests tell them, too.
"""

import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from doorward_server.clock import Clock
from doorward_server.errors import (
    GrantRefused,
    ProviderMalformed,
    ProviderTimeout,
    ProviderUnavailable,
    RefreshRejected,
)
from doorward_server.logs import Log

# That the provider is down. Busy is not: then it was not asked.
_DOWN = (ProviderUnavailable, ProviderTimeout, ProviderMalformed)
# No, but an answer all the same.
_REFUSALS = (GrantRefused, RefreshRejected)


@dataclass(frozen=True)
class BreakerPolicy:
    """When a breaker opens, and for how long."""

    threshold: int = 5  # failures, with no success between them
    first: timedelta = timedelta(seconds=10)
    longest: timedelta = timedelta(minutes=1)

    def pause(self, pauses: int, luck: float) -> timedelta:
        """How long to send nothing after so many pauses; `luck`, from 0 to 1, makes it up to a quarter longer."""
        longer: float = 2.0 ** min(pauses, 20)
        return min(self.first * longer, self.longest) * (1 + luck / 4)


@dataclass(frozen=True)
class Breaker:
    """What is known of one provider: closed, or open until the next probe may be sent."""

    failures: int = 0
    pauses: int = 0
    probe_at: datetime | None = None  # unset: closed

    @property
    def is_open(self) -> bool:
        return self.probe_at is not None

    def failed(self, policy: BreakerPolicy, now: datetime, luck: float) -> "Breaker":
        """After a failure. While it is open one more says nothing new: the probe's is reckoned with already."""
        if self.is_open:
            return self
        if self.failures + 1 < policy.threshold:
            return replace(self, failures=self.failures + 1)
        return replace(self, failures=0).paused(policy, now, luck)

    def paused(self, policy: BreakerPolicy, now: datetime, luck: float) -> "Breaker":
        """Open for a pause, which is longer than the one before.

        This is also what a probe begins with: it counts as failed until it succeeds, so none is sent beside it,
        and one that is never heard of again holds up nothing.
        """
        return replace(self, pauses=self.pauses + 1, probe_at=now + policy.pause(self.pauses, luck))

    def allowance(self, most: int, now: datetime) -> int:
        """How many requests may be begun, of so many: all of them, one, the probe, or none."""
        if self.probe_at is None:
            return most
        return min(most, 1) if self.probe_at <= now else 0


class Breakers:
    """The breakers of this process, by the provider's id. Thread-safe."""

    def __init__(self, policy: BreakerPolicy, clock: Clock, log: Log) -> None:
        self._policy = policy
        self._clock = clock
        self._log = log
        self._lock = threading.Lock()
        self._breakers: dict[str, Breaker] = {}

    def allowance(self, provider_id: str, most: int) -> int:
        """How many requests may be begun unasked, at most so many."""
        with self._lock:
            return self._of(provider_id).allowance(most, self._clock.now())

    def begin(self, provider_id: str) -> None:
        """Something is about to be sent unasked: with the breaker open it is the probe."""
        with self._lock:
            breaker = self._of(provider_id)
            if breaker.is_open:
                self._breakers[provider_id] = breaker.paused(self._policy, self._clock.now(), random.random())  # noqa: S311

    @contextlib.contextmanager
    def watching(self, provider_id: str) -> Iterator[None]:
        """Around a request to a provider, whoever asked for it: notes how it ends."""
        try:
            yield
        except _REFUSALS:
            self._succeeded(provider_id)
            raise
        except _DOWN as failure:
            self._failed(provider_id, failure.reason)
            raise
        self._succeeded(provider_id)

    def _succeeded(self, provider_id: str) -> None:
        with self._lock:
            breaker = self._breakers.pop(provider_id, None)
        if breaker is not None and breaker.is_open:
            self._log.info("breaker closed", provider=provider_id)

    def _failed(self, provider_id: str, reason: str) -> None:
        with self._lock:
            before = self._of(provider_id)
            after = before.failed(self._policy, self._clock.now(), random.random())  # noqa: S311 - no secret
            self._breakers[provider_id] = after
        if after.is_open and not before.is_open:
            self._log.warning("breaker opened", provider=provider_id, reason=reason)

    def _of(self, provider_id: str) -> Breaker:
        return self._breakers.get(provider_id, Breaker())
