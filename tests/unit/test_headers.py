"""What HTTP callers send: credentials, cookies, addresses and request ids; and the cookie that they get."""

import base64
from datetime import timedelta

import pytest

from doorward_server.rpc.headers import (
    SetCookie,
    basic_credentials,
    bearer_token,
    client_address,
    request_id_of,
    session_cookies,
    text_of,
)
from doorward_server.rpc.peers import Peer

TCP = "ipv4:192.0.2.7:4711"
GATEWAY = Peer("unix:/run/doorward.sock", is_gateway=True)
GATEWAY_OVER_TLS = Peer(TCP, is_gateway=True)


def encoded(pair: str | bytes) -> str:
    return base64.b64encode(pair if isinstance(pair, bytes) else pair.encode()).decode()


# Credentials


@pytest.mark.parametrize(
    ("header", "pair"),
    [
        pytest.param(f"Basic {encoded('ada:secret')}", ("ada", "secret"), id="usual"),
        pytest.param(f"BASIC {encoded('ada:secret')}", ("ada", "secret"), id="capitals"),
        pytest.param(f"basic {encoded('ada:secret')}", ("ada", "secret"), id="small letters"),
        pytest.param(f"bAsIc {encoded('ada:secret')}", ("ada", "secret"), id="mixed case"),
        pytest.param(f"Basic   {encoded('ada:secret')}", ("ada", "secret"), id="more blanks"),
        pytest.param(f"Basic {encoded('ada:secret')}  ", ("ada", "secret"), id="blanks after it"),
        pytest.param(f"Basic {encoded('ada:a:b::')}", ("ada", "a:b::"), id="colons in the password"),
        pytest.param(f"Basic {encoded(':secret')}", ("", "secret"), id="no user"),
        pytest.param(f"Basic {encoded('ada:')}", ("ada", ""), id="no password"),
        pytest.param(f"Basic {encoded(':')}", ("", ""), id="neither"),
        pytest.param(f"Basic {encoded('ада:пароль')}", ("ада", "пароль"), id="UTF-8"),
        pytest.param(f"Basic {encoded(' ada : secret ')}", (" ada ", " secret "), id="blanks within"),
        pytest.param(f"Basic {encoded('ada:' + 'x' * 10_000)}", ("ada", "x" * 10_000), id="long"),
        pytest.param(f"Basic {encoded('ada:🔑?>~')}", ("ada", "🔑?>~"), id="all of the alphabet"),
        pytest.param("", None, id="empty"),
        pytest.param("Basic", None, id="scheme alone"),
        pytest.param("Basic ", None, id="scheme and a blank"),
        pytest.param("Basic  =", None, id="padding alone"),
        pytest.param(f"Basic {encoded('ada')}", None, id="no colon"),
        pytest.param(f"Basic {encoded(b'ada:' + bytes([0xFF]))}", None, id="not UTF-8"),
        pytest.param(f"Basic {encoded('é:x'.encode('latin-1'))}", None, id="Latin-1"),
        pytest.param(f"Basic {encoded(bytes.fromhex('edb080') + b':x')}", None, id="an encoded surrogate"),
        pytest.param("Basic ada:secret", None, id="in clear"),
        pytest.param(f"Basic {encoded('ada:secret').rstrip('=')}", None, id="no padding"),
        pytest.param(f"Basic {encoded('ada:secret')}=", None, id="too much padding"),
        pytest.param(f"Basic {encoded('ada:secret')[:-1]}", None, id="cut"),
        pytest.param(f"Basic {encoded('ada:secret')}{encoded('x:y')}", None, id="twice"),
        pytest.param(f"Basic {encoded('ada:secret')}, Basic {encoded('x:y')}", None, id="two headers joined"),
        pytest.param(f"Basic {encoded('ada:secret')[:4]} {encoded('ada:secret')[4:]}", None, id="a blank within"),
        pytest.param(f"Basic {encoded('ada:🔑?>~').replace('/', '_').replace('+', '-')}", None, id="URL alphabet"),
        pytest.param("Basic ÿÿÿÿ", None, id="beyond ASCII"),
        pytest.param("Basic !!!!", None, id="no base64"),
        pytest.param(f"Basic\t{encoded('ada:secret')}", None, id="a tab"),
        pytest.param(f"Basic{encoded('ada:secret')}", None, id="no blank"),
        pytest.param(f" Basic {encoded('ada:secret')}", None, id="a blank before it"),
        pytest.param(f"Basic: {encoded('ada:secret')}", None, id="a colon after the scheme"),
        pytest.param(f"Bearer {encoded('ada:secret')}", None, id="another scheme"),
        pytest.param(encoded("ada:secret"), None, id="no scheme"),
    ],
)
def test_basic_credentials(header: str, pair: tuple[str, str] | None) -> None:
    assert basic_credentials({"authorization": header}) == pair
    assert basic_credentials({"proxy-authorization": header}) is None


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer dwt_x", "dwt_x"),
        ("bearer dwt_x", "dwt_x"),
        ("BEARER   dwt_x ", "dwt_x"),
        ("Bearer", ""),
        ("Bearer ", ""),
        ("Bearer a b", "a b"),
        ("Basic dwt_x", None),
        ("dwt_x", None),
        ("", None),
        (" Bearer dwt_x", None),
    ],
)
def test_bearer_token(header: str, token: str | None) -> None:
    assert bearer_token({"authorization": header}) == token


