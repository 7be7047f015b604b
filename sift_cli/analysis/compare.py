"""Methods side by side on one's own task: same rows, batches and budget, a process for each run."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sift_cli.analysis.finished import Finished, differing, require_one_task
from sift_cli.analysis.jobs import HALF_DECADE, Job, Runner, rates_of
from sift_cli.analysis.methods import ADAPTERS, METHODS, WITHOUT_BUDGET, require_peft
from sift_cli.analysis.table import (
    Comparison,
    Diverged,
    FinishedRun,
    label,
    markdown,
    shown_rate,
    tabulated,
)
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.devices import pick_device, require_devices
from sift_cli.recipe import AUTO, DEFAULT_POLICY, Rate, Recipe
from sift_cli.runs.session import tell_emulated
from sift_cli.runs.summary import Summary
from sift_cli.selection.policies import POLICIES
from sift_cli.tasks.metrics import better
from sift_cli.tasks.own_metrics import own_metrics
from sift_cli.tasks.table import LANGUAGE
from sift_cli.training.parts import rule_of
from sift_cli.training.rates import with_rate

UNTUNED = (
    "Learning rates: the recipe's, times what each method usually bears beside its policy, where "
    "--lr says nothing else; none was tuned here, so a method may do better at another."
)

FOUND = (
    "auto ({}): each run took the learning rate with the lowest loss of those it tried for a tenth "
    "of its steps, on a tenth of its training rows; its rates.json tells which."
)


def compare(
    recipe: Recipe,
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    densities: Sequence[float] = (),
    rates: Mapping[str, Rate] | None = None,
    sweep: int = 1,
    workers: int = 1,
    device: str | None = None,
    devices: int = 1,
    allow_code: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Trains with every method and seed; writes compare.json, .md and .png to `out`.

    `methods` are names of policies and of METHODS, the `usual_methods` if not given; the recipe's
    own policy is the reference, or the first where it is not among them. `seeds` counts up from the
    recipe's. At each of `densities` (the recipe's own budget if empty) LoRA and SHiRA get the rank
    that comes nearest to as many entries. `rates` are learning rates by method; with `sweep` so
    many are tried around each on the first seed, and the one with the best metric runs on the
    others. Each run is shared by so many `devices`. What has finished in `out` is not run again.
    Runs that diverge are told in the table, and the others go on.

    Raises SiftError for what cannot be compared, and (exit code 4) where every run diverged.
    """
    console = console or Console(stderr=True, quiet=True)
    rates = rates or {}
    recipe = with_rate(recipe)
    rule_of(recipe.selection, allow_code)
    if methods is None:
        methods = usual_methods(recipe)
    own_metrics(recipe.metric_names, allow_code)
    check_methods([*methods, *rates])
    if not methods:
        raise SiftError("--methods: name one at least, such as sign-descent,random,lora")
    for method in rates:
        if method not in methods:
            raise SiftError(f"--lr {method}=RATE: it is none of --methods {','.join(methods)}")
    if any(method in ADAPTERS for method in methods):
        require_peft()
    tell_emulated(recipe.model, recipe.train, pick_device(device), console)
    if devices > 1:
        require_devices(devices, device)
    runner = Runner(out, workers, device, allow_code, console, devices)
    tried = jobs_of(recipe, methods, densities, rates, sweep)
    chosen, notes, lost = [jobs[0] for jobs in tried], [UNTUNED], list[Diverged]()
    if sweep > 1:
        chosen, notes, lost = swept(tried, runner)
    else:
        notes = notes_on_rates(chosen)
    runs, more = on_all_seeds(chosen, seeds, runner)
    lost += more
    if not runs:
        raise diverged_error(lost)
    return write(out, tabulated(runs, notes, lost, recipe.selection.policy))


def usual_methods(recipe: Recipe) -> list[str]:
    """The recipe's own policy, a random mask, and each of METHODS that trains something."""
    headless = recipe.data.task in LANGUAGE
    others = [method for method in METHODS if not (headless and method == "head-only")]
    return list(dict.fromkeys([recipe.selection.policy, "random", *others]))


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
    return [
        [
            Job.of(recipe, method, density, rate, recipe.train.seed)
            for rate in rates_of(recipe, method, density, rates, sweep)
        ]
        for method, density in cells
    ]


