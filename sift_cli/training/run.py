"""The run folder: what is written, and what is measured for it."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from sift_cli.delta.build import build_delta, describe_base, versions
from sift_cli.delta.cards import CARD_FILE, delta_card
from sift_cli.delta.file import save_delta
from sift_cli.delta.tuned import DELTA_FILE, RECIPE_FILE
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import probe_logits
from sift_cli.recipe import Recipe
from sift_cli.session import Session
from sift_cli.sparse import SparseParameters
from sift_cli.system.files import write_text
from sift_cli.tasks.metrics import Metrics
from sift_cli.training.record import GRADIENT_FILE, PLOTS, REPORT_FILE, write_weights
from sift_cli.training.sinks import Bar, JsonLines, Sink, Sinks, TensorBoard, WandB

SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
NO_RESULT = {"out", "log", "checkpoint"}  # parts of a recipe that change no result


class Timing:
    """Wall time of the run and of each step; a GPU's steps are timed by its own clock.

    A run that was resumed also counts what the processes before this one used.
    """

    def __init__(self) -> None:
        self.resumed_at: list[int] = []
        self._started = time.perf_counter()
        self._peak_memory = 0
        self._step_ms: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Times one step on `device`, and waits for none."""
        if device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        began = time.perf_counter()
        yield
        self._step_ms.append((time.perf_counter() - began) * 1e3)

    def used(self, device: torch.device) -> dict[str, Any]:
        """What the run took so far, and the steps after which it was resumed."""
        return {
            "wall_time_s": time.perf_counter() - self._started,
            "peak_memory_bytes": max(peak_memory(device), self._peak_memory),
            "resumed_at": self.resumed_at,
        }

    def resume(self, step: int, step_ms: list[float], used: Mapping[str, Any]) -> None:
        """Counts on from where `used` and the milliseconds of each step were taken."""
        self._started -= used["wall_time_s"]
        self._peak_memory = used["peak_memory_bytes"]
        self.resumed_at = [*used["resumed_at"], step]
        self._step_ms = step_ms

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of every step so far; waits for the last of them."""
        if self._events:
            self._events[-1][1].synchronize()
            self._step_ms += [began.elapsed_time(ended) for began, ended in self._events]
            self._events.clear()
        return self._step_ms


def open_run_folder(recipe: Recipe, out: Path, console: Console, after: int = 0) -> Sinks:
    """metrics.jsonl and the other sinks, which go on after step `after`.

    What a finished run left in the folder is cleared away.
    """
    sinks: list[Sink] = []  # first: a package that is missing must not cost the earlier run
    if recipe.log.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard", after))
    if recipe.log.wandb:
        sinks.append(WandB(out, recipe.model_dump(mode="json"), after))
    for name in (SUMMARY_FILE, DELTA_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    if not after:
        (out / GRADIENT_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / PLOTS, ignore_errors=True)
    write_text(out / RECIPE_FILE, recipe.to_yaml())
    return Sinks(JsonLines(out / METRICS_FILE, after), [*sinks, Bar(console)])


def write_run(
    out: Path,
    recipe: Recipe,
    session: Session,
    parameters: SparseParameters,
    *,
    dense: Sequence[str],
    marks: Mapping[str, str],
    metrics_before: Metrics,
    metrics: Metrics | None,
    kept_step: int,
    steps: int,
    skipped: int,
    timing: Timing,
) -> dict[str, Any]:
    """Writes the delta, the card and summary.json, which comes last and marks the run as whole."""
    assert metrics is not None
    assert session.train is not None
    delta = build_delta(parameters, session.new, marks, describe(recipe, session, metrics))
    digest = save_delta(out / DELTA_FILE, delta)
    write_weights(out, session.model, parameters, dense)
    counts = {one.name: len(one.support) for one in parameters}
    dense_entries = sum(counts[name] for name in dense)
    summary = {
        "task": session.task.name,
        "policy": recipe.selection.policy,
        "seed": recipe.train.seed,
        "labels": None if session.task.labels is None else list(session.task.labels),
        "metrics": dict(metrics),
        "metrics_before": dict(metrics_before),
        "trained_entries": sum(counts.values()) - dense_entries,
        "dense_entries": dense_entries,
        "changed_entries": sum(w.count for n, w in delta.weights.items() if n not in dense),
        "total_entries": sum(weight.numel() for weight in session.model.parameters()),
        "steps": steps,
        "skipped_steps": skipped,
        "kept_step": kept_step,
        "train_rows": len(session.train),
        "truncated": session.truncated(),
        "step_time_ms": median(timing.step_ms),
        "train_time_s": sum(timing.step_ms) / 1e3,
        **timing.used(session.device),
        "delta_bytes": (out / DELTA_FILE).stat().st_size,
        "delta_sha256": digest,
        "device": str(session.device),
        "bf16_autocast": session.bf16,
    }
    write_text(out / CARD_FILE, delta_card(recipe, summary))
    write_text(out / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(out: Path) -> dict[str, Any] | None:
    """What the finished run in `out` says of itself; None where none has finished there.

    Raises SiftError (exit code 3) where it cannot be understood.
    """
    path = out / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise SiftError(f"{path}: damaged: {error}", ExitCode.WRONG_FILE) from None
    return summary


def describe(recipe: Recipe, session: Session, metrics: Metrics) -> dict[str, Any]:
    """What a delta says of itself; nothing that changes from one run of the recipe to the next."""
    base = recipe.model
    return {
        "base": describe_base(session.model, base.path, base.revision, base.dtype),
        "architecture": type(session.model).__name__,
        "task": session.task.name,
        "labels": None if session.task.labels is None else list(session.task.labels),
        "policy": recipe.selection.policy,
        "recipe": recipe.model_dump(mode="json", exclude=NO_RESULT),
        "metrics": dict(metrics),
        "logits": probe_logits(session.model, session.model.config).tolist(),
        "versions": versions(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
