"""The DM and every way to answer it: what is shown, what the callback gets, what the user is told.

Nothing is waited for but what has to come. That nothing came is told by what came after it.
"""
# ruff: noqa: RUF001 - what looks like a number, a name or nothing is what it is about

import json
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from doorward_server.models import ApiKey, ConsentRequest
from tests.bot.conftest import Person, Scene, make_scene
from tests.conftest import find_secrets
from tests.processes import await_condition, free_port
from tests.sandbox.discord.client import CannotDo, Message
from tests.stack import basic, rest

VALUES = ("value-one-1111", "value-two-2222", "value-three-3333")
LATE = "That request is already over"
# As Discord's clients find inline code, in which they interpret nothing.
_CODE = re.compile(r"(`+)(.*?[^`])\1(?!`)", re.DOTALL)
Act = Callable[[Person, Message], object]


@pytest.fixture(scope="module", autouse=True)
def no_listener_fails(scene: Scene) -> Iterator[None]:
    """Whatever people do, the bot meets nothing unexpected, and logs no key."""
    scene.discord.configure(requests_per_second=100_000)  # all these people at once are more than a bot is made for
    yield
    log = (scene.logs / "bot.log").read_bytes()
    assert [line for line in log.splitlines() if b'"level": "error"' in line] == []
    assert find_secrets(log, scene.stack.secrets) == []


@pytest.fixture
def person(person: Person) -> Iterator[Person]:
    """Somebody who is never pinged, and never shown the value of a key."""
    yield person
    for message in person.user.messages():
        shown = json.dumps([message.raw, *message.history], ensure_ascii=False)
        assert message.pings == []
        assert [secret for secret in person.scene.stack.secrets if secret in shown] == []


# What everybody does


def asked(person: Person, *values: str) -> Message:
    """The prompt of a person with these keys."""
    person.keep(*values)
    person.ask("st")
    return person.prompt()


def selected(person: Person, prompt: Message, *labels: str) -> Message:
    """The prompt, once it shows another choice."""
    person.user.select(prompt, *labels)
    return person.user.await_change(prompt)


def pressed(person: Person, prompt: Message, button: str) -> Message:
    """The prompt, once it shows what a button does."""
    person.user.click(prompt, button)
    return person.user.await_change(prompt)


def chosen(prompt: Message) -> list[str]:
    """The labels of what a prompt shows as selected."""
    options = [option for row in prompt.components for each in row["components"] for option in each.get("options", [])]
    return [option["label"] for option in options if option.get("default")]


def custom_id(prompt: Message, label: str) -> str:
    """What a client sends for a button, even when that is no longer there."""
    return next(button.custom_id for button in prompt.buttons if button.label == label and button.custom_id)


def under(prompt: Message, heading: str) -> str:
    """What a prompt shows under, or after, a heading."""
    found = re.search(rf"{heading}[:*\s]+(.*)", prompt.text)
    assert found, prompt.text
    return found[1]


def requests_of(person: Person) -> list[ConsentRequest]:
    app = person.scene.stack.app
    query = ConsentRequest.select().where(ConsentRequest.discord_user == str(person.user.id))
    return app.database.fetch_all(query.order_by(ConsentRequest.id))


def ended(person: Person, prompt: Message, title: str) -> Message:
    """The prompt, once it shows how its requests ended, and the server knows that it does."""
    shown = person.user.await_change(prompt, lambda message: message.embeds[0]["title"] == title)
    assert not shown.components
    await_condition(
        lambda: all(
            one.finished_at and one.message_closed_at
            for one in requests_of(person)
            if f"/{prompt.id}/" in (one.message or "")
        ),
        "ClosePrompt",
    )
    return person.scene.discord.message(prompt.id)


def told(person: Person, typed: Message) -> str:
    """What the bot replied to a message."""
    return person.user.await_message(lambda message: message.reply_to == typed.id).text


def prompts_of(person: Person) -> set[str]:
    """The ids of all messages that are a prompt, or were one."""
    own = [message for message in person.user.messages() if message.by_bot and not message.ephemeral]
    return {message.id for message in own if message.embeds}


def assert_open(person: Person, prompt: Message) -> None:
    """The bot has seen all that was done before, and the request waits as it did."""
    person.user.answer(person.user.slash("keys list"))
    assert [request.finished_at for request in requests_of(person)] == [None]
    assert person.scene.discord.message(prompt.id).history == prompt.history
    assert person.scene.receiver.callbacks(person.path) == []


def assert_shared(person: Person, *values: str) -> None:
    """The only callback carries these keys, in this order."""
    fields = [("userid", str(person.user.id)), ("state", "st"), *(("api_keys", value) for value in values)]
    assert person.outcome().pairs == fields
    assert len(person.scene.receiver.callbacks(person.path)) == 1


def assert_refused(person: Person, error: str = "user canceled") -> None:
    """The only callback carries an error."""
    assert person.outcome().pairs == [("userid", str(person.user.id)), ("state", "st"), ("error", error)]
    assert len(person.scene.receiver.callbacks(person.path)) == 1


def remove(person: Person, *keys: ApiKey) -> None:
    app = person.scene.stack.app
    for key in keys:
        app.api_keys.remove(key.user, key.id, actor="test")


# What it says


