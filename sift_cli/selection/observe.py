"""What batches tell about weights: gradients and inputs, gone as soon as they are looked at."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


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
