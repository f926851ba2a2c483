"""All words that a user sees. Imports nothing of the project.

What others chose (names, labels, hosts) is shown as inline code: there, Discord interprets nothing and pings nobody.
"""

from collections.abc import Sequence

from doorward.keybroker.v1 import keybroker_service_pb2 as pb

SHARE_ALL = "Share all"
CANCEL = "Cancel"
PREVIOUS = "◀ Previous"
NEXT = "Next ▶"
CHOOSE = "Choose the keys to share"

NOT_YOURS = "These buttons are for somebody else."
AWAY = "Doorward cannot be reached right now. Nothing was decided: please answer again in a minute."
HOLD_ON = "I have your answer, but Doorward cannot be reached right now. I keep trying for a minute."
NOT_KNOWN = "Doorward no longer knows this request."
INVALID_CHOICE = (
    "That is not a valid choice, so I canceled the request: nothing is shared. Valid are `all`, or numbers of the "
    "keys. The application can ask you again."
)
NOTHING_TO_CHOOSE = (
    "You have no keys to share, so I canceled the request. Add one with `/keys add`, then let the application ask "
    "again. If what you typed is a key, better delete that message."
)
SEVERAL = (
    "More than one application is waiting for your answer: please use the buttons, or Discord's Reply on the message "
    "that you mean."
)
KEY_GONE = "One of these keys is gone. Nothing was shared yet: please choose again."
FULL = "That many cannot be selected at once. Use “Share all”, or type the numbers."
LATE = "That request is already over. "
FAILED = "Something went wrong; nothing was changed. Please try again."

REMOVED = "Removed. What was not sent yet goes without this key."
REVOKED = "Revoked. What was not sent yet goes without these keys; what the application already has, it may keep."
BLOCKED = "Blocked. Requests under this registered name, or to exactly this address, do not reach you any more."
AWAY_FOR_COMMANDS = "Doorward cannot be reached right now. Please try again in a minute."

NO_KEYS = "You have no keys yet. `/keys add` adds one, for any service."
NO_GRANTS = "You share no keys with anybody."
MODAL_TITLE = "Add an API key"
SERVICE, SERVICE_HINT = "Service", "A short name for what the key is for, such as game"
LABEL, LABEL_HINT = "Label", "How you will recognize it, such as “main account”"
KEY, KEY_HINT = "Key", "Stored encrypted. Only applications that you choose receive it."

_MOST_LABELS = 10
_LIKE_A_BACKTICK = "\N{MODIFIER LETTER GRAVE ACCENT}"
_ENDS = {
    pb.CONSENT_STATUS_GRANTED: ("Shared", "You shared {what}. `/sharing revoke` ends that."),
    pb.CONSENT_STATUS_CANCELED: ("Canceled", "Nothing was shared. The application is told that you canceled."),
    pb.CONSENT_STATUS_TIMED_OUT: ("Too late", "You did not answer in time, so nothing was shared."),
    pb.CONSENT_STATUS_BLOCKED: ("Closed", "The application is told that you cannot be asked."),
}
_REASONS = {
    "INVALID_SERVICE": "Nothing was stored: a service is named by 1 to 40 of a-z, 0-9, - and _, such as `gw2`.",
    "INVALID_LABEL": "Nothing was stored: a label has 1 to 80 visible characters.",
    "INVALID_KEY": "Nothing was stored: a key has no spaces in it.",
    "KEY_REJECTED": "The service does not accept this key, so it was not stored.",
    "KEY_EXISTS": "You have this key already.",
    "TOO_MANY_KEYS": "You have 15 keys for this service, or 200 in all; remove one first.",
    "SERVICE_UNAVAILABLE": "The service that checks this key cannot be reached. Nothing was stored; try again later.",
    "BUSY": "Too much is going on. Nothing was stored; try again in a minute.",
    "KEY_NOT_FOUND": "You have no such key. Please pick one from the list.",
    "GRANT_NOT_FOUND": "You share no such keys.",
    "CONSENT_REQUEST_NOT_FOUND": "There is no such application.",
}


def plain(text: str) -> str:
    """Somebody's text, shown as it is."""
    return f"`{text.replace('`', _LIKE_A_BACKTICK)}`" if text.strip() else "(nothing)"


