"""The providers at hand: kept sealed, found with those of the settings file, and removed with care."""

from collections.abc import Callable
from typing import Any

import pytest

from doorward_server.crypto import CannotOpen, KeyRing, MasterKey
from doorward_server.database import Database
from doorward_server.errors import OperatorError, ProviderNotFound
from doorward_server.models import Connection, OAuthIdentity, StoredProvider
from doorward_server.provider_registry import ProviderRegistry
from doorward_server.providers import Provider
from doorward_server.users import Users
from tests.unit.conftest import StoppedClock, in_files

SECRET = "hunter2sekret"
KEYS = KeyRing([MasterKey(b"k" * 32)])

Registry = Callable[..., ProviderRegistry]


def identity(provider_id: str = "login", **more: Any) -> Provider:
    """A provider to log in with."""
    settings = {"kind": "identity", "lookup_url": "https://login.example/me?t={access_token}", **more}
    return Provider(id=provider_id, **settings)


KAI = Provider(
    id="flo",
    kind="kai",
    token_url="https://flo.example/token",
    client_id="doorward",
    client_secret=SECRET,
    redirect_uri="https://app.example/connected",
)
FULL = identity(
    authorize_url="https://login.example/authorize",
    token_url="https://login.example/token",
    revocation_url="https://login.example/revoke",
    lookup_url="https://login.example/<%= accessToken %>/me",
    lookup_id_property="data.user.id",
    client_id="doorward",
    client_secret=SECRET,
    token_auth="client_secret_basic",
    token_method="get",
    redirect_uri="https://app.example/connected",
    scopes=("openid", "profile"),
    timeout=3.5,
    connect_timeout=1,
    read_timeout=2,
)


@pytest.fixture
def registry(database: Database, clock: StoppedClock) -> Registry:
    """A registry with these providers in its settings file; all of them share the database."""

    def registry(*configured: Provider) -> ProviderRegistry:
        return ProviderRegistry(database, clock, KEYS, {provider.id: provider for provider in configured})

    return registry


@pytest.fixture
def user_id(database: Database, clock: StoppedClock) -> int:
    return Users(database, clock).create("Ada").id


def link(registry: ProviderRegistry, user_id: int, provider_id: str, subject: str = "7") -> None:
    with registry.database.writing():
        OAuthIdentity.create(user=user_id, provider=provider_id, subject=subject, created_at=registry.clock.now())


def connect(registry: ProviderRegistry, user_id: int, provider_id: str) -> None:
    with registry.database.writing():
        Connection.create(
            user=user_id,
            provider=provider_id,
            access_token=b"sealed",
            obtained_at=registry.clock.now(),
            needs_reauth=False,
            lease_epoch=0,
            created_at=registry.clock.now(),
        )


def links(registry: ProviderRegistry) -> list[tuple[str, str]]:
    rows = registry.database.fetch_all(OAuthIdentity.select().order_by(OAuthIdentity.id))
    return [(row.provider, row.subject) for row in rows]


# Adding and finding


@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(identity(), id="least of all"),
        pytest.param(FULL, id="with everything"),
        pytest.param(KAI, id="kai"),
        pytest.param(identity(token_auth="none", token_url="https://login.example/token"), id="public client"),
        pytest.param(identity(client_secret="ключ"), id="secret beyond ASCII"),
    ],
)
def test_a_provider_comes_back_as_it_was(registry: Registry, provider: Provider) -> None:
    assert registry().find(provider.id) is None
    registry().add(provider)
    for again in (registry(), registry(identity("other"))):
        assert again.find(provider.id) == again.get(provider.id) == provider
        assert again.get(provider.id).secret == provider.secret


def test_providers_are_listed_by_id(registry: Registry) -> None:
    assert registry().list() == []
    for name in ("b", "d", "a"):
        registry().add(identity(name))
    assert [provider.id for provider in registry(identity("c"), KAI).list()] == ["a", "b", "c", "d", "flo"]


