"""The command line of `doorward`: a module for each group of commands. Imports `app` and the domain."""

from doorward_server.cli import (
    applications,
    audit,
    clients,
    connections,
    consents,
    credentials,
    keys,
    master_key,
    providers,
    transfer,
    users,
)
from doorward_server.cli.root import cli, run

__all__ = ["run"]

cli.add_typer(users.cli, name="user")
cli.add_typer(connections.cli, name="connection")
cli.add_typer(keys.cli, name="key")
cli.add_typer(credentials.session_cli, name="session")
cli.add_typer(clients.cli, name="client")
cli.add_typer(applications.cli, name="app")
cli.add_typer(consents.consent_cli, name="consent")
cli.add_typer(consents.delivery_cli, name="delivery")
cli.add_typer(providers.cli, name="provider")
cli.add_typer(credentials.token_cli, name="token")
cli.add_typer(audit.cli, name="audit")
cli.command("migrate-data", epilog="Example: doorward migrate-data --to postgresql://doorward@db.example/doorward")(
    transfer.migrate_data
)
cli.add_typer(master_key.cli, name="master-key")
