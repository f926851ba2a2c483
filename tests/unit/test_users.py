"""Users: which names and addresses are taken, and how a user is found again."""

import concurrent.futures
import threading

import pytest

from doorward_server.clients import ApiClients
from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import (
    CallError,
    EmailTaken,
    InvalidEmail,
    InvalidName,
    NotYourUser,
    SlugTaken,
    UserNotFound,
)
from doorward_server.users import Users, find_id


@pytest.fixture
def users(database: Database) -> Users:
    return Users(database, Clock())


# Names


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        pytest.param("Ada", "ada", id="one word"),
        pytest.param("Ada Lovelace", "ada-lovelace", id="two words"),
        pytest.param("  Ada -- Lovelace! ", "ada-lovelace", id="punctuation between"),
        pytest.param("Ångström Ødegård", "angstrom-odegard", id="diacritics"),
        pytest.param("Straße", "strasse", id="sharp s"),
        pytest.param("Лев Толстой", "lev-tolstoi", id="Cyrillic"),
        pytest.param("李白", "li-bai", id="Chinese"),
        pytest.param("O'Brien", "o-brien", id="apostrophe"),
        pytest.param("R2-D2", "r2-d2", id="digits and letters"),
        pytest.param("1 2", "1-2", id="digits apart"),
        pytest.param("me too", "me-too", id="begins with me"),
        pytest.param("a", "a", id="one letter"),
        pytest.param("x" * 100, "x" * 100, id="100 characters"),
        pytest.param("Ada 😀", "ada", id="letters and emoji"),
        pytest.param("../etc/passwd", "etc-passwd", id="a path"),
        pytest.param("a%2Fb", "a-2fb", id="percent"),
    ],
)
def test_a_name_gives_a_slug(users: Users, name: str, slug: str) -> None:
    user = users.create(name)
    assert (user.slug, user.name, user.email) == (slug, name, None)
    assert users.get(slug).id == user.id


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param("   ", id="blanks"),
        pytest.param("12345", id="digits only"),
        pytest.param("\uff11\uff12\uff13", id="full-width digits"),
        pytest.param("१२", id="Devanagari digits"),
        pytest.param("me", id="me"),
        pytest.param("ME", id="ME"),
        pytest.param(" Me! ", id="me with punctuation"),
        pytest.param("mé", id="me with an accent"),
        pytest.param("\uff4d\uff45", id="full-width me"),
        pytest.param("...!?", id="punctuation only"),
        pytest.param("-", id="dash"),
        pytest.param("😀😀", id="emoji only"),
        pytest.param("Ada\nLovelace", id="line feed"),
        pytest.param("Ada\x00", id="NUL"),
        pytest.param("Ada\x1b[31m", id="escape"),
        pytest.param("Ada\x7f", id="DEL"),
        pytest.param("Ada\x85", id="C1 control"),
        pytest.param("Ada\u202eecalevol", id="bidirectional override"),
        pytest.param("Ada\u2028", id="line separator"),
        pytest.param("Ada\udcff", id="surrogate"),
        pytest.param("x" * 101, id="101 characters"),
    ],
)
def test_other_names_are_refused(users: Users, name: str) -> None:
    with pytest.raises(InvalidName):
        users.create(name)
    assert count(users) == 0


def test_one_slug_is_one_user(users: Users) -> None:
    first = users.create("Ada Lovelace")
    for name in ("Ada Lovelace", "ada lovelace", "Ada-Lovelace", "Áda Lovelace!"):
        with pytest.raises(SlugTaken):
            users.create(name)
    assert count(users) == 1
    assert users.get("ada-lovelace").name == first.name


# E-mail addresses


@pytest.mark.parametrize(
    "email",
    [
        pytest.param("ada@example.org", id="plain"),
        pytest.param("Ada.Lovelace+doorward@EXAMPLE.org", id="tags and capitals"),
        pytest.param("ada@localhost", id="no dot"),
        pytest.param("用户@例子.公司", id="international"),
        pytest.param("a" * 64 + "@" + "b" * 255, id="longest"),
    ],
)
def test_an_address_is_kept_as_it_is(users: Users, email: str) -> None:
    assert users.get(str(users.create("Ada", email).id)).email == email


