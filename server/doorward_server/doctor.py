"""The doctor: looks at an installation, and says what is wrong and how to mend it. Imports `app` and the domain.

It changes nothing, and goes on as far as it gets: where there is no home, no key or no database, or where the settings
cannot be read, it says so and looks at the rest.
"""

import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.clock import Clock
from doorward_server.database import Database, is_made, open_database
from doorward_server.database.transfer import refuse_moved
from doorward_server.delivery import Status as DeliveryStatus
from doorward_server.errors import CallError, OperatorError, StorageUnavailable
from doorward_server.outbound import Bulkhead, Outbound, Timeouts
from doorward_server.providers import Provider

_OTHERS = 0o077
_ENOUGH_BYTES, _FEW_BYTES = 1 << 30, 100 << 20
# Workers take a job within a second, and bots a request.
_LONG_DUE, _NEGLECTED = timedelta(minutes=1), timedelta(seconds=30)
_EXPIRES_SOON = timedelta(days=14)
# By so much tokens are taken to live too long, or too short.
_SKEWED, _WRONG = timedelta(seconds=10), timedelta(minutes=1)
# How many connections are opened for a try.
_OPENED = 100
_AT_ONCE = 8
_GATEWAY_TIMEOUTS = Timeouts(connect=2, read=5, total=5)
_SERVER_ERROR = 500


class Verdict(StrEnum):
    """`warning`: it works, but not for long or not for all."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """What was found out about one thing, in a sentence; and what to do about it, unless that says so itself."""

    check: str
    verdict: Verdict
    told: str
    mend: str | None = None


class _Answer(NamedTuple):
    """What a provider's URL answered to a request for its head: in how many milliseconds, and at what time."""

    finding: Finding
    skew: timedelta | None = None


def examine(home: Path | None, clock: Clock | None = None) -> Iterator[Finding]:
    """Every finding; `home` is the one that the command line names."""
    place, config = settings_module.places(home)
    if not place.is_dir():
        mend = "run `doorward init`, or set DOORWARD_HOME or --home"
        yield Finding("home", Verdict.PROBLEM, f"there is no home {place}", mend)
        return
    yield _judge_mode("home", place, "700")
    app: App | None = None
    try:
        app = App(settings_module.load(home), clock)
    except OperatorError as error:
        yield from _told("settings", error)
    if app is not None:
        yield from _Doctor(app, config).examine()


