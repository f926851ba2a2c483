"""One thing at a time for each user. Imports nothing of the project."""

import asyncio
from weakref import WeakValueDictionary


class Locks:
    """A lock for each user, for as long as somebody holds or awaits it.

    A typed reply may overtake Discord's answer to the prompt that it replies to, and clicks come twice.
    """

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    def of(self, user_id: int) -> asyncio.Lock:
        lock = self._locks.get(user_id)
        if lock is None:
            lock = self._locks[user_id] = asyncio.Lock()
        return lock
