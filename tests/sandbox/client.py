"""The control plane of the stand-in provider, for tests."""

from typing import Any

import httpx

from tests.sandbox.grants import CLIENT_SECRET

_REDIRECT_URI = "http://127.0.0.1/app/callback"


class SandboxProvider:
    """A running stand-in provider, at its URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=f"{url}/_sandbox", trust_env=False)

    @property
    def address(self) -> str:
        """Its ip:port."""
        return self.url.partition("://")[2]

    def reset(self) -> None:
        """Forget grants, faults, settings and recorded requests."""
        self._send("POST", "reset")

    def code(self, kai: str = "flo", user: str = "ada", literal: str | None = None) -> str:
        """An authorization code, as if a user had allowed it; `literal` makes it this very string."""
        wanted = {"client_id": f"{kai}-client", "redirect_uri": _REDIRECT_URI, "user": user}
        if literal is not None:
            wanted["code"] = literal
        code: str = self._send("POST", "codes", json=wanted).json()["code"]
        return code

    def access_token(self, user: str = "ada", client: str = "sandbox") -> str:
        """An access token for a user's account, as if an application had exchanged a code for it."""
        grant = {
            "grant_type": "authorization_code",
            "code": self.code(client, user),
            "redirect_uri": _REDIRECT_URI,
            "client_id": f"{client}-client",
            "client_secret": CLIENT_SECRET,
        }
        answer = self._http.post(f"{self.url}/token", data=grant).raise_for_status()
        token: str = answer.json()["access_token"]
        return token

    def fault(self, endpoint: str, kind: str, **options: Any) -> None:
        """Make the next requests to an endpoint fail."""
        self._send("PUT", f"faults/{endpoint}", json={"kind": kind, **options})

    def heal(self) -> None:
        """End all faults."""
        self._send("DELETE", "faults")

    def configure(self, **settings: Any) -> None:
        """Change `expires_in`, `issue_refresh_token`, `rotate` or `latency`."""
        self._send("PUT", "settings", json=settings)

    def requests(self, endpoint: str = "token", grant_type: str | None = None) -> list[dict[str, Any]]:
        """What an endpoint was asked since the last reset."""
        return [
            request
            for request in self._send("GET", "requests").json()
            if request["endpoint"] == endpoint and grant_type in (None, request["form"].get("grant_type"))
        ]

    def families(self) -> list[dict[str, Any]]:
        """The grants, each with its current tokens."""
        families: list[dict[str, Any]] = self._send("GET", "families").json()
        return families

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, json: Any = None) -> httpx.Response:
        return self._http.request(method, f"/{path}", json=json).raise_for_status()
