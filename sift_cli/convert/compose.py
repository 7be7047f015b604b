"""Several deltas of one base as one change: rules over the entries that any of them changes.

For one weight, delta i says at its positions by how much the trained value differs from the base's.
All arithmetic is on such sparse lists, block by block of the flat weight, so that many deltas need
little memory; it runs in fp32, or fp64 where the weight itself is fp32, and is rounded once.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from sift_cli.delta.file import SIGNED, WeightDelta, weight_delta
from sift_cli.errors import SiftError
from sift_cli.sparse import Support

BLOCK = 1 << 21  # entries of all deltas that are worked on at once


@dataclass(frozen=True)
class Mix:
    """How deltas are put together: a rule, its options, and a weight for each delta.

    Raises SiftError for numbers that make no sense.
    """

    weights: tuple[float, ...]
    rule: str = "sum"
    scale: float = 1.0
    keep: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise SiftError(f"--rule {self.rule}: unknown; there is {', '.join(RULES)}")
        if not all(isfinite(one) and one for one in (*self.weights, self.scale)):
            raise SiftError("--scale and --weight must be finite and not 0")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise SiftError(f"--keep {self.keep:g} must be above 0 and at most 1")
        if self.keep is not None and self.rule == "sum":
            raise SiftError("--keep goes with --rule ties or dare; sum keeps every entry")
        if self.keep is None and self.rule == "dare":
            raise SiftError("--rule dare needs --keep: the share of entries that are not dropped")

    @property
    def exact(self) -> bool:
        """Whether the result is the one trained model, bit for bit."""
        return self.weights == (1.0,) and self.scale == 1.0 and self.keep in (None, 1.0)


@dataclass(frozen=True)
class Overlap:
    """For one weight: deltas that change it; entries that any of them changes, that several do,
    and of the latter those that one pulls up and another down; entries that came out changed.
    """

    deltas: int
    entries: int
    collisions: int
    sign_conflicts: int
    changed: int


# rule(at [N], change [N], delta [N], weights [deltas], size) -> [size]: N changes, `at` which of
# `size` entries, by which delta
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def add(at: Tensor, change: Tensor, delta: Tensor, weights: Tensor, size: int) -> Tensor:
    """The weighted sum: task arithmetic (Ilharco et al. 2023, arXiv 2212.04089), scaled later."""
    return change.new_zeros(size).index_add_(0, at, weights[delta] * change)


def elect(at: Tensor, change: Tensor, delta: Tensor, weights: Tensor, size: int) -> Tensor:
    """Where deltas disagree in sign, the larger total wins and the mean of its side counts.

    TIES (Yadav et al. 2023, arXiv 2306.01708), sections 3.2 and 3.3. Weights shift election and
    mean; they do not change the size of a change that only one delta makes. An even vote changes
    nothing.
    """
    pull = weights[delta] * change
    sign = change.new_zeros(size).index_add_(0, at, pull).sign()
    agrees = (pull.sign() == sign[at]) & (pull != 0)
    total = change.new_zeros(size).index_add_(0, at[agrees], pull[agrees])
    voters = change.new_zeros(size).index_add_(0, at[agrees], weights[delta[agrees]].abs())
    return torch.where(voters > 0, total / voters, 0)


def keep_largest(change: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """[K] bool: the share `keep` of a weight's changes that are largest (TIES, section 3.1)."""
    chosen = torch.zeros(len(change), dtype=torch.bool)
    order = change.abs().argsort(descending=True, stable=True)
    chosen[order[: max(1, round(keep * len(change)))]] = True
    return chosen


