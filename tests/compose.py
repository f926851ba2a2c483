"""deploy/compose/compose.yaml as Docker Compose reads it, and its services as processes of this machine."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.processes import BIN, ROOT, free_port

FOLDER = ROOT / "deploy" / "compose"
HOME, CONFIG, SECRETS = "/var/lib/doorward", "/etc/doorward", "/run/secrets"
# ${NAME}, ${NAME:-default} and ${NAME:?what to do}.
VARIABLE = re.compile(r"\$\{(\w+)(?::(?:-(?P<default>[^}]*)|\?[^}]*))?\}")


def example() -> dict[str, str]:
    """The variables of .env.example."""
    lines = (FOLDER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """The whole file, with the variables in it; KeyError when one is missing that has no default."""

    def substitute(match: re.Match[str]) -> str:
        name, default = match[1], match["default"]
        return variables[name] if default is None else variables.get(name, default)

    whole: dict[str, Any] = yaml.safe_load(VARIABLE.sub(substitute, (FOLDER / "compose.yaml").read_text()))
    return whole


def of_ours(whole: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The services that run our image."""
    for name, service in whole["services"].items():
        if not service["image"].startswith("postgres:"):
            yield name, service


@dataclass(frozen=True)
class Rehearsal:
    """How the containers' paths, names and ports are those of this machine."""

    # What prepare.sh made: config/ and secrets/.
    folder: Path
    # What the database's host is to libpq.
    postgres: str
    services: Mapping[str, Any] = field(default_factory=lambda: read(example())["services"])
    _ports: dict[tuple[str, str], int] = field(default_factory=dict)

    def port(self, name: str, port: str) -> int:
        """Which port of this machine is that one of a service's container."""
        return self._ports.setdefault((name, port), free_port())

    def command(self, name: str, *arguments: str) -> list[str | Path]:
        """What a service runs, with other arguments if some are given."""
        service = self.services[name]
        if "entrypoint" in service:
            return [BIN / service["entrypoint"][0], *arguments]
        program, *usual = service["command"]
        return [BIN / program, *(arguments or usual)]

    def healthcheck(self, name: str) -> list[str | Path]:
        """What tells whether a service is well."""
        how, program, *arguments = self.services[name]["healthcheck"]["test"]
        assert (how, program) == ("CMD", "healthy")
        return [sys.executable, FOLDER / "healthy.py", *(self._here(name, argument) for argument in arguments)]

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a service."""
        (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        return {key: self._here(name, value) for key, value in self.services[name]["environment"].items()}

    def _here(self, name: str, text: str) -> str:
        for place, folder in ((HOME, name), (CONFIG, "config"), (SECRETS, "secrets")):
            text = text.replace(place, str(self.folder / folder))
        text = text.replace("@postgres/doorward?", f"@/doorward?host={self.postgres}&").replace("0.0.0.0", "127.0.0.1")
        environment = self.services[name]["environment"]
        for port in {value for key, value in environment.items() if key.endswith("_PORT")}:
            text = re.sub(rf"\b{port}\b(?=[./]|$)", str(self.port(name, port)), text) if ":" in text else text
            text = str(self.port(name, port)) if text == port else text
        # The gateway looks for the name of its settings in the certificate, the bot for the host's.
        text = re.sub(r"\b(server-\d):(\d+)", lambda found: f"127.0.0.1:{self.port(found[1], found[2])}", text)
        return re.sub(r"^server:(\d+)$", lambda found: f"localhost:{self.port('server-1', found[1])}", text)
