"""From scores to supports, with one dense gradient alive at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sift_cli.errors import SiftError
from sift_cli.selection.budget import (
    Global,
    PerWeight,
    allot,
    entries,
    pooled,
    require_fits,
    share,
)
from sift_cli.selection.descent import sign_descent
from sift_cli.selection.evidence import (
    OF_TOKENS,
    evidence_of,
    observed_gradients,
    observed_inputs,
    observed_tokens,
)
from sift_cli.selection.parts import Part, Retained
from sift_cli.selection.scores import Score, by_rows, score_entries
from sift_cli.selection.structures import BY_ROWS, Units
from sift_cli.selection.targets import LinearLayer, density_of, linear_layers
from sift_cli.sparse import Support
from sift_cli.sparse.local import Shards

Whole = Callable[[Tensor], Tensor]  # sums a part of what batches show with that of others
Compete = Callable[..., None]  # scores the weight of that name by what is known of it


@dataclass(frozen=True)
class Rule:
    """How entries are chosen, whatever the model.

    One of `density` (share of each weight, or of all together under scope `global`; or patterns
    with a `default`) and `budget` (entries in all) is given; with both, the budget is split in
    proportion to the densities. `block` is the edge of a block, `rank` that of the low-rank score,
    `balance` how far the balanced one goes.
    """

    score: Score
    scope: str = "tensor"
    structure: str = "entry"
    density: float | Mapping[str, float] | None = None
    budget: int | None = None
    block: int = 1
    rank: int = 32
    balance: float = 1.0


def alone(part: Tensor) -> Tensor:
    """What there is of it: no other process looks at parts of the batches."""
    return part


def check(model: nn.Module, names: Sequence[str], rule: Rule) -> None:
    """Raises what `select` raises for densities, budgets and blocks; computes nothing."""
    if not names:
        raise SiftError("selection.target: nothing is left beside the modules trained whole")
    weights, _, units = _look_up(model, names, rule)
    _chooser(rule, weights, units)


def planned(model: nn.Module, names: Sequence[str], rule: Rule) -> dict[str, int]:
    """The entries of each weight that `select` will choose, from shapes alone.

    Under scope `global` only their sum is known; it is split by the sizes of the weights.
    """
    weights, _, units = _look_up(model, names, rule)
    chooser = _chooser(rule, weights, units)
    counts = allot(chooser.budget, units) if isinstance(chooser, Global) else chooser.counts
    return {name: count * units[name].size for name, count in counts.items()}


def beside(
    model: nn.Module, names: Sequence[str], vectors: Sequence[str], rule: Rule
) -> tuple[list[str], Rule]:
    """What is left of `names` to choose from, and of the rule's budget, beside whole `vectors`.

    Both together train as many entries as the rule gives `names`, but for what fills no unit.
    Raises SiftError where nothing is left.
    """
    if not vectors:
        return list(names), rule
    named, whole = dict(model.named_parameters()), set(vectors)
    total = rule.budget or sum(planned(model, names, rule).values())
    spent = sum(named[name].numel() for name in vectors)
    left = [name for name in names if name not in whole]
    units = _look_up(model, left, rule)[2]
    if total - spent < min((own.size for own in units.values()), default=1):
        raise SiftError(
            f"selection.vectors: biases and norms hold {spent:,} entries and the budget is "
            f"{total:,}, so nothing is left to choose; give a higher selection.density or budget, "
            "or selection.exclude some of them"
        )
    density = rule.density if isinstance(rule.density, Mapping) else None
    return left, replace(rule, budget=total - spent, density=density)


def select(
    model: nn.Module,
    names: Sequence[str],
    rule: Rule,
    *,
    seed: int = 0,
    backward: Sequence[Callable[[], object]] = (),
    change: Mapping[str, Tensor] | None = None,
    retained: Mapping[str, Retained] | None = None,
    norms: dict[str, Tensor] | None = None,
    descent_rate: float = 0.0,
    whole: Whole = alone,
    shards: Shards | None = None,
) -> dict[str, Support]:
    """The entries to train of the model's parameters called `names`; supports on the host.

    Each callable in `backward` runs one calibration batch forward and backward. With one batch each
    gradient is scored and freed as it arrives, with several their sum gathers on the host. A weight
    that the loss does not depend on has no gradient to rank and is left out. `change` (dense, by
    name) is evidence for scores that ask for it; `retained` says what of an earlier support stays.
    `norms` is filled with the 2-norm of each weight's gradient ([]), where the score looks at it.
    `descent_rate` is that of sign descent, where the score looks at its votes. Where `backward`
    sees only a part of each batch, `whole` sums what that part gives with the others', in place.
    Where weights lie in rows on several ranks (`shards`), each scores its own, of gradients that
    come to it summed, and the best of all are taken.
    Raises SiftError where a score is not finite, a budget or a block does not fit, a score needs
    batches and there are none, or a rule is not one by rows.
    """
    weights, layers, units = _look_up(model, names, rule)
    score = rule.score
    if shards is not None:
        require_by_rows(rule, [name for name in names if units[name].transposed])
    if score.needs_data and not backward:
        raise SiftError("selection.score: it looks at batches, and there are none to look at")
    parts = {name: Part.of(weight, units[name], shards) for name, weight in weights.items()}
    joined = alone if shards is None else shards.joined
    staying = {
        name: parts[name].staying(one, joined)
        for name, one in (retained or {}).items()
        if name in parts
    }
    chooser = _chooser(rule, weights, units, partial=shards is not None)
    loud = _observed(score, {"input_norm"}, weights, layers)
    seen = _observed(score, OF_TOKENS, weights, layers)
    with observed_inputs(loud) as squares, observed_tokens(seen) as tokens:

        def compete(name: str, **found: Tensor | None) -> None:
            """Scores one weight's units by what the batches showed; hands them to the chooser."""
            part, gradient = parts[name], found.get("gradient")
            if norms is not None and gradient is not None and not score.folds:
                norms[name] = _norm(gradient)
            evidence = evidence_of(
                part.rows,
                part.units,
                input_squares=whole(squares[name]) if name in squares else None,
                tokens=tokens[name].over(whole) if name in tokens else None,
                change=None if change is None else change[name],
                **found,
            )
            evidence |= {"rank": rule.rank, "balance": rule.balance}
            scores = part.units.mean(score_entries(score, name, evidence, seed, part.before))
            if name in staying:
                scores = scores.clone()
                scores.view(-1)[staying[name].to(scores.device)] = float("inf")
            chooser.add(name, scores, part.units.size)

        if score.descends:
            _descend(weights, parts, descent_rate, backward, compete, whole)
        elif score.needs_data:
            _run_batches(weights, score, backward, compete, whole)
        else:
            for name in names:
                compete(name)
    if shards is None:
        chosen = chooser.chosen()
    else:
        if norms:
            norms |= shards.norms(norms)
        sizes = {name: own.size for name, own in units.items()}
        before = {name: part.before for name, part in parts.items()}
        chosen = pooled(chooser, _chooser(rule, weights, units), sizes, shards.joined, before)
    return {
        name: Support.of(tuple(weights[name].shape), units[name].positions(chosen[name]))
        for name in names
        if name in chosen and len(chosen[name])
    }


