"""Metrics: what is counted while the bot runs, for Prometheus. Imports nothing of the project.

Labels hold outcomes and HTTP statuses, never what tells of a user or a callback.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import disnake
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Info, PlatformCollector
from prometheus_client.process_collector import ProcessCollector


class Metrics:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counted: dict[str, Any] = {"namespace": "doorward_bot", "registry": self.registry}
        self._leased = Counter("leased", "Prompts that the server gave out, to be sent or closed.", **counted)
        self._prompts = Counter("prompts", "Prompts by what became of them.", ("outcome",), **counted)
        self._answers = Counter("answers", "Answers of users.", ("by", "outcome"), **counted)
        self._failures = Counter("discord_failures", "Calls of Discord that failed, by status.", ("status",), **counted)
        self._under_way = Gauge("prompts_under_way", "Prompts that are being sent or closed.", **counted)
        self._connected = Gauge("discord_connected", "1 while Discord's gateway is connected.", **counted)
        self._reached = Gauge("server_reached", "1 while the server answers.", **counted)
        Info("build", "The version that runs.", **counted).info({"version": version("doorward")})
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def watch(self, state: Callable[[], dict[str, bool]], under_way: Callable[[], int]) -> None:
        """Read at a scrape: whether `discord` and `server` are reached, and how many prompts are under way."""
        self._connected.set_function(lambda: state()["discord"])
        self._reached.set_function(lambda: state()["server"])
        self._under_way.set_function(under_way)

    def leased(self, prompts: int) -> None:
        """The server gave out so many."""
        self._leased.inc(prompts)

    def prompt_ended(self, outcome: str) -> None:
        """One was "sent", or its user "refused" it, or it "failed" and will be leased again."""
        self._prompts.labels(outcome).inc()

    def answered(self, by: str, outcome: str) -> None:
        """A user's answer, "typed" or "pressed", counted as "granted" or "canceled", or was "late"."""
        self._answers.labels(by, outcome).inc()

    def discord_failed(self, failure: BaseException) -> None:
        """A call of Discord's failed: by the answer's status, or without an answer."""
        status = str(failure.status) if isinstance(failure, disnake.HTTPException) else "none"
        self._failures.labels(status).inc()
