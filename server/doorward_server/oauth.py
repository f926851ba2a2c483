"""The OAuth 2 client: exchanges codes, refreshes and revokes tokens, looks up accounts (RFC 6749, 7009).

Imports `outbound`, `providers` and `errors`.
"""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeGuard
from urllib.parse import quote_plus

from doorward_server.errors import (
    CodeRejected,
    GrantRefused,
    LookupRejected,
    LookupWithoutId,
    ProviderMalformed,
    ProviderNotConfigured,
    ProviderUnavailable,
    RefreshRejected,
)
from doorward_server.outbound import Answer, Outbound, Timeouts
from doorward_server.providers import Provider, member_at

# RFC 6749, section 5.2: the characters of an error code. Longer ones are nobody's.
_ERROR_CODE = re.compile(r"[\x20-\x21\x23-\x5b\x5d-\x7e]{1,100}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_LONGEST_LIFE = 10 * 365 * 86400.0
_TOO_MANY_REQUESTS = 429
_LONGEST_ACCOUNT_ID = 255


class NoTokenGranted(ProviderMalformed):
    """The token endpoint answered 2xx without an access token; `cause` is its OAuth error code, if it told one."""


@dataclass(frozen=True)
class TokenPair:
    """What a token endpoint grants. `expires_in` is in seconds, None when it does not say."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    expires_in: float | None


class OAuth:
    """The client's side of the token and the revocation endpoint."""

    def __init__(self, outbound: Outbound) -> None:
        self._outbound = outbound

    def exchange_code(self, provider: Provider, code: str) -> TokenPair:
        """Trade a code for tokens (RFC 6749, section 4.1.3). Not to be repeated with the same code.

        Raises CodeRejected on a 4xx, NoTokenGranted, else what `Outbound.request` raises.
        """
        grant = {"grant_type": "authorization_code", "code": code}
        if provider.redirect_uri is not None:
            grant["redirect_uri"] = provider.redirect_uri
        answer = self._token_request(provider, grant)
        if _is_client_error(answer.status):
            raise CodeRejected(_metadata(_error_code(answer)))
        return _token_pair(answer)

    def refresh(self, provider: Provider, refresh_token: str) -> TokenPair:
        """Trade a refresh token for a new pair (RFC 6749, section 6).

        Raises GrantRefused on `invalid_grant`, RefreshRejected on any other 4xx, else what
        `Outbound.request` raises. The pair's refresh token is None when the old one stays valid.
        """
        answer = self._token_request(provider, {"grant_type": "refresh_token", "refresh_token": refresh_token})
        if answer.status == _TOO_MANY_REQUESTS:
            raise ProviderUnavailable
        if _is_client_error(answer.status):
            error = _error_code(answer)
            raise GrantRefused if error == "invalid_grant" else RefreshRejected(_metadata(error))
        return _token_pair(answer)

    def look_up(self, provider: Provider, access_token: str) -> str:
        """The id of the account that an access token is for, by the provider's lookup URL.

        Raises LookupRejected on a 4xx, LookupWithoutId, else what `Outbound.request` raises.
        """
        answer = self._request(provider, "GET", provider.lookup_url_for(access_token))
        if _is_client_error(answer.status):
            raise LookupRejected
        if answer.status >= 500:  # noqa: PLR2004
            raise ProviderUnavailable
        if not 200 <= answer.status < 300:  # noqa: PLR2004
            raise ProviderMalformed
        return _account_id(answer.body, provider.lookup_id_property)

    def revoke(self, provider: Provider, token: str, token_type_hint: str) -> int:
        """Ask the provider to revoke a token (RFC 7009, section 2.1); returns the answer's status."""
        if provider.revocation_url is None:
            raise ProviderNotConfigured
        form = {"token": token, "token_type_hint": token_type_hint}
        return self._authenticated(provider, "POST", provider.revocation_url, form).status

    def _token_request(self, provider: Provider, grant: Mapping[str, str]) -> Answer:
        if provider.token_url is None:
            raise ProviderNotConfigured
        return self._authenticated(provider, provider.token_method.upper(), provider.token_url, grant)

    def _authenticated(self, provider: Provider, method: str, url: str, form: Mapping[str, str]) -> Answer:
        """A request with the client's authentication (RFC 6749, section 2.3.1)."""
        form, headers = dict(form), {}
        client_id, secret = provider.client_id, provider.secret
        if provider.token_auth == "client_secret_basic":  # noqa: S105
            pair = f"{quote_plus(client_id or '')}:{quote_plus(secret)}"
            headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif client_id is not None:
            form["client_id"] = client_id
            if provider.token_auth == "client_secret_post":  # noqa: S105
                form["client_secret"] = secret
        if method == "GET":
            return self._request(provider, method, url, headers=headers, query=form)
        return self._request(provider, method, url, headers=headers, form=form)

    def _request(self, provider: Provider, method: str, url: str, **parts: Any) -> Answer:
        timeouts = Timeouts(provider.connect_timeout, provider.read_timeout, provider.timeout)
        return self._outbound.request(method, url, provider_id=provider.id, timeouts=timeouts, **parts)


def _is_client_error(status: int) -> bool:
    return 400 <= status < 500  # noqa: PLR2004


def _token_pair(answer: Answer) -> TokenPair:
    """Read a successful answer (RFC 6749, section 5.1)."""
    if answer.status >= 500:  # noqa: PLR2004
        raise ProviderUnavailable
    if not 200 <= answer.status < 300:  # noqa: PLR2004
        raise ProviderMalformed
    members = answer.json_object()
    if members is None:
        raise NoTokenGranted
    access_token, refresh_token = members.get("access_token"), members.get("refresh_token")
    if not _is_token(access_token):
        raise NoTokenGranted(cause=_error_code(answer))
    return TokenPair(
        access_token=access_token,
        refresh_token=refresh_token if _is_token(refresh_token) else None,
        expires_in=_seconds(members.get("expires_in")),
    )


def _is_token(value: object) -> TypeGuard[str]:
    """A string that is not empty, can be stored, and is safe in a header: JSON also holds lone surrogates."""
    if not isinstance(value, str) or not value or _CONTROL.search(value):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _account_id(body: bytes, path: str) -> str:
    """The id at a dotted path of a lookup's answer, a number as its decimal text. Raises LookupWithoutId."""
    try:
        value: object = json.loads(body.decode(), parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, ArithmeticError):
        raise LookupWithoutId from None
    value = member_at(value, path)
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        value = _decimal_text(Decimal(value))
    # Dots alone could not be told in a path (RFC 3986, section 5.2.4).
    if not _is_token(value) or len(value) > _LONGEST_ACCOUNT_ID or not value.isprintable() or not value.strip(" ."):
        raise LookupWithoutId
    return value


def _decimal_text(number: Decimal) -> str:
    """The shortest decimal text of a number, so that 7, 7.0 and 7e0 are the same; "" for zero and what is too long."""
    if not number or number.adjusted() > _LONGEST_ACCOUNT_ID or number.adjusted() < -_LONGEST_ACCOUNT_ID:
        return ""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _seconds(value: object) -> float | None:
    """A life in seconds; some providers send it as a string. None when it is no such thing."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_LIFE) if math.isfinite(seconds) else None


def _error_code(answer: Answer) -> str | None:
    """The `error` member of a refusal (RFC 6749, section 5.2), if it is one."""
    error = (answer.json_object() or {}).get("error")
    return error if isinstance(error, str) and _ERROR_CODE.fullmatch(error) else None


def _metadata(error: str | None) -> dict[str, str]:
    return {"error": error} if error else {}
