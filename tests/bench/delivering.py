"""Deliveries against bare POSTs: `doorward work` with a backlog, to a receiver that answers at once."""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.consents import Question, Status
from tests.bench import load, stack
from tests.bench.contenders import Contender, Sample, fetching_contender
from tests.processes import BIN, await_condition, free_port, running

_USER = "80351110224678912"
_PER_SECOND = 800
_OF_PROMPT = 10
_SETTINGS = """
[callbacks]
allow = ["127.0.0.1:{port}"]
per_host = {threads}
[jobs]
threads = {threads}
[limits]
open_per_user = 0
requests_per_address = 0
[log]
level = "warning"
"""
_QUEUED = "SELECT count(*) FROM deliveries WHERE status = 'queued'"


@contextlib.contextmanager
def contenders(folder: Path, work_core: int, load_core: int, *, threads: int) -> Iterator[tuple[Contender, Contender]]:
    """The bare POSTs and the deliveries, both by so many threads."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/callback"
    home = folder / "delivering"
    with contextlib.ExitStack() as opened:
        with stack.on_core(load_core):
            command = [sys.executable, "-m", "tests.bench.peers.receiver", str(port)]
            receiver = opened.enter_context(running(command, folder / "receiver.log"))
        receiver.await_output("serving")
        stack.doorward(home, "init", "--settings", "-", text=_SETTINGS.format(port=port, threads=threads))
        app = App(settings_module.load(home))
        models.bind(app.database)
        opened.callback(app.database.close)
        opened.callback(app.callback_outbound.close)
        app.record_key()
        user = app.discord_users.obtain(_USER)
        key = app.api_keys.add(user, "game", "main", "EXAMPLE-KEY", actor="bench")
        with stack.on_core(work_core):
            worker = opened.enter_context(
                running([BIN / "doorward", "work"], folder / "work.log", {"DOORWARD_HOME": str(home)})
            )
        process = psutil.Process(worker.pid)
        prompts = itertools.count(1)

        def queued() -> int:
            row = app.database.fetch_one(_QUEUED, ())
            assert row is not None
            return int(row[0])

        def run(seconds: float) -> Sample:
            number = round(seconds * _PER_SECOND)
            process.suspend()  # it looks for jobs, and there are none: it holds nothing that others wait for
            for _ in range(number // _OF_PROMPT):
                # Requests of one callback are answered together.
                callback = f"{url}/{next(prompts)}"
                asked = [Question("bench", _USER, callback, f"{state}") for state in range(_OF_PROMPT)]
                ids = [app.consents.request(question, None, "") for question in asked]
                app.consents.resolve(ids[0], Status.GRANTED, [key.id], actor="bench")
            before = stack.cpu_seconds(process)
            process.resume()
            # The worker looks for other processes' jobs twice a second: its clock starts when it has found them.
            await_condition(lambda: queued() < number, "the first delivery")
            first, started = queued(), time.perf_counter()
            # To a tenth: the last ones wait for their turn, and leave the processor idle.
            await_condition(lambda: queued() < number // 10, "most deliveries", patience=60)
            elapsed, done = time.perf_counter() - started, first - queued()
            sample = Sample(load.Result(done, elapsed, 0.0, ()), stack.cpu_seconds(process) - before)
            await_condition(lambda: queued() == 0, "every delivery", patience=60)
            return sample

        yield (
            fetching_contender("bare POST with httpx", url, threads, work_core, "--post"),
            Contender("deliveries", run),
        )
