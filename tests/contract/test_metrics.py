"""What a real server tells a monitoring system, on a port of its own."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward_server.models import Connection
from tests.processes import BIN, await_condition, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.scraping import Samples, scrape
from tests.stack import Stack, make_stack

_REFUSAL = '{"error": "invalid_grant"}'
_TOKEN_CALL = "IntegrationService/GetAccessToken"


class Monitored:
    """A stack whose server is scraped."""

    def __init__(self, stack: Stack, port: int) -> None:
        self.stack = stack
        self.port = port

    def scrape(self) -> Samples:
        return scrape(self.port)

    def await_sample(self, name: str, value: float) -> None:
        """Fail when a sample does not get a value."""
        await_condition(lambda: self.scrape().get(name) == value, f"{name} {value}: {self.scrape().get(name)}")


@pytest.fixture(scope="module")
def monitored(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Monitored]:
    port = free_port()
    home = tmp_path_factory.mktemp("monitored") / "home"
    stack = make_stack(home, logs, shared_provider, secrets, DOORWARD_METRICS_PORT=str(port))
    with stack.server():
        yield Monitored(stack, port)


def test_calls_are_counted_by_method_and_code(monitored: Monitored, provider: SandboxProvider) -> None:
    person = monitored.stack.person()
    monitored.stack.connect(person)
    backend = (("authorization", f"Bearer {monitored.stack.service_token('backend')}"),)
    request = pb.GetAccessTokenRequest(user=person.slug, provider="flo")
    before = monitored.scrape()
    with monitored.stack.stub() as stub:
        stub.GetAccessToken(request, metadata=backend)
        stub.GetAccessToken(request, metadata=backend)
        with pytest.raises(grpc.RpcError):
            stub.GetAccessToken(request)
    after = monitored.scrape()

    def more(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert more(f'doorward_calls_total{{code="OK",method="{_TOKEN_CALL}"}}') == 2
    assert more(f'doorward_calls_total{{code="UNAUTHENTICATED",method="{_TOKEN_CALL}"}}') == 1
    assert more(f'doorward_call_seconds_count{{method="{_TOKEN_CALL}"}}') == 3
    assert more(f'doorward_call_seconds_bucket{{le="30.0",method="{_TOKEN_CALL}"}}') == 3
    assert more(f'doorward_call_seconds_sum{{method="{_TOKEN_CALL}"}}') > 0
    assert after["doorward_calls_under_way"] == 0


def test_a_call_under_way_is_seen(monitored: Monitored, provider: SandboxProvider) -> None:
    person = monitored.stack.person()
    monitored.stack.connect(person)
    _expire(person.id)
    provider.fault("token", "hang")
    backend = (("authorization", f"Bearer {monitored.stack.service_token('backend')}"),)
    with monitored.stack.stub() as stub:
        call = stub.GetAccessToken.future(pb.GetAccessTokenRequest(user=person.slug, provider="flo"), metadata=backend)
        monitored.await_sample("doorward_calls_under_way", 1)
        assert call.exception(timeout=20) is not None
    monitored.await_sample("doorward_calls_under_way", 0)


@pytest.mark.parametrize(
    ("fault", "refresh", "request_outcome"),
    [
        pytest.param(None, "refreshed", "2xx", id="refreshed"),
        pytest.param(("status", {"status": 400, "body": _REFUSAL}), "grant_refused", "4xx", id="refused"),
        pytest.param(("status", {"status": 503}), "provider_unavailable", "5xx", id="away"),
        pytest.param(("hang", {}), "provider_timeout", "timeout", id="slow"),
    ],
)
def test_refreshes_and_requests_are_counted_by_outcome(
    monitored: Monitored,
    provider: SandboxProvider,
    fault: tuple[str, dict[str, object]] | None,
    refresh: str,
    request_outcome: str,
) -> None:
    person = monitored.stack.person()
    monitored.stack.connect(person)
    _expire(person.id)
    if fault:
        provider.fault("token", fault[0], **fault[1])
    refreshes = f'doorward_refreshes_total{{outcome="{refresh}",provider="flo"}}'
    requests = f'doorward_outbound_request_seconds_count{{outcome="{request_outcome}",peer="flo"}}'
    before = monitored.scrape()
    backend = (("authorization", f"Bearer {monitored.stack.service_token('backend')}"),)
    with monitored.stack.stub() as stub:
        future = stub.GetAccessToken.future(
            pb.GetAccessTokenRequest(user=person.slug, provider="flo"), metadata=backend
        )
        assert (future.exception(timeout=20) is None) == (fault is None)
    after = monitored.scrape()
    assert after.get(refreshes, 0) - before.get(refreshes, 0) == 1
    assert after.get(requests, 0) - before.get(requests, 0) == 1


def test_jobs_are_counted_by_outcome(monitored: Monitored, provider: SandboxProvider) -> None:
    done, put_off, abandoned = (
        f'doorward_jobs_total{{kind="revoke-token",outcome="{outcome}"}}'
        for outcome in ("done", "put_off", "abandoned")
    )
    before = monitored.scrape()
    person = monitored.stack.person()
    monitored.stack.connect(person)
    monitored.stack.app.integrations.revoke(person.id, "flo")
    monitored.await_sample(done, before.get(done, 0) + 1)
    monitored.stack.connect(person)
    provider.fault("revoke", "status", status=503)
    monitored.stack.app.integrations.revoke(person.id, "flo")
    monitored.await_sample(abandoned, before.get(abandoned, 0) + 1)
    assert monitored.scrape()[put_off] - before.get(put_off, 0) == 3  # the schedule of the tests


def test_what_the_database_holds_is_read_at_a_scrape(monitored: Monitored, provider: SandboxProvider) -> None:
    seen = monitored.scrape()
    assert seen["doorward_database_up"] == 1
    for name in (
        "doorward_jobs_due",
        "doorward_jobs_oldest_due_seconds",
        'doorward_deliveries{status="queued"}',
        'doorward_deliveries{status="abandoned"}',
        'doorward_consent_requests_open{status="pending"}',
        'doorward_consent_requests_open{status="prompted"}',
        "process_resident_memory_bytes",
        'python_gc_collections_total{generation="2"}',
        'doorward_build_info{version="0.1.0"}',
    ):
        assert seen[name] >= 0, name


def test_no_label_tells_of_a_user(monitored: Monitored) -> None:
    """All labels are of these few, and none has a value that a caller could choose."""
    page = httpx.get(f"http://127.0.0.1:{monitored.port}/metrics", trust_env=False).text
    labels = set(re.findall(r'[{,]([a-z]+)="', page))
    assert labels <= {
        "method", "code", "le", "peer", "outcome", "provider", "status", "kind", "version",
        "generation", "implementation", "major", "minor", "patchlevel",
    }  # fmt: skip


@pytest.mark.sqlite
def test_a_scrape_does_not_fail_because_the_database_is_away(
    tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]
) -> None:
    port = free_port()
    stack = make_stack(tmp_path / "home", logs, provider, secrets, DOORWARD_METRICS_PORT=str(port))
    with stack.server():
        assert scrape(port)["doorward_database_up"] == 1
        for path in stack.home.glob("doorward.db*"):
            path.write_bytes(b"no database" * 1000)
        seen = scrape(port)
        assert seen["doorward_database_up"] == 0
        assert "doorward_jobs_due" not in seen
        assert seen["doorward_calls_under_way"] == 0


def test_a_worker_of_its_own_has_metrics_too(
    tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]
) -> None:
    port = free_port()
    stack = make_stack(tmp_path / "home", logs, provider, secrets)
    environment = stack.environment | {"DOORWARD_METRICS_PORT": str(port)}
    with running([BIN / "doorward", "work"], logs / "worker-with-metrics.log", environment) as worker:
        worker.await_output('"working"')
        person = stack.person()
        stack.connect(person)
        stack.app.integrations.revoke(person.id, "flo")
        done = 'doorward_jobs_total{kind="revoke-token",outcome="done"}'
        await_condition(lambda: scrape(port).get(done) == 1, done)


def test_a_port_in_use_is_told_in_a_sentence(monitored: Monitored) -> None:
    done = monitored.stack.cli("work")
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{monitored.port} for metrics: Address already in use" in done.stderr
    assert "DOORWARD_METRICS_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_connections_are_counted_beside_the_scrapes(
    tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]
) -> None:
    port = free_port()
    stack = make_stack(tmp_path / "home", logs, provider, secrets, DOORWARD_METRICS_PORT=str(port))
    people = [stack.person() for _ in range(3)]
    for person in people:
        stack.connect(person)
    Connection.update(needs_reauth=True).where(Connection.user == people[0].id).execute()
    with stack.server():
        connected = 'doorward_connections{provider="flo",status="connected"}'
        await_condition(lambda: scrape(port).get(connected) == 2, connected)
        assert scrape(port)['doorward_connections{provider="flo",status="needs_reauth"}'] == 1


def _expire(user_id: int) -> None:
    connection = Connection.get(Connection.user == user_id)
    Connection.update(expires_at=connection.obtained_at).where(Connection.id == connection.id).execute()
