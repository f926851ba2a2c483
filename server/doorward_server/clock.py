"""The time, as an object, so that tests can set it. Imports nothing of the project."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime


class Clock:
    """The system's clock."""

    def now(self) -> datetime:
        """The current time, aware, UTC."""
        return datetime.now(UTC)

    def polls(self, seconds: float, *, first: float = 0.005, longest: float = 0.05) -> Iterator[float]:
        """Wait in growing steps (in seconds), yielding what is left of `seconds` after each."""
        deadline = time.monotonic() + seconds
        step = first
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(step, left))
            step = min(step * 2, longest)
            yield deadline - time.monotonic()
