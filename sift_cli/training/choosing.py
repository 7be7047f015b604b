"""Which entries train at which step: the recipe's selection, carried out along a run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import Recipe, SelectionSection
from sift_cli.runs.session import Session
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import Held, Rule, check, select
from sift_cli.selection.targets import choose_weights
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, Touched, attach
from sift_cli.sparse.parameters import whole
from sift_cli.training.batches import Batches
from sift_cli.training.gradient import add_gradient
from sift_cli.training.randomness import kept_randomness

ALL_RATE = 1e-4  # of a warm-up that trains every entry, where the recipe gives none


def rule_of(selection: SelectionSection, allow_code: bool = False) -> Rule:
    """What the recipe says of score, scope, structure and size."""
    return Rule(
        score=find_score(selection.score or "gradient", allow_code),
        scope=selection.scope or "tensor",
        structure=selection.structure or "entry",
        density=selection.density,
        budget=selection.budget,
        block=selection.block_size or 1,
        rank=selection.rank or 32,
    )


def batches_of(recipe: Recipe, lengths: Sequence[int]) -> Batches:
    """The batches of a run of the recipe over training rows of so many tokens each."""
    settings = recipe.train
    return Batches.plan(
        lengths,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        max_tokens=settings.max_tokens,
    )


@dataclass(frozen=True)
class Chooser:
    """The recipe's selection over one run.

    `sparse` names the weights of which entries are chosen, `dense` those that train whole. `norms`
    are those of the first batch's gradient by weight, once `begin` has looked at that batch alone.
    """

    recipe: Recipe
    session: Session
    batches: Batches
    rule: Rule
    sparse: Sequence[str]
    dense: Sequence[str]
    console: Console
    norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, recipe: Recipe, session: Session, rule: Rule, console: Console | None = None
    ) -> "Chooser":
        """The recipe's selection for this session.

        Raises SiftError where its patterns, densities, budgets or blocks do not fit the model.
        """
        chosen = recipe.selection
        sparse, dense = choose_weights(
            session.model, chosen.target, chosen.exclude, chosen.dense, session.new
        )
        check(session.model, sparse, rule)
        assert session.train is not None
        batches = batches_of(recipe, session.train.lengths)
        console = console or Console(stderr=True, quiet=True)
        return cls(recipe, session, batches, rule, sparse, dense, console)

    def begin(self) -> SparseParameters:
        """Warms up where the schedule says so, chooses, and attaches what was chosen."""
        touched, change = None, None
        if self.recipe.selection.schedule == "after-warmup":
            touched, change = self._warm_up()
        norms = self.norms if self.recipe.selection.batches == 1 else None
        return self._attach(self.supports(1, change=change, norms=norms), touched)

    def due(self, step: int) -> bool:
        """Whether entries are chosen anew before this step."""
        schedule = self.recipe.selection.schedule
        every = 1 if schedule == "every-batch" else self.recipe.selection.every
        return step > 1 and every is not None and (step - 1) % every == 0

    def change(self, step: int, optimizer: SparseAdamW) -> None:
        """Chooses anew from the batches that begin with this one, and trains that from now on."""
        drop = self.recipe.selection.drop or 1.0
        parameters = optimizer.parameters
        held = {
            segment.name: Held(segment.support, parameters.change(segment), drop)
            for segment in parameters
            if drop < 1
        }
        parameters.detach()
        supports = self.supports(step, held=held)
        optimizer.move(supports, revert=bool(self.recipe.selection.revert))

    def supports(
        self,
        step: int,
        change: dict[str, Tensor] | None = None,
        held: dict[str, Held] | None = None,
        norms: dict[str, Tensor] | None = None,
    ) -> dict[str, Support]:
        """The entries to train from `step` on, and the modules that train whole.

        The calibration batches are those of the next steps, seen with the same dropout masks:
        selection leaves random states as it found them, and each of them trains as well.
        """
        model = self.session.model
        batches = islice(self.batches.since(step), self.recipe.selection.batches)
        with frozen(model), kept_randomness(self.session.device):
            chosen = select(
                model,
                self.sparse,
                self.rule,
                seed=self.recipe.train.seed,
                backward=backward_passes(self.session, batches),
                change=change,
                held=held,
                norms=norms,
            )
        return chosen | whole(model, self.dense)

    def _attach(
        self, supports: dict[str, Support], touched: Touched | None = None
    ) -> SparseParameters:
        offload = self.recipe.train.offload_optimizer
        return attach(self.session.model, supports, touched=touched, offload=offload)

    def _warm_up(self) -> tuple[Touched | None, dict[str, Tensor] | None]:
        """Trains the head alone, or everything, on the first batches.

        The head stays as it was trained, and its base values are returned. Where everything
        trained, all of it goes back, and what is returned is how far each weight had moved.
        """
        selection, settings, model = self.recipe.selection, self.recipe.train, self.session.model
        everything = selection.warmup_trains == "all"
        names = [*(self.sparse if everything else ()), *self.dense]
        if not names:
            raise SiftError("selection.warmup_trains: no module trains whole, so there is no head")
        parameters = self._attach(whole(model, names))
        usual = ALL_RATE if everything else settings.learning_rate
        optimizer = SparseAdamW(parameters, selection.warmup_learning_rate or usual)
        steps = selection.warmup_steps or 0
        self.console.print(f"warm-up: {steps} steps of {selection.warmup_trains}", highlight=False)
        walk = islice(self.batches.endless(), steps)
        hidden = not self.console.is_terminal
        for rows in track(walk, "warm-up", steps, console=self.console, disable=hidden):
            loss = float(add_gradient(self.session, rows))
            norm = float(optimizer.clip(settings.max_grad_norm))
            if not torch.isfinite(torch.tensor([loss, norm])).all():
                raise SiftError(
                    f"selection: the warm-up's loss is {loss}, its gradient's norm {norm}; try a "
                    "lower selection.warmup_learning_rate",
                    ExitCode.NOT_FINITE,
                )
            optimizer.step()
        parameters.detach()
        if not everything:
            return parameters.touched, None
        change = {
            segment.name: parameters.change(segment).view(segment.weight.shape)
            for segment in parameters
            if segment.name in set(self.sparse)
        }
        parameters.revert()
        return None, change


def backward_passes(
    session: Session, batches: Iterable[list[list[int]]]
) -> list[Callable[[], object]]:
    """A forward and backward pass for each micro-batch of each of `batches`, not run yet."""
    passes: list[Callable[[], object]] = []
    for rows in batches:
        total = sum(map(len, rows))
        passes += [partial(add_gradient, session, [part], total) for part in rows]
    return passes


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
