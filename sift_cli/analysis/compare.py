"""Methods side by side on one's own task: same rows, batches and budget, a process for each run."""

import difflib
import json
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from rich.console import Console

from sift_cli.analysis.jobs import HALF_DECADE, WITHOUT_BUDGET, Job, Runner, rates_of
from sift_cli.analysis.methods import ADAPTERS, METHODS, require_peft
from sift_cli.errors import SiftError
from sift_cli.models.devices import pick_device
from sift_cli.recipe import Recipe
from sift_cli.runs.folder import RECIPE_FILE, SUMMARY_FILE
from sift_cli.runs.session import tell_emulated
from sift_cli.selection.policies import POLICIES
from sift_cli.tasks.metrics import shown
from sift_cli.training.choosing import rule_of

REFERENCE = "sift"
MEASURES = ("step_time_ms", "peak_memory_bytes", "delta_bytes", "trained_entries", "dense_entries")


def compare(
    recipe: Recipe,
    out: Path,
    *,
    methods: Sequence[str],
    seeds: int = 3,
    densities: Sequence[float] = (),
    rates: Mapping[str, float] | None = None,
    sweep: int = 1,
    workers: int = 1,
    device: str | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
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
    tell_emulated(recipe, pick_device(device), console)
    runner = Runner(out, workers, device, allow_code, console)
    first = recipe.train.seed
    cells = [
        (method, density)
        for method in dict.fromkeys(methods)
        for density in ((None,) if method in WITHOUT_BUDGET else tuple(densities) or (None,))
    ]
    tried = {
        cell: [
            Job.of(recipe, *cell, rate, first)
            for rate in rates_of(recipe.train.learning_rate, cell[0], rates, sweep)
        ]
        for cell in cells
    }
    chosen, notes = {cell: jobs[0] for cell, jobs in tried.items()}, []
    if sweep > 1:
        found = runner.run([job for jobs in tried.values() for job in jobs], "sweep")
        for cell, jobs in tried.items():
            chosen[cell], said = best_rate(jobs, found)
            notes += said
        notes.append(
            f"Learning rates: the best of {sweep}, a factor of {HALF_DECADE:.2f} apart, on the "
            f"evaluation split with seed {first}; so the scores of that seed are a little too good."
        )
    else:
        notes.append(
            "Learning rates: those of the recipe (full: a twentieth of it) where --lr says nothing "
            "else; none was tuned here, so a method may do better at another."
        )
    jobs = [
        Job.of(job.recipe, job.method, job.density, job.rate, first + more)
        for more in range(seeds)
        for job in chosen.values()
    ]
    summaries = runner.run(jobs, "run")
    runs = []
    for job, summary in summaries.items():
        if summary is None:
            raise SiftError(
                f"{job.method} diverged at a learning rate of {job.rate:g} with seed {job.seed}; "
                f"give it another with --lr {job.method}=RATE, or try several with --lr-sweep 3"
            )
        runs.append({**summary, "method": job.method, "density": job.density, "rate": job.rate})
    return write(out, tabulated(runs, notes))


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """The same table of runs that have finished; those that differ in their seed alone are one row.

    Writes nothing unless `out` is given. Raises SiftError for a folder that holds no finished run.
    """
    runs, names = [], dict[str, str]()
    for folder in folders:
        if not (folder / SUMMARY_FILE).is_file():
            raise SiftError(f"{folder}: no finished run; it holds no {SUMMARY_FILE}")
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        recipe: dict[str, Any] = {}
        if (folder / RECIPE_FILE).is_file():
            recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        for key in ("out", "log"):
            recipe.pop(key, None)
        rate = recipe.get("train", {}).get("learning_rate")
        recipe.get("train", {}).pop("seed", None)
        density = recipe.get("selection", {}).get("density")
        if summary["policy"] in WITHOUT_BUDGET:
            density = None
        settings = json.dumps([summary["policy"], recipe], sort_keys=True)
        name = names.setdefault(settings, folder.name)
        runs.append({**summary, "method": summary["policy"], "density": density, "rate": rate})
        runs[-1]["settings"] = name
    found = tabulated(runs, [])
    return write(out, found) if out else found


def check_methods(methods: Sequence[str]) -> None:
    """Raises SiftError for a name that is neither a policy nor one of METHODS."""
    known = [*POLICIES, *METHODS]
    for method in methods:
        if method not in known:
            near = difflib.get_close_matches(method, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise SiftError(f"--methods: unknown: {method!r}; {hint}")


def best_rate(
    jobs: Sequence[Job], found: Mapping[Job, Mapping[str, Any] | None]
) -> tuple[Job, list[str]]:
    """The job with the best first metric, and what is to be said of the choice."""
    scores: dict[float, tuple[float, Job]] = {}
    for job in jobs:
        summary = found[job]
        if summary is not None:
            score = next(iter(summary["metrics"].values()))
            scores[job.rate] = (-inf if score is None else score, job)
    if not scores:
        raise SiftError(
            f"{jobs[0].method} diverged at every learning rate; give a lower one with "
            f"--lr {jobs[0].method}=RATE"
        )
    _, job = max(scores.values(), key=lambda one: one[0])
    ends = {jobs[0].rate, jobs[-1].rate}
    if job.rate in ends:
        return job, [
            f"{label(job.method, job.density)}: its best learning rate, {job.rate:g}, lies at the "
            "edge of the sweep; another may be better."
        ]
    return job, []


def tabulated(runs: Sequence[dict[str, Any]], notes: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation of each group of runs, and the difference from `sift`."""
    tasks = {run["task"]: tuple(run["metrics"]) for run in runs}
    if len(set(tasks.values())) > 1 or len(tasks) > 1:
        raise SiftError(f"these are runs of {', '.join(tasks)}; compare one task at a time")
    ((task, metrics),) = tasks.items()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        key = (run["method"], str(run["density"]), run.get("settings"))
        groups.setdefault(key, []).append(run)
    rows = [row_of(group, metrics) for group in groups.values()]
    for row, group in zip(rows, groups.values(), strict=True):
        other = reference_of(row, rows)
        if other is not None and other is not row:
            base = list(groups.values())[rows.index(other)]
            row["against_sift"] = paired(group, base, metrics[0])
    notes = [*notes]
    fewest = min(row["seeds"] for row in rows)
    if fewest == 1:
        notes.append("One seed: differences may be chance alone.")
    elif fewest < 6:
        notes.append(
            f"p: paired t-test over {fewest} seeds, which shows large and steady differences only; "
            "not corrected for the number of methods."
        )
    for row in rows:
        del row["scores_by_seed"]
    return {"task": task, "metric": metrics[0], "rows": rows, "notes": notes}


def row_of(group: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """One row of the table, from the runs of one method that differ in their seeds."""
    one = group[0]
    return {
        "method": one["method"],
        "density": one["density"],
        "run": one.get("settings"),
        "rank": one.get("rank"),
        "learning_rate": one["rate"],
        "seeds": len(group),
        "metrics": {name: summed([run["metrics"][name] for run in group]) for name in metrics},
        **{name: mean(run[name] for run in group) for name in MEASURES},
        "against_sift": None,
        "scores_by_seed": {run["seed"]: run["metrics"][metrics[0]] for run in group},
    }


def summed(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation; None where a value is undefined, or is the only one."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "mean": mean(known) if whole else None,
        "std": stdev(known) if whole and len(known) > 1 else None,
        "values": list(values),
    }


def reference_of(row: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of `sift` that another is held against: at its density, else at the largest."""
    own = [one for one in rows if one["method"] == REFERENCE]
    same = [one for one in own if one["density"] == row["density"]]
    return next(iter(same or sorted(own, key=lambda one: -one["trained_entries"])), None)


def paired(
    group: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any] | None:
    """The mean difference from `sift` over the seeds that both have, and a paired t-test's p.

    p is None with fewer than two seeds, or where all differences are the same.
    """
    own, other = ({run["seed"]: run["metrics"][metric] for run in runs} for runs in (group, base))
    both = own.keys() & other.keys()
    seeds = sorted(seed for seed in both if None not in (own[seed], other[seed]))
    if not seeds:
        return None
    differences = [own[seed] - other[seed] for seed in seeds]
    found = {"difference": mean(differences), "seeds": len(seeds), "p": None}
    if len(seeds) > 1 and max(differences) > min(differences):
        from scipy import stats

        test = stats.ttest_rel([own[seed] for seed in seeds], [other[seed] for seed in seeds])
        found["p"] = float(test.pvalue)
    return found


def label(method: str, density: object) -> str:
    """What a row is called."""
    return method if density is None else f"{method} at {density}"


def write(out: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes the JSON, the Markdown and the plot; returns what the JSON holds."""
    from sift_cli.analysis.plots import plot_compare

    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (out / "compare.md").write_text(markdown(found), encoding="utf-8")
    plot_compare(found, out / "compare.png")
    return found


HEADINGS = ("method", "entries", "rate", "metric", "to sift", "p", "ms", "MB", "kB")
LEGEND = (
    "entries: trained, without the head; to sift: mean difference from it; ms: median step; MB: "
    "peak memory of the process (on a GPU: of the device); kB: the file with what was trained."
)


def cells(row: Mapping[str, Any], metric: str) -> list[str]:
    """The cells of one row under HEADINGS."""
    found, against = row["metrics"][metric], row["against_sift"]
    spread = "" if found["std"] is None else f" ± {found['std']:.4f}"
    rank = "" if row["rank"] is None else f", r {row['rank']}"
    difference = p = ""
    if against is not None:
        difference = f"{against['difference']:+.4f}"
        p = "" if against["p"] is None else f"{against['p']:.2g}"
    rate = row["learning_rate"]
    return [
        label(row["method"], row["density"]) + rank,
        f"{row['trained_entries']:,.0f}",
        "" if rate is None else f"{rate:g}",
        f"{shown(found['mean'])}{spread}",
        difference,
        p,
        f"{row['step_time_ms']:,.0f}",
        f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        f"{row['delta_bytes'] / 1e3:,.0f}",
    ]


def headings(found: Mapping[str, Any]) -> list[str]:
    """HEADINGS with the name of the metric and the number of seeds."""
    seeds = sorted({row["seeds"] for row in found["rows"]})
    counted = "-".join(str(count) for count in (seeds[0], seeds[-1])[: len(seeds)])
    metric = f"{found['metric']} (n={counted})"
    return [metric if one == "metric" else one for one in HEADINGS]


def markdown(found: Mapping[str, Any]) -> str:
    """The table and its notes."""
    lines = [f"# {found['task']}", "", "| " + " | ".join(headings(found)) + " |"]
    lines.append("|" + " --- |" * len(HEADINGS))
    for row in found["rows"]:
        lines.append("| " + " | ".join(cells(row, found["metric"])) + " |")
    return "\n".join([*lines, "", LEGEND, "", *(f"- {note}" for note in found["notes"])]) + "\n"
