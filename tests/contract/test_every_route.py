"""What holds for every REST route, through a real Envoy. Bytes go out as they are written: clients would mend them."""

import http.client
import io
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from doorward.identity.v1 import identity_service_pb2 as identity_pb
from doorward.identity.v1 import identity_service_pb2_grpc as identity_stubs
from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from tests.stack import Client, Person, Stack

STATUS = "/api/v1/users/me/integrations/kai/flo"
CALLBACK = f"{STATUS}/oauth2callback"
USERS, IDENTITIES = "/api/users", "/api/users/nobody/o-auth-identities"
LOG_IN, SESSION, SESSIONS = "/api/auth/login-o-auth", "/api/auth/session", "/api/auth/sessions"
SERVICE = "/doorward.integration.v1.IntegrationService"
IDENTITY_SERVICE = "/doorward.identity.v1.IdentityService"
KEYBROKER_SERVICE = "/doorward.keybroker.v1.KeyBrokerService"
JSON = b"content-type: application/json\r\n"
TEXT = b"content-type: text/plain\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
LARGEST_BODY = 64 * 1024
# What the answers of this gateway say, and nothing more.
HEADERS = {"content-type", "content-length", "date", "x-request-id", "connection"}


@dataclass
class Answer:
    """One answer, read as it came."""

    status: int
    headers: Message
    body: bytes

    @property
    def reason(self) -> str:
        """The ErrorInfo reason; "" when the answer is no error."""
        details = self.json.get("details", [])
        return str(details[0]["reason"]) if details else ""

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


def read_answer(stream: io.BufferedReader, method: str = "GET") -> Answer:
    """The next answer of a connection; informational ones (100 Continue) are passed over."""
    while True:
        line = stream.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        status = int(line.split()[1])
        headers = http.client.parse_headers(stream)
        if status >= 200:
            break
    length = 0 if method == "HEAD" else int(headers["content-length"])
    return Answer(status, headers, stream.read(length))


def connect(stack: Stack) -> socket.socket:
    # A timeout, so that a request that is never answered fails the test.
    return socket.create_connection(("127.0.0.1", stack.gateway_port), timeout=10)


def exchange(stack: Stack, request: bytes, method: str = "GET") -> Answer:
    """Send bytes, read one answer."""
    with connect(stack) as peer, peer.makefile("rb") as stream:
        peer.sendall(request)
        return read_answer(stream, method)


def request(method: str, target: str | bytes, headers: bytes = b"", body: bytes = b"") -> bytes:
    path = target.encode() if isinstance(target, str) else target
    return b"%s %s HTTP/1.1\r\nhost: doorward.example\r\n%s\r\n%s" % (method.encode(), path, headers, body)


def ask(stack: Stack, method: str, target: str | bytes, headers: bytes = b"", body: bytes = b"") -> Answer:
    return exchange(stack, request(method, target, headers, body), method)


def cookie(person: Person) -> bytes:
    return f"cookie: doorward_session={person.cookie}\r\n".encode()


def authorization(client: Client) -> bytes:
    return f"authorization: {client.headers['authorization']}\r\n".encode()


def sized(body: bytes) -> bytes:
    return b"content-length: %d\r\n" % len(body)


