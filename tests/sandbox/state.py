"""What one running provider holds: settings, grants, planned faults and the request journal."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from .faults import Faults
from .grants import Grants, Settings

JOURNAL_LENGTH = 10_000
FORM_TYPE = "application/x-www-form-urlencoded"


@dataclass
class Call:
    """One request to a protocol endpoint, read in full, and what became of it."""

    endpoint: str
    method: str
    form: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: str
    repeats: bool
    outcome: int | str = "unanswered"

    @property
    def parameters(self) -> dict[str, str]:
        return self.query if self.method == "GET" else self.form

    def as_json(self) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "method": self.method,
            "form": self.form,
            "query": self.query,
            "headers": self.headers,
            "body": self.body,
            "outcome": self.outcome,
        }


class Sandbox:
    """Everything a test may change, and `reset` puts back."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.settings = Settings()
        self.grants = Grants()
        self.faults = Faults()
        self.journal: deque[Call] = deque(maxlen=JOURNAL_LENGTH)


SANDBOX = web.AppKey("sandbox", Sandbox)
CALL = web.RequestKey("call", Call)


async def read_call(endpoint: str, request: web.Request) -> Call:
    """The request as the journal keeps it: the first of repeated names, headers in lower case."""
    body = await request.read()
    form = form_pairs(request, body)
    query = list(request.query.items())
    return Call(
        endpoint=endpoint,
        method=request.method,
        form=first_values(form),
        query=first_values(query),
        headers=first_values((name.lower(), value) for name, value in request.headers.items()),
        body=body.decode("latin-1"),
        repeats=any(len(pairs) != len(dict(pairs)) for pairs in (form, query)),
    )


def form_pairs(request: web.Request, body: bytes) -> list[tuple[str, str]]:
    """The fields of an urlencoded body; any other body has none."""
    if request.content_type != FORM_TYPE:
        return []
    return parse_qsl(body.decode(errors="replace"), keep_blank_values=True)


def first_values(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in pairs:
        values.setdefault(name, value)
    return values
