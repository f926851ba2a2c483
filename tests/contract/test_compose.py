"""compose.yaml rehearsed without containers: its commands with its environment, its certificates and a PostgreSQL."""

import contextlib
import json
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.compose import FOLDER, Rehearsal
from tests.engines import IN_TESTS, Postgresql, postgresql_server
from tests.processes import Process, await_condition, clean_environment, running
from tests.sandbox.discord.client import Discord, discord_stand_in
from tests.sandbox.receiver import Receiver, callback_receiver

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")

STATUS = "/api/v1/users/me/integrations/kai/flo"
# Each service that goes on, and what it prints when it is up.
_UP = {
    "server-1": '"serving"',
    "server-2": '"serving"',
    "worker": '"working"',
    "gateway": "gateway on",
    "bot": '"connected to Discord"',
}


@dataclass
class Deployment:
    """All services, as processes."""

    rehearsal: Rehearsal
    discord: Discord
    receiver: Receiver
    logs: Path
    secrets: set[str]
    processes: dict[str, Process] = field(default_factory=dict)

    def run(self, name: str, *arguments: str, stdin: str = "") -> str:
        """What a service that ends prints: `docker compose run --rm NAME ARGUMENTS`."""
        done = subprocess.run(
            self.rehearsal.command(name, *arguments),
            env=clean_environment(self.rehearsal.environment(name)),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """`docker compose up`, and each service stopped as its own settings say."""
        with contextlib.ExitStack() as opened:
            for name in _UP:
                environment = {**self.rehearsal.environment(name), "DISCORD_API_BASE": self.discord.api_base}
                log = self.logs / f"compose-{name}.log"
                self.processes[name] = opened.enter_context(running(self.rehearsal.command(name), log, environment))
            for name, told in _UP.items():
                self.processes[name].await_output(told)
            yield
            for name in reversed(_UP):
                stop_signal = self.rehearsal.services[name].get("stop_signal", "SIGTERM")
                self.processes[name].signal(signal.Signals[stop_signal])
            for name, process in self.processes.items():
                grace = self.rehearsal.services[name]["stop_grace_period"]
                assert process.wait(float(grace.removesuffix("s"))) == 0, name

    def is_healthy(self, name: str) -> bool:
        """Whether a service's healthcheck says that it is well."""
        command = self.rehearsal.healthcheck(name)
        done = subprocess.run(command, env=clean_environment({}), capture_output=True, timeout=30, check=False)
        return done.returncode == 0

    def ask(self, method: str, path: str, **options: object) -> httpx.Response:
        """A request of the public's."""
        url = f"https://127.0.0.1:{self.rehearsal.port('gateway', '8443')}{path}"
        trust = ssl.create_default_context(cafile=str(self.rehearsal.folder / "secrets" / "ca.pem"))
        with httpx.Client(verify=trust, trust_env=False, timeout=30) as client:
            return client.request(method, url, **options)  # type: ignore[arg-type]


def make_database(server: Postgresql, password: str) -> str:
    """What the image of PostgreSQL makes of its environment; returns where the server is."""
    server.execute(f"CREATE ROLE doorward LOGIN PASSWORD '{password}'")
    server.execute("CREATE DATABASE doorward OWNER doorward")
    (hba,) = server.execute("SHOW hba_file").fetchone()
    rules = Path(hba).read_text()
    Path(hba).write_text(f"local all doorward scram-sha-256\n{rules}")
    server.execute("SELECT pg_reload_conf()")
    host = str(Path(hba).parent)

    def asks_for_password() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(host=host, user="doorward", dbname="doorward", passfile=f"{host}/none").close()
            return False
        return True

    await_condition(asks_for_password, "PostgreSQL to ask for the password")
    return host


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, logs: Path, secrets: set[str]) -> Iterator[Deployment]:
    """What deploy/README.md tells to do, step by step."""
    folder = tmp_path_factory.mktemp("compose")
    shutil.copy(FOLDER / "prepare.sh", folder)
    subprocess.run([folder / "prepare.sh"], check=True, capture_output=True, timeout=60)
    password = (folder / "secrets" / "postgres.password").read_text().strip()
    secrets.add(password)
    with contextlib.ExitStack() as opened:
        enter = opened.enter_context
        server = enter(postgresql_server(*IN_TESTS))
        receiver = enter(callback_receiver(folder / "receiver.log"))
        discord = enter(discord_stand_in(logs / "compose-discord.log"))
        rehearsal = Rehearsal(folder, make_database(server, password))
        made = Deployment(rehearsal, discord, receiver, logs, secrets)
        made.run("admin", "init")
        with (folder / "config" / "doorward.toml").open("a") as file:
            file.write(f'[callbacks]\nallow = ["{receiver.address}"]\n')
        made.run("migrate")
        token = made.run("admin", "token", "create", "--role", "bot", "--name", "bot")
        (folder / "secrets" / "bot.token").write_text(token)
        (folder / "secrets" / "discord.token").write_text(discord.token)
        secrets.add(token.strip())
        with made.up():
            for name in _UP:
                await_condition(lambda name=name: made.is_healthy(name), f"health of {name}")  # type: ignore[misc]
            await_condition(lambda: made.ask("GET", "/healthz").status_code == 200, "the gateway to find a server")
            yield made
        assert not any(map(made.is_healthy, ("server-1", "gateway"))), "what has ended is called healthy"