def swept(
    tried: Sequence[Sequence[Job]], runner: Runner
) -> tuple[list[Job], list[str], list[Diverged]]:
    """Runs all of them: of each method and density the job with the best rate, and notes.

    Where a method diverged at every rate, it has no job, and its runs are among the last.
    """
    found = runner.run([job for jobs in tried for job in jobs], "sweep")
    chosen, notes, lost = [], [], list[Diverged]()
    for jobs in tried:
        summaries = {job: one for job in jobs if isinstance(one := found[job], Summary)}
        if not summaries:
            lost += [one for job in jobs if isinstance(one := found[job], Diverged)]
            continue
        best, remark = best_rate(jobs, summaries)
        chosen.append(best)
        notes += remark
    sweep, seed = len(tried[0]), tried[0][0].seed
    notes.append(
        f"Learning rates: the best of {sweep}, a factor of {HALF_DECADE:.2f} apart, on the "
        f"evaluation split with seed {seed}; so the scores of that seed are a little too good."
    )
    return chosen, notes, lost


def best_rate(jobs: Sequence[Job], summaries: Mapping[Job, Summary]) -> tuple[Job, list[str]]:
    """The job with the best first metric, and a note where its rate is at the edge of the sweep.

    `summaries` are those of the jobs that did not diverge, at least one.
    """
    best, highest = None, None
    for job in (job for job in jobs if job in summaries):
        name, score = next(iter(summaries[job].metrics.items()))
        if best is None or (score is not None and better(name, score, highest)):
            best, highest = job, score
    assert best is not None
    if best.rate not in (jobs[0].rate, jobs[-1].rate):
        return best, []
    return best, [
        f"{label(best.method, best.density)}: its best learning rate, {shown_rate(best.rate)}, "
        "lies at the edge of the sweep; another may be better."
    ]


def on_all_seeds(
    chosen: Sequence[Job], seeds: int, runner: Runner
) -> tuple[list[FinishedRun], list[Diverged]]:
    """Runs each job with so many seeds, from its own up: what finished, and what diverged."""
    jobs = [
        Job.of(job.recipe, job.method, job.density, job.rate, job.seed + more)
        for more in range(seeds)
        for job in chosen
    ]
    runs, lost = [], []
    for job, found in runner.run(jobs, "run").items():
        if isinstance(found, Diverged):
            lost.append(found)
        else:
            runs.append(FinishedRun(found, job.method, job.density, job.rate))
    return runs, lost


def diverged_error(lost: Sequence[Diverged]) -> SiftError:
    """What a comparison ends with in which runs diverged."""
    methods = " ".join(f"--lr {method}=RATE" for method in {one.method: 0 for one in lost})
    lines = [one.sentence() for one in lost]
    return SiftError(
        "\n".join([*lines, f"Give lower learning rates ({methods}), or try several: --lr-sweep 3"]),
        ExitCode.NOT_FINITE,
    )


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> Comparison:
    """The same table of runs that have finished; those that differ in their seed alone are one row.

    Others are held against the default policy, or the method of the first where it is not there.
    Writes nothing unless `out` is given. Raises SiftError for a folder that holds no finished run,
    and for runs that were not scored on the same rows by the same metrics.
    """
    finished = [Finished.read(folder) for folder in folders]
    require_one_task(finished)
    runs, names = [], dict[str, str]()
    for one, differs in zip(finished, differing(finished), strict=True):
        name = one.folder.name
        name = names.setdefault(one.row, str(one.folder) if name in names.values() else name)
        method, density, rate = one.summary.policy, one.density, one.rate
        runs.append(FinishedRun(one.summary, method, density, rate, name, differs))
    comparison = tabulated(told_apart(runs), [], own=DEFAULT_POLICY)
    return write(out, comparison) if out else comparison


def told_apart(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs; those that differ from others of their method in the rate alone say so."""

    def alike(one: FinishedRun, other: FinishedRun) -> bool:
        return (one.method, one.density) == (other.method, other.density)

    return [
        replace(one, differs={"train.learning_rate": one.rate})
        if not one.differs
        and any(alike(one, other) and one.settings != other.settings for other in runs)
        else one
        for one in runs
    ]


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
