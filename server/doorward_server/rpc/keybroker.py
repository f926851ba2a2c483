"""KeyBrokerService: translates only."""

from dataclasses import dataclass
from datetime import timedelta

import grpc
from google.api.httpbody_pb2 import HttpBody

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward.keybroker.v1 import keybroker_service_pb2_grpc as stubs
from doorward_server.api_keys import ApiKeys, ListedKey
from doorward_server.applications import Registered
from doorward_server.consents import Consents, Leased, Question, Status, callback_host
from doorward_server.delivery import Deliveries
from doorward_server.delivery import Status as DeliveryStatus
from doorward_server.discord_users import DiscordUsers, parse_snowflake
from doorward_server.errors import ConsentRequestNotFound, GrantNotFound, InvalidField, KeyNotFound, NoApplication
from doorward_server.models import ConsentRequest, Delivery
from doorward_server.rpc.headers import client_address, read_metadata
from doorward_server.rpc.messages import service_name, timestamp
from doorward_server.rpc.peers import current_peer
from doorward_server.rpc.policy import current_caller
from doorward_server.rpc.request_form import answer, read_question
from doorward_server.service_tokens import Service

_OUTCOMES = {"granted": Status.GRANTED, "canceled": Status.CANCELED, "blocked": Status.BLOCKED}
_DELIVERY_STATUSES = {
    pb.DELIVERY_STATUS_QUEUED: DeliveryStatus.QUEUED,
    pb.DELIVERY_STATUS_SENT: DeliveryStatus.SENT,
    pb.DELIVERY_STATUS_ABANDONED: DeliveryStatus.ABANDONED,
}
_MOST_LEASED, _LONGEST_WAIT, _LONGEST_LEASE, _MOST_REQUESTS, _MOST_DELIVERIES = 100, 30.0, 300, 100, 1000
# How long the bot has to show the outcome that it brought, in the message.
_CLOSING = timedelta(seconds=30)


