"""One step, the same for all who take any: the loop, the warm-up, the probe, a measured plan."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.models.devices import autocast, place
from sift_cli.runs.session import Session
from sift_cli.selection.evidence import uncounted
from sift_cli.tasks.task import Loss
from sift_cli.training.asked import Asked
from sift_cli.training.method import Optimizer
from sift_cli.training.shares import Share, shares_of

Rows = Sequence[list[int]]  # of one step, by micro-batch
# gathers the gradient of a step's mean loss where the optimizer looks for it; gives that mean, []
StepGradient = Callable[[Session, Rows], Tensor]
# step, rows, loss [] and norm [] -> whether the weights are to stay as they are (0 or 1, [])
Guard = Callable[[int, Rows, Tensor, Tensor], Tensor]


def add_gradient(session: Session, rows: Rows, total: float | None = None) -> Tensor:
    """Adds the gradient of the mean loss of a step; returns that mean, of shape [].

    It is the sum of the micro-batches' losses over what they count, rows or tokens as the task
    says, so 1 x 16 equals 4 x 4, whatever the last one holds. `total` stands in for the step's
    count, where `rows` are only some of a step's. Of several ranks, each adds the part of its own
    rows, and the parts sum to the mean.
    """
    alike = total is not None  # a pass that entries are chosen by
    total = total or session.counted(rows)
    mean = torch.zeros((), device=session.device)
    for part in shares_of(session, rows, alike):
        with part.masks(), nullcontext() if part.counts else uncounted():
            share = _loss(session, part).sum / total
            if not part.counts:
                share = share * 0
            share.backward()
        mean = mean + share.detach()
    return mean


def take_step(
    session: Session,
    optimizer: Optimizer,
    step: int,
    rows: Rows,
    guard: Guard,
    *,
    max_grad_norm: float | None,
    schedule: LRScheduler | None = None,
    gradient: StepGradient = add_gradient,
    asked: Asked | None = None,
    seen: Callable[[], None] | None = None,
) -> None:
    """Takes the step of that number (the first is 1): gradient, clipping, update, learning rate.

    `guard` sees loss and gradient norm (before clipping) and says on the device whether the weights
    must not move. `gradient` stands in for `add_gradient`, `seen` is called once all of it is
    there. With the ranks' parts of it travels what is `asked` of them.
    """
    loss = gradient(session, rows)
    if not session.ranks.alone:
        flags = asked.flags(step) if asked else (False, False)
        loss, heard = session.ranks.exchange(optimizer.parameters, loss, flags)
        if asked:
            asked.hear(heard)
    if seen:
        seen()
    norm = optimizer.clip(max_grad_norm)
    optimizer.step(skip=guard(step, rows, loss, norm))
    if schedule is not None:
        schedule.step()


def backward_passes(session: Session, batches: Iterable[Rows]) -> list[Callable[[], object]]:
    """A forward and backward pass for each micro-batch of each of `batches`, not run yet."""
    passes: list[Callable[[], object]] = []
    for rows in batches:
        total = session.counted(rows)
        passes += [partial(add_gradient, session, [part], total) for part in rows]
    return passes


@contextmanager
def watched(
    passes: Sequence[Callable[[], object]], what: str, console: Console | None
) -> Iterator[list[Callable[[], object]]]:
    """The same passes; several are told of, on a terminal by a bar that goes with this context."""
    if console is None or console.quiet or len(passes) == 1:
        yield list(passes)
        return
    if not console.is_terminal:
        console.print(f"{what}: {len(passes):,} passes forward and backward", highlight=False)
        yield list(passes)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=len(passes))

        def run(one: Callable[[], object]) -> None:
            one()
            bar.advance(task)

        yield [partial(run, one) for one in passes]


def forward_passes(session: Session, batches: Iterable[Rows]) -> list[Callable[[], object]]:
    """A forward pass for each micro-batch of each of `batches`, not run yet."""
    return [partial(_look, session, [part]) for rows in batches for part in rows]


def _look(session: Session, rows: Rows) -> None:
    for part in shares_of(session, rows, alike=True):
        with part.masks(), nullcontext() if part.counts else uncounted():
            _loss(session, part)


def _loss(session: Session, part: Share) -> Loss:
    """The loss of what a rank has of one micro-batch, by a forward pass."""
    batch = place(part.batch(session), session.device)
    with autocast(session.device, session.bf16):
        return session.task.loss(session.model, batch)
