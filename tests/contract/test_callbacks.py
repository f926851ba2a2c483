"""What reaches the callbacks, to the byte: from a request through the gateway to a receiver in its own process."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from standardwebhooks import Webhook, WebhookVerificationError

from doorward_server.models import ConsentRequest, Delivery
from tests.contract.test_request_api_key import (
    AT_ONCE,
    NO_LIMITS,
    TEXTS,
    Application,
    Bot,
    Fields,
    assert_answer,
    assert_ok,
    bot_of,
    by_form,
    by_json,
    by_query,
    fields_of,
    quickly,
    register,
    requests_of,
    snowflake,
)
from tests.processes import await_condition
from tests.sandbox.client import SandboxProvider
from tests.sandbox.receiver import Callback, Receiver, callback_receiver
from tests.stack import Stack, make_stack, rest

FORM_TYPE = "application/x-www-form-urlencoded"
KEYS = ("key-one-A1b2C3", "key-two-ünïcode&=+%", "key-three-\U0001f511")
_PATHS = itertools.count(1)


@dataclass(frozen=True)
class Round:
    """What one test has to do with: a stack that delivers, the receiver, the bot, and a path of its own."""

    stack: Stack
    receiver: Receiver
    bot: Bot
    path: str

    @property
    def callback(self) -> str:
        return self.receiver.url + self.path

    def ask(self, **changes: str) -> ConsentRequest:
        """A stranger's request that was answered OK."""
        fields = fields_of(**{"callback": self.callback, **changes})
        assert_ok(by_form(self.stack, fields))
        return requests_of(self.stack, fields["userid"])[0]

    def ask_as(self, application: Application, **changes: str) -> ConsentRequest:
        fields = fields_of(**{"callback": self.callback, **changes})
        assert_ok(by_form(self.stack, fields, headers=application.headers))
        return requests_of(self.stack, fields["userid"])[0]

    def receive(self, count: int = 1) -> list[Callback]:
        found = self.receiver.await_callbacks(self.path, count)
        assert len(found) == count
        return found

    def await_delivery(self, request: ConsentRequest, status: str) -> Delivery:
        def ended() -> bool:
            row = Delivery.get_or_none(Delivery.request == request.id)
            return row is not None and row.status == status

        await_condition(ended, f"the delivery to be {status}")
        return Delivery.get(Delivery.request == request.id)


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with callback_receiver(tmp_path_factory.mktemp("receiver") / "receiver.log") as receiver:
        yield receiver


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory,
    logs: Path,
    shared_provider: SandboxProvider,
    secrets: set[str],
    receiver: Receiver,
) -> Iterator[tuple[Stack, Bot]]:
    """A server, a gateway, and quick deliveries; requests time out soon where a test waits for it."""
    more = (
        f"{NO_LIMITS}[callbacks]\nallow = [{json.dumps(receiver.address)}]\nschedule = [0.1, 0.1, 0.1]\ntimeout = 0.5\n"
    )
    folder = tmp_path_factory.mktemp("callbacks") / "home"
    stack = make_stack(folder, logs, shared_provider, secrets, more, **AT_ONCE)
    with stack.server(), stack.gateway(), bot_of(stack) as bot:
        yield stack, bot


@pytest.fixture
def round_(house: tuple[Stack, Bot], receiver: Receiver) -> Iterator[Round]:
    stack, bot = house
    _ = stack.app  # its models, for the test's own look at the database
    yield Round(stack, receiver, bot, f"/callback/{next(_PATHS)}")
    receiver.heal()


# Outcomes


def test_keys(round_: Round) -> None:
    """One `api_keys` field per key, in the order chosen."""
    user = snowflake()
    one, two, three = round_.bot.add_keys(user, *KEYS)
    request = round_.ask(userid=user, state="s p+a=c&e")
    assert round_.bot.grant(request.id, three, one, two) == "granted"
    [callback] = round_.receive()
    chosen = [KEYS[2], KEYS[0], KEYS[1]]
    assert callback.pairs == [("userid", user), ("state", "s p+a=c&e"), *(("api_keys", key) for key in chosen)]
    assert callback.headers["content-type"] == FORM_TYPE
    assert round_.await_delivery(request, "sent").webhook_id == callback.webhook_id


