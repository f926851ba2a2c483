"""API keys: which are kept, how much of them is shown, and that they are sealed, counted and recorded."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from doorward_server.api_keys import ApiKeys
from doorward_server.audit import Audit
from doorward_server.crypto import CannotOpen, KeyRing, MasterKey
from doorward_server.database import Database
from doorward_server.discord_users import DiscordUsers
from doorward_server.errors import (
    CallError,
    InvalidKey,
    InvalidLabel,
    InvalidService,
    KeyExists,
    KeyNotFound,
    KeyRejected,
    ServiceUnavailable,
    StorageUnavailable,
    TooManyKeys,
    UserNotFound,
)
from doorward_server.key_validators import KeyValidators
from doorward_server.models import ApiKey, AuditEvent, User
from doorward_server.validators import Validator
from tests.unit.conftest import StoppedClock, in_files
from tests.unit.peers import Peer, Serve, answering, make_outbound

VALUE = "hunter2-sekret-value"
KEYS = KeyRing([MasterKey(b"k" * 32)])
Make = Callable[..., ApiKeys]


@pytest.fixture
def make(database: Database, clock: StoppedClock) -> Iterator[Make]:
    """Makes an ApiKeys; without validators it asks nobody."""
    with make_outbound() as nowhere:

        def make(keys: KeyRing = KEYS, validators: KeyValidators | None = None) -> ApiKeys:
            return ApiKeys(database, clock, keys, validators or KeyValidators(nowhere, {}), Audit(database, clock))

        yield make


@pytest.fixture
def api_keys(make: Make) -> ApiKeys:
    return make()


@pytest.fixture
def user(database: Database, clock: StoppedClock) -> User:
    return DiscordUsers(database, clock).obtain("7")


@pytest.fixture
def other(database: Database, clock: StoppedClock) -> User:
    return DiscordUsers(database, clock).obtain("8")


def add(api_keys: ApiKeys, user: User, value: str = VALUE, service: str = "forum", label: str = "main") -> ApiKey:
    return api_keys.add(user, service, label, value, actor="tester")


def fill(api_keys: ApiKeys, user: User, number: int = 15, service: str = "forum") -> list[int]:
    return [add(api_keys, user, f"value-{service}-{one}", service).id for one in range(number)]


def count(database: Database) -> int:
    return len(database.fetch_all(ApiKey.select(ApiKey.id)))


def events(database: Database) -> list[tuple[str, str, str, Any]]:
    rows = database.fetch_all(AuditEvent.select().order_by(AuditEvent.id))
    return [(row.actor, row.action, row.subject, row.details) for row in rows]


# Adding


def test_a_key_is_kept(api_keys: ApiKeys, user: User, clock: StoppedClock) -> None:
    key = add(api_keys, user)
    [(row, last_four)] = api_keys.list(user)
    for one in (key, row):
        assert (one.id, one.user_id, one.service, one.label) == (key.id, user.id, "forum", "main")
        assert (one.account, one.permissions, one.created_at) == (None, [], clock.now())
    assert last_four == "alue"
    assert values(api_keys, [key.id]) == [VALUE]


def values(api_keys: ApiKeys, key_ids: Sequence[int]) -> list[str]:
    return list(api_keys.values(key_ids).values())


@pytest.mark.parametrize(
    ("service", "label", "value"),
    [
        pytest.param("g", "x", "v", id="shortest"),
        pytest.param("0", "0", "0", id="digits"),
        pytest.param("a" * 40, "x" * 80, "v" * 4096, id="longest"),
        pytest.param("a-b_c", "a b", "a-b_c", id="punctuation"),
        pytest.param("forum", "😀" * 80, "😀" * 4096, id="longest in bytes"),
        pytest.param("forum", "<b>*_`@everyone", "'\"`\\;--<>&%{key}", id="markup"),
        pytest.param("forum", " x ", "ключ", id="blanks around the label, Cyrillic"),
    ],
)
def test_forms(api_keys: ApiKeys, user: User, service: str, label: str, value: str) -> None:
    key = add(api_keys, user, value, service, label)
    assert values(api_keys, [key.id]) == [value]
    assert [(row.service, row.label) for row, _ in api_keys.list(user)] == [(service, label)]


@pytest.mark.parametrize(
    ("part", "text", "failure"),
    [
        *(
            pytest.param("service", text, InvalidService, id=f"service: {what}")
            for what, text in {
                "empty": "",
                "41 characters": "a" * 41,
                "capitals": "GW2",
                "blank": "a b",
                "begins with -": "-a",
                "begins with _": "_a",
                "dot": "a.b",
                "slash": "a/b",
                "accent": "é",
                "full-width": "\uff47",
                "line feed": "gw2\n",
                "NUL": "gw2\x00",
                "lone surrogate": "\udcff",
            }.items()
        ),
        *(
            pytest.param("label", text, InvalidLabel, id=f"label: {what}")
            for what, text in {
                "empty": "",
                "blanks": "   ",
                "81 characters": "x" * 81,
                "line feed": "a\nb",
                "tab": "a\tb",
                "NUL": "a\x00",
                "escape": "\x1b[31m",
                "delete": "a\x7f",
                "C1 control": "a\x9b",
                "direction override": "a\u202eb",
                "line separator": "a\u2028b",
                "zero width": "\u200b",
                "no-break space": "a\u00a0b",
                "lone surrogate": "\udcff",
            }.items()
        ),
        *(
            pytest.param("value", text, InvalidKey, id=f"value: {what}")
            for what, text in {
                "empty": "",
                "blank": " ",
                "blank within": "a b",
                "blank after": "ab ",
                "4097 characters": "x" * 4097,
                "line feed": "ab\n",
                "carriage return": "ab\r",
                "tab": "a\tb",
                "NUL": "a\x00b",
                "escape": "\x1b[31m",
                "no-break space": "a\u00a0b",
                "ideographic space": "a\u3000b",
                "zero width": "a\u200bb",
                "direction override": "a\u202eb",
                "byte order mark": "\ufeffab",
                "lone surrogate": "\ud800",
            }.items()
        ),
    ],
)
def test_other_forms_are_refused(api_keys: ApiKeys, user: User, part: str, text: str, failure: type[CallError]) -> None:
    with pytest.raises(failure):
        add(api_keys, user, **{part: text})
    assert count(api_keys.database) == 0
    assert events(api_keys.database) == []


def test_the_same_key_twice(api_keys: ApiKeys, user: User, other: User) -> None:
    add(api_keys, user)
    for label in ("main", "another label"):
        with pytest.raises(KeyExists):
            add(api_keys, user, label=label)
    add(api_keys, user, service="game")
    add(api_keys, user, VALUE.upper())
    add(api_keys, user, VALUE + "x")
    add(api_keys, other)
    assert [len(api_keys.list(one)) for one in (user, other)] == [4, 1]


def test_at_most_15_keys_per_user_and_service(api_keys: ApiKeys, user: User, other: User) -> None:
    ids = fill(api_keys, user)
    with pytest.raises(TooManyKeys):
        add(api_keys, user)
    with pytest.raises(KeyExists):  # which tells more
        add(api_keys, user, "value-forum-3")
    fill(api_keys, user, service="game")
    fill(api_keys, other)
    api_keys.remove(user, ids[3], actor="tester")
    add(api_keys, user)
    with pytest.raises(TooManyKeys):
        add(api_keys, user, "value-forum-3")
    assert count(api_keys.database) == 45


def test_a_user_who_is_gone(api_keys: ApiKeys, user: User, database: Database) -> None:
    with database.writing():
        User.delete().where(User.id == user.id).execute()
    with pytest.raises(UserNotFound):
        add(api_keys, user)
    assert (count(database), events(database)) == (0, [])


# Races


def at_once(acts: list[Callable[[], ApiKey]]) -> list[type[Exception] | None]:
    """How each of them ended, when all begin together."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], ApiKey]) -> type[Exception] | None:
        barrier.wait(10)
        try:
            act()
        except CallError as failure:
            return type(failure)
        return None

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


