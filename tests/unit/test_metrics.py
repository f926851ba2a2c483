"""The page of metrics: who gets it, and what it costs a call."""

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from doorward_server.errors import OperatorError
from doorward_server.metrics import Metrics, served
from tests.processes import free_port
from tests.scraping import samples, scrape

METHOD = "/doorward.integration.v1.IntegrationService/GetKaiStatus"


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    with served(Metrics().registry, "127.0.0.1", port):
        yield port


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("GET", "/metrics?collect=all", 200),
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("POST", "/metrics", 501),
        ("DELETE", "/metrics", 501),
    ],
)
def test_one_page_is_served(port: int, method: str, path: str, status: int) -> None:
    request = httpx.Request(method, httpx.URL(f"http://127.0.0.1:{port}", raw_path=path.encode()))
    with httpx.Client(trust_env=False) as client:
        assert client.send(request).status_code == status


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        pytest.param("*/*", "text/plain; version=0.0.4", id="anything"),
        pytest.param("application/openmetrics-text; version=1.0.0", "application/openmetrics-text", id="OpenMetrics"),
    ],
)
def test_the_form_is_negotiated(port: int, accept: str, content_type: str) -> None:
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"accept": accept}, trust_env=False)
    assert page.headers["content-type"].startswith(content_type)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="TLS"),
        pytest.param(b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n", id="a long path"),
        pytest.param(b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", id="many headers"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", id="leaves before the answer"),
    ],
)
def test_who_talks_nonsense_keeps_nobody_from_scraping(
    port: int, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(sent)
        assert "doorward_calls_under_way" in scrape(port)
    assert "doorward_calls_under_way" in scrape(port)
    assert capfd.readouterr() == ("", "")


def test_an_address_in_use_is_an_error_of_the_operator(port: int) -> None:
    with pytest.raises(OperatorError, match=f"cannot listen on 127.0.0.1:{port} .*DOORWARD_METRICS_PORT"):
        served(Metrics().registry, "127.0.0.1", port).__enter__()


def test_without_a_port_nothing_is_served() -> None:
    with served(Metrics().registry, "127.0.0.1", None):
        assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]


def test_calls_of_many_threads_are_all_counted() -> None:
    metrics = Metrics()
    calls = metrics.calls_of(METHOD)

    def serve() -> None:
        for _ in range(2_000):
            calls.begin()
            calls.end("OK", 0.002)

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    port = free_port()
    with served(metrics.registry, "127.0.0.1", port):
        seen = scrape(port)
    assert seen['doorward_calls_total{code="OK",method="IntegrationService/GetKaiStatus"}'] == 16_000
    assert seen['doorward_call_seconds_bucket{le="0.0025",method="IntegrationService/GetKaiStatus"}'] == 16_000
    assert seen["doorward_calls_under_way"] == 0


def test_two_registries_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.job_ended("delivery", "done")
    port = free_port()
    with served(other.registry, "127.0.0.1", port):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert 'doorward_jobs_total{kind="delivery",outcome="done"}' not in samples(text)
