"""Lookups: whose account a token is for, as the stand-in provider and rougher peers answer."""

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from doorward_server.errors import (
    Busy,
    CallError,
    CodeRejected,
    LookupRejected,
    LookupWithoutId,
    ProviderMalformed,
    ProviderNotConfigured,
    ProviderTimeout,
    ProviderUnavailable,
)
from doorward_server.oauth import NoTokenGranted, OAuth
from doorward_server.outbound import NotConnectable, Outbound
from doorward_server.providers import Provider
from tests.processes import free_port
from tests.sandbox.client import SandboxProvider
from tests.unit.peers import Peer, answering, make_outbound

SECRET = "sandbox-secret"


@pytest.fixture(scope="module")
def outbound(shared_provider: SandboxProvider) -> Iterator[Outbound]:
    with make_outbound(shared_provider.address) as outbound:
        yield outbound


LookUp = Callable[..., str]


@pytest.fixture
def look_up(outbound: Outbound, provider: SandboxProvider) -> LookUp:
    """Ask the stand-in provider, which answers with a body."""

    def look_up(body: str, path: str = "id", status: int = 200, **fault: Any) -> str:
        fault = {"kind": "status", "body": body, "status": status, **fault}
        provider.fault("lookup", **fault)
        return OAuth(outbound).look_up(described(provider.url, lookup_id_property=path), "access-token")

    return look_up


def described(url: str, **more: Any) -> Provider:
    """A provider to log in with at a URL."""
    return Provider.model_validate(
        {
            "id": "sandbox",
            "kind": "identity",
            "lookup_url": f"{url}/lookup?access_token={{access_token}}",
            "timeout": 5,
            **more,
        }
    )


# What an id is


@pytest.mark.parametrize(
    ("body", "account_id"),
    [
        # Strings
        pytest.param('{"id":"abcd"}', "abcd", id="string"),
        pytest.param('{"id":"7"}', "7", id="digits"),
        pytest.param('{"id":"007"}', "007", id="leading zeros"),
        pytest.param('{"id":"7.0"}', "7.0", id="a string is no number"),
        pytest.param('{"id":"0"}', "0", id="zero as a string"),
        pytest.param('{"id":"null"}', "null", id="null as a string"),
        pytest.param('{"id":"a b"}', "a b", id="blank within"),
        pytest.param('{"id":"Ä😀"}', "Ä😀", id="beyond ASCII"),
        pytest.param('{"id":"\\u00c4\\ud83d\\ude00"}', "Ä😀", id="escaped"),
        pytest.param('{"id":"a/b?c#d&e=%2F\'\\""}', "a/b?c#d&e=%2F'\"", id="punctuation"),
        pytest.param(json.dumps({"id": "x" * 255}), "x" * 255, id="255 characters"),
        pytest.param(json.dumps({"id": "é" * 255}, ensure_ascii=False), "é" * 255, id="255 characters, more bytes"),
        # Numbers, of which JSON has one kind
        pytest.param('{"id":7}', "7", id="integer"),
        pytest.param('{"id":-7}', "-7", id="negative"),
        pytest.param('{"id":7.0}', "7", id="7.0"),
        pytest.param('{"id":7e0}', "7", id="7e0"),
        pytest.param('{"id":0.7E+1}', "7", id="0.7E+1"),
        pytest.param('{"id":700e-2}', "7", id="700e-2"),
        pytest.param('{"id":7.50}', "7.5", id="fraction"),
        pytest.param('{"id":7e2}', "700", id="7e2"),
        pytest.param('{"id":100}', "100", id="zeros at the end"),
        pytest.param('{"id":100.00}', "100", id="zeros on both sides of the dot"),
        pytest.param('{"id":9007199254740993}', "9007199254740993", id="beyond what a double holds"),
        pytest.param('{"id":9007199254740993.0}', "9007199254740993", id="the same with a dot"),
        pytest.param('{"id":18446744073709551617}', "18446744073709551617", id="beyond 64 bits"),
        pytest.param(f'{{"id":{"1234567890" * 4}}}', "1234567890" * 4, id="40 digits"),
        pytest.param(f'{{"id":{"9" * 255}}}', "9" * 255, id="255 digits"),
        pytest.param('{"id":1e254}', "1" + "0" * 254, id="1e254"),
        pytest.param('{"id":0.000001}', "0.000001", id="small"),
        pytest.param(f'{{"id":7.{"0" * 5000}}}', "7", id="5,000 zeros after the dot"),
        # What stands around it
        pytest.param(' \n{"id"\t: "abcd"}\r\n', "abcd", id="blanks"),
        pytest.param('{"id":"first","id":"last"}', "last", id="twice"),
        pytest.param('{"x":null,"id":"abcd","y":[{"id":"z"}]}', "abcd", id="among others"),
        pytest.param('{"x":1e400,"id":"abcd"}', "abcd", id="beside a huge number"),
        pytest.param('{"x":"\\ud800","id":"abcd"}', "abcd", id="beside a lone surrogate"),
        pytest.param(json.dumps({"x": "y" * 1_000_000, "id": "abcd"}), "abcd", id="almost 1 MiB"),
    ],
)
def test_an_id(look_up: LookUp, body: str, account_id: str) -> None:
    assert look_up(body) == account_id


