"""Providers: which lookup URLs are accepted, and how an access token is put into one."""

from urllib.parse import unquote

import pytest
from pydantic import ValidationError

from doorward_server.providers import Provider

URL = "https://login.example/me?t={access_token}"


def identity(lookup_url: str = URL, lookup_id_property: str = "id") -> Provider:
    return Provider(id="login", kind="identity", lookup_url=lookup_url, lookup_id_property=lookup_id_property)


# Where the token goes


@pytest.mark.parametrize(
    ("template", "url"),
    [
        pytest.param("https://l.example/me?t={access_token}", "https://l.example/me?t=TOKEN", id="ours"),
        pytest.param("https://l.example/me?t=<%= accessToken %>", "https://l.example/me?t=TOKEN", id="the seed's"),
        pytest.param("https://l.example/me?t=<%=accessToken%>", "https://l.example/me?t=TOKEN", id="without blanks"),
        pytest.param("https://l.example/me?t=<%=\t accessToken  %>", "https://l.example/me?t=TOKEN", id="more blanks"),
        pytest.param("https://l.example/{access_token}/me", "https://l.example/TOKEN/me", id="in the path"),
        pytest.param("https://l.example/<%= accessToken %>", "https://l.example/TOKEN", id="the seed's, in the path"),
        pytest.param("https://l.example?{access_token}", "https://l.example?TOKEN", id="the whole query"),
        pytest.param("https://l.example/?{access_token}=1", "https://l.example/?TOKEN=1", id="a name in the query"),
        pytest.param("https://l.example/a-{access_token}-b?c", "https://l.example/a-TOKEN-b?c", id="in a segment"),
        pytest.param(
            "https://l.example/{access_token}?a=<%= accessToken %>&b={access_token}",
            "https://l.example/TOKEN?a=TOKEN&b=TOKEN",
            id="several times",
        ),
        pytest.param("http://127.0.0.1:9100/?t={access_token}", "http://127.0.0.1:9100/?t=TOKEN", id="plain http"),
        pytest.param("HTTPS://L.example/?t={access_token}", "HTTPS://L.example/?t=TOKEN", id="capitals"),
        pytest.param("https://[::1]:9100/?t={access_token}", "https://[::1]:9100/?t=TOKEN", id="IPv6"),
        pytest.param("https://l.example/?a=%20&t={access_token}", "https://l.example/?a=%20&t=TOKEN", id="encoded"),
        pytest.param("https://l.example/?{x}&t={access_token}", "https://l.example/?{x}&t=TOKEN", id="other braces"),
        pytest.param(
            "https://l.example/doorward-access-token?t={access_token}",
            "https://l.example/doorward-access-token?t=TOKEN",
            id="a path like our own marker",
        ),
    ],
)
def test_the_place_of_the_token(template: str, url: str) -> None:
    assert identity(template).lookup_url_for("TOKEN") == url


@pytest.mark.parametrize(
    ("token", "encoded"),
    [
        pytest.param("1234", "1234", id="digits"),
        pytest.param("aZ09-._~", "aZ09-._~", id="unreserved"),
        pytest.param("header.pay-load_.sig", "header.pay-load_.sig", id="like a JWT"),
        pytest.param("a&b=c", "a%26b%3Dc", id="ampersand and equals sign"),
        pytest.param("#", "%23", id="number sign"),
        pytest.param("a/b", "a%2Fb", id="slash"),
        pytest.param("../../admin", "..%2F..%2Fadmin", id="a path"),
        pytest.param("a?b", "a%3Fb", id="question mark"),
        pytest.param("a b", "a%20b", id="space"),
        pytest.param("a+b", "a%2Bb", id="plus"),
        pytest.param("100%", "100%25", id="percent"),
        pytest.param("%2F", "%252F", id="encoded already"),
        pytest.param("'\"", "%27%22", id="quotes"),
        pytest.param("\\1\\g<0>\\n", "%5C1%5Cg%3C0%3E%5Cn", id="backslashes"),
        pytest.param("{access_token}", "%7Baccess_token%7D", id="our placeholder"),
        pytest.param("<%= accessToken %>", "%3C%25%3D%20accessToken%20%25%3E", id="the seed's placeholder"),
        pytest.param("é", "%C3%A9", id="two bytes"),
        pytest.param("😀", "%F0%9F%98%80", id="emoji"),
        pytest.param("\r\nHost: evil", "%0D%0AHost%3A%20evil", id="line feed"),
        pytest.param("\x00\x7f", "%00%7F", id="control characters"),
        pytest.param("@:;,$!*()[]", "%40%3A%3B%2C%24%21%2A%28%29%5B%5D", id="other reserved ones"),
        pytest.param("x" * 16384, "x" * 16384, id="long"),
    ],
)
@pytest.mark.parametrize("template", [URL, "https://login.example/<%= accessToken %>/me"], ids=["query", "path"])
def test_the_token_is_percent_encoded(template: str, token: str, encoded: str) -> None:
    before, _, after = template.replace("<%= accessToken %>", "{access_token}").partition("{access_token}")
    assert identity(template).lookup_url_for(token) == before + encoded + after
    assert unquote(encoded) == token


