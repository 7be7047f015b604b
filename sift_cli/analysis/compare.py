"""Methods side by side on one's own task: same rows, batches and budget, a process for each run."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sift_cli.analysis.jobs import HALF_DECADE, WITHOUT_BUDGET, Job, Runner, rates_of
from sift_cli.analysis.methods import ADAPTERS, METHODS, require_peft
from sift_cli.analysis.table import (
    Comparison,
    FinishedRun,
    label,
    markdown,
    shown_rate,
    tabulated,
)
from sift_cli.errors import SiftError
from sift_cli.models.devices import pick_device
from sift_cli.recipe import AUTO, Rate, Recipe
from sift_cli.runs.folder import RECIPE_FILE, SUMMARY_FILE
from sift_cli.runs.session import tell_emulated
from sift_cli.runs.summary import Summary
from sift_cli.selection.policies import POLICIES
from sift_cli.tasks.metrics import better
from sift_cli.training.choosing import rule_of

UNTUNED = (
    "Learning rates: those of the recipe (full: a twentieth of it) where --lr says nothing "
    "else; none was tuned here, so a method may do better at another."
)

FOUND = (
    "auto ({}): each run took the learning rate with the lowest loss of those it tried for a tenth "
    "of its steps, on a tenth of its training rows; its rates.json tells which."
)


def compare(
    recipe: Recipe,
    out: Path,
    *,
    methods: Sequence[str],
    seeds: int = 3,
    densities: Sequence[float] = (),
    rates: Mapping[str, Rate] | None = None,
    sweep: int = 1,
    workers: int = 1,
    device: str | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Trains with every method and seed; writes compare.json, .md and .png to `out`.

    `methods` are names of policies and of METHODS, `seeds` counts up from the recipe's. At each of
    `densities` (the recipe's own budget if empty) LoRA and SHiRA get the rank that comes nearest to
    as many entries. `rates` are learning rates by method; with `sweep` so many are tried around
    each on the first seed, and the one with the best metric runs on the others. What has finished
    in `out` is not run again. Raises SiftError for what cannot be compared.
    """
    console = console or Console(stderr=True, quiet=True)
    rates = rates or {}
    rule_of(recipe.selection, allow_code)
    check_methods([*methods, *rates])
    if any(method in ADAPTERS for method in methods):
        require_peft()
    tell_emulated(recipe.model, recipe.train, pick_device(device), console)
    runner = Runner(out, workers, device, allow_code, console)
    tried = jobs_of(recipe, methods, densities, rates, sweep)
    if sweep > 1:
        chosen, notes = swept(tried, runner)
    else:
        chosen = [jobs[0] for jobs in tried]
        notes = notes_on_rates(chosen)
    return write(out, tabulated(on_all_seeds(chosen, seeds, runner), notes))


def notes_on_rates(chosen: Sequence[Job]) -> list[str]:
    """Where the rates come from, of jobs that each have one rate."""
    found = list(dict.fromkeys(job.method for job in chosen if job.rate == AUTO))
    notes = [FOUND.format(", ".join(found))] if found else []
    return notes if all(job.rate == AUTO for job in chosen) else [*notes, UNTUNED]


def jobs_of(
    recipe: Recipe,
    methods: Sequence[str],
    densities: Sequence[float],
    rates: Mapping[str, Rate],
    sweep: int,
) -> list[list[Job]]:
    """For each method and density, a job on the recipe's own seed for each learning rate to try."""
    cells = [
        (method, density)
        for method in dict.fromkeys(methods)
        for density in ((None,) if method in WITHOUT_BUDGET else tuple(densities) or (None,))
    ]
    settings = recipe.train
    return [
        [
            Job.of(recipe, method, density, rate, settings.seed)
            for rate in rates_of(settings.learning_rate, method, rates, sweep)
        ]
        for method, density in cells
    ]