@pytest.mark.parametrize(
    "body",
    [
        # No id
        pytest.param("{}", id="missing"),
        pytest.param('{"ID":"abcd","_id":"abcd"}', id="another name"),
        pytest.param('{"id":null}', id="null"),
        pytest.param('{"id":""}', id="empty string"),
        pytest.param('{"id":0}', id="0"),
        pytest.param('{"id":-0}', id="-0"),
        pytest.param('{"id":0.0}', id="0.0"),
        pytest.param('{"id":-0.0}', id="-0.0"),
        pytest.param('{"id":0e5}', id="0e5"),
        pytest.param('{"id":true}', id="true"),
        pytest.param('{"id":false}', id="false"),
        pytest.param('{"id":[]}', id="empty array"),
        pytest.param('{"id":["abcd"]}', id="array"),
        pytest.param('{"id":{}}', id="empty object"),
        pytest.param('{"id":{"id":"abcd"}}', id="object"),
        # Ids that nothing could keep
        pytest.param(json.dumps({"id": "x" * 256}), id="256 characters"),
        pytest.param(f'{{"id":{"9" * 256}}}', id="256 digits"),
        pytest.param(f'{{"id":-{"9" * 255}}}', id="255 digits and a sign"),
        pytest.param(f'{{"id":{"9" * 4300}}}', id="4,300 digits"),
        pytest.param(f'{{"id":{"9" * 4301}}}', id="4,301 digits"),
        pytest.param(f'{{"id":{"9" * 100_000}}}', id="100,000 digits"),
        pytest.param('{"id":1e255}', id="1e255"),
        pytest.param('{"id":1e400}', id="1e400"),
        pytest.param('{"id":-1e400}', id="-1e400"),
        pytest.param('{"id":1e-400}', id="1e-400"),
        pytest.param('{"id":1e999999999}', id="1e999999999"),
        pytest.param('{"id":1e-999999999}', id="1e-999999999"),
        pytest.param('{"id":1e999999999999999999}', id="1e(10^18)"),
        pytest.param('{"id":1e99999999999999999999}', id="1e(10^20)"),
        pytest.param(f'{{"id":0.{"3" * 300}}}', id="300 digits after the dot"),
        pytest.param('{"id":"a\\u0000b"}', id="NUL"),
        pytest.param('{"id":"a\\nb"}', id="line feed"),
        pytest.param('{"id":"\\u001b[31m"}', id="escape"),
        pytest.param('{"id":"a\\u007f"}', id="DEL"),
        pytest.param('{"id":"\\ud800"}', id="lone surrogate"),
        pytest.param('{"id":"a\\udc00\\ud800b"}', id="surrogates the wrong way round"),
        # No JSON, or no object
        pytest.param("", id="no body"),
        pytest.param("abcd", id="text"),
        pytest.param("<html>{}</html>", id="HTML"),
        pytest.param('{"id":"abcd"', id="cut"),
        pytest.param('{"id":"abcd"}{}', id="two objects"),
        pytest.param('{"id":"abcd",}', id="comma"),
        pytest.param("{'id':'abcd'}", id="single quotes"),
        pytest.param('{"id":"a\nb"}', id="line feed, not escaped"),
        pytest.param('\ufeff{"id":"abcd"}', id="byte order mark"),
        pytest.param('{"id":NaN}', id="NaN"),
        pytest.param('{"id":Infinity}', id="Infinity"),
        pytest.param('{"id":-Infinity}', id="-Infinity"),
        pytest.param('{"id":"abcd","x":NaN}', id="NaN beside the id"),
        pytest.param('{"id":07}', id="octal"),
        pytest.param('{"id":0x7}', id="hexadecimal"),
        pytest.param('{"id":+7}', id="plus sign"),
        pytest.param('{"id":7.}', id="dot at the end"),
        pytest.param("null", id="null alone"),
        pytest.param("7", id="number alone"),
        pytest.param('"id"', id="string alone"),
        pytest.param('[{"id":"abcd"}]', id="in an array"),
        pytest.param('["id"]', id="array of strings"),
    ],
)
def test_no_id(look_up: LookUp, body: str) -> None:
    with pytest.raises(LookupWithoutId):
        look_up(body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"id":"\xff"}', id="not UTF-8"),
        pytest.param('{"id":"é"}'.encode("latin-1"), id="Latin-1"),
        pytest.param('{"id":"abcd"}'.encode("utf-16"), id="UTF-16"),
        pytest.param('{"id":"abcd"}'.encode("utf-16-le"), id="UTF-16 without a mark"),
        pytest.param(b'{"id":"\xed\xa0\x80"}', id="an encoded surrogate"),
        pytest.param(b'{"id":"\xc0\x80"}', id="an overlong NUL"),
        pytest.param(b'{"id":"a\x00b"}', id="NUL, not escaped"),
        pytest.param(b"\x00" * 100, id="NULs"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="100,000 brackets"),
        pytest.param(b'{"id":' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="100,000 brackets within"),
        pytest.param(b'{"id":' * 100_000 + b"1" + b"}" * 100_000, id="100,000 objects"),
    ],
)
def test_bytes_that_are_no_id(body: bytes) -> None:
    with Peer(answering(body)) as peer, make_outbound(peer.address) as outbound, pytest.raises(LookupWithoutId):
        OAuth(outbound).look_up(described(peer.url), "access-token")


