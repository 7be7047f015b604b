"""The run folder: what is written, and what is measured for it."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from sift_cli.delta.build import describe_base, versions
from sift_cli.models.fingerprints import probe_logits
from sift_cli.recipe import Recipe
from sift_cli.runs.facts import settings_of
from sift_cli.runs.session import Session
from sift_cli.runs.timing import Timing
from sift_cli.tasks.metrics import Metrics


@dataclass(frozen=True)
class Written:
    """What a run wrote of what it trained: the file's size and hash, and how many entries.

    `changed` counts those that differ from the base, where that is known; `rank` is an adapter's.
    """

    bytes: int
    sha256: str
    trained: int
    dense: int
    total: int
    changed: int | None = None
    rank: int | None = None


def summarize(
    session: Session,
    written: Written,
    timing: Timing,
    *,
    policy: str,
    seed: int,
    metrics_before: Metrics,
    metrics: Metrics,
    kept_step: int,
    steps: int,
    skipped: int,
) -> dict[str, Any]:
    """What summary.json says."""
    assert session.train is not None
    summary = {
        "task": session.task.name,
        "policy": policy,
        "rank": written.rank,
        "seed": seed,
        "labels": None if session.task.labels is None else list(session.task.labels),
        "metrics": dict(metrics),
        "metrics_before": dict(metrics_before),
        "trained_entries": written.trained,
        "dense_entries": written.dense,
        "changed_entries": written.changed,
        "total_entries": written.total,
        "steps": steps,
        "skipped_steps": skipped,
        "kept_step": kept_step,
        "train_rows": len(session.train),
        "truncated": session.truncated(),
        "step_time_ms": median(timing.step_ms),
        "train_time_s": sum(timing.step_ms) / 1e3,
        **timing.used(session.device),
        "delta_bytes": written.bytes,
        "delta_sha256": written.sha256,
        "device": str(session.device),
        "bf16_autocast": session.bf16,
    }
    for key in ("rank", "changed_entries"):
        if summary[key] is None:
            del summary[key]
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
        "recipe": settings_of(recipe),
        "metrics": dict(metrics),
        "logits": probe_logits(session.model, session.model.config).tolist(),
        "versions": versions(),
    }
