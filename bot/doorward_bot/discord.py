"""The few calls of Discord's REST API that the bot makes itself, on raw JSON. Imports only `metrics`.

disnake keeps what it hands out in caches, and has no parameter for `enforce_nonce`; its HTTP client still does the
rate limits and the retries.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import disnake
from aiolimiter import AsyncLimiter
from disnake.http import HTTPClient, Route

from doorward_bot.metrics import Metrics

# Discord's JSON error codes (https://discord.com/developers/docs/topics/opcodes-and-status-codes#json).
_NO_SUCH_USER = {10013, 50033}
_REFUSED = {50007, 50278}
# HTTP's: the message, the channel or the right to change it is gone.
_GONE = {403, 404}
_HISTORY = 100
Message = dict[str, Any]


class CannotAsk(Exception):
    """The user takes no messages from the bot, or does not exist."""


class Dms:
    """Direct messages with users."""

    def __init__(self, http: HTTPClient, metrics: Metrics) -> None:
        self._http = http
        self._metrics = metrics
        # Discord takes 50 requests a second: with this, never more than 47 in any second.
        self._pace = AsyncLimiter(5, 0.12)

    @contextlib.asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        """At the pace that Discord wants; failures are counted."""
        async with self._pace:
            try:
                yield
            except (disnake.HTTPException, aiohttp.ClientError, OSError) as failure:
                self._metrics.discord_failed(failure)
                raise

    async def open(self, user_id: int) -> int:
        """The id of the channel. Raises CannotAsk."""
        try:
            async with self._calling():
                channel = await self._http.start_private_message(user_id)
        except disnake.HTTPException as failure:
            raise _translated(failure) from None
        return int(channel["id"])

    async def send(self, channel_id: int, payload: Message, *, nonce: str) -> int:
        """The id of the message; a repeat with the same nonce is the same message. Raises CannotAsk."""
        route = Route("POST", "/channels/{channel_id}/messages", channel_id=channel_id)
        try:
            async with self._calling():
                sent = await self._http.request(route, json={**payload, "nonce": nonce, "enforce_nonce": True})
        except disnake.HTTPException as failure:
            raise _translated(failure) from None
        return int(sent["id"])

    async def reply(self, message: Message, text: str) -> None:
        """Answer a user's message; once, however often it is called."""
        payload = {
            "content": text,
            "allowed_mentions": {"parse": []},
            "message_reference": {"message_id": message["id"], "fail_if_not_exists": False},
        }
        await self.send(int(message["channel_id"]), payload, nonce=f"r{message['id']}")

    async def edit(self, channel_id: int, message_id: int, payload: Message) -> bool:
        """Change a message of the bot's; False: it is gone."""
        route = Route(
            "PATCH", "/channels/{channel_id}/messages/{message_id}", channel_id=channel_id, message_id=message_id
        )
        try:
            async with self._calling():
                await self._http.request(route, json=payload)
        except disnake.HTTPException as failure:
            if failure.status in _GONE:
                return False
            raise
        return True

    async def can_be_pressed(self, channel_id: int, message_id: int) -> bool:
        """Whether a message shows buttons, or a menu."""
        try:
            async with self._calling():
                message = await self._http.get_message(channel_id, message_id)
        except disnake.NotFound:
            return False
        return bool(message.get("components"))

    async def history(self, channel_id: int, after: int) -> AsyncIterator[Message]:
        """The messages of a channel after an id (of a message, or a time), the oldest first."""
        while True:
            async with self._calling():
                page = sorted(
                    await self._http.logs_from(channel_id, _HISTORY, after=after),
                    key=lambda message: int(message["id"]),
                )
            for message in page:
                yield dict(message)
            if len(page) < _HISTORY:
                return
            after = int(page[-1]["id"])


def _translated(failure: disnake.HTTPException) -> Exception:
    return CannotAsk() if failure.code in _NO_SUCH_USER | _REFUSED else failure
