"""PostgreSQL goes away under load and comes back: what was answered OK is kept, all others are told to come again."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.contract.test_request_api_key import ALLOWED, CALLBACK, NO_LIMITS, snowflake
from tests.engines import IN_TESTS, Postgresql, postgresql_server
from tests.processes import BIN, await_condition, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.stack import Person, Stack, make_stack

STATUS = "/api/v1/users/me/integrations/kai/flo"
# Seconds from PostgreSQL's first answer until Doorward's.
RECOVERY = 5.0
RESTARTS, SOAK_RESTARTS = 1, 10


@pytest.fixture
def postgresql() -> Iterator[Postgresql]:
    with postgresql_server(*IN_TESTS) as server:
        yield server


@pytest.fixture
def away_stack(
    tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str], postgresql: Postgresql
) -> Iterator[Stack]:
    """Two servers, a worker and a gateway on one PostgreSQL."""
    database = f'[database]\nurl = "{postgresql.new_database()}"\nbusy_timeout = 2\n'
    stack = make_stack(tmp_path / "home", logs, provider, secrets, f"{NO_LIMITS}{ALLOWED}{database}")
    other = free_port()
    sockets = [f"unix:{stack.home}/doorward-{port}.sock" for port in (stack.grpc_port, other)]
    stack.environment["DOORWARD_GATEWAY_UPSTREAMS"] = ",".join(sockets)
    work = running([BIN / "doorward", "work"], logs / "worker-of-postgresql.log", stack.environment)
    with stack.server(), stack.server(other), work, stack.gateway():
        yield stack


@dataclass
class Load:
    """Threads that ask again and again, and what they were told."""

    stack: Stack
    person: Person
    statuses: Counter[int] = field(default_factory=Counter)
    without_retry_after: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        threads = [threading.Thread(target=act) for act in (self._read, self._read, self._ask, self._ask)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.stack.url, trust_env=False, verify=False, timeout=20)

    def _read(self) -> None:
        with self._client() as client:
            while not self._stop.is_set():
                self._note(client.get(STATUS, headers={"cookie": f"doorward_session={self.person.cookie}"}))

    def _ask(self) -> None:
        with self._client() as client:
            while not self._stop.is_set():
                state = f"state-{next(self._numbers)}"
                form = {"name": "Bot", "userid": snowflake(), "callback": CALLBACK, "state": state}
                if self._note(client.post("/requestapikey", data=form)) == 200:
                    self.accepted.append(state)

    def _note(self, answer: httpx.Response) -> int:
        self.statuses[answer.status_code] += 1
        if answer.status_code == 503 and "retry-after" not in answer.headers:
            self.without_retry_after.append(answer.text)
        return answer.status_code

    def has(self, status: int, number: int) -> bool:
        return self.statuses[status] > number

    def accepts_more_than(self, number: int) -> bool:
        return len(self.accepted) > number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=["restarted", "crashed"])
def test_restarted_under_load(away_stack: Stack, postgresql: Postgresql, number: signal.Signals, soaking: bool) -> None:
    load = Load(away_stack, away_stack.person())
    with load.running():
        for _ in range(SOAK_RESTARTS if soaking else RESTARTS):
            served, refused = load.statuses[200], load.statuses[503]
            await_condition(partial(load.has, 200, served + 50), "answers")
            postgresql.stop(number)
            await_condition(partial(load.has, 503, refused + 20), "refusals")
            postgresql.start()
            back = time.monotonic()
            await_condition(partial(load.accepts_more_than, len(load.accepted)), "a change after the restart")
            assert time.monotonic() - back < RECOVERY
    assert set(load.statuses) == {200, 503}, load.statuses
    assert load.without_retry_after == []
    database = away_stack.app.database
    kept = {bytes(state).decode() for (state,) in database.fetch_rows("SELECT state FROM consent_requests", ())}
    assert set(load.accepted) <= kept
    assert away_stack.app.audit.verify().is_intact
