"""The README's first screen, as a new user would type it: `make up`, its lines, and Ctrl-C."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from doorward_gateway import settings as gateway_settings
from doorward_server import settings as server_settings
from doorward_server.providers import Provider
from tests.processes import BIN, ROOT, Process, clean_environment, free_port

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ports = {
        f"DOORWARD_{name}_PORT": str(free_port())
        for name in ("GATEWAY", "GATEWAY_ADMIN", "GRPC", "SANDBOX", "SANDBOX_RECEIVER")
    }
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    home = tmp_path_factory.mktemp("readme") / "home"
    environment = {**clean_environment({"DOORWARD_HOME": str(home), "PATH": path}), **ports}
    del environment["PYTHONWARNINGS"]  # honcho is not ours to keep free of warnings
    return environment


@pytest.fixture(scope="module")
def up(environment: dict[str, str], logs: Path) -> Iterator[Process]:
    process = Process(["make", "up"], logs / "make-up.log", environment)
    try:
        process.await_output("Ctrl-C stops everything")
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.signal(signal.SIGTERM)
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == [], "make up left processes behind"


def block(after: str) -> str:
    """The first fenced block after a text."""
    match = re.compile(r"```\w*\n(.*?)```", re.DOTALL).search(README, README.index(after))
    assert match is not None
    return match[1]


def test_the_readmes_lines(up: Process, environment: dict[str, str]) -> None:
    scripts = [
        block("connect a user's `flo` account"),
        block("With `make up` running"),
        block("in the Discord bot's place"),
    ]
    script = "".join(scripts).replace(".venv/bin/", "")
    for port, name in (("8080", "GATEWAY"), ("9100", "SANDBOX"), ("9200", "SANDBOX_RECEIVER")):
        script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{environment[f'DOORWARD_{name}_PORT']}")
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = "created user 1 (ada)\n" + block("The five requests print") + block("made, linked and logged in")
    assert done.stdout == expected + block("These lines print")
    up.await_output(block("The receiver prints").strip())


@pytest.mark.usefixtures("up")
def test_a_second_init_changes_nothing(environment: dict[str, str]) -> None:
    home = Path(environment["DOORWARD_HOME"])
    before = {name: (home / name).read_bytes() for name in ("doorward.toml", "master.key")}
    done = subprocess.run(
        [BIN / "doorward", "init"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"nothing to do: {home} has all it needs\n")
    assert before == {name: (home / name).read_bytes() for name in before}


def test_a_changed_port_of_the_stand_in_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    """The settings of an earlier `make up` are for its port: sending codes elsewhere would only confuse."""
    environment = {**environment, "DOORWARD_HOME": str(tmp_path)}
    command = [str(BIN / "python"), "-m", "tests.sandbox.settings"]
    text = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    (tmp_path / "doorward.toml").write_text(text)
    changed = {**environment, "DOORWARD_SANDBOX_PORT": "1"}
    done = subprocess.run(command, cwd=ROOT, env=changed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"is for a stand-in provider on port {environment['DOORWARD_SANDBOX_PORT']}" in done.stderr


def test_every_setting_is_documented() -> None:
    documented = (ROOT / "docs" / "settings.md").read_text()
    sections = {name: field.annotation for name, field in server_settings.Settings.model_fields.items()}
    sections["gateway"] = gateway_settings.GatewaySection
    kinds = (server_settings.Section, gateway_settings.GatewaySection)
    missing = []
    for name, section in sections.items():
        if isinstance(section, type) and issubclass(section, kinds):
            rows = "".join(line for line in documented.splitlines() if f"`[{name}] " in line)
            missing += [f"[{name}] {key}" for key in section.model_fields if not re.search(rf"\b{key}`", rows)]
    providers = documented[documented.index("## Providers") :]
    missing += [f"[providers] {key}" for key in Provider.model_fields if key != "id" and f"`{key}`" not in providers]
    assert missing == []
