"""`doorward client`, `provider` and `user` as operators meet them: output, exit codes, files, and no secrets."""

import base64
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from doorward_server.crypto import Place, fingerprint
from doorward_server.integrations import REVOCATION
from doorward_server.models import Connection, Job, OAuthIdentity, User
from tests.unit.command_line import (
    Done,
    Here,
    assert_tells,
    at_terminal,
    doorward,
    in_database,
    opened,
    printed,
    result,
)

SECRET = "hunter2-sekret"
LOOKUP = "https://login.example/me?t={access_token}"
WITH_CODES = ("--lookup-url", LOOKUP, "--token-url", "https://login.example/token", "--client-id", "doorward")
KAI = ("--token-url", "https://flo.example/token", "--client-id", "us", "--redirect-uri", "https://app.example/")
CONTROLS = [
    pytest.param("a\tb", id="tab"),
    pytest.param("a\nb", id="line feed"),
    pytest.param("a\x1b[31mb", id="escape"),
    pytest.param("a\x7fb", id="delete"),
    pytest.param("a\x9bb", id="C1 control"),
    pytest.param("a\u202eb", id="direction override"),
]


# client


def lets_in(home: Path, client_id: str, *secrets: str) -> list[bool]:
    with opened(home) as app:
        return [app.clients.find(client_id, secret) is not None for secret in secrets]


def make_client(here: Here, home: Path, name: str = "shop") -> dict[str, Any]:
    made: dict[str, Any] = result(here(home, "client", "create", "--name", name, "--json"))
    return made


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_client_s_secret_is_shown_once(home: Path, here: Here, form: tuple[str, ...]) -> None:
    done = here(home, "client", "create", "--name", "shop", *form)
    made = result(done) if form else printed(done)
    assert set(made) == ({"id", "name", "created", "disabled", "secret"} if form else {"id", "secret"})
    assert lets_in(home, made["id"], made["secret"]) == [True]
    assert not in_database(home, made["secret"].removeprefix("dws_"))
    for words in (("list",), ("list", "--json"), ("disable", made["id"]), ("enable", made["id"])):
        later = here(home, "client", *words)
        assert later.returncode == 0
        assert made["id"] in later.stdout
        assert made["secret"] not in later.stdout + later.stderr


def test_clients_are_listed_as_a_table_and_as_json(home: Path, here: Here) -> None:
    assert result(here(home, "client", "list", "--json")) == []
    made = [make_client(here, home, name) for name in ("shop", "Ünïcode 🎉", "[red]x[/b]")]
    here(home, "client", "disable", made[1]["id"])
    listed = result(here(home, "client", "list", "--json"))
    assert [(client["id"], client["name"]) for client in listed] == [(client["id"], client["name"]) for client in made]
    assert [client["disabled"] is None for client in listed] == [True, False, True]
    table = here(home, "client", "list")
    assert (table.returncode, table.stderr) == (0, "")
    assert [text for client in made for text in (client["id"], client["name"]) if text not in table.stdout] == []


@pytest.mark.parametrize(
    ("options", "valid", "ends"),
    [
        pytest.param((), [True, True], "the previous secret is valid until 20", id="a day by default"),
        pytest.param(
            ("--overlap-hours", "0.5"), [True, True], "the previous secret is valid until 20", id="half an hour"
        ),
        pytest.param(("--overlap-hours", "0"), [False, True], "the previous secret has ended", id="at once"),
    ],
)
def test_rotate(home: Path, here: Here, options: tuple[str, ...], valid: list[bool], ends: str) -> None:
    client = make_client(here, home)
    done = here(home, "client", "rotate", client["id"], *options)
    made = printed(done)
    assert made["id"] == client["id"]
    assert lets_in(home, client["id"], client["secret"], made["secret"]) == valid
    assert done.stderr.startswith(ends)
    assert not in_database(home, made["secret"].removeprefix("dws_"))

    again = result(here(home, "client", "rotate", client["id"], *options, "--json"))
    assert set(again) == {"id", "secret", "old_secret_expires"}
    assert lets_in(home, client["id"], client["secret"], made["secret"], again["secret"]) == [False, *valid]


def test_disable_and_enable(home: Path, here: Here) -> None:
    client = make_client(here, home)
    for word, let_in in (("disable", False), ("disable", False), ("enable", True), ("enable", True)):
        assert here(home, "client", word, client["id"]).stdout == f"{word}d client {client['id']}\n"
        assert lets_in(home, client["id"], client["secret"]) == [let_in]
        assert result(here(home, "client", word, client["id"], "--json")) == {"id": client["id"]}


