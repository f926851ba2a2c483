"""Tells others whether the bot is well: GET /healthz. Imports nothing of the project."""

import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import web


@contextlib.asynccontextmanager
async def served(port: int, state: Callable[[], dict[str, bool]]) -> AsyncIterator[None]:
    """Answers on 127.0.0.1 with the state as JSON: 200 when all of it holds, else 503. Port 0: nowhere."""
    if not port:
        yield
        return

    async def answer(_: web.Request) -> web.Response:
        now = state()
        return web.json_response(now, status=200 if all(now.values()) else 503)

    app = web.Application()
    app.router.add_get("/healthz", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
    finally:
        await runner.cleanup()
