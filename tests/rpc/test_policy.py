"""Who may call what: one table of callers and RPCs, over the gateway's socket and over TCP."""

import itertools
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from doorward.auth.v1 import policy_pb2
from doorward.identity.v1 import identity_service_pb2 as identity
from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.keybroker.v1 import keybroker_service_pb2 as keybroker
from doorward_server import service_tokens
from doorward_server.app import SERVICES
from doorward_server.rpc.policy import read_policies
from tests.rpc.conftest import METHODS, House, Metadata, basic, bearer, call, cookie
from tests.stack import Client, Person

grpc_max_workers = 8

_INTEGRATION = "/doorward.integration.v1.IntegrationService"
_IDENTITY = "/doorward.identity.v1.IdentityService"
_KEYBROKER = "/doorward.keybroker.v1.KeyBrokerService"
_PASS = "PASS"
_TRANSPORTS = ("socket", "tcp")
_OWNERS = (
    "self",
    "session",
    "client",
    "anyone or client",
    "application",
    "anyone or application",
    "backend",
    "bot",
    "operator",
)
# A Discord user of whom nothing is known.
_NOBODY = "80351110224678912"

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
    f"{_IDENTITY}/CreateUser": (
        "client",
        lambda _: identity.CreateUserRequest(),
        "INVALID_ARGUMENT INVALID_NAME",
    ),
    f"{_IDENTITY}/GetUser": (
        "client",
        lambda person: identity.GetUserRequest(handle=person.slug),
        "OK",
    ),
    f"{_IDENTITY}/UpdateUser": (
        "client",
        lambda person: identity.UpdateUserRequest(handle=str(person.id)),
        "OK",
    ),
    f"{_IDENTITY}/DeleteUser": (
        "client",
        lambda person: identity.DeleteUserRequest(handle=f"not-{person.slug}"),
        "NOT_FOUND USER_NOT_FOUND",
    ),
    f"{_IDENTITY}/AddOAuthIdentity": (
        "client",
        lambda person: identity.AddOAuthIdentityRequest(handle=person.slug),
        "INVALID_ARGUMENT PROVIDER_REQUIRED",
    ),
    f"{_IDENTITY}/RemoveOAuthIdentity": (
        "client",
        lambda person: identity.RemoveOAuthIdentityRequest(handle=person.slug, provider="sandbox", id="7"),
        "NOT_FOUND IDENTITY_NOT_FOUND",
    ),
    f"{_IDENTITY}/LogIn": (
        "anyone or client",
        lambda _: identity.LogInRequest(),
        "INVALID_ARGUMENT PROVIDER_REQUIRED",
    ),
    f"{_IDENTITY}/LogOut": (
        "session",
        lambda _: identity.LogOutRequest(),
        "OK",
    ),
    f"{_IDENTITY}/LogOutEverywhere": (
        "session",
        lambda _: identity.LogOutEverywhereRequest(),
        "OK",
    ),
    f"{_IDENTITY}/CreateSession": (
        "backend",
        lambda person: identity.CreateSessionRequest(user=person.slug),
        "OK",
    ),
    f"{_KEYBROKER}/RequestApiKeyForm": (
        "anyone or application",
        lambda _: keybroker.RequestApiKeyFormRequest(),
        "OK",
    ),
    f"{_KEYBROKER}/RequestApiKey": (
        "application",
        lambda _: keybroker.RequestApiKeyRequest(),
        "INVALID_ARGUMENT PARAMETER_MISSING",
    ),
    f"{_KEYBROKER}/AddApiKey": (
        "bot",
        lambda _: keybroker.AddApiKeyRequest(),
        "INVALID_ARGUMENT INVALID_USER_ID",
    ),
    f"{_KEYBROKER}/ListApiKeys": (
        "bot",
        lambda _: keybroker.ListApiKeysRequest(discord_user_id=_NOBODY),
        "OK",
    ),
    f"{_KEYBROKER}/DeleteApiKey": (
        "bot",
        lambda _: keybroker.DeleteApiKeyRequest(discord_user_id=_NOBODY, key_id=1),
        "NOT_FOUND KEY_NOT_FOUND",
    ),
    f"{_KEYBROKER}/LeaseConsentRequests": (
        "bot",
        lambda _: keybroker.LeaseConsentRequestsRequest(),
        "OK",
    ),
    f"{_KEYBROKER}/MarkPrompted": (
        "bot",
        lambda _: keybroker.MarkPromptedRequest(),
        "NOT_FOUND CONSENT_REQUEST_NOT_FOUND",
    ),
    f"{_KEYBROKER}/ClosePrompt": (
        "bot",
        lambda _: keybroker.ClosePromptRequest(),
        "NOT_FOUND CONSENT_REQUEST_NOT_FOUND",
    ),
    f"{_KEYBROKER}/ListConsentRequests": (
        "bot",
        lambda _: keybroker.ListConsentRequestsRequest(),
        "OK",
    ),
    f"{_KEYBROKER}/ResolveConsentRequest": (
        "bot",
        lambda _: keybroker.ResolveConsentRequestRequest(),
        "NOT_FOUND CONSENT_REQUEST_NOT_FOUND",
    ),
    f"{_KEYBROKER}/GetConsentRequest": (
        "bot",
        lambda _: keybroker.GetConsentRequestRequest(),
        "NOT_FOUND CONSENT_REQUEST_NOT_FOUND",
    ),
    f"{_KEYBROKER}/ListGrants": (
        "bot",
        lambda _: keybroker.ListGrantsRequest(discord_user_id=_NOBODY),
        "OK",
    ),
    f"{_KEYBROKER}/RevokeGrant": (
        "bot",
        lambda _: keybroker.RevokeGrantRequest(discord_user_id=_NOBODY, grant_id=1),
        "NOT_FOUND GRANT_NOT_FOUND",
    ),
    f"{_KEYBROKER}/BlockApplication": (
        "bot",
        lambda _: keybroker.BlockApplicationRequest(),
        "INVALID_ARGUMENT INVALID_USER_ID",
    ),
    f"{_KEYBROKER}/ListDeliveries": (
        "operator",
        lambda _: keybroker.ListDeliveriesRequest(),
        "OK",
    ),
    f"{_KEYBROKER}/RedeliverDelivery": (
        "operator",
        lambda _: keybroker.RedeliverDeliveryRequest(),
        "NOT_FOUND DELIVERY_NOT_FOUND",
    ),
}

