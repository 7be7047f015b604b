"""The units that are chosen as one: single entries, blocks, rows or columns of a weight."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from sift_cli.errors import SiftError

BY_ROWS = ("entry", "row")  # those of which a unit lies in one row of a weight


@dataclass(frozen=True)
class Units:
    """One weight cut into `count` units of `size` entries each, numbered row by row.

    `shape` is [outputs, inputs] for a matrix. `transposed` says that the weight is stored as
    [inputs, outputs] (GPT-2's Conv1D). A row holds what one output neuron reads, a column what one
    input feeds; blocks are `block` x `block`, and what is left over at the edges takes no part.
    Each entry of a tensor that is no matrix is a unit.
    """

    shape: tuple[int, ...]
    structure: str = "entry"
    block: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, name: str, weight: Tensor, structure: str, block: int, transposed: bool) -> "Units":
        """The units of the weight called `name`; raises SiftError where a block does not fit."""
        shape = tuple(weight.shape)
        if len(shape) != 2:
            return cls(shape)
        if structure == "block" and block > min(shape):
            raise SiftError(
                f"selection.block_size: a block of {block} x {block} does not fit into {name} of "
                f"{shape[0]} x {shape[1]}; take at most {min(shape)}, or selection.exclude it"
            )
        return cls(shape[::-1] if transposed else shape, structure, block, transposed)

    def of_rows(self, count: int) -> "Units":
        """The units of so many of its rows, as stored, of which each holds whole units."""
        return replace(self, shape=(count, *self.shape[1:]))

    @property
    def grid(self) -> tuple[int, int]:
        """Number of units down and across."""
        if len(self.shape) != 2:
            return 1, prod(self.shape)
        high, wide = self.box
        return self.shape[0] // high, self.shape[1] // wide

    @property
    def count(self) -> int:
        """Number of units."""
        return prod(self.grid)

    @property
    def size(self) -> int:
        """Entries in each unit."""
        if len(self.shape) != 2:
            return 1
        return prod(self.box)

    @property
    def box(self) -> tuple[int, int]:
        """Height and width of each unit of a matrix."""
        rows, columns = self.shape
        return {
            "entry": (1, 1),
            "row": (1, columns),
            "column": (rows, 1),
            "block": (self.block, self.block),
        }[self.structure]

    def turned(self, tensor: Tensor) -> Tensor:
        """A tensor of the stored shape as [outputs, inputs]; a view."""
        return tensor.t() if self.transposed else tensor

    def mean(self, scores: Tensor) -> Tensor:
        """The mean score of each unit, [down, across], from one per entry."""
        if self.size == 1:
            return scores.reshape(self.grid)
        (down, across), (high, wide) = self.grid, self.box
        covered = scores[: down * high, : across * wide]
        return covered.reshape(down, high, across, wide).float().mean((1, 3))

    def positions(self, units: Tensor) -> Tensor:
        """The entries of the given units, as positions in the stored weight; in no order."""
        if len(self.shape) != 2:
            return units
        (_, across), (high, wide) = self.grid, self.box
        rows, columns = self.shape
        top, left = units // across * high, units % across * wide
        row = top[:, None, None] + torch.arange(high, device=units.device)[:, None]
        column = left[:, None, None] + torch.arange(wide, device=units.device)
        flat = column * rows + row if self.transposed else row * columns + column
        return flat.reshape(-1)

    def holding(self, positions: Tensor) -> Tensor:
        """The number of the unit that holds each of the given positions of the stored weight."""
        if len(self.shape) != 2:
            return positions
        (_, across), (high, wide) = self.grid, self.box
        row, column = self.cells(positions)
        return row // high * across + column // wide

    def cells(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the input of the entries at the given positions of the stored matrix."""
        rows, columns = self.shape
        if self.transposed:
            return positions % rows, positions // rows
        return positions // columns, positions % columns
