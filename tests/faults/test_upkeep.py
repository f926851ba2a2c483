"""Refreshing unasked and removing what is over, by several processes, while providers fail and processes die."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from doorward_server.consents import Question, Status
from doorward_server.errors import CallError
from doorward_server.models import Connection, ConsentRequest, Session, User, to_micros
from tests.processes import BIN, Process, await_condition, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.stack import LEASE, TIMEOUT, Person, Stack, make_stack, sandbox_provider

# Tokens are due in the last 3 to 4 s of a life of 12 s.
LIFE = 12
AHEAD = "ahead = 3\njitter = 1\npoll = 0.1\n"
MANY = 30
CLAIM = timedelta(seconds=2 * LEASE)
# A provider of its own, which can be down while flo is not.
EAG = """\
[providers.eag]
kind = "kai"
token_url = "{url}/token"
client_id = "eag-client"
client_secret = "sandbox-secret"
redirect_uri = "http://127.0.0.1/app/callback"
timeout = {timeout}
"""


@pytest.fixture
def ahead_stack(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> Stack:
    """A home of this test's own, with nothing running yet."""
    stack = make_stack(tmp_path / "home", logs, provider, secrets)
    refresh_ahead(stack)
    return stack


def refresh_ahead(stack: Stack) -> None:
    """Switch on what other tests do without."""
    settings = stack.home / "doorward.toml"
    settings.write_text(settings.read_text().replace("ahead = 0\n", AHEAD))
    assert AHEAD in settings.read_text()


@pytest.fixture
def other_provider(logs: Path) -> Iterator[SandboxProvider]:
    with sandbox_provider(logs / "other-provider.log") as other:
        yield other


def connect_many(stack: Stack, kai: str = "flo", provider: SandboxProvider | None = None) -> list[Person]:
    """People whose first tokens run out soon; the refreshed ones live long."""
    provider = provider or stack.provider
    provider.configure(expires_in=LIFE)
    people = [stack.person() for _ in range(MANY)]
    for person in people:
        stack.app.integrations.connect(person.id, kai, provider.code(kai))
    provider.configure(expires_in=3600)
    return people


def connections(stack: Stack, kai: str = "flo") -> list[Connection]:
    query = Connection.select().where(Connection.provider == kai).order_by(Connection.id)
    return stack.app.database.fetch_all(query)


def ends(stack: Stack) -> dict[int, datetime]:
    """When the tokens run out, by the connection's id."""
    return {row.id: row.expires_at for row in connections(stack)}


def make_due(stack: Stack) -> None:
    """Let time pass for all connections: their tokens run out within the second."""
    now = stack.app.clock.now()
    passed = {"obtained_at": now - timedelta(seconds=LIFE), "expires_at": now + timedelta(seconds=1)}
    with stack.app.database.writing():
        Connection.update(refresh_at=now, **passed).execute()


def all_refreshed(provider: SandboxProvider) -> bool:
    return all(family["refreshes"] for family in provider.families())


def assert_refreshed_once(provider: SandboxProvider) -> None:
    families = provider.families()
    assert len(families) == MANY
    assert {(family["refreshes"], family["reused"], family["revoked"]) for family in families} == {(1, False, False)}


def assert_in_time(stack: Stack, ended: dict[int, datetime]) -> None:
    """Every pair was replaced before it ran out, and nobody has to connect again."""
    rows = connections(stack)
    assert [row.id for row in rows if row.needs_reauth] == []
    assert [row.id for row in rows if row.obtained_at >= ended[row.id]] == []


def events(process: Process) -> Counter[str]:
    """How often a process has logged each thing."""
    lines = [json.loads(line) for line in process.output().splitlines() if line.startswith("{")]
    return Counter(line["event"] for line in lines)


@contextlib.contextmanager
def worker(stack: Stack) -> Iterator[Process]:
    """`doorward work` on the stack's home."""
    with running(
        [BIN / "doorward", "work"], stack.logs / f"worker-{stack.grpc_port}.log", stack.environment
    ) as process:
        process.await_output('"working"')
        yield process


