"""Callbacks: what is one, what a prefix covers whoever reads it, and which names look alike."""
# ruff: noqa: RUF001 - look-alikes are what it is about

import contextlib
from urllib.parse import quote, unquote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward_server.callbacks import Callback, InvalidCallback, clean_name, name_key

LONGEST_LABEL = "a" * 63


def parse(url: str) -> tuple[str, str, int, tuple[str, ...]]:
    callback = Callback.parse(url)
    assert callback.url == url
    return callback.scheme, callback.host, callback.port, callback.segments


# What is a callback


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("https://example.com/cb", ("https", "example.com", 443, ("cb",)), id="as usual"),
        pytest.param("http://example.com", ("http", "example.com", 80, ()), id="no path"),
        pytest.param("http://example.com/", ("http", "example.com", 80, ()), id="empty path"),
        pytest.param("http://example.com?x=1", ("http", "example.com", 80, ()), id="query without a path"),
        pytest.param("https://example.com/a/b/?x=/c#/d", ("https", "example.com", 443, ("a", "b")), id="query"),
        pytest.param("HTTPS://EXAMPLE.com/CB", ("https", "example.com", 443, ("CB",)), id="capitals"),
        pytest.param("https://example.com:443/", ("https", "example.com", 443, ()), id="default port"),
        pytest.param("https://example.com:/", ("https", "example.com", 443, ()), id="empty port"),
        pytest.param("https://example.com:0443/", ("https", "example.com", 443, ()), id="zeros before the port"),
        pytest.param("http://localhost:65535/", ("http", "localhost", 65535, ()), id="highest port"),
        pytest.param("http://example.com.:1/", ("http", "example.com", 1, ()), id="final dot"),
        pytest.param("http://Bücher.example/", ("http", "xn--bcher-kva.example", 80, ()), id="beyond ASCII"),
        pytest.param("http://xn--bcher-kva.example/", ("http", "xn--bcher-kva.example", 80, ()), id="encoded name"),
        pytest.param("http://a。example/", ("http", "a.example", 80, ()), id="ideographic full stop"),
        pytest.param("http://cafe.de/", ("http", "cafe.de", 80, ()), id="name of hexadecimal digits"),
        pytest.param("http://1.example/", ("http", "1.example", 80, ()), id="number in a name"),
        pytest.param(f"http://{LONGEST_LABEL}.example/", ("http", f"{LONGEST_LABEL}.example", 80, ()), id="long label"),
        pytest.param("http://192.0.2.1:8080/", ("http", "192.0.2.1", 8080, ()), id="IPv4"),
        pytest.param("http://[2001:DB8:0::1]/", ("http", "2001:db8::1", 80, ()), id="IPv6"),
        pytest.param("http://[::ffff:192.0.2.1]:1/", ("http", "::ffff:c000:201", 1, ()), id="IPv4 in IPv6"),
        pytest.param(
            "http://a.example/%63%b/ü%C3%bc", ("http", "a.example", 80, ("c%25b", "%C3%BC%C3%BC")), id="codes"
        ),
        pytest.param("http://a.example/a%2fb", ("http", "a.example", 80, ("a%2Fb",)), id="encoded slash"),
        pytest.param("http://a.example/a/./b/../c", ("http", "a.example", 80, ("a", "c")), id="dot segments"),
        pytest.param("http://a.example/a/%2E%2e/c", ("http", "a.example", 80, ("c",)), id="encoded dot segments"),
        pytest.param("http://a.example/../../c", ("http", "a.example", 80, ("c",)), id="above the root"),
        pytest.param("http://a.example//c//", ("http", "a.example", 80, ("", "c", "")), id="empty segments"),
        pytest.param("http://a.example/%FF", ("http", "a.example", 80, ("%FF",)), id="not UTF-8"),
        pytest.param("http://a.example/%252F", ("http", "a.example", 80, ("%252F",)), id="encoded twice"),
    ],
)
def test_callbacks(url: str, expected: object) -> None:
    assert parse(url) == expected


