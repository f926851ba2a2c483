"""Failures: how often each caller may try wrong credentials or proofs. Imports `errors` and `clock`."""

import math
import threading
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class FailureLimit:
    """Counts failures by caller, in this process, from the first one until a minute later.

    Whoever succeeds is never asked here: others' failures lock nobody out of what they have the
    credentials for.
    """

    per_minute: int  # 0: no limit
    clock: Clock
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _counts: TTLCache[tuple[str, str], _Count] = field(init=False)

    def __post_init__(self) -> None:
        counts: TTLCache[tuple[str, str], _Count] = TTLCache(_MOST_CALLERS, _WINDOW, timer=self._seconds)
        object.__setattr__(self, "_counts", counts)

    def add(self, caller: str, address: str) -> None:
        """Count one failure; raises TooManyFailures when it is one too many."""
        if not self.per_minute:
            return
        with self._lock:
            count = self._counts.setdefault((caller, address), _Count(self._seconds()))
            count.failures += 1
            allowed = count.failures <= self.per_minute
        if not allowed:
            left = count.since + _WINDOW - self._seconds()
            raise TooManyFailures({"retry_after": str(max(1, math.ceil(left)))})

    def _seconds(self) -> float:
        return self.clock.now().timestamp()
