"""Tells whoever typed `make up` where everything is and what to try, once everything answers."""

import os
import signal
from urllib.parse import urlencode

import httpx

_LINES = """\
Doorward is up: {gateway}   (stand-ins: an OAuth 2 provider {provider}, a callback receiver {receiver}, {discord})
In another terminal, connect a user's flo account:
{home}.venv/bin/doorward user create --name Ada
SESSION=$(.venv/bin/doorward session create --user ada)
CODE=$(curl -sSL -d '{consent}' {provider}/authorize)
COOKIE="Cookie: doorward_session=$SESSION" JSON='Content-Type: application/json'
FLO={gateway}/api/v1/users/me/integrations/kai/flo
curl -sS -w '\\n' -H "$COOKIE" -H "$JSON" -d "{{\\"code\\": \\"$CODE\\"}}" $FLO/oauth2callback
curl -sS -w '\\n' -H "$COOKIE" $FLO
Or ask a Discord user for API keys{answer}:
ADA=80351110224678912 ASK='name=My super bot!&state=xyz&callback={receiver}/callback'
echo EXAMPLE-KEY-1 | .venv/bin/doorward key add --discord-user $ADA --service game --label main --value-stdin
curl -sS -w '\\n' -d "$ASK&userid=$ADA" {gateway}/requestapikey
Ctrl-C stops everything.\
"""


def render(gateway: str, provider: str, receiver: str, discord: str | None, home: str | None) -> str:
    """What is printed; `discord` is None on the real one, `home` is DOORWARD_HOME, if it is set."""
    grant = {
        "client_id": "flo-client",
        "redirect_uri": f"{provider}/app/callback",
        "user": "ada",
        "decision": "allow",
    }
    return _LINES.format(
        gateway=gateway,
        provider=provider,
        receiver=receiver,
        discord=f"Discord {discord}" if discord else "and the bot is on Discord",
        answer=f", and answer as ada at {discord}/" if discord else "",
        consent=urlencode(grant, safe=":/"),
        home=f"export DOORWARD_HOME={home}\n" if home else "",
    )


def main() -> None:
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    stopped = False
    gateway, provider = _url("GATEWAY_PORT", "8080"), _url("SANDBOX_PORT", "9100")
    receiver = _url("SANDBOX_RECEIVER_PORT", "9200")
    is_real = any(os.environ.get(name) for name in ("DISCORD_TOKEN", "DISCORD_TOKEN_FILE"))
    discord = None if is_real else _url("SANDBOX_DISCORD_PORT", "9300")
    with httpx.Client(trust_env=False) as client:
        waiting = [f"{url}/healthz" for url in (gateway, provider, receiver)]
        while not stopped and (waiting or (discord and not _has_bot(client, discord))):
            stopped = signal.sigtimedwait(stop_signals, 0.1) is not None
            waiting = [url for url in waiting if not _answers(client, url)]
    if not stopped:
        print(render(gateway, provider, receiver, discord, os.environ.get("DOORWARD_HOME")), flush=True)
        signal.sigwait(stop_signals)  # honcho stops everything when one process ends


def _url(variable: str, default: str) -> str:
    return f"http://127.0.0.1:{os.environ.get(f'DOORWARD_{variable}') or default}"


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def _has_bot(client: httpx.Client, discord: str) -> bool:
    try:
        sessions = client.get(f"{discord}/_sandbox/gateway").json()["sessions"]
    except httpx.TransportError:
        return False
    return any(session["connected"] for session in sessions)


if __name__ == "__main__":
    main()
