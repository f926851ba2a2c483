"""How log lines look: one JSON object a line on stderr. Imports nothing of the project.

No line ever carries a token, a key or what a user wrote.
"""

import logging
import re
import sys
import traceback
from typing import Any

import structlog

Log = structlog.typing.FilteringBoundLogger


# Of disnake's lines: what stands there may be a URL that holds a token.
_PLACEHOLDERS = re.compile(r"%[0-9.]*[a-z]")


class _Relayed(logging.Handler):
    """disnake's own lines, without their values: those may be URLs that hold tokens."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning("disnake", message=_PLACEHOLDERS.sub("…", str(record.msg)), logger=record.name)


def make_log(level: str) -> Log:
    """A logger that writes lines of `level` and above to stderr, disnake's warnings too."""
    log: Log = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    # What it says of intents and of voice, which the bot has no use for.
    for name in ("disnake.state", "disnake.client"):
        logging.getLogger(name).setLevel(logging.ERROR)
    relayed = logging.getLogger("disnake")
    relayed.handlers[:] = [_Relayed(log)]
    relayed.propagate = False
    return log


def describe(failure: BaseException) -> dict[str, Any]:
    """The fields that tell of an unexpected exception without its text."""
    frames = traceback.extract_tb(failure.__traceback__)
    return {
        "exception": type(failure).__qualname__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-5:]],
    }
