"""The poller: takes prompts from the server, for ever. Imports `consent`, `broker`, `backoff` and below."""

import asyncio

import disnake

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_bot.backoff import Backoff
from doorward_bot.broker import Away, Broker, Refused
from doorward_bot.consent import Consent
from doorward_bot.logs import Log, describe
from doorward_bot.metrics import Metrics

# Prompts that are sent, or closed, at once.
_AT_ONCE = 16
_WAIT_SECONDS = 20.0
# Longer than disnake tries again when Discord fails: some 25 seconds.
_LEASE_SECONDS = 60
# Discord may hang; a prompt that took longer is leased again anyway.
_LONGEST_TAKE = 45.0


class Poller:
    """Leases prompts, as many as there is room for, and hands them to the consent."""

    def __init__(self, broker: Broker, consent: Consent, log: Log, metrics: Metrics) -> None:
        self._broker = broker
        self._consent = consent
        self._log = log
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_room = asyncio.Event()

    @property
    def under_way(self) -> int:
        """How many prompts are being sent or closed."""
        return len(self._tasks)

    async def run(self) -> None:
        """Until it is canceled. Raises NotAdmitted."""
        backoff = Backoff(0.2, 10.0)
        while True:
            try:
                leased = await self._lease()
            except (Away, Refused) as failure:
                pause = backoff.next()
                self._log.warning("server away", reason=str(failure) or "UNAVAILABLE", seconds=round(pause, 2))
                await asyncio.sleep(pause)
                continue
            backoff.reset()
            self._metrics.leased(len(leased))
            for one in leased:
                task = asyncio.create_task(self._take(one))
                self._tasks.add(task)
                task.add_done_callback(self._forget)
            if len(self._tasks) >= _AT_ONCE:
                self._has_room.clear()
                await self._has_room.wait()

    async def _lease(self) -> list[pb.LeasedConsentRequest]:
        wanted = pb.LeaseConsentRequestsRequest(
            max_requests=_AT_ONCE - len(self._tasks), wait_seconds=_WAIT_SECONDS, lease_seconds=_LEASE_SECONDS
        )
        answer = await self._broker.call("LeaseConsentRequests", wanted, timeout=_WAIT_SECONDS + 5)
        return list(answer.requests)

    async def _take(self, leased: pb.LeasedConsentRequest) -> None:
        try:
            async with asyncio.timeout(_LONGEST_TAKE):
                await self._consent.take(leased)
        except (Away, Refused, disnake.HTTPException, OSError) as failure:
            self._metrics.prompt_ended("failed")
            status = getattr(failure, "status", None)
            self._log.warning("prompt failed", request_id=leased.request.id, status=status, **describe(failure))
        except Exception as failure:  # noqa: BLE001 - one bad prompt must not end the bot
            self._metrics.prompt_ended("failed")
            self._log.error("prompt failed", request_id=leased.request.id, **describe(failure))

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._has_room.set()
