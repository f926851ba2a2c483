"""The documented HTTP route of the KeyBroker: reads its fields, and answers in plain text."""

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from google.api.httpbody_pb2 import HttpBody

from doorward_server.consents import Question
from doorward_server.errors import CallError, ParameterMissing, ResourceExhausted, Unavailable
from doorward_server.rpc.headers import RequestMetadata, text_of
from doorward_server.rpc.status import Metadata

# What the gateway makes the answer's status of.
_STATUS = "x-doorward-status"
_MOST_FIELDS = 1000
_UNAVAILABLE = "service unavailable"


def read_question(metadata: RequestMetadata, form: HttpBody) -> Question:
    """The fields of the query and the body; the query wins, and the first value. Raises ParameterMissing."""
    _, _, query = text_of(metadata.get("x-envoy-original-path")).partition("?")
    try:
        fields = _body_fields(form) | _first_values(query)
    except (ValueError, RecursionError):
        raise ParameterMissing from None
    return Question(*(fields.get(name, "") for name in ("name", "userid", "callback", "state")))


def answer(ask: Callable[[], object]) -> tuple[HttpBody, Metadata]:
    """What an attempt comes to: the answer's text, and the metadata that hold its status."""
    try:
        ask()
    except Unavailable:
        return _text(_UNAVAILABLE), ((_STATUS, "503"),)
    except ResourceExhausted as refusal:
        retry_after = refusal.metadata.get("retry_after", "1")
        return _text(refusal.message), ((_STATUS, "429"), ("retry-after", retry_after))
    except CallError as refusal:
        return _text(refusal.message), ((_STATUS, "400"),)
    return _text("OK"), ()


def _text(words: str) -> HttpBody:
    return HttpBody(content_type="text/plain; charset=utf-8", data=words.encode())


def _body_fields(form: HttpBody) -> dict[str, str]:
    match form.content_type.partition(";")[0].strip().lower():
        case "application/x-www-form-urlencoded":
            return _first_values(form.data.decode())
        case "application/json":
            return _json_fields(form.data)
        case _:
            return {}


def _first_values(encoded: str) -> dict[str, str]:
    pairs = parse_qsl(encoded, keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    return dict(reversed(pairs))


def _json_fields(data: bytes) -> dict[str, str]:
    """The members that are strings; `userid` may be an integer, too."""
    members = json.loads(data.decode(), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    if not isinstance(members, dict):
        raise ValueError("the body is no JSON object")  # noqa: TRY004 - as what does not decode
    fields: dict[str, str] = {name: _string(name, value) for name, value in members.items()}
    for value in fields.values():
        value.encode()  # lone surrogates are no text
    return fields


def _string(name: str, value: Any) -> str:
    if name == "userid" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else ""
