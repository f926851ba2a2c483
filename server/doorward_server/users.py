"""Users: the people whose connections, identities and keys hang together. Imports `models` and below."""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import peewee
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from slugify import slugify

from doorward_server.clock import Clock
from doorward_server.database import Database
from doorward_server.errors import (
    EmailTaken,
    InvalidEmail,
    InvalidField,
    InvalidName,
    NotYourUser,
    SlugTaken,
    UserNotFound,
)
from doorward_server.models import User

# The handle that stands for the session's own user; no slug may shadow it.
ME = "me"
_BY_ID, _BY_SLUG = User.select_sql("WHERE id = ?"), User.select_sql("WHERE slug = ?")
_LONGEST_NAME = 100
_LARGEST_CONCEPTS = 32 << 10
_LARGEST_ID = 2**63 - 1
# What must hold of every deliverable address (RFC 5321, section 4.5.3.1.3); the rest only mail can tell.
_EMAIL = re.compile(r"[^\s@\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,64}@[^\s@\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}")


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

    def create(self, name: object, email: object = None, client_id: str | None = None) -> User:
        """Add a user of an API client's or of the operator's own; the slug comes from the name.

        Raises InvalidName and InvalidEmail, also for what is no text, SlugTaken and EmailTaken.
        """
        slug = slugify(name) if isinstance(name, str) and len(name) <= _LONGEST_NAME and name.isprintable() else ""
        if not slug or slug.isdigit() or slug == ME:
            raise InvalidName
        if email in (None, ""):
            email = None
        elif not isinstance(email, str) or not _EMAIL.fullmatch(email):
            raise InvalidEmail
        try:
            with self.database.writing():
                return User.create(
                    slug=slug,
                    name=name,
                    email=email,
                    email_key=unicodedata.normalize("NFC", email.casefold()) if email else None,
                    client=client_id,
                    created_at=self.clock.now(),
                )
        except peewee.IntegrityError as error:
            raise EmailTaken if "email" in str(error) else SlugTaken from None

    def get(self, handle: str) -> User:
        """The user with this numeric id or slug; raises UserNotFound."""
        if not (handle.isascii() and handle.isprintable()):  # every slug is, and not every other text can be asked for
            raise UserNotFound
        number = find_id(handle)
        row = self.database.fetch_one(*((_BY_SLUG, (handle,)) if number is None else (_BY_ID, (number,))))
        if row is None:
            raise UserNotFound
        return User.from_row(row)

    def get_of(self, client_id: str, handle: str) -> User:
        """As `get`, for an API client; raises NotYourUser for a user that it did not create."""
        user = self.get(handle)
        if user.client_id != client_id:
            raise NotYourUser
        return user

    def update(self, user: User, changes: Mapping[str, object]) -> None:
        """Set those fields of the profile that a JSON object holds, in one step; null is a field's default.

        The object is as documented for PATCH; members that are not known are ignored. Raises
        InvalidField, UserNotFound.
        """
        try:
            profile = _Profile.model_validate(changes)
        except ValidationError as error:
            path = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise InvalidField({"field": path}) from None
        columns = profile.columns()
        if not columns:
            return
        with self.database.writing():
            if not User.update(**columns).where(User.id == user.id).execute():
                raise UserNotFound


# What an API client may set


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, alias_generator=to_camel)

    @model_validator(mode="before")
    @classmethod
    def _reset_nulls(cls, members: object) -> object:
        if not isinstance(members, Mapping):
            return members
        defaults = {field.alias: field.default for field in cls.model_fields.values()}
        return {key: _whole_default(defaults.get(key)) if value is None else value for key, value in members.items()}

    def columns(self) -> dict[str, Any]:
        """The given members, with their paths as columns' names."""
        columns: dict[str, Any] = {}
        for name in self.model_fields_set:
            value = getattr(self, name)
            if isinstance(value, _Document):
                columns |= {f"{name}_{key}": inner for key, inner in value.columns().items()}
            else:
                columns[name] = value
        return columns


def _whole_default(default: object) -> object:
    """A default with every member of its own named, so that each of them is set."""
    return default.model_dump(by_alias=True) if isinstance(default, _Document) else default


def _whole(value: object) -> object:
    """JSON has one kind of number: 3 may arrive as 3.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _moment(value: object) -> object:
    """A time with an offset from UTC (ISO 8601)."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("it has to be a string")  # noqa: TRY004 - what pydantic expects
    time = datetime.fromisoformat(value)
    if time.tzinfo is None:
        raise ValueError("it lacks its offset from UTC")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is out of range") from None


def _of_bearable_size(value: dict[str, Any]) -> dict[str, Any]:
    """It stands in every answer that shows the user."""
    if len(json.dumps(value, ensure_ascii=False).encode()) > _LARGEST_CONCEPTS:
        raise ValueError("it is too large")
    return value


class _Term(_Document):
    active: bool = False
    ends_at: Annotated[datetime | None, BeforeValidator(_moment)] = Field(None, alias="ends")


class _Stats(_Document):
    games_completed: Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**31)] = 0
    play_time: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    concepts: Annotated[dict[str, Any], AfterValidator(_of_bearable_size)] = {}


class _Profile(_Document):
    role: Annotated[str, Field(max_length=64)] = ""
    license: _Term = _Term()
    subscription: _Term = _Term()
    stats: _Stats = _Stats()
