"""Linear layers whose backward pass computes only the selected entries of the gradient."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_cli.sparse.kernels import Kernel
from sift_cli.sparse.saved import Saved, to_save


class _SelectedLinear(torch.autograd.Function):
    """y = x W^T + b, where W is frozen and `values` ([K]) stands for its selected entries.

    The entries live in W itself, so `values` takes no part in the product: it is the leaf at which
    their gradient arrives, whatever device it lies on. `saved` gives back the columns of x that
    the kernel needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        kernel: Kernel,
        saved: Saved,
    ) -> Tensor:
        ctx.save_for_backward(weight, *saved.tensors)
        ctx.kernel, ctx.columns = kernel, saved.columns
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.dtype, ctx.device = values.dtype, values.device
        kind = x.device.type
        with torch.autocast(kind, enabled=False):
            out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        # torch lets no one change a view in place that comes out of such a function.
        whole: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
        return whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grad_outputs
        weight, *sources = ctx.saved_tensors
        grad_x = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ weight.to(grad_out.dtype)
        flat = grad_out.reshape(-1, grad_out.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[3]:
            inputs = ctx.columns(*sources).to(grad_out.dtype)
            grad_values = ctx.kernel.gradient(flat, inputs).to(ctx.device, ctx.dtype)
        return grad_x, None, grad_bias, grad_values, None, None


def selected_forward(
    layer: nn.Linear, values: Tensor, kernel: Kernel
) -> Callable[[Tensor], Tensor]:
    """A forward for `layer` that gives its own output; the selected gradient goes to `values`."""

    def forward(input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return nn.Linear.forward(layer, input)
        saved = to_save(input, kernel.columns)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        out: Tensor = _SelectedLinear.apply(  # type: ignore[no-untyped-call]
            input, layer.weight, layer.bias, values, kernel, saved
        )
        return out

    return forward
