"""Triton kernels: a sampled product, and one scatter for all weights.

Importing this module imports Triton; only code that runs on a GPU does so.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 32  # of one row, handled by one program of the sampled product
TOKENS = 64  # read at a time
VALUES = 1024  # written by one program of the scatter


def chunks(starts: Tensor) -> Tensor:
    """Cuts [starts[i], starts[i + 1]) into pieces of at most ENTRIES: i, from, to; int32 [C, 3].

    `starts` [R + 1] is int32, as the row pointers of a CSR matrix.
    """
    return _cut(starts, ENTRIES)


def sampled_product(
    left: Tensor, right: Tensor, columns: Tensor, pieces: Tensor, out: Tensor
) -> None:
    """out[k] = left[row of k] . right[columns[k]] for every entry k, summed in the dtype of `out`.

    `left` [u, T] and `right` [v, T] are contiguous, `columns` [K] is int32, `pieces` come from
    `chunks`, `out` [K] is fp32 or fp64.
    """
    _sampled[(len(pieces),)](
        left, right, columns, pieces, out, left.shape[1], ENTRIES=ENTRIES, TOKENS=TOKENS
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sampled(  # type: ignore[no-untyped-def]
    left, right, columns, pieces, out, tokens, ENTRIES: tl.constexpr, TOKENS: tl.constexpr
):
    piece = tl.program_id(0)
    row = tl.load(pieces + piece * 3).to(tl.int64)
    entries = tl.load(pieces + piece * 3 + 1) + tl.arange(0, ENTRIES)
    there = entries < tl.load(pieces + piece * 3 + 2)
    column = tl.load(columns + entries, mask=there, other=0).to(tl.int64)
    wide = out.dtype.element_ty
    total = tl.zeros((ENTRIES,), dtype=wide)
    for start in range(0, tokens, TOKENS):
        at = start + tl.arange(0, TOKENS)
        inside = at < tokens
        grads = tl.load(left + row * tokens + at, mask=inside, other=0).to(wide)
        both = there[:, None] & inside[None, :]
        inputs = tl.load(right + column[:, None] * tokens + at[None, :], mask=both, other=0)
        total += tl.sum(inputs.to(wide) * grads[None, :], axis=1)
    tl.store(out + entries, total, mask=there)


class Scatter:
    """Writes parts of one flat tensor into many weights of one dtype, in one launch.

    Part i is `spans[i]` of the flat tensor and goes to weight i. `positions` holds the places in
    the flattened weights, part after part, in one tensor.
    """

    def __init__(self, spans: Sequence[slice], positions: Tensor) -> None:
        counts = torch.tensor([0, *(span.stop - span.start for span in spans)])
        starts = counts.cumsum(0)
        pieces = _cut(starts, VALUES)
        shift = torch.tensor([span.start for span in spans]) - starts[:-1]
        columns = [pieces, shift[pieces[:, 0].long()].to(pieces.dtype)[:, None]]
        self._pieces = torch.cat(columns, dim=1).to(positions.device)
        self._positions = positions
        self._addresses: list[int] = []
        self._table = torch.empty(0)

    def __call__(self, weights: Sequence[Tensor], values: Tensor) -> None:
        """Writes `values` (the flat tensor), rounded to the weights' dtype; all contiguous."""
        addresses = [weight.data_ptr() for weight in weights]
        if addresses != self._addresses:
            self._addresses = addresses
            self._table = torch.tensor(addresses, device=values.device)
        rounded = values.to(weights[0].dtype)
        _scatter[(len(self._pieces),)](
            self._table, self._positions, rounded, self._pieces, VALUES=VALUES
        )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scatter(table, positions, values, pieces, VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    piece = pieces + tl.program_id(0) * 4
    weight = tl.load(table + tl.load(piece)).to(tl.pointer_type(values.dtype.element_ty))
    at = tl.load(piece + 1) + tl.arange(0, VALUES)
    there = at < tl.load(piece + 2)
    position = tl.load(positions + at, mask=there, other=0)
    value = tl.load(values + (at + tl.load(piece + 3)), mask=there, other=0)
    tl.store(weight + position, value, mask=there)


def _cut(starts: Tensor, size: int) -> Tensor:
    starts = starts.long()
    counts = starts[1:] - starts[:-1]
    pieces = (counts + size - 1) // size
    part = torch.arange(len(counts), device=starts.device).repeat_interleave(pieces)
    first = pieces.cumsum(0) - pieces
    begin = starts[part] + (torch.arange(len(part), device=starts.device) - first[part]) * size
    end = torch.minimum(begin + size, starts[part + 1])
    cut = torch.stack([part, begin, end], dim=1)
    return cut.to(torch.int32 if int(starts[-1]) < 2**31 else torch.int64)
