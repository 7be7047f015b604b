"""The score table: how much each entry of one weight is worth training."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError


@dataclass(frozen=True)
class Score:
    """A row: `of(weight, gradient, generator)` gives one score per entry, larger is better.

    All three scores have the shape of the weight. `gradient` is None where `needs_gradient` is
    false.
    """

    of: Callable[[Tensor, Tensor | None, torch.Generator], Tensor]
    needs_gradient: bool


def _gradient(weight: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    assert gradient is not None
    return gradient.abs()


def _magnitude(weight: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    return weight.abs()


def _random(weight: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.shape, generator=generator)


SCORES: dict[str, Score] = {
    "gradient": Score(_gradient, needs_gradient=True),
    "magnitude": Score(_magnitude, needs_gradient=False),
    "random": Score(_random, needs_gradient=False),
}


def score_entries(
    score: Score, name: str, weight: Tensor, gradient: Tensor | None, seed: int
) -> Tensor:
    """Scores of all entries of the weight called `name`, flat.

    Randomness is drawn on the host from a seed of the weight's own, so that the device, the order
    of the weights and what else is selected change nothing. Raises SiftError (exit code 4) where a
    score is not finite.
    """
    own_seed = zlib.crc32(f"{seed}/{name}".encode())
    generator = torch.Generator().manual_seed(own_seed)
    scores = score.of(weight.detach(), gradient, generator).reshape(-1)
    if not bool(torch.isfinite(scores).all()):
        raise SiftError(
            f"selection: the scores of {name} are not finite; try train.precision: float32, or "
            "other data in the first batch",
            ExitCode.NOT_FINITE,
        )
    return scores
