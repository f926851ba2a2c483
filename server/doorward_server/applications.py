"""Applications: who is registered to ask for users' keys. Imports `audit`, `crypto`, `models` and below."""

import base64
import contextlib
import hmac
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import peewee

from doorward_server.audit import Audit
from doorward_server.callbacks import Callback, InvalidCallback, clean_name, name_key
from doorward_server.clock import Clock
from doorward_server.crypto import KeyRing, Place, fingerprint, make_secret
from doorward_server.database import Database
from doorward_server.errors import ApplicationNotFound, CallbackRejected, OperatorError
from doorward_server.models import Application, ApplicationSecret, SigningSecret, to_micros
from doorward_server.rotation import retire

# Told apart from other secrets by people and by scanners of repositories.
_ID_PREFIX, _SECRET_PREFIX = "app_", "das_"
# As Standard Webhooks writes a symmetric secret (spec/standard-webhooks.md, "Signature scheme").
_SIGNING_PREFIX, _SIGNING_BYTES = "whsec_", 32
_LONGEST_NAME = 100
_LONGEST_PREFIX = 2048
_OPERATOR = "operator"
# Looked up by the secret: an unknown id and a wrong secret are the same miss, which takes the same time.
_FIND = """
SELECT application_secrets.application_id FROM application_secrets
JOIN applications ON applications.id = application_secrets.application_id
WHERE secret_hash = ? AND (expires_at IS NULL OR expires_at > ?) AND enabled
"""
_PREFIXES = "SELECT id, callback_prefixes FROM applications"
_KNOWN_NAME = "SELECT 1 FROM applications WHERE name_key = ?"
_SIGNING = """
SELECT id, secret FROM signing_secrets WHERE application_id = ? AND (expires_at IS NULL OR expires_at > ?)
ORDER BY id DESC
"""

# What callbacks carry: an HTML form, or JSON.
CallbackFormat = Literal["form", "json"]


class NewApplication(NamedTuple):
    """An application and its secrets, which are not told again."""

    application: Application
    secret: str
    signing_secret: str


class Registered(NamedTuple):
    """The registered application that calls."""

    application_id: str


