"""`doorward provider`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr, ValidationError

from doorward_server.app import App
from doorward_server.cli.base import HELP, Json, app_of, print_done, print_list, print_one
from doorward_server.errors import OperatorError
from doorward_server.providers import Kind, Provider, TokenAuth, TokenMethod
from doorward_server.settings import CLIENT_SECRET_VARIABLE, client_secret_variable

cli = typer.Typer(help="OAuth 2 services that users connect to or log in with.", **HELP)
ProviderId = Annotated[str, typer.Argument(metavar="ID", help="Its id.")]


@cli.command(epilog="Example: doorward provider add xyz --lookup-url 'https://oauth.example.org/user?t={access_token}'")
def add(  # noqa: PLR0917 - an option for each setting
    ctx: typer.Context,
    provider_id: ProviderId,
    kind: Annotated[Kind, typer.Option(help="identity: users log in with it. kai: its tokens are kept.")] = "identity",
    lookup_url: Annotated[
        str | None, typer.Option(help="Tells whose account a token is for; holds {access_token}.")
    ] = None,
    lookup_id_property: Annotated[
        str | None, typer.Option(help="Where the lookup's answer holds the id; dots lead deeper. \\[default: id]")
    ] = None,
    token_url: Annotated[str | None, typer.Option(help="Where codes are exchanged.")] = None,
    token_method: Annotated[TokenMethod | None, typer.Option(help="How. \\[default: post]")] = None,
    token_auth: Annotated[
        TokenAuth | None, typer.Option(help="How it knows this client. \\[default: client_secret_post]")
    ] = None,
    client_id: Annotated[str | None, typer.Option(help="The id that it knows this installation by.")] = None,
    client_secret_file: Annotated[
        Path | None,
        typer.Option(
            help=f"A file with the client's secret (`-`: standard input). \\[default: ${CLIENT_SECRET_VARIABLE}, "
            "else a prompt]",
            allow_dash=True,
        ),
    ] = None,
    redirect_uri: Annotated[str | None, typer.Option(help="As registered there.")] = None,
    authorize_url: Annotated[str | None, typer.Option(help="Where users allow the access.")] = None,
    revocation_url: Annotated[str | None, typer.Option(help="Where tokens are revoked.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one request may take. \\[default: 5]")] = None,
    as_json: Json = False,
) -> None:
    """Add a provider. A running server knows it at once; the client's secret is kept sealed."""
    app = app_of(ctx)
    given: dict[str, Any] = {
        "id": provider_id,
        "kind": kind,
        "lookup_url": lookup_url,
        "lookup_id_property": lookup_id_property,
        "token_url": token_url,
        "token_method": token_method,
        "token_auth": token_auth,
        "client_id": client_id,
        "redirect_uri": redirect_uri,
        "authorize_url": authorize_url,
        "revocation_url": revocation_url,
        "scopes": tuple(scope) if scope else None,
        "timeout": timeout,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if client_id and token_url and token_auth != "none":  # noqa: S105
        given["client_secret"] = _read_secret(client_secret_file)
    app.record_key()  # the secret is sealed with it
    app.providers.add(_checked(app, given))
    print_done("added provider", provider_id, as_json=as_json)


@cli.command("list", epilog="Example: doorward provider list")
def list_providers(ctx: typer.Context, as_json: Json = False) -> None:
    """List the providers, those of the settings file too."""
    app = app_of(ctx)
    rows = [_provider(app, provider) for provider in app.providers.list()]
    print_list(rows, ("id", "kind", "source", "token_url", "lookup_url"), as_json=as_json)


@cli.command(epilog="Example: doorward provider show xyz")
def show(ctx: typer.Context, provider_id: ProviderId, as_json: Json = False) -> None:
    """Show a provider's settings, but not its secret."""
    app = app_of(ctx)
    print_one(_provider(app, app.providers.get(provider_id)), as_json=as_json)


@cli.command(epilog="Example: doorward provider remove xyz")
def remove(
    ctx: typer.Context,
    provider_id: ProviderId,
    unlink: Annotated[bool, typer.Option("--unlink", help="Remove the users' identities there, too.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a provider that was added by command."""
    app_of(ctx).providers.remove(provider_id, unlink=unlink)
    print_done("removed provider", provider_id, as_json=as_json)


def _read_secret(file: Path | None) -> SecretStr:
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
        secret = text.removesuffix("\n")
    else:
        secret = client_secret_variable() or _ask_secret()
    if not secret:
        raise OperatorError("the client secret is empty")
    return SecretStr(secret)


def _ask_secret() -> str:
    if not sys.stdin.isatty():
        raise OperatorError(
            f"the client secret is missing: set {CLIENT_SECRET_VARIABLE}, give --client-secret-file, "
            "or run this in a terminal to be asked for it"
        )
    secret: str = typer.prompt("Client secret", hide_input=True, err=True)
    return secret


def _checked(app: App, given: dict[str, Any]) -> Provider:
    try:
        provider = Provider.model_validate(given)
        app.settings.check_timeouts(provider)
    except ValidationError as error:
        raise OperatorError("\n".join(map(_sentence, error.errors()))) from None
    except ValueError as error:
        raise OperatorError(str(error)) from None
    return provider


def _sentence(problem: Any) -> str:
    """One problem that pydantic found, by the option's name. It never shows the value."""
    what = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    return f"--{problem['loc'][0].replace('_', '-')}: {what}" if problem["loc"] else what


def _provider(app: App, provider: Provider) -> dict[str, Any]:
    settings = provider.model_dump(mode="json", exclude={"id", "client_secret", "client_secret_file"})
    return {
        "id": provider.id,
        "source": "settings file" if provider.id in app.providers.configured else "database",
        **settings,
        "client_secret": "set" if provider.secret else None,
    }