def chunks(body: bytes, size: int = 8192) -> bytes:
    parts = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def assert_error(answer: Answer, status: int, reason: str, code: int | None = None) -> None:
    """The answer is an error in the documented shape."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json"), answer
    error = answer.json
    assert set(error) == {"code", "message", "details"}
    assert error["message"]
    assert isinstance(error["code"], int)
    assert code is None or error["code"] == code
    [detail] = error["details"]
    assert set(detail) == {"@type", "reason", "domain", "metadata"}
    assert (detail["@type"], detail["domain"]) == ("type.googleapis.com/google.rpc.ErrorInfo", "doorward")
    assert detail["reason"] == reason


@pytest.fixture
def person(stack: Stack) -> Person:
    return stack.person()


def assert_asked_for(answer: Answer, *, connected: bool) -> None:
    assert (answer.status, answer.json) == (200, {"authStatus": connected})


# Paths and methods


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/nothing",
        "/api",
        "/api/",
        "/api/v1/nothing",
        "/api/v2/users/me/integrations/kai/flo",
        "/API/v1/users/me/integrations/kai/flo",
        "/api/v1/users/me/integrations/kai",
        "/api/v1/users/me/integrations/kai/",
        f"{STATUS}/more",
        "/healthz/",
        "/healthz/more",
        "/users",
        "/api/v1/users/1",
        "/api/users/1/more",
        "/api/users//o-auth-identities/sandbox/1/more",
        "/api/users/1/o-auth-identities/sandbox/",
        "/api/users/1/o-auth-identities/sandbox/1/more",
        "/api/users/1/oAuthIdentities",
        "/api/auth",
        "/api/auth/login",
        "/api/auth/sessions/1",
        "/favicon.ico",
        "/metrics",
        "/stats",
        "/ready",
        "/config_dump",
        "/quitquitquit",
        f"{SERVICE}/GetKaiStatus",
        f"{SERVICE}/GetAccessToken",
        f"/api{SERVICE}/GetAccessToken",
        f"{IDENTITY_SERVICE}/GetUser",
        f"{IDENTITY_SERVICE}/CreateSession",
        f"/api{IDENTITY_SERVICE}/CreateSession",
        f"{KEYBROKER_SERVICE}/RequestApiKeyForm",
        f"{KEYBROKER_SERVICE}/RequestApiKey",
        f"{KEYBROKER_SERVICE}/AddApiKey",
        f"{KEYBROKER_SERVICE}/ListDeliveries",
        f"/api{KEYBROKER_SERVICE}/ListDeliveries",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_unknown_paths(stack: Stack, target: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = ask(stack, method, target, JSON + sized(b"{}"), b"{}")
        assert_error(answer, 404, "NO_SUCH_ROUTE", code=5)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        *[(method, STATUS) for method in ("POST", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE")],
        *[(method, CALLBACK) for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")],
        *[(method, USERS) for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")],
        *[(method, f"{USERS}/1") for method in ("POST", "PUT", "HEAD", "OPTIONS")],
        *[(method, IDENTITIES) for method in ("GET", "PUT", "PATCH", "DELETE")],
        *[(method, f"{IDENTITIES}/sandbox/1") for method in ("GET", "POST", "PUT", "PATCH")],
        *[(method, LOG_IN) for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD")],
        *[(method, target) for target in (SESSION, SESSIONS) for method in ("GET", "POST", "PUT", "HEAD")],
    ],
)
def test_unknown_methods(stack: Stack, person: Person, method: str, target: str) -> None:
    stack.connect(person)
    answer = ask(stack, method, target, cookie(person))
    if method == "HEAD":
        assert (answer.status, answer.headers["content-type"]) in {(404, "application/json"), (405, "application/json")}
    else:
        assert_error(answer, 404, "NO_SUCH_ROUTE")
    assert answer.headers["x-request-id"]
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person)), connected=True)


@pytest.mark.parametrize(
    ("target", "status", "reason"),
    [
        pytest.param("/api/v1/../v1/users/me/integrations/kai/flo", 200, "", id="dot segment"),
        pytest.param("/api/v1/users/x/%2e%2E/me/integrations/kai/flo", 200, "", id="encoded dot segment"),
        pytest.param("/api/v1/../../nothing", 404, "NO_SUCH_ROUTE", id="dots out of the API"),
        pytest.param("/../../../../etc/passwd", 404, "NO_SUCH_ROUTE", id="dots above the root"),
        pytest.param("//api//v1/users//me/integrations/kai/flo", 200, "", id="double slashes"),
        pytest.param("/api/v1/users/me/integrations/kai//", 404, "NO_SUCH_ROUTE", id="empty segment"),
        pytest.param(f"{STATUS}/", 200, "", id="trailing slash"),
        pytest.param("/api/v1/users/m%65/integrations/kai/fl%6F", 200, "", id="encoded letters"),
        pytest.param("/api/v1/users%2fme/integrations/kai/flo", 404, "NO_SUCH_ROUTE", id="encoded slash"),
        pytest.param("/api/v1/users/me%2Fx/integrations/kai/flo", 403, "NOT_SELF", id="encoded slash in the user"),
        pytest.param(f"{STATUS}%2f", 400, "UNKNOWN_KAI_TYPE", id="encoded slash in the type"),
        pytest.param(f"{STATUS}%252f", 400, "UNKNOWN_KAI_TYPE", id="twice encoded slash"),
        pytest.param(f"{STATUS};a=b", 400, "UNKNOWN_KAI_TYPE", id="path parameter"),
        pytest.param("/api/v1/users/me;x/integrations/kai/flo", 403, "NOT_SELF", id="path parameter of the user"),
        pytest.param("/api/v1/users/me+/integrations/kai/flo", 403, "NOT_SELF", id="plus is no space"),
        pytest.param(f"{STATUS}:verb", 400, "UNKNOWN_KAI_TYPE", id="verb"),
        pytest.param(f"{STATUS}%zz", 400, "UNKNOWN_KAI_TYPE", id="bad encoding"),
        pytest.param(f"{STATUS}#fragment", 400, "MALFORMED_REQUEST", id="fragment"),
        pytest.param(f"http://evil.example{STATUS}", 200, "", id="absolute form"),
        pytest.param(f"{STATUS}%00", 400, "MALFORMED_REQUEST", id="NUL in the type"),
        pytest.param("/api/v1/users/%00me/integrations/kai/flo", 400, "MALFORMED_REQUEST", id="NUL in the user"),
        pytest.param(f"{STATUS}%ff", 400, "MALFORMED_REQUEST", id="not UTF-8 in the type"),
        pytest.param("/api/v1/users/%ff/integrations/kai/flo", 400, "MALFORMED_REQUEST", id="not UTF-8 in the user"),
        pytest.param("/api/v1/users/me/integrations/kai/%c3%28", 400, "MALFORMED_REQUEST", id="cut UTF-8"),
        pytest.param("/api/v1/users/me/integrations/kai/%ed%a0%80", 400, "MALFORMED_REQUEST", id="surrogate"),
        pytest.param("/api/v1/users/me/integrations/kai/%c0%af", 400, "MALFORMED_REQUEST", id="overlong slash"),
        pytest.param(STATUS.encode() + b"\xff", 400, "MALFORMED_REQUEST", id="raw byte"),
        pytest.param(f"{STATUS}?", 200, "", id="empty query"),
    ],
)
def test_odd_paths(stack: Stack, person: Person, target: str | bytes, status: int, reason: str) -> None:
    stack.connect(person)
    answer = ask(stack, "GET", target, cookie(person))
    if status == 200:
        assert_asked_for(answer, connected=True)
    else:
        assert_error(answer, status, reason)


# Bodies and their type


def a_body(length: int) -> bytes:
    """A JSON object of so many bytes."""
    return b'{"kode":"%s"}' % (b"x" * (length - 11))


FRAMINGS = pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])


@dataclass(frozen=True)
class BodyRoute:
    """A route that takes a body, and the refusal of an empty one that comes with a session."""

    method: str
    target: str
    status: int
    reason: str

    def send(self, stack: Stack, headers: bytes, body: bytes, *, chunked: bool = False, query: str = "") -> Answer:
        framing, payload = (CHUNKED, chunks(body)) if chunked else (sized(body), body)
        return ask(stack, self.method, self.target + query, headers + framing, payload)


BODY_ROUTES = {
    "connect": BodyRoute("POST", CALLBACK, 400, "CODE_REQUIRED"),
    "create": BodyRoute("POST", USERS, 401, "NO_API_CLIENT"),
    "update": BodyRoute("PATCH", f"{USERS}/nobody", 401, "NO_API_CLIENT"),
    "link": BodyRoute("POST", IDENTITIES, 401, "NO_API_CLIENT"),
    "log in": BodyRoute("POST", LOG_IN, 400, "PROVIDER_REQUIRED"),
}
EVERY_BODY_ROUTE = pytest.mark.parametrize("route", BODY_ROUTES.values(), ids=BODY_ROUTES)


def post(stack: Stack, headers: bytes, body: bytes, *, chunked: bool = False) -> Answer:
    return BODY_ROUTES["connect"].send(stack, headers, body, chunked=chunked)


@FRAMINGS
@EVERY_BODY_ROUTE
def test_a_body_over_64_kib(stack: Stack, person: Person, route: BodyRoute, chunked: bool) -> None:
    body = a_body(LARGEST_BODY + 1)
    assert_error(route.send(stack, cookie(person) + JSON, body, chunked=chunked), 413, "BODY_TOO_LARGE", code=3)


@FRAMINGS
@EVERY_BODY_ROUTE
def test_a_body_of_64_kib(stack: Stack, person: Person, route: BodyRoute, chunked: bool) -> None:
    body = a_body(LARGEST_BODY)
    assert len(body) == LARGEST_BODY
    assert_error(route.send(stack, cookie(person) + JSON, body, chunked=chunked), route.status, route.reason)


@EVERY_BODY_ROUTE
def test_a_declared_length_is_believed(stack: Stack, person: Person, route: BodyRoute) -> None:
    headers = cookie(person) + JSON + b"content-length: 99999999999\r\n"
    assert_error(ask(stack, route.method, route.target, headers, b"{}"), 413, "BODY_TOO_LARGE")


@FRAMINGS
@EVERY_BODY_ROUTE
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json, text/plain",
        "application/vnd.api+json",
        "application/grpc-web",
        "application",
        "json",
        "*/*",
    ],
)
def test_bodies_of_another_type(
    stack: Stack, person: Person, route: BodyRoute, content_type: str | None, chunked: bool
) -> None:
    headers = b"" if content_type is None else f"content-type: {content_type}\r\n".encode()
    answer = route.send(stack, cookie(person) + headers, b'{"code":"x"}', chunked=chunked)
    assert_error(answer, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert stack.provider.requests() == []


@FRAMINGS
@EVERY_BODY_ROUTE
@pytest.mark.parametrize("headers", [JSON + TEXT, TEXT + JSON, JSON + JSON], ids=["json text", "text json", "twice"])
def test_two_content_types(stack: Stack, person: Person, route: BodyRoute, headers: bytes, chunked: bool) -> None:
    answer = route.send(stack, cookie(person) + headers, b'{"code":"x"}', chunked=chunked)
    assert_error(answer, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert stack.provider.requests() == []


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", STATUS),
        ("DELETE", STATUS),
        ("GET", f"{USERS}/1"),
        ("DELETE", f"{USERS}/1"),
        ("DELETE", f"{IDENTITIES}/sandbox/1"),
        ("DELETE", SESSION),
        ("DELETE", SESSIONS),
    ],
)
def test_bodies_of_another_type_where_none_is_awaited(stack: Stack, person: Person, method: str, target: str) -> None:
    stack.connect(person)
    answer = ask(stack, method, target, cookie(person) + TEXT + sized(b"hello"), b"hello")
    assert_error(answer, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person)), connected=True)


@EVERY_BODY_ROUTE
@pytest.mark.parametrize(
    "body",
    [b"{bad", b"[]", b'"x"', b"null", b"{} {}", b'{"a":"\xff"}', b'{"name":"\\ud800","code":"\\ud800"}', b"{" * 5000],
    ids=["syntax", "array", "string", "null", "trailing", "not utf-8", "surrogate", "deep"],
)
def test_malformed_json(stack: Stack, person: Person, route: BodyRoute, body: bytes) -> None:
    answer = route.send(stack, cookie(person) + JSON, body)
    if b"ud800" in body and route.reason == "NO_API_CLIENT":
        assert answer.status in {400, 401}  # an unknown field is passed over
    else:
        assert_error(answer, 400, "MALFORMED_REQUEST", code=3)
    assert stack.provider.requests() == []


@EVERY_BODY_ROUTE
@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"unknown":{"deep":[null,{"a":"b"}]},"@type":"x","Code":"y"}', b" \r\n\t{ } "],
    ids=["nothing", "empty object", "unknown fields", "blanks"],
)
@pytest.mark.parametrize("query", ["", "?name=x&provider=sandbox&code=x&%63ode=x&accessToken=x&access_token=x"])
def test_bodies_without_a_known_field(stack: Stack, person: Person, route: BodyRoute, body: bytes, query: str) -> None:
    assert_error(route.send(stack, cookie(person) + JSON, body, query=query), route.status, route.reason)
    assert stack.provider.requests() == []


@EVERY_BODY_ROUTE
@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", " \t application/json ;x"]
)
def test_the_ways_to_say_json(stack: Stack, person: Person, route: BodyRoute, content_type: str) -> None:
    headers = cookie(person) + f"content-type: {content_type}\r\n".encode()
    assert_error(route.send(stack, headers, b"{}"), route.status, route.reason)


@FRAMINGS
@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "application/json ; charset=utf-8",
        "APPLICATION/JSON",
        " \t application/json",
    ],
)
def test_json_bodies(stack: Stack, person: Person, content_type: str, chunked: bool) -> None:
    code = stack.provider.code()
    body = json.dumps({"code": code}).encode()
    answer = post(stack, cookie(person) + f"content-type: {content_type}\r\n".encode(), body, chunked=chunked)
    assert (answer.status, answer.body) == (200, b"{}")


@pytest.mark.parametrize(
    "headers",
    [b"", b"content-length: 0\r\n", TEXT + b"content-length: 0\r\n", JSON],
    ids=["bare", "length 0", "text of length 0", "json"],
)
def test_no_body_needs_no_type(stack: Stack, person: Person, headers: bytes) -> None:
    assert_error(ask(stack, "POST", CALLBACK, cookie(person) + headers), 400, "CODE_REQUIRED")
    assert_error(ask(stack, "DELETE", STATUS, cookie(person) + headers), 409, "NOT_CONNECTED")
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person) + headers), connected=False)


# HTTP/2 without TLS, in the few frames that it takes (RFC 9113, section 6; RFC 7541, section 6)

TYPE, LENGTH = "content-type", "content-length"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
# Entries of the static table; other statuses come as text after the name's index.
_INDEXED_STATUS = {0x88: 200, 0x8C: 400, 0x8D: 404, 0x8E: 500}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def literal(name: str, value: str) -> bytes:
    """A header field that stands for itself; short enough for lengths of one byte."""
    return b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in (name, value))


def ask_by_http_2(stack: Stack, method: str, path: str, headers: dict[str, str], body: bytes | None) -> Answer:
    """One request on a connection of its own; of the answer's headers only the status is read."""
    pseudo = {":method": method, ":scheme": "http", ":authority": "doorward.example", ":path": path}
    block = b"".join(literal(name, value) for name, value in (pseudo | headers).items())
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0)
    sent += frame(_HEADERS, _END_HEADERS | (_END_STREAM if body is None else 0), 1, block)
    if body is not None:
        more_to_come = len(body) < int(headers.get(LENGTH, 0))
        sent += frame(_DATA, 0 if more_to_come else _END_STREAM, 1, body)
    status, content = 0, b""
    with connect(stack) as peer, peer.makefile("rb") as stream:
        peer.sendall(sent)
        while True:
            head = stream.read(9)
            assert len(head) == 9, "the connection ended before the answer"
            payload = stream.read(int.from_bytes(head[:3]))
            kind, flags = head[3], head[4]
            if kind == _HEADERS and payload[0] in _INDEXED_STATUS:
                status = _INDEXED_STATUS[payload[0]]
            elif kind == _HEADERS and payload[:2] == b"H\x03":
                status = int(payload[2:5])
            elif kind == _DATA:
                content += payload
            if kind in {_DATA, _HEADERS} and flags & _END_STREAM:
                return Answer(status, Message(), content)


