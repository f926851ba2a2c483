"""A callback receiver in a process of its own, for tests and for people.

Every POST outside of `/_sandbox/` is a callback: it is printed on one line, recorded, and answered 200 unless a
fault is planned for its path. The control plane speaks JSON, as the stand-in provider's. `Receiver` is its client.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tests.processes import await_condition

from .faults import MEBIBYTE, Fault, spoil
from .serving import port_number, run, started
from .state import FORM_TYPE, JOURNAL_LENGTH

DEFAULT_PORT = "9200"
EVERYWHERE = "*"
GIBIBYTE = 1 << 30
NAME = "callback receiver"
Pairs = list[tuple[str, str]]


class Plan(BaseModel):
    """How callbacks to a path fail: the next `times`, or all of them.

    `kind` is `gigabyte`, or one of the stand-in provider's: `status` (also of redirects, with `headers`), `hang`,
    `trickle_headers`, `trickle_body`, `cut`, `cut_body`, `not_http`. Nothing happens before `delay` seconds.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    kind: str = "status"
    times: int | None = Field(default=None, ge=1)
    status: int = Field(default=200, ge=200, le=599)
    headers: dict[str, str] = {}
    delay: float = Field(default=0.0, ge=0)

    @property
    def fault(self) -> Fault | None:
        """The provider's fault of this kind; None: it is ours. Raises ValidationError when there is none."""
        if self.kind == "gigabyte":
            return None
        return Fault(kind=self.kind, status=self.status, headers=self.headers, content_type="text/plain")


@dataclass(frozen=True)
class Callback:
    """One POST as it came: `pairs` are the fields of a form, `members` the object of a JSON body."""

    path: str
    headers: dict[str, str]
    body: str
    pairs: Pairs
    members: dict[str, Any]
    at: float
    # Whether another one with the same webhook-id was under way.
    overlaps: bool
    status: int | None = None
    ended: bool = False

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def keys(self) -> list[str]:
        """The keys it carries, in order."""
        return [value for name, value in self.pairs if name == "api_keys"] or self.members.get("api_keys", [])

    def field(self, name: str) -> str | None:
        """A field that comes once; None when it does not come."""
        values = [value for field, value in self.pairs if field == name]
        values += [self.members[name]] if name in self.members else []
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None


@dataclass
class _State:
    """Everything that a test may change, and `reset` puts back."""

    plans: dict[str, Plan] = field(default_factory=dict)
    journal: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=JOURNAL_LENGTH))
    under_way: Counter[str] = field(default_factory=Counter)

    def take(self, path: str) -> Plan | None:
        """The plan for the next callback to a path, counted as met."""
        place = path if path in self.plans else EVERYWHERE
        plan = self.plans.get(place)
        if plan is not None and plan.times is not None:
            plan.times -= 1
            if plan.times == 0:
                del self.plans[place]
        return plan


_STATE = web.AppKey("state", _State)
routes = web.RouteTableDef()


@routes.put("/_sandbox/faults")
async def plan_fault(request: web.Request) -> web.Response:
    wanted = await request.json()
    try:
        plan = Plan.model_validate({name: value for name, value in wanted.items() if name != "path"})
        _ = plan.fault
    except ValidationError as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from None
    request.app[_STATE].plans[wanted.get("path", EVERYWHERE)] = plan
    return web.Response(status=204)


@routes.delete("/_sandbox/faults")
async def heal(request: web.Request) -> web.Response:
    request.app[_STATE].plans.clear()
    return web.Response(status=204)


@routes.get("/_sandbox/callbacks")
async def list_callbacks(request: web.Request) -> web.Response:
    path = request.query.get("path")
    return web.json_response([entry for entry in request.app[_STATE].journal if path in (None, entry["path"])])


@routes.post("/_sandbox/reset")
async def reset(request: web.Request) -> web.Response:
    state = request.app[_STATE]
    state.plans.clear()
    state.journal.clear()
    return web.Response(status=204)


