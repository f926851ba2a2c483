"""The endpoints that applications call: token, revocation and account lookup.

Each is a plain function of a request read in full, so that its effect is never half done,
however early the client leaves. `endpoint` adds what they share: the journal, planned faults
and latency.
"""

import asyncio
import base64
import secrets
import zlib
from collections.abc import Awaitable, Callable
from urllib.parse import unquote_plus

from aiohttp import hdrs, web

from .faults import spoil
from .grants import CLIENT_SECRET, CLIENTS, OAuthError
from .state import CALL, SANDBOX, Call, Sandbox, read_call

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_NOT_CACHED = {hdrs.CACHE_CONTROL: "no-store", hdrs.PRAGMA: "no-cache"}
_CHALLENGES = {
    "invalid_client": 'Basic realm="sandbox"',
    "invalid_token": 'Bearer realm="sandbox", error="invalid_token"',
}


def endpoint(name: str, effect: Callable[[Sandbox, Call], object]) -> Handler:
    """Serve an effect: journaled, spoilt if a fault is planned, late if the settings say so."""

    async def answer(request: web.Request) -> web.StreamResponse:
        sandbox = request.app[SANDBOX]
        call = request[CALL] = await read_call(name, request)
        sandbox.journal.append(call)
        fault = sandbox.faults.take(name)
        if fault is None or fault.phase == "after":
            response = _respond(sandbox, call, effect)
        if fault is not None:
            call.outcome = fault.kind
        if name == "token":
            await asyncio.sleep(sandbox.settings.latency)
        return response if fault is None else await spoil(request, fault)

    return answer


def token(sandbox: Sandbox, call: Call) -> object:
    """RFC 6749 sections 4.1.3 and 6, by POST or, as some providers have it, by GET."""
    client_id = _authenticate(call)
    grant_type = _parameter(call, "grant_type")
    if grant_type == "authorization_code":
        code, redirect_uri = _parameter(call, "code"), _parameter(call, "redirect_uri")
        return sandbox.grants.redeem(client_id, code, redirect_uri, sandbox.settings)
    if grant_type == "refresh_token":
        refresh_token = _parameter(call, "refresh_token")
        return sandbox.grants.refresh(client_id, refresh_token, sandbox.settings)
    raise OAuthError("unsupported_grant_type", "use authorization_code or refresh_token")


def revoke(sandbox: Sandbox, call: Call) -> object:
    """RFC 7009."""
    sandbox.grants.revoke(_authenticate(call), _parameter(call, "token"))
    return {}


def lookup(sandbox: Sandbox, call: Call) -> object:
    """Whose account it is, for the bearer of an access token."""
    scheme, _, bearer = call.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        bearer = call.query.get("access_token", "")
    user = sandbox.grants.user_of(bearer)
    return {"id": user, "name": user.capitalize(), "profile": {"id": zlib.crc32(user.encode())}}


def elsewhere(_sandbox: Sandbox, _call: Call) -> object:
    """Where the redirect fault points: it rewards who follows, and the journal tells on them."""
    return {"access_token": "access-from-elsewhere", "token_type": "Bearer"}


def _respond(sandbox: Sandbox, call: Call, effect: Callable[[Sandbox, Call], object]) -> web.Response:
    try:
        response = web.json_response(effect(sandbox, call), headers=_NOT_CACHED)
        call.outcome = response.status
    except OAuthError as error:
        response = _refuse(error)
        call.outcome = error.code
    return response


def _refuse(error: OAuthError) -> web.Response:
    challenge = _CHALLENGES.get(error.code)
    return web.json_response(
        {"error": error.code, "error_description": error.description},
        status=401 if challenge else 400,
        headers=_NOT_CACHED | ({hdrs.WWW_AUTHENTICATE: challenge} if challenge else {}),
    )


def _parameter(call: Call, name: str) -> str:
    """A parameter that must be there; one without a value counts as absent (RFC 6749 3.2)."""
    value = call.parameters.get(name)
    if not value:
        raise OAuthError("invalid_request", f"{name} is missing")
    return value


def _authenticate(call: Call) -> str:
    """The client's id, once it has proved itself by exactly one of the two methods."""
    if call.repeats:
        raise OAuthError("invalid_request", "a parameter is repeated")
    basic = _basic_credentials(call.headers.get("authorization", ""))
    posted = call.parameters.get("client_id", ""), call.parameters.get("client_secret", "")
    if basic and posted[1]:
        raise OAuthError("invalid_request", "the client authenticates in two ways at once")
    client_id, client_secret = basic or posted
    known = secrets.compare_digest(client_secret.encode(), CLIENT_SECRET.encode())
    if client_id not in CLIENTS or not known:
        raise OAuthError("invalid_client", "the client id or its secret is wrong")
    return client_id


def _basic_credentials(authorization: str) -> tuple[str, str] | None:
    """Id and secret of client_secret_basic, each form-urlencoded first (RFC 6749 2.3.1)."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        client_id, _, client_secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:
        raise OAuthError("invalid_client", "the Authorization header is malformed") from None
    return unquote_plus(client_id), unquote_plus(client_secret)
