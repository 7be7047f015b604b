"""The runs of a comparison: which there are, each in a process of its own, finished ones kept."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sift_cli.analysis.methods import METHODS, WITHOUT_BUDGET, usual_rate_of
from sift_cli.analysis.table import Diverged, shown_rate
from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import Rate, Recipe, parse_recipe
from sift_cli.runs.facts import settings_of
from sift_cli.runs.folder import CHECKPOINTS, METRICS_FILE
from sift_cli.runs.sinks import logged
from sift_cli.runs.summary import Summary
from sift_cli.system.stopping import hears
from sift_cli.tasks.metrics import shown
from sift_cli.training.rates import share_of

HALF_DECADE = 10**0.5


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a method (a policy's name, or one of METHODS) and its recipe.

    `density` and `rate` are those of the table; the recipe holds them too. Equal to itself alone.
    """

    method: str
    density: float | None
    rate: Rate
    seed: int
    recipe: Recipe

    @classmethod
    def of(cls, base: Recipe, method: str, density: float | None, rate: Rate, seed: int) -> "Job":
        """The job with the data, batches and budget of the recipe `base`.

        The policy of `base` keeps the axes that `base` gives; others are as their row says.
        """
        changes = [f"train.learning_rate={rate!r}", f"train.seed={seed}"]
        if method not in METHODS and method != base.selection.policy:
            changes.append(f"selection.policy={method}")
        if method in WITHOUT_BUDGET:
            changes.append("selection.density=0.01")  # it means nothing: one name for the run
        elif density is not None:
            changes.append(f"selection.density={density!r}")
        recipe = parse_recipe(base.to_yaml(), f"--methods {method}", changes)
        return cls(method, density, rate, seed, recipe)

    @property
    def name(self) -> str:
        """The folder of the run: method, density, rate and seed, and a hash of the recipe."""
        identity = {"method": self.method, **settings_of(self.recipe)}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        density = "" if self.density is None else f"-d{self.density:g}"
        return f"{self.method}{density}-r{shown_rate(self.rate)}-s{self.seed}-{digest}"


