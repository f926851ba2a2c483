"""`/requestapikey`, row by row of its contract, through a real Envoy."""

import base64
import contextlib
import itertools
import json
import socket
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward.keybroker.v1 import keybroker_service_pb2_grpc as stubs
from doorward_server.models import ConsentRequest, Delivery
from tests.processes import free_port
from tests.sandbox.client import SandboxProvider
from tests.stack import Stack, basic, make_stack, rest

PATH = "/requestapikey"
FORM_TYPE = "application/x-www-form-urlencoded"
TEXT = "text/plain; charset=utf-8"
NO_LIMITS = "[limits]\nopen_per_user = 0\nrequests_per_address = 0\nrequests_per_application = 0\nauth_failures = 0\n"
# Nobody listens there; and no name has to be looked up.
NOWHERE = "127.0.0.1:9"
ALLOWED = f'[callbacks]\nallow = ["{NOWHERE}"]\n'
CALLBACK = f"http://{NOWHERE}/callback"
# Names below .invalid never resolve (RFC 6761), which is no reason to refuse them.
REGISTERED = "https://registered.invalid/hooks"
REGISTERED_NAME = "Straße Bot"
# Nobody has to be drained here.
AT_ONCE = {"DOORWARD_GATEWAY_DRAIN_WAIT": "0", "DOORWARD_GRPC_DRAIN_WAIT": "0", "DOORWARD_GRPC_DRAIN_GRACE": "0"}
_SERIAL = itertools.count(10**17)
Fields = dict[str, str]
Send = Callable[..., httpx.Response]


def snowflake() -> str:
    """A Discord user that nobody has asked yet."""
    return str(next(_SERIAL))


def fields_of(**changes: str | None) -> Fields:
    """The fields of a request that is in order, but for the changes; None leaves one out."""
    fields = {"name": "My super bot!", "userid": snowflake(), "callback": CALLBACK, "state": "xyz", **changes}
    return {name: value for name, value in fields.items() if value is not None}


def by_query(stack: Stack, fields: Mapping[str, str], method: str = "GET", **options: Any) -> httpx.Response:
    return rest(stack, method, f"{PATH}?{urlencode(fields, quote_via=quote, errors='surrogateescape')}", **options)


def by_post_query(stack: Stack, fields: Mapping[str, str], **options: Any) -> httpx.Response:
    return by_query(stack, fields, "POST", **options)


def by_form(stack: Stack, fields: Mapping[str, str], **options: Any) -> httpx.Response:
    return rest(stack, "POST", PATH, data=dict(fields), **options)


def by_json(stack: Stack, fields: Mapping[str, Any], **options: Any) -> httpx.Response:
    return rest(stack, "POST", PATH, json=dict(fields), **options)


WAYS = {"query": by_query, "POST query": by_post_query, "form": by_form, "JSON": by_json}
every_way = pytest.mark.parametrize("send", WAYS.values(), ids=WAYS)


def assert_answer(answer: httpx.Response, status: int, text: str) -> None:
    """The answer is this text, to the byte, and nothing of gRPC shows."""
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (status, text.encode(), TEXT)
    assert answer.headers["x-request-id"]
    assert not [name for name in answer.headers if name.startswith(("grpc-", "x-doorward", "x-envoy"))]


def assert_ok(answer: httpx.Response) -> None:
    assert_answer(answer, 200, "OK")


def requests_of(stack: Stack, user: str) -> list[ConsentRequest]:
    """A user's requests as they are stored, the latest first."""
    return stack.app.consents.latest(user, 100)


@dataclass(frozen=True)
class Application:
    """A registered application."""

    id: str
    secret: str = field(repr=False)
    signing_secret: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": basic(self.id, self.secret)}


def register(stack: Stack, name: str, *prefixes: str, as_json: bool = False) -> Application:
    made = stack.app.applications.create(name, prefixes, "json" if as_json else "form")
    application = Application(made.application.id, made.secret, made.signing_secret)
    stack.secrets |= {application.secret, application.signing_secret, application.headers["authorization"][6:]}
    return application


