"""Errors as gRPC statuses: every class in one table, and the failures that no caller should see the inside of."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from doorward.auth.v1 import policy_pb2
from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from doorward_server import errors
from doorward_server.errors import CallError
from doorward_server.oauth import NoTokenGranted
from doorward_server.outbound import ConnectTimeout, NotConnectable
from doorward_server.rpc.integration import IntegrationServicer
from doorward_server.rpc.status import status_code, trailing_metadata
from doorward_server.service_tokens import Role
from tests.rpc.conftest import METHODS, House, Metadata, basic, bearer, call, cookie, opened, served
from tests.stack import Client, Person, Stack

grpc_max_workers = 4

_INTEGRATION = "/doorward.integration.v1.IntegrationService"
_STATUS = f"{_INTEGRATION}/GetKaiStatus"
_TOKEN = f"{_INTEGRATION}/GetAccessToken"

# The number of each code in use (google/rpc/code.proto); the gateway's tests map each to its HTTP status.
CODES = {
    "CANCELLED": 1,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}
ERRORS: dict[type[CallError], tuple[str, str]] = {
    errors.MalformedRequest: ("INVALID_ARGUMENT", "MALFORMED_REQUEST"),
    errors.UnknownKaiType: ("INVALID_ARGUMENT", "UNKNOWN_KAI_TYPE"),
    errors.CodeRequired: ("INVALID_ARGUMENT", "CODE_REQUIRED"),
    errors.CodeRejected: ("INVALID_ARGUMENT", "CODE_REJECTED"),
    errors.InvalidMinTtl: ("INVALID_ARGUMENT", "INVALID_MIN_TTL"),
    errors.InvalidName: ("INVALID_ARGUMENT", "INVALID_NAME"),
    errors.InvalidEmail: ("INVALID_ARGUMENT", "INVALID_EMAIL"),
    errors.InvalidField: ("INVALID_ARGUMENT", "INVALID_FIELD"),
    errors.ProviderRequired: ("INVALID_ARGUMENT", "PROVIDER_REQUIRED"),
    errors.TokenOrCodeRequired: ("INVALID_ARGUMENT", "TOKEN_OR_CODE_REQUIRED"),
    errors.TokenOrCodeTooLong: ("INVALID_ARGUMENT", "TOKEN_OR_CODE_TOO_LONG"),
    errors.ProviderHasNoTokenUrl: ("INVALID_ARGUMENT", "PROVIDER_HAS_NO_TOKEN_URL"),
    errors.LookupRejected: ("INVALID_ARGUMENT", "LOOKUP_REJECTED"),
    errors.LookupWithoutId: ("INVALID_ARGUMENT", "LOOKUP_WITHOUT_ID"),
    errors.InvalidService: ("INVALID_ARGUMENT", "INVALID_SERVICE"),
    errors.InvalidLabel: ("INVALID_ARGUMENT", "INVALID_LABEL"),
    errors.InvalidKey: ("INVALID_ARGUMENT", "INVALID_KEY"),
    errors.KeyRejected: ("INVALID_ARGUMENT", "KEY_REJECTED"),
    errors.InvalidUserId: ("INVALID_ARGUMENT", "INVALID_USER_ID"),
    errors.ParameterMissing: ("INVALID_ARGUMENT", "PARAMETER_MISSING"),
    errors.ParameterTooLong: ("INVALID_ARGUMENT", "PARAMETER_TOO_LONG"),
    errors.CallbackRejected: ("INVALID_ARGUMENT", "INVALID_CALLBACK"),
    errors.NameTaken: ("INVALID_ARGUMENT", "INVALID_APPLICATION_NAME"),
    errors.RequestFinished: ("FAILED_PRECONDITION", "REQUEST_FINISHED"),
    errors.DeliveryNotAbandoned: ("FAILED_PRECONDITION", "DELIVERY_NOT_ABANDONED"),
    errors.NoKeyLeft: ("FAILED_PRECONDITION", "NO_KEY_LEFT"),
    errors.TooManyKeys: ("FAILED_PRECONDITION", "TOO_MANY_KEYS"),
    errors.ProviderNotConfigured: ("FAILED_PRECONDITION", "PROVIDER_NOT_CONFIGURED"),
    errors.NeedsReauth: ("FAILED_PRECONDITION", "NEEDS_REAUTH"),
    errors.RefreshRejected: ("FAILED_PRECONDITION", "REFRESH_REJECTED"),
    errors.NoSession: ("UNAUTHENTICATED", "NO_SESSION"),
    errors.NoServiceToken: ("UNAUTHENTICATED", "NO_SERVICE_TOKEN"),
    errors.NoApiClient: ("UNAUTHENTICATED", "NO_API_CLIENT"),
    errors.NoApplication: ("UNAUTHENTICATED", "NO_APPLICATION"),
    errors.SessionRequired: ("PERMISSION_DENIED", "SESSION_REQUIRED"),
    errors.NotSelf: ("PERMISSION_DENIED", "NOT_SELF"),
    errors.OriginNotAllowed: ("PERMISSION_DENIED", "ORIGIN_NOT_ALLOWED"),
    errors.ServiceTokenRequired: ("PERMISSION_DENIED", "SERVICE_TOKEN_REQUIRED"),
    errors.RoleRequired: ("PERMISSION_DENIED", "ROLE_REQUIRED"),
    errors.NotYourUser: ("PERMISSION_DENIED", "NOT_YOUR_USER"),
    errors.NoConnection: ("NOT_FOUND", "NOT_CONNECTED"),
    errors.UserNotFound: ("NOT_FOUND", "USER_NOT_FOUND"),
    errors.SessionNotFound: ("NOT_FOUND", "SESSION_NOT_FOUND"),
    errors.ServiceTokenNotFound: ("NOT_FOUND", "SERVICE_TOKEN_NOT_FOUND"),
    errors.ApiClientNotFound: ("NOT_FOUND", "API_CLIENT_NOT_FOUND"),
    errors.KeyNotFound: ("NOT_FOUND", "KEY_NOT_FOUND"),
    errors.ApplicationNotFound: ("NOT_FOUND", "APPLICATION_NOT_FOUND"),
    errors.ConsentRequestNotFound: ("NOT_FOUND", "CONSENT_REQUEST_NOT_FOUND"),
    errors.GrantNotFound: ("NOT_FOUND", "GRANT_NOT_FOUND"),
    errors.DeliveryNotFound: ("NOT_FOUND", "DELIVERY_NOT_FOUND"),
    errors.ProviderNotFound: ("NOT_FOUND", "PROVIDER_NOT_FOUND"),
    errors.IdentityNotFound: ("NOT_FOUND", "IDENTITY_NOT_FOUND"),
    errors.NoSuchIdentity: ("NOT_FOUND", "NO_SUCH_IDENTITY"),
    errors.SlugTaken: ("ALREADY_EXISTS", "SLUG_TAKEN"),
    errors.EmailTaken: ("ALREADY_EXISTS", "EMAIL_TAKEN"),
    errors.KeyExists: ("ALREADY_EXISTS", "KEY_EXISTS"),
    errors.IdentityTaken: ("ALREADY_EXISTS", "IDENTITY_TAKEN"),
    errors.TooManyFailures: ("RESOURCE_EXHAUSTED", "TOO_MANY_FAILURES"),
    errors.TooManyRequests: ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS"),
    errors.NotConnected: ("ABORTED", "NOT_CONNECTED"),
    errors.CodeAlreadyUsed: ("ABORTED", "CODE_ALREADY_USED"),
    errors.LeaseLost: ("ABORTED", "LEASE_LOST"),
    errors.ServiceUnavailable: ("UNAVAILABLE", "SERVICE_UNAVAILABLE"),
    errors.ProviderUnavailable: ("UNAVAILABLE", "PROVIDER_UNAVAILABLE"),
    NotConnectable: ("UNAVAILABLE", "PROVIDER_UNAVAILABLE"),
    errors.ProviderMalformed: ("UNAVAILABLE", "PROVIDER_MALFORMED"),
    NoTokenGranted: ("UNAVAILABLE", "PROVIDER_MALFORMED"),
    errors.Busy: ("UNAVAILABLE", "BUSY"),
    errors.StorageUnavailable: ("UNAVAILABLE", "STORAGE_UNAVAILABLE"),
    errors.ProviderTimeout: ("DEADLINE_EXCEEDED", "PROVIDER_TIMEOUT"),
    ConnectTimeout: ("DEADLINE_EXCEEDED", "PROVIDER_TIMEOUT"),
    errors.Internal: ("INTERNAL", "INTERNAL"),
    errors.Cancelled: ("CANCELLED", "CANCELLED"),
    errors.TooManyIdentities: ("FAILED_PRECONDITION", "TOO_MANY_IDENTITIES"),
}
# What HTTP callers see beside the answer, of errors with the metadata `{"error": ..., "retry_after": "17"}`.
HEADERS: dict[type[CallError], tuple[str, str]] = {
    errors.NoApiClient: ("www-authenticate", 'Basic realm="doorward"'),
    errors.NoApplication: ("www-authenticate", 'Basic realm="doorward"'),
    errors.TooManyFailures: ("retry-after", "17"),
    errors.TooManyRequests: ("retry-after", "17"),
}


def descendants(error: type[CallError]) -> Iterator[type[CallError]]:
    for child in error.__subclasses__():
        yield child
        yield from descendants(child)


def test_the_table_holds_every_error() -> None:
    raised = {
        error
        for error in descendants(CallError)
        if error.__module__.startswith("doorward_server.") and hasattr(error, "reason")
    }
    assert raised == set(ERRORS)
    assert {code for code, _ in ERRORS.values()} == set(CODES)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_what_an_error_says(error: type[CallError]) -> None:
    code, reason = ERRORS[error]
    metadata = {"error": "invalid_client"} | ({"retry_after": "17"} if code == "RESOURCE_EXHAUSTED" else {})
    failure = error(metadata)
    assert (status_code(failure).name, status_code(failure).value[0]) == (code, CODES[code])
    (key, value), *headers = trailing_metadata(failure)
    assert key == "grpc-status-details-bin"
    assert isinstance(value, bytes)
    status, info = Status.FromString(value), ErrorInfo()
    assert (status.code, status.message) == (CODES[code], error.message)
    [detail] = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    assert detail.Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, "doorward", metadata)
    assert headers == ([HEADERS[error]] if error in HEADERS else [])
    assert str(failure) == error.message
    assert error.message.isascii()
    assert error.message == error.message.strip() != ""


# Malformed messages


@pytest.fixture(scope="module")
def person(house: House) -> Person:
    return house.person()


@pytest.fixture(scope="module")
def of_person(person: Person) -> Metadata:
    return cookie(person.cookie)


@pytest.fixture(scope="module")
def of_service(house: House) -> Metadata:
    """A program that may do all that programs may."""
    return bearer(house.service_token(*Role)[1])


@pytest.fixture(scope="module")
def of_client(house: House) -> Metadata:
    return basic(house.client())


@pytest.fixture(scope="module")
def of_application(house: House) -> Metadata:
    return basic(house.application())


Entrance = tuple[grpc.Channel, Metadata]


@pytest.fixture
def entrances(
    over_socket: grpc.Channel,
    over_tcp: grpc.Channel,
    of_person: Metadata,
    of_client: Metadata,
    of_application: Metadata,
    of_service: Metadata,
) -> dict[int, Entrance]:
    """How to get past authentication, by the kind of the callers."""
    return {
        policy_pb2.CALLER_KIND_SELF_SESSION: (over_socket, of_person),
        policy_pb2.CALLER_KIND_SESSION: (over_socket, of_person),
        policy_pb2.CALLER_KIND_API_CLIENT: (over_socket, of_client),
        policy_pb2.CALLER_KIND_APPLICATION: (over_socket, of_application),
        policy_pb2.CALLER_KIND_SERVICE: (over_tcp, of_service),
        policy_pb2.CALLER_KIND_ANYONE: (over_socket, ()),
    }


def has_text(field: FieldDescriptor | None) -> bool:
    return field is not None and field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)


def callers_of(method: str) -> list[int]:
    return [*METHODS[method].GetOptions().Extensions[policy_pb2.policy].callers]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        pytest.param(method, message, id=f"{METHODS[method].name} {name}")
        for method in METHODS
        for name, message in {
            "garbage": b"\xff\xff\xff\xff",
            "cut tag": b"\x0a",
            "cut string": b"\x0a\x05me",
            "not UTF-8": b"\x0a\x02\xff\xfe",
            "long length": b"\x0a\xff\xff\xff\xff\xff\x01",
            "wire type": b"\x07",
        }.items()
        # Of a field that the message does not have, or has as a number, no text is read.
        if name != "not UTF-8" or has_text(METHODS[method].input_type.fields_by_number.get(1))
    ],
)
def test_messages_that_do_not_parse(
    entrances: dict[int, Entrance], over_socket: grpc.Channel, method: str, message: bytes
) -> None:
    kinds = callers_of(method)
    for kind in kinds:
        channel, metadata = entrances[kind]
        assert call(channel, method, message, metadata).short == "INVALID_ARGUMENT MALFORMED_REQUEST"
    if policy_pb2.CALLER_KIND_ANYONE not in kinds:
        # Nobody learns that much without credentials.
        assert call(over_socket, method, message).code == "UNAUTHENTICATED"


STRINGS = {
    "user_id": "me",
    "kai_type": "flo",
    "user": "somebody",
    "provider": "flo",
    "handle": "somebody",
    "id": "7",
    "name": "Somebody",
    "state": "x",
    "callback": "https://app.example/cb",
    "discord_user_id": "80351110224678912",
    "service": "gw2",
    "label": "main",
    "value": "sekret",
    "message": "1/2",
}
# Values of message fields, by their type, each with a NUL somewhere; of other types there is no text in them.
NULS: dict[str, dict[str, Any]] = {
    "google.protobuf.Value": {
        "string": {"string_value": "a\0b"},
        "list": {"list_value": {"values": [{"number_value": 1}, {"string_value": "\0"}]}},
        "member": {"struct_value": {"fields": {"a": {"string_value": "\0"}}}},
        "name": {"struct_value": {"fields": {"\0": {"bool_value": True}}}},
    },
    "google.api.HttpBody": {
        "content type": {"content_type": "text/plain\0"},
        "extension": {"extensions": [{"type_url": "\0"}]},
    },
    "doorward.keybroker.v1.GrantedKeys": {},
    "doorward.keybroker.v1.Canceled": {},
    "doorward.keybroker.v1.Blocked": {},
}


def nul_requests() -> Iterator[Any]:
    """Of every RPC a request for each of its strings and JSON values, with a NUL in that one."""
    for name, method in METHODS.items():
        request_class = GetMessageClass(method.input_type)
        fields = method.input_type.fields
        valid = {field.name: STRINGS[field.name] for field in fields if field.type == FieldDescriptor.TYPE_STRING}
        for field in fields:
            if field.type == FieldDescriptor.TYPE_STRING:
                spoilt = {**valid, field.name: f"{valid[field.name]}\0"}
                yield pytest.param(name, request_class(**spoilt), id=f"{method.name} {field.name}")
            elif field.message_type is not None:
                for key, value in NULS[field.message_type.full_name].items():
                    request = request_class(**{**valid, field.name: value})
                    yield pytest.param(name, request, id=f"{method.name} {field.name} {key}")


@pytest.mark.parametrize(("method", "request_"), [*nul_requests()])
def test_nul_in_any_string(entrances: dict[int, Entrance], method: str, request_: Message) -> None:
    for kind in callers_of(method):
        channel, metadata = entrances[kind]
        result = call(channel, method, request_, metadata)
        if kind == policy_pb2.CALLER_KIND_SELF_SESSION and "\0" in getattr(request_, "user_id", ""):
            # Whoever that is, it is not the caller; and that is judged first.
            assert result.short == "PERMISSION_DENIED NOT_SELF"
        else:
            assert result.short == "INVALID_ARGUMENT MALFORMED_REQUEST"


@pytest.mark.parametrize(
    "method", ["/doorward.integration.v1.IntegrationService/Nothing", "/doorward.v9.Nothing/Nothing", "/"]
)
def test_unknown_methods(over_tcp: grpc.Channel, of_service: Metadata, method: str) -> None:
    assert call(over_tcp, method, b"", of_service).code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("size", "outcome"),
    [((1 << 20) - 100, "NOT_FOUND NOT_CONNECTED"), ((1 << 20) + 1, "RESOURCE_EXHAUSTED")],
    ids=["below", "above"],
)
def test_messages_of_1_mib(stack: Stack, size: int, outcome: str) -> None:
    metadata = (("authorization", f"Bearer {stack.service_token('backend')}"),)
    with grpc.insecure_channel(f"127.0.0.1:{stack.grpc_port}") as channel:
        request = pb.GetAccessTokenRequest(user="x" * size, provider="flo")
        assert call(channel, _TOKEN, request, metadata).short == outcome


# Failures inside


class Faulty(IntegrationServicer):
    """A servicer with mistakes of every sort, each named by the request's `kai_type`."""

    def GetKaiStatus(  # noqa: N802 - the generated base class names the method
        self, request: pb.GetKaiStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetKaiStatusResponse:
        match request.kai_type:
            case "exception":
                raise ValueError("secret text")
            case "chained":
                try:
                    raise KeyError("secret text")
                except KeyError as error:
                    raise RuntimeError("more secret text") from error
            case "grpc":
                raise grpc.RpcError("secret text")
            case _:
                return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("mistake", "exception"),
    [
        ("exception", "ValueError"),
        ("chained", "RuntimeError"),
        ("grpc", "RpcError"),
        ("no answer", "TypeError"),
    ],
)
def test_an_unexpected_exception_is_told_to_nobody(
    house: House, tmp_path: Path, logs: Path, of_person: Metadata, mistake: str, exception: str
) -> None:
    log = logs / f"faulty-{mistake.replace(' ', '-')}.log"
    metadata = (*of_person, ("x-request-id", f"id-of-{mistake.replace(' ', '-')}"))
    with opened(house.app.settings, log) as app:
        faulty = Faulty(app.integrations)
        with served(
            app, tmp_path, lambda server: stubs.add_IntegrationServiceServicer_to_server(faulty, server)
        ) as channel:
            request = pb.GetKaiStatusRequest(user_id="me", kai_type=mistake)
            result = call(channel, _STATUS, request, metadata)
    assert (result.short, result.message, result.error) == ("INTERNAL INTERNAL", "internal error", None)
    assert result.trailers == {}
    text = log.read_text()
    assert "secret" not in text
    unexpected, line = (json.loads(line) for line in text.splitlines())
    assert (unexpected["event"], unexpected["level"], line["event"]) == ("unexpected", "error", "call")
    assert unexpected["request_id"] == line["request_id"] == metadata[-1][1]
    assert unexpected["exception"] == exception
    assert (line["code"], line["reason"]) == ("INTERNAL", "INTERNAL")


