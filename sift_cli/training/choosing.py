"""Which entries train at which step: a recipe's selection, carried out along a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from torch import Tensor

from sift_cli.delta.build import build_delta
from sift_cli.delta.file import save_delta
from sift_cli.delta.header import Header
from sift_cli.models.prepare import frozen
from sift_cli.recipe import Recipe, SelectionSection, TrainSection
from sift_cli.runs.cards import delta_card
from sift_cli.runs.checkpoint import Checkpoint
from sift_cli.runs.folder import CARD_FILE, DELTA_FILE
from sift_cli.runs.record import write_weights
from sift_cli.runs.session import Session
from sift_cli.runs.summary import EntryCounts, Summary, Written
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import Retained, Rule, check, select
from sift_cli.selection.targets import choose_weights
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, Touched, attach
from sift_cli.sparse.parameters import whole_supports
from sift_cli.system.files import write_text
from sift_cli.training.batches import Batches
from sift_cli.training.method import Build
from sift_cli.training.packing import Packed, entries_in, supports_in
from sift_cli.training.randomness import kept_randomness
from sift_cli.training.step import backward_passes
from sift_cli.training.warmup import WarmUp, warm_up


def rule_of(selection: SelectionSection, allow_code: bool = False) -> Rule:
    """What the section says of score, scope, structure and size."""
    return Rule(
        score=find_score(selection.score or "gradient", allow_code),
        scope=selection.scope or "tensor",
        structure=selection.structure or "entry",
        density=selection.density,
        budget=selection.budget,
        block=selection.block_size or 1,
        rank=selection.rank or 32,
    )


def selecting(recipe: Recipe, allow_code: bool = False, console: Console | None = None) -> Build:
    """The method that trains what a recipe selects; refuses a score that cannot be, at once."""
    rule = rule_of(recipe.selection, allow_code)
    return partial(Chooser.of, recipe.selection, recipe.train, rule=rule, console=console)


@dataclass(frozen=True)
class Chooser:
    """A selection over one run: the `Method` that is sift's own.

    `sparse` names the weights of which entries are chosen, `dense` those that train whole. Entries
    are chosen anew `every` so many steps (None: never), all but the share `drop` of which stay.
    `norms` are those of the first batch's gradient by weight, once `begin` has looked at that batch
    alone.
    """

    selection: SelectionSection
    train: TrainSection
    session: Session
    batches: Batches
    rule: Rule
    sparse: Sequence[str]
    dense: Sequence[str]
    every: int | None
    drop: float
    console: Console
    norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        selection: SelectionSection,
        train: TrainSection,
        session: Session,
        batches: Batches,
        *,
        rule: Rule,
        console: Console | None = None,
    ) -> "Chooser":
        """The selection for this session.

        Raises SiftError where its patterns, densities, budgets or blocks do not fit the model.
        """
        sparse, dense = choose_weights(
            session.model, selection.target, selection.exclude, selection.dense, session.new
        )
        check(session.model, sparse, rule)
        return cls(
            selection=selection,
            train=train,
            session=session,
            batches=batches,
            rule=rule,
            sparse=sparse,
            dense=dense,
            every=1 if selection.schedule == "every-batch" else selection.every,
            drop=selection.drop or 1.0,
            console=console or Console(stderr=True, quiet=True),
        )

    @property
    def name(self) -> str:
        """The policy."""
        return self.selection.policy

    def begin(self) -> SparseAdamW:
        """Warms up where the schedule says so, chooses, and attaches what was chosen."""
        touched, change = None, None
        if self.selection.schedule == "after-warmup":
            touched, change = warm_up(
                WarmUp.of(self.selection, self.train),
                self.session,
                self.batches,
                self.sparse,
                self.dense,
                self.console,
            )
        norms = self.norms if self.selection.batches == 1 else None
        supports = self.supports(1, change=change, norms=norms)
        offload = self.train.offload_optimizer
        return self._optimizer(
            attach(self.session.model, supports, touched=touched, offload=offload)
        )

    def restore(self, saved: Checkpoint) -> SparseAdamW:
        """What trained when the checkpoint was made, on a model that is the base."""
        model = self.session.model
        named, before = dict(model.named_parameters()), entries_in(saved, "touched")
        touched = Touched()
        for name, (support, _) in before.items():
            touched.add(name, support, named[name])
        supports, offload = supports_in(saved, "support"), self.train.offload_optimizer
        parameters = attach(model, supports, touched=touched, offload=offload)
        parameters.load_state(before)
        parameters.flat.data.copy_(saved.tensors["masters"])
        parameters.write_back()
        return self._optimizer(parameters)

    def due(self, step: int) -> bool:
        """Whether entries are chosen anew before this step."""
        return step > 1 and self.every is not None and (step - 1) % self.every == 0

    def change(self, step: int, optimizer: SparseAdamW) -> None:
        """Chooses anew from the batches that begin with this one, and trains that from now on."""
        parameters = optimizer.parameters
        held = {
            segment.name: Retained(segment.support, parameters.change(segment), self.drop)
            for segment in parameters
            if self.drop < 1
        }
        parameters.detach()
        supports = self.supports(step, held=held)
        optimizer.move(supports, revert=bool(self.selection.revert))

    def supports(
        self,
        step: int,
        change: dict[str, Tensor] | None = None,
        held: dict[str, Retained] | None = None,
        norms: dict[str, Tensor] | None = None,
    ) -> dict[str, Support]:
        """The entries to train from `step` on, and the modules that train whole.

        The calibration batches are those of the next steps, seen with the same dropout masks:
        selection leaves random states as it found them, and each of them trains as well.
        """
        model = self.session.model
        batches = islice(self.batches.since(step), self.selection.batches)
        with frozen(model), kept_randomness(self.session.device):
            chosen = select(
                model,
                self.sparse,
                self.rule,
                seed=self.train.seed,
                backward=backward_passes(self.session, batches),
                change=change,
                retained=held,
                norms=norms,
            )
        return chosen | whole_supports(model, self.dense)

    def pack(self, optimizer: SparseAdamW) -> Packed:
        """Masters and supports; of what has left the support, the values in the weights."""
        parameters = optimizer.parameters
        packed = Packed({"masters": parameters.flat.detach()}, {"support": {}, "touched": {}})
        trained = {segment.name: segment.support for segment in parameters}
        for name, support in trained.items():
            packed.put("support", name, support)
        for name, (support, values) in parameters.state().items():
            if name not in trained or len(trained[name]) < len(support):  # some have left
                packed.put("touched", name, support, values)
        return packed

    def write(
        self,
        out: Path,
        optimizer: SparseAdamW,
        marks: Mapping[str, str],
        header: Callable[[], Header],
    ) -> Written:
        """Writes the delta, and weights.jsonl for the report."""
        parameters, session = optimizer.parameters, self.session
        known = {name: mark for name, mark in marks.items() if name not in session.new}
        delta = build_delta(parameters, session.new, known, header())
        digest = save_delta(out / DELTA_FILE, delta)
        write_weights(out, session.model, parameters, self.dense)
        counts = {segment.name: len(segment.support) for segment in parameters}
        dense = sum(counts[name] for name in self.dense)
        entries = EntryCounts(
            trained=sum(counts.values()) - dense,
            dense=dense,
            changed=sum(w.count for name, w in delta.weights.items() if name not in self.dense),
            total=sum(weight.numel() for weight in session.model.parameters()),
        )
        return Written((out / DELTA_FILE).stat().st_size, digest, entries)

    def describe(self, out: Path, recipe: Recipe, summary: Summary) -> None:
        """Writes the card."""
        write_text(out / CARD_FILE, delta_card(recipe, summary))

    def _optimizer(self, parameters: SparseParameters) -> SparseAdamW:
        return SparseAdamW(
            parameters,
            self.train.rate,
            weight_decay=self.train.weight_decay,
            history=self.selection.history or "keep",
        )
