"""The providers at hand: those of the settings file and those that were added by command.

Imports `providers`, `crypto`, `models` and below.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import peewee
from pydantic import ValidationError

from doorward_server.clock import Clock
from doorward_server.crypto import KeyRing, Place
from doorward_server.database import Database
from doorward_server.errors import OperatorError, ProviderNotFound
from doorward_server.models import Connection, OAuthIdentity, StoredProvider
from doorward_server.providers import DISCORD, Provider

_TAKEN = "there is a provider {} already: remove it first, or choose another id"
_LIST = "SELECT id, settings, client_secret FROM providers"
_FIND = f"{_LIST} WHERE provider = ?"


@dataclass(frozen=True)
class ProviderRegistry:
    """Owns the table `providers`."""

    database: Database
    clock: Clock
    keys: KeyRing
    configured: Mapping[str, Provider]  # by id, of the settings file

    def find(self, provider_id: str) -> Provider | None:
        """The provider with this id; that of the settings file, should both have one."""
        provider = self.configured.get(provider_id)
        if provider is not None:
            return provider
        row = self.database.fetch_one(_FIND, (provider_id,))
        return _open(self.keys, *row) if row else None

    def get(self, provider_id: str) -> Provider:
        """As `find`; raises ProviderNotFound."""
        provider = self.find(provider_id)
        if provider is None:
            raise ProviderNotFound
        return provider

    def list(self) -> list[Provider]:
        """All of them, by id."""
        stored = [_open(self.keys, *row) for row in self.database.fetch_rows(_LIST, ())]
        by_id = {**{provider.id: provider for provider in stored}, **self.configured}
        return [by_id[provider_id] for provider_id in sorted(by_id)]

    def check_free(self, provider: Provider) -> None:
        """Raise OperatorError when there is a provider with this one's id."""
        if provider.id in self.configured:
            raise OperatorError(
                f"the provider {provider.id} stands in the settings file: change it there, or choose another id"
            )
        if self.find(provider.id) is not None:
            raise OperatorError(_TAKEN.format(provider.id))

    def add(self, provider: Provider) -> None:
        """Keep a provider, its secret sealed."""
        self.check_free(provider)
        if linked := self._count_linked(provider.id):
            raise OperatorError(
                f"{linked} of the users' identities are at an earlier provider {provider.id}, and would be taken for "
                f"accounts at this one: choose another id, or remove them by `provider remove {provider.id} --unlink`"
            )
        settings = provider.model_dump(
            mode="json", exclude={"client_secret", "client_secret_file"}, exclude_defaults=True
        )
        try:
            with self.database.writing():
                row = StoredProvider.create(provider=provider.id, settings=settings, created_at=self.clock.now())
                if provider.secret:
                    sealed = self.keys.seal(provider.secret, _secret_of(row.id))
                    StoredProvider.update(client_secret=sealed).where(StoredProvider.id == row.id).execute()
        except peewee.IntegrityError:
            raise OperatorError(_TAKEN.format(provider.id)) from None

    def remove(self, provider_id: str, *, unlink: bool) -> None:
        """Forget a provider.

        Identities at it would be anybody's whom a later provider of the same id gives the same number:
        so it goes only without them, or, with `unlink`, together with them.
        """
        if provider_id in self.configured:
            raise OperatorError(f"the provider {provider_id} stands in the settings file: remove its section there")
        with self.database.writing():
            if Connection.select().where(Connection.provider == provider_id).exists():
                raise OperatorError(f"users are connected to the provider {provider_id}: they have to disconnect first")
            linked = self._count_linked(provider_id)
            if linked and not unlink:
                raise OperatorError(
                    f"{linked} of the users' identities are at the provider {provider_id}: "
                    "give --unlink to remove these, too"
                )
            if linked:
                OAuthIdentity.delete().where(OAuthIdentity.provider == provider_id).execute()
            if not StoredProvider.delete().where(StoredProvider.provider == provider_id).execute() and not linked:
                raise ProviderNotFound

    def _count_linked(self, provider_id: str) -> int:
        """How many identities a removal would leave behind. Discord's are known without a provider, too."""
        if provider_id == DISCORD:
            return 0
        return int(OAuthIdentity.select().where(OAuthIdentity.provider == provider_id).count())


@lru_cache(maxsize=256)
def _open(keys: KeyRing, row_id: int, settings: str, client_secret: bytes | None) -> Provider:
    """The provider of a row. The whole row is the cache's key, so a change is seen at once."""
    secret = {"client_secret": keys.open(client_secret, _secret_of(row_id))} if client_secret else {}
    try:
        return Provider.model_validate({**json.loads(settings), **secret})
    except ValidationError:
        raise OperatorError(
            f"a provider that was added by an earlier version of Doorward is not valid for this one ({settings}): "
            "remove it, and add it anew"
        ) from None


def _secret_of(row_id: int) -> Place:
    return Place("providers", row_id, "client_secret")
