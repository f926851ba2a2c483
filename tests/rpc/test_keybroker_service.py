"""KeyBrokerService, as applications, the bot and an operator call it: keys, prompts, outcomes, deliveries."""

import base64
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from standardwebhooks import Webhook

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_server.consents import Status
from doorward_server.models import (
    ApplicationBlock,
    ConsentRequest,
    Delivery,
    DeliveryAttempt,
    Grant,
    GrantKey,
    Job,
    OAuthIdentity,
)
from tests.rpc.conftest import METHODS, House, Metadata, Receiver, Result, basic, bearer, call, opened, served
from tests.stack import Client

grpc_max_workers = 16

_SERVICE = "/doorward.keybroker.v1.KeyBrokerService"
_NO_REQUEST = "NOT_FOUND CONSENT_REQUEST_NOT_FOUND"
_NO_KEY = "NOT_FOUND KEY_NOT_FOUND"
_NO_GRANT = "NOT_FOUND GRANT_NOT_FOUND"
_LIFETIME = timedelta(seconds=600)
_PENDING = pb.CONSENT_STATUS_PENDING
_PROMPTED = pb.CONSENT_STATUS_PROMPTED
_GRANTED = pb.CONSENT_STATUS_GRANTED
_CANCELED = pb.CONSENT_STATUS_CANCELED
_TIMED_OUT = pb.CONSENT_STATUS_TIMED_OUT
_BLOCKED = pb.CONSENT_STATUS_BLOCKED
_QUEUED = "DELIVERY_STATUS_QUEUED"
_SENT = "DELIVERY_STATUS_SENT"
_ABANDONED = "DELIVERY_STATUS_ABANDONED"
_snowflakes = count(80351110224678912)


@dataclass
class Caller:
    """A channel to the server with somebody's credentials."""

    channel: grpc.Channel
    metadata: Metadata = field(default=(), repr=False)

    def __call__(self, rpc: str, more: Metadata = (), /, **fields: Any) -> Result:
        """One call; the fields are as in JSON."""
        method = METHODS[f"{_SERVICE}/{rpc}"]
        request = ParseDict(fields, GetMessageClass(method.input_type)())
        return call(self.channel, f"{_SERVICE}/{rpc}", request, self.metadata + more)


@dataclass
class Asker(Caller):
    """An application, and the callback to which it wants its answers."""

    callback: str = ""

    def ask(self, user: str, state: str = "s") -> int:
        """Ask for a user's keys; the request's id."""
        result = self("RequestApiKey", name="x", userId=user, state=state, callback=self.callback)
        assert result.code == "OK", result.short
        return int(result.answer.request_id)


@pytest.fixture(autouse=True)
def receiver(house: House) -> Iterator[Receiver]:
    """What listens at the callbacks; nobody has asked for anything yet."""
    house.receiver.seen.clear()
    house.receiver.status = "200 OK"
    with house.app.database.writing():
        for model in (DeliveryAttempt, Delivery, GrantKey, Grant, ConsentRequest, ApplicationBlock, Job):
            model.delete().execute()
    yield house.receiver
    house.receiver.status = "200 OK"


@pytest.fixture(scope="module")
def bot_token(house: House) -> Metadata:
    return bearer(house.service_token("bot")[1])


@pytest.fixture(scope="module")
def operator_token(house: House) -> Metadata:
    return bearer(house.service_token("operator")[1])


@pytest.fixture
def bot(over_tcp: grpc.Channel, bot_token: Metadata) -> Caller:
    return Caller(over_tcp, bot_token)


@pytest.fixture
def operator(over_tcp: grpc.Channel, operator_token: Metadata) -> Caller:
    return Caller(over_tcp, operator_token)


@pytest.fixture(scope="module")
def registered(house: House) -> Client:
    return house.application(f"{house.receiver.url}/registered", name="Registered")


@pytest.fixture
def application(house: House, over_socket: grpc.Channel, registered: Client) -> Asker:
    """A registered application that answers at the receiver."""
    return Asker(over_socket, basic(registered), f"{house.receiver.url}/registered/cb")


@pytest.fixture
def other_application(house: House, over_socket: grpc.Channel) -> Asker:
    made = house.application()
    return Asker(over_socket, basic(made), house.app.applications.get(made.id).callback_prefixes[0])


@pytest.fixture
def user() -> str:
    """A Discord user whom nobody knows yet."""
    return str(next(_snowflakes))


@dataclass
class KeyChain:
    """Adds keys to users, each with another value."""

    bot: Caller
    house: House
    values: dict[int, str] = field(default_factory=dict)

    def add(self, user: str, service: str = "game") -> int:
        """The id of a new key."""
        value = f"VALUE-{len(self.values)}-of-{user}-abcd"
        self.house.secrets.add(value)
        result = self.bot("AddApiKey", discordUserId=user, service=service, label="Main", value=value)
        assert result.code == "OK", result.short
        self.values[result.answer.key.id] = value
        return int(result.answer.key.id)


@pytest.fixture
def chain(house: House, bot: Caller) -> KeyChain:
    return KeyChain(bot, house)


def form(fields: dict[str, str]) -> dict[str, Any]:
    """A request of the documented route's, as the gateway hands it on."""
    data = base64.b64encode(urlencode(fields).encode()).decode()
    return {"form": {"contentType": "application/x-www-form-urlencoded; charset=utf-8", "data": data}}


def work(house: House) -> None:
    """Do all jobs that are due."""
    worker = house.app.worker
    while worker.run_one():
        pass


def lease(bot: Caller, most: int = 10, seconds: int = 60, wait_seconds: float = 0) -> list[pb.LeasedConsentRequest]:
    result = bot("LeaseConsentRequests", maxRequests=most, leaseSeconds=seconds, waitSeconds=wait_seconds)
    assert result.code == "OK", result.short
    return list(result.answer.requests)


def status_of(bot: Caller, request_id: int) -> int:
    result = bot("GetConsentRequest", requestId=request_id)
    assert result.code == "OK", result.short
    return int(result.answer.request.status)


def told(receiver: Receiver) -> list[dict[str, list[str]]]:
    """The fields of all that was sent to callbacks."""
    bodies = [request.partition(b"\r\n\r\n")[2].decode() for request in receiver.seen]
    return [parse_qs(body, keep_blank_values=True, strict_parsing=True) for body in bodies]


def headers_of(request: bytes) -> dict[str, str]:
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


# Asking


def test_what_is_asked_can_be_read(bot: Caller, application: Asker, user: str) -> None:
    request_id = application.ask(user)
    request = bot("GetConsentRequest", requestId=request_id).answer.request
    assert (request.id, request.discord_user_id, request.status) == (request_id, user, _PENDING)
    assert (request.application_name, request.verified) == ("Registered", True)
    assert (request.callback_host, request.message) == ("127.0.0.1", "")
    assert request.deadline_time.ToDatetime() - request.create_time.ToDatetime() == _LIFETIME


