"""Options and table of `sift eval --tasks`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sift_cli.cli.options import print_json, print_table, stdout
from sift_cli.cli.studies import names
from sift_cli.errors import SiftError
from sift_cli.tasks.metrics import shown

if TYPE_CHECKING:
    from sift_cli.analysis.benchmarks import Asked

PANEL = "Benchmarks"

Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-eval instead of the recipe's data, with commas between.",
        rich_help_panel=PANEL,
    ),
]
TasksPath = Annotated[
    Path | None,
    typer.Option(
        help="A folder with more tasks (YAML); code that it holds runs.", rich_help_panel=PANEL
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of each task; no benchmark then.", rich_help_panel=PANEL),
]
Shots = Annotated[
    int | None,
    typer.Option(
        min=0, help="Solved rows before each; the task's own if not given.", rich_help_panel=PANEL
    ),
]
Template = Annotated[
    bool | None,
    typer.Option(
        "--template/--no-template",
        help="Put prompts as chats; as in training if not given.",
        rich_help_panel=PANEL,
    ),
]
TaskBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Prompts at a time; 1 if not given.", rich_help_panel=PANEL
    ),
]
TasksOut = Annotated[
    Path | None,
    typer.Option(
        help="The JSON file for results; one in a run's folder if not given.",
        rich_help_panel=PANEL,
    ),
]


def asked_of(
    tasks: str | None,
    folder: Path | None,
    limit: int | None,
    shots: int | None,
    template: bool | None,
    batch_size: int | None,
) -> "Asked | None":
    """What the options ask for, None where they ask for nothing of lm-eval.

    Raises SiftError for options of tasks without a task.
    """
    if tasks is None:
        if any(one is not None for one in (folder, limit, shots, template, batch_size)):
            raise SiftError(
                "--tasks-path, --limit, --num-fewshot, --template and --batch-size go with --tasks"
            )
        return None
    wanted = tuple(dict.fromkeys(names(tasks)))
    if not wanted:
        raise SiftError("--tasks: name one at least, such as arc_easy")
    from sift_cli.analysis.benchmarks import Asked

    return Asked(wanted, folder, limit, shots, template, batch_size or 1)


def evaluate_tasks(
    tuned: str,
    asked: "Asked",
    *,
    base: str | None,
    device: str | None,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Runs the tasks, stores what they came to, and prints it."""
    from sift_cli.analysis.benchmarks import run_benchmarks, store, write
    from sift_cli.runs.folder import finished_run

    if out is not None and not out.parent.is_dir():
        raise SiftError(f"--out {out}: there is no folder {out.parent}")
    results = run_benchmarks(tuned, asked, base=base, device=device, silent=quiet)
    run = finished_run(tuned)
    if out is not None:
        write(results, out)
    elif run is not None:
        out = store(results, asked, run)
    if as_json:
        print_json(results)
        return
    print_table(results_table(results))
    if not quiet:
        stored = f"Results: {out}" if out else "Not stored; --out FILE stores them."
        stdout.print(stored, highlight=False, markup=False)


def results_table(results: Mapping[str, Any]) -> Table:
    """A row for each metric of each task, under what they depend on."""
    settings = results["settings"]
    chats = "on" if settings["template"] else "off"
    title = f"{results['model']['source']}, chat template {chats}"
    limited = f"{settings['limit']:,} rows of each task at most: no benchmark"
    table = Table(
        *("task", "metric", "value", "stderr", "shots", "rows"),
        title=escape(title),
        caption=None if results["is_benchmark"] else limited,
    )
    for name, task in results["tasks"].items():
        for metric, one in task["metrics"].items():
            error = "" if one["stderr"] is None else shown(one["stderr"])
            counts = ["" if task[key] is None else f"{task[key]:,}" for key in ("shots", "rows")]
            table.add_row(escape(name), escape(metric), shown(one["value"]), error, *counts)
    return table