@pytest.mark.parametrize(
    ("url", "why"),
    [
        pytest.param("", "absolute", id="empty"),
        pytest.param("/cb", "absolute", id="path"),
        pytest.param("//example.com/cb", "absolute", id="no scheme"),
        pytest.param("example.com/cb", "absolute", id="no scheme nor slashes"),
        pytest.param("https:example.com", "absolute", id="no slashes"),
        pytest.param("https:/example.com", "absolute", id="one slash"),
        pytest.param("https:\\\\example.com", "absolute", id="backslashes"),
        pytest.param("ftp://example.com/", "absolute", id="other scheme"),
        pytest.param("javascript:alert(1)//https://example.com/", "absolute", id="script"),
        pytest.param("file:///etc/passwd", "absolute", id="file"),
        pytest.param("https://", "host", id="no host"),
        pytest.param("https:///cb", "host", id="empty host"),
        pytest.param("https://:443/cb", "host", id="port alone"),
        pytest.param("https://u:p@example.com/", "user information", id="user and password"),
        pytest.param("https://@example.com/", "user information", id="empty user"),
        pytest.param("https://example.com\\@evil.example/", "user information", id="backslash before an at sign"),
        pytest.param("https://example.com\\.evil.example/", "host", id="backslash in the host"),
        pytest.param("https://example.com/a b", "blank", id="blank"),
        pytest.param(" https://example.com/", "blank", id="blank before"),
        pytest.param("https://example.com/\n", "control", id="line feed"),
        pytest.param("ht\ttps://example.com/", "control", id="tab"),
        pytest.param("https://example.com/\x00", "control", id="NUL"),
        pytest.param("https://example.com/\x7f", "control", id="delete"),
        pytest.param("https://example.com/\x85", "control", id="C1 control"),
        pytest.param("https://example.com/\u00a0", "blank", id="no-break space"),
        pytest.param("https://example.com/\u2028", "blank", id="line separator"),
        pytest.param("https://example.com/\u202egp", "control", id="direction override"),
        pytest.param("https://exa\u200bmple.com/", "control", id="zero width space"),
        pytest.param("https://exa\u00admple.com/", "control", id="soft hyphen"),
        pytest.param("https://example.com/\ud800", "control", id="lone surrogate"),
        pytest.param("https://example.com:0/", "port", id="port 0"),
        pytest.param("https://example.com:65536/", "port", id="port too high"),
        pytest.param("https://example.com:x/", "port", id="port of letters"),
        pytest.param("https://example.com:-1/", "port", id="port below 0"),
        pytest.param("https://example.com:８０/", "port", id="port of wide digits"),
        pytest.param("https://example.com:1:2/", "port", id="two ports"),
        pytest.param("https://a..example/", "name", id="empty label"),
        pytest.param("https://./", "name", id="dot"),
        pytest.param("https://-a.example/", "name", id="hyphen first"),
        pytest.param("https://a_b.example/", "name", id="underscore"),
        pytest.param("https://a%2eexample/", "name", id="encoded host"),
        pytest.param("https://xn--a/", "name", id="not an encoded name"),
        pytest.param("https://💩.example/", "name", id="emoji"),
        pytest.param(f"https://{LONGEST_LABEL}a.example/", "name", id="label too long"),
        pytest.param(f"https://{'a.' * 200}example/", "too long", id="host too long"),
        pytest.param("http://2130706433/", "address", id="one number"),
        pytest.param("http://0177.0.0.1/", "address", id="octal"),
        pytest.param("http://0x7f.1/", "address", id="hexadecimal and short"),
        pytest.param("http://0x7F000001/", "address", id="hexadecimal"),
        pytest.param("http://0x/", "address", id="hexadecimal nothing"),
        pytest.param("http://127.1/", "address", id="short"),
        pytest.param("http://127.0.0.1./", "address", id="final dot"),
        pytest.param("http://127.0.0.01/", "address", id="zeros"),
        pytest.param("http://127.0.0.256/", "address", id="too high"),
        pytest.param("http://1.2.3.4.5/", "address", id="five numbers"),
        pytest.param("http://127。0。0。1/", "address", id="ideographic full stops"),
        pytest.param("http://１２７.0.0.1/", "name", id="wide digits"),
        pytest.param("http://١٢٧.0.0.1/", "name", id="Arabic digits"),
        pytest.param("http://a.example.1/", "address", id="number at the end"),
        pytest.param("http://[::1/", "host", id="open bracket"),
        pytest.param("http://::1/", "host", id="IPv6 without brackets"),
        pytest.param("http://[127.0.0.1]/", "address", id="IPv4 in brackets"),
        pytest.param("http://[::1%25eth0]/", "host", id="zone"),
        pytest.param("http://[::1]evil.example/", "host", id="name after brackets"),
        pytest.param("http://evil.example[::1]/", "host", id="name before brackets"),
        pytest.param("http://[v1.a]/", "host", id="future address"),
        pytest.param("http://a.example/%25252541", "too often", id="encoded too often"),
        pytest.param(f"http://a.example/{'/%' * 30_000}", "too long", id="long"),
    ],
)
def test_what_is_no_callback(url: str, why: str) -> None:
    with pytest.raises(InvalidCallback, match=why):
        Callback.parse(url)


