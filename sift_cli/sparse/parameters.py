"""The selected entries of a model as one flat parameter."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sift_cli.sparse.linear import Gradient, choose_gradient, selected_forward
from sift_cli.sparse.support import Support


@dataclass(frozen=True, eq=False)
class Segment:
    """One weight's share of the flat buffer: entries [start, stop)."""

    name: str
    weight: nn.Parameter
    support: Support
    start: int
    stop: int

    @property
    def span(self) -> slice:
        """Where the segment lies in the flat buffer."""
        return slice(self.start, self.stop)


class SparseParameters:
    """Masters and gradients of all selected entries, in the order of the model's parameters.

    `flat` is one parameter of shape [K] in fp32 (fp64 for an fp64 model) whose `.grad` is a buffer
    of the same shape: every backward pass adds to it. `base` holds the K entries as they were
    before training, in fp32 on the host. The model's weights hold the tuned values themselves;
    `write_back` rounds the masters into them once.
    """

    def __init__(self, segments: list[Segment]) -> None:
        if not segments:
            raise ValueError("no entry is selected")
        self.segments = segments
        wide = torch.float32
        for segment in segments:
            wide = torch.promote_types(wide, segment.weight.dtype)
        total, device = segments[-1].stop, segments[0].weight.device
        self.flat = nn.Parameter(torch.empty(total, dtype=wide, device=device))
        for segment in segments:
            self.flat.data[segment.span] = segment.support.gather(segment.weight).to(wide)
        self.grad = torch.zeros_like(self.flat.data)
        self.flat.grad = self.grad
        self.base = self.flat.detach().to("cpu", copy=True)
        self._undo: list[Callable[[], object]] = []

    def __len__(self) -> int:
        """Number of trained entries, K."""
        return self.flat.numel()

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters once into the model's weights."""
        for segment in self.segments:
            segment.support.scatter_(segment.weight, self.flat[segment.span])

    def zero_grad(self) -> None:
        """Clears the gradient buffer, keeping it in place."""
        self.grad.zero_()

    def state(self) -> Tensor:
        """A copy of the masters, [K]: all that is needed to come back to this point."""
        return self.flat.detach().clone()

    @torch.no_grad()
    def load_state(self, masters: Tensor) -> None:
        """Takes masters saved by `state` and writes them into the weights."""
        self.flat.copy_(masters)
        self.write_back()

    def detach(self) -> None:
        """Gives the model its own forward passes and `requires_grad` flags back; values stay."""
        while self._undo:
            self._undo.pop()()

    def _leaf(self, segment: Segment) -> Tensor:
        """A view of the masters whose gradient is the segment's view of the gradient buffer."""
        leaf = self.flat.detach()[segment.span].requires_grad_()
        leaf.grad = self.grad[segment.span]
        return leaf


def attach(
    model: nn.Module,
    supports: Mapping[str, Support],
    gradient_for: Callable[[Support, torch.device], Gradient] = choose_gradient,
) -> SparseParameters:
    """Makes the entries in `supports` (parameter name -> support) the only ones that train.

    Linear layers with a weight of their own compute only the selected gradient; every other weight
    (embeddings, norms, biases, Conv1D, tied weights) is gathered from its dense gradient, which
    lives no longer than one hook. `gradient_for` overrides the choice of kernel.

    Raises KeyError for a name that the model lacks, ValueError for a support of another shape.
    """
    named = dict(model.named_parameters())
    unknown = [name for name in supports if name not in named]
    if unknown:
        raise KeyError(f"the model has no parameter {unknown[0]}")
    segments, start = [], 0
    for name, weight in named.items():
        support = supports.get(name)
        if support is None or not len(support):
            continue
        if support.shape != tuple(weight.shape):
            raise ValueError(f"{name}: the support is of shape {support.shape}")
        on_device = support.to(weight.device)
        segments.append(Segment(name, weight, on_device, start, start + len(support)))
        start += len(support)
    parameters = SparseParameters(segments)
    _freeze(named.values(), parameters._undo)
    layers = _plain_linear_layers(model)
    for segment in segments:
        layer = layers.get(id(segment.weight))
        if layer is None:
            _hook(segment, parameters)
        else:
            kernel = gradient_for(segment.support, segment.weight.device)
            _replace_forward(layer, parameters._leaf(segment), kernel, parameters._undo)
    return parameters


def _freeze(weights: Iterable[nn.Parameter], undo: list[Callable[[], object]]) -> None:
    for weight in weights:
        undo.append(partial(weight.requires_grad_, weight.requires_grad))
        weight.requires_grad_(False)


def _plain_linear_layers(model: nn.Module) -> dict[int, nn.Linear]:
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


def _hook(segment: Segment, parameters: SparseParameters) -> None:
    segment.weight.requires_grad_(True)
    target = parameters.grad[segment.span]

    def gather(weight: Tensor) -> None:
        assert weight.grad is not None
        target.add_(segment.support.gather(weight.grad))
        weight.grad = None

    parameters._undo.append(segment.weight.register_post_accumulate_grad_hook(gather).remove)


def _replace_forward(
    layer: nn.Linear,
    leaf: Tensor,
    kernel: Gradient,
    undo: list[Callable[[], object]],
) -> None:
    layer.forward = selected_forward(layer, leaf, kernel)  # type: ignore[assignment, method-assign]

    def restore() -> None:
        del layer.forward

    undo.append(restore)
