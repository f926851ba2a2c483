"""How long to wait after failures. Imports nothing of the project."""

import random


class Backoff:
    """Full jitter: any time up to a bound that doubles with each failure."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._failures = 0

    def reset(self) -> None:
        """Something went as it should."""
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        bound = min(self._first * 2.0**self._failures, self._longest)
        self._failures = min(self._failures + 1, 30)
        return random.uniform(0, bound)  # noqa: S311 - no secret
