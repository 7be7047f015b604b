"""Which entries train at which step: a recipe's selection, carried out along a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
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
from sift_cli.selection.parts import Retained
from sift_cli.selection.scale import input_scales
from sift_cli.selection.select import Rule, alone, select
from sift_cli.selection.targets import left_out, linear_layers, tell_left_out
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, Touched, attach
from sift_cli.sparse.coordinates import Coordinates, InputScale
from sift_cli.sparse.local import local_of
from sift_cli.sparse.parameters import Changed, whole_supports
from sift_cli.system.files import write_text
from sift_cli.system.heap import trim_heap
from sift_cli.training.batches import Steps
from sift_cli.training.head import start_head, start_of
from sift_cli.training.method import Build
from sift_cli.training.packing import Packed, entries_in, supports_in
from sift_cli.training.parts import Parts, choices_of, descent_rate, rule_in
from sift_cli.training.randomness import kept_randomness
from sift_cli.training.step import backward_passes, forward_passes, watched
from sift_cli.training.warmup import WarmUp, warm_up

Seen = TypeVar("Seen")
SCALE_BATCHES = 8  # enough for root mean squares over their tokens
SCALE = "step_scale/"  # before a weight's name, in a checkpoint


def selecting(recipe: Recipe, allow_code: bool = False, console: Console | None = None) -> Build:
    """The method that trains what a recipe selects; refuses a score that cannot be, at once."""
    rule = rule_in(recipe, allow_code)
    return partial(Chooser.of, recipe.selection, recipe.train, rule=rule, console=console)


@dataclass(frozen=True)
class Chooser:
    """A selection over one run: the `Method` that is sift's own.

    `parts` says what trains. Entries are chosen anew `every` so many steps (None: never), all but
    the share `drop` of which stay. `norms` are those of the first batch's gradient by weight, once
    `begin` has looked at that batch alone.
    """

    selection: SelectionSection
    train: TrainSection
    session: Session
    batches: Steps
    parts: Parts
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
        batches: Steps,
        *,
        rule: Rule,
        console: Console | None = None,
    ) -> "Chooser":
        """The selection for this session.

        Raises SiftError where its patterns, densities, budgets, blocks or head do not fit.
        """
        start_of(train, session.task, session.model)  # raises where it cannot be
        console = console or Console(stderr=True, quiet=True)
        parts = Parts.of(selection, session.model, session.new, rule)
        if sizes := left_out(session.model, selection.target, parts.all):
            console.print(f"target: {tell_left_out(sizes)}", highlight=False)
        return cls(
            selection=selection,
            train=train,
            session=session,
            batches=batches,
            parts=parts,
            every=selection.period,
            drop=selection.drop or 1.0,
            console=console,
        )

    @property
    def name(self) -> str:
        """The policy."""
        return self.selection.policy

    @property
    def rule(self) -> Rule:
        """How entries of `sparse` are chosen."""
        return self.parts.rule

    @property
    def sparse(self) -> Sequence[str]:
        """The weights of which entries are chosen."""
        return self.parts.sparse

    @property
    def dense(self) -> Sequence[str]:
        """The weights that train whole beside the budget."""
        return self.parts.dense

    @property
    def vectors(self) -> Sequence[str]:
        """The weights that train whole within the budget."""
        return self.parts.vectors

    @property
    def looking(self) -> Session:
        """What looks at calibration batches: on a CPU at all of them, in full.

        So entries are those that one process would choose, which sums of parts would not be where
        two scores are next to equal. Who looks says `_looked`.
        """
        session = self.session
        if not session.ranks.exact:
            return session
        # Of weights in rows gradients come summed over the ranks: what the main one sees counts.
        return session.alone() if session.sharded is None else session.keeping_step()

    @property
    def descent_rate(self) -> float:
        """That of its sign descent."""
        return descent_rate(self.selection, self.train.rate, self.session.model, self.parts)

    def begin(self) -> SparseAdamW:
        """Starts the head, warms up where the schedule says so, chooses, and attaches that."""
        touched, change = self._head(), None
        if self.selection.schedule == "after-warmup":
            touched, change = warm_up(
                WarmUp.of(self.selection, self.train),
                self.looking if self.session.shards is None else self.session,
                self.batches,
                [*self.sparse, *self.vectors],
                self.dense,
                self.console,
                touched,
            )
        norms = self.norms if self.selection.batches == 1 else None
        supports = self.supports(1, change=change, norms=norms)
        looks = next(iter(choices_of(self.selection, self.rule, self.batches.steps)), 0)
        if looks > 1:
            self.console.print(f"entries: chosen by {looks} batches", highlight=False)
        return self._optimizer(self._attach(supports, touched, self.scales()))

    def restore(self, saved: Checkpoint) -> SparseAdamW:
        """What trained when the checkpoint was made, on a model that is the base."""
        model, shards = self.session.model, self.session.shards
        named, before = dict(model.named_parameters()), entries_in(saved, "touched")
        touched = Touched()
        for name, (support, _) in before.items():
            own = support if shards is None else shards.local(support)
            touched.add(name, own, local_of(named[name]))
        supports, scales = supports_in(saved, "support"), self._scales_in(saved)
        parameters = self._attach(supports, touched, scales)
        parameters.load_state(parameters.own_entries(before))
        parameters.flat.data.copy_(parameters.own_of(saved.tensors["masters"]))
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
        model, shards = self.session.model, self.session.shards
        batches = islice(self.batches.since(step), self.selection.batches)
        passes = backward_passes(self.looking, batches)
        console = self.console if step == 1 else None  # later the training's own bar is there

        def choose() -> dict[str, Support]:
            with (
                watched(passes, "choosing entries", console) as backward,
                frozen(model),
                kept_randomness(self.session.device),
            ):
                return select(
                    model,
                    self.sparse,
                    self.rule,
                    seed=self.train.seed,
                    backward=backward,
                    change=change,
                    retained=held,
                    norms=norms,
                    descent_rate=self.descent_rate if self.rule.score.descends else 0.0,
                    whole=self.looking.ranks.sum_ if shards is None else alone,
                    shards=shards,
                )

        chosen = self._looked(choose)
        trim_heap()  # of the dense gradients, more than steps need
        return chosen | whole_supports(model, [*self.vectors, *self.dense])

    def scales(self) -> dict[str, InputScale]:
        """The step scale of each input, as the first calibration batches have them, 8 at most.

        They stay as they are, also where entries are chosen anew: an entry that leaves and comes
        back finds its own.
        """
        if self.train.step_scale == "none":
            return {}
        batches = islice(self.batches.since(1), min(self.selection.batches, SCALE_BATCHES))
        forward, whole = forward_passes(self.looking, batches), self.looking.ranks.sum_

        def look() -> dict[str, InputScale]:
            with kept_randomness(self.session.device):
                return input_scales(self.session.model, self.sparse, forward, whole)

        return self._looked(look)

    def pack(self, optimizer: SparseAdamW, own: bool = False) -> Packed:
        """Masters, supports and scales; of what has left the support, the values in the weights.

        Where weights lie on several ranks, the main one has the values of all, or each its `own`.
        """
        parameters = optimizer.parameters
        masters = parameters.flat.detach()
        masters = masters if own else parameters.all_of(masters)
        packed = Packed({"masters": masters}, {"support": {}, "touched": {}})
        for name, scale in parameters.coordinates.scales.items():
            packed.tensors[f"{SCALE}{name}"] = scale.values
        for name, support in parameters.supports.items():
            packed.put("support", name, support)
        left = parameters.left()
        mine = ((name, support, values) for name, (support, values) in left.items())
        for name, support, values in mine if own else parameters.all_entries(left):
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
        # Both take every rank where each holds a part of the weights.
        changes, said = list(optimizer.parameters.changes()), header()
        write = partial(self._write, out, optimizer.parameters, changes, marks, said)
        return self.session.ranks.on_main(write)

    def _write(
        self,
        out: Path,
        parameters: SparseParameters,
        changes: Sequence[Changed],
        marks: Mapping[str, str],
        header: Header,
    ) -> Written:
        session = self.session
        known = {name: mark for name, mark in marks.items() if name not in session.new}
        base_of = session.sharded.base if session.sharded else None
        delta = build_delta(parameters, session.new, known, header, changes, base_of)
        digest = save_delta(out / DELTA_FILE, delta)
        write_weights(out, session.model, parameters, self.dense, changes)
        counts = {name: len(support) for name, support in parameters.supports.items()}
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

    def _looked(self, look: Callable[[], Seen]) -> Seen:
        """What a look at batches gives: on a CPU the main rank's alone, which has all threads."""
        ranks = self.session.ranks
        if ranks.exact and self.session.shards is None:
            return ranks.as_one(look)
        return ranks.agree(look())

    def _head(self) -> Touched | None:
        """Starts a new head, alike on every rank; the random numbers that it held before."""
        session = self.session
        if session.shards is not None:  # each has drawn the same, and has its rows of it
            return start_head(self.train, session, self.console)
        named = dict(session.model.named_parameters())

        def start() -> tuple[Touched | None, dict[str, Tensor]]:
            touched = start_head(self.train, session.alone(), self.console)
            return touched, {name: named[name].detach().cpu() for name in session.new}

        touched, head = session.ranks.as_one(start)
        if not session.ranks.main:
            with torch.no_grad():
                for name, values in head.items():
                    named[name].copy_(values)
        return touched

    def _attach(
        self,
        supports: Mapping[str, Support],
        touched: Touched | None,
        scales: dict[str, InputScale],
    ) -> SparseParameters:
        """Trains the supports, in the coordinates that step scale and decay ask for."""
        new = set(self.session.new)
        based = self.train.decay_toward == "base" and self.train.weight_decay > 0
        centred = [
            name for name in (*self.sparse, *self.vectors, *self.dense) if based and name not in new
        ]
        return attach(
            self.session.model,
            supports,
            touched=touched,
            offload=self.train.offload_optimizer,
            coordinates=Coordinates(scales, centred),
            shards=self.session.shards,
        )

    def _scales_in(self, saved: Checkpoint) -> dict[str, InputScale]:
        layers = linear_layers(self.session.model)
        names = [key.removeprefix(SCALE) for key in saved.tensors if key.startswith(SCALE)]
        return {
            name: InputScale(saved.tensors[f"{SCALE}{name}"], layers[name].transposed)
            for name in names
        }

    def _optimizer(self, parameters: SparseParameters) -> SparseAdamW:
        return SparseAdamW(
            parameters,
            self.train.rate,
            weight_decay=self.train.weight_decay,
            history=self.selection.history or "keep",
        )
