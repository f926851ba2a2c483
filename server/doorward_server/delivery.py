"""Deliveries: the outcomes of requests on their way to the callbacks.

Owns the tables `deliveries` and `delivery_attempts`; knows rows, not the services. A delivery is queued in the
transaction of its outcome, and attempted by a job until it is sent or its schedule ends. Imports `outbound`,
`applications`, `api_keys`, `jobs`, `audit`, `models` and below.
"""

import json
import random
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlencode

from cachetools import LRUCache
from standardwebhooks import Webhook

from doorward_server.api_keys import ApiKeys
from doorward_server.applications import Applications
from doorward_server.audit import Audit
from doorward_server.callbacks import host_of
from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import (
    Busy,
    CallError,
    DeliveryNotAbandoned,
    DeliveryNotFound,
    NoKeyLeft,
    ProviderTimeout,
    ProviderUnavailable,
)
from doorward_server.jobs import Action, Ending, Jobs, Payload, PutOff
from doorward_server.logs import Log
from doorward_server.models import ConsentRequest, Delivery, DeliveryAttempt, to_micros
from doorward_server.outbound import ConnectTimeout, NotConnectable, Outbound, Receipt, Timeouts
from doorward_server.upkeep import Sweep

DELIVERY = "delivery"
NOTHING_LEFT = "user canceled"
_GONE = 410
_LONGEST_RETRY_AFTER = 24 * 3600.0
_UNTIL_ENABLED = timedelta(minutes=1)
# Whose cap counts for deliveries to those who are not registered, and have not just answered quickly.
STRANGERS = "(strangers)"
# No attempts: others' requests to the host are under way, or the machine slept.
_NOT_TRIED = {Busy.reason, "SUSPENDED"}
# Seconds for which what was opened may still be sent.
_FRESH = 5.0
# Seconds to wait for one's turn at a host: as long as its answers take, at least, and when that is not known yet.
_LEAST_TURN, _FIRST_TURN = 0.2, 1.0
_MOST_PACES = 1024
# Why there was no answer, the narrower kinds first.
_FAILURES: Sequence[tuple[type[CallError], str]] = (
    (NotConnectable, "NOT_CONNECTABLE"),
    (ConnectTimeout, "CONNECT_TIMEOUT"),
    (ProviderTimeout, "TIMEOUT"),
    (ProviderUnavailable, "NO_ANSWER"),
)
_KEY_IDS = """
SELECT grant_keys.key_id FROM grant_keys JOIN grants ON grants.id = grant_keys.grant_id
WHERE grants.request_id = ? AND grants.revoked_at IS NULL ORDER BY grant_keys.position
"""


_DUE = """
SELECT deliveries.id, request_id, webhook_id, error, carried_keys, attempts, discord_user, callback, state,
       application_id, callback_format, coalesce(enabled, TRUE), next_attempt_at, under_way
FROM deliveries JOIN consent_requests ON consent_requests.id = request_id
LEFT JOIN applications ON applications.id = application_id
WHERE deliveries.id = ? AND deliveries.status = 'queued'
"""
_BEGIN = """
UPDATE deliveries SET begun = begun + 1, under_way = TRUE, carried_keys = ?, error = ? WHERE id = ? RETURNING begun
"""
_RETURNED = "UPDATE deliveries SET under_way = FALSE WHERE id = ? AND begun = ?"
_AS_BEFORE = "UPDATE deliveries SET carried_keys = ? WHERE id = ? AND begun = ?"
_ATTEMPT = """
INSERT INTO delivery_attempts (delivery_id, started_at, milliseconds, status, error) VALUES (?, ?, ?, ?, ?)
"""
_WAIT = """
UPDATE deliveries SET attempts = attempts + 1, next_attempt_at = ?, carried_keys = carried_keys OR ?
WHERE id = ? AND status = 'queued'
"""
_ABANDON = """
UPDATE deliveries SET status = 'abandoned', next_attempt_at = NULL, finished_at = ?
WHERE id = ? AND status = 'queued'
"""
# An attempt that was late may still say that the delivery was sent, but not that it was not.
_FINISH = """
UPDATE deliveries SET status = ?, attempts = ?, next_attempt_at = NULL, finished_at = ?, under_way = FALSE
WHERE id = ? AND (status = 'queued' OR ? = 'sent')
"""


