"""Tells others how the bot is: GET /healthz, and GET /metrics for Prometheus. Imports nothing of the project."""

import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


@contextlib.asynccontextmanager
async def served(port: int, state: Callable[[], dict[str, bool]], registry: CollectorRegistry) -> AsyncIterator[None]:
    """Answers on 127.0.0.1; the state as JSON, 200 when all of it holds, else 503. Port 0: nowhere."""
    if not port:
        yield
        return

    async def answer(_: web.Request) -> web.Response:
        now = state()
        return web.json_response(now, status=200 if all(now.values()) else 503)

    async def measure(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=encode(registry), headers={hdrs.CONTENT_TYPE: content_type})

    app = web.Application()
    app.router.add_get("/healthz", answer)
    app.router.add_get("/metrics", measure)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
    finally:
        await runner.cleanup()
