"""Losses and gradients that are not finite: kept out of the weights, found, and told."""

from dataclasses import dataclass
from math import isfinite, nan

import torch
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError
from sift_cli.runs.session import Session
from sift_cli.training.method import Trained
from sift_cli.training.randomness import kept_randomness
from sift_cli.training.step import Rows, add_gradient


@dataclass(frozen=True)
class Advice:
    """What a step is called where one fails, and which keys of the recipe may help."""

    step: str = "step"
    rate: str = "train.learning_rate"
    skip: str | None = None


TRAINING = Advice(skip="train.skip_nonfinite")


class Watch:
    """Loss and norm of every step, read now and then: a GPU's host does not wait at each.

    A step at which one of them is not finite leaves the weights alone, and so does every step after
    it once there were more than `skips` of them: `broken` says so to the optimizer, on the device.
    """

    def __init__(
        self,
        session: Session,
        parameters: Trained | None = None,
        skips: int = 0,
        advice: Advice = TRAINING,
    ) -> None:
        self.session, self.parameters, self.skips = session, parameters, skips
        self.advice = advice
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
        where = f"training rows {numbers}, counted from 0"
        earlier = f", after {self.skips} skipped" if self.skips else ""
        call, rate, skip = self.advice.step, self.advice.rate, self.advice.skip
        pass_over = f", or let {skip} pass over {self.skips + 1} such steps" if skip else ""
        look = "look at these rows" if skip else "or look at these rows"
        return SiftError(
            f"{call} {step}: {what}; {where}{earlier}. The weights are those of "
            f"{call} {step - 1}. Try a lower {rate}, {look}{pass_over}",
            ExitCode.NOT_FINITE,
        )

    def _blame(self, rows: Rows) -> tuple[list[str], list[int]]:
        """Weights whose gradient is not finite when the step is run again, and the rows at fault.

        The weights are as they were, dropout is not: what it alone had made infinite is not found.
        """
        assert self.parameters is not None
        parameters, alone = self.parameters, self.session.alone()

        def not_finite() -> list[str]:
            gathered = parameters.gradients()
            return [name for name, gradient in gathered if not bool(gradient.isfinite().all())]

        def spoilt(some: Rows) -> bool:
            parameters.zero_grad()
            loss = add_gradient(alone, some)
            return not bool(loss.isfinite()) or bool(not_finite())

        with kept_randomness(self.session.device):
            guilty = [row for part in rows for row in part if spoilt([[row]])]
            spoilt(rows)
        bad = not_finite()
        parameters.zero_grad()
        return bad, guilty
