"""Provider: an OAuth 2 service that users connect to or log in with, as the operator described it.

Imports nothing of the project.
"""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit

import idna
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

KAI_TYPES = ("flo", "min", "eag")
# The provider of the identities of people in Discord, whether it is configured or not.
DISCORD = "discord"
_NO_BLANKS = re.compile(r"[^\s\x00-\x1f\x7f]+")
_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")
# `<%= accessToken %>` is how templates of other programs write it.
_PLACEHOLDER = re.compile(r"\{access_token\}|<%=\s*accessToken\s*%>")
_PROVIDER_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def _http_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and _is_host(parts.hostname or "") and parts.port != 0
    except ValueError:
        good = False
    if not good or not _NO_BLANKS.fullmatch(url):
        raise ValueError("it has to be an absolute http or https URL")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("it must not hold user information or a fragment")
    return url


def _is_host(host: str) -> bool:
    """Whether requests can be made to a host: an address in its usual form, or a name of whole labels."""
    if ":" in host or _DIGITS_AND_DOTS.fullmatch(host):
        ipaddress.ip_address(host.partition("%")[0])
        return True
    return bool(idna.encode(host, uts46=True))


def _lookup_template(template: str) -> str:
    """A URL with the access token's place in its path or query: in no other part would it be safe."""
    marker = "doorward-access-token"
    url = _http_url(_PLACEHOLDER.sub(marker, template))
    if not _PLACEHOLDER.search(template) or marker in urlsplit(url).netloc:
        raise ValueError("it has to hold {access_token} in its path or query, where the access token is to be put")
    return template


def _dotted_name(path: str) -> str:
    if not all(path.split(".")):
        raise ValueError("it has to be a member's name, or several with a dot between them")
    return path


def percent_encoded(text: str) -> str:
    """A text as one segment of a path, or one value of a query."""
    encoded = quote(text, safe="")
    # As a segment of a path, dots would lead elsewhere.
    return encoded if encoded.strip(".") else encoded.replace(".", "%2E")


def member_at(value: object, path: str) -> object:
    """What stands at a dotted name in a JSON value, None when nothing does."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


HttpUrl = Annotated[str, AfterValidator(_http_url)]
DottedName = Annotated[str, AfterValidator(_dotted_name)]
# kai: flo, min or eag, whose tokens are kept. identity: a service that users log in with.
Kind = Literal["kai", "identity"]
# How the token endpoint knows us (RFC 6749, section 2.3.1).
TokenAuth = Literal["client_secret_post", "client_secret_basic", "none"]
TokenMethod = Literal["post", "get"]
LookupTemplate = Annotated[str, AfterValidator(_lookup_template)]


class SettingsMissing(ValueError):
    """A provider of this kind cannot do without these settings."""

    def __init__(self, kind: str, names: Sequence[str]) -> None:
        super().__init__(f'kind = "{kind}" needs {", ".join(names)}: add what is missing')
        self.kind = kind
        self.names = names


class Provider(BaseModel):
    """One `[providers.ID]` section. Times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    kind: Kind
    authorize_url: HttpUrl | None = None
    token_url: HttpUrl | None = None
    # Where tokens are revoked when a user disconnects (RFC 7009); without it nothing is sent.
    revocation_url: HttpUrl | None = None
    # Answers whose account an access token is for: an http(s) URL with {access_token} in its path or query.
    lookup_url: LookupTemplate | None = None
    # Where the account's id stands in that answer; `a.b` is the member b of the object a.
    lookup_id_property: DottedName = "id"
    client_id: str | None = Field(None, min_length=1)
    client_secret: SecretStr | None = Field(None, min_length=1)
    # A file that holds the secret, relative to the settings file.
    client_secret_file: Path | None = None
    token_auth: TokenAuth = "client_secret_post"  # noqa: S105
    token_method: TokenMethod = "post"  # noqa: S105
    redirect_uri: HttpUrl | None = None
    scopes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    # One request, from the name lookup to the last byte.
    timeout: float = Field(5.0, gt=0, le=60)
    connect_timeout: float = Field(2.0, gt=0, le=60)
    # Between two bytes of the answer.
    read_timeout: float = Field(5.0, gt=0, le=60)

    @model_validator(mode="after")
    def _is_complete(self) -> "Provider":
        if not _PROVIDER_ID.fullmatch(self.id):
            raise ValueError("a provider's id is made of a-z, 0-9, `-` and `_`, at most 64 of them: rename it")
        if self.client_secret is not None and self.client_secret_file is not None:
            raise ValueError("client_secret and client_secret_file contradict each other: keep one")
        if missing := [name for name in self._required() if getattr(self, name) is None]:
            raise SettingsMissing(self.kind, missing)
        if self.kind == "kai" and self.id not in KAI_TYPES:
            raise ValueError("the kind kai is for the ids flo, min and eag: choose one of these, or the kind identity")
        return self

    def _required(self) -> list[str]:
        if self.kind == "identity":
            return ["lookup_url"]
        required = ["token_url", "client_id", "redirect_uri"]
        if self.token_auth != "none" and self.client_secret_file is None:  # noqa: S105
            required.append("client_secret")
        return required

    @property
    def longest_call(self) -> float:
        """Seconds that one call may wait for it: an exchange of the code, then a lookup."""
        return self.timeout * (2 if self.token_url and self.lookup_url else 1)

    def lookup_url_for(self, access_token: str) -> str:
        """The lookup URL with a token in its place, percent-encoded."""
        return _PLACEHOLDER.sub(percent_encoded(access_token), self.lookup_url or "")

    @property
    def secret(self) -> str:
        """The client secret, "" when there is none."""
        return self.client_secret.get_secret_value() if self.client_secret else ""