def refusal(reason: str) -> str:
    """What a user is told when the server refuses something."""
    return _REASONS.get(reason, FAILED)


def who(request: pb.ConsentRequest) -> str:
    """Who asks."""
    name = plain(request.application_name)
    return name if request.verified else f"{name} (not verified)"


def key_line(key: pb.ApiKey) -> str:
    """A key as its owner knows it."""
    return f"{plain(key.label)} for {plain(key.service)}, ending in {plain(key.last_four)}"


def key_choice(key: pb.ApiKey) -> str:
    """A key in a list of choices, at most 100 characters."""
    return f"{key.label} ({key.service} …{key.last_four})"[:100]


def share(number: int) -> str:
    """The button that shares what is selected."""
    return f"Share selected ({number})" if number else "Share selected"


# A prompt

TITLE = "An application asks for your API keys"
ASKS, SENT_TO, KEYS, NEXT_STEP = "Who asks", "Where the keys will be sent", "Your keys", "What happens next"
ASKED, WERE_SENT_TO = "Who asked", "Where the keys are sent"


def next_step(deadline: int, *, has_keys: bool) -> str:
    """`deadline` is in seconds since 1970."""
    if not has_keys:
        return (
            "You have no keys yet. Use `/keys add` (do not type the key here): it will then appear in this message. "
            "Anything that you type cancels. "
            f"Without an answer the request ends <t:{deadline}:R>."
        )
    return (
        "Select keys and press Share selected, press Share all, or type `all` or numbers such as `1, 3`. "
        "Anything else that you type cancels. The keys you share go to the application, which can then use them; "
        f"nobody else sees them. Without an answer the request ends <t:{deadline}:R> and nothing is shared."
    )


def page_of(page: int, pages: int) -> str:
    """Which part of the keys is shown."""
    return f"{KEYS} (page {page + 1} of {pages})" if pages > 1 else KEYS


# Outcomes


def end_title(status: pb.ConsentStatus.ValueType) -> str:
    """How a request ended, in a word or two."""
    return _ENDS[status][0]


def end(status: pb.ConsentStatus.ValueType, labels: Sequence[str] = ()) -> str:
    """How a request ended; `labels` are of the keys that were shared, as far as they are known."""
    if status == pb.CONSENT_STATUS_GRANTED and not labels:  # by the operator, or before
        return "Keys were shared. `/sharing revoke` ends that."
    return _ENDS[status][1].format(what=_several(labels))


def _several(labels: Sequence[str]) -> str:
    """Labels of keys, as many as anybody reads."""
    more = f" and {len(labels) - _MOST_LABELS} more" if len(labels) > _MOST_LABELS else ""
    return ", ".join(map(plain, labels[:_MOST_LABELS])) + more


# Replies to commands


def added(key: pb.ApiKey) -> str:
    account = f" It belongs to the account {plain(key.account)}." if key.account else ""
    return f"Added {key_line(key)}.{account}"


def grant_line(grant: pb.Grant) -> str:
    """What is shared with whom."""
    name = plain(grant.application_name) + ("" if grant.verified else " (not verified)")
    keys = _several([key.label for key in grant.keys]) or "keys that you removed since"
    return f"{name} at {plain(grant.callback_host)}: {keys}, <t:{grant.create_time.seconds}:R>"


def grant_choice(grant: pb.Grant) -> str:
    """A grant in a list of choices, at most 100 characters."""
    keys = ", ".join(key.label for key in grant.keys)
    return f"{grant.application_name} at {grant.callback_host}: {keys}"[:100]


def application_choice(request: pb.ConsentRequest) -> str:
    """Who asked, in a list of choices, at most 100 characters."""
    return f"{request.application_name} at {request.callback_host}"[:100]


def listed(lines: Sequence[str], most: int = 4000) -> str:
    """Lines, as many as fit into an embed."""
    shown: list[str] = []
    for line in lines:
        if sum(map(len, shown)) + len(shown) + len(line) > most:
            shown.append(f"… and {len(lines) - len(shown)} more")
            break
        shown.append(line)
    return "\n".join(shown)
