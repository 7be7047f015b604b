"""How many entries each weight may train, and the exact choice of that many."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.sparse import Support


def share(density: float, size: int) -> int:
    """Entries that a density allots to a weight: rounded up, so that every weight trains.

    This gives the paper's 806,208 entries for RoBERTa-large at .008. Exact for the decimal fraction
    that the user wrote: 7 % of 100 is 7, not 8.
    """
    return ceil(Fraction(str(density)) * size)


def allot(budget: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Splits `budget` entries over weights in proportion to their sizes, summing to it exactly.

    What rounding down leaves over goes to the largest remainders, earlier weights first. Raises
    SiftError where the weights hold fewer entries than the budget.
    """
    total = sum(sizes.values())
    if budget > total:
        raise SiftError(
            f"selection.budget: {budget:,} entries asked for, the targeted weights hold {total:,}"
        )
    counts = {name: budget * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(budget * sizes[name] % total))
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts


def largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of `scores` ([n]), sorted; among equals the first win.

    Costs one partial sort, and the same on every device.
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


class PerTensor:
    """Entries compete within their own weight: each weight is settled when its scores arrive."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = counts
        self._supports: dict[str, Support] = {}

    def add(self, name: str, shape: tuple[int, ...], scores: Tensor) -> None:
        """Takes the flat scores of one weight."""
        positions = largest(scores, self.counts[name])
        self._supports[name] = Support.of(shape, positions.cpu())

    def supports(self) -> dict[str, Support]:
        """The supports of all weights added."""
        return self._supports


class Global:
    """Entries of all weights compete for one budget.

    Candidates that can no longer win are dropped whenever twice the budget has gathered, so the
    cost is linear in the number of entries whatever the number of weights.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._names: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, weight indices, positions
        self._held = 0  # candidates in all parts
        self._floor = float("-inf")

    def add(self, name: str, shape: tuple[int, ...], scores: Tensor) -> None:
        """Takes the flat scores of one weight."""
        positions = (scores > self._floor).nonzero().flatten()
        if len(positions) > self.budget:
            positions = largest(scores, self.budget)
        owner = torch.full((len(positions),), len(self._names), dtype=torch.int32)
        self._names.append(name)
        self._shapes.append(shape)
        self._parts.append((scores[positions].float().cpu(), owner, positions.cpu()))
        self._held += len(positions)
        if self._held > 2 * self.budget:
            self._prune()

    def supports(self) -> dict[str, Support]:
        """The supports of all weights added; a weight none of whose entries won is left out."""
        if not self._parts:
            return {}
        self._prune()
        ((_, owner, positions),) = self._parts
        found = {}
        for index, (name, shape) in enumerate(zip(self._names, self._shapes, strict=True)):
            mine = positions[owner == index]
            if len(mine):
                found[name] = Support.of(shape, mine)
        return found

    def _prune(self) -> None:
        scores, owner, positions = (torch.cat(column) for column in zip(*self._parts, strict=True))
        keep = largest(scores, self.budget)
        self._parts = [(scores[keep], owner[keep], positions[keep])]
        self._held = len(keep)
        if len(keep) == self.budget:
            self._floor = float(scores[keep].min())