@dataclass(frozen=True)
class Runner:
    """Runs jobs under the folder `out`, `workers` at a time, each with its share of the cores.

    Each of them runs on so many `devices`.
    """

    out: Path
    workers: int
    device: str | None
    allow_code: bool
    console: Console
    devices: int = 1
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    # A process is started and noted, or ended, never one amid the other; SIGTERM may come twice.
    changing: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self, jobs: Sequence[Job], what: str) -> dict[Job, Summary | Diverged]:
        """What each job came to, from disk where it has finished.

        Raises SiftError where one fails for another reason; those that have finished stay. SIGTERM
        ends what runs too, and then this as Ctrl-C would, which reaches the processes by itself.
        """
        unique = {job.name: job for job in jobs}
        done: dict[str, Summary | Diverged] = {}
        with (
            self._progress(what, len(unique)) as report,
            self._passing_on(),
            ThreadPoolExecutor(self.workers) as pool,
        ):
            waiting: dict[Future[Summary | Diverged], Job] = {}
            try:
                for job in unique.values():
                    waiting[pool.submit(self._finished, job)] = job
                for future in as_completed(waiting):
                    job = waiting[future]
                    done[job.name] = future.result()
                    report(job, done[job.name])
            except KeyboardInterrupt:
                self.ended.set()
                raise _interrupted() from None
            finally:
                for future in waiting:
                    future.cancel()
        return {job: done[job.name] for job in jobs}

    def _finished(self, job: Job) -> Summary | Diverged:
        """What a job came to, which is run unless it has finished."""
        folder = self.out / "runs" / job.name
        summary = Summary.read(folder)
        if summary is not None:
            return summary
        recipe = self.out / "recipes" / f"{job.name}.yaml"
        for parent in (folder.parent, recipe.parent):
            parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(job.recipe.to_yaml(), encoding="utf-8")
        code, errors = self._process(self._command(job, recipe, folder))
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        if code == ExitCode.NOT_FINITE:
            if job.method in METHODS:  # dense, so large
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            return Diverged(job.method, job.density, job.rate, job.seed, _placed(last, folder))
        if code:
            raise SiftError(f"{job.name}: {last}", _code(code))
        summary = Summary.read(folder)
        assert summary is not None  # a run that ends well has written it
        return summary

    def _command(self, job: Job, recipe: Path, folder: Path) -> list[str]:
        python = [sys.executable, "-m"]
        several = ["--devices", str(self.devices)] if self.devices > 1 else []
        if job.method in METHODS:
            arguments = [job.method, str(recipe), str(folder), *filter(None, [self.device])]
            return [*python, "sift_cli.analysis.adapted", *arguments, *several]
        more = ["--device", self.device] if self.device else []
        more += ["--allow-code"] if self.allow_code else []
        return [
            *python,
            "sift_cli",
            "train",
            str(recipe),
            "--out",
            str(folder),
            "--resume",
            *more,
            *several,
        ]

    def _process(self, command: Sequence[str]) -> tuple[int, str]:
        """The exit code of a process, and what it wrote to standard error."""
        with self.changing:
            if self.ended.is_set():
                raise _interrupted()
            process = subprocess.Popen(
                command,
                env=self._environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.add(process)
        with process:
            _, errors = process.communicate()
            self.processes.discard(process)
        return process.returncode, errors

    @contextmanager
    def _passing_on(self) -> Iterator[None]:
        """Within it, SIGTERM ends the processes that run, each after its step, and raises."""

        def hear(number: int, frame: FrameType | None) -> None:
            with self.changing:
                self.ended.set()
                for process in list(self.processes):
                    process.terminate()
            raise KeyboardInterrupt

        if not hears(signal.SIGTERM):
            yield
            return
        before = signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _environment(self) -> dict[str, str]:
        if self.workers == 1:
            return dict(os.environ)
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        return {**os.environ, "OMP_NUM_THREADS": str(threads)}

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Any]:
        """A progress bar, and the function that moves it: it prints a line for a finished job."""
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        watched = self.console.is_terminal
        bar = Progress(
            *columns, TimeElapsedColumn(), console=self.console, disable=not watched, transient=True
        )
        task = bar.add_task(what, total=total)
        count = 0

        def report(job: Job, found: Summary | Diverged) -> None:
            nonlocal count
            count += 1
            result = "diverged"
            if isinstance(found, Summary):
                first, value = next(iter(found.metrics.items()))
                result = f"{first} {shown(value)}"
            name = job.name.rpartition("-")[0]
            self.console.print(f"{what} {count}/{total}: {name}: {result}", highlight=False)
            bar.advance(task)

        with bar:
            yield report


def rates_of(
    recipe: Recipe, method: str, density: float | None, given: Mapping[str, Rate], sweep: int
) -> list[Rate]:
    """The learning rates to try of a method: `sweep` of them, half a decade apart.

    In their middle is the one in `given`, else the recipe's, times the method's usual rate over
    that of the recipe's own policy and density. Raises SiftError where there is more than one to
    try of a rate that is left open.
    """
    own = recipe.train.learning_rate
    assert own is not None
    if not isinstance(own, str):
        policy, share = recipe.selection.policy, share_of(recipe)
        task = recipe.data.task
        times = usual_rate_of(method, density or share, task) / usual_rate_of(policy, share, task)
        own = float(f"{own * times:.2g}") if times != 1 else own
    middle = given.get(method, own)
    if sweep <= 1:
        return [middle]
    if isinstance(middle, str):
        raise SiftError(f"--lr-sweep {sweep}: {method} has auto, which tries rates by itself")
    steps = [at - (sweep - 1) / 2 for at in range(sweep)]
    return [float(f"{middle * HALF_DECADE**step:.2g}") for step in steps]


def _placed(said: str, folder: Path) -> str:
    """A message with the step that its run had logged last; an evaluation's names none itself."""
    last = max((record["step"] for record in logged(folder / METRICS_FILE)), default=None)
    known = last is None or said.startswith("step ")
    return said if known else f"{said}; the last step it logged is {last:,}"


def _interrupted() -> SiftError:
    return SiftError("interrupted; the same command goes on from here", ExitCode.INTERRUPTED)


def _code(returncode: int) -> ExitCode:
    known = [code for code in ExitCode if code == returncode]
    return known[0] if known else ExitCode.BUG
