"""Applications: whose credentials are right, for how long, and what is nobody else's."""

import base64
import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from doorward_server.applications import Applications, NewApplication, Registered
from doorward_server.audit import Audit
from doorward_server.callbacks import Callback
from doorward_server.crypto import CannotOpen, KeyRing, MasterKey, Place, fingerprint
from doorward_server.database import Database
from doorward_server.errors import ApplicationNotFound, CallbackRejected, OperatorError
from doorward_server.models import SigningSecret
from doorward_server.service_tokens import Service, ServiceTokens
from tests.unit.conftest import StoppedClock, in_files

HOUR = timedelta(hours=1)
MOMENT = timedelta(microseconds=1)
PREFIX = "https://bot.example/callback"


class Made(NamedTuple):
    """Two applications' ids and secrets."""

    one: str
    secret: str
    other: str
    theirs: str
    signing: str


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing([MasterKey.generate()])


@pytest.fixture
def applications(database: Database, clock: StoppedClock, keys: KeyRing) -> Applications:
    return Applications(database, clock, keys, Audit(database, clock))


@pytest.fixture
def tokens(database: Database, clock: StoppedClock) -> ServiceTokens:
    return ServiceTokens(database, clock)


def make(applications: Applications, name: str = "My super bot", prefix: str = PREFIX) -> NewApplication:
    return applications.create(name, [prefix])


def bystander(applications: Applications) -> NewApplication:
    return make(applications, "Bystander", "https://bystander.example/")


def valid(applications: Applications, application_id: str, secrets: list[str]) -> list[bool]:
    """Which of the secrets let the application in."""
    return [applications.find(application_id, secret) == Registered(application_id) for secret in secrets]


def count(database: Database, table: str) -> int:
    return len(database.fetch_rows(f"SELECT id FROM {table}", ()))


def events(database: Database) -> list[tuple[str, str, dict[str, Any]]]:
    """The audit trail: action, subject, details."""
    rows = database.fetch_rows("SELECT actor, action, subject, details FROM audit_events ORDER BY id", ())
    assert {actor for actor, *_ in rows} <= {"operator"}
    return [(action, subject, json.loads(details)) for _, action, subject, details in rows]


# Creating and finding


def test_an_application_is_found_by_its_id_and_secret(applications: Applications, clock: StoppedClock) -> None:
    application, secret, signing_secret = make(applications)
    kept = applications.get(application.id)
    assert (kept.name, kept.callback_prefixes, kept.callback_format) == ("My super bot", [PREFIX], "form")
    assert (kept.enabled, kept.created_at) == (True, clock.now())
    assert (application.id[:4], len(application.id), secret[:4], len(secret)) == ("app_", 20, "das_", 47)
    assert signing_secret.startswith("whsec_")
    assert len(base64.b64decode(signing_secret.removeprefix("whsec_"), validate=True)) == 32
    assert applications.find(application.id, secret) == Registered(application.id)
    clock.advance(timedelta(days=5000))
    assert applications.find(application.id, secret) == Registered(application.id)
    assert applications.signing_secrets(application.id) == [signing_secret]


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda made: (made.one, made.theirs), id="another's secret"),
        pytest.param(lambda made: (made.other, made.secret), id="another's id"),
        pytest.param(lambda made: (made.one, made.signing), id="the signing secret"),
        pytest.param(lambda made: (made.secret, made.one), id="the wrong way round"),
        pytest.param(lambda made: ("app_unknown", made.secret), id="unknown id"),
        pytest.param(lambda made: ("", made.secret), id="no id"),
        pytest.param(lambda made: (made.one.upper(), made.secret), id="id in capitals"),
        pytest.param(lambda made: (made.one + " ", made.secret), id="blank after the id"),
        pytest.param(lambda made: (made.one[:-1], made.secret), id="shorter id"),
        pytest.param(lambda made: ("é" + made.one, made.secret), id="id beyond ASCII"),
        pytest.param(lambda made: ("\udcff", made.secret), id="lone surrogate in the id"),
        pytest.param(lambda made: (made.one, ""), id="no secret"),
        pytest.param(lambda made: (made.one, made.secret[:-1]), id="shorter secret"),
        pytest.param(lambda made: (made.one, made.secret + "\n"), id="line feed after the secret"),
        pytest.param(lambda made: (made.one, made.secret.swapcase()), id="secret in the other case"),
        pytest.param(lambda made: (made.one, made.secret[4:]), id="secret without its prefix"),
        pytest.param(lambda made: (made.one, fingerprint(made.secret).hex()), id="the stored hash"),
        pytest.param(lambda made: (made.one, "\x00"), id="NUL"),
        pytest.param(lambda made: (made.one, "\udcff"), id="lone surrogate"),
    ],
)
def test_nobody_else_is(applications: Applications, choose: Callable[[Made], tuple[str, str]]) -> None:
    one, other = make(applications), bystander(applications)
    made = Made(one.application.id, one.secret, other.application.id, other.secret, one.signing_secret)
    assert applications.find(*choose(made)) is None


