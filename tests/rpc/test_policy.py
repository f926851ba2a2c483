"""Who may call what: one table of callers and RPCs, over the gateway's socket and over TCP."""

import base64
import itertools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from doorward.auth.v1 import policy_pb2
from doorward.integration.v1 import integration_service_pb2 as pb
from doorward_server import service_tokens
from doorward_server.app import SERVICES
from doorward_server.rpc.policy import read_policies
from tests.rpc.conftest import METHODS, House, Metadata, call
from tests.stack import Person

grpc_max_workers = 8

_INTEGRATION = "/doorward.integration.v1.IntegrationService"
_BASIC = "Basic " + base64.b64encode(b"client:secret").decode()
_PASS = "PASS"
_TRANSPORTS = ("socket", "tcp")

# Every RPC: whose it is, a request that names the person, and what one who passes is told.
RPCS: dict[str, tuple[str, Callable[[Person], Message], str]] = {
    f"{_INTEGRATION}/GetKaiStatus": (
        "self",
        lambda person: pb.GetKaiStatusRequest(user_id=person.slug, kai_type="flo"),
        "OK",
    ),
    f"{_INTEGRATION}/RevokeKai": (
        "self",
        lambda person: pb.RevokeKaiRequest(user_id=str(person.id), kai_type="flo"),
        "ABORTED NOT_CONNECTED",
    ),
    f"{_INTEGRATION}/ConnectKai": (
        "self",
        lambda person: pb.ConnectKaiRequest(user_id=person.slug, kai_type="flo"),
        "INVALID_ARGUMENT CODE_REQUIRED",
    ),
    f"{_INTEGRATION}/GetAccessToken": (
        "backend",
        lambda person: pb.GetAccessTokenRequest(user=person.slug, provider="flo"),
        "NOT_FOUND NOT_CONNECTED",
    ),
}

_NO_SESSION, _NO_TOKEN = "UNAUTHENTICATED NO_SESSION", "UNAUTHENTICATED NO_SERVICE_TOKEN"
_SESSION, _TOKEN = "PERMISSION_DENIED SESSION_REQUIRED", "PERMISSION_DENIED SERVICE_TOKEN_REQUIRED"
_NOT_SELF, _ROLE = "PERMISSION_DENIED NOT_SELF", "PERMISSION_DENIED ROLE_REQUIRED"

