"""Commands that train, score and try a model."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sift_cli.cli.benchmarks import (
    Limit,
    Shots,
    TaskBatch,
    Tasks,
    TasksOut,
    TasksPath,
    Template,
    asked_of,
    evaluate_tasks,
)
from sift_cli.cli.checks import check_recipe, check_rows, check_tuned
from sift_cli.cli.options import (
    AllowCode,
    BaseModelPath,
    Device,
    Devices,
    Json,
    Overrides,
    Quiet,
    RecipeArg,
    Tuned,
    print_json,
    print_table,
    run_on,
    size,
    stdout,
)
from sift_cli.cli.tables import show_classes
from sift_cli.errors import ExitCode, SiftError
from sift_cli.system.launch import launched
from sift_cli.tasks.metrics import shown

if TYPE_CHECKING:
    from sift_cli.runs.session import Session
    from sift_cli.runs.summary import Summary

SHOWN_METRICS = 4  # metrics in the summary of a training


def train(
    recipe: RecipeArg,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Override train.seed.")] = None,
    device: Device = None,
    devices: Devices = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in the run folder.")
    ] = False,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, evaluate, and write the run folder.

    Example: sift train glue/rte --out runs/rte --set train.epochs=3
    """
    from sift_cli import api
    from sift_cli.recipe import recipe_of

    changes = list(overrides or [])
    if seed is not None:
        changes.append(f"train.seed={seed}")
    resolved = recipe_of(recipe, changes)
    folder = api.folder_of(recipe, out or resolved.out)
    check_recipe(resolved, device, data=not resume)
    run_on(devices, device)
    with telling_how_to_resume(folder):
        run = api.train(
            resolved,
            folder,
            device=device,
            resume=resume,
            overwrite=overwrite,
            allow_code=allow_code,
            quiet=quiet,
        )
    if not launched().main:
        return
    if as_json:
        print_json(run.summary.to_json())
        return
    _show_metrics(run.summary)
    if not quiet:
        _show_numbers(run.summary, folder, resolved.log.report)


def _show_metrics(summary: "Summary") -> None:
    """The table of the first metrics after training, and before it where that was evaluated."""
    columns = summary.scores
    table = Table(f"metric ({summary.task})", *columns, box=None, pad_edge=False)
    for name in list(summary.metrics)[:SHOWN_METRICS]:
        table.add_row(name, *(shown(found[name]) for found in columns.values()))
    print_table(table)


def _show_numbers(summary: "Summary", folder: Path, reported: bool) -> None:
    """What trained, what it took, and what to do next."""
    from sift_cli.runs.folder import DELTA_FILE, REPORT_FILE, SUMMARY_FILE

    if len(summary.metrics) > SHOWN_METRICS:
        stdout.print(f"and {len(summary.metrics) - SHOWN_METRICS} more in {folder}/{SUMMARY_FILE}")
    trained, total = summary.trained_entries, summary.total_entries
    head = f", and a head of {summary.dense_entries:,}"
    if summary.language and not summary.dense_entries:
        head = ""
    stdout.print(f"{trained:,} of {total:,} entries trained ({trained / total:.2%}){head}")
    stdout.print(
        f"step {summary.step_time_ms:.0f} ms, peak memory {size(summary.peak_memory_bytes)}, "
        f"delta {size(summary.delta_bytes)}"
    )
    if reported and (folder / REPORT_FILE).is_file():
        stdout.print(f"Report: {folder / REPORT_FILE}")
    stdout.print(f"Next: sift merge {folder}/{DELTA_FILE} --out {folder}/merged")


@contextmanager
def telling_how_to_resume(folder: Path) -> Iterator[None]:
    """Adds to an interruption the command that goes on, or that there is nothing to go on from."""
    try:
        yield
    except (KeyboardInterrupt, SiftError) as error:
        code = error.code if isinstance(error, SiftError) else ExitCode.INTERRUPTED
        if code != ExitCode.INTERRUPTED:
            raise
        from sift_cli.runs.folder import CHECKPOINTS, RATES

        message = str(error) or "interrupted"
        if any((folder / CHECKPOINTS).glob("*.safetensors")) or (folder / RATES).is_dir():
            given = [arg for arg in sys.argv[1:] if arg not in ("--overwrite", "--resume")]
            message += f"\nGo on with: {shlex.join(['sift', *given, '--resume'])}"
        else:
            message += "; nothing is saved yet, and the same command begins anew"
        raise SiftError(message, code) from None


def evaluate(
    tuned: Tuned,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe with the data, if none travels along.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split; eval.split if not given.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Other rows: all of a file, or the split of a folder.")
    ] = None,
    overrides: Overrides = None,
    base: BaseModelPath = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    template: Template = None,
    batch_size: TaskBatch = None,
    out: TasksOut = None,
    device: Device = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a run, a delta on its base, or any model folder: on its data, or on tasks of lm-eval.

    Example: sift eval runs/rte --data new.csv
    """
    check_tuned(tuned, device)
    asked = asked_of(tasks, tasks_path, limit, num_fewshot, template, batch_size)
    if asked is not None:
        if recipe or split or data or overrides:
            raise SiftError(
                "--tasks brings its own data; leave --recipe, --split, --data and --set out"
            )
        evaluate_tasks(
            tuned, asked, base=base, device=device, out=out, quiet=quiet, as_json=as_json
        )
        return
    if out is not None:
        raise SiftError("--out stores results of --tasks")
    from sift_cli.api import session_of

    if data is not None:
        check_rows(data, "custom")
    session = session_of(
        tuned,
        recipe,
        split=split,
        data=data,
        overrides=overrides or [],
        base=base,
        device=device,
        allow_code=allow_code,
    )
    _tell_scores(session, count_rows=data is not None, as_json=as_json)


def _tell_scores(session: "Session", *, count_rows: bool, as_json: bool) -> None:
    """Scores a session's rows and prints the metrics and those of each class."""
    outputs = session.predict()
    metrics = session.score(outputs)
    classes = {
        suffix: found
        for suffix, lines in session.lines(outputs).items()
        if (found := session.task.by_class(lines))
    }
    rows = sum(map(len, session.evaluation.values()))
    if as_json:
        told = {"classes" + key: [asdict(one) for one in some] for key, some in classes.items()}
        print_json({"metrics": metrics} | ({"rows": rows} if count_rows else {}) | told)
        return
    table = Table("metric", "value", title=f"{session.task.name}, {rows:,} rows")
    for name, value in metrics.items():
        table.add_row(name, shown(value))
    print_table(table)
    for suffix, some in classes.items():
        show_classes(some, suffix)
