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
    weight: nn.Parameter
    support: Support
    start: int
    stop: int

    @property
    def span(self) -> slice:
        """Where the segment lies in the flat buffer."""
        return slice(self.start, self.stop)


def segments_of(
    model: nn.Module, supports: Mapping[str, Support], offload: bool = False
) -> list[Segment]:
    """The supports that hold anything, in the order of the model's parameters.

    With `offload` they are for a flat buffer on the host.
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
    if offload or not writes_at_once(segments):
        return segments
    return _one_tensor_of_positions(segments)


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


def merged(held: Tensor, came: Tensor, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Two sorted rows of positions without a common one ([n], [k]) as one, and their columns.

    `kept` ([..., n]) and `new` ([..., k]) follow the positions. Nothing is sorted again: the cost
    is n + k log n.
    """
    came = came.to(held.dtype)  # a support of every entry has int64 positions, others int32
    size = len(held) + len(came)
    at = torch.searchsorted(held, came) + torch.arange(len(came), device=came.device)
    stays = torch.ones(size, dtype=torch.bool, device=held.device)
    stays[at] = False
    positions, columns = held.new_empty(size), kept.new_empty((*kept.shape[:-1], size))
    positions[stays], positions[at] = held, came
    columns[..., stays], columns[..., at] = kept, new
    return positions, columns


def origin_of(old: Segment | None, new: Segment) -> Tensor:
    """Where each entry of a segment lay in the flat buffer before, -1 where it did not."""
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
    """What writes a flat buffer into the weights: few calls, whatever the number of weights.

    Modules that train whole are one foreach copy. Entries are one launch per dtype on a GPU; a CPU
    has no launches to save, and from the host (`offload`) each weight's share is sent by itself.
    """
    whole = [segment for segment in segments if segment.support.positions is None]
    some = [segment for segment in segments if segment.support.positions is not None]
    launches = []
    if not offload and writes_at_once(segments):
        from sift_cli.sparse.gpu import Scatter

        for _, group in groupby(sorted(some, key=_kind), _kind):
            parts = list(group)
            first = parts[0].support.positions
            assert first is not None
            positions = first._base if first._base is not None else first
            launches.append((Scatter([one.span for one in parts], positions), parts))
        some = []

    def write(flat: Tensor) -> None:
        if whole:
            into = [segment.weight.detach().view(-1) for segment in whole]
            torch._foreach_copy_(into, [flat[segment.span] for segment in whole])
        for scatter, parts in launches:
            scatter([segment.weight.detach() for segment in parts], flat)
        for segment in some:
            segment.support.scatter_(segment.weight, flat[segment.span])

    return write


def writes_at_once(segments: Sequence[Segment]) -> bool:
    """Whether all entries are written by Triton: on one GPU, where it is installed."""
    devices = {segment.weight.device for segment in segments}
    return len(devices) == 1 and takes_triton(devices.pop())


def _one_tensor_of_positions(segments: Sequence[Segment]) -> list[Segment]:
    """The same segments, where the positions of each dtype of weights are views of one tensor."""
    shared = {}
    some = [segment for segment in segments if segment.support.positions is not None]
    for _, group in groupby(sorted(some, key=_kind), _kind):
        parts = list(group)
        found = [one.support.positions for one in parts if one.support.positions is not None]
        together = torch.cat(found)
        for part, positions in zip(parts, together.split([len(one) for one in found]), strict=True):
            shared[part.name] = Support(part.support.shape, positions)
    return [
        replace(segment, support=shared.get(segment.name, segment.support)) for segment in segments
    ]


def _kind(segment: Segment) -> str:
    assert segment.support.positions is not None
    return f"{segment.weight.dtype} {segment.support.positions.dtype}"