def test_who_asks_for_what(person: Person) -> None:
    prompt = asked(person, *VALUES)
    assert under(prompt, "Who asks") == "`My super bot!` (not verified)"
    assert under(prompt, "Where the keys will be sent") == "`127.0.0.1`"
    text = prompt.text
    for number, end in enumerate(("1111", "2222", "3333"), 1):
        assert f"**{number}.** `key{number}` for `game`, ending in `{end}`" in text
    assert "press Share all, or type `all` or numbers" in text
    assert f"<t:{int(requests_of(person)[0].deadline_at.timestamp())}:R>" in text


def test_a_registered_application_asks(scene: Scene, person: Person) -> None:
    application, secret, _ = scene.stack.app.applications.create(f"Guild {person.path}", [person.callback])
    fields = {"name": "whoever", "userid": str(person.user.id), "callback": person.callback, "state": "st"}
    headers = {"authorization": basic(application.id, secret)}
    person.keep(*VALUES)
    assert rest(scene.stack, "POST", "/requestapikey", data=fields, headers=headers).text == "OK"
    prompt = person.prompt("Guild")
    assert under(prompt, "Who asks") == f"`Guild {person.path}`"
    person.user.click(prompt, "Share all")
    assert_shared(person, *VALUES)


@pytest.mark.parametrize(
    ("callback", "host"),
    [
        pytest.param("http://xn--bcher-kva.example/cb", "xn--bcher-kva.example", id="encoded name"),
        pytest.param("http://b\N{CYRILLIC SMALL LETTER A}nk.example/", "xn--bnk-6cd.example", id="look-alike"),
        pytest.param("http://MY-HOST.example:1/@everyone", "my-host.example", id="capitals, port and path"),
        pytest.param(f"http://{'.'.join(['a' * 63] * 3)}.example/", f"{'.'.join(['a' * 63] * 3)}.example", id="long"),
    ],
)
def test_where_the_keys_will_be_sent(person: Person, callback: str, host: str) -> None:
    person.ask(callback=callback)
    assert under(person.prompt(), "Where the keys will be sent") == f"`{host}`"


def test_who_has_no_keys_is_asked_and_adds_some(person: Person) -> None:
    prompt = asked(person)
    assert "Use `/keys add`" in prompt.text
    assert ([button.label for button in prompt.buttons], prompt.menus) == (["Cancel"], [])
    for number, value in enumerate(VALUES[:2], 1):
        add_key(person, f"added{number}", value)
        prompt = person.user.await_change(prompt)
        assert f"**{number}.** `added{number}` for `game`, ending in `{value[-4:]}`" in prompt.text
    assert [*prompt.menu.options.values()] == ["1. added1", "2. added2"]
    person.user.say("2 1")
    assert_shared(person, VALUES[1], VALUES[0])
    ended(person, prompt, "Shared")


def add_key(person: Person, label: str, value: str) -> None:
    person.scene.stack.secrets.add(value)
    opened = person.user.outcome(person.user.slash("keys add"))
    answer = person.user.answer(person.user.submit(opened, service="game", label=label, value=value))
    assert answer.ephemeral
    assert f"Added `{label}`" in answer.text


def test_numbers_stay_when_keys_come_and_go(person: Person) -> None:
    keys = person.keep(*VALUES[:2])
    person.ask("st")
    prompt = person.prompt()
    remove(person, keys[0])
    add_key(person, "added", VALUES[2])
    prompt = person.user.await_change(prompt)
    assert [*prompt.menu.options.values()] == ["2. key2", "3. added"]
    person.user.say("3, 2")
    assert_shared(person, VALUES[2], VALUES[1])


# Valid answers


@pytest.mark.parametrize(
    ("typed", "numbers"),
    [
        pytest.param("all", (1, 2, 3), id="all"),
        pytest.param("ALL", (1, 2, 3), id="capitals"),
        pytest.param(" all ", (1, 2, 3), id="blanks around"),
        pytest.param("1", (1,), id="one"),
        pytest.param("2,1", (2, 1), id="comma"),
        pytest.param("2 1", (2, 1), id="blank"),
        pytest.param("3, 1,2", (3, 1, 2), id="every one"),
        pytest.param("1, 1, 2", (1, 2), id="twice"),
        pytest.param("1,,2", (1, 2), id="two commas"),
    ],
)
@pytest.mark.parametrize("replies", [pytest.param(True, id="reply"), pytest.param(False, id="message")])
def test_typed(person: Person, typed: str, numbers: tuple[int, ...], replies: bool) -> None:
    prompt = asked(person, *VALUES)
    said = person.user.say(typed, prompt if replies else None)
    assert_shared(person, *(VALUES[number - 1] for number in numbers))
    what = f"You shared {', '.join(f'`key{number}`' for number in numbers)}."
    assert what in ended(person, prompt, "Shared").text
    assert told(person, said).startswith(what)


def test_share_all(person: Person) -> None:
    prompt = asked(person, *VALUES)
    clicked = person.user.click(prompt, "Share all")
    assert_shared(person, *VALUES)
    shown = ended(person, prompt, "Shared")
    assert "You shared `key1`, `key2`, `key3`." in shown.text
    assert under(shown, "Who asked") == "`My super bot!` (not verified)"
    assert person.user.outcome(clicked).followups == []


