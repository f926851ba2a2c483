"""How a stand-in runs as a process, and how tests start one: it tells where it listens, and ends when it is told to."""

import asyncio
import contextlib
import signal
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.processes import BIN, running

_SHUTDOWN_TIMEOUT = 0.1  # hanging requests would otherwise be waited for


def run(
    name: str,
    build: Callable[[], web.Application],
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    **limits: Any,
) -> int:
    """Serve until told to stop; returns the exit code. `limits` are aiohttp's, of a request's head."""
    try:
        asyncio.run(_serve(name, build, host, port, tls, limits))
    except OSError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(
    name: str,
    build: Callable[[], web.Application],
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    limits: dict[str, Any],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    options = {"access_log": None, "handler_cancellation": True, "shutdown_timeout": _SHUTDOWN_TIMEOUT, **limits}
    runner = web.AppRunner(build(), **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
        print(f"{name} on {_origin(runner, 'https' if tls else 'http')}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _origin(runner: web.AppRunner, scheme: str) -> str:
    host, port = runner.addresses[0][:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def port_number(text: str) -> int:
    """What `--port` takes."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


@contextlib.contextmanager
def started(name: str, module: str, log: Path, *options: str) -> Iterator[str]:
    """A stand-in in a process of its own, on a free port; yields its URL."""
    command: list[str | Path] = [BIN / "python", "-m", module, "--port", "0", *options]
    with running(command, log) as process:
        process.await_output(f"{name} on http")
        line = next(line for line in process.output().splitlines() if f"{name} on http" in line)
        yield line.split()[-1]
