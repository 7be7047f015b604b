"""Commands about the shipped recipes and the named policies."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sift_cli.cli import shipped
from sift_cli.cli.options import Json, ShippedName, print_json, stdout
from sift_cli.errors import SiftError


def ls() -> None:
    """List the shipped recipes."""
    table = Table("name", "what it does")
    for name, about in shipped.listing().items():
        table.add_row(name, about)
    stdout.print(table)


def policies(as_json: Json = False) -> None:
    """List the named ways to choose entries: rows of `selection.policy`."""
    from dataclasses import asdict

    from sift_cli.selection.policies import POLICIES

    if as_json:
        print_json({name: asdict(row) for name, row in POLICIES.items()})
        return
    table = Table("policy", "score, scope, structure, schedule", "source")
    table.columns[0].no_wrap = True
    for name, row in POLICIES.items():
        chosen = ", ".join([row.score, row.scope, row.structure, row.schedule])
        more = "".join(f"; {key}: {value}" for key, value in row.defaults.items())
        table.add_row(name, chosen + more, row.paper)
    stdout.print(table)


def show(
    name: ShippedName,
) -> None:
    """Print a shipped recipe."""
    typer.echo(shipped.find(name, only_shipped=True).read_text(encoding="utf-8"), nl=False)


def cp(
    name: ShippedName,
    to: Annotated[Path | None, typer.Argument(help="A file or folder; here if not given.")] = None,
) -> None:
    """Copy a shipped recipe, to change it."""
    source = shipped.find(name, only_shipped=True)
    target = to or Path()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise SiftError(f"{target} exists already")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    stdout.print(f"{target}")
