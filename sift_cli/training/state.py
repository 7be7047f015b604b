"""The state of a run: all that changes from step to step, and how a checkpoint holds it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.runs.checkpoint import KEPT, Best, Checkpoint
from sift_cli.runs.facts import Facts
from sift_cli.runs.timing import Timing
from sift_cli.tasks.metrics import Metrics
from sift_cli.training.method import Method, Optimizer, Trained, Weights
from sift_cli.training.packing import entries_in
from sift_cli.training.randomness import set_random_states, states_of
from sift_cli.training.watch import Watch

ENTRY_BYTES = 18  # about what an entry takes in a file: master, moments, position, best value
DELTA_BYTES = 6  # and in the delta
MORE_BYTES = 1 << 20  # and what does not grow with them: random states, fingerprints, metrics


@dataclass
class Kept:
    """The weights to end with: those of the best evaluation, or the last. Holds K numbers.

    `better` tells whether an evaluation is to be preferred to an earlier one (None before the
    first), `seen` is the step of the newest, and `stale` counts those since the best.
    """

    parameters: Trained
    keep: str
    better: Callable[[Metrics, Metrics | None], bool]
    step: int = 0
    metrics: dict[str, float | None] | None = None
    state: Weights | None = None
    seen: int = 0
    stale: int = 0

    def offer(self, step: int, metrics: Metrics) -> bool:
        """Takes an evaluation; tells whether its weights are now the ones to keep."""
        self.seen = step
        improved = self.better(metrics, self.metrics)
        self.stale = 0 if improved else self.stale + 1
        if improved or self.keep == "last":
            self.step, self.metrics = step, dict(metrics)
            if self.keep == "best":
                self.state = self.parameters.state()
        return improved

    def restore(self) -> None:
        """Puts the kept weights back into the model."""
        if self.state is not None:
            self.parameters.load_state(self.state)


@dataclass(frozen=True)
class State:
    """The parts of a run that change from step to step."""

    method: Method
    optimizer: Optimizer
    schedule: LRScheduler
    kept: Kept
    watch: Watch
    timing: Timing
    device: torch.device

    @property
    def parameters(self) -> Trained:
        """What trains."""
        return self.optimizer.parameters

    def gather(
        self,
        step: int,
        facts: Facts,
        metrics_before: Metrics,
        random: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    ) -> Checkpoint:
        """All of them after `step`, for a run of these facts. Waits for a GPU, and only here.

        `random` are the states of the generators, of all ranks.
        """
        packed = self.method.pack(self.optimizer)
        packed.table.setdefault("kept", {})
        for name, support, values in self.parameters.all_entries(self.kept.state or {}):
            packed.put("kept", name, support, values)
        tensors = dict(packed.tensors)
        tensors |= {f"optimizer/{key}": column for key, column in self.optimizer.state().items()}
        generators, states = random
        tensors |= {**states, "step_ms": torch.tensor(self.timing.step_ms, dtype=torch.float64)}
        return Checkpoint(
            tensors={key: tensor.cpu().contiguous() for key, tensor in tensors.items()},
            step=step,
            supports=packed.table,
            schedule=self.schedule.state_dict(),
            kept=Best(self.kept.step, self.kept.metrics, self.kept.seen, self.kept.stale),
            skipped=self.watch.skipped,
            random=generators,
            used=self.timing.used(self.device),
            facts=facts,
            metrics_before=dict(metrics_before),
        )

    def load(self, saved: Checkpoint, rank: int = 0) -> None:
        """Goes on from there; `optimizer` must be what `method.restore(saved)` gave."""
        own = "optimizer/"
        columns = {
            k.removeprefix(own): one for k, one in saved.tensors.items() if k.startswith(own)
        }
        self.optimizer.load_state(columns)
        self.schedule.load_state_dict(dict(saved.schedule))
        for group, rate in zip(
            self.optimizer.adamw.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        self.kept.step, self.kept.seen = saved.kept.step, saved.kept.seen
        self.kept.stale = saved.kept.stale
        self.kept.metrics = saved.kept.metrics
        self.kept.state = self.parameters.own_entries(entries_in(saved, "kept")) or None
        self.watch.resume(saved.skipped)
        self.timing.resume(saved.step, saved.tensors["step_ms"].tolist(), saved.used)
        set_random_states(*states_of(rank, saved.random, saved.tensors), self.device)


def space_for(parameters: Trained, regular: bool) -> int:
    """About how many bytes the checkpoints and the delta of a run take at most.

    Of checkpoints that are `regular`, one is written beside those that are kept; otherwise there is
    one at most, which a signal asks for.
    """
    files = KEPT + 1 if regular else 1
    return len(parameters) * (ENTRY_BYTES * files + DELTA_BYTES) + MORE_BYTES
