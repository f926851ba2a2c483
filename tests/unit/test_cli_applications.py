"""`doorward app` as operators meet it: output, exit codes, and each secret only once."""

from pathlib import Path
from typing import Any

import pytest

from doorward_server.service_tokens import Service
from tests.unit.command_line import Here, assert_tells, doorward, in_database, opened, printed, result

PREFIX = "https://bot.example/callback"
NAME = "My super bot"


def make(here: Here, home: Path, *options: str) -> dict[str, Any]:
    words = ("app", "create", "--name", NAME, "--callback-prefix", PREFIX)
    made: dict[str, Any] = result(here(home, *words, *options, "--json"))
    return made


def lets_in(home: Path, application_id: str, *secrets: str) -> list[bool]:
    with opened(home) as app:
        return [app.applications.find(application_id, secret) is not None for secret in secrets]


def signs_with(home: Path, application_id: str) -> list[str]:
    with opened(home) as app:
        return app.applications.signing_secrets(application_id)


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_an_application_s_secrets_are_shown_once(home: Path, here: Here, form: tuple[str, ...]) -> None:
    done = here(home, "app", "create", "--name", NAME, "--callback-prefix", PREFIX, *form)
    made = result(done) if form else printed(done)
    shown = {"name", "enabled", "callback_prefixes", "callback_format", "created"} if form else set()
    assert set(made) == {"id", "secret", "signing_secret"} | shown
    assert lets_in(home, made["id"], made["secret"]) == [True]
    assert signs_with(home, made["id"]) == [made["signing_secret"]]
    secrets = [made["secret"].removeprefix("das_"), made["signing_secret"].removeprefix("whsec_")]
    assert [in_database(home, secret) for secret in secrets] == [False, False]
    one = made["id"]
    for words in (("list",), ("show", one), ("change", one, "--format", "json"), ("disable", one), ("enable", one)):
        for more in ((), ("--json",)):
            later = here(home, "app", *words, *more)
            assert later.returncode == 0
            assert one in later.stdout
            assert [secret for secret in secrets if secret in later.stdout + later.stderr] == []


def test_it_works_as_a_process_of_its_own(home: Path) -> None:
    made = printed(doorward(home, "app", "create", "--name", NAME, "--callback-prefix", PREFIX))
    assert lets_in(home, made["id"], made["secret"]) == [True]


def test_applications_are_listed_and_shown(home: Path, here: Here) -> None:
    assert result(here(home, "app", "list", "--json")) == []
    one = make(here, home, "--callback-prefix", "https://other.example", "--format", "json")
    shown = result(here(home, "app", "show", one["id"], "--json"))
    assert shown == {name: value for name, value in one.items() if not name.endswith("secret")}
    assert shown == {
        "id": one["id"],
        "name": NAME,
        "enabled": True,
        "callback_prefixes": [PREFIX, "https://other.example"],
        "callback_format": "json",
        "created": shown["created"],
    }
    here(home, "app", "disable", one["id"])
    assert result(here(home, "app", "list", "--json")) == [{**shown, "enabled": False}]
    for words in (("list",), ("show", one["id"])):
        table = here(home, "app", *words)
        assert (table.returncode, table.stderr) == (0, "")
        wanted = (one["id"], NAME, "no", PREFIX, "https://other.example")
        assert [text for text in wanted if text not in table.stdout] == []


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        pytest.param(("--name", "Other bot"), {"name": "Other bot"}, id="name"),
        pytest.param(("--name", "a\x1b[31mb\u202e"), {"name": "a[31mb"}, id="name with controls"),
        pytest.param(
            ("--callback-prefix", "https://a.example", "--callback-prefix", "https://b.example"),
            {"callback_prefixes": ["https://a.example", "https://b.example"]},
            id="prefixes",
        ),
        pytest.param(("--format", "json"), {"callback_format": "json"}, id="format"),
        pytest.param(("--format", "form", "--name", "X"), {"callback_format": "form", "name": "X"}, id="two of them"),
    ],
)
def test_change(home: Path, here: Here, options: tuple[str, ...], changed: dict[str, Any]) -> None:
    one = make(here, home)["id"]
    before = result(here(home, "app", "show", one, "--json"))
    assert here(home, "app", "change", one, *options).stdout == f"changed application {one}\n"
    assert result(here(home, "app", "show", one, "--json")) == {**before, **changed}
    assert result(here(home, "app", "change", one, *options, "--json")) == {"id": one}


@pytest.mark.parametrize(
    ("options", "overlaps", "ends"),
    [
        pytest.param((), True, "is valid until 20", id="a day by default"),
        pytest.param(("--overlap-hours", "0.5"), True, "is valid until 20", id="half an hour"),
        pytest.param(("--overlap-hours", "0"), False, "has ended", id="at once"),
    ],
)
def test_rotate(home: Path, here: Here, options: tuple[str, ...], overlaps: bool, ends: str) -> None:
    one = make(here, home)
    done = here(home, "app", "rotate", one["id"], *options)
    made = printed(done)
    assert made == {"id": one["id"], "secret": made["secret"]}
    assert done.stderr.startswith(f"the previous secret {ends}")
    assert lets_in(home, one["id"], one["secret"], made["secret"]) == [overlaps, True]
    assert not in_database(home, made["secret"].removeprefix("das_"))
    again = result(here(home, "app", "rotate", one["id"], *options, "--json"))
    assert set(again) == {"id", "secret", "old_secret_expires"}
    assert lets_in(home, one["id"], one["secret"], made["secret"], again["secret"]) == [False, overlaps, True]