@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "status", "reason"),
    [
        pytest.param("GET", STATUS, {}, None, 200, "", id="route"),
        pytest.param("GET", "/nothing", {}, None, 404, "NO_SUCH_ROUTE", id="no route"),
        pytest.param("PUT", STATUS, {}, None, 404, "NO_SUCH_ROUTE", id="no method"),
        pytest.param("GET", f"{STATUS}%ff", {}, None, 400, "MALFORMED_REQUEST", id="not UTF-8"),
        pytest.param("GET", f"{STATUS}?user%5Fid=1", {}, None, 200, "", id="query"),
        pytest.param("POST", CALLBACK, {TYPE: "application/json"}, b"{}", 400, "CODE_REQUIRED", id="body"),
        pytest.param("POST", CALLBACK, {TYPE: "text/plain"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE", id="streamed text"),
        pytest.param("POST", CALLBACK, {}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE", id="streamed, no type"),
        pytest.param("POST", CALLBACK, {LENGTH: "2"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE", id="no type"),
        pytest.param("DELETE", STATUS, {TYPE: "text/plain"}, b"x", 415, "UNSUPPORTED_MEDIA_TYPE", id="text to revoke"),
        pytest.param("POST", CALLBACK, {}, b"", 400, "CODE_REQUIRED", id="streamed nothing"),
        pytest.param("POST", CALLBACK, {}, None, 400, "CODE_REQUIRED", id="no body"),
        pytest.param("POST", LOG_IN, {TYPE: "application/json"}, b"{}", 400, "PROVIDER_REQUIRED", id="log in"),
        pytest.param("POST", LOG_IN, {}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE", id="log in, no type"),
        pytest.param("PATCH", f"{USERS}/1", {}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE", id="update, no type"),
        pytest.param("DELETE", f"{USERS}/1", {}, b"x", 415, "UNSUPPORTED_MEDIA_TYPE", id="streamed text to delete"),
        pytest.param(
            "POST", CALLBACK, {TYPE: "application/json", LENGTH: "65537"}, b"{", 413, "BODY_TOO_LARGE", id="large"
        ),
    ],
)
def test_http_2(
    stack: Stack,
    person: Person,
    method: str,
    target: str,
    headers: dict[str, str],
    body: bytes | None,
    status: int,
    reason: str,
) -> None:
    of_person = {"cookie": f"doorward_session={person.cookie}"}
    answer = ask_by_http_2(stack, method, target, of_person | headers, body)
    assert (answer.status, answer.reason) == (status, reason)


# Nothing but the path says whose data, and of what kind

OTHER_NAMES = ["user_id", "userId", "user%5Fid", "user%5fid", "%75ser_id", "kai_type", "kaiType", "kai%5Ftype"]


@pytest.fixture
def other(stack: Stack, person: Person) -> Iterator[Person]:
    """Somebody else, who is connected to flo and min, and still is after the test; the caller is not."""
    other = stack.person()
    for kai in ("flo", "min"):
        stack.connect(other, kai)
    yield other
    for kai in ("flo", "min"):
        target = f"/api/v1/users/me/integrations/kai/{kai}"
        assert_asked_for(ask(stack, "GET", target, cookie(other)), connected=True)
        assert_asked_for(ask(stack, "GET", target, cookie(person)), connected=False)


def wanted(name: str, other: Person) -> str:
    """What an attacker would put there."""
    return "min" if "kai" in name else str(other.id)


@pytest.mark.parametrize("name", [*OTHER_NAMES, "code", "alt", "$.xgafv", "user_id[]", "user_id.x"])
def test_query_parameters_are_ignored(stack: Stack, person: Person, other: Person, name: str) -> None:
    for before in ("", "unknown=1&", "unknown=%00%ff&&=&"):
        query = f"?{before}{name}={wanted(name, other)}"
        assert_asked_for(ask(stack, "GET", STATUS + query, cookie(person)), connected=False)
        assert_error(ask(stack, "DELETE", STATUS + query, cookie(person)), 409, "NOT_CONNECTED")
        assert_error(ask(stack, "POST", CALLBACK + query, cookie(person)), 400, "CODE_REQUIRED")


@pytest.mark.parametrize("name", [*OTHER_NAMES, "user\\u005fid", "kai\\u005ftype"])
def test_body_fields_do_not_override_the_path(stack: Stack, person: Person, other: Person, name: str) -> None:
    # A code that the provider does not know: whoever it is exchanged for, nobody gets connected by it.
    body = b'{"code":"code-of-%d","%s":"%s"}' % (person.id, name.encode(), wanted(name, other).encode())
    headers = cookie(person) + JSON + sized(body)
    status = ask(stack, "GET", STATUS, headers, body)
    assert (status.status, status.body) == (200, b'{"authStatus":false}') or status.reason == "MALFORMED_REQUEST"
    assert ask(stack, "DELETE", STATUS, headers, body).reason in {"NOT_CONNECTED", "MALFORMED_REQUEST"}
    assert ask(stack, "POST", CALLBACK, headers, body).reason in {"CODE_REJECTED", "MALFORMED_REQUEST"}
    # The code was tried for the caller and flo or not at all; the other's claims are of what stands.
    claims = stack.app.database.fetch_one(
        "SELECT sum(user_id = ?), sum(user_id = ? AND provider != 'flo') FROM code_claims", (other.id, person.id)
    )
    assert claims == (2, 0)


@pytest.mark.parametrize("name", ["userId", "user_id"])
def test_a_body_that_repeats_the_path(stack: Stack, person: Person, other: Person, name: str) -> None:
    body = json.dumps({name: other.slug, "code": stack.provider.code()}).encode()
    target = f"/api/v1/users/{other.slug}/integrations/kai/flo/oauth2callback"
    assert_error(ask(stack, "POST", target, cookie(person) + JSON + sized(body), body), 403, "NOT_SELF")
    assert stack.provider.requests(grant_type="authorization_code")[2:] == []


@pytest.mark.parametrize(
    "more",
    [b'"unknown":1', b'"unknown":{"deep":[null,{"a":"b"}]}', b'"@type":"x"', b'"Code":"y"'],
    ids=["number", "object", "type", "other case"],
)
def test_unknown_fields_are_ignored(stack: Stack, person: Person, more: bytes) -> None:
    body = b'{%s,"code":"%s"}' % (more, stack.provider.code().encode())
    assert ask(stack, "POST", CALLBACK, cookie(person) + JSON + sized(body), body).status == 200
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person)), connected=True)


@pytest.mark.parametrize(
    "body",
    [b'{"code":"a\0b"}', b'{"code":"a\\u0000b"}', b'{"code":{"a\\u0000":1}}', b'{"code":["\\u0000"]}'],
    ids=["raw", "escaped", "in a name", "in a list"],
)
def test_nul_in_the_body(stack: Stack, person: Person, body: bytes) -> None:
    assert_error(
        ask(stack, "POST", CALLBACK, cookie(person) + JSON + sized(body), body), 400, "MALFORMED_REQUEST", code=3
    )


# gRPC stays inside


@pytest.fixture
def channel(stack: Stack) -> Iterator[grpc.Channel]:
    """A gRPC client that takes the public port for a server's."""
    with grpc.insecure_channel(f"127.0.0.1:{stack.gateway_port}") as channel:
        yield channel


@pytest.mark.parametrize("service", ["token", "status", "session", "user", "health", "reflection"])
def test_a_grpc_client_gets_no_service(stack: Stack, person: Person, channel: grpc.Channel, service: str) -> None:
    metadata = (
        ("authorization", f"Bearer {stack.service_token('backend', 'bot', 'operator')}"),
        ("cookie", f"doorward_session={person.cookie}"),
    )
    stub = stubs.IntegrationServiceStub(channel)
    identity = identity_stubs.IdentityServiceStub(channel)
    of_client = (("authorization", stack.client().headers["authorization"]),)
    health = health_pb2_grpc.HealthStub(channel)
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
    calls: dict[str, Callable[[], object]] = {
        "token": lambda: stub.GetAccessToken(
            pb.GetAccessTokenRequest(user=person.slug, provider="flo"), metadata=metadata
        ),
        "status": lambda: stub.GetKaiStatus(pb.GetKaiStatusRequest(user_id="me", kai_type="flo"), metadata=metadata),
        "session": lambda: identity.CreateSession(
            identity_pb.CreateSessionRequest(user=person.slug), metadata=metadata
        ),
        "user": lambda: identity.GetUser(identity_pb.GetUserRequest(handle=person.slug), metadata=of_client),
        "health": lambda: health.Check(health_pb2.HealthCheckRequest(), metadata=metadata),
        "reflection": lambda: list(
            reflect.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
            )
        ),
    }
    with pytest.raises(grpc.RpcError) as refusal:
        calls[service]()
    assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto"])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        pytest.param("POST", f"{SERVICE}/GetAccessToken", id="RPC"),
        pytest.param("POST", f"/api{SERVICE}/GetAccessToken", id="RPC below the API"),
        pytest.param("POST", f"{IDENTITY_SERVICE}/CreateSession", id="another RPC"),
        pytest.param("POST", LOG_IN, id="log in"),
        pytest.param("DELETE", SESSIONS, id="log out"),
        pytest.param("POST", CALLBACK, id="connect"),
        pytest.param("GET", STATUS, id="status"),
        pytest.param("DELETE", STATUS, id="revoke"),
    ],
)
def test_requests_of_a_grpc_type_get_no_service(
    stack: Stack, person: Person, method: str, target: str, content_type: str
) -> None:
    stack.connect(person)
    frame = b"\0\0\0\0\0" if method == "POST" else b""
    headers = cookie(person) + f"content-type: {content_type}\r\nte: trailers\r\n".encode() + sized(frame)
    # HTTP/1.1 frames such an answer by chunks or by the end of the connection; its headers say it all.
    with connect(stack) as peer, peer.makefile("rb") as stream:
        peer.sendall(request(method, target, headers + b"connection: close\r\n", frame))
        assert stream.readline().startswith((b"HTTP/1.1 200", b"HTTP/1.1 404", b"HTTP/1.1 415"))
        answer = http.client.parse_headers(stream)
    assert answer["grpc-status"] in {None, "12"}
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person)), connected=True)