_UNSENT = """
SELECT status, count(*) FROM deliveries WHERE status IN ('queued', 'abandoned') GROUP BY status
"""


class Status(StrEnum):
    """Where a delivery stands; the names of doorward.keybroker.v1.DeliveryStatus."""

    QUEUED = "queued"
    SENT = "sent"
    ABANDONED = "abandoned"


@dataclass(frozen=True)
class Schedule:
    """When to try again: seconds between attempts, each made longer by up to a tenth at random."""

    seconds: Sequence[float]

    def delay(self, attempts: int, retry_after: float | None) -> timedelta | None:
        """How long to wait after so many attempts, at least what the receiver asks for; None: give up."""
        if attempts > len(self.seconds):
            return None
        jittered = self.seconds[attempts - 1] * (1 + random.uniform(0, 0.1))  # noqa: S311 - no secret
        return timedelta(seconds=max(jittered, min(retry_after or 0.0, _LONGEST_RETRY_AFTER)))


@dataclass(frozen=True)
class Message:
    """What one attempt sends."""

    body: bytes = field(repr=False)
    headers: dict[str, str] = field(repr=False)


class _Attempted(NamedTuple):
    """How one POST went: a receipt, or the reason why there is none."""

    started_at: datetime
    milliseconds: int
    receipt: Receipt | None
    failure: str | None
    nothing_was_sent: bool

    @property
    def status(self) -> int | None:
        return self.receipt.status if self.receipt else None


class _Due(NamedTuple):
    """A queued delivery, its request, and the application if it is registered."""

    id: int
    request_id: int
    webhook_id: str
    error: str | None
    carried_keys: bool
    attempts: int
    discord_user: str
    callback: str
    state: bytes
    application_id: str | None
    callback_format: str | None
    is_enabled: bool
    next_attempt_at: int
    under_way: bool
    begun: int = 0
    begun_at: float = 0.0


class Paces:
    """How long hosts take to answer, so that those who wait for their turn do not ask too often."""

    def __init__(self) -> None:
        self._seconds: LRUCache[str, float] = LRUCache(_MOST_PACES)
        self._lock = threading.Lock()

    def note(self, host: str, seconds: float) -> None:
        """An answer of a host's took so long."""
        with self._lock:
            self._seconds[host] = seconds

    def is_quick(self, host: str) -> bool:
        """Whether its last answer came soon."""
        with self._lock:
            return self._seconds.get(host, _FIRST_TURN) < _FIRST_TURN

    def turn(self, host: str) -> timedelta:
        """How long to wait for a turn, more or less."""
        with self._lock:
            seconds = self._seconds.get(host, _FIRST_TURN)
        return timedelta(seconds=max(seconds, _LEAST_TURN) * random.uniform(0.5, 1.5))  # noqa: S311 - no secret


