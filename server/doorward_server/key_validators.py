"""Judging keys: whether the service that a key is for knows it, and whose it is there.

Imports `outbound`, `validators`, `providers` and `errors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from doorward_server.errors import (
    KeyRejected,
    ProviderMalformed,
    ProviderTimeout,
    ProviderUnavailable,
    ServiceUnavailable,
)
from doorward_server.outbound import Outbound, Timeouts
from doorward_server.providers import member_at
from doorward_server.validators import BUILT_IN, Validator, with_key

_TOO_MANY_REQUESTS = 429
# What stands in a user's list of keys has to be bearable there.
_LONGEST_TEXT = 200
_MOST_PERMISSIONS = 100


@dataclass(frozen=True)
class KeyFacts:
    """What a service tells of a key: its name there, the account that it opens, and what it may do there.

    All of it was written by others; only printable characters are left of it.
    """

    name: str | None
    account: str
    permissions: list[str]


class KeyValidators:
    """Asks the services that have a validator: one of the settings, else a built-in one."""

    def __init__(self, outbound: Outbound, configured: Mapping[str, Validator]) -> None:
        self._outbound = outbound
        self._validators = {**BUILT_IN, **configured}

    def check(self, service: str, value: str) -> KeyFacts | None:
        """Ask a service about a key, by two requests; None when it has no validator.

        Raises KeyRejected (a 4xx; an answer that is no JSON object, or names no account), ServiceUnavailable, Busy.
        """
        validator = self._validators.get(service)
        if validator is None or not validator.enabled:
            return None
        of_key = self._ask(validator, validator.tokeninfo_url, value)
        of_account = self._ask(validator, validator.account_url, value)
        account = _text(member_at(of_account, validator.account_property))
        if account is None:
            raise KeyRejected
        return KeyFacts(
            name=_text(member_at(of_key, validator.name_property)),
            account=account,
            permissions=_texts(member_at(of_key, validator.permissions_property)),
        )

    def _ask(self, validator: Validator, template: str | None, value: str) -> dict[str, Any]:
        target = with_key(template or "", value)
        if target is None:
            raise KeyRejected
        url, headers = target
        timeouts = Timeouts(validator.connect_timeout, validator.read_timeout, validator.timeout)
        try:
            answer = self._outbound.request(
                "GET", url, provider_id=f"key:{validator.service}", timeouts=timeouts, headers=headers
            )
        except (ProviderUnavailable, ProviderTimeout, ProviderMalformed) as failure:
            raise ServiceUnavailable(cause=failure.cause or failure.reason) from failure
        if 400 <= answer.status < 500 and answer.status != _TOO_MANY_REQUESTS:  # noqa: PLR2004
            raise KeyRejected
        if not 200 <= answer.status < 300:  # noqa: PLR2004
            raise ServiceUnavailable(cause=f"status {answer.status}")
        members = answer.json_object()
        if members is None:
            raise KeyRejected
        return members


def _text(value: object) -> str | None:
    """A string, or a whole number as its decimal text, without what is not printable; None when nothing is left."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    return "".join(one for one in value if one.isprintable()).strip()[:_LONGEST_TEXT] or None


def _texts(value: object) -> list[str]:
    texts = [_text(one) for one in value] if isinstance(value, list) else []
    return [text for text in texts if text is not None][:_MOST_PERMISSIONS]
