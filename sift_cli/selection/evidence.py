"""What a score may look at: weights, and the gradients and inputs of calibration batches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sift_cli.selection.structures import Units
from sift_cli.sparse.local import local_of


@contextmanager
def observed_gradients(
    weights: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """In this context each backward pass hands every weight's gradient to `take` and frees it.

    So at most one dense gradient is alive at a time; of a weight in rows on several ranks, this
    one's rows of it. `requires_grad` is restored afterwards.
    """
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    handles = []

    def hand_over(name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        take(name, local_of(gradient))

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


_weight: ContextVar[int] = ContextVar("weight", default=1)


@contextmanager
def uncounted() -> Iterator[None]:
    """Within it, layers see inputs that count for nothing: those that a rank runs to keep step."""
    before = _weight.set(0)
    try:
        yield
    finally:
        _weight.reset(before)


@contextmanager
def observed_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """In this context, sums the squares of each layer's inputs over tokens: name -> [inputs], fp32.

    Padding counts like any token; activations that a backward pass computes again do not count.
    """
    squares: dict[str, Tensor] = {}

    def add(name: str, arguments: tuple[object, ...]) -> None:
        inputs = arguments[0]
        assert isinstance(inputs, Tensor)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            return
        batch = inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(0)
        batch *= _weight.get()
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


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the tokens that a linear layer has seen amount to, in fp32 or wider.

    `output_gradient` is the sum of the gradients of its outputs, [outputs]: that of a bias.
    `mean` ([inputs]) is that of the inputs, `squares` the sum of their squared differences from it.
    """

    count: int
    output_gradient: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: Tensor, output_gradient: Tensor) -> "Tokens":
        """Those of one call, from its inputs and their part of the sum."""
        flat = _wide(inputs.detach().reshape(-1, inputs.shape[-1]))
        variance, mean = torch.var_mean(flat, 0, correction=0)
        count = _weight.get() * len(flat)
        return cls(count, output_gradient, mean, variance * count)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of each input, [inputs]."""
        return (self.squares / self.count).sqrt()

    def __add__(self, other: "Tokens") -> "Tokens":
        """Those of both; no difference of large numbers (Chan, Golub and LeVeque 1979)."""
        count, apart = max(1, self.count + other.count), other.mean - self.mean
        return Tokens(
            count,
            self.output_gradient + other.output_gradient,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )

    def over(self, whole: Callable[[Tensor], Tensor]) -> "Tokens":
        """Those of all ranks, where `whole` sums a tensor over them, in place."""
        count = whole(self.mean.new_tensor(float(self.count), dtype=torch.float64))
        mean = whole(self.mean * self.count) / count.to(self.mean)
        squares = self.squares + (self.mean - mean).square() * self.count
        return Tokens(int(count), whole(self.output_gradient), mean, whole(squares))


@contextmanager
def observed_tokens(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tokens]]:
    """In this context, adds up what each layer's tokens amount to, by name.

    Padding counts like any token. A call counts when the gradient of its outputs arrives, before
    that of the weight: not for a forward pass alone, nor when activations are computed again.
    """
    seen: dict[str, Tokens] = {}

    def watch(name: str, arguments: tuple[object, ...], outputs: object) -> None:
        inputs = arguments[0]
        assert isinstance(inputs, Tensor)
        assert isinstance(outputs, Tensor)
        if not outputs.requires_grad:
            return
        none = torch.zeros((), device=outputs.device)
        call = Tokens.of(inputs, none)  # small, where the inputs themselves would stay in memory

        def add(gradient: Tensor) -> None:
            summed = _wide(gradient.detach().reshape(-1, gradient.shape[-1])).sum(0)
            own = replace(call, output_gradient=summed)
            seen[name] = seen[name] + own if name in seen else own

        outputs.register_hook(add)

    handles = [
        layer.register_forward_hook(lambda _, given, out, name=name: watch(name, given, out))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# What a score function may ask for, by the name of its parameter. Weights of linear layers are
# [outputs, inputs] however they are stored, all others have their own shape.
EVIDENCE = {
    "weight": "the weight",
    "gradient": "sum over the calibration batches of `fold` of its gradient, in its shape",
    "input_norm": "2-norm of each input over all tokens, [inputs]; one for what has no such input",
    "gradient_squares": "sum over the calibration batches of its gradient's square, in its shape",
    "output_gradient": "sum over all tokens of the gradient of the layer's outputs, [outputs]; "
    "zero for what has no such layer",
    "input_mean": "mean of each input over all tokens, [inputs]; zero for what has no such input",
    "input_deviation": "its standard deviation, [inputs]; one for what has no such input",
    "votes": "sum of the signs of its gradients along a sign descent over the calibration batches, "
    "in its shape",
    "change": "how far the warm-up moved it, |trained - base|, in its shape",
    "generator": "a seeded generator of the weight's own, on the host",
    "rank": "selection.rank",
    "balance": "selection.balance",
}

OF_TOKENS = {"output_gradient", "input_mean", "input_deviation"}  # what `observed_tokens` tells
# of all, what only batches tell
NEED_DATA = {"gradient", "gradient_squares", "input_norm", "votes", *OF_TOKENS}


def evidence_of(
    weight: Tensor,
    units: Units,
    *,
    gradient: Tensor | None = None,
    gradient_squares: Tensor | None = None,
    votes: Tensor | None = None,
    change: Tensor | None = None,
    input_squares: Tensor | None = None,
    tokens: Tokens | None = None,
) -> dict[str, object]:
    """What is known of one weight, by the names in EVIDENCE.

    `weight`, `gradient`, `gradient_squares`, `change` and `votes` have the shape in which the
    weight is stored; `input_squares` ([inputs]) are its inputs' sums of squares, `tokens` those of
    its layer.
    """
    return {
        "weight": units.turned(weight),
        "gradient": None if gradient is None else units.turned(gradient),
        "gradient_squares": None if gradient_squares is None else units.turned(gradient_squares),
        "votes": None if votes is None else units.turned(votes),
        **_of_tokens(weight, units, tokens),
        "input_norm": _input_norm(weight, units, input_squares),
        "change": None if change is None else units.turned(change),
    }


def _input_norm(weight: Tensor, units: Units, squares: Tensor | None) -> Tensor:
    """The 2-norm of each of a weight's inputs, [inputs]; ones where it has no such input."""
    if squares is not None:
        return squares.sqrt()
    width = units.shape[-1] if len(units.shape) else 1
    return torch.ones(width, device=weight.device)


def _of_tokens(weight: Tensor, units: Units, tokens: Tokens | None) -> dict[str, Tensor]:
    """The evidence in OF_TOKENS; that of a layer whose inputs are centred where there is none."""
    if tokens is not None:
        found = tokens.output_gradient, tokens.mean, tokens.deviation
    else:
        high, wide = units.shape if len(units.shape) == 2 else (1, 1)
        empty = _wide(weight.new_empty(0))
        found = empty.new_zeros(high), empty.new_zeros(wide), empty.new_ones(wide)
    return dict(zip(("output_gradient", "input_mean", "input_deviation"), found, strict=True))
