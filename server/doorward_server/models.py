"""The tables. The schema itself is made by `migrations/`. Imports only `database`.

Times are stored as microseconds since 1970-01-01 UTC, which sort and compare alike on every
engine; in Python they are aware datetimes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

import peewee

from doorward_server.database import Database

if TYPE_CHECKING:
    _BigInteger = peewee.BigIntegerField[Any]
else:
    _BigInteger = peewee.BigIntegerField  # generic in its stubs only

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(time: datetime) -> int:
    """The stored form of a time."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """The time that `to_micros` stored."""
    return _EPOCH + timedelta(microseconds=micros)


class TimeField(_BigInteger):
    """An aware datetime, stored as microseconds."""

    def db_value(self, value: datetime | None) -> int | None:
        return None if value is None else to_micros(value)

    def python_value(self, value: int | None) -> datetime | None:
        return None if value is None else from_micros(value)


class JsonField(peewee.TextField):
    """Any JSON value."""

    def db_value(self, value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    def python_value(self, value: str) -> Any:
        return json.loads(value)


class Record(peewee.Model):
    """A row that hot paths read by a constant statement: building a query takes longer than running it."""

    @classmethod
    def select_sql(cls, rest: str) -> str:
        """A statement for all columns, in the order that `from_row` asks for."""
        return f"SELECT {cls.columns_sql()} FROM {cls._meta.table_name} {rest}"  # noqa: S608 - constants only

    @classmethod
    def columns_sql(cls) -> str:
        """All columns, in the order that `from_row` asks for."""
        return ", ".join(field.column_name for field in cls._meta.sorted_fields)

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Self:
        """The model of such a row."""
        record = cls()
        fields = zip(cls._meta.sorted_fields, row, strict=True)
        record.__data__ = {field.name: field.python_value(value) for field, value in fields}
        return record


class ApiClient(peewee.Model):
    """Whoever keeps users here over REST."""

    id = peewee.TextField(primary_key=True)
    name = peewee.TextField()
    created_at = TimeField()
    disabled_at = TimeField(null=True)

    class Meta:
        table_name = "api_clients"


class ClientSecret(peewee.Model):
    """A secret of an API client's, stored as its fingerprint; two are valid while one replaces the other."""

    id = peewee.AutoField()
    client = peewee.ForeignKeyField(ApiClient)
    secret_hash = peewee.BlobField()
    created_at = TimeField()
    expires_at = TimeField(null=True)  # set when it is replaced

    class Meta:
        table_name = "client_secrets"


class User(Record):
    id = peewee.AutoField()
    slug = peewee.TextField()
    name = peewee.TextField()
    email = peewee.TextField(null=True)
    email_key = peewee.TextField(null=True)  # the same whatever the case of the address
    client = peewee.ForeignKeyField(ApiClient, null=True)  # unset: the operator's own
    client_id: str | None
    role = peewee.TextField(default="")
    license_active = peewee.BooleanField(default=False)
    license_ends_at = TimeField(null=True)
    subscription_active = peewee.BooleanField(default=False)
    subscription_ends_at = TimeField(null=True)
    stats_games_completed = peewee.IntegerField(default=0)
    stats_play_time = peewee.FloatField(default=0.0)  # seconds
    stats_concepts = JsonField(default=dict)
    created_at = TimeField()

    class Meta:
        table_name = "users"


class OAuthIdentity(Record):
    """An account at a provider; the pair of provider and subject is one user's."""

    id = peewee.AutoField()
    user = peewee.ForeignKeyField(User)
    user_id: int
    provider = peewee.TextField()
    subject = peewee.TextField()
    created_at = TimeField()

    class Meta:
        table_name = "oauth_identities"


# The user who has an identity: by its provider and subject.
USER_OF_IDENTITY = User.select_sql(
    "WHERE id = (SELECT user_id FROM oauth_identities WHERE provider = ? AND subject = ?)"
)


class StoredProvider(peewee.Model):
    """A provider that was added by command; those of the settings file are not here."""

    id = peewee.AutoField()
    provider = peewee.TextField()  # its id
    settings = JsonField()  # without the secret
    client_secret = peewee.BlobField(null=True)  # sealed
    created_at = TimeField()

    class Meta:
        table_name = "providers"


class Session(peewee.Model):
    """A browser's log-in; the cookie's value is stored as its fingerprint."""

    id = peewee.AutoField()
    user = peewee.ForeignKeyField(User)
    token_hash = peewee.BlobField()
    created_at = TimeField()
    expires_at = TimeField()

    class Meta:
        table_name = "sessions"


