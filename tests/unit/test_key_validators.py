"""Judging keys: what services are asked, what is made of their answers, and which services are asked at all."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from doorward_server import settings as settings_module
from doorward_server.errors import Busy, CallError, KeyRejected, OperatorError, ServiceUnavailable
from doorward_server.key_validators import KeyFacts, KeyValidators
from doorward_server.validators import BUILT_IN, Validator
from tests.processes import free_port
from tests.sandbox.client import SandboxProvider
from tests.unit.peers import Peer, Serve, answering, make_outbound, read_request

KEY = "564F181A-F0FC-114A-A55D-3C1DCD45F3767AF3848F-AB29-4EBF-9594-F91E6A75E015"
# As https://wiki.guildwars2.com/wiki/API:2/tokeninfo and /account have them.
TOKEN_INFO = {"id": KEY[:36], "name": "for Doorward", "permissions": ["account", "wallet", "builds"]}
ACCOUNT = {"id": "C19467C6-F5AD-E211-8756-78E7D1936222", "name": "Ada.1234", "world": 1004, "guilds": []}
Answers = Mapping[str, tuple[str, bytes]]


def service(answers: Answers, seen: list[bytes] | None = None) -> Serve:
    """Answers by the path's first segment."""

    def serve(connection: Any, stopping: threading.Event) -> None:
        request = read_request(connection)
        if seen is not None:
            seen.append(request)
        segment = request.split(b" ")[1].decode().lstrip("/").partition("?")[0].partition("/")[0]
        status, body = answers[segment]
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nLocation: /tokeninfo\r\n\r\n"
        connection.sendall(head.encode() + body)

    return serve


def answers(
    tokeninfo: object = TOKEN_INFO, account: object = ACCOUNT, statuses: Mapping[str, str] | None = None
) -> Answers:
    """A good service's answers, but for these; bytes are a body as it is."""
    bodies = {"tokeninfo": tokeninfo, "account": account}
    return {
        name: ((statuses or {}).get(name, "200 OK"), body if isinstance(body, bytes) else json.dumps(body).encode())
        for name, body in bodies.items()
    }


def described(url: str, **more: Any) -> Validator:
    urls = {"tokeninfo_url": f"{url}/tokeninfo", "account_url": f"{url}/account"}
    return Validator.model_validate({"service": "game", **urls, **more})


def check(given: Answers, value: str = KEY, seen: list[bytes] | None = None, **more: Any) -> KeyFacts | None:
    """Ask a service that answers so."""
    with Peer(service(given, seen)) as peer, make_outbound(peer.address) as outbound:
        return KeyValidators(outbound, {"game": described(peer.url, **more)}).check("game", value)


# What is made of the answers


def test_a_good_key() -> None:
    assert check(answers()) == KeyFacts("for Doorward", "Ada.1234", ["account", "wallet", "builds"])


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        pytest.param(answers(tokeninfo={}), KeyFacts(None, "Ada.1234", []), id="nothing of the key"),
        pytest.param(answers(tokeninfo={"name": None}), KeyFacts(None, "Ada.1234", []), id="null"),
        pytest.param(answers(tokeninfo={"name": "  "}), KeyFacts(None, "Ada.1234", []), id="blank name"),
        pytest.param(answers(tokeninfo={"name": ["x"]}), KeyFacts(None, "Ada.1234", []), id="name: array"),
        pytest.param(answers(tokeninfo={"permissions": "account"}), KeyFacts(None, "Ada.1234", []), id="no array"),
        pytest.param(
            answers(tokeninfo={"permissions": ["a", 7, None, "", {"b": "c"}, ["d"], True, "e"]}),
            KeyFacts(None, "Ada.1234", ["a", "7", "e"]),
            id="permissions of all kinds",
        ),
        pytest.param(
            answers(tokeninfo={"permissions": [f"p{number}" for number in range(1000)]}),
            KeyFacts(None, "Ada.1234", [f"p{number}" for number in range(100)]),
            id="1,000 permissions",
        ),
        pytest.param(
            answers(tokeninfo={"name": "\x1b[31m\u202ered\n\x00", "permissions": ["a\tb"]}),
            KeyFacts("[31mred", "Ada.1234", ["ab"]),
            id="not printable",
        ),
        pytest.param(answers(tokeninfo={"name": "x" * 201}), KeyFacts("x" * 200, "Ada.1234", []), id="long name"),
        pytest.param(answers({}, {"name": 1234}), KeyFacts(None, "1234", []), id="account: number"),
        pytest.param(answers({}, {"name": "Ünï 😀"}), KeyFacts(None, "Ünï 😀", []), id="account beyond ASCII"),
        pytest.param(answers({}, {"name": "a\ud800b"}), KeyFacts(None, "ab", []), id="account: lone surrogate"),
        pytest.param(
            answers({}, statuses={"tokeninfo": "206 Partial Content", "account": "201 Created"}),
            KeyFacts(None, "Ada.1234", []),
            id="other successes",
        ),
    ],
)
def test_facts(given: Answers, facts: KeyFacts) -> None:
    assert check(given) == facts


