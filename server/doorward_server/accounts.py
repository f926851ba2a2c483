"""Accounts: users together with all that hangs on them. Imports `identities`, `integrations` and below."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from doorward_server.api_keys import ApiKeys
from doorward_server.audit import Audit
from doorward_server.consents import Consents
from doorward_server.database import Database
from doorward_server.errors import UserNotFound
from doorward_server.identities import Identities, Profile
from doorward_server.integrations import Integrations
from doorward_server.models import User
from doorward_server.sessions import Sessions
from doorward_server.users import Users


@dataclass(frozen=True)
class Accounts:
    """What API clients do with their users, and operators with all of them."""

    database: Database
    users: Users
    identities: Identities
    integrations: Integrations
    sessions: Sessions
    api_keys: ApiKeys
    consents: Consents
    audit: Audit

    # For API clients

    def create(self, client_id: str, name: object, email: object) -> Profile:
        """Add a user of the client's. Raises what `Users.create` raises."""
        return self.identities.profile(self.users.create(name, email, client_id))

    def get(self, client_id: str, handle: str) -> Profile:
        """Raises UserNotFound, NotYourUser."""
        return self.identities.profile(self.users.get_of(client_id, handle))

    def update(self, client_id: str, handle: str, changes: Mapping[str, object]) -> Profile:
        """Change a user's profile. Raises UserNotFound, NotYourUser, and what `Users.update` raises."""
        self.users.update(self.users.get_of(client_id, handle), changes)
        return self.get(client_id, handle)

    def delete_of(self, client_id: str, handle: str) -> None:
        """Delete a user of the client's. Raises UserNotFound, NotYourUser."""
        self.delete(self.users.get_of(client_id, handle), actor=f"client:{client_id}")

    # For operators, too

    def delete(self, user: User, *, actor: str = "operator") -> None:
        """Delete a user and all that hangs on it, and queue the revocation of the tokens. Raises UserNotFound."""
        with self.database.writing():
            self.integrations.queue_revocations(user.id, actor)
            # Identities, sessions and connections go with their user: the schema says so.
            if not User.delete().where(User.id == user.id).execute():
                raise UserNotFound
            self.audit.record(actor, "user.deleted", f"user:{user.id}")

    def export(self, user: User) -> dict[str, Any]:
        """All that is known of a user but the secrets, as one JSON object; times are ISO 8601."""
        return {
            "id": user.id,
            "slug": user.slug,
            "name": user.name,
            "email": user.email,
            "role": user.role,
            "client": user.client_id,
            "created": _time(user.created_at),
            "license": {"active": user.license_active, "ends": _time(user.license_ends_at)},
            "subscription": {"active": user.subscription_active, "ends": _time(user.subscription_ends_at)},
            "stats": {
                "games_completed": user.stats_games_completed,
                "play_time": user.stats_play_time,
                "concepts": user.stats_concepts,
            },
            "identities": [
                {"provider": identity.provider, "id": identity.subject, "created": _time(identity.created_at)}
                for identity in self.identities.profile(user).identities
            ],
            "connections": [
                {
                    "provider": connection.provider,
                    "created": _time(connection.created_at),
                    "obtained": _time(connection.obtained_at),
                    "expires": _time(connection.expires_at),
                    "needs_reauth": connection.needs_reauth,
                }
                for connection in self.integrations.connections(user.id)
            ],
            "keys": [
                {
                    "id": listed.key.id,
                    "service": listed.key.service,
                    "label": listed.key.label,
                    "account": listed.key.account,
                    "permissions": listed.key.permissions,
                    "created": _time(listed.key.created_at),
                }
                for listed in self.api_keys.list(user)
            ],
            "grants": [
                {
                    "id": grant.id,
                    "application": grant.request.name,
                    "callback": grant.request.callback,
                    "keys": key_ids,
                    "created": _time(grant.created_at),
                }
                for grant, key_ids in self.consents.grants(user)
            ],
            "sessions": [
                {"id": session.id, "created": _time(session.created_at), "expires": _time(session.expires_at)}
                for session in self.sessions.list(user)
            ],
        }


def _time(time: datetime | None) -> str | None:
    return time.isoformat() if time else None
