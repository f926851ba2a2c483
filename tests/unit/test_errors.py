"""The tree of errors: complete, drawn as it is, and within the contract's HTTP statuses."""

import inspect
import re

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from doorward_server import errors
from doorward_server.errors import CallError, DoorwardError, GrantRefused, OperatorError
from doorward_server.rpc.status import DOMAIN, status_code, trailing_metadata

# The contract's statuses; the gateway's table is https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
}
# A class that fixes nothing but the code only groups others.
LEAVES = [
    kind for kind in CLASSES.values() if issubclass(kind, CallError) and not kind.__subclasses__() and kind != CallError
]
GROUPS = [kind for kind in CLASSES.values() if issubclass(kind, CallError) and CallError in kind.__bases__]


def names(kinds: list[type[CallError]]) -> list[str]:
    return [kind.__name__ for kind in kinds]


@pytest.mark.parametrize("kind", LEAVES, ids=names(LEAVES))
def test_a_call_error_says_all_that_a_caller_is_told(kind: type[CallError]) -> None:
    assert re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", kind.reason)
    assert kind.message == kind.message.strip() != ""
    assert not kind.message.endswith(".")
    assert "\n" not in kind.message
    assert kind.code in grpc.StatusCode.__members__
    assert kind.code in HTTP or kind.code == "INTERNAL"


@pytest.mark.parametrize("kind", LEAVES, ids=names(LEAVES))
def test_a_call_error_becomes_a_status_with_details(kind: type[CallError]) -> None:
    error = kind({"error": "access_denied"})
    assert status_code(error).name == kind.code
    (key, value), *headers = trailing_metadata(error)
    assert isinstance(value, bytes)
    status = Status.FromString(value)
    [detail] = status.details
    info = ErrorInfo()
    assert detail.Unpack(info)
    assert key == "grpc-status-details-bin"
    assert (status.code, status.message) == (grpc.StatusCode[kind.code].value[0], kind.message)
    assert (info.reason, info.domain, dict(info.metadata)) == (kind.reason, DOMAIN, {"error": "access_denied"})
    assert headers == ([("www-authenticate", kind.challenge)] if kind.challenge else [])


def test_what_http_callers_are_told_to_do() -> None:
    """Only Basic is asked for: cookies and service tokens are no schemes that a browser could answer with."""
    assert {kind: kind.challenge for kind in LEAVES if kind.challenge} == {
        errors.NoApiClient: 'Basic realm="doorward"',
        errors.NoApplication: 'Basic realm="doorward"',
    }
    for kind in (errors.TooManyFailures, errors.TooManyRequests):
        assert trailing_metadata(kind({"retry_after": "17"}))[1:] == (("retry-after", "17"),)


def test_a_call_error_keeps_a_copy_of_its_metadata() -> None:
    metadata = {"error": "access_denied"}
    error = errors.CodeRejected(metadata)
    metadata["error"] = "other"
    assert error.metadata == {"error": "access_denied"}
    assert str(error) == errors.CodeRejected.message
    assert errors.CodeRejected().metadata == {}


def test_one_reason_under_one_code_is_one_class() -> None:
    pairs = [(kind.code, kind.reason) for kind in LEAVES]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("kind", LEAVES, ids=names(LEAVES))
def test_the_group_of_a_call_error_fixes_its_code(kind: type[CallError]) -> None:
    [group] = [group for group in GROUPS if issubclass(kind, group)]
    assert re.sub(r"(?<!^)(?=[A-Z])", "_", group.__name__).upper() == kind.code == group.code


def test_the_drawn_tree_is_the_tree() -> None:
    """Each class is drawn once, under its parent: by depth, and leaves beside their group."""
    drawn: dict[str, str | None] = {}
    parents: dict[int, str] = {}
    group = ""
    for line in (errors.__doc__ or "").splitlines():
        if branch := re.fullmatch(r" {4}((?:│ {3}| {4})*)(?:[├└]── )?(\w+)(?: {2,}(.*))?", line):
            depth, beside = len(branch[1]) // 4 + ("── " in line), branch[3] or ""
            group = branch[2]
            drawn[group] = parents.get(depth - 1)
            parents[depth] = group
        elif more := re.fullmatch(r" {4}[│ ]+(\w.*)", line):
            beside = more[1]
        else:
            continue
        # What stands beside a class is either its leaves or words about it.
        if leaves := re.fullmatch(r"([A-Z]\w+)(, [A-Z]\w+)*,?", beside.strip()):
            drawn |= dict.fromkeys(re.findall(r"\w+", leaves[0]), group)
    real = {name: kind.__bases__[0].__name__ if kind != DoorwardError else None for name, kind in CLASSES.items()}
    assert drawn == real


def test_what_is_not_for_callers_is_no_call_error() -> None:
    assert not issubclass(OperatorError, CallError)
    assert not issubclass(GrantRefused, CallError)
