"""Fine-tuning, from top to bottom."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import EvalSection, Recipe, TrainSection
from sift_cli.runs.callbacks import Callback, require_callbacks
from sift_cli.runs.checkpoint import Checkpoints
from sift_cli.runs.facts import Facts, settings_of
from sift_cli.runs.guard import guarded, require_space
from sift_cli.runs.language import with_template
from sift_cli.runs.ranks import Ranks, opened
from sift_cli.runs.record import write_gradient, write_predictions
from sift_cli.runs.samples import Sample, answered, draw_samples, write_samples
from sift_cli.runs.session import (
    Session,
    open_session,
    tell_emulated,
    tell_no_better,
    tell_undefined,
)
from sift_cli.runs.sinks import Sinks, open_sinks
from sift_cli.runs.summary import Summary, describe, summarize
from sift_cli.runs.timing import Timing
from sift_cli.system.stopping import Stop
from sift_cli.training.asked import Asked
from sift_cli.training.batches import Steps, steps_of
from sift_cli.training.choosing import selecting
from sift_cli.training.method import Build, Method, require_alike
from sift_cli.training.randomness import packed_states, random_states
from sift_cli.training.rates import rate_from, rated, remove_trials, told_rate
from sift_cli.training.schedule import schedule_of
from sift_cli.training.state import Kept, State, space_for
from sift_cli.training.step import add_gradient, take_step
from sift_cli.training.watch import Watch


def train(
    recipe: Recipe,
    out: Path,
    *,
    build: Callable[[Recipe], Build] | None = None,
    narrow: float | None = None,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> Summary:
    """Trains, evaluates and writes the run folder `out`; returns what its summary.json holds.

    What trains is what the recipe selects, or what `build` makes of the session. A learning rate
    that the recipe leaves open is the usual one (on a narrow model `narrow`, if given, else that of
    the policy), and one that it asks for is found near that. `resume` goes on
    from the newest checkpoint in `out`, to the same delta as if nothing had come between;
    `overwrite` replaces a run there. `allow_code` lets `selection.score` and metrics name functions
    in files. `callbacks` are told of logged steps and of evaluations. Where a launcher started
    several processes, or `ranks` says so, they share the work of each step, and one of them writes.

    Raises SiftError for what the recipe gets wrong and for faults of disk and memory (exit code 2),
    for another base than the checkpoint's (3), where a loss, a gradient or an output is not finite
    (4), and after a SIGINT or SIGTERM, once the state is saved (130).
    """
    require_callbacks(callbacks)
    with opened(device) if ranks is None else nullcontext(ranks) as ranks, guarded(out, ranks.main):
        console = console if console and ranks.main else Console(stderr=True, quiet=True)
        recipe = with_template(recipe)
        if recipe.distributed.shard == "full":
            if ranks.alone:
                console.print("distributed.shard: full: one process holds all rows, as without it")
            ranks = ranks.in_rows(recipe.distributed.replicas, of_recipe=build is None)
        checkpoints = Checkpoints(out, recipe.checkpoint, console)
        if overwrite:
            ranks.on_main(partial(remove_trials, out))
        elif not resume:
            ranks.on_main(checkpoints.require_none)
        source = rate_from(recipe)
        trial = partial(train, build=build, device=device, allow_code=allow_code, ranks=ranks)
        recipe = rated(recipe, out, partial(trial, resume=True), narrow, console, ranks)
        timing = Timing()
        if resume:
            policy = recipe.selection.policy if build is None else None
            found = partial(checkpoints.finished, settings_of(recipe), policy=policy)
            if (summary := ranks.on_main(found)) is not None:
                return summary
        method = build(recipe) if build else selecting(recipe, allow_code, console)
        session = open_session(recipe, device=device, allow_code=allow_code, ranks=ranks)
        if source == "usual":
            console.print(told_rate(recipe, narrow is None), highlight=False)
        run = begin(recipe, session, method, checkpoints, timing, resume=resume)
        regular = recipe.checkpoint.every is not None
        space = space_for(run.state.parameters, regular)
        ranks.on_main(partial(require_space, out, space))
        with Stop() as stop:
            with closing(open_sinks(recipe, out, console, run.done, callbacks, ranks.main)) as log:
                if run.saved is None:
                    ranks.on_main(checkpoints.remove)
                take_steps(run, log, Asked(stop, checkpoints, ranks))
            return finish(run, recipe, source)


@dataclass(frozen=True)
class Run:
    """A run before its first step, or after step `saved` where it was resumed.

    `undo` gives the model its own dropout and attention back.
    """

    settings: TrainSection
    evaluation: EvalSection
    log_every: int
    session: Session
    batches: Steps
    method: Method
    checkpoints: Checkpoints
    facts: Facts
    state: State
    samples: Sequence[Sample]
    metrics_before: dict[str, float | None]
    saved: int | None
    undo: Callable[[], None]

    @property
    def done(self) -> int:
        """The steps that are behind it."""
        return self.saved or 0

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.session.ranks.main

    def answers(self) -> list[dict[str, Any]]:
        """What the model answers to the samples now; the other ranks need not ask."""
        if not self.main and not self.session.ranks.even:
            return []
        return answered(self.session, self.samples, self.evaluation.generate.max_new_tokens)


def begin(
    recipe: Recipe,
    session: Session,
    build: Build,
    checkpoints: Checkpoints,
    timing: Timing,
    *,
    resume: bool,
) -> Run:
    """Chooses what trains, or takes that and all else from the newest checkpoint."""
    console, settings = checkpoints.console, recipe.train
    assert session.train is not None
    batches = steps_of(settings, session.train.lengths, session.task.packs)
    method = build(session, batches)
    for split, rows in session.splits.items():
        if rows.truncated:
            console.print(
                f"{split}: {rows.truncated:,} rows cut to {recipe.data.max_length} tokens"
            )
        for why, dropped in rows.dropped.items():
            console.print(f"{split}: {len(dropped):,} rows dropped: {why}")
    for note in session.notes:
        console.print(note, highlight=False)
    tell_emulated(recipe.model, settings, session.device, console)
    facts, ranks = Facts.of(settings_of(recipe), method.name, session), session.ranks
    ranks.require_same("base or rows", lambda: json.dumps([facts.base, facts.data]))
    saved = ranks.on_main(partial(checkpoints.newest, facts)) if resume else None
    metrics_before: dict[str, float | None] = {}
    if recipe.eval.before and saved:
        metrics_before = saved.metrics_before
    elif recipe.eval.before:
        held_out = sum(map(len, session.evaluation.values()))
        console.print(f"evaluating {held_out:,} rows before training", highlight=False)
        metrics_before = session.evaluate()
    tell_undefined(metrics_before, console)
    undo = prepare_model(session.model, session.device, settings.gradient_checkpointing)
    optimizer = method.restore(saved) if saved else method.begin()
    require_alike(session, method, optimizer)
    if not ranks.alone and not session.one_dropout:
        torch.manual_seed(settings.seed + ranks.rank)
    schedule = schedule_of(settings, optimizer.adamw, batches.steps)
    kept = Kept(optimizer.parameters, recipe.eval.keep, session.task.better)
    watch = Watch(session, optimizer.parameters, settings.skip_nonfinite)
    state = State(method, optimizer, schedule, kept, watch, timing, session.device)
    if saved:
        state.load(saved, ranks.rank)
        console.print(f"resuming after step {saved.step:,} of {batches.steps:,}", highlight=False)
    return Run(
        settings=settings,
        evaluation=recipe.eval,
        log_every=recipe.log.every,
        session=session,
        batches=batches,
        method=method,
        checkpoints=checkpoints,
        facts=facts,
        state=state,
        samples=draw_samples(session, recipe.eval.samples),
        metrics_before=metrics_before,
        saved=saved.step if saved else None,
        undo=undo,
    )


def take_steps(run: Run, log: Sinks, asked: Asked) -> None:
    """Takes every step that is left, and logs, evaluates and saves on the way.

    It ends early where `eval.patience` says so.
    """
    session, state, batches = run.session, run.state, run.batches
    if not run.done and (answers := asked.unless_stopped(run.answers)) and run.main:
        write_samples(run.checkpoints.out, 0, answers)
    settle(run, run.done, log, asked)
    for step, rows in enumerate(batches.since(run.done + 1), start=run.done + 1):
        if state.kept.stale == run.evaluation.patience:
            run.checkpoints.console.print(
                f"stopped after step {step - 1:,} of {batches.steps:,}: {state.kept.stale} "
                f"evaluations no better than that of step {state.kept.step:,}",
                highlight=False,
            )
            return
        with state.timing.step(session.device):
            if run.method.due(step):
                run.method.change(step, state.optimizer)
                require_alike(session, run.method, state.optimizer)
            rate = float(state.schedule.get_last_lr()[0])
            take_step(
                session,
                state.optimizer,
                step,
                rows,
                state.watch.broken,
                max_grad_norm=run.settings.max_grad_norm,
                schedule=state.schedule,
                gradient=add_gradient,
                asked=asked,
                seen=partial(note_gradient, run) if step == 1 else None,
            )
        if step % run.log_every == 0 or step == batches.steps:
            step_ms = state.timing.step_ms[-1]
            record = progress(step, batches, *state.watch.read(), rate, rows, step_ms)
            if session.learns_tokens:
                tokens = sum(batches.lengths[row] for part in rows for row in part)
                record["tokens_per_second"] = tokens / step_ms * 1e3
            log.log(record)
        settle(run, step, log, asked)


def note_gradient(run: Run) -> None:
    """Keeps in the run folder how much of the first step's gradient the trained entries hold."""
    if run.method.norms:
        kept = run.state.parameters.norms()
        if run.main:
            write_gradient(run.checkpoints.out, kept, run.method.norms)


