"""How far each input's entries step: the learning rate is divided by how loud the input is."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.selection.evidence import observed_inputs
from sift_cli.selection.select import alone
from sift_cli.selection.targets import linear_layers
from sift_cli.sparse.coordinates import InputScale

MOST = 8.0  # an input that is next to never on in one batch may be loud in another


def input_scale(squares: Tensor) -> Tensor:
    """The step scale of each input from its sum of squares over tokens, both [inputs]; fp32.

    Adam moves every entry by the learning rate, whatever its gradient; the outputs then move by the
    rate times the input. Divided by the input's root mean square, equal steps change the outputs
    equally. The reference that keeps its rate is the median input: a few inputs can be so loud that
    they alone make the mean (72 times the median in SmolLM2's last `down_proj`, where the root mean
    square over all inputs is 5.4 times it). Scales are rounded to powers of two, at most `MOST`;
    those of silent inputs are 1, since nothing is known of them.
    """
    rms = squares.float().sqrt()
    heard = rms > 0
    if not bool(heard.any()):
        return torch.ones_like(rms)
    ratio = torch.where(heard, rms[heard].median() / rms, 1.0)
    return torch.exp2(ratio.log2().round()).clamp(max=MOST)


def input_scales(
    model: nn.Module,
    names: Sequence[str],
    forward: Iterable[Callable[[], object]],
    whole: Callable[[Tensor], Tensor] = alone,
) -> dict[str, InputScale]:
    """The scales of the model's parameters called `names`, by name.

    Each callable in `forward` runs a calibration batch forward. Only matrices of linear layers
    (Conv1D among them) have inputs of that kind: embeddings read one row a token, a bias and a norm
    read no input that could be loud, and a layer that no batch reached told nothing. They keep the
    learning rate. `whole` is as `select` has it. Raises SiftError (exit code 4) where an
    input is not finite.
    """
    linear, named = linear_layers(model), dict(model.named_parameters())
    layers = {name: linear[name] for name in names if name in linear and named[name].dim() == 2}
    with torch.no_grad(), observed_inputs({n: one.module for n, one in layers.items()}) as squares:
        for run in forward:
            run()
    for name, part in squares.items():
        squares[name] = sums = whole(part)
        if not bool(torch.isfinite(sums).all()):
            raise SiftError(
                f"train.step_scale: the inputs of {name} are not finite; try train.precision: "
                "float32, or other data in the first batch",
                ExitCode.NOT_FINITE,
            )
    return {
        name: InputScale(input_scale(sums), layers[name].transposed)
        for name, sums in squares.items()
    }
