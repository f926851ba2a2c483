"""`doorward key` as operators meet it: output, exit codes, and no values."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from doorward_server.models import AuditEvent, User
from tests.processes import free_port
from tests.unit.command_line import Done, Here, assert_tells, at_terminal, doorward, in_database, opened, result
from tests.unit.peers import Peer, Serve, answering

SNOWFLAKE = "123456789012345678"
WHOSE = ("--discord-user", SNOWFLAKE)
ADD = ("key", "add", *WHOSE, "--service", "forum", "--label", "main")
VALUE = "hunter2-sekret-value"


def values(home: Path, snowflake: str = SNOWFLAKE) -> list[str]:
    """What is kept for a Discord user."""
    with opened(home) as app:
        user = app.discord_users.find(snowflake)
        return list(app.api_keys.values([row.id for row, _ in app.api_keys.list(user)]).values()) if user else []


def add(here: Here, home: Path, value: str = VALUE, *words: str) -> int:
    key_id: int = result(here(home, *(words or ADD), "--value-stdin", "--json", stdin=value.encode()))["id"]
    return key_id


# add


@pytest.mark.parametrize(
    ("stdin", "value"),
    [
        pytest.param(VALUE.encode(), VALUE, id="as it is"),
        pytest.param(f"{VALUE}\n".encode(), VALUE, id="final newline"),
        pytest.param("ключ\n".encode(), "ключ", id="beyond ASCII"),
    ],
)
def test_a_key_is_read_from_standard_input(home: Path, here: Here, stdin: bytes, value: str) -> None:
    done = here(home, *ADD, "--value-stdin", stdin=stdin)
    assert (done.returncode, done.stdout, done.stderr) == (0, "added key 1\n", "")
    assert values(home) == [value]
    assert not in_database(home, value)
    with opened(home) as app:
        [event] = app.database.fetch_all(AuditEvent.select())
        assert (event.actor, event.action) == ("operator", "key.added")
        assert app.database.fetch_one("SELECT key_id FROM master_keys", ()) == (app.keys.sealing_id,)


def test_a_key_is_asked_for_at_a_terminal_without_echo(home: Path) -> None:
    done = at_terminal(home, *ADD, "--json", prompt="Key", typed=f"{VALUE}\n", hidden=True)
    assert result(Done(done.args, done.returncode, done.stdout, "")) == {"id": 1}
    assert VALUE not in done.stderr
    assert values(home) == [VALUE]


def test_an_end_at_the_prompt_adds_nothing(home: Path) -> None:
    done = at_terminal(home, *ADD, prompt="Key", typed="\x03", hidden=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert values(home) == []


def test_with_nobody_to_ask(home: Path, here: Here) -> None:
    assert_tells(here(home, *ADD, stdin=VALUE.encode()), "--value-stdin", "terminal")
    assert values(home) == []


@pytest.mark.parametrize(
    ("stdin", "parts"),
    [
        pytest.param(b"", ("the key has to be",), id="empty"),
        pytest.param(b"\n", ("the key has to be",), id="newline alone"),
        pytest.param(b"hunter2\n\n", ("the key has to be",), id="two newlines"),
        pytest.param(b"hunter2\r\n", ("the key has to be",), id="carriage return"),
        pytest.param(b"hunter2 sekret", ("the key has to be",), id="blank"),
        pytest.param(b"hunter2" * 1000, ("4096",), id="long"),
        pytest.param(b"hunter2\xff", ("--value-stdin", "not UTF-8 text"), id="not UTF-8"),
    ],
)
def test_what_is_no_key(home: Path, here: Here, stdin: bytes, parts: tuple[str, ...]) -> None:
    done = here(home, *ADD, "--value-stdin", stdin=stdin)
    assert_tells(done, *parts)
    assert "hunter2" not in done.stderr
    assert values(home) == []


@pytest.mark.parametrize("words", [ADD, ("key", "list", *WHOSE), ("key", "remove", *WHOSE, "1")], ids=lambda it: it[1])
@pytest.mark.parametrize("snowflake", ["", "ada", "-1", "1.5", str(2**64), "1" * 21, "<@1>", "\uff11"])
def test_what_is_no_discord_user(home: Path, here: Here, words: tuple[str, ...], snowflake: str) -> None:
    words = tuple(snowflake if word == SNOWFLAKE else word for word in words)
    more = ("--value-stdin",) if words[1] == "add" else ()
    assert_tells(here(home, *words, *more, stdin=VALUE.encode()), "--discord-user has to be a Discord user's id")


@pytest.mark.parametrize(
    ("option", "text", "part"),
    [
        ("--service", "GW2", "the service has to be"),
        ("--service", "", "the service has to be"),
        ("--label", " ", "the label has to be"),
        ("--label", "a\nb", "the label has to be"),
    ],
)
def test_what_is_no_service_or_label(home: Path, here: Here, option: str, text: str, part: str) -> None:
    assert_tells(here(home, *ADD, option, text, "--value-stdin", stdin=VALUE.encode()), part)
    assert values(home) == []


def test_refusals(home: Path, here: Here) -> None:
    add(here, home)
    assert_tells(here(home, *ADD, "--value-stdin", stdin=VALUE.encode()), "has this key already")
    for number in range(14):
        add(here, home, f"{VALUE}-{number}")
    assert_tells(here(home, *ADD, "--value-stdin", stdin=b"another"), "there are 15 keys")


def with_validator(home: Path, url: str) -> None:
    (home / "doorward.toml").write_text(
        f"[outbound]\nallow = ['{url.removeprefix('http://')}']\n"
        f"[validators.forum]\ntokeninfo_url = '{url}/t'\naccount_url = '{url}/a'\n"
    )


@pytest.mark.parametrize(
    ("serve", "part"),
    [
        pytest.param(answering(status="401 Unauthorized"), "the service does not accept this key", id="refused"),
        pytest.param(answering(status="503 Whatever"), "the service cannot judge the key", id="failing"),
    ],
)
def test_what_the_service_does_not_accept(home: Path, here: Here, serve: Serve, part: str) -> None:
    with Peer(serve) as peer:
        with_validator(home, peer.url)
        done = here(home, *ADD, "--value-stdin", stdin=VALUE.encode())
    assert_tells(done, part)
    assert VALUE not in done.stderr
    assert values(home) == []


def test_a_service_that_is_away(home: Path, here: Here) -> None:
    with_validator(home, f"http://127.0.0.1:{free_port()}")
    assert_tells(here(home, *ADD, "--value-stdin", stdin=VALUE.encode()), "the service cannot judge the key")
    assert values(home) == []


# list


def test_keys_are_listed_as_a_table_and_as_json(home: Path, here: Here) -> None:
    with Peer(answering(b'{"name":"Ada.1234","permissions":["account","wallet"]}')) as peer:
        with_validator(home, peer.url)
        add(here, home)
    add(here, home, "short", "key", "add", *WHOSE, "--service", "game", "--label", "[red]Ünï 🎉[/b]")
    add(here, home, VALUE, "key", "add", "--discord-user", "8", "--service", "game", "--label", "theirs")
    listed = result(here(home, "key", "list", "--discord-user", f"00{SNOWFLAKE}", "--json"))
    assert [key.pop("created")[:2] for key in listed] == ["20", "20"]
    facts = {"account": "Ada.1234", "permissions": ["account", "wallet"]}
    assert listed == [
        {"id": 1, "service": "forum", "label": "main", "last_four": "alue", **facts},
        {
            "id": 2,
            "service": "game",
            "label": "[red]Ünï 🎉[/b]",
            "last_four": "rt",
            "account": None,
            "permissions": [],
        },
    ]
    table = here(home, "key", "list", *WHOSE)
    assert (table.returncode, table.stderr) == (0, "")
    for text in ("forum", "main", "alue", "Ada.1234", "account, wallet", "game", "[red]Ünï 🎉[/b]"):
        assert text in table.stdout
    assert "theirs" not in table.stdout
    assert VALUE not in table.stdout


def test_nobody_has_no_keys(home: Path, here: Here) -> None:
    assert result(here(home, "key", "list", *WHOSE, "--json")) == []
    assert here(home, "key", "list", *WHOSE).returncode == 0
    with opened(home) as app:
        assert app.database.fetch_all(User.select()) == []


# remove


def test_remove(home: Path, here: Here) -> None:
    first, second = add(here, home), add(here, home, f"{VALUE}-2")
    assert here(home, "key", "remove", *WHOSE, str(first)).stdout == f"removed key {first}\n"
    assert result(here(home, "key", "remove", *WHOSE, str(second), "--json")) == {"id": second}
    assert values(home) == []
    with opened(home) as app:
        events = app.database.fetch_all(AuditEvent.select().order_by(AuditEvent.id))
        assert [(event.actor, event.action) for event in events[2:]] == [("operator", "key.removed")] * 2


@pytest.mark.parametrize(
    ("whose", "key_id"),
    [
        pytest.param(SNOWFLAKE, "2", id="unknown"),
        pytest.param(SNOWFLAKE, str(2**63 - 1), id="largest"),
        pytest.param("8", "1", id="of another"),
        pytest.param("9", "1", id="of nobody"),
    ],
)
def test_there_is_no_such_key(home: Path, here: Here, whose: str, key_id: str) -> None:
    add(here, home)
    with opened(home) as app:
        app.discord_users.obtain("8")
    assert_tells(here(home, "key", "remove", "--discord-user", whose, key_id), "the user has no such key")
    assert values(home) == [VALUE]


@pytest.mark.parametrize("key_id", ["0", "-1", str(2**63), "main", ""])
def test_what_is_no_id(home: Path, here: Here, key_id: str) -> None:
    done = here(home, "key", "remove", *WHOSE, "--", key_id)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


# The commands as processes


@pytest.mark.parametrize("option", ["--discord-user", "--service", "--label"])
def test_what_is_required(home: Path, here: Here, option: str) -> None:
    position = ADD.index(option)
    done = here(home, *ADD[:position], *ADD[position + 2 :], "--value-stdin", stdin=VALUE.encode())
    assert done.returncode == 2
    assert option in done.stderr


def test_as_processes(home: Path) -> None:
    assert doorward(home, *ADD, "--value-stdin", stdin=f"{VALUE}\n".encode()).stdout == "added key 1\n"
    assert [key["id"] for key in result(doorward(home, "key", "list", *WHOSE, "--json"))] == [1]
    assert doorward(home, "key", "remove", *WHOSE, "1").stdout == "removed key 1\n"


def test_processes_at_once_make_one_user(home: Path) -> None:
    assert doorward(home, "migrate").returncode == 0
    with ThreadPoolExecutor(4) as pool:
        added = [
            pool.submit(doorward, home, *ADD, "--value-stdin", stdin=f"{VALUE}-{number}".encode())
            for number in (0, 0, 1, 2)
        ]
    assert sorted(one.result().returncode for one in added) == [0, 0, 0, 1]
    assert sorted(values(home)) == [f"{VALUE}-{number}" for number in range(3)]
    with opened(home) as app:
        assert len(app.database.fetch_all(User.select())) == 1