def test_where_the_facts_stand() -> None:
    facts = check(
        answers({"data": {"label": "l", "may": ["read"]}, "name": "x"}, {"user": {"login": {"id": 7}}, "name": "x"}),
        name_property="data.label",
        permissions_property="data.may",
        account_property="user.login.id",
    )
    assert facts == KeyFacts("l", "7", ["read"])


@pytest.mark.parametrize("endpoint", ["tokeninfo", "account"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="no body"),
        pytest.param(b"<html></html>", id="HTML"),
        pytest.param(b'{"name":"x"', id="cut"),
        pytest.param(b'{"name":"\xff"}', id="not UTF-8"),
        pytest.param(b'["name"]', id="array"),
        pytest.param(b'"name"', id="string"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b'{"name":' + b"9" * 5000 + b"}", id="5,000 digits"),
    ],
)
def test_what_is_no_object_is_no_judgement_in_favour(endpoint: str, body: bytes) -> None:
    with pytest.raises(KeyRejected):
        check({**answers(), endpoint: ("200 OK", body)})


@pytest.mark.parametrize("account", [{}, {"name": None}, {"name": ""}, {"name": " \n"}, {"name": True}], ids=repr)
def test_a_key_of_no_account_is_refused(account: object) -> None:
    with pytest.raises(KeyRejected):
        check(answers(account=account))


@pytest.mark.parametrize("endpoint", ["tokeninfo", "account"])
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (300, ServiceUnavailable),
        (302, ServiceUnavailable),
        (304, ServiceUnavailable),
        (307, ServiceUnavailable),
        (400, KeyRejected),
        (401, KeyRejected),
        (403, KeyRejected),
        (404, KeyRejected),
        (418, KeyRejected),
        (429, ServiceUnavailable),
        (499, KeyRejected),
        (500, ServiceUnavailable),
        (502, ServiceUnavailable),
        (503, ServiceUnavailable),
        (599, ServiceUnavailable),
    ],
)
def test_statuses(endpoint: str, status: int, failure: type[CallError]) -> None:
    seen: list[bytes] = []
    with pytest.raises(failure) as raised:
        check(answers(statuses={endpoint: f"{status} Whatever"}), seen=seen)
    assert raised.value.metadata == {}
    assert KEY not in f"{raised.value} {raised.value.cause}"
    assert len(seen) == (1 if endpoint == "tokeninfo" else 2)


@pytest.mark.parametrize(
    "kind",
    ["hang", "trickle_headers", "trickle_body", "huge", "gzip_bomb", "redirect", "cut", "cut_body", "not_http"],
)
def test_misbehaviour(provider: SandboxProvider, kind: str) -> None:
    provider.fault("lookup", kind)
    timeout = 0.4 if kind in ("hang", "trickle_headers", "trickle_body") else 10.0
    url = f"{provider.url}/lookup?access_token={{key}}"
    validator = described("", tokeninfo_url=url, account_url=url, timeout=timeout)
    with make_outbound(provider.address) as outbound, pytest.raises(ServiceUnavailable) as raised:
        KeyValidators(outbound, {"game": validator}).check("game", KEY)
    assert len(provider.requests("lookup")) == 1
    assert provider.requests("elsewhere") == []
    assert KEY not in f"{raised.value} {raised.value.cause} {raised.value.__cause__}"


@pytest.mark.parametrize("allowed", [True, False], ids=["nobody there", "not allowed"])
def test_no_connection(allowed: bool) -> None:
    address = f"127.0.0.1:{free_port()}"
    with make_outbound(*([address] if allowed else [])) as outbound, pytest.raises(ServiceUnavailable):
        KeyValidators(outbound, {"game": described(f"http://{address}")}).check("game", KEY)