@pytest.mark.parametrize(
    ("choices", "numbers"),
    [
        pytest.param([["2. key2"]], [2], id="one"),
        pytest.param([["3. key3", "1. key1"]], [3, 1], id="at once, in any order"),
        pytest.param([["3. key3"], ["1. key1", "3. key3"]], [3, 1], id="one after the other"),
        pytest.param([["1. key1", "2. key2"], ["2. key2"]], [2], id="one less"),
        pytest.param([["1. key1", "2. key2"], [], ["2. key2", "1. key1"]], [2, 1], id="none, then others"),
        pytest.param([["1. key1", "2. key2"], ["2. key2"], ["1. key1", "2. key2"]], [2, 1], id="off and on again"),
    ],
)
def test_select_and_share(person: Person, choices: list[list[str]], numbers: list[int]) -> None:
    prompt = asked(person, *VALUES)
    for labels in choices:
        prompt = selected(person, prompt, *labels)
        assert sorted(chosen(prompt)) == sorted(labels)
    person.user.click(prompt, f"Share selected ({len(numbers)})")
    assert_shared(person, *(VALUES[number - 1] for number in numbers))
    what = f"You shared {', '.join(f'`key{number}`' for number in numbers)}."
    assert what in ended(person, prompt, "Shared").text


def test_nothing_selected_cannot_be_shared(person: Person) -> None:
    prompt = asked(person, *VALUES)
    with pytest.raises(CannotDo, match="is disabled"):
        person.user.click(prompt, "Share selected")
    prompt = selected(person, selected(person, prompt, "1. key1"))
    assert chosen(prompt) == []
    with pytest.raises(CannotDo, match="is disabled"):
        person.user.click(prompt, "Share selected")
    person.user.click(prompt, "Cancel")
    assert_refused(person)


def test_what_is_selected_does_not_matter_to_what_is_typed(person: Person) -> None:
    prompt = selected(person, asked(person, *VALUES), "1. key1")
    person.user.say("3")
    assert_shared(person, VALUES[2])
    ended(person, prompt, "Shared")


# What cancels


@pytest.mark.parametrize("values", [pytest.param(VALUES, id="keys"), pytest.param((), id="no keys")])
def test_cancel(person: Person, values: tuple[str, ...]) -> None:
    prompt = asked(person, *values)
    person.user.click(prompt, "Cancel")
    assert_refused(person)
    assert "Nothing was shared. The application is told that you canceled." in ended(person, prompt, "Canceled").text


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param("a" * 2000, id="2,000 characters"),
        pytest.param("1 " * 999 + "11", id="2,000 characters of numbers"),
        pytest.param("9" * 2000, id="2,000 digits"),
        pytest.param("\N{THUMBS UP SIGN}", id="emoji"),
        pytest.param("1\N{VARIATION SELECTOR-16}\N{COMBINING ENCLOSING KEYCAP}", id="keycap emoji"),
        pytest.param("0", id="zero"),
        pytest.param("99", id="too high"),
        pytest.param("1, 4", id="one too high"),
        pytest.param("-1", id="negative"),
        pytest.param("1-3", id="range"),
        pytest.param("1.5", id="fraction"),
        pytest.param("1.", id="full stop"),
        pytest.param("\N{FULLWIDTH DIGIT ONE}", id="full width"),
        pytest.param("\N{ARABIC-INDIC DIGIT ONE}", id="Arabic"),
        pytest.param("\N{SUPERSCRIPT ONE}", id="superscript"),
        pytest.param("1\N{FULLWIDTH COMMA}2", id="full-width comma"),
        pytest.param("1;2", id="semicolon"),
        pytest.param("one", id="word"),
        pytest.param("1 and 2", id="words between"),
        pytest.param("all of them", id="all and more"),
        pytest.param("all, 1", id="all and one"),
        pytest.param("`all`", id="as it is shown"),
        pytest.param("1\n2", id="lines"),
        pytest.param("#1", id="sharp"),
        pytest.param("@everyone", id="everybody"),
        pytest.param("\N{RIGHT-TO-LEFT OVERRIDE}1", id="override"),
        pytest.param("\N{RIGHT-TO-LEFT MARK}all", id="right-to-left mark"),
        pytest.param("1\N{ZERO WIDTH SPACE}2", id="zero-width space"),
        pytest.param("all\N{ZERO WIDTH JOINER}", id="zero-width joiner"),
        pytest.param("/keys", id="like a command"),
        pytest.param("cancel", id="as asked"),
    ],
)
def test_typed_cancels(person: Person, typed: str) -> None:
    prompt = asked(person, *VALUES)
    said = person.user.say(typed)
    assert_refused(person)
    ended(person, prompt, "Canceled")
    assert "not a valid choice, so I canceled the request" in told(person, said)


@pytest.mark.parametrize("typed", ["all", "1"])
def test_who_has_no_keys_can_share_none(person: Person, typed: str) -> None:
    prompt = asked(person)
    said = person.user.say(typed)
    assert_refused(person)
    ended(person, prompt, "Canceled")
    assert "You have no keys to share" in told(person, said)


# What changes nothing


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda person, _prompt: person.scene.person().user.say("all"), id="another's message"),
        pytest.param(lambda person, _prompt: person.user.say("all", guild=True), id="message in a server"),
        pytest.param(lambda person, _prompt: person.scene.person().user.say("1", guild=True), id="another's in one"),
        pytest.param(
            lambda person, prompt: person.user.answer(person.user.click(prompt, "dw1:all:987654321:", forged=True)),
            id="request that there is not",
        ),
    ],
)
def test_others_change_nothing(person: Person, act: Act) -> None:
    prompt = asked(person, *VALUES)
    act(person, prompt)
    assert_open(person, prompt)
    person.user.click(prompt, "Share all")
    assert_shared(person, *VALUES)