@dataclass(frozen=True)
class _Doctor:
    """With settings that are in order."""

    app: App
    config: Path

    def examine(self) -> Iterator[Finding]:
        yield from _run("settings", self._settings)
        yield from _run("certificates", self._certificates)
        yield from (key := _run("master key", self._key))
        yield from (database := _run("database", self._database))
        is_open = _are_well(key) and _are_well(database) and is_made(self.app.settings.database_url)
        if is_open:
            for check, run in (
                ("sealed values", self._sealed),
                ("jobs", self._jobs),
                ("deliveries", self._deliveries),
                ("requests", self._requests),
                ("service tokens", self._tokens),
            ):
                yield from _run(check, run)
        yield from _run("providers", self._all_providers if is_open else self._configured_providers)
        yield from _run("server", self._server)
        yield from _run("gateway", self._gateway)
        if is_open:
            self.app.database.close()

    # What is on this machine

    def _settings(self) -> Iterator[Finding]:
        if not self.config.exists():
            yield Finding("settings", Verdict.OK, f"there is no file {self.config}: every setting has its default")
            return
        yield Finding("settings", Verdict.OK, f"{self.config} is valid")
        if "secret" in self.config.read_text():
            yield _judge_mode("settings", self.config, "600")

    def _certificates(self) -> Iterator[Finding]:
        tls, now = self.app.read_tls(), self.app.clock.now()
        for pem in filter(None, (tls.certificate, tls.clients) if tls else ()):
            left = pem.expires_at - now
            if left <= timedelta():
                mend = "put a new one in its place, and restart"
                yield Finding("certificates", Verdict.PROBLEM, f"{pem.path} has expired", mend)
            elif left <= _EXPIRES_SOON:
                mend = "put a new one in its place by then"
                yield Finding("certificates", Verdict.WARNING, f"{pem.path} ends in {_duration(left)}", mend)
            else:
                yield Finding("certificates", Verdict.OK, f"{pem.path} is valid for {_duration(left)}")

    def _key(self) -> Iterator[Finding]:
        first, *others = self.app.keys.ids
        more = f"; {', '.join(others)} can open what was sealed before" if others else ""
        yield Finding("master key", Verdict.OK, f"{first} is at hand, and seals{more}")

    def _database(self) -> Iterator[Finding]:
        settings = self.app.settings
        if not is_made(settings.database_url):
            yield Finding("database", Verdict.WARNING, "there is no database yet", "`doorward serve` makes it")
            return
        database = open_database(settings.database_url, settings.database.busy_timeout)
        try:
            yield from self._judge_database(database)
        finally:
            database.close()

    def _judge_database(self, database: Database) -> Iterator[Finding]:
        for problem in database.find_damage():
            yield Finding("database", Verdict.PROBLEM, f"it is damaged: {problem}", "stop all, and restore a backup")
        if due := database.check_schema():
            told = f"its schema lacks {len(due)} migrations, the last one is {due[-1]}"
            yield Finding("database", Verdict.PROBLEM, told, "run `doorward migrate`")
        else:
            refuse_moved(database)
        with database.writing():  # waits for whoever writes, and fails where nobody may
            pass
        yield Finding("database", Verdict.OK, "it can be read and written")
        for path in database.files:
            if _is_open_to_others(path):
                yield _judge_mode("database", path, "600")
        yield from (_judge_disk(path.parent) for path in database.files[:1])
        if (now := database.now()) is not None:
            yield _judge_clock(self.app.clock.now() - now, "the database's")

    def _sealed(self) -> Iterator[Finding]:
        self.app.master_keys.check(self.app.master_keys.status())
        opened = self.app.integrations.can_be_opened(_OPENED)
        if lost := opened.count(False):
            yield Finding(
                "sealed values",
                Verdict.PROBLEM,
                f"{lost} of the latest {len(opened)} connections cannot be opened",
                "restore the master key that they were sealed with, as a further line of the key file",
            )
        else:
            yield Finding("sealed values", Verdict.OK, f"the latest {len(opened)} connections can be opened")

    # What waits

    def _jobs(self) -> Iterator[Finding]:
        due, now = self.app.jobs.backlog(), self.app.clock.now()
        if due.since is not None and now - due.since > _LONG_DUE:
            yield Finding(
                "jobs",
                Verdict.PROBLEM,
                f"{due.jobs} jobs are due, the first for {_duration(now - due.since)}",
                "run `doorward serve`, or `doorward work`; if one runs, its log tells what it waits for",
            )
        else:
            yield Finding("jobs", Verdict.OK, "none waits for a worker")
        for kind, count in self.app.jobs.abandoned().items():
            told = f"{count} of the kind {kind} were abandoned"
            yield Finding("jobs", Verdict.WARNING, told, "the log's lines `job abandoned` tell why")

    def _deliveries(self) -> Iterator[Finding]:
        counts = self.app.deliveries.count_unsent()
        if abandoned := counts[DeliveryStatus.ABANDONED]:
            mend = "`doorward delivery list --status abandoned` shows them, `doorward delivery retry` sends one again"
            yield Finding("deliveries", Verdict.WARNING, f"{abandoned} were abandoned", mend)
        yield Finding("deliveries", Verdict.OK, f"{counts[DeliveryStatus.QUEUED]} are on their way")

    def _requests(self) -> Iterator[Finding]:
        if count := self.app.consents.neglected(_NEGLECTED):
            told = f"{count} requests for keys wait for a bot to take them"
            yield Finding("requests", Verdict.PROBLEM, told, "run `doorward-bot`; if it runs, its log tells")
        else:
            yield Finding("requests", Verdict.OK, "none waits for the bot")

    def _tokens(self) -> Iterator[Finding]:
        now = self.app.clock.now()
        tokens = [token for token in self.app.service_tokens.list() if token.expires_at is not None]
        mend = "`doorward token create` makes another one, `doorward token revoke` removes it"
        for token in tokens:
            name = f"token {token.id}" + (f" ({token.name!r})" if token.name else "")
            if token.expires_at <= now:
                yield Finding("service tokens", Verdict.WARNING, f"{name} has expired", mend)
            elif token.expires_at <= now + _EXPIRES_SOON:
                told = f"{name} expires in {_duration(token.expires_at - now)}"
                yield Finding("service tokens", Verdict.WARNING, told, mend)
        if all(token.expires_at > now + _EXPIRES_SOON for token in tokens):
            yield Finding("service tokens", Verdict.OK, "none expires soon")

    # What is elsewhere

    def _all_providers(self) -> Iterator[Finding]:
        yield from self._judge_providers(self.app.providers.list())
        self.app.check_providers()

    def _configured_providers(self) -> Iterator[Finding]:
        yield from self._judge_providers(self.app.settings.providers.values())

    def _judge_providers(self, providers: Iterable[Provider]) -> Iterator[Finding]:
        targets = [(provider, name, url) for provider in providers for name, url in _urls(provider)]
        if not targets:
            yield Finding("providers", Verdict.WARNING, "there are none", "add one: see docs/settings.md")
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = list(pool.map(lambda target: self._probe(*target), targets))
        yield from (answer.finding for answer in answers)
        if skews := [answer.skew for answer in answers if answer.skew is not None]:
            # By the one that agrees best: a provider's clock may be wrong, too.
            yield _judge_clock(min(skews, key=abs), "the providers'")

    def _probe(self, provider: Provider, name: str, url: str) -> _Answer:
        check, where = f"provider {provider.id}", f"its {name} at {urlsplit(url).hostname}"
        timeouts = Timeouts(provider.connect_timeout, provider.read_timeout, provider.timeout)
        started = monotonic()
        try:
            receipt = self.app.outbound.probe(url, peer=provider.id, timeouts=timeouts)
        except CallError as failure:
            told = f"{where} does not answer: {failure.cause or failure.message}"
            return _Answer(Finding(check, Verdict.PROBLEM, told, _advice(failure)))
        told = f"{where} answers in {round((monotonic() - started) * 1000)} ms"
        if receipt.status >= _SERVER_ERROR:
            told += f", with status {receipt.status}"
            return _Answer(Finding(check, Verdict.WARNING, told, "ask whoever runs it"))
        return _Answer(Finding(check, Verdict.OK, told), _skew(receipt.date, self.app.clock.now()))

    def _server(self) -> Iterator[Finding]:
        for path in map(self.app.settings.socket_at, self.app.settings.ports):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_GATEWAY_TIMEOUTS.connect)
                if probe.connect_ex(str(path)):
                    yield Finding("server", Verdict.WARNING, f"none answers on {path}", "run `doorward serve`")
                else:
                    yield Finding("server", Verdict.OK, f"one answers on {path}")

    def _gateway(self) -> Iterator[Finding]:
        address = f"127.0.0.1:{self.app.settings.gateway.port}"
        if self.app.settings.gateway.tls_cert_file is not None:  # whose name is not that of this address
            yield Finding("gateway", Verdict.OK, "it speaks TLS, and is not looked at: `GET /healthz` at its own name")
            return
        bulkhead = Bulkhead(threads=2, outbound=1, per_provider=1, waiting=1)
        outbound = Outbound(allow=[address], ca_file=None, bulkhead=bulkhead, concurrency=1)
        try:
            url = f"http://{address}/healthz"
            status = outbound.request("GET", url, provider_id="gateway", timeouts=_GATEWAY_TIMEOUTS).status
        except CallError:
            mend = "run `doorward-gateway`; one on another machine is not looked at"
            yield Finding("gateway", Verdict.WARNING, f"none answers on {address}", mend)
            return
        finally:
            outbound.close()
        if 200 <= status < 300:  # noqa: PLR2004
            yield Finding("gateway", Verdict.OK, f"it answers on {address}, and reaches a server")
        else:
            told = f"it answers on {address} with status {status}"
            yield Finding("gateway", Verdict.PROBLEM, told, "run `doorward serve`: the gateway reaches no server")


