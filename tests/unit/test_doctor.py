"""`doorward doctor`: each thing that may be wrong, what is said about it, and what is to be done."""

import contextlib
import json
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from doorward_server.clock import Clock
from doorward_server.consents import Question
from doorward_server.crypto import MasterKey, Place
from doorward_server.doctor import Verdict, examine
from doorward_server.models import Connection, Job, to_micros
from tests.engines import Engines, held
from tests.processes import BIN, clean_environment, free_port
from tests.sandbox.client import SandboxProvider
from tests.stack import Stack, make_stack
from tests.unit.command_line import Done, Here, doorward, opened, write_key

IDENTITY = """
[outbound]
allow = ["127.0.0.1:{port}"]
[providers.login]
kind = "identity"
lookup_url = "http://127.0.0.1:{port}/lookup?access_token={{access_token}}"
timeout = 2
"""
Spoil = Callable[[Path], object]


class Report:
    """What the doctor said."""

    def __init__(self, done: Done) -> None:
        assert "Traceback" not in done.stdout + done.stderr, done
        told = json.loads(done.stdout)
        self.findings: list[dict[str, Any]] = told["findings"]
        assert told["problems"] == len(self.of(Verdict.PROBLEM))
        assert done.returncode == (1 if told["problems"] else 0)
        assert done.stderr == ""
        assert not [one for one in self.findings if "\n" in one["told"]]

    def of(self, verdict: Verdict) -> list[dict[str, Any]]:
        return [one for one in self.findings if one["verdict"] == verdict]

    def assert_finds(self, check: str, verdict: Verdict, *parts: str) -> None:
        """That a finding of the check holds all of the parts."""
        found = [
            f"{one['told']}: {one['mend']}"
            for one in self.findings
            if (one["check"], one["verdict"]) == (check, verdict)
        ]
        assert [text for text in found if all(part in text for part in parts)], self.findings


def ask(here: Here, home: Path, **environment: str) -> Report:
    """With ports that nobody listens on."""
    ports = {"DOORWARD_GRPC_PORT": str(free_port()), "DOORWARD_GATEWAY_PORT": str(free_port())}
    return Report(here(home, "doctor", "--json", environment=ports | environment))


def serve_once(home: Path) -> None:
    """Have a database, as after a first start."""
    with opened(home) as app:
        app.record_key()


# Nothing wrong


def test_a_whole_stack_in_order(stack: Stack) -> None:
    person = stack.person()
    stack.connect(person)
    report = Report(stack.cli("doctor", "--json"))
    assert report.of(Verdict.PROBLEM) == []
    checks = {one["check"] for one in report.of(Verdict.OK)}
    assert checks >= {
        *("home", "settings", "master key", "database", "sealed values", "jobs", "deliveries"),
        *("requests", "service tokens", "provider flo", "provider sandbox", "clock", "server", "gateway"),
    }
    report.assert_finds("provider flo", Verdict.OK, "its token URL at 127.0.0.1 answers in", "ms")
    report.assert_finds("provider flo", Verdict.OK, "its revocation URL")
    report.assert_finds("provider sandbox", Verdict.OK, "its lookup URL")
    report.assert_finds("gateway", Verdict.OK, "reaches a server")
    assert not [token for token in stack.secrets if token in json.dumps(report.findings)]


def test_a_provider_is_not_asked_for_anything(stack: Stack, provider: SandboxProvider) -> None:
    Report(stack.cli("doctor", "--json"))
    asked = [request for endpoint in ("token", "lookup", "revoke") for request in provider.requests(endpoint)]
    assert [request for request in asked if request.get("method", "HEAD") != "HEAD"] == []


def test_every_worker_is_looked_at(here: Here, home: Path) -> None:
    report = ask(here, home, DOORWARD_GRPC_PORT="20100", DOORWARD_WORKERS="2")
    for port in (20100, 20101):
        report.assert_finds("server", Verdict.WARNING, f"none answers on {home}/doorward-{port}.sock")


@pytest.mark.sqlite
def test_a_home_after_init(here: Here, home: Path) -> None:
    report = ask(here, home)
    assert report.of(Verdict.PROBLEM) == []
    report.assert_finds("database", Verdict.WARNING, "there is no database yet", "`doorward serve` makes it")
    report.assert_finds("server", Verdict.WARNING, "run `doorward serve`")
    report.assert_finds("gateway", Verdict.WARNING, "run `doorward-gateway`")
    report.assert_finds("providers", Verdict.WARNING, "there are none")
    assert not (home / "doorward.db").exists(), "the doctor changes nothing"


def test_people_get_a_table(here: Here, home: Path) -> None:
    nowhere = {f"DOORWARD_{name}_PORT": str(free_port()) for name in ("GRPC", "GATEWAY")}
    done = here(home, "doctor", environment=nowhere)
    assert done.returncode == 0
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["verdict", "check", "finding"]
    assert f"{home} is its owner's alone" in lines[0]


