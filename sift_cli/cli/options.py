"""What commands share: options, consoles, the form of numbers."""

import json
import re
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import render
from rich.table import Table

from sift_cli.errors import SiftError
from sift_cli.system.launch import launch, launched

stdout = Console(soft_wrap=True)
stderr = Console(stderr=True, markup=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no advice: results and errors only.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Let score and metrics run functions in files."),
]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")
]
Devices = Annotated[
    int, typer.Option(min=1, help="So many processes on this node, each with a GPU of its own.")
]
Tuned = Annotated[str, typer.Argument(help="A run folder, a delta file, or a model folder or id.")]
RecipeArg = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
ShippedName = Annotated[str, typer.Argument(help="As `sift recipes ls` lists it.")]
Longest = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="The most tokens of an answer.")
]
BaseModelPath = Annotated[
    str | None, typer.Option(help="The base model, if not the one the delta names.")
]


def run_on(devices: int, device: str | None) -> None:
    """Where several devices are asked for: runs this command in as many processes, and exits.

    In one of these, and with one device, it returns. Raises SiftError where that cannot be.
    """
    if devices == 1 or launched().world == devices:
        return
    if launched().world > 1:
        raise SiftError(
            f"--devices {devices}: a launcher has started {launched().world} processes already; "
            "leave it out"
        )
    from sift_cli.models.devices import cores_here, pick_device, require_devices

    require_devices(devices, device)
    if pick_device(device).type == "cpu" and devices > (cores := cores_here()):
        stderr.print(
            f"--devices {devices}: there are {cores} cores, so that processes wait for each other",
            highlight=False,
        )
    raise typer.Exit(launch(devices, "sift_cli", sys.argv[1:]))


def print_json(value: dict[str, Any]) -> None:
    """The one object that a command with --json puts on stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_table(table: Table) -> None:
    """The table where someone watches; else plain lines, its cells between tabs."""
    if stdout.is_terminal:
        stdout.print(table)
        return
    lines = list(zip(*(column.cells for column in table.columns), strict=True))
    if table.show_header:
        lines = [tuple(column.header for column in table.columns), *lines]
    if table.title:
        typer.echo(table.title)
    for line in lines:
        typer.echo("\t".join(str(render(str(cell))) for cell in line))
    if table.caption:
        typer.echo(table.caption)


def size(count: float) -> str:
    """Bytes as a person reads them: powers of 1000, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GB or 512 MB, in powers of 1000; GiB and its kin in powers of 1024.

    Raises SiftError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?)B?", text.strip().upper())
    if match is None:
        raise SiftError(f"--memory {text}: give a size such as 24GB or 80GiB")
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * float(base) ** (1 + "KMGT".index(match[2])))
