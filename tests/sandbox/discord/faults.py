"""Deliberate misbehaviour of the REST API: which fault a route shows next, and how each looks on the wire.

Faults that never finish wait to be cancelled, which the server does when the client goes away.
"""

import asyncio
import fnmatch
import json
import socket
import struct
import time
from typing import Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

JSON_TYPE = {"Content-Type": "application/json"}
# disnake, as others, takes a 429 without it for one of Cloudflare's.
VIA = {"Via": "1.1 sandbox"}


class Fault(BaseModel):
    """One way to fail, for the next `times` requests to the routes of a pattern or (None) until healed.

    `phase` says whether the request does not take place (`before`), or has taken place (`after`) when it fails.
    `delay` waits for `seconds` and then goes on as if nothing were wrong; `status` answers with a `code` of
    Discord's; `rate_limit` answers 429; `hang` never answers; `reset` resets the connection.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    route: str = "*"
    kind: Literal["status", "rate_limit", "delay", "hang", "reset"]
    times: int | None = Field(default=None, ge=1)
    phase: Literal["before", "after"] = "before"
    seconds: float = Field(default=0.0, ge=0)
    status: int = Field(default=500, ge=400, le=599)
    code: int = 0
    message: str = "a planned fault"
    scope: Literal["user", "global", "shared"] = "user"


class Faults:
    """The faults planned, oldest first."""

    def __init__(self) -> None:
        self._planned: list[Fault] = []

    def plan(self, fault: Fault) -> None:
        self._planned.append(fault)

    def clear(self) -> None:
        self._planned.clear()

    def take(self, route: str) -> Fault | None:
        """The fault the next request to a route (as `POST /channels/{channel_id}/messages`) meets, counted."""
        fault = next((fault for fault in self._planned if _covers(fault.route, route)), None)
        if fault is not None and fault.times is not None:
            fault.times -= 1
            if fault.times == 0:
                self._planned.remove(fault)
        return fault


def _covers(pattern: str, route: str) -> bool:
    return fnmatch.fnmatchcase(route, pattern)


async def spoil(request: web.Request, fault: Fault) -> web.Response | None:
    """Answer as the fault has it, if at all; None: go on."""
    if fault.kind == "status":
        body = {"message": fault.message, "code": fault.code}
        return json_answer(fault.status, body)
    if fault.kind == "rate_limit":
        return rate_limited(fault.seconds, fault.scope)
    if fault.kind == "delay":
        await asyncio.sleep(fault.seconds)
        return None
    if fault.kind == "reset":
        _reset(request)
    await asyncio.Future()
    return None


def rate_limited(seconds: float, scope: str) -> web.Response:
    """Discord's 429."""
    headers = {
        "Retry-After": str(max(1, round(seconds))),
        "X-RateLimit-Limit": "5",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": f"{time.time() + seconds:.3f}",
        "X-RateLimit-Reset-After": f"{seconds:.3f}",
        "X-RateLimit-Bucket": "sandbox",
        "X-RateLimit-Scope": scope,
    }
    if scope == "global":
        headers = {name: headers[name] for name in ("Retry-After", "X-RateLimit-Scope")}
        headers["X-RateLimit-Global"] = "true"
    message = "You are being rate limited."
    body = {"message": message, "code": 0, "retry_after": seconds, "global": scope == "global"}
    return json_answer(429, body, headers)


def json_answer(status: int, body: object, headers: dict[str, str] | None = None) -> web.Response:
    """An answer whose type is exactly `application/json`: with a charset, disnake would not read it."""
    return web.Response(status=status, body=json.dumps(body).encode(), headers=JSON_TYPE | VIA | (headers or {}))


def _reset(request: web.Request) -> None:
    transport = request.transport
    assert isinstance(transport, asyncio.Transport)
    connection: socket.socket = transport.get_extra_info("socket")
    # Lingering for no time at all makes closing send RST in place of FIN.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
