"""`doorward app`."""

from datetime import timedelta
from typing import Annotated, Any

import typer

from doorward_server.applications import CallbackFormat
from doorward_server.cli.base import (
    HELP,
    Json,
    OverlapHours,
    app_of,
    iso,
    print_done,
    print_json,
    print_list,
    print_one,
    print_rotated,
)
from doorward_server.errors import OperatorError
from doorward_server.models import Application

cli = typer.Typer(
    help="Applications: programs that may ask users for their API keys under a name of their own. None is ever "
    "removed, so that nobody else gets its name or its prefixes: disable it.",
    **HELP,
)
ApplicationId = Annotated[
    str, typer.Argument(metavar="APPLICATION_ID", help="The application's id; see `doorward app list`.")
]


@cli.command(epilog="Example: doorward app create --name 'My super bot' --callback-prefix https://example.com/callback")
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Option(help="What users are shown; no other application's may look like it.")],
    callback_prefix: Annotated[
        list[str],
        typer.Option(
            metavar="URL",
            help="Keys are sent only to URLs under it: .../cb stands for .../cb and .../cb/x, not .../cbx. May be "
            "repeated.",
        ),
    ],
    callback_format: Annotated[
        CallbackFormat, typer.Option("--format", help="What the callbacks carry: form fields or JSON.")
    ] = "form",
    as_json: Json = False,
) -> None:
    """Add an application; print its id and secret (the user name and password of HTTP Basic) and its signing secret.

    The signing secret is for checking that a callback comes from here (Standard Webhooks). Each secret is shown only
    this once.
    """
    app = app_of(ctx)
    app.record_key()  # the signing secret is sealed with it
    made = app.applications.create(name, callback_prefix, callback_format)
    if as_json:
        shown = _application(made.application)
        print_json({**shown, "secret": made.secret, "signing_secret": made.signing_secret})
    else:
        typer.echo(f"id: {made.application.id}\nsecret: {made.secret}\nsigning_secret: {made.signing_secret}")


@cli.command("list", epilog="Example: doorward app list")
def list_applications(ctx: typer.Context, as_json: Json = False) -> None:
    """List the applications, disabled ones too."""
    rows = [_application(application) for application in app_of(ctx).applications.list()]
    print_list(rows, ("id", "name", "enabled", "callback_prefixes"), as_json=as_json)


@cli.command(epilog="Example: doorward app show app_0123456789abcdef")
def show(ctx: typer.Context, application_id: ApplicationId, as_json: Json = False) -> None:
    """Show an application, but none of its secrets."""
    print_one(_application(app_of(ctx).applications.get(application_id)), as_json=as_json)


@cli.command(epilog="Example: doorward app change app_0123456789abcdef --callback-prefix https://new.example/callback")
def change(  # noqa: PLR0917 - an option for each setting
    ctx: typer.Context,
    application_id: ApplicationId,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    callback_prefix: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="In place of all that it had; may be repeated.")
    ] = None,
    callback_format: Annotated[
        CallbackFormat | None, typer.Option("--format", help="What the callbacks carry from now on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Change what is given, and leave the rest as it is."""
    if name is None and not callback_prefix and callback_format is None:
        raise OperatorError("there is nothing to change: give --name, --callback-prefix or --format")
    app_of(ctx).applications.change(application_id, name, callback_prefix or None, callback_format)
    print_done("changed application", application_id, as_json=as_json)


@cli.command(epilog="Example: doorward app rotate app_0123456789abcdef --overlap-hours 1")
def rotate(
    ctx: typer.Context, application_id: ApplicationId, overlap_hours: OverlapHours = 24, as_json: Json = False
) -> None:
    """Make a new secret and print it; it is shown only this once. An older one still in its overlap ends at once."""
    app = app_of(ctx)
    overlap = timedelta(hours=overlap_hours)
    secret = app.applications.rotate(application_id, overlap)
    print_rotated(app, application_id, "secret", secret, overlap, as_json=as_json)


@cli.command("rotate-signing", epilog="Example: doorward app rotate-signing app_0123456789abcdef --overlap-hours 1")
def rotate_signing(
    ctx: typer.Context, application_id: ApplicationId, overlap_hours: OverlapHours = 24, as_json: Json = False
) -> None:
    """Make a new signing secret and print it; it is shown only this once.

    For the overlap, callbacks carry a signature by the previous secret, too. An older one still in its overlap ends.
    """
    app = app_of(ctx)
    overlap = timedelta(hours=overlap_hours)
    app.record_key()  # the signing secret is sealed with it
    secret = app.applications.rotate_signing(application_id, overlap)
    print_rotated(app, application_id, "signing_secret", secret, overlap, as_json=as_json)


@cli.command(epilog="Example: doorward app disable app_0123456789abcdef")
def disable(ctx: typer.Context, application_id: ApplicationId, as_json: Json = False) -> None:
    """Refuse an application's calls from now on, and send it nothing more.

    Its name and its prefixes stay its own. What it has asked goes on; the answers wait until it is enabled again.
    """
    app_of(ctx).applications.enable(application_id, enabled=False)
    print_done("disabled application", application_id, as_json=as_json)


@cli.command(epilog="Example: doorward app enable app_0123456789abcdef")
def enable(ctx: typer.Context, application_id: ApplicationId, as_json: Json = False) -> None:
    """Let a disabled application call again, with the secrets that it had."""
    app_of(ctx).applications.enable(application_id, enabled=True)
    print_done("enabled application", application_id, as_json=as_json)


@cli.command(epilog="Example: TOKEN=$(doorward app token app_0123456789abcdef --days 90)")
def token(
    ctx: typer.Context,
    application_id: ApplicationId,
    days: Annotated[
        int | None,
        typer.Option(help="It expires after so many days. \\[default: never]", min=1, max=36500),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a service token, with which an application calls over gRPC, and print its value. It is shown only now.

    `doorward token list` and `doorward token revoke` know it, too.
    """
    app = app_of(ctx)
    application = app.applications.get(application_id)
    if not application.enabled:
        raise OperatorError(f"the application is disabled: `doorward app enable {application_id}` enables it")
    made, value = app.service_tokens.create(
        (), application.name, timedelta(days=days) if days else None, application_id
    )
    if as_json:
        print_json({"id": made.id, "application": application_id, "expires": iso(made.expires_at), "token": value})
    else:
        typer.echo(value)


def _application(application: Application) -> dict[str, Any]:
    return {
        "id": application.id,
        "name": application.name,
        "enabled": application.enabled,
        "callback_prefixes": application.callback_prefixes,
        "callback_format": application.callback_format,
        "created": iso(application.created_at),
    }
