"""Prompts: what fits into a message of Discord's, what is shown as it is, and what answers mean."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward.keybroker.v1 import keybroker_service_pb2 as pb
from doorward_bot import messages
from doorward_bot.prompts import PAGE, Place, Press, Prompt, choose, decode, encode, ended, fits, parse_answer
from tests.sandbox.discord.checks import NewMessage, check

# As Discord's clients find inline code, in which they interpret nothing.
_CODE = re.compile(r"(`+)(.*?[^`])\1(?!`)", re.DOTALL)
LONGEST_ID = 2**63 - 1
STATUSES = [
    pb.CONSENT_STATUS_GRANTED,
    pb.CONSENT_STATUS_CANCELED,
    pb.CONSENT_STATUS_TIMED_OUT,
    pb.CONSENT_STATUS_BLOCKED,
]
# What the server takes for a name or a label.
visible = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=80)


def key(number: int, label: str = "", service: str = "game", last_four: str = "1234") -> pb.ApiKey:
    return pb.ApiKey(id=100 + number, service=service, label=label or f"key{number}", last_four=last_four)


def keys(count: int) -> list[pb.ApiKey]:
    return [key(number) for number in range(1, count + 1)]


def request(name: str = "App", host: str = "app.example", *, verified: bool = False) -> pb.ConsentRequest:
    return pb.ConsentRequest(
        id=LONGEST_ID, prompt_id=LONGEST_ID, application_name=name, verified=verified, callback_host=host
    )


def outside(text: str) -> str:
    """What Discord interprets of a text."""
    return _CODE.sub("", text)


def texts(payload: NewMessage) -> str:
    """What stands in a message, where Discord interprets it."""
    lines: list[str] = []
    for embed in payload.embeds or []:
        lines += [embed.title or "", embed.description or "", *(field.value for field in embed.fields or [])]
    return "\n".join(lines)


# Typed answers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        pytest.param("all", [1, 2, 3], id="all"),
        pytest.param("\tAlL \n", [1, 2, 3], id="all, in blanks"),
        pytest.param("1", [1], id="one"),
        pytest.param("3,1", [3, 1], id="comma"),
        pytest.param("3 1", [3, 1], id="blank"),
        pytest.param("3 ,  1", [3, 1], id="both"),
        pytest.param("1,,2", [1, 2], id="two commas"),
        pytest.param("2,2, 1 2", [2, 1], id="again"),
        pytest.param("02", [2], id="zero before"),
        pytest.param("", None, id="nothing"),
        pytest.param(",1", None, id="comma before"),
        pytest.param("1,", None, id="comma after"),
        pytest.param("0", None, id="zero"),
        pytest.param("4", None, id="too high"),
        pytest.param("1 4", None, id="one too high"),
        pytest.param("+1", None, id="sign"),
        pytest.param("1_0", None, id="as Python reads it"),
        pytest.param("1\n2", None, id="lines"),
        pytest.param("1\t2", None, id="tab"),
        pytest.param("1\N{NO-BREAK SPACE}2", None, id="other blank"),
        pytest.param("\N{MATHEMATICAL BOLD DIGIT ONE}", None, id="bold digit"),
        pytest.param("\N{DEVANAGARI DIGIT ONE}", None, id="Devanagari digit"),
        pytest.param("\N{CIRCLED DIGIT ONE}", None, id="circled digit"),
        pytest.param("I", None, id="Roman"),
        pytest.param("a11", None, id="almost all"),
        pytest.param("al\N{LATIN SMALL LETTER L WITH MIDDLE TILDE}", None, id="look-alike"),
        pytest.param("all all", None, id="twice"),
        pytest.param("1" * 2000, None, id="long"),
    ],
)
def test_typed_answers(text: str, numbers: list[int] | None) -> None:
    expected = None if numbers is None else [key(number) for number in numbers]
    assert parse_answer(text, keys(3)) == expected


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        pytest.param("all", [1, 3], id="all that are left"),
        pytest.param("3", [3], id="another"),
        pytest.param("2", None, id="the one that is gone"),
        pytest.param("1 2", None, id="with the one that is gone"),
    ],
)
def test_typed_answers_when_a_key_is_gone(text: str, numbers: list[int] | None) -> None:
    expected = None if numbers is None else [key(number) for number in numbers]
    assert parse_answer(text, [key(1), None, key(3)]) == expected


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_none_are_not_all(gone: int) -> None:
    assert parse_answer("all", [None] * gone) is None


@given(st.text(max_size=20) | st.text("0123456789, al", max_size=8))
def test_nothing_is_shared_that_is_not_named(text: str) -> None:
    chosen = parse_answer(text, keys(12))
    if chosen is not None and text.strip().lower() != "all":
        named = dict.fromkeys(int(number) for number in re.findall("[0-9]+", text))
        assert chosen == [key(number) for number in named]


# What stands in a custom_id


@pytest.mark.parametrize(
    ("custom_id", "press"),
    [
        pytest.param("dw1:share:7:1ab", ("share", 7, "1ab"), id="share"),
        pytest.param("dw1:all:9223372036854775807:", ("all", LONGEST_ID, ""), id="highest id"),
        pytest.param("dw1:pick:7:0", ("pick", 7, "0"), id="pick"),
        pytest.param("dw1:page:7:2", ("page", 7, "2"), id="page"),
        pytest.param("dw1:cancel:7:", ("cancel", 7, ""), id="cancel"),
        pytest.param("dw1:key", None, id="form of a command"),
        pytest.param("dw2:all:7:", None, id="other version"),
        pytest.param("dw1:grant:7:", None, id="other action"),
        pytest.param("dw1:all::", None, id="no id"),
        pytest.param("dw1:all:-7:", None, id="negative id"),
        pytest.param("dw1:all:\N{ARABIC-INDIC DIGIT SEVEN}:", None, id="other digits"),
        pytest.param("dw1:all:7", None, id="too short"),
        pytest.param("dw1:all:7:\n", None, id="line end"),
        pytest.param("", None, id="empty"),
        pytest.param(None, None, id="link"),
    ],
)
def test_presses(custom_id: str | None, press: tuple[str, int, str] | None) -> None:
    assert Press.parse(custom_id) == press


@given(st.lists(st.integers(0, 74), unique=True, max_size=75))
def test_a_selection_comes_back(selection: list[int]) -> None:
    assert decode(encode(selection), 75) == tuple(selection)


@pytest.mark.parametrize("text", ["", "0", "1", "3aa", "x", "-", "2a", "Zz"])
def test_what_was_never_written_selects_nothing_that_is_not_there(text: str) -> None:
    assert all(index < 5 for index in decode(text, 5))


def test_a_selection_outlives_a_change_of_the_number_of_keys() -> None:
    selection = (63, 0, 5)
    assert decode(encode(selection), 65) == selection
    assert decode(encode(selection), 60) == (0, 5)


@pytest.mark.parametrize(
    ("selection", "does"),
    [
        pytest.param(range(64), True, id="the first 64"),
        pytest.param(range(31, 65), True, id="34 of more"),
        pytest.param(range(30, 65), False, id="35 of more"),
    ],
)
def test_what_fits_into_a_custom_id(selection: range, does: bool) -> None:
    assert fits(selection) == does
    if does:
        check(NewMessage, Prompt(request(), keys(65), selection=tuple(selection)).payload())


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place(1, 2, ()), id="no keys"),
        pytest.param(Place(LONGEST_ID, LONGEST_ID, (1,)), id="one"),
        pytest.param(Place(1, 2, tuple(range(1, 76))), id="many"),
    ],
)
def test_places_come_back(place: Place) -> None:
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize("text", ["", "1", "1/2", "1/2/3/4", "a/2/", "1/2/x"])
def test_what_is_no_place(text: str) -> None:
    assert Place.parse(text) is None


# Selecting


@pytest.mark.parametrize(
    ("page", "before", "chosen", "after"),
    [
        pytest.param(0, (), (3, 1), (2, 0), id="first"),
        pytest.param(0, (2,), (1, 3), (2, 0), id="one more"),
        pytest.param(0, (2, 0), (1,), (0,), id="one less"),
        pytest.param(0, (2, 0), (), (), id="none"),
        pytest.param(0, (30, 2, 29), (1,), (30, 29, 0), id="other pages stay"),
        pytest.param(1, (30, 2, 29), (28, 31), (30, 2, 27), id="on another page"),
        pytest.param(0, (0,), (1, 1, 2), (0, 1), id="twice"),
        pytest.param(0, (0,), (1, 999), (0,), id="what is not there"),
        pytest.param(0, (), (28,), (27,), id="of another page"),
    ],
)
def test_choosing(page: int, before: tuple[int, ...], chosen: tuple[int, ...], after: tuple[int, ...]) -> None:
    prompt = Prompt(request(), keys(40), page, before)
    assert choose(prompt, [100 + number for number in chosen]) == after


def test_a_key_that_is_gone_cannot_be_chosen() -> None:
    assert choose(Prompt(request(), [key(1), None, key(3)]), [101, 102, 103]) == (0, 2)


# Messages


@pytest.mark.parametrize(
    ("count", "page", "rows"),
    [
        pytest.param(0, 0, [["cancel"]], id="no keys"),
        pytest.param(1, 0, [["pick"], ["share", "all", "cancel"]], id="one"),
        pytest.param(25, 0, [["pick"], ["share", "all", "cancel"]], id="a page"),
        pytest.param(26, 0, [["pick"], ["share", "all", "cancel"], ["-page", "page"]], id="first of two"),
        pytest.param(26, 1, [["pick"], ["share", "all", "cancel"], ["page", "-page"]], id="second of two"),
        pytest.param(75, 1, [["pick"], ["share", "all", "cancel"], ["page", "page"]], id="second of three"),
    ],
)
def test_components(count: int, page: int, rows: list[list[str]]) -> None:
    """`-page` is a button that is disabled; `share` is so as long as nothing is selected."""
    prompt = check(NewMessage, Prompt(request(), keys(count), page).payload())
    shown = [[(each, Press.parse(each.custom_id)) for each in row.components] for row in prompt.components or []]
    assert [
        [("-" if each.disabled and press.action == "page" else "") + press.action for each, press in row if press]
        for row in shown
    ] == rows
    disabled = {press.action for row in shown for each, press in row if press and each.disabled}
    assert disabled - {"page"} == ({"share"} if count else set())


def test_keys_that_are_gone_leave_gaps() -> None:
    text = texts(check(NewMessage, Prompt(request(), [None, key(2), None, key(4)]).payload()))
    assert re.findall(r"\*\*(\d+)\.\*\*", text) == ["2", "4"]


def test_a_page_whose_keys_are_gone_does_not_hide_the_others() -> None:
    """What is on other pages can still be shared."""
    prompt = check(NewMessage, Prompt(request(), [*[None] * PAGE, key(26)]).payload())
    assert "You have no keys yet" not in texts(prompt)
    presses = [Press.parse(each.custom_id) for row in prompt.components or [] for each in row.components]
    assert {"all", "cancel", "page"} <= {press.action for press in presses if press}


@given(name=visible, label=visible, last_four=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"])))
def test_what_others_chose_is_interpreted_nowhere(name: str, label: str, last_four: str) -> None:
    for shown, benign in (
        (Prompt(request(name), [key(1, label, last_four=last_four[:4])]), Prompt(request(), [key(1)])),
        (Prompt(request(name), []), Prompt(request(), [])),
    ):
        hostile, plain = (texts(check(NewMessage, one.payload())) for one in (shown, benign))
        assert _without_nothing(outside(hostile)) == outside(plain)
    for status in STATUSES:
        hostile = texts(check(NewMessage, ended(request(name), status, [label])))
        plain = texts(check(NewMessage, ended(request(), status, ["key"])))
        assert _without_nothing(outside(hostile)) == outside(plain)


def _without_nothing(text: str) -> str:
    """Names of blanks only are shown as `(nothing)`."""
    return text.replace("(nothing)", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("main", "`main`", id="as usual"),
        pytest.param("@everyone", "`@everyone`", id="everybody"),
        pytest.param("a`b", "`a\N{MODIFIER LETTER GRAVE ACCENT}b`", id="backtick"),
        pytest.param("\\", "`\\`", id="backslash"),
        pytest.param("", "(nothing)", id="empty"),
        pytest.param("  ", "(nothing)", id="blanks"),
    ],
)
def test_plain(text: str, shown: str) -> None:
    assert messages.plain(text) == shown


def longest_keys() -> list[pb.ApiKey]:
    return [key(number, f"{number:02}{'l' * 78}", "s" * 40) for number in range(1, 76)]


@pytest.mark.parametrize("page", [0, 1, 2])
def test_the_longest_prompt_names_every_key(page: int) -> None:
    text = texts(check(NewMessage, Prompt(request("n" * 100, "h" * 253), longest_keys(), page).payload()))
    first = page * PAGE + 1
    assert [int(number) for number in re.findall(r"\*\*(\d+)\.\*\*", text)] == [*range(first, first + PAGE)]


def test_the_longest_prompt_fits() -> None:
    long = longest_keys()
    for page in range(3):
        selection = tuple(range(page * PAGE, page * PAGE + PAGE))
        check(NewMessage, Prompt(request("n" * 100, "h" * 253), long, page, selection).payload())
    labels = [one.label for one in long]
    check(NewMessage, ended(request("n" * 100, "h" * 253), pb.CONSENT_STATUS_GRANTED, labels))
    check(NewMessage, {"content": messages.LATE + messages.end(pb.CONSENT_STATUS_GRANTED, labels)})


@pytest.mark.parametrize("verified", [True, False])
def test_who_asks(verified: bool) -> None:
    assert messages.who(request(verified=verified)) == ("`App`" if verified else "`App` (not verified)")


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        pytest.param([], "Keys were shared.", id="not known"),
        pytest.param(["a"], "You shared `a`.", id="one"),
        pytest.param([*"abcdefghij"], "You shared " + ", ".join(f"`{one}`" for one in "abcdefghij") + ".", id="ten"),
        pytest.param(["a"] * 12, "You shared " + ", ".join(["`a`"] * 10) + " and 2 more.", id="twelve"),
        pytest.param(["{what}"], "You shared `{what}`.", id="braces"),
    ],
)
def test_what_was_shared(labels: list[str], what: str) -> None:
    assert messages.end(pb.CONSENT_STATUS_GRANTED, labels).startswith(what)


@pytest.mark.parametrize("status", STATUSES)
def test_a_prompt_that_ended_has_nothing_to_press(status: pb.ConsentStatus.ValueType) -> None:
    shown = check(NewMessage, ended(request(), status))
    assert shown.components == []
    assert messages.end_title(status) in texts(shown)


# Lists


def test_long_lists_say_what_they_leave_out() -> None:
    lines = [f"- line {number} {'x' * 90}" for number in range(100)]
    shown = messages.listed(lines).splitlines()
    assert shown[:-1] == lines[: len(shown) - 1]
    assert shown[-1] == f"… and {100 - len(shown) + 1} more"
    assert 3500 < len("\n".join(shown)) <= 4096


@pytest.mark.parametrize("lines", [[], ["- one"], ["- one", "- two"]])
def test_short_lists_are_whole(lines: list[str]) -> None:
    assert messages.listed(lines).splitlines() == lines


@pytest.mark.parametrize("verified", [True, False])
def test_a_grant_of_many_keys_can_be_listed(verified: bool) -> None:
    long = [key(number, f"{number:02}{'l' * 78}") for number in range(75)]
    grant = pb.Grant(application_name="n" * 100, callback_host="h" * 253, keys=long, verified=verified)
    [line] = messages.listed([f"- {messages.grant_line(grant)}"]).splitlines()
    assert line.startswith(f"- `{'n' * 100}`")
    assert ("(not verified)" in line) != verified


@given(st.lists(visible, max_size=3), visible)
def test_choices_fit(labels: list[str], name: str) -> None:
    """Discord takes 1 to 100 characters."""
    many = [key(number, label) for number, label in enumerate(labels)]
    choices = [messages.key_choice(one) for one in many]
    choices.append(messages.grant_choice(pb.Grant(application_name=name, callback_host="h" * 253, keys=many)))
    choices.append(messages.application_choice(request(name, "h" * 253)))
    assert all(1 <= len(choice) <= 100 for choice in choices)


def test_refusals() -> None:
    assert messages.refusal("KEY_NOT_FOUND") == "You have no such key. Please pick one from the list."
    assert messages.refusal("WHATEVER") == messages.FAILED