# Nearly everything broken


def test_without_a_home(here: Here, tmp_path: Path) -> None:
    report = ask(here, tmp_path / "nowhere")
    report.assert_finds("home", Verdict.PROBLEM, "there is no home", "run `doorward init`")
    assert len(report.findings) == 1


def _write_settings(text: str) -> Spoil:
    return lambda home: (home / "doorward.toml").write_text(text)


def _replace_database(content: bytes) -> Spoil:
    return lambda home: (home / "doorward.db").write_bytes(content)


def _tear_database(home: Path) -> None:
    serve_once(home)
    with contextlib.closing(sqlite3.connect(home / "doorward.db")) as database:
        database.execute("PRAGMA journal_mode = delete")
    with (home / "doorward.db").open("r+b") as file:
        for page in range(2, 30):
            file.seek(4096 * page)
            file.write(os.urandom(2048))


def _contradict_schema(home: Path) -> None:
    with opened(home) as app:
        app.record_key()
        app.users.create("Ada")
    with contextlib.closing(sqlite3.connect(home / "doorward.db", isolation_level=None)) as database:
        database.execute("PRAGMA writable_schema = on")
        database.execute("UPDATE sqlite_master SET sql = replace(sql, 'email TEXT', 'email TEXT NOT NULL')")


def _forget_migration(home: Path) -> None:
    serve_once(home)
    with contextlib.closing(sqlite3.connect(home / "doorward.db")) as database:
        database.execute("DELETE FROM schema_migration WHERE name LIKE '0004%'")
        database.commit()


def _come_from_the_future(home: Path) -> None:
    serve_once(home)
    with contextlib.closing(sqlite3.connect(home / "doorward.db")) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(schema_migration)")]
        others = ", ".join(column for column in columns if column not in {"id", "name"})
        database.execute(
            f"INSERT INTO schema_migration (name, {others}) "
            f"SELECT '9999_future', {others} FROM schema_migration LIMIT 1"
        )
        database.commit()


def _change_key(home: Path) -> None:
    with opened(home) as app:
        app.record_key()
        app.applications.create("Bot", ["https://bot.example/callback"], "form")
    write_key(home, MasterKey.generate())


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("spoil", "check", "parts"),
    [
        pytest.param(_write_settings("[grpc\n"), "settings", ("is not valid TOML",), id="bad TOML"),
        pytest.param(_write_settings("[grpc]\nprot = 1\n"), "settings", ("did you mean port?",), id="unknown setting"),
        pytest.param(
            lambda home: (home / "master.key").unlink(), "master key", ("there is no master key",), id="no key"
        ),
        pytest.param(write_key, "master key", ("holds no master key",), id="an empty key file"),
        pytest.param(
            lambda home: (home / "master.key").chmod(0o644), "master key", ("chmod 600",), id="a key that others read"
        ),
        pytest.param(_change_key, "sealed values", ("not at hand", "restore"), id="another key"),
        pytest.param(
            _replace_database(b"garbage" * 999), "database", ("not a database", "restore a backup"), id="no database"
        ),
        pytest.param(lambda home: (home / "doorward.db").mkdir(), "database", ("unable to open",), id="a folder"),
        pytest.param(_tear_database, "database", ("damaged", "restore a backup"), id="torn pages"),
        pytest.param(_contradict_schema, "database", ("damaged: NULL value in users.email",), id="damaged rows"),
        pytest.param(_forget_migration, "database", ("lacks 1 migrations", "`doorward migrate`"), id="old schema"),
        pytest.param(_come_from_the_future, "database", ("newer schema", "upgrade Doorward"), id="new schema"),
    ],
)
def test_what_is_broken_is_told(here: Here, home: Path, spoil: Spoil, check: str, parts: tuple[str, ...]) -> None:
    spoil(home)
    report = ask(here, home)
    report.assert_finds(check, Verdict.PROBLEM, *parts)
    report.assert_finds("home", Verdict.OK)
    if check != "settings":  # and the rest is looked at
        report.assert_finds("settings", Verdict.OK)
        report.assert_finds("gateway", Verdict.WARNING)


@pytest.mark.sqlite
def test_a_schema_is_not_brought_up_to_date(here: Here, home: Path) -> None:
    _forget_migration(home)
    ask(here, home)
    assert ask(here, home).of(Verdict.PROBLEM), "the doctor changes nothing"


