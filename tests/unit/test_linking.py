"""What changes while a provider is asked whose account it is."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doorward_server import models
from doorward_server import settings as settings_module
from doorward_server.app import App
from doorward_server.consents import Question, Status
from doorward_server.errors import CallError, IdentityTaken, ProviderNotFound, UserNotFound
from doorward_server.identities import Proof
from doorward_server.models import ApiClient, OAuthIdentity, User
from doorward_server.providers import Provider
from tests.unit.peers import Peer, answering

Meanwhile = Callable[[App], None]


@pytest.fixture
def during() -> list[Callable[[], None]]:
    """What the provider does before it answers."""
    return []


@pytest.fixture
def peer(during: list[Callable[[], None]]) -> Iterator[Peer]:
    def serve(connection: socket.socket, stopping: threading.Event) -> None:
        for action in during:
            action()
        answering(b'{"id":"7"}')(connection, stopping)

    with Peer(serve) as peer:
        yield peer


@pytest.fixture
def app(tmp_path: Path, peer: Peer) -> Iterator[App]:
    (tmp_path / "doorward.toml").write_text(f'[outbound]\nallow = ["{peer.address}"]\n')
    key = "DOORWARD_MASTER_KEY"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(key, "doorward-key-1:bedf4c16:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")
        app = App(settings_module.load(tmp_path))
    models.bind(app.database)
    yield app
    app.outbound.close()
    app.callback_outbound.close()
    app.database.close()


@pytest.fixture
def client(app: App) -> ApiClient:
    return app.clients.create("shop")[0]


@pytest.fixture
def user(app: App, client: ApiClient) -> User:
    return app.users.create("Ada", client_id=client.id)


def login(peer: Peer, property_: str = "id") -> Provider:
    return Provider(
        id="login", kind="identity", lookup_url=peer.url + "/?t={access_token}", lookup_id_property=property_
    )


def add(app: App, client: ApiClient, user: User) -> None:
    app.identities.add(client.id, user.slug, Proof("login", "token", None))


@pytest.mark.parametrize("later", [False, True], ids=["nothing follows", "another service follows"])
def test_an_identity_at_a_removed_provider_is_not_kept(
    app: App, peer: Peer, during: list[Callable[[], None]], client: ApiClient, user: User, *, later: bool
) -> None:
    """Else it would stand for somebody else's account at a later provider of the same id."""
    app.providers.add(login(peer))

    def replace() -> None:
        app.providers.remove("login", unlink=False)
        if later:
            app.providers.add(login(peer, "other.id"))

    during.append(replace)
    with pytest.raises(ProviderNotFound):
        add(app, client, user)
    assert app.database.fetch_all(OAuthIdentity.select()) == []


@pytest.mark.parametrize(
    ("meanwhile", "failure"),
    [
        pytest.param(lambda app: app.accounts.delete(app.users.get("ada")), UserNotFound, id="the user is deleted"),
        pytest.param(lambda app: app.providers.list(), None, id="nothing"),
    ],
)
def test_a_link_meanwhile(
    app: App,
    peer: Peer,
    during: list[Callable[[], None]],
    client: ApiClient,
    user: User,
    meanwhile: Meanwhile,
    failure: type[CallError] | None,
) -> None:
    app.providers.add(login(peer))
    during.append(lambda: meanwhile(app))
    if failure is None:
        add(app, client, user)
    else:
        with pytest.raises(failure):
            add(app, client, user)
    linked = app.database.fetch_all(OAuthIdentity.select())
    assert [identity.subject for identity in linked] == ([] if failure else ["7"])


# Adoption


def discord(peer: Peer) -> Provider:
    return Provider(id="discord", kind="identity", lookup_url=peer.url + "/?t={access_token}")


def test_a_linked_discord_user_s_keys_grants_and_blocks_are_adopted(
    app: App, peer: Peer, client: ApiClient, user: User
) -> None:
    app.providers.add(discord(peer))
    person = app.discord_users.obtain("7")
    key = app.api_keys.add(person, "game", "main", "EXAMPLE-KEY", actor="test")
    request_id = app.consents.request(Question("x", "7", "https://93.184.215.14/cb", "s"), None, "")
    app.consents.resolve(request_id, Status.GRANTED, [key.id], actor="test")
    app.consents.block(person, request_id, actor="test")
    profile = app.identities.add(client.id, user.slug, Proof("discord", "token", None))
    assert [(one.provider, one.subject) for one in profile.identities] == [("discord", "7")]
    assert [listed.key.id for listed in app.api_keys.list(user)] == [key.id]
    assert [key_ids for _, key_ids in app.consents.grants(user)] == [[key.id]]
    assert app.discord_users.find("7") == user
    assert {one.id for one in app.database.fetch_all(User.select())} == {user.id}
    # What is still to be delivered goes out with the adopted keys.
    assert app.api_keys.values([key.id]) == {key.id: "EXAMPLE-KEY"}


def test_an_identity_of_another_client_s_user_is_not_adopted(
    app: App, peer: Peer, client: ApiClient, user: User
) -> None:
    app.providers.add(discord(peer))
    other = app.users.create("Bob", client_id=app.clients.create("other")[0].id)
    app.identities.add(other.client_id or "", other.slug, Proof("discord", "token", None))
    with pytest.raises(IdentityTaken):
        app.identities.add(client.id, user.slug, Proof("discord", "token", None))
    assert app.discord_users.find("7") == other