def test_without_the_header_there_is_nothing() -> None:
    assert (basic_credentials({}), bearer_token({}), [*session_cookies({})]) == (None, None, [])


# Cookies


@pytest.mark.parametrize(
    ("header", "values"),
    [
        pytest.param("doorward_session=abc", ["abc"], id="alone"),
        pytest.param("a=1; doorward_session=abc; b=2", ["abc"], id="among others"),
        pytest.param("a=1;doorward_session=abc;b=2", ["abc"], id="without blanks"),
        pytest.param("  doorward_session=abc  ", ["abc"], id="blanks around"),
        pytest.param('doorward_session="abc"', ["abc"], id="quoted"),
        pytest.param("doorward_session=a=b==", ["a=b=="], id="equals signs in it"),
        pytest.param("doorward_session=", [""], id="empty"),
        pytest.param("doorward_session", [""], id="no equals sign"),
        pytest.param("doorward_session=first; doorward_session=second", ["first", "second"], id="twice"),
        pytest.param("doorward_session=; doorward_session=second", ["", "second"], id="the empty one first"),
        pytest.param("xdoorward_session=abc", [], id="longer name"),
        pytest.param("doorward_session2=abc", [], id="another name"),
        pytest.param("Doorward_Session=abc", [], id="capitals"),
        pytest.param("a=doorward_session=abc", [], id="in another's value"),
        pytest.param("doorward_session =abc", [], id="blank before the equals sign"),
        pytest.param("a=1, doorward_session=abc", [], id="comma"),
        pytest.param("", [], id="nothing"),
        pytest.param(";;;", [], id="separators alone"),
    ],
)
def test_session_cookies(header: str, values: list[str]) -> None:
    assert [*session_cookies({"cookie": header})] == values
    assert [*session_cookies({"set-cookie": header})] == []


@pytest.mark.parametrize(
    ("lifetime", "secure", "kept", "forgotten"),
    [
        pytest.param(
            timedelta(days=365),
            True,
            "doorward_session=abc; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax; Secure",
            "doorward_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax; Secure",
            id="https",
        ),
        pytest.param(
            timedelta(seconds=1.9),
            False,
            "doorward_session=abc; Path=/; Max-Age=1; HttpOnly; SameSite=Lax",
            "doorward_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax",
            id="http",
        ),
    ],
)
def test_how_the_cookie_is_set(lifetime: timedelta, secure: bool, kept: str, forgotten: str) -> None:
    set_cookie = SetCookie(lifetime, secure)
    assert set_cookie.keep("abc") == ("set-cookie", kept)
    assert set_cookie.forget() == ("set-cookie", forgotten)


# Who is connected


@pytest.mark.parametrize(
    ("peer", "said", "address"),
    [
        pytest.param(GATEWAY, "203.0.113.9", "203.0.113.9", id="as the gateway says"),
        pytest.param(GATEWAY, "2001:db8::1", "2001:db8::/64", id="IPv6, as the gateway says"),
        pytest.param(GATEWAY, "2001:db8::ffff:1", "2001:db8::/64", id="its neighbour"),
        pytest.param(GATEWAY, "2001:db8:0:1::1", "2001:db8:0:1::/64", id="another subscriber"),
        pytest.param(GATEWAY, None, "", id="the gateway says nothing"),
        pytest.param(GATEWAY_OVER_TLS, "203.0.113.9", "203.0.113.9", id="as a gateway on another machine says"),
        pytest.param(Peer(TCP, is_gateway=False), None, "ipv4:192.0.2.7", id="who is connected"),
        pytest.param(Peer(TCP, is_gateway=False), "203.0.113.9", "ipv4:192.0.2.7", id="what others say does not count"),
        pytest.param(Peer("ipv6:%5B::1%5D:4711", is_gateway=False), None, "ipv6:%5B::1%5D", id="IPv6"),
    ],
)
def test_client_address(peer: Peer, said: str | None, address: str) -> None:
    metadata = {"x-forwarded-for": "198.51.100.1", **({"x-envoy-external-address": said} if said else {})}
    assert client_address(metadata, peer) == address


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 64])
def test_a_fit_request_id_is_kept(given: str) -> None:
    assert request_id_of({"x-request-id": given}) == given


@pytest.mark.parametrize("given", [None, "", "x" * 65, "a b", "a\nb", "é", "a\n", b"abc"], ids=repr)
def test_an_unfit_request_id_is_replaced(given: str | bytes | None) -> None:
    metadata = {} if given is None else {"x-request-id": given}
    first, second = request_id_of(metadata), request_id_of(metadata)
    assert len(first) == 32
    assert first != second
    assert given not in (first, second)


@pytest.mark.parametrize(("value", "text"), [("a", "a"), ("", ""), (b"a", ""), (None, "")], ids=repr)
def test_text_of(value: str | bytes | None, text: str) -> None:
    assert text_of(value) == text