@pytest.mark.parametrize("button", ["Share all", "Cancel", "Share selected (1)", None])
def test_others_clicks_are_refused(person: Person, button: str | None) -> None:
    prompt = selected(person, asked(person, *VALUES), "2. key2")
    stranger = person.scene.person()
    stranger.keep("value-other-9999")
    clicked = (
        stranger.user.click(prompt, button, forged=True)
        if button
        else stranger.user.select(prompt, *prompt.menu.options, forged=True)
    )
    answer = stranger.user.answer(clicked)
    assert (answer.text, answer.ephemeral) == ("These buttons are for somebody else.", True)
    assert_open(person, prompt)
    person.user.click(prompt, "Share selected (1)")
    assert_shared(person, VALUES[1])


@pytest.mark.parametrize(
    ("forged", "values"),
    [
        pytest.param("dw1:share:{id}:", VALUES, id="nothing selected"),
        pytest.param("dw1:share:{id}:Zz", VALUES, id="keys that are not there"),
        pytest.param("dw1:all:{id}:", (), id="all of none"),
    ],
)
def test_forged_clicks_decide_nothing(person: Person, forged: str, values: tuple[str, ...]) -> None:
    prompt = asked(person, *values)
    button = forged.format(id=requests_of(person)[0].id)
    answer = person.user.answer(person.user.click(prompt, button, forged=True))
    assert answer.ephemeral
    assert "Nothing was shared yet" in answer.text
    assert [request.finished_at for request in requests_of(person)] == [None]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        pytest.param("Share all", "Share all", "Shared", id="shared twice"),
        pytest.param("Cancel", "Share all", "Canceled", id="canceled, then shared"),
        pytest.param("Share all", "Cancel", "Shared", id="shared, then canceled"),
    ],
)
def test_the_first_of_two_clicks_counts(person: Person, first: str, second: str, outcome: str) -> None:
    prompt = asked(person, *VALUES)
    buttons = [custom_id(prompt, label) for label in (first, second)]
    clicked = [person.user.click(prompt, button, forged=True) for button in buttons]
    assert LATE in person.user.answer(clicked[1]).text
    if outcome == "Shared":
        assert_shared(person, *VALUES)
        assert "You shared `key1`, `key2`, `key3`." in ended(person, prompt, outcome).text
    else:
        assert_refused(person)
        ended(person, prompt, outcome)


@pytest.mark.parametrize("label", ["Share all", "Share selected (1)", "Cancel", None])
@pytest.mark.parametrize("end", ["Share all", "Cancel"])
def test_old_buttons_do_nothing(person: Person, end: str, label: str | None) -> None:
    prompt = selected(person, asked(person, *VALUES), "3. key3")
    person.user.click(prompt, end)
    callback = person.outcome()
    shown = ended(person, prompt, {"Share all": "Shared", "Cancel": "Canceled"}[end])
    clicked = (
        person.user.click(prompt, custom_id(prompt, label), forged=True)
        if label
        else person.user.select(prompt, *prompt.menu.options, custom_id=prompt.menu.custom_id, forged=True)
    )
    answer = person.user.answer(clicked)
    assert answer.ephemeral
    assert answer.text.startswith(LATE)
    assert person.scene.discord.message(prompt.id).embeds == shown.embeds
    assert person.scene.receiver.callbacks(person.path) == [callback]


def test_what_is_typed_after_the_end_does_nothing(person: Person) -> None:
    prompt = asked(person, *VALUES)
    person.user.say("2")
    callback = person.outcome()
    ended(person, prompt, "Shared")
    unheard = person.user.say("all")
    assert told(person, person.user.say("all", prompt)).startswith(LATE)
    assert unheard.id not in {message.reply_to for message in person.user.messages()}
    assert person.scene.receiver.callbacks(person.path) == [callback]
    assert [request.status for request in requests_of(person)] == ["granted"]


# The deadline


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[tuple[Person, Message]]]:
    """People who had three seconds and let them pass, each with the prompt as it was."""
    with make_scene(tmp_path_factory.mktemp("late"), timeout=3) as scene, scene.bot():
        scene.discord.await_commands("keys", "sharing")
        people = [scene.person() for _ in range(4)]
        for person in people:
            person.keep(*VALUES)
        for person in people:
            person.ask("st")
        prompts = [person.prompt() for person in people]
        prompts[0] = selected(people[0], prompts[0], "1. key1")
        yield zip(people, prompts, strict=True)
        assert scene.discord.problems() == []


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(None, id="nothing"),
        pytest.param(lambda person, prompt: told(person, person.user.say("all", prompt)), id="reply"),
        pytest.param(lambda person, prompt: told(person, person.user.say("no", prompt)), id="reply that cancels"),
        pytest.param(
            lambda person, prompt: (
                person.user.answer(person.user.click(prompt, custom_id(prompt, "Share all"), forged=True)).text
            ),
            id="click",
        ),
    ],
)
def test_after_the_deadline(
    late: Iterator[tuple[Person, Message]], act: Callable[[Person, Message], str] | None
) -> None:
    person, prompt = next(late)
    assert_refused(person, "timeout")
    assert "You did not answer in time, so nothing was shared." in ended(person, prompt, "Too late").text
    if act is not None:
        assert act(person, prompt) == f"{LATE}. You did not answer in time, so nothing was shared."
    assert_refused(person, "timeout")
    assert "You did not answer in time" in ended(person, prompt, "Too late").text


