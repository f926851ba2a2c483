"""The provider as a process: its routes, its log, its command line, its start and end."""

import argparse
import logging
import os
import ssl
import sys
import traceback
from pathlib import Path

import trustme
from aiohttp import web

from . import control, frontend, oauth
from .serving import port_number, run
from .state import CALL, SANDBOX, Sandbox

DEFAULT_PORT = "9100"
LONGEST_LINE = 1 << 16  # codes may be long, and travel in addresses
NAME = "sandbox provider"

log = logging.getLogger("sandbox")


def main() -> int:
    arguments = _parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # aiohttp reports malformed requests with their text, which may hold a secret.
    logging.getLogger("aiohttp.server").disabled = True
    return run(
        NAME,
        build_app,
        arguments.host,
        arguments.port,
        tls=_tls_context(arguments.tls_name, arguments.ca_out) if arguments.tls else None,
        max_line_size=LONGEST_LINE,
        max_field_size=LONGEST_LINE,
    )


def build_app() -> web.Application:
    app = web.Application(middlewares=[log_request])
    app[SANDBOX] = Sandbox()
    token = oauth.endpoint("token", oauth.token)
    app.add_routes(
        [
            web.get("/", frontend.index),
            web.get("/healthz", frontend.health),
            web.get("/authorize", frontend.ask_consent),
            web.post("/authorize", frontend.take_consent),
            web.get(frontend.CALLBACK_PATH, frontend.callback),
            web.post("/token", token),
            web.get("/token", token, allow_head=False),
            web.post("/revoke", oauth.endpoint("revoke", oauth.revoke)),
            web.get("/lookup", oauth.endpoint("lookup", oauth.lookup), allow_head=False),
            web.route("*", "/elsewhere", oauth.endpoint("elsewhere", oauth.elsewhere)),
            *control.routes,
        ]
    )
    return app


@web.middleware
async def log_request(request: web.Request, handler: oauth.Handler) -> web.StreamResponse:
    """Log one line: the route, never the address, for that may hold a code or token."""
    outcome: int | str = "client left"
    try:
        response = await handler(request)
    except web.HTTPException as refusal:
        outcome = refusal.status
        raise
    except ConnectionError:
        raise
    except Exception as error:
        outcome = 500
        frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
        # Where it happened, not what it says: messages quote the values they are about.
        log.error("%s in a handler\n%s", type(error).__name__, frames)
        raise
    else:
        outcome = response.status
        return response
    finally:
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else "(unknown path)"
        call = request.get(CALL)
        log.info("%s %s %s", request.method, path, call.outcome if call else outcome)


def _tls_context(name: str, ca_out: Path | None) -> ssl.SSLContext:
    authority = trustme.CA()
    if ca_out is not None:
        authority.cert_pem.write_to_path(ca_out)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sandbox.provider", description="A stand-in OAuth 2 provider."
    )
    port = os.environ.get("DOORWARD_SANDBOX_PORT") or DEFAULT_PORT
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port_number, default=port, help="0 chooses a free one")
    parser.add_argument("--tls", action="store_true", help="serve https by a certificate of its own")
    parser.add_argument("--tls-name", default="127.0.0.1", help="whom the certificate names")
    parser.add_argument("--ca-out", type=Path, metavar="FILE", help="where to write the CA's PEM")
    arguments = parser.parse_args()
    if arguments.ca_out and not arguments.tls:
        parser.error("--ca-out needs --tls")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