def require_by_rows(rule: Rule, transposed: Sequence[str] = ()) -> None:
    """Raises SiftError where a rank that holds some rows of each weight cannot choose by the rule.

    `transposed` are weights that are stored as [inputs, outputs].
    """
    wrong = None
    if not by_rows(rule.score):
        wrong = "selection.score: it looks at more than the rows that a rank holds"
    elif rule.structure not in BY_ROWS:
        wrong = f"selection.structure: a {rule.structure} lies on several ranks"
    elif transposed:
        wrong = f"{transposed[0]} is stored as [inputs, outputs]"
    if wrong:
        raise SiftError(
            f"distributed.shard: full: {wrong}; take selection.policy sift, sign-descent, random "
            "or magnitude on a model of linear layers, or distributed.shard: none"
        )


def _look_up(
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


def _observed(
    score: Score,
    evidence: set[str],
    weights: Mapping[str, Tensor],
    layers: Mapping[str, LinearLayer],
) -> dict[str, nn.Module]:
    """The layers at which the score looks for any of `evidence`, by the name of their weight."""
    if not evidence & score.needs:
        return {}
    return {
        name: layers[name].module
        for name, weight in weights.items()
        if name in layers and weight.dim() == 2
    }


def _chooser(
    rule: Rule, weights: Mapping[str, Tensor], units: Mapping[str, Units], partial: bool = False
) -> PerWeight | Global:
    """What takes scores and chooses, by scope, with the number of units or entries to choose.

    A choice that is `partial` is one of several that are pooled.
    Raises SiftError where a budget does not fit.
    """
    if rule.scope == "global":
        count = rule.budget
        if count is None:
            assert isinstance(rule.density, float | int)
            count = share(rule.density, sum(weight.numel() for weight in weights.values()))
        else:
            require_fits(count, units)
        return Global(min(count, entries(units)), units)
    if rule.budget is not None:
        densities = None if rule.density is None else density_of(rule.density, weights)
        counts = allot(rule.budget, units, densities)
    else:
        assert rule.density is not None
        densities = density_of(rule.density, weights)
        counts = {name: share(densities[name], own.count) for name, own in units.items()}
    neurons = {name: own.grid[0] for name, own in units.items()}
    return PerWeight(counts, neurons if rule.scope == "neuron" else None, partial)


def _norm(gradient: Tensor) -> Tensor:
    """The 2-norm, [], in fp32 or wider."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=wide)
    return norm


def _descend(
    weights: Mapping[str, nn.Parameter],
    parts: Mapping[str, Part],
    rate: float,
    backward: Sequence[Callable[[], object]],
    compete: Compete,
    whole: Whole,
) -> None:
    """Runs the batches, each from where signSGD has come, and hands the votes to `compete`."""
    with (
        sign_descent({name: part.rows for name, part in parts.items()}, rate) as (take, votes),
        observed_gradients(weights, lambda name, part: take(name, whole(part))),
    ):
        for run in backward:
            run()
    for name in list(votes):
        compete(name, votes=votes.pop(name).to(weights[name].device))


def _run_batches(
    weights: Mapping[str, nn.Parameter],
    score: Score,
    backward: Sequence[Callable[[], object]],
    compete: Compete,
    whole: Whole,
) -> None:
    """Runs the batches and hands each weight's folded gradient to `compete`.

    With one batch as it arrives; with several their sum, which gathers on the host in fp32. Beside
    it the sum of the gradient's squares, where the score asks for it.
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        if "gradient_squares" in score.needs:
            wide = gradient.float() if len(backward) == 1 else gradient.to("cpu").float()
            squares[name] = squares[name].addcmul_(wide, wide) if name in squares else wide.square()
        folded = score.fold(gradient)
        if len(backward) == 1:
            compete(name, gradient=folded, gradient_squares=squares.pop(name, None))
        elif name in sums:
            sums[name] += folded.to("cpu", sums[name].dtype)
        else:
            sums[name] = folded.to("cpu").float()

    with observed_gradients(weights, lambda name, part: take(name, whole(part))):
        for run in backward:
            run()
    for name in list(sums):
        device, squared = weights[name].device, squares.pop(name, None)
        squared = None if squared is None else squared.to(device)
        compete(name, gradient=sums.pop(name).to(device), gradient_squares=squared)
