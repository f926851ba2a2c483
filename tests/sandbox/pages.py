"""The provider's HTML: pure functions from what is to be shown to a whole page."""

import json
import shlex
from collections.abc import Mapping
from html import escape

from .grants import CLIENT_SECRET, CLIENTS

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #fff;
  --ground: #eef1f5; --line: #d5dbe3; --accent: #2456c5; --on-accent: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf1; --soft: #9ba7b7; --paper: #1b212b;
  --ground: #11151c; --line: #364152; --accent: #8ab0ff; --on-accent: #10182a } }
* { box-sizing: border-box }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1rem;
  background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
main { width: 100%; max-width: 30rem; padding: 2rem; background: var(--paper);
  border: 1px solid var(--line); border-radius: .75rem }
main.wide { max-width: 46rem }
header { margin-bottom: 1.25rem; color: var(--soft); font-size: .875rem }
h1 { margin: 0 0 .75rem; font-size: 1.375rem; line-height: 1.3 }
h1 code { font-size: .9em }
p, ul, pre { margin: 0 0 1rem }
main > :last-child { margin-bottom: 0 }
ul { padding-left: 1.25rem }
a { color: var(--accent) }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; overflow-wrap: anywhere }
pre { padding: .75rem 1rem; background: var(--ground); border-radius: .5rem; white-space: pre-wrap }
.soft { color: var(--soft); font-size: .875rem }
label { display: block; margin-bottom: .25rem; font-weight: 600 }
input { width: 100%; padding: .6rem .75rem; margin-bottom: 1.25rem; font: inherit; color: inherit;
  background: transparent; border: 1px solid var(--line); border-radius: .5rem }
.choice { display: flex; gap: .75rem; margin-bottom: 1.25rem }
button { flex: 1; padding: .65rem; font: inherit; font-weight: 600; cursor: pointer;
  color: inherit; background: transparent; border: 1px solid var(--line); border-radius: .5rem }
button.main { color: var(--on-accent); background: var(--accent); border-color: var(--accent) }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
"""


def index(example: str) -> str:
    clients = ", ".join(f"<code>{escape(client)}</code>" for client in CLIENTS)
    return _page(
        "Sandbox provider",
        f"""<h1>A stand-in OAuth 2 provider</h1>
<p>It plays the service whose accounts Doorward links, so that linking can be tried and tested
without a real one. It forgets everything when it stops.</p>
<p><a href="{escape(example)}">Link an account as <code>flo-client</code></a></p>
<p class="soft">Its applications are {clients}, each with the secret
<code>{escape(CLIENT_SECRET)}</code>.</p>""",
    )


def consent(fields: Mapping[str, str], user: str) -> str:
    """Ask whether the application may; the hidden fields carry its request along."""
    client_id = escape(fields["client_id"])
    scopes = "".join(f"<li><code>{escape(scope)}</code></li>" for scope in fields["scope"].split())
    hidden = "\n".join(
        f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">' for name, value in fields.items()
    )
    return _page(
        "Allow access?",
        f"""<h1>Allow <code>{client_id}</code> to use your account?</h1>
{f"<p>It asks for:</p><ul>{scopes}</ul>" if scopes else "<p>It asks for basic access.</p>"}
<form method="post" action="/authorize">
{hidden}
<label for="user">Sign in as</label>
<input id="user" name="user" value="{escape(user)}" autocomplete="off" autocapitalize="none"
  spellcheck="false">
<div class="choice">
<button class="main" name="decision" value="allow">Allow</button>
<button name="decision" value="deny">Deny</button>
</div>
</form>
<p class="soft">You will be sent back to
<code>{escape(fields["redirect_uri"])}</code></p>""",
    )


def callback(code: str, state: str | None, gateway: str) -> str:
    """What the application got, and the command that gives it to Doorward."""
    shown_state = f"<p>State: <code>{escape(state)}</code></p>" if state is not None else ""
    return _page(
        "Back at the application",
        f"""<h1>The provider sent this code</h1>
<pre>{escape(code)}</pre>
{shown_state}
<p>Within a minute, give it to Doorward, with your session cookie's value in
<code>COOKIE</code>:</p>
<pre>{escape(_exchange_command(code, gateway))}</pre>
<p class="soft">A code is good for one use.</p>""",
        wide=True,
    )


def refusal(reason: str) -> str:
    return _page("Bad request", f"<h1>This request cannot be served</h1>\n<p>{escape(reason)}</p>")


def _exchange_command(code: str, gateway: str) -> str:
    data = shlex.quote(json.dumps({"code": code}))
    return f"""GATEWAY={gateway}
curl -sS -X POST "$GATEWAY/api/v1/users/me/integrations/kai/flo/oauth2callback" \\
  -H "Cookie: doorward_session=$COOKIE" \\
  -H 'Content-Type: application/json' \\
  -d {data}"""


def _page(title: str, content: str, *, wide: bool = False) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Sandbox provider</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main{' class="wide"' if wide else ""}>
<header>Sandbox provider</header>
{content}
</main>
</body>
</html>
"""