def settle(run: Run, step: int, log: Sinks, asked: Asked) -> None:
    """What may follow a step: an evaluation, a checkpoint, the end that a signal asks for.

    Step 0 is the choice of entries. An evaluation that a signal breaks off is made up for on
    resuming.
    """
    state, batches, evaluation = run.state, run.batches, run.evaluation
    if evaluates(step, evaluation.every, batches) and state.kept.seen < step:
        state.watch.read()
        found = asked.unless_stopped(lambda: (run.session.predict(), run.answers()))
        if found is not None:
            outputs, answers = found
            metrics = run.session.score(outputs)
            log.log({"step": step, "metrics": metrics, "best": state.kept.offer(step, metrics)})
            if state.kept.step == step and run.main:
                write_predictions(run.checkpoints.out, run.session, outputs, evaluation.split)
            if answers and run.main:
                write_samples(run.checkpoints.out, step, answers)
    stops = asked.to_stop  # read once: what comes later is heard after the next step
    if step != run.saved and (stops or asked.to_save(step)):
        state.watch.read()
        log.sync()
        save(run, step)
    if stops:
        raise SiftError(
            f"interrupted after step {step:,} of {batches.steps:,}; all of it is saved in "
            f"{run.checkpoints.folder}",
            ExitCode.INTERRUPTED,
        )