class Bot:
    """The bot's side of the service, on a server's TCP port."""

    def __init__(self, stack: Stack, stub: stubs.KeyBrokerServiceStub) -> None:
        self._stack = stack
        self.stub = stub
        self._metadata = (("authorization", f"Bearer {stack.service_token('bot')}"),)

    def call(self, rpc: str, request: Any) -> Any:
        return getattr(self.stub, rpc)(request, metadata=self._metadata, timeout=10)

    def add_keys(self, user: str, *values: str) -> list[int]:
        """Keep keys of a user's; their ids. No log may show them."""
        self._stack.secrets.update(values)
        adding = (
            pb.AddApiKeyRequest(discord_user_id=user, service="game", label=f"Key {number}", value=value)
            for number, value in enumerate(values)
        )
        return [self.call("AddApiKey", request).key.id for request in adding]

    def lease(self) -> list[pb.LeasedConsentRequest]:
        """All prompts: those that other tests have left may be more than one call gives."""
        request = pb.LeaseConsentRequestsRequest(max_requests=100, lease_seconds=60)
        leased: list[pb.LeasedConsentRequest] = []
        while more := self.call("LeaseConsentRequests", request).requests:
            leased += more
        return leased

    def grant(self, request_id: int, *key_ids: int) -> str:
        return self._resolve(request_id, granted=pb.GrantedKeys(key_ids=key_ids))

    def cancel(self, request_id: int) -> str:
        return self._resolve(request_id, canceled=pb.Canceled())

    def report_blocked(self, request_id: int) -> str:
        return self._resolve(request_id, blocked=pb.Blocked())

    def _resolve(self, request_id: int, **outcome: Any) -> str:
        """The status that the request ended in, in small letters."""
        request = pb.ResolveConsentRequestRequest(request_id=request_id, **outcome)
        status = self.call("ResolveConsentRequest", request).status
        return pb.ConsentStatus.Name(status).removeprefix("CONSENT_STATUS_").lower()


@contextlib.contextmanager
def bot_of(stack: Stack) -> Iterator[Bot]:
    with grpc.insecure_channel(f"127.0.0.1:{stack.grpc_port}") as channel:
        yield Bot(stack, stubs.KeyBrokerServiceStub(channel))


@pytest.fixture(scope="module")
def door(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Stack]:
    """A server and a gateway without limits, which deliver nothing."""
    stack = make_stack(
        tmp_path_factory.mktemp("door") / "home", logs, shared_provider, secrets, NO_LIMITS + ALLOWED, **AT_ONCE
    )
    with stack.server(), stack.gateway():
        yield stack


@pytest.fixture(scope="module")
def application(door: Stack) -> Application:
    return register(door, REGISTERED_NAME, REGISTERED)


# What is accepted


@every_way
def test_accepted(door: Stack, send: Send) -> None:
    fields = fields_of(state="ünïcode & = + %")
    assert_ok(send(door, fields))
    [request] = requests_of(door, fields["userid"])
    assert (request.name, request.callback, bytes(request.state).decode()) == (
        fields["name"],
        CALLBACK,
        fields["state"],
    )
    assert (request.status, request.application_id) == ("pending", None)
    assert (request.deadline_at - request.created_at).total_seconds() == 600


@every_way
@pytest.mark.parametrize("state", [None, ""], ids=["missing", "empty"])
def test_state_is_optional(door: Stack, send: Send, state: str | None) -> None:
    fields = fields_of(state=state)
    assert_ok(send(door, fields))
    [request] = requests_of(door, fields["userid"])
    assert bytes(request.state) == b""


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8", "application/json ; x=y"],
)
@pytest.mark.parametrize("as_number", [False, True], ids=["text", "integer"])
def test_json(door: Stack, content_type: str, as_number: bool) -> None:
    fields = fields_of(name="Жук", state="\U0001f512\u2028")
    body = {**fields, "userid": int(fields["userid"])} if as_number else fields
    content = json.dumps(body, ensure_ascii=False).encode()
    assert_ok(rest(door, "POST", PATH, content=content, headers={"content-type": content_type}))
    [request] = requests_of(door, fields["userid"])
    assert (request.name, bytes(request.state).decode()) == ("Жук", "\U0001f512\u2028")