@pytest.mark.parametrize("state", ["xyz", ""])
@pytest.mark.parametrize(
    ("outcome", "error"), [("cancel", "user canceled"), ("report_blocked", "user blocked verification dm")]
)
def test_errors(round_: Round, outcome: str, error: str, state: str) -> None:
    request = round_.ask(state=state)
    getattr(round_.bot, outcome)(request.id)
    [callback] = round_.receive()
    assert callback.pairs == [("userid", request.discord_user), ("state", state), ("error", error)]


def test_a_timeout(round_: Round) -> None:
    """Whatever the bot does. The ten minutes are cut short in the database."""
    request = round_.ask()
    app = round_.stack.app
    with app.database.writing():
        app.jobs.queue("consent-deadline", {"request": request.id, "outcome": "timed_out"})
    [callback] = round_.receive()
    assert callback.pairs == [("userid", request.discord_user), ("state", "xyz"), ("error", "timeout")]
    assert round_.bot.cancel(request.id) == "timed_out"


def test_what_an_unregistered_application_gets(round_: Round) -> None:
    round_.bot.cancel(round_.ask().id)
    [callback] = round_.receive()
    assert {name for name in callback.headers if name.startswith("webhook-")} == {"webhook-id"}
    assert callback.webhook_id.startswith("msg_")
    assert not {"authorization", "cookie", "referer"} & set(callback.headers)


def test_the_first_outcome_wins(round_: Round) -> None:
    user = snowflake()
    [key] = round_.bot.add_keys(user, "first-outcome-key")
    request = round_.ask(userid=user)
    assert round_.bot.cancel(request.id) == "canceled"
    assert round_.bot.grant(request.id, key) == "canceled"
    assert round_.bot.report_blocked(request.id) == "canceled"
    [callback] = round_.receive()
    assert (callback.field("error"), callback.keys) == ("user canceled", [])


def test_each_state_gets_its_callback(round_: Round) -> None:
    user = snowflake()
    key_ids = round_.bot.add_keys(user, "shared-prompt-key")
    first = round_.ask(userid=user, state="one")
    round_.ask(userid=user, state="two")
    round_.bot.grant(first.id, *key_ids)
    callbacks = round_.receive(2)
    assert {callback.field("state") for callback in callbacks} == {"one", "two"}
    assert [callback.keys for callback in callbacks] == [["shared-prompt-key"]] * 2
    assert len({callback.webhook_id for callback in callbacks}) == 2


def test_another_callback_is_asked_apart(round_: Round) -> None:
    user = snowflake()
    key_ids = round_.bot.add_keys(user, "asked-apart-key")
    first = round_.ask(userid=user)
    other = round_.ask(userid=user, callback=f"{round_.callback}/other")
    round_.bot.grant(first.id, *key_ids)
    round_.receive()
    assert round_.stack.app.consents.get(other.id).status == "pending"
    assert round_.receiver.callbacks(f"{round_.path}/other") == []
    round_.bot.cancel(other.id)
    [callback] = round_.receiver.await_callbacks(f"{round_.path}/other")
    assert (callback.field("error"), callback.keys) == ("user canceled", [])


@pytest.mark.parametrize("suffix", ["", "?", "?a=b&state=own&a=%20", "/%2F;x=y/%C3%BC?q=ü", "#fragment"])
def test_callbacks_keep_their_address(round_: Round, suffix: str) -> None:
    request = round_.ask(callback=round_.callback + suffix)
    round_.bot.cancel(request.id)
    round_.await_delivery(request, "sent")
    [callback] = [one for one in round_.receiver.callbacks() if one.field("userid") == request.discord_user]
    assert callback.field("state") == "xyz"


@quickly
@given(name=TEXTS, state=TEXTS)
@example(name="\u202e", state="\x00\r\n\u202e\ufeff+%00&=;\\\"'")
def test_any_state_comes_back(round_: Round, name: str, state: str) -> None:
    """Through query, form and JSON, byte for byte."""
    for number, send in enumerate((by_query, by_form, by_json)):
        path = f"{round_.path}/{next(_PATHS)}/{number}"
        fields = fields_of(name=f"x{name}", state=state, callback=round_.receiver.url + path)
        assert_ok(send(round_.stack, fields))
        round_.bot.cancel(requests_of(round_.stack, fields["userid"])[0].id)
        [callback] = round_.receiver.await_callbacks(path)
        assert callback.pairs == [("userid", fields["userid"]), ("state", state), ("error", "user canceled")]


# Registered applications


