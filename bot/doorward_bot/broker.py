"""The server, as the bot calls it. Imports only `backoff` and `errors`."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from doorward.keybroker.v1 import keybroker_service_pb2_grpc as stubs
from doorward_bot.backoff import Backoff
from doorward_bot.errors import BotError

Answer = TypeVar("Answer")
# A server that hangs is noticed within some ten seconds; without `ping_timeout_ms` only after a minute.
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # it would see the token and the keys
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
]
_AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_NOT_ADMITTED = {
    "NO_SERVICE_TOKEN": "the server does not know DOORWARD_BOT_TOKEN: `doorward token create --role bot` makes one",
    "ROLE_REQUIRED": "DOORWARD_BOT_TOKEN is not of role bot: `doorward token create --role bot` makes one",
}


class Refused(Exception):
    """The server said no, for a reason of its own."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Away(Exception):
    """The server cannot be reached, or does not answer in time."""


class NotAdmitted(BotError):
    """The bot's token is not what the server wants."""


class Broker:
    """KeyBrokerService; its methods by their names."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None, token: str) -> None:
        """`credentials`: of TLS, if it is to be spoken."""
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self._stub = stubs.KeyBrokerServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),)
        # Whether the last call was answered.
        self.is_reached = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def call(self, rpc: str, request: Any, *, timeout: float = 5.0, patience: float = 0.0) -> Any:
        """One call; while the server is away, again for `patience` seconds. Raises Refused, Away, NotAdmitted."""
        ends, backoff = time.monotonic() + patience, Backoff(0.1, 2.0)
        while True:
            try:
                return await self._call(getattr(self._stub, rpc), request, timeout)
            except Away:
                if time.monotonic() > ends:
                    raise
            await asyncio.sleep(backoff.next())

    async def _call(self, rpc: Callable[..., Awaitable[Answer]], request: Any, timeout: float) -> Answer:
        try:
            answer = await rpc(request, metadata=self._metadata, timeout=timeout)
        except grpc.aio.AioRpcError as failure:
            reason = _reason(failure)
            # What the server says of a service that it asked is an answer.
            self.is_reached = bool(reason)
            if reason in _NOT_ADMITTED:
                raise NotAdmitted(_NOT_ADMITTED[reason]) from None
            if failure.code() in _AWAY and reason in {"", "STORAGE_UNAVAILABLE"}:
                raise Away from None
            raise Refused(reason or failure.code().name) from None
        self.is_reached = True
        return answer


def _reason(failure: grpc.aio.AioRpcError) -> str:
    """The reason of the error's google.rpc.ErrorInfo; "" when it has none."""
    for name, value in failure.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in Status.FromString(value).details:
                info = ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""
