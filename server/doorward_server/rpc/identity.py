"""IdentityService: translates only."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct, Value

from doorward.identity.v1 import identity_service_pb2 as pb
from doorward.identity.v1 import identity_service_pb2_grpc as stubs
from doorward.identity.v1 import user_pb2
from doorward_server.accounts import Accounts
from doorward_server.clients import Client
from doorward_server.errors import MalformedRequest
from doorward_server.identities import Identities, Profile, Proof
from doorward_server.rpc.headers import SetCookie, client_address, read_metadata, session_cookies
from doorward_server.rpc.messages import timestamp
from doorward_server.rpc.peers import current_peer
from doorward_server.rpc.policy import current_caller
from doorward_server.sessions import Sessions, SessionUser
from doorward_server.users import Users


@dataclass(frozen=True)
class IdentityServicer(stubs.IdentityServiceServicer):
    accounts: Accounts
    identities: Identities
    sessions: Sessions
    users: Users
    set_cookie: SetCookie

    def CreateUser(self, request: pb.CreateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return _user(self.accounts.create(_client_id(), _plain(request.name), _plain(request.email)))

    def GetUser(self, request: pb.GetUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return _user(self.accounts.get(_client_id(), request.handle))

    def UpdateUser(self, request: pb.UpdateUserRequest, context: grpc.ServicerContext) -> user_pb2.User:
        changes = {field.name: _plain(value) for field, value in request.ListFields() if field.name != "handle"}
        return _user(self.accounts.update(_client_id(), request.handle, changes))

    def DeleteUser(self, request: pb.DeleteUserRequest, context: grpc.ServicerContext) -> pb.DeleteUserResponse:
        self.accounts.delete_of(_client_id(), request.handle)
        return pb.DeleteUserResponse()

    def AddOAuthIdentity(self, request: pb.AddOAuthIdentityRequest, context: grpc.ServicerContext) -> user_pb2.User:
        return _user(self.identities.add(_client_id(), request.handle, _proof(request)))

    def RemoveOAuthIdentity(
        self, request: pb.RemoveOAuthIdentityRequest, context: grpc.ServicerContext
    ) -> user_pb2.User:
        return _user(self.identities.remove(_client_id(), request.handle, request.provider, request.id))

    def LogIn(self, request: pb.LogInRequest, context: grpc.ServicerContext) -> user_pb2.User:
        caller, metadata = current_caller.get(), read_metadata(context)
        profile, cookie = self.identities.log_in(
            _proof(request),
            client_id=caller.client_id if isinstance(caller, Client) else None,
            address=client_address(metadata, current_peer.get()),
            replacing=tuple(session_cookies(metadata)),
        )
        answer = _user(profile)
        context.send_initial_metadata((self.set_cookie.keep(cookie),))
        return answer

    def LogOut(self, request: pb.LogOutRequest, context: grpc.ServicerContext) -> pb.LogOutResponse:
        self.sessions.log_out(_session())
        context.send_initial_metadata((self.set_cookie.forget(),))
        return pb.LogOutResponse()

    def LogOutEverywhere(
        self, request: pb.LogOutEverywhereRequest, context: grpc.ServicerContext
    ) -> pb.LogOutEverywhereResponse:
        self.sessions.log_out_everywhere(_session())
        context.send_initial_metadata((self.set_cookie.forget(),))
        return pb.LogOutEverywhereResponse()

    def CreateSession(
        self, request: pb.CreateSessionRequest, context: grpc.ServicerContext
    ) -> pb.CreateSessionResponse:
        session, cookie = self.sessions.create(self.users.get(request.user))
        return pb.CreateSessionResponse(cookie=cookie, expire_time=timestamp(session.expires_at))


def _client_id() -> str:
    caller = current_caller.get()
    if not isinstance(caller, Client):
        raise TypeError("this RPC's policy has to be API_CLIENT")
    return caller.client_id


def _session() -> SessionUser:
    caller = current_caller.get()
    if not isinstance(caller, SessionUser):
        raise TypeError("this RPC's policy has to be SESSION")
    return caller


def _proof(request: pb.AddOAuthIdentityRequest | pb.LogInRequest) -> Proof:
    return Proof(_plain(request.provider), _plain(request.access_token), _plain(request.code))


def _plain(value: Value) -> Any:
    """A JSON value as Python has it; None when it is unset, too."""
    if value.WhichOneof("kind") is None:
        return None
    try:
        return MessageToDict(value)
    except ValueError:  # NaN and infinities, which protobuf has and JSON has not
        raise MalformedRequest from None


def _user(profile: Profile) -> user_pb2.User:
    user = profile.user
    return user_pb2.User(
        id=str(user.id),
        slug=user.slug,
        name=user.name,
        email=user.email or "",
        role=user.role,
        o_auth_identities=[
            user_pb2.OAuthIdentity(provider=identity.provider, id=identity.subject) for identity in profile.identities
        ],
        license=user_pb2.License(active=user.license_active, ends=_iso(user.license_ends_at)),
        subscription=user_pb2.Subscription(active=user.subscription_active, ends=_iso(user.subscription_ends_at)),
        stats=user_pb2.Stats(
            games_completed=user.stats_games_completed,
            play_time=user.stats_play_time,
            concepts=ParseDict(user.stats_concepts, Struct()),
        ),
    )


def _iso(time: datetime | None) -> str | None:
    """As JavaScript writes it: milliseconds and `Z`."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z") if time else None