# Headers of answers


@dataclass(frozen=True)
class Kind:
    """One kind of answer: the request that brings it about."""

    status: int
    method: str = "GET"
    target: str | bytes = STATUS
    headers: bytes = b""
    body: bytes = b""
    session: bool = True
    client: bool = False
    # What the answer's headers hold beside the usual.
    more: frozenset[str] = frozenset()

    def ask(self, stack: Stack, person: Person, headers: bytes = b"") -> Answer:
        caller = cookie(person) if self.session else b""
        if self.client:
            caller += authorization(stack.client())
        answer = ask(stack, self.method, self.target, caller + self.headers + headers, self.body)
        assert answer.status == self.status
        return answer


KINDS = {
    "status": Kind(200),
    "no session": Kind(401, session=False),
    "not self": Kind(403, target="/api/v1/users/nobody/integrations/kai/flo"),
    "bad argument": Kind(400, target="/api/v1/users/me/integrations/kai/foo"),
    "bad UTF-8": Kind(400, target=f"{STATUS}%ff"),
    "bad JSON": Kind(400, "POST", CALLBACK, JSON + sized(b"{bad"), b"{bad"),
    "conflict": Kind(409, "DELETE"),
    "no route": Kind(404, target="/nothing"),
    "no method": Kind(404, "PUT"),
    "head": Kind(404, "HEAD"),
    "unknown method": Kind(404, "FOO"),
    "too large": Kind(413, "POST", CALLBACK, JSON + b"content-length: 70000\r\n"),
    "text": Kind(415, "POST", CALLBACK, TEXT + sized(b"{}"), b"{}"),
    "no API client": Kind(401, target=f"{USERS}/1", more=frozenset({"www-authenticate"})),
    "wrong API client": Kind(401, "POST", LOG_IN, b"authorization: Basic \r\n", more=frozenset({"www-authenticate"})),
    "no user": Kind(404, target=f"{USERS}/nobody", client=True),
    "bad handle": Kind(400, target=f"{USERS}/%ff", client=True),
    "bad argument of a client": Kind(400, "POST", USERS, JSON + sized(b"{}"), b"{}", client=True),
    "bad JSON of a client": Kind(400, "PATCH", f"{USERS}/1", JSON + sized(b"{bad"), b"{bad", client=True),
    "text of a client": Kind(415, "POST", IDENTITIES, TEXT + sized(b"{}"), b"{}", client=True),
    "no proof": Kind(400, "POST", LOG_IN, JSON + sized(b"{}"), b"{}", session=False),
    "another origin": Kind(403, "POST", LOG_IN, b"origin: https://evil.example\r\n" + JSON + sized(b"{}"), b"{}"),
    "nothing to log out of": Kind(401, "DELETE", SESSION, session=False),
}
# Envoy refuses these before it makes a request of them.
UNREAD = {
    "NUL in the path": Kind(400, target=f"{STATUS}%00"),
    "fragment": Kind(400, target=f"{STATUS}#fragment"),
    "raw byte in the path": Kind(400, target=STATUS.encode() + b"\xff"),
    "header with underscore": Kind(400, headers=b"x_y: 1\r\n"),
    "large header": Kind(431, headers=b"x-y: %s\r\n" % (b"y" * 102_400)),
    "all options": Kind(404, "OPTIONS", "*"),
}