@pytest.mark.parametrize(
    "content_type", [FORM_TYPE, f"{FORM_TYPE}; charset=utf-8", f"{FORM_TYPE.upper()};charset=UTF-8"]
)
def test_forms(door: Stack, content_type: str) -> None:
    fields = fields_of(state="a+b c")
    answer = rest(door, "POST", PATH, content=urlencode(fields).encode(), headers={"content-type": content_type})
    assert_ok(answer)
    [request] = requests_of(door, fields["userid"])
    assert bytes(request.state) == b"a+b c"


@pytest.mark.parametrize("way", ["form", "JSON"])
def test_the_query_wins_over_the_body(door: Stack, way: str) -> None:
    user = snowflake()
    query = urlencode({"state": "query", "userid": user})
    body = fields_of(state="body")
    options: dict[str, Any] = {"data": body} if way == "form" else {"json": body}
    assert_ok(rest(door, "POST", f"{PATH}?{query}", **options))
    [request] = requests_of(door, user)
    assert bytes(request.state) == b"query"
    assert requests_of(door, body["userid"]) == []


@pytest.mark.parametrize("way", ["query", "form", "JSON"])
def test_the_first_value_wins(door: Stack, way: str) -> None:
    fields, user = fields_of(state="first"), snowflake()
    twice = [*fields.items(), ("state", "second"), ("userid", user)]
    if way == "query":
        answer = rest(door, "GET", f"{PATH}?{urlencode(twice)}")
    elif way == "form":
        answer = rest(door, "POST", PATH, content=urlencode(twice), headers={"content-type": FORM_TYPE})
    else:
        content = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in twice) + "}"
        answer = rest(door, "POST", PATH, content=content, headers={"content-type": "application/json"})
    assert_ok(answer)
    [request] = requests_of(door, fields["userid"])
    assert bytes(request.state) == b"first"
    assert requests_of(door, user) == []


def test_other_fields_are_ignored(door: Stack) -> None:
    for send in (by_query, by_form, by_json):
        assert_ok(send(door, fields_of(form="x", data="y", content_type="z", api_keys="k", error="e")))


@pytest.mark.parametrize("user", ["0", "1", "18446744073709551615", "00000000000000000007"])
def test_snowflakes(door: Stack, user: str) -> None:
    state = snowflake()
    assert_ok(by_form(door, fields_of(userid=user, state=state)))
    assert state.encode() in [bytes(request.state) for request in requests_of(door, user)]


# What is refused, in whichever way it comes

INVALID = [
    pytest.param({"name": None}, "missing parameters", id="no name"),
    pytest.param({"userid": None}, "missing parameters", id="no userid"),
    pytest.param({"callback": None}, "missing parameters", id="no callback"),
    pytest.param({"name": ""}, "missing parameters", id="empty name"),
    pytest.param({"userid": ""}, "missing parameters", id="empty userid"),
    pytest.param({"callback": ""}, "missing parameters", id="empty callback"),
    pytest.param({"name": None, "userid": None, "callback": None, "state": None}, "missing parameters", id="nothing"),
    pytest.param({"name": "\u202e\x07"}, "missing parameters", id="name of nothing to see"),
    *[
        pytest.param({"userid": user}, "invalid userid", id=f"userid {user[:22]}")
        for user in ("x", "-1", "+1", "1.0", " 1", "1e3", "0x10", "123 456", "18446744073709551616", "1" * 21, "١٢٣")
    ],
    *[
        pytest.param({"callback": callback}, "invalid callback", id=f"callback {callback}")
        for callback in (
            "x",
            "/callback",
            "//app.invalid/callback",
            "app.invalid/callback",
            "ftp://app.invalid/",
            "javascript:alert(1)",
            "https://",
            "https:///callback",
            "https://user@app.invalid/",
            "https://user:password@app.invalid/",
            "https://app.invalid:65536/",
            "https://app.invalid/a b",
            "https://app.invalid/\n",
            "https://app.invalid\\@evil.example/",
        )
    ],
    pytest.param({"name": "x" * 101}, "parameter too long", id="long name"),
    pytest.param({"state": "x" * 2049}, "parameter too long", id="long state"),
    pytest.param({"callback": f"{CALLBACK}/{'x' * 2048}"}, "parameter too long", id="long callback"),
]
FORBIDDEN = [
    "127.0.0.1",
    "127.255.255.254",
    "localhost",
    "LOCALHOST.",
    "[::1]",
    "0.0.0.0",
    "[::]",
    "169.254.169.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "255.255.255.255",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fc00::1]",
    "2130706433",
    "0177.0.0.1",
    "017700000001",
    "0x7f.0.0.1",
    "0x7f000001",
    "127.1",
    "127.0.0.1.",
    "①②⑦.0.0.1",
]


