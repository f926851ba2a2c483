"""What most unit tests need: a database of their own, and a clock that they set."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from doorward_server import models, settings
from doorward_server.clock import Clock
from doorward_server.database import Database, open_database
from tests.engines import ENGINES, contents
from tests.unit.command_line import Here, make_home, within


class StoppedClock(Clock):
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    def advance(self, by: timedelta) -> None:
        self.time += by


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = open_database(ENGINES.database_url(tmp_path / "doorward.db"), busy_timeout=5)
    database.migrate()
    models.bind(database)
    yield database
    database.close()
    ENGINES.forget(database.url)


def in_files(database: Database, text: str) -> bool:
    """Whether a text stands in clear in the database's files."""
    return text.encode() in contents(database)


# Of the command line


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    return within(capfd, monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = make_home(tmp_path)
    url = settings.load(home).database_url
    yield home
    ENGINES.forget(url)
