"""The units of deploy/systemd/: what systemd says of them, and whether what they start and set exists."""

import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from doorward_bot import settings as bot_settings
from doorward_gateway import settings as gateway_settings
from doorward_server import settings as server_settings
from tests.processes import BIN, ROOT, clean_environment
from tests.unit.command_line import make_home

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
_INSTALLED = "/opt/doorward/bin"
# What `systemd-analyze security` may find at most, in tenths of its points from 0 to 10; what is left is the network,
# and being among the other services of the machine.
_EXPOSURE = 15

services = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def directives(unit: Path) -> dict[str, list[str]]:
    """The values of each directive of a unit, in order; no name is in two sections."""
    found = defaultdict(list)
    for line in unit.read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


def environment(unit: Path) -> dict[str, str]:
    return dict(value.split("=", 1) for value in directives(unit)["Environment"])


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with what they start where it is."""
    for unit in (ROOT / "deploy" / "systemd").glob("doorward*.[st]*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace(_INSTALLED, str(BIN)))
    return tmp_path


def analyze(folder: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    # The colon: and then where systemd itself looks.
    environment = {**clean_environment({}), "SYSTEMD_UNIT_PATH": f"{folder}:"}
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
def test_systemd_takes_the_units(installed: Path) -> None:
    units = [*installed.glob("*.service"), *installed.glob("*.target")]
    done = analyze(installed, "verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(units) == 5


@needs_systemd
def test_systemd_refuses_a_unit_with_a_mistake(installed: Path) -> None:
    """What the test above would tell."""
    unit = installed / "doorward.service"
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=gentle"))
    assert "gentle" in analyze(installed, "verify", "--man=no", unit).stderr


@needs_systemd
@services
def test_the_unit_is_shut_in(installed: Path, unit: Path) -> None:
    done = analyze(installed, "security", "--offline=true", f"--threshold={_EXPOSURE}", installed / unit.name)
    assert done.returncode == 0, done.stdout


@services
def test_what_it_starts_exists(unit: Path) -> None:
    (start,) = directives(unit)["ExecStart"]
    program, *arguments = shlex.split(start)
    command = [program.replace(_INSTALLED, str(BIN)), *arguments, "--help"]
    done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@services
def test_what_it_sets_are_settings(unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = environment(unit)
    assert given
    if "doorward-bot" in unit.name:
        for name, value in given.items():
            (tmp_path / Path(value).name).write_text("a-token")
            given[name] = value.replace("%d", str(tmp_path))
        settings = bot_settings.load(given)
        assert settings.discord_token.get_secret_value() == settings.doorward_bot_token.get_secret_value() == "a-token"
        handed = {value.split(":")[0] for value in directives(unit)["LoadCredential"]}
        assert handed == {Path(value).name for value in given.values()}
        return
    home = make_home(tmp_path)
    assert given["DOORWARD_HOME"] == "/var/lib/doorward"
    for name, value in (given | {"DOORWARD_HOME": str(home)}).items():
        monkeypatch.setenv(name, value)
    load = gateway_settings.load if "gateway" in unit.name else server_settings.load
    assert load().workers == int(given.get("DOORWARD_WORKERS", "1"))


def test_the_gateway_knows_of_every_worker() -> None:
    server, gateway = (ROOT / "deploy" / "systemd" / name for name in ("doorward.service", "doorward-gateway.service"))
    for name in ("Environment", "EnvironmentFile", "User"):
        assert directives(server)[name] == directives(gateway)[name]
    assert int(environment(server)["DOORWARD_WORKERS"]) > 1, "a reload would end the only one"


@services
def test_it_is_stopped_as_it_stops_by_itself(unit: Path) -> None:
    """Its first process alone is told to end, and has the time for it that the docs say, twice."""
    found = directives(unit)
    assert found["KillMode"] == ["mixed"]
    assert int(found["TimeoutStopSec"][0]) >= 2 * 5
    assert found["Restart"] == ["on-failure"]
    assert found["WantedBy"] == found["PartOf"] == ["doorward.target"]