@dataclass(frozen=True)
class Applications:
    """Owns the tables `applications`, `application_secrets` and `signing_secrets`.

    No two applications have names that look alike, or prefixes that overlap.
    """

    database: Database
    clock: Clock
    keys: KeyRing
    audit: Audit

    def create(self, name: str, prefixes: Sequence[str], callback_format: CallbackFormat = "form") -> NewApplication:
        """Add an application. Raises OperatorError when the name or a prefix is not valid or taken."""
        name, kept = _checked_name(name), _checked_prefixes(prefixes)
        application_id = _ID_PREFIX + secrets.token_hex(8)
        with _unique_name(), self.database.writing():
            self._check_free(application_id, kept)
            application = Application.create(
                id=application_id,
                name=name,
                name_key=name_key(name),
                callback_prefixes=kept,
                callback_format=callback_format,
                enabled=True,
                created_at=self.clock.now(),
            )
            made = NewApplication(application, self._add_secret(application_id), self._add_signing(application_id))
            self._record("created", application_id, name=name, callback_prefixes=kept, callback_format=callback_format)
        return made

    def find(self, application_id: str, secret: str) -> Registered | None:
        """The enabled application with this id and secret. On the path of every call of an application's."""
        row = self.database.fetch_one(_FIND, (fingerprint(secret), to_micros(self.clock.now())))
        if row is None or not hmac.compare_digest(row[0].encode(), application_id.encode("utf-8", "surrogatepass")):
            return None
        return Registered(row[0])

    def get(self, application_id: str) -> Application:
        """Raises ApplicationNotFound."""
        for application in self.database.fetch_all(Application.select().where(Application.id == application_id)):
            return application  # type: ignore[no-any-return]
        raise ApplicationNotFound

    def signing_secrets(self, application_id: str) -> list[str]:
        """What callbacks to an application are signed with, the newest first."""
        rows = self.database.fetch_rows(_SIGNING, (application_id, to_micros(self.clock.now())))
        return [self.keys.open(sealed, _place(row_id)) for row_id, sealed in rows]

    def list(self) -> list[Application]:
        """All of them, disabled ones too."""
        return self.database.fetch_all(Application.select().order_by(Application.created_at, Application.id))

    def change(
        self,
        application_id: str,
        name: str | None = None,
        prefixes: Sequence[str] | None = None,
        callback_format: CallbackFormat | None = None,
    ) -> Application:
        """Change what is given. Raises ApplicationNotFound, and OperatorError as `create`."""
        changes: dict[str, Any] = {}
        if name is not None:
            changes["name"] = _checked_name(name)
        if prefixes is not None:
            changes["callback_prefixes"] = _checked_prefixes(prefixes)
        if callback_format is not None:
            changes["callback_format"] = callback_format
        with _unique_name(), self.database.writing():
            application = self.get(application_id)
            self._check_free(application_id, changes.get("callback_prefixes", ()))
            changes = {field: value for field, value in changes.items() if getattr(application, field) != value}
            if changes:
                for field, value in changes.items():
                    setattr(application, field, value)
                application.name_key = name_key(application.name)
                application.save()
                self._record("changed", application_id, **changes)
        return application

    def enable(self, application_id: str, *, enabled: bool) -> None:
        """Let an application ask again, or refuse it from now on. Raises ApplicationNotFound."""
        with self.database.writing():
            if self.get(application_id).enabled != enabled:
                Application.update(enabled=enabled).where(Application.id == application_id).execute()
                self._record("enabled" if enabled else "disabled", application_id)

    def rotate(self, application_id: str, overlap: timedelta) -> str:
        """Add a secret; the one before is valid for `overlap` more, any older one ends now."""
        with self.database.writing():
            self.get(application_id)
            secret = self._add_secret(application_id)
            ends_at = retire(
                ApplicationSecret, ApplicationSecret.application == application_id, overlap, self.clock.now()
            )
            self._record("rotated", application_id, previous_ends=ends_at.isoformat())
        return secret

    def rotate_signing(self, application_id: str, overlap: timedelta) -> str:
        """Add a signing secret; callbacks are signed with the one before, too, for `overlap` more."""
        with self.database.writing():
            self.get(application_id)
            secret = self._add_signing(application_id)
            ends_at = retire(SigningSecret, SigningSecret.application == application_id, overlap, self.clock.now())
            self._record("signing_rotated", application_id, previous_ends=ends_at.isoformat())
        return secret

    def owner_of(self, callback: Callback) -> Application | None:
        """The application, enabled or not, whose prefix covers a callback.

        Raises CallbackRejected when some servers would take it for one under a prefix, and others would not.
        """
        for application_id, text in self.database.fetch_rows(_PREFIXES, ()):
            for prefix in _parsed(text):
                if callback.is_covered_by(prefix):
                    with contextlib.suppress(ApplicationNotFound):  # gone meanwhile
                        return self.get(application_id)
                elif callback.may_be_under(prefix):
                    raise CallbackRejected
        return None

    def is_known_name(self, name: str) -> bool:
        """Whether an application, enabled or not, has a name that looks like this one."""
        return self.database.fetch_one(_KNOWN_NAME, (name_key(name),)) is not None

    def _check_free(self, application_id: str, prefixes: Sequence[str]) -> None:
        """Raise OperatorError when another application's prefix overlaps; inside the transaction that adds these."""
        ours = [Callback.parse_prefix(prefix) for prefix in prefixes]
        for other in Application.select().where(Application.id != application_id):
            for theirs in map(Callback.parse_prefix, other.callback_prefixes):
                for prefix in ours:
                    if prefix.overlaps(theirs):
                        raise OperatorError(
                            f"{prefix.url} overlaps {theirs.url}, a prefix of the application {other.id}: "
                            "choose another, or change that one"
                        )

    def _add_secret(self, application_id: str) -> str:
        secret = _SECRET_PREFIX + make_secret()
        ApplicationSecret.create(
            application=application_id, secret_hash=fingerprint(secret), created_at=self.clock.now()
        )
        return secret

    def _add_signing(self, application_id: str) -> str:
        secret = _SIGNING_PREFIX + base64.b64encode(secrets.token_bytes(_SIGNING_BYTES)).decode()
        row = SigningSecret.create(application=application_id, secret=b"", created_at=self.clock.now())
        # It is sealed for its row, whose id is known only now.
        sealed = self.keys.seal(secret, _place(row.id))
        SigningSecret.update(secret=sealed).where(SigningSecret.id == row.id).execute()
        return secret

    def _record(self, event: str, application_id: str, **details: Any) -> None:
        self.audit.record(_OPERATOR, f"application.{event}", f"application:{application_id}", **details)


@contextlib.contextmanager
def _unique_name() -> Iterator[None]:
    """Of all that a statement could violate, only the name's index is not judged beforehand."""
    try:
        yield
    except peewee.IntegrityError:
        raise OperatorError(
            "another application has a name that looks the same: choose another, or change that one"
        ) from None


def _checked_name(name: str) -> str:
    cleaned = clean_name(name)
    if not 0 < len(cleaned) <= _LONGEST_NAME or not name_key(cleaned):
        raise OperatorError(f"the name has to be 1 to {_LONGEST_NAME} characters that can be seen, not all blank")
    return cleaned


def _checked_prefixes(prefixes: Sequence[str]) -> Sequence[str]:
    """The prefixes, each once, in the order given."""
    if not prefixes:
        raise OperatorError("an application needs at least one callback prefix")
    for prefix in prefixes:
        try:
            Callback.parse_prefix(prefix)
        except InvalidCallback as error:
            raise OperatorError(f'the callback prefix "{clean_name(prefix)}" is not valid: {error}') from None
        if len(prefix) > _LONGEST_PREFIX:
            raise OperatorError(f"a callback prefix has at most {_LONGEST_PREFIX} characters")
    return [*dict.fromkeys(prefixes)]


@lru_cache(maxsize=1024)
def _parsed(prefixes: str) -> tuple[Callback, ...]:
    """The prefixes of a row. The stored text is the cache's key, so a change is seen at once."""
    return tuple(Callback.parse_prefix(prefix) for prefix in json.loads(prefixes))


def _place(row_id: int) -> Place:
    return Place("signing_secrets", row_id, "secret")