@pytest.mark.parametrize(
    "rest",
    [
        "?",
        "?a=b",
        "#",
        "#a",
        "/..",
        "/cb/../x",
        "/cb/./x",
        "/%2e%2e/x",
        "//",
        "/a//b",
        "/a%2Fb",
        "/a%5cb",
        "/a\\b",
        "/a;b",
    ],
)
def test_what_is_no_prefix(rest: str) -> None:
    url = f"https://a.example{rest}"
    assert Callback.parse(url).url == url
    with pytest.raises(InvalidCallback, match="a prefix"):
        Callback.parse_prefix(url)


@given(st.text(max_size=40))
def test_whatever_is_given_is_parsed_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://a.example/{text}", f"https://a.example:{text}/"):
        with contextlib.suppress(InvalidCallback):
            assert Callback.parse(url).url == url


HOST_PIECES = st.lists(
    st.sampled_from(
        ["a", "EXAMPLE", ".", "-", "ü", "ß", "。", "1", "0x7f", "127.0.0.1", "[::1]", "xn--bcher-kva", "２"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@given(HOST_PIECES, st.sampled_from(["", ":1", ":443", ":", ":99999"]))
def test_the_http_client_goes_where_the_callback_says(host: str, port: str) -> None:
    try:
        callback = Callback.parse(f"https://{host}{port}/cb")
    except InvalidCallback:
        return
    seen = httpx.URL(callback.url)
    assert (seen.raw_host.decode().removesuffix("."), seen.port or 443) == (callback.host, callback.port)


# What a prefix covers


@pytest.mark.parametrize(
    ("prefix", "url"),
    [
        pytest.param("https://a.example/cb", "https://a.example/cb", id="itself"),
        pytest.param("https://a.example/cb", "https://a.example/cb/", id="with a slash"),
        pytest.param("https://a.example/cb/", "https://a.example/cb", id="without the slash"),
        pytest.param("https://a.example/cb", "https://a.example/cb/x/y", id="below"),
        pytest.param("https://a.example/cb", "https://a.example/cb?next=//evil.example/../..", id="any query"),
        pytest.param("https://a.example/cb", "https://a.example/cb#x", id="any fragment"),
        pytest.param("https://a.example", "https://a.example/anything", id="all of the origin"),
        pytest.param("https://a.example/cb", "HTTPS://A.Example/cb", id="case of scheme and host"),
        pytest.param("https://a.example/cb", "https://a.example:443/cb", id="default port"),
        pytest.param("http://a.example:80/cb", "http://a.example./cb", id="final dot"),
        pytest.param("https://bücher.example/cb", "https://XN--BCHER-KVA.example/cb", id="encoded name"),
        pytest.param("http://[::1]:8000/cb", "http://[0:0::1]:8000/cb/x", id="IPv6"),
        pytest.param("https://a.example/%63b", "https://a.example/c%62", id="encoded letters"),
        pytest.param("https://a.example/ü", "https://a.example/%c3%bc/x", id="beyond ASCII"),
        pytest.param("https://a.example/a b".replace(" ", "%20"), "https://a.example/a%20b", id="encoded blank"),
        pytest.param("https://a.example/cb", "https://a.example/x/../cb", id="dots that lead to it"),
        pytest.param("https://a.example/cb", "https://a.example/cb/x/../y", id="dots that stay below"),
        pytest.param("https://a.example/cb", "https://a.example/cb/http%3A%2F%2Fb.example%2F", id="encoded URL below"),
        pytest.param("https://a.example/cb", "https://a.example/cb//x", id="empty segment below"),
    ],
)
def test_covered(prefix: str, url: str) -> None:
    callback = Callback.parse(url)
    assert callback.is_covered_by(Callback.parse_prefix(prefix))
    assert callback.may_be_under(Callback.parse_prefix(prefix))


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://a.example/cbx", id="longer segment"),
        pytest.param("https://a.example/c", id="shorter segment"),
        pytest.param("https://a.example/CB", id="other case"),
        pytest.param("https://a.example/", id="above"),
        pytest.param("https://a.example", id="no path"),
        pytest.param("https://a.example/x/cb", id="further below"),
        pytest.param("http://a.example/cb", id="other scheme"),
        pytest.param("http://a.example:443/cb", id="other scheme, same port"),
        pytest.param("https://a.example:444/cb", id="other port"),
        pytest.param("https://b.example/cb", id="other host"),
        pytest.param("https://a.example.b.example/cb", id="host goes on"),
        pytest.param("https://x.a.example/cb", id="subdomain"),
        pytest.param("https://a.example?/cb", id="in the query"),
        pytest.param("https://a.example#/cb", id="in the fragment"),
        pytest.param("https://a.example/cb/..", id="dots"),
        pytest.param("https://a.example/cb/../x", id="dots and on"),
        pytest.param("https://a.example/cb/%2e%2E/x", id="encoded dots"),
        pytest.param("https://a.example/cb/.%2e/x", id="half encoded dots"),
        pytest.param("https://a.example/cb/x/../../y", id="dots twice"),
    ],
)
def test_not_covered(url: str) -> None:
    callback, prefix = Callback.parse(url), Callback.parse_prefix("https://a.example/cb")
    assert not callback.is_covered_by(prefix)
    assert not callback.may_be_under(prefix)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/cb/..%2fx", id="encoded slash after dots"),
        pytest.param("/cb%2Fx", id="encoded slash"),
        pytest.param("/cb%5Cx", id="encoded backslash"),
        pytest.param("/cb\\x", id="backslash"),
        pytest.param("/cb/..\\x", id="backslash after dots"),
        pytest.param("/cb/%252e%252e/x", id="dots encoded twice"),
        pytest.param("/cb/..%252fx", id="slash encoded twice"),
        pytest.param("/cb/%%32e%%32e/x", id="dots encoded in halves"),
        pytest.param("/cb//../x", id="empty segment"),
        pytest.param("/cb/..;/x", id="parameters after dots"),
        pytest.param("/cb/..%3b/x", id="encoded parameters after dots"),
        pytest.param("/cb;x", id="parameters"),
        pytest.param("//cb", id="empty segment first"),
        pytest.param("/x/..%2fcb", id="from elsewhere"),
    ],
)
def test_what_servers_read_in_more_than_one_way_is_not_covered(path: str) -> None:
    callback, prefix = Callback.parse(f"https://a.example{path}"), Callback.parse_prefix("https://a.example/cb")
    assert not callback.is_covered_by(prefix)
    assert callback.may_be_under(prefix)


