"""What studies of methods share: many runs, each a process of one thread, and what came of them.

The help of quality.py tells the stages, what a method is called, and the files in OUT.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from quality_tables import Run, best_rate

from sift_cli.selection.policies import POLICIES

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "trained.safetensors"  # of a method that trains whole parameters: too large to keep all
DIVERGED = 4  # the exit code of a run whose loss or gradient is not finite
SCORES = "scores.json"  # in a run's folder: what a process after the training has found out
# of the environment of a process: one thread, and the code beside this script
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
USUAL_RATE = 4e-3


@dataclass(frozen=True)
class Method:
    """How a method trains: the recipe's `settings`, and `rate`, the usual one at 1 %.

    `baseline` names a method of `sift compare` that is no policy. One without a `budget` is the
    same at each density.
    """

    settings: Mapping[str, Any]
    rate: float = USUAL_RATE
    baseline: str | None = None
    budget: bool = True


ADDED = {
    "step": {"train.step_scale": "input"},
    "probe": {"train.head_start": "probe"},
    "prior": {"train.head_start": "prior"},
    "vectors": {"selection.vectors": True},
    "base": {"train.decay_toward": "base", "train.weight_decay": 0.3},
    "half": {"selection.balance": 0.5},
    "few": {"selection.batches": 32},
}
# The size of an adapter is that of the recipe's density; rank 1 is the least.
BASELINES = {
    "lora": Method({"selection.policy": "sift"}, rate=1e-3, baseline="lora"),
    "lora-r1": Method({"selection.density": 1e-4}, baseline="lora", budget=False),
    "shira": Method({"selection.policy": "sift"}, baseline="shira"),
    "full": Method({"selection.density": 0.01}, rate=1e-4, baseline="full", budget=False),
    "head-only": Method({"selection.density": 0.01}, rate=2e-3, baseline="head-only", budget=False),
}


@cache
def find(name: str) -> Method:
    """A policy or a baseline by its name, with what is ADDED to its recipe: `sift+step+probe`."""
    first, *more = name.split("+")
    if first not in {*BASELINES, *POLICIES} or not ADDED.keys() >= {*more}:
        known = f"{', '.join([*BASELINES, *POLICIES])}, with +{', +'.join(ADDED)}"
        raise argparse.ArgumentTypeError(f"unknown method {name!r}; known: {known}")
    found = BASELINES.get(first) or Method(
        {"selection.policy": first}, USUAL_RATE * POLICIES[first].pace
    )
    settings = {key: value for one in more for key, value in ADDED[one].items()}
    return replace(found, settings={**found.settings, **settings})


def method_name(text: str) -> str:
    """The name of a method that there is."""
    find(text)
    return text


@dataclass(frozen=True)
class Design:
    """What a study trains: settings of every recipe, of each task, and of the stage `rates`.

    `middle` gives the middle of the rates to try for a method at a density. `after` gives the words
    of a process that looks at what a run, its recipe and its folder, has left, and writes SCORES
    there; none if it is not given, or gives none.
    """

    shared: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    middle: Callable[[str, float | None], float]
    trying: Mapping[str, Any] = field(default_factory=lambda: {"data.holdout": 0.1})
    after: Callable[[Run, Path, Path], Sequence[str]] | None = None

    def settings(self, run: Run) -> dict[str, Any]:
        """The recipe by section.key, without the model and the place of the data."""
        own = {"train.learning_rate": run.rate, "train.seed": run.seed}
        if run.density is not None:
            own["selection.density"] = run.density
        task = {"data.task": run.task, **self.tasks[run.task]}
        trying = self.trying if run.stage == "rates" else {}
        return {**self.shared, **task, **find(run.method).settings, **trying, **own}

    def rates(self, method: str, density: float | None, tries: int) -> list[float]:
        """Those to try, an odd number, each twice as large as the one before."""
        middle, steps = self.middle(method, density), range(-(tries // 2), tries // 2 + 1)
        return [float(f"{middle * 2**step:.3g}") for step in steps]


@dataclass(frozen=True)
class Study:
    """Carries out runs under the folder `out`; `more` are settings that come last in every recipe.

    After the time `end` (of time.monotonic) no run is begun.
    """

    design: Design
    model: str
    data: str
    out: Path
    jobs: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)
    end: float = float("inf")
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    processes: set[subprocess.Popen[str]] = field(default_factory=set)

    @property
    def results(self) -> Path:
        """The file with a line for each run that has finished."""
        return self.out / "results.jsonl"

    def finished(self) -> list[Run]:
        """What has, each run once; a line that a kill cut short is passed over."""
        rows: dict[tuple[Any, ...], Run] = {}
        if self.results.is_file():
            for line in self.results.read_text().splitlines():
                with suppress(ValueError, TypeError):
                    row = Run(**json.loads(line))
                    rows[row.key] = row
        return list(rows.values())

    def carry_out(self, runs: Iterable[Run]) -> list[str]:
        """Trains those that have not finished, `jobs` at a time; says what went wrong, by run."""
        done = {row.key for row in self.finished()}
        left = [run for run in runs if run.key not in done]
        print(f"{len(left)} runs to go", flush=True)
        with self._passing_on(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                waiting = [
                    pool.submit(self._one, run, f"{place}/{len(left)}")
                    for place, run in enumerate(left, start=1)
                ]
                return [said for one in waiting if (said := one.result())]
            except KeyboardInterrupt:
                with self.lock:
                    self.ended.set()
                    for process in list(self.processes):
                        process.terminate()  # it saves its state first
                sys.exit("interrupted; the same command goes on from here")

    def _one(self, run: Run, place: str) -> str | None:
        """Trains, and notes what came of it; gives the last line of an error."""
        if self.ended.is_set() or time.monotonic() > self.end:
            return None
        folder, recipe = self.out / run.stage / run.name, self.recipe(run)
        found = self._wait(command(run, recipe, folder))
        after = self.design.after and self.design.after(run, recipe, folder)
        if found and found[0] == 0 and after:
            found = self._wait(after)
        if found is None:
            return None
        code, errors = found
        if code not in (0, DIVERGED):
            said = f"{run.name}: {(errors.strip().splitlines() or ['it said nothing'])[-1]}"
            print(f"{place} {said}", flush=True)
            return said
        row = outcome(run, folder, Path(self.model).name, diverged=bool(code))
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps(row.to_json()) + "\n")
        if find(run.method).baseline == "full":
            (folder / WEIGHTS).unlink(missing_ok=True)
        score = "diverged" if row.score is None else f"{row.metric} {row.score:.4f}"
        print(f"{place} {run.stage} {run.name}: {score}, {row.seconds:.0f} s", flush=True)
        return None

    def recipe(self, run: Run) -> Path:
        """Writes it beside the run's folder."""
        where = {"model.path": self.model, "data.path": f"{self.data}/{run.task}"}
        sections: dict[str, dict[str, Any]] = {}
        for name, value in {**where, **self.design.settings(run), **self.more}.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        path = self.out / run.stage / f"{run.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    def _wait(self, words: Sequence[str]) -> tuple[int, str] | None:
        """The exit code of a process and what it said of errors; None after the end."""
        process = self._start(words)
        if process is None:
            return None
        _, errors = process.communicate()
        self.processes.discard(process)
        return None if self.ended.is_set() else (process.returncode, errors)

    def _start(self, words: Sequence[str]) -> subprocess.Popen[str] | None:
        """A process of one thread, with the code beside this script; None after the end."""
        with self.lock:
            if self.ended.is_set():
                return None
            process = subprocess.Popen(
                words,
                env={**os.environ, **ALONE},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
            self.processes.add(process)
        return process

    @contextmanager
    def _passing_on(self) -> Iterator[None]:
        """Within it, SIGTERM is heard as Ctrl-C is."""

        def hear(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def command(run: Run, recipe: Path, folder: Path) -> list[str]:
    """The process of a run: `sift train`, or the one that `sift compare` starts for a baseline."""
    python, baseline = [sys.executable, "-m"], find(run.method).baseline
    if baseline:
        return [*python, "sift_cli.analysis.adapted", baseline, str(recipe), str(folder)]
    return [*python, "sift_cli", "train", str(recipe), "--out", str(folder), "--resume", "--quiet"]


def outcome(run: Run, folder: Path, model: str, *, diverged: bool) -> Run:
    """The line of a run that has finished; the last tenth of its steps make its training loss."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if diverged:
        return replace(run, model=model)
    summary = json.loads((folder / "summary.json").read_text())
    name, score = next(iter(summary["metrics"].items()))
    scores = folder / SCORES
    return replace(
        run,
        model=model,
        metric=name,
        score=score,
        train_loss=mean(losses[-max(1, len(losses) // 10) :]),
        seconds=summary["wall_time_s"],
        step_ms=summary["step_time_ms"],
        entries=summary["trained_entries"],
        rank=summary.get("rank"),
        more=json.loads(scores.read_text()) if scores.is_file() else {},
    )


def cells(given: argparse.Namespace) -> list[tuple[str, str, float | None]]:
    """Each task, method and density; a method without a budget once a task."""
    return [
        (task, method, density)
        for task in given.tasks
        for method in given.methods
        for density in (given.densities if find(method).budget else [None])
    ]


def runs_of(
    given: argparse.Namespace, design: Design, rows: Sequence[Run]
) -> tuple[list[Run], list[str]]:
    """Those of the stage, and what keeps others from being among them."""
    if given.stage == "rates":
        seed = given.seeds[0]
        return [
            Run("rates", *cell, rate, seed)
            for cell in cells(given)
            for rate in design.rates(*cell[1:], given.tries)
        ], []
    chosen, missing = {}, []
    for method, density in dict.fromkeys(cell[1:] for cell in cells(given)):
        tried = [
            row
            for row in rows
            if (row.stage, row.method, row.density) == ("rates", method, density)
        ]
        where = method if density is None else f"{method} at {density:g}"
        found = {row.rate for row in tried}
        if not found >= set(design.rates(method, density, given.tries)):
            missing.append(f"{where}: {len(found)} rates tried; run the stage rates first")
        elif (best := best_rate(tried)) is None:
            missing.append(f"{where}: diverged at every rate")
        else:
            chosen[method, density] = best
    return (
        [
            Run("runs", *cell, chosen[cell[1:]], seed)
            for seed in given.seeds  # outermost: what is cut short has every method
            for cell in cells(given)
            if cell[1:] in chosen
        ],
        missing,
    )


def setting(text: str) -> tuple[str, Any]:
    """`section.key=value` as a pair."""
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def options(
    told: str | None, tasks: Iterable[str], *, methods: Sequence[str], seeds: Sequence[int]
) -> argparse.ArgumentParser:
    """The options of a study; `told` is its help, `methods` and `seeds` are the usual ones."""
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=told, formatter_class=usage)
    parser.add_argument("stage", choices=("rates", "runs", "table"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=list(tasks))
    parser.add_argument("--methods", nargs="+", type=method_name, default=methods)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.001])
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--tries", type=int, default=3, choices=(1, 3, 5, 7), help="rates")
    parser.add_argument("--set", nargs="+", type=setting, default=[], help="for every recipe")
    parser.add_argument(
        "--against", type=method_name, default="sign-descent", help="what p is against"
    )
    parser.add_argument("--budget-hours", type=float, default=float("inf"))
    return parser


def study_of(given: argparse.Namespace, design: Design) -> Study:
    """The study that the options ask for; fills in the tasks if none are named."""
    given.tasks = given.tasks or [one for one in design.tasks if Path(given.data, one).is_dir()]
    end = time.monotonic() + 3600 * given.budget_hours
    return Study(design, given.model, given.data, given.out, given.jobs, dict(given.set), end)


def train_all(given: argparse.Namespace, study: Study) -> None:
    """Carries out the runs of the stage; exits with what went wrong."""
    runs, missing = runs_of(given, study.design, study.finished())
    wrong = [*missing, *study.carry_out(runs)]
    if wrong:
        sys.exit("\n".join(wrong))