@pytest.mark.parametrize(
    ("path", "body", "account_id"),
    [
        ("data.id", '{"data":{"id":7},"id":8}', "7"),
        ("a.b.c.d", '{"a":{"b":{"c":{"d":"e"}}}}', "e"),
        ("user-id", '{"user-id":"e"}', "e"),
        ("0", '{"0":"e"}', "e"),
        ("é", '{"\\u00e9":"e"}', "e"),
        ("data.id", '{"data.id":"e"}', None),
        ("data.id", '{"data":[{"id":"e"}]}', None),
        ("data.0.id", '{"data":[{"id":"e"}]}', None),
        ("data.id", '{"data":"id"}', None),
        ("data.id", '{"data":null}', None),
        ("data.id", '{"id":"e"}', None),
        ("data", '{"data":{"id":"e"}}', None),
        ("id.length", '{"id":"e"}', None),
        ("__class__", "{}", None),
    ],
)
def test_where_the_id_stands(look_up: LookUp, path: str, body: str, account_id: str | None) -> None:
    if account_id is None:
        with pytest.raises(LookupWithoutId):
            look_up(body, path)
    else:
        assert look_up(body, path) == account_id


# How the provider answers


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (200, None),
        (201, None),
        (206, None),
        (299, None),
        (204, LookupWithoutId),  # which has no body
        (300, ProviderMalformed),
        (302, ProviderMalformed),
        (304, ProviderMalformed),
        (307, ProviderMalformed),
        (400, LookupRejected),
        (401, LookupRejected),
        (403, LookupRejected),
        (404, LookupRejected),
        (418, LookupRejected),
        (429, LookupRejected),
        (499, LookupRejected),
        (500, ProviderUnavailable),
        (502, ProviderUnavailable),
        (503, ProviderUnavailable),
        (599, ProviderUnavailable),
    ],
)
def test_statuses(look_up: LookUp, provider: SandboxProvider, status: int, failure: type[CallError] | None) -> None:
    headers = {"Location": "/elsewhere"} if 300 <= status < 400 else {}
    if failure is None:
        assert look_up('{"id":"abcd"}', status=status, headers=headers) == "abcd"
    else:
        with pytest.raises(failure) as raised:
            look_up('{"id":"abcd"}', status=status, headers=headers)
        assert raised.value.metadata == {}
    assert provider.requests("elsewhere") == []


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("hang", ProviderTimeout),
        ("trickle_headers", ProviderTimeout),
        ("trickle_body", ProviderTimeout),
        ("huge", ProviderMalformed),
        ("gzip_bomb", ProviderMalformed),
        ("redirect", ProviderMalformed),
        ("cut", ProviderUnavailable),
        ("cut_body", ProviderUnavailable),
        ("not_http", ProviderUnavailable),
        ("garbage", LookupWithoutId),
        ("not_object", LookupWithoutId),
    ],
)
def test_misbehaviour(provider: SandboxProvider, kind: str, failure: type[CallError]) -> None:
    """On a new connection, for a request on a kept one may be repeated."""
    provider.fault("lookup", kind)
    timeout = 0.4 if failure is ProviderTimeout else 10.0  # the stand-in takes a while for its first bomb
    with make_outbound(provider.address) as outbound, pytest.raises(failure):
        OAuth(outbound).look_up(described(provider.url, timeout=timeout), "access-token")
    assert len(provider.requests("lookup")) == 1
    assert provider.requests("elsewhere") == []


