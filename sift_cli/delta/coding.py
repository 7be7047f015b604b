"""Positions of a weight's changed entries as a byte stream: gaps in Rice code.

Golomb 1966; Rice and Plaunt 1971. The parts of the code are kept apart (parameters, low bits plane
by plane, high bits in unary), so that numpy decodes each part of a run at once.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sift_cli.delta.planes import Bytes
from sift_cli.sparse.support import LARGEST_INT32

BLOCK = 64  # gaps that share a parameter; a multiple of 8, so that blocks start at whole bytes
RUN = 1 << 16  # gaps coded together: what is at work at a time stays in the processor's cache
ROWS, COLUMNS = 0, 1  # the order that positions are counted in: the first byte of a stream
LARGEST_SIZE = 2**62  # entries of a weight: a position and a gap add up in int64
SPREAD = 8  # rows and columns to an entry, beyond which positions never go by columns
WORTH = 1.01  # by how much the order by columns must win: it takes longer to decode

Positions = NDArray[np.signedinteger]


def encode_positions(positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Codes sorted unique positions ([K], integers) in a weight of `shape` as uint8 ([B]).

    `docs/delta-format.md` specifies the code. Positions go by rows or by columns, whichever is
    shorter: gradients are products of a row's and a column's part, so their largest entries cluster
    in both.
    """
    flat = positions.cpu().numpy()
    rows, columns = _matrix(shape)
    stream = _encode(flat, ROWS)
    if _may_go_by_columns(len(flat), rows, columns):
        turned = _encode(_transpose(flat, rows, columns), COLUMNS)
        stream = turned if WORTH * len(turned) < len(stream) else stream
    return torch.from_numpy(stream)