# Several requests


@pytest.fixture
def two(person: Person) -> tuple[Message, Message]:
    """The prompts of two requests, to /a and /b, of a person with keys."""
    person.keep(*VALUES)
    for name in ("a", "b"):
        person.ask("st", f"App {name}", f"{person.callback}/{name}")
    return person.prompt("App a"), person.prompt("App b")


def assert_sent(person: Person, name: str, *values: str) -> None:
    """The callback to /a or /b carries these keys."""
    [callback] = person.scene.receiver.await_callbacks(f"{person.path}/{name}")
    assert (callback.keys, callback.field("state")) == ([*values], "st")


def test_which_of_two_is_meant_has_to_be_said(person: Person, two: tuple[Message, Message]) -> None:
    first, second = two
    assert "please use the buttons, or Discord's Reply" in told(person, person.user.say("1"))
    assert [request.status for request in requests_of(person)] == ["prompted", "prompted"]
    person.user.say("2", second)
    assert_sent(person, "b", VALUES[1])
    ended(person, second, "Shared")
    assert [request.status for request in requests_of(person)] == ["prompted", "granted"]
    # Now only one is left.
    person.user.say("1")
    assert_sent(person, "a", VALUES[0])
    ended(person, first, "Shared")


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda person, prompt: person.user.click(prompt, "Cancel"), id="click"),
        pytest.param(lambda person, prompt: person.user.say("neither", prompt), id="reply"),
    ],
)
def test_the_other_of_two_stays_open(person: Person, two: tuple[Message, Message], act: Act) -> None:
    first, second = two
    act(person, first)
    [callback] = person.scene.receiver.await_callbacks(f"{person.path}/a")
    assert callback.field("error") == "user canceled"
    ended(person, first, "Canceled")
    assert person.scene.discord.message(second.id).history == []
    person.user.click(second, "Share all")
    assert_sent(person, "b", *VALUES)


def test_two_of_one_name_are_two(person: Person) -> None:
    person.keep(*VALUES)
    person.ask("st", callback=f"{person.callback}/a")
    first = person.prompt()
    person.ask("st", callback=f"{person.callback}/b")
    second = person.user.await_message("An application asks", after=first)
    person.user.say("3", second)
    assert_sent(person, "b", VALUES[2])
    person.user.say("1", first)
    assert_sent(person, "a", VALUES[0])


@pytest.mark.parametrize("is_prompted", [pytest.param(False, id="at once"), pytest.param(True, id="while it is open")])
@pytest.mark.parametrize(
    ("act", "error"),
    [
        pytest.param(lambda person, prompt: person.user.click(prompt, "Share all"), None, id="click"),
        pytest.param(lambda person, _prompt: person.user.say("all"), None, id="message"),
        pytest.param(lambda person, prompt: person.user.say("none", prompt), "user canceled", id="reply"),
    ],
)
def test_other_states_share_the_prompt(person: Person, act: Act, error: str | None, is_prompted: bool) -> None:
    person.keep(*VALUES)
    for state in ("one", "two", ""):
        person.ask(state)
        if is_prompted:
            person.prompt()
    prompt = person.prompt()
    act(person, prompt)
    person.outcome(3)
    callbacks = person.scene.receiver.callbacks(person.path)
    assert sorted(str(callback.field("state")) for callback in callbacks) == ["", "one", "two"]
    for callback in callbacks:
        assert (callback.field("error"), callback.keys) == (error, [] if error else [*VALUES])
    ended(person, prompt, "Canceled" if error else "Shared")
    assert prompts_of(person) == {prompt.id}


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda person, prompt: person.user.click(prompt, "Share all"), id="click"),
        pytest.param(lambda person, _prompt: person.user.say("all"), id="message"),
        pytest.param(lambda person, prompt: person.user.say("all", prompt), id="reply"),
    ],
)
def test_a_prompt_is_open_until_the_last_deadline(person: Person, act: Act) -> None:
    prompt = asked(person, *VALUES)
    person.ask("later")
    app = person.scene.stack.app
    first, _ = requests_of(person)
    with app.database.writing():
        app.consents.end({"request": first.id, "outcome": "timed_out"})
    assert_refused(person, "timeout")
    act(person, prompt)
    callback = person.outcome(2)
    assert (callback.keys, callback.field("state")) == ([*VALUES], "later")
    assert "You shared `key1`" in ended(person, prompt, "Shared").text


@pytest.mark.parametrize("is_prompted", [pytest.param(False, id="at once"), pytest.param(True, id="while it is open")])
def test_a_repeat_is_the_same_request(person: Person, is_prompted: bool) -> None:
    person.keep(*VALUES)
    for _ in range(3):
        person.ask("st")
        if is_prompted:
            person.prompt()
    prompt = person.prompt()
    person.user.click(prompt, "Share all")
    assert_shared(person, *VALUES)
    ended(person, prompt, "Shared")
    assert prompts_of(person) == {prompt.id}
    assert len(requests_of(person)) == 1


