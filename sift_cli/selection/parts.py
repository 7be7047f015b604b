"""What of a weight is scored in a process: all of it, or some of its rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sift_cli.selection.budget import largest, share
from sift_cli.selection.structures import Units
from sift_cli.sparse import Support
from sift_cli.sparse.local import Shards, local_of


@dataclass(frozen=True, eq=False)
class Retained:
    """A support to retain but for the share `drop` of its units: those that changed least.

    `change` is how far each entry is from the base, [K].
    """

    support: Support
    change: Tensor
    drop: float


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a weight that are scored here, and their `units`; all where it is not shared out.

    In the whole weight `before` entries come ahead of these.
    """

    rows: Tensor
    units: Units
    before: int = 0

    @classmethod
    def of(cls, weight: Tensor, units: Units, shards: Shards | None) -> "Part":
        """That of a weight whose units are `units`, by how it lies on several ranks."""
        rows = local_of(weight.detach())
        if shards is None:
            return cls(rows, units)
        return cls(rows, units.of_rows(len(rows)), shards.before(weight.shape))

    def staying(self, retained: Retained, joined: Callable[[Tensor], Tensor]) -> Tensor:
        """The numbers of the units that win before any other: not the least changed of all.

        `joined` gives what all ranks that share the weight hold, one after the other.
        """
        device, positions = retained.change.device, retained.support.positions
        if positions is None:
            positions = torch.arange(retained.support.size, device=device)
        held = self.units.holding(positions.long().to(device))
        unit, place = held.unique(return_inverse=True)
        moved = torch.zeros(len(unit), device=device).index_add_(0, place, retained.change.float())
        first = self.before // self.units.size
        every, moved = joined(unit + first), joined(moved)
        stay = every[largest(moved, len(every) - share(retained.drop, len(every)))] - first
        return stay[(stay >= 0) & (stay < self.units.count)]