def names_of(answer: Answer) -> set[str]:
    return {name.lower() for name in answer.headers}


def cookies_of(answer: Answer) -> list[str]:
    return [str(value) for value in answer.headers.get_all("set-cookie", [])]


EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize(
    "kind",
    [
        *[pytest.param(kind, id=name) for name, kind in (KINDS | UNREAD).items()],
        pytest.param(Kind(200, target="/healthz", session=False), id="health"),
    ],
)
def test_no_header_tells_of_the_inside(stack: Stack, person: Person, kind: Kind) -> None:
    answer = kind.ask(stack, person)
    assert names_of(answer) <= HEADERS | kind.more
    assert names_of(answer) >= kind.more


def test_the_connect_route_tells_nothing_of_the_inside(stack: Stack, person: Person) -> None:
    body = json.dumps({"code": stack.provider.code()}).encode()
    answer = ask(stack, "POST", CALLBACK, cookie(person) + JSON + sized(body), body)
    assert (answer.status, names_of(answer) <= HEADERS) == (200, True)


def test_the_identity_routes_tell_nothing_of_the_inside(stack: Stack) -> None:
    client = stack.client()
    user, identities = stack.person(client), b"/o-auth-identities"
    proof = json.dumps({"provider": "sandbox", "accessToken": stack.provider.access_token(f"of-{user.id}")}).encode()
    role, own = b'{"role":"teacher"}', f"{USERS}/{user.id}".encode()
    steps: list[tuple[str, bytes, bytes, set[str]]] = [
        ("GET", own, b"", set()),
        ("PATCH", own, role, set()),
        ("POST", own + identities, proof, set()),
        ("POST", LOG_IN.encode(), proof, {"set-cookie"}),
        ("DELETE", own + identities + f"/sandbox/of-{user.id}".encode(), b"", set()),
        ("DELETE", own, b"", set()),
    ]
    for method, target, body, more in steps:
        answer = ask(stack, method, target, authorization(client) + JSON + sized(body), body)
        assert (answer.status, names_of(answer) - HEADERS) == (200, more), (method, target, answer.body)
        stack.secrets.update(value.partition("=")[2].partition(";")[0] for value in cookies_of(answer))