_NO_SESSION, _NO_TOKEN = "UNAUTHENTICATED NO_SESSION", "UNAUTHENTICATED NO_SERVICE_TOKEN"
_SESSION, _TOKEN = "PERMISSION_DENIED SESSION_REQUIRED", "PERMISSION_DENIED SERVICE_TOKEN_REQUIRED"
_NOT_SELF, _ROLE = "PERMISSION_DENIED NOT_SELF", "PERMISSION_DENIED ROLE_REQUIRED"
_NO_CLIENT, _NO_APP = "UNAUTHENTICATED NO_API_CLIENT", "UNAUTHENTICATED NO_APPLICATION"

# What those who hold no service token are told where one is needed: nobody's is read over the gateway's socket.
_NO_TOKENS, _COOKIES = (_NO_TOKEN,) * 3, (_TOKEN,) * 3
# What RPCs for applications tell those who are none: a stranger is served through the gateway only.
_STRANGER, _OUTSIDER = (_NO_APP, _PASS), (_NO_APP, _TOKEN)

# Every kind of caller, over each transport: what the RPCs of each owner answer, in the order of _OWNERS.
CALLERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("nobody", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_NO_TOKENS),
    ("own session", "socket"): (_PASS, _PASS, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("another's session", "socket"): (_NOT_SELF, _PASS, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("unknown cookie", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("empty cookie", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("expired session", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("revoked session", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("client", "socket"): (_SESSION, _SESSION, _PASS, _PASS, *_STRANGER, *_NO_TOKENS),
    ("client with an old secret", "socket"): (_SESSION, _SESSION, _PASS, _PASS, *_STRANGER, *_NO_TOKENS),
    ("client and own session", "socket"): (_PASS, _PASS, _PASS, _PASS, *_STRANGER, *_COOKIES),
    # Credentials that are presented have to be right, also where none are needed.
    ("wrong secret", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("wrong secret and own session", "socket"): (_PASS, _PASS, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_COOKIES),
    ("expired secret", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("another client's secret", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("unknown client", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("disabled client", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("malformed basic", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("empty authorization", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("secret as bearer", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("secret as cookie", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    ("unknown bearer", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("session as bearer", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("token as cookie", "socket"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _PASS, *_STRANGER, *_COOKIES),
    # A service token that comes through the gateway is none.
    ("backend token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("backend and bot token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("bot token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("operator token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("expired token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("revoked token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("own session and backend token", "socket"): (_PASS, _PASS, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_COOKIES),
    # An application is one by Basic here; elsewhere it is nobody, and presents what is no client's.
    ("application", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, _PASS, _PASS, *_NO_TOKENS),
    ("application with an old secret", "socket"): (
        _SESSION,
        _SESSION,
        _NO_CLIENT,
        _NO_CLIENT,
        _PASS,
        _PASS,
        *_NO_TOKENS,
    ),
    ("application and own session", "socket"): (_PASS, _PASS, _NO_CLIENT, _NO_CLIENT, _PASS, _PASS, *_COOKIES),
    # Wrong credentials make a stranger of whoever may be one.
    ("wrong application secret", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("expired application secret", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("another application's secret", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("disabled application", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("application's token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("application's bot token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    ("disabled application's token", "socket"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_STRANGER, *_NO_TOKENS),
    # A cookie that does not come through the gateway is none.
    ("nobody", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("own session", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("another's session", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("unknown cookie", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("empty cookie", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("expired session", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("revoked session", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("secret as cookie", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    ("token as cookie", "tcp"): (_NO_SESSION, _NO_SESSION, _NO_CLIENT, _TOKEN, *_OUTSIDER, *_NO_TOKENS),
    # And so are Basic credentials, right ones too.
    ("client", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("client with an old secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("client and own session", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("wrong secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("wrong secret and own session", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("expired secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("another client's secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("unknown client", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("disabled client", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("malformed basic", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("empty authorization", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("secret as bearer", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("unknown bearer", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("session as bearer", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("backend token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, _PASS, _ROLE, _ROLE),
    ("backend and bot token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, _PASS, _PASS, _ROLE),
    ("bot token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, _ROLE, _PASS, _ROLE),
    ("operator token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, _ROLE, _ROLE, _PASS),
    ("expired token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("revoked token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("own session and backend token", "tcp"): (
        _SESSION,
        _SESSION,
        _NO_CLIENT,
        _NO_CLIENT,
        *_OUTSIDER,
        _PASS,
        _ROLE,
        _ROLE,
    ),
    ("application", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("application with an old secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("application and own session", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("wrong application secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("expired application secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("another application's secret", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    ("disabled application", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
    # Its token makes an application of whoever holds it, and nothing else that its roles do not.
    ("application's token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, _PASS, _PASS, _ROLE, _ROLE, _ROLE),
    ("application's bot token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, _PASS, _PASS, _ROLE, _PASS, _ROLE),
    ("disabled application's token", "tcp"): (_SESSION, _SESSION, _NO_CLIENT, _NO_CLIENT, *_OUTSIDER, *_NO_TOKENS),
}
# Of each owner a caller who passes, and where.
PASSING = {
    "self": ("own session", "socket"),
    "session": ("own session", "socket"),
    "client": ("client", "socket"),
    "anyone or client": ("nobody", "socket"),
    "application": ("application", "socket"),
    "anyone or application": ("nobody", "socket"),
    "backend": ("backend token", "tcp"),
    "bot": ("bot token", "tcp"),
    "operator": ("operator token", "tcp"),
}
# What HTTP callers are asked for.
_CHALLENGED = {_NO_CLIENT, _NO_APP}


def outcome_of(caller: str, transport: str, method: str) -> str:
    """What the table says; what one who passes is told included."""
    owner, _, passed = RPCS[method]
    outcome = CALLERS[caller, transport][_OWNERS.index(owner)]
    return passed if outcome == _PASS else outcome


class Callers:
    """The person that the requests name, and the credentials of every kind of caller."""

    def __init__(self, house: House) -> None:
        client = house.client()
        self.person, other, revoked = house.person(client), house.person(), house.person()
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
        own = cookie(self.person.cookie)
        self.metadata: dict[str, Metadata] = {
            "nobody": (),
            "own session": own,
            "another's session": cookie(other.cookie),
            "unknown cookie": cookie("unknown"),
            "empty cookie": cookie(""),
            "expired session": cookie(expired.cookie),
            "revoked session": cookie(revoked.cookie),
            "unknown bearer": bearer("dwt_unknown"),
            "session as bearer": bearer(self.person.cookie),
            "token as cookie": cookie(backend),
            "own session and backend token": own + bearer(backend),
            **{f"{name} token": bearer(value) for name, value in tokens.items()},
            **_clients(house, client, own),
            **_applications(house, own),
        }


def _clients(house: House, client: Client, own: Metadata) -> dict[str, Metadata]:
    """The credentials of the person's client, of other clients, and of none."""
    clients, other, disabled, brief = house.app.clients, house.client(), house.client(), house.client()
    clients.enable(disabled.id, enabled=False)
    clients.rotate(brief.id, timedelta(0))
    house.known(Client(client.id, new := clients.rotate(client.id, timedelta(days=1))))
    wrong = Client(client.id, "dws_wrong")
    return {
        "client": basic(Client(client.id, new)),
        "client with an old secret": basic(client),
        "client and own session": own + basic(client),
        "wrong secret": basic(wrong),
        "wrong secret and own session": own + basic(wrong),
        "expired secret": basic(brief),
        "another client's secret": basic(Client(client.id, other.secret)),
        "unknown client": basic(Client("dwc_unknown", client.secret)),
        "disabled client": basic(disabled),
        "malformed basic": (("authorization", f"Basic {client.id}:{client.secret}"),),
        "empty authorization": (("authorization", ""),),
        "secret as bearer": bearer(client.secret),
        "secret as cookie": cookie(client.secret),
    }


def _applications(house: House, own: Metadata) -> dict[str, Metadata]:
    """The credentials of an application, of other ones, and of none."""
    applications = house.app.applications
    ours, other, disabled, brief = (house.application() for _ in range(4))
    applications.enable(disabled.id, enabled=False)
    applications.rotate(brief.id, timedelta(0))
    new = house.known(Client(ours.id, applications.rotate(ours.id, timedelta(days=1))))
    return {
        "application": basic(new),
        "application with an old secret": basic(ours),
        "application and own session": own + basic(new),
        "wrong application secret": basic(Client(ours.id, "das_wrong")),
        "expired application secret": basic(brief),
        "another application's secret": basic(Client(ours.id, other.secret)),
        "disabled application": basic(disabled),
        "application's token": bearer(house.service_token(application_id=ours.id)[1]),
        "application's bot token": bearer(house.service_token("bot", application_id=ours.id)[1]),
        "disabled application's token": bearer(house.service_token("bot", application_id=disabled.id)[1]),
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
    assert {owner for owner, _, _ in RPCS.values()} == set(_OWNERS) == set(PASSING)


# A test for each caller, not for each call: there are thousands of these.


@pytest.mark.parametrize(("caller", "transport"), CALLERS, ids=map(" over ".join, CALLERS))
def test_who_may_call(
    house: House, callers: Callers, channels: dict[str, grpc.Channel], caller: str, transport: str
) -> None:
    told, expected = {}, {}
    for method, (owner, make_request, _) in RPCS.items():
        outcome = outcome_of(caller, transport, method)
        # Whoever passes is logged out.
        ours = Callers(house) if owner == "session" and outcome == "OK" else callers
        result = call(channels[transport], method, make_request(ours.person), ours.metadata[caller])
        told[method] = (result.short, result.domain, result.trailers.get("www-authenticate"))
        domain = "" if outcome == "OK" else "doorward"
        expected[method] = (outcome, domain, 'Basic realm="doorward"' if outcome in _CHALLENGED else None)
    assert told == expected


FORGED: dict[str, Metadata] = {
    "address": (("x-envoy-external-address", "127.0.0.1"), ("x-envoy-internal", "true")),
    "path": (("x-envoy-original-path", "/api/v1/users/me/integrations/kai/flo"), ("x-envoy-original-method", "GET")),
    "forwarded": (("x-forwarded-for", "unix:"), ("forwarded", "for=unix"), ("x-real-ip", "unix:")),
    "peer": (("peer", "unix:"), ("x-peer", "unix:")),
    "user": (("x-user-id", "1"), ("x-doorward-user", "1"), ("user-id", "me")),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("caller", ["own session", "client", "application"])
def test_forged_metadata_makes_no_gateway(callers: Callers, over_tcp: grpc.Channel, caller: str, forged: str) -> None:
    metadata = FORGED[forged] + callers.metadata[caller]
    told = {
        method: call(over_tcp, method, make_request(callers.person), metadata).short
        for method, (_, make_request, _) in RPCS.items()
    }
    assert told == {method: outcome_of(caller, "tcp", method) for method in RPCS}


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer  "], ids=["lower", "upper", "spaces"])
def test_the_case_of_bearer_does_not_matter(callers: Callers, over_tcp: grpc.Channel, scheme: str) -> None:
    [(_, value)] = callers.metadata["backend token"]
    assert isinstance(value, str)
    metadata: Metadata = (("authorization", f"{scheme} {value.split()[1]}"),)
    request = pb.GetAccessTokenRequest(user="x", provider="flo")
    assert call(over_tcp, f"{_INTEGRATION}/GetAccessToken", request, metadata).short == "NOT_FOUND NOT_CONNECTED"


@pytest.mark.parametrize("scheme", ["basic", "BASIC", "bAsIc", "Basic  "], ids=["lower", "upper", "mixed", "spaces"])
def test_the_case_of_basic_does_not_matter(callers: Callers, over_socket: grpc.Channel, scheme: str) -> None:
    [(_, value)] = callers.metadata["client"]
    assert isinstance(value, str)
    metadata: Metadata = (("authorization", f"{scheme} {value.split()[1]}"),)
    request = identity.GetUserRequest(handle=callers.person.slug)
    assert call(over_socket, f"{_IDENTITY}/GetUser", request, metadata).short == "OK"


# Origins


_FOREIGN = "PERMISSION_DENIED ORIGIN_NOT_ALLOWED"


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:8080", True),
        ("HTTP://127.0.0.1:8080", True),
        ("https://127.0.0.1:8080", False),
        ("http://127.0.0.1", False),
        ("https://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
@pytest.mark.parametrize(
    ("method", "caller"),
    [
        (f"{_INTEGRATION}/GetKaiStatus", "own session"),
        (f"{_IDENTITY}/LogIn", "nobody"),
        (f"{_IDENTITY}/LogIn", "own session"),
        (f"{_IDENTITY}/LogIn", "client"),
        (f"{_IDENTITY}/LogOut", "unknown cookie"),
    ],
    ids=["status", "log-in by nobody", "log-in with a session", "log-in by a client", "log-out"],
)
def test_which_origins_are_allowed(
    callers: Callers, over_socket: grpc.Channel, method: str, caller: str, origin: str, allowed: bool
) -> None:
    _, make_request, _ = RPCS[method]
    metadata = (*callers.metadata[caller], ("origin", origin))
    result = call(over_socket, method, make_request(callers.person), metadata)
    assert result.short == (outcome_of(caller, "socket", method) if allowed else _FOREIGN)


@pytest.mark.parametrize("method", RPCS, ids=lambda method: method.rpartition("/")[2])
def test_who_looks_at_the_origin(
    house: House, callers: Callers, channels: dict[str, grpc.Channel], method: str
) -> None:
    """What browsers send cookies along with; clients and backends prove themselves by what no page has."""
    owner, make_request, passed = RPCS[method]
    caller, transport = PASSING[owner]
    metadata = (*callers.metadata[caller], ("origin", "https://evil.example"))
    result = call(channels[transport], method, make_request(callers.person), metadata)
    assert result.short == (_FOREIGN if owner in ("self", "session", "anyone or client") else passed)
    # Nobody was logged out.
    assert house.app.sessions.find(callers.person.cookie)


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
    if policy_pb2.CALLER_KIND_SESSION in kinds:
        assert not method.input_type.fields
    if method.output_type.name == "User" and policy_pb2.CALLER_KIND_ANYONE in kinds:
        assert policy.same_origin  # it sets a cookie


def test_the_roles_of_tokens_are_those_of_the_protos() -> None:
    declared = {name.removeprefix("ROLE_").lower() for name in policy_pb2.Role.keys() if name != "ROLE_UNSPECIFIED"}  # noqa: SIM118
    assert declared == set(service_tokens.Role)


def test_a_service_without_policies_is_refused() -> None:
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    with pytest.raises(LookupError, match=r"grpc\.health\.v1\.Health\.\w+ declares no policy"):
        read_policies([*SERVICES, health], frozenset())


def declare(name: str, *callers: str) -> ServiceDescriptor:
    """A service with one RPC that these kinds of callers may call."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"tests/{name}.proto", package=f"tests.{name}", dependency=[policy_pb2.DESCRIPTOR.name]
    )
    method = file.service.add(name="Service").method.add(
        name="Call", input_type=".doorward.auth.v1.Policy", output_type=".doorward.auth.v1.Policy"
    )
    policy = method.options.Extensions[policy_pb2.policy]
    policy.callers.extend(policy_pb2.CallerKind.Value(f"CALLER_KIND_{caller}") for caller in callers)
    pool = descriptor_pool.Default()
    service: ServiceDescriptor = pool.AddSerializedFile(file.SerializeToString()).services_by_name["Service"]
    return service


@pytest.mark.parametrize(
    ("name", "callers"),
    [
        ("nobody", ()),
        ("unspecified", ("UNSPECIFIED",)),
        ("self_or_session", ("SELF_SESSION", "SESSION")),
        ("self_or_client", ("SELF_SESSION", "API_CLIENT")),
        ("self_or_anyone", ("SELF_SESSION", "ANYONE")),
        ("client_or_service", ("API_CLIENT", "SERVICE")),
        ("anyone_or_service", ("ANYONE", "SERVICE")),
        ("application_or_service", ("APPLICATION", "SERVICE")),
        ("application_or_client", ("APPLICATION", "API_CLIENT")),
        ("application_or_self", ("APPLICATION", "SELF_SESSION")),
    ],
)
def test_callers_that_nothing_judges_yet_are_refused(name: str, callers: tuple[str, ...]) -> None:
    with pytest.raises(LookupError, match=rf"tests\.{name}\.Service\.Call: callers are not judged"):
        read_policies([declare(name, *callers)], frozenset())


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