def test_nobody_there(outbound: Outbound) -> None:
    with pytest.raises(NotConnectable):
        OAuth(outbound).look_up(described(f"http://127.0.0.1:{free_port()}"), "access-token")


def test_a_lookup_takes_a_slot() -> None:
    with make_outbound(per_provider=1) as outbound, outbound.bulkhead.requesting("sandbox"), pytest.raises(Busy):
        OAuth(outbound).look_up(described("http://127.0.0.1"), "access-token")


# What is asked


TOKENS = {
    "usual": "access-1234_.~",
    "like a JWT": "eyJh.eyJz.SflK-_w",
    "reserved": "a&b=c#d/e?f;g,h+i@j:k",
    "space": "a b",
    "percent": "100%2F%",
    "quotes": "'\"`\\",
    "brackets": "{access_token}<%= accessToken %>[]()",
    "emoji": "é😀",
    "dot": ".",
    "two dots": "..",
    "dots and slashes": "../../admin",
    "long": "x" * 16384,
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(
    "template",
    ["/users/{access_token}/me?x=1", "/users/me?x=1&t=<%= accessToken %>"],
    ids=["path", "query"],
)
def test_the_token_arrives_as_it_is(template: str, token: str) -> None:
    """In its place and nowhere else: no token changes the rest of the URL."""
    seen: list[bytes] = []
    with Peer(answering(b'{"id":"abcd"}', seen=seen)) as peer, make_outbound(peer.address) as outbound:
        OAuth(outbound).look_up(described(peer.url, lookup_url=peer.url + template), token)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    method, target, version = head.split(b"\r\n")[0].decode().split(" ")
    parts = urlsplit(target)
    segments, query = [unquote(part) for part in parts.path.split("/")], parse_qsl(parts.query)
    assert (method, version, body) == ("GET", "HTTP/1.1", b"")
    if "{access_token}" in template:
        assert (segments, query) == (["", "users", token, "me"], [("x", "1")])
    else:
        assert (segments, query) == (["", "users", "me"], [("x", "1"), ("t", token)])
    assert b"authorization" not in head.lower()


def test_one_request_per_lookup(outbound: Outbound, provider: SandboxProvider) -> None:
    token = provider.access_token("grace")
    assert OAuth(outbound).look_up(described(provider.url), token) == "grace"
    [request] = provider.requests("lookup")
    assert (request["method"], request["query"], request["body"]) == ("GET", {"access_token": token}, "")
    with pytest.raises(LookupRejected):
        OAuth(outbound).look_up(described(provider.url), token + "x")


# The token, if there is a code only


@pytest.mark.parametrize("auth", ["client_secret_post", "client_secret_basic"])
@pytest.mark.parametrize("method", ["post", "get"])
def test_a_code_is_exchanged_by_the_provider_s_method(
    outbound: Outbound, provider: SandboxProvider, method: str, auth: str
) -> None:
    redirect_uri, code = "http://127.0.0.1/app/callback", provider.code("sandbox", literal="a&b=c d/+%é😀")
    getter = described(
        provider.url,
        token_url=f"{provider.url}/token",
        token_method=method,
        token_auth=auth,
        client_id="sandbox-client",
        client_secret=SECRET,
        redirect_uri=redirect_uri,
    )
    pair = OAuth(outbound).exchange_code(getter, code)
    assert pair.access_token == provider.families()[0]["access_token"]
    [request] = provider.requests("token")
    credentials = {"client_id": "sandbox-client", "client_secret": SECRET} if auth == "client_secret_post" else {}
    grant = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri, **credentials}
    sent, empty = ("form", "query") if method == "post" else ("query", "form")
    assert (request["method"], request[sent], request[empty]) == (method.upper(), grant, {})
    assert ("authorization" in request["headers"]) == (auth == "client_secret_basic")