def test_two_servers_refresh_each_pair_once(ahead_stack: Stack) -> None:
    """At a provider that rotates: a token that were sent twice would end its connection."""
    provider = ahead_stack.provider
    with ahead_stack.server() as one, ahead_stack.server(free_port()) as other:
        people = connect_many(ahead_stack)
        ended = ends(ahead_stack)
        await_condition(lambda: all_refreshed(provider), "all refreshes", patience=60)
        # Whatever somebody had claimed for a second time would be sent by then.
        claimed = time.monotonic()
        await_condition(lambda: time.monotonic() > claimed + CLAIM.total_seconds() + 0.5, "the end of all claims")
        assert_refreshed_once(provider)
        assert_in_time(ahead_stack, ended)
        assert len(provider.requests(grant_type="refresh_token")) == MANY
        current = {family["access_token"] for family in provider.families()}
        assert {ahead_stack.app.integrations.access_token(one.slug, "flo").value for one in people} == current
        assert len(provider.requests(grant_type="refresh_token")) == MANY
        failed = {"refresh failed", "routine failed", "breaker opened"}
        assert not failed & (events(one).keys() | events(other).keys())


def test_callers_and_the_refresher_together(ahead_stack: Stack) -> None:
    """Callers that need another token just when it is due: one refresh all the same."""
    provider = ahead_stack.provider
    stop = threading.Event()
    failures: list[str] = []
    with ahead_stack.server():
        people = connect_many(ahead_stack)
        with ahead_stack.app.database.writing():
            ahead_stack.app.database.execute("UPDATE connections SET refresh_at = expires_at - 4000000", ())

        def ask() -> None:
            while not stop.is_set():
                for person in people:
                    try:
                        ahead_stack.app.integrations.access_token(person.slug, "flo", 4)
                    except CallError as failure:
                        failures.append(failure.reason)
            ahead_stack.app.database.engine.close()

        callers = [threading.Thread(target=ask) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            await_condition(lambda: all_refreshed(provider), "all refreshes", patience=60)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
        assert_refreshed_once(provider)
        assert failures == []


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "status", "status": 503}], ids=["hangs", "fails"])
def test_a_provider_that_is_down_holds_up_no_other(
    tmp_path: Path,
    logs: Path,
    provider: SandboxProvider,
    other_provider: SandboxProvider,
    secrets: set[str],
    fault: dict[str, str],
) -> None:
    stack = make_stack(tmp_path / "home", logs, provider, secrets, EAG.format(url=other_provider.url, timeout=TIMEOUT))
    refresh_ahead(stack)
    settings = stack.home / "doorward.toml"
    both = f'"{provider.address}", "{other_provider.address}"'
    settings.write_text(settings.read_text().replace(f'"{provider.address}"', both))
    with stack.server() as server:
        connect_many(stack, "eag", other_provider)
        other_provider.fault("token", **fault)
        connect_many(stack, "flo")
        ended = ends(stack)
        await_condition(lambda: all_refreshed(provider), "flo's refreshes", patience=60)
        assert_refreshed_once(provider)
        assert_in_time(stack, ended)
        # Five failures, three more that were under way by then, and a probe now and then; the rest was spared.
        await_condition(lambda: events(server)["breaker opened"] == 1, "the breaker")
        sent = len(other_provider.requests(grant_type="refresh_token"))
        assert sent < MANY * 2 // 3, sent
        # Callers are let through all the same.
        person = User.get(User.id == connections(stack, "eag")[-1].user_id)
        before = len(other_provider.requests(grant_type="refresh_token"))

        def is_let_through() -> bool:
            """Unless the refresher is at this very connection just now: then its failure is shared."""
            with pytest.raises(CallError):
                stack.app.integrations.access_token(person.slug, "eag", 3600)
            return len(other_provider.requests(grant_type="refresh_token")) > before

        await_condition(is_let_through, "a caller's request")

        other_provider.heal()
        await_condition(lambda: all_refreshed(other_provider), "eag's refreshes", patience=60)
        assert_refreshed_once(other_provider)
        assert [row.id for row in connections(stack, "eag") if row.needs_reauth] == []
        counted = events(server)
        assert (counted["breaker opened"], counted["breaker closed"]) == (1, 1)
        assert not {"refresh failed", "routine failed"} & counted.keys()