class Application(peewee.Model):
    """Whoever asks for users' keys, registered with the operator."""

    id = peewee.TextField(primary_key=True)
    name = peewee.TextField()
    name_key = peewee.TextField()  # the same for names that look alike
    callback_prefixes = JsonField()  # a list of URLs
    callback_format = peewee.TextField()  # "form" or "json"
    enabled = peewee.BooleanField()
    created_at = TimeField()

    class Meta:
        table_name = "applications"


class ServiceToken(peewee.Model):
    """A program's credential on the gRPC port; stored as its fingerprint."""

    id = peewee.AutoField()
    name = peewee.TextField()
    token_hash = peewee.BlobField()
    roles = peewee.TextField()  # separated by commas
    created_at = TimeField()
    expires_at = TimeField(null=True)
    last_used_at = TimeField(null=True)
    application = peewee.ForeignKeyField(Application, null=True)  # whose it is, if it is an application's
    application_id: str | None

    class Meta:
        table_name = "service_tokens"


class Connection(Record):
    """A user's tokens at a provider, and the lease under which they are refreshed.

    Whoever refreshes holds the lease of the current `lease_epoch`. A new pair is stored only in place of
    the one that it follows, and passes the epoch on: a refresher that comes late cannot overwrite a newer
    pair, nor end another's lease.
    """

    id = peewee.AutoField()
    user = peewee.ForeignKeyField(User)
    user_id: int
    provider = peewee.TextField()
    access_token = peewee.BlobField()  # sealed
    refresh_token = peewee.BlobField(null=True)  # sealed
    expires_at = TimeField(null=True)  # unset: the provider does not say
    obtained_at = TimeField()
    needs_reauth = peewee.BooleanField()
    lease_epoch = peewee.IntegerField()
    lease_expires_at = TimeField(null=True)
    lease_failure = peewee.TextField(null=True)  # how the last refresh ended, for those who waited for it
    refresh_at = TimeField(null=True)  # when to refresh it unasked; unset: never
    created_at = TimeField()

    class Meta:
        table_name = "connections"


class CodeClaim(peewee.Model):
    """An authorization code that is being, or has been, exchanged; so that none is sent twice."""

    id = peewee.AutoField()
    provider = peewee.TextField()
    code_hash = peewee.BlobField()
    user = peewee.ForeignKeyField(User)
    outcome = peewee.TextField(null=True)  # "connected", the reason of the error, or unset while under way
    oauth_error = peewee.TextField(null=True)
    created_at = TimeField()

    class Meta:
        table_name = "code_claims"


class Job(Record):
    """Work to be done at least once. A claim moves `run_at` to the end of its lease."""

    id = peewee.AutoField()
    kind = peewee.TextField()
    payload = peewee.BlobField()  # sealed JSON
    run_at = TimeField(null=True)  # unset: abandoned
    attempts = peewee.IntegerField()
    failures = peewee.IntegerField(default=0)  # since the last attempt that went as it should
    last_error = peewee.TextField(null=True)
    abandoned_at = TimeField(null=True)
    created_at = TimeField()

    class Meta:
        table_name = "jobs"


class ApplicationSecret(peewee.Model):
    """A credential of an application's, stored as its fingerprint; two are valid while one replaces the other."""

    id = peewee.AutoField()
    application = peewee.ForeignKeyField(Application)
    secret_hash = peewee.BlobField()
    created_at = TimeField()
    expires_at = TimeField(null=True)

    class Meta:
        table_name = "application_secrets"


class SigningSecret(peewee.Model):
    """What callbacks to an application are signed with; two are in use while one replaces the other."""

    id = peewee.AutoField()
    application = peewee.ForeignKeyField(Application)
    secret = peewee.BlobField()  # sealed
    created_at = TimeField()
    expires_at = TimeField(null=True)

    class Meta:
        table_name = "signing_secrets"


class ApiKey(peewee.Model):
    """A user's own key at some service."""

    id = peewee.AutoField()
    user = peewee.ForeignKeyField(User)
    user_id: int
    service = peewee.TextField()
    label = peewee.TextField()
    value = peewee.BlobField()  # sealed
    account = peewee.TextField(null=True)  # what the service calls its owner, if a validator knows
    permissions = JsonField()  # a list of texts
    created_at = TimeField()

    class Meta:
        table_name = "api_keys"


