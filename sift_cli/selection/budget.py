"""How many units each weight may train, and the exact choice of that many.

Units are single entries, or blocks, rows or columns that are chosen as one.
"""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.selection.structures import Units


def share(density: float, size: int) -> int:
    """Entries that a density allots to a weight: rounded up, so that every weight trains.

    This gives the paper's 806,208 entries for RoBERTa-large at .008. Exact for the decimal fraction
    that the user wrote: 7 % of 100 is 7, not 8.
    """
    return ceil(Fraction(str(density)) * size)


def entries(units: Mapping[str, Units]) -> int:
    """Entries that the units of all weights hold."""
    return sum(own.count * own.size for own in units.values())


def require_fits(budget: int, units: Mapping[str, Units]) -> None:
    """Raises SiftError where the weights hold fewer entries than the budget."""
    total = entries(units)
    if budget > total:
        raise SiftError(
            f"selection.budget: {budget:,} entries asked for, the targeted weights hold {total:,}"
        )


def allot(
    budget: int, units: Mapping[str, Units], densities: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Splits `budget` entries over weights in proportion to their sizes, in whole units.

    With `densities`, in proportion to what these would give each weight. What rounding down leaves
    over goes to the largest remainders, earlier weights first, as long as whole units fit; single
    entries sum to the budget exactly. Raises SiftError where the weights hold fewer entries than
    the budget.
    """
    require_fits(budget, units)
    weighed = {
        name: own.count * (Fraction(str(densities[name])) if densities else 1)
        for name, own in units.items()
    }
    total = sum(weighed[name] * own.size for name, own in units.items())
    exact = {name: Fraction(budget * one, total) for name, one in weighed.items()}
    counts = {name: min(int(exact[name]), own.count) for name, own in units.items()}
    left = budget - sum(counts[name] * own.size for name, own in units.items())
    for name in sorted(units, key=lambda name: counts[name] - exact[name]):
        if units[name].size <= left and counts[name] < units[name].count:
            counts[name] += 1
            left -= units[name].size
    if not any(counts.values()):
        raise SiftError(f"selection.budget: {budget:,} entries are less than any whole unit")
    return counts


def largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of `scores` ([n]), sorted; among equals the first win.

    One partial sort; which of equals win does not depend on the device, as it would with topk.
    """
    if count >= len(scores):
        return torch.arange(len(scores), device=scores.device)
    if count == 0:
        return torch.arange(0, device=scores.device)
    threshold = scores.topk(count, sorted=False).values.min()
    chosen = scores > threshold
    equal = (scores == threshold).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


def largest_per_neuron(scores: Tensor, count: int) -> Tensor:
    """The numbers of `count` units of `scores` ([neurons, across]), sorted: each neuron's largest.

    Where `count` is no multiple of the neurons, those whose next best unit scores highest get one
    more, so it is met exactly. Among equals the first win.
    """
    neurons, across = scores.shape
    each, more = divmod(count, neurons or 1)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    start = torch.arange(neurons, device=scores.device)[:, None] * across
    chosen = (start + order[:, :each]).reshape(-1)
    if more:
        with_more = largest(values[:, each], more)
        chosen = torch.cat([chosen, start[with_more, 0] + order[with_more, each]])
    return chosen.sort().values


class PerWeight:
    """Units compete within their own weight, or within their output neuron.

    That is where `neurons` says how many each weight has. The choice within a weight is final when
    its scores arrive. Where it is one of several (`partial`), of some of the weight's neurons, it
    holds all that may be among the chosen of the whole weight, and their scores are kept.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        neurons: Mapping[str, int] | None = None,
        partial: bool = False,
    ) -> None:
        self.counts, self.neurons, self.partial = counts, neurons, partial
        self._chosen: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}

    def add(self, name: str, scores: Tensor, size: int = 1) -> None:
        """Takes the scores of one weight's units, [down, across]; of a whole one, flat as well."""
        count = self.counts[name]
        if self.neurons is None:
            chosen = largest(scores.reshape(-1), count)
        elif self.partial:
            each = min(-(-count // self.neurons[name]), scores.shape[1])
            chosen = largest_per_neuron(scores, each * len(scores))
        else:
            chosen = largest_per_neuron(scores.reshape(self.neurons[name], -1), count)
        self._chosen[name] = chosen.cpu()
        if self.partial:
            wide = torch.promote_types(scores.dtype, torch.float32)
            self._scores[name] = scores.reshape(-1)[chosen].to("cpu", wide)

    def best(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Scores and numbers of the chosen units, by weight, of a partial choice."""
        return {name: (self._scores[name], units) for name, units in self._chosen.items()}

    def chosen(self) -> dict[str, Tensor]:
        """The numbers of the chosen units, by weight, on the host."""
        return self._chosen


class Global:
    """Units of all weights compete for one budget of entries, by their mean scores.

    No weight takes part with more units than the budget holds; of these the best are taken as long
    as the next one fits. Among equals the weight that comes first in `names` wins, in whatever
    order weights arrive. Candidates that can no longer win are dropped whenever twice the budget
    has gathered, so the cost is linear in the number of entries whatever the number of weights, and
    the choice is that of a sort of everything.
    """

    def __init__(self, budget: int, names: Iterable[str]) -> None:
        self.budget = budget
        self._owners = {name: index for index, name in enumerate(names)}
        self._sizes = dict.fromkeys(self._owners, 1)
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}  # by owner: scores, units; sorted
        self._floor = float("-inf")

    def add(self, name: str, scores: Tensor, size: int = 1) -> None:
        """Takes the scores of one weight's units."""
        scores = scores.reshape(-1)
        units = (scores >= self._floor).nonzero().flatten()
        if len(units) > self.budget // size:
            units = largest(scores, self.budget // size)
        self._sizes[name] = size
        self._parts[self._owners[name]] = (scores[units].float().cpu(), units.cpu())
        if self._candidates() > 2 * self.budget:
            # The first that exceeds the budget stays: nothing behind it may be chosen, even if
            # it fits.
            self._prune(spare=1)

    def best(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Scores and numbers of all that may win among others, of every weight that was added."""
        self._prune(spare=1)
        names = list(self._owners)
        return {names[owner]: self._parts[owner] for owner in sorted(self._parts)}

    def chosen(self) -> dict[str, Tensor]:
        """The numbers of the chosen units; a weight none of whose units is chosen is left out."""
        self._prune()
        chosen = {}
        for name, owner in self._owners.items():
            units = self._parts.get(owner, (None, torch.empty(0)))[1]
            if len(units):
                chosen[name] = units
        return chosen

    def _candidates(self) -> int:
        """Entries of all units that are still in the running."""
        sizes = list(self._sizes.values())
        return sum(len(units) * sizes[owner] for owner, (_, units) in self._parts.items())

    def _prune(self, spare: int = 0) -> None:
        """Drops all units but the best that fit into the budget, and `spare` that rank next."""
        if self._candidates() <= self.budget:
            return
        owners = sorted(self._parts)
        scores = torch.cat([self._parts[owner][0] for owner in owners])
        sizes = list(self._sizes.values())
        size = torch.cat([torch.full((len(self._parts[o][1]),), sizes[o]) for o in owners])
        ranked = scores.sort(descending=True, stable=True)
        fits = int((size[ranked.indices].cumsum(0) <= self.budget).sum())
        self._floor = float(ranked.values[fits])
        wins = torch.zeros(len(scores), dtype=torch.bool)
        wins[ranked.indices[: fits + spare]] = True
        for owner, win in zip(
            owners, wins.split([len(self._parts[o][1]) for o in owners]), strict=True
        ):
            kept, units = self._parts[owner]
            self._parts[owner] = (kept[win], units[win])


def pooled(
    here: PerWeight | Global,
    among: PerWeight | Global,
    sizes: Mapping[str, int],
    joined: Callable[[Tensor], Tensor],
    before: Mapping[str, int],
) -> dict[str, Tensor]:
    """The choice over the units of several ranks, of which each has its best `here`.

    `sizes` are the entries of each unit, by weight, and `before` those that lie before this rank's
    in the whole weight; `joined` gives what all ranks hold, one after the other. `among` chooses as
    if all had been added to it; among equals the first win, as ever, since rows are dealt to the
    ranks in order.
    """
    every = {}
    for name, (scores, units) in sorted(here.best().items()):
        every[name] = joined(units + before[name] // sizes[name])
        among.add(name, joined(scores), sizes[name])
    return {name: every[name][places] for name, places in among.chosen().items()}