def test_a_redirect_uri_that_is_not_configured_is_not_sent(outbound: Outbound, provider: SandboxProvider) -> None:
    with pytest.raises(CodeRejected) as refusal:
        OAuth(outbound).exchange_code(described(provider.url, token_url=f"{provider.url}/token"), "code")
    assert refusal.value.metadata == {"error": "invalid_client"}
    [request] = provider.requests("token")
    assert request["form"] == {"grant_type": "authorization_code", "code": "code"}


def test_without_a_token_url_there_is_nobody_to_ask(outbound: Outbound) -> None:
    with pytest.raises(ProviderNotConfigured):
        OAuth(outbound).exchange_code(described("http://127.0.0.1"), "code")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ('{"error":"bad_verification_code"}', "bad_verification_code"),  # as GitHub has it
        ('{"error":"a\\"b"}', None),
        ('{"error":5}', None),
        ("{}", None),
        ("[]", None),
        ("access_token=x", None),
        ("", None),
        ('{"access_token":""}', None),
        ('{"access_token":5}', None),
        ('{"access_token":"a\\nb"}', None),
        ('{"access_token":"\\ud800"}', None),
    ],
    ids=str,
)
def test_a_success_without_a_token(outbound: Outbound, provider: SandboxProvider, body: str, error: str | None) -> None:
    provider.fault("token", "status", status=200, body=body)
    with pytest.raises(NoTokenGranted) as failure:
        OAuth(outbound).exchange_code(described(provider.url, token_url=f"{provider.url}/token"), "code")
    assert (failure.value.cause, failure.value.metadata) == (error, {})
