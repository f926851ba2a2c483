"""The stand-in as a process: its routes, its command line, its start and end."""

import argparse
import os
import re
import sys

from aiohttp import web

from tests.sandbox.serving import port_number, run

from . import control, gateway, page, rest
from .state import DEFAULT_TOKEN, DEFAULT_USERS, NAME, WORLD, World

DEFAULT_PORT = "9300"


def main() -> int:
    arguments = _parse_arguments()
    users = dict(arguments.user or DEFAULT_USERS.items())
    return run(NAME, lambda: build_app(World(users, arguments.token)), arguments.host, arguments.port)


def build_app(world: World) -> web.Application:
    app = web.Application(middlewares=[control.refuse_the_impossible])
    app[WORLD] = world
    app[gateway.GATEWAY] = gateway.Gateway(world)
    app.router.add_get(gateway.PATH, gateway.connect)
    app.add_routes([*control.routes, *page.routes])
    rest.add_routes(app)
    app.on_shutdown.append(_drop_connections)
    return app


async def _drop_connections(app: web.Application) -> None:
    app[gateway.GATEWAY].drop()


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