@pytest.mark.parametrize(
    ("value_of", "outcomes"),
    [
        pytest.param(lambda _: VALUE, {None: 1, KeyExists: 19}, id="the same key"),
        pytest.param(lambda number: f"{VALUE}-{number}", {None: 15, TooManyKeys: 5}, id="20 keys"),
    ],
)
def test_who_adds_at_once(
    api_keys: ApiKeys,
    database: Database,
    user: User,
    value_of: Callable[[int], str],
    outcomes: dict[type[Exception] | None, int],
) -> None:
    ended = at_once([partial(add, api_keys, user, value_of(number)) for number in range(20)])
    assert {outcome: ended.count(outcome) for outcome in set(ended)} == outcomes
    assert count(database) == outcomes[None] == len(events(database))


# The service's judgement


def judge(make: Make, serve: Serve, act: Callable[[ApiKeys], object], **keys: Any) -> int:
    """Act with a service `game` that answers so; returns how often it was asked."""
    with Peer(serve) as peer, make_outbound(peer.address) as outbound:
        game = Validator(service="game", tokeninfo_url=f"{peer.url}/t", account_url=f"{peer.url}/a")
        act(make(validators=KeyValidators(outbound, {"game": game}), **keys))
        return peer.connections


GOOD = answering(b'{"name":"Ada.1234","permissions":["account","wallet"]}')


