"""What Discord answers when it refuses: one table of its codes, and the tree of an invalid form.

The codes are those of https://discord.com/developers/docs/topics/opcodes-and-status-codes. A *violation* is a
mistake of the bot's, and kept as a problem for the tests; the rest a faultless bot may meet.
"""

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """One way in which Discord refuses."""

    status: int
    code: int
    message: str
    violation: bool = True


NO_ROUTE = Refusal(404, 0, "404: Not Found")
NO_METHOD = Refusal(405, 0, "405: Method Not Allowed")
UNAUTHORIZED = Refusal(401, 0, "401: Unauthorized")
REVOKED = Refusal(401, 0, "401: Unauthorized", violation=False)
UNKNOWN_APPLICATION = Refusal(404, 10002, "Unknown Application")
UNKNOWN_CHANNEL = Refusal(404, 10003, "Unknown Channel", violation=False)
UNKNOWN_GUILD = Refusal(404, 10004, "Unknown Guild", violation=False)
UNKNOWN_MESSAGE = Refusal(404, 10008, "Unknown Message", violation=False)
UNKNOWN_USER = Refusal(404, 10013, "Unknown User", violation=False)
UNKNOWN_WEBHOOK = Refusal(404, 10015, "Unknown Webhook")
UNKNOWN_INTERACTION = Refusal(404, 10062, "Unknown interaction")
UNKNOWN_COMMAND = Refusal(404, 10063, "Unknown application command")
TOO_MANY_COMMANDS = Refusal(400, 30032, "Maximum number of application commands reached (100)")
ALREADY_ACKNOWLEDGED = Refusal(400, 40060, "Interaction has already been acknowledged.")
NO_ACCESS = Refusal(403, 50001, "Missing Access")
NOT_FOR_CHANNEL_TYPE = Refusal(403, 50003, "Cannot execute action on this channel type")
NOT_THE_AUTHOR = Refusal(403, 50005, "Cannot edit a message authored by another user")
EMPTY_MESSAGE = Refusal(400, 50006, "Cannot send an empty message")
DM_REFUSED = Refusal(403, 50007, "Cannot send messages to this user", violation=False)
NO_MUTUAL_GUILD = Refusal(
    403, 50278, "Cannot send messages to this user due to having no mutual guilds", violation=False
)
INVALID_WEBHOOK_TOKEN = Refusal(401, 50027, "Invalid Webhook Token")
INVALID_RECIPIENT = Refusal(400, 50033, "Invalid Recipient(s)", violation=False)
INVALID_FORM = Refusal(400, 50035, "Invalid Form Body")
INVALID_JSON = Refusal(400, 50109, "The request body contains invalid JSON.")

DM_REFUSALS = {refusal.code: refusal for refusal in (DM_REFUSED, NO_MUTUAL_GUILD)}


class DiscordError(Exception):
    """The refusal of one request."""

    def __init__(self, refusal: Refusal, errors: Json | None = None) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.errors = errors

    def as_json(self) -> Json:
        body: Json = {"message": self.refusal.message, "code": self.refusal.code}
        return body | ({"errors": self.errors} if self.errors else {})

    def __str__(self) -> str:
        """What a test shows: the code, and the places of an invalid form."""
        places = "; ".join(_places(self.errors or {}))
        return f"{self.refusal.code} {self.refusal.message}" + (f": {places}" if places else "")


def invalid_form(place: str, code: str, message: str) -> DiscordError:
    """An invalid form with one error, at a place as `data.components.0`."""
    tree: Json = {"_errors": [{"code": code, "message": message}]}
    for name in reversed(place.split(".") if place else []):
        tree = {name: tree}
    return DiscordError(INVALID_FORM, tree)


def _places(tree: Json, path: str = "") -> list[str]:
    found = [f"{path or 'body'}: {error['code']} {error['message']}" for error in tree.get("_errors", [])]
    for name, branch in tree.items():
        if name != "_errors":
            found += _places(branch, f"{path}.{name}" if path else name)
    return found