@pytest.mark.parametrize("client_id", ["dwc_unknown", "", "shop", "é", "%", "a\nb"])
@pytest.mark.parametrize("word", ["rotate", "disable", "enable"])
def test_unknown_clients(home: Path, here: Here, word: str, client_id: str) -> None:
    make_client(here, home)
    assert_tells(here(home, "client", word, client_id), "there is no such API client")


@pytest.mark.parametrize(
    "name", [pytest.param("", id="empty"), pytest.param(" ", id="blank"), pytest.param("x" * 101, id="long"), *CONTROLS]
)
def test_names_that_no_client_can_have(home: Path, here: Here, name: str) -> None:
    """They are shown in the operator's terminal."""
    assert_tells(here(home, "client", "create", "--name", name), "name")
    assert result(here(home, "client", "list", "--json")) == []


# provider


def provider(here: Here, home: Path, provider_id: str = "login") -> dict[str, Any]:
    shown: dict[str, Any] = result(here(home, "provider", "show", provider_id, "--json"))
    return shown


def stored_secret(home: Path, provider_id: str = "login") -> str:
    with opened(home) as app:
        return app.providers.get(provider_id).secret


def test_a_provider_to_log_in_with_needs_no_secret(home: Path, here: Here) -> None:
    done = here(home, "provider", "add", "login", "--lookup-url", LOOKUP)
    assert (done.returncode, done.stdout, done.stderr) == (0, "added provider login\n", "")
    shown = provider(here, home)
    assert (shown["id"], shown["kind"], shown["source"]) == ("login", "identity", "database")
    assert (shown["lookup_url"], shown["lookup_id_property"], shown["client_secret"]) == (LOOKUP, "id", None)


def test_every_option_is_kept(home: Path, here: Here) -> None:
    options = {
        "--kind": "kai",
        "--lookup-url": LOOKUP,
        "--lookup-id-property": "data.id",
        "--token-url": "https://flo.example/token",
        "--token-method": "get",
        "--token-auth": "client_secret_basic",
        "--client-id": "us",
        "--redirect-uri": "https://app.example/back",
        "--authorize-url": "https://flo.example/authorize",
        "--revocation-url": "https://flo.example/revoke",
        "--timeout": "2.5",
    }
    words = [word for option in options.items() for word in option]
    environment = {"DOORWARD_CLIENT_SECRET": SECRET}
    done = here(
        home, "provider", "add", "flo", *words, "--scope", "a", "--scope", "b", "--json", environment=environment
    )
    assert result(done) == {"id": "flo"}
    shown = provider(here, home, "flo")
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
    assert {name: shown[name] for name in given} == {**given, "timeout": 2.5}
    assert (shown["scopes"], shown["client_secret"]) == (["a", "b"], "set")


class Source(NamedTuple):
    """Where a secret comes from."""

    options: tuple[str, ...] = ()
    stdin: bytes = b""
    environment: Mapping[str, str] = {}


FILE, STDIN = ("--client-secret-file", "{folder}/secret"), ("--client-secret-file", "-")


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        pytest.param(Source(environment={"DOORWARD_CLIENT_SECRET": SECRET}), b"", SECRET, id="environment"),
        pytest.param(Source(FILE), SECRET.encode(), SECRET, id="file"),
        pytest.param(Source(FILE), f"{SECRET}\n".encode(), SECRET, id="file with a newline"),
        pytest.param(Source(FILE), f" {SECRET} \n\n".encode(), f" {SECRET} \n", id="file with more"),
        pytest.param(Source(FILE), f"{SECRET}é\n".encode(), f"{SECRET}é", id="file beyond ASCII"),
        pytest.param(
            Source(FILE, environment={"DOORWARD_CLIENT_SECRET": "other"}), SECRET.encode(), SECRET, id="file first"
        ),
        pytest.param(Source(STDIN, SECRET.encode()), b"", SECRET, id="standard input"),
        pytest.param(Source(STDIN, f"{SECRET}\n".encode()), b"", SECRET, id="standard input with a newline"),
        pytest.param(Source(STDIN, f"{SECRET}\n\n".encode()), b"", f"{SECRET}\n", id="one newline only is dropped"),
    ],
)
def test_sources_of_the_secret(
    home: Path, here: Here, tmp_path: Path, source: Source, content: bytes, expected: str
) -> None:
    (tmp_path / "secret").write_bytes(content)
    options = [option.format(folder=tmp_path) for option in source.options]
    done = here(
        home,
        *("provider", "add", "login", *WITH_CODES, *options),
        stdin=source.stdin,
        environment=source.environment,
    )
    outputs = [done, *(here(home, "provider", *words) for words in (("list",), ("show", "login")))]
    outputs += [here(home, "provider", *words, "--json") for words in (("list",), ("show", "login"))]
    assert [output.returncode for output in outputs] == [0] * 5, done.stderr
    assert [output for output in outputs if SECRET in output.stdout + output.stderr] == []
    assert stored_secret(home) == expected
    assert not in_database(home, SECRET)