@routes.get("/healthz")
async def health(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


@routes.route("*", "/{path:.*}")
async def take_callback(request: web.Request) -> web.StreamResponse:
    """Record it, whatever its method: nothing but POST should come, and a test wants to see the rest."""
    state = request.app[_STATE]
    webhook_id = request.headers.get("webhook-id", "")
    callback = await _read(request, overlaps=bool(webhook_id and state.under_way[webhook_id]))
    entry = asdict(callback)
    state.journal.append(entry)
    print(_line(request.method, callback), flush=True)
    plan = state.take(request.path)
    state.under_way[webhook_id] += 1
    try:
        response = await _answer(request, plan or Plan())
        entry["status"] = response.status
        return response
    finally:
        entry["ended"] = True
        state.under_way[webhook_id] -= 1


async def _read(request: web.Request, *, overlaps: bool) -> Callback:
    body = await request.read()
    pairs: Pairs = []
    members: dict[str, Any] = {}
    if request.content_type == FORM_TYPE:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=True, errors="strict")
    elif request.content_type == "application/json":
        members = json.loads(body.decode())
    return Callback(
        path=request.path,
        headers={name.lower(): value for name, value in request.headers.items()},
        body=body.decode("latin-1"),
        pairs=pairs,
        members=members,
        at=time.monotonic(),
        overlaps=overlaps,
    )


def _line(method: str, callback: Callback) -> str:
    fields = callback.pairs or callback.members.items()
    shown = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields)
    return f"{method} {callback.path} {shown or '(no fields)'}"


async def _answer(request: web.Request, plan: Plan) -> web.StreamResponse:
    await asyncio.sleep(plan.delay)
    return await _send_gigabyte(request) if plan.fault is None else await spoil(request, plan.fault)


async def _send_gigabyte(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(GIBIBYTE // MEBIBYTE):
        await response.write(b"x" * MEBIBYTE)
    return response


# The process


def main() -> int:
    arguments = _parse_arguments()
    return run(NAME, build_app, arguments.host, arguments.port)


def build_app() -> web.Application:
    app = web.Application()
    app[_STATE] = _State()
    app.add_routes(routes)
    return app


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sandbox.receiver", description="A callback receiver.")
    port = os.environ.get("DOORWARD_SANDBOX_RECEIVER_PORT") or DEFAULT_PORT
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port_number, default=port, help="0 chooses a free one")
    return parser.parse_args()


# For tests


class Receiver:
    """A running receiver, at its URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=f"{url}/_sandbox", trust_env=False)

    @property
    def address(self) -> str:
        """Its ip:port."""
        return self.url.partition("://")[2]

    def fault(self, path: str = EVERYWHERE, **plan: Any) -> None:
        """Make the callbacks to a path fail; see Plan."""
        self._send("PUT", "faults", json={"path": path, **plan})

    def heal(self) -> None:
        """End all faults."""
        self._send("DELETE", "faults")

    def reset(self) -> None:
        """Forget faults and callbacks."""
        self._send("POST", "reset")

    def callbacks(self, path: str | None = None) -> list[Callback]:
        """What came, in order; to a path, or anywhere."""
        entries = self._send("GET", "callbacks", params={} if path is None else {"path": path}).json()
        return [Callback(**{**entry, "pairs": [tuple(pair) for pair in entry["pairs"]]}) for entry in entries]

    def await_callbacks(self, path: str, count: int = 1) -> list[Callback]:
        """What came to a path, once there are so many and all are answered."""

        def came() -> bool:
            found = self.callbacks(path)
            return len(found) >= count and all(callback.ended for callback in found)

        await_condition(came, f"{count} callbacks to {path}")
        return self.callbacks(path)

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, json: Any = None, params: Any = None) -> httpx.Response:
        return self._http.request(method, f"/{path}", json=json, params=params).raise_for_status()


@contextlib.contextmanager
def callback_receiver(log: Path) -> Iterator[Receiver]:
    """A receiver in a process of its own. Its log shows users' keys, so it is none of the logs that may not."""
    with started(NAME, "tests.sandbox.receiver", log) as url:
        receiver = Receiver(url)
        try:
            yield receiver
        finally:
            receiver.close()


if __name__ == "__main__":
    sys.exit(main())