@dataclass(frozen=True)
class KeyBrokerServicer(stubs.KeyBrokerServiceServicer):
    consents: Consents
    deliveries: Deliveries
    api_keys: ApiKeys
    discord_users: DiscordUsers

    # For applications

    def RequestApiKeyForm(self, request: pb.RequestApiKeyFormRequest, context: grpc.ServicerContext) -> HttpBody:
        metadata = read_metadata(context)
        address, caller = client_address(metadata, current_peer.get()), _find_application()
        body, headers = answer(lambda: self.consents.request(read_question(metadata, request.form), caller, address))
        if headers:
            context.send_initial_metadata(headers)
        return body

    def RequestApiKey(
        self, request: pb.RequestApiKeyRequest, context: grpc.ServicerContext
    ) -> pb.RequestApiKeyResponse:
        caller = _find_application()
        if caller is None:
            raise NoApplication
        question = Question(request.name, request.user_id, request.callback, request.state)
        address = client_address(read_metadata(context), current_peer.get())
        return pb.RequestApiKeyResponse(request_id=self.consents.request(question, caller, address))

    # For the bot

    def AddApiKey(self, request: pb.AddApiKeyRequest, context: grpc.ServicerContext) -> pb.AddApiKeyResponse:
        user = self.discord_users.obtain(parse_snowflake(request.discord_user_id))
        key = self.api_keys.add(user, request.service, request.label, request.value, actor=service_name())
        return pb.AddApiKeyResponse(key=_key(self.api_keys.listed(key)))

    def ListApiKeys(self, request: pb.ListApiKeysRequest, context: grpc.ServicerContext) -> pb.ListApiKeysResponse:
        user = self.discord_users.find(parse_snowflake(request.discord_user_id))
        keys = self.api_keys.list(user, request.service or None) if user else []
        return pb.ListApiKeysResponse(keys=map(_key, keys))

    def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: grpc.ServicerContext) -> pb.DeleteApiKeyResponse:
        user = self.discord_users.find(parse_snowflake(request.discord_user_id))
        if user is None:
            raise KeyNotFound
        self.api_keys.remove(user, request.key_id, actor=service_name())
        return pb.DeleteApiKeyResponse()

    def LeaseConsentRequests(
        self, request: pb.LeaseConsentRequestsRequest, context: grpc.ServicerContext
    ) -> pb.LeaseConsentRequestsResponse:
        leased = self.consents.lease(
            min(max(request.max_requests, 1), _MOST_LEASED),
            timedelta(seconds=min(max(request.lease_seconds, 1), _LONGEST_LEASE)),
            min(max(request.wait_seconds, 0.0), _LONGEST_WAIT),
            context.is_active,
        )
        return pb.LeaseConsentRequestsResponse(requests=map(_leased, leased))

    def MarkPrompted(self, request: pb.MarkPromptedRequest, context: grpc.ServicerContext) -> pb.MarkPromptedResponse:
        self.consents.mark_prompted(request.request_id, request.lease_epoch, request.message)
        return pb.MarkPromptedResponse()

    def ClosePrompt(self, request: pb.ClosePromptRequest, context: grpc.ServicerContext) -> pb.ClosePromptResponse:
        self.consents.close_prompt(request.request_id)
        return pb.ClosePromptResponse()

    def ResolveConsentRequest(
        self, request: pb.ResolveConsentRequestRequest, context: grpc.ServicerContext
    ) -> pb.ResolveConsentRequestResponse:
        outcome = _OUTCOMES.get(request.WhichOneof("outcome") or "", Status.CANCELED)
        resolved = self.consents.resolve(
            request.request_id, outcome, request.granted.key_ids, actor=service_name(), closes_within=_CLOSING
        )
        return pb.ResolveConsentRequestResponse(status=_status(resolved.status), decided=bool(resolved.ids))

    def GetConsentRequest(
        self, request: pb.GetConsentRequestRequest, context: grpc.ServicerContext
    ) -> pb.GetConsentRequestResponse:
        found = self.consents.get(request.request_id)
        user = self.discord_users.find(found.discord_user)
        return pb.GetConsentRequestResponse(
            request=_request(found),
            prompt_open=self.consents.is_prompt_open(found),
            lease_epoch=found.lease_epoch,
            keys=map(_key, self.api_keys.list(user) if user else []),
        )

    def ListConsentRequests(
        self, request: pb.ListConsentRequestsRequest, context: grpc.ServicerContext
    ) -> pb.ListConsentRequestsResponse:
        found = self.consents.latest(
            request.discord_user_id or None,
            min(max(request.max_requests, 1), _MOST_REQUESTS),
            before=request.before_id or None,
            status=Status.PROMPTED if request.only_prompted else None,
        )
        return pb.ListConsentRequestsResponse(requests=[_leased(self.consents.with_keys(one)) for one in found])

    def ListGrants(self, request: pb.ListGrantsRequest, context: grpc.ServicerContext) -> pb.ListGrantsResponse:
        user = self.discord_users.find(parse_snowflake(request.discord_user_id))
        if user is None:
            return pb.ListGrantsResponse()
        keys = {listed.key.id: listed for listed in self.api_keys.list(user)}
        return pb.ListGrantsResponse(
            grants=[
                pb.Grant(
                    id=grant.id,
                    application_name=grant.request.name,
                    verified=grant.request.application_id is not None,
                    callback_host=callback_host(grant.request),
                    keys=[_key(keys[key_id]) for key_id in key_ids if key_id in keys],
                    create_time=timestamp(grant.created_at),
                )
                for grant, key_ids in self.consents.grants(user)
            ]
        )

    def RevokeGrant(self, request: pb.RevokeGrantRequest, context: grpc.ServicerContext) -> pb.RevokeGrantResponse:
        user = self.discord_users.find(parse_snowflake(request.discord_user_id))
        if user is None:
            raise GrantNotFound
        self.consents.revoke_grant(user, request.grant_id, actor=service_name())
        return pb.RevokeGrantResponse()

    def BlockApplication(
        self, request: pb.BlockApplicationRequest, context: grpc.ServicerContext
    ) -> pb.BlockApplicationResponse:
        discord_user = parse_snowflake(request.discord_user_id)
        # Checked before, for a request that is not the user's makes no user either.
        if self.consents.get(request.request_id).discord_user != discord_user:
            raise ConsentRequestNotFound
        self.consents.block(self.discord_users.obtain(discord_user), request.request_id, actor=service_name())
        return pb.BlockApplicationResponse()

    # For operators

    def ListDeliveries(
        self, request: pb.ListDeliveriesRequest, context: grpc.ServicerContext
    ) -> pb.ListDeliveriesResponse:
        status = None
        if request.status:
            if request.status not in _DELIVERY_STATUSES:
                raise InvalidField({"field": "status"})
            status = _DELIVERY_STATUSES[request.status]
        most = min(max(request.max_deliveries, 1), _MOST_DELIVERIES)
        deliveries = self.deliveries.latest(status, most, request.before_id or None)
        return pb.ListDeliveriesResponse(deliveries=map(self._delivery, deliveries))

    def RedeliverDelivery(
        self, request: pb.RedeliverDeliveryRequest, context: grpc.ServicerContext
    ) -> pb.RedeliverDeliveryResponse:
        self.deliveries.redeliver(request.delivery_id, actor=service_name())
        return pb.RedeliverDeliveryResponse()

    def _delivery(self, delivery: Delivery) -> pb.Delivery:
        return pb.Delivery(
            id=delivery.id,
            request_id=delivery.request_id,
            webhook_id=delivery.webhook_id,
            callback_host=callback_host(delivery.request),
            status=pb.DeliveryStatus.Value(f"DELIVERY_STATUS_{delivery.status.upper()}"),
            error=delivery.error or "",
            attempts=[
                pb.DeliveryAttempt(
                    start_time=timestamp(attempt.started_at),
                    milliseconds=attempt.milliseconds,
                    status=attempt.status or 0,
                    error=attempt.error or "",
                )
                for attempt in self.deliveries.attempts(delivery.id)
            ],
            next_attempt_time=timestamp(delivery.next_attempt_at),
        )