@pytest.mark.parametrize("provider_id", ["", "nothing", "LOGIN", "login ", "log%", "é"])
def test_unknown_providers(registry: Registry, provider_id: str) -> None:
    registry().add(identity())
    assert registry(KAI).find(provider_id) is None
    with pytest.raises(ProviderNotFound):
        registry(KAI).get(provider_id)
    with pytest.raises(ProviderNotFound):
        registry(KAI).remove(provider_id, unlink=True)
    assert registry().list() == [identity()]


def test_an_id_is_taken_once(registry: Registry) -> None:
    registry().add(FULL)
    with pytest.raises(OperatorError, match="there is a provider login already: remove it first, or choose another id"):
        registry().add(identity())
    assert registry().list() == [FULL]


def test_the_secret_is_sealed_at_its_place(registry: Registry, database: Database) -> None:
    registry().add(FULL)
    registry().add(identity("other", client_secret="another"))
    assert in_files(database, "data.user.id")
    assert not in_files(database, SECRET)
    assert SECRET not in repr(registry().get("login"))
    full, other = StoredProvider.select().order_by(StoredProvider.id)
    assert "client_secret" not in full.settings
    with database.writing():
        StoredProvider.update(client_secret=full.client_secret).where(StoredProvider.id == other.id).execute()
    with pytest.raises(CannotOpen):
        registry().get("other")
    assert registry().get("login") == FULL


# The settings file


def test_the_settings_file_wins(registry: Registry) -> None:
    registry().add(identity())
    configured = identity(lookup_url="https://other.example/{access_token}")
    both = registry(configured)
    assert (both.find("login"), both.get("login"), both.list()) == (configured, configured, [configured])
    assert registry().list() == [identity()]


def test_what_stands_in_the_settings_file_is_changed_there(registry: Registry) -> None:
    configured = registry(identity())
    with pytest.raises(OperatorError, match="login stands in the settings file: change it there, or choose another id"):
        configured.add(identity(client_id="other"))
    assert registry().list() == []
    for unlink in (False, True):
        with pytest.raises(OperatorError, match="login stands in the settings file: remove its section there"):
            configured.remove("login", unlink=unlink)
    assert configured.list() == [identity()]


# Removing


@pytest.mark.parametrize("unlink", [False, True])
def test_an_unused_provider_is_removed(registry: Registry, user_id: int, unlink: bool) -> None:
    registry().add(FULL)
    registry().add(identity("other"))
    link(registry(), user_id, "other")
    registry().remove("login", unlink=unlink)
    assert registry().list() == [identity("other")]
    assert links(registry()) == [("other", "7")]
    registry().add(identity())  # the id is free again


def test_identities_are_unlinked_on_demand_only(registry: Registry, user_id: int) -> None:
    for name in ("login", "other"):
        registry().add(identity(name))
        for subject in ("7", "8"):
            link(registry(), user_id, name, subject)
    with pytest.raises(
        OperatorError, match="2 of the users' identities are at the provider login: give --unlink to remove these, too"
    ):
        registry().remove("login", unlink=False)
    assert len(links(registry())) == 4
    registry().remove("login", unlink=True)
    assert links(registry()) == [("other", "7"), ("other", "8")]
    assert registry().list() == [identity("other")]


@pytest.mark.parametrize("unlink", [False, True])
def test_a_provider_that_users_are_connected_to_stays(registry: Registry, user_id: int, unlink: bool) -> None:
    registry().add(KAI)
    connect(registry(), user_id, "flo")
    link(registry(), user_id, "flo")
    with pytest.raises(OperatorError, match="users are connected to the provider flo: they have to disconnect first"):
        registry().remove("flo", unlink=unlink)
    assert registry().list() == [KAI]
    assert links(registry()) == [("flo", "7")]


def test_identities_of_an_earlier_provider_are_nobody_s_at_a_later_one(registry: Registry, user_id: int) -> None:
    """Of a section that the operator has taken out of the settings file, and may put back."""
    link(registry(), user_id, "login")
    with pytest.raises(OperatorError, match="1 of the users' identities are at an earlier provider login"):
        registry().add(identity("login"))
    assert registry().list() == []
    registry().remove("login", unlink=True)
    assert links(registry()) == []
    registry().add(identity("login"))
    with pytest.raises(ProviderNotFound):
        registry().remove("unknown", unlink=True)