def test_cookies_count_at_both_servers(deployment: Deployment) -> None:
    """They come by way of the gateway's certificate, and the users are PostgreSQL's."""
    deployment.run("admin", "user", "create", "--name", "Ada")
    cookie = deployment.run("admin", "session", "create", "--user", "ada").strip()
    deployment.secrets.add(cookie)
    assert deployment.ask("GET", STATUS).status_code == 401

    def both_have_answered() -> bool:
        answer = deployment.ask("GET", STATUS, headers={"cookie": f"doorward_session={cookie}"})
        assert (answer.status_code, answer.json()) == (200, {"authStatus": False})
        servers = (deployment.processes["server-1"], deployment.processes["server-2"])
        return all("GetKaiStatus" in server.output() for server in servers)

    await_condition(both_have_answered, "answers of both servers")


def test_a_request_for_keys_and_its_callback(deployment: Deployment) -> None:
    """From the public through the servers to the bot, and by the worker to the application."""
    user, value = deployment.discord.create_user("alex"), "DEPLOYED-KEY-1"
    deployment.secrets.add(value)
    options = ["--discord-user", str(user.id), "--service", "game", "--label", "main", "--value-stdin"]
    deployment.run("admin", "key", "add", *options, stdin=value)
    callback = f"{deployment.receiver.url}/compose"
    fields = {"name": "App", "userid": str(user.id), "callback": callback, "state": "xyz"}
    answer = deployment.ask("POST", "/requestapikey", data=fields)
    assert (answer.status_code, answer.text) == (200, "OK")
    user.click(user.await_message(lambda message: bool(message.buttons)), "Share all")
    (called,) = deployment.receiver.await_callbacks("/compose")
    assert called.pairs == [("userid", str(user.id)), ("state", "xyz"), ("api_keys", value)]


def test_the_doctor_finds_no_problem_beside_a_server(deployment: Deployment) -> None:
    findings = json.loads(deployment.run("server-1", "doctor", "--json"))["findings"]
    well = {one["check"] for one in findings if one["verdict"] == "ok"}
    assert well >= {"certificates", "master key", "database", "clock", "sealed values", "requests", "server"}


def test_the_command_line_may_change_the_configuration(deployment: Deployment) -> None:
    """Files in it are replaced as wholes, which a folder that is mounted shows to everybody."""
    deployment.run("admin", "master-key", "rotate")
    key_file = deployment.rehearsal.folder / "config" / "master.key"
    keys = [line for line in key_file.read_text().splitlines() if line.startswith("doorward-key-1:")]
    assert (len(keys), key_file.stat().st_mode & 0o777) == (2, 0o600)


def test_metrics_are_where_they_are_said_to_be(deployment: Deployment) -> None:
    for name in ("server-1", "server-2", "worker"):
        url = f"http://127.0.0.1:{deployment.rehearsal.port(name, '9464')}/metrics"
        assert re.search("^doorward_database_up 1", httpx.get(url, trust_env=False, verify=False).text, re.MULTILINE)
