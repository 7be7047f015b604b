"""The run folder: what is written, and what is measured for it."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from sift_cli import __version__
from sift_cli.delta.build import build_delta
from sift_cli.delta.cards import delta_card
from sift_cli.delta.file import save_delta
from sift_cli.delta.tuned import DELTA_FILE, RECIPE_FILE
from sift_cli.errors import SiftError
from sift_cli.evaluation import probe_logits
from sift_cli.recipe import Recipe
from sift_cli.session import Session
from sift_cli.sparse import SparseParameters
from sift_cli.training.record import PLOTS, REPORT_FILE, write_weights
from sift_cli.training.sinks import Bar, JsonLines, Sink, Sinks, TensorBoard, WandB

SUMMARY_FILE = "summary.json"


class Timing:
    """Wall time of the run and of each step; a GPU's steps are timed by its own clock."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
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

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of every step so far; waits for the last of them."""
        if self._events:
            self._events[-1][1].synchronize()
            self._step_ms += [began.elapsed_time(ended) for began, ended in self._events]
            self._events.clear()
        return self._step_ms


def require_free(out: Path, overwrite: bool) -> None:
    """Raises SiftError where `out` holds a finished run that may not be overwritten."""
    if (out / SUMMARY_FILE).exists() and not overwrite:
        raise SiftError(f"{out} holds a finished run; choose another --out, or pass --overwrite")


def open_run_folder(recipe: Recipe, out: Path, console: Console) -> Sinks:
    """Makes the folder, clears it of an earlier run; returns metrics.jsonl and the other sinks."""
    out.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []  # first: a package that is missing must not cost the earlier run
    if recipe.log.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard"))
    if recipe.log.wandb:
        sinks.append(WandB(out, recipe.model_dump(mode="json")))
    for name in (SUMMARY_FILE, DELTA_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / PLOTS, ignore_errors=True)
    (out / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    return Sinks([*sinks, JsonLines(out / "metrics.jsonl"), Bar(console)])


def write_run(
    out: Path,
    recipe: Recipe,
    session: Session,
    parameters: SparseParameters,
    *,
    dense: Sequence[str],
    marks: Mapping[str, str],
    metrics_before: dict[str, float],
    metrics: dict[str, float] | None,
    kept_step: int,
    steps: int,
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
        "metrics": metrics,
        "metrics_before": metrics_before,
        "trained_entries": sum(counts.values()) - dense_entries,
        "dense_entries": dense_entries,
        "changed_entries": sum(w.count for n, w in delta.weights.items() if n not in dense),
        "total_entries": sum(weight.numel() for weight in session.model.parameters()),
        "steps": steps,
        "kept_step": kept_step,
        "train_rows": len(session.train),
        "truncated": session.truncated(),
        "step_time_ms": median(timing.step_ms),
        "train_time_s": sum(timing.step_ms) / 1e3,
        "wall_time_s": time.perf_counter() - timing.started,
        "peak_memory_bytes": peak_memory(session.device),
        "delta_bytes": (out / DELTA_FILE).stat().st_size,
        "delta_sha256": digest,
        "device": str(session.device),
        "bf16_autocast": session.bf16,
    }
    (out / "README.md").write_text(delta_card(recipe, summary), encoding="utf-8")
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def describe(recipe: Recipe, session: Session, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What a delta says of itself; nothing that changes from one run of the recipe to the next."""
    held = dict(session.model.named_parameters())
    default = getattr(torch, recipe.model.dtype)
    config = session.model.config
    return {
        "base": {
            "path": recipe.model.path,
            "revision": recipe.model.revision,
            "dtype": recipe.model.dtype,
            "architectures": config.architectures,
            "kept_dtypes": {
                name: str(weight.dtype).removeprefix("torch.")
                for name, weight in held.items()
                if weight.dtype != default
            },
        },
        "architecture": type(session.model).__name__,
        "task": session.task.name,
        "labels": None if session.task.labels is None else list(session.task.labels),
        "policy": recipe.selection.policy,
        "recipe": recipe.model_dump(mode="json", exclude={"out", "log"}),
        "metrics": dict(metrics),
        "logits": probe_logits(session.model, config).tolist(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"sift": __version__, "torch": version("torch"), "transformers": version("transformers")}


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
