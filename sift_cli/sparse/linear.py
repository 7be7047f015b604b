"""Linear layers whose backward pass computes only the selected entries of the gradient."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_cli.sparse.support import Support

# Where sampled products stop paying on a CPU. Measured over MiniLM and BERT-base shapes and 350 to
# 2240 tokens, sampled over dense time: .2 to .7 at 1 %, .35 to .8 at 5 %, about 1.0 at 10 % and
# 1.5 at 20 %.
SAMPLED_BELOW = 0.1

Gradient = Callable[[Tensor, Tensor], Tensor]


def dense_gradient(support: Support) -> Gradient:
    """The reference: the whole gradient of one weight, then a gather.

    The returned function maps output gradients [T, m] and inputs [T, n] to [K] fp32 (or wider).
    """

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        return widen(support.gather(grad_out.t() @ inputs))

    return gradient


def sampled_gradient(support: Support) -> Gradient:
    """The same numbers from K dot products of length T, without the dense gradient.

    Needs a 2-d support with positions; takes fp32 and fp64 as they are and widens the rest.
    """
    assert support.positions is not None
    rows, columns = support.shape
    counts = torch.bincount(support.positions // columns, minlength=rows)
    row_starts = torch.zeros(rows + 1, dtype=torch.int32, device=support.positions.device)
    torch.cumsum(counts, 0, out=row_starts[1:])
    column_of = (support.positions % columns).to(torch.int32)

    def pattern(dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(len(column_of), dtype=dtype, device=column_of.device)
        return torch.sparse_csr_tensor(
            row_starts, column_of, zeros, size=(rows, columns), check_invariants=False
        )

    with warnings.catch_warnings():  # said once per process: here, not in the backward thread
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern(torch.float32)

    def gradient(grad_out: Tensor, inputs: Tensor) -> Tensor:
        grad_out, inputs = widen(grad_out), widen(inputs)
        sampled = torch.sparse.sampled_addmm(pattern(inputs.dtype), grad_out.t(), inputs, beta=0.0)
        values: Tensor = sampled.values()
        return values

    return gradient


def choose_gradient(support: Support, device: torch.device) -> Gradient:
    """The kernel that is fastest for this support on this device."""
    sparse_enough = support.positions is not None and len(support) < SAMPLED_BELOW * support.size
    return (
        sampled_gradient(support)
        if device.type == "cpu" and sparse_enough
        else dense_gradient(support)
    )


def widen(tensor: Tensor) -> Tensor:
    """At least fp32; fp64 stays fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _SelectedLinear(torch.autograd.Function):
    """y = x W^T + b, where W is frozen and `values` ([K]) stands for its selected entries.

    The entries live in W itself, so `values` takes no part in the product: it is the leaf at which
    their gradient arrives.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, gradient: Gradient
    ) -> Tensor:
        kind = x.device.type
        w, b = weight, bias
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, w, b = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        ctx.dtypes = (None if bias is None else bias.dtype, values.dtype)
        with torch.autocast(kind, enabled=False):
            return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grad_outputs
        x, weight = ctx.saved_tensors
        bias_dtype, values_dtype = ctx.dtypes
        grad_x = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ weight.to(grad_out.dtype)
        flat = grad_out.reshape(-1, grad_out.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0).to(bias_dtype)
        if ctx.needs_input_grad[3]:
            grad_values = ctx.gradient(flat, x.reshape(-1, x.shape[-1])).to(values_dtype)
        return grad_x, None, grad_bias, grad_values, None


def selected_forward(
    layer: nn.Linear, values: Tensor, gradient: Gradient
) -> Callable[[Tensor], Tensor]:
    """A forward for `layer` that gives its own output; the selected gradient goes to `values`."""

    def forward(input: Tensor) -> Tensor:
        out: Tensor = _SelectedLinear.apply(input, layer.weight, layer.bias, values, gradient)  # type: ignore[no-untyped-call]
        return out

    return forward
