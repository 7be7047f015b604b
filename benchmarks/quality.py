"""Which method is best, each at a rate of its own: the runs and tables of docs/quality.md.

usage: python benchmarks/quality.py STAGE --model FOLDER --data FOLDER --out OUT [--jobs 2]
       [--tasks cola sst2] [--methods sift lora] [--densities .01] [--seeds 42 43 44 45 46]
       [--tries 3] [--set train.epochs=1] [--against sift] [--budget-hours 2]

The stages, in their order:

rates  Every method trains at as many rates (--tries), a factor of 2 apart, on nine tenths of the
       training rows of each task and is scored on the rest, with the first seed; the validation
       split is not looked at.
runs   At its rate with the best mean score there, one for all tasks, every method trains on all
       rows with every seed, and is scored on the validation split, with the weights of the last
       step. Also on tasks that the stage before left out.
table  Writes OUT/quality.md and OUT/rates.png, from OUT/results.jsonl alone; prints the former.

A method is a policy or a baseline (lora, lora-r1, shira, full, head-only), with what is added to
it: `scaled-sift`, `random+step`, `sift+step+probe+vectors`, `lora+probe`; an unknown one lists all.

The data FOLDER holds a folder of GLUE files for each task; tasks that it lacks are left out if none
are named. OUT is for one model. Each run is a process of its own, with one thread, and keeps its
folder, OUT/STAGE/TASK-METHOD-DENSITY-RATE-SEED; a line of OUT/results.jsonl tells of each that has
finished. The same command again takes these as they are and goes on with those that were
interrupted; after `--budget-hours` none is begun.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import log10
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from quality_tables import Row, best_rate, write_tables

from sift_cli.selection.policies import POLICIES

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "trained.safetensors"  # of a method that trains whole parameters: too large to keep all
DIVERGED = 4  # the exit code of a run whose loss or gradient is not finite

SHARED = {
    "train.batch_size": 32,
    "data.max_length": 128,
    "train.precision": "float32",  # not every CPU has bfloat16
    "eval.keep": "last",
    "eval.every": 1_000_000,  # the last step alone
    "checkpoint.every": 200,
    "log.every": 1,
    "log.report": False,
}
TASKS: dict[str, dict[str, Any]] = {
    "cola": {"train.epochs": 3},
    "sst2": {"train.epochs": 2, "data.max_train_rows": 10_000},
    "rte": {"train.epochs": 3},
    "mrpc": {"train.epochs": 3},
    "qnli": {"train.epochs": 2, "data.max_train_rows": 6_000},
    "qqp": {"train.epochs": 2, "data.max_train_rows": 6_000},
    "mnli": {"train.epochs": 2, "data.max_train_rows": 6_000},
}
USUAL_RATE = 4e-3


@dataclass(frozen=True)
class Method:
    """How a method trains: the recipe's `settings`, and `rate`, the middle of those tried at 1 %.

    `baseline` names a method of `sift compare` that is no policy. One without a `budget` is the
    same at each density.
    """

    settings: Mapping[str, Any]
    rate: float = USUAL_RATE
    baseline: str | None = None
    budget: bool = True

    def rates(self, density: float | None, tries: int) -> list[float]:
        """Those to try, an odd number: at a tenth of the entries, each twice as large."""
        middle = self.rate if density is None else self.rate * 2 ** log10(0.01 / density)
        steps = range(-(tries // 2), tries // 2 + 1)
        return [float(f"{middle * 2**step:.3g}") for step in steps]


ADDED = {
    "step": {"train.step_scale": "input"},
    "probe": {"train.head_start": "probe"},
    "prior": {"train.head_start": "prior"},
    "vectors": {"selection.vectors": True},
    "base": {"train.decay_toward": "base", "train.weight_decay": 0.3},
    "half": {"selection.balance": 0.5},
}
# The size of an adapter is that of the recipe's density; rank 1 is the least.
BASELINES = {
    "lora": Method({"selection.policy": "sift"}, rate=1e-3, baseline="lora"),
    "lora-r1": Method({"selection.density": 1e-4}, baseline="lora", budget=False),
    "shira": Method({"selection.policy": "sift"}, baseline="shira"),
    "full": Method({"selection.density": 0.01}, rate=2e-4, baseline="full", budget=False),
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


USUAL = ("sign-descent", "random", "sift", "lora", "shira", "full")  # of --methods


@dataclass(frozen=True)
class Run:
    """One training; `density` is None for a method without a budget."""

    stage: str
    task: str
    method: str
    density: float | None
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder under that of the stage."""
        density = "" if self.density is None else f"-d{self.density:g}"
        return f"{self.task}-{self.method}{density}-r{self.rate:g}-s{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Its recipe by section.key, without the model and the place of the data."""
        own = {"train.learning_rate": self.rate, "train.seed": self.seed}
        if self.density is not None:
            own["selection.density"] = self.density
        held_out = {"data.holdout": 0.1} if self.stage == "rates" else {}
        method = find(self.method).settings
        return {**SHARED, "data.task": self.task, **TASKS[self.task], **method, **held_out, **own}


