"""The state of a run: all that changes from step to step, and how a checkpoint holds it."""

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.runs.checkpoint import KEPT, Checkpoint
from sift_cli.runs.timing import Timing
from sift_cli.training.kept import Kept
from sift_cli.training.method import Method, Optimizer, Trained
from sift_cli.training.packing import entries_in
from sift_cli.training.randomness import random_states, set_random_states
from sift_cli.training.watch import Watch

ENTRY_BYTES = 18  # about what an entry takes in a file: master, moments, position, best value
DELTA_BYTES = 6  # and in the delta
MORE_BYTES = 1 << 20  # and what does not grow with them: random states, fingerprints, metrics


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

    def gather(self, step: int) -> Checkpoint:
        """All of them after `step`. Waits for a GPU, and only here."""
        packed = self.method.pack(self.optimizer)
        packed.table.setdefault("kept", {})
        for name, (support, values) in (self.kept.state or {}).items():
            packed.put("kept", name, support, values)
        tensors = dict(packed.tensors)
        tensors |= {f"optimizer/{key}": one for key, one in self.optimizer.state().items()}
        generators, states = random_states(self.device)
        tensors |= states | {"step_ms": torch.tensor(self.timing.step_ms, dtype=torch.float64)}
        about = {
            "step": step,
            "supports": packed.table,
            "schedule": self.schedule.state_dict(),
            "kept": {
                "step": self.kept.step,
                "metrics": self.kept.metrics,
                "seen": self.kept.seen,
            },
            "skipped": self.watch.skipped,
            "random": generators,
            "used": self.timing.used(self.device),
        }
        return Checkpoint({key: one.cpu().contiguous() for key, one in tensors.items()}, about)

    def load(self, saved: Checkpoint) -> None:
        """Goes on from there; `optimizer` must be what `method.restore(saved)` gave."""
        about, tensors = saved.about, saved.tensors
        self.optimizer.load_state(
            {
                key.removeprefix("optimizer/"): one
                for key, one in tensors.items()
                if key.startswith("optimizer/")
            }
        )
        self.schedule.load_state_dict(about["schedule"])
        for group, rate in zip(
            self.optimizer.adamw.param_groups, self.schedule.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        self.kept.step, self.kept.seen = about["kept"]["step"], about["kept"]["seen"]
        self.kept.metrics, self.kept.state = (
            about["kept"]["metrics"],
            entries_in(saved, "kept") or None,
        )
        self.watch.resume(about["skipped"])
        self.timing.resume(saved.step, tensors["step_ms"].tolist(), about["used"])
        set_random_states(about["random"], tensors, self.device)


def space_for(parameters: Trained) -> int:
    """About how many bytes the checkpoints and the delta of a run take at most."""
    return len(parameters) * (ENTRY_BYTES * (KEPT + 1) + DELTA_BYTES) + MORE_BYTES
