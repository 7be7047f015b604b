"""What sparse fine-tuning rests on, measured on one's own model and data.

How few entries hold how much of the gradient, how much of it a mask keeps while training goes on,
how alike masks are, and how much of Adam's history a changing mask throws away: the claims of SIFT
(Song et al. 2024, arXiv 2312.11875, sections 3 and 4).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.errors import SiftError
from sift_cli.models.prepare import frozen, prepare_model
from sift_cli.recipe import AXES, OPTIONS, Recipe, parse_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.selection.budget import largest, share
from sift_cli.selection.evidence import observed_gradients
from sift_cli.selection.policies import POLICIES
from sift_cli.sparse import SparseAdamW, Support
from sift_cli.sparse.segments import find
from sift_cli.training.batches import Batches
from sift_cli.training.choosing import Chooser, rule_of
from sift_cli.training.randomness import kept_randomness
from sift_cli.training.schedule import schedule_of
from sift_cli.training.step import Rows, add_gradient, take_step
from sift_cli.training.watch import Watch

CURVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BETA2 = 0.999  # decay of Adam's second moment
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
    squares are shares of its energy. Raises SiftError for what the recipe gets wrong.
    """
    console = console or Console(stderr=True, quiet=True)
    session = open_session(recipe, device=device)
    prepare_model(session.model, session.device, recipe.train.gradient_checkpointing)
    walk = _Walk.begin(recipe, session, steps, _choosers(recipe, session, policies, allow_code))
    classes = _class_masks(session, walk.masks["sift"], recipe.train.batch_size)
    numbered = zip(range(1, walk.steps + 1), walk.chooser.batches, strict=False)
    for step, rows in track(numbered, "probing", walk.steps, console=console, transient=True):
        walk.step(step, rows)
    found = _report(recipe, walk.steps, walk.seen, walk.masks, classes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    from sift_cli.analysis.plots import plot_probe

    plot_probe(found, out)
    return found


def _choosers(
    recipe: Recipe, session: Session, policies: Sequence[str], allow_code: bool
) -> dict[str, Chooser]:
    """The selection of each policy that is looked at, by its name; the recipe's own among them."""
    assert session.train is not None
    batches = Batches.of(recipe.train, session.train.lengths)
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
    masks: "dict[str, _Mask]"
    seen: "_Track"

    @classmethod
    def begin(
        cls, recipe: Recipe, session: Session, steps: int, choosers: Mapping[str, Chooser]
    ) -> "_Walk":
        """Before the first step: what trains and every mask are chosen."""
        chooser = choosers[recipe.selection.policy]
        optimizer = chooser.begin()
        optimizer.parameters.detach()
        masks = {name: _Mask(name, one) for name, one in choosers.items()}
        for mask in masks.values():
            mask.renew(1)
        named = dict(session.model.named_parameters())
        return cls(
            session=session,
            steps=min(steps, chooser.batches.steps),
            chooser=chooser,
            optimizer=optimizer,
            schedule=schedule_of(recipe.train, optimizer.adamw, chooser.batches.steps),
            watch=Watch(session),
            masks=masks,
            seen=_Track({name: named[name].numel() for name in chooser.sparse}),
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
                curve = step in (1, self.steps)
                self.seen.see(step, name, gradient, self.masks.values(), curve=curve)

        named = dict(session.model.named_parameters())
        weights = {name: named[name] for name in {*self.chooser.sparse, *self.chooser.dense}}
        with frozen(session.model), observed_gradients(weights, take):
            loss = add_gradient(session, rows)
        for mask in self.masks.values():
            mask.settle(step, self.seen.energy[step])
        return loss


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


@dataclass
class _Mask:
    """One policy's mask along the run, and what a second moment on it alone would be.

    The mask of `every-batch` is that of the gradient being looked at. Policies that drop by their
    own training's changes keep their first mask, as another policy trains here.
    """

    policy: str
    chooser: Chooser
    supports: dict[str, Support] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)  # share of each gradient's norm
    lost: list[float] = field(default_factory=list)  # share of second moment, per change
    replaced: list[float] = field(default_factory=list)  # share of entries, per change
    _energy: float = 0.0
    _lost: float = 0.0
    _held: float = 0.0
    _gone: int = 0
    _entries: int = 0
    _second: dict[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    @property
    def follows(self) -> bool:
        """Whether the mask is chosen from the gradient being looked at."""
        return self.chooser.selection.schedule == "every-batch"

    def renew(self, step: int) -> None:
        """Chooses where the policy's schedule says so."""
        selection = self.chooser.selection
        changes = selection.schedule == "every-n-steps" and selection.drop == 1.0
        if step > 1 and not (changes and self.chooser.due(step)):
            return
        if selection.score == "change":
            raise SiftError(
                f"--policies: {self.policy} chooses by a whole training run; it cannot be probed"
            )
        self.supports = self.chooser.supports(step)

    def see(self, name: str, gradient: Tensor) -> Tensor | None:
        """Adds one weight's flat gradient; returns the positions that the mask has there."""
        support = self.supports.get(name)
        positions: Tensor | None
        if support is None:
            count, positions = 0, torch.zeros(0, dtype=torch.int64)
        elif self.follows:
            count, positions = len(support), largest(gradient.abs(), len(support))
        else:
            count, positions = len(support), support.positions
        inside = (gradient if positions is None else gradient[positions.long()]).square()
        self._energy += float(inside.sum())
        self._age(name, positions, inside)
        self._entries += count
        return positions

    def settle(self, step: int, whole: float) -> None:
        """Ends a step whose gradient had the energy `whole`."""
        self.kept.append(sqrt(self._energy / whole) if whole else 0.0)
        if step > 1:
            self.lost.append(self._lost / self._held if self._held else 0.0)
            self.replaced.append(self._gone / max(self._entries, 1))
        self._energy = self._lost = self._held = 0.0
        self._gone = self._entries = 0

    def _age(self, name: str, positions: Tensor | None, squares: Tensor) -> None:
        """Carries the second moment of entries that stay, and counts what the others had."""
        second = torch.zeros_like(squares)
        if name in self._second:
            before, old = self._second[name]
            if before is positions or before is None or positions is None:
                second = old.clone()
            else:
                place = find(positions, before.to(positions.dtype))
                stays = place >= 0
                second[stays] = old[place[stays]]
                self._gone += len(old) - int(stays.sum())
            self._held += float(old.sum())
            self._lost += float(old.sum() - second.sum())
        self._second[name] = positions, BETA2 * second + (1 - BETA2) * squares


@dataclass
class _Track:
    """What is seen of each step's gradient beside the masks."""

    sizes: dict[str, int]
    curve: dict[int, dict[str, list[float]]] = field(default_factory=dict)  # step, name -> energy
    whole: dict[int, dict[str, float]] = field(default_factory=dict)
    energy: dict[int, float] = field(default_factory=dict)  # squared norm of each step's gradient
    alike: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _first: dict[str, Tensor] = field(default_factory=dict)

    def see(self, step: int, name: str, gradient: Tensor, masks: Any, curve: bool) -> None:
        """Adds one weight's gradient."""
        flat = gradient.reshape(-1).float()
        squares = flat.square()
        self.energy[step] = self.energy.get(step, 0.0) + float(squares.sum())
        for mask in masks:
            positions = mask.see(name, flat)
            if mask.policy == "current-batch" and positions is not None:
                self._compare(step, name, positions)
        if curve:
            counts = [share(density, len(squares)) for density in CURVE]
            top = squares.topk(counts[-1]).values.double().cumsum(0)
            at = self.curve.setdefault(step, {})
            at[name] = [float(top[count - 1]) for count in counts]
            self.whole.setdefault(step, {})[name] = float(squares.double().sum())

    def _compare(self, step: int, name: str, positions: Tensor) -> None:
        common = torch.isin(positions, self._first.setdefault(name, positions)).sum()
        self.alike.setdefault(step, []).append((len(positions), int(common)))


def _class_masks(session: Session, mask: "_Mask", batch_size: int) -> dict[str, dict[str, Tensor]]:
    """The mask of one batch of each class alone, by label and weight; none for regression.

    Each is as large as `mask`.
    """
    chooser, supports = mask.chooser, mask.supports
    assert session.train is not None
    labels = session.task.labels
    if labels is None:
        return {}
    rows: dict[int, list[int]] = {}
    column = session.train.rows["label"]
    for row, label in enumerate(column):
        if len(rows.setdefault(int(label), [])) < batch_size:
            rows[int(label)].append(row)
    found = {}
    named = dict(session.model.named_parameters())
    counts = {name: len(supports[name]) for name in chooser.sparse if name in supports}
    weights = {name: named[name] for name in counts}
    for label in sorted(rows)[:CLASSES]:
        masks: dict[str, Tensor] = {}

        def take(name: str, gradient: Tensor, masks: dict[str, Tensor] = masks) -> None:
            masks[name] = largest(gradient.reshape(-1).abs(), counts[name])

        with (
            frozen(session.model),
            kept_randomness(session.device),
            observed_gradients(weights, take),
        ):
            add_gradient(session, [rows[label]])
        found[labels[label]] = masks
    return found


def kind(name: str) -> str:
    """The name of a weight without layer numbers, in its last parts: `self.query`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-3:-1]) + (" bias" if parts[-1] == "bias" else "")


def _report(
    recipe: Recipe,
    steps: int,
    seen: _Track,
    masks: dict[str, _Mask],
    classes: dict[str, dict[str, Tensor]],
) -> dict[str, Any]:
    """Everything that was measured, as probe.json holds it."""
    curves = {
        f"step {step}": {
            "overall": _curve(seen, step, lambda name: True),
            **{
                one: _curve(seen, step, lambda name, one=one: kind(name) == one)  # type: ignore[misc]
                for one in sorted({kind(name) for name in seen.curve[step]})
            },
        }
        for step in seen.curve
    }
    later = {
        name: {
            "first": mask.kept[0],
            "mean": mean(mask.kept[1:] or mask.kept),
            "last": mask.kept[-1],
            "steps": mask.kept,
            "entries": sum(len(mask.supports[n]) for n in mask.supports if n in seen.sizes),
            "replaced_per_step": mean(mask.replaced or [0.0]),
            "second_moment_lost_per_step": mean(mask.lost or [0.0]),
        }
        for name, mask in masks.items()
    }
    found: dict[str, Any] = {
        "task": recipe.data.task,
        "model": recipe.model.path,
        "policy": recipe.selection.policy,
        "density": recipe.selection.density,
        "budget": recipe.selection.budget,
        "steps": steps,
        "seed": recipe.train.seed,
        "curve": {"densities": list(CURVE), "norm_share": curves},
        "kept_norm_share": later,
        "overlap": {
            "with_first_batch": _overlaps(seen),
            "with_batch_before": [1 - gone for gone in masks["current-batch"].replaced],
            "between_classes": _between(classes),
        },
    }
    found["says"] = _sentences(found)
    return found


def _curve(seen: _Track, step: int, chosen: Callable[[str], bool]) -> list[float]:
    names = [name for name in seen.curve[step] if chosen(name)]
    whole = sum(seen.whole[step][name] for name in names) or 1.0
    tops = zip(*(seen.curve[step][name] for name in names), strict=True)
    return [sqrt(sum(top) / whole) for top in tops]


def _overlaps(seen: _Track) -> list[float]:
    """For each step but the first, the share of its mask that the first batch's mask holds."""
    return [
        sum(common for _, common in counts) / sum(size for size, _ in counts)
        for step, counts in seen.alike.items()
        if step > 1
    ]


def _between(classes: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    return {
        one: {
            other: sum(
                int(torch.isin(mask, classes[other][name]).sum()) for name, mask in masks.items()
            )
            / sum(map(len, masks.values()))
            for other in classes
        }
        for one, masks in classes.items()
    }


def _sentences(found: dict[str, Any]) -> list[str]:
    """What the numbers mean for this model and data, in three sentences."""
    kept = found["kept_norm_share"]
    first, current, random = (kept[name]["mean"] for name in ("sift", "current-batch", "random"))
    place = CURVE.index(1e-2)
    shares = [step["overall"][place] for step in found["curve"]["norm_share"].values()]
    replaced = kept["current-batch"]["replaced_per_step"]
    lost = kept["current-batch"]["second_moment_lost_per_step"]
    how = (
        f"far above what a random mask keeps ({random:.0%})"
        if first > 2 * random
        else f"little more than what a random mask keeps ({random:.0%})"
    )
    return [
        f"The top 1 % of each weight's entries hold {shares[0]:.0%} of the first gradient's norm "
        f"and {shares[-1]:.0%} of the last one's ({shares[0] ** 2:.0%} and "
        f"{shares[-1] ** 2:.0%} of its energy).",
        f"Up to step {found['steps']} the first batch's mask keeps {first:.0%} of each later "
        f"gradient's norm, {first / max(current, 1e-12):.0%} of what the current batch's mask "
        f"keeps ({current:.0%}) and {how}.",
        f"A mask chosen anew for every batch replaces {replaced:.0%} of its entries at each step "
        f"and throws away {lost:.0%} of the second moment that Adam has gathered; a mask that "
        "stays throws away none.",
    ]