# Every kind of caller, over each transport: what the person's own RPCs and a backend's answer.
CALLERS: dict[tuple[str, str], dict[str, str]] = {
    ("nobody", "socket"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("own session", "socket"): {"self": _PASS, "backend": _TOKEN},
    ("another's session", "socket"): {"self": _NOT_SELF, "backend": _TOKEN},
    ("unknown cookie", "socket"): {"self": _NO_SESSION, "backend": _TOKEN},
    ("empty cookie", "socket"): {"self": _NO_SESSION, "backend": _TOKEN},
    ("expired session", "socket"): {"self": _NO_SESSION, "backend": _TOKEN},
    ("revoked session", "socket"): {"self": _NO_SESSION, "backend": _TOKEN},
    ("basic", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("unknown bearer", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("session as bearer", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("token as cookie", "socket"): {"self": _NO_SESSION, "backend": _TOKEN},
    # A service token that comes through the gateway is none.
    ("backend token", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("backend and bot token", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("bot token", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("operator token", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("expired token", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("revoked token", "socket"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("own session and backend token", "socket"): {"self": _PASS, "backend": _TOKEN},
    # A cookie that does not come through the gateway is none.
    ("nobody", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("own session", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("another's session", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("unknown cookie", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("empty cookie", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("expired session", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("revoked session", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("basic", "tcp"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("unknown bearer", "tcp"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("session as bearer", "tcp"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("token as cookie", "tcp"): {"self": _NO_SESSION, "backend": _NO_TOKEN},
    ("backend token", "tcp"): {"self": _SESSION, "backend": _PASS},
    ("backend and bot token", "tcp"): {"self": _SESSION, "backend": _PASS},
    ("bot token", "tcp"): {"self": _SESSION, "backend": _ROLE},
    ("operator token", "tcp"): {"self": _SESSION, "backend": _ROLE},
    ("expired token", "tcp"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("revoked token", "tcp"): {"self": _SESSION, "backend": _NO_TOKEN},
    ("own session and backend token", "tcp"): {"self": _SESSION, "backend": _PASS},
}


def cookie(value: str) -> Metadata:
    return (("cookie", f"doorward_session={value}"),)


def bearer(value: str) -> Metadata:
    return (("authorization", f"Bearer {value}"),)


class Callers:
    """The person that the requests name, and the credentials of every kind of caller."""

    def __init__(self, house: House) -> None:
        self.person, other, revoked = (house.person() for _ in range(3))
        house.clock.ahead = timedelta(seconds=-house.app.settings.sessions.lifetime)
        expired = house.person()
        _, expired_token = house.service_token("backend", lifetime=timedelta(seconds=1))
        house.clock.ahead = timedelta(0)
        for session in house.app.sessions.list():
            if session.user.id == revoked.id:
                house.app.sessions.revoke(session.id)
        _, backend = house.service_token("backend")
        revoked_id, revoked_token = house.service_token("backend")
        house.app.service_tokens.revoke(revoked_id)
        tokens = {
            "backend and bot": house.service_token("backend", "bot")[1],
            "bot": house.service_token("bot")[1],
            "operator": house.service_token("operator")[1],
            "backend": backend,
            "expired": expired_token,
            "revoked": revoked_token,
        }
        self.metadata: dict[str, Metadata] = {
            "nobody": (),
            "own session": cookie(self.person.cookie),
            "another's session": cookie(other.cookie),
            "unknown cookie": cookie("unknown"),
            "empty cookie": cookie(""),
            "expired session": cookie(expired.cookie),
            "revoked session": cookie(revoked.cookie),
            "basic": (("authorization", _BASIC),),
            "unknown bearer": bearer("dwt_unknown"),
            "session as bearer": bearer(self.person.cookie),
            "token as cookie": cookie(backend),
            "own session and backend token": cookie(self.person.cookie) + bearer(backend),
            **{f"{name} token": bearer(value) for name, value in tokens.items()},
        }


@pytest.fixture(scope="module")
def callers(house: House) -> Callers:
    return Callers(house)


@pytest.fixture
def channels(over_socket: grpc.Channel, over_tcp: grpc.Channel) -> dict[str, grpc.Channel]:
    return {"socket": over_socket, "tcp": over_tcp}


def test_the_tables_are_complete(callers: Callers) -> None:
    assert set(RPCS) == set(METHODS)
    assert set(CALLERS) == set(itertools.product(callers.metadata, _TRANSPORTS))
    owners = {owner for owner, _, _ in RPCS.values()}
    assert all(set(outcomes) == owners for outcomes in CALLERS.values())


@pytest.mark.parametrize("method", RPCS, ids=lambda method: method.rpartition("/")[2])
@pytest.mark.parametrize(("caller", "transport"), CALLERS, ids=map(" over ".join, CALLERS))
def test_who_may_call(
    callers: Callers, channels: dict[str, grpc.Channel], caller: str, transport: str, method: str
) -> None:
    owner, make_request, passed = RPCS[method]
    outcome = CALLERS[caller, transport][owner]
    result = call(channels[transport], method, make_request(callers.person), callers.metadata[caller])
    assert result.short == (passed if outcome == _PASS else outcome)
    assert result.domain == ("" if result.code == "OK" else "doorward")


FORGED: dict[str, Metadata] = {
    "address": (("x-envoy-external-address", "127.0.0.1"), ("x-envoy-internal", "true")),
    "path": (("x-envoy-original-path", "/api/v1/users/me/integrations/kai/flo"), ("x-envoy-original-method", "GET")),
    "forwarded": (("x-forwarded-for", "unix:"), ("forwarded", "for=unix"), ("x-real-ip", "unix:")),
    "peer": (("peer", "unix:"), ("x-peer", "unix:")),
    "user": (("x-user-id", "1"), ("x-doorward-user", "1"), ("user-id", "me")),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("method", RPCS, ids=lambda method: method.rpartition("/")[2])
def test_forged_metadata_makes_no_gateway(callers: Callers, over_tcp: grpc.Channel, method: str, forged: str) -> None:
    owner, make_request, _ = RPCS[method]
    metadata = FORGED[forged] + callers.metadata["own session"]
    result = call(over_tcp, method, make_request(callers.person), metadata)
    assert result.short == CALLERS["own session", "tcp"][owner]


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer  "], ids=["lower", "upper", "spaces"])
def test_the_scheme_s_case_does_not_matter(callers: Callers, over_tcp: grpc.Channel, scheme: str) -> None:
    [(_, value)] = callers.metadata["backend token"]
    assert isinstance(value, str)
    metadata: Metadata = (("authorization", f"{scheme} {value.split()[1]}"),)
    request = pb.GetAccessTokenRequest(user="x", provider="flo")
    assert call(over_tcp, f"{_INTEGRATION}/GetAccessToken", request, metadata).short == "NOT_FOUND NOT_CONNECTED"


@pytest.mark.parametrize(
    ("origin", "outcome"),
    [
        ("http://127.0.0.1:8080", "OK"),
        ("https://evil.example", "PERMISSION_DENIED ORIGIN_NOT_ALLOWED"),
        ("null", "PERMISSION_DENIED ORIGIN_NOT_ALLOWED"),
        ("", "PERMISSION_DENIED ORIGIN_NOT_ALLOWED"),
    ],
)
def test_the_origin_of_a_session_s_call(callers: Callers, over_socket: grpc.Channel, origin: str, outcome: str) -> None:
    request = pb.GetKaiStatusRequest(user_id="me", kai_type="flo")
    metadata = (*callers.metadata["own session"], ("origin", origin))
    assert call(over_socket, f"{_INTEGRATION}/GetKaiStatus", request, metadata).short == outcome


# What the protos declare


@pytest.mark.parametrize("method", METHODS.values(), ids=[method.rpartition("/")[2] for method in METHODS])
def test_every_rpc_declares_a_policy(method: Any) -> None:
    options = method.GetOptions()
    assert options.HasExtension(policy_pb2.policy)
    policy = options.Extensions[policy_pb2.policy]
    kinds = set(policy.callers)
    assert kinds
    assert policy_pb2.CALLER_KIND_UNSPECIFIED not in kinds
    assert bool(policy.roles) == (policy_pb2.CALLER_KIND_SERVICE in kinds)
    assert policy_pb2.ROLE_UNSPECIFIED not in policy.roles
    if policy_pb2.CALLER_KIND_SELF_SESSION in kinds:
        assert "user_id" in method.input_type.fields_by_name


def test_the_roles_of_tokens_are_those_of_the_protos() -> None:
    declared = {name.removeprefix("ROLE_").lower() for name in policy_pb2.Role.keys() if name != "ROLE_UNSPECIFIED"}  # noqa: SIM118
    assert declared == set(service_tokens.Role)


def test_a_service_without_policies_is_refused() -> None:
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    with pytest.raises(LookupError, match=r"grpc\.health\.v1\.Health\.\w+ declares no policy"):
        read_policies([*SERVICES, health], frozenset())


class Registered(grpc.Server):
    """Only takes down which handlers are added."""

    def __init__(self) -> None:
        self.methods: set[str] = set()

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, object]) -> None:
        self.methods |= {f"/{service_name}/{name}" for name in method_handlers}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """The same handlers, as older servers take them."""

    def add_insecure_port(self, address: str) -> int:
        raise NotImplementedError

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, grace: float | None) -> Any:
        raise NotImplementedError

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        raise NotImplementedError


def test_no_handler_is_served_without_a_policy(house: House) -> None:
    server = Registered()
    house.app.add_services(server)
    assert server.methods == set(read_policies(SERVICES, frozenset())) == set(METHODS)
