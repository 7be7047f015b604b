"""What a score may look at: weights, and the gradients and inputs of calibration batches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sift_cli.selection.structures import Units


@contextmanager
def observed_gradients(
    weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """In this context each backward pass hands every weight's gradient to `take` and frees it.

    So at most one dense gradient is alive at a time. `requires_grad` is restored afterwards.
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
    """In this context, sums the squares of each layer's inputs over tokens: name -> [inputs], fp32.

    Padding counts like any token.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, arguments: tuple[object, ...]) -> None:
        inputs = arguments[0]
        assert isinstance(inputs, Tensor)
        batch = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)
        squares[name] = squares[name] + batch if name in squares else batch

    handles = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: add(name, arguments))
        for name, layer in layers.items()
    ]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


# What a score function may ask for, by the name of its parameter. Weights of linear layers are
# [outputs, inputs] however they are stored, all others have their own shape.
EVIDENCE = {
    "weight": "the weight",
    "gradient": "sum over the calibration batches of `fold` of its gradient, in its shape",
    "input_norm": "2-norm of each input over all tokens, [inputs]; one for what has no such input",
    "change": "how far the warm-up moved it, |trained - base|, in its shape",
    "generator": "a seeded generator of the weight's own, on the host",
    "rank": "selection.rank",
}

NEED_DATA = {"gradient", "input_norm"}  # of these, what only batches tell


def evidence_of(
    weight: Tensor,
    units: Units,
    gradient: Tensor | None,
    squares: Tensor | None,
    change: Tensor | None,
) -> dict[str, object]:
    """What is known of one weight, by the names in EVIDENCE.

    `weight`, `gradient` and `change` have the shape in which the weight is stored; `squares`
    ([inputs]) are its inputs' sums of squares.
    """
    return {
        "weight": units.turned(weight),
        "gradient": None if gradient is None else units.turned(gradient),
        "input_norm": _input_norm(weight, units, squares),
        "change": None if change is None else units.turned(change),
    }


def _input_norm(weight: Tensor, units: Units, squares: Tensor | None) -> Tensor:
    """The 2-norm of each of a weight's inputs, [inputs]; ones where it has no such input."""
    if squares is not None:
        return squares.sqrt()
    width = units.shape[-1] if len(units.shape) else 1
    return torch.ones(width, device=weight.device)
