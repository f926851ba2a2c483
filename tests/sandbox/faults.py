"""Deliberate misbehaviour: which fault an endpoint shows next, and how each looks on the wire.

Faults that never finish wait to be cancelled, which the server does when the client goes away.
"""

import asyncio
import functools
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal, NoReturn

from aiohttp import hdrs, web
from multidict import CIMultiDict
from pydantic import BaseModel, ConfigDict, Field, field_validator

MEBIBYTE = 1 << 20
TRICKLE_INTERVAL = 0.2
JSON_TYPE = {hdrs.CONTENT_TYPE: "application/json"}


class Fault(BaseModel):
    """One way to fail, for the next `times` requests or (None) until cleared."""

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: str
    times: int | None = Field(default=None, ge=1)
    phase: Literal["before", "after"] = "before"
    status: int = Field(default=500, ge=200, le=599)
    body: str = ""
    content_type: str = "application/json"
    headers: dict[str, str] = {}

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in _SPOILERS:
            raise ValueError(f"the kinds are {', '.join(sorted(_SPOILERS))}")
        return kind


class Faults:
    """The faults planned, at most one per endpoint."""

    def __init__(self) -> None:
        self._planned: dict[str, Fault] = {}

    def plan(self, endpoint: str, fault: Fault) -> None:
        self._planned[endpoint] = fault

    def clear(self) -> None:
        self._planned.clear()

    def take(self, endpoint: str) -> Fault | None:
        """The fault the next request to the endpoint meets, counted as shown."""
        fault = self._planned.get(endpoint)
        if fault is not None and fault.times is not None:
            fault.times -= 1
            if fault.times == 0:
                del self._planned[endpoint]
        return fault


async def spoil(request: web.Request, fault: Fault) -> web.StreamResponse:
    """Answer the request as the fault has it, if at all."""
    return await _SPOILERS[fault.kind](request, fault)


Spoiler = Callable[[web.Request, Fault], Awaitable[web.StreamResponse]]


def _json(body: bytes) -> Spoiler:
    async def answer(_request: web.Request, _fault: Fault) -> web.StreamResponse:
        return web.Response(body=body, headers=JSON_TYPE)

    return answer


async def _status(_request: web.Request, fault: Fault) -> web.StreamResponse:
    headers = CIMultiDict({hdrs.CONTENT_TYPE: fault.content_type})
    headers.update(fault.headers)
    return web.Response(status=fault.status, body=fault.body.encode(), headers=headers)


async def _redirect(_request: web.Request, _fault: Fault) -> web.StreamResponse:
    return web.Response(status=302, headers={hdrs.LOCATION: "/elsewhere"})


async def _hang(_request: web.Request, _fault: Fault) -> NoReturn:
    await asyncio.Future()
    raise AssertionError("nobody resolves that future")


async def _trickle_headers(request: web.Request, _fault: Fault) -> NoReturn:
    transport = _transport(request)
    for byte in b"HTTP/1.1 200 OK\r\nX-Trickle: ":
        transport.write(bytes([byte]))
        await asyncio.sleep(TRICKLE_INTERVAL)
    while True:
        transport.write(b".")
        await asyncio.sleep(TRICKLE_INTERVAL)


async def _trickle_body(request: web.Request, _fault: Fault) -> NoReturn:
    response = web.StreamResponse(headers=JSON_TYPE)
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(TRICKLE_INTERVAL)


async def _huge(request: web.Request, _fault: Fault) -> web.StreamResponse:
    response = web.StreamResponse(headers=JSON_TYPE)
    await response.prepare(request)
    for chunk in _long_json(10):
        await response.write(chunk)
    return response


async def _gzip_bomb(_request: web.Request, _fault: Fault) -> web.StreamResponse:
    bomb = await asyncio.to_thread(_build_bomb)  # the first time, it takes a good while
    return web.Response(body=bomb, headers={**JSON_TYPE, hdrs.CONTENT_ENCODING: "gzip"})


async def _cut(request: web.Request, fault: Fault) -> NoReturn:
    transport = _transport(request)
    connection: socket.socket = transport.get_extra_info("socket")
    # Lingering for no time at all makes closing send RST in place of FIN.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    await _hang(request, fault)


async def _cut_body(request: web.Request, fault: Fault) -> NoReturn:
    response = web.StreamResponse(headers=JSON_TYPE)
    response.content_length = 1000
    await response.prepare(request)
    await response.write(b'{"access_token": "')
    _transport(request).close()
    await _hang(request, fault)


async def _not_http(request: web.Request, fault: Fault) -> NoReturn:
    transport = _transport(request)
    transport.write(b"\x16\x03 this is no HTTP answer\r\n\r\n")
    transport.close()
    await _hang(request, fault)


def _transport(request: web.Request) -> asyncio.Transport:
    if request.transport is None:
        raise ConnectionResetError("the client is gone")
    assert isinstance(request.transport, asyncio.Transport)
    return request.transport


def _long_json(mebibytes: int) -> Iterator[bytes]:
    yield b'{"token_type": "Bearer", "access_token": "'
    for _ in range(mebibytes):
        yield b"x" * MEBIBYTE
    yield b'"}'


@functools.cache
def _build_bomb() -> bytes:
    packer = zlib.compressobj(level=9, wbits=31)  # 31: the gzip container
    return b"".join([*map(packer.compress, _long_json(100)), packer.flush()])


_SPOILERS: dict[str, Spoiler] = {
    "status": _status,
    "hang": _hang,
    "trickle_headers": _trickle_headers,
    "trickle_body": _trickle_body,
    "garbage": _json(b"\xff\xfe{\x00 not JSON \xc3("),
    "not_utf8": _json(b'{"id": "\xff", "access_token": "\xff"}'),
    "not_object": _json(b'["access_token"]'),
    "no_access_token": _json(b"{}"),
    "token_not_string": _json(b'{"access_token": 12345, "token_type": "Bearer"}'),
    "huge": _huge,
    "gzip_bomb": _gzip_bomb,
    "nested": _json(b"[" * 100_000 + b"]" * 100_000),
    "cut": _cut,
    "cut_body": _cut_body,
    "redirect": _redirect,
    "not_http": _not_http,
}