def test_the_secret_is_asked_for_at_a_terminal_without_echo(home: Path) -> None:
    words = ("provider", "add", "login", *WITH_CODES, "--json")
    done = at_terminal(home, *words, prompt="Client secret", typed=f"{SECRET}\n", hidden=True)
    assert result(Done(done.args, done.returncode, done.stdout, "")) == {"id": "login"}
    assert SECRET not in done.stderr
    assert stored_secret(home) == SECRET
    assert not in_database(home, SECRET)


def test_an_end_at_the_prompt_adds_nothing(home: Path, here: Here) -> None:
    done = at_terminal(home, "provider", "add", "login", *WITH_CODES, prompt="Client secret", typed="\x03", hidden=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert result(here(home, "provider", "list", "--json")) == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        pytest.param(
            Source(),
            ("the client secret is missing", "DOORWARD_CLIENT_SECRET", "--client-secret-file", "terminal"),
            id="nowhere",
        ),
        pytest.param(
            Source(environment={"DOORWARD_CLIENT_SECRET": ""}), ("the client secret is missing",), id="empty variable"
        ),
        pytest.param(Source(STDIN), ("the client secret is empty",), id="empty standard input"),
        pytest.param(Source(STDIN, b"\n"), ("the client secret is empty",), id="newline alone"),
        pytest.param(Source(STDIN, b"\xff\xfe"), ("standard input is not UTF-8 text",), id="binary input"),
        pytest.param(
            Source(("--client-secret-file", "{folder}/none")),
            ("--client-secret-file", "{folder}/none", "No such file"),
            id="missing file",
        ),
        pytest.param(
            Source(("--client-secret-file", "{folder}")),
            ("--client-secret-file", "{folder}", "Is a directory"),
            id="folder",
        ),
        pytest.param(
            Source(("--client-secret-file", "{folder}/binary")),
            ("--client-secret-file", "{folder}/binary is not UTF-8 text"),
            id="binary file",
        ),
    ],
)
@pytest.mark.parametrize("stdin_errors", ["strict", "surrogateescape"])
def test_without_a_usable_secret(
    home: Path, here: Here, tmp_path: Path, source: Source, parts: tuple[str, ...], stdin_errors: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    done = here(
        home,
        *("provider", "add", "login", *WITH_CODES, *(option.format(folder=tmp_path) for option in source.options)),
        stdin=source.stdin,
        stdin_errors=stdin_errors,
        environment=source.environment,
    )
    assert_tells(done, *(part.format(folder=tmp_path) for part in parts))
    assert result(here(home, "provider", "list", "--json")) == []


def lookup(*more: str) -> tuple[str, ...]:
    return ("--lookup-url", LOOKUP, *more)


@pytest.mark.parametrize(
    ("provider_id", "options", "parts"),
    [
        pytest.param("login", (), ("--lookup-url",), id="no lookup URL"),
        *(
            pytest.param("login", ("--lookup-url", template), ("--lookup-url: it has to", mend), id=f"template {what}")
            for what, template, mend in (
                ("without place", "https://login.example/me", "{access_token} in its path or query"),
                ("with place in the host", "https://{access_token}.example/", "{access_token} in its path or query"),
                ("of another scheme", "ftp://login.example/{access_token}", "http or https URL"),
                ("with a blank", "https://login.example/ {access_token}", "http or https URL"),
                ("relative", "/me?t={access_token}", "http or https URL"),
                ("empty", "", "http or https URL"),
            )
        ),
        pytest.param(
            "login",
            ("--lookup-url", "https://u:p@login.example/{access_token}"),
            ("--lookup-url: it must not hold user information",),
            id="template with user information",
        ),
        *(
            pytest.param(bad, lookup(), ("a provider's id is made of a-z, 0-9",), id=f"id {what}")
            for what, bad in (
                ("empty", ""),
                ("in capitals", "Login"),
                ("with a blank", "log in"),
                ("with a slash", "a/b"),
                ("beyond ASCII", "é"),
                ("with a line feed", "login\n"),
                ("with an underscore first", "_x"),
            )
        ),
        pytest.param("x" * 65, lookup(), ("a provider's id", "64"), id="id too long"),
        pytest.param("login", ("--kind", "kai", *KAI), ("flo, min and eag", "kind identity"), id="kai by another id"),
        pytest.param("flo", ("--kind", "kai"), ("--token-url", "--client-id", "--redirect-uri"), id="kai without"),
        pytest.param("login", lookup("--token-url", "login.example"), ("--token-url: it has to",), id="token URL"),
        pytest.param("login", lookup("--redirect-uri", "app:/x"), ("--redirect-uri: it has to",), id="redirect URI"),
        pytest.param(
            "login", lookup("--lookup-id-property", "a..b"), ("--lookup-id-property: it has",), id="id's path"
        ),
        pytest.param("login", lookup("--timeout", "0"), ("--timeout", "greater than 0"), id="no time"),
        pytest.param("login", lookup("--timeout", "-1"), ("--timeout", "greater than 0"), id="negative time"),
        pytest.param("login", lookup("--timeout", "nan"), ("--timeout", "60"), id="NaN"),
        pytest.param("login", lookup("--timeout", "61"), ("--timeout", "60"), id="more than a minute"),
        pytest.param(
            "login", lookup("--timeout", "10"), ("[refresh] lease (10 s)", "lower the one or raise"), id="lease"
        ),
        pytest.param(
            "login",
            (*WITH_CODES, "--timeout", "8"),
            ("16 s for the exchange and the lookup together", "[gateway] timeout (15 s)", "lower the one or raise"),
            id="two requests",
        ),
        pytest.param("known", lookup(), ("there is a provider known already", "remove it first"), id="duplicate"),
        pytest.param("file", lookup(), ("stands in the settings file", "change it there"), id="in the settings file"),
        pytest.param("login", lookup("--client-id", ""), ("--client-id",), id="empty client id"),
        pytest.param("login", lookup("--scope", ""), ("--scope",), id="empty scope"),
        pytest.param(
            "login",
            lookup("--client-secret-file", "-"),
            ("--client-secret-file", "--token-url", "--client-id"),
            id="secret that nothing uses",
        ),
    ],
)
def test_refused_providers(
    home: Path, here: Here, provider_id: str, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    """Each refusal names the option, not the file's key, and shows no secret."""
    (home / "doorward.toml").write_text(f'[providers.file]\nkind = "identity"\nlookup_url = "{LOOKUP}"\n')
    assert here(home, "provider", "add", "known", *lookup()).returncode == 0
    environment = {"DOORWARD_CLIENT_SECRET": SECRET}
    done = here(home, "provider", "add", provider_id, *options, stdin=b"x\n", environment=environment)
    assert_tells(done, *parts)
    assert SECRET not in done.stderr
    assert [shown["id"] for shown in result(here(home, "provider", "list", "--json"))] == ["file", "known"]


def test_two_problems_are_told_in_one_line(home: Path, here: Here) -> None:
    done = here(home, "provider", "add", "login", "--lookup-url", "x", "--redirect-uri", "y")
    assert_tells(done, "--lookup-url: ", "--redirect-uri: ")


@pytest.mark.parametrize(
    ("provider_id", "options", "part"),
    [
        pytest.param("known", WITH_CODES, "there is a provider known already", id="duplicate"),
        pytest.param("login", (*WITH_CODES, "--redirect-uri", "x"), "--redirect-uri: it has to", id="URL"),
        pytest.param("Login", WITH_CODES, "a provider's id", id="id"),
        pytest.param("login", ("--kind", "kai", *KAI), "flo, min and eag", id="kai by another id"),
    ],
)
def test_the_secret_is_wanted_only_when_all_else_is_right(
    home: Path, here: Here, provider_id: str, options: tuple[str, ...], part: str
) -> None:
    assert here(home, "provider", "add", "known", *lookup()).returncode == 0
    assert_tells(here(home, "provider", "add", provider_id, *options), part)


def test_providers_of_the_file_are_shown_but_not_removed(home: Path, here: Here) -> None:
    (home / "doorward.toml").write_text(
        f'[providers.file]\nkind = "identity"\nlookup_url = "{LOOKUP}"\nclient_secret = "{SECRET}"\n'
    )
    here(home, "provider", "add", "added", *lookup())
    listed = result(here(home, "provider", "list", "--json"))
    assert [(shown["id"], shown["source"]) for shown in listed] == [("added", "database"), ("file", "settings file")]
    assert provider(here, home, "file") == listed[1]
    table, text = here(home, "provider", "list"), here(home, "provider", "show", "file")
    assert "settings file" in table.stdout
    assert "settings file" in text.stdout
    assert SECRET not in json.dumps(listed) + table.stdout + text.stdout
    assert_tells(here(home, "provider", "remove", "file"), "the settings file", "remove its section there")


@pytest.mark.parametrize("provider_id", ["nothing", "", "LOGIN", "é", "a\nb"])
@pytest.mark.parametrize("word", ["show", "remove"])
def test_unknown_providers(home: Path, here: Here, word: str, provider_id: str) -> None:
    here(home, "provider", "add", "login", *lookup())
    assert_tells(here(home, "provider", word, provider_id), "there is no such provider")


def test_identities_go_with_a_provider_on_demand_only(home: Path, here: Here) -> None:
    here(home, "provider", "add", "login", *lookup())
    here(home, "provider", "add", "other", *lookup())
    make_user(here, home)
    with opened(home) as app, app.database.writing():
        for provider_id in ("login", "other"):
            OAuthIdentity.create(user=1, provider=provider_id, subject="7", created_at=app.clock.now())
    assert_tells(here(home, "provider", "remove", "login"), "the provider login", "--unlink")
    assert provider(here, home)["id"] == "login"
    assert result(here(home, "provider", "remove", "login", "--unlink", "--json")) == {"id": "login"}
    assert_tells(here(home, "provider", "show", "login"), "no such provider")
    identities = result(here(home, "user", "show", "ada", "--json"))["identities"]
    assert [identity["provider"] for identity in identities] == ["other"]


# user


class Holdings(NamedTuple):
    """What must not be told of a user: values, their fingerprints and sealed forms."""

    values: list[str]
    blobs: list[bytes]

    def told_in(self, text: str) -> list[object]:
        forms = {blob: (blob.hex(), base64.b64encode(blob).decode(), str(blob)[2:-1]) for blob in self.blobs}
        return [value for value in self.values if value in text] + [
            blob for blob, texts in forms.items() if any(form in text for form in texts)
        ]


def make_user(here: Here, home: Path, name: str = "Ada", email: str = "ada@example.org") -> dict[str, Any]:
    made: dict[str, Any] = result(here(home, "user", "create", "--name", name, "--email", email, "--json"))
    return made


def furnish(home: Path, user_id: int) -> Holdings:
    """Give a user a connection, an identity and a session."""
    with opened(home) as app:
        app.record_key()
        _, cookie = app.sessions.create(app.users.get(str(user_id)))
        tokens, now = (
            {"access_token": f"access-of-{user_id}", "refresh_token": f"refresh-of-{user_id}"},
            app.clock.now(),
        )
        with app.database.writing():
            OAuthIdentity.create(user=user_id, provider="login", subject=f"s{user_id}", created_at=now)
            connection = Connection.create(
                user=user_id,
                provider="flo",
                access_token=b"",
                obtained_at=now,
                needs_reauth=False,
                lease_epoch=0,
                created_at=now,
            )
            sealed = {
                name: app.keys.seal(token, Place("connections", connection.id, name)) for name, token in tokens.items()
            }
            Connection.update(**sealed).where(Connection.id == connection.id).execute()
        values = [cookie, *tokens.values()]
        return Holdings(values, [*map(fingerprint, values), *sealed.values()])


def count(home: Path, table: str, user_id: int) -> int:
    with opened(home) as app:
        row = app.database.fetch_one(f"SELECT count(*) FROM {table} WHERE user_id = ?", (user_id,))
        assert row is not None
        number: int = row[0]
        return number


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param(" ", id="blank"),
        pytest.param("x" * 101, id="101 characters"),
        pytest.param("🎉🎊", id="emoji only"),
        pytest.param("...", id="punctuation only"),
        pytest.param("42", id="digits only"),
        pytest.param("Me", id="me"),
        *CONTROLS,
    ],
)
def test_names_that_no_user_can_have(home: Path, here: Here, name: str) -> None:
    assert_tells(here(home, "user", "create", "--name", name), "the name has to")
    assert_tells(here(home, "user", "show", "1"), "no such user")