@pytest.mark.parametrize("target", [SESSION, SESSIONS])
def test_the_log_out_routes_tell_nothing_of_the_inside(stack: Stack, person: Person, target: str) -> None:
    answer = ask(stack, "DELETE", target, cookie(person))
    assert (answer.status, names_of(answer) - HEADERS) == (200, {"set-cookie"})
    assert len(cookies_of(answer)) == 1


@pytest.mark.parametrize(
    "kind",
    [
        *[pytest.param(kind, id=name) for name, kind in (KINDS | UNREAD).items()],
        pytest.param(Kind(200, target="/healthz"), id="health"),
    ],
)
def test_every_answer_has_a_request_id_of_its_own(stack: Stack, person: Person, kind: Kind) -> None:
    ids = [kind.ask(stack, person).headers["x-request-id"] for _ in range(2)]
    assert all(ids)
    assert len(set(ids)) == 2


@EVERY_KIND
def test_a_forged_request_id_is_not_used(stack: Stack, person: Person, kind: Kind) -> None:
    forged = "0a1b2c3d-0000-4000-8000-000000000000"
    answer = kind.ask(stack, person, f"x-request-id: {forged}\r\nx-request-id: {forged}\r\n".encode())
    assert answer.headers.get_all("x-request-id") not in (None, [forged])
    assert forged not in (stack.logs / f"server-{stack.grpc_port}.log").read_text()


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        pytest.param(KINDS["status"], "OK", None, id="status"),
        pytest.param(KINDS["no session"], "UNAUTHENTICATED", "NO_SESSION", id="no session"),
        pytest.param(KINDS["not self"], "PERMISSION_DENIED", "NOT_SELF", id="not self"),
        pytest.param(KINDS["bad UTF-8"], "INVALID_ARGUMENT", "MALFORMED_REQUEST", id="bad UTF-8"),
        pytest.param(KINDS["conflict"], "ABORTED", "NOT_CONNECTED", id="conflict"),
    ],
)
def test_the_request_id_stands_in_the_server_s_log(
    stack: Stack, person: Person, kind: Kind, code: str, reason: str | None
) -> None:
    request_id = kind.ask(stack, person).headers["x-request-id"]
    log = (stack.logs / f"server-{stack.grpc_port}.log").read_text().splitlines()
    [line] = [json.loads(line) for line in log if request_id in line]
    assert (line["event"], line["request_id"], line["code"], line["reason"]) == ("call", request_id, code, reason)
    assert line["caller"] == (f"user:{person.id}" if kind.session else None)


