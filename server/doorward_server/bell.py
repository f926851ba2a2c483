"""A bell: tells other threads of this process that there is something new. Imports nothing of Doorward's."""

import threading


class Bell:
    """Only a hint to look sooner: what other processes do is found by looking."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.rung = 0

    def ring(self) -> None:
        with self._condition:
            self.rung += 1
            self._condition.notify_all()

    def wait(self, rung: int, seconds: float) -> int:
        """Until it has rung oftener than so often, or the time is over; returns how often it has."""
        with self._condition:
            self._condition.wait_for(lambda: self.rung != rung, seconds)
            return self.rung
