"""The worker's claim of a job, and the bot's lease of a prompt: in small tables, and in large ones."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import App
from tests.bench import load, stack
from tests.bench.contenders import Contender, Sample

_FEW = 4_000
_LEASE = timedelta(hours=1)
_FINISHED = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?)
INSERT INTO consent_requests (prompt_id, discord_user, name, callback, state, address, status, lease_epoch,
                              lease_expires_at, deadline_at, created_at, finished_at)
SELECT i, 'user-' || i, 'bench', 'https://example.com/callback', x'', '192.0.2.1', 'granted', 1, 0, 0, 0, 1 FROM n
"""
_DELIVERED = """
INSERT INTO deliveries (request_id, webhook_id, status, carried_keys, attempts, created_at, finished_at)
SELECT id, 'msg_' || id, 'sent', 1, 1, 0, 1 FROM consent_requests WHERE id <= ?
"""
# What is kept of jobs that are over: those that were given up.
_ABANDONED = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?)
INSERT INTO jobs (kind, payload, attempts, created_at) SELECT 'delivery', randomblob(150), 8, 0 FROM n
"""
_OVER = (_FINISHED, _DELIVERED, _ABANDONED)
_WAITING_JOBS = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?)
INSERT INTO jobs (kind, payload, run_at, attempts, created_at) SELECT 'delivery', randomblob(150), i, 0, 0 FROM n
"""
_WAITING_PROMPTS = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?)
INSERT INTO consent_requests (prompt_id, discord_user, name, callback, state, address, status, lease_epoch,
                              lease_expires_at, deadline_at, created_at)
SELECT i + (SELECT count(*) FROM consent_requests), 'asked-' || i,
       'bench', 'https://example.com/callback', x'', '192.0.2.1', 'pending', 0, i, 4102444800000000, 0 FROM n
"""
_AGAIN = (
    "UPDATE jobs SET run_at = id, attempts = 0 WHERE attempts = 1",
    "UPDATE consent_requests SET lease_expires_at = id, lease_epoch = 0 WHERE lease_epoch = 1 AND status = 'pending'",
)


@contextlib.contextmanager
def contenders(folder: Path, *, finished: int, waiting: int) -> Iterator[tuple[Contender, ...]]:
    """Claims in the small table and in the large one, then leases in both."""
    with contextlib.ExitStack() as opened:
        few = opened.enter_context(_opened(folder / "claims-few", 0, _FEW))
        many = opened.enter_context(_opened(folder / "claims-many", finished, waiting))
        rows = f"{finished + waiting:,} rows"
        yield (
            _contender(f"claim, {_FEW:,} rows", few, _claim),
            _contender(f"claim, {rows}", many, _claim),
            _contender(f"lease, {_FEW:,} rows", few, _lease),
            _contender(f"lease, {rows}", many, _lease),
        )


@contextlib.contextmanager
def _opened(home: Path, finished: int, waiting: int) -> Iterator[App]:
    stack.doorward(home, "init")
    app = App(settings_module.load(home))
    with app.database.writing():
        for statement in _OVER:
            app.database.execute(statement, (finished,))
        app.database.execute(_WAITING_JOBS, (waiting,))
        app.database.execute(_WAITING_PROMPTS, (waiting,))
    try:
        yield app
    finally:
        app.database.close()


def _contender(name: str, app: App, claim: Callable[[App], bool]) -> Contender:
    def run(seconds: float) -> Sample:
        models.bind(app.database)
        for statement in _AGAIN:
            with app.database.writing():
                app.database.execute(statement, ())
        number, started, cpu = 0, time.perf_counter(), time.process_time()
        while number < _FEW and time.perf_counter() < started + seconds:
            if not claim(app):
                raise load.WrongAnswer("nothing was left to be claimed")
            number += 1
        used = time.process_time() - cpu
        return Sample(load.Result(number, time.perf_counter() - started, 0.0, ()), used)

    return Contender(name, run)


def _claim(app: App) -> bool:
    return app.jobs.claim(_LEASE) is not None


def _lease(app: App) -> bool:
    return bool(app.consents.lease(1, _LEASE, 0.0))