def save(run: Run, step: int) -> None:
    """Writes a checkpoint after `step`, with the random states of every rank."""
    ranks, state = run.session.ranks, run.state
    random = packed_states(ranks.gather(random_states(state.device)))
    saved = state.gather(step, run.facts, run.metrics_before, random)
    ranks.on_main(partial(run.checkpoints.save, saved))


def finish(run: Run, recipe: Recipe, source: str) -> Summary:
    """Writes the run folder with the weights that are kept; returns what summary.json holds.

    `source` is where the learning rate came from.
    """
    out, session, state = run.checkpoints.out, run.session, run.state
    state.kept.restore()
    state.parameters.detach()
    run.undo()
    metrics = state.kept.metrics
    assert metrics is not None  # the last step was evaluated
    tell_no_better(session.task, metrics, run.metrics_before, run.checkpoints.console)

    header = partial(describe, recipe, session, metrics)
    written = run.method.write(out, state.optimizer, run.facts.base, header)

    def write() -> Summary:
        summary = summarize(
            session,
            written,
            state.timing,
            policy=run.method.name,
            seed=run.settings.seed,
            learning_rate=run.settings.rate,
            learning_rate_from=source,
            metrics_before=run.metrics_before,
            metrics=metrics,
            kept_step=state.kept.step,
            steps=state.kept.seen,  # the last one taken is always evaluated
            skipped=state.watch.skipped,
        )
        run.method.describe(out, recipe, summary)
        summary.write(out)  # last: it marks the run as whole
        run.checkpoints.remove()
        return summary

    return session.ranks.on_main(write)


def progress(
    step: int,
    batches: Steps,
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


def evaluates(step: int, every: str | int, batches: Steps) -> bool:
    """Whether the model is evaluated after this step; it always is after the last."""
    period = batches.steps_per_epoch if every == "epoch" else int(every)
    return step % period == 0 or step == batches.steps
