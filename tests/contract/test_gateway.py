"""The gateway as a process: its health, limits and timeouts, its launcher's words, its drain and the server's."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward_gateway import cli as gateway_cli
from doorward_gateway import settings as gateway_settings
from doorward_gateway.settings import GatewayError
from doorward_server.errors import CallError
from doorward_server.rpc.status import status_code, trailing_metadata
from tests.processes import BIN, Process, await_condition, clean_environment, free_port, running
from tests.sandbox.client import SandboxProvider
from tests.stack import Person, Stack, make_stack, rest

STATUS = "/api/v1/users/me/integrations/kai/flo"
CALLBACK = f"{STATUS}/oauth2callback"
SERVICE = "doorward.integration.v1.IntegrationService"
# Less than the provider's timeout in the stack's settings.
SLOW = 0.4
AT_ONCE = {"DOORWARD_GATEWAY_DRAIN_WAIT": "0", "DOORWARD_GRPC_DRAIN_WAIT": "0"}


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Stack]:
    """A home with a server; the gateways and further servers of these tests share it."""
    folder = tmp_path_factory.mktemp("gateway") / "home"
    stack = make_stack(folder, logs, shared_provider, secrets, **AT_ONCE)
    with stack.server():
        yield stack


@pytest.fixture
def person(home: Stack, provider: SandboxProvider) -> Person:
    return home.person()


def front(home: Stack, *sockets: Path, grpc_port: int | None = None, **environment: str) -> Stack:
    """The same home behind a gateway of its own, before other servers if some are named."""
    if sockets:
        environment["DOORWARD_GATEWAY_UPSTREAMS"] = ", ".join(f"unix:{path}" for path in sockets)
    return replace(
        home,
        grpc_port=grpc_port or home.grpc_port,
        gateway_port=free_port(),
        environment={**AT_ONCE, **environment},
    )


def socket_of(home: Stack, port: int) -> Path:
    return home.home / f"doorward-{port}.sock"


def as_user(person: Person) -> dict[str, str]:
    return {"cookie": f"doorward_session={person.cookie}"}


def get_status(stack: Stack, person: Person) -> httpx.Response:
    return rest(stack, "GET", STATUS, headers=as_user(person))


def post_code(stack: Stack, person: Person, code: str) -> httpx.Response:
    return rest(stack, "POST", CALLBACK, headers=as_user(person), json={"code": code})


def assert_error(answer: httpx.Response, status: int, code: int, reason: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    error = answer.json()
    assert set(error) == {"code", "message", "details"}
    assert error["code"] == code
    assert error["details"] == [
        {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": reason,
            "domain": "doorward",
            "metadata": {},
        }
    ]
    assert answer.headers["x-request-id"]
    assert not [name for name in answer.headers if name.startswith(("grpc-", "x-envoy-", "server"))]


def await_status(stack: Stack, path: str, status: int) -> None:
    """Until a route answers so; what it answers before that is JSON, too."""

    def answers() -> bool:
        answer = rest(stack, "GET", path)
        assert answer.headers["content-type"] == "application/json"
        return answer.status_code == status

    await_condition(answers, f"{status} from {path}")


# Health and upstreams


def test_without_a_server(home: Stack, person: Person) -> None:
    stack = front(home, home.home / "nobody.sock")
    with stack.gateway():
        assert_error(get_status(stack, person), 503, 14, "UNAVAILABLE")
        assert_error(rest(stack, "POST", CALLBACK, json={"code": "x"}), 503, 14, "UNAVAILABLE")
        answer = rest(stack, "GET", "/healthz")
        assert (answer.status_code, answer.json()) == (503, {"status": 503})
        assert answer.headers["content-type"] == "application/json"
        # What the gateway refuses by itself, it refuses as ever.
        assert_error(rest(stack, "GET", "/nothing"), 404, 5, "NO_SUCH_ROUTE")
        assert_error(rest(stack, "POST", CALLBACK, content=b"x"), 415, 3, "UNSUPPORTED_MEDIA_TYPE")


def test_a_server_that_is_killed_and_comes_back(home: Stack, person: Person) -> None:
    stack = front(home, grpc_port=free_port())
    with stack.gateway():
        with stack.server() as server:
            await_status(stack, "/healthz", 200)
            assert get_status(stack, person).status_code == 200
            server.kill()
            await_status(stack, "/healthz", 503)
            assert_error(get_status(stack, person), 503, 14, "UNAVAILABLE")
        assert socket_of(stack, stack.grpc_port).exists()  # what a killed server leaves is no obstacle
        log = stack.logs / f"server-{stack.grpc_port}-again.log"
        environment = clean_environment(stack.environment)
        with running([BIN / "doorward", "serve"], log, environment) as server:
            server.await_output('"serving"')
            await_status(stack, "/healthz", 200)
            # Envoy's threads learn of it one after the other.
            await_condition(lambda: get_status(stack, person).status_code == 200, "a status from the new server")


# Several servers


class Load:
    """Callers that send one request after the other until told to stop."""

    def __init__(self, stack: Stack, person: Person, callers: int) -> None:
        self.statuses: list[int] = []
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(callers)
        self._runs = [self._pool.submit(self._call, stack, person) for _ in range(callers)]

    def await_answers(self, count: int) -> None:
        """Until so many more requests are answered."""
        wanted = len(self.statuses) + count
        await_condition(lambda: len(self.statuses) >= wanted, f"{count} answers")

    def stop(self) -> list[int]:
        """End the load; returns the statuses of all answers."""
        self._stop.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()
        return self.statuses

    def _call(self, stack: Stack, person: Person) -> None:
        client = httpx.Client(base_url=stack.url, trust_env=False, verify=False, timeout=30, headers=as_user(person))
        with client:
            while not self._stop.is_set():
                self.statuses.append(client.get(STATUS).status_code)


@contextlib.contextmanager
def loaded(stack: Stack, person: Person, callers: int) -> Iterator[Load]:
    load = Load(stack, person, callers)
    try:
        yield load
    finally:
        load.stop()


@pytest.mark.parametrize(
    "number",
    [
        # What a killed server was working on, the other one is asked, for these are reads.
        pytest.param(signal.SIGKILL, id="killed"),
        # One that is told to stop tells the gateway first, and by default waits until that has looked.
        pytest.param(signal.SIGTERM, id="drained"),
    ],
)
def test_one_of_two_servers_goes(home: Stack, person: Person, number: int) -> None:
    port = free_port()
    stack = front(home, socket_of(home, home.grpc_port), socket_of(home, port), DOORWARD_GRPC_DRAIN_WAIT="")
    with stack.gateway(), stack.server(port) as server:
        with loaded(stack, person, callers=4) as load:
            await_condition(lambda: server.output().count('"call"') >= 50, "the second server's share of the load")
            server.signal(number)
            server.wait()
            load.await_answers(200)
        assert set(load.statuses) == {200}


# What the server and upstreams say, as HTTP


class Upstream:
    """A gRPC server that is healthy, and fails every call as the request's `kai_type` says, or never answers."""

    SILENT = "silent"

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        handler = grpc.unary_unary_rpc_method_handler(
            self._answer,
            request_deserializer=pb.GetKaiStatusRequest.FromString,
            response_serializer=pb.GetKaiStatusResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"GetKaiStatus": handler}),)
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> "Upstream":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def _answer(self, request: pb.GetKaiStatusRequest, context: grpc.ServicerContext) -> pb.GetKaiStatusResponse:
        if request.kai_type == self.SILENT:
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(30)
        elif request.kai_type.startswith("bare-"):
            context.abort(grpc.StatusCode[request.kai_type.removeprefix("bare-")], "some words")
        error = _error(request.kai_type)
        context.set_trailing_metadata(trailing_metadata(error))
        context.abort(status_code(error), error.message)
        raise AssertionError("abort raises")


