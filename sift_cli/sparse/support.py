"""A support: which entries of one weight are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Support:
    """Selected entries of one weight, as sorted unique positions in its flattened (row-major) form.

    `positions` has shape [K], int32 where the weight has fewer than 2**31 entries, else int64;
    None stands for every entry, so that a module trained whole costs no index at all.
    """

    shape: tuple[int, ...]
    positions: Tensor | None = None

    @classmethod
    def of(cls, shape: Sequence[int], positions: Tensor) -> "Support":
        """The support of a weight of `shape` at `positions` ([K], integers, any order).

        Raises ValueError where a position is out of range or named twice.
        """
        shape = tuple(shape)
        size = prod(shape)
        ordered = positions.sort().values
        if len(ordered) and (int(ordered[0]) < 0 or int(ordered[-1]) >= size):
            raise ValueError(f"positions must lie in [0, {size}) for a weight of shape {shape}")
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError("a position occurs twice")
        if len(ordered) == size:
            return cls(shape)
        return cls(shape, ordered.to(torch.int32 if size <= LARGEST_INT32 else torch.int64))

    @property
    def size(self) -> int:
        """Number of entries of the weight."""
        return prod(self.shape)

    def __len__(self) -> int:
        """Number of selected entries, K."""
        return self.size if self.positions is None else len(self.positions)

    def gather(self, weight: Tensor) -> Tensor:
        """The selected entries of a weight (or of its gradient), shape [K]."""
        flat = weight.detach().reshape(-1)
        return flat.clone() if self.positions is None else flat[self.positions]

    def scatter_(self, weight: Tensor, values: Tensor) -> None:
        """Writes `values` ([K], on any device) into the selected entries of `weight`, rounded."""
        flat = weight.detach().view(-1)
        if self.positions is None:
            flat.copy_(values)
        else:
            flat[self.positions] = values.to(flat)

    def half_in(self, dim: int) -> float:
        """The smallest share of a matrix's rows (`dim` 0) or columns (1) that holds half of it.

        Where entries are spread evenly it is a half.
        """
        positions, (_, width) = self.positions, self.shape
        if positions is None:
            positions = torch.arange(self.size)
        places = positions // width if dim == 0 else positions % width
        counts = torch.bincount(places.long().cpu(), minlength=self.shape[dim])
        enough = counts.sort(descending=True).values.cumsum(0) >= len(self) / 2
        return (int(enough.int().argmax()) + 1) / self.shape[dim]

    def to(self, device: torch.device) -> "Support":
        """The same support with its positions on `device`."""
        return self if self.positions is None else Support(self.shape, self.positions.to(device))
