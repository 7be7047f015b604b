"""The state of a run: all that changes from step to step, and how a checkpoint holds it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.delta.coding import encode_positions
from sift_cli.runs.checkpoint import KEPT, Checkpoint
from sift_cli.runs.timing import Timing
from sift_cli.sparse import SparseAdamW, SparseParameters, Support
from sift_cli.training.kept import Kept
from sift_cli.training.randomness import random_states, set_random_states
from sift_cli.training.watch import Watch

ENTRY_BYTES = 18  # about what an entry takes in a file: master, moments, position, best value


DELTA_BYTES = 6  # and in the delta


MORE_BYTES = 1 << 20  # and what does not grow with them: random states, fingerprints, metrics


@dataclass(frozen=True)
class State:
    """The parts of a run that change from step to step."""

    parameters: SparseParameters
    optimizer: SparseAdamW
    schedule: LRScheduler
    kept: Kept
    watch: Watch
    timing: Timing
    device: torch.device

    def gather(self, step: int) -> Checkpoint:
        """All of them after `step`. Waits for a GPU, and only here."""
        tensors = {"masters": self.parameters.flat.detach()}
        tensors |= {f"optimizer/{key}": one for key, one in self.optimizer.state().items()}
        table: dict[str, dict[str, Any]] = {"support": {}, "touched": {}, "kept": {}}

        def put(kind: str, name: str, support: Support, values: Tensor | None = None) -> None:
            table[kind][name] = [list(support.shape), len(support)]
            if support.positions is not None:
                coded = encode_positions(support.positions, support.shape)
                tensors[f"{kind}/{name}/positions"] = coded
            if values is not None:
                tensors[f"{kind}/{name}/values"] = values

        trained = {segment.name: segment.support for segment in self.parameters}
        for name, support in trained.items():
            put("support", name, support)
        for name, (support, values) in self.parameters.state().items():
            if name not in trained or len(trained[name]) < len(support):  # some have left
                put("touched", name, support, values)
        for name, (support, values) in (self.kept.state or {}).items():
            put("kept", name, support, values)
        said, states = random_states(self.device)
        tensors |= states | {"step_ms": torch.tensor(self.timing.step_ms, dtype=torch.float64)}
        about = {
            "step": step,
            "supports": table,
            "schedule": self.schedule.state_dict(),
            "kept": {
                "step": self.kept.step,
                "metrics": self.kept.metrics,
                "seen": self.kept.seen,
            },
            "skipped": self.watch.skipped,
            "random": said,
            "used": self.timing.used(self.device),
        }
        return Checkpoint({key: one.cpu().contiguous() for key, one in tensors.items()}, about)

    def load(self, saved: Checkpoint) -> None:
        """Goes on from there; `parameters` must be what `saved.attach` gave."""
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
        self.kept.metrics, self.kept.state = about["kept"]["metrics"], saved.kept()
        self.watch.resume(about["skipped"])
        self.timing.resume(saved.step, tensors["step_ms"].tolist(), about["used"])
        set_random_states(about["random"], tensors, self.device)


def space_for(parameters: SparseParameters) -> int:
    """About how many bytes the checkpoints and the delta of a run take at most."""
    return len(parameters) * (ENTRY_BYTES * (KEPT + 1) + DELTA_BYTES) + MORE_BYTES
