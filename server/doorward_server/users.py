"""Users: the people whose connections, identities and keys hang together. Imports `models` and below."""

import re
from dataclasses import dataclass

import peewee
from slugify import slugify

from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import EmailTaken, InvalidEmail, InvalidName, SlugTaken, UserNotFound
from doorward_server.models import User

# The handle that stands for the session's own user; no slug may shadow it.
ME = "me"
_LONGEST_NAME = 100
_LARGEST_ID = 2**63 - 1
# What must hold of every deliverable address (RFC 5321, section 4.5.3.1.3); the rest only mail can tell.
_EMAIL = re.compile(r"[^\s@\x00-\x1f\x7f\ud800-\udfff]{1,64}@[^\s@\x00-\x1f\x7f\ud800-\udfff]{1,255}")


def find_id(handle: str) -> int | None:
    """The numeric id that a handle spells, if it spells one."""
    if not (handle.isascii() and handle.isdigit()):
        return None
    number = int(handle[:20])
    return number if str(number) == handle and number <= _LARGEST_ID else None


@dataclass(frozen=True)
class Users:
    """Owns the table `users`."""

    database: Database
    clock: Clock

    def create(self, name: str, email: str | None = None) -> User:
        """Add a user; the slug comes from the name. Raises InvalidName, InvalidEmail, SlugTaken, EmailTaken."""
        slug = slugify(name)
        if not slug or slug.isdigit() or slug == ME or len(name) > _LONGEST_NAME or not name.isprintable():
            raise InvalidName
        if email is not None and not _EMAIL.fullmatch(email):
            raise InvalidEmail
        try:
            with self.database.writing():
                return User.create(slug=slug, name=name, email=email, created_at=self.clock.now())
        except peewee.IntegrityError as error:
            raise EmailTaken if "email" in str(error) else SlugTaken from None

    def get(self, handle: str) -> User:
        """The user with this numeric id or slug; raises UserNotFound."""
        if not handle.isascii():  # no slug is, and not every such text can be asked for
            raise UserNotFound
        number = find_id(handle)
        wanted = User.id == number if number is not None else User.slug == handle
        for user in self.database.fetch_all(User.select().where(wanted)):
            return user  # type: ignore[no-any-return]
        raise UserNotFound
