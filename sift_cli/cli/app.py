"""Every command of `sift`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sift_cli.cli import shipped
from sift_cli.errors import ExitCode, SiftError

app = typer.Typer(
    help="Sparse fine-tuning: adapt a model by changing 1 % of its entries, and ship the change.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

stdout = Console(soft_wrap=True)
stderr = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe.")
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let selection.score run a function in a file.")
]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu; the best there is if not given.")
]
Tuned = Annotated[str, typer.Argument(help="A run folder, a delta file, or a model folder or id.")]
ShippedName = Annotated[str, typer.Argument(help="As `sift recipes ls` lists it.")]
Base = Annotated[str | None, typer.Option(help="The base model, if not the one the delta names.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command; `debug` is read in `main`."""
    if version:
        from sift_cli import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Override train.seed.")] = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished run in the run folder.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Train, evaluate, and write the run folder."""
    from sift_cli.recipe import load_recipe

    changes = list(overrides or [])
    if seed is not None:
        changes.append(f"train.seed={seed}")
    path = shipped.find(recipe)
    resolved = load_recipe(path, changes)
    folder = out or Path(resolved.out or f"runs/{path.stem}")
    from sift_cli.training import train as run

    summary = run(
        resolved,
        folder,
        device=device,
        overwrite=overwrite,
        allow_code=allow_code,
        console=stderr,
    )
    if as_json:
        _print_json(summary)
        return
    table = Table("metric", "before", "after", title=f"{summary['task']} -> {folder}")
    for name, value in summary["metrics"].items():
        table.add_row(name, f"{summary['metrics_before'][name]:.4f}", f"{value:.4f}")
    stdout.print(table)
    trained, total = summary["trained_entries"], summary["total_entries"]
    stdout.print(
        f"{trained:,} of {total:,} entries trained ({trained / total:.2%}) and a head of "
        f"{summary['dense_entries']:,}; step {summary['step_time_ms']:.0f} ms; delta "
        f"{_size(summary['delta_bytes'])}; peak memory {_size(summary['peak_memory_bytes'])}"
    )
    stdout.print(f"Next: sift merge {folder}/delta.safetensors --out {folder}/merged")


@app.command()
def probe(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
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
        _print_json(found)
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


@app.command("eval")
def evaluate(
    tuned: Tuned,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe with the data, if none travels along.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split; eval.split if not given.")] = None,
    overrides: Overrides = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Score a run, a delta on its base, or any model folder."""
    from sift_cli.recipe import load_recipe, parse_recipe

    given = load_recipe(recipe, overrides or []) if recipe else None
    from sift_cli.delta.tuned import load_tuned
    from sift_cli.session import open_session

    loaded, own = load_tuned(tuned, base)
    if given is None and own is None:
        raise SiftError(f"{tuned} carries no recipe; name the data with --recipe")
    chosen = given or parse_recipe(own.to_yaml(), tuned, overrides or [])  # type: ignore[union-attr]
    session = open_session(chosen, device=device, train=False, split=split, tuned=loaded)
    metrics = session.evaluate()
    if as_json:
        _print_json({"metrics": metrics})
        return
    rows = sum(map(len, session.evaluation.values()))
    table = Table("metric", "value", title=f"{session.task.name}, {rows:,} rows")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    stdout.print(table)


@app.command()
def merge(
    delta: Annotated[Path, typer.Argument(help="A delta file.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Base = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Turn the merged model given as --base back.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not load the result and compare its logits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write base + delta as a Hugging Face folder, and prove it equal to the trained model."""
    from sift_cli.delta import merge as run

    report = run(delta, out, base=base, undo=undo, verify=not no_verify)
    if as_json:
        _print_json(report)
        return
    said = f"{report['changed']} of {report['tensors']} tensors changed, each equal to the "
    said += "base's bit for bit" if undo else "trained one bit for bit"
    if "logits_difference" in report:
        said += f"; reloaded, logits differ by {report['logits_difference']:g}"
    stdout.print(f"{out}: {said}")


@app.command()
def predict(
    tuned: Tuned,
    text: Annotated[list[str], typer.Argument(help="Texts, each classified.")],
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text of each, for sentence pairs.")
    ] = None,
    base: Base = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Try a tuned model on text."""
    if pair and len(pair) != len(text):
        raise SiftError(f"{len(text)} texts, but {len(pair)} --pair; give one for each")
    from sift_cli.delta.tuned import load_tuned
    from sift_cli.models import pick_device
    from sift_cli.predict import predict as run

    loaded, recipe = load_tuned(tuned, base)
    limit = recipe.data.max_length if recipe else None
    predictions = run(loaded, text, pair, device=pick_device(device), max_length=limit)
    if as_json:
        _print_json({"predictions": predictions})
        return
    table = Table("text", "label", "probability" if "probability" in predictions[0] else "score")
    for one in predictions:
        said = " / ".join([one["text"], one["pair"]] if "pair" in one else [one["text"]])
        number = one.get("probability", one.get("score"))
        table.add_row(said, str(one.get("label", "")), f"{number:.4f}")
    stdout.print(table)


@app.command()
def env(as_json: Json = False) -> None:
    """Print versions and devices, for a bug report."""
    from sift_cli.environment import describe

    found = describe()
    if as_json:
        _print_json(found)
        return
    table = Table("what", "is", show_header=False)
    for name, value in found.items():
        table.add_row(name, str(value))
    stdout.print(table)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    table = Table("name", "what it does")
    for name, about in shipped.listing().items():
        table.add_row(name, about)
    stdout.print(table)


@recipes_app.command("policies")
def recipes_policies(as_json: Json = False) -> None:
    """List the named ways to choose entries: rows of `selection.policy`."""
    from dataclasses import asdict

    from sift_cli.selection.policies import POLICIES

    if as_json:
        _print_json({name: asdict(row) for name, row in POLICIES.items()})
        return
    table = Table("policy", "score, scope, structure, schedule", "source")
    table.columns[0].no_wrap = True
    for name, row in POLICIES.items():
        chosen = ", ".join([row.score, row.scope, row.structure, row.schedule])
        more = "".join(f"; {key}: {value}" for key, value in row.defaults.items())
        table.add_row(name, chosen + more, row.paper)
    stdout.print(table)


@recipes_app.command("show")
def recipes_show(
    name: ShippedName,
) -> None:
    """Print a shipped recipe."""
    typer.echo(shipped.find(name, only_shipped=True).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("cp")
def recipes_cp(
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


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def main() -> None:
    """The console script: a user's mistake becomes a message and an exit code, no traceback."""
    debug = "--debug" in sys.argv
    try:
        app(prog_name="sift")
    except SiftError as error:
        if debug:
            raise
        lines = str(error).splitlines()
        for line in lines:
            print(line, file=sys.stderr)
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except Exception as error:
        if debug:
            raise
        print(
            f"sift failed, and should not have: {type(error).__name__}: {error}\n"
            "`sift --debug ...` shows where; `sift env` belongs into a report",
            file=sys.stderr,
        )
        sys.exit(int(ExitCode.BUG))
