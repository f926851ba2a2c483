"""What a person sees: the consent dialogue, and the application it sends them back to."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit, urlunsplit

from aiohttp import hdrs, web

from . import pages
from .grants import CLIENTS
from .state import SANDBOX, first_values, form_pairs

DEFAULT_USER = "ada"
CALLBACK_PATH = "/app/callback"

_PAGE_HEADERS = {
    hdrs.CACHE_CONTROL: "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "Referrer-Policy": "no-referrer",  # a callback's address holds its code
}


@dataclass(frozen=True)
class Authorization:
    """An authorization request whose client and redirect URI are in order."""

    client_id: str
    redirect_uri: str
    state: str
    scope: str

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> "Authorization":
        """Refuse with a page, since a dubious redirect URI is not to be followed."""
        client_id = parameters.get("client_id", "")
        redirect_uri = parameters.get("redirect_uri", "")
        if client_id not in CLIENTS:
            raise _bad_request(f"No application is registered as “{client_id}”.")
        if not _is_loopback(redirect_uri):
            raise _bad_request(f"“{redirect_uri}” is no redirect URI on the loopback network.")
        return cls(client_id, redirect_uri, parameters.get("state", ""), parameters.get("scope", ""))

    def redirect(self, **answer: str) -> web.Response:
        """Send the browser back. By 303, so that it comes with a GET whatever it sent here."""
        if self.state:
            answer["state"] = self.state
        parts = urlsplit(self.redirect_uri)
        query = "&".join(filter(None, [parts.query, urlencode(answer)]))
        location = urlunsplit(parts._replace(query=query))
        headers = {hdrs.LOCATION: location, hdrs.CACHE_CONTROL: "no-store"}
        return web.Response(status=303, headers=headers)


async def index(request: web.Request) -> web.Response:
    origin = str(request.url.origin())
    example = {
        "response_type": "code",
        "client_id": "flo-client",
        "redirect_uri": origin + CALLBACK_PATH,
        "state": "xyz",
        "scope": "profile offline_access",
    }
    return _page(pages.index(f"/authorize?{urlencode(example)}"))


async def ask_consent(request: web.Request) -> web.Response:
    authorization = Authorization.parse(request.query)
    if request.query.get("response_type") != "code":
        return authorization.redirect(error="unsupported_response_type")
    fields = {
        "client_id": authorization.client_id,
        "redirect_uri": authorization.redirect_uri,
        "state": authorization.state,
        "scope": authorization.scope,
    }
    return _page(pages.consent(fields, DEFAULT_USER))


async def take_consent(request: web.Request) -> web.Response:
    form = first_values(form_pairs(request, await request.read()))
    authorization = Authorization.parse(form)
    if form.get("decision") != "allow":
        return authorization.redirect(error="access_denied")
    code = request.app[SANDBOX].grants.mint_code(
        authorization.client_id,
        authorization.redirect_uri,
        form.get("user", "").strip() or DEFAULT_USER,
        authorization.scope,
    )
    return authorization.redirect(code=code)


async def callback(request: web.Request) -> web.Response:
    """Play the application: hand the code to the person, or to the script, that came."""
    code = request.query.get("code")
    wants_page = "text/html" in request.headers.get(hdrs.ACCEPT, "")
    if code is None:
        reason = request.query.get("error", "there is no code in this address")
        if wants_page:
            raise _bad_request(f"The provider gave no code: {reason}.")
        return web.Response(status=400, text=f"{reason}\n")
    if not wants_page:
        return web.Response(text=f"{code}\n")
    gateway = f"http://127.0.0.1:{os.environ.get('DOORWARD_GATEWAY_PORT', '8080')}"
    return _page(pages.callback(code, request.query.get("state"), gateway))


async def health(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


def _is_loopback(uri: str) -> bool:
    """Whether it is an absolute http(s) URL of this machine, without a fragment."""
    if not (uri.isascii() and uri.isprintable()) or "#" in uri or " " in uri:
        return False
    try:
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https"):
            return False
        return parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _page(html: str) -> web.Response:
    return web.Response(text=html, content_type="text/html", headers=_PAGE_HEADERS)


def _bad_request(reason: str) -> web.HTTPBadRequest:
    html = pages.refusal(reason)
    return web.HTTPBadRequest(text=html, content_type="text/html", headers=_PAGE_HEADERS)