@pytest.mark.sqlite
def test_everything_broken_at_once(here: Here, home: Path) -> None:
    (home / "master.key").unlink()
    (home / "doorward.db").write_bytes(b"garbage" * 999)
    (home / "doorward.toml").write_text(IDENTITY.format(port=free_port()))
    home.chmod(0o755)
    report = ask(here, home)
    report.assert_finds("home", Verdict.WARNING, "others may use", f"chmod 700 {home}")
    assert {one["check"] for one in report.of(Verdict.PROBLEM)} == {"master key", "database", "provider login"}


def test_every_wrong_setting_is_a_finding(here: Here, home: Path) -> None:
    (home / "doorward.toml").write_text("[jobs]\nthreads = 0\n[log]\nlevel = 'loud'\n")
    report = ask(here, home)
    assert len(report.of(Verdict.PROBLEM)) == 2


def test_settings_with_secrets_are_the_owners(here: Here, home: Path) -> None:
    path = home / "doorward.toml"
    path.write_text("# client_secret\n")
    path.chmod(0o644)
    ask(here, home).assert_finds("settings", Verdict.WARNING, f"others may use {path}", f"chmod 600 {path}")


@pytest.mark.sqlite
def test_a_database_of_others(here: Here, home: Path) -> None:
    serve_once(home)
    (home / "doorward.db").chmod(0o644)
    ask(here, home).assert_finds("database", Verdict.WARNING, "others may use", "chmod 600")


def test_a_database_that_another_program_holds(here: Here, home: Path) -> None:
    serve_once(home)
    with opened(home) as app, held(app.database):
        report = ask(here, home, DOORWARD_DATABASE_BUSY_TIMEOUT="0.1")
    report.assert_finds("database", Verdict.PROBLEM, "lock", "who else holds it")


def test_a_database_server_that_is_away(here: Here, home: Path) -> None:
    url = f"postgresql://doorward:secret-word@127.0.0.1:{free_port()}/doorward"
    report = ask(here, home, DOORWARD_DATABASE_URL=url)
    report.assert_finds("database", Verdict.PROBLEM, "cannot use the database", "start PostgreSQL")
    report.assert_finds("gateway", Verdict.WARNING)
    assert "secret-word" not in json.dumps(report.findings)


def test_a_database_server(here: Here, home: Path, engines: Engines) -> None:
    """The clock is compared with its, and there is no file to look at."""
    report = ask(here, home, DOORWARD_DATABASE_URL=engines.server.new_database())
    assert report.of(Verdict.PROBLEM) == []
    report.assert_finds("database", Verdict.OK, "can be read and written")
    report.assert_finds("clock", Verdict.OK, "it agrees with the database's")
    assert "disk" not in {one["check"] for one in report.findings}


# What waits


@pytest.fixture
def served(home: Path) -> Path:
    serve_once(home)
    return home


def test_jobs_that_nobody_does(here: Here, served: Path) -> None:
    with opened(served) as app, app.database.writing():
        app.jobs.queue("revoke-token", {}, app.clock.now() - timedelta(minutes=10))
        app.jobs.queue("revoke-token", {}, app.clock.now() + timedelta(minutes=10))
        app.jobs.queue("delivery", {})
    report = ask(here, served)
    report.assert_finds("jobs", Verdict.PROBLEM, "2 jobs are due, the first for 10 minutes", "`doorward work`")


def test_jobs_that_were_abandoned(here: Here, served: Path) -> None:
    with opened(served) as app, app.database.writing():
        app.jobs.queue("revoke-token", {})
        Job.update(run_at=None).execute()
    report = ask(here, served)
    report.assert_finds("jobs", Verdict.WARNING, "1 of the kind revoke-token were abandoned")
    assert report.of(Verdict.PROBLEM) == []


def test_requests_that_no_bot_takes(here: Here, served: Path) -> None:
    with opened(served) as app:
        asked = Question("Bot", "80351110224678912", "http://93.184.215.14/cb", "")
        app.consents.request(asked, None, "192.0.2.1")
        assert ask(here, served).of(Verdict.PROBLEM) == []
        earlier = to_micros(app.clock.now() - timedelta(minutes=1))
        with app.database.writing():
            app.database.execute_all("UPDATE consent_requests SET lease_expires_at = ?", (earlier,))
    ask(here, served).assert_finds("requests", Verdict.PROBLEM, "1 requests for keys wait", "run `doorward-bot`")


@pytest.mark.parametrize(
    ("life", "parts"),
    [
        pytest.param(timedelta(days=-1), ("token 1 ('shop') has expired", "`doorward token create`"), id="expired"),
        pytest.param(timedelta(days=3), ("token 1 ('shop') expires in 2 days",), id="soon"),
        pytest.param(timedelta(days=30), None, id="later"),
        pytest.param(None, None, id="never"),
    ],
)
def test_service_tokens(here: Here, served: Path, life: timedelta | None, parts: tuple[str, ...] | None) -> None:
    with opened(served) as app:
        app.service_tokens.create(["backend"], "shop", life - timedelta(minutes=30) if life else None)
    report = ask(here, served)
    if parts:
        report.assert_finds("service tokens", Verdict.WARNING, *parts)
    else:
        report.assert_finds("service tokens", Verdict.OK, "none expires soon")