@pytest.fixture(scope="module")
def forms(house: tuple[Stack, Bot], receiver: Receiver) -> Application:
    return register(house[0], "Form Application", f"{receiver.url}/forms")


@pytest.fixture(scope="module")
def objects(house: tuple[Stack, Bot], receiver: Receiver) -> Application:
    return register(house[0], "JSON Application", f"{receiver.url}/objects", as_json=True)


def verify(callback: Callback, secret: str) -> Any:
    """Verify a signature as receivers do."""
    body = callback.body.encode("latin-1")
    if callback.headers["content-type"] == "application/json":
        return Webhook(secret).verify(body, callback.headers)
    # The library's `verify` wants JSON at the end of it.
    at = datetime.fromtimestamp(int(callback.headers["webhook-timestamp"]), UTC)
    expected = Webhook(secret).sign(callback.webhook_id, at, body.decode())
    if expected not in callback.headers["webhook-signature"].split():
        raise WebhookVerificationError("no matching signature")
    return callback.pairs


def test_a_signed_form(round_: Round, forms: Application) -> None:
    request = round_.ask_as(forms, callback=f"{round_.receiver.url}/forms{round_.path}", state="ä")
    round_.bot.cancel(request.id)
    [callback] = round_.receiver.await_callbacks(f"/forms{round_.path}")
    assert callback.headers["content-type"] == FORM_TYPE
    assert verify(callback, forms.signing_secret) == [
        ("userid", request.discord_user),
        ("state", "ä"),
        ("error", "user canceled"),
    ]
    sent = int(callback.headers["webhook-timestamp"])
    assert abs(datetime.now(UTC).timestamp() - sent) < 60


@pytest.mark.parametrize("shares", [False, True], ids=["error", "keys"])
def test_signed_json(round_: Round, objects: Application, shares: bool) -> None:
    user = snowflake()
    keys = ["json-key-ü", "json-key-2"] if shares else []
    key_ids = round_.bot.add_keys(user, *keys)
    target = f"{round_.receiver.url}/objects{round_.path}"
    request = round_.ask_as(objects, userid=user, callback=target, state="\x00ä\U0001f511")
    round_.bot.grant(request.id, *key_ids) if shares else round_.bot.cancel(request.id)
    [callback] = round_.receiver.await_callbacks(f"/objects{round_.path}")
    outcome: dict[str, Any] = {"api_keys": keys} if shares else {"error": "user canceled"}
    assert callback.headers["content-type"] == "application/json"
    expected = {"userid": user, "state": "\x00ä\U0001f511", **outcome}
    assert verify(callback, objects.signing_secret) == expected == callback.members


def test_signatures_during_a_rotation(round_: Round, house: tuple[Stack, Bot]) -> None:
    """The old secret and the new one verify while both are valid; then the new one alone."""
    prefix = round_.callback
    application = register(house[0], f"Rotating {round_.path}", prefix, as_json=True)
    applications = house[0].app.applications
    new = applications.rotate_signing(application.id, timedelta(days=1))
    newest = applications.rotate_signing(application.id, timedelta(0))
    house[0].secrets |= {new, newest}
    during = register(house[0], f"During {round_.path}", f"{prefix}-during")
    second = applications.rotate_signing(during.id, timedelta(days=1))
    house[0].secrets.add(second)
    for one, path in ((application, round_.path), (during, f"{round_.path}-during")):
        round_.bot.cancel(round_.ask_as(one, callback=round_.receiver.url + path).id)
    [after] = round_.receiver.await_callbacks(round_.path)
    [amid] = round_.receiver.await_callbacks(f"{round_.path}-during")
    assert len(amid.headers["webhook-signature"].split()) == 2
    verify(amid, second)
    verify(amid, during.signing_secret)
    assert len(after.headers["webhook-signature"].split()) == 1
    verify(after, newest)
    for secret in (application.signing_secret, new):
        with pytest.raises(WebhookVerificationError):
            verify(after, secret)


def test_every_attempt_is_signed_for_its_time(round_: Round, objects: Application) -> None:
    path = f"/objects{round_.path}"
    round_.receiver.fault(path, status=503, times=2)
    round_.bot.cancel(round_.ask_as(objects, callback=round_.receiver.url + path).id)
    attempts = round_.receiver.await_callbacks(path, 3)
    assert len({callback.webhook_id for callback in attempts}) == 1
    assert len({callback.body for callback in attempts}) == 1
    for callback in attempts:
        verify(callback, objects.signing_secret)


