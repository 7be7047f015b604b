"""What sparse fine-tuning rests on, measured on one's own model and data.

How few entries hold how much of the gradient, how much of it a mask keeps while training goes on,
how alike masks are, and how much of Adam's history a changing mask throws away: the claims of SIFT
(Song et al. 2024, arXiv 2312.11875, sections 3 and 4). And what a mask's first step is made of: how
much of it a bias could do, and how far it moves the outputs of its layers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.analysis.findings import findings_of
from sift_cli.analysis.masks import BiasTerm, TrackedGradient, TrackedMask
from sift_cli.analysis.movement import Change, evaluating, relative_moves
from sift_cli.errors import SiftError
from sift_cli.models.prepare import frozen, prepare_model
from sift_cli.recipe import AXES, OPTIONS, Recipe, parse_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.selection.budget import largest
from sift_cli.selection.evidence import observed_gradients, observed_tokens
from sift_cli.selection.policies import POLICIES
from sift_cli.selection.structures import Units
from sift_cli.selection.targets import LinearLayer, linear_layers
from sift_cli.sparse import SparseAdamW
from sift_cli.training.batches import steps_of
from sift_cli.training.choosing import Chooser
from sift_cli.training.parts import rule_of
from sift_cli.training.randomness import kept_randomness
from sift_cli.training.rates import at_usual_rate
from sift_cli.training.schedule import schedule_of
from sift_cli.training.step import Rows, add_gradient, forward_passes, take_step
from sift_cli.training.watch import Watch

PROBE_FILE = "probe.json"
CLASSES = 8  # at most so many classes are compared


def probe(
    recipe: Recipe,
    out: Path,
    *,
    policies: Sequence[str] = (),
    steps: int = 30,
    device: str | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains `steps` steps as the recipe says and looks at every whole gradient on the way.

    Writes `probe.json` and plots to `out`, nothing else; returns what probe.json holds. Masks are
    those of the recipe's own policy, of `sift`, `current-batch`, `random` and of `policies`, each
    as large as the recipe's. Shares are of the gradient's 2-norm over the targeted weights; their
    squares are shares of its energy. What a bias could do of it, `masks` says; how far
    outputs move, `movement`, for Adam's first step at train.learning_rate. Raises SiftError for
    what the recipe gets wrong.
    """
    console = console or Console(stderr=True, quiet=True)
    recipe = at_usual_rate(recipe)
    session = open_session(recipe.without_code(), device=device)
    prepare_model(session.model, session.device, recipe.train.gradient_checkpointing)
    walk = _Walk.begin(recipe, session, steps, _choosers(recipe, session, policies, allow_code))
    classes = _class_masks(session, walk.masks["sift"], recipe.train.batch_size)
    numbered = zip(range(1, walk.steps + 1), walk.chooser.batches, strict=False)
    for step, rows in track(numbered, "probing", walk.steps, console=console, transient=True):
        walk.step(step, rows)
    found = findings_of(recipe, walk.steps, walk.seen, walk.masks, classes)
    out.mkdir(parents=True, exist_ok=True)
    (out / PROBE_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    from sift_cli.analysis.plots import plot_probe

    plot_probe(found, out)
    return found


def _choosers(
    recipe: Recipe, session: Session, policies: Sequence[str], allow_code: bool
) -> dict[str, Chooser]:
    """The selection of each policy that is looked at, by its name; the recipe's own among them."""
    assert session.train is not None
    batches = steps_of(recipe.train, session.train.lengths, session.task.packs)
    asked = dict.fromkeys(["sift", "current-batch", "random", *policies])
    recipes = {name: _with_policy(recipe, name) for name in asked}
    recipes.setdefault(recipe.selection.policy, recipe)
    return {
        name: Chooser.of(
            one.selection, one.train, session, batches, rule=rule_of(one.selection, allow_code)
        )
        for name, one in recipes.items()
    }


@dataclass(frozen=True)
class _Walk:
    """The training that is looked at, as `chooser` has it, and all that looks at it."""

    session: Session
    steps: int
    chooser: Chooser
    optimizer: SparseAdamW
    schedule: LRScheduler
    watch: Watch
    masks: dict[str, TrackedMask]
    seen: TrackedGradient
    layers: dict[str, LinearLayer]  # those of which entries are chosen, by weight

    @classmethod
    def begin(
        cls, recipe: Recipe, session: Session, steps: int, choosers: Mapping[str, Chooser]
    ) -> "_Walk":
        """Before the first step: what trains and every mask are chosen."""
        chooser = choosers[recipe.selection.policy]
        optimizer = chooser.begin()
        optimizer.parameters.detach()
        masks = {name: TrackedMask(name, one) for name, one in choosers.items()}
        for mask in masks.values():
            mask.renew(1)
        named = dict(session.model.named_parameters())
        linear = linear_layers(session.model)
        return cls(
            session=session,
            steps=min(steps, chooser.batches.steps),
            chooser=chooser,
            optimizer=optimizer,
            schedule=schedule_of(recipe.train, optimizer.adamw, chooser.batches.steps),
            watch=Watch(session, skips=recipe.train.skip_nonfinite),
            masks=masks,
            seen=TrackedGradient({name: named[name].numel() for name in chooser.sparse}),
            layers={
                name: linear[name]
                for name in chooser.sparse
                if name in linear and named[name].dim() == 2
            },
        )

    def step(self, step: int, rows: Rows) -> None:
        """Takes the step of that number; every mask sees its whole gradient."""
        if self.chooser.due(step):
            self.chooser.change(step, self.optimizer)
        self.optimizer.parameters.detach()
        for mask in self.masks.values() if step > 1 else ():
            mask.renew(step)
        take_step(
            self.session,
            self.optimizer,
            step,
            rows,
            self.watch.broken,
            max_grad_norm=self.chooser.train.max_grad_norm,
            schedule=self.schedule,
            gradient=partial(self._gradient, step),
        )
        self.watch.read()

    def _gradient(self, step: int, session: Session, rows: Rows) -> Tensor:
        """Gathers what trains from the whole gradients, which the masks see on the way."""
        parameters = self.optimizer.parameters
        targets = {segment.name: segment for segment in parameters}

        def take(name: str, gradient: Tensor) -> None:
            if name in targets:
                own = targets[name]
                parameters.grad[own.span] += own.support.gather(gradient)
            if name in self.seen.sizes:
                term = None
                if name in tokens:  # of this backward pass alone: micro-batches come one by one
                    units = Units.of(name, gradient, "entry", 1, self.layers[name].transposed)
                    term = BiasTerm(units, tokens.pop(name))
                curve = step in (1, self.steps)
                self.seen.see(step, name, gradient, self.masks.values(), curve=curve, term=term)

        named = dict(session.model.named_parameters())
        weights = {name: named[name] for name in {*self.seen.sizes, *targets}}
        modules = {name: layer.module for name, layer in self.layers.items()}
        with (
            frozen(session.model),
            observed_gradients(weights, take),
            observed_tokens(modules) as tokens,
        ):
            loss = add_gradient(session, rows)
        self.seen.bias.settle()
        for mask in self.masks.values():
            mask.settle(step, self.seen.energy[step])
        if step == 1:
            self._move(rows)
        return loss

    def _move(self, rows: Rows) -> None:
        """Notes how far a first step of Adam on each mask would move the outputs for `rows`."""
        passes = forward_passes(self.session, [rows])

        def forward() -> None:
            for one in passes:
                one()

        changes = {
            mask.policy: {
                name: Change.against(mask.supports[name], gradient)
                for name, gradient in mask.first.items()
            }
            for mask in self.masks.values()
        }
        coordinates = self.optimizer.parameters.coordinates
        scales = {name: scale.values for name, scale in coordinates.scales.items()}
        run = evaluating(self.session.model, forward)
        moves = relative_moves(self.layers, changes, run, scales)
        for mask in self.masks.values():
            mask.moves = moves[mask.policy]
            mask.first.clear()


def _with_policy(recipe: Recipe, policy: str) -> Recipe:
    if policy not in POLICIES:
        raise SiftError(f"--policies: unknown: {policy!r}; known: {', '.join(POLICIES)}")
    if policy == recipe.selection.policy:
        return recipe
    values = recipe.model_dump(mode="json")
    for key in (*AXES, *OPTIONS, "batches"):  # each policy as its row has it
        del values["selection"][key]
    values["selection"]["policy"] = policy
    return parse_recipe(yaml.safe_dump(values), f"--policies {policy}")


def _class_masks(
    session: Session, mask: TrackedMask, batch_size: int
) -> dict[str, dict[str, Tensor]]:
    """The mask of one batch of each class alone, by label and weight; none where there are none.

    Each is as large as `mask`.
    """
    chooser, supports = mask.chooser, mask.supports
    assert session.train is not None
    rows = session.task.groups(session.train)
    found = {}
    named = dict(session.model.named_parameters())
    counts = {name: len(supports[name]) for name in chooser.sparse if name in supports}
    weights = {name: named[name] for name in counts}
    for label in list(rows)[:CLASSES]:
        masks: dict[str, Tensor] = {}

        def take(name: str, gradient: Tensor, masks: dict[str, Tensor] = masks) -> None:
            masks[name] = largest(gradient.reshape(-1).abs(), counts[name])

        with (
            frozen(session.model),
            kept_randomness(session.device),
            observed_gradients(weights, take),
        ):
            add_gradient(session, [rows[label][:batch_size]])
        found[label] = masks
    return found
