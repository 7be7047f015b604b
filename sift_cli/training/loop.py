"""Sparse fine-tuning, from top to bottom."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import Recipe
from sift_cli.runs.checkpoint import Checkpoints
from sift_cli.runs.facts import Facts
from sift_cli.runs.folder import open_run_folder
from sift_cli.runs.guard import guarded, require_space
from sift_cli.runs.record import write_gradient, write_predictions
from sift_cli.runs.session import Session, open_session, tell_emulated
from sift_cli.runs.sinks import Sinks
from sift_cli.runs.summary import write_run
from sift_cli.runs.timing import Timing
from sift_cli.selection.select import Rule
from sift_cli.sparse import SparseAdamW, SparseParameters
from sift_cli.system.stopping import Stop
from sift_cli.tasks.metrics import Metrics
from sift_cli.training.batches import Batches
from sift_cli.training.choosing import Chooser, rule_of
from sift_cli.training.gradient import add_gradient
from sift_cli.training.kept import Kept
from sift_cli.training.state import State, space_for
from sift_cli.training.watch import Watch

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and writes the run folder `out`; returns what its summary.json holds.

    `resume` goes on from the newest checkpoint in `out`, to the same delta as if nothing had come
    between; `overwrite` replaces a run there. `allow_code` lets `selection.score` name a function
    in a file.

    Raises SiftError for what the recipe gets wrong and for faults of disk and memory (exit code 2),
    for another base than the checkpoint's (3), where a loss, a gradient or an output is not finite
    (4), and after a SIGINT or SIGTERM, once the state is saved (130).
    """
    timing = Timing()
    console = console or Console(stderr=True, quiet=True)
    with guarded(out):
        checkpoints = Checkpoints(out, recipe.checkpoint, console)
        summary = checkpoints.finished(recipe, resume=resume, overwrite=overwrite)
        if summary is not None:
            return summary
        rule = rule_of(recipe.selection, allow_code)
        session = open_session(recipe, device=device)
        run = begin(recipe, session, rule, checkpoints, timing, resume=resume)
        require_space(out, space_for(run.state.parameters))
        with Stop() as stop:
            with closing(open_run_folder(recipe, out, console, run.done)) as log:
                if run.saved is None:
                    checkpoints.remove()
                take_steps(run, log, stop)
            return finish(run)


@dataclass(frozen=True)
class Run:
    """A run before its first step, or after step `saved` where it was resumed.

    `undo` gives the model its own dropout and attention back.
    """

    recipe: Recipe
    session: Session
    chooser: Chooser
    checkpoints: Checkpoints
    facts: Facts
    state: State
    metrics_before: Metrics
    saved: int | None
    undo: Callable[[], None]

    @property
    def done(self) -> int:
        """The steps that are behind it."""
        return self.saved or 0


def begin(
    recipe: Recipe,
    session: Session,
    rule: Rule,
    checkpoints: Checkpoints,
    timing: Timing,
    *,
    resume: bool,
) -> Run:
    """Chooses what trains, or takes that and all else from the newest checkpoint."""
    console = checkpoints.console
    chooser = Chooser.of(recipe, session, rule, console)
    for split, cut in session.truncated().items():
        if cut:
            console.print(f"{split}: {cut:,} rows cut to {recipe.data.max_length} tokens")
    tell_emulated(recipe, session.device, console)
    facts = Facts.of(recipe, session)
    saved = checkpoints.newest(facts) if resume else None
    metrics_before = saved.about["metrics_before"] if saved else session.evaluate()
    tell_undefined(metrics_before, console)
    undo = prepare_model(session.model, session.device, recipe.train.gradient_checkpointing)
    offload = recipe.train.offload_optimizer
    parameters = saved.attach(session.model, offload) if saved else chooser.begin()
    optimizer, schedule = make_optimizer(recipe, parameters, chooser.batches.steps)
    kept = Kept(parameters, recipe.eval.keep, session.task.metrics[0])
    watch = Watch(session, parameters, recipe.train.skip_nonfinite)
    state = State(parameters, optimizer, schedule, kept, watch, timing, session.device)
    if saved:
        state.load(saved)
        console.print(
            f"resuming after step {saved.step:,} of {chooser.batches.steps:,}", highlight=False
        )
    step = saved.step if saved else None
    return Run(recipe, session, chooser, checkpoints, facts, state, metrics_before, step, undo)