def test_nobody_borrows_a_prefix(round_: Round, forms: Application, objects: Application) -> None:
    target = f"{round_.receiver.url}/objects{round_.path}"
    answer = by_form(round_.stack, fields_of(callback=target), headers=forms.headers)
    assert_answer(answer, 400, "invalid callback")


# Receivers that fail

FAILURES = [
    pytest.param({"status": 300}, "300", id="300"),
    pytest.param({"status": 301, "headers": {"location": "/elsewhere"}}, "301", id="301"),
    pytest.param({"status": 302, "headers": {"location": "/elsewhere"}}, "302", id="302"),
    pytest.param({"status": 307, "headers": {"location": "/elsewhere"}}, "307", id="307"),
    pytest.param({"status": 308, "headers": {"location": "/elsewhere"}}, "308", id="308"),
    pytest.param({"status": 304}, "304", id="304"),
    pytest.param({"status": 400}, "400", id="400"),
    pytest.param({"status": 404}, "404", id="404"),
    pytest.param({"status": 500}, "500", id="500"),
    pytest.param({"status": 503, "headers": {"retry-after": "0"}}, "503", id="503"),
    pytest.param({"kind": "hang"}, "TIMEOUT", id="hang"),
    pytest.param({"kind": "trickle_headers"}, "TIMEOUT", id="trickle"),
    pytest.param({"kind": "cut"}, "NO_ANSWER", id="close early"),
    pytest.param({"kind": "not_http"}, "NO_ANSWER", id="garbage"),
]


@pytest.mark.parametrize(("plan", "recorded"), FAILURES)
def test_failures_are_tried_again(round_: Round, plan: dict[str, Any], recorded: str) -> None:
    round_.receiver.fault(round_.path, times=1, **plan)
    request = round_.ask()
    round_.bot.cancel(request.id)
    first, second = round_.receive(2)
    assert (first.body, first.webhook_id) == (second.body, second.webhook_id)
    delivery = round_.await_delivery(request, "sent")
    failed, sent = round_.stack.app.deliveries.attempts(delivery.id)
    assert str(failed.status or failed.error) == recorded
    assert (sent.status, sent.error) == (200, None)
    assert round_.receiver.callbacks("/elsewhere") == []


@pytest.mark.parametrize(
    "plan",
    [
        *[pytest.param({"status": status}, id=str(status)) for status in (200, 201, 202, 204, 299)],
        pytest.param({"kind": "gigabyte"}, id="1 GB body"),
        pytest.param({"kind": "trickle_body"}, id="body that trickles"),
        pytest.param({"kind": "cut_body"}, id="body that ends early"),
    ],
)
def test_any_2xx_is_enough(round_: Round, plan: dict[str, Any]) -> None:
    """The body is nobody's business."""
    round_.receiver.fault(round_.path, **plan)
    request = round_.ask()
    round_.bot.cancel(request.id)
    delivery = round_.await_delivery(request, "sent")
    assert delivery.attempts == 1
    assert len(round_.receiver.callbacks(round_.path)) == 1


def test_410_stops(round_: Round) -> None:
    round_.receiver.fault(round_.path, status=410)
    request = round_.ask()
    round_.bot.cancel(request.id)
    delivery = round_.await_delivery(request, "abandoned")
    assert (delivery.attempts, delivery.next_attempt_at) == (1, None)
    round_.receive()


def test_abandoned_and_sent_again(round_: Round) -> None:
    """Abandoned at the end of the schedule; an operator may start it anew, under the same id."""
    round_.receiver.fault(round_.path, status=500, times=4)
    request = round_.ask()
    round_.bot.cancel(request.id)
    abandoned = round_.await_delivery(request, "abandoned")
    round_.receive(4)
    round_.stack.app.deliveries.redeliver(abandoned.id, actor="test")
    round_.await_delivery(request, "sent")
    assert {callback.webhook_id for callback in round_.receive(5)} == {abandoned.webhook_id}


def test_what_is_answered_is_no_callback(round_: Round) -> None:
    """A refused request leads to nothing."""
    user = snowflake()
    fields: Fields = fields_of(userid=user, callback=round_.callback, name="x" * 101)
    assert rest(round_.stack, "POST", "/requestapikey", data=fields).status_code == 400
    assert requests_of(round_.stack, user) == []
    assert round_.receiver.callbacks(round_.path) == []
