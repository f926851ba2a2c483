"""Service tokens: what backends and the bot present on the gRPC port. Imports `models` and below."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from doorward_server.clock import Clock
from doorward_server.crypto import fingerprint, make_secret
from doorward_server.database import Database
from doorward_server.errors import ServiceTokenNotFound, StorageUnavailable
from doorward_server.models import ServiceToken, to_micros

# Told apart from other secrets by people and by scanners of repositories.
_PREFIX = "dwt_"
# A disabled application's tokens are none.
_FIND = """
SELECT service_tokens.id, roles, last_used_at, application_id FROM service_tokens
LEFT JOIN applications ON applications.id = application_id
WHERE token_hash = ? AND (expires_at IS NULL OR expires_at > ?) AND (application_id IS NULL OR enabled)
"""
# The last use is written down at most so often: a write per call would cost more than the call.
_USE_RESOLUTION = timedelta(minutes=1)


class Role(StrEnum):
    """What a token may be used for; the names of doorward.auth.v1.Role."""

    BOT = "bot"
    BACKEND = "backend"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Service:
    """The program that holds a token."""

    token_id: int
    roles: frozenset[str]
    application_id: str | None = None  # of the application that it is


@dataclass(frozen=True)
class ServiceTokens:
    """Owns the table `service_tokens`."""

    database: Database
    clock: Clock

    def create(
        self,
        roles: Iterable[str],
        name: str = "",
        lifetime: timedelta | None = None,
        application_id: str | None = None,
    ) -> tuple[ServiceToken, str]:
        """Make a token; returns it and its value, which is stored nowhere. None: it does not expire, is nobody's."""
        value, now = _PREFIX + make_secret(), self.clock.now()
        with self.database.writing():
            token = ServiceToken.create(
                name=name,
                token_hash=fingerprint(value),
                roles=",".join(sorted(set(roles))),
                created_at=now,
                expires_at=now + lifetime if lifetime else None,
                application=application_id,
            )
        return token, value

    def find(self, value: str) -> Service | None:
        """The live token with this value."""
        now = self.clock.now()
        row = self.database.fetch_one(_FIND, (fingerprint(value), to_micros(now)))
        if row is None:
            return None
        token_id, roles, last_used_at, application_id = row
        if last_used_at is None or last_used_at <= to_micros(now - _USE_RESOLUTION):
            with contextlib.suppress(StorageUnavailable), self.database.writing():
                ServiceToken.update(last_used_at=now).where(ServiceToken.id == token_id).execute()
        return Service(token_id, frozenset(filter(None, roles.split(","))), application_id)

    def list(self) -> list[ServiceToken]:
        """Every token that was not revoked, expired ones too."""
        return self.database.fetch_all(ServiceToken.select().order_by(ServiceToken.id))

    def revoke(self, token_id: int) -> None:
        """End a token; raises ServiceTokenNotFound."""
        with self.database.writing():
            if not ServiceToken.delete().where(ServiceToken.id == token_id).execute():
                raise ServiceTokenNotFound
