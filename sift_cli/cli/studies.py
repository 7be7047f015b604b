"""Commands that measure and plan."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sift_cli.cli.checks import check_recipe, check_runs
from sift_cli.cli.options import (
    AllowCode,
    Device,
    Devices,
    Json,
    Overrides,
    Quiet,
    RecipeArg,
    parse_size,
    print_json,
    stderr,
    stdout,
)
from sift_cli.cli.tables import show_benchmarks, show_compare, show_plan, show_probe
from sift_cli.errors import SiftError
from sift_cli.system import shipped

if TYPE_CHECKING:
    from sift_cli.recipe.training import Rate

Methods = Annotated[
    str | None,
    typer.Option(
        help="Policies, and lora, shira, full, head-only; with commas. If not given, the recipe's "
        "own policy, random, and these four; without head-only where there is no head."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each, from train.seed up.")]
Densities = Annotated[
    str, typer.Option(help="Several budgets, with commas; the recipe's if not given.")
]
Rates = Annotated[
    list[str] | None,
    typer.Option("--lr", metavar="METHOD=RATE", help="Learning rate of one method, or auto."),
]
Sweep = Annotated[
    int, typer.Option("--lr-sweep", min=1, help="Try so many learning rates on the first seed.")
]
Workers = Annotated[
    int, typer.Option("--jobs", min=1, help="Runs at a time; their times disturb each other.")
]


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
    from sift_cli import api
    from sift_cli.recipe import recipe_of

    resolved = recipe_of(recipe, overrides or [])
    check_recipe(resolved, device)
    from sift_cli.analysis.probe import PROBE_FILE

    folder = api.folder_of(recipe, out, "-probe")
    measured = api.probe(
        resolved,
        folder,
        policies=names(policies),
        steps=steps,
        device=device,
        allow_code=allow_code,
        quiet=quiet,
    )
    if as_json:
        print_json(measured)
        return
    show_probe(measured)
    stdout.print(f"Plots and {PROBE_FILE}: {folder}")


def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    device: Device = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Plan for so many devices that share each step.")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(help="Plan for weights in rows on these devices (full); distributed.shard."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Of so many copies of the model; distributed.replicas."),
    ] = None,
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

    if shard == "full" and devices == 1:
        raise SiftError("--shard full: rows lie on several devices; give --devices N")
    asked = {"shard": shard, "replicas": replicas}
    shared = [f"distributed.{key}={one}" for key, one in asked.items() if one is not None]
    resolved, origins = trace_recipe(shipped.find(recipe), [*(overrides or []), *shared])
    capacity = None if memory is None else parse_size(memory)
    check_recipe(resolved, device, data=False)
    from sift_cli.analysis.plan import plan as run

    planned = run(
        resolved,
        device=device,
        devices=devices,
        memory=capacity,
        measure=measure,
        allow_code=allow_code,
        console=stderr,
    )
    from sift_cli.training.rates import with_rate

    if resolved.train.learning_rate is None:
        resolved, origins["train.learning_rate"] = with_rate(resolved), "usual rate"
    planned = {"recipe": resolved.model_dump(mode="json"), "origins": origins, **planned}
    if as_json:
        print_json(planned)
        return
    show_plan(planned, show_all)


def compare(
    what: Annotated[
        list[str], typer.Argument(help="A recipe, or folders of finished runs to tabulate.")
    ],
    methods: Methods = None,
    seeds: Seeds = 3,
    densities: Densities = "",
    rates: Rates = None,
    sweep: Sweep = 1,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the runs, the table and the plot.")
    ] = None,
    workers: Workers = 1,
    overrides: Overrides = None,
    device: Device = None,
    devices: Devices = 1,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Put methods side by side on your task: same rows, batches and budget.

    Example: sift compare glue/rte --methods sign-descent,random,lora --seeds 3
    """
    finished = all(Path(one).is_dir() for one in what)
    if finished:
        check_runs([Path(one) for one in what])
        from sift_cli.analysis.compare import compare_runs

        comparison = compare_runs([Path(one) for one in what], out)
    else:
        from sift_cli.recipe import load_recipe

        path = only_recipe(what)
        resolved = load_recipe(path, overrides or [])
        shares, given = numbers("--densities", densities), learning_rates(rates or [])
        out = out or Path(f"runs/{path.stem}-compare")
        check_recipe(resolved, device)
        from sift_cli.analysis.compare import compare as run

        comparison = run(
            resolved,
            out,
            methods=None if methods is None else names(methods),
            seeds=seeds,
            densities=shares,
            rates=given,
            sweep=sweep,
            workers=workers,
            device=device,
            devices=devices,
            allow_code=allow_code,
            console=stderr,
        )
    stored = benchmarks_of(what) if finished else {}
    if as_json:
        print_json(comparison.to_json() | stored)
    else:
        show_compare(comparison)
        show_benchmarks(stored, what)
        if out:
            written = "Table and plot" if finished else "Table, plot and runs"
            stdout.print(f"{written}: {out}", highlight=False)
    if comparison.diverged:
        from sift_cli.analysis.compare import diverged_error

        raise diverged_error(comparison.diverged)


def benchmarks_of(runs: list[str]) -> dict[str, Any]:
    """What finished runs have stored of `sift eval --tasks`, under `benchmarks`; {} for nothing."""
    from sift_cli.analysis.benchmarks import beside

    rows = beside([Path(run) for run in runs])
    return {"benchmarks": [asdict(row) for row in rows]} if rows else {}


def only_recipe(what: list[str]) -> Path:
    """The recipe that `what` names. Raises SiftError where it is more, with the missing folder."""
    if len(what) > 1:
        wrong = next(one for one in what if not Path(one).is_dir())
        raise SiftError(f"{wrong}: no such run folder; give one recipe, or folders of runs")
    return shipped.find(what[0])


def names(text: str) -> list[str]:
    """The names in a text with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(option: str, text: str) -> list[float]:
    """The densities in a text with commas between. Raises SiftError for what is none."""
    try:
        shares = [float(one) for one in text.split(",") if one.strip()]
    except ValueError:
        raise SiftError(f"{option} {text}: give numbers, with commas between") from None
    if not all(0 < one <= 1 for one in shares):
        raise SiftError(f"{option} {text}: a density lies above 0 and up to 1")
    return shares


def learning_rates(given: list[str]) -> "dict[str, Rate]":
    """The rates in texts such as `lora=1e-3`, by method. Raises SiftError for what is none."""
    rates: dict[str, Rate] = {}
    for one in given:
        method, _, rate = one.partition("=")
        if rate.strip() == "auto":
            rates[method.strip()] = "auto"
            continue
        try:
            number = float(rate)
        except ValueError:
            raise SiftError(
                f"--lr {one}: it reads METHOD=RATE, such as lora=1e-3 or lora=auto"
            ) from None
        if not 0 < number < float("inf"):
            raise SiftError(f"--lr {one}: a learning rate is above 0")
        rates[method.strip()] = number
    return rates