def _error(code: str) -> CallError:
    error = type("Planned", (CallError,), {"code": code, "reason": "PLANNED", "message": "as planned"})()
    assert isinstance(error, CallError)
    return error


@pytest.fixture(scope="module")
def upstream(home: Stack) -> Iterator[tuple[Stack, Upstream]]:
    """A gateway before that upstream, which it gives up on after half a second."""
    with Upstream() as upstream:
        address = f"127.0.0.1:{upstream.port}"
        stack = front(home, DOORWARD_GATEWAY_UPSTREAMS=address, DOORWARD_GATEWAY_TIMEOUT="0.5")
        with stack.gateway():
            await_status(stack, "/healthz", 200)
            yield stack, upstream


STATUSES = {
    "INVALID_ARGUMENT": (3, 400),
    "FAILED_PRECONDITION": (9, 400),
    "OUT_OF_RANGE": (11, 400),
    "UNAUTHENTICATED": (16, 401),
    "PERMISSION_DENIED": (7, 403),
    "NOT_FOUND": (5, 404),
    "ALREADY_EXISTS": (6, 409),
    "ABORTED": (10, 409),
    "RESOURCE_EXHAUSTED": (8, 429),
    "INTERNAL": (13, 500),
    "UNIMPLEMENTED": (12, 501),
    "UNAVAILABLE": (14, 503),
    "DEADLINE_EXCEEDED": (4, 504),
}


