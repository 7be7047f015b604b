"""The score table: how much each entry of one weight is worth training."""

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError
from sift_cli.selection.evidence import EVIDENCE, NEED_DATA
from sift_cli.system.code import function_in

# The evidence of which a rank's rows are all that counts for its rows.
OF_ENTRIES = {"weight", "gradient", "gradient_squares", "votes", "change", "generator"}
DRAWN = 1 << 24  # random numbers at once, of those that come before


def _itself(gradient: Tensor) -> Tensor:
    return gradient


@dataclass(frozen=True)
class Score:
    """A row: `of` gives one score per entry, larger is better, in the shape of the weight.

    `of` takes what its parameters name (EVIDENCE); `fold` is applied to each batch's gradient
    before the batches are summed.
    """

    of: Callable[..., Tensor]
    fold: Callable[[Tensor], Tensor] = _itself

    @cached_property
    def needs(self) -> frozenset[str]:
        """The names of `of`'s parameters."""
        return frozenset(inspect.signature(self.of).parameters)

    @property
    def needs_data(self) -> bool:
        """Whether calibration batches must be run."""
        return bool(self.needs & NEED_DATA)

    @property
    def descends(self) -> bool:
        """Whether it ranks where sign descent over the batches leads."""
        return "votes" in self.needs

    @property
    def folds(self) -> bool:
        """Whether `fold` changes each batch's gradient before the batches are summed."""
        return self.fold is not _itself


def _gradient(gradient: Tensor) -> Tensor:
    return gradient.abs()


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs()


def _magnitude(weight: Tensor) -> Tensor:
    return weight.abs()


def _smallest_magnitude(weight: Tensor) -> Tensor:
    return -weight.abs()


def _random(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.shape, generator=generator)


def _low_rank(weight: Tensor, generator: torch.Generator, rank: int) -> Tensor:
    """|W_r|, the rank-r approximation (LIFT), by a randomised SVD with two power iterations.

    Halko, Martinsson and Tropp 2011, algorithm 4.4. What is no matrix is its own approximation.
    """
    if weight.dim() != 2 or rank >= min(weight.shape):
        return weight.abs()
    wide = weight.float()
    width = min(rank + 8, *weight.shape)  # the paper advises 5 or 10 more than rank
    probe = torch.randn(weight.shape[1], width, generator=generator).to(wide.device)
    basis = torch.linalg.qr(wide @ probe).Q
    for _ in range(2):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    approximation: Tensor = (basis @ left[:, :rank]) * values[:rank] @ right[:rank]
    return approximation.abs()