def take_steps(run: Run, log: Sinks, stop: Stop) -> None:
    """Takes every step that is left, and logs, evaluates and saves on the way."""
    recipe, session, state = run.recipe, run.session, run.state
    batches, optimizer, watch = run.chooser.batches, state.optimizer, state.watch
    settle(run, run.done, log, stop)
    for step, rows in enumerate(batches.since(run.done + 1), start=run.done + 1):
        with state.timing.step(session.device):
            if run.chooser.due(step):
                run.chooser.change(step, optimizer)
            loss = add_gradient(session, rows)
            if step == 1 and run.chooser.norms:
                write_gradient(run.checkpoints.out, state.parameters, run.chooser.norms)
            norm = optimizer.clip(recipe.train.max_grad_norm)
            rate = float(state.schedule.get_last_lr()[0])
            optimizer.step(skip=watch.broken(step, rows, loss, norm))
            state.schedule.step()
        if step % recipe.log.every == 0 or step == batches.steps:
            step_ms = state.timing.step_ms[-1]
            log.log(progress(step, batches, *watch.read(), rate, rows, step_ms))
        settle(run, step, log, stop)


def settle(run: Run, step: int, log: Sinks, stop: Stop) -> None:
    """What may follow a step: an evaluation, a checkpoint, the end that a signal asks for.

    Step 0 is the choice of entries. An evaluation that a signal breaks off is made up for on
    resuming.
    """
    state, batches = run.state, run.chooser.batches
    if evaluates(step, run.recipe.eval.every, batches) and state.kept.seen < step:
        state.watch.read()
        logits = stop.interruptible(run.session.predict)
        if logits is not None:
            metrics = run.session.score(logits)
            log.log({"step": step, "metrics": metrics, "best": state.kept.offer(step, metrics)})
            if state.kept.step == step:
                write_predictions(run.checkpoints.out, run.session, logits, run.recipe.eval.split)
    asked = stop.asked  # read once: what comes later is heard after the next step
    if step != run.saved and (asked or run.checkpoints.due(step)):
        state.watch.read()
        log.sync()
        facts = {"facts": asdict(run.facts), "metrics_before": run.metrics_before}
        run.checkpoints.save(state.gather(step), **facts)
    if asked:
        raise SiftError(
            f"interrupted after step {step:,} of {batches.steps:,}; all of it is saved in "
            f"{run.checkpoints.folder}",
            ExitCode.INTERRUPTED,
        )


def finish(run: Run) -> dict[str, Any]:
    """Writes the run folder with the weights that are kept; returns what summary.json holds."""
    state = run.state
    state.kept.restore()
    state.parameters.detach()
    run.undo()
    summary = write_run(
        run.checkpoints.out,
        run.recipe,
        run.session,
        state.parameters,
        dense=run.chooser.dense,
        marks={name: m for name, m in run.facts.base.items() if name not in run.session.new},
        metrics_before=run.metrics_before,
        metrics=state.kept.metrics,
        kept_step=state.kept.step,
        steps=run.chooser.batches.steps,
        skipped=state.watch.skipped,
        timing=state.timing,
    )
    run.checkpoints.remove()
    return summary


def tell_undefined(metrics: Metrics, console: Console) -> None:
    """Says which metrics of the base are undefined: on data of one class they stay so."""
    names = [name for name, value in metrics.items() if value is None]
    if names:
        console.print(
            f"{', '.join(names)}: undefined before training, since all labels or all predictions "
            "are the same",
            highlight=False,
        )


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