@pytest.mark.parametrize(("code", "number", "status"), [(code, *row) for code, row in STATUSES.items()], ids=STATUSES)
def test_every_code_becomes_its_http_status(
    upstream: tuple[Stack, Upstream], code: str, number: int, status: int
) -> None:
    stack, _ = upstream
    answer = rest(stack, "GET", f"/api/v1/users/me/integrations/kai/{code}")
    assert_error(answer, status, number, "PLANNED")
    assert ("retry-after" in answer.headers) == (status in (429, 503))


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNIMPLEMENTED"])
def test_a_status_without_details_gets_them(upstream: tuple[Stack, Upstream], code: str) -> None:
    stack, _ = upstream
    answer = rest(stack, "GET", f"/api/v1/users/me/integrations/kai/bare-{code}")
    assert [detail["domain"] for detail in answer.json()["details"]] == ["doorward"]


def test_no_answer_in_time(upstream: tuple[Stack, Upstream]) -> None:
    stack, server = upstream
    started = time.monotonic()
    answer = rest(stack, "GET", f"/api/v1/users/me/integrations/kai/{Upstream.SILENT}")
    assert_error(answer, 504, 4, "TIMEOUT")
    # Envoy counts from when its loop woke up, which may be a little before the request was read.
    assert 0.45 < time.monotonic() - started < 5
    assert server.cancelled.wait(10)  # the server is told that nobody waits any more


# The rate limit


def ask_from(address: str, stack: Stack, count: int, path: str = STATUS) -> list[httpx.Response]:
    """Requests in a row from an address of this machine, each claiming another one."""
    transport = httpx.HTTPTransport(local_address=address, verify=False)
    with httpx.Client(base_url=stack.url, transport=transport, timeout=30) as client:
        return [client.get(path, headers={"x-forwarded-for": f"9.9.9.{number}"}) for number in range(count)]


def test_the_rate_limit(home: Stack) -> None:
    stack = front(home, DOORWARD_GATEWAY_RATE_LIMIT="5")
    with stack.gateway():
        await_status(stack, "/healthz", 200)
        answers = ask_from("127.0.0.2", stack, 40)
        refused = [answer for answer in answers if answer.status_code == 429]
        passed = [answer for answer in answers if answer.status_code == 401]
        assert len(refused) + len(passed) == 40
        assert 10 <= len(passed) <= 30  # a burst of twice the rate, and what came in since
        for answer in refused:
            assert_error(answer, 429, 8, "RATE_LIMITED")
            assert int(answer.headers["retry-after"]) >= 1
        # Each address has its own limit, health is not limited, and time heals.
        assert {answer.status_code for answer in ask_from("127.0.0.3", stack, 5)} == {401}
        assert {answer.status_code for answer in ask_from("127.0.0.2", stack, 40, "/healthz")} == {200}
        await_condition(lambda: ask_from("127.0.0.2", stack, 1)[0].status_code == 401, "the limit to let one pass")


