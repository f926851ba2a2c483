"""Prints the settings file of `make up`: the kai services are the stand-in provider."""

import os

from tests.sandbox.grants import CLIENT_SECRET, CLIENTS

_HEAD = """\
# Settings of `make up`: the services are stand-ins on this machine.
# Remove this file, and `make up` writes it anew; `doorward init` writes the one of a real installation.

[outbound]
allow = ["127.0.0.1:{port}"]
"""
_PROVIDER = """
[providers.{kai}]
kind = "kai"
authorize_url = "{url}/authorize"
token_url = "{url}/token"
revocation_url = "{url}/revoke"
client_id = "{kai}-client"
client_secret = "{secret}"
redirect_uri = "{url}/app/callback"
"""


def render(port: int) -> str:
    """The TOML for a sandbox provider on a port of 127.0.0.1."""
    url = f"http://127.0.0.1:{port}"
    sections = [
        _PROVIDER.format(kai=client_id.removesuffix("-client"), url=url, secret=CLIENT_SECRET) for client_id in CLIENTS
    ]
    return _HEAD.format(port=port) + "".join(sections)


if __name__ == "__main__":
    print(render(int(os.environ.get("DOORWARD_SANDBOX_PORT", "9100"))), end="")
