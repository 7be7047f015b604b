"""The gradient of the trained entries of one weight, computed without that of the others.

Letters for dimensions: T tokens, m x n the weight, K its trained entries, u and v the rows and
columns that hold any.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import gcd

import torch
from torch import Tensor

from sift_cli.sparse.support import LARGEST_INT32, Support

Gradient = Callable[[Tensor, Tensor], Tensor]

# Costs on a CPU in units of what one entry costs in a dense product, measured over MiniLM and
# BERT-base shapes with 350 to 2240 tokens: one entry of a sampled product, and the transposition
# of one row or column that a sampled product asks for.
SAMPLED_ENTRY = 5
TRANSPOSED = 80
# The same on a GPU, for the kernel of `gpu.py` and, where there is no Triton, for cuSPARSE's, which
# reads fp32 alone: by the bandwidth of an H200's cache and the rate of its tensor cores in
# bfloat16. Not measured yet; benchmarks/products.py does.
TRITON_ENTRY = 200
CUSPARSE_ENTRY = 500
# Share of an axis above which leaving the rest out costs more than it saves.
CROWDED = 0.8


@dataclass(frozen=True, eq=False)
class Kernel:
    """How one weight's gradient is computed.

    `gradient` maps output gradients [T, m] and those input columns that `columns` names ([u],
    sorted; None: all of them) to the gradient of the support, [K] in fp32 or wider.
    """

    name: str
    gradient: Gradient
    columns: Tensor | None = None


def dense(support: Support) -> Kernel:
    """The reference: the whole gradient, gathered and freed."""

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        return widen(support.gather(grad_out.t() @ inputs))

    return Kernel("dense", gradient)


def product(support: Support, axes: "tuple[Axis, Axis] | None" = None) -> Kernel:
    """A dense product of the rows and columns that hold anything, and a gather where it has gaps.

    All there is to do for whole rows and whole columns. `axes` are both of the support's.
    """
    rows, columns = axes or (Axis.of(support, 0), Axis.of(support, 1))
    used, within = rows.used, None
    area = rows.count * columns.count
    if area > len(support):
        within = support.positions
        if area < support.size:
            within = rows.local * columns.count + columns.local
            within = within.to(torch.int32 if area <= LARGEST_INT32 else torch.int64)

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        grads = take(grad_out, used).t() @ inputs
        return widen(grads.reshape(-1) if within is None else grads.reshape(-1)[within])

    return Kernel("product", gradient, columns.used)


def sampled(support: Support) -> Kernel:
    """K dot products of length T, by MKL or cuSPARSE; fp32 and fp64 as they are, wider the rest."""
    return _sampled(support, Axis.of(support, 0), Axis.of(support, 1))


def _sampled(support: Support, rows: "Axis", columns: "Axis") -> Kernel:
    row_starts, used, count = _row_starts(rows), rows.used, columns.count
    column_of = columns.local.to(torch.int32)

    def pattern(dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(len(column_of), dtype=dtype, device=column_of.device)
        size = (len(row_starts) - 1, count)
        return torch.sparse_csr_tensor(
            row_starts, column_of, zeros, size=size, check_invariants=False
        )

    with warnings.catch_warnings():  # said once per process: here, not in the backward thread
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern(torch.float32)

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        # Transposed first: left to itself, the product does it at several times the cost.
        left = widen(take(grad_out, used)).t().contiguous()
        right = widen(inputs).t().contiguous().t()
        values: Tensor = torch.sparse.sampled_addmm(
            pattern(left.dtype), left, right, beta=0.0
        ).values()
        return values

    return Kernel("sampled", gradient, columns.used)


def triton(support: Support) -> Kernel:
    """K dot products of length T in one launch of a Triton kernel, of any dtype of input."""
    return _triton(support, Axis.of(support, 0), Axis.of(support, 1))


def _triton(support: Support, rows: "Axis", columns: "Axis") -> Kernel:
    from sift_cli.sparse.gpu import chunks, sampled_product

    pieces, column_of = chunks(_row_starts(rows)), columns.local.to(torch.int32)
    used = rows.used

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        left = take(grad_out, used).t().contiguous()
        wide = torch.promote_types(left.dtype, torch.float32)
        out = torch.empty(len(column_of), dtype=wide, device=left.device)
        sampled_product(left, inputs.t().contiguous(), column_of, pieces, out)
        return out

    return Kernel("triton", gradient, columns.used)


def _row_starts(rows: "Axis") -> Tensor:
    """Where the entries of each row begin, and where the last ends: int32 [count + 1]."""
    ends = torch.arange(rows.count + 1, device=rows.local.device)
    return torch.searchsorted(rows.local, ends, out_int32=True)


def blocks(support: Support, size: int) -> Kernel:
    """One small product for each block of `size` x `size`; all blocks must be whole and aligned.

    Raises ValueError where they are not.
    """
    tiles = _tiles(support, size)
    if tiles is None:
        raise ValueError(f"the support is not made of whole blocks of {size} x {size}")
    tile_rows, tile_columns = tiles
    bands, band = tile_rows.unique(return_inverse=True)
    stripes, stripe = tile_columns.unique(return_inverse=True)
    rows, columns = _spread(bands, size), _spread(stripes, size)
    order = _block_order(support, size)

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        left = grad_out.index_select(1, rows).t().reshape(len(bands), size, -1)
        right = inputs.reshape(len(inputs), len(stripes), size).transpose(0, 1)
        grads = left.index_select(0, band) @ right.index_select(0, stripe)
        return widen(grads.reshape(-1)[order])

    return Kernel("blocks", gradient, columns)


KERNELS: dict[str, Callable[[Support], Kernel]] = {  # those that take any support
    "dense": dense,
    "product": product,
    "sampled": sampled,
    "triton": triton,
}


def choose(support: Support, device: torch.device) -> Kernel:
    """The kernel that is fastest for this support on this device, by the measured costs above."""
    if support.positions is None:
        return dense(support)
    rows, columns = Axis.of(support, 0), Axis.of(support, 1)
    few = samples(len(support), rows.count, columns.count, device)
    if not few:
        return product(support, (rows, columns))
    return (_triton if takes_triton(device) else _sampled)(support, rows, columns)


def samples(entries: int, rows: int, columns: int, device: torch.device) -> bool:
    """Whether so many entries in so many rows and columns are worth a sampled product."""
    area = rows * columns
    if device.type == "cuda":
        return (TRITON_ENTRY if takes_triton(device) else CUSPARSE_ENTRY) * entries < area
    return SAMPLED_ENTRY * entries + TRANSPOSED * (rows + columns) < area


def takes_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a GPU, where it is installed."""
    return device.type == "cuda" and find_spec("triton") is not None