@pytest.mark.parametrize("send", [by_query, by_form, by_json], ids=["query", "form", "JSON"])
@pytest.mark.parametrize(("changes", "text"), INVALID)
def test_refused(door: Stack, send: Send, changes: Mapping[str, str | None], text: str) -> None:
    fields = fields_of(**changes)
    assert_answer(send(door, fields), 400, text)
    if text != "invalid userid" and fields.get("userid"):
        assert requests_of(door, fields["userid"]) == []


@pytest.mark.parametrize(
    "changes", [{"name": "ü" * 100}, {"state": "\U0001f511" * 2048}, {"callback": f"{CALLBACK}/".ljust(2048, "x")}],
    ids=["name", "state", "callback"],
)  # fmt: skip
def test_the_longest_parameters(door: Stack, changes: Fields) -> None:
    for send in (by_form, by_json):
        assert_ok(send(door, fields_of(**changes)))


@pytest.mark.parametrize("host", FORBIDDEN)
def test_forbidden_callbacks(door: Stack, host: str) -> None:
    fields = fields_of(callback=f"http://{host}/callback")
    assert_answer(by_form(door, fields), 400, "invalid callback")
    assert requests_of(door, fields["userid"]) == []


def test_asking_connects_to_nobody(door: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        for host in FORBIDDEN:
            assert_answer(by_form(door, fields_of(callback=f"http://{host}:{port}/")), 400, "invalid callback")
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        pytest.param("application/json", b"{", id="malformed JSON"),
        pytest.param("application/json", b"", id="empty JSON"),
        pytest.param("application/json", b"[]", id="list"),
        pytest.param("application/json", b"null", id="null"),
        pytest.param("application/json", b'"text"', id="text"),
        pytest.param("application/json", b'{"name":"\xff"}', id="JSON not UTF-8"),
        pytest.param("application/json", b'{"state":"\\ud800"}', id="lone surrogate"),
        pytest.param("application/json", b"[" * 30_000, id="deep JSON"),
        pytest.param("application/json", b'{"userid":' + b"9" * 30_000 + b"}", id="long number"),
        pytest.param(FORM_TYPE, b"name=%ff", id="form not UTF-8"),
        pytest.param(FORM_TYPE, b"name=\xff", id="form of raw bytes"),
        pytest.param(FORM_TYPE, b"&" * 3000 + b"a=b&" * 3000, id="many fields"),
        pytest.param("multipart/form-data; boundary=x", b"--x--", id="multipart"),
        pytest.param("text/plain", b"name=x", id="plain text"),
        pytest.param("application/grpc-web", b"name=x", id="gRPC-Web"),
    ],
)
def test_bodies_that_say_nothing(door: Stack, content_type: str, content: bytes) -> None:
    answer = rest(door, "POST", PATH, content=content, headers={"content-type": content_type})
    assert_answer(answer, 400, "missing parameters")


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "text/plain"])
def test_fields_beside_another_body(door: Stack, content_type: str) -> None:
    answer = by_post_query(door, fields_of(), content=b"x", headers={"content-type": content_type})
    assert_ok(answer)