def test_applications_are_listed_in_the_order_of_their_making(applications: Applications, clock: StoppedClock) -> None:
    assert applications.list() == []
    made = []
    for name in ("B", "A", "C"):
        made.append(make(applications, name, f"https://{name}.example/").application)
        clock.advance(MOMENT)
    applications.enable(made[1].id, enabled=False)
    assert [(one.id, one.name, one.enabled) for one in applications.list()] == [
        (one.id, one.name, one is not made[1]) for one in made
    ]


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda applications: applications.get("app_unknown"), id="get"),
        pytest.param(lambda applications: applications.change("app_unknown", name="x"), id="change"),
        pytest.param(lambda applications: applications.rotate("app_unknown", HOUR), id="rotate"),
        pytest.param(lambda applications: applications.rotate_signing("app_unknown", HOUR), id="rotate_signing"),
        pytest.param(lambda applications: applications.enable("app_unknown", enabled=True), id="enable"),
        pytest.param(lambda applications: applications.enable("app_unknown", enabled=False), id="disable"),
    ],
)
def test_an_unknown_application(
    applications: Applications, database: Database, use: Callable[[Applications], object]
) -> None:
    make(applications)
    with pytest.raises(ApplicationNotFound):
        use(applications)
    assert [action for action, *_ in events(database)] == ["application.created"]
    assert applications.signing_secrets("app_unknown") == []


def test_no_secret_stands_in_the_files(applications: Applications, database: Database) -> None:
    application, first, signing = make(applications)
    secrets = [first, signing, applications.rotate(application.id, HOUR)]
    secrets.append(applications.rotate_signing(application.id, HOUR))
    assert in_files(database, application.id)
    shown = [secret.removeprefix("das_").removeprefix("whsec_") for secret in secrets]
    assert [in_files(database, secret) for secret in shown] == [False] * 4


def test_signing_secrets_are_sealed_at_their_place(applications: Applications, keys: KeyRing) -> None:
    one, other = make(applications), bystander(applications)
    first, second = SigningSecret.select().order_by(SigningSecret.id)
    assert keys.open(first.secret, Place("signing_secrets", first.id, "secret")) == one.signing_secret
    SigningSecret.update(secret=first.secret).where(SigningSecret.id == second.id).execute()
    with pytest.raises(CannotOpen):
        applications.signing_secrets(other.application.id)


# Names


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("x", "x", id="one character"),
        pytest.param("x" * 100, "x" * 100, id="the longest"),
        pytest.param(f"\u202e{'x' * 100}\n", "x" * 100, id="the longest when it is clean"),
        pytest.param("  My\tbot\x1b ", "Mybot", id="control characters"),
        pytest.param("Ünïcode 🎉", "Ünïcode 🎉", id="beyond ASCII"),
    ],
)
def test_names(applications: Applications, name: str, kept: str) -> None:
    application = make(applications, name).application
    assert applications.get(application.id).name == kept
    assert applications.is_known_name(name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param(" ", id="blank"),
        pytest.param("\x00\u202e\n", id="nothing when it is clean"),
        pytest.param("\u200b\ufe0f", id="nothing that shows"),
        pytest.param("x" * 101, id="long"),
    ],
)
def test_names_that_no_application_can_have(applications: Applications, database: Database, name: str) -> None:
    bystander_id = bystander(applications).application.id
    with pytest.raises(OperatorError, match="the name has to be 1 to 100"):
        make(applications, name)
    with pytest.raises(OperatorError, match="the name has to be 1 to 100"):
        applications.change(bystander_id, name=name)
    assert not applications.is_known_name(name)
    assert len(events(database)) == 1


