"""Sign descent over calibration batches: where it takes each weight, and back to the base."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError

Take = Callable[[str, Tensor], None]


@contextmanager
def sign_descent(
    weights: Mapping[str, Tensor], rate: float
) -> Iterator[tuple[Take, dict[str, Tensor]]]:
    """In this context, moves each weight against the sign of each gradient of it that it is given.

    signSGD (Bernstein et al. 2018, arXiv 1802.04434). Gives what takes a gradient, by the name of
    its weight, and the votes, which fill up: the sums of the signs, int16 in the weight's shape, on
    the host. A weight is always its base - `rate` x votes, so that no rounding adds up, and base
    and votes, both on the host, are all that is kept; afterwards it is its base to the bit. Raises
    SiftError (exit code 4) for a gradient that is not finite.
    """
    bases: dict[str, Tensor] = {}
    votes: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(name: str, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise SiftError(
                f"selection: a gradient of {name} is not finite; try train.precision: float32, a "
                "lower selection.descent_rate, or other data in the first batches",
                ExitCode.NOT_FINITE,
            )
        weight = weights[name]
        signs = gradient.sign().to("cpu", torch.int16)
        if name not in bases:
            bases[name] = weight.detach().to("cpu", copy=True)
            votes[name] = signs
        else:
            votes[name] += signs
        base, moved = (one.to(weight.device) for one in (bases[name], votes[name]))
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(base.to(wide) - rate * moved.to(wide))

    try:
        yield take, votes
    finally:
        with torch.no_grad():
            for name, base in bases.items():
                weights[name].copy_(base)
