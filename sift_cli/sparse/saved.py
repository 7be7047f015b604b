"""What a linear layer saves of its input for the backward pass: as little as gives it back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 1 / 8  # share of columns up to which a copy of them is cheaper than computing them again
HALF = 1 / 2  # and up to which it is made where they cannot, since it is smaller than the input


@dataclass(frozen=True, eq=False)
class Saved:
    """Tensors for the backward pass, and what computes the input's columns from them.

    `columns(*tensors)` gives [T, u], T tokens and u columns.
    """

    tensors: tuple[Tensor, ...]
    columns: Callable[..., Tensor]


def to_save(x: Tensor, columns: Tensor | None) -> Saved:
    """What to save of an input [..., n] of which the backward pass needs `columns` (None: all).

    The output of GELU, a product or layer normalisation is computed again from what these save for
    their own backward pass, at no memory; else the columns are copied where that is smaller.
    """
    share = 1.0 if columns is None else len(columns) / x.shape[-1]
    made = None if share <= FEW else _made_by(x)
    if made is not None:
        return Saved(made.tensors, lambda *sources: made.columns(*sources, columns))
    if share <= HALF:
        return Saved((_take(x.detach(), columns),), _same)
    return Saved((x.detach(),), lambda every: _take(every, columns))


def _made_by(x: Tensor) -> Saved | None:
    """What the operation that made `x` saves; None where `x` cannot be computed from that.

    `columns` takes the indices as its last argument.
    """
    if torch.compiler.is_compiling() or _hooks():
        return None
    node: Any = x.grad_fn
    if node is None:
        return None
    match node.name():
        case "GeluBackward0":
            approximate = node._saved_approximate
            return Saved(
                (node._saved_self,),
                lambda source, columns: F.gelu(_take(source, columns), approximate=approximate),
            )
        case "MulBackward0":
            factors = (node._saved_self, node._saved_other)
            if all(factor is not None and factor.shape == x.shape for factor in factors):
                return Saved(factors, _product)
        case "NativeLayerNormBackward0" if len(node._saved_normalized_shape) == 1:
            saved = (node._saved_input, node._saved_result1, node._saved_result2)
            scale, shift = node._saved_weight, node._saved_bias
            if scale is not None and shift is not None:
                return Saved((*saved, scale, shift), _normalised)
    return None


def _hooks() -> bool:
    """Whether saved tensors are being packed away, as under gradient checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _product(left: Tensor, right: Tensor, columns: Tensor | None) -> Tensor:
    return _take(left, columns) * _take(right, columns)


def _normalised(
    x: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor, shift: Tensor, columns: Tensor | None
) -> Tensor:
    if columns is not None:
        scale, shift = scale[columns], shift[columns]
    centred = _take(x, columns) - mean.reshape(-1, 1)
    return centred.mul_(inverse.reshape(-1, 1)).mul_(scale).add_(shift)


def _take(x: Tensor, columns: Tensor | None) -> Tensor:
    """Columns of [..., n], as [T, u]."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if columns is None else flat.index_select(1, columns)


def _same(columns: Tensor) -> Tensor:
    return columns