def decode_positions(coded: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """Positions ([count], int32 where the weight's size allows, else int64), ascending.

    Takes memory in proportion to the stream, whatever `count` and `shape` say. Raises ValueError
    where the stream does not hold `count` different positions of such a weight.
    """
    data, size = coded.numpy(), prod(shape)
    if not (0 <= count <= size <= LARGEST_SIZE) or count > 8 * len(data):
        raise ValueError(f"{count} positions do not fit {len(data)} bytes and {size} entries")
    order = int(data[0]) if len(data) else None
    rows, columns = _matrix(shape)
    if order != ROWS and not (order == COLUMNS and _may_go_by_columns(count, rows, columns)):
        raise ValueError(f"unknown order {order} of positions")
    kind = np.int32 if size <= LARGEST_INT32 else np.int64
    positions: Positions = np.empty(count, dtype=kind)
    used, last = 1, -1
    for start in range(0, count, RUN):
        run = positions[start : start + RUN]
        used += _decode_run(data[used:], run, last, size)
        last = int(run[-1])
    if used != len(data):
        raise ValueError(f"{len(data) - used} bytes are left over")
    if order == COLUMNS:
        positions = _transpose(positions, columns, rows)
    return torch.from_numpy(positions)


def _encode(flat: Positions, order: int) -> Bytes:
    parts = [np.array([order], dtype=np.uint8)]
    for start in range(0, len(flat), RUN):
        last = int(flat[start - 1]) if start else -1
        parts += _encode_run(flat[start : start + RUN], last)
    return np.concatenate(parts)


def _encode_run(flat: Positions, last: int) -> list[Bytes]:
    """The parts of one run, which goes on behind the position `last`."""
    count = len(flat)
    gaps = np.zeros((-(-count // BLOCK), BLOCK), dtype=flat.dtype)  # entries skipped
    line = gaps.reshape(-1)
    line[0] = int(flat[0]) - last - 1
    np.subtract(flat[1:], flat[:-1], out=line[1:count])
    line[1:count] -= 1
    parameters = _parameters(gaps, count)
    planes = []
    for plane in range(int(parameters.max())):
        held = parameters > plane
        bits = ((gaps if held.all() else gaps[held]) >> plane).astype(np.uint8) & 1
        planes.append(np.packbits(bits.reshape(-1)[: _values(held, count)], bitorder="little"))
    gaps >>= parameters[:, None].astype(gaps.dtype)
    ones = np.cumsum(line[:count], dtype=np.int64) + np.arange(count)
    unary = np.zeros(int(ones[-1]) + 1, dtype=np.uint8)
    unary[ones] = 1
    packed = np.packbits(unary, bitorder="little")
    length = np.array([len(packed)], dtype="<u4").view(np.uint8)
    return [length, parameters, *planes, packed]


def _decode_run(data: Bytes, out: Positions, last: int, size: int) -> int:
    """Fills `out` from the start of `data`, behind the position `last`; returns the bytes used."""
    count, dtype = len(out), out.dtype
    blocks = -(-count // BLOCK)
    parameters = data[4 : 4 + blocks]
    if len(parameters) < blocks:
        raise ValueError("the stream ends early")
    if int(parameters.max()) >= size.bit_length():
        raise ValueError("a parameter is too large for the weight")
    lows, start = _low_bits(data, parameters, count)
    used = start + int(data[:4].view("<u4")[0])
    unary = np.unpackbits(data[start:used], bitorder="little")
    ones = np.flatnonzero(unary.view(np.bool_))
    if used > len(data) or len(ones) != count or len(unary) - ones[-1] > 8:
        raise ValueError(f"a run holds {len(ones)} positions, not {count}")
    steps = np.ones(lows.shape, dtype=dtype)  # the high bits of a gap, plus one
    line = steps.reshape(-1)
    line[0] = ones[0] + 1
    np.subtract(ones[1:], ones[:-1], out=line[1:count], casting="unsafe")
    highest = np.ldexp((steps.max(axis=1) - 1).astype(np.float64), parameters)
    if float(highest.max()) >= size:
        raise ValueError(f"a position lies beyond the {size} entries of the weight")
    shift = parameters[:, None].astype(dtype)
    steps <<= shift
    steps += lows
    steps += 1 - (np.ones(1, dtype) << shift)
    line[:1] += last
    np.cumsum(line[:count], dtype=dtype, out=out)
    # no step passes 2**31 (2**63), so the first sum that does shows as a negative position
    if int(out.min()) < 0 or int(out.max()) >= size:
        raise ValueError(f"a position lies beyond the {size} entries of the weight")
    return used


def _low_bits(data: Bytes, parameters: Bytes, count: int) -> tuple[NDArray[np.integer], int]:
    """The low bits of a run's gaps ([blocks, BLOCK]), and where in `data` they end."""
    highest, used = int(parameters.max()), 4 + len(parameters)
    kind = next(np.dtype(one) for one in ("u1", "u2", "u4", "i8") if highest <= 8 * int(one[1]))
    lows = np.zeros((len(parameters), BLOCK), dtype=kind)
    for plane in range(highest):
        held = parameters > plane
        length = -(-_values(held, count) // 8)
        packed = data[used : used + length]
        if len(packed) < length:
            raise ValueError("the stream ends early")
        padded = int(np.count_nonzero(held)) * BLOCK
        bits = np.unpackbits(packed, bitorder="little", count=padded).reshape(-1, BLOCK)
        bits = bits.astype(kind, copy=False) << kind.type(plane)
        if len(bits) == len(lows):
            lows |= bits
        else:
            lows[held] |= bits
        used += length
    return lows, used


def _values(held: NDArray[np.bool_], count: int) -> int:
    """How many of a run's gaps lie in the blocks that are `held`; the last block may be short."""
    short = len(held) * BLOCK - count
    return int(np.count_nonzero(held)) * BLOCK - (short if held[-1] else 0)


def _parameters(gaps: Positions, count: int) -> Bytes:
    """The parameter with which each block ([blocks, BLOCK], zeros behind the last) is shortest."""
    lengths = np.full(len(gaps), BLOCK)
    lengths[-1] -= len(gaps) * BLOCK - count
    guess = np.frexp(gaps.sum(axis=1, dtype=np.int64) / lengths)[1]
    best: Positions = np.zeros(len(gaps), dtype=np.int64)
    cost = np.full(len(gaps), np.inf)
    for less in (2, 1, 0):
        tried = np.maximum(guess - less, 0)
        high = (gaps >> tried[:, None].astype(gaps.dtype)).sum(axis=1, dtype=np.int64)
        total = high + lengths * tried
        best = np.where(total < cost, tried, best)
        cost = np.minimum(total, cost)
    return best.astype(np.uint8)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A weight as rows and columns: all axes but the first are one."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _may_go_by_columns(count: int, rows: int, columns: int) -> bool:
    """False where rows and columns have few entries: so no shape makes a reader allocate much."""
    return rows > 1 and columns > 1 and rows + columns <= SPREAD * count


def _transpose(flat: Positions, rows: int, columns: int) -> Positions:
    """Ascending positions in a matrix as ascending positions in its transpose."""
    row, column = np.divmod(flat, flat.dtype.type(columns))
    turned: Positions = column * flat.dtype.type(rows) + row
    turned.sort()
    return turned
