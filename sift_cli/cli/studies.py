"""Commands that measure and plan."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sift_cli.cli import shipped
from sift_cli.cli.options import (
    AllowCode,
    Device,
    Json,
    Overrides,
    RecipeArg,
    parse_size,
    print_json,
    stderr,
    stdout,
)
from sift_cli.cli.tables import show_plan


def probe(
    recipe: RecipeArg,
    out: Annotated[Path | None, typer.Option(help="The folder for probe.json and plots.")] = None,
    policies: Annotated[
        str, typer.Option(help="More policies to look at, with commas; as `sift recipes policies`.")
    ] = "",
    steps: Annotated[int, typer.Option(min=2, help="Training steps to look at.")] = 30,
    overrides: Overrides = None,
    device: Device = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Measure on your model and data what sparse fine-tuning rests on."""
    from sift_cli.recipe import load_recipe

    path = shipped.find(recipe)
    resolved = load_recipe(path, overrides or [])
    folder = out or Path(f"runs/{path.stem}-probe")
    from sift_cli.analysis import probe as run

    more = [name.strip() for name in policies.split(",") if name.strip()]
    found = run(
        resolved,
        folder,
        policies=more,
        steps=steps,
        device=device,
        allow_code=allow_code,
        console=stderr,
    )
    if as_json:
        print_json(found)
        return
    table = Table(
        "mask",
        "first",
        "mean",
        "last",
        "replaced",
        "moment lost",
        title=f"share of the gradient's norm kept over {found['steps']} steps",
        caption="replaced: share of the entries, moment lost: share of Adam's, at each step",
    )
    for name, kept in found["kept_norm_share"].items():
        shares = [f"{kept[key]:.3f}" for key in ("first", "mean", "last")]
        rest = [kept["replaced_per_step"], kept["second_moment_lost_per_step"]]
        table.add_row(name, *shares, *(f"{value:.3f}" for value in rest))
    stdout.print(table)
    for sentence in found["says"]:
        stdout.print(sentence, highlight=False)
    stdout.print(f"Plots and probe.json: {folder}")


def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    device: Device = None,
    memory: Annotated[
        str | None, typer.Option(help="Plan for a device with so much memory, such as 24GB.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and time three steps.")
    ] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="List the values that are defaults as well.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Tell what a recipe will train and need; trains nothing, and needs no weights."""
    from sift_cli.recipe import trace_recipe

    resolved, origins = trace_recipe(shipped.find(recipe), overrides or [])
    there = None if memory is None else parse_size(memory)
    from sift_cli.analysis import plan as run

    found = run(
        resolved,
        device=device,
        memory=there,
        measure=measure,
        allow_code=allow_code,
        console=stderr,
    )
    found = {"recipe": resolved.model_dump(mode="json"), "origins": origins, **found}
    if as_json:
        print_json(found)
        return
    show_plan(stdout, found, show_all)
