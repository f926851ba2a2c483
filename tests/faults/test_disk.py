"""A disk that is full while the server runs: clear answers, nothing damaged, and on again when there is room."""

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest

from tests.contract.test_request_api_key import ALLOWED, CALLBACK, NO_LIMITS, by_form, snowflake
from tests.processes import await_condition
from tests.sandbox.client import SandboxProvider
from tests.stack import make_stack, rest

pytestmark = pytest.mark.sqlite
STATUS = "/api/v1/users/me/integrations/kai/flo"


def test_full_and_free_again(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> None:
    stack = make_stack(tmp_path / "home", logs, provider, secrets, NO_LIMITS + ALLOWED, DOORWARD_LOG_ACCESS="false")
    person = stack.person()
    headers = {"cookie": f"doorward_session={person.cookie}"}
    accepted = []

    def ask() -> httpx.Response:
        state = f"state-{snowflake()}"
        answer = by_form(stack, {"name": "Bot", "userid": snowflake(), "callback": CALLBACK, "state": state})
        if answer.status_code == 200:
            accepted.append(state)
        return answer

    with stack.server() as server, stack.gateway():
        assert ask().status_code == 200
        process = psutil.Process(server.pid)
        unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
        # No file of the server's may grow beyond where the largest one is now: as on a full disk.
        largest = max(path.stat().st_size for path in stack.home.iterdir())
        process.rlimit(psutil.RLIMIT_FSIZE, (largest + 65536, resource.RLIM_INFINITY))
        await_condition(lambda: ask().status_code == 503, "a refusal")
        refused = ask()
        assert (refused.status_code, refused.text) == (503, "service unavailable")
        assert refused.headers["retry-after"] == "1"
        # What only reads goes on.
        assert rest(stack, "GET", STATUS, headers=headers).json() == {"authStatus": False}
        failed = rest(stack, "DELETE", "/api/auth/session", headers=headers)
        assert (failed.status_code, failed.json()["details"][0]["reason"]) == (503, "STORAGE_UNAVAILABLE")
        process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
        await_condition(lambda: ask().status_code == 200, "an acceptance")
        assert rest(stack, "DELETE", "/api/auth/session", headers=headers).status_code == 200
    with closing(sqlite3.connect(stack.home / "doorward.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        kept = {bytes(state).decode() for (state,) in database.execute("SELECT state FROM consent_requests")}
    assert set(accepted) == kept
    assert stack.app.audit.verify().is_intact
    assert '"unexpected"' not in server.output()