@pytest.mark.parametrize("name", ["x" * 100, "Zoë 🎉", "李", "[red]Ada[/b]"])
def test_unusual_names(home: Path, here: Here, name: str) -> None:
    made = make_user(here, home, name)
    assert made["name"] == name
    shown = here(home, "user", "show", made["slug"])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert name in shown.stdout


@pytest.mark.parametrize(
    ("email", "sentence"),
    [
        pytest.param("ada@example.org", "another user has this e-mail address", id="taken"),
        pytest.param("ADA@Example.ORG", "another user has this e-mail address", id="taken in another case"),
        pytest.param("ada", "the e-mail address is not valid", id="no address"),
        pytest.param("a da@example.org", "the e-mail address is not valid", id="blank"),
        pytest.param("ada\x1b@example.org", "the e-mail address is not valid", id="escape"),
        pytest.param("ada\x9b@example.org", "the e-mail address is not valid", id="C1 control"),
        pytest.param("a" * 65 + "@example.org", "the e-mail address is not valid", id="long"),
    ],
)
def test_addresses_that_no_further_user_can_have(home: Path, here: Here, email: str, sentence: str) -> None:
    make_user(here, home)
    assert_tells(here(home, "user", "create", "--name", "Bob", "--email", email), sentence)
    assert_tells(here(home, "user", "show", "bob"), "no such user")


