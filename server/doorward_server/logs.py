"""How log lines look: one JSON object a line on stderr. Imports nothing of the project.

No line ever carries a token, a code, a cookie or a key. That is why an unexpected exception is
logged by its type and the places it passed through, never by its text: a library may have put a
URL or a parameter into it.
"""

import logging
import sys
import traceback
from typing import Any, Literal

import structlog

Level = Literal["debug", "info", "warning", "error"]
Log = structlog.typing.FilteringBoundLogger


def make_log(level: Level) -> Log:
    """A logger that writes lines of `level` and above to stderr."""
    return structlog.wrap_logger(  # type: ignore[no-any-return]
        structlog.WriteLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )


def describe(failure: BaseException) -> dict[str, Any]:
    """The fields that tell of an unexpected exception without its text."""
    frames = traceback.extract_tb(failure.__traceback__)
    return {
        "exception": type(failure).__qualname__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