def keep_random(change: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """[K] bool: each entry stays with probability `keep`.

    DARE (Yu et al. 2024, arXiv 2311.03099) drops the others and divides what stays by `keep`.
    """
    return torch.rand(len(change), generator=generator) < keep


@dataclass(frozen=True)
class Row:
    """A rule: which entries of each delta stay, whether they grow for the others, how they join."""

    join: Rule
    thin: Callable[[Tensor, float, torch.Generator], Tensor] | None = None
    rescale: bool = False


RULES: Mapping[str, Row] = {
    "sum": Row(add),
    "ties": Row(elect, keep_largest),
    "dare": Row(add, keep_random, rescale=True),
}


class Part:
    """What one delta says of one weight, cut into blocks: positions, and the change there.

    Nothing dense is made: `positions` is None where every entry changes.
    """

    def __init__(self, name: str, weight: WeightDelta, base: Tensor, mix: Mix) -> None:
        self.positions = weight.support.positions
        self._signed = weight.bits.view(SIGNED[base.element_size()])
        self._grow = 1.0
        self._stays: Tensor | None = None
        row = RULES[mix.rule]
        if row.thin is not None and mix.keep is not None and mix.keep < 1:
            # by what the change is, so that neither order nor file names matter
            mark = f"{mix.seed} {name} {weight.trained}".encode()
            seed = int.from_bytes(hashlib.sha256(mark).digest()[:7], "little")
            _, change = self.block(base, 0, base.numel())
            generator = torch.Generator().manual_seed(seed)
            self._stays = row.thin(change, mix.keep, generator)
            self._grow = 1 / mix.keep if row.rescale else 1.0

    def count(self, low: int, high: int) -> int:
        """Entries in [low, high) of the flat weight."""
        first, last = self._ends(low, high)
        return last - first

    def block(self, base: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Positions (int64) in [low, high) and how far each entry goes from its base value."""
        first, last = self._ends(low, high)
        if self.positions is None:
            at = torch.arange(low, high)
        else:
            at = self.positions[first:last].long()
        bits = self._signed[first:last]
        if self._stays is not None:
            stays = self._stays[first:last]
            at, bits = at[stays], bits[stays]
        before = base.reshape(-1)[at]
        after = (before.view(bits.dtype) ^ bits).view(before.dtype)
        return at, (after.to(wide(base)) - before.to(wide(base))) * self._grow

    def _ends(self, low: int, high: int) -> tuple[int, int]:
        if self.positions is None:
            return low, high
        ends = torch.tensor([low, high], dtype=self.positions.dtype)
        first, last = torch.searchsorted(self.positions, ends).tolist()
        return first, last


def wide(weight: Tensor) -> torch.dtype:
    """The dtype that changes of a weight are counted in."""
    return torch.float64 if weight.element_size() >= 4 else torch.float32


def compose_(
    name: str, weight: Tensor, deltas: Mapping[int, WeightDelta], mix: Mix, mark: str
) -> tuple[WeightDelta | None, Overlap]:
    """Changes `weight` as the mix of `deltas` says, in place; the change as a delta of its own.

    `deltas` go by their place in `mix.weights`; `mark` is the base's fingerprint. The delta is None
    where no entry came out changed.
    """
    parts = {at: Part(name, one, weight, mix) for at, one in deltas.items()}
    shares = torch.tensor(mix.weights, dtype=wide(weight))
    flat = weight.view(-1)
    entries = collisions = conflicts = 0
    changed = []
    for low, high in _blocks(list(parts.values()), 0, weight.numel()):
        blocks = {at: part.block(weight, low, high) for at, part in parts.items()}
        every = torch.cat([at for at, _ in blocks.values()])
        change = torch.cat([change for _, change in blocks.values()])
        counts = torch.tensor([len(at) for at, _ in blocks.values()])
        whose = torch.tensor(list(blocks)).repeat_interleave(counts)
        positions, at = every.unique(return_inverse=True)
        size = len(positions)
        sign = (shares[whose] * change).sign()
        up = torch.zeros(size, dtype=torch.bool).index_fill_(0, at[sign > 0], True)
        down = torch.zeros(size, dtype=torch.bool).index_fill_(0, at[sign < 0], True)
        entries += size
        collisions += int((torch.bincount(at, minlength=size) > 1).sum())
        conflicts += int((up & down).sum())
        total = RULES[mix.rule].join(at, change, whose, shares, size)
        before = flat[positions]
        after = (before.to(total.dtype) + mix.scale * total).to(weight.dtype)
        flat[positions] = after
        signed = SIGNED[weight.element_size()]
        moved = before.view(signed) != after.view(signed)
        changed.append((positions[moved], before[moved], after[moved]))
    positions, before, after = map(torch.cat, zip(*changed, strict=True))
    overlap = Overlap(len(deltas), entries, collisions, conflicts, len(positions))
    if not len(positions):
        return None, overlap
    support = Support.of(weight.shape, positions)
    return weight_delta(support, before, after, mark, weight), overlap


def _blocks(parts: Sequence[Part], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ranges of the flat weight in each of which the parts have at most BLOCK entries together."""
    if high - low > 1 and sum(part.count(low, high) for part in parts) > BLOCK:
        middle = (low + high) // 2
        yield from _blocks(parts, low, middle)
        yield from _blocks(parts, middle, high)
    else:
        yield low, high
