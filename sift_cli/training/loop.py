"""Sparse fine-tuning, from top to bottom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from sift_cli.attention import leave_masks_unread
from sift_cli.delta.apply import state_fingerprints
from sift_cli.dropout import quicken_dropout
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models import recompute_activations
from sift_cli.recipe import Recipe
from sift_cli.session import Session, open_session
from sift_cli.sparse import SparseAdamW, SparseParameters, Support
from sift_cli.training.batches import Batches
from sift_cli.training.choosing import Chooser, rule_of
from sift_cli.training.gradient import add_gradient
from sift_cli.training.record import write_predictions
from sift_cli.training.run import Timing, open_run_folder, require_free, write_run

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and writes the run folder `out`; returns what its summary.json holds.

    `allow_code` lets `selection.score` name a function in a file. Raises SiftError for what the
    recipe gets wrong (exit code 2), and where a loss, a gradient or an output is not finite (4).
    """
    timing = Timing()
    console = console or Console(stderr=True, quiet=True)
    require_free(out, overwrite)
    rule = rule_of(recipe.selection, allow_code)
    session = open_session(recipe, device=device)
    assert session.train is not None
    chooser = Chooser.of(recipe, session, rule, console)
    for split, cut in session.truncated().items():
        if cut:
            console.print(f"{split}: {cut:,} rows cut to {recipe.data.max_length} tokens")
    metrics_before = session.evaluate()
    marks = state_fingerprints(session.model, session.new)
    batches = chooser.batches
    undo = prepare_model(session, recipe.train.gradient_checkpointing)
    parameters = chooser.begin()
    optimizer, schedule = make_optimizer(recipe, parameters, batches.steps)
    kept = Kept(parameters, recipe.eval.keep, session.task.metrics[0])
    watch = Watch(session)
    log = open_run_folder(recipe, out, console)
    try:
        for step, rows in enumerate(batches, start=1):
            with timing.step(session.device):
                if chooser.due(step):
                    chooser.change(step, optimizer)
                loss = add_gradient(session, rows)
                norm = optimizer.clip(recipe.train.max_grad_norm)
                rate = float(schedule.get_last_lr()[0])
                optimizer.step(skip=watch.broken(step, rows, loss, norm))
                schedule.step()
            logs = step % recipe.log.every == 0 or step == batches.steps
            evaluating = evaluates(step, recipe.eval.every, batches)
            if logs or evaluating:
                seen = watch.read()
            if logs:
                log.log(progress(step, batches, *seen, rate, rows, timing.step_ms[-1]))
            if evaluating:
                logits = session.predict()
                metrics = session.score(logits)
                best = kept.offer(step, metrics)
                log.log({"step": step, "metrics": metrics, "best": best})
                if kept.step == step:
                    write_predictions(out, session, logits, recipe.eval.split)
    finally:
        log.close()
    kept.restore()
    parameters.detach()
    undo()
    return write_run(
        out,
        recipe,
        session,
        parameters,
        dense=chooser.dense,
        marks=marks,
        metrics_before=metrics_before,
        metrics=kept.metrics,
        kept_step=kept.step,
        steps=batches.steps,
        timing=timing,
    )


def prepare_model(session: Session, gradient_checkpointing: bool) -> Callable[[], None]:
    """Training mode, with activations recomputed in the backward pass where that is asked for.

    Returns what gives the model its own dropout and attention back.
    """
    session.model.train()
    on_gpu = session.device.type == "cuda"
    undo = (leave_masks_unread if on_gpu else quicken_dropout)(session.model)
    if gradient_checkpointing:
        recompute_activations(session.model)
    return undo


def make_optimizer(
    recipe: Recipe, parameters: SparseParameters, steps: int
) -> tuple[SparseAdamW, LRScheduler]:
    """AdamW over the selected entries, and the learning rate of each of `steps`."""
    settings = recipe.train
    optimizer = SparseAdamW(
        parameters,
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        history=recipe.selection.history or "keep",
    )
    warmup = ceil(settings.warmup * steps)
    name = SCHEDULES[settings.lr_schedule]
    return optimizer, get_scheduler(name, optimizer.adamw, warmup, steps)


class Watch:
    """Loss and norm of every step, read now and then: a GPU's host does not wait at each.

    From the first step on at which one of them is not finite, `broken` says so to the optimizer, on
    the device, and nothing reaches the weights.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._unread: list[tuple[int, Sequence[list[int]], Tensor]] = []
        self._broken = torch.zeros((), device=session.device)

    def broken(self, step: int, rows: Sequence[list[int]], loss: Tensor, norm: Tensor) -> Tensor:
        """Takes in a step; returns whether it or one before it is not finite (0 or 1, [])."""
        both = torch.stack([loss.float(), norm.float()])
        self._unread.append((step, rows, both))
        self._broken = torch.maximum(self._broken, (~both.isfinite()).any().float())
        return self._broken

    def read(self) -> tuple[float, float]:
        """Loss and norm of the newest step.

        Raises SiftError (exit code 4) naming the first step that is not finite, and its rows.
        """
        assert self.session.train is not None
        numbers = torch.stack([both for _, _, both in self._unread]).tolist()
        for (step, rows, _), (loss, norm) in zip(self._unread, numbers, strict=True):
            if isfinite(loss) and isfinite(norm):
                continue
            lost = not isfinite(loss)
            what = f"the loss is {loss}" if lost else f"the gradient's norm is {norm}"
            named = self.session.train.numbers([row for part in rows for row in part])
            raise SiftError(
                f"step {step}: {what}; training rows {named}. The weights are those of step "
                f"{step - 1}. Try a lower train.learning_rate, or look at these rows",
                ExitCode.NOT_FINITE,
            )
        self._unread.clear()
        loss, norm = numbers[-1]
        return loss, norm


def progress(
    step: int,
    batches: Batches,
    loss: float,
    norm: float,
    rate: float,
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
    state: dict[str, tuple[Support, Tensor]] | None = None

    def offer(self, step: int, metrics: dict[str, float]) -> bool:
        """Takes an evaluation; tells whether its weights are now the ones to keep."""
        better = self.metrics is None or metrics[self.metric] > self.metrics[self.metric]
        if better or self.keep == "last":
            self.step, self.metrics = step, metrics
            if self.keep == "best":
                self.state = self.parameters.state()
        return better

    def restore(self) -> None:
        """Puts the kept weights back into the model."""
        if self.state is not None:
            self.parameters.load_state(self.state)