@pytest.mark.parametrize(
    "email",
    [
        pytest.param(" ", id="blank alone"),
        pytest.param("ada", id="no at sign"),
        pytest.param("@example.org", id="no local part"),
        pytest.param("ada@", id="no domain"),
        pytest.param("ada@lovelace@example.org", id="two at signs"),
        pytest.param("ada lovelace@example.org", id="blank"),
        pytest.param("ada@example.org\n", id="line feed at the end"),
        pytest.param("ada@example.org\r\nBcc: eve@example.org", id="header injection"),
        pytest.param("ada\x00@example.org", id="NUL"),
        pytest.param("ada@\x7fexample.org", id="DEL"),
        pytest.param("ada@example\u3000.org", id="ideographic space"),
        pytest.param("a" * 65 + "@example.org", id="long local part"),
        pytest.param("ada@" + "b" * 256, id="long domain"),
        pytest.param("ada\udcff@example.org", id="surrogate"),
    ],
)
def test_what_is_no_address_is_refused(users: Users, email: str) -> None:
    with pytest.raises(InvalidEmail):
        users.create("Ada", email)
    assert count(users) == 0


@pytest.mark.parametrize(
    ("first", "again"),
    [
        pytest.param("ada@example.org", "ada@example.org", id="the same"),
        pytest.param("ada@example.org", "ADA@example.org", id="capitals before the at sign"),
        pytest.param("ada@example.org", "ada@EXAMPLE.ORG", id="capitals after it"),
        pytest.param("Ada@Example.Org", "ada@example.org", id="small letters"),
        pytest.param("ärger@example.org", "ÄRGER@example.org", id="umlauts"),
        pytest.param("лев@example.org", "ЛЕВ@example.org", id="Cyrillic"),
        pytest.param("straße@example.org", "STRASSE@example.org", id="sharp s"),
        pytest.param("rené@example.org", "rene\u0301@example.org", id="decomposed"),
    ],
)
def test_an_address_is_one_user_s_whatever_its_case(users: Users, first: str, again: str) -> None:
    users.create("Ada", first)
    with pytest.raises(EmailTaken):
        users.create("Eve", again)
    assert count(users) == 1


@pytest.mark.parametrize("email", [None, ""], ids=["None", "empty"])
def test_many_users_have_no_address(users: Users, email: str | None) -> None:
    assert [users.create(name, email).email for name in ("Ada", "Eve", "Bob")] == [None] * 3


@pytest.mark.parametrize("value", [5, 0, 1.5, True, False, [], ["Ada"], {}, {"name": "Ada"}], ids=repr)
def test_names_and_addresses_are_strings(users: Users, value: object) -> None:
    """They come as whatever JSON value a caller sends."""
    with pytest.raises(InvalidName):
        users.create(value)
    with pytest.raises(InvalidEmail):
        users.create("Ada", value)
    assert count(users) == 0


def test_a_name_is_required(users: Users) -> None:
    with pytest.raises(InvalidName):
        users.create(None, "ada@example.org")


def test_a_name_that_was_refused_for_its_address_stays_free(users: Users) -> None:
    users.create("Ada", "ada@example.org")
    with pytest.raises(EmailTaken):
        users.create("Eve", "ada@example.org")
    assert users.create("Eve", "eve@example.org").slug == "eve"


# Finding


