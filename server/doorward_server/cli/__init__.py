"""The command line of `doorward`: a module for each group of commands. Imports `app` and the domain."""

from doorward_server.cli import clients, credentials, providers, users
from doorward_server.cli.root import cli, run

__all__ = ["run"]

cli.add_typer(users.cli, name="user")
cli.add_typer(credentials.session_cli, name="session")
cli.add_typer(clients.cli, name="client")
cli.add_typer(providers.cli, name="provider")
cli.add_typer(credentials.token_cli, name="token")
