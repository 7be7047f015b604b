"""From scores to supports, one dense gradient at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sift_cli.errors import SiftError
from sift_cli.selection.budget import (
    Global,
    PerWeight,
    allot,
    entries,
    largest,
    require_fits,
    share,
)
from sift_cli.selection.evidence import input_norm_of, observed_gradients, observed_inputs
from sift_cli.selection.scores import Score, score_entries
from sift_cli.selection.structures import Units
from sift_cli.selection.targets import LinearLayer, density_of, linear_layers
from sift_cli.sparse import Support


@dataclass(frozen=True)
class Rule:
    """How entries are chosen, whatever the model.

    Exactly one of `density` (share of each weight, or of all together under scope `global`; or
    patterns with a `default`) and `budget` (entries in all) is given. `block` is the edge of a
    block, `rank` that of the low-rank score.
    """

    score: Score
    scope: str = "tensor"
    structure: str = "entry"
    density: float | Mapping[str, float] | None = None
    budget: int | None = None
    block: int = 1
    rank: int = 32


@dataclass(frozen=True, eq=False)
class Retained:
    """A support that is to stay but for the share `drop` of its units that changed least.

    `change` is how far each entry is from the base, [K].
    """

    support: Support
    change: Tensor
    drop: float


def check(model: nn.Module, names: Sequence[str], rule: Rule) -> None:
    """Raises what `select` would of densities, budgets and blocks, before anything is computed."""
    if not names:
        raise SiftError("selection.target: nothing is left beside the modules trained whole")
    weights, _, units = _cut(model, names, rule)
    _chooser(rule, weights, units)


def planned(model: nn.Module, names: Sequence[str], rule: Rule) -> dict[str, int]:
    """The entries of each weight that `select` will choose, from shapes alone.

    Under scope `global` only their sum is known; it is split by the sizes of the weights.
    """
    weights, _, units = _cut(model, names, rule)
    chooser = _chooser(rule, weights, units)
    counts = allot(chooser.budget, units) if isinstance(chooser, Global) else chooser.counts
    return {name: count * units[name].size for name, count in counts.items()}


def select(
    model: nn.Module,
    names: Sequence[str],
    rule: Rule,
    *,
    seed: int = 0,
    backward: Sequence[Callable[[], object]] = (),
    change: Mapping[str, Tensor] | None = None,
    held: Mapping[str, Retained] | None = None,
    norms: dict[str, Tensor] | None = None,
) -> dict[str, Support]:
    """The entries to train of the model's parameters called `names`; supports on the host.

    Each callable in `backward` runs one calibration batch forward and backward. With one batch each
    gradient is scored and freed as it arrives, with several their sum gathers on the host. A weight
    that the loss does not depend on has no gradient to rank and is left out. `change` (dense, by
    name) is evidence for scores that ask for it; `held` says what of an earlier support stays.
    `norms` takes the 2-norm of each weight's gradient ([]), where the score looks at it.
    Raises SiftError where a score is not finite, a budget or a block does not fit, or a score needs
    batches and there are none.
    """
    weights, layers, units = _cut(model, names, rule)
    score, held = rule.score, held or {}
    if score.needs_data and not backward:
        raise SiftError("selection.score: it looks at batches, and there are none to look at")
    chooser = _chooser(rule, weights, units)
    watched = {
        name: layers[name].module
        for name in names
        if "input_norm" in score.needs and name in layers and weights[name].dim() == 2
    }
    with observed_inputs(watched) as squares:

        def settle(name: str, gradient: Tensor | None) -> None:
            weight, cut = weights[name].detach(), units[name]
            if norms is not None and gradient is not None and not score.folds:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                norms[name] = torch.linalg.vector_norm(gradient, dtype=wide)
            evidence = {
                "weight": cut.turned(weight),
                "gradient": None if gradient is None else cut.turned(gradient),
                "input_norm": input_norm_of(name, weight, cut, squares),
                "change": cut.turned(change[name]) if change is not None else None,
                "rank": rule.rank,
            }
            scores = cut.mean(score_entries(score, name, evidence, seed))
            if name in held:
                scores = _hold(scores, cut, held[name])
            chooser.add(name, scores, cut.size)

        if score.needs_data:
            _see_batches(weights, score, backward, settle)
        else:
            for name in names:
                settle(name, None)
    return {
        name: Support.of(tuple(weights[name].shape), units[name].positions(won))
        for name, won in _in_order(chooser.chosen(), names).items()
    }


def _cut(
    model: nn.Module, names: Sequence[str], rule: Rule
) -> tuple[dict[str, nn.Parameter], dict[str, LinearLayer], dict[str, Units]]:
    """The weights called `names`, the model's linear layers, and the units of each weight."""
    named = dict(model.named_parameters())
    weights = {name: named[name] for name in names}
    layers = linear_layers(model)
    units = {
        name: Units.of(
            name,
            weight,
            rule.structure,
            rule.block,
            transposed=name in layers and layers[name].transposed,
        )
        for name, weight in weights.items()
    }
    return weights, layers, units


def _chooser(
    rule: Rule, weights: Mapping[str, Tensor], units: Mapping[str, Units]
) -> PerWeight | Global:
    if rule.scope == "global":
        count = rule.budget
        if count is None:
            assert isinstance(rule.density, float | int)
            count = share(rule.density, sum(weight.numel() for weight in weights.values()))
        else:
            require_fits(count, units)
        return Global(min(count, entries(units)), units)
    if rule.budget is not None:
        counts = allot(rule.budget, units)
    else:
        assert rule.density is not None
        densities = density_of(rule.density, weights)
        counts = {name: share(densities[name], one.count) for name, one in units.items()}
    return PerWeight(counts, per_neuron=rule.scope == "neuron")


def _hold(scores: Tensor, units: Units, held: Retained) -> Tensor:
    """Scores under which all but the least changed of the held units win before any other."""
    positions = held.support.positions
    if positions is None:
        positions = torch.arange(held.support.size, device=held.change.device)
    holding = units.holding(positions.long().to(held.change.device))
    unit, place = holding.unique(return_inverse=True)
    moved = torch.zeros(len(unit), device=held.change.device).index_add_(
        0, place, held.change.float()
    )
    stay = len(unit) - share(held.drop, len(unit))
    flat = scores.reshape(-1).clone()
    flat[unit[largest(moved, stay)].to(flat.device)] = float("inf")
    return flat.view(scores.shape)


def _see_batches(
    weights: Mapping[str, nn.Parameter],
    score: Score,
    backward: Sequence[Callable[[], object]],
    settle: Callable[[str, Tensor | None], None],
) -> None:
    """Runs the batches; each gradient is folded and settled, or added up on the host."""
    sums: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        folded = score.fold(gradient)
        if len(backward) == 1:
            settle(name, folded)
        elif name in sums:
            sums[name] += folded.to("cpu", sums[name].dtype)
        else:
            sums[name] = folded.to("cpu").float()

    with observed_gradients(weights, take):
        for run in backward:
            run()
    for name in list(sums):
        settle(name, sums.pop(name).to(weights[name].device))


def _in_order(chosen: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: chosen[name] for name in names if name in chosen and len(chosen[name])}
