"""Identity: the accounts at providers that users are linked to, and logging in with them.

Owns the table `oauth_identities`. Imports `oauth`, `provider_registry`, `sessions`, `users`, `failures`,
`models` and below.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import peewee

from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import (
    CodeRejected,
    IdentityNotFound,
    IdentityTaken,
    LookupRejected,
    LookupWithoutId,
    NoApiClient,
    NoSuchIdentity,
    NotYourUser,
    ProviderHasNoTokenUrl,
    ProviderNotFound,
    ProviderRequired,
    TokenOrCodeRequired,
    TokenOrCodeTooLong,
    TooManyIdentities,
    UserNotFound,
)
from doorward_server.failures import FailureLimit
from doorward_server.models import USER_OF_IDENTITY, OAuthIdentity, User, to_micros
from doorward_server.oauth import NoTokenGranted, OAuth
from doorward_server.provider_registry import ProviderRegistry
from doorward_server.providers import Provider
from doorward_server.sessions import Sessions
from doorward_server.users import Users

# Both may have to go into a URL, percent-encoded, which has its limits.
_LONGEST_PROOF = 16384
# All of them stand in every answer that shows the user.
_MOST_IDENTITIES = 50
_LINK = """
INSERT INTO oauth_identities (user_id, provider, subject, created_at) VALUES (?, ?, ?, ?)
ON CONFLICT (provider, subject) DO NOTHING
"""
_LINKED = """
SELECT user_id, (SELECT count(*) FROM oauth_identities WHERE user_id = ?) FROM oauth_identities
WHERE provider = ? AND subject = ?
"""
_IS_NOBODY_S = "SELECT 1 FROM users WHERE id = ? AND client_id IS NULL"
_ADOPT = "UPDATE oauth_identities SET user_id = ? WHERE user_id = ?"
_DELETE_USER = "DELETE FROM users WHERE id = ?"
_OF_USER = OAuthIdentity.select_sql("WHERE user_id = ? ORDER BY id")
_FAILED_ATTEMPTS = (CodeRejected, LookupRejected, LookupWithoutId, NoSuchIdentity, NotYourUser, NoApiClient)


class Profile(NamedTuple):
    """A user, and the identities in the order in which they were added."""

    user: User
    identities: list[OAuthIdentity]


@dataclass(frozen=True)
class Proof:
    """What is to prove whose account it is: JSON values, as the caller sent them."""

    provider: object
    access_token: object = field(repr=False)
    code: object = field(repr=False)


@dataclass(frozen=True)
class Identities:
    """Links, unlinks, and logs in."""

    database: Database
    clock: Clock
    oauth: OAuth
    providers: ProviderRegistry
    users: Users
    sessions: Sessions
    failures: FailureLimit
    # What else passes from one user (id) to another, each by its owner.
    adoptions: Sequence[Callable[[int, int], None]]

    def profile(self, user: User) -> Profile:
        """What the documents show of a user."""
        rows = self.database.fetch_rows(_OF_USER, (user.id,))
        return Profile(user, [OAuthIdentity.from_row(row) for row in rows])

    def add(self, client_id: str, handle: str, proof: Proof) -> Profile:
        """Link the account that a proof is for to a client's user. See AddOAuthIdentity for the errors."""
        user = self.users.get_of(client_id, handle)
        provider, subject = self._look_up(proof)
        try:
            self.database.write(partial(self._link, user, provider, subject))
        except peewee.IntegrityError:
            raise UserNotFound from None
        return self.profile(user)

    def _link(self, user: User, provider: Provider, subject: str) -> None:
        """Inside a transaction. The unique index decides who is first."""
        if self.providers.find(provider.id) != provider:
            raise ProviderNotFound  # removed meanwhile: a later one of the same id may be another service
        self.database.execute(_LINK, (user.id, provider.id, subject, to_micros(self.clock.now())))
        linked = self.database.execute(_LINKED, (user.id, provider.id, subject))
        if linked is None:
            raise IdentityTaken
        if linked[0] != user.id:
            self._adopt(linked[0], user.id)
        if linked[1] > _MOST_IDENTITIES:
            raise TooManyIdentities

    def _adopt(self, owner_id: int, user_id: int) -> None:
        """Let a user have what belongs to nobody's user: a Discord user, made before any client knew the person.

        Inside a transaction. Raises IdentityTaken when the owner is somebody's.
        """
        if self.database.execute(_IS_NOBODY_S, (owner_id,)) is None:
            raise IdentityTaken
        for adopt in self.adoptions:
            adopt(owner_id, user_id)
        self.database.execute(_ADOPT, (user_id, owner_id))
        self.database.execute(_DELETE_USER, (owner_id,))

    def remove(self, client_id: str, handle: str, provider_id: str, subject: str) -> Profile:
        """Unlink an account. Raises UserNotFound, NotYourUser, IdentityNotFound."""
        user = self.users.get_of(client_id, handle)
        with self.database.writing():
            linked = (
                (OAuthIdentity.user == user.id)
                & (OAuthIdentity.provider == provider_id)
                & (OAuthIdentity.subject == subject)
            )
            if not OAuthIdentity.delete().where(linked).execute():
                raise IdentityNotFound
        return self.profile(user)

    def log_in(
        self, proof: Proof, *, client_id: str | None, address: str, replacing: Sequence[str]
    ) -> tuple[Profile, str]:
        """Start a session; returns the profile and the cookie's value. See LogIn for the errors.

        `address` is where the attempt comes from, `replacing` the cookies that came with it.
        """
        with self._counted(client_id, address):
            if client_id is None and proof.access_token not in (None, ""):
                raise NoApiClient
            provider, subject = self._look_up(proof)
            user = self._find_user(provider, subject)
            if client_id is not None and user.client_id != client_id:
                raise NotYourUser
        _, cookie = self.sessions.create(user, replacing)
        return self.profile(user), cookie

    @contextmanager
    def _counted(self, client_id: str | None, address: str) -> Iterator[None]:
        """Counts the failures that whoever tries can be blamed for; a right proof is never refused for others."""
        try:
            yield
        except _FAILED_ATTEMPTS:
            self.failures.add(client_id or "", address)
            raise

    def _find_user(self, provider: Provider, subject: str) -> User:
        row = self.database.fetch_one(USER_OF_IDENTITY, (provider.id, subject))
        if row is None:
            raise NoSuchIdentity
        return User.from_row(row)

    def _look_up(self, proof: Proof) -> tuple[Provider, str]:
        """Ask the provider whose account it is: the provider, and the account's id there."""
        if not isinstance(proof.provider, str) or not proof.provider:
            raise ProviderRequired
        access_token, code = _text(proof.access_token), _text(proof.code)
        if access_token is None and code is None:
            raise TokenOrCodeRequired
        provider = self.providers.get(proof.provider)
        if provider.lookup_url is None:
            raise ProviderNotFound
        if access_token is None:
            access_token = self._exchange(provider, code or "")
        return provider, self.oauth.look_up(provider, access_token)

    def _exchange(self, provider: Provider, code: str) -> str:
        if provider.token_url is None:
            raise ProviderHasNoTokenUrl
        try:
            return self.oauth.exchange_code(provider, code).access_token
        except NoTokenGranted as failure:
            raise CodeRejected({"error": failure.cause} if failure.cause else None) from None


def _text(value: object) -> str | None:
    """A token or a code, None when there is none."""
    if value in (None, ""):
        return None
    if not isinstance(value, str):
        raise TokenOrCodeRequired
    if len(value.encode()) > _LONGEST_PROOF:
        raise TokenOrCodeTooLong
    return value