def test_what_the_service_tells_is_kept(make: Make, user: User) -> None:
    assert judge(make, GOOD, lambda api_keys: add(api_keys, user, service="game")) == 2
    [(row, _)] = make().list(user)
    assert (row.account, row.permissions) == ("Ada.1234", ["account", "wallet"])


def test_other_services_are_not_asked(make: Make, user: User) -> None:
    assert judge(make, GOOD, lambda api_keys: add(api_keys, user, service="forum")) == 0


@pytest.mark.parametrize(
    ("status", "failure"), [("401 Unauthorized", KeyRejected), ("503 Service Unavailable", ServiceUnavailable)]
)
def test_what_the_service_does_not_know_is_not_kept(
    make: Make, user: User, database: Database, status: str, failure: type[CallError]
) -> None:
    def refuse(api_keys: ApiKeys) -> None:
        with pytest.raises(failure):
            add(api_keys, user, service="game")

    judge(make, answering(status=status), refuse)
    assert (count(database), events(database)) == (0, [])


def test_what_cannot_be_kept_is_not_asked_about(make: Make, user: User) -> None:
    fill(make(), user, service="game")

    def refuse(api_keys: ApiKeys) -> None:
        for failure, value in ((TooManyKeys, VALUE), (KeyExists, "value-game-0"), (InvalidKey, "a b")):
            with pytest.raises(failure):
                add(api_keys, user, value, "game")

    assert judge(make, GOOD, refuse) == 0


@pytest.mark.parametrize(
    ("number", "value", "failure"),
    [pytest.param(1, VALUE, KeyExists, id="the same"), pytest.param(15, "new-{}", TooManyKeys, id="the 15th")],
)
def test_what_is_added_while_the_service_is_asked(
    make: Make, database: Database, user: User, number: int, value: str, failure: type[CallError]
) -> None:
    """No transaction is open meanwhile, and what was checked before is checked again."""
    quick = make()

    def serve(connection: socket.socket, stopping: threading.Event) -> None:
        if not quick.list(user):
            for one in range(number):
                add(quick, user, value.format(one), "game")
        GOOD(connection, stopping)

    def refuse(api_keys: ApiKeys) -> None:
        with pytest.raises(failure):
            add(api_keys, user, service="game")

    assert judge(make, serve, refuse) == 2
    assert count(database) == number


# Listing, opening and removing


