"""The README's first screen, as a new user would type it: `make up`, its lines, and Ctrl-C."""

import contextlib
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
from tests.sandbox.discord.client import Discord

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ports = {
        f"DOORWARD_{name}_PORT": str(free_port())
        for name in ("GATEWAY", "GATEWAY_ADMIN", "GRPC", "SANDBOX", "SANDBOX_RECEIVER", "SANDBOX_DISCORD")
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


def type_in(script: str, environment: dict[str, str]) -> str:
    """What lines of the README print in a shell."""
    script = script.replace(".venv/bin/", "")
    for port, name in (("8080", "GATEWAY"), ("9100", "SANDBOX"), ("9200", "SANDBOX_RECEIVER")):
        script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{environment[f'DOORWARD_{name}_PORT']}")
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_readmes_lines(up: Process, environment: dict[str, str]) -> None:
    """As ada picks her keys on the stand-in's page, which has a test of its own, somebody clicks for her here."""
    scripts = [block("connect a user's `flo` account"), block("With `make up` running"), block("ada has two keys")]
    expected = "created user 1 (ada)\n" + block("The five requests print") + block("made, linked and logged in")
    assert type_in("".join(scripts), environment) == expected + block("These lines print")
    discord = Discord(f"http://127.0.0.1:{environment['DOORWARD_SANDBOX_DISCORD_PORT']}")
    with contextlib.closing(discord):
        ada = discord.user("ada")
        prompt = ada.await_message("My super bot!")
        ada.select(prompt, "2. alt", "1. main")
        ada.click(ada.await_change(prompt), "Share selected (2)")
        up.await_output(block("The receiver prints").strip())
        asked, granted = block("answer in the user's place").splitlines()[0], block("answer in the user's place")
        assert type_in(f"ADA={ada.id}\n{asked}\n", environment) == "OK\n"
        ada.await_message(lambda message: bool(message.buttons))
    # The same request again is the same request.
    assert type_in(f"ADA={ada.id}\n{granted}", environment) == block("has an id of its own")
    up.await_output('state="abc" api_keys="EXAMPLE-KEY-1"')


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
    for variable in ("DOORWARD_SANDBOX_PORT", "DOORWARD_SANDBOX_RECEIVER_PORT"):
        changed = {**environment, variable: "1"}
        done = subprocess.run(command, cwd=ROOT, env=changed, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        ports = f"{environment['DOORWARD_SANDBOX_PORT']} and {environment['DOORWARD_SANDBOX_RECEIVER_PORT']}"
        assert f"allows stand-ins on the ports {ports}, but" in done.stderr


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
