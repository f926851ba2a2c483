"""Who may call what: the policies that the protos declare, and the one place that judges by them."""

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from doorward.auth.v1 import policy_pb2
from doorward_server.applications import Registered
from doorward_server.clients import Client
from doorward_server.errors import (
    NoApiClient,
    NoApplication,
    NoServiceToken,
    NoSession,
    NotSelf,
    OriginNotAllowed,
    RoleRequired,
    ServiceTokenRequired,
    SessionRequired,
)
from doorward_server.service_tokens import Service
from doorward_server.sessions import SessionUser
from doorward_server.users import ME

Caller = SessionUser | Service | Client | Registered
# The caller of the call that this thread serves. Set before a handler runs.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller")


def caller_name(caller: Caller) -> str:
    """A caller as log lines and the audit trail name it."""
    match caller:
        case SessionUser():
            return f"user:{caller.user_id}"
        case Client():
            return f"client:{caller.client_id}"
        case Registered():
            return f"application:{caller.application_id}"
        case Service():
            return f"service:{caller.token_id}"


_ANYONE = policy_pb2.CALLER_KIND_ANYONE
_SELF_SESSION = policy_pb2.CALLER_KIND_SELF_SESSION
_API_CLIENT = policy_pb2.CALLER_KIND_API_CLIENT
_APPLICATION = policy_pb2.CALLER_KIND_APPLICATION
_SERVICE = policy_pb2.CALLER_KIND_SERVICE
_SESSION = policy_pb2.CALLER_KIND_SESSION
_JUDGED = {
    frozenset({_ANYONE}),
    frozenset({_SELF_SESSION}),
    frozenset({_SESSION}),
    frozenset({_API_CLIENT}),
    frozenset({_ANYONE, _API_CLIENT}),
    frozenset({_APPLICATION}),
    frozenset({_ANYONE, _APPLICATION}),
    frozenset({_SERVICE}),
}


class Credentials(NamedTuple):
    """What a call came with, already looked up.

    `has_cookie` and `has_authorization` tell what was presented, `caller` what it proved to be.
    `by_gateway`: the gateway sent it (`peers` judges that), and not somebody else on the TCP port.
    """

    caller: Caller | None
    has_cookie: bool
    has_authorization: bool
    origin: str | None
    by_gateway: bool


@dataclass(frozen=True)
class Policy:
    """The policy of one RPC, read from its descriptor."""

    callers: frozenset[int]
    roles: frozenset[str]
    # None: requests from pages of any origin are served.
    allowed_origins: frozenset[str] | None

    @property
    def knows_clients(self) -> bool:
        """Whether Basic credentials are looked at, and not cookies."""
        return _API_CLIENT in self.callers

    @property
    def knows_applications(self) -> bool:
        """Whether Basic credentials are an application's."""
        return _APPLICATION in self.callers

    def authenticate(self, credentials: Credentials) -> None:
        """Refuse a caller of the wrong kind; what the message says does not matter yet."""
        origin = credentials.origin
        if self.allowed_origins is not None and origin is not None and origin.lower() not in self.allowed_origins:
            raise OriginNotAllowed
        if _SELF_SESSION in self.callers or _SESSION in self.callers:
            self._require_session(credentials)
        elif _API_CLIENT in self.callers:
            self._require_client(credentials)
        elif _APPLICATION in self.callers:
            self._require_application(credentials)
        elif _SERVICE in self.callers:
            self._require_service(credentials)

    def authorise(self, caller: Caller | None, message: Message, slug_of: Callable[[SessionUser], str | None]) -> None:
        """Refuse a message that names a user other than the caller: by `me`, the id or the slug."""
        if _SELF_SESSION not in self.callers:
            return
        user_id: str = message.user_id  # type: ignore[attr-defined]
        if not isinstance(caller, SessionUser):
            raise NotSelf
        if user_id not in (ME, str(caller.user_id)) and user_id != slug_of(caller):
            raise NotSelf

    def _require_session(self, credentials: Credentials) -> None:
        if isinstance(credentials.caller, SessionUser):
            return
        raise (SessionRequired if credentials.has_authorization and not credentials.has_cookie else NoSession)

    def _require_client(self, credentials: Credentials) -> None:
        if isinstance(credentials.caller, Client):
            return
        if _ANYONE not in self.callers or credentials.has_authorization:
            raise NoApiClient
        if not credentials.by_gateway:
            # Else anybody could hold the port's threads, by messages that never come.
            raise ServiceTokenRequired

    def _require_application(self, credentials: Credentials) -> None:
        caller = credentials.caller
        if isinstance(caller, Registered) or (isinstance(caller, Service) and caller.application_id is not None):
            return
        # Wrong credentials make a stranger of whoever may be one.
        if _ANYONE not in self.callers:
            raise NoApplication
        if not credentials.by_gateway:
            raise ServiceTokenRequired

    def _require_service(self, credentials: Credentials) -> None:
        caller = credentials.caller
        if isinstance(caller, Service):
            if not caller.roles & self.roles:
                raise RoleRequired
            return
        raise ServiceTokenRequired if credentials.has_cookie else NoServiceToken


def read_policies(services: Iterable[ServiceDescriptor], allowed_origins: frozenset[str]) -> Mapping[str, Policy]:
    """The policy of every RPC by its full name (`/package.Service/Method`); LookupError when one has none."""
    return {
        f"/{service.full_name}/{method.name}": _read_policy(method, allowed_origins)
        for service in services
        for method in service.methods
    }


def _read_policy(method: MethodDescriptor, allowed_origins: frozenset[str]) -> Policy:
    options = method.GetOptions()
    if not options.HasExtension(policy_pb2.policy):
        raise LookupError(f"{method.full_name} declares no policy")
    declared = options.Extensions[policy_pb2.policy]
    callers = frozenset(declared.callers)
    if callers not in _JUDGED:
        raise LookupError(f"{method.full_name}: callers are not judged by {sorted(callers)} yet")
    same_origin = declared.same_origin or bool(callers & {_SELF_SESSION, _SESSION})
    roles = frozenset(policy_pb2.Role.Name(role).removeprefix("ROLE_").lower() for role in declared.roles)
    return Policy(callers, roles, allowed_origins if same_origin else None)
