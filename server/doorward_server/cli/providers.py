"""`doorward provider`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from doorward_server.app import App
from doorward_server.cli.base import HELP, Json, app_of, has_terminal, print_done, print_list, print_one
from doorward_server.cli.files import read_text
from doorward_server.errors import OperatorError
from doorward_server.providers import Kind, Provider, SettingsMissing, TokenAuth, TokenMethod
from doorward_server.settings import CLIENT_SECRET_VARIABLE, client_secret_variable

cli = typer.Typer(help="OAuth 2 services that users connect to or log in with.", **HELP)
ProviderId = Annotated[str, typer.Argument(metavar="ID", help="Its id; see `doorward provider list`.")]


@cli.command(epilog="Example: doorward provider add xyz --lookup-url 'https://oauth.example.org/user?t={access_token}'")
def add(  # noqa: PLR0917 - an option for each setting
    ctx: typer.Context,
    provider_id: Annotated[
        str, typer.Argument(metavar="ID", help="A name of your choice (a-z, 0-9, -, _); clients send it as `provider`.")
    ],
    kind: Annotated[
        Kind, typer.Option(help="identity: users log in with it. kai (the ids flo, min, eag): its tokens are kept.")
    ] = "identity",
    lookup_url: Annotated[
        str | None, typer.Option(help="Tells whose account a token is for; holds {access_token}.")
    ] = None,
    lookup_id_property: Annotated[
        str | None,
        typer.Option(help="Where the lookup's answer holds the account's id, such as data.id. \\[default: id]"),
    ] = None,
    token_url: Annotated[
        str | None, typer.Option(help="Where codes are exchanged; needed if clients send codes.")
    ] = None,
    token_method: Annotated[
        TokenMethod | None, typer.Option(help="The HTTP method of the exchange. \\[default: post]")
    ] = None,
    token_auth: Annotated[
        TokenAuth | None, typer.Option(help="How Doorward authenticates there. \\[default: client_secret_post]")
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
    redirect_uri: Annotated[
        str | None, typer.Option(help="The redirect URI that is registered at the provider.")
    ] = None,
    authorize_url: Annotated[str | None, typer.Option(help="Where users allow the access.")] = None,
    revocation_url: Annotated[str | None, typer.Option(help="Where tokens are revoked.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="A scope, for your own records; may be repeated.")] = None,
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
    needs_secret = bool(client_id and token_url and token_auth != "none")  # noqa: S105
    if client_secret_file is not None and not needs_secret:
        raise OperatorError("--client-secret-file is of no use without --token-url and --client-id")
    if needs_secret:
        # What is wrong with the rest is told before anybody has to type a secret.
        app.providers.check_free(_checked(app, {**given, "client_secret": "-"}))
        given["client_secret"] = _read_secret(client_secret_file)
    provider = _checked(app, given)
    app.record_key()  # the secret is sealed with it
    app.providers.add(provider)
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
    unlink: Annotated[
        bool,
        typer.Option("--unlink", help="Also remove the users' identities there, who then cannot log in with them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove a provider that was added by command."""
    app_of(ctx).providers.remove(provider_id, unlink=unlink)
    print_done("removed provider", provider_id, as_json=as_json)


def _read_secret(file: Path | None) -> str:
    if file is not None:
        secret = read_text(file, "--client-secret-file").removesuffix("\n")
    else:
        secret = client_secret_variable() or _ask_secret()
    if not secret:
        raise OperatorError("the client secret is empty")
    return secret


def _ask_secret() -> str:
    if not has_terminal():
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
        raise OperatorError("; ".join(map(_sentence, error.errors()))) from None
    except ValueError as error:
        raise OperatorError(str(error)) from None
    return provider


def _sentence(problem: Any) -> str:
    """One problem that pydantic found, by the option's name. It never shows the value."""
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, SettingsMissing):
        return f"--kind {error.kind} needs {', '.join(map(_option, error.names))}"
    what = str(error) if problem["type"] == "value_error" else problem["msg"][0].lower() + problem["msg"][1:]
    return f"{_option(problem['loc'][0])}: {what}" if problem["loc"] else what


def _option(setting: str) -> str:
    return f"--{setting.removesuffix('s') if setting == 'scopes' else setting}".replace("_", "-")


def _provider(app: App, provider: Provider) -> dict[str, Any]:
    settings = provider.model_dump(mode="json", exclude={"id", "client_secret", "client_secret_file"})
    return {
        "id": provider.id,
        "source": "settings file" if provider.id in app.providers.configured else "database",
        **settings,
        "client_secret": "set" if provider.secret else None,
    }
