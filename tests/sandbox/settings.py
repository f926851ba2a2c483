"""Prints the settings file of `make up`: the services are the stand-in provider."""

import os
import re
import sys

from doorward_server.settings import places
from tests.sandbox.grants import CLIENT_SECRET, KAI_CLIENTS

_HEAD = """\
# Settings of `make up`: the services are stand-ins on this machine.
# Remove this file, and `make up` writes it anew; `doorward init` writes the one of a real installation.

[outbound]
allow = ["127.0.0.1:{port}"]

[callbacks]
allow = ["127.0.0.1:{receiver_port}"]
"""
# The head of what `make up` wrote before; other settings are not ours to judge. The ports that they allow follow.
_IS_OURS = re.compile(r"\A# Settings of `make up`")
_ALLOWED = re.compile(r'^allow = \["127\.0\.0\.1:([0-9]+)"\]$', re.MULTILINE)
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
_IDENTITY_PROVIDER = """
[providers.sandbox]
kind = "identity"
authorize_url = "{url}/authorize"
token_url = "{url}/token"
lookup_url = "{url}/lookup?access_token={{access_token}}"
client_id = "sandbox-client"
client_secret = "{secret}"
redirect_uri = "{url}/app/callback"
"""


def render(port: int, receiver_port: int) -> str:
    """The TOML for a sandbox provider and a callback receiver on ports of 127.0.0.1."""
    url = f"http://127.0.0.1:{port}"
    sections = [
        _PROVIDER.format(kai=client_id.removesuffix("-client"), url=url, secret=CLIENT_SECRET)
        for client_id in KAI_CLIENTS
    ]
    sections.append(_IDENTITY_PROVIDER.format(url=url, secret=CLIENT_SECRET))
    return _HEAD.format(port=port, receiver_port=receiver_port) + "".join(sections)


def _port_of(variable: str, default: str) -> int:
    text = os.environ.get(variable) or default
    if not text.isdecimal() or not 0 < int(text) < 65536:
        sys.exit(f"{variable} has to be a port: a number from 1 to 65535")
    return int(text)


def main() -> None:
    """Print the settings, unless the home has some that are for another port."""
    port = _port_of("DOORWARD_SANDBOX_PORT", "9100")
    receiver_port = _port_of("DOORWARD_SANDBOX_RECEIVER_PORT", "9200")
    _, config = places()
    if config.is_file() and _IS_OURS.match(text := config.read_text()):
        found, wanted = _ALLOWED.findall(text), [str(port), str(receiver_port)]
        if found != wanted:
            sys.exit(
                f"{config} allows stand-ins on the ports {' and '.join(found)}, but DOORWARD_SANDBOX_PORT and "
                f"DOORWARD_SANDBOX_RECEIVER_PORT say {' and '.join(wanted)}: remove the file, and `make up` writes it "
                "anew, or set the variables to what it says"
            )
    print(render(port, receiver_port), end="")


if __name__ == "__main__":
    main()
