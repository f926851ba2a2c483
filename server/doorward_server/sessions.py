"""Sessions: what a browser's cookie stands for. Imports `users`, `models` and below."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import peewee

from doorward_server.clock import Clock
from doorward_server.crypto import fingerprint, make_secret
from doorward_server.database import Database
from doorward_server.errors import SessionNotFound, UserNotFound
from doorward_server.models import Session, User, to_micros
from doorward_server.upkeep import Sweep

COOKIE = "doorward_session"
# Answered by the index sessions_token alone.
_FIND = "SELECT id, user_id FROM sessions WHERE token_hash = ? AND expires_at > ?"
_SLUG = "SELECT slug FROM users WHERE id = ?"


class SessionUser(NamedTuple):
    """Whose session it is."""

    session_id: int
    user_id: int


@dataclass(frozen=True)
class Sessions:
    """Owns the table `sessions`."""

    database: Database
    clock: Clock
    lifetime: timedelta

    def create(self, user: User, replacing: Sequence[str] = ()) -> tuple[Session, str]:
        """Start a session; returns it and the cookie's value, which is stored nowhere. Raises UserNotFound.

        `replacing` are cookies' values, whose sessions end in the same step.
        """
        cookie, now = make_secret(), self.clock.now()
        try:
            with self.database.writing():
                if replacing:
                    Session.delete().where(Session.token_hash.in_([*map(fingerprint, replacing)])).execute()
                session = Session.create(
                    user=user,
                    token_hash=fingerprint(cookie),
                    created_at=now,
                    expires_at=now + self.lifetime,
                )
        except peewee.IntegrityError:
            raise UserNotFound from None
        return session, cookie

    def find(self, cookie: str) -> SessionUser | None:
        """The live session that a cookie's value stands for. On the path of every call."""
        row = self.database.fetch_one(_FIND, (fingerprint(cookie), to_micros(self.clock.now())))
        return SessionUser(*row) if row else None

    def slug(self, user: SessionUser) -> str | None:
        """The slug of a session's user, which few calls ask for."""
        row = self.database.fetch_one(_SLUG, (user.user_id,))
        return row[0] if row else None

    def list(self, user: User | None = None) -> list[Session]:
        """The live sessions, of one user or of all."""
        query = (
            Session.select(Session, User).join(User).where(Session.expires_at > self.clock.now()).order_by(Session.id)
        )
        return self.database.fetch_all(query.where(Session.user == user) if user else query)

    def revoke(self, session_id: int) -> None:
        """End a session; raises SessionNotFound."""
        with self.database.writing():
            if not Session.delete().where(Session.id == session_id).execute():
                raise SessionNotFound

    def log_out(self, caller: SessionUser) -> None:
        """End the session that a call came with; another call may have done so meanwhile."""
        with self.database.writing():
            Session.delete().where(Session.id == caller.session_id).execute()

    def log_out_everywhere(self, caller: SessionUser) -> None:
        """End all sessions of the user whose session a call came with."""
        with self.database.writing():
            Session.delete().where(Session.user == caller.user_id).execute()


def expired_sessions(kept: timedelta) -> Sweep:
    """Those that ended so long ago; nobody gets in with one in the meantime."""
    return Sweep("sessions", "expires_at <= ?", (kept,))