def swept(tried: Sequence[Sequence[Job]], runner: Runner) -> tuple[list[Job], list[str]]:
    """Runs all of them: of each method and density the job with the best rate, and notes."""
    summaries = runner.run([job for jobs in tried for job in jobs], "sweep")
    chosen, notes = [], []
    for jobs in tried:
        best, remark = best_rate(jobs, summaries)
        chosen.append(best)
        notes += remark
    sweep, seed = len(tried[0]), tried[0][0].seed
    notes.append(
        f"Learning rates: the best of {sweep}, a factor of {HALF_DECADE:.2f} apart, on the "
        f"evaluation split with seed {seed}; so the scores of that seed are a little too good."
    )
    return chosen, notes


def best_rate(
    jobs: Sequence[Job], summaries: Mapping[Job, Summary | None]
) -> tuple[Job, list[str]]:
    """The job with the best first metric, and a note where its rate is at the edge of the sweep.

    Raises SiftError where all of them diverged.
    """
    best, highest = None, None
    for job in jobs:
        summary = summaries[job]
        if summary is None:
            continue
        name, score = next(iter(summary.metrics.items()))
        if best is None or (score is not None and better(name, score, highest)):
            best, highest = job, score
    if best is None:
        raise SiftError(
            f"{jobs[0].method} diverged at every learning rate; give a lower one with "
            f"--lr {jobs[0].method}=RATE"
        )
    if best.rate not in (jobs[0].rate, jobs[-1].rate):
        return best, []
    return best, [
        f"{label(best.method, best.density)}: its best learning rate, {shown_rate(best.rate)}, "
        "lies at the edge of the sweep; another may be better."
    ]


def on_all_seeds(chosen: Sequence[Job], seeds: int, runner: Runner) -> list[FinishedRun]:
    """Runs each job with so many seeds, from its own up. Raises SiftError where one diverges."""
    jobs = [
        Job.of(job.recipe, job.method, job.density, job.rate, job.seed + more)
        for more in range(seeds)
        for job in chosen
    ]
    runs = []
    for job, summary in runner.run(jobs, "run").items():
        if summary is None:
            raise SiftError(
                f"{job.method} diverged at a learning rate of {shown_rate(job.rate)} with seed "
                f"{job.seed}; give it another with --lr {job.method}=RATE, or try several with "
                "--lr-sweep 3"
            )
        runs.append(FinishedRun(summary, job.method, job.density, job.rate))
    return runs


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> Comparison:
    """The same table of runs that have finished; those that differ in their seed alone are one row.

    Writes nothing unless `out` is given. Raises SiftError for a folder that holds no finished run.
    """
    runs, names = [], dict[str, str]()
    for folder in folders:
        summary = Summary.read(folder)
        if summary is None:
            raise SiftError(f"{folder}: no finished run; it holds no {SUMMARY_FILE}")
        recipe = row_settings(folder)
        method, density = summary.policy, recipe.get("selection", {}).get("density")
        if method in WITHOUT_BUDGET:
            density = None
        train = recipe.get("train", {})
        if train.get("learning_rate_from") == AUTO:  # each seed may have found another
            train["learning_rate"] = AUTO
        rate = train.get("learning_rate")
        train.pop("seed", None)
        settings = json.dumps([method, recipe], sort_keys=True)
        name = names.setdefault(settings, folder.name)
        runs.append(FinishedRun(summary, method, density, rate, name))
    comparison = tabulated(runs, [])
    return write(out, comparison) if out else comparison


def row_settings(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run without what changes no result; empty where it has none."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return {}
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("out", "log"):
        recipe.pop(key, None)
    return recipe


def check_methods(methods: Sequence[str]) -> None:
    """Raises SiftError for a name that is neither a policy nor one of METHODS."""
    known = [*POLICIES, *METHODS]
    for method in methods:
        if method not in known:
            near = difflib.get_close_matches(method, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise SiftError(f"--methods: unknown: {method!r}; {hint}")


def write(out: Path, comparison: Comparison) -> Comparison:
    """Writes the JSON, the Markdown and the plot; returns what it was given."""
    from sift_cli.analysis.plots import plot_compare

    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison.to_json(), indent=2) + "\n"
    (out / "compare.json").write_text(text, encoding="utf-8")
    (out / "compare.md").write_text(markdown(comparison), encoding="utf-8")
    plot_compare(comparison, out / "compare.png")
    return comparison