@pytest.mark.parametrize(
    "handle",
    [
        pytest.param("0001", id="leading zeros"),
        pytest.param("१", id="Devanagari digit"),
        pytest.param("\uff11", id="full-width digit"),
        pytest.param("¹", id="superscript"),
        pytest.param("+1", id="sign"),
        pytest.param("-1", id="negative"),
        pytest.param(" 1", id="blank"),
        pytest.param("1.0", id="fraction"),
        pytest.param("1_0", id="underscore"),
        pytest.param("0", id="zero"),
        pytest.param("2", id="nobody's id"),
        pytest.param(str(2**63 - 1), id="largest id"),
        pytest.param(str(2**63), id="too large an id"),
        pytest.param(str(2**64 + 1), id="an id beyond 64 bits"),
        pytest.param("1" + "0" * 10_000, id="10001 digits"),
        pytest.param("", id="empty"),
        pytest.param("me", id="me"),
        pytest.param("ADA", id="capitals"),
        pytest.param("Ada", id="the name"),
        pytest.param("ada ", id="trailing blank"),
        pytest.param("ada\x00", id="NUL"),
        pytest.param("a%", id="wildcard"),
        pytest.param("nobody", id="nobody's slug"),
        pytest.param("\udcff", id="surrogate"),
    ],
)
def test_a_handle_of_nobody(users: Users, handle: str) -> None:
    assert users.create("Ada").id == 1
    with pytest.raises(UserNotFound):
        users.get(handle)


def test_a_user_is_found_by_id_and_slug(users: Users) -> None:
    ada, eve = users.create("Ada"), users.create("Eve 2")
    assert [users.get(handle).id for handle in (str(ada.id), "ada", str(eve.id), "eve-2")] == [
        ada.id,
        ada.id,
        eve.id,
        eve.id,
    ]


@pytest.mark.parametrize(
    ("handle", "number"),
    [
        ("1", 1),
        ("0", 0),
        (str(2**63 - 1), 2**63 - 1),
        (str(2**63), None),
        ("01", None),
        ("१", None),
        ("", None),
        ("ada", None),
        ("9" * 5000, None),
    ],
    ids=["one", "zero", "largest", "too large", "leading zero", "Devanagari", "empty", "slug", "5000 digits"],
)
def test_find_id(handle: str, number: int | None) -> None:
    assert find_id(handle) == number


# Whose users they are


def test_a_client_finds_its_own_users_only(users: Users) -> None:
    clients = ApiClients(users.database, users.clock)
    ours, theirs = (clients.create(name)[0].id for name in ("Ours", "Theirs"))
    own, foreign, operators = (
        users.create("Own", client_id=ours),
        users.create("Foreign", None, theirs),
        users.create("X"),
    )
    assert [user.client_id for user in (own, foreign, operators)] == [ours, theirs, None]
    for handle in ("own", str(own.id)):
        assert users.get_of(ours, handle).id == own.id
    for handle in ("foreign", str(foreign.id), "x", str(operators.id)):
        assert users.get(handle)
        with pytest.raises(NotYourUser):
            users.get_of(ours, handle)
    for handle in ("nobody", "99", "", "\udcff", "me"):
        with pytest.raises(UserNotFound):
            users.get_of(ours, handle)


def test_slugs_and_addresses_are_taken_whoever_s_user_has_them(users: Users) -> None:
    clients = ApiClients(users.database, users.clock)
    ours, theirs = (clients.create(name)[0].id for name in ("Ours", "Theirs"))
    users.create("Ada", "ada@example.org", ours)
    with pytest.raises(SlugTaken):
        users.create("Ada", client_id=theirs)
    with pytest.raises(EmailTaken):
        users.create("Eve", "ada@example.org", theirs)


# Races


@pytest.mark.parametrize(
    ("same", "loss"),
    [pytest.param("name", SlugTaken, id="name"), pytest.param("email", EmailTaken, id="email")],
)
def test_of_racing_creates_one_wins(users: Users, same: str, loss: type[CallError]) -> None:
    racers = 8
    start = threading.Barrier(racers)

    def race(number: int) -> type[Exception] | None:
        start.wait(10)
        try:
            if same == "name":
                users.create("Ada", f"ada{number}@example.org")
            else:
                users.create(f"Ada {number}", "ada@example.org")
        except CallError as error:
            return type(error)
        finally:
            users.database.close()
        return None

    with concurrent.futures.ThreadPoolExecutor(racers) as pool:
        outcomes = list(pool.map(race, range(racers)))
    assert sorted(outcomes, key=str) == sorted([None] + [loss] * (racers - 1), key=str)
    assert count(users) == 1


def count(users: Users) -> int:
    row = users.database.fetch_one("SELECT count(*) FROM users", ())
    assert row is not None
    number: int = row[0]
    return number