def test_a_provider_that_is_not_configured_any_more(ahead_stack: Stack) -> None:
    provider = ahead_stack.provider
    connect_many(ahead_stack)
    settings = ahead_stack.home / "doorward.toml"
    text = settings.read_text()
    settings.write_text(text.replace("[providers.flo]", "[providers.eag]").replace("flo-client", "eag-client"))
    make_due(ahead_stack)
    with ahead_stack.app.database.writing():
        # One that is looked at later, which tells that the others were not.
        [last, *_] = Connection.select().order_by(Connection.id.desc())
        Connection.update(provider="min").where(Connection.id == last.id).execute()
    with ahead_stack.server():
        # Its token is flo's, so min refuses it.
        await_condition(lambda: Connection.get_by_id(last.id).needs_reauth, "the refusal")
        await_condition(lambda: len(provider.requests(grant_type="refresh_token")) == 1, "the request")
    assert [row.id for row in connections(ahead_stack) if row.needs_reauth] == []
    settings.write_text(text)
    with ahead_stack.server():
        await_condition(
            lambda: sum(bool(family["refreshes"]) for family in provider.families()) == MANY - 1, "flo's refreshes"
        )


@pytest.mark.parametrize("takes_over", ["serve", "work"])
def test_a_killed_refresher_s_connections_are_due_again(ahead_stack: Stack, takes_over: str) -> None:
    """SIGKILL with refreshes under way, that the provider has not seen to: others do them in time."""
    provider = ahead_stack.provider
    with ahead_stack.server() as victim:
        connect_many(ahead_stack)
        provider.fault("token", "hang")
        make_due(ahead_stack)
        await_condition(lambda: len(provider.requests(grant_type="refresh_token")) >= 3, "refreshes under way")
        victim.kill()
    provider.heal()
    # Those of the dead process are claimed for a while yet, the others are due.
    assert {row.refresh_at > ahead_stack.app.clock.now() for row in connections(ahead_stack)} == {True, False}
    with ahead_stack.server(free_port()) if takes_over == "serve" else worker(ahead_stack):
        await_condition(lambda: all_refreshed(provider), "all refreshes", patience=60)
    assert_refreshed_once(provider)
    assert [row.id for row in connections(ahead_stack) if row.needs_reauth] == []


def test_what_is_under_way_ends_before_the_process(ahead_stack: Stack) -> None:
    """SIGTERM during refreshes: the pairs that the provider gives then are stored."""
    provider = ahead_stack.provider
    with ahead_stack.server() as server:
        connect_many(ahead_stack)
        provider.configure(latency=0.4)
        make_due(ahead_stack)
        await_condition(lambda: len(provider.requests(grant_type="refresh_token")) >= 3, "refreshes under way")
        assert server.stop() == 0
    provider.configure(latency=0.0)
    # A pair that was lost would leave a refresh token that is spent, and end its connection here.
    app = ahead_stack.app
    handed_out = {app.integrations.access_token(str(row.user_id), "flo").value for row in connections(ahead_stack)}
    assert handed_out == {family["access_token"] for family in provider.families()}
    assert_refreshed_once(provider)


# Retention