def test_connections_that_cannot_be_opened(here: Here, served: Path) -> None:
    with opened(served) as app:
        user, now = app.users.create("Ada"), app.clock.now()
        with app.database.writing():
            Connection.create(
                user=user.id,
                provider="flo",
                access_token=app.keys.seal("a token of another place", Place("connections", 0, "access_token")),
                obtained_at=now,
                needs_reauth=False,
                lease_epoch=0,
                created_at=now,
            )
    ask(here, served).assert_finds("sealed values", Verdict.PROBLEM, "1 of the latest 1 connections cannot be opened")


# What is elsewhere


@pytest.mark.parametrize(
    ("life", "verdict", "told"),
    [
        pytest.param(timedelta(days=-1), Verdict.PROBLEM, "has expired", id="expired"),
        pytest.param(timedelta(days=3, hours=12), Verdict.WARNING, "ends in 3 days", id="soon"),
        pytest.param(timedelta(days=90, hours=12), Verdict.OK, "is valid for 90 days", id="later"),
    ],
)
def test_certificates(here: Here, home: Path, life: timedelta, verdict: Verdict, told: str) -> None:
    ends = datetime.now(UTC) + life
    made = trustme.CA().issue_cert("doorward.example", not_before=ends - timedelta(days=365), not_after=ends)
    made.cert_chain_pems[0].write_to_path(home / "cert.pem")
    made.private_key_pem.write_to_path(home / "key.pem")
    with (home / "doorward.toml").open("a") as settings:
        settings.write("[grpc]\ntls_cert_file = 'cert.pem'\ntls_key_file = 'key.pem'\n")
    ask(here, home).assert_finds("certificates", verdict, f"{home / 'cert.pem'} {told}")


@pytest.mark.parametrize("with_database", [True, False], ids=["with a database", "without one"])
def test_a_provider_that_does_not_answer(here: Here, home: Path, with_database: bool) -> None:
    if with_database:
        serve_once(home)
    (home / "doorward.toml").write_text(IDENTITY.format(port=free_port()))
    report = ask(here, home)
    report.assert_finds("provider login", Verdict.PROBLEM, "its lookup URL at 127.0.0.1 does not answer", "refused")


def test_a_provider_at_an_address_that_is_not_allowed(here: Here, home: Path) -> None:
    text = IDENTITY.format(port=free_port())
    (home / "doorward.toml").write_text(text[text.index("[providers") :])
    ask(here, home).assert_finds("provider login", Verdict.PROBLEM, "not allowed", "[outbound] allow")


class Wrong(Clock):
    """A clock that is ahead, or behind."""

    def __init__(self, ahead: timedelta) -> None:
        self._ahead = ahead

    def now(self) -> Any:
        return super().now() + self._ahead


@pytest.mark.parametrize(
    ("ahead", "verdict", "told"),
    [
        pytest.param(timedelta(0), Verdict.OK, "it agrees with the providers'", id="right"),
        pytest.param(timedelta(seconds=30), Verdict.WARNING, " seconds ahead of the providers'", id="ahead"),
        pytest.param(timedelta(minutes=-10), Verdict.PROBLEM, "minutes behind the providers'", id="behind"),
    ],
)
def test_the_clock_is_compared_with_providers(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, ahead: timedelta, verdict: Verdict, told: str
) -> None:
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    found = [one for one in examine(stack.home, Wrong(ahead)) if one.check == "clock"]
    assert {one.verdict for one in found} == {verdict}
    assert [one for one in found if told in one.told]


@pytest.fixture
def lonely(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Iterator[Stack]:
    """A gateway without a server behind it."""
    stack = make_stack(tmp_path / "lonely", logs, provider, secrets)
    with stack.server() as server, stack.gateway():
        server.kill()
        yield stack


def test_a_gateway_without_a_server(lonely: Stack) -> None:
    report = Report(lonely.cli("doctor", "--json"))
    report.assert_finds("server", Verdict.WARNING, "none answers on", "run `doorward serve`")
    report.assert_finds("gateway", Verdict.PROBLEM, "with status 503", "reaches no server")


def test_a_real_process_ends_with_exit_code_1(tmp_path: Path) -> None:
    done = doorward(tmp_path / "nowhere", "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    assert "there is no home" in done.stdout
    assert "run `doorward init`" in done.stdout
    closed = subprocess.run(
        [BIN / "doorward", "doctor", "--json"], env=clean_environment({"DOORWARD_HOME": "/"}), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in closed.stderr
