"""What happens around every call, in this order: request id and log line, errors, authentication, policy.

The handler gets the raw message, so that a message that does not parse is answered like any other
error. Health and reflection, which are not ours and show nothing, pass through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from doorward_server.applications import Applications, Registered
from doorward_server.clients import ApiClients, Client
from doorward_server.errors import CallError, Cancelled, Internal, MalformedRequest
from doorward_server.failures import FailureLimit
from doorward_server.logs import Log, describe
from doorward_server.metrics import CallMetrics, Metrics
from doorward_server.rpc.headers import (
    REQUEST_ID,
    RequestMetadata,
    basic_credentials,
    bearer_token,
    client_address,
    read_metadata,
    request_id_of,
    session_cookies,
    text_of,
)
from doorward_server.rpc.peers import Peer, Peers, current_peer
from doorward_server.rpc.policy import Caller, Credentials, Policy, caller_name, current_caller
from doorward_server.rpc.status import Metadata, status_code, trailing_metadata
from doorward_server.service_tokens import ServiceTokens
from doorward_server.sessions import Sessions, SessionUser

_LONGEST_ID = 32


class Authenticator:
    """Finds out who calls.

    Cookies and Basic credentials count through the gateway only, service tokens everywhere else only.
    """

    def __init__(
        self,
        sessions: Sessions,
        service_tokens: ServiceTokens,
        clients: ApiClients,
        applications: Applications,
        failures: FailureLimit,
    ) -> None:
        self.slug_of = sessions.slug
        self._sessions = sessions
        self._service_tokens = service_tokens
        self._clients = clients
        self._applications = applications
        self._failures = failures

    def credentials(self, policy: Policy, peer: Peer, metadata: RequestMetadata) -> Credentials:
        """What a call came with, as far as its policy asks. Raises TooManyFailures."""
        if not peer.is_gateway:
            token = bearer_token(metadata)
            caller = self._service_tokens.find(token) if token is not None else None
            return Credentials(
                caller,
                has_cookie=False,
                has_authorization="authorization" in metadata,
                origin=None,
                by_gateway=False,
            )
        cookie = next(session_cookies(metadata), None)
        return Credentials(
            caller=self._find_caller(policy, peer, metadata, cookie),
            has_cookie=cookie is not None,
            has_authorization="authorization" in metadata,
            origin=text_of(metadata["origin"]) if "origin" in metadata else None,
            by_gateway=True,
        )

    def _find_caller(
        self, policy: Policy, peer: Peer, metadata: RequestMetadata, cookie: str | None
    ) -> SessionUser | Client | Registered | None:
        if policy.knows_clients:
            return self._find_client(metadata, peer)
        if policy.knows_applications:
            pair = basic_credentials(metadata)
            return self._applications.find(*pair) if pair else None
        return self._find_session(cookie)

    def _find_session(self, cookie: str | None) -> SessionUser | None:
        return self._sessions.find(cookie) if cookie else None

    def _find_client(self, metadata: RequestMetadata, peer: Peer) -> Client | None:
        if "authorization" not in metadata:
            return None
        pair = basic_credentials(metadata)
        client = self._clients.find(*pair) if pair else None
        if client is None:
            # No id of ours is longer; whoever sends such gets one count for all of them.
            client_id = pair[0] if pair and len(pair[0]) <= _LONGEST_ID else ""
            self._failures.add(client_id, client_address(metadata, peer))
        return client


class CallInterceptor(grpc.ServerInterceptor):
    """Wraps the handlers of the RPCs that have a policy; refuses to run ours without one."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        authenticator: Authenticator,
        peers: Peers,
        log: Log,
        metrics: Metrics,
        *,
        access_log: bool,
        whole_messages: bool = False,
    ) -> None:
        """`whole_messages`: the peer sends a message together with its headers, as the gateway does.

        From anyone else it is awaited only after authentication: who may not call holds no thread by
        announcing a message and never sending it.
        """
        self._policies = policies
        self._authenticator = authenticator
        self._peers = peers
        self._log = log
        self._metrics = metrics
        self._access_log = access_log
        self._whole_messages = whole_messages
        self._wrapped: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = continuation(handler_call_details)
        policy = self._policies.get(method)
        if handler is None or policy is None:
            return handler
        if handler.unary_unary is None:
            raise TypeError(f"{method} streams, which no handler here is made for")
        call = _Call(
            method,
            handler,
            policy,
            authenticator=self._authenticator,
            peers=self._peers,
            log=self._log,
            metrics=self._metrics.calls_of(method),
            access_log=self._access_log,
        )
        if self._whole_messages:
            wrapped = grpc.unary_unary_rpc_method_handler(call.with_message)
        else:
            wrapped = grpc.stream_unary_rpc_method_handler(call.with_stream)
        self._wrapped[method] = wrapped
        return wrapped