@pytest.mark.parametrize("request_id", [0, -1, 12345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(
    ("rpc", "fields"),
    [
        ("GetConsentRequest", {}),
        ("MarkPrompted", {"message": "1"}),
        ("ClosePrompt", {}),
        ("ResolveConsentRequest", {"canceled": {}}),
        ("BlockApplication", {"discordUserId": "7"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_is_none(bot: Caller, rpc: str, fields: dict[str, Any], request_id: int) -> None:
    assert bot(rpc, requestId=request_id, **fields).short == _NO_REQUEST


# What a request of the registered application's may change, and what becomes of it.
QUESTIONS: dict[str, tuple[dict[str, str], str]] = {
    "no name": ({"name": ""}, "PARAMETER_MISSING"),
    "name of nothing visible": ({"name": "\u202e\n"}, "PARAMETER_MISSING"),
    "no user": ({"userId": ""}, "PARAMETER_MISSING"),
    "no callback": ({"callback": ""}, "PARAMETER_MISSING"),
    "user: letters": ({"userId": "ada"}, "INVALID_USER_ID"),
    "user: negative": ({"userId": "-1"}, "INVALID_USER_ID"),
    "user: blank": ({"userId": " 1"}, "INVALID_USER_ID"),
    "user: 2^64": ({"userId": str(2**64)}, "INVALID_USER_ID"),
    "user: 21 digits": ({"userId": "0" * 20 + "1"}, "INVALID_USER_ID"),
    "user: other digits": ({"userId": "\u0663"}, "INVALID_USER_ID"),
    "user: largest": ({"userId": str(2**64 - 1)}, ""),
    "callback: relative": ({"callback": "/registered/cb"}, "INVALID_CALLBACK"),
    "callback: scheme": ({"callback": "ftp://{address}/registered/cb"}, "INVALID_CALLBACK"),
    "callback: user information": ({"callback": "http://a:b@{address}/registered/cb"}, "INVALID_CALLBACK"),
    "callback: not under a prefix": ({"callback": "http://{address}/other"}, "INVALID_CALLBACK"),
    "callback: begins as a prefix": ({"callback": "http://{address}/registeredcb"}, "INVALID_CALLBACK"),
    "callback: leaves the prefix": ({"callback": "http://{address}/registered/../other"}, "INVALID_CALLBACK"),
    "callback: query": ({"callback": "http://{address}/registered?x=1"}, ""),
    "name: longest": ({"name": "x" * 100}, ""),
    "name: too long": ({"name": "x" * 101}, "PARAMETER_TOO_LONG"),
    "state: none": ({"state": ""}, ""),
    "state: longest": ({"state": "x" * 2048}, ""),
    "state: too long": ({"state": "x" * 2049}, "PARAMETER_TOO_LONG"),
    "callback: too long": ({"callback": "http://{address}/registered/" + "x" * 2048}, "PARAMETER_TOO_LONG"),
    "everything else before the length": ({"state": "x" * 2049, "callback": "x"}, "INVALID_CALLBACK"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_what_is_a_question(house: House, application: Asker, user: str, case: str) -> None:
    changes, reason = QUESTIONS[case]
    fields = {"name": "x", "userId": user, "state": "s", "callback": application.callback, **changes}
    fields["callback"] = fields["callback"].replace("{address}", house.receiver.address)
    result = application("RequestApiKey", **fields)
    assert result.short == (f"INVALID_ARGUMENT {reason}" if reason else "OK")


def test_an_application_asks_by_its_token_too(
    house: House, bot: Caller, application: Asker, over_tcp: grpc.Channel, registered: Client, user: str
) -> None:
    by_token = Asker(over_tcp, bearer(house.service_token(application_id=registered.id)[1]), application.callback)
    request_id = by_token.ask(user)
    assert application.ask(user) == request_id
    assert bot("GetConsentRequest", requestId=request_id).answer.request.verified


def test_a_repeated_question_is_the_same_while_it_is_open(bot: Caller, application: Asker, user: str) -> None:
    first = application.ask(user, "one")
    assert application.ask(user, "one") == first
    assert application.ask(str(next(_snowflakes)), "one") != first
    second = application.ask(user, "two")
    assert second != first
    bot("ResolveConsentRequest", requestId=first, canceled={})
    assert application.ask(user, "one") not in (first, second)


def test_racing_repeats_are_one_request(application: Asker, user: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: application.ask(user), range(16)))) == 1


def test_open_prompts_of_a_user_are_few(house: House, application: Asker, user: str) -> None:
    """Of registered applications as many again as of strangers; what joins an open prompt is none of its own."""
    limit = house.app.settings.limits.open_per_user
    stranger = Caller(application.channel)

    def ask_as_stranger(number: int, state: str = "") -> Result:
        fields = {"name": "S", "userid": user, "state": state, "callback": f"http://stranger-{number}.example/"}
        return stranger("RequestApiKeyForm", **form(fields))

    for number in range(limit):
        assert ask_as_stranger(number).answer.data == b"OK"
    refused = ask_as_stranger(limit)
    assert (refused.answer.data, refused.headers["x-doorward-status"]) == (b"too many requests", "429")
    assert int(refused.headers["retry-after"]) >= 1
    assert ask_as_stranger(0, "joins").answer.data == b"OK"
    application.ask(user)
    for number in range(limit - 1):
        Asker(application.channel, application.metadata, f"{application.callback}/{number}").ask(user)
    last = application("RequestApiKey", name="x", userId=user, callback=f"{application.callback}/last")
    assert last.short == "RESOURCE_EXHAUSTED TOO_MANY_REQUESTS"
    assert last.trailers["retry-after"] == last.metadata["retry_after"]


# The documented route

FORMS: dict[str, tuple[dict[str, str], str]] = {
    "all there": ({}, "OK"),
    "no state": ({"state": ""}, "OK"),
    "no name": ({"name": ""}, "missing parameters"),
    "no user": ({"userid": ""}, "missing parameters"),
    "no callback": ({"callback": ""}, "missing parameters"),
    "user": ({"userid": "ada"}, "invalid userid"),
    "callback": ({"callback": "ftp://x.example/"}, "invalid callback"),
    "private address": ({"callback": "http://10.0.0.1/"}, "invalid callback"),
    "another's prefix": ({"callback": "{url}/registered/cb"}, "invalid callback"),
    "another's name": ({"name": "REGISTERED\u200b"}, "invalid name"),
    "long name": ({"name": "x" * 101}, "parameter too long"),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_stranger_s_form(house: House, over_socket: grpc.Channel, registered: Client, user: str, case: str) -> None:
    assert registered
    changes, text = FORMS[case]
    fields = {"name": "Stranger", "userid": user, "state": "s", "callback": "http://stranger.example/", **changes}
    fields["callback"] = fields["callback"].replace("{url}", house.receiver.url)
    result = Caller(over_socket)("RequestApiKeyForm", **form(fields))
    assert (result.code, result.answer.content_type) == ("OK", "text/plain; charset=utf-8")
    assert result.answer.data.decode() == text
    assert result.headers.get("x-doorward-status") == (None if text == "OK" else "400")


def test_the_query_wins_and_its_first_value(over_socket: grpc.Channel, bot: Caller, user: str) -> None:
    query = urlencode([("name", "First"), ("name", "Second"), ("userid", user)])
    path: Metadata = (("x-envoy-original-path", f"/requestapikey?{query}"),)
    body = {"name": "Body", "userid": "1", "callback": "http://stranger.example/"}
    assert Caller(over_socket)("RequestApiKeyForm", path, **form(body)).answer.data == b"OK"
    [leased] = lease(bot)
    assert (leased.request.application_name, leased.request.discord_user_id) == ("First", user)
    assert (leased.request.verified, leased.request.callback_host) == (False, "stranger.example")


def test_with_its_credentials_an_application_may_use_the_form(bot: Caller, application: Asker, user: str) -> None:
    fields = {"name": "Whatever", "userid": user, "callback": application.callback}
    assert application("RequestApiKeyForm", **form(fields)).answer.data == b"OK"
    [leased] = lease(bot)
    assert (leased.request.application_name, leased.request.verified) == ("Registered", True)


@pytest.mark.parametrize("rpc", ["RequestApiKeyForm", "RequestApiKey"])
def test_a_damaged_database_promises_nothing(house: House, tmp_path: Path, logs: Path, user: str, rpc: str) -> None:
    settings, path = house.app.settings, tmp_path / "doorward.db"
    database = settings.database.model_copy(update={"url": f"sqlite:///{path}", "busy_timeout": 0.2})
    log = logs / f"{tmp_path.name}.log"
    with opened(settings.model_copy(update={"database": database}), log) as app:
        made = app.applications.create("Asks", ["http://asks.example/"])
        house.secrets.add(made.signing_secret)
        metadata = basic(house.known(Client(made.application.id, made.secret)))
        fields = {"name": "x", "callback": "http://asks.example/"}
        with served(app, tmp_path) as channel, closing(sqlite3.connect(path, isolation_level=None)) as other:
            asks = Caller(channel, metadata)
            other.execute("BEGIN IMMEDIATE")
            if rpc == "RequestApiKey":
                assert asks(rpc, **fields, userId=user).short == "UNAVAILABLE STORAGE_UNAVAILABLE"
            else:
                result = asks(rpc, **form({**fields, "userid": user}))
                assert (result.answer.data, result.headers["x-doorward-status"]) == (b"service unavailable", "503")
    assert '"unexpected"' not in log.read_text()


# Keys


def test_a_key_s_life(house: House, bot: Caller, user: str) -> None:
    assert list(bot("ListApiKeys", discordUserId=user).answer.keys) == []
    house.secrets.add(value := f"ABCD-{user}-wxyz")
    added = bot("AddApiKey", discordUserId=user, service="game", label="Main", value=value)
    key = added.answer.key
    assert (key.service, key.label, key.last_four, key.account) == ("game", "Main", "wxyz", "")
    assert list(bot("ListApiKeys", discordUserId=user).answer.keys) == [key]
    assert list(bot("ListApiKeys", discordUserId=user, service="game").answer.keys) == [key]
    assert list(bot("ListApiKeys", discordUserId=user, service="other").answer.keys) == []
    again = bot("AddApiKey", discordUserId=user, service="game", label="Again", value=value)
    assert again.short == "ALREADY_EXISTS KEY_EXISTS"
    assert bot("DeleteApiKey", discordUserId=user, keyId=key.id).code == "OK"
    assert bot("DeleteApiKey", discordUserId=user, keyId=key.id).short == _NO_KEY
    assert list(bot("ListApiKeys", discordUserId=user).answer.keys) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"discordUserId": "ada"}, "INVALID_USER_ID"),
        ({"discordUserId": ""}, "INVALID_USER_ID"),
        ({"service": ""}, "INVALID_SERVICE"),
        ({"service": "GAME"}, "INVALID_SERVICE"),
        ({"label": ""}, "INVALID_LABEL"),
        ({"label": "x" * 81}, "INVALID_LABEL"),
        ({"value": ""}, "INVALID_KEY"),
        ({"value": "a b"}, "INVALID_KEY"),
        ({"value": "x" * 4097}, "INVALID_KEY"),
    ],
    ids=str,
)
def test_what_is_no_key(bot: Caller, user: str, changes: dict[str, str], reason: str) -> None:
    fields = {"discordUserId": user, "service": "game", "label": "Main", "value": "some-value", **changes}
    assert bot("AddApiKey", **fields).short == f"INVALID_ARGUMENT {reason}"


@pytest.mark.parametrize("rpc", ["ListApiKeys", "DeleteApiKey", "ListGrants", "RevokeGrant", "BlockApplication"])
@pytest.mark.parametrize("snowflake", ["", "ada", str(2**64)])
def test_what_is_no_user(bot: Caller, rpc: str, snowflake: str) -> None:
    assert bot(rpc, discordUserId=snowflake).short == "INVALID_ARGUMENT INVALID_USER_ID"


def test_fifteen_keys_for_a_service(chain: KeyChain, bot: Caller, user: str) -> None:
    for _ in range(15):
        chain.add(user)
    result = bot("AddApiKey", discordUserId=user, service="game", label="Main", value="one-too-many")
    assert result.short == "FAILED_PRECONDITION TOO_MANY_KEYS"
    chain.add(user, "other")


def test_another_s_key_is_nobody_s(chain: KeyChain, bot: Caller, user: str) -> None:
    key, other = chain.add(user), str(next(_snowflakes))
    assert bot("DeleteApiKey", discordUserId=other, keyId=key).short == _NO_KEY
    chain.add(other)
    assert bot("DeleteApiKey", discordUserId=other, keyId=key).short == _NO_KEY
    assert [listed.id for listed in bot("ListApiKeys", discordUserId=user).answer.keys] == [key]


# Leases


def test_a_prompt_comes_with_the_keys_but_not_their_values(
    chain: KeyChain, bot: Caller, application: Asker, user: str
) -> None:
    keys, request_id = [chain.add(user), chain.add(user, "other")], application.ask(user)
    [leased] = lease(bot)
    assert (leased.request.id, leased.lease_epoch, leased.request.status) == (request_id, 1, _PENDING)
    assert [key.id for key in leased.keys] == keys
    assert [key.last_four for key in leased.keys] == ["abcd", "abcd"]
    assert not any(value.encode() in leased.SerializeToString() for value in chain.values.values())


def test_a_user_without_keys_is_asked_all_the_same(bot: Caller, application: Asker, user: str) -> None:
    application.ask(user)
    [leased] = lease(bot)
    assert list(leased.keys) == []


def test_a_lease_that_ran_out_is_fenced_off(house: House, bot: Caller, application: Asker, user: str) -> None:
    request_id = application.ask(user)
    [first] = lease(bot, seconds=5)
    assert lease(bot) == []
    house.clock.ahead = timedelta(seconds=6)
    # Nobody else has it yet.
    [second] = lease(bot, seconds=5)
    assert (second.request.id, second.lease_epoch) == (request_id, first.lease_epoch + 1)
    late = bot("MarkPrompted", requestId=request_id, leaseEpoch=first.lease_epoch, message="late")
    assert late.short == "ABORTED LEASE_LOST"
    for _ in range(2):
        marked = bot("MarkPrompted", requestId=request_id, leaseEpoch=second.lease_epoch, message="7/8")
        assert marked.code == "OK"
    late = bot("MarkPrompted", requestId=request_id, leaseEpoch=first.lease_epoch, message="late")
    assert late.short == "ABORTED LEASE_LOST"
    request = bot("GetConsentRequest", requestId=request_id).answer.request
    assert (request.status, request.message) == (_PROMPTED, "7/8")
    house.clock.ahead = timedelta(seconds=60)
    assert lease(bot) == []


def test_a_lease_that_ran_out_holds_until_another_takes_it(
    house: House, bot: Caller, application: Asker, user: str
) -> None:
    request_id = application.ask(user)
    [leased] = lease(bot, seconds=5)
    house.clock.ahead = timedelta(seconds=60)
    assert bot("MarkPrompted", requestId=request_id, leaseEpoch=leased.lease_epoch, message="1").code == "OK"
    assert lease(bot) == []


def test_who_waits_gets_what_is_asked_meanwhile(bot: Caller, application: Asker, user: str) -> None:
    assert lease(bot) == []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lease, bot, wait_seconds=30)
        request_id = application.ask(user)
        [leased] = waiting.result(10)
    assert leased.request.id == request_id


# Prompts that ended


@pytest.fixture
def prompted(bot: Caller, application: Asker, user: str) -> int:
    """A request whose prompt was sent."""
    request_id = application.ask(user)
    [leased] = lease(bot)
    assert bot("MarkPrompted", requestId=request_id, leaseEpoch=leased.lease_epoch, message="7/8").code == "OK"
    return request_id


def test_a_prompt_that_ended_is_given_out_until_it_is_closed(house: House, bot: Caller, prompted: int) -> None:
    house.app.consents.resolve(prompted, Status.CANCELED, actor="operator")
    for ahead in (0, 6):
        house.clock.ahead = timedelta(seconds=ahead)
        [ended] = lease(bot, seconds=5)
        assert (ended.request.id, ended.request.status, ended.request.message) == (prompted, _CANCELED, "7/8")
        assert list(ended.keys) == []
        assert lease(bot, seconds=5) == []
    house.clock.ahead = timedelta(seconds=12)
    for _ in range(2):
        assert bot("ClosePrompt", requestId=prompted).code == "OK"
    assert lease(bot) == []


def test_the_deadline_s_outcome_is_to_be_shown_too(house: House, bot: Caller, prompted: int) -> None:
    house.clock.ahead = _LIFETIME
    work(house)
    [ended] = lease(bot)
    assert (ended.request.id, ended.request.status) == (prompted, _TIMED_OUT)


def test_whoever_brings_the_outcome_is_first_to_show_it(house: House, bot: Caller, prompted: int) -> None:
    assert bot("ResolveConsentRequest", requestId=prompted, canceled={}).answer.status == _CANCELED
    assert lease(bot) == []
    house.clock.ahead = timedelta(seconds=31)
    assert [ended.request.id for ended in lease(bot)] == [prompted]


def test_what_was_never_sent_needs_not_be_closed(house: House, bot: Caller, application: Asker, user: str) -> None:
    request_id = application.ask(user)
    house.app.consents.resolve(request_id, Status.BLOCKED, actor="operator")
    assert lease(bot) == []


def test_a_shared_prompt_is_open_as_long_as_one_of_its_requests(
    house: House, bot: Caller, application: Asker, user: str, prompted: int
) -> None:
    house.clock.ahead = timedelta(seconds=300)
    later = application.ask(user, state="later")
    house.clock.ahead = _LIFETIME
    work(house)
    assert (status_of(bot, prompted), status_of(bot, later)) == (_TIMED_OUT, _PROMPTED)
    assert lease(bot) == []
    assert bot("ClosePrompt", requestId=prompted).code == "OK"
    house.app.consents.resolve(prompted, Status.CANCELED, actor="operator")
    [ended] = lease(bot)
    assert (ended.request.id, ended.request.status, ended.request.message) == (later, _CANCELED, "7/8")


# Lists


def test_requests_are_listed(chain: KeyChain, bot: Caller, application: Asker, user: str, prompted: int) -> None:
    key = chain.add(user)
    other_user = application.ask("4242")

    def listed(**fields: Any) -> list[tuple[int, list[int]]]:
        result = bot("ListConsentRequests", maxRequests=100, **fields)
        assert result.code == "OK", result.short
        return [(one.request.id, [key.id for key in one.keys]) for one in result.answer.requests]

    assert listed()[:2] == [(other_user, []), (prompted, [key])]
    assert (prompted, [key]) in listed(onlyPrompted=True)
    assert other_user not in dict(listed(onlyPrompted=True))
    assert listed(discordUserId=user) == [(prompted, [key])]
    assert listed(discordUserId=user, beforeId=prompted) == []
    assert bot("ResolveConsentRequest", requestId=prompted, granted={"keyIds": [key]}).answer.status == _GRANTED
    assert listed(discordUserId=user) == [(prompted, [])]
    assert listed(discordUserId=user, onlyPrompted=True) == []
    assert bot("ListConsentRequests", discordUserId="ada").short == "INVALID_ARGUMENT INVALID_USER_ID"


@pytest.mark.parametrize("epoch", [0, 2, -1, 2**31 - 1])
def test_a_lease_that_is_none(bot: Caller, application: Asker, user: str, epoch: int) -> None:
    request_id = application.ask(user)
    [_] = lease(bot)
    assert bot("MarkPrompted", requestId=request_id, leaseEpoch=epoch).short == "ABORTED LEASE_LOST"


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"maxRequests": 0}, id="no requests"),
        pytest.param({"maxRequests": -(2**31)}, id="fewer"),
        pytest.param({"maxRequests": 2**31 - 1}, id="many"),
        pytest.param({"waitSeconds": -1}, id="no wait"),
        pytest.param({"waitSeconds": "NaN"}, id="not a number"),
        pytest.param({"waitSeconds": "-Infinity"}, id="minus infinity"),
        pytest.param({"waitSeconds": "Infinity"}, id="infinity"),
        pytest.param({"waitSeconds": 1e300}, id="for ever"),
        pytest.param({"leaseSeconds": -(2**31)}, id="lease ended"),
        pytest.param({"leaseSeconds": 2**31 - 1}, id="lease without end"),
    ],
)
def test_numbers_out_of_their_ranges_are_taken_for_the_nearest(
    house: House, bot: Caller, application: Asker, user: str, fields: dict[str, Any]
) -> None:
    request_id = application.ask(user)
    result = bot("LeaseConsentRequests", **fields)
    assert [leased.request.id for leased in result.answer.requests] == [request_id]
    assert list(bot("LeaseConsentRequests", **fields | {"waitSeconds": 0}).answer.requests) == []
    house.clock.ahead = timedelta(seconds=301)
    assert [leased.lease_epoch for leased in lease(bot)] == [2]