@dataclass(frozen=True)
class Study:
    """Carries out runs under the folder `out`; `more` are settings of every recipe.

    After the time `end` (of time.monotonic) no run is begun.
    """

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

    def finished(self) -> list[Row]:
        """What has, each run once; a line that a kill cut short is passed over."""
        rows: dict[tuple[Any, ...], Row] = {}
        if self.results.is_file():
            for line in self.results.read_text().splitlines():
                with suppress(ValueError, TypeError):
                    row = Row(**json.loads(line))
                    rows[tuple(getattr(row, key) for key in KEYS)] = row
        return list(rows.values())

    def carry_out(self, runs: Iterable[Run]) -> list[str]:
        """Trains those that have not finished, `jobs` at a time; says what went wrong, by run."""
        done = {tuple(getattr(row, key) for key in KEYS) for row in self.finished()}
        left = [run for run in runs if tuple(getattr(run, key) for key in KEYS) not in done]
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
        process = self._start(command(run, recipe, folder))
        if process is None:
            return None
        _, errors = process.communicate()
        self.processes.discard(process)
        if self.ended.is_set():
            return None
        if process.returncode not in (0, DIVERGED):
            said = f"{run.name}: {(errors.strip().splitlines() or ['it said nothing'])[-1]}"
            print(f"{place} {said}", flush=True)
            return said
        row = outcome(run, folder, Path(self.model).name, diverged=bool(process.returncode))
        with self.lock, self.results.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        if find(run.method).baseline == "full":
            (folder / WEIGHTS).unlink(missing_ok=True)
        score = "diverged" if row.score is None else f"{row.metric} {row.score:.4f}"
        print(f"{place} {run.stage} {run.name}: {score}, {row.seconds:.0f} s", flush=True)
        return None

    def recipe(self, run: Run) -> Path:
        """Writes it beside the run's folder."""
        where = {"model.path": self.model, "data.path": f"{self.data}/{run.task}"}
        sections: dict[str, dict[str, Any]] = {}
        for name, value in {**where, **run.settings(), **self.more}.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        path = self.out / run.stage / f"{run.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    def _start(self, words: Sequence[str]) -> subprocess.Popen[str] | None:
        """A process of one thread, with the code beside this script; None after the end."""
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with self.lock:
            if self.ended.is_set():
                return None
            process = subprocess.Popen(
                words,
                env={**os.environ, **one, "PYTHONPATH": str(ROOT)},
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


KEYS = ("stage", "task", "method", "density", "rate", "seed")


def command(run: Run, recipe: Path, folder: Path) -> list[str]:
    """The process of a run: `sift train`, or the one that `sift compare` starts for a baseline."""
    python, baseline = [sys.executable, "-m"], find(run.method).baseline
    if baseline:
        return [*python, "sift_cli.analysis.adapted", baseline, str(recipe), str(folder)]
    return [*python, "sift_cli", "train", str(recipe), "--out", str(folder), "--resume", "--quiet"]


def outcome(run: Run, folder: Path, model: str, *, diverged: bool) -> Row:
    """The line of a run that has finished; the last tenth of its steps make its training loss."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if diverged:
        return Row(**asdict(run), model=model)
    summary = json.loads((folder / "summary.json").read_text())
    name, score = next(iter(summary["metrics"].items()))
    return Row(
        **asdict(run),
        model=model,
        metric=name,
        score=score,
        train_loss=mean(losses[-max(1, len(losses) // 10) :]),
        seconds=summary["wall_time_s"],
        step_ms=summary["step_time_ms"],
        entries=summary["trained_entries"],
        rank=summary.get("rank"),
    )


def cells(given: argparse.Namespace) -> list[tuple[str, str, float | None]]:
    """Each task, method and density; a method without a budget once a task."""
    return [
        (task, method, density)
        for task in given.tasks
        for method in given.methods
        for density in (given.densities if find(method).budget else [None])
    ]


def runs_of(given: argparse.Namespace, rows: Sequence[Row]) -> tuple[list[Run], list[str]]:
    """Those of the stage, and what keeps others from being among them."""
    if given.stage == "rates":
        seed = given.seeds[0]
        return [
            Run("rates", *cell, rate, seed)
            for cell in cells(given)
            for rate in find(cell[1]).rates(cell[2], given.tries)
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
        if not found >= set(find(method).rates(density, given.tries)):
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a stage."""
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("stage", choices=("rates", "runs", "table"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--methods", nargs="+", type=method_name, default=USUAL)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.001])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44, 45, 46])
    parser.add_argument("--tries", type=int, default=3, choices=(1, 3, 5, 7), help="rates")
    parser.add_argument("--set", nargs="+", type=setting, default=[], help="for every recipe")
    parser.add_argument(
        "--against", type=method_name, default="sign-descent", help="what p is against"
    )
    parser.add_argument("--budget-hours", type=float, default=float("inf"))
    given = parser.parse_args(arguments)
    given.tasks = given.tasks or [task for task in TASKS if Path(given.data, task).is_dir()]
    end = time.monotonic() + 3600 * given.budget_hours
    study = Study(given.model, given.data, given.out, given.jobs, dict(given.set), end)
    rows = study.finished()
    if given.stage == "table":
        print(write_tables(rows, given.out, given.against))
        return
    runs, missing = runs_of(given, rows)
    wrong = [*missing, *study.carry_out(runs)]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