def _run(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check, and what kept it from going on."""
    found: list[Finding] = []
    try:
        for finding in run():
            found.append(finding)
    except OperatorError as error:
        found += _told(check, error)
    except StorageUnavailable as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        mend = "free some disk space, and see to the file's owner and mode and to who else holds it"
        found.append(Finding(check, Verdict.PROBLEM, f"{error.message}{cause}", mend))
    except Exception as error:  # noqa: BLE001 - the other checks are to be made all the same
        told = f"it cannot be looked at ({type(error).__name__})"
        found.append(Finding(check, Verdict.PROBLEM, told, "mend what else is found, and try again"))
    return found


def _told(check: str, error: OperatorError) -> list[Finding]:
    """The sentences of an error, which say how to mend it."""
    return [Finding(check, Verdict.PROBLEM, line) for line in str(error).splitlines()]


def _are_well(findings: Iterable[Finding]) -> bool:
    return all(finding.verdict is not Verdict.PROBLEM for finding in findings)


def _is_open_to_others(path: Path) -> bool:
    try:
        return bool(stat.S_IMODE(path.stat().st_mode) & _OTHERS)
    except FileNotFoundError:  # what SQLite keeps beside a database comes and goes
        return False


def _judge_mode(check: str, path: Path, mode: str) -> Finding:
    if _is_open_to_others(path):
        return Finding(check, Verdict.WARNING, f"others may use {path}", f"run `chmod {mode} {path}`")
    return Finding(check, Verdict.OK, f"{path} is its owner's alone")


def _judge_disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    told = f"{free >> 20} MiB are free at {folder}"
    if free >= _ENOUGH_BYTES:
        return Finding("disk", Verdict.OK, told)
    return Finding("disk", Verdict.WARNING if free >= _FEW_BYTES else Verdict.PROBLEM, told, "free some disk space")


def _urls(provider: Provider) -> Iterator[tuple[str, str]]:
    """What requests are made to; the lookup with a token that is none."""
    if provider.token_url is not None:
        yield "token URL", provider.token_url
    if provider.lookup_url is not None:
        yield "lookup URL", provider.lookup_url_for("doctor")
    if provider.revocation_url is not None:
        yield "revocation URL", provider.revocation_url


def _advice(failure: CallError) -> str:
    if "not allowed" in (failure.cause or ""):
        return "use a public address, or add its ip:port to [outbound] allow"
    return "see to the URL, to the network, and to [outbound] ca_file if it has a certificate of your own"


def _skew(date: str | None, now: datetime) -> timedelta | None:
    """How far this clock is ahead of a peer's, by its Date header (RFC 9110, section 6.6.1)."""
    with suppress(TypeError, ValueError, OverflowError):
        return now - parsedate_to_datetime(date or "")
    return None


def _judge_clock(skew: timedelta, whose: str) -> Finding:
    """By how far this machine's clock is ahead of another one."""
    if abs(skew) <= _SKEWED:
        return Finding("clock", Verdict.OK, f"it agrees with {whose}")
    way = "ahead of" if skew > timedelta() else "behind"
    verdict = Verdict.WARNING if abs(skew) <= _WRONG else Verdict.PROBLEM
    told = f"it is {_duration(abs(skew))} {way} {whose}"
    return Finding("clock", verdict, told, "have it set over the network (NTP)")


def _duration(time: timedelta) -> str:
    seconds = round(time.total_seconds())
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} seconds"