def test_keys_are_listed_in_the_order_of_their_adding(api_keys: ApiKeys, user: User, other: User) -> None:
    ids = [add(api_keys, user, f"value-{number}", service).id for number, service in enumerate(("b", "a", "b"))]
    theirs = add(api_keys, other).id
    assert [row.id for row, _ in api_keys.list(user)] == ids
    assert [row.id for row, _ in api_keys.list(user, "b")] == [ids[0], ids[2]]
    assert [row.id for row, _ in api_keys.list(other)] == [theirs]
    assert [api_keys.list(user, service) for service in ("", "B", "c")] == [[], [], []]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("1", ""),
        ("12", "2"),
        ("123", "3"),
        ("1234", "34"),
        ("12345", "45"),
        ("123456", "456"),
        ("1234567", "567"),
        ("12345678", "5678"),
        ("123456789", "6789"),
        ("ab😀é😀xyz", "😀xyz"),
    ],
)
def test_never_more_than_half_is_shown(api_keys: ApiKeys, user: User, value: str, shown: str) -> None:
    add(api_keys, user, value)
    assert [listed.last_four for listed in api_keys.list(user)] == [shown]


def test_values_come_in_the_order_asked(api_keys: ApiKeys, user: User, other: User) -> None:
    first, second, third = fill(api_keys, user, 3)
    theirs = add(api_keys, other).id
    assert api_keys.values([]) == {}
    assert values(api_keys, (third, theirs, first)) == ["value-forum-2", VALUE, "value-forum-0"]
    api_keys.remove(user, third, actor="tester")
    assert values(api_keys, [third, second, 10**6, first]) == ["value-forum-1", "value-forum-0"]
    assert api_keys.values([third]) == {}


@pytest.mark.parametrize("which", ["another's", "removed before", "unknown", "0", "negative"])
def test_a_key_that_the_user_does_not_have(api_keys: ApiKeys, user: User, other: User, which: str) -> None:
    mine, theirs = add(api_keys, user).id, add(api_keys, other).id
    api_keys.remove(user, mine, actor="tester")
    key_id = {"another's": theirs, "removed before": mine, "unknown": 10**6, "0": 0, "negative": -1}[which]
    with pytest.raises(KeyNotFound):
        api_keys.remove(user, key_id, actor="tester")
    assert values(api_keys, [theirs]) == [VALUE]
    assert len(events(api_keys.database)) == 3


# Secrecy and records


def test_values_are_sealed_at_their_place(make: Make, user: User, database: Database) -> None:
    api_keys = make()
    first, second = add(api_keys, user), add(api_keys, user, f"{VALUE}-2")
    assert not in_files(database, VALUE)
    with database.writing():
        ApiKey.update(value=first.value).where(ApiKey.id == second.id).execute()
    with pytest.raises(CannotOpen):
        api_keys.values([second.id])
    with pytest.raises(CannotOpen):
        make(keys=KeyRing([MasterKey(b"x" * 32)])).values([first.id])


def test_changes_are_recorded_without_the_value(api_keys: ApiKeys, user: User, other: User, database: Database) -> None:
    key = add(api_keys, user)
    api_keys.add(other, "game", "Ünï 😀", VALUE, actor="bot")
    api_keys.remove(user, key.id, actor="operator")
    details = {"key_id": key.id, "service": "forum", "label": "main"}
    assert events(database) == [
        ("tester", "key.added", f"user:{user.id}", details),
        ("bot", "key.added", f"user:{other.id}", {"key_id": key.id + 1, "service": "game", "label": "Ünï 😀"}),
        ("operator", "key.removed", f"user:{user.id}", details),
    ]
    assert not in_files(database, VALUE)


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda api_keys, user, _: add(api_keys, user, "another"), id="add"),
        pytest.param(lambda api_keys, user, key_id: api_keys.remove(user, key_id, actor="tester"), id="remove"),
    ],
)
def test_without_a_record_nothing_changes(
    api_keys: ApiKeys, user: User, database: Database, act: Callable[[ApiKeys, User, int], object]
) -> None:
    key = add(api_keys, user)
    with database.writing():
        database.execute("DROP TABLE audit_events", ())
    with pytest.raises(StorageUnavailable):
        act(api_keys, user, key.id)
    assert [row.id for row, _ in api_keys.list(user)] == [key.id]
