"""The provider's memory: its clients, authorization codes and token families.

A family is what one consent gave rise to: every access and refresh token descending from
one code. All of it is a state machine without HTTP, in which each call takes effect at once.
"""

import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

KAI_CLIENTS = ("flo-client", "min-client", "eag-client")
CLIENTS = (*KAI_CLIENTS, "sandbox-client")
CLIENT_SECRET = "sandbox-secret"
CODE_LIFETIME = 60.0
UNSTATED_LIFETIME = 3600  # of access tokens whose answer leaves `expires_in` out


class Settings(BaseModel):
    """How tokens are issued; adjustable while the provider runs."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    expires_in: int | None = Field(default=3600, ge=0)
    issue_refresh_token: bool = True
    rotate: bool = True
    latency: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class OAuthError(Exception):
    """A refusal, in the vocabulary of RFC 6749 section 5.2 and RFC 6750 section 3.1."""

    def __init__(self, code: str, description: str) -> None:
        super().__init__(code)
        self.code = code
        self.description = description


@dataclass
class Family:
    """The tokens that descend from one consent."""

    number: int
    client_id: str
    user: str
    scope: str
    access_token: str = ""
    refresh_token: str | None = None
    refreshes: int = 0
    revoked: bool = False
    reused: bool = False

    def as_json(self) -> dict[str, object]:
        return {
            "family": self.number,
            "client_id": self.client_id,
            "user": self.user,
            "refreshes": self.refreshes,
            "revoked": self.revoked,
            "reused": self.reused,
            "access_token": self.access_token,
            "refresh_token": self.refresh_token,
        }


@dataclass
class Code:
    """An authorization code; it knows its family once it has been redeemed."""

    client_id: str
    redirect_uri: str
    user: str
    scope: str
    expires_at: float
    family: Family | None = None


@dataclass(frozen=True)
class AccessToken:
    family: Family
    expires_at: float


class Grants:
    """Issues, exchanges and revokes; refuses with an OAuthError."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = itertools.count(1)
        self._codes: dict[str, Code] = {}
        self._families: list[Family] = []
        self._access_tokens: dict[str, AccessToken] = {}
        self._refresh_tokens: dict[str, Family] = {}

    def mint_code(self, client_id: str, redirect_uri: str, user: str, scope: str = "", code: str | None = None) -> str:
        """Register a fresh code: the literal one if given, otherwise a random one."""
        code = code if code is not None else f"code-{secrets.token_urlsafe(24)}"
        expires_at = self._clock() + CODE_LIFETIME
        self._codes[code] = Code(client_id, redirect_uri, user, scope, expires_at)
        return code

    def redeem(self, client_id: str, code: str, redirect_uri: str, settings: Settings) -> dict[str, object]:
        """Exchange a code for the first tokens of a new family."""
        known = self._codes.get(code)
        if known is None:
            raise OAuthError("invalid_grant", "no such code")
        if (known.client_id, known.redirect_uri) != (client_id, redirect_uri):
            raise OAuthError("invalid_grant", "the code is bound to another client or redirect URI")
        if known.family is not None:
            known.family.revoked = True
            raise OAuthError("invalid_grant", "the code was used before")
        if self._clock() >= known.expires_at:
            raise OAuthError("invalid_grant", "the code has expired")
        known.family = Family(next(self._numbers), client_id, known.user, known.scope)
        self._families.append(known.family)
        return self._issue(known.family, settings, with_refresh_token=settings.issue_refresh_token)

    def refresh(self, client_id: str, refresh_token: str, settings: Settings) -> dict[str, object]:
        """Exchange a refresh token; one that was already used ends its family."""
        family = self._refresh_tokens.get(refresh_token)
        if family is None or family.client_id != client_id:
            raise OAuthError("invalid_grant", "no such refresh token")
        if refresh_token != family.refresh_token:
            family.reused = family.revoked = True
            raise OAuthError("invalid_grant", "the refresh token was used before")
        if family.revoked:
            raise OAuthError("invalid_grant", "the grant was revoked")
        family.refreshes += 1
        rotate = settings.rotate and settings.issue_refresh_token
        return self._issue(family, settings, with_refresh_token=rotate)

    def revoke(self, client_id: str, token: str) -> None:
        """End the family of a token of either kind; an unknown token is no error (RFC 7009)."""
        family = self._family_of(token)
        if family is None:
            return
        if family.client_id != client_id:
            raise OAuthError("invalid_grant", "the token was issued to another client")
        family.revoked = True

    def user_of(self, access_token: str) -> str:
        """Whose account a live access token opens."""
        token = self._access_tokens.get(access_token)
        if token is None or token.family.revoked or self._clock() >= token.expires_at:
            raise OAuthError("invalid_token", "the access token is unknown, expired or revoked")
        return token.family.user

    def families(self) -> list[dict[str, object]]:
        return [family.as_json() for family in self._families]

    def _family_of(self, token: str) -> Family | None:
        if token in self._access_tokens:
            return self._access_tokens[token].family
        return self._refresh_tokens.get(token)

    def _issue(self, family: Family, settings: Settings, *, with_refresh_token: bool) -> dict[str, object]:
        """Give the family its next tokens, and word them as RFC 6749 section 5.1 does."""
        family.access_token = f"access-{secrets.token_urlsafe(24)}"
        lifetime = UNSTATED_LIFETIME if settings.expires_in is None else settings.expires_in
        self._access_tokens[family.access_token] = AccessToken(family, self._clock() + lifetime)
        answer: dict[str, object] = {"access_token": family.access_token, "token_type": "Bearer"}
        if settings.expires_in is not None:
            answer["expires_in"] = settings.expires_in
        if with_refresh_token:
            family.refresh_token = f"refresh-{secrets.token_urlsafe(24)}"
            self._refresh_tokens[family.refresh_token] = family
            answer["refresh_token"] = family.refresh_token
        if family.scope:
            answer["scope"] = family.scope
        return answer
