"""Steps before entries are chosen: of the head, or of everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from rich.console import Console
from rich.progress import track
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.recipe import SelectionSection, TrainSection
from sift_cli.runs.session import Session
from sift_cli.sparse import SparseAdamW, SparseParameters, Touched, attach
from sift_cli.sparse.parameters import whole_supports
from sift_cli.training.batches import Steps
from sift_cli.training.step import take_step
from sift_cli.training.watch import Advice, Watch

ALL_RATE = 1e-4  # of a warm-up that trains every entry, where the recipe gives none


@dataclass(frozen=True)
class WarmUp:
    """So many steps at one learning rate, of the dense modules alone or of `everything`."""

    steps: int
    everything: bool
    learning_rate: float
    max_grad_norm: float | None
    offload: bool

    @classmethod
    def of(cls, selection: SelectionSection, train: TrainSection) -> "WarmUp":
        """What the sections say of it."""
        everything = selection.warmup_trains == "all"
        usual = ALL_RATE if everything else train.rate
        return cls(
            steps=selection.warmup_steps or 0,
            everything=everything,
            learning_rate=selection.warmup_learning_rate or usual,
            max_grad_norm=train.max_grad_norm,
            offload=train.offload_optimizer,
        )


def warmed(everything: bool, sparse: Sequence[str], dense: Sequence[str]) -> list[str]:
    """The weights that a warm-up trains: `dense`, and `sparse` where that is everything.

    Raises SiftError where there is none.
    """
    names = [*(sparse if everything else ()), *dense]
    if not names:
        raise SiftError(
            "selection.warmup_trains: no module trains whole, so there is no head to warm up; set "
            "it to all, or selection.schedule to first-batch"
        )
    return names


def warm_up(
    settings: WarmUp,
    session: Session,
    batches: Steps,
    sparse: Sequence[str],
    dense: Sequence[str],
    console: Console,
    touched: Touched | None = None,
) -> tuple[Touched | None, dict[str, Tensor] | None]:
    """Trains the weights `dense` alone, or `sparse` as well, on the first batches.

    The head stays as it was trained, and its base values are returned. Where everything trained,
    all of it goes back, and what is returned is how far each weight of `sparse` had moved.
    `touched` has the base values of a head that has left them already.
    """
    names = warmed(settings.everything, sparse, dense)
    supports = whole_supports(session.model, names)
    base = None if settings.everything else touched  # everything goes back to where it is now
    parameters = attach(
        session.model, supports, touched=base, offload=settings.offload, shards=session.shards
    )
    _train(settings, session, batches, parameters, console)
    parameters.detach()
    if not settings.everything:
        return parameters.touched, None
    change = {
        segment.name: parameters.change(segment).view(segment.weight.shape)
        for segment in parameters
        if segment.name in set(sparse)
    }
    parameters.revert()
    return touched, change


def _train(
    settings: WarmUp,
    session: Session,
    batches: Steps,
    parameters: SparseParameters,
    console: Console,
) -> None:
    optimizer = SparseAdamW(parameters, settings.learning_rate)
    watch = Watch(
        session, parameters, advice=Advice("warm-up step", "selection.warmup_learning_rate")
    )
    trains = "all" if settings.everything else "head"
    console.print(f"warm-up: {settings.steps} steps of {trains}", highlight=False)
    walk = enumerate(islice(batches.endless(), settings.steps), start=1)
    hidden = not console.is_terminal
    for step, rows in track(walk, "warm-up", settings.steps, console=console, disable=hidden):
        take_step(
            session, optimizer, step, rows, watch.broken, max_grad_norm=settings.max_grad_norm
        )
        watch.read()