@pytest.mark.parametrize("name", ["My super bot", "MY SUPER BOT", "My\u00a0su\u200bper \u202ebot", "Ｍｙ super bot"])  # noqa: RUF001
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
def test_a_name_is_one_application_s(applications: Applications, database: Database, name: str, enabled: bool) -> None:
    first, other = make(applications).application, bystander(applications).application
    applications.enable(first.id, enabled=enabled)
    before = events(database)
    with pytest.raises(OperatorError, match="another application has a name that looks the same"):
        make(applications, name, "https://other.example/")
    with pytest.raises(OperatorError, match="another application has a name that looks the same"):
        applications.change(other.id, name=name, callback_format="json")
    assert applications.is_known_name(name)
    assert events(database) == before  # nothing of what failed was kept
    assert (len(applications.list()), count(database, "application_secrets")) == (2, 2)
    assert applications.get(other.id).callback_format == "form"
    assert applications.change(first.id, name=name).id == first.id  # its own is free for it


def test_a_name_is_one_application_s_even_at_the_same_time(applications: Applications, database: Database) -> None:
    outcomes: list[object] = []
    start = threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        try:
            outcomes.append(make(applications, "My super bot", f"https://{number}.example.com/").application.id)
        except OperatorError as error:
            outcomes.append(error)
        finally:
            database.engine.close()

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert [one for one in outcomes if isinstance(one, str)] == [one.id for one in applications.list()]
    assert len(applications.list()) == 1


def test_an_old_name_is_free_again(applications: Applications) -> None:
    application = make(applications).application
    applications.change(application.id, name="Your super bot")
    assert [applications.is_known_name(name) for name in ("My super bot", "your SUPER bot")] == [False, True]
    make(applications, "My super bot", "https://other.example/")


# Prefixes


@pytest.mark.parametrize(
    ("prefixes", "why"),
    [
        pytest.param([], "at least one callback prefix", id="none"),
        pytest.param(["bot.example/callback"], "absolute", id="not absolute"),
        pytest.param(["https://u@bot.example/"], "user information", id="user information"),
        pytest.param(["https://bot.example/?a"], "neither a query nor a fragment", id="query"),
        pytest.param(["https://bot.example/a/../b"], "no `.`", id="dots"),
        pytest.param(["http://127.1/"], "address", id="hidden address"),
        pytest.param([PREFIX, ""], "absolute", id="one of two"),
        pytest.param([f"https://bot.example/{'x' * 2048}"], "at most 2048", id="long"),
    ],
)
def test_prefixes_that_no_application_can_have(applications: Applications, prefixes: list[str], why: str) -> None:
    application = bystander(applications).application
    with pytest.raises(OperatorError, match=why):
        applications.create("My super bot", prefixes)
    with pytest.raises(OperatorError, match=why):
        applications.change(application.id, prefixes=prefixes)
    assert [one.callback_prefixes for one in applications.list()] == [["https://bystander.example/"]]


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param(PREFIX, id="the same"),
        pytest.param("HTTPS://BOT.example:443/%63allback/", id="the same in other words"),
        pytest.param(f"{PREFIX}/mine", id="below"),
        pytest.param("https://bot.example", id="above"),
    ],
)
def test_prefixes_of_two_applications_do_not_overlap(
    applications: Applications, database: Database, prefix: str
) -> None:
    first, other = make(applications).application, bystander(applications).application
    for use in (
        lambda: applications.create("Another", ["https://free.example/", prefix]),
        lambda: applications.change(other.id, prefixes=[prefix]),
    ):
        with pytest.raises(OperatorError, match=f"overlaps {PREFIX}, a prefix of the application {first.id}"):
            use()
    assert len(events(database)) == 2
    changed = applications.change(first.id, prefixes=[prefix, "https://bot.example/callback/x", prefix])
    assert changed.callback_prefixes == [prefix, "https://bot.example/callback/x"]  # its own may overlap


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
@pytest.mark.parametrize(
    ("url", "owner"),
    [
        pytest.param(PREFIX, "one", id="prefix"),
        pytest.param(f"{PREFIX}/x?y=z", "one", id="below"),
        pytest.param("https://bot.example/second", "one", id="second prefix"),
        pytest.param("https://bystander.example/any/thing", "bystander", id="another's"),
        pytest.param(f"{PREFIX}x", None, id="beside"),
        pytest.param(f"{PREFIX}/../x", None, id="out of it"),
        pytest.param("https://other.example/%2e%2e/..%2f..%5c;//x", None, id="somewhere else, however it is read"),
    ],
)
def test_owner_of(applications: Applications, url: str, owner: str | None, enabled: bool) -> None:
    one = applications.create("One", [PREFIX, "https://bot.example/second"]).application
    owners = {"one": one, "bystander": bystander(applications).application}
    for application in owners.values():
        applications.enable(application.id, enabled=enabled)
    found = applications.owner_of(Callback.parse(url))
    assert found == (owners[owner] if owner else None)
    assert found is None or found.enabled == enabled


