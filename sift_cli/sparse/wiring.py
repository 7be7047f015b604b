"""Wires a model so that backward passes deliver the selected gradients, and only these."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sift_cli.sparse.kernels import Kernel
from sift_cli.sparse.linear import selected_forward
from sift_cli.sparse.local import local_of
from sift_cli.sparse.segments import Segment
from sift_cli.sparse.support import Support

KernelFor = Callable[[Support, torch.device], Kernel]


def wire(
    model: nn.Module,
    slots: Sequence[tuple[Segment, Tensor]],
    kernel_for: KernelFor,
    undo: ExitStack,
) -> None:
    """Freezes the model and adds the gradient of each segment's entries to the tensor beside it.

    These are what the gradients of linear layers arrive at: leaves whose values nothing reads.
    Closing `undo` gives forward passes and `requires_grad` flags back.
    """
    for weight in model.parameters():
        undo.callback(weight.requires_grad_, weight.requires_grad)
        weight.requires_grad_(False)
    layers = plain_linear_layers(model)
    for segment, target in slots:
        layer = layers.get(id(segment.weight))
        if layer is None:
            _gather_dense(segment, target, undo)
            continue
        # A leaf whose gradient is the segment's view of the buffer: autograd adds to it in place.
        leaf = target.detach().requires_grad_()
        leaf.grad = target
        kernel = kernel_for(segment.support, segment.weight.device)
        layer.forward = selected_forward(layer, leaf, kernel)  # type: ignore[assignment, method-assign]
        undo.callback(delattr, layer, "forward")


def plain_linear_layers(model: nn.Module) -> dict[int, nn.Linear]:
    """Linear layers whose weight nothing else uses, by the weight's id.

    Subclasses are left out: their forward, or their owner's, may read the weight in other ways.
    """
    uses: dict[int, int] = {}
    layers = {}
    for module in model.modules():
        for weight in module._parameters.values():
            uses[id(weight)] = uses.get(id(weight), 0) + 1
        if type(module) is nn.Linear:
            layers[id(module.weight)] = module
    return {key: layer for key, layer in layers.items() if uses[key] == 1}


def _gather_dense(segment: Segment, target: Tensor, undo: ExitStack) -> None:
    """Lets autograd make the weight's dense gradient, takes the entries from it, and frees it."""
    segment.weight.requires_grad_(True)

    def gather(weight: Tensor) -> None:
        assert weight.grad is not None
        target.add_(segment.support.gather(local_of(weight.grad)).to(target.device))
        weight.grad = None

    undo.callback(segment.weight.register_post_accumulate_grad_hook(gather).remove)