@pytest.mark.parametrize("wait_seconds", ["NaN", -1, "-Infinity"])
def test_no_number_waits_for_nobody(bot: Caller, wait_seconds: Any) -> None:
    started = time.monotonic()
    assert list(bot("LeaseConsentRequests", waitSeconds=wait_seconds).answer.requests) == []
    assert time.monotonic() - started < 5


def test_two_leasers_never_get_the_same_prompt(bot: Caller, application: Asker) -> None:
    asked = [application.ask(str(next(_snowflakes))) for _ in range(24)]
    start = threading.Barrier(6)

    def take(_: int) -> list[int]:
        taken: list[int] = []
        start.wait(10)
        while leased := lease(bot, most=2):
            taken += [one.request.id for one in leased]
        return taken

    with ThreadPoolExecutor(6) as pool:
        counted = Counter(request_id for taken in pool.map(take, range(6)) for request_id in taken)
    assert counted == Counter(asked)


def test_those_who_wait_longest_come_first(bot: Caller, application: Asker) -> None:
    asked = [application.ask(str(next(_snowflakes))) for _ in range(5)]
    leased = [[one.request.id for one in lease(bot, most=2)] for _ in range(4)]
    assert leased == [asked[:2], asked[2:4], asked[4:], []]


def test_a_long_poll_ends_when_a_request_comes(bot: Caller, application: Asker, user: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(lease, bot, wait_seconds=20)
        assert wait([polling], 0.5).not_done == {polling}
        request_id, started = application.ask(user), time.monotonic()
        assert [leased.request.id for leased in polling.result(20)] == [request_id]
        assert time.monotonic() - started < 2


def test_a_long_poll_ends_in_nothing(bot: Caller) -> None:
    started = time.monotonic()
    assert lease(bot, wait_seconds=0.3) == []
    assert 0.29 < time.monotonic() - started < 5


def test_long_polls_leave_threads_to_others(
    house: House, tmp_path: Path, logs: Path, bot_token: Metadata, operator_token: Metadata
) -> None:
    """However many poll, somebody else is served at once: what waits has a cap."""
    settings = house.app.settings
    few = {
        "grpc": settings.grpc.model_copy(update={"threads": 4}),
        "outbound": settings.outbound.model_copy(update={"waiting": 2}),
    }
    with (
        opened(settings.model_copy(update=few), logs / f"{tmp_path.name}.log") as app,
        served(app, tmp_path, over_tcp=True) as channel,
        ThreadPoolExecutor(8) as pool,
    ):
        polls = [pool.submit(Caller(channel, bot_token), "LeaseConsentRequests", waitSeconds=3) for _ in range(8)]
        assert wait(polls, 0.5).not_done
        started = time.monotonic()
        assert Caller(channel, operator_token)("ListDeliveries").code == "OK"
        taken = time.monotonic() - started
    assert taken < 1
    assert {poll.result().short for poll in polls} <= {"OK", "UNAVAILABLE BUSY"}


def test_another_state_shares_the_prompt(bot: Caller, application: Asker, user: str) -> None:
    first, second = application.ask(user, "one"), application.ask(user, "two")
    [leased] = lease(bot)
    assert leased.request.id == first
    third = application.ask(user, "three")
    assert lease(bot) == []
    assert bot("MarkPrompted", requestId=first, leaseEpoch=leased.lease_epoch, message="1").code == "OK"
    fourth = application.ask(user, "four")
    assert lease(bot) == []
    assert [status_of(bot, one) for one in (first, second, third, fourth)] == [_PROMPTED] * 4


def test_another_callback_never_shares_a_prompt(bot: Caller, application: Asker, user: str) -> None:
    other = Asker(application.channel, application.metadata, f"{application.callback}/other")
    asked = [application.ask(user), other.ask(user)]
    assert [leased.request.id for leased in lease(bot)] == asked


@pytest.mark.parametrize("worked", [True, False], ids=["its worker lives", "no worker lives"])
def test_a_request_past_its_deadline_is_not_prompted(
    house: House, bot: Caller, application: Asker, user: str, worked: bool
) -> None:
    application.ask(user)
    house.clock.ahead = _LIFETIME + timedelta(seconds=1)
    if worked:
        work(house)
    assert lease(bot) == []


# Outcomes


@dataclass(frozen=True)
class Outcome:
    """How a request may end: what the bot says, what is recorded, and the error that the application is told."""

    fields: dict[str, Any]
    status: int
    error: str | None


OUTCOMES = {
    "granted": Outcome({}, _GRANTED, None),
    "canceled": Outcome({"canceled": {}}, _CANCELED, "user canceled"),
    "blocked": Outcome({"blocked": {}}, _BLOCKED, "user blocked verification dm"),
}


def resolve(bot: Caller, request_id: int, outcome: str, *key_ids: int) -> Result:
    fields = OUTCOMES[outcome].fields or {"granted": {"keyIds": key_ids}}
    return bot("ResolveConsentRequest", requestId=request_id, **fields)


@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "not yet prompted"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_reaches_the_callback(
    house: House,
    chain: KeyChain,
    bot: Caller,
    application: Asker,
    receiver: Receiver,
    user: str,
    outcome: str,
    prompted: bool,
) -> None:
    one, two, three = (chain.add(user) for _ in range(3))
    request_id = application.ask(user, "stäte&=\n")
    [leased] = lease(bot)
    if prompted:
        bot("MarkPrompted", requestId=request_id, leaseEpoch=leased.lease_epoch, message="1")
    keys = [three, one, three]
    assert resolve(bot, request_id, outcome, *keys).answer.status == OUTCOMES[outcome].status
    assert status_of(bot, request_id) == OUTCOMES[outcome].status
    work(house)
    error = OUTCOMES[outcome].error
    expected = {"error": [error]} if error else {"api_keys": [chain.values[three], chain.values[one]]}
    assert told(receiver) == [{"userid": [user], "state": ["stäte&=\n"], **expected}]
    assert chain.values[two] not in str(told(receiver))
    assert lease(bot) == []
    marked = bot("MarkPrompted", requestId=request_id, leaseEpoch=leased.lease_epoch, message="2")
    assert marked.short == "FAILED_PRECONDITION REQUEST_FINISHED"


def test_a_registered_application_s_callbacks_are_signed(
    house: House, bot: Caller, registered: Client, application: Asker, receiver: Receiver, user: str
) -> None:
    resolve(bot, application.ask(user), "canceled")
    work(house)
    [request] = receiver.seen
    headers, body = headers_of(request), request.partition(b"\r\n\r\n")[2]
    assert headers["content-type"].startswith("application/x-www-form-urlencoded")
    [secret] = house.app.applications.signing_secrets(registered.id)
    sent_at = datetime.fromtimestamp(int(headers["webhook-timestamp"]), UTC)
    assert headers["webhook-signature"] == Webhook(secret).sign(headers["webhook-id"], sent_at, body.decode())


def test_an_application_may_choose_json(
    house: House, chain: KeyChain, bot: Caller, over_socket: grpc.Channel, receiver: Receiver, user: str
) -> None:
    made = house.application(f"{receiver.url}/json", form="json")
    key, request_id = chain.add(user), Asker(over_socket, basic(made), f"{receiver.url}/json").ask(user, "s")
    resolve(bot, request_id, "granted", key)
    work(house)
    [request] = receiver.seen
    assert headers_of(request)["content-type"].startswith("application/json")
    expected = {"userid": user, "state": "s", "api_keys": [chain.values[key]]}
    assert json.loads(request.partition(b"\r\n\r\n")[2]) == expected


def test_a_stranger_is_told_without_a_signature(
    house: House, bot: Caller, over_socket: grpc.Channel, receiver: Receiver, user: str
) -> None:
    fields = {"name": "Stranger", "userid": user, "callback": f"{receiver.url}/stranger?x=1"}
    assert Caller(over_socket)("RequestApiKeyForm", **form(fields)).answer.data == b"OK"
    [leased] = lease(bot)
    resolve(bot, leased.request.id, "canceled")
    work(house)
    [request] = receiver.seen
    assert request.startswith(b"POST /stranger?x=1 HTTP/1.1\r\n")
    assert {name for name in headers_of(request) if name.startswith("webhook-")} == {"webhook-id"}
    assert told(receiver) == [{"userid": [user], "state": [""], "error": ["user canceled"]}]


def test_silence_ends_in_a_timeout(
    house: House, bot: Caller, application: Asker, receiver: Receiver, user: str
) -> None:
    request_id = application.ask(user)
    [_] = lease(bot, seconds=300)
    house.clock.ahead = _LIFETIME - timedelta(seconds=5)
    work(house)
    assert (status_of(bot, request_id), receiver.seen) == (_PENDING, [])
    house.clock.ahead = _LIFETIME + timedelta(seconds=1)
    work(house)
    assert status_of(bot, request_id) == _TIMED_OUT
    assert [fields["error"] for fields in told(receiver)] == [["timeout"]]
    assert resolve(bot, request_id, "canceled").answer.status == _TIMED_OUT


@pytest.mark.parametrize("later", OUTCOMES)
@pytest.mark.parametrize("first", OUTCOMES)
def test_the_first_outcome_wins(
    house: House,
    chain: KeyChain,
    bot: Caller,
    application: Asker,
    receiver: Receiver,
    user: str,
    first: str,
    later: str,
) -> None:
    one, two, request_id = chain.add(user), chain.add(user), application.ask(user)
    assert resolve(bot, request_id, first, one).answer.status == OUTCOMES[first].status
    assert resolve(bot, request_id, later, two).answer.status == OUTCOMES[first].status
    house.clock.ahead = _LIFETIME + timedelta(seconds=1)
    work(house)
    assert status_of(bot, request_id) == OUTCOMES[first].status
    [fields] = told(receiver)
    error = OUTCOMES[first].error
    assert fields.get("error") == ([error] if error else None)
    assert fields.get("api_keys") == (None if error else [chain.values[one]])


def test_of_racing_outcomes_one_wins(
    house: House, chain: KeyChain, bot: Caller, application: Asker, receiver: Receiver, user: str
) -> None:
    key, request_id, start = chain.add(user), application.ask(user), threading.Barrier(9)

    def decide(number: int) -> int:
        start.wait(10)
        return int(resolve(bot, request_id, [*OUTCOMES][number % 3], key).answer.status)

    with ThreadPoolExecutor(9) as pool:
        statuses = set(pool.map(decide, range(9)))
    assert statuses == {status_of(bot, request_id)}
    work(house)
    assert len(receiver.seen) == 1


@pytest.mark.parametrize("whose", ["another's", "nobody's", "none", "own and another's", "removed"])
def test_keys_that_are_not_the_user_s_are_not_granted(
    chain: KeyChain, bot: Caller, application: Asker, user: str, whose: str
) -> None:
    own, foreign = chain.add(user), chain.add(str(next(_snowflakes)))
    keys = {
        "another's": [foreign],
        "nobody's": [2**62],
        "none": [],
        "own and another's": [own, foreign],
        "removed": [own],
    }[whose]
    if whose == "removed":
        bot("DeleteApiKey", discordUserId=user, keyId=own)
    request_id = application.ask(user)
    assert resolve(bot, request_id, "granted", *keys).short == _NO_KEY
    # Nothing was decided.
    assert status_of(bot, request_id) == _PENDING
    assert resolve(bot, request_id, "canceled").answer.status == _CANCELED


def test_who_has_no_keys_grants_none(bot: Caller, application: Asker, user: str) -> None:
    assert resolve(bot, application.ask(user), "granted", 1).short == _NO_KEY


def test_one_decision_answers_all_who_share_the_prompt(
    house: House, chain: KeyChain, bot: Caller, application: Asker, receiver: Receiver, user: str
) -> None:
    key, first, second = chain.add(user), application.ask(user, "one"), application.ask(user, "two")
    [leased] = lease(bot)
    assert leased.request.id == first
    assert resolve(bot, first, "granted", key).answer.status == _GRANTED
    assert [status_of(bot, one) for one in (first, second)] == [_GRANTED] * 2
    work(house)
    expected = [{"userid": [user], "state": [state], "api_keys": [chain.values[key]]} for state in ("one", "two")]
    assert sorted(told(receiver), key=str) == sorted(expected, key=str)


def test_who_joined_late_outlives_the_first(
    house: House, chain: KeyChain, bot: Caller, application: Asker, receiver: Receiver, user: str
) -> None:
    """Each request has 600 s of its own, and the user answers by the one prompt that there is: that of the first."""
    key, first = chain.add(user), application.ask(user, "one")
    [leased] = lease(bot)
    bot("MarkPrompted", requestId=first, leaseEpoch=leased.lease_epoch, message="1")
    house.clock.ahead = _LIFETIME - timedelta(seconds=10)
    second = application.ask(user, "two")
    house.clock.ahead = _LIFETIME + timedelta(seconds=1)
    work(house)
    assert [status_of(bot, one) for one in (first, second)] == [_TIMED_OUT, _PROMPTED]
    assert resolve(bot, second, "granted", key).answer.status == _GRANTED
    work(house)
    assert [fields.get("api_keys") for fields in told(receiver)] == [None, [chain.values[key]]]


# Grants


def grants(bot: Caller, user: str) -> list[pb.Grant]:
    result = bot("ListGrants", discordUserId=user)
    assert result.code == "OK"
    return list(result.answer.grants)


def test_a_grant_s_life(house: House, chain: KeyChain, bot: Caller, application: Asker, user: str) -> None:
    assert grants(bot, user) == []
    one, two = chain.add(user), chain.add(user)
    resolve(bot, application.ask(user), "granted", two, one)
    [grant] = grants(bot, user)
    assert (grant.application_name, grant.verified, grant.callback_host) == ("Registered", True, "127.0.0.1")
    assert [key.id for key in grant.keys] == [two, one]
    bot("DeleteApiKey", discordUserId=user, keyId=two)
    assert [[key.id for key in grant.keys] for grant in grants(bot, user)] == [[one]]
    other = str(next(_snowflakes))
    assert bot("RevokeGrant", discordUserId=other, grantId=grant.id).short == _NO_GRANT
    chain.add(other)
    assert bot("RevokeGrant", discordUserId=other, grantId=grant.id).short == _NO_GRANT
    assert bot("RevokeGrant", discordUserId=user, grantId=grant.id).code == "OK"
    assert bot("RevokeGrant", discordUserId=user, grantId=grant.id).short == _NO_GRANT
    assert grants(bot, user) == []
    assert [listed.id for listed in bot("ListApiKeys", discordUserId=user).answer.keys] == [one]


@pytest.mark.parametrize("outcome", ["canceled", "blocked"])
def test_what_is_not_granted_is_no_grant(
    chain: KeyChain, bot: Caller, application: Asker, user: str, outcome: str
) -> None:
    chain.add(user)
    resolve(bot, application.ask(user), outcome)
    assert grants(bot, user) == []


Taking = Callable[[Caller, str, int], Result]


def _revoke(bot: Caller, user: str, _: int) -> Result:
    return bot("RevokeGrant", discordUserId=user, grantId=grants(bot, user)[0].id)


def _delete(bot: Caller, user: str, key: int) -> Result:
    return bot("DeleteApiKey", discordUserId=user, keyId=key)


@pytest.mark.parametrize("take_back", [_revoke, _delete], ids=["grant", "key"])
def test_what_is_taken_back_in_time_is_not_sent(
    house: House,
    chain: KeyChain,
    bot: Caller,
    application: Asker,
    receiver: Receiver,
    user: str,
    take_back: Taking,
) -> None:
    key = chain.add(user)
    resolve(bot, application.ask(user), "granted", key)
    assert take_back(bot, user, key).code == "OK"
    work(house)
    assert [fields.get("error") for fields in told(receiver)] == [["user canceled"]]


@pytest.mark.parametrize("take_back", [_revoke, _delete], ids=["grant", "key"])
def test_keys_that_went_out_once_are_never_followed_by_an_error(
    house: House,
    chain: KeyChain,
    bot: Caller,
    operator: Caller,
    application: Asker,
    receiver: Receiver,
    user: str,
    take_back: Taking,
) -> None:
    key, receiver.status = chain.add(user), "500 Oops"
    resolve(bot, application.ask(user), "granted", key)
    work(house)
    assert take_back(bot, user, key).code == "OK"
    house.clock.ahead, receiver.status = timedelta(hours=1), "200 OK"
    work(house)
    assert [set(fields) for fields in told(receiver)] == [{"userid", "state", "api_keys"}]
    assert [delivery.status for delivery in deliveries(operator)] == [pb.DELIVERY_STATUS_ABANDONED]


# Blocks


def test_who_is_blocked_asks_in_vain_and_is_not_told_so(
    house: House, bot: Caller, application: Asker, other_application: Asker, receiver: Receiver, user: str
) -> None:
    first = application.ask(user)
    resolve(bot, first, "canceled")
    for _ in range(2):
        assert bot("BlockApplication", discordUserId=user, requestId=first).code == "OK"
    work(house)
    receiver.seen.clear()
    request_id = application.ask(user)
    assert lease(bot) == []
    house.clock.ahead = timedelta(seconds=4)
    work(house)
    assert (status_of(bot, request_id), receiver.seen) == (_PENDING, [])
    house.clock.ahead = timedelta(seconds=61)
    assert lease(bot) == []
    work(house)
    assert status_of(bot, request_id) == _CANCELED
    assert [fields["error"] for fields in told(receiver)] == [["user canceled"]]
    # Others may still ask, and this one others.
    asked = [other_application.ask(user), application.ask(str(next(_snowflakes)))]
    assert [leased.request.id for leased in lease(bot)] == asked


def test_who_is_blocked_is_not_prompted_when_no_worker_lives(
    house: House, bot: Caller, application: Asker, user: str
) -> None:
    first = application.ask(user)
    resolve(bot, first, "canceled")
    bot("BlockApplication", discordUserId=user, requestId=first)
    application.ask(user)
    house.clock.ahead = _LIFETIME + timedelta(seconds=1)
    assert lease(bot) == []


def test_a_stranger_is_blocked_by_its_callback(bot: Caller, over_socket: grpc.Channel, user: str) -> None:
    stranger = Caller(over_socket)

    def ask(callback: str) -> None:
        fields = {"name": "Stranger", "userid": user, "callback": callback, "state": callback}
        assert stranger("RequestApiKeyForm", **form(fields)).answer.data == b"OK"

    ask("http://one.example/cb")
    [leased] = lease(bot)
    assert bot("BlockApplication", discordUserId=user, requestId=leased.request.id).code == "OK"
    resolve(bot, leased.request.id, "canceled")
    ask("http://one.example/cb")
    ask("http://one.example/cb2")
    assert [leased.request.callback_host for leased in lease(bot)] == ["one.example"]


def test_blocking_for_no_request_makes_no_user(house: House, bot: Caller, user: str) -> None:
    assert bot("BlockApplication", discordUserId=user, requestId=2**40).short == _NO_REQUEST
    known = house.app.database.fetch_all(OAuthIdentity.select().where(OAuthIdentity.subject == user))
    assert known == []


# Deliveries


def deliveries(operator: Caller, **fields: Any) -> list[pb.Delivery]:
    result = operator("ListDeliveries", **{"maxDeliveries": 100, **fields})
    assert result.code == "OK", result.short
    return list(result.answer.deliveries)


def test_a_delivery_s_life(
    house: House, bot: Caller, operator: Caller, application: Asker, receiver: Receiver, user: str
) -> None:
    request_id, receiver.status = application.ask(user), "410 Gone"
    resolve(bot, request_id, "canceled")
    [queued] = deliveries(operator)
    assert (queued.request_id, queued.callback_host, queued.error) == (request_id, "127.0.0.1", "user canceled")
    assert (queued.status, list(queued.attempts)) == (pb.DELIVERY_STATUS_QUEUED, [])
    assert queued.HasField("next_attempt_time")
    refused = operator("RedeliverDelivery", deliveryId=queued.id)
    assert refused.short == "FAILED_PRECONDITION DELIVERY_NOT_ABANDONED"
    work(house)
    [abandoned] = deliveries(operator)
    assert (abandoned.id, abandoned.status) == (queued.id, pb.DELIVERY_STATUS_ABANDONED)
    assert [(attempt.status, attempt.error) for attempt in abandoned.attempts] == [(410, "")]
    assert not abandoned.HasField("next_attempt_time")
    receiver.status = "204 No Content"
    assert operator("RedeliverDelivery", deliveryId=queued.id).code == "OK"
    work(house)
    [sent] = deliveries(operator)
    assert (sent.status, sent.webhook_id) == (pb.DELIVERY_STATUS_SENT, queued.webhook_id)
    assert [attempt.status for attempt in sent.attempts] == [410, 204]
    assert {headers_of(request)["webhook-id"] for request in receiver.seen} == {queued.webhook_id}
    refused = operator("RedeliverDelivery", deliveryId=queued.id)
    assert refused.short == "FAILED_PRECONDITION DELIVERY_NOT_ABANDONED"


def test_a_delivery_is_tried_on_schedule_and_then_abandoned(
    house: House, bot: Caller, operator: Caller, application: Asker, receiver: Receiver, user: str
) -> None:
    receiver.status = "503 Later"
    resolve(bot, application.ask(user), "canceled")
    work(house)
    for number, seconds in enumerate(house.app.settings.callbacks.schedule, start=1):
        [delivery] = deliveries(operator)
        assert (delivery.status, len(delivery.attempts)) == (pb.DELIVERY_STATUS_QUEUED, number)
        left = delivery.next_attempt_time.ToDatetime() - house.clock.now().replace(tzinfo=None)
        assert 0.95 * seconds - 5 < left.total_seconds() <= 1.1 * seconds
        house.clock.ahead += timedelta(seconds=seconds * 1.1 + 1)
        work(house)
    [delivery] = deliveries(operator)
    assert (delivery.status, len(delivery.attempts)) == (pb.DELIVERY_STATUS_ABANDONED, 8)
    assert operator("RedeliverDelivery", deliveryId=delivery.id).code == "OK"
    work(house)
    # It starts from the beginning of its schedule.
    [delivery] = deliveries(operator)
    left = delivery.next_attempt_time.ToDatetime() - house.clock.now().replace(tzinfo=None)
    assert (delivery.status, left < timedelta(seconds=6)) == (pb.DELIVERY_STATUS_QUEUED, True)


def test_nobody_there_is_no_status(
    house: House, bot: Caller, operator: Caller, other_application: Asker, user: str
) -> None:
    """The callback's name does not resolve."""
    resolve(bot, other_application.ask(user), "canceled")
    work(house)
    [delivery] = deliveries(operator)
    assert [(attempt.status, attempt.error) for attempt in delivery.attempts] == [(0, "NOT_CONNECTABLE")]
    assert delivery.status == pb.DELIVERY_STATUS_QUEUED


@pytest.fixture
def five(house: House, bot: Caller, application: Asker, receiver: Receiver) -> list[int]:
    """The requests of five deliveries, the oldest first: abandoned, sent, sent, queued, queued."""
    for status in ("410 Gone", "200 OK", "200 OK"):
        receiver.status = status
        resolve(bot, application.ask(str(next(_snowflakes)), status), "canceled")
        work(house)
    for _ in range(2):
        resolve(bot, application.ask(str(next(_snowflakes))), "canceled")
    with house.app.database.writing():
        return [row.id for row in ConsentRequest.select().order_by(ConsentRequest.id)]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        pytest.param({}, [4, 3, 2, 1, 0], id="all"),
        pytest.param({"status": _QUEUED}, [4, 3], id="queued"),
        pytest.param({"status": _SENT}, [2, 1], id="sent"),
        pytest.param({"status": _ABANDONED}, [0], id="abandoned"),
        pytest.param({"maxDeliveries": 2}, [4, 3], id="at most two"),
        pytest.param({"maxDeliveries": 0}, [4], id="at most none"),
        pytest.param({"maxDeliveries": -5}, [4], id="less than none"),
        pytest.param({"maxDeliveries": 2**31 - 1}, [4, 3, 2, 1, 0], id="very many"),
        pytest.param({"beforeId": -1}, [], id="before the first"),
        pytest.param({"beforeId": 2**63 - 1}, [4, 3, 2, 1, 0], id="before the last"),
    ],
)
def test_which_deliveries_are_listed(
    operator: Caller, five: list[int], fields: dict[str, Any], found: list[int]
) -> None:
    assert [delivery.request_id for delivery in deliveries(operator, **fields)] == [five[one] for one in found]


def test_deliveries_are_paged(operator: Caller, five: list[int]) -> None:
    pages, before = [], 0
    while page := deliveries(operator, maxDeliveries=2, beforeId=before):
        pages.append([delivery.request_id for delivery in page])
        before = page[-1].id
    assert pages == [[five[4], five[3]], [five[2], five[1]], [five[0]]]


def test_a_status_that_is_none_finds_nothing_or_is_refused(operator: Caller) -> None:
    """Enums of proto3 are open: any number may come."""
    result = operator("ListDeliveries", status=99)
    assert result.code in ("OK", "INVALID_ARGUMENT"), result.short


@pytest.mark.parametrize("delivery_id", [0, -1, 2**62])
def test_a_delivery_that_is_none(operator: Caller, delivery_id: int) -> None:
    assert operator("RedeliverDelivery", deliveryId=delivery_id).short == "NOT_FOUND DELIVERY_NOT_FOUND"
