"""`doorward master-key`."""

from typing import Annotated, Any

import typer

from doorward_server.cli.base import HELP, Json, Yes, app_of, confirm, iso, print_done, print_json, print_list, progress
from doorward_server.crypto import MasterKey
from doorward_server.errors import OperatorError
from doorward_server.master_keys import KeyStatus, Rotation

cli = typer.Typer(
    help="The master keys, which all else is sealed with. Commands tell their ids, never the keys.", **HELP
)


@cli.command(epilog="Example: doorward master-key status")
def status(ctx: typer.Context, as_json: Json = False) -> None:
    """List the master keys, and what each is needed for; exit code 1 if one is needed that is not at hand."""
    master_keys = app_of(ctx).master_keys
    statuses = master_keys.status()
    print_list([_row(one) for one in statuses], ("id", "seals", "at_hand", "first_used", "values"), as_json=as_json)
    master_keys.check(statuses)


@cli.command(epilog="Example: doorward master-key rotate")
def rotate(
    ctx: typer.Context,
    drop_old: Annotated[
        bool, typer.Option("--drop", help="Also drop the other keys, but those that values need.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Seal with a new master key, and seal anew what is there, while the servers go on.

    Seals with the key that `doorward master-key add` added, if there is one. A rotation that was cut off goes on.
    """
    master_keys = app_of(ctx).master_keys
    with progress("sealing anew") as on_progress:
        rotation = master_keys.rotate(on_progress)
    dropped = rotation.unneeded if drop_old else []
    for key_id in dropped:
        master_keys.drop(key_id)
    if as_json:
        print_json(
            {
                "id": rotation.key_id,
                "resealed": rotation.resealed,
                "damaged": rotation.damaged,
                "needed": rotation.needed,
                "unneeded": rotation.unneeded,
                "dropped": dropped,
            }
        )
    else:
        _tell(rotation, dropped)
    if rotation.needed:
        master_keys.check(master_keys.status())
        raise OperatorError(
            f"values were sealed with the master key {rotation.needed[0]} meanwhile, by a process with another key "
            "file: copy this one to every host, and do this again"
        )


@cli.command(epilog="Example: doorward master-key add")
def add(ctx: typer.Context, as_json: Json = False) -> None:
    """Add a new master key that does not seal yet: copy the key file to all hosts, then rotate."""
    print_done("added master key", app_of(ctx).master_keys.add(), as_json=as_json)


@cli.command(epilog="Example: doorward master-key drop 0a1b2c3d")
def drop(
    ctx: typer.Context,
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="The key's id; see `doorward master-key status`.")],
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Forget a master key that nothing needs any more. Backups of the database from before the rotation still do."""
    master_keys = app_of(ctx).master_keys
    if not yes:
        confirm(f"Drop the master key {key_id}? Backups from before the rotation cannot be opened without it.")
    master_keys.drop(key_id)
    print_done("dropped master key", key_id, as_json=as_json)


@cli.command(epilog="Example: doorward master-key generate")
def generate(as_json: Json = False) -> None:
    """Print a new master key, for DOORWARD_MASTER_KEY. It is kept nowhere, and is a secret."""
    key = MasterKey.generate()
    if as_json:
        print_json({"id": key.id, "key": str(key)})
    else:
        typer.echo(str(key))


def _tell(rotation: Rotation, dropped: list[str]) -> None:
    typer.echo(f"the master key {rotation.key_id} seals; values sealed anew: {rotation.resealed}")
    if rotation.damaged:
        typer.echo(f"values that no key opens, for they are damaged: {rotation.damaged}", err=True)
    for key_id in rotation.unneeded:
        if key_id in dropped:
            typer.echo(f"dropped master key {key_id}; keep it as long as backups from before the rotation", err=True)
        else:
            typer.echo(
                f"nothing but backups needs the master key {key_id} any more: when every host has the new key file, "
                f"run `doorward master-key drop {key_id}`",
                err=True,
            )


def _row(status: KeyStatus) -> dict[str, Any]:
    return {
        "id": status.id,
        "seals": status.seals,
        "at_hand": status.is_at_hand,
        "first_used": iso(status.first_used_at),
        "values": status.values,
    }