def test_no_rate_limit(home: Stack) -> None:
    stack = front(home, DOORWARD_GATEWAY_RATE_LIMIT="0")
    with stack.gateway():
        await_status(stack, "/healthz", 200)
        assert {answer.status_code for answer in ask_from("127.0.0.2", stack, 300)} == {401}


# The access log


def test_the_access_log(home: Stack, person: Person) -> None:
    stack = front(home, DOORWARD_GATEWAY_RATE_LIMIT="5")
    code = home.provider.code()
    requests: list[tuple[int, str, str, dict[str, Any]]] = [
        (200, "GET", f"{STATUS}?secret=query", {"headers": as_user(person)}),
        (200, "POST", CALLBACK, {"headers": as_user(person), "json": {"code": code}}),
        (401, "GET", STATUS, {}),
        (404, "GET", "/nothing", {}),
        (413, "POST", CALLBACK, {"json": "x" * 70_000}),
        (415, "POST", CALLBACK, {"content": b"secret body"}),
    ]
    seen = {}

    def ask(method: str, path: str, **options: Any) -> int:
        answer = rest(stack, method, path, **options)
        seen[answer.headers["x-request-id"]] = (answer.status_code, method, path.partition("?")[0])
        return answer.status_code

    with stack.gateway():
        await_status(stack, "/healthz", 200)
        for status, method, path, options in requests:
            assert ask(method, path, **options) == status
        await_condition(lambda: ask("GET", STATUS) == 429, "the rate limit")
    log = (stack.logs / f"gateway-{stack.gateway_port}.log").read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {line["request_id"]: (line["status"], line["method"], line["path"]) for line in lines} == seen
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    assert not [secret for secret in ("secret", code, person.cookie) if secret in log]


# The launcher's words


