"""Starts the bot of `make up`: on Discord if DISCORD_TOKEN is set, else on the stand-in."""

import json
import os
import subprocess

from tests.processes import BIN
from tests.sandbox.discord.state import DEFAULT_TOKEN

_NAME = "make up"


def main() -> None:
    """Replace this process by the bot's."""
    environment = dict(os.environ)
    if not any(environment.get(name) for name in ("DISCORD_TOKEN", "DISCORD_TOKEN_FILE")):
        port = environment.get("DOORWARD_SANDBOX_DISCORD_PORT") or "9300"
        environment |= {"DISCORD_TOKEN": DEFAULT_TOKEN, "DISCORD_API_BASE": f"http://127.0.0.1:{port}/api/v10"}
    if not any(environment.get(name) for name in ("DOORWARD_BOT_TOKEN", "DOORWARD_BOT_TOKEN_FILE")):
        environment["DOORWARD_BOT_TOKEN"] = _new_token()
    os.execve(BIN / "doorward-bot", ["doorward-bot"], environment)


def _new_token() -> str:
    """A service token, in place of the one of the last time, whose value nobody has kept."""
    for token in json.loads(_doorward("token", "list", "--json")):
        if token["name"] == _NAME:
            _doorward("token", "revoke", str(token["id"]))
    return _doorward("token", "create", "--role", "bot", "--name", _NAME).strip()


def _doorward(*arguments: str) -> str:
    done = subprocess.run([BIN / "doorward", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    main()
