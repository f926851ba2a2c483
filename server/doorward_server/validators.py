"""Validator: how a service is asked about keys of its users, as the operator described it. Imports `providers`."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from doorward_server.providers import DottedName, HttpUrl, percent_encoded

_SERVICE = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_PLACEHOLDER = "{key}"


def is_service(name: str) -> bool:
    """Whether a service may have this name."""
    return _SERVICE.fullmatch(name) is not None


def _key_template(template: str) -> str:
    """A URL with the key's place in its path or query, or without one."""
    rest = template.replace(_PLACEHOLDER, "")
    if "{" in rest or "}" in rest:
        raise ValueError("the only placeholder is {key}, where the key is to be put")
    return template


# No host holds a brace, and no fragment is allowed, so the placeholder stands in the path or the query.
KeyUrl = Annotated[HttpUrl, AfterValidator(_key_template)]


class Validator(BaseModel):
    """One `[validators.SERVICE]` section. Times are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service: str
    # false: keys of this service are taken as they are.
    enabled: bool = True
    # Answer what a key may do, and whose it is: the key is put in place of {key}, percent-encoded; a URL
    # without that gets it as a bearer token (RFC 6750, section 2.1).
    tokeninfo_url: KeyUrl | None = None
    account_url: KeyUrl | None = None
    # Where the answer of `tokeninfo_url` holds the key's name, that of `account_url` the account's, and the former
    # the permissions, an array of strings; `a.b` is the member b of the object a.
    name_property: DottedName = "name"
    account_property: DottedName = "name"
    permissions_property: DottedName = "permissions"
    # One of the two requests, from the name lookup to the last byte.
    timeout: float = Field(5.0, gt=0, le=60)
    connect_timeout: float = Field(2.0, gt=0, le=60)
    # Between two bytes of the answer.
    read_timeout: float = Field(5.0, gt=0, le=60)

    @model_validator(mode="after")
    def _is_complete(self) -> "Validator":
        if not is_service(self.service):
            raise ValueError("a service's name is made of a-z, 0-9, `-` and `_`, at most 40 of them: rename it")
        missing = [name for name in ("tokeninfo_url", "account_url") if getattr(self, name) is None]
        if self.enabled and missing:
            raise ValueError(f"it needs {', '.join(missing)}: add what is missing, or set enabled = false")
        return self


def with_key(template: str, key: str) -> tuple[str, dict[str, str]] | None:
    """The URL and the headers of a request about a key; None when its header cannot hold the key."""
    if _PLACEHOLDER in template:
        return template.replace(_PLACEHOLDER, percent_encoded(key)), {}
    return (template, {"authorization": f"Bearer {key}"}) if key.isascii() else None


# Those that need no settings. https://wiki.guildwars2.com/wiki/API:2/tokeninfo
BUILT_IN: Mapping[str, Validator] = {
    "gw2": Validator(
        service="gw2",
        tokeninfo_url="https://api.guildwars2.com/v2/tokeninfo",
        account_url="https://api.guildwars2.com/v2/account",
    )
}