@pytest.mark.parametrize("value", [None, True, 1, 1.5, [], ["x"], {}, {"x": "y"}], ids=repr)
@pytest.mark.parametrize("name", ["name", "userid", "callback", "state"])
def test_json_that_is_no_text_counts_as_missing(door: Stack, name: str, value: Any) -> None:
    fields = fields_of()
    answer = by_json(door, {**fields, name: value})
    if name == "state":
        assert_ok(answer)
        [request] = requests_of(door, fields["userid"])
        assert bytes(request.state) == b""
    elif (name, value) == ("userid", 1) and value is not True:
        assert_ok(answer)
    else:
        assert_answer(answer, 400, "missing parameters")


@pytest.mark.parametrize("user", [-1, 2**64, 10**20])
def test_integers_that_are_no_snowflake(door: Stack, user: int) -> None:
    assert_answer(by_json(door, {**fields_of(), "userid": user}), 400, "invalid userid")


@pytest.mark.parametrize("query", ["name=%ff", "state=%ff", "state=%ed%a0%80", "x=%ff", "%ff=x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_queries_that_are_not_utf8(door: Stack, method: str, query: str) -> None:
    answer = rest(door, method, f"{PATH}?{query}&{urlencode(fields_of())}")
    assert_answer(answer, 400, "missing parameters")


@pytest.mark.parametrize("way", ["data", "json"])
def test_the_body_of_a_get(door: Stack, way: str) -> None:
    fields: Any = fields_of()
    assert_ok(rest(door, "GET", PATH, **{way: fields}))
    assert len(requests_of(door, fields["userid"])) == 1


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "FOO"])
@pytest.mark.parametrize("way", ["query", "form", "JSON", "nothing"])
def test_other_methods(door: Stack, method: str, way: str) -> None:
    fields = fields_of()
    if way == "query":
        answer = by_query(door, fields, method)
    elif way == "nothing":
        answer = rest(door, method, PATH)
    else:
        answer = rest(door, method, PATH, **({"data": fields} if way == "form" else {"json": fields}))
    assert_answer(answer, 400, f"invalid method call {method}")
    assert requests_of(door, fields["userid"]) == []


@pytest.mark.parametrize("query", ["", "?name=x"])
def test_head_has_no_body(door: Stack, query: str) -> None:
    assert_answer(rest(door, "HEAD", PATH + query), 400, "")


