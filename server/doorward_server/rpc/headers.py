"""What HTTP callers send and get beside the messages: cookies, credentials, addresses, request ids.

All of it arrives as gRPC metadata. Whether it may be believed depends on who sends it (`peers`): the
gateway overwrites what others could forge.
"""

import base64
import binascii
import ipaddress
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import grpc

from doorward_server.rpc.peers import Peer
from doorward_server.sessions import COOKIE

REQUEST_ID = "x-request-id"
RequestMetadata = Mapping[str, str | bytes]
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def read_metadata(context: grpc.ServicerContext) -> RequestMetadata:
    """The metadata by name. A browser may send several Cookie headers (RFC 9113, section 8.2.3)."""
    pairs = context.invocation_metadata()
    metadata = dict(pairs)
    if len(metadata) != len(pairs):
        cookies = [text_of(value) for name, value in pairs if name == "cookie"]
        metadata |= {"cookie": "; ".join(cookies)} if cookies else {}
    return metadata


def request_id_of(metadata: RequestMetadata) -> str:
    """The id that the caller chose, if it is fit for a log line; else a new one."""
    given = metadata.get(REQUEST_ID)
    return given if isinstance(given, str) and _ACCEPTABLE_ID.fullmatch(given) else secrets.token_hex(16)


def client_address(metadata: RequestMetadata, peer: Peer) -> str:
    """The address that a call comes from: what the gateway says of its client, or who is connected.

    Of an IPv6 address it is the /64, which one subscriber has to itself (RFC 6177).
    """
    if not peer.is_gateway:
        return peer.address.rpartition(":")[0]
    address = text_of(metadata.get("x-envoy-external-address"))
    return str(ipaddress.IPv6Network((address, 64), strict=False)) if ":" in address else address


def bearer_token(metadata: RequestMetadata) -> str | None:
    """The token of an Authorization header (RFC 6750, section 2.1)."""
    scheme, _, token = text_of(metadata.get("authorization")).partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def basic_credentials(metadata: RequestMetadata) -> tuple[str, str] | None:
    """User and password of an Authorization header (RFC 7617, section 2); None when it is malformed."""
    scheme, _, encoded = text_of(metadata.get("authorization")).partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (user, password) if colon else None


def session_cookies(metadata: RequestMetadata) -> Iterator[str]:
    """The values of our cookie in a Cookie header (RFC 6265, section 4.2.1); the first one counts."""
    for pair in text_of(metadata.get("cookie")).split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            yield value.strip('"')


def text_of(value: str | bytes | None) -> str:
    """A header's value; "" for none and for bytes."""
    return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class SetCookie:
    """How browsers are told to keep the session cookie (RFC 6265, section 4.1)."""

    lifetime: timedelta
    secure: bool

    def keep(self, value: str) -> tuple[str, str]:
        """The header that sets the cookie."""
        return self._header(value, int(self.lifetime.total_seconds()))

    def forget(self) -> tuple[str, str]:
        """The header that takes it back."""
        return self._header("", 0)

    def _header(self, value: str, max_age: int) -> tuple[str, str]:
        attributes = [f"{COOKIE}={value}", "Path=/", f"Max-Age={max_age}", "HttpOnly", "SameSite=Lax"]
        return "set-cookie", "; ".join([*attributes, "Secure"] if self.secure else attributes)