@pytest.mark.parametrize(
    ("options", "overlaps", "ends"),
    [
        pytest.param((), True, "is valid until 20", id="a day by default"),
        pytest.param(("--overlap-hours", "0"), False, "has ended", id="at once"),
    ],
)
def test_rotate_signing(home: Path, here: Here, options: tuple[str, ...], overlaps: bool, ends: str) -> None:
    one = make(here, home)
    done = here(home, "app", "rotate-signing", one["id"], *options)
    made = printed(done)
    assert made == {"id": one["id"], "signing_secret": made["signing_secret"]}
    assert done.stderr.startswith(f"the previous signing secret {ends}")
    old = [one["signing_secret"]] if overlaps else []
    assert signs_with(home, one["id"]) == [made["signing_secret"], *old]
    again = result(here(home, "app", "rotate-signing", one["id"], *options, "--json"))
    assert set(again) == {"id", "signing_secret", "old_signing_secret_expires"}
    assert lets_in(home, one["id"], one["secret"]) == [True]


def test_disable_and_enable(home: Path, here: Here) -> None:
    one = make(here, home)
    for word, let_in in (("disable", False), ("disable", False), ("enable", True), ("enable", True)):
        assert here(home, "app", word, one["id"]).stdout == f"{word}d application {one['id']}\n"
        assert lets_in(home, one["id"], one["secret"]) == [let_in]
        assert result(here(home, "app", word, one["id"], "--json")) == {"id": one["id"]}


def test_a_token_is_the_application_s(home: Path, here: Here) -> None:
    one = make(here, home)["id"]
    value = here(home, "app", "token", one).stdout.removesuffix("\n")
    made = result(here(home, "app", "token", one, "--days", "90", "--json"))
    assert set(made) == {"id", "application", "expires", "token"}
    assert (made["application"], made["expires"] is None) == (one, False)
    with opened(home) as app:
        found = [app.service_tokens.find(token) for token in (value, made["token"])]
    assert found == [Service(made["id"] - 1, frozenset(), one), Service(made["id"], frozenset(), one)]
    listed = result(here(home, "token", "list", "--json"))
    assert [(token["name"], token["roles"], token["application"]) for token in listed] == [(NAME, [], one)] * 2
    assert here(home, "token", "list").returncode == 0
    assert not in_database(home, value.removeprefix("dwt_"))


@pytest.mark.parametrize("application_id", ["app_unknown", "", NAME, "é", "%", "a\nb"])
@pytest.mark.parametrize(
    "words",
    [("show",), ("change", "--name", "x"), ("rotate",), ("rotate-signing",), ("disable",), ("enable",), ("token",)],
    ids=lambda words: words[0],
)
def test_unknown_applications(home: Path, here: Here, words: tuple[str, ...], application_id: str) -> None:
    word, *options = words
    assert_tells(here(home, "app", word, *options, "--", application_id), "there is no such application")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param(("--name", "\u202e "), ("the name has to be 1 to 100",), id="no name"),
        pytest.param(("--name", "x" * 101), ("the name has to be 1 to 100",), id="long name"),
        pytest.param(("--name", "MY SUPER BOT"), ("looks the same",), id="name taken"),
        pytest.param(("--callback-prefix", "bot.example"), ('"bot.example"', "absolute"), id="no URL"),
        pytest.param(("--callback-prefix", "http://0177.0.0.1/"), ("not valid", "address"), id="hidden address"),
        pytest.param(("--callback-prefix", "https://a.example/\x1b[31m"), ("control character",), id="control"),
        pytest.param(("--callback-prefix", f"{PREFIX}/x"), ("overlaps", PREFIX), id="prefix taken"),
    ],
)
def test_what_no_application_can_have(home: Path, here: Here, options: tuple[str, str], parts: tuple[str, ...]) -> None:
    taken = make(here, home)["id"]
    needed = {"--name": "Other", "--callback-prefix": "https://other.example", **dict([options])}
    create = [word for option in needed.items() for word in option]
    done = here(home, "app", "create", *create)
    assert_tells(done, *parts)
    assert "\x1b" not in done.stderr
    assert [one["id"] for one in result(here(home, "app", "list", "--json"))] == [taken]


def test_nothing_to_change(home: Path, here: Here) -> None:
    one = make(here, home)["id"]
    assert_tells(here(home, "app", "change", one), "there is nothing to change", "--callback-prefix")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("create", "--name", NAME), id="no prefix"),
        pytest.param(("create", "--callback-prefix", PREFIX), id="no name"),
        pytest.param(("create", "--name", NAME, "--callback-prefix", PREFIX, "--format", "xml"), id="format"),
        pytest.param(("rotate", "app_x", "--overlap-hours", "-1"), id="overlap below 0"),
        pytest.param(("token", "app_x", "--days", "0"), id="no days"),
    ],
)
def test_wrong_usage(home: Path, here: Here, words: tuple[str, ...]) -> None:
    done = here(home, "app", *words)
    assert (done.returncode, done.stdout) == (2, "")
