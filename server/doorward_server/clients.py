"""API clients: who keeps users here over REST, known by an id and a secret. Imports `models` and below."""

import hmac
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from doorward_server.clock import Clock
from doorward_server.crypto import fingerprint, make_secret
from doorward_server.database import Database
from doorward_server.errors import ApiClientNotFound, OperatorError
from doorward_server.models import ApiClient, ClientSecret, to_micros
from doorward_server.rotation import retire

# Told apart from other secrets by people and by scanners of repositories.
_ID_PREFIX, _SECRET_PREFIX = "dwc_", "dws_"
_LONGEST_NAME = 100
# Looked up by the secret: an unknown id and a wrong secret are the same miss, which takes the same time.
_FIND = """
SELECT client_secrets.client_id FROM client_secrets JOIN api_clients ON api_clients.id = client_secrets.client_id
WHERE secret_hash = ? AND (expires_at IS NULL OR expires_at > ?) AND disabled_at IS NULL
"""


class Client(NamedTuple):
    """The API client that calls."""

    client_id: str


@dataclass(frozen=True)
class ApiClients:
    """Owns the tables `api_clients` and `client_secrets`."""

    database: Database
    clock: Clock

    def create(self, name: str) -> tuple[ApiClient, str]:
        """Add a client; returns it and its secret, which is stored nowhere."""
        if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
            raise OperatorError(f"the name has to be 1 to {_LONGEST_NAME} printable characters, not all blank")
        client_id, now = _ID_PREFIX + secrets.token_hex(8), self.clock.now()
        with self.database.writing():
            client = ApiClient.create(id=client_id, name=name, created_at=now)
            return client, self._add_secret(client)

    def find(self, client_id: str, secret: str) -> Client | None:
        """The enabled client with this id and secret. On the path of every call of a client's."""
        row = self.database.fetch_one(_FIND, (fingerprint(secret), to_micros(self.clock.now())))
        if row is None or not hmac.compare_digest(row[0].encode(), client_id.encode()):
            return None
        return Client(row[0])

    def get(self, client_id: str) -> ApiClient:
        """Raises ApiClientNotFound."""
        for client in self.database.fetch_all(ApiClient.select().where(ApiClient.id == client_id)):
            return client  # type: ignore[no-any-return]
        raise ApiClientNotFound

    def list(self) -> list[ApiClient]:
        """All of them, disabled ones too."""
        return self.database.fetch_all(ApiClient.select().order_by(ApiClient.created_at, ApiClient.id))

    def rotate(self, client_id: str, overlap: timedelta) -> str:
        """Add a secret; the one before is valid for `overlap` more, any older one ends now."""
        client = self.get(client_id)
        with self.database.writing():
            secret = self._add_secret(client)
            retire(ClientSecret, ClientSecret.client == client, overlap, self.clock.now())
        return secret

    def enable(self, client_id: str, *, enabled: bool) -> None:
        """Let a client call again, or refuse it from now on; its users stay. Raises ApiClientNotFound."""
        with self.database.writing():
            disabled_at = None if enabled else self.clock.now()
            if not ApiClient.update(disabled_at=disabled_at).where(ApiClient.id == client_id).execute():
                raise ApiClientNotFound

    def _add_secret(self, client: ApiClient) -> str:
        secret = _SECRET_PREFIX + make_secret()
        ClientSecret.create(client=client, secret_hash=fingerprint(secret), created_at=self.clock.now())
        return secret
