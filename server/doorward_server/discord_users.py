"""Discord users: people known by their snowflake alone, until an API client links them. Imports `models` and below."""

import secrets
from dataclasses import dataclass
from functools import partial

from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import InvalidUserId
from doorward_server.models import USER_OF_IDENTITY, OAuthIdentity, User
from doorward_server.providers import DISCORD

# The provider of their identities; the subject is the snowflake's decimal text.
PROVIDER = DISCORD
_MOST_DIGITS = 20


def parse_snowflake(text: str) -> str:
    """A snowflake as its decimal text without leading zeros: 1 to 20 digits, below 2^64. Raises InvalidUserId."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS) or int(text) >= 2**64:
        raise InvalidUserId
    return str(int(text))


@dataclass(frozen=True)
class DiscordUsers:
    """Finds and makes the users behind snowflakes, which are as `parse_snowflake` gives them."""

    database: Database
    clock: Clock

    def find(self, snowflake: str) -> User | None:
        """The user with this Discord identity, whoever linked it."""
        row = self.database.fetch_one(USER_OF_IDENTITY, (PROVIDER, snowflake))
        return User.from_row(row) if row else None

    def obtain(self, snowflake: str) -> User:
        """As `find`; on this person's first own action makes the user, of no client, and the identity.

        Outside of transactions, for it has one of its own.
        """
        return self.find(snowflake) or self.database.write(partial(self._obtain, snowflake))

    def _obtain(self, snowflake: str) -> User:
        """Inside a transaction, in which nobody else writes: another process may have been first."""
        row = self.database.execute(USER_OF_IDENTITY, (PROVIDER, snowflake))
        if row is not None:
            return User.from_row(row)
        now = self.clock.now()
        user = User.create(slug=_free_slug(snowflake), name=f"Discord user {snowflake}", created_at=now)
        OAuthIdentity.create(user=user, provider=PROVIDER, subject=snowflake, created_at=now)
        return user


def _free_slug(snowflake: str) -> str:
    """`discord-` and the snowflake; with an addition when a client's user is called so, who must not be in the way."""
    slug = f"discord-{snowflake}"
    while User.select().where(User.slug == slug).exists():
        slug = f"discord-{snowflake}-{secrets.token_hex(4)}"
    return slug