@dataclass(frozen=True, eq=False)
class Axis:
    """The rows (or columns) that a support uses: `used` ([u], None for all `count` of them), and
    `local` ([K]), the place of each entry's row (or column) among them."""

    used: Tensor | None
    local: Tensor
    count: int

    @classmethod
    def of(cls, support: Support, axis: int) -> "Axis":
        """Those of axis 0 (rows) or 1 (columns) of a 2-d support."""
        indices = indices_of(support)[axis]
        size = support.shape[axis]
        used, local = indices.unique(return_inverse=True)
        if len(used) > CROWDED * size:
            return cls(None, indices, size)
        return cls(used, local, len(used))


def take(values: Tensor, used: Tensor | None) -> Tensor:
    """The columns `used` (None: all) of `values`."""
    return values if used is None else values.index_select(-1, used)


def indices_of(support: Support) -> tuple[Tensor, Tensor]:
    """Row and column of every entry of a 2-d support, two of shape [K]."""
    rows, columns = support.shape
    positions = support.positions
    if positions is None:
        positions = torch.arange(rows * columns)
    positions = positions.long()
    return positions // columns, positions % columns


def block_size(support: Support) -> int:
    """The largest b for which the support is made of whole, aligned blocks of b x b; at least 1."""
    rows, columns = indices_of(support)
    first = int((rows == rows[0]).sum())
    common = gcd(first, int(columns[0]), int(rows[0]), *support.shape)
    for size in range(min(common, int(len(support) ** 0.5)), 1, -1):
        if common % size == 0 and _tiles(support, size) is not None:
            return size
    return 1


def widen(tensor: Tensor) -> Tensor:
    """At least fp32; fp64 stays fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _tiles(support: Support, size: int) -> tuple[Tensor, Tensor] | None:
    """Row and column of each tile, in row-major order; None where a tile has gaps."""
    across = -(-support.shape[1] // size)
    rows, columns = indices_of(support)
    tiles, counts = (rows // size * across + columns // size).unique(return_counts=True)
    if not bool((counts == size * size).all()):
        return None
    return tiles // across, tiles % across


def _spread(tiles: Tensor, size: int) -> Tensor:
    """The indices that tiles of `size` cover along one axis."""
    return (tiles[:, None] * size + torch.arange(size, device=tiles.device)).reshape(-1)


def _block_order(support: Support, size: int) -> Tensor:
    """Where each entry of the support lies in a list of blocks of [size, size], [K]."""
    across = -(-support.shape[1] // size)
    rows, columns = indices_of(support)
    tile = rows // size * across + columns // size
    place = tile.unique(return_inverse=True)[1]
    order: Tensor = place * size * size + rows % size * size + columns % size
    return order