@pytest.mark.parametrize("rest", ["/..%2fx", "/..;/x", "//../x", "%2fx", "/..\\x", "/%252e%252e/x"])
def test_a_callback_that_may_or_may_not_be_an_application_s_is_refused(applications: Applications, rest: str) -> None:
    callback = Callback.parse(f"{PREFIX}{rest}")
    assert applications.owner_of(callback) is None
    make(applications)
    with pytest.raises(CallbackRejected):
        applications.owner_of(callback)


def test_changed_prefixes_count_at_once(applications: Applications) -> None:
    application = make(applications).application
    callback, new = Callback.parse(PREFIX), Callback.parse("https://new.example/x")
    assert (applications.owner_of(callback), applications.owner_of(new)) == (application, None)
    applications.change(application.id, prefixes=["https://new.example"])
    assert (applications.owner_of(callback), applications.owner_of(new)) == (None, application)


# Another secret


@pytest.mark.parametrize(
    ("overlap", "later", "expected"),
    [
        pytest.param(HOUR, timedelta(0), [True, True], id="at once"),
        pytest.param(HOUR, HOUR - MOMENT, [True, True], id="until its last moment"),
        pytest.param(HOUR, HOUR, [False, True], id="over"),
        pytest.param(HOUR, timedelta(days=5000), [False, True], id="long over"),
        pytest.param(timedelta(0), timedelta(0), [False, True], id="no overlap"),
    ],
)
def test_the_secret_before_is_valid_for_the_overlap(
    applications: Applications, clock: StoppedClock, overlap: timedelta, later: timedelta, expected: list[bool]
) -> None:
    application, first, first_signing = make(applications)
    second = applications.rotate(application.id, overlap)
    second_signing = applications.rotate_signing(application.id, overlap)
    assert (second != first, second_signing != first_signing) == (True, True)
    clock.advance(later)
    assert valid(applications, application.id, [first, second]) == expected
    signing = applications.signing_secrets(application.id)
    assert signing == ([second_signing, first_signing] if expected[0] else [second_signing])


@pytest.mark.parametrize(
    ("overlaps", "pause", "expected"),
    [
        pytest.param((HOUR, HOUR), timedelta(0), [False, True, True], id="two are valid at most"),
        pytest.param((HOUR, HOUR), 2 * HOUR, [False, True, True], id="the older had expired"),
        pytest.param((HOUR, timedelta(0)), timedelta(0), [False, False, True], id="without overlap"),
        pytest.param((HOUR, HOUR, HOUR), timedelta(0), [False, False, True, True], id="three in a row"),
    ],
)
def test_a_further_secret_ends_the_oldest(
    applications: Applications,
    clock: StoppedClock,
    database: Database,
    overlaps: tuple[timedelta, ...],
    pause: timedelta,
    expected: list[bool],
) -> None:
    application, first, first_signing = make(applications)
    other = bystander(applications)
    secrets, signing = [first], [first_signing]
    for number, overlap in enumerate(overlaps, 1):
        secrets.append(applications.rotate(application.id, overlap))
        signing.append(applications.rotate_signing(application.id, overlap))
        if number < len(overlaps):
            clock.advance(pause)
    assert valid(applications, application.id, secrets) == expected
    in_use = applications.signing_secrets(application.id)
    assert [secret in in_use for secret in signing] == expected
    assert valid(applications, other.application.id, [other.secret]) == [True]
    assert applications.signing_secrets(other.application.id) == [other.signing_secret]
    # Nothing heaps up: two of the one and one of the other.
    assert (count(database, "application_secrets"), count(database, "signing_secrets")) == (3, 3)
    clock.advance(HOUR)
    assert valid(applications, application.id, secrets) == [False] * len(overlaps) + [True]
    assert applications.signing_secrets(application.id) == [signing[-1]]


