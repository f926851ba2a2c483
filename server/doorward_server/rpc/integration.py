"""IntegrationService: translates only."""

from dataclasses import dataclass

import grpc

from doorward.integration.v1 import integration_service_pb2 as pb
from doorward.integration.v1 import integration_service_pb2_grpc as stubs
from doorward_server.integrations import DEFAULT_MIN_TTL, Integrations
from doorward_server.rpc.messages import service_name, timestamp
from doorward_server.rpc.policy import current_caller
from doorward_server.sessions import SessionUser


@dataclass(frozen=True)
class IntegrationServicer(stubs.IntegrationServiceServicer):
    integrations: Integrations

    def GetKaiStatus(self, request: pb.GetKaiStatusRequest, context: grpc.ServicerContext) -> pb.GetKaiStatusResponse:
        connected = self.integrations.status(_self_id(), request.kai_type)
        return pb.GetKaiStatusResponse(auth_status=connected)

    def RevokeKai(self, request: pb.RevokeKaiRequest, context: grpc.ServicerContext) -> pb.RevokeKaiResponse:
        self.integrations.revoke(_self_id(), request.kai_type)
        return pb.RevokeKaiResponse()

    def ConnectKai(self, request: pb.ConnectKaiRequest, context: grpc.ServicerContext) -> pb.ConnectKaiResponse:
        # A code of another JSON type reads as "".
        self.integrations.connect(_self_id(), request.kai_type, request.code.string_value)
        return pb.ConnectKaiResponse()

    def GetAccessToken(
        self, request: pb.GetAccessTokenRequest, context: grpc.ServicerContext
    ) -> pb.GetAccessTokenResponse:
        min_ttl = request.min_ttl if request.HasField("min_ttl") else DEFAULT_MIN_TTL
        token = self.integrations.access_token(request.user, request.provider, min_ttl, reader=service_name())
        return pb.GetAccessTokenResponse(access_token=token.value, expire_time=timestamp(token.expires_at))


def _self_id() -> int:
    """The user whose session it is: the policy has seen to it that the message names no other."""
    caller = current_caller.get()
    if not isinstance(caller, SessionUser):
        raise TypeError("this RPC's policy has to be SELF_SESSION")
    return caller.user_id