def launch(home: Stack, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `doorward-gateway` to its end."""
    settings = {f"DOORWARD_GATEWAY_{name}": value for name, value in environment.items()}
    return subprocess.run(
        [BIN / "doorward-gateway", *arguments],
        env=clean_environment(front(home).environment | settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["PORT", "ADMIN_PORT"])
def test_a_port_in_use(home: Stack, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        done = launch(home, **{name: str(port)})
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"doorward-gateway: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert f"DOORWARD_GATEWAY_{name}" in line


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        pytest.param("UPSTREAMS", "nonsense", '"nonsense" has to be unix:PATH or host:port', id="upstream"),
        pytest.param("UPSTREAMS", "unix:a, host:0", '"host:0" has to be', id="upstream's port"),
        pytest.param("UPSTREAMS", f"unix:/{'x' * 107}", "longer than 107 bytes", id="long socket path"),
        pytest.param("RATE_LIMIT", "-1", "greater than or equal to 0", id="negative rate limit"),
        pytest.param("RATE_LIMIT", "many", "valid integer", id="rate limit in words"),
        pytest.param("PORT", "65536", "less than or equal to 65535", id="port"),
        pytest.param("TIMEOUT", "0", "greater than 0", id="timeout"),
        pytest.param("DRAIN_GRACE", "5", "within 3.5 s together", id="long drain"),
        pytest.param("WORKERS", "0", "workers (or DOORWARD_WORKERS): Input should be greater", id="no worker"),
        pytest.param("WORKERS", "65", "less than or equal to 64", id="many workers"),
    ],
)
def test_a_bad_setting(
    home: Stack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    words: str,
) -> None:
    """In this process, and without an Envoy in case it is accepted."""
    for variable in [variable for variable in os.environ if variable.startswith("DOORWARD_")]:
        monkeypatch.delenv(variable)
    given = f"DOORWARD_{name}" if name == "WORKERS" else f"DOORWARD_GATEWAY_{name}"
    for variable, setting in (front(home).environment | {given: value}).items():
        monkeypatch.setenv(variable, setting)
    monkeypatch.setattr(sys, "argv", ["doorward-gateway", "--print-config"])
    with pytest.raises(SystemExit) as end:
        gateway_cli.run()
    assert capsys.readouterr() == ("", "")
    line = end.value.code  # which Python prints, and exits with 1
    assert isinstance(line, str)
    assert "\n" not in line
    assert line.startswith("doorward-gateway: ")
    assert words in line
    assert name.lower() in line.lower() or "SOCKET" in line


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        pytest.param({"DOORWARD_GRPC_PORT": "65534"}, ("workers (3)", "port 65536"), id="ports beyond all"),
        pytest.param({"DOORWARD_GRPC_SOCKET": "/x"}, ("DOORWARD_GRPC_SOCKET", "workers to 1"), id="one socket for all"),
    ],
)
def test_workers_without_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: tuple[str, ...]
) -> None:
    for variable in [variable for variable in os.environ if variable.startswith("DOORWARD_")]:
        monkeypatch.delenv(variable)
    for variable, setting in {"DOORWARD_WORKERS": "3", **variables}.items():
        monkeypatch.setenv(variable, setting)
    with pytest.raises(GatewayError) as failure:
        gateway_settings.load(tmp_path)
    sentence = str(failure.value)
    assert "\n" not in sentence
    assert [word for word in words if word not in sentence] == []


def test_a_bad_setting_as_a_process(home: Stack) -> None:
    done = launch(home, UPSTREAMS="nonsense")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("doorward-gateway: ")
    assert '"nonsense" has to be unix:PATH or host:port' in line


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--validate", "OK"), ("--version", "doorward-gateway 0."), ("--help", "DOORWARD_GATEWAY_PORT"), ("-h", "Usage")],
)
def test_what_it_prints(home: Stack, argument: str, words: str) -> None:
    done = launch(home, argument)
    assert (done.returncode, done.stderr if argument != "--validate" else "") == (0, "")
    assert words in done.stdout + done.stderr


def test_print_config(home: Stack) -> None:
    ports = {"PORT": "18080", "ADMIN_PORT": "19901"}
    done = launch(home, "--print-config", **ports, RATE_LIMIT="7", TIMEOUT="2.5", UPSTREAMS="unix:/a,[::1]:2")
    assert (done.returncode, done.stderr) == (0, "")
    config = yaml.safe_load(done.stdout)
    [listener], [cluster] = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    addresses = [place["address"]["socket_address"] for place in (listener, config["admin"])]
    assert [address["port_value"] for address in addresses] == [18080, 19901]
    [endpoints] = cluster["load_assignment"]["endpoints"]
    assert [endpoint["endpoint"]["address"] for endpoint in endpoints["lb_endpoints"]] == [
        {"pipe": {"path": "/a"}},
        {"socket_address": {"address": "::1", "port_value": 2}},
    ]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    # Those that go to the server; one is answered by the gateway itself.
    assert [route["route"]["timeout"] for route in routes if "route" in route] == ["2.5s"] * 3
    assert [route["direct_response"]["status"] for route in routes if "route" not in route] == [400]
    filters = {one["name"].rpartition(".")[2]: one["typed_config"] for one in manager["http_filters"]}
    bucket = filters["local_ratelimit"]["descriptors"][0]["token_bucket"]
    assert (bucket["max_tokens"], bucket["tokens_per_fill"]) == (14, 7)
    assert Path(filters["grpc_json_transcoder"]["proto_descriptor"]).is_absolute()


def test_print_config_with_workers(home: Stack) -> None:
    """A socket for each, unless the upstreams are named."""
    environment = home.environment | {"DOORWARD_WORKERS": "3", "DOORWARD_GRPC_PORT": "51000"}
    sockets = [f"{home.home}/doorward-{port}.sock" for port in (51000, 51001, 51002)]
    for upstreams, paths in (("", sockets), ("unix:/a", ["/a"])):
        done = subprocess.run(
            [BIN / "doorward-gateway", "--print-config"],
            env=clean_environment(environment | {"DOORWARD_GATEWAY_UPSTREAMS": upstreams}),
            capture_output=True,
            text=True,
            check=True,
        )
        [cluster] = yaml.safe_load(done.stdout)["static_resources"]["clusters"]
        [endpoints] = cluster["load_assignment"]["endpoints"]
        addresses = [endpoint["endpoint"]["address"] for endpoint in endpoints["lb_endpoints"]]
        assert addresses == [{"pipe": {"path": path}} for path in paths]


# The end


def envoy_of(launcher: Process) -> psutil.Process:
    [envoy] = psutil.Process(launcher.pid).children()
    assert "envoy" in envoy.name()
    return envoy


def is_gone(process: psutil.Process) -> bool:
    # An orphan stays a zombie where nobody collects it.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@contextlib.contextmanager
def slow_call(stack: Stack, person: Person) -> Iterator["concurrent.futures.Future[httpx.Response]"]:
    """A request that is under way: the provider has it and takes its time."""
    provider = stack.provider
    code = provider.code()
    provider.configure(latency=SLOW)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(post_code, stack, person, code)
        await_condition(lambda: len(provider.requests()) == 1, "the request at the provider")
        yield call


def test_a_request_under_way_when_the_gateway_is_told_to_stop(home: Stack, person: Person) -> None:
    stack = front(home)
    with stack.gateway() as launcher:
        await_status(stack, "/healthz", 200)
        envoy = envoy_of(launcher)
        with slow_call(stack, person) as call:
            started = time.monotonic()
            launcher.signal(signal.SIGTERM)
            assert (call.result().status_code, call.result().content) == (200, b"{}")
        assert launcher.wait(10) == 0
        assert time.monotonic() - started < 4
    assert is_gone(envoy)
    with pytest.raises(httpx.ConnectError):
        rest(stack, "GET", "/healthz")


def test_an_idle_gateway_is_told_to_stop(home: Stack) -> None:
    stack = front(home, DOORWARD_GATEWAY_DRAIN_WAIT="")  # the default
    with stack.gateway() as launcher:
        await_status(stack, "/healthz", 200)
        envoy, started = envoy_of(launcher), time.monotonic()
        launcher.signal(signal.SIGINT)
        # A load balancer sees it before connections are refused.
        await_status(stack, "/healthz", 503)
        assert get_status(stack, Person(0, "", "unknown")).status_code == 401
        assert launcher.wait(10) == 0
        assert time.monotonic() - started < 4
    assert is_gone(envoy)


def test_a_killed_launcher_takes_envoy_with_it(home: Stack) -> None:
    stack = front(home)
    with stack.gateway() as launcher:
        envoy = envoy_of(launcher)
        launcher.kill()
        await_condition(lambda: is_gone(envoy), "Envoy's end", patience=10)


def test_envoy_s_end_is_the_launcher_s(home: Stack) -> None:
    stack = front(home)
    with stack.gateway() as launcher:
        envoy_of(launcher).kill()
        assert launcher.wait(10) != 0


def test_a_call_under_way_when_the_server_is_told_to_stop(home: Stack, person: Person) -> None:
    port = free_port()
    stack = front(home, grpc_port=port, DOORWARD_GRPC_DRAIN_WAIT="0.3")
    with stack.gateway(), stack.server() as server:
        await_status(stack, "/healthz", 200)
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            slow_call(stack, person) as call,
        ):
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            await_condition(
                lambda: check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING,
                "NOT_SERVING",
            )
            assert (call.result().status_code, call.result().content) == (200, b"{}")
        assert server.wait(10) == 0
        assert time.monotonic() - started < 4.5
        assert not socket_of(stack, port).exists()
        assert '"stopped"' in server.output()
        await_status(stack, "/healthz", 503)
        assert_error(get_status(stack, person), 503, 14, "UNAVAILABLE")
