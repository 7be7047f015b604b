"""One training by a method that is not sift's, for comparison: what differs is what trains.

Rows, batches, learning-rate schedule, clipping, evaluation and what is measured are those of
`sift train`; the optimizer is torch's own AdamW. Run as a process of its own:
python -m sift_cli.analysis.adapted METHOD RECIPE OUT [DEVICE]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import get_scheduler

from sift_cli.analysis.methods import (
    ADAPTERS,
    adapt,
    adapted_layers,
    rank_for,
    require_peft,
    trained,
)
from sift_cli.errors import SiftError
from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.folder import RECIPE_FILE, SUMMARY_FILE
from sift_cli.runs.session import open_session
from sift_cli.runs.timing import Timing, peak_memory
from sift_cli.selection.select import planned
from sift_cli.training.choosing import Chooser, rule_of
from sift_cli.training.gradient import add_gradient
from sift_cli.training.loop import SCHEDULES, evaluates
from sift_cli.training.watch import Watch

WEIGHTS_FILE = "trained.safetensors"


def train_adapted(
    recipe: Recipe, method: str, out: Path, *, device: str | None = None
) -> dict[str, Any]:
    """Trains, evaluates and writes what was trained and summary.json, with the keys of a run."""
    timing = Timing()
    session = open_session(recipe, device=device)
    chooser = Chooser.of(recipe, session, rule_of(recipe.selection))
    settings, batches = recipe.train, chooser.batches
    metrics_before = session.evaluate()
    total = sum(weight.numel() for weight in session.model.parameters())
    layers, rank = adapted_layers(session.model, chooser.sparse), None
    if method in ADAPTERS:
        budget = sum(planned(session.model, chooser.sparse, chooser.rule).values())
        rank, _ = rank_for(session.model, layers, budget)
    prepare_model(session.model, session.device, settings.gradient_checkpointing)
    dense = set(chooser.dense)
    head = [weight for name, weight in session.model.named_parameters() if name in dense]
    model = adapt(session.model, method, layers, chooser.dense, rank or 0, settings.seed)
    session = replace(session, model=model)
    weights = trained(model)
    if not weights:
        raise SiftError(f"{method}: no module trains whole; name one in selection.dense")
    optimizer = torch.optim.AdamW(
        weights.values(),
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    warmup = ceil(settings.warmup * batches.steps)
    schedule = get_scheduler(SCHEDULES[settings.lr_schedule], optimizer, warmup, batches.steps)
    limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
    watch = Watch(session)
    best: dict[str, float | None] = {}
    first = session.task.metrics[0]
    best_step, best_weights = 0, dict[str, Tensor]()
    for step, rows in enumerate(batches, start=1):
        with timing.step(session.device):
            loss = add_gradient(session, rows)
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), limit)
            watch.broken(step, rows, loss, norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        evaluating = evaluates(step, recipe.eval.every, batches)
        if evaluating or step % recipe.log.every == 0:
            watch.read()
        if evaluating:
            metrics = session.evaluate()
            new, old = metrics[first], best.get(first)
            better = old is None or (new is not None and new > old)
            if better or recipe.eval.keep == "last":
                best, best_step = metrics, step
                best_weights = {name: one.detach().cpu().clone() for name, one in weights.items()}
    for name, value in best_weights.items():
        weights[name].data.copy_(value)
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_save(model, method, weights, head), out / WEIGHTS_FILE)
    (out / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    dense_entries = sum(weight.numel() for weight in head)
    entries = sum(weight.numel() for weight in weights.values())
    summary = {
        "task": session.task.name,
        "policy": method,
        "rank": rank,
        "seed": settings.seed,
        "metrics": best,
        "metrics_before": metrics_before,
        "trained_entries": entries - dense_entries,
        "dense_entries": dense_entries,
        "total_entries": total,
        "steps": batches.steps,
        "kept_step": best_step,
        "train_rows": len(chooser.batches.lengths),
        "step_time_ms": median(timing.step_ms),
        "train_time_s": sum(timing.step_ms) / 1e3,
        "wall_time_s": timing.used(session.device)["wall_time_s"],
        "peak_memory_bytes": peak_memory(session.device),
        "delta_bytes": (out / WEIGHTS_FILE).stat().st_size,
        "device": str(session.device),
        "bf16_autocast": session.bf16,
    }
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def to_save(
    model: Any, method: str, weights: Mapping[str, Tensor], head: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What one would keep of a run: what trained; of an adapter, what PEFT saves and the head."""
    found = dict(weights)
    if method in ADAPTERS:
        own = {id(weight) for weight in head}
        found = {name: weight for name, weight in weights.items() if id(weight) in own}
        found |= require_peft().get_peft_model_state_dict(model)
    return {name: weight.detach().cpu().contiguous() for name, weight in found.items()}


def main(arguments: list[str]) -> None:
    """The process: a user's mistake becomes a line and an exit code."""
    method, recipe, out, *device = arguments
    try:
        train_adapted(load_recipe(Path(recipe)), method, Path(out), device=next(iter(device), None))
    except SiftError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))


if __name__ == "__main__":
    main(sys.argv[1:])
