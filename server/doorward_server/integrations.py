"""Integration: users' connections to the kai services, and the tokens behind them.

Owns the tables `connections` and `code_claims`. Imports `oauth`, `jobs`, `users`, `audit`, `models` and below.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import peewee

from doorward_server.audit import AccessReads, Audit
from doorward_server.breaker import Breakers
from doorward_server.clock import Clock
from doorward_server.crypto import OWN_FROM, CannotOpen, KeyRing, Place, fingerprint, own_part
from doorward_server.database import Database, storage_failures
from doorward_server.errors import (
    Busy,
    CallError,
    CodeAlreadyUsed,
    CodeRejected,
    CodeRequired,
    DoorwardError,
    GrantRefused,
    InvalidMinTtl,
    NeedsReauth,
    NoConnection,
    NotConnected,
    ProviderMalformed,
    ProviderNotConfigured,
    ProviderTimeout,
    ProviderUnavailable,
    RefreshRejected,
    StorageUnavailable,
    UnknownKaiType,
    UserNotFound,
)
from doorward_server.jobs import Abandon, Jobs, Payload
from doorward_server.logs import Log
from doorward_server.metrics import Metrics
from doorward_server.models import CodeClaim, Connection, User, to_micros
from doorward_server.oauth import OAuth, TokenPair
from doorward_server.outbound import Bulkhead, ConnectTimeout, NotConnectable
from doorward_server.provider_registry import ProviderRegistry
from doorward_server.providers import KAI_TYPES, Provider
from doorward_server.upkeep import Sweep
from doorward_server.users import Users

REVOCATION = "revoke-token"
DEFAULT_MIN_TTL = 10
_LARGEST_MIN_TTL = 86400
_COUNT = "SELECT provider, needs_reauth, count(*) FROM connections GROUP BY provider, needs_reauth"
# Answered by the index alone.
_STATUS = "SELECT needs_reauth FROM connections INDEXED BY connections_status WHERE user_id = ? AND provider = ?"
# What those who waited for a refresh are told when it failed.
_REFRESH_FAILURES: Mapping[str, type[CallError]] = {
    error.reason: error for error in (Busy, ProviderMalformed, ProviderTimeout, ProviderUnavailable, RefreshRejected)
}
# Codes that no provider will take any more.
OLD_CLAIMS = Sweep("code_claims", "created_at <= ?", (timedelta(days=7),))
_NEXT_DUE = "SELECT id FROM connections WHERE provider = ? AND refresh_at <= ? ORDER BY refresh_at LIMIT 1"
_CLAIM_DUE = f"""
UPDATE connections SET refresh_at = ?
WHERE id IN (
    WITH due AS MATERIALIZED (
        SELECT id FROM connections WHERE provider = ? AND refresh_at <= ? ORDER BY refresh_at LIMIT ?
        FOR UPDATE SKIP LOCKED
    ) SELECT id FROM due
) RETURNING {Connection.columns_sql()}
"""  # noqa: S608 - constants only
# The claim of a connection that has a new pair meanwhile, or was claimed anew, has no say any more.
_PUT_OFF = "UPDATE connections SET refresh_at = ? WHERE id = ? AND refresh_at = ?"
# The longest pause after a failure of the provider's, and after a refusal, which is likely to stay.
_LONGEST_PAUSE, _LONGEST_REFUSED_PAUSE = timedelta(minutes=1), timedelta(hours=6)
_CONNECTED = "connected"
# A connection that cannot be refreshed is called expiring for so long.
_SOON = timedelta(days=1)
# How long a failing disk, or a database that restarts, is given to take a pair that was just obtained: with the
# provider's own time, still less than the gateway waits.
_STORING_SECONDS = 8.0


@dataclass(frozen=True)
class AccessToken:
    """A token to hand out; `expires_at` is None when the provider does not say."""

    value: str = field(repr=False)
    expires_at: datetime | None


class Status(StrEnum):
    """Where a connection stands, as an operator sees it."""

    CONNECTED = "connected"  # the token is valid, or the refresh token gets another one
    EXPIRING = "expiring"  # within a day, and there is no refresh token
    EXPIRED = "expired"  # and there is no refresh token
    NEEDS_REAUTH = "needs_reauth"  # the user has to connect again


class ListedConnection(NamedTuple):
    """A connection as an operator sees it; `reason` is why it is not in order, or why the last refresh failed."""

    id: int
    user_id: int
    slug: str
    provider: str
    status: str
    reason: str | None
    expires_at: datetime | None
    obtained_at: datetime
    created_at: datetime


@dataclass(frozen=True)
class Ahead:
    """When a pair is refreshed unasked: so long before it runs out, and up to `jitter` more."""

    seconds: float
    jitter: float
    lease: timedelta

    @property
    def longest(self) -> timedelta:
        return timedelta(seconds=self.seconds + self.jitter)

    def due_at(self, obtained_at: datetime, expires_at: datetime, luck: float) -> datetime | None:
        """Never in the first half of its life. None for a life of less than two leases: it would be refreshed
        again and again, perhaps with nobody to use it. `luck`, from 0 to 1, is the part of the jitter.
        """
        life = expires_at - obtained_at
        if life < 2 * self.lease:
            return None
        return expires_at - min(timedelta(seconds=self.seconds + luck * self.jitter), life / 2)

    @property
    def claim(self) -> timedelta:
        """How long a claim of what is due counts: longer than a refresh takes."""
        return 2 * self.lease

    def pause(self, waited: timedelta, longest: timedelta, luck: float) -> timedelta:
        """How long to wait after a failure: as long again as the pair has been due, so the pauses double."""
        return min(max(waited, self.claim), longest) * (1 + luck / 4)


@dataclass(frozen=True)
class Integrations:
    """Connects, tells, refreshes and revokes."""

    database: Database
    clock: Clock
    keys: KeyRing
    oauth: OAuth
    bulkhead: Bulkhead
    jobs: Jobs
    users: Users
    providers: ProviderRegistry
    audit: Audit
    reads: AccessReads
    breakers: Breakers
    ahead: Ahead
    lease: timedelta
    log: Log
    metrics: Metrics

    def status(self, user_id: int, kai_type: str) -> bool:
        """Whether the user is connected, by tokens that the provider has not refused."""
        row = self.database.fetch_one(_STATUS, (user_id, _kai_id(kai_type)))
        return row is not None and not row[0]

    def revoke(self, user_id: int, kai_type: str) -> None:
        """End a connection, and queue its revocation at the provider. Raises NotConnected."""
        provider_id = _kai_id(kai_type)
        with self.database.writing():
            connection = _find(user_id, provider_id)
            if connection is None:
                raise NotConnected
            Connection.delete().where(Connection.id == connection.id).execute()
            self._revoked(connection, _actor(user_id))

    def connections(self, user_id: int) -> list[Connection]:
        """A user's connections, those that need a new authorization too."""
        return self.database.fetch_all(Connection.select().where(Connection.user == user_id).order_by(Connection.id))

    def latest(
        self,
        most: int,
        *,
        user_id: int | None = None,
        provider: str | None = None,
        status: Status | None = None,
        before: int | None = None,
    ) -> list[ListedConnection]:
        """The latest first, without the tokens: all, or those of a user, at a provider, that stand so, below an id."""
        status_of, reason_of = _judged(self.clock.now())
        query = (
            Connection.select(
                Connection.id,
                Connection.user,
                User.slug,
                Connection.provider,
                status_of,
                reason_of,
                Connection.expires_at,
                Connection.obtained_at,
                Connection.created_at,
            )
            .join(User)
            .order_by(Connection.id.desc())
            .limit(most)
        )
        if user_id is not None:
            query = query.where(Connection.user == user_id)
        if provider is not None:
            query = query.where(Connection.provider == provider)
        if status is not None:
            query = query.where(status_of == status)
        if before is not None:
            query = query.where(Connection.id < before)
        return [ListedConnection(*row) for row in self.database.fetch_all(query.tuples())]

    def count_by_provider(self) -> list[tuple[str, bool, int]]:
        """A provider, whether users have to connect again, and how many. Reads an index over all connections."""
        return [(provider, bool(needs), count) for provider, needs, count in self.database.fetch_rows(_COUNT, ())]

    def can_be_opened(self, most: int) -> list[bool]:
        """Whether each of the latest connections can be opened with the keys at hand."""
        query = Connection.select().order_by(Connection.id.desc()).limit(most)
        return [self._can_open(connection) for connection in self.database.fetch_all(query)]

    def queue_revocations(self, user_id: int, actor: str) -> None:
        """Queue the revocation of all the tokens of a user whom the actor deletes, inside the caller's transaction."""
        for connection in self.connections(user_id):
            self._revoked(connection, actor)

    @storage_failures()
    def connect(self, user_id: int, kai_type: str, code: str) -> None:
        """Exchange a code and store the tokens, replacing earlier ones. See ConnectKai for the errors."""
        provider_id = _kai_id(kai_type)
        if not code:
            raise CodeRequired
        provider = self._kai_provider(provider_id)
        claim = self._claim_code(provider_id, user_id, code)
        if claim is None:
            self._await_exchange(provider, user_id, code)
            return
        pair = self._exchange(provider, claim, code)

        def store() -> None:
            connection_id = self._store_connection(user_id, provider_id, pair)
            subject = f"connection:{connection_id}"
            self.audit.record(_actor(user_id), "connection.connected", subject, user=user_id, provider=provider_id)
            CodeClaim.update(outcome=_CONNECTED).where(CodeClaim.id == claim.id).execute()

        try:
            self._insist(store)
        except peewee.IntegrityError:
            # Deleted meanwhile: what the provider gave us now must not live on.
            with self.database.writing():
                self._queue_revocation(provider_id, pair)
            raise UserNotFound from None

    @storage_failures()
    def access_token(
        self, handle: str, provider_id: str, min_ttl: int = DEFAULT_MIN_TTL, *, reader: str = "operator"
    ) -> AccessToken:
        """A token that is valid for `min_ttl` more seconds, refreshed if needed. See GetAccessToken for the errors.

        `reader` is who gets it, for the audit trail: what cannot be recorded there is not handed out.
        """
        try:
            user_id = self.users.get(handle).id
        except UserNotFound:
            raise NoConnection from None
        connection = _get(user_id, provider_id)
        if not 0 <= min_ttl <= _LARGEST_MIN_TTL:
            raise InvalidMinTtl
        with contextlib.ExitStack() as slots:
            connection = self._freshened(connection, timedelta(seconds=min_ttl), slots)
        token = AccessToken(self._open_pair(connection).access_token, connection.expires_at)
        self.reads.count(reader, connection)
        return token

    def revoke_at_provider(self, payload: Payload) -> None:
        """The job that follows `revoke`. A refusal (4xx) is final: RFC 7009 has 200 even for unknown tokens."""
        provider = self.providers.find(payload["provider"])
        if provider is None or provider.revocation_url is None:
            raise Abandon("PROVIDER_NOT_CONFIGURED")
        status = self.oauth.revoke(provider, payload["token"], payload["token_type_hint"])
        if status in (408, 429) or status >= 500:  # noqa: PLR2004
            raise ProviderUnavailable
        if not 200 <= status < 300:  # noqa: PLR2004
            raise Abandon(f"HTTP_{status}")

    # Refreshing unasked

    def claim_due(self, provider_id: str, most: int) -> list[Connection]:
        """Take at most so many of a provider's connections that are due, those that have been so for longest.

        Should this process die, they are due again after a while.
        """
        now = self.clock.now()
        # Idle processes look again and again: a read is nothing to anybody.
        if self.database.fetch_one(_NEXT_DUE, (provider_id, to_micros(now))) is None:
            return []
        parameters = (to_micros(now + self.ahead.claim), provider_id, to_micros(now), most)
        return [Connection.from_row(row) for row in self.database.claim(_CLAIM_DUE, parameters)]

    @storage_failures()
    def refresh_due(self, claimed: Connection) -> None:
        """Refresh a connection from `claim_due`, unless a call has done so or is at it; what fails is put off.

        Raises StorageUnavailable.
        """
        provider = self.providers.find(claimed.provider)
        if provider is None or not self._lease_is_free(claimed):
            return
        if self._is_fresh(claimed, self.ahead.longest):  # the settings have changed since its time was set
            self._put_off(claimed, self._due_at(claimed.obtained_at, claimed.expires_at))
            return
        try:
            self._refresh(provider, claimed, self.ahead.longest)
        except (Busy, NeedsReauth, NoConnection):
            return  # due again when the claim ends; never; gone
        except StorageUnavailable:
            raise
        except (CallError, CannotOpen) as failure:
            self._put_off(claimed, self.clock.now() + self._pause_after(failure, claimed))

    def _pause_after(self, failure: DoorwardError, claimed: Connection) -> timedelta:
        is_down = isinstance(failure, ProviderMalformed | ProviderTimeout | ProviderUnavailable)
        longest = _LONGEST_PAUSE if is_down else _LONGEST_REFUSED_PAUSE
        due_at = self.ahead.due_at(claimed.obtained_at, claimed.expires_at, 1.0)
        waited = self.clock.now() - due_at if due_at is not None else longest
        return self.ahead.pause(waited, longest, random.random())  # noqa: S311 - no secret

    def _put_off(self, claimed: Connection, refresh_at: datetime | None) -> None:
        new = to_micros(refresh_at) if refresh_at is not None else None
        parameters = (new, claimed.id, to_micros(claimed.refresh_at))
        self.database.write(partial(self.database.execute, _PUT_OFF, parameters))

    def _due_at(self, obtained_at: datetime, expires_at: datetime | None) -> datetime | None:
        if expires_at is None:
            return None
        return self.ahead.due_at(obtained_at, expires_at, random.random())  # noqa: S311 - no secret

    def _kai_provider(self, provider_id: str) -> Provider:
        provider = self.providers.find(provider_id)
        if provider is None or provider.kind != "kai":
            raise ProviderNotConfigured
        return provider

    # Codes

    def _claim_code(self, provider_id: str, user_id: int, code: str) -> CodeClaim | None:
        """The right to exchange a code, which one call gets; None for all others."""
        try:
            with self.database.writing():
                return CodeClaim.create(
                    provider=provider_id,
                    code_hash=fingerprint(code),
                    user=user_id,
                    created_at=self.clock.now(),
                )
        except peewee.IntegrityError:
            return None

    def _exchange(self, provider: Provider, claim: CodeClaim, code: str) -> TokenPair:
        try:
            return self.oauth.exchange_code(provider, code)
        except (Busy, NotConnectable, ConnectTimeout):
            # Nobody saw the code, so it may be sent again.
            with self.database.writing():
                CodeClaim.delete().where(CodeClaim.id == claim.id).execute()
            raise
        except CallError as failure:
            with self.database.writing():
                outcome = CodeClaim.update(outcome=failure.reason, oauth_error=failure.metadata.get("error"))
                outcome.where(CodeClaim.id == claim.id).execute()
            raise

    def _await_exchange(self, provider: Provider, user_id: int, code: str) -> None:
        """Return when another call's exchange of the same code has connected the user; else raise."""
        with contextlib.ExitStack() as slots:
            waits: Iterator[float] | None = None
            while True:
                claim = CodeClaim.get_or_none(provider=provider.id, code_hash=fingerprint(code), user=user_id)
                if claim is None:
                    # Gone while we waited: the other call could not reach the provider.
                    raise CodeAlreadyUsed if waits is None else ProviderUnavailable
                if claim.outcome is not None:
                    break
                # One second more than an exchange may take, to store its result. No outcome after
                # that means that its process died.
                waits = waits or self._waits(slots, claim.created_at + timedelta(seconds=provider.timeout + 1))
                if next(waits, None) is None:
                    raise CodeAlreadyUsed
        if claim.outcome == CodeRejected.reason:
            raise CodeRejected({"error": claim.oauth_error} if claim.oauth_error else None)
        if claim.outcome != _CONNECTED or not self.status(user_id, provider.id):
            raise CodeAlreadyUsed

    def _waits(self, slots: contextlib.ExitStack, until: datetime) -> Iterator[float]:
        """Pauses while another call does the work; they take one of the few slots for that."""
        slots.enter_context(self.bulkhead.waiting())
        return self.clock.polls((until - self.clock.now()).total_seconds())

    # Connections

    def _store_connection(self, user_id: int, provider_id: str, pair: TokenPair) -> int:
        """Insert or replace, inside the caller's transaction; a refresh under way loses its lease. Returns its id."""
        now = self.clock.now()
        Connection.insert(
            user=user_id,
            provider=provider_id,
            access_token=b"",
            obtained_at=now,
            needs_reauth=False,
            lease_epoch=0,
            created_at=now,
        ).on_conflict_ignore().execute()
        connection = _get(user_id, provider_id)
        values = self._sealed(connection.id, pair, keep_refresh_token=False)
        self._write(
            connection,
            epoch=connection.lease_epoch,
            lease_epoch=connection.lease_epoch + 1,
            **values,
        )
        return int(connection.id)

    def _sealed(self, connection_id: int, pair: TokenPair, *, keep_refresh_token: bool) -> dict[str, Any]:
        """The columns of a new pair. A refresh whose answer holds no refresh token keeps the old one."""
        now = self.clock.now()
        expires_at = now + timedelta(seconds=pair.expires_in) if pair.expires_in is not None else None
        can_refresh = pair.refresh_token is not None or keep_refresh_token
        values: dict[str, Any] = {
            "access_token": self.keys.seal(pair.access_token, _access_token_of(connection_id)),
            "expires_at": expires_at,
            "refresh_at": self._due_at(now, expires_at) if can_refresh else None,
            "obtained_at": now,
            "needs_reauth": False,
            "lease_expires_at": None,
            "lease_failure": None,
        }
        if pair.refresh_token is not None:
            values["refresh_token"] = self.keys.seal(pair.refresh_token, _refresh_token_of(connection_id))
        elif not keep_refresh_token:
            values["refresh_token"] = None
        return values

    def _write(self, connection: Connection, *, epoch: int, **values: Any) -> bool:
        """Change the row, if the epoch is still the given one."""
        fence = (Connection.id == connection.id) & (Connection.lease_epoch == epoch)
        return bool(Connection.update(**values).where(fence).execute())

    def _open_pair(self, connection: Connection) -> TokenPair:
        refresh_token = connection.refresh_token
        return TokenPair(
            access_token=self.keys.open(connection.access_token, _access_token_of(connection.id)),
            refresh_token=self.keys.open(refresh_token, _refresh_token_of(connection.id)) if refresh_token else None,
            expires_in=None,
        )

    def _can_open(self, connection: Connection) -> bool:
        try:
            self._open_pair(connection)
        except CannotOpen:
            return False
        return True

    def _revoked(self, connection: Connection, actor: str) -> None:
        """What follows the end of a connection, inside the caller's transaction."""
        subject, user_id = f"connection:{connection.id}", connection.user_id
        self.audit.record(actor, "connection.revoked", subject, user=user_id, provider=connection.provider)
        self._queue_revocation_of(connection)

    def _queue_revocation_of(self, connection: Connection) -> None:
        try:
            self._queue_revocation(connection.provider, self._open_pair(connection))
        except CannotOpen:
            # The user gets rid of it all the same; only the provider cannot be told.
            self.log.error("connection cannot be opened; it is removed, not revoked", user_id=connection.user_id)

    def _queue_revocation(self, provider_id: str, pair: TokenPair) -> None:
        """Inside the caller's transaction. Revoking a refresh token ends its access tokens too (RFC 7009, 2.1)."""
        provider = self.providers.find(provider_id)
        if provider is None or provider.revocation_url is None:
            return
        token, hint = (
            (pair.refresh_token, "refresh_token") if pair.refresh_token else (pair.access_token, "access_token")
        )
        self.jobs.queue(REVOCATION, {"provider": provider_id, "token": token, "token_type_hint": hint})

    # Refreshing

    def _freshened(self, first: Connection, min_ttl: timedelta, slots: contextlib.ExitStack) -> Connection:
        """The row with the stored token, or with a new one that this call or another one gets from the provider."""
        waits: Iterator[float] | None = None
        connection = first
        while True:
            if connection.needs_reauth:
                raise NeedsReauth
            if self._is_fresh(connection, min_ttl) or _has_new_pair(connection, since=first):
                return connection
            provider = self.providers.find(connection.provider)
            if provider is None:
                raise ProviderNotConfigured
            if self._lease_is_free(connection):
                if waits is not None and connection.lease_failure is not None:
                    raise _REFRESH_FAILURES.get(connection.lease_failure, ProviderUnavailable)
                self._refresh(provider, connection, min_ttl)
            else:
                # The holder may be dead: then its lease runs out, and another call takes over.
                longest = self.lease + timedelta(seconds=provider.timeout + 1)
                waits = waits or self._waits(slots, self.clock.now() + longest)
                if next(waits, None) is None:
                    raise ProviderTimeout
            connection = _get(connection.user_id, connection.provider)

    def _is_fresh(self, connection: Connection, min_ttl: timedelta) -> bool:
        if connection.expires_at is None:
            return True
        # No refresh gives more than the provider's whole life: then half of it has to do, or every
        # call would refresh.
        life = connection.expires_at - connection.obtained_at
        needed = min_ttl if min_ttl < life else life / 2
        left: timedelta = connection.expires_at - self.clock.now()
        return left > needed

    def _lease_is_free(self, connection: Connection) -> bool:
        if connection.lease_expires_at is None:
            return True
        # No lease ends later than one that begins now, unless the clock was put back: its holder has long ended.
        left = connection.lease_expires_at - self.clock.now()
        return not timedelta(0) < left <= self.lease

    def _refresh(self, provider: Provider, connection: Connection, min_ttl: timedelta) -> None:
        """Refresh under the lease, if this call gets it; the row then tells how it went."""
        held = self._acquire(connection, min_ttl)
        if held is None:
            return
        refresh_token = self._open_pair(held).refresh_token
        if refresh_token is None:
            # The rest of the token's life is too short for this caller, but it may do for others.
            self._end_lease(held, needs_reauth=not self._is_fresh(held, timedelta(0)), refresh_at=None)
            raise NeedsReauth
        try:
            with self.breakers.watching(provider.id):
                pair = self.oauth.refresh(provider, refresh_token)
        except GrantRefused:
            self.metrics.refresh_ended(provider.id, "grant_refused")
            self._refused(held)
        except CallError as failure:
            self.metrics.refresh_ended(provider.id, failure.reason.lower())
            self._end_lease(held, lease_failure=failure.reason)
            raise
        else:
            self._store_refreshed(held, pair)
            self.metrics.refresh_ended(provider.id, "refreshed")

    def _acquire(self, connection: Connection, min_ttl: timedelta) -> Connection | None:
        """The row under a new lease, or None when another call was faster."""
        epoch = connection.lease_epoch + 1
        with self.database.writing():
            lease_end = self.clock.now() + self.lease
            if not self._write(
                connection,
                epoch=epoch - 1,
                lease_epoch=epoch,
                lease_expires_at=lease_end,
                lease_failure=None,
            ):
                return None
            held = _get(connection.user_id, connection.provider)
            # The holder that was seen before may have finished in the meantime.
            if _has_new_pair(held, since=connection) or held.needs_reauth or self._is_fresh(held, min_ttl):
                self._write(held, epoch=epoch, lease_expires_at=None)
                return None
            return held

    def _store_refreshed(self, held: Connection, pair: TokenPair) -> None:
        """Store the pair before anyone gets to see it, unless the one that it follows was replaced.

        It counts even when the lease has passed to another call meanwhile: that one has nothing but
        the refresh token that is spent now.
        """

        def store() -> None:
            values = self._sealed(held.id, pair, keep_refresh_token=True)
            pair_held = peewee.fn.substr(Connection.access_token, OWN_FROM) == own_part(held.access_token)
            unchanged = (Connection.id == held.id) & pair_held
            stored = Connection.update(lease_epoch=Connection.lease_epoch + 1, **values).where(unchanged).execute()
            if not stored and Connection.get_or_none(Connection.id == held.id) is None:
                # Disconnected meanwhile: what the provider gave us now must not live on.
                self._queue_revocation(held.provider, pair)

        self._insist(store)

    def _insist(self, store: Callable[[], None]) -> None:
        """Do it in a transaction, again if the storage fails: what the provider gave cannot be had again."""
        waits = self.clock.polls(_STORING_SECONDS, first=0.1, longest=1.0)
        while True:
            try:
                with self.database.writing():
                    return store()
            except StorageUnavailable:
                if next(waits, None) is None:
                    raise

    def _refused(self, held: Connection) -> None:
        """The provider no longer takes the refresh token. That is final, unless it is not the current one."""
        current = Connection.get_or_none(Connection.id == held.id)
        if current is None or not _has_new_pair(current, since=held):
            self._end_lease(held, needs_reauth=True, refresh_at=None)

    def _end_lease(self, held: Connection, **values: Any) -> None:
        with self.database.writing():
            self._write(held, epoch=held.lease_epoch, lease_expires_at=None, **values)