def found(path: str, decodings: int, merges: bool, backslashes: bool, parameters: bool) -> list[str]:
    """Where a server finds a file, by a loop over its folders."""
    for _ in range(decodings):
        path = unquote(path)
    path = path.replace("\\", "/") if backslashes else path
    folders: list[str] = []
    for part in path.split("/")[1:]:
        name = unquote(part).split(";")[0] if parameters else unquote(part)
        if name == "..":
            folders = folders[:-1]
        elif name != "." and not (merges and not name):
            folders.append(name)
    return folders


PIECES = st.sampled_from(
    ["/", "/..", "/cb", "\\", "..", ".", "%2f", "%2E", "%5c", "%252f", "%25", ";", "x", "%63b", "%"]
)
FLAG = st.booleans()


@given(st.lists(PIECES, max_size=10), st.integers(0, 3), FLAG, FLAG, FLAG)
def test_nothing_escapes_the_prefix(
    pieces: list[str], decodings: int, merges: bool, backslashes: bool, parameters: bool
) -> None:
    url, prefix = f"https://a.example/cb{''.join(pieces)}", Callback.parse_prefix("https://a.example/cb")
    try:
        callback = Callback.parse(url)
    except InvalidCallback:
        return
    for path in (url.removeprefix("https://a.example"), httpx.URL(url).raw_path.decode()):  # as given and as sent
        is_below = found(path, decodings, merges, backslashes, parameters)[:1] == ["cb"]
        assert is_below or not callback.is_covered_by(prefix)
        assert callback.may_be_under(prefix) or not is_below