_URL, _PLACE, _SECRET = "absolute http or https URL", "in its path or query", "user information or a fragment"


@pytest.mark.parametrize(
    ("template", "part"),
    [
        pytest.param("https://l.example/me", _PLACE, id="no place"),
        pytest.param("https://l.example", _PLACE, id="nothing but a host"),
        pytest.param("https://l.example/?t={accessToken}", _PLACE, id="another name"),
        pytest.param("https://l.example/?t={ACCESS_TOKEN}", _PLACE, id="capitals"),
        pytest.param("https://l.example/?t=%7Baccess_token%7D", _PLACE, id="an encoded place"),
        pytest.param("https://l.example/?t=<%- accessToken %>", _URL, id="another tag"),
        pytest.param("https://l.example/?t=<%= access_token %>", _URL, id="the names mixed"),
        pytest.param("https://l.example/doorward-access-token", _PLACE, id="our own marker"),
        pytest.param("https://{access_token}.example/", _PLACE, id="in the host"),
        pytest.param("https://{access_token}/", _PLACE, id="as the host"),
        pytest.param("https://l.example.{access_token}/?t={access_token}", _PLACE, id="in the host, and in the query"),
        pytest.param("https://l.example:{access_token}/", _URL, id="as the port"),
        pytest.param("https://{access_token}@l.example/", _SECRET, id="as the user"),
        pytest.param("https://ada:{access_token}@l.example/", _SECRET, id="as the password"),
        pytest.param("https://ada@l.example/{access_token}", _SECRET, id="with a user"),
        pytest.param("https://l.example/#{access_token}", _SECRET, id="in the fragment"),
        pytest.param("https://l.example/{access_token}#top", _SECRET, id="with a fragment"),
        pytest.param("{access_token}://l.example/", _URL, id="as the scheme"),
        pytest.param("http{access_token}://l.example/", _URL, id="in the scheme"),
        pytest.param("{access_token}", _URL, id="as the URL"),
        pytest.param("/me?t={access_token}", _URL, id="relative"),
        pytest.param("//l.example/?t={access_token}", _URL, id="no scheme"),
        pytest.param("ftp://l.example/{access_token}", _URL, id="ftp"),
        pytest.param("file:///etc/{access_token}", _URL, id="file"),
        pytest.param("javascript:{access_token}", _URL, id="javascript"),
        pytest.param("https:///{access_token}", _URL, id="no host"),
        pytest.param("https://l.example:0/{access_token}", _URL, id="port 0"),
        pytest.param("https://l .example/{access_token}", _URL, id="blank in the host"),
        pytest.param("https://l.example/a b/{access_token}", _URL, id="blank in the path"),
        pytest.param("https://l.example/{access_token}\n", _URL, id="line feed"),
        pytest.param("", _URL, id="empty"),
    ],
)
def test_a_template_that_is_refused(template: str, part: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        identity(template)
    [error] = refusal.value.errors()
    assert error["loc"] == ("lookup_url",)
    assert part in error["msg"]


# Where the id is


@pytest.mark.parametrize("path", ["id", "data.id", "a.b.c.d", "user-id", "$t", "ID", "0", "é", " "])
def test_a_path_to_the_id(path: str) -> None:
    assert identity(lookup_id_property=path).lookup_id_property == path


@pytest.mark.parametrize("path", ["", ".", "id.", ".id", "data..id", "..."])
def test_a_path_that_is_refused(path: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        identity(lookup_id_property=path)
    [error] = refusal.value.errors()
    assert error["loc"] == ("lookup_id_property",)
    assert "several with a dot between them" in error["msg"]


# How long it may take


@pytest.mark.parametrize(
    ("token_url", "lookup_url", "longest"),
    [
        pytest.param("https://l.example/token", URL, 6, id="exchange and lookup"),
        pytest.param(None, URL, 3, id="lookup alone"),
        pytest.param("https://l.example/token", None, 3, id="exchange alone"),
    ],
)
def test_the_longest_call(token_url: str | None, lookup_url: str | None, longest: float) -> None:
    kind = "identity" if lookup_url else "kai"
    more = {} if lookup_url else {"client_id": "x", "client_secret": "y", "redirect_uri": "https://app.example/"}
    settings = {"id": "flo", "kind": kind, "token_url": token_url, "lookup_url": lookup_url, "timeout": 3, **more}
    assert Provider.model_validate(settings).longest_call == longest
