"""The coordinates in which the trained entries are held: entry = centre + scale * master."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sift_cli.sparse.segments import Segment
from sift_cli.sparse.support import Support
from sift_cli.sparse.touched import Touched


@dataclass(frozen=True, eq=False)
class InputScale:
    """One scale for each input of a matrix: how far its entries go beside others, [inputs].

    All are powers of two, so that an entry divided by its scale and multiplied again is the same
    entry, bit for bit. `transposed` says that the weight is stored as [inputs, outputs].
    """

    values: Tensor
    transposed: bool = False

    def of(self, support: Support) -> Tensor:
        """The scale of each entry of a support, [K]."""
        positions = support.positions
        if positions is None:
            positions = torch.arange(support.size, device=self.values.device)
        wide = support.shape[1]
        inputs = positions // wide if self.transposed else positions % wide
        return self.values.to(inputs.device)[inputs.long()]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """How masters stand for entries; nothing given, a master is its entry.

    Weights in `scales` hold their entries divided by the scale of their input: AdamW, which moves
    every master by the learning rate, moves these entries by the rate times their scale. Weights in
    `centred` hold the change from the base, so that weight decay pulls them there.
    """

    scales: Mapping[str, InputScale] = field(default_factory=dict)
    centred: Collection[str] = ()

    def scale(self, segments: Sequence[Segment], flat: Tensor) -> Tensor | None:
        """The scale of every entry, like `flat` ([K]); None where all are one."""
        if not any(segment.name in self.scales for segment in segments):
            return None
        scale = torch.ones_like(flat)
        for segment in segments:
            if segment.name in self.scales:
                scale[segment.span] = self.scales[segment.name].of(segment.support).to(flat)
        return scale

    def centre(self, segments: Sequence[Segment], flat: Tensor, base: Touched) -> Tensor | None:
        """What a master of 0 stands for, like `flat` ([K]); None where that is 0 for all."""
        if not any(segment.name in self.centred for segment in segments):
            return None
        centre = torch.zeros_like(flat)
        for segment in segments:
            if segment.name in self.centred:
                centre[segment.span] = base.values(segment.name, segment.support).to(flat)
        return centre


PLAIN = Coordinates()