@pytest.mark.parametrize(
    ("method", "target", "body", "reason"),
    [
        ("GET", f"{USERS}/nobody", b"", "USER_NOT_FOUND"),
        ("POST", USERS, b"{}", "INVALID_NAME"),
        ("POST", LOG_IN, b"{}", "PROVIDER_REQUIRED"),
    ],
)
def test_the_request_id_of_a_client_s_call_stands_in_the_server_s_log(
    stack: Stack, method: str, target: str, body: bytes, reason: str
) -> None:
    client = stack.client()
    answer = ask(stack, method, target, authorization(client) + JSON + sized(body), body)
    request_id = answer.headers["x-request-id"]
    log = (stack.logs / f"server-{stack.grpc_port}.log").read_text().splitlines()
    [line] = [json.loads(line) for line in log if request_id in line]
    assert (line["event"], line["reason"], line["caller"]) == ("call", reason, f"client:{client.id}")


# Headers of requests


@pytest.mark.parametrize(
    "headers",
    [
        b"x-envoy-external-address: 9.9.9.9\r\n",
        b"x-envoy-internal: true\r\n",
        b"x-forwarded-for: 9.9.9.9, unix:\r\n",
        b"x-forwarded-proto: https\r\nx-forwarded-host: evil.example\r\n",
        b"x-envoy-original-path: /evil\r\nx-envoy-original-method: DELETE\r\n",
        b"x-http-method-override: DELETE\r\nx-http-method: DELETE\r\nx-method-override: DELETE\r\n",
        b"x-original-url: /evil\r\nx-rewrite-url: /evil\r\n",
        b"x-envoy-upstream-rq-timeout-ms: 1\r\nx-envoy-expected-rq-timeout-ms: 1\r\n",
        b"x-envoy-retry-on: 5xx\r\nx-envoy-max-retries: 9\r\nx-envoy-hedge-on-per-try-timeout: true\r\n",
        b"grpc-timeout: 1n\r\n",
        b"grpc-encoding: gzip\r\ngrpc-accept-encoding: gzip\r\naccept-encoding: gzip\r\n",
        b"grpc-status: 7\r\ngrpc-message: forged\r\n",
        b"te: trailers\r\ntrailer: x\r\n",
        b"accept: text/html\r\n",
        b"cookie: other=1\r\n",
        b"user-agent: \xff\xfe\r\n",
        b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n",
    ],
    ids=lambda headers: headers.split(b":")[0].decode(),
)
def test_headers_that_change_nothing(stack: Stack, person: Person, headers: bytes) -> None:
    # Long enough for a forged timeout to show, and a forged retry would send the code twice.
    stack.provider.configure(latency=0.05)
    body = json.dumps({"code": stack.provider.code()}).encode()
    answer = ask(stack, "POST", CALLBACK, cookie(person) + headers + JSON + sized(body), body)
    assert (answer.status, answer.body) == (200, b"{}")
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person) + headers), connected=True)
    assert names_of(answer) <= HEADERS
    assert len(stack.provider.requests()) == 1


@pytest.mark.parametrize("name", ["x-any-bin", "grpc-trace-bin", "grpc-tags-bin", "grpc-status-details-bin"])
def test_headers_that_mean_something_to_grpc_only(stack: Stack, person: Person, name: str) -> None:
    answer = ask(stack, "GET", STATUS, cookie(person) + f"{name}: not base64!\r\n".encode())
    assert_asked_for(answer, connected=False)


