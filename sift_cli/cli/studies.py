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
    Quiet,
    RecipeArg,
    parse_size,
    print_json,
    print_table,
    silent,
    stderr,
    stdout,
)
from sift_cli.cli.tables import show_compare, show_plan
from sift_cli.errors import SiftError


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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure on your model and data what sparse fine-tuning rests on.

    Example: sift probe glue/rte --steps 30 --policies snip,rows
    """
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
        console=silent if quiet else stderr,
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
    print_table(table)
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
    """Tell what a recipe will train and need; trains nothing, and needs no weights.

    Example: sift plan glue/rte
    """
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
    show_plan(found, show_all)


def compare(
    what: Annotated[
        list[str], typer.Argument(help="A recipe, or folders of finished runs to tabulate.")
    ],
    methods: Annotated[
        str,
        typer.Option(help="Policies, and lora, shira, full, head-only; with commas."),
    ] = "sift,random,current-batch,lora,shira,full,head-only",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, from train.seed up.")] = 3,
    densities: Annotated[
        str, typer.Option(help="Several budgets, with commas; the recipe's if not given.")
    ] = "",
    rates: Annotated[
        list[str] | None,
        typer.Option("--lr", metavar="METHOD=RATE", help="Learning rate of one method."),
    ] = None,
    sweep: Annotated[
        int,
        typer.Option("--lr-sweep", min=1, help="Try so many learning rates on the first seed."),
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the runs, the table and the plot.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--jobs", min=1, help="Runs at a time; their times disturb each other.")
    ] = 1,
    overrides: Overrides = None,
    device: Device = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Put methods side by side on your task: same rows, batches and budget.

    Example: sift compare glue/rte --methods sift,random,lora --seeds 3
    """
    if all(Path(one).is_dir() for one in what):
        from sift_cli.analysis import compare_runs

        found = compare_runs([Path(one) for one in what], out)
    elif len(what) > 1:
        wrong = next(one for one in what if not Path(one).is_dir())
        raise SiftError(f"{wrong}: no such run folder; give one recipe, or folders of runs")
    else:
        from sift_cli.recipe import load_recipe

        path = shipped.find(what[0])
        resolved = load_recipe(path, overrides or [])
        shares = numbers("--densities", densities)
        given = learning_rates(rates or [])
        out = out or Path(f"runs/{path.stem}-compare")
        from sift_cli.analysis import compare as run

        found = run(
            resolved,
            out,
            methods=[name.strip() for name in methods.split(",") if name.strip()],
            seeds=seeds,
            densities=shares,
            rates=given,
            sweep=sweep,
            workers=workers,
            device=device,
            allow_code=allow_code,
            console=stderr,
        )
    if as_json:
        print_json(found)
        return
    show_compare(found)
    if out:
        stdout.print(f"Table, plot and runs: {out}")


def numbers(option: str, text: str) -> list[float]:
    """Shares between 0 and 1, with commas between."""
    try:
        found = [float(one) for one in text.split(",") if one.strip()]
    except ValueError:
        raise SiftError(f"{option} {text}: give numbers, with commas between") from None
    if not all(0 < one <= 1 for one in found):
        raise SiftError(f"{option} {text}: a density lies above 0 and up to 1")
    return found


def learning_rates(given: list[str]) -> dict[str, float]:
    """`lora=1e-3` and the like, by method."""
    found = {}
    for one in given:
        method, _, rate = one.partition("=")
        try:
            found[method.strip()] = float(rate)
        except ValueError:
            raise SiftError(f"--lr {one}: it reads METHOD=RATE, such as lora=1e-3") from None
        if not 0 < found[method.strip()] < float("inf"):
            raise SiftError(f"--lr {one}: a learning rate is above 0")
    return found
