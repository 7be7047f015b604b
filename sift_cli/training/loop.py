"""Sparse fine-tuning, from top to bottom."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from sift_cli.delta.apply import state_fingerprints
from sift_cli.errors import ExitCode, SiftError
from sift_cli.evaluation import autocast
from sift_cli.models import recompute_activations
from sift_cli.recipe import Recipe
from sift_cli.selection.select import select
from sift_cli.selection.targets import choose_weights
from sift_cli.session import Session, open_session
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, attach
from sift_cli.training.batches import Batches
from sift_cli.training.run import Timing, open_run_folder, require_free, write_run

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and writes the run folder `out`; returns what its summary.json holds.

    Raises SiftError for what the recipe gets wrong (exit code 2), and where a loss, a gradient or
    an output is not finite (4).
    """
    timing = Timing()
    console = console or Console(stderr=True, quiet=True)
    require_free(out, overwrite)
    session = open_session(recipe, device=device)
    assert session.train is not None
    for split, cut in session.truncated().items():
        if cut:
            console.print(f"{split}: {cut:,} rows cut to {recipe.data.max_length} tokens")
    metrics_before = session.evaluate()
    marks = state_fingerprints(session.model, session.new)
    batches = plan_batches(recipe, session)
    prepare_model(session, recipe.train.gradient_checkpointing)
    sparse, dense = choose_weights(
        session.model,
        recipe.selection.target,
        recipe.selection.exclude,
        recipe.selection.dense,
        session.new,
    )
    supports = select_entries(recipe, session, batches, sparse) | whole(session.model, dense)
    parameters = attach(session.model, supports)
    optimizer, schedule = make_optimizer(recipe, parameters, batches.steps)
    kept = Kept(parameters, recipe.eval.keep, session.task.metrics[0])
    log = open_run_folder(recipe, out, console)
    try:
        for step, rows in enumerate(batches, start=1):
            with timing.step():
                loss = add_gradient(session, rows)
                norm = float(optimizer.clip(recipe.train.max_grad_norm))
                require_finite(step, loss, norm, session, rows)
                rate = float(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
            if step % recipe.log.every == 0 or step == batches.steps:
                log.log(progress(step, batches, loss, rate, norm, rows, timing.step_ms[-1]))
            if evaluates(step, recipe.eval.every, batches):
                metrics = session.evaluate()
                best = kept.offer(step, metrics)
                log.log({"step": step, "metrics": metrics, "best": best})
    finally:
        log.close()
    kept.restore()
    parameters.detach()
    return write_run(
        out,
        recipe,
        session,
        parameters,
        dense=dense,
        marks=marks,
        metrics_before=metrics_before,
        metrics=kept.metrics,
        kept_step=kept.step,
        steps=batches.steps,
        timing=timing,
    )


def plan_batches(recipe: Recipe, session: Session) -> Batches:
    """The rows of every step."""
    assert session.train is not None
    return Batches.plan(
        session.train.lengths,
        batch_size=recipe.train.batch_size,
        accumulate=recipe.train.accumulate,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
    )


def prepare_model(session: Session, gradient_checkpointing: bool) -> None:
    """Training mode, with activations recomputed in the backward pass where that is asked for."""
    session.model.train()
    if gradient_checkpointing:
        recompute_activations(session.model)


def select_entries(
    recipe: Recipe, session: Session, batches: Batches, names: Sequence[str]
) -> dict[str, Support]:
    """The entries of the weights called `names` to train.

    The calibration batches are the first ones of training, seen with the same dropout masks:
    selection leaves random states as it found them, and the first batch trains as well.
    """
    if not names:
        raise SiftError("selection.target: nothing is left beside the modules trained whole")
    chosen = recipe.selection
    calibration = [(rows, sum(map(len, rows))) for rows in islice(batches, chosen.batches)]
    with frozen(session.model), kept_randomness(session.device):
        named = dict(session.model.named_parameters())
        return select(
            {name: named[name] for name in names},
            score=chosen.score or "gradient",
            scope=chosen.scope or "tensor",
            density=chosen.density,
            budget=chosen.budget,
            seed=recipe.train.seed,
            backward=[
                partial(add_gradient, session, [part], total)
                for rows, total in calibration
                for part in rows
            ],
        )


def whole(model: nn.Module, names: Sequence[str]) -> dict[str, Support]:
    """Supports that hold every entry of the parameters called `names`."""
    named = dict(model.named_parameters())
    return {name: Support(tuple(named[name].shape)) for name in names}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient, but for those that ask for one meanwhile."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    for weight, _ in flags:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def make_optimizer(
    recipe: Recipe, parameters: SparseParameters, steps: int
) -> tuple[SparseAdamW, LRScheduler]:
    """AdamW over the selected entries, and the learning rate of each of `steps`."""
    settings = recipe.train
    optimizer = SparseAdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = ceil(settings.warmup * steps)
    name = SCHEDULES[settings.lr_schedule]
    return optimizer, get_scheduler(name, optimizer.adamw, warmup, steps)


