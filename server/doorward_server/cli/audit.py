"""`doorward audit`."""

from typing import Annotated, Any

import typer

from doorward_server.cli.base import HELP, Before, Json, app_of, print_json, print_list, progress
from doorward_server.errors import OperatorError
from doorward_server.models import AuditEvent

_HASH_DIGITS = 64
_COLUMNS = ("id", "at", "actor", "action", "subject", "details")

cli = typer.Typer(help="The audit trail: who did what, in a chain that shows what was changed later.", **HELP)


@cli.command("list", epilog="Example: doorward audit list --subject user:7 --limit 20")
def list_events(  # noqa: PLR0917 - an option for each column
    ctx: typer.Context,
    actor: Annotated[str | None, typer.Option(help="Only what this one did, such as client:dwc_1a2b.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only what was done to this one, such as user:7.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, such as user.deleted.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 50,
    before: Before = None,
    as_json: Json = False,
) -> None:
    """List the newest events, newest first. Reads of access tokens come up to two minutes later."""
    events = app_of(ctx).audit.list(limit, before=before, actor=actor, subject=subject, action=action)
    rows = [_event(event) for event in events]
    print_list(rows, _COLUMNS, as_json=as_json)


@cli.command(epilog="Example: doorward audit verify --head $(cat head-noted-last-week)")
def verify(
    ctx: typer.Context,
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A head noted earlier, away from here: shows whether the end was cut off."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that no event was altered, inserted, moved or removed; exit code 1 if one was."""
    if head is not None and not _is_hash(head):
        raise OperatorError(f"--head: give the {_HASH_DIGITS} hexadecimal digits that `doorward audit verify` printed")
    with progress("checking") as tell:
        verdict = app_of(ctx).audit.verify(head, tell)
    if as_json:
        print_json(
            {
                "intact": verdict.is_intact,
                "rows": verdict.rows,
                "head": verdict.head,
                "broken_at": verdict.broken_at,
                "problem": verdict.problem,
                "has_head": verdict.has_head,
            }
        )
    if verdict.broken_at is not None:
        raise OperatorError(
            f"the audit trail is broken at event {verdict.broken_at}: {verdict.problem}. "
            f"The {verdict.rows} events before it are as they were recorded, up to the head {verdict.head}"
        )
    if not verdict.has_head:
        raise OperatorError(
            f"no event of the audit trail has the hash {head}: its end was cut off, or it was made anew. "
            f"It has {verdict.rows} events in an unbroken chain, up to the head {verdict.head}"
        )
    if not as_json:
        typer.echo(f"{verdict.rows} events in an unbroken chain\nhead: {verdict.head}")


def _is_hash(text: str) -> bool:
    return len(text) == _HASH_DIGITS and set(text.lower()) <= set("0123456789abcdef")


def _event(event: AuditEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "at": event.at.isoformat(timespec="microseconds"),
        "actor": event.actor,
        "action": event.action,
        "subject": event.subject,
        "details": event.details,
        "hash": bytes(event.hash).hex(),
    }
