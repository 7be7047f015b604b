"""How far one step on a mask's entries moves the outputs of the layers that hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_cli.models import devices
from sift_cli.selection.targets import LinearLayer
from sift_cli.sparse import Support


@dataclass(frozen=True, eq=False)
class Change:
    """A change of some entries of one weight: `values` ([K]) are added to those in `support`."""

    support: Support
    values: Tensor

    @classmethod
    def against(cls, support: Support, gradient: Tensor) -> "Change":
        """Adam's first step at rate 1: the negative sign of the entries' `gradient` ([K])."""
        return cls(support, -gradient.sign())


def relative_moves(
    layers: Mapping[str, LinearLayer],
    changes: Mapping[str, Mapping[str, Change]],
    forward: Callable[[], object],
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """How far each mask's `changes` (by weight) move the outputs of `layers` (by weight).

    The root mean square of (change x input) over that of (weight x input), without the bias, both
    over all outputs and all tokens that `forward` runs through the layer: by mask and layer.
    `scales` ([inputs], by weight) multiply what an entry changes by; one where there is none. Holds
    one dense change at a time.
    """
    moved = {mask: dict.fromkeys(layers, 0.0) for mask in changes}
    outputs = dict.fromkeys(layers, 0.0)

    def look(name: str, given: tuple[Tensor, ...], out: Tensor) -> None:
        layer = layers[name]
        weight, bias = layer.module.weight, layer.module.bias
        assert isinstance(weight, Tensor)
        wide = torch.promote_types(given[0].dtype, torch.float32)
        with torch.autocast(given[0].device.type, enabled=False):
            own = out.to(wide) if bias is None else out.to(wide) - bias.to(wide)  # type: ignore[operator]
            outputs[name] += float(own.square().sum())
            for mask, weights in changes.items():
                if name in weights:
                    dense = _dense(weights[name], weight, wide, layer.transposed)
                    if scales is not None and name in scales:
                        dense = dense * scales[name].to(dense)
                    moved[mask][name] += float(F.linear(given[0].to(wide), dense).square().sum())

    handles = [
        layer.module.register_forward_hook(lambda _, given, out, name=name: look(name, given, out))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        mask: {name: sqrt(one / (outputs[name] or 1.0)) for name, one in weights.items()}
        for mask, weights in moved.items()
    }


def evaluating(model: nn.Module, forward: Callable[[], object]) -> Callable[[], None]:
    """`forward` without dropout; the model is left in the mode it was in."""

    def run() -> None:
        with devices.evaluating(model):
            forward()

    return run


def _dense(change: Change, weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """The change as a whole matrix, [outputs, inputs]."""
    dense = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    change.support.scatter_(dense, change.values)
    return dense.t() if transposed else dense
