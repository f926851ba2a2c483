"""Who is connected: the gateway, or anybody else. This is the one place that judges it, once a call.

The gateway is who reaches the Unix socket, and who proves on the TCP port, by a certificate of an
authority in `[grpc] client_ca_file`, to be called as `[grpc] gateway_name` says.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import NamedTuple

import grpc

_SOCKET = "unix:"
# The DNS names among the subject alternative names (RFC 5280, section 4.2.1.6) of a certificate that
# gRPC has verified. Its `x509_subject_alternative_name` mixes them with addresses and URIs of the same text.
_DNS_NAMES = "peer_dns"


class Peer(NamedTuple):
    """`address` as gRPC writes it, such as `ipv4:192.0.2.7:4711`."""

    address: str
    is_gateway: bool


# The peer of the call that this thread serves. Set before a handler runs.
current_peer: ContextVar[Peer] = ContextVar("current_peer")


class Peers:
    """Tells the gateway from all others."""

    def __init__(self, gateway_names: Iterable[str]) -> None:
        self._gateway_names = frozenset(name.lower().encode() for name in gateway_names)

    def of(self, context: grpc.ServicerContext) -> Peer:
        """A call's peer."""
        address = context.peer()
        return Peer(address, address.startswith(_SOCKET) or self._has_gateway_name(context))

    def _has_gateway_name(self, context: grpc.ServicerContext) -> bool:
        if not self._gateway_names:  # reading a certificate's names takes 10 microseconds
            return False
        names: Iterable[bytes] = context.auth_context().get(_DNS_NAMES, ())  # type: ignore[assignment]
        return any(name.lower() in self._gateway_names for name in names)
