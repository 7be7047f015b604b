"""Several deltas of one base as one change: rules over the entries that any of them changes.

For one weight, a delta has positions, and at each by how much the trained value differs from the
base's. All arithmetic is on such sparse lists, block by block of the flat weight, so that many
deltas need little memory; it runs in fp32, or fp64 where the weight itself is fp32, and is rounded
to the weight's dtype once.
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

ENTRIES_AT_ONCE = 1 << 21  # entries of all deltas that are worked on at once


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
        """Whether nothing is mixed: a single delta, of which every entry counts fully."""
        return self.weights == (1.0,) and self.scale == 1.0 and self.keep in (None, 1.0)


@dataclass(frozen=True)
class Overlap:
    """What deltas have in common in one weight.

    `deltas` counts those that change it, `entries` what any of them changes, `collisions` what
    several do, `sign_conflicts` what one pulls up and another down. `changed` counts the entries
    that came out changed.
    """

    deltas: int
    entries: int
    collisions: int
    sign_conflicts: int
    changed: int


# join(at [N], change [N], delta [N], weights [deltas], size) -> [size]: the changes of `size`
# entries from N changes by all deltas, `at` telling of which entry, `delta` by which delta
Join = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


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
class MergeRule:
    """How deltas become one change.

    `thin` chooses the entries of each delta that stay (None: all of them), `rescale` divides these
    by the share that stays, `join` makes one change of all deltas' changes of an entry.
    """

    join: Join
    thin: Callable[[Tensor, float, torch.Generator], Tensor] | None = None
    rescale: bool = False


RULES: Mapping[str, MergeRule] = {
    "sum": MergeRule(add),
    "ties": MergeRule(elect, keep_largest),
    "dare": MergeRule(add, keep_random, rescale=True),
}


class SparseChange:
    """One delta's change of one weight, after thinning, read block by block of the flat weight.

    Nothing dense is made. `positions` is None where every entry changes.
    """

    def __init__(self, name: str, weight: WeightDelta, base: Tensor, mix: Mix) -> None:
        self.positions = weight.support.positions
        self._signed = weight.bits.view(SIGNED[base.element_size()])
        self._grow = 1.0
        self._stays: Tensor | None = None
        rule = RULES[mix.rule]
        if rule.thin is not None and mix.keep is not None and mix.keep < 1:
            # a seed from the content, so that neither the order of deltas nor file names matter
            mark = f"{mix.seed} {name} {weight.trained}".encode()
            seed = int.from_bytes(hashlib.sha256(mark).digest()[:7], "little")
            _, change = self.block(base, 0, base.numel())
            generator = torch.Generator().manual_seed(seed)
            self._stays = rule.thin(change, mix.keep, generator)
            self._grow = 1 / mix.keep if rule.rescale else 1.0

    def count(self, low: int, high: int) -> int:
        """How many entries change in [low, high) of the flat weight, before thinning."""
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
        dtype = arithmetic_dtype(base)
        return at, (after.to(dtype) - before.to(dtype)) * self._grow

    def _ends(self, low: int, high: int) -> tuple[int, int]:
        """Where in the list of positions those in [low, high) begin and end."""
        if self.positions is None:
            return low, high
        ends = torch.tensor([low, high], dtype=self.positions.dtype)
        first, last = torch.searchsorted(self.positions, ends).tolist()
        return first, last


def arithmetic_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which changes of a weight are added up."""
    return torch.float64 if weight.element_size() >= 4 else torch.float32


def compose_(
    name: str, weight: Tensor, deltas: Mapping[int, WeightDelta], mix: Mix, mark: str
) -> tuple[WeightDelta | None, Overlap]:
    """Changes `weight` as the mix of `deltas` says, in place; the change as a delta of its own.

    `deltas` go by their place in `mix.weights`; `mark` is the base's fingerprint. The delta is None
    where no entry came out changed.
    """
    parts = {at: SparseChange(name, one, weight, mix) for at, one in deltas.items()}
    shares = torch.tensor(mix.weights, dtype=arithmetic_dtype(weight))
    flat = weight.view(-1)
    signed = SIGNED[weight.element_size()]
    counts, changed = [], []
    for low, high in _blocks(list(parts.values()), 0, weight.numel()):
        blocks = {at: part.block(weight, low, high) for at, part in parts.items()}
        positions, at = torch.cat([at for at, _ in blocks.values()]).unique(return_inverse=True)
        change = torch.cat([change for _, change in blocks.values()])
        lengths = torch.tensor([len(at) for at, _ in blocks.values()])
        delta = torch.tensor(list(blocks)).repeat_interleave(lengths)
        total = RULES[mix.rule].join(at, change, delta, shares, len(positions))
        counts.append(_meetings(at, shares[delta] * change, len(positions)))
        before = flat[positions]
        after = (before.to(total.dtype) + mix.scale * total).to(weight.dtype)
        flat[positions] = after
        moved = before.view(signed) != after.view(signed)
        changed.append((positions[moved], before[moved], after[moved]))
    positions, before, after = map(torch.cat, zip(*changed, strict=True))
    entries, collisions, conflicts = map(sum, zip(*counts, strict=True))
    overlap = Overlap(len(deltas), entries, collisions, conflicts, len(positions))
    if not len(positions):
        return None, overlap
    support = Support.of(weight.shape, positions)
    return weight_delta(support, before, after, mark, weight), overlap


def _meetings(at: Tensor, pull: Tensor, size: int) -> tuple[int, int, int]:
    """Entries, collisions and sign conflicts (see `Overlap`) among N changes of `size` entries.

    `pull` ([N]) are the weighted changes, `at` ([N]) tells which entry each is of.
    """
    up = torch.zeros(size, dtype=torch.bool).index_fill_(0, at[pull > 0], True)
    down = torch.zeros(size, dtype=torch.bool).index_fill_(0, at[pull < 0], True)
    several = torch.bincount(at, minlength=size) > 1
    return size, int(several.sum()), int((up & down).sum())


def _blocks(parts: Sequence[SparseChange], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ranges of the flat weight, in each of which the parts have up to ENTRIES_AT_ONCE entries."""
    if high - low > 1 and sum(part.count(low, high) for part in parts) > ENTRIES_AT_ONCE:
        middle = (low + high) // 2
        yield from _blocks(parts, low, middle)
        yield from _blocks(parts, middle, high)
    else:
        yield low, high
