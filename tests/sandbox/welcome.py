"""Tells whoever typed `make up` where everything is and what to try, once everything answers."""

import os
import signal
from urllib.parse import urlencode

import httpx

_LINES = """\
Doorward is up: {gateway}   (the stand-in provider: {provider})
In another terminal, connect a user's flo account:
{home}.venv/bin/doorward user create --name Ada
SESSION=$(.venv/bin/doorward session create --user ada)
CODE=$(curl -sSL -d '{consent}' {provider}/authorize)
COOKIE="Cookie: doorward_session=$SESSION" JSON='Content-Type: application/json'
FLO={gateway}/api/v1/users/me/integrations/kai/flo
curl -sS -H "$COOKIE" -H "$JSON" -d "{{\\"code\\": \\"$CODE\\"}}" $FLO/oauth2callback
curl -sS -H "$COOKIE" $FLO
Ctrl-C stops everything.\
"""


def render(gateway: str, provider: str, home: str | None) -> str:
    """What is printed; `home` is DOORWARD_HOME, if it is set."""
    grant = {
        "client_id": "flo-client",
        "redirect_uri": f"{provider}/app/callback",
        "user": "ada",
        "decision": "allow",
    }
    consent = urlencode(grant, safe=":/")
    return _LINES.format(
        gateway=gateway,
        provider=provider,
        consent=consent,
        home=f"export DOORWARD_HOME={home}\n" if home else "",
    )


def main() -> None:
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    stopped = False
    gateway = f"http://127.0.0.1:{os.environ.get('DOORWARD_GATEWAY_PORT', '8080')}"
    provider = f"http://127.0.0.1:{os.environ.get('DOORWARD_SANDBOX_PORT', '9100')}"
    with httpx.Client(trust_env=False) as client:
        waiting = [f"{gateway}/healthz", f"{provider}/healthz"]
        while waiting and not stopped:
            stopped = signal.sigtimedwait(stop_signals, 0.1) is not None
            waiting = [url for url in waiting if not _answers(client, url)]
    if not waiting:
        print(render(gateway, provider, os.environ.get("DOORWARD_HOME")), flush=True)
    if not stopped:
        signal.sigwait(stop_signals)  # honcho stops everything when one process ends


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