def _activation_magnitude(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W| times the norm of its input (Wanda)."""
    return weight.abs() * input_norm


def _large_gradient_small_weight(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.abs() / (weight.abs() + 1e-8)  # finite for a weight of 0


def _gradient_per_input(gradient: Tensor, input_norm: Tensor) -> Tensor:
    """|gradient| over the norm of its input, so that large inputs get no more than their share.

    Of the norm, what `_bounded` leaves of it.
    """
    return gradient.abs() / _bounded(input_norm)


def _bounded(sizes: Tensor) -> Tensor:
    """Each of `sizes` ([n]) as at least a thousandth of the largest.

    Inputs that are almost never on would win by division alone; 1e-30 where all are zero.
    """
    return sizes.clamp_min(1e-3 * float(sizes.max()) + 1e-30)


def _balanced_gradient(gradient: Tensor, balance: float) -> Tensor:
    """|gradient| over what its row and its column lead one to expect, to the power of `balance`.

    That is the product of their root mean squares over that of the whole, Adafactor's factored
    second moment (Shazeer and Stern 2018, section 3), of each what `_bounded` leaves of it: a row
    or column of zeros scores zero. Where `balance` is 0, and for what is no matrix, |gradient|.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    scores = gradient.abs().to(wide)
    if gradient.dim() != 2:
        return scores
    rows, columns = (
        torch.linalg.vector_norm(gradient, dim=dim, dtype=wide) / gradient.shape[dim] ** 0.5
        for dim in (1, 0)
    )
    relative = _bounded(rows) / (rows.square().mean().sqrt() + 1e-30)
    return scores.div_(relative.pow(balance)[:, None]).div_(_bounded(columns).pow(balance))


def _centred_gradient(
    gradient: Tensor, output_gradient: Tensor, input_mean: Tensor, input_deviation: Tensor
) -> Tensor:
    """|gradient of centred inputs| over the input's deviation: what no bias could do.

    The gradient is a sum over tokens of output gradient x input. Of input - mean input it is the
    gradient - (sum of output gradients) x (mean input), over the tokens of all batches (centring:
    Schraudolph 1998). Of the deviation, what `_bounded` leaves of it. For what is no matrix,
    |gradient|.
    """
    if gradient.dim() != 2:
        return gradient.abs()
    wide = gradient.to(output_gradient.dtype)
    centred = torch.addr(wide, output_gradient, input_mean, alpha=-1)
    return centred.abs_().div_(_bounded(input_deviation))


def _agreement(gradient: Tensor, gradient_squares: Tensor) -> Tensor:
    """|sum g| / sqrt(sum g^2) over batches: 1 for noise, sqrt(n) for n that agree.

    Adam's steps settle at this ratio of moments (Balles and Hennig 2018). Zero where the
    squares sum to less than the smallest normal number.
    """
    tiny = torch.finfo(gradient_squares.dtype).tiny
    scores = gradient.abs().to(gradient_squares.dtype)
    scores /= gradient_squares.clamp_min(tiny).sqrt_()
    return scores.masked_fill_(gradient_squares < tiny, 0.0)


def _agreed_gradient(gradient: Tensor, gradient_squares: Tensor) -> Tensor:
    """|sum g| times `_agreement`: by how much Adam's step on the entry lowers the loss.

    To first order, that is gradient times step. Of one batch it is |g|: Adam begins with signs.
    """
    return _agreement(gradient, gradient_squares).mul_(gradient.abs())


def _sign_descent(votes: Tensor, generator: torch.Generator) -> Tensor:
    """How far sign descent over the batches takes it, in steps; chance decides between equals."""
    chance = torch.rand(votes.shape, generator=generator)
    return votes.abs().float() + chance.to(votes.device)


def _change(change: Tensor) -> Tensor:
    return change


SCORES: dict[str, Score] = {
    "gradient": Score(_gradient),
    "absolute-gradient": Score(_gradient, fold=torch.abs),
    "fisher": Score(_gradient, fold=torch.square),
    "snip": Score(_snip),
    "magnitude": Score(_magnitude),
    "smallest-magnitude": Score(_smallest_magnitude),
    "random": Score(_random),
    "low-rank": Score(_low_rank),
    "activation-magnitude": Score(_activation_magnitude),
    "large-gradient-small-weight": Score(_large_gradient_small_weight),
    "gradient-per-input": Score(_gradient_per_input),
    "balanced-gradient": Score(_balanced_gradient),
    "centred-gradient": Score(_centred_gradient),
    "agreement": Score(_agreement),
    "agreed-gradient": Score(_agreed_gradient),
    "sign-descent": Score(_sign_descent),
    "change": Score(_change),
}


def find_score(name: str, allow_code: bool = False) -> Score:
    """The row called `name`, or the function that `FILE.py:FUNCTION` names.

    Raises SiftError where code is not allowed, or where there is no such function.
    """
    if name in SCORES:
        return SCORES[name]
    score = Score(function_in(name, "selection.score", allow_code))
    unknown = sorted(score.needs - set(EVIDENCE))
    if unknown:
        raise SiftError(
            f"selection.score: {name} asks for {', '.join(unknown)}; a score may ask for "
            + ", ".join(EVIDENCE)
        )
    return score


def by_rows(score: Score) -> bool:
    """Whether the scores of some rows of a weight are those that they have in the whole one."""
    return score in SCORES.values() and score.needs <= OF_ENTRIES


def score_entries(
    score: Score, name: str, evidence: Mapping[str, object], seed: int, before: int = 0
) -> Tensor:
    """Scores of the weight called `name`, in its shape; of rows that `before` entries precede.

    Randomness is drawn on the host from a seed of the weight's own, so that the device, the order
    of the weights and what else is selected change nothing. Raises SiftError (exit code 4) where a
    score is not finite.
    """
    own_seed = zlib.crc32(f"{seed}/{name}".encode())
    generator = torch.Generator().manual_seed(own_seed)
    for at in range(0, before, DRAWN):
        torch.rand(min(DRAWN, before - at), generator=generator)
    given = {**evidence, "generator": generator}
    scores = score.of(**{key: given[key] for key in score.needs})
    weight = evidence["weight"]
    assert isinstance(weight, Tensor)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise SiftError(
            f"selection.score: for {name} of shape {list(weight.shape)} it gave {got}; a score "
            "has the shape of the weight"
        )
    if not bool(torch.isfinite(scores).all()):
        raise SiftError(
            f"selection: the scores of {name} are not finite; try train.precision: float32, or "
            "other data in the first batch",
            ExitCode.NOT_FINITE,
        )
    return scores
