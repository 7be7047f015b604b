"""Sorted positions as a byte stream: gaps in LEB128."""

import numpy as np
import torch
from torch import Tensor

SEVEN_BITS = 0x7F
MORE = 0x80
LONGEST = 9  # bytes that 63 bits take


def encode_positions(positions: Tensor) -> Tensor:
    """Codes sorted unique positions ([K], integers) as uint8 ([B]).

    The first number is the first position, each further one the count of entries skipped since the
    one before; a number is seven bits to a byte, low bits first, the top bit set on all but its
    last.
    """
    flat = positions.cpu().numpy().astype(np.int64)
    gaps = np.diff(flat, prepend=-1) - 1
    lengths = np.ones(len(gaps), dtype=np.int64)
    for width in range(1, LONGEST):
        lengths += gaps >= (1 << 7 * width)
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), dtype=np.uint8)
    for at in range(int(lengths.max(initial=0))):
        here = lengths > at
        more = np.where(lengths[here] > at + 1, MORE, 0)
        out[starts[here] + at] = ((gaps[here] >> 7 * at) & SEVEN_BITS) | more
    return torch.from_numpy(out)


def decode_positions(coded: Tensor, count: int, size: int) -> Tensor:
    """Positions ([count], int64) from their code; ValueError where they do not fit `size`."""
    data = coded.numpy()
    ends = np.flatnonzero(data < MORE)
    if len(ends) != count or (len(data) and (not count or ends[-1] != len(data) - 1)):
        raise ValueError(f"the stream holds {len(ends)} whole positions, not {count}")
    if not count:
        return torch.empty(0, dtype=torch.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    within = np.arange(len(data)) - np.repeat(starts, ends - starts + 1)
    if int(within.max()) >= LONGEST:
        raise ValueError("a coded position is too long")
    gaps = np.add.reduceat((data & SEVEN_BITS).astype(np.int64) << 7 * within, starts)
    if int(gaps.max()) >= size:
        raise ValueError(f"a position lies beyond the {size} entries of the weight")
    positions = np.cumsum(gaps + 1) - 1
    if int(positions[-1]) >= size:
        raise ValueError(f"a position lies beyond the {size} entries of the weight")
    return torch.from_numpy(positions)