@pytest.mark.parametrize("handle", ["nobody", "2", "", "ADA", "é", "01", "9" * 30, "a\nb"])
@pytest.mark.parametrize("words", [("show",), ("export",), ("delete", "--yes")], ids=" ".join)
def test_unknown_users(home: Path, here: Here, words: tuple[str, ...], handle: str) -> None:
    make_user(here, home)
    assert_tells(here(home, "user", *words, handle), "there is no such user")


def test_an_unknown_user_s_export_makes_no_file(home: Path, here: Here, tmp_path: Path) -> None:
    assert_tells(here(home, "user", "export", "nobody", "--output", str(tmp_path / "x.json")), "no such user")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("handle", ["ada", "1"])
def test_all_but_the_secrets_is_told(home: Path, here: Here, tmp_path: Path, handle: str) -> None:
    make_user(here, home)
    holdings, file = furnish(home, 1), tmp_path / "ada.json"
    exported = here(home, "user", "export", handle)
    written = here(home, "user", "export", handle, "--output", str(file))
    shown = here(home, "user", "show", handle)
    as_json = here(home, "user", "show", handle, "--json")
    for done in (exported, written, shown, as_json):
        assert (done.returncode, done.stderr) == (0, "")
        assert holdings.told_in(done.stdout) == []
    assert holdings.told_in(file.read_text()) == []
    known = result(as_json)
    assert json.loads(exported.stdout) == json.loads(file.read_text()) == known
    assert (known["id"], known["slug"], known["email"]) == (1, "ada", "ada@example.org")
    assert [(one["provider"], one["id"]) for one in known["identities"]] == [("login", "s1")]
    assert [one["provider"] for one in known["connections"]] == ["flo"]
    assert [one["id"] for one in known["sessions"]] == [1]
    assert [part for part in ("ada@example.org", "login", "s1", "flo") if part not in shown.stdout] == []


