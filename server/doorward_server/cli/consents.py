"""`doorward consent` and `doorward delivery`: what the bot does by direct messages, by hand."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from doorward_server.app import App
from doorward_server.cli.base import HELP, Json, app_of, iso, print_done, print_list, print_one
from doorward_server.consents import Status, callback_host
from doorward_server.delivery import Status as DeliveryStatus
from doorward_server.errors import OperatorError
from doorward_server.models import ConsentRequest, Delivery

consent_cli = typer.Typer(help="Applications' requests for users' keys.", **HELP)
delivery_cli = typer.Typer(help="The outcomes of requests, on their way to the applications.", **HELP)
RequestId = Annotated[int, typer.Argument(metavar="REQUEST_ID", help="The request's id.")]
DeliveryId = Annotated[int, typer.Argument(metavar="DELIVERY_ID", help="The delivery's id.")]
_ACTOR = "operator"


@consent_cli.command("list", epilog="Example: doorward consent list --discord-user 80351110224678912")
def list_requests(
    ctx: typer.Context,
    discord_user: Annotated[str, typer.Option(help="The user's id at Discord.")],
    as_json: Json = False,
) -> None:
    """List a user's requests, the latest first."""
    requests = app_of(ctx).consents.requests_of(discord_user)
    print_list(
        [_request(request) for request in requests],
        ("id", "application", "verified", "callback_host", "status", "created", "deadline"),
        as_json=as_json,
    )


@consent_cli.command("show", epilog="Example: doorward consent show 7")
def show_request(ctx: typer.Context, request_id: RequestId, as_json: Json = False) -> None:
    """Show a request."""
    print_one(_request(app_of(ctx).consents.get(request_id)), as_json=as_json)


@consent_cli.command("grant", epilog="Example: doorward consent grant 7 --keys 3,1")
def grant_request(
    ctx: typer.Context,
    request_id: RequestId,
    keys: Annotated[str, typer.Option(help="The ids of the user's keys, in the order to share, separated by commas.")],
    as_json: Json = False,
) -> None:
    """Share keys with the application. A running server delivers them at once."""
    _resolve(ctx, request_id, Status.GRANTED, _key_ids(keys), as_json=as_json)


@consent_cli.command("cancel", epilog="Example: doorward consent cancel 7")
def cancel_request(ctx: typer.Context, request_id: RequestId, as_json: Json = False) -> None:
    """Share nothing: the application is told `user canceled`."""
    _resolve(ctx, request_id, Status.CANCELED, as_json=as_json)


@consent_cli.command("block", epilog="Example: doorward consent block 7")
def block_request(ctx: typer.Context, request_id: RequestId, as_json: Json = False) -> None:
    """The user cannot be asked: the application is told `user blocked verification dm`."""
    _resolve(ctx, request_id, Status.BLOCKED, as_json=as_json)


@delivery_cli.command("list", epilog="Example: doorward delivery list --status abandoned")
def list_deliveries(
    ctx: typer.Context,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only those that stand so.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)] = 100,
    before: Annotated[int | None, typer.Option(help="Only older ones than this id.")] = None,
    as_json: Json = False,
) -> None:
    """List deliveries, the latest first."""
    deliveries = app_of(ctx).deliveries.latest(status, limit, before)
    print_list(
        [_delivery(delivery) for delivery in deliveries],
        ("id", "request", "callback_host", "status", "error", "attempts", "next_attempt"),
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
    status = app.consents.resolve(request_id, outcome, key_ids, actor=_ACTOR)
    if status is not outcome:
        raise OperatorError(f"the request {request_id} has its outcome already: {status}")
    print_done(f"{outcome} request", request_id, as_json=as_json)


def _key_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OperatorError("--keys: it has to be ids of keys, such as 3,1: see `doorward key list`") from None


def _request(request: ConsentRequest) -> dict[str, Any]:
    return {
        "id": request.id,
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
        "status": delivery.status,
        "error": delivery.error,
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
            "status": attempt.status,
            "error": attempt.error,
        }
        for attempt in app.deliveries.attempts(delivery.id)
    ]
    return {**_delivery(delivery), "log": attempts}