OLD, SOAK_OLD = 100, 400
RETENTION = {"DOORWARD_RETENTION_EVERY": "0.2", "DOORWARD_RETENTION_BATCH": "20"}
RECEIVER = '[callbacks]\nallow = ["127.0.0.1:9"]\n[limits]\nopen_per_user = 0\nrequests_per_address = 0\n'
CALLBACK = "http://127.0.0.1:9/callback"
# Of every five requests: one that is granted still, one whose grant was revoked, one that is queued still, two others.
OLD_ROWS = """
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
INSERT INTO consent_requests (prompt_id, discord_user, name, callback, state, address, status, lease_epoch,
                              lease_expires_at, deadline_at, created_at, finished_at, message_closed_at)
SELECT i, '1', 'old', 'http://127.0.0.1:9/' || i, '', '192.0.2.1',
       CASE WHEN i % 5 < 2 THEN 'granted' ELSE 'canceled' END, 1, 0, {old}, {old}, {old}, {old} FROM n;
INSERT INTO deliveries (request_id, webhook_id, status, carried_keys, attempts, created_at,
                        next_attempt_at, finished_at)
SELECT id, 'old_' || id, CASE prompt_id % 5 WHEN 2 THEN 'queued' ELSE 'sent' END, TRUE, 1, {old},
       CASE prompt_id % 5 WHEN 2 THEN {old} END, CASE prompt_id % 5 WHEN 2 THEN NULL ELSE {old} END
FROM consent_requests WHERE name = 'old';
INSERT INTO delivery_attempts (delivery_id, started_at, milliseconds, status)
SELECT id, {old}, 1, 200 FROM deliveries WHERE webhook_id LIKE 'old_%';
INSERT INTO grants (request_id, user_id, created_at, revoked_at)
SELECT id, {user}, {old}, CASE prompt_id % 5 WHEN 1 THEN {old} END
FROM consent_requests WHERE name = 'old' AND status = 'granted';
INSERT INTO grant_keys (grant_id, key_id, position) SELECT id, {key}, 0 FROM grants;
INSERT INTO sessions (user_id, token_hash, created_at, expires_at)
SELECT {user}, CAST(callback AS BLOB), {old}, {old} FROM consent_requests WHERE name = 'old'
"""


def test_what_is_over_goes_while_others_write(
    tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str], soaking: bool
) -> None:
    """Two servers sweep, and requests, grants and sessions are made meanwhile: none of these is lost or refused."""
    stack = make_stack(tmp_path / "home", logs, provider, secrets, RECEIVER, **RETENTION)
    app, count = stack.app, SOAK_OLD if soaking else OLD
    user = app.discord_users.obtain("1")
    key = app.api_keys.add(user, "game", "Key", "sekret-api-key", actor="test")
    secrets.add("sekret-api-key")
    old = to_micros(app.clock.now() - timedelta(days=100))
    made: list[int] = []
    slowest = 0.0
    left = ConsentRequest.select().where(ConsentRequest.name == "old")
    with stack.server() as one, stack.server(free_port()) as other:
        with app.database.writing():
            for statement in OLD_ROWS.format(rows=count, old=old, user=user.id, key=key.id).split(";"):
                app.database.execute(statement, ())
        while left.count() > count * 2 // 5 or Session.select().where(Session.expires_at <= app.clock.now()).exists():
            started = time.monotonic()
            request_id = app.consents.request(
                Question(name="new", user_id="1", callback=f"{CALLBACK}/{len(made)}", state=""), None, "192.0.2.1"
            )
            app.consents.resolve(request_id, Status.GRANTED, [key.id], actor="test")
            app.sessions.create(user)
            slowest = max(slowest, time.monotonic() - started)
            made.append(request_id)
            assert len(made) < 100_000
        for process in (one, other):
            assert not {"sweep failed", "routine failed", "job failed"} & events(process).keys()
        assert events(one)["swept"] + events(other)["swept"] > 0
    print(f"{count} old requests went while {len(made)} were made; the slowest of these took {slowest * 1000:.0f} ms")
    assert slowest < 5  # what a writer waits at most: [database] busy_timeout

    assert Counter(row.status for row in left) == {"granted": count // 5, "canceled": count // 5}
    assert ConsentRequest.select().where(ConsentRequest.id.in_(made)).count() == len(made)
    assert len(app.consents.grants(user)) == count // 5 + len(made)
    assert len(app.sessions.list(user)) == len(made)
    for table, column, whole in (
        ("delivery_attempts", "delivery_id", "deliveries"),
        ("deliveries", "request_id", "consent_requests"),
        ("grants", "request_id", "consent_requests"),
        ("grant_keys", "grant_id", "grants"),
    ):
        orphans = f"SELECT count(*) FROM {table} WHERE {column} NOT IN (SELECT id FROM {whole})"
        assert app.database.fetch_one(orphans, ()) == (0,), table
