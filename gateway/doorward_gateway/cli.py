"""The command line of `doorward-gateway`. Imports `launcher`, `config` and `settings`."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import yaml

from doorward_gateway import settings as settings_module
from doorward_gateway.config import render
from doorward_gateway.launcher import Launcher
from doorward_gateway.settings import GatewayError

cli = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> None:
    """The console script: errors are one line on stderr, exit code 1."""
    try:
        cli(prog_name="doorward-gateway")
    except GatewayError as error:
        sys.exit(f"doorward-gateway: {error}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"doorward-gateway {version('doorward')}")
        raise typer.Exit


@cli.command(
    epilog="Settings: \\[gateway] in doorward.toml, or DOORWARD_GATEWAY_* in the environment. "
    "Example: DOORWARD_GATEWAY_PORT=8081 doorward-gateway"
)
def gateway(
    home: Annotated[Path | None, typer.Option(help="The home. \\[default: $DOORWARD_HOME, or var/]")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Let Envoy check the configuration, and exit.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print what Envoy gets, and exit.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Run the public gateway, an Envoy in front of the server, until SIGTERM or Ctrl-C."""
    settings = settings_module.load(home)
    if print_config:
        typer.echo(yaml.safe_dump(render(settings), sort_keys=False))
        return
    launcher = Launcher(settings)
    if validate:
        raise typer.Exit(launcher.validate())
    scheme = "http" if settings.gateway.tls_cert_file is None else "https"
    url = f"{scheme}://{settings.gateway.host}:{settings.gateway.port}"
    raise typer.Exit(launcher.run(on_ready=lambda: typer.echo(f"gateway on {url}", err=True)))