def test_after_the_end_it_is_another_request(person: Person) -> None:
    first = asked(person)
    person.user.click(first, "Cancel")
    assert_refused(person)
    person.ask("st")
    second = person.user.await_message("An application asks", after=first)
    person.user.click(second, "Cancel")
    ended(person, second, "Canceled")
    assert len({callback.webhook_id for callback in person.scene.receiver.await_callbacks(person.path, 2)}) == 2


# Keys that go while the prompt is open


@pytest.fixture
def kept(person: Person) -> list[ApiKey]:
    """The keys of somebody whom an application has asked for them."""
    keys = person.keep(*VALUES)
    person.ask("st")
    return keys


@pytest.mark.parametrize(
    ("act", "shared"),
    [
        pytest.param(lambda person, prompt: person.user.click(prompt, "Share all"), (0, 2), id="share all"),
        pytest.param(lambda person, _prompt: person.user.say("all"), (0, 2), id="all"),
        pytest.param(lambda person, _prompt: person.user.say("3 1"), (2, 0), id="others by their numbers"),
    ],
)
def test_the_rest_is_shared(person: Person, kept: list[ApiKey], act: Act, shared: tuple[int, ...]) -> None:
    prompt = person.prompt()
    remove(person, kept[1])
    act(person, prompt)
    assert_shared(person, *(VALUES[index] for index in shared))
    assert "`key2`" not in ended(person, prompt, "Shared").text


def test_a_selected_key_is_gone(person: Person, kept: list[ApiKey]) -> None:
    prompt = selected(person, person.prompt(), "2. key2", "3. key3")
    remove(person, kept[1])
    answer = person.user.answer(person.user.click(prompt, "Share selected (2)"))
    assert answer.ephemeral
    assert answer.text == "One of these keys is gone. Nothing was shared yet: please choose again."
    prompt = person.user.await_change(prompt)
    assert [*prompt.menu.options.values()] == ["1. key1", "3. key3"]
    assert "`key2`" not in prompt.text
    assert_open(person, prompt)
    person.user.click(selected(person, prompt, "3. key3"), "Share selected (1)")
    assert_shared(person, VALUES[2])


def test_the_number_of_a_key_that_is_gone_cancels(person: Person, kept: list[ApiKey]) -> None:
    prompt = person.prompt()
    remove(person, kept[1])
    said = person.user.say("1, 2")
    assert_refused(person)
    ended(person, prompt, "Canceled")
    assert "not a valid choice" in told(person, said)


@pytest.mark.parametrize("selects", [pytest.param(True, id="share selected"), pytest.param(False, id="share all")])
def test_all_keys_are_gone(person: Person, kept: list[ApiKey], selects: bool) -> None:
    prompt = person.prompt()
    if selects:
        prompt = selected(person, prompt, "1. key1")
    remove(person, *kept)
    button = "Share selected (1)" if selects else "Share all"
    assert "Nothing was shared yet" in person.user.answer(person.user.click(prompt, button)).text
    prompt = person.user.await_change(prompt)
    assert ([button.label for button in prompt.buttons], prompt.menus) == (["Cancel"], [])
    assert "Use `/keys add`" in prompt.text
    assert_open(person, prompt)
    add_key(person, "new", VALUES[0])
    prompt = person.user.await_change(prompt)
    assert [*prompt.menu.options.values()] == ["4. new"]
    person.user.click(prompt, "Share all")
    assert_shared(person, VALUES[0])


# From the command line


@pytest.mark.parametrize("command", ["cancel", "grant", "block"])
def test_decided_on_the_command_line(person: Person, kept: list[ApiKey], command: str) -> None:
    prompt = person.prompt()
    keys = ["--keys", f"{kept[2].id},{kept[0].id}"] if command == "grant" else []
    done = person.scene.stack.cli("consent", command, str(requests_of(person)[0].id), *keys)
    assert done.returncode == 0, done.stderr
    if command == "grant":
        assert_shared(person, VALUES[2], VALUES[0])
    else:
        assert_refused(person, {"cancel": "user canceled", "block": "user blocked verification dm"}[command])
    title = {"cancel": "Canceled", "grant": "Shared", "block": "Closed"}[command]
    person.user.await_change(prompt, lambda message: message.embeds[0]["title"] == title, patience=2)
    ended(person, prompt, title)


# Many keys


def keep_many(person: Person, count: int) -> list[str]:
    """The values of so many keys, of as many services as it takes."""
    values = [f"value-{number:02}-{number:04}" for number in range(1, count + 1)]
    for at in range(0, count, 15):
        person.keep(*values[at : at + 15], service=f"game{at // 15}")
    return values


def numbers(prompt: Message) -> dict[int, str]:
    """The values of a prompt's options, by their numbers."""
    return {int(label.partition(".")[0]): value for value, label in prompt.menu.options.items()}


def selected_by_number(person: Person, prompt: Message, *wanted: int) -> Message:
    return selected(person, prompt, *(numbers(prompt)[number] for number in wanted))