@pytest.mark.parametrize(
    ("method", "damage"),
    [
        pytest.param("GetKaiStatus", "DROP TABLE sessions", id="damaged, to a reader"),
        pytest.param("RevokeKai", "DROP TABLE connections", id="damaged, to a writer"),
        pytest.param("RevokeKai", "BEGIN IMMEDIATE", id="locked"),
        pytest.param("GetUser", "DROP TABLE client_secrets", id="damaged, to a client's authentication"),
        pytest.param("GetUser", "DROP TABLE oauth_identities", id="damaged, to a reader of users"),
        pytest.param("UpdateUser", "DROP TABLE users", id="damaged, to a writer of users"),
        pytest.param("LogOut", "BEGIN IMMEDIATE", id="locked, to who logs out"),
    ],
)
def test_a_database_that_cannot_be_used(house: House, tmp_path: Path, logs: Path, method: str, damage: str) -> None:
    """Told apart from mistakes: the caller may come again, once somebody has mended it."""
    settings, path = house.app.settings, tmp_path / "doorward.db"
    database = settings.database.model_copy(update={"url": f"sqlite:///{path}", "busy_timeout": 0.2})
    log = logs / f"{tmp_path.name}.log"
    with opened(settings.model_copy(update={"database": database}), log) as app:
        row, secret = app.clients.create("Client")
        client = house.known(Client(row.id, secret))
        user = app.users.create("Somebody", client_id=client.id)
        metadata = cookie(app.sessions.create(user)[1]) + basic(client)
        [name] = [name for name in METHODS if name.endswith(f"/{method}")]
        fields = METHODS[name].input_type.fields_by_name
        valid = {"user_id": "me", "kai_type": "flo", "handle": "somebody", "role": {"string_value": "x"}}
        request = GetMessageClass(METHODS[name].input_type)(**{key: valid[key] for key in valid if key in fields})
        with served(app, tmp_path) as channel, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            if method != "LogOut":  # which succeeds only once
                assert call(channel, name, request, metadata).code in {"OK", "ABORTED"}
            other.execute(damage)
            result = call(channel, name, request, metadata)
    assert result.short == "UNAVAILABLE STORAGE_UNAVAILABLE"
    assert result.message == errors.StorageUnavailable.message
    assert '"unexpected"' not in log.read_text()
