"""Commands about the shipped recipes and the named policies."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sift_cli.cli.options import Json, ShippedName, print_json, print_table, stdout
from sift_cli.errors import SiftError
from sift_cli.system import shipped


def ls() -> None:
    """List the shipped recipes.

    Example: sift recipes ls
    """
    table = Table("name", "what it does")
    for name, about in shipped.listing().items():
        table.add_row(name, about)
    print_table(table)


def policies(as_json: Json = False) -> None:
    """List the named ways to choose entries: rows of `selection.policy`.

    Example: sift recipes policies
    """
    from dataclasses import asdict

    from sift_cli.selection.policies import POLICIES

    if as_json:
        print_json({name: asdict(row) for name, row in POLICIES.items()})
        return
    table = Table("policy", "score, scope, structure, schedule", "source")
    table.columns[0].no_wrap = True
    for name, row in POLICIES.items():
        chosen = ", ".join([row.score, row.scope, row.structure, row.schedule])
        more = "".join(f"; {key}: {value}" for key, value in row.more.items())
        table.add_row(name, chosen + more, row.paper)
    print_table(table)


def show(
    name: ShippedName,
) -> None:
    """Print a shipped recipe.

    Example: sift recipes show glue/rte
    """
    typer.echo(shipped.find(name, only_shipped=True).read_text(encoding="utf-8"), nl=False)


def cp(
    name: ShippedName,
    to: Annotated[Path | None, typer.Argument(help="A file or folder; here if not given.")] = None,
) -> None:
    """Copy a shipped recipe, to change it: every key in sight, and a schema for the editor.

    Example: sift recipes cp glue/rte mine.yaml
    """
    source = shipped.find(name, only_shipped=True)
    target = to or Path()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise SiftError(f"{target} exists already")
    if not target.parent.is_dir():
        raise SiftError(f"{target.parent}: no such folder")
    from sift_cli.cli.editing import SCHEMA_FILE, editable

    target.write_text(editable(source.read_text(encoding="utf-8")), encoding="utf-8")
    beside = target.parent / SCHEMA_FILE
    schema(beside)
    stdout.print(f"{target}\n{beside}: by it an editor checks and completes", highlight=False)


def schema(
    out: Annotated[Path | None, typer.Option(help="A file to write it to.")] = None,
) -> None:
    """Print the JSON schema of recipes, by which editors check and complete them.

    Example: sift recipes schema --out sift-recipe.schema.json
    """
    import json

    from sift_cli.cli.editing import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
