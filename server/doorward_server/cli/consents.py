"""`doorward consent` and `doorward delivery`: what the bot does by direct messages, by hand."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from doorward_server.app import App
from doorward_server.cli.base import (
    HELP,
    ROW_ID,
    Before,
    Json,
    Limit,
    app_of,
    iso,
    print_done,
    print_json,
    print_list,
    print_one,
)
from doorward_server.cli.keys import read_snowflake
from doorward_server.consents import Status, callback_host
from doorward_server.delivery import Status as DeliveryStatus
from doorward_server.errors import OperatorError
from doorward_server.models import ConsentRequest, Delivery

consent_cli = typer.Typer(help="Applications' requests for users' keys.", **HELP)
delivery_cli = typer.Typer(help="The outcomes of requests, on their way to the applications.", **HELP)
RequestId = Annotated[
    int, typer.Argument(metavar="REQUEST_ID", help="The request's id; see `doorward consent list`.", **ROW_ID)
]
DeliveryId = Annotated[
    int, typer.Argument(metavar="DELIVERY_ID", help="The delivery's id; see `doorward delivery list`.", **ROW_ID)
]
_ACTOR = "operator"
_MOST_SHOWN = 100


@consent_cli.command("list", epilog="Example: doorward consent list --discord-user 80351110224678912")
def list_requests(  # noqa: PLR0917 - an option for each
    ctx: typer.Context,
    discord_user: Annotated[
        str | None, typer.Option(metavar="ID", help="Only of this user: the id at Discord, a number.")
    ] = None,
    status: Annotated[Status | None, typer.Option(help="Only those with this status.")] = None,
    limit: Limit = _MOST_SHOWN,
    before: Before = None,
    as_json: Json = False,
) -> None:
    """List requests, the latest first. Those with the same prompt are decided together."""
    snowflake = read_snowflake(discord_user) if discord_user is not None else None
    requests = app_of(ctx).consents.latest(snowflake, limit, before=before, status=status)
    print_list(
        [_request(request) for request in requests],
        ("id", "prompt", "discord_user", "application", "verified", "callback_host", "status", "created", "deadline"),
        as_json=as_json,
    )


@consent_cli.command("show", epilog="Example: doorward consent show 7")
def show_request(ctx: typer.Context, request_id: RequestId, as_json: Json = False) -> None:
    """Show a request, the keys that were granted, and its delivery."""
    app = app_of(ctx)
    request = app.consents.get(request_id)
    shown = {
        **_request(request),
        "application_id": request.application_id,
        "callback": request.callback,
        "state": bytes(request.state).decode(),
        "keys": app.consents.granted_keys(request_id),
        "delivery": next((delivery.id for delivery in app.deliveries.latest(request_id=request_id)), None),
    }
    print_one(shown, as_json=as_json)


@consent_cli.command("grant", epilog="Example: doorward consent grant 7 --keys 3,1")
def grant_request(
    ctx: typer.Context,
    request_id: RequestId,
    keys: Annotated[str, typer.Option(help="The ids of the user's keys, in the order to share, separated by commas.")],
    as_json: Json = False,
) -> None:
    """Share keys with the application. A running server delivers them at once.

    Every open request with the same prompt is decided: those of the same user and the same callback.
    """
    _resolve(ctx, request_id, Status.GRANTED, _key_ids(keys), as_json=as_json)


@consent_cli.command("cancel", epilog="Example: doorward consent cancel 7")
def cancel_request(ctx: typer.Context, request_id: RequestId, as_json: Json = False) -> None:
    """Share nothing: the application is told `user canceled`.

    Every open request with the same prompt is decided: those of the same user and the same callback.
    """
    _resolve(ctx, request_id, Status.CANCELED, as_json=as_json)


@consent_cli.command("block", epilog="Example: doorward consent block 7")
def block_request(ctx: typer.Context, request_id: RequestId, as_json: Json = False) -> None:
    """Record that Discord refused the message: the application is told `user blocked verification dm`.

    It may ask again. Every open request with the same prompt is decided.
    """
    _resolve(ctx, request_id, Status.BLOCKED, as_json=as_json)


@delivery_cli.command("list", epilog="Example: doorward delivery list --status abandoned")
def list_deliveries(  # noqa: PLR0917 - an option for each
    ctx: typer.Context,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only those with this status.")] = None,
    request: Annotated[int | None, typer.Option(metavar="REQUEST_ID", help="Only this request's.", **ROW_ID)] = None,
    limit: Limit = _MOST_SHOWN,
    before: Before = None,
    as_json: Json = False,
) -> None:
    """List deliveries, the latest first."""
    deliveries = app_of(ctx).deliveries.latest(status, limit, before, request)
    print_list(
        [_delivery(delivery) for delivery in deliveries],
        ("id", "request", "callback_host", "outcome", "status", "attempts", "next_attempt"),
        as_json=as_json,
    )


@delivery_cli.command("show", epilog="Example: doorward delivery show 7")
def show_delivery(ctx: typer.Context, delivery_id: DeliveryId, as_json: Json = False) -> None:
    """Show a delivery and each of its attempts; never what was sent."""
    app = app_of(ctx)
    print_one(_whole_delivery(app, app.deliveries.get(delivery_id)), as_json=as_json)


@delivery_cli.command("retry", epilog="Example: doorward delivery retry 7")
def retry_delivery(ctx: typer.Context, delivery_id: DeliveryId, as_json: Json = False) -> None:
    """Send an abandoned delivery again, from the start of its schedule."""
    app_of(ctx).deliveries.redeliver(delivery_id, actor=_ACTOR)
    print_done("queued delivery", delivery_id, as_json=as_json)


def _resolve(
    ctx: typer.Context, request_id: int, outcome: Status, key_ids: Sequence[int] = (), *, as_json: bool
) -> None:
    app = app_of(ctx)
    app.record_key()  # the job of the delivery is sealed with it
    request = app.consents.get(request_id)
    if request.finished_at is not None:  # others with its prompt may be open, but they were not named
        raise OperatorError(_already(request))
    resolved = app.consents.resolve(request_id, outcome, key_ids, actor=_ACTOR)
    if request_id not in resolved.ids:  # somebody was faster
        raise OperatorError(_already(app.consents.get(request_id)))
    if as_json:
        print_json({"id": request_id, "requests": resolved.ids})
    elif len(resolved.ids) == 1:
        typer.echo(f"{outcome} request {request_id}")
    else:
        typer.echo(f"{outcome} requests {', '.join(map(str, resolved.ids))} (one prompt)")


def _already(request: ConsentRequest) -> str:
    status = request.status.replace("_", " ")
    return f"request {request.id} was {status} at {iso(request.finished_at)} already: nothing was changed"


def _key_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = []
    if not ids or not all(ROW_ID["min"] <= key_id <= ROW_ID["max"] for key_id in ids):
        raise OperatorError("--keys: it has to be ids of keys, such as 3,1: see `doorward key list`")
    return ids


def _request(request: ConsentRequest) -> dict[str, Any]:
    return {
        "id": request.id,
        "prompt": request.prompt_id,
        "discord_user": request.discord_user,
        "application": request.name,
        "verified": request.application_id is not None,
        "callback_host": callback_host(request),
        "status": request.status,
        "created": iso(request.created_at),
        "deadline": iso(request.deadline_at),
        "finished": iso(request.finished_at),
    }


def _delivery(delivery: Delivery) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "request": delivery.request_id,
        "webhook_id": delivery.webhook_id,
        "callback_host": callback_host(delivery.request),
        "outcome": delivery.error or "keys",
        "status": delivery.status,
        "attempts": delivery.attempts,
        "next_attempt": iso(delivery.next_attempt_at),
        "created": iso(delivery.created_at),
        "finished": iso(delivery.finished_at),
    }


def _whole_delivery(app: App, delivery: Delivery) -> dict[str, Any]:
    attempts = [
        {
            "started": iso(attempt.started_at),
            "milliseconds": attempt.milliseconds,
            "http_status": attempt.status,
            "failure": attempt.error,
        }
        for attempt in app.deliveries.attempts(delivery.id)
    ]
    return {**_delivery(delivery), "log": attempts}