@dataclass(frozen=True)
class Deliveries:
    """Queues, attempts, tells, and tries again."""

    database: Database
    clock: Clock
    jobs: Jobs
    applications: Applications
    api_keys: ApiKeys
    audit: Audit
    callbacks: Outbound
    schedule: Schedule
    timeouts: Timeouts
    log: Log
    paces: Paces = field(default_factory=Paces)
    fresh: float = _FRESH

    def queue(self, request: ConsentRequest, error: str | None) -> None:
        """Record what the application is to be told, inside the caller's transaction."""
        now = self.clock.now()
        delivery = Delivery.create(
            request=request,
            webhook_id=f"msg_{secrets.token_hex(16)}",
            error=error,
            status=Status.QUEUED,
            carried_keys=False,
            attempts=0,
            next_attempt_at=now,
            created_at=now,
        )
        self.jobs.queue(DELIVERY, {"delivery": delivery.id})

    def begin(self, payload: Payload) -> Action | PutOff | None:
        """The job of a delivery: returns the attempt to make.

        Before anything is sent it is on record whether keys or an error go out: never both.
        """
        row = self.database.execute(_DUE, (payload["delivery"],))
        if row is None:
            return None
        due = _Due(*row)
        early = due.next_attempt_at - to_micros(self.clock.now())
        if early > 0:  # another worker, whose lease had ended, recorded its attempt after all
            return PutOff(timedelta(microseconds=early), "TOO_EARLY")
        if not due.is_enabled:
            return PutOff(_UNTIL_ENABLED, "APPLICATION_DISABLED")
        if due.under_way and due.carried_keys:  # the worker before died, or is late: nobody knows whether they went out
            self.audit.record("doorward", "keys.sent", f"delivery:{due.id}", status="unknown")
        keys = self._keys(due) if due.error is None else {}
        if not keys and due.carried_keys:  # an error now would contradict the keys that went out once
            now = to_micros(self.clock.now())
            self.database.execute(_ATTEMPT, (due.id, now, 0, None, NoKeyLeft.reason))
            self._abandon(due, due.attempts, NoKeyLeft.reason)
            return None
        if not keys and due.error is None:
            due = due._replace(error=NOTHING_LEFT)
        (begun,) = self.database.execute(_BEGIN, (bool(keys), due.error, due.id)) or (0,)
        return partial(self._attempt, due._replace(begun=begun, begun_at=_now()), keys)

    def _keys(self, due: "_Due") -> dict[int, str]:
        """What is left of the keys that were granted: their values by id, in order."""
        return self.api_keys.values([key_id for (key_id,) in self.database.execute_all(_KEY_IDS, (due.request_id,))])

    def _attempt(self, due: "_Due", keys: dict[int, str]) -> Ending:
        message = self._message(due, list(keys.values()))
        if _now() > due.begun_at + self.fresh:  # suspended meanwhile: the keys may be gone by now
            attempted = _Attempted(self.clock.now(), 0, None, "SUSPENDED", nothing_was_sent=True)
        else:
            attempted = self._post(due, message)
        return partial(self._record, due, attempted, list(keys))

    def _message(self, due: "_Due", keys: Sequence[str]) -> Message:
        # What the application is told: keys, or an error.
        outcome: dict[str, Any] = {"api_keys": list(keys)} if keys else {"error": due.error}
        fields = {"userid": due.discord_user, "state": bytes(due.state).decode(), **outcome}
        if due.callback_format == "json":
            content_type, body = "application/json", json.dumps(fields, ensure_ascii=False)
        else:
            content_type, body = "application/x-www-form-urlencoded", urlencode(fields, doseq=True)
        headers = {"content-type": content_type, "webhook-id": due.webhook_id}
        if due.application_id is not None:
            now = self.clock.now()
            secrets_ = self.applications.signing_secrets(due.application_id)
            signatures = [Webhook(secret).sign(due.webhook_id, now, body) for secret in secrets_]
            headers |= {"webhook-timestamp": str(int(now.timestamp())), "webhook-signature": " ".join(signatures)}
        return Message(body.encode(), headers)

    def _post(self, due: "_Due", message: Message) -> "_Attempted":
        host = host_of(due.callback)
        # Strangers that may hang leave, together, some threads to others.
        is_trusted = due.application_id is not None or self.paces.is_quick(host)
        peers = (host,) if is_trusted else (host, STRANGERS)
        started, clock = self.clock.now(), time.monotonic()
        receipt, failure, nothing_was_sent = None, None, False
        try:
            receipt = self.callbacks.post(
                due.callback, peers=peers, timeouts=self.timeouts, headers=message.headers, body=message.body
            )
        except CallError as error:
            failure = next((told for kind, told in _FAILURES if isinstance(error, kind)), error.reason)
            nothing_was_sent = isinstance(error, Busy | NotConnectable | ConnectTimeout)
        seconds = time.monotonic() - clock
        if failure != Busy.reason:
            self.paces.note(host, seconds)
        return _Attempted(started, round(seconds * 1000), receipt, failure, nothing_was_sent)

    def _record(self, due: "_Due", attempted: "_Attempted", key_ids: Sequence[int]) -> PutOff | None:
        """Write down how an attempt went, inside a transaction; returns when to try again, None when it is over."""
        if attempted.nothing_was_sent:
            self.database.execute(_AS_BEFORE, (due.carried_keys, due.id, due.begun))
            key_ids = []
        if attempted.failure in _NOT_TRIED:
            self.database.execute(_RETURNED, (due.id, due.begun))
            return PutOff(self.paces.turn(host_of(due.callback)), attempted.failure, is_turn=True)
        status, now = attempted.status, self.clock.now()
        started = to_micros(attempted.started_at)
        self.database.execute(_ATTEMPT, (due.id, started, attempted.milliseconds, status, attempted.failure))
        if key_ids:
            self.audit.record("doorward", "keys.sent", f"delivery:{due.id}", keys=list(key_ids), status=status)
        if status is not None and 200 <= status < 300:  # noqa: PLR2004
            self._finish(due, Status.SENT, due.attempts + 1)
            return None
        retry_after = _seconds(attempted.receipt.retry_after, now) if attempted.receipt else None
        delay = None if status == _GONE else self.schedule.delay(due.attempts + 1, retry_after)
        reason = attempted.failure or f"HTTP_{status}"
        if delay is None:
            self._abandon(due, due.attempts + 1, reason)
            return None
        self.database.execute(_RETURNED, (due.id, due.begun))
        self.database.execute(_WAIT, (to_micros(now + delay), bool(key_ids), due.id))
        return PutOff(delay, reason)

    def _abandon(self, due: "_Due", attempts: int, reason: str) -> None:
        self._finish(due, Status.ABANDONED, attempts)
        told = {"delivery_id": due.id, "request_id": due.request_id, "attempts": attempts, "reason": reason}
        self.database.engine.after_commit(partial(self.log.error, "delivery abandoned", **told))

    def _finish(self, due: "_Due", status: Status, attempts: int) -> None:
        now = to_micros(self.clock.now())
        self.database.execute(_FINISH, (status, attempts, now, due.id, status))

    def abandon(self, payload: Payload) -> None:
        """The job of a delivery was given up; inside its transaction."""
        self.database.execute(_ABANDON, (to_micros(self.clock.now()), payload["delivery"]))

    # For operators

    def latest(
        self, status: Status | None = None, most: int = 100, before: int | None = None, request_id: int | None = None
    ) -> list[Delivery]:
        """The latest first."""
        query = Delivery.select(Delivery, ConsentRequest).join(ConsentRequest).order_by(Delivery.id.desc()).limit(most)
        if status is not None:
            query = query.where(Delivery.status == status)
        if before is not None:
            query = query.where(Delivery.id < before)
        if request_id is not None:
            query = query.where(Delivery.request == request_id)
        return self.database.fetch_all(query)

    def count_unsent(self) -> dict[str, int]:
        """How many are queued, and how many abandoned."""
        return {Status.QUEUED: 0, Status.ABANDONED: 0, **dict(self.database.fetch_rows(_UNSENT, ()))}

    def get(self, delivery_id: int) -> Delivery:
        """Raises DeliveryNotFound."""
        query = Delivery.select(Delivery, ConsentRequest).join(ConsentRequest).where(Delivery.id == delivery_id)
        for delivery in self.database.fetch_all(query):
            return delivery  # type: ignore[no-any-return]
        raise DeliveryNotFound

    def attempts(self, delivery_id: int) -> list[DeliveryAttempt]:
        """In order."""
        query = DeliveryAttempt.select().where(DeliveryAttempt.delivery == delivery_id)
        return self.database.fetch_all(query.order_by(DeliveryAttempt.id))

    def redeliver(self, delivery_id: int, *, actor: str) -> None:
        """Start the schedule of an abandoned delivery anew.

        Raises DeliveryNotFound, DeliveryNotAbandoned, NoKeyLeft.
        """
        with self.database.writing():
            delivery = self.get(delivery_id)
            if delivery.status != Status.ABANDONED:
                raise DeliveryNotAbandoned
            if delivery.carried_keys and not self.database.execute(_KEY_IDS, (delivery.request_id,)):
                raise NoKeyLeft
            Delivery.update(status=Status.QUEUED, attempts=0, next_attempt_at=self.clock.now(), finished_at=None).where(
                Delivery.id == delivery_id
            ).execute()
            self.jobs.queue(DELIVERY, {"delivery": delivery_id})
            self.audit.record(actor, "delivery.requeued", f"delivery:{delivery_id}")


def old_deliveries(kept: timedelta) -> Sweep:
    """Those that were sent or abandoned so long ago, with their attempts. One that is queued has no `finished_at`."""
    return Sweep("deliveries", "finished_at <= ?", (kept,))


def _now() -> float:
    """Seconds that go on while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _seconds(retry_after: str | None, now: datetime) -> float | None:
    """A Retry-After header (RFC 9110, section 10.2.3): seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:10])
    try:
        return (parsedate_to_datetime(retry_after) - now).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return None