def _find_application() -> Registered | None:
    """The application that calls: by Basic, or by a service token that is bound to it."""
    caller = current_caller.get()
    if isinstance(caller, Service) and caller.application_id is not None:
        return Registered(caller.application_id)
    return caller if isinstance(caller, Registered) else None


def _leased(leased: Leased) -> pb.LeasedConsentRequest:
    return pb.LeasedConsentRequest(
        request=_request(leased.request),
        lease_epoch=leased.request.lease_epoch,
        keys=map(_key, leased.keys),
    )


def _request(request: ConsentRequest) -> pb.ConsentRequest:
    return pb.ConsentRequest(
        id=request.id,
        prompt_id=request.prompt_id or request.id,
        discord_user_id=request.discord_user,
        application_name=request.name,
        verified=request.application_id is not None,
        callback_host=callback_host(request),
        status=_status(Status(request.status)),
        message=request.message or "",
        create_time=timestamp(request.created_at),
        deadline_time=timestamp(request.deadline_at),
        finish_time=timestamp(request.finished_at),
    )


def _key(listed: ListedKey) -> pb.ApiKey:
    key = listed.key
    return pb.ApiKey(
        id=key.id,
        service=key.service,
        label=key.label,
        last_four=listed.last_four,
        account=key.account or "",
        permissions=key.permissions,
        create_time=timestamp(key.created_at),
    )


def _status(status: Status) -> pb.ConsentStatus.ValueType:
    return pb.ConsentStatus.Value(f"CONSENT_STATUS_{status.upper()}")