@pytest.mark.parametrize("header", [b"cookie: doorward_session=\xff\xfe\r\n", b"cookie: \xff\r\n", b"cookie: =;;=\r\n"])
def test_cookies_of_odd_bytes_are_no_session(stack: Stack, header: bytes) -> None:
    assert_error(ask(stack, "GET", STATUS, header), 401, "NO_SESSION")


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        pytest.param(b"x_forged: 1\r\n", {400}, id="underscore"),
        pytest.param(b"x-large: %s\r\n" % (b"y" * 102_400), {400, 431}, id="100 KB"),
        pytest.param(b"x-many: 1\r\n" * 500, {400, 431}, id="many"),
        pytest.param(b"x-space : 1\r\n", {400}, id="space before the colon"),
        pytest.param(b"x-nul: a\0b\r\n", {400}, id="NUL"),
        pytest.param(b"no colon\r\n", {400}, id="no colon"),
        pytest.param(b"content-length: -1\r\n", {400}, id="negative length"),
        pytest.param(b"content-length: 1\r\ncontent-length: 2\r\n", {400}, id="two lengths"),
        pytest.param(b"content-length: 2\r\n" + CHUNKED, {400}, id="length and chunks"),
        pytest.param(b"transfer-encoding: gzip\r\n", {501}, id="unknown encoding"),
        pytest.param(JSON + CHUNKED + b"\r\nnot a chunk\r\n", {400}, id="broken chunk"),
    ],
)
def test_headers_that_are_refused(stack: Stack, person: Person, headers: bytes, statuses: set[int]) -> None:
    answer = ask(stack, "POST", CALLBACK, cookie(person) + headers)
    assert answer.status in statuses
    reason, code = ("NOT_IMPLEMENTED", 12) if answer.status == 501 else ("MALFORMED_REQUEST", 3)
    assert_error(answer, answer.status, reason, code)
    assert stack.provider.requests() == []


# The protocol


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", {426}, id="HTTP/1.0"),
        pytest.param(b"GET %s HTTP/1.1\r\n\r\n" % STATUS.encode(), {400}, id="no Host"),
        pytest.param(b"GET /\r\n\r\n", {400, 426}, id="HTTP/0.9"),
        pytest.param(b"GET / HTTP/3.7\r\nhost: x\r\n\r\n", {400, 426, 505}, id="HTTP/3.7"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, {400}, id="TLS"),
        pytest.param(b"hello there\r\n\r\n", {400}, id="garbage"),
        pytest.param(b"\0" * 100, {400}, id="zeros"),
        pytest.param(b"GET /a b c HTTP/1.1\r\nhost: x\r\n\r\n", {400}, id="spaces"),
        pytest.param(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org:443\r\n\r\n", {404}, id="CONNECT"),
        pytest.param(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"/" + b"a" * 102_400), {400, 414, 431}, id="long path"),
    ],
)
def test_absurd_requests_are_refused(stack: Stack, sent: bytes, statuses: set[int]) -> None:
    answer = exchange(stack, sent)
    assert answer.status in statuses
    assert answer.headers["content-type"] == "application/json"
    assert answer.reason in {"MALFORMED_REQUEST", "NO_SUCH_ROUTE"}


def test_an_upgrade_is_refused(stack: Stack, person: Person) -> None:
    answer = ask(stack, "GET", STATUS, cookie(person) + b"connection: upgrade\r\nupgrade: websocket\r\n")
    assert (answer.status, answer.headers["content-type"]) == (403, "application/json")


def test_a_broken_http_2_preface_ends_the_connection(stack: Stack) -> None:
    with connect(stack) as peer, peer.makefile("rb") as stream:
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 50)
        assert b"HTTP/1" not in stream.read()  # to its end


def test_pipelined_requests_are_answered_in_order(stack: Stack, person: Person) -> None:
    stack.connect(person)
    one, two = request("GET", STATUS, cookie(person)), request("GET", STATUS)
    with connect(stack) as peer, peer.makefile("rb") as stream:
        peer.sendall(one + two + one)
        first, second, third = (read_answer(stream) for _ in range(3))
    assert_asked_for(first, connected=True)
    assert_error(second, 401, "NO_SESSION")
    assert_asked_for(third, connected=True)


def test_a_connection_serves_each_request_for_its_own_caller(stack: Stack, person: Person) -> None:
    other = stack.person()
    stack.connect(other)
    with connect(stack) as peer, peer.makefile("rb") as stream:
        for caller, connected in ((other, True), (person, False), (other, True)):
            peer.sendall(request("GET", STATUS, cookie(caller)))
            assert_asked_for(read_answer(stream), connected=connected)
        peer.sendall(request("GET", STATUS))
        assert_error(read_answer(stream), 401, "NO_SESSION")


def test_connection_close_is_obeyed(stack: Stack, person: Person) -> None:
    with connect(stack) as peer, peer.makefile("rb") as stream:
        peer.sendall(request("GET", STATUS, cookie(person) + b"connection: close\r\n"))
        answer = read_answer(stream)
        assert_asked_for(answer, connected=False)
        assert answer.headers["connection"] == "close"
        assert stream.read() == b""


def test_expect_100_continue(stack: Stack, person: Person) -> None:
    body = json.dumps({"code": stack.provider.code()}).encode()
    with connect(stack) as peer, peer.makefile("rb") as stream:
        headers = cookie(person) + JSON + sized(body) + b"expect: 100-continue\r\n"
        peer.sendall(request("POST", CALLBACK, headers))
        assert stream.readline().startswith(b"HTTP/1.1 100 ")
        assert stream.readline() == b"\r\n"
        peer.sendall(body)
        answer = read_answer(stream)
    assert (answer.status, answer.body) == (200, b"{}")


def test_a_request_that_is_never_finished_touches_nothing(stack: Stack, person: Person) -> None:
    with connect(stack) as peer:
        peer.sendall(request("POST", CALLBACK, cookie(person) + JSON + b"content-length: 100\r\n", b'{"code":"x"}'))
    assert_asked_for(ask(stack, "GET", STATUS, cookie(person)), connected=False)
    assert stack.provider.requests() == []
