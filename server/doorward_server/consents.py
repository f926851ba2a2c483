"""Consent: applications' questions for users' keys, from the question to its one outcome.

Owns the tables `consent_requests`, `grants`, `grant_keys` and `application_blocks`. Imports `applications`,
`api_keys`, `discord_users`, `delivery`, `jobs`, `audit`, `models` and below.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from peewee import fn

from doorward_server.api_keys import ApiKeys, ListedKey
from doorward_server.applications import Applications, Registered
from doorward_server.audit import Audit
from doorward_server.bell import Bell
from doorward_server.callbacks import Callback, InvalidCallback, clean_name, host_of, name_key
from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.delivery import Deliveries
from doorward_server.discord_users import DiscordUsers, parse_snowflake
from doorward_server.errors import (
    CallbackRejected,
    ConsentRequestNotFound,
    GrantNotFound,
    KeyNotFound,
    LeaseLost,
    NameTaken,
    ParameterMissing,
    ParameterTooLong,
    RequestFinished,
    TooManyRequests,
)
from doorward_server.jobs import Jobs, Payload
from doorward_server.models import (
    ApiKey,
    Application,
    ApplicationBlock,
    ConsentRequest,
    Grant,
    GrantKey,
    User,
    to_micros,
)
from doorward_server.outbound import Bulkhead, Outbound
from doorward_server.upkeep import Sweep

DEADLINE = "consent-deadline"
_TOPIC = "prompts"
_LONGEST_NAME, _LONGEST_STATE, _LONGEST_CALLBACK = 100, 2048, 2048
_HOUR = timedelta(hours=1)
# How long a user who has blocked an application seems to think about it, in seconds.
_FEIGNED_THOUGHT = (5.0, 60.0)
_LONGEST_POLL = 0.25
# Requests that may share a prompt, one after another.
_MOST_OF_PROMPT = 10

_OPEN = """
SELECT id, prompt_id, state, name, status, message, lease_epoch, lease_expires_at FROM consent_requests
WHERE discord_user = ? AND callback = ? AND finished_at IS NULL ORDER BY id
"""
_PROMPTS = """
SELECT count(DISTINCT prompt_id) FROM consent_requests
WHERE discord_user = ? AND finished_at IS NULL AND (application_id IS NULL) = ?
"""
_OF_PROMPT = "SELECT count(*) FROM consent_requests WHERE prompt_id = ?"
_OF_ADDRESS = "SELECT count(*) FROM consent_requests WHERE address = ? AND created_at > ?"
_OF_APPLICATION = "SELECT count(*) FROM consent_requests WHERE application_id = ? AND created_at > ?"
_IS_BLOCKED = """
SELECT 1 FROM application_blocks JOIN oauth_identities ON oauth_identities.user_id = application_blocks.user_id
WHERE oauth_identities.provider = 'discord' AND oauth_identities.subject = ? AND application = ?
"""
# Each by an index of its own.
_COUNT_OPEN = """
SELECT 'pending', count(*) FROM consent_requests WHERE status = 'pending'
UNION ALL SELECT 'prompted', count(*) FROM consent_requests WHERE status = 'prompted'
"""
_NEGLECTED = """
SELECT count(*) FROM consent_requests
WHERE status = 'pending' AND lease_epoch = 0 AND lease_expires_at <= ? AND deadline_at > ?
"""
_INSERT = """
INSERT INTO consent_requests (prompt_id, discord_user, application_id, name, callback, state, address, status,
                              lease_epoch, lease_expires_at, message, deadline_at, created_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id
"""
_LEAD = "UPDATE consent_requests SET prompt_id = id WHERE id = ?"
# The job at its deadline has had its time; its delivery is not kept any more; its prompt shows the outcome, or was
# never sent; and it has no grant, or one that was revoked long ago, or is too old itself.
_OLD = """
finished_at <= ? AND deadline_at <= ?
AND (message_closed_at IS NOT NULL OR (message IS NULL AND lease_epoch = 0))
AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.request_id = consent_requests.id)
AND NOT EXISTS (
    SELECT 1 FROM grants WHERE grants.request_id = consent_requests.id
    AND (grants.revoked_at > ? OR (grants.revoked_at IS NULL AND grants.created_at > ?))
)
"""


class Status(StrEnum):
    """Where a request stands; the names of doorward.keybroker.v1.ConsentStatus."""

    PENDING = "pending"
    PROMPTED = "prompted"
    GRANTED = "granted"
    CANCELED = "canceled"
    TIMED_OUT = "timed_out"
    BLOCKED = "blocked"


_OUTCOMES = frozenset({Status.GRANTED, Status.CANCELED, Status.TIMED_OUT, Status.BLOCKED})
# Every transition there is. A decision may be faster than the bot's word that it has asked.
TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.PENDING: _OUTCOMES | {Status.PROMPTED},
    Status.PROMPTED: _OUTCOMES,
    **dict.fromkeys(_OUTCOMES, frozenset()),
}
# What the application is told; keys instead when there is no word.
ERRORS: Mapping[Status, str | None] = {
    Status.GRANTED: None,
    Status.CANCELED: "user canceled",
    Status.TIMED_OUT: "timeout",
    Status.BLOCKED: "user blocked verification dm",
}


@dataclass(frozen=True)
class Question:
    """What an application asks, as it came; "" for what is missing."""

    name: str
    user_id: str
    callback: str
    state: str = field(repr=False)


class Leased(NamedTuple):
    """A request, and the keys among which its user may choose."""

    request: ConsentRequest
    keys: list[ListedKey]


class Resolved(NamedTuple):
    """How a request ended, and the ids of those that ended with this call."""

    status: Status
    ids: list[int]


@dataclass(frozen=True)
class Limits:
    """How much one may ask; 0: no limit."""

    open_per_user: int
    requests_per_address: int
    requests_per_application: int


@dataclass(frozen=True)
class Consents:
    """Asks, tells what is asked, and records what was decided."""

    database: Database
    clock: Clock
    applications: Applications
    discord_users: DiscordUsers
    api_keys: ApiKeys
    deliveries: Deliveries
    jobs: Jobs
    audit: Audit
    callbacks: Outbound
    limits: Limits
    lifetime: timedelta
    allow_unregistered: bool
    bulkhead: Bulkhead  # of the calls that wait
    bell: Bell = field(default_factory=Bell)

    def __post_init__(self) -> None:
        self.database.subscribe(_TOPIC, self.bell.ring)

    # Asking

    def request(self, question: Question, caller: Registered | None, address: str) -> int:
        """Record a question, durably; returns its id. See RequestApiKey for the errors."""
        name = clean_name(question.name)
        if not (name_key(name) and question.user_id and question.callback):
            raise ParameterMissing
        discord_user = parse_snowflake(question.user_id)
        if len(question.callback) > _LONGEST_CALLBACK:
            raise ParameterTooLong
        # Before a name is looked up, which takes time.
        self._check_limit(self.limits.requests_per_address, _OF_ADDRESS, (address, self._an_hour_ago()), _HOUR)
        application, host = self._judge_callback(question.callback, caller)
        if len(question.name) > _LONGEST_NAME or len(question.state) > _LONGEST_STATE:
            raise ParameterTooLong
        if application is None and self.applications.is_known_name(name):
            raise NameTaken
        asking = _Asking(
            discord_user=discord_user,
            application_id=application.id if application else None,
            name=application.name if application else name,
            callback=question.callback,
            host=host,
            state=question.state.encode(),
            address=address,
        )
        return self.database.write(partial(self._insert, asking))

    def _judge_callback(self, url: str, caller: Registered | None) -> tuple[Application | None, str]:
        """The application that asks, None for a stranger, and the callback's host. Raises CallbackRejected."""
        try:
            callback = Callback.parse(url)
        except InvalidCallback:
            raise CallbackRejected from None
        owner = self.applications.owner_of(callback)
        if (owner.id if owner else None) != (caller.application_id if caller else None):
            raise CallbackRejected
        if owner is None and not self.allow_unregistered:
            raise CallbackRejected
        if not self.callbacks.may_connect(callback.host, callback.port):
            raise CallbackRejected
        return owner, callback.host

    def _insert(self, asking: "_Asking") -> int:
        """Inside a transaction."""
        now = self.clock.now()
        together = self.database.execute_all(_OPEN, (asking.discord_user, asking.callback))
        for request_id, _prompt, state, *_ in together:
            if state == asking.state:
                return int(request_id)
        if together:
            # The user was shown the first name, and is asked no longer than for so many.
            asking = replace(asking, name=together[0][3])
            self._check_limit(_MOST_OF_PROMPT, _OF_PROMPT, (together[0][1],), self.lifetime)
        self._check_limits(asking, joins=bool(together))
        deadline = now + self.lifetime
        is_blocked = self.database.execute(_IS_BLOCKED, (asking.discord_user, asking.sender)) is not None
        # Whoever is blocked is not told so, and nobody is asked: it is never leased.
        prompt_id, status, message, epoch, lease_end = (
            (together[0][1], *together[0][4:])
            if together
            else (None, Status.PENDING, None, 0, to_micros(deadline if is_blocked else now))
        )
        row = self.database.execute(
            _INSERT,
            (
                prompt_id,
                asking.discord_user,
                asking.application_id,
                asking.name,
                asking.callback,
                asking.state,
                asking.address,
                status,
                epoch,
                lease_end,
                message,
                to_micros(deadline),
                to_micros(now),
            ),
        )
        assert row is not None  # noqa: S101 - what RETURNING is for
        request_id = int(row[0])
        if prompt_id is None:
            self.database.execute(_LEAD, (request_id,))
        ends, outcome = (
            (now + timedelta(seconds=random.uniform(*_FEIGNED_THOUGHT)), Status.CANCELED)  # noqa: S311
            if is_blocked
            else (deadline, Status.TIMED_OUT)
        )
        self.jobs.queue(DEADLINE, {"request": request_id, "outcome": outcome}, run_at=ends)
        asker = _sender(asking.application_id, asking.host)
        self.database.announce(_TOPIC)
        self.audit.record(asker, "consent.requested", f"request:{request_id}", discord_user=asking.discord_user)
        return request_id

    def _check_limits(self, asking: "_Asking", *, joins: bool) -> None:
        since = self._an_hour_ago()
        if not joins:
            of_kind = (asking.discord_user, asking.application_id is None)
            self._check_limit(self.limits.open_per_user, _PROMPTS, of_kind, self.lifetime)
        self._check_limit(self.limits.requests_per_address, _OF_ADDRESS, (asking.address, since), _HOUR)
        if asking.application_id is not None:
            of_application = (asking.application_id, since)
            self._check_limit(self.limits.requests_per_application, _OF_APPLICATION, of_application, _HOUR)

    def _an_hour_ago(self) -> int:
        return to_micros(self.clock.now() - _HOUR)

    def _check_limit(self, limit: int, sql: str, parameters: Sequence[object], window: timedelta) -> None:
        if not limit:
            return
        row = self.database.execute(sql, parameters)
        if row is not None and row[0] >= limit:
            raise TooManyRequests({"retry_after": str(round(window.total_seconds() / limit) or 1)})

    # Prompting

    def lease(
        self, most: int, lease: timedelta, wait: float, is_wanted: Callable[[], bool] = lambda: True
    ) -> list[Leased]:
        """Take prompts to be sent or closed, at most so many; waits so many seconds for the first.

        A caller that has gone, as `is_wanted` tells, takes nothing with it. Raises Busy.
        """
        rung = self.bell.rung
        leased = self._lease(most, lease)
        if leased or not wait:
            return leased
        with self.bulkhead.waiting():
            ends = time.monotonic() + wait
            while not leased and (left := ends - time.monotonic()) > 0:
                rung = self.bell.wait(rung, min(left, _LONGEST_POLL))
                if not is_wanted():
                    break
                leased = self._lease(most, lease)
        return leased

    def _lease(self, most: int, lease: timedelta) -> list[Leased]:
        now = self.clock.now()
        sibling = ConsentRequest.alias()
        open_siblings = sibling.select().where(
            sibling.prompt_id == ConsentRequest.prompt_id, sibling.finished_at.is_null()
        )
        to_send = (ConsentRequest.status == Status.PENDING) & (ConsentRequest.deadline_at > now)
        first_time = ConsentRequest.lease_epoch == 0
        to_close = (
            ConsentRequest.finished_at.is_null(False)
            # Whoever has leased it may have sent it, and died before telling where.
            & (ConsentRequest.message.is_null(False) | (ConsentRequest.lease_epoch > 0))
            & ConsentRequest.message_closed_at.is_null()
            & ~fn.EXISTS(open_siblings)
        )
        due = [
            ConsentRequest.select(ConsentRequest.prompt_id)
            .where(wanted, ConsentRequest.lease_expires_at <= now)
            .order_by(ConsentRequest.lease_expires_at, ConsentRequest.id)
            for wanted in (to_send & first_time, to_close, to_send & ~first_time)
        ]
        if not any(self.database.fetch_all(query.limit(1)) for query in due):
            return []
        with self.database.writing():
            # Those that failed before leave some room, for they may fail again, and slowly.
            limits = (most, most, max(1, most // 2))
            rows = [row for query, limit in zip(due, limits, strict=True) for row in query.limit(limit)]
            prompts = dict.fromkeys(row.prompt_id for row in rows)
            return [self._lease_prompt(prompt_id, now + lease) for prompt_id in [*prompts][:most]]

    def _lease_prompt(self, prompt_id: int | None, until: datetime) -> Leased:
        """Inside a transaction; tells of an open one of the requests that share the prompt, or of the last to end."""
        together = ConsentRequest.prompt_id == prompt_id
        ConsentRequest.update(lease_epoch=ConsentRequest.lease_epoch + 1, lease_expires_at=until).where(
            together
        ).execute()
        query = ConsentRequest.select().where(together)
        return self.with_keys(
            query.order_by(
                ConsentRequest.finished_at.is_null(False), ConsentRequest.finished_at.desc(), ConsentRequest.id
            ).get()
        )

    def mark_prompted(self, request_id: int, lease_epoch: int, message: str) -> None:
        """The prompt was sent. Raises ConsentRequestNotFound, RequestFinished, LeaseLost."""
        with self.database.writing():
            together = self._open_together(self.get(request_id))
            if not together:
                raise RequestFinished
            if together[0].lease_epoch != lease_epoch:
                raise LeaseLost
            ConsentRequest.update(status=Status.PROMPTED, message=message).where(
                ConsentRequest.id.in_([one.id for one in together])
            ).execute()

    def close_prompt(self, request_id: int) -> None:
        """The message of a prompt shows how it ended. Raises ConsentRequestNotFound."""
        with self.database.writing():
            request = self.get(request_id)
            ConsentRequest.update(message_closed_at=self.clock.now()).where(
                ConsentRequest.prompt_id == request.prompt_id, ConsentRequest.finished_at.is_null(False)
            ).execute()

    # Deciding

    def resolve(
        self,
        request_id: int,
        outcome: Status,
        key_ids: Sequence[int] = (),
        *,
        actor: str,
        closes_within: timedelta = timedelta(),
    ) -> "Resolved":
        """Record an outcome for all open requests that share the prompt, even when the given one is over.

        When all of them are, their outcome stays, and is returned. The caller has `closes_within` to close the
        prompt before anyone else is asked to. Raises ConsentRequestNotFound, KeyNotFound.
        """
        with self.database.writing():
            request = self.get(request_id)
            together = self._open_together(request)
            if not together:
                return Resolved(Status(request.status), [])
            if outcome is Status.GRANTED:
                self._require_keys(request.discord_user, key_ids)
            for one in together:
                self._finish(one, outcome, key_ids, actor, closes_within)
            return Resolved(outcome, [one.id for one in together])

    def end(self, payload: Payload) -> None:
        """The job at a request's deadline, inside its transaction."""
        request = ConsentRequest.get_or_none(ConsentRequest.id == payload["request"])
        if request is not None and request.finished_at is None:
            self._finish(request, Status(payload["outcome"]), (), "doorward")

    def _finish(
        self,
        request: ConsentRequest,
        outcome: Status,
        key_ids: Sequence[int],
        actor: str,
        closes_within: timedelta = timedelta(),
    ) -> None:
        """Inside a transaction: the outcome and its delivery."""
        if outcome not in TRANSITIONS[Status(request.status)]:
            raise RequestFinished
        now = self.clock.now()
        ConsentRequest.update(status=outcome, finished_at=now).where(ConsentRequest.id == request.id).execute()
        # Of those that ended earlier, too: the prompt is to be closed when all have.
        ConsentRequest.update(lease_expires_at=now + closes_within).where(
            ConsentRequest.prompt_id == request.prompt_id, ConsentRequest.finished_at.is_null(False)
        ).execute()
        self.database.announce(_TOPIC)
        if outcome is Status.GRANTED:
            user = self.discord_users.find(request.discord_user)
            grant = Grant.create(request=request, user=user, created_at=now)
            for position, key_id in enumerate(dict.fromkeys(key_ids)):
                GrantKey.create(grant=grant, key=key_id, position=position)
        self.deliveries.queue(request, ERRORS[outcome])
        self.audit.record(
            actor,
            f"consent.{outcome}",
            f"request:{request.id}",
            discord_user=request.discord_user,
            application=_audited(request),
            keys=list(key_ids),
        )

    def _require_keys(self, discord_user: str, key_ids: Sequence[int]) -> None:
        user = self.discord_users.find(discord_user)
        own = {key.id for key in ApiKey.select(ApiKey.id).where(ApiKey.user == user.id)} if user else set()
        if not key_ids or not own.issuperset(key_ids):
            raise KeyNotFound

    # Telling

    def count_open(self) -> dict[str, int]:
        """How many requests wait to be put to their users, and how many for their answers."""
        return dict(self.database.fetch_rows(_COUNT_OPEN, ()))

    def neglected(self, since: timedelta) -> int:
        """How many requests no bot has taken for so long."""
        now = self.clock.now()
        row = self.database.fetch_one(_NEGLECTED, (to_micros(now - since), to_micros(now)))
        return row[0] if row else 0

    def get(self, request_id: int) -> ConsentRequest:
        """Raises ConsentRequestNotFound."""
        query = ConsentRequest.select().where(ConsentRequest.id == request_id)
        for request in self.database.fetch_all(query):
            return request  # type: ignore[no-any-return]
        raise ConsentRequestNotFound

    def latest(
        self, discord_user: str | None, most: int, *, before: int | None = None, status: Status | None = None
    ) -> list[ConsentRequest]:
        """A user's requests, or all, the latest first; or only those below an id, or that stand so."""
        query = ConsentRequest.select().order_by(ConsentRequest.id.desc()).limit(most)
        if discord_user is not None:
            query = query.where(ConsentRequest.discord_user == parse_snowflake(discord_user))
        if before is not None:
            query = query.where(ConsentRequest.id < before)
        if status is not None:
            query = query.where(ConsentRequest.status == status)
        return self.database.fetch_all(query)

    def is_prompt_open(self, request: ConsentRequest) -> bool:
        """Whether the user may still answer: for this request, or one that shares its prompt."""
        return bool(self._open_together(request))

    def _open_together(self, request: ConsentRequest) -> list[ConsentRequest]:
        """The open requests that share a request's prompt."""
        query = ConsentRequest.select().where(
            ConsentRequest.prompt_id == request.prompt_id, ConsentRequest.finished_at.is_null()
        )
        return self.database.fetch_all(query.order_by(ConsentRequest.id))

    def with_keys(self, request: ConsentRequest) -> Leased:
        """A request, with its user's keys while it is open."""
        user = self.discord_users.find(request.discord_user) if request.finished_at is None else None
        return Leased(request, self.api_keys.list(user) if user else [])

    # Sharing

    def granted_keys(self, request_id: int) -> list[int]:
        """The ids of the keys that a request was granted, in order; less those that were removed since."""
        query = GrantKey.select().join(Grant).where(Grant.request == request_id).order_by(GrantKey.position)
        return [row.key_id for row in self.database.fetch_all(query)]

    def grants(self, user: User) -> list[tuple[Grant, list[int]]]:
        """What a user shares and has not revoked, with the ids of the keys in order."""
        query = Grant.select(Grant, ConsentRequest).join(ConsentRequest)
        query = query.where(Grant.user == user.id, Grant.revoked_at.is_null()).order_by(Grant.id.desc())
        return [(grant, self._key_ids(grant)) for grant in self.database.fetch_all(query)]

    def revoke_grant(self, user: User, grant_id: int, *, actor: str) -> None:
        """End a grant; what is still to be delivered goes without its keys. Raises GrantNotFound."""
        own = (Grant.id == grant_id) & (Grant.user == user.id) & Grant.revoked_at.is_null()
        with self.database.writing():
            if not Grant.update(revoked_at=self.clock.now()).where(own).execute():
                raise GrantNotFound
            self.audit.record(actor, "grant.revoked", f"grant:{grant_id}", user=user.id)

    def block(self, user: User, request_id: int, *, actor: str) -> None:
        """Keep the application of a request from asking the user again. Raises ConsentRequestNotFound."""
        with self.database.writing():
            request = self.get(request_id)
            ApplicationBlock.insert(
                user=user.id,
                application=_sender(request.application_id, request.callback),
                created_at=self.clock.now(),
            ).on_conflict_ignore().execute()
            self.audit.record(actor, "application.blocked", f"user:{user.id}", application=_audited(request))

    def adopt(self, user_id: int, by: int) -> None:
        """Pass a user's grants and blocks to another user, inside the caller's transaction."""
        Grant.update(user=by).where(Grant.user == user_id).execute()
        known = ApplicationBlock.select(ApplicationBlock.application).where(ApplicationBlock.user == by)
        ApplicationBlock.update(user=by).where(
            ApplicationBlock.user == user_id, ApplicationBlock.application.not_in([row.application for row in known])
        ).execute()

    def _key_ids(self, grant: Grant) -> list[int]:
        query = GrantKey.select().where(GrantKey.grant == grant.id).order_by(GrantKey.position)
        return [row.key_id for row in self.database.fetch_all(query)]


def old_requests(kept: timedelta, grants: timedelta) -> Sweep:
    """Those that ended so long ago, and that nothing needs; one with a live grant only when that is so old."""
    return Sweep("consent_requests", _OLD, (kept, timedelta(0), kept, grants))


@dataclass(frozen=True)
class _Asking:
    """A question whose parts are in order."""

    discord_user: str
    application_id: str | None
    name: str
    callback: str
    host: str
    state: bytes
    address: str

    @property
    def sender(self) -> str:
        return _sender(self.application_id, self.callback)


def _sender(application_id: str | None, callback: str) -> str:
    """Who asks: a registered application by its id, a stranger by its exact callback."""
    return f"application:{application_id}" if application_id is not None else f"callback:{callback}"


def _audited(request: ConsentRequest) -> str:
    """As the audit trail names who asks: nothing is ever taken out of that, and a callback may hold a secret."""
    return _sender(request.application_id, callback_host(request))


def callback_host(request: ConsentRequest) -> str:
    """Where the keys are sent, for people: the callback's host."""
    return host_of(request.callback)
