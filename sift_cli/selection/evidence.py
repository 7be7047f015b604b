"""What batches tell about weights: gradients and inputs, gone as soon as they are looked at."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sift_cli.selection.structures import Units


@contextmanager
def observed_gradients(
    weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within, each backward pass hands every weight's gradient to `take` and frees it.

    So at most one dense gradient is alive at a time. Flags are restored afterwards.
    """
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    handles = []

    def hand_over(name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        take(name, gradient)

    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(
            weight.register_post_accumulate_grad_hook(lambda w, name=name: hand_over(name, w))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])


@contextmanager
def observed_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within, gathers the sum of squares of each layer's inputs: name -> [inputs], fp32.

    Padding counts like any token.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, arguments: tuple[object, ...]) -> None:
        inputs = arguments[0]
        assert isinstance(inputs, Tensor)
        seen = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)
        squares[name] = squares[name] + seen if name in squares else seen

    handles = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: add(name, arguments))
        for name, layer in layers.items()
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


# What a score function may ask for, by the name of its parameter. Weights of linear layers come as
# [outputs, inputs], all others in their own shape.
EVIDENCE = {
    "weight": "the weight",
    "gradient": "sum over the calibration batches of `fold` of its gradient, in its shape",
    "input_norm": "2-norm of each input over all tokens, [inputs]; one for what has no such input",
    "change": "how far the warm-up moved it, |trained - base|, in its shape",
    "generator": "a seeded generator of the weight's own, on the host",
    "rank": "selection.rank",
}


NEED_DATA = {"gradient", "input_norm"}


def input_norm_of(name: str, weight: Tensor, units: Units, squares: Mapping[str, Tensor]) -> Tensor:
    """The 2-norm of each of a weight's inputs, [inputs]; ones where it has no such input."""
    if name in squares:
        return squares[name].sqrt()
    width = units.shape[-1] if len(units.shape) else 1
    return torch.ones(width, device=weight.device)