# What is asked


VALUES = {
    "usual": KEY,
    "reserved": "a&b=c#d/e?f;g,h+i@j:k",
    "percent": "100%2F%",
    "quotes": "'\"`\\",
    "placeholder": "{key}",
    "dots and slashes": "../../admin",
    "dot": ".",
    "two dots": "..",
    "long": "x" * 4096,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("template", ["/account", "/account/{key}/x?y=1", "/account?y=1&k={key}"])
def test_the_key_arrives_as_it_is(template: str, value: str) -> None:
    """In its place and nowhere else."""
    seen: list[bytes] = []
    with Peer(service(answers(), seen)) as peer, make_outbound(peer.address) as outbound:
        validator = described(peer.url, account_url=peer.url + template)
        assert KeyValidators(outbound, {"game": validator}).check("game", value) is not None
    asked = []
    for request in seen:
        first, *lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        method, target, _ = first.split(" ")
        parts = urlsplit(target)
        headers = [line.partition(": ")[2] for line in lines if line.lower().startswith("authorization:")]
        asked.append((method, [unquote(part) for part in parts.path.split("/")], parse_qsl(parts.query), headers))
    bearer = [f"Bearer {value}"]
    expected = {
        "/account": ("GET", ["", "account"], [], bearer),
        "/account/{key}/x?y=1": ("GET", ["", "account", value, "x"], [("y", "1")], []),
        "/account?y=1&k={key}": ("GET", ["", "account"], [("y", "1"), ("k", value)], []),
    }
    assert asked == [("GET", ["", "tokeninfo"], [], bearer), expected[template]]


@pytest.mark.parametrize("value", ["ключ", "é", "😀" * 4096], ids=["Cyrillic", "Latin-1", "long"])
def test_a_key_that_no_header_holds(value: str) -> None:
    seen: list[bytes] = []
    with pytest.raises(KeyRejected):
        check(answers(), value, seen)
    assert seen == []
    with Peer(service(answers())) as peer, make_outbound(peer.address) as outbound:
        urls = {"tokeninfo_url": f"{peer.url}/tokeninfo/{{key}}", "account_url": f"{peer.url}/account?k={{key}}"}
        assert KeyValidators(outbound, {"game": described(peer.url, **urls)}).check("game", value) is not None


# Which services are asked


def test_a_service_without_a_validator() -> None:
    with Peer(answering()) as peer, make_outbound(peer.address) as outbound:
        validators = KeyValidators(outbound, {"game": described(peer.url)})
        assert [validators.check(name, KEY) for name in ("other", "GAME", "")] == [None, None, None]
        assert peer.connections == 0


def test_guild_wars_2_is_built_in() -> None:
    gw2 = BUILT_IN["gw2"]
    assert gw2.tokeninfo_url == "https://api.guildwars2.com/v2/tokeninfo"
    assert gw2.account_url == "https://api.guildwars2.com/v2/account"
    assert (gw2.name_property, gw2.account_property, gw2.permissions_property) == ("name", "name", "permissions")
    # All slots are taken, so that nobody is really asked.
    with make_outbound(per_provider=1) as outbound, outbound.bulkhead.requesting("key:gw2"), pytest.raises(Busy):
        KeyValidators(outbound, {}).check("gw2", KEY)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DOORWARD_")]:
        monkeypatch.delenv(name)


def load(home: Path, text: str) -> Mapping[str, Validator]:
    (home / "doorward.toml").write_text(text)
    return settings_module.load(home).validators


def test_a_section_replaces_the_built_in(tmp_path: Path) -> None:
    with Peer(service(answers())) as peer, make_outbound(peer.address) as outbound:
        text = f"[validators.gw2]\ntokeninfo_url = '{peer.url}/tokeninfo'\naccount_url = '{peer.url}/account'\n"
        facts = KeyValidators(outbound, load(tmp_path, text)).check("gw2", KEY)
    assert facts == KeyFacts("for Doorward", "Ada.1234", ["account", "wallet", "builds"])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[validators.gw2]\nenabled = false\n", id="alone"),
        pytest.param("[validators.gw2]\nenabled = false\ntokeninfo_url = 'https://game.example/'\n", id="with a URL"),
    ],
)
def test_the_built_in_is_switched_off(tmp_path: Path, text: str) -> None:
    with make_outbound() as outbound:
        assert KeyValidators(outbound, load(tmp_path, text)).check("gw2", KEY) is None


