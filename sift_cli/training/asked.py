"""What is asked of a run between its steps, of whichever rank: to stop, or to save."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sift_cli.runs.checkpoint import Checkpoints
from sift_cli.runs.ranks import Ranks
from sift_cli.system.stopping import Stop

Result = TypeVar("Result")


class Asked:
    """A signal to stop, and a checkpoint that the clock asks for: the same on every rank.

    With one process both are asked about where they are needed. With several, what each has heard
    travels with its gradients, so that all act on it after the same step; on GPUs that is the next
    one, since a host that looked at once would wait for its GPU at every step.
    """

    def __init__(self, stop: Stop, checkpoints: Checkpoints, ranks: Ranks) -> None:
        self._stop, self._checkpoints, self._ranks = stop, checkpoints, ranks
        self._agreed = [0.0, 0.0]
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    @property
    def to_stop(self) -> bool:
        """Whether the run is to end here."""
        return self._stop.asked if self._ranks.alone else self._agreed[0] > 0

    def to_save(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        if self._ranks.alone or step == 0 or not self._checkpoints.by_clock:
            return self._checkpoints.due(step)
        return self._agreed[1] > 0

    def unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """What `work` returns; None where a signal breaks it off, as it can one process alone."""
        return self._stop.interruptible(work) if self._ranks.alone else work()

    def flags(self, step: int) -> tuple[bool, bool]:
        """What this rank adds to the message of a step."""
        return self._stop.asked, self._ranks.main and self._checkpoints.due(step)

    def hear(self, flags: Tensor) -> None:
        """Takes in the flags of a step's message, [2]."""
        if flags.device.type != "cuda":
            self._agreed = flags.tolist()
            return
        earlier = self._coming
        landing = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        landing.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._coming = landing, event
        if earlier is not None:
            earlier[1].synchronize()
            self._agreed = earlier[0].tolist()
