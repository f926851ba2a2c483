"""Failures: how often each caller may try wrong credentials or proofs. Imports `errors` and `clock`."""

import math
import threading
from dataclasses import dataclass

from cachetools import TTLCache

from doorward_server.clock import Clock
from doorward_server.errors import TooManyFailures

_WINDOW = 60.0
# Callers remembered at once; the one that was quiet for the longest is forgotten first.
_MOST_CALLERS = 20_000


@dataclass
class _Count:
    since: float
    failures: int = 0


class FailureLimit:
    """Counts failures by caller, in this process, from the first one until a minute later.

    Whoever succeeds is never asked here: others' failures lock nobody out of what they have the
    credentials for.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        """`per_minute` 0: no limit."""
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: TTLCache[tuple[str, str], _Count] = TTLCache(_MOST_CALLERS, _WINDOW, timer=self._seconds)

    def add(self, caller: str, address: str) -> None:
        """Count one failure; raises TooManyFailures when it is one too many."""
        if not self._per_minute:
            return
        with self._lock:
            count = self._counts.setdefault((caller, address), _Count(self._seconds()))
            count.failures += 1
            allowed = count.failures <= self._per_minute
        if not allowed:
            left = count.since + _WINDOW - self._seconds()
            raise TooManyFailures({"retry_after": str(max(1, math.ceil(left)))})

    def _seconds(self) -> float:
        return self._clock.now().timestamp()