def kept_randomness(device: torch.device) -> Any:
    """Leaves the random states of the host and of `device` as they were."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)


def add_gradient(session: Session, rows: Sequence[list[int]], total: int | None = None) -> float:
    """Adds the gradient of the mean loss over all rows of a step; returns that mean.

    Each micro-batch counts by its rows, so 1 x 16 equals 4 x 4, whatever its last one holds.
    """
    assert session.train is not None
    total = total or sum(map(len, rows))
    loss = torch.zeros((), device=session.device)
    for part in rows:
        batch = session.collate(session.train.take(part))
        with autocast(session.device, session.bf16):
            mean = session.model(**{k: v.to(session.device) for k, v in batch.items()}).loss
        share = mean.float() * (len(part) / total)
        share.backward()
        loss += share.detach()
    return float(loss)


def require_finite(
    step: int, loss: float, norm: float, session: Session, rows: Sequence[list[int]]
) -> None:
    """Raises SiftError (exit code 4) naming step and rows, before anything reaches the weights."""
    assert session.train is not None
    finite = torch.isfinite(torch.tensor([loss, norm])).tolist()
    if all(finite):
        return
    what = f"the gradient's norm is {norm}" if finite[0] else f"the loss is {loss}"
    numbers = session.train.numbers([row for part in rows for row in part])
    raise SiftError(
        f"step {step}: {what}; training rows {numbers}. The weights are those of step "
        f"{step - 1}. Try a lower train.learning_rate, or look at these rows",
        ExitCode.NOT_FINITE,
    )


def progress(
    step: int,
    batches: Batches,
    loss: float,
    rate: float,
    norm: float,
    rows: Sequence[list[int]],
    step_ms: float,
) -> dict[str, float]:
    """What is logged of one step."""
    return {
        "step": step,
        "steps": batches.steps,
        "epoch": step / batches.steps_per_epoch,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "step_time_ms": step_ms,
        "rows_per_second": sum(map(len, rows)) / step_ms * 1e3,
    }


def evaluates(step: int, every: str | int, batches: Batches) -> bool:
    """Whether the model is evaluated after this step; it always is after the last."""
    period = batches.steps_per_epoch if every == "epoch" else int(every)
    return step % period == 0 or step == batches.steps


@dataclass
class Kept:
    """The weights to end with: those of the best evaluation, or the last. Holds K numbers."""

    parameters: SparseParameters
    keep: str
    metric: str
    step: int = 0
    metrics: dict[str, float] | None = None
    masters: torch.Tensor | None = None

    def offer(self, step: int, metrics: dict[str, float]) -> bool:
        """Takes an evaluation; tells whether its weights are now the ones to keep."""
        better = self.metrics is None or metrics[self.metric] > self.metrics[self.metric]
        if better or self.keep == "last":
            self.step, self.metrics = step, metrics
            if self.keep == "best":
                self.masters = self.parameters.state()
        return better

    def restore(self) -> None:
        """Puts the kept weights back into the model."""
        if self.masters is not None:
            self.parameters.load_state(self.masters)
