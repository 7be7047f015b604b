"""A rank's part of what trains where weights lie in rows on several: pure functions of supports.

Rows are dealt in order and a support is sorted row by row, so that the entries of a rank are one
run of it. Letters for dimensions: K the entries of all weights, k those that this rank owns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from sift_cli.sparse.segments import Segment
from sift_cli.sparse.support import LARGEST_INT32, Support

Weights = Mapping[str, tuple[Support, Tensor]]  # by name: which entries, and their values


def rows_of(count: int, ranks: int) -> list[range]:
    """The rows of each rank, of `count` in all: equal runs, of which the last are short or empty.

    As `torch.chunk` cuts them.
    """
    each = -(-count // ranks)
    return [range(min(r * each, count), min((r + 1) * each, count)) for r in range(ranks)]


def owned(support: Support, rows: range) -> slice:
    """Which of the support's entries lie in these rows of the weight."""
    first, last = rows.start * _across(support), rows.stop * _across(support)
    if support.positions is None:
        return slice(first, last)
    ends = support.positions.new_tensor([first, last])
    start, stop = torch.searchsorted(support.positions, ends).tolist()
    return slice(start, stop)


def local(support: Support, rows: range) -> Support:
    """The support's entries in these rows, as entries of the rows alone."""
    shape = (len(rows), *support.shape[1:])
    if support.positions is None:
        return Support(shape)
    mine = support.positions[owned(support, rows)].long() - rows.start * _across(support)
    return Support(shape, mine.to(torch.int32 if prod(shape) <= LARGEST_INT32 else torch.int64))


def local_of(weight: Tensor) -> Tensor:
    """The rows of a weight (or of its gradient) that lie here, as a view: all, where none but one
    rank holds it."""
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local().detach()


def whole_of(weight: Tensor) -> Tensor:
    """All of a weight, where several ranks hold some rows each; every rank must ask."""
    full = getattr(weight, "full_tensor", None)
    return weight.detach() if full is None else full().detach()


def _across(support: Support) -> int:
    """Entries in each row; of a vector each entry is one."""
    return prod(support.shape[1:])


@dataclass(frozen=True)
class Shards:
    """How the weights lie on `count` ranks, of which this is number `rank`, and how these talk.

    `reduce` takes a row for each rank ([count, n]) and gives this rank's, summed over all who
    computed a gradient ([n]); `total` sums numbers over the ranks. What all ranks hold one
    after the other ([n of each] -> [sum of n]) `joined` gives to every rank, and `gathered` to the
    main one alone, on the host, and nothing ([0]) to the others.
    """

    count: int
    rank: int
    reduce: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]
    joined: Callable[[Tensor], Tensor]
    gathered: Callable[[Tensor], Tensor]

    def norms(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The 2-norms ([]) of what lies in rows, by name, from those of each rank's `own` rows."""
        if not own:
            return {}
        squares = torch.stack([*own.values()]).double().square()
        whole = self.total(squares).sqrt()
        return dict(zip(own, whole, strict=True))

    def rows(self, shape: Sequence[int], rank: int | None = None) -> range:
        """The rows of a weight of that shape that this rank has, or `rank`."""
        return rows_of(shape[0], self.count)[self.rank if rank is None else rank]

    def before(self, shape: Sequence[int]) -> int:
        """How many entries of a weight of that shape come before this rank's."""
        return self.rows(shape).start * prod(shape[1:])

    def local(self, support: Support) -> Support:
        """This rank's entries of a support, as entries of its own rows."""
        return local(support, self.rows(support.shape))

    def local_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that is whole."""
        rows = self.rows(whole.shape)
        return whole[rows.start : rows.stop]

    def segments(self, whole: Sequence[Segment]) -> list[Segment]:
        """What this rank owns of each of the segments, one after the other."""
        own, start = [], 0
        for segment in whole:
            support = self.local(segment.support)
            stop = start + len(support)
            own.append(Segment(segment.name, local_of(segment.weight), support, start, stop))
            start = stop
        return own

    def own(self, values: Tensor, whole: Sequence[Segment]) -> Tensor:
        """This rank's, [k], of the values of all entries of the segments, [K]."""
        return torch.cat([values[run] for run in _runs(self, whole, self.rank)])

    def whole(self, values: Tensor, whole: Sequence[Segment]) -> Tensor:
        """The values of all entries of the segments, [K], of which each rank has its own, [k].

        On the main rank, and on the host; on the others none ([0]).
        """
        gathered, at = self.gathered(values), 0
        if not len(gathered):
            return gathered
        every = torch.empty_like(gathered)
        for rank in range(self.count):
            for run in _runs(self, whole, rank):
                size = run.stop - run.start
                every[run], at = gathered[at : at + size], at + size
        return every

    def own_entries(self, entries: Weights) -> dict[str, tuple[Support, Tensor]]:
        """This rank's of some entries with their values, as those of its own rows."""
        return {
            name: (
                self.local(support),
                values[owned(support, self.rows(support.shape))],
            )
            for name, (support, values) in entries.items()
        }

    def whole_entries(
        self, entries: Weights, shapes: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, Support, Tensor]]:
        """All of some entries, of which each rank has its own; one weight at a time, in order.

        On the main rank, and on the host; on the others the weights come without entries. `shapes`
        are those of the whole weights. Every rank must go through all of them.
        """
        for name, (support, values) in entries.items():
            shape, mine = tuple(shapes[name]), support.positions
            count = self.total(torch.tensor(len(support), device=values.device))
            if int(count) == prod(shape):
                yield name, Support(shape), self.gathered(values)
                continue
            if mine is None:  # of these rows, not of all
                mine = torch.arange(len(support))
            own = mine.long().to(values.device) + self.before(shape)
            positions = self.gathered(own)
            yield name, Support.of(shape, positions), self.gathered(values)


def _runs(shards: Shards, whole: Sequence[Segment], rank: int) -> Iterator[slice]:
    """Where the entries of a rank lie among those of all, by segment."""
    for segment in whole:
        run = owned(segment.support, shards.rows(segment.support.shape, rank))
        yield slice(segment.start + run.start, segment.start + run.stop)


class Exchange:
    """Gradients that every rank computes of all entries of some segments, and owns in part.

    One buffer [K], in the order of the segments; `add_to` brings to each rank the sum over all of
    what it owns, in one piece: rows for each rank, as long as the longest.
    """

    def __init__(self, shards: Shards, whole: Sequence[Segment], own: Sequence[Segment]) -> None:
        self._shards, self._own, start = shards, own, 0
        self.segments = []
        for segment in whole:
            stop = start + len(segment.support)
            self.segments.append(replace(segment, start=start, stop=stop))
            start = stop
        self._runs = [list(_runs(shards, self.segments, r)) for r in range(shards.count)]
        self.sizes = [sum(run.stop - run.start for run in runs) for runs in self._runs]

    def buffer(self, like: Tensor) -> Tensor:
        """A new one, cleared, of the dtype and on the device of `like`."""
        return like.new_zeros(sum(self.sizes))

    def add_to(self, gradient: Tensor, buffer: Tensor) -> None:
        """Adds this rank's part of the sum to `gradient` ([k]) and clears the buffer."""
        if not self.segments:
            return
        rows = buffer.new_zeros(self._shards.count, max(self.sizes))
        for row, runs in zip(rows, self._runs, strict=True):
            at = 0
            for run in runs:
                row[at : (at := at + run.stop - run.start)] = buffer[run]
        summed, at = self._shards.reduce(rows), 0
        for segment in self._own:
            gradient[segment.span] += summed[at : (at := at + len(segment.support))]
        buffer.zero_()