def _judged(now: datetime) -> tuple[peewee.Case, peewee.Case]:
    """What SQL says of a connection: its status, and the reason for that."""
    ends, cannot_refresh = Connection.expires_at, Connection.refresh_token.is_null()
    status = peewee.Case(
        None,
        (
            (Connection.needs_reauth, Status.NEEDS_REAUTH),
            (cannot_refresh & (ends <= now), Status.EXPIRED),
            (cannot_refresh & (ends <= now + _SOON), Status.EXPIRING),
        ),
        Status.CONNECTED,
    )
    reason = peewee.Case(
        None,
        (
            (cannot_refresh & (Connection.needs_reauth | (ends <= now + _SOON)), "NO_REFRESH_TOKEN"),
            (Connection.needs_reauth, "GRANT_REFUSED"),
        ),
        Connection.lease_failure,
    )
    return status, reason


def _actor(user_id: int) -> str:
    return f"user:{user_id}"


def _kai_id(kai_type: str) -> str:
    kai_id = kai_type.lower()
    if kai_id not in KAI_TYPES:
        raise UnknownKaiType
    return kai_id


def _find(user_id: int, provider_id: str) -> Connection | None:
    return Connection.get_or_none(user=user_id, provider=provider_id)


def _get(user_id: int, provider_id: str) -> Connection:
    connection = _find(user_id, provider_id)
    if connection is None:
        raise NoConnection
    return connection


def _has_new_pair(connection: Connection, *, since: Connection) -> bool:
    # No two seals have it in common; and it stays when the token is sealed with another master key.
    return own_part(connection.access_token) != own_part(since.access_token)


def _access_token_of(connection_id: int) -> Place:
    return Place("connections", connection_id, "access_token")


def _refresh_token_of(connection_id: int) -> Place:
    return Place("connections", connection_id, "refresh_token")