def test_an_export_is_its_owner_s_alone_and_replaces_nothing(home: Path, here: Here, tmp_path: Path) -> None:
    make_user(here, home)
    file = tmp_path / "ada.json"
    first = here(home, "user", "export", "ada", "--output", str(file))
    assert (first.returncode, first.stderr) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("mine")
    assert_tells(here(home, "user", "export", "ada", "--output", str(file)), "--output", str(file), "exists")
    assert file.read_text() == "mine"


def test_an_export_into_no_folder(home: Path, here: Here, tmp_path: Path) -> None:
    make_user(here, home)
    path = str(tmp_path / "no" / "ada.json")
    assert_tells(here(home, "user", "export", "ada", "--output", path), "--output", path, "No such file")


def test_a_dash_is_standard_output(home: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_user(here, home)
    monkeypatch.chdir(tmp_path)
    done = here(home, "user", "export", "ada", "--output", "-")
    assert not (tmp_path / "-").exists()
    assert json.loads(done.stdout)["slug"] == "ada"


def test_an_export_on_a_full_disk_leaves_no_half_file(home: Path, here: Here, tmp_path: Path) -> None:
    make_user(here, home)
    with opened(home) as app, app.database.writing():
        User.update(stats_concepts={"x": "y" * 200_000}).execute()
    path = tmp_path / "ada.json"
    assert_tells(doorward(home, "user", "export", "ada", "--output", str(path), limit=128), str(path), "too large")
    assert not path.exists()


def test_what_others_have_set_does_not_reach_the_terminal(home: Path, here: Here) -> None:
    """Clients set roles, and providers ids: neither may steer the operator's terminal."""
    make_user(here, home)
    with opened(home) as app, app.database.writing():
        User.update(role="a\x1b]0;x\x07\x1b[2Jb\x9b").execute()
        OAuthIdentity.create(user=1, provider="login", subject="7\x1b[2J", created_at=app.clock.now())
    shown = here(home, "user", "show", "ada")
    assert shown.returncode == 0
    assert [character for character in shown.stdout if not (character.isprintable() or character == "\n")] == []
    assert result(here(home, "user", "show", "ada", "--json"))["identities"][0]["id"] == "7\x1b[2J"


PROMPT = "Delete user 1 (ada)"


@pytest.mark.parametrize(
    ("typed", "code"), [("n\n", 1), ("\n", 1), ("\x04", 1), ("\x03", 130)], ids=["n", "return", "end", "interrupt"]
)
def test_delete_asks_first(home: Path, here: Here, typed: str, code: int) -> None:
    make_user(here, home)
    furnish(home, 1)
    done = at_terminal(home, "user", "delete", "ada", prompt=PROMPT, typed=typed)
    assert (done.returncode, done.stdout.strip()) == (code, "")
    assert "Traceback" not in done.stderr
    assert [count(home, table, 1) for table in ("connections", "sessions", "oauth_identities")] == [1, 1, 1]


def test_delete_with_nobody_to_ask(home: Path, here: Here) -> None:
    make_user(here, home)
    done = here(home, "user", "delete", "ada")
    assert_tells(done, "--yes")
    assert result(here(home, "user", "show", "ada", "--json"))["id"] == 1


def test_delete_prints_its_value_alone(home: Path, here: Here) -> None:
    """The question and its answer are the terminal's."""
    make_user(here, home)
    done = at_terminal(home, "user", "delete", "ada", "--json", prompt=PROMPT, typed="y\n")
    assert result(Done(done.args, done.returncode, done.stdout, "")) == {"id": 1}
    assert_tells(here(home, "user", "show", "ada"), "no such user")


@pytest.mark.parametrize("words", [("--yes",), ("-y",), ("--yes", "--json")], ids=" ".join)
def test_delete_takes_all_that_hangs_on_a_user(home: Path, here: Here, words: tuple[str, ...]) -> None:
    make_user(here, home)
    make_user(here, home, "Bob", "bob@example.org")
    holdings = furnish(home, 1)
    furnish(home, 2)
    revocation = ("--revocation-url", "https://flo.example/revoke", "--token-auth", "none")
    assert here(home, "provider", "add", "flo", "--kind", "kai", *KAI, *revocation).returncode == 0
    done = here(home, "user", "delete", "ada", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ('{"id": 1}\n' if "--json" in words else "deleted user 1\n")
    for table in ("connections", "sessions", "oauth_identities"):
        assert (count(home, table, 1), count(home, table, 2)) == (0, 1), table
    with opened(home) as app:
        jobs = app.database.fetch_all(Job.select())
        assert [job.kind for job in jobs] == [REVOCATION] * len(jobs)
        told = json.dumps([app.jobs.payload(job) for job in jobs])
    assert "access-of-1" in told or "refresh-of-1" in told
    assert "of-2" not in told
    assert [value for value in holdings.values if in_database(home, value)] == []
    assert_tells(here(home, "user", "delete", "ada", "--yes"), "there is no such user")