class ConsentRequest(peewee.Model):
    """An application's question for a user's keys.

    Requests of one callback that are open together share one prompt: `prompt_id` is the id of the first.
    """

    id = peewee.AutoField()
    prompt_id = peewee.IntegerField(null=True)
    discord_user = peewee.TextField()
    application = peewee.ForeignKeyField(Application, null=True)  # unset: a stranger, known by its callback
    application_id: str | None
    name = peewee.TextField()
    callback = peewee.TextField()
    state = peewee.BlobField()  # UTF-8; it may hold a NUL, which not every engine takes as text
    address = peewee.TextField()  # where it came from
    status = peewee.TextField()
    lease_epoch = peewee.IntegerField()
    lease_expires_at = TimeField()
    message = peewee.TextField(null=True)  # where the bot put the prompt
    message_closed_at = TimeField(null=True)  # since when that shows the outcome
    deadline_at = TimeField()
    created_at = TimeField()
    finished_at = TimeField(null=True)

    class Meta:
        table_name = "consent_requests"


class Grant(peewee.Model):
    """That a user shares keys with whoever made a request."""

    id = peewee.AutoField()
    request = peewee.ForeignKeyField(ConsentRequest)
    request_id: int
    user = peewee.ForeignKeyField(User)
    user_id: int
    created_at = TimeField()
    revoked_at = TimeField(null=True)

    class Meta:
        table_name = "grants"


class GrantKey(peewee.Model):
    """A key of a grant, in the order of the user's choice."""

    id = peewee.AutoField()
    grant = peewee.ForeignKeyField(Grant)
    key = peewee.ForeignKeyField(ApiKey)
    key_id: int
    position = peewee.IntegerField()

    class Meta:
        table_name = "grant_keys"


class ApplicationBlock(peewee.Model):
    """That a user wants no questions of an application: `application:ID`, or `callback:URL` for a stranger."""

    id = peewee.AutoField()
    user = peewee.ForeignKeyField(User)
    application = peewee.TextField()
    created_at = TimeField()

    class Meta:
        table_name = "application_blocks"


class Delivery(peewee.Model):
    """The outcome of a request, on its way to the callback."""

    id = peewee.AutoField()
    request = peewee.ForeignKeyField(ConsentRequest)
    request_id: int
    webhook_id = peewee.TextField()  # the same in every attempt
    error = peewee.TextField(null=True)  # unset: keys
    status = peewee.TextField()  # queued, sent or abandoned
    carried_keys = peewee.BooleanField()  # an attempt with keys was made
    begun = peewee.IntegerField(default=0)  # counts attempts from their beginning, and fences off earlier ones
    under_way = peewee.BooleanField(default=False)  # one has begun, and it is not on record how it went
    attempts = peewee.IntegerField()
    next_attempt_at = TimeField(null=True)
    created_at = TimeField()
    finished_at = TimeField(null=True)

    class Meta:
        table_name = "deliveries"


class DeliveryAttempt(peewee.Model):
    """One POST to a callback: its status, or why there was none."""

    id = peewee.AutoField()
    delivery = peewee.ForeignKeyField(Delivery)
    started_at = TimeField()
    milliseconds = peewee.IntegerField()
    status = peewee.IntegerField(null=True)
    error = peewee.TextField(null=True)

    class Meta:
        table_name = "delivery_attempts"


class AuditEvent(peewee.Model):
    """What somebody did, chained to the event before by its hash."""

    id = peewee.AutoField()
    at = TimeField()
    actor = peewee.TextField()
    action = peewee.TextField()
    subject = peewee.TextField()
    details = JsonField()
    hash = peewee.BlobField()

    class Meta:
        table_name = "audit_events"


class MasterKeyUse(peewee.Model):
    """The id of a master key that values in this database are sealed with."""

    key_id = peewee.TextField(primary_key=True)
    first_used_at = TimeField()

    class Meta:
        table_name = "master_keys"


_MODELS = (
    ApiClient,
    ClientSecret,
    User,
    OAuthIdentity,
    StoredProvider,
    Session,
    ServiceToken,
    Connection,
    CodeClaim,
    Job,
    Application,
    ApplicationSecret,
    SigningSecret,
    ApiKey,
    ConsentRequest,
    Grant,
    GrantKey,
    ApplicationBlock,
    Delivery,
    DeliveryAttempt,
    AuditEvent,
    MasterKeyUse,
)


def bind(database: Database) -> None:
    """Point the models at a database: the process's one."""
    database.engine.bind(_MODELS)