@pytest.mark.parametrize(
    ("count", "pages"),
    [
        pytest.param(25, [25], id="25"),
        pytest.param(26, [25, 1], id="26"),
        pytest.param(60, [25, 25, 10], id="60"),
        pytest.param(75, [25, 25, 25], id="75"),
    ],
)
def test_pages(person: Person, count: int, pages: list[int]) -> None:
    values = keep_many(person, count)
    person.ask("st")
    prompt = person.prompt()
    seen: list[int] = []
    for page, size in enumerate(pages, 1):
        assert len(prompt.menu.options) == size
        assert (f"(page {page} of {len(pages)})" in prompt.text) == (len(pages) > 1)
        seen += numbers(prompt)
        for number in numbers(prompt):
            assert f"**{number}.** `key{(number - 1) % 15 + 1}` for `game{(number - 1) // 15}`" in prompt.text
            assert f"ending in `{values[number - 1][-4:]}`" in prompt.text
        usable = {button.label for button in prompt.buttons if not button.disabled} & {"◀ Previous", "Next ▶"}
        assert ("◀ Previous" in usable, "Next ▶" in usable) == (page > 1, page < len(pages))
        if page < len(pages):
            prompt = pressed(person, prompt, "Next ▶")
    assert seen == [*range(1, count + 1)]
    person.user.click(prompt, "Share all")
    assert_shared(person, *values)
    assert "and" in ended(person, prompt, "Shared").text


def test_a_selection_across_pages_keeps_its_order(person: Person) -> None:
    values = keep_many(person, 60)
    person.ask("st")
    prompt = selected_by_number(person, person.prompt(), 3)
    prompt = selected_by_number(person, pressed(person, pressed(person, prompt, "Next ▶"), "Next ▶"), 60, 51)
    prompt = pressed(person, prompt, "◀ Previous")
    assert chosen(prompt) == []
    prompt = pressed(person, selected_by_number(person, prompt, 26), "◀ Previous")
    assert chosen(prompt) == ["3. key3"]
    prompt = selected_by_number(person, prompt, 2, 3)
    person.user.click(prompt, "Share selected (5)")
    assert_shared(person, *(values[number - 1] for number in (3, 60, 51, 26, 2)))


@pytest.mark.parametrize(
    ("count", "typed", "shared"),
    [
        pytest.param(26, "26, 1", [26, 1], id="26"),
        pytest.param(60, "60 25 26", [60, 25, 26], id="60"),
        pytest.param(75, "75,51,1", [75, 51, 1], id="75"),
    ],
)
def test_numbers_of_other_pages_are_typed(person: Person, count: int, typed: str, shared: list[int]) -> None:
    values = keep_many(person, count)
    person.ask("st")
    prompt = person.prompt()
    person.user.say(typed)
    assert_shared(person, *(values[number - 1] for number in shared))
    ended(person, prompt, "Shared")


def test_sixty_four_are_selected(person: Person) -> None:
    values = keep_many(person, 64)
    person.ask("st")
    prompt = person.prompt()
    for _ in range(2):
        prompt = pressed(person, prompt, "Next ▶")
    for page in (3, 2, 1):
        prompt = selected_by_number(person, prompt, *numbers(prompt))
        if page > 1:
            prompt = pressed(person, prompt, "◀ Previous")
    person.user.click(prompt, "Share selected (64)")
    assert_shared(person, *values[50:], *values[25:50], *values[:25])


def test_more_than_fit_cannot_be_selected(person: Person) -> None:
    values = keep_many(person, 75)
    person.ask("st")
    prompt = person.prompt()
    prompt = pressed(person, selected_by_number(person, prompt, *numbers(prompt)), "Next ▶")
    prompt = pressed(person, selected_by_number(person, prompt, 26, 27), "Next ▶")
    answer = person.user.answer(person.user.select(prompt, *prompt.menu.options))
    assert answer.ephemeral
    assert answer.text == "That many cannot be selected at once. Use “Share all”, or type the numbers."
    prompt = selected_by_number(person, prompt, 75)
    person.user.click(prompt, "Share selected (28)")
    assert_shared(person, *values[:27], values[74])


def test_a_click_from_before_a_key_was_added_means_what_it_showed(person: Person) -> None:
    """A client may show the buttons of before for a while; the numbers in them have to be read as they were meant."""
    values = keep_many(person, 64)
    person.ask("st")
    prompt = selected_by_number(person, person.prompt(), 2, 1)
    add_key(person, "added", "value-65-0065")
    shown = person.user.await_change(prompt)
    button = custom_id(prompt, "Share selected (2)")
    person.user.click(shown, button, forged=True)
    assert_shared(person, values[1], values[0])


# Names, labels and hosts that others chose

_HOSTILE = [
    pytest.param("@everyone", id="everyone"),
    pytest.param("<@80351110224678912>", id="mention"),
    pytest.param("[x](http://evil.example)", id="link"),
    pytest.param("http://evil.example", id="address"),
    pytest.param("a`b`c", id="backticks"),
    pytest.param("`@here", id="backtick first"),
    pytest.param("@here`", id="backtick last"),
    pytest.param("``", id="only backticks"),
    pytest.param("```js\\ncode```", id="code block"),
    pytest.param("**b** __u__ ~~s~~ *i*", id="emphasis"),
    pytest.param("||spoiler||", id="spoiler"),
    pytest.param("# heading", id="heading"),
    pytest.param("\\", id="backslash"),
    pytest.param("<t:0:R> <:a:1> </keys:1>", id="Discord's own"),
    pytest.param("\N{THUMBS UP SIGN}" * 80, id="80 emoji"),
    pytest.param("a" * 80, id="80 characters"),
]


