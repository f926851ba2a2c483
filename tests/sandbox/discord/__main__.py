"""The stand-in as a process: its routes, its command line, its start and end."""

import argparse
import asyncio
import os
import re
import signal
import sys

from aiohttp import web

from tests.sandbox.provider import port_number

from . import control, gateway, page, rest
from .state import DEFAULT_TOKEN, DEFAULT_USERS, WORLD, World

DEFAULT_PORT = "9300"
READY = "Discord stand-in on"
SHUTDOWN_TIMEOUT = 0.1  # hanging requests would otherwise be waited for


def main() -> int:
    arguments = _parse_arguments()
    try:
        asyncio.run(serve(arguments))
    except OSError as error:
        print(f"Discord stand-in: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until told to stop, then let go of whoever still waits for an answer."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = build_app(World(dict(arguments.user or DEFAULT_USERS.items()), arguments.token))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_TIMEOUT)
    await runner.setup()
    try:
        await web.TCPSite(runner, arguments.host, arguments.port).start()
        host, port = runner.addresses[0][:2]
        print(f"{READY} http://{host}:{port}", flush=True)
        await stop.wait()
        app[gateway.GATEWAY].drop()
    finally:
        await runner.cleanup()


def build_app(world: World) -> web.Application:
    app = web.Application(middlewares=[control.refuse_the_impossible])
    app[WORLD] = world
    app[gateway.GATEWAY] = gateway.Gateway(world)
    app.router.add_get(gateway.PATH, gateway.connect)
    app.add_routes([*control.routes, *page.routes])
    rest.add_routes(app)
    return app


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sandbox.discord", description="A stand-in for Discord.")
    port = os.environ.get("DOORWARD_SANDBOX_DISCORD_PORT") or DEFAULT_PORT
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port_number, default=port, help="0 chooses a free one")
    parser.add_argument("--token", default=DEFAULT_TOKEN, help="the bot's")
    parser.add_argument(
        "--user", type=_user, action="append", metavar="NAME:SNOWFLAKE", help="a person; may come several times"
    )
    return parser.parse_args()


def _user(text: str) -> tuple[str, str]:
    name, _, snowflake = text.partition(":")
    if not re.fullmatch(r"[a-z0-9_.]{1,32}", name) or not re.fullmatch(r"[1-9][0-9]{0,19}", snowflake):
        raise ValueError
    return name, snowflake


if __name__ == "__main__":
    sys.exit(main())
