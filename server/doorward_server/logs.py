"""How log lines look: one JSON object a line on stderr. Imports nothing of the project.

No line ever carries a token, a code, a cookie or a key. That is why an unexpected exception is
logged by its type and the places it passed through, never by its text: a library may have put a
URL or a parameter into it.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from typing import Any, Literal

import structlog

Level = Literal["debug", "info", "warning", "error"]
Log = structlog.typing.FilteringBoundLogger


# One encoder for all lines: json.dumps makes a new one per call as soon as it is given an option.
_encoder = json.JSONEncoder(default=repr)


def _to_json(line: dict[str, Any], **_options: Any) -> str:
    return _encoder.encode(line)


class _Lines:
    """Writes each line by one system call, so that lines of threads and processes do not mix."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk or a reader that is gone must not fail a call
            os.write(self._descriptor, f"{line}\n".encode())

    debug = info = warning = error = msg


def make_log(level: Level) -> Log:
    """A logger that writes lines of `level` and above to stderr."""
    # Without a stderr its number may by now be some other file's, such as the database's.
    descriptor = sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY)
    log = structlog.wrap_logger(
        _Lines(descriptor),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    # Bound once: the lazy logger would put itself together anew for every line.
    return log.bind()  # type: ignore[no-any-return]


def describe(failure: BaseException) -> dict[str, Any]:
    """The fields that tell of an unexpected exception without its text."""
    frames = traceback.extract_tb(failure.__traceback__)
    return {
        "exception": type(failure).__qualname__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
