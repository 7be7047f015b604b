"""Which weights a run ends with."""

from dataclasses import dataclass

from sift_cli.tasks.metrics import Metrics, better
from sift_cli.training.method import Trained, Weights


@dataclass
class Kept:
    """The weights to end with: those of the best evaluation, or the last. Holds K numbers.

    `seen` is the step of the newest evaluation. One whose metric is undefined gives way
    to any later one.
    """

    parameters: Trained
    keep: str
    metric: str
    step: int = 0
    metrics: dict[str, float | None] | None = None
    state: Weights | None = None
    seen: int = 0

    def offer(self, step: int, metrics: Metrics) -> bool:
        """Takes an evaluation; tells whether its weights are now the ones to keep."""
        self.seen = step
        old = (self.metrics or {}).get(self.metric)
        improved = better(self.metric, metrics[self.metric], old)
        if improved or self.keep == "last":
            self.step, self.metrics = step, dict(metrics)
            if self.keep == "best":
                self.state = self.parameters.state()
        return improved

    def restore(self) -> None:
        """Puts the kept weights back into the model."""
        if self.state is not None:
            self.parameters.load_state(self.state)
