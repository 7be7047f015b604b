"""The run folder: what is written, and what is measured for it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sift_cli.delta.build import build_delta, describe_base, versions
from sift_cli.delta.file import save_delta
from sift_cli.models.fingerprints import probe_logits
from sift_cli.recipe import Recipe
from sift_cli.runs.cards import delta_card
from sift_cli.runs.folder import (
    CARD_FILE,
    DELTA_FILE,
    NO_RESULT,
    SUMMARY_FILE,
)
from sift_cli.runs.record import write_weights
from sift_cli.runs.session import Session
from sift_cli.runs.timing import Timing
from sift_cli.sparse import SparseParameters
from sift_cli.system.files import write_text
from sift_cli.tasks.metrics import Metrics


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
