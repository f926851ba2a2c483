"""Upkeep: what is done again and again by threads of their own, and the removal of what is past its time.

Imports `models` and below. Which rows are past their time is said by the modules that own the tables.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.logs import Log, describe
from doorward_server.models import to_micros

# Longer than anything is kept.
FOR_EVER = timedelta(days=1000 * 365)
# Rows that are looked for at once, outside of transactions.
_MOST_FOUND = 10_000
# Seconds between two batches, in which others write.
_PAUSE = 0.1
# The first round comes soon after the start, for some processes do not live for as long as a round takes.
_FIRST_SECONDS = 60.0


class Routine:
    """Something that is done every so many seconds, or sooner when hurried.

    A failure is logged, and the next round comes all the same. `act` is given the event that tells of the end.
    """

    def __init__(self, name: str, seconds: float, act: Callable[[threading.Event], object], log: Log) -> None:
        self._name = name
        self._seconds = seconds
        self._act = act
        self._log = log
        self._hurry = threading.Event()

    def start(self, stop: threading.Event) -> None:
        """Go on until the event is set."""
        threading.Thread(target=self._run, args=(stop,), name=self._name, daemon=True).start()

    def hurry(self) -> None:
        """Begin the next round now."""
        self._hurry.set()

    def _run(self, stop: threading.Event) -> None:
        # Processes that start together need not look together.
        self._hurry.wait(min(self._seconds, _FIRST_SECONDS) * random.random())  # noqa: S311 - no secret
        while not stop.is_set():
            self._hurry.clear()
            try:
                self._act(stop)
            except Exception as error:  # noqa: BLE001 - the next round may succeed
                self._log.error("routine failed", routine=self._name, **describe(error))
            self._hurry.wait(self._seconds)


@dataclass(frozen=True)
class Sweep:
    """Which rows of a table are past their time.

    `where` is SQL with a `?` for each of `ages`, in order, which stands for the time that is so long ago.
    Whatever hangs on a row goes with it: the schema says so.
    """

    table: str
    where: str
    ages: Sequence[timedelta]

    def times(self, now: datetime) -> list[int]:
        return [to_micros(now - age) for age in self.ages]

    @property
    def find(self) -> str:
        """The statement for the ids of at most so many rows."""
        return f"SELECT id FROM {self.table} WHERE {self.where} LIMIT ?"  # noqa: S608 - constants only

    @property
    def remove(self) -> str:
        """The statement that removes a row by its id, if it is past its time still."""
        return f"DELETE FROM {self.table} WHERE id = ? AND {self.where} RETURNING id"  # noqa: S608 - constants only


@dataclass(frozen=True)
class Sweeper:
    """Removes what is past its time, a batch in a transaction, so that nobody waits for long.

    Several processes may do so at once: a row that another one has removed is gone, no more.
    """

    database: Database
    clock: Clock
    sweeps: Sequence[Sweep]
    batch: int
    log: Log

    def run(self, stop: threading.Event) -> None:
        """One round: everything that is past its time now, unless it is told to stop."""
        for sweep in self.sweeps:
            try:
                removed = self._sweep(sweep, stop)
            except Exception as error:  # noqa: BLE001 - one table must not hold up the others
                self.log.error("sweep failed", table=sweep.table, **describe(error))
                continue
            if removed:
                self.log.info("swept", table=sweep.table, rows=removed)

    def _sweep(self, sweep: Sweep, stop: threading.Event) -> int:
        times, removed = sweep.times(self.clock.now()), 0
        while True:
            # What has to stay is read again in every round; no writer waits for that.
            ids = [row_id for (row_id,) in self.database.fetch_rows(sweep.find, (*times, _MOST_FOUND))]
            for start in range(0, len(ids), self.batch):
                if stop.is_set():
                    return removed
                remove = partial(self._remove, sweep, ids[start : start + self.batch], times)
                removed += self.database.write(remove)
                stop.wait(_PAUSE)
            if len(ids) < _MOST_FOUND:
                return removed

    def _remove(self, sweep: Sweep, ids: Sequence[int], times: Sequence[int]) -> int:
        """Inside a transaction; a row that was needed again in the meantime stays."""
        return sum(self.database.execute(sweep.remove, (row_id, *times)) is not None for row_id in ids)