@pytest.mark.parametrize("size", [65537, 200_000])
@pytest.mark.parametrize("content_type", [FORM_TYPE, "application/json"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_bodies_over_64_kib(door: Stack, content_type: str, size: int, chunked: bool) -> None:
    content = b"x" * size
    sent: Any = iter([content[:1000], content[1000:]]) if chunked else content
    answer = rest(door, "POST", PATH, content=sent, headers={"content-type": content_type})
    assert (answer.status_code, answer.headers["content-type"]) == (413, TEXT)
    assert answer.text


def test_a_body_of_64_kib(door: Stack) -> None:
    content = urlencode(fields_of()).encode() + b"&filler="
    content = content.ljust(65536, b"x")
    assert_ok(rest(door, "POST", PATH, content=content, headers={"content-type": FORM_TYPE}))


def test_no_other_path(door: Stack) -> None:
    for path in ("/requestapikeys", "/RequestApiKey", "/requestapikey/x"):
        assert rest(door, "GET", path).status_code == 404


# Who asks


def test_a_registered_application(door: Stack, application: Application) -> None:
    for number, send in enumerate((by_query, by_form, by_json)):
        fields = fields_of(callback=f"{REGISTERED}/{number}")
        assert_ok(send(door, fields, headers=application.headers))
        [request] = requests_of(door, fields["userid"])
        assert (request.application_id, request.name) == (application.id, REGISTERED_NAME)


@pytest.mark.parametrize(
    "callback",
    [REGISTERED, f"{REGISTERED}/x", f"{REGISTERED}?x", f"{REGISTERED}/../hooks", REGISTERED.replace("h", "H", 1)],
)
def test_its_callbacks_are_its_own(door: Stack, application: Application, callback: str) -> None:
    assert_answer(by_form(door, fields_of(callback=callback)), 400, "invalid callback")


@pytest.mark.parametrize("callback", [f"{REGISTERED}x", "https://registered.invalid/", REGISTERED.replace("s:", ":")])
def test_beside_its_callbacks(door: Stack, application: Application, callback: str) -> None:
    assert_answer(by_form(door, fields_of(callback=callback), headers=application.headers), 400, "invalid callback")
    assert_ok(by_form(door, fields_of(callback=callback)))


@pytest.mark.parametrize(
    "authorization",
    ["Basic", "Basic !", basic("app_0", "x"), "Basic " + base64.b64encode(b"no colon").decode(), "Bearer x"],
)
def test_wrong_credentials_are_a_stranger_s(door: Stack, application: Application, authorization: str) -> None:
    headers = {"authorization": authorization}
    assert_answer(by_form(door, fields_of(callback=REGISTERED), headers=headers), 400, "invalid callback")
    fields = fields_of()
    assert_ok(by_form(door, fields, headers=headers))
    [request] = requests_of(door, fields["userid"])
    assert request.application_id is None


@pytest.mark.parametrize(
    "name",
    [REGISTERED_NAME, "STRASSE BOT", "strasse bot", " Straße\u200b Bot ", "\uff33traße\u00a0Bot", "Stra\u00adße Bot"],
)
def test_names_like_a_registered_one(door: Stack, application: Application, name: str) -> None:
    for send in (by_query, by_form, by_json):
        assert_answer(send(door, fields_of(name=name)), 400, "invalid name")
    assert_ok(by_form(door, fields_of(name=name, callback=REGISTERED), headers=application.headers))


# Repeats and joining


@every_way
def test_a_repeat_is_the_same_request(door: Stack, send: Send) -> None:
    fields = fields_of()
    for name in ("One name", "Another name"):
        assert_ok(send(door, {**fields, "name": name}))
    [request] = requests_of(door, fields["userid"])
    assert request.name == "One name"


def test_after_its_outcome_it_is_a_new_request(door: Stack) -> None:
    fields = fields_of()
    with bot_of(door) as bot:
        for count in (1, 2):
            assert_ok(by_form(door, fields))
            latest, *others = requests_of(door, fields["userid"])
            assert (latest.status, len(others)) == ("pending", count - 1)
            assert bot.cancel(latest.id) == "canceled"


def test_another_state_shares_the_prompt(door: Stack) -> None:
    fields = fields_of(state="one")
    other_callback, other_user = {**fields, "callback": f"{CALLBACK}/2"}, {**fields, "userid": snowflake()}
    for asked in (fields, {**fields, "state": "two"}, other_callback, other_user):
        assert_ok(by_form(door, asked))
    apart, two, one = requests_of(door, fields["userid"])
    [other] = requests_of(door, other_user["userid"])
    assert one.prompt_id == two.prompt_id
    assert len({one.prompt_id, apart.prompt_id, other.prompt_id}) == 3
    with bot_of(door) as bot:
        leased = bot.lease()
        own = [lease for lease in leased if lease.request.discord_user_id == fields["userid"]]
        assert len(own) == 2  # prompts, of three requests
        assert bot.cancel(two.id) == "canceled"
    statuses = [request.status for request in requests_of(door, fields["userid"])]
    assert statuses == ["pending", "canceled", "canceled"]
    delivered = Delivery.select().where(Delivery.request.in_([one.id, two.id]))
    assert len(door.app.database.fetch_all(delivered)) == 2


# Any text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
quickly = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
_BIDIRECTIONAL = {"LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = "\u061c\u200e\u200f"


def expected_name(name: str) -> str:
    """A name as the contract has it: without control and bidirectional characters, and blanks around it."""
    kept = (
        character
        for character in name
        if unicodedata.category(character) not in ("Cc", "Zl", "Zp")
        and unicodedata.bidirectional(character) not in _BIDIRECTIONAL
        and character not in _MARKS
    )
    return "".join(kept).strip()


@every_way
@quickly
@given(name=TEXTS, state=TEXTS)
@example(name="a\u202eb\x00c\x1b[0m", state="\x00\r\n\u202e")
@example(name="e\u0301\ufb01", state="e\u0301\ufb01\ufeff +%00&=;")
def test_any_text_survives(door: Stack, send: Send, name: str, state: str) -> None:
    fields = fields_of(name=f"x{name}", state=state)
    assert_ok(send(door, fields))
    [request] = requests_of(door, fields["userid"])
    assert (request.name, bytes(request.state)) == (expected_name(f"x{name}"), state.encode())


# Limits


@pytest.fixture(scope="module")
def narrow(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, shared_provider: SandboxProvider, secrets: set[str]
) -> Iterator[Stack]:
    """A server and a gateway with low limits."""
    limits = "[limits]\nopen_per_user = 2\nrequests_per_address = 12\nrequests_per_application = 2\n"
    stack = make_stack(
        tmp_path_factory.mktemp("narrow") / "home", logs, shared_provider, secrets, limits + ALLOWED, **AT_ONCE
    )
    with stack.server(), stack.gateway():
        yield stack


def assert_too_many(answer: httpx.Response) -> None:
    assert_answer(answer, 429, "too many requests")
    assert int(answer.headers["retry-after"]) >= 1


def test_limits(narrow: Stack) -> None:
    """One after the other, for the address is the same for all."""
    application = register(narrow, "Registered", REGISTERED)
    user = snowflake()
    for number in (1, 2):
        assert_ok(by_form(narrow, fields_of(userid=user, callback=f"{CALLBACK}/{number}")))
    third = fields_of(userid=user, callback=f"{CALLBACK}/3")
    assert_too_many(by_form(narrow, third))
    # A repeat asks nothing new, another state no new prompt, and a registered application has a count of its own.
    assert_ok(by_form(narrow, fields_of(userid=user, callback=f"{CALLBACK}/1")))
    assert_ok(by_form(narrow, fields_of(userid=user, callback=f"{CALLBACK}/1", state="another")))
    for number in (1, 2):
        fields = fields_of(userid=user, callback=f"{REGISTERED}/{number}")
        assert_ok(by_form(narrow, fields, headers=application.headers))
    # Another user, but the application has asked twice in this hour.
    assert_too_many(by_form(narrow, fields_of(callback=REGISTERED), headers=application.headers))
    with bot_of(narrow) as bot:
        bot.cancel(requests_of(narrow, user)[-1].id)
    assert_ok(by_form(narrow, third))
    recorded = ConsentRequest.select().count()
    for _ in range(12 - recorded):
        assert_ok(by_form(narrow, fields_of()))
    assert_too_many(by_form(narrow, fields_of()))
    assert_too_many(by_query(narrow, fields_of()))
    assert ConsentRequest.select().count() == 12


def test_the_gateway_s_own_limit(door: Stack) -> None:
    gateway = Stack(
        door.home, door.logs, door.provider, door.secrets, grpc_port=door.grpc_port,
        environment=AT_ONCE | {"DOORWARD_GATEWAY_RATE_LIMIT": "1"},
    )  # fmt: skip
    with gateway.gateway():
        answers = [by_form(gateway, fields_of()) for _ in range(10)]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert_too_many(answer)


def test_without_what_it_needs(tmp_path: Path, logs: Path, provider: SandboxProvider, secrets: set[str]) -> None:
    """A server that cannot write says so, and has recorded nothing; so does the gateway without a server."""
    environment = AT_ONCE | {"DOORWARD_DATABASE_BUSY_TIMEOUT": "0.1"}
    stack = make_stack(tmp_path / "home", logs, provider, secrets, NO_LIMITS + ALLOWED, **environment)
    with stack.server() as server, stack.gateway():
        fields = fields_of()
        with stack.app.database.writing():
            assert_answer(by_form(stack, fields), 503, "service unavailable")
        assert requests_of(stack, fields["userid"]) == []
        assert_ok(by_form(stack, fields))
        server.kill()
        for _ in range(2):
            for send in WAYS.values():
                assert_answer(send(stack, fields_of()), 503, "service unavailable")
        assert_answer(rest(stack, "PUT", PATH), 400, "invalid method call PUT")


def test_a_name_that_does_not_resolve(door: Stack) -> None:
    """It is judged at the delivery."""
    assert_ok(by_form(door, fields_of(callback=f"https://nowhere.invalid:{free_port()}/")))