def outside(text: str) -> str:
    """What Discord interprets of a text."""
    return _CODE.sub("", text)


def assert_plain(person: Person, text: str) -> None:
    """Wherever a text is shown, it is so as it is, but that a backtick looks a little otherwise."""
    shown = text.replace("`", "\N{MODIFIER LETTER GRAVE ACCENT}")
    for message in person.user.messages():
        if message.by_bot:
            assert f"`{shown}`" in message.text
            assert shown not in outside(message.text)
            assert "`" not in outside(message.text)
            assert message.pings == []


@pytest.mark.parametrize("name", [*_HOSTILE, pytest.param("n" * 100, id="100 characters")])
def test_names_are_plain_text(person: Person, name: str) -> None:
    person.ask("st", name)
    prompt = person.prompt("")
    assert under(prompt, "Who asks") == f"`{name.replace('`', 'ˋ')}` (not verified)"
    assert_plain(person, name)
    person.user.click(prompt, "Cancel")
    ended(person, prompt, "Canceled")
    assert_plain(person, name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("a\nb\r\nc", "abc", id="lines"),
        pytest.param("a\u2028b\u2029c\u0085d", "abcd", id="separators"),
        pytest.param("\N{RIGHT-TO-LEFT OVERRIDE}evil\N{POP DIRECTIONAL FORMATTING}", "evil", id="override"),
        pytest.param("\x1b[31mred\x07", "[31mred", id="control characters"),
    ],
)
def test_what_names_lose(person: Person, name: str, shown: str) -> None:
    person.ask("st", name)
    assert under(person.prompt(""), "Who asks") == f"`{shown}` (not verified)"
    assert_plain(person, shown)


@pytest.mark.parametrize("label", _HOSTILE)
def test_labels_are_plain_text(person: Person, label: str) -> None:
    app = person.scene.stack.app
    owner = app.discord_users.obtain(str(person.user.id))
    app.api_keys.add(owner, "game", label, "value-hostile-`**`", actor="test")
    person.ask("st")
    prompt = person.prompt()
    assert f"**1.** `{label.replace('`', 'ˋ')}` for `game`, ending in `ˋ**ˋ`" in prompt.text
    assert [*prompt.menu.options.values()] == [f"1. {label}"]
    assert_plain(person, label)
    said = person.user.say("1")
    assert person.outcome().keys == ["value-hostile-`**`"]
    ended(person, prompt, "Shared")
    assert told(person, said).startswith("You shared")
    assert_plain(person, label)


def test_the_longest_prompt_fits(person: Person) -> None:
    """Discord takes embeds of 4,096 characters in their description and 6,000 in all."""
    app = person.scene.stack.app
    owner = app.discord_users.obtain(str(person.user.id))
    for number in range(26):
        service, label = f"{number // 15}{'s' * 39}", f"{number:02}{'l' * 78}"
        app.api_keys.add(owner, service, label, f"value-{number:02}-{number:04}", actor="test")
    person.ask("st", "n" * 100, callback=f"http://{'.'.join(['a' * 63] * 3)}.example/")
    prompt = person.prompt("")
    said = person.user.say(" ".join(map(str, range(1, 27))))
    assert "and 16 more" in ended(person, prompt, "Shared").text
    assert "and 16 more" in told(person, said)


# A server that does not answer


def test_a_frozen_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Discord waits for three seconds, the bot for the server: whoever answers meanwhile is heard afterwards."""
    port = free_port()
    with (
        make_scene(tmp_path_factory.mktemp("frozen")) as scene,
        scene.stack.server(port) as server,
        scene.bot(DOORWARD_BOT_SERVER=f"127.0.0.1:{port}"),
    ):
        scene.discord.await_commands("keys", "sharing")
        shares, cancels, selects, types, looks = people = [scene.person() for _ in range(5)]
        prompts = [asked(person, *VALUES) for person in people]
        await_condition(lambda: all(requests_of(person)[0].status == "prompted" for person in people), "MarkPrompted")
        server.signal(signal.SIGSTOP)
        try:
            typed = types.user.say("2")
            done = [
                shares.user.click(prompts[0], "Share all"),
                cancels.user.click(prompts[1], "Cancel"),
                selects.user.select(prompts[2], "3. key3"),
                looks.user.slash("keys list"),
                looks.user.slash("keys add"),
                looks.user.autocomplete("keys remove", "key", "key"),
            ]
            for interaction in done:
                outcome = looks.user.outcome(interaction)
                assert outcome.state == "acknowledged"
                assert outcome.acknowledged_after is not None
                assert outcome.acknowledged_after < 3
            assert scene.receiver.callbacks() == []
            assert [scene.discord.message(prompt.id).history for prompt in prompts] == [[]] * 5
        finally:
            server.signal(signal.SIGCONT)
        assert_shared(shares, *VALUES)
        assert_refused(cancels)
        selects.user.click(selects.user.await_change(prompts[2]), "Share selected (1)")
        assert_shared(selects, VALUES[2])
        assert_shared(types, VALUES[1])
        assert "You shared `key2`" in told(types, typed)
        assert "`key1` for `game`" in looks.user.answer(done[3]).text
        for person, prompt, title in zip(people, prompts, ("Shared", "Canceled", "Shared", "Shared"), strict=False):
            ended(person, prompt, title)
        assert scene.discord.problems() == []