URLS = "tokeninfo_url = 'https://game.example/t/{key}'\naccount_url = 'https://game.example/a'\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="none"),
        pytest.param(f"[validators.game]\n{URLS}", id="least of all"),
        pytest.param(f"[validators.a-b_1]\n{URLS}", id="name of all kinds"),
        pytest.param(f"[validators.{'x' * 40}]\n{URLS}", id="40 characters"),
        pytest.param(f"[validators.game]\n{URLS}name_property = 'a.b'\ntimeout = 60\n", id="more"),
    ],
)
def test_settings(tmp_path: Path, text: str) -> None:
    assert all(validator.enabled and validator.service == name for name, validator in load(tmp_path, text).items())


def one_url(url: str) -> str:
    return f"[validators.game]\ntokeninfo_url = '{url}'\naccount_url = 'https://game.example/a'\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("[validators.game]\n", ("[validators.game]", "tokeninfo_url, account_url", "enabled"), id="empty"),
        pytest.param(
            "[validators.game]\ntokeninfo_url = 'https://game.example'\n",
            ("[validators.game]", "needs account_url"),
            id="half",
        ),
        pytest.param(f"[validators.Game]\n{URLS}", ("[validators.Game]", "rename it"), id="capitals"),
        pytest.param(f"[validators.{'x' * 41}]\n{URLS}", ("at most 40", "rename it"), id="41 characters"),
        pytest.param(f"[validators._x]\n{URLS}", ("[validators._x]", "rename it"), id="begins with _"),
        pytest.param(
            f"[validators.game]\n{URLS}acount_url = 'x'\n",
            ("[validators.game] acount_url", "did you mean account_url?"),
            id="unknown key",
        ),
        pytest.param("validators = 5\n", ("validators", "section"), id="no section"),
        pytest.param("[validators]\ngame = 5\n", ("[validators.game]", "section"), id="no section of its own"),
        pytest.param(one_url("game.example"), ("[validators.game] tokeninfo_url", "absolute"), id="no scheme"),
        pytest.param(one_url("https://{key}.example/"), ("tokeninfo_url", "absolute"), id="key in the host"),
        pytest.param(one_url("https://{key}/"), ("tokeninfo_url", "absolute"), id="key as the host"),
        pytest.param(one_url("https://game.example:{key}/"), ("tokeninfo_url", "absolute"), id="key as the port"),
        pytest.param(one_url("https://{key}@game.example/"), ("tokeninfo_url", "user"), id="key as the user"),
        pytest.param(one_url("https://game.example/#{key}"), ("tokeninfo_url", "fragment"), id="key in the fragment"),
        pytest.param(
            one_url("https://game.example/{api_key}"), ("tokeninfo_url", "placeholder is {key}"), id="no placeholder"
        ),
        pytest.param(one_url("https://game.example/{KEY}"), ("tokeninfo_url", "placeholder"), id="in capitals"),
        pytest.param(f"[validators.game]\n{URLS}name_property = 'a.'\n", ("name_property", "dot"), id="dot at the end"),
        pytest.param(f"[validators.game]\n{URLS}timeout = 0\n", ("[validators.game] timeout", "than 0"), id="timeout"),
        pytest.param(f"[validators.game]\n{URLS}timeout = 61\n", ("[validators.game] timeout", "60"), id="long"),
        pytest.param(f"[validators.game]\n{URLS}enabled = 'maybe'\n", ("[validators.game] enabled",), id="enabled"),
    ],
)
def test_a_wrong_setting_is_named_with_the_mend(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(OperatorError) as failure:
        load(tmp_path, text)
    sentence = str(failure.value)
    assert "\n" not in sentence
    assert [part for part in parts if part not in sentence] == [], sentence


@pytest.mark.parametrize("name", ["DOORWARD_VALIDATORS", "DOORWARD_VALIDATORS_GW2_ENABLED"])
def test_validators_do_not_stand_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "false")
    with pytest.raises(OperatorError, match=f"{name}: validators stand in the settings file only"):
        load(tmp_path, "")