SEGMENT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda text: not set(text) & set("/\\;%") and text not in {".", ".."}
)


@given(st.lists(SEGMENT, min_size=1, max_size=4), st.lists(SEGMENT, max_size=4))
def test_whatever_is_below_is_covered(prefix: list[str], more: list[str]) -> None:
    def url(segments: list[str]) -> str:
        return f"https://a.example/{'/'.join(quote(segment, safe='') for segment in segments)}"

    assert Callback.parse(url(prefix + more)).is_covered_by(Callback.parse_prefix(url(prefix)))
    assert not Callback.parse(url([prefix[0] + "x", *more])).is_covered_by(Callback.parse_prefix(url(prefix)))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param("https://a.example/cb", "https://a.example/cb", True, id="the same"),
        pytest.param("https://a.example/cb", "https://A.example:443/cb/", True, id="the same in other words"),
        pytest.param("https://a.example/cb", "https://a.example/cb/x", True, id="below"),
        pytest.param("https://a.example/cb", "https://a.example", True, id="above"),
        pytest.param("https://a.example/cb", "https://a.example/cbx", False, id="beside"),
        pytest.param("https://a.example/cb", "http://a.example/cb", False, id="other scheme"),
        pytest.param("https://a.example/cb", "https://a.example:8443/cb", False, id="other port"),
    ],
)
def test_overlaps(one: str, other: str, expected: bool) -> None:
    first, second = Callback.parse_prefix(one), Callback.parse_prefix(other)
    assert (first.overlaps(second), second.overlaps(first)) == (expected, expected)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("My super bot!", "My super bot!", id="as it is"),
        pytest.param("  My  bot ", "My  bot", id="blanks around"),
        pytest.param("a\tb\r\nc\x00\x1b[31m\x7f\x9b", "abc[31m", id="controls"),
        pytest.param(
            "\u202eabc\u202c\u2066d\u2069\u200e\u200f\u061c\u202a\u202b\u202d\u2067\u2068", "abcd", id="bidirectional"
        ),
        pytest.param("a\u2028b\u2029c", "abc", id="separators"),
        pytest.param(" \x00 \u202e ", "", id="nothing else"),
        pytest.param("👩\u200d💻 Ünïcode", "👩\u200d💻 Ünïcode", id="joined emoji"),
        pytest.param("a\ud800b", "ab", id="lone surrogate"),
        pytest.param("", "", id="empty"),
    ],
)
def test_clean_name(name: str, expected: str) -> None:
    assert clean_name(name) == expected


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("my SUPER bot", id="case"),
        pytest.param("Ｍｙ Ｓｕｐｅｒ Ｂｏｔ", id="wide letters"),
        pytest.param("𝐌𝐲 𝓢𝓾𝓹𝓮𝓻 𝔹𝕠𝕥", id="mathematical letters"),
        pytest.param("My Ⓢⓤⓟⓔⓡ Bot", id="circled letters"),
        pytest.param(" My Super  Bot ", id="more blanks"),
        pytest.param("My\u00a0Super\u3000Bot", id="other blanks"),
        pytest.param("My Su\u202eper Bot", id="direction override"),
        pytest.param("My Su\u200bper B\u200dot", id="zero width characters"),
        pytest.param("My Su\u00adper Bot", id="soft hyphen"),
        pytest.param("My Super Bot\ufe0f\u3164\u2800", id="characters that show nothing"),
        pytest.param("My Super Bot\U000e0041", id="tag"),
        pytest.param("M\x00y Super Bot\n", id="controls"),
    ],
)
def test_names_that_look_alike(other: str) -> None:
    assert name_key(other) == name_key("My Super Bot")


@pytest.mark.parametrize(
    "other", ["My Super Bot!", "MySuper Bot", "My Super Bots", "My Süper Bot", "Your Super Bot", ""]
)
def test_names_that_do_not(other: str) -> None:
    assert name_key(other) != name_key("My Super Bot")


@given(st.text())
def test_a_name_s_key_is_its_own_key(name: str) -> None:
    assert clean_name(clean_name(name)) == clean_name(name)
    assert name_key(name_key(name)) == name_key(name) == name_key(clean_name(name))
