"""Losses and gradients that are not finite: kept out of the weights, found, and told."""

from collections.abc import Sequence
from math import isfinite, nan

import torch
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError
from sift_cli.runs.session import Session
from sift_cli.sparse import SparseParameters
from sift_cli.training.gradient import add_gradient
from sift_cli.training.randomness import kept_randomness

Rows = Sequence[list[int]]


class Watch:
    """Loss and norm of every step, read now and then: a GPU's host does not wait at each.

    A step at which one of them is not finite leaves the weights alone, and so does every step after
    it once there were more than `skips` of them: `broken` says so to the optimizer, on the device.
    """

    def __init__(
        self, session: Session, parameters: SparseParameters | None = None, skips: int = 0
    ) -> None:
        self.session, self.parameters, self.skips = session, parameters, skips
        self.skipped = 0  # steps read so far that were not finite
        self._unread: list[tuple[int, Rows, Tensor]] = []
        self._newest = nan, nan
        self._count = torch.zeros((), device=session.device)

    def resume(self, skipped: int) -> None:
        """Counts on from there."""
        self.skipped = skipped
        self._count.fill_(skipped)

    def broken(self, step: int, rows: Rows, loss: Tensor, norm: Tensor) -> Tensor:
        """Takes in a step; returns whether the weights are to stay as they are (0 or 1, [])."""
        both = torch.stack([loss.float(), norm.to(loss.device).float()])
        self._unread.append((step, rows, both))
        now = (~both.isfinite()).any().float()
        self._count = self._count + now
        return torch.maximum(now, (self._count > self.skips).float())

    def read(self) -> tuple[float, float]:
        """Loss and norm of the newest step.

        Raises SiftError (exit code 4) for the first step that is one too many, naming its rows and
        the weights whose gradient is not finite.
        """
        if not self._unread:
            return self._newest
        numbers = torch.stack([both for _, _, both in self._unread]).tolist()
        for (step, rows, _), (loss, norm) in zip(self._unread, numbers, strict=True):
            if isfinite(loss) and isfinite(norm):
                continue
            self.skipped += 1
            if self.skipped > self.skips:
                raise self._refusal(step, rows, loss, norm)
        self._unread.clear()
        self._newest = numbers[-1][0], numbers[-1][1]
        return self._newest

    def _refusal(self, step: int, rows: Rows, loss: float, norm: float) -> SiftError:
        what = f"the gradient's norm is {norm}" if isfinite(loss) else f"the loss is {loss}"
        names, guilty = ([], []) if self.parameters is None else self._blame(rows)
        if names:
            more = f" and {len(names) - 3} more weights" if len(names) > 3 else ""
            what += f"; not finite: the gradient of {', '.join(names[:3])}{more}"
        assert self.session.train is not None
        numbers = self.session.train.numbers(guilty or [row for part in rows for row in part])
        earlier = f", after {self.skips} skipped" if self.skips else ""
        return SiftError(
            f"step {step}: {what}; training rows {numbers}{earlier}. The weights are those of step "
            f"{step - 1}. Try a lower train.learning_rate, look at these rows, or let "
            f"train.skip_nonfinite pass over {self.skips + 1} such steps",
            ExitCode.NOT_FINITE,
        )

    def _blame(self, rows: Rows) -> tuple[list[str], list[int]]:
        """Weights whose gradient is not finite when the step is run again, and the rows at fault.

        The weights are as they were, dropout is not: what it alone had made infinite is not found.
        """
        assert self.parameters is not None
        grad = self.parameters.grad

        def spoilt(some: Rows) -> bool:
            grad.zero_()
            loss = add_gradient(self.session, some)
            return not bool(loss.isfinite()) or not bool(grad.isfinite().all())

        with kept_randomness(self.session.device):
            guilty = [row for part in rows for row in part if spoilt([[row]])]
            spoilt(rows)
        bad = [one.name for one in self.parameters if not grad[one.span].isfinite().all()]
        grad.zero_()
        return bad, guilty
