"""API keys: users' own keys at other services, kept sealed.

Imports `key_validators`, `audit`, `crypto`, `models` and below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import peewee

from doorward_server.audit import Audit
from doorward_server.clock import Clock
from doorward_server.crypto import KeyRing, Place
from doorward_server.database import Database
from doorward_server.errors import (
    InvalidKey,
    InvalidLabel,
    InvalidService,
    KeyExists,
    KeyNotFound,
    TooManyKeys,
    UserNotFound,
)
from doorward_server.key_validators import KeyValidators
from doorward_server.models import ApiKey, User
from doorward_server.validators import is_service

_VALUE = "SELECT id, value FROM api_keys WHERE id = ?"
_MOST_KEYS, _MOST_IN_ALL = 15, 200
_LONGEST_LABEL = 80
_LONGEST_VALUE = 4096
_SHOWN = 4


class ListedKey(NamedTuple):
    """A key as its owner may see it: the row, and the end of the value."""

    key: ApiKey
    last_four: str


@dataclass(frozen=True)
class ApiKeys:
    """Owns the table `api_keys`. `actor` is who acts, for the audit trail."""

    database: Database
    clock: Clock
    keys: KeyRing
    validators: KeyValidators
    audit: Audit

    def add(self, user: User, service: str, label: str, value: str, *, actor: str) -> ApiKey:
        """Keep a key of a user's, once the service, if it has a validator, knows it.

        Raises InvalidService, InvalidLabel, InvalidKey, KeyExists, TooManyKeys, UserNotFound, and what
        `KeyValidators.check` raises.
        """
        _check_form(service, label, value)
        self._check_new(user, service, value)  # before the service is asked
        facts = self.validators.check(service, value)
        with self.database.writing():
            self._check_new(user, service, value)
            try:
                key = ApiKey.create(
                    user=user.id,
                    service=service,
                    label=label,
                    value=b"",
                    account=facts.account if facts else None,
                    permissions=facts.permissions if facts else [],
                    created_at=self.clock.now(),
                )
            except peewee.IntegrityError:
                raise UserNotFound from None
            key.value = self.keys.seal(value, _value_of(key.id))
            ApiKey.update(value=key.value).where(ApiKey.id == key.id).execute()
            self._record(key, actor, "key.added")
        return key

    def adopt(self, user_id: int, by: int) -> None:
        """Pass a user's keys to another user, inside the caller's transaction; be they more than one may add."""
        ApiKey.update(user=by).where(ApiKey.user == user_id).execute()

    def remove(self, user: User, key_id: int, *, actor: str) -> None:
        """Forget a key, with its place in all grants. Raises KeyNotFound."""
        with self.database.writing():
            key = ApiKey.get_or_none((ApiKey.id == key_id) & (ApiKey.user == user.id))
            if key is None:
                raise KeyNotFound
            ApiKey.delete().where(ApiKey.id == key_id).execute()
            self._record(key, actor, "key.removed")

    def values(self, key_ids: Sequence[int]) -> dict[int, str]:
        """Those keys that still exist, by id in the order asked, and their values; inside the caller's transaction."""
        rows = [self.database.execute(_VALUE, (key_id,)) for key_id in key_ids]
        return {row[0]: self.keys.open(row[1], _value_of(row[0])) for row in rows if row is not None}

    def list(self, user: User, service: str | None = None) -> list[ListedKey]:
        """A user's keys, in the order in which they were added."""
        return [self.listed(key) for key in self._of(user, service)]

    def listed(self, key: ApiKey) -> ListedKey:
        """A key as its owner may see it."""
        return ListedKey(key, _end(self._open(key)))

    def _of(self, user: User, service: str | None) -> Sequence[ApiKey]:
        query = ApiKey.select().where(ApiKey.user == user.id)
        if service is not None:
            query = query.where(ApiKey.service == service)
        return self.database.fetch_all(query.order_by(ApiKey.id))

    def _check_new(self, user: User, service: str, value: str) -> None:
        """Raise KeyExists or TooManyKeys. There is no hash to look for: one would let short keys be guessed."""
        rows = self._of(user, service)
        if any(self._open(row) == value for row in rows):
            raise KeyExists
        if len(rows) >= _MOST_KEYS or len(self._of(user, None)) >= _MOST_IN_ALL:
            raise TooManyKeys

    def _open(self, key: ApiKey) -> str:
        return self.keys.open(key.value, _value_of(key.id))

    def _record(self, key: ApiKey, actor: str, action: str) -> None:
        details = {"key_id": key.id, "service": key.service, "label": key.label}
        self.audit.record(actor, action, f"user:{key.user_id}", **details)


def _check_form(service: str, label: str, value: str) -> None:
    if not is_service(service):
        raise InvalidService
    if not label.strip() or len(label) > _LONGEST_LABEL or not label.isprintable():
        raise InvalidLabel
    # Of all blanks, Python takes but the space for printable.
    if not 0 < len(value) <= _LONGEST_VALUE or not value.isprintable() or " " in value:
        raise InvalidKey


def _end(value: str) -> str:
    """The last four characters, of a short value fewer: never more than half of it is shown."""
    return value[len(value) - min(_SHOWN, len(value) // 2) :]


def _value_of(row_id: int) -> Place:
    return Place("api_keys", row_id, "value")
