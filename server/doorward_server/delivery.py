"""Deliveries: the outcomes of requests on their way to the callbacks.

Owns the tables `deliveries` and `delivery_attempts`; knows rows, not the services. A delivery is queued in the
transaction of its outcome, and attempted by a job until it is sent or its schedule ends. Imports `outbound`,
`applications`, `api_keys`, `jobs`, `audit`, `models` and below.
"""

import json
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from standardwebhooks import Webhook

from doorward_server.api_keys import ApiKeys
from doorward_server.applications import Applications
from doorward_server.audit import Audit
from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import Busy, CallError, DeliveryNotAbandoned, DeliveryNotFound
from doorward_server.jobs import Jobs, Payload, PutOff
from doorward_server.models import Application, ConsentRequest, Delivery, DeliveryAttempt
from doorward_server.outbound import Outbound, Receipt, Timeouts

DELIVERY = "delivery"
NOTHING_LEFT = "user canceled"
_GONE = 410
_LONGEST_RETRY_AFTER = 24 * 3600.0
# How long to wait for others' requests to the same host.
_TURN = timedelta(seconds=0.2)
_KEY_IDS = """
SELECT grant_keys.key_id FROM grant_keys JOIN grants ON grants.id = grant_keys.grant_id
WHERE grants.request_id = ? AND grants.revoked_at IS NULL ORDER BY grant_keys.position
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

    def attempt(self, payload: Payload) -> None:
        """The job of a delivery: one POST. Raises PutOff when there is to be another."""
        delivery = Delivery.get_or_none(Delivery.id == payload["delivery"])
        if delivery is None or delivery.status != Status.QUEUED:
            return
        request = ConsentRequest.get_by_id(delivery.request_id)
        application = Application.get_or_none(Application.id == request.application_id)
        key_ids = self._key_ids(delivery)
        keys = self.api_keys.values(key_ids)
        if not self._commit_to(delivery, bool(keys)):
            return
        message = self._message(delivery, request, application, keys)
        self._record(delivery, self._post(request.callback, message), key_ids if keys else [])

    def _key_ids(self, delivery: Delivery) -> list[int]:
        if delivery.error is not None:
            return []
        return [row[0] for row in self.database.fetch_rows(_KEY_IDS, (delivery.request_id,))]

    def _commit_to(self, delivery: Delivery, has_keys: bool) -> bool:
        """Write down, before anything is sent, whether keys or an error go out: never both. False: neither."""
        with self.database.writing():
            if has_keys:
                delivery.carried_keys = True
            elif delivery.error is None and delivery.carried_keys:
                # Its keys went out once, and none is left: an error now would contradict them.
                self._finish(delivery, Status.ABANDONED)
                return False
            elif delivery.error is None:
                delivery.error = NOTHING_LEFT
            Delivery.update(carried_keys=delivery.carried_keys, error=delivery.error).where(
                Delivery.id == delivery.id
            ).execute()
            return True

    def _message(
        self, delivery: Delivery, request: ConsentRequest, application: Application | None, keys: Sequence[str]
    ) -> Message:
        fields = _fields(delivery, request, keys)
        if application is not None and application.callback_format == "json":
            content_type, body = "application/json", json.dumps(fields, ensure_ascii=False)
        else:
            content_type, body = "application/x-www-form-urlencoded", urlencode(fields, doseq=True)
        headers = {"content-type": content_type, "webhook-id": delivery.webhook_id}
        if application is not None:
            now = self.clock.now()
            secrets_ = self.applications.signing_secrets(application.id)
            signatures = [Webhook(secret).sign(delivery.webhook_id, now, body) for secret in secrets_]
            headers |= {"webhook-timestamp": str(int(now.timestamp())), "webhook-signature": " ".join(signatures)}
        return Message(body.encode(), headers)

    def _post(self, url: str, message: Message) -> "_Attempted":
        started, clock = self.clock.now(), time.monotonic()
        receipt, failure = None, None
        try:
            receipt = self.callbacks.post(
                url, peer=urlsplit(url).netloc, timeouts=self.timeouts, headers=message.headers, body=message.body
            )
        except Busy:
            raise PutOff(_TURN, Busy.reason) from None
        except CallError as error:
            failure = error.reason
        return _Attempted(started, round((time.monotonic() - clock) * 1000), receipt, failure)

    def _record(self, delivery: Delivery, attempted: "_Attempted", key_ids: Sequence[int]) -> None:
        attempts = delivery.attempts + 1
        receipt, failure = attempted.receipt, attempted.failure
        status = receipt.status if receipt else None
        with self.database.writing():
            DeliveryAttempt.create(
                delivery=delivery,
                started_at=attempted.started_at,
                milliseconds=attempted.milliseconds,
                status=status,
                error=failure,
            )
            Delivery.update(attempts=attempts).where(Delivery.id == delivery.id).execute()
            if key_ids:
                self.audit.record("doorward", "keys.sent", f"delivery:{delivery.id}", keys=key_ids, status=status)
            if status is not None and 200 <= status < 300:  # noqa: PLR2004
                self._finish(delivery, Status.SENT)
                return
            retry_after = _seconds(receipt.retry_after, self.clock.now()) if receipt else None
            delay = None if status == _GONE else self.schedule.delay(attempts, retry_after)
            if delay is None:
                self._finish(delivery, Status.ABANDONED)
                return
            Delivery.update(next_attempt_at=self.clock.now() + delay).where(Delivery.id == delivery.id).execute()
        raise PutOff(delay, failure or f"HTTP_{status}")

    def _finish(self, delivery: Delivery, status: Status) -> None:
        Delivery.update(status=status, next_attempt_at=None, finished_at=self.clock.now()).where(
            Delivery.id == delivery.id
        ).execute()

    # For operators

    def latest(self, status: Status | None = None, most: int = 100, before: int | None = None) -> list[Delivery]:
        """The latest first."""
        query = Delivery.select(Delivery, ConsentRequest).join(ConsentRequest).order_by(Delivery.id.desc()).limit(most)
        if status is not None:
            query = query.where(Delivery.status == status)
        if before is not None:
            query = query.where(Delivery.id < before)
        return self.database.fetch_all(query)

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
        """Start the schedule of an abandoned delivery anew. Raises DeliveryNotFound, DeliveryNotAbandoned."""
        with self.database.writing():
            delivery = Delivery.get_or_none(Delivery.id == delivery_id)
            if delivery is None:
                raise DeliveryNotFound
            if delivery.status != Status.ABANDONED:
                raise DeliveryNotAbandoned
            Delivery.update(status=Status.QUEUED, attempts=0, next_attempt_at=self.clock.now(), finished_at=None).where(
                Delivery.id == delivery_id
            ).execute()
            self.jobs.queue(DELIVERY, {"delivery": delivery_id})
            self.audit.record(actor, "delivery.requeued", f"delivery:{delivery_id}")


def _fields(delivery: Delivery, request: ConsentRequest, keys: Sequence[str]) -> dict[str, Any]:
    """What the application is told: keys, or an error."""
    outcome = {"api_keys": list(keys)} if keys else {"error": delivery.error}
    return {"userid": request.discord_user, "state": bytes(request.state).decode(), **outcome}


def _seconds(retry_after: str | None, now: datetime) -> float | None:
    """A Retry-After header (RFC 9110, section 10.2.3): seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:10])
    try:
        return (parsedate_to_datetime(retry_after) - now).total_seconds()
    except (TypeError, ValueError):
        return None
