"""Where each weight's entries lie in the flat buffer, and how the buffer gets into the weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from sift_cli.sparse.kernels import takes_triton
from sift_cli.sparse.support import Support


@dataclass(frozen=True, eq=False)
class Segment:
    """One weight's share of the flat buffer: entries [start, stop)."""

    name: str
    weight: Tensor
    support: Support
    start: int
    stop: int

    @property
    def span(self) -> slice:
        """Where the segment lies in the flat buffer."""
        return slice(self.start, self.stop)


def segments_of(model: nn.Module, supports: Mapping[str, Support]) -> list[Segment]:
    """A segment for each support that holds entries, in the order of the model's parameters.

    Raises KeyError for a name that the model lacks, ValueError for a support of another shape or
    where no entry is selected.
    """
    named = dict(model.named_parameters())
    unknown = [name for name in supports if name not in named]
    if unknown:
        raise KeyError(f"the model has no parameter {unknown[0]}")
    segments, start = [], 0
    for name, weight in named.items():
        support = supports.get(name)
        if support is None or not len(support):
            continue
        if support.shape != tuple(weight.shape):
            raise ValueError(f"{name}: the support is of shape {support.shape}")
        on_device = support.to(weight.device)
        segments.append(Segment(name, weight, on_device, start, start + len(support)))
        start += len(support)
    if not segments:
        raise ValueError("no entry is selected")
    return segments


def positions_of(support: Support, where: Tensor) -> Tensor:
    """The positions of those entries of a support that `where` ([K], bool) marks."""
    if support.positions is None:
        return where.nonzero().flatten()
    return support.positions[where.to(support.positions.device)]


def find(positions: Tensor, among: Tensor) -> Tensor:
    """Where each of `positions` stands in the sorted `among`, -1 where it does not; int64."""
    if not len(among):
        return torch.full(positions.shape, -1, dtype=torch.int64, device=positions.device)
    place = torch.searchsorted(among, positions).clamp_(max=len(among) - 1)
    return torch.where(among[place] == positions, place, -1)


def merged(
    old: Tensor, new: Tensor, old_values: Tensor, new_values: Tensor
) -> tuple[Tensor, Tensor]:
    """The union of two disjoint sorted lists of positions ([n], [k]), sorted, and its values.

    `old_values` ([..., n]) and `new_values` ([..., k]) follow their positions; the dtypes are those
    of the old. Nothing is sorted again: the cost is n + k log n.
    """
    size, new = len(old) + len(new), new.to(old.dtype)
    at = torch.searchsorted(old, new) + torch.arange(len(new), device=new.device)
    from_old = torch.ones(size, dtype=torch.bool, device=old.device)
    from_old[at] = False
    positions = old.new_empty(size)
    values = old_values.new_empty((*old_values.shape[:-1], size))
    positions[from_old], positions[at] = old, new
    values[..., from_old], values[..., at] = old_values, new_values
    return positions, values


def origin_of(old: Segment | None, new: Segment) -> Tensor:
    """Where each entry of `new` lay in the flat buffer before, -1 where it did not train: [K].

    `old` is the same weight's segment before, None where none of it trained; int64.
    """
    count, device = len(new.support), new.weight.device
    if old is None:
        return torch.full((count,), -1, device=device)
    before, after = old.support.positions, new.support.positions
    if before is None:
        place = torch.arange(count, device=device) if after is None else after.long()
    elif after is None:
        place = torch.full((count,), -1, device=device)
        place[before.long()] = torch.arange(len(before), device=device)
    else:
        place = find(after, before)
    return torch.where(place >= 0, place + old.start, -1)


def writer(segments: Sequence[Segment], offload: bool = False) -> Callable[[Tensor], None]:
    """A function that writes a flat buffer into the weights, in few calls for any number of them.

    Weights that train in full take one foreach copy. Those of which some entries train take one
    launch per dtype on a GPU; a CPU has no launches to save, and from the host (`offload`) each
    weight's entries are sent by themselves.
    """
    full = [segment for segment in segments if segment.support.positions is None]
    partial = [segment for segment in segments if segment.support.positions is not None]
    launches = []
    if not offload and writes_at_once(segments):
        from sift_cli.sparse.gpu import Scatter

        for _, group in groupby(sorted(partial, key=_kind), _kind):
            parts = list(group)
            first = parts[0].support.positions
            assert first is not None
            # The parts' positions are views of one tensor: `at_once` saw to that.
            positions = first._base if first._base is not None else first
            launches.append((Scatter([part.span for part in parts], positions), parts))
        partial = []

    def write(flat: Tensor) -> None:
        if full:
            into = [segment.weight.detach().view(-1) for segment in full]
            torch._foreach_copy_(into, [flat[segment.span] for segment in full])
        for scatter, parts in launches:
            scatter([segment.weight.detach() for segment in parts], flat)
        for segment in partial:
            segment.support.scatter_(segment.weight, flat[segment.span])

    return write


def writes_at_once(segments: Sequence[Segment]) -> bool:
    """Whether all entries are written by Triton: on one GPU, where it is installed."""
    devices = {segment.weight.device for segment in segments}
    return len(devices) == 1 and takes_triton(devices.pop())


def at_once(segments: list[Segment]) -> list[Segment]:
    """The same segments, as `writer` can write them at once where that is possible.

    Their positions are views of one tensor for each dtype of weights: what one launch of
    `gpu.Scatter` reads.
    """
    if not writes_at_once(segments):
        return segments
    shared = {}
    partial = [segment for segment in segments if segment.support.positions is not None]
    for _, group in groupby(sorted(partial, key=_kind), _kind):
        parts = list(group)
        own = [part.support.positions for part in parts if part.support.positions is not None]
        views = torch.cat(own).split([len(positions) for positions in own])
        for part, positions in zip(parts, views, strict=True):
            shared[part.name] = Support(part.support.shape, positions)
    return [
        replace(segment, support=shared.get(segment.name, segment.support)) for segment in segments
    ]


def _kind(segment: Segment) -> str:
    assert segment.support.positions is not None
    return f"{segment.weight.dtype} {segment.support.positions.dtype}"