class _Call:
    """One RPC's handler with everything around it, for many threads."""

    def __init__(
        self,
        method: str,
        handler: grpc.RpcMethodHandler[Any, Any],
        policy: Policy,
        *,
        authenticator: Authenticator,
        peers: Peers,
        log: Log,
        metrics: CallMetrics,
        access_log: bool,
    ) -> None:
        self._method = method
        self._parse: Callable[[bytes], Message] = cast(Any, handler.request_deserializer)
        self._behavior: Callable[[Message, grpc.ServicerContext], Message] = cast(Any, handler.unary_unary)
        self._serialize: Callable[[Message], bytes] = cast(Any, handler.response_serializer)
        self._policy = policy
        self._authenticator = authenticator
        self._peers = peers
        self._log = log
        self._metrics = metrics
        self._access_log = access_log

    def with_message(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Serve a call whose message is here."""
        return self._serve(iter((request,)), context)

    def with_stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Serve a call whose message is still to come."""
        return self._serve(requests, context)

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        started = time.perf_counter()
        self._metrics.begin()
        metadata = read_metadata(context)
        peer = self._peers.of(context)
        request_id = request_id_of(metadata)
        caller: Caller | None = None
        failure: CallError | None = None
        answer = b""
        try:
            credentials = self._authenticator.credentials(self._policy, peer, metadata)
            caller = credentials.caller
            self._policy.authenticate(credentials)
            request = _receive(requests)
            message = self._parse_message(request)
            self._policy.authorise(caller, message, self._authenticator.slug_of)
            if b"\0" in request and _holds_nul(message):
                raise MalformedRequest
            current_caller.set(caller)
            current_peer.set(peer)
            answer = self._serialize(self._behavior(message, context))
        except CallError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the catch-all: no caller sees a traceback
            self._log.error("unexpected", method=self._method, request_id=request_id, **describe(error))
            failure = Internal()
        seconds = time.perf_counter() - started
        self._metrics.end(failure.code if failure else "OK", seconds)
        if self._access_log:
            self._write_line(request_id, caller, failure, seconds)
        # The gateway answers with the id itself.
        trailers: Metadata = () if peer.is_gateway else ((REQUEST_ID, request_id),)
        if failure is not None:
            context.set_trailing_metadata(trailers + trailing_metadata(failure))
            context.abort(status_code(failure), failure.message)
        if trailers:
            context.set_trailing_metadata(trailers)
        return answer

    def _parse_message(self, request: bytes) -> Message:
        try:
            return self._parse(request)
        except (DecodeError, ValueError):
            raise MalformedRequest from None

    def _write_line(self, request_id: str, caller: Caller | None, failure: CallError | None, seconds: float) -> None:
        self._log.info(
            "call",
            method=self._method,
            code=failure.code if failure else "OK",
            reason=failure.reason if failure else None,
            cause=failure.cause if failure else None,
            ms=round(seconds * 1000, 3),
            caller=caller_name(caller) if caller is not None else None,
            request_id=request_id,
        )


def _receive(requests: Iterator[bytes]) -> bytes:
    """The message, or an empty one when the caller sends none."""
    try:
        return next(requests, b"")
    except grpc.RpcError:
        raise Cancelled from None


def _holds_nul(message: Message) -> bool:
    """Whether a string anywhere in the message holds a NUL, which no store or peer handles well."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values = [*value.keys(), *value.values()]
        if any(
            _holds_nul(item) if isinstance(item, Message) else isinstance(item, str) and "\0" in item for item in values
        ):
            return True
    return False
