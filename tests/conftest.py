"""Fixtures of all tests: the stack, and the canary that no log of the whole run holds a secret."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ENGINES, Engines, contents
from tests.sandbox.client import SandboxProvider
from tests.stack import Stack, make_stack, sandbox_provider

# What the stand-in provider issues, and a master key, can be told by their form.
_SECRET_FORMS = re.compile(rb"(?:access|refresh|code)-[\w-]{32}|doorward-key-1:[0-9a-f]{8}:[\w-]{20}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the fault tests at their full counts")
    parser.addoption("--engine", choices=["sqlite", "postgresql"], default="sqlite", help="where databases are")


# Whoever needs none of these has no database, and nothing to do with its engine.
_WITH_DATABASE = {
    "application",
    "database",
    "home",
    "house",
    "make_house",
    "provider",
    "scene",
    "shared_provider",
    "world",
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Modules of few, slow tests come first, or one process would be at them long after the others have ended."""
    items.sort(key=lambda item: "faults" not in item.path.parts)
    if config.getoption("--engine") != "sqlite":
        items[:] = [item for item in items if _WITH_DATABASE & {*getattr(item, "fixturenames", ())}]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--engine") != "sqlite" and item.get_closest_marker("sqlite"):
        pytest.skip("it is about SQLite's own ways")


@pytest.fixture(scope="session", autouse=True)
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    """Where the tests' databases are made."""
    ENGINES.is_postgresql = request.config.getoption("--engine") == "postgresql"
    yield ENGINES
    ENGINES.close()


@pytest.fixture(scope="session")
def soaking(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--soak"))


def find_secrets(text: bytes, known: set[str]) -> list[bytes]:
    """The secrets that stand in a text: known ones, and whatever has the form of one."""
    return [match[0] for match in _SECRET_FORMS.finditer(text)] + [
        secret.encode() for secret in known if secret.encode() in text
    ]


@pytest.fixture(scope="session")
def secrets() -> set[str]:
    """Every secret that a test makes and that has no form of its own."""
    return set()


@pytest.fixture(scope="session", autouse=True)
def logs(tmp_path_factory: pytest.TempPathFactory, secrets: set[str]) -> Iterator[Path]:
    """The folder that every process of the run logs to; at the end no secret may stand in it."""
    folder = tmp_path_factory.mktemp("logs")
    yield folder
    leaks = {path.name: found for path in folder.iterdir() if (found := find_secrets(path.read_bytes(), secrets))}
    assert not leaks, f"secrets in logs: {leaks}"


@pytest.fixture(scope="session")
def shared_provider(logs: Path) -> Iterator[SandboxProvider]:
    with sandbox_provider(logs / "provider.log") as provider:
        yield provider


@pytest.fixture
def provider(shared_provider: SandboxProvider) -> SandboxProvider:
    """The stand-in provider, in its initial state."""
    shared_provider.reset()
    return shared_provider


@pytest.fixture(scope="session")
def shared_stack(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("stack") / "home"
    more = 'allowed_origins = ["https://app.example"]\n[limits]\nauth_failures = 0\n'
    stack = make_stack(home, logs, shared_provider, secrets, more)
    with stack.server(), stack.gateway():
        yield stack
    # What was stored is sealed or hashed: nothing secret stands there in clear.
    assert not find_secrets(contents(stack.app.database), secrets), "secrets in the database"


@pytest.fixture
def stack(shared_stack: Stack, provider: SandboxProvider) -> Stack:
    """A server and a gateway that all tests share, with a provider in its initial state."""
    return shared_stack