# Disabled applications


def test_a_disabled_application_is_not_found_until_it_is_enabled(
    applications: Applications, clock: StoppedClock, tokens: ServiceTokens
) -> None:
    application, first, signing = make(applications)
    second = applications.rotate(application.id, HOUR)
    token, value = tokens.create((), application_id=application.id)
    other = bystander(applications)
    for _ in range(2):  # doing it twice is no error
        applications.enable(application.id, enabled=False)
    assert valid(applications, application.id, [first, second]) == [False, False]
    assert tokens.find(value) is None
    assert valid(applications, other.application.id, [other.secret]) == [True]
    assert applications.get(application.id).enabled is False
    assert applications.signing_secrets(application.id) == [signing]  # for what is still under way
    clock.advance(HOUR / 2)
    for _ in range(2):
        applications.enable(application.id, enabled=True)
    assert valid(applications, application.id, [first, second]) == [True, True]
    assert tokens.find(value) == Service(token.id, frozenset(), application.id)
    clock.advance(HOUR / 2)
    assert valid(applications, application.id, [first, second]) == [False, True]  # that time went on


def test_neither_a_new_secret_nor_a_change_enables_anybody(applications: Applications) -> None:
    application = make(applications).application
    applications.enable(application.id, enabled=False)
    secret = applications.rotate(application.id, HOUR)
    applications.change(application.id, name="Another name")
    assert applications.find(application.id, secret) is None
    applications.enable(application.id, enabled=True)
    assert applications.find(application.id, secret) == Registered(application.id)


# What is written down


def test_each_change_is_in_the_audit_trail(applications: Applications, database: Database, clock: StoppedClock) -> None:
    application, secret, signing_secret = make(applications)
    secrets = [secret, signing_secret]
    applications.change(application.id, name="Other", prefixes=[PREFIX], callback_format="json")
    applications.change(application.id, name="Other")  # changes nothing
    for enabled in (False, False, True):
        applications.enable(application.id, enabled=enabled)
    secrets += [applications.rotate(application.id, HOUR), applications.rotate_signing(application.id, timedelta(0))]
    ends_at, now = (clock.now() + HOUR).isoformat(), clock.now().isoformat()
    recorded = events(database)
    assert {subject for _, subject, _ in recorded} == {f"application:{application.id}"}
    assert [(action.removeprefix("application."), details) for action, _, details in recorded] == [
        ("created", {"name": "My super bot", "callback_prefixes": [PREFIX], "callback_format": "form"}),
        ("changed", {"name": "Other", "callback_format": "json"}),
        ("disabled", {}),
        ("enabled", {}),
        ("rotated", {"previous_ends": ends_at}),
        ("signing_rotated", {"previous_ends": now}),
    ]
    assert not any(secret[6:] in json.dumps(recorded) for secret in secrets)


# Service tokens


def test_a_token_of_an_application_has_no_role(applications: Applications, tokens: ServiceTokens) -> None:
    application = make(applications).application
    token, value = tokens.create((), "x", HOUR, application.id)
    assert tokens.find(value) == Service(token.id, frozenset(), application.id)
    backend, other = tokens.create(["backend"])
    assert tokens.find(other) == Service(backend.id, frozenset({"backend"}), None)
    tokens.revoke(token.id)
    assert tokens.find(value) is None


def test_a_token_of_an_application_expires(
    applications: Applications, tokens: ServiceTokens, clock: StoppedClock
) -> None:
    _, value = tokens.create((), "x", HOUR, make(applications).application.id)
    clock.advance(HOUR - MOMENT)
    assert tokens.find(value) is not None
    clock.advance(MOMENT)
    assert tokens.find(value) is None
