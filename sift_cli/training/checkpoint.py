"""Checkpoints: all that a run needs to go on bit for bit, of the trained entries alone.

A checkpoint is one safetensors file, `step-STEP-HASH.safetensors`: it is damaged where its bytes do
not have the hash. What is no tensor stands as JSON in its metadata. The rest of the model is the
base, whose fingerprints are in there too.
"""

import json
import random
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from sift_cli.delta.coding import decode_positions, encode_positions
from sift_cli.delta.tuned import RECIPE_FILE
from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import CheckpointSection, Recipe, load_recipe
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, Touched, attach
from sift_cli.system.files import sha256_of, sync
from sift_cli.training.facts import Facts, differences, recipe_changes
from sift_cli.training.kept import Kept
from sift_cli.training.run import NO_RESULT, Timing, read_summary
from sift_cli.training.watch import Watch

FOLDER = "checkpoint"
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.safetensors")
KEPT = 2  # files
ENTRY_BYTES = 18  # about what an entry takes in a file: master, moments, position, best value
DELTA_BYTES = 6  # and in the delta
MORE_BYTES = 1 << 20  # and what does not grow with them: random states, fingerprints, metrics


@dataclass(frozen=True)
class Checkpoint:
    """One as it was read: `tensors` by name, and `about`, the JSON."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step that is in it."""
        return int(self.about["step"])

    def attach(self, model: nn.Module, offload: bool = False) -> SparseParameters:
        """The sparse parameters as they were, on a model that is the base."""
        table, named = self.about["supports"], dict(model.named_parameters())
        supports = {name: self._support("support", name) for name in table["support"]}
        touched = Touched()
        for name in table["touched"]:
            touched.add(name, self._support("touched", name), named[name])
        parameters = attach(model, supports, touched=touched, offload=offload)
        parameters.load_state(
            {
                name: (self._support("touched", name), self.tensors[f"touched/{name}/values"])
                for name in table["touched"]
            }
        )
        parameters.flat.data.copy_(self.tensors["masters"])
        parameters.write_back()
        return parameters

    def kept(self) -> dict[str, tuple[Support, Tensor]] | None:
        """The weights of the best evaluation."""
        table = self.about["supports"]["kept"]
        if not table:
            return None
        return {
            name: (self._support("kept", name), self.tensors[f"kept/{name}/values"])
            for name in table
        }

    def _support(self, kind: str, name: str) -> Support:
        shape, count = self.about["supports"][kind][name]
        coded = self.tensors.get(f"{kind}/{name}/positions")
        if coded is None:
            return Support(tuple(shape))
        return Support.of(shape, decode_positions(coded, count, shape))


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


class Checkpoints:
    """The checkpoints of the run in `out`: when one is due, the files, the newest that is whole."""

    def __init__(self, out: Path, section: CheckpointSection, console: Console) -> None:
        self.out, self.folder = out, out / FOLDER
        self.section, self.console = section, console
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step; and before the first, once what trains is chosen."""
        seconds, every = self.section.seconds, self.section.every
        if seconds is not None:
            return step == 0 or time.monotonic() - self._saved_at >= seconds
        return isinstance(every, int) and step % every == 0

    def save(self, saved: Checkpoint, **more: object) -> None:
        """Writes one, with `more` beside what it says of itself; keeps the one before it."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / "partial"
        text = json.dumps({**saved.about, **more})
        try:
            save_file(dict(saved.tensors), partial, metadata={"sift": text})
            sync(partial)
            mark = sha256_of(partial)[:16]
            partial.replace(self.folder / f"step-{saved.step:08}-{mark}.safetensors")
        finally:
            partial.unlink(missing_ok=True)
        sync(self.folder)
        earlier = [path for path in self.files() if _step(path) < saved.step][-(KEPT - 1) :]
        for path in self.files():
            if path not in earlier and _mark(path) != mark:
                path.unlink()
        self._saved_at = time.monotonic()

    def files(self) -> list[Path]:
        """The files there are, oldest first."""
        return sorted(path for path in self.folder.glob("*") if NAME.fullmatch(path.name))

    def newest(self, here: Facts) -> Checkpoint | None:
        """The newest that is whole; None where there is none at all.

        Raises SiftError where it is that of another recipe or other data (exit code 2), or of
        another base (3), with what differs; and where every file is damaged (3).
        """
        files = self.files()
        for path in reversed(files):
            if not sha256_of(path).startswith(_mark(path)):
                self.console.print(f"{path} is damaged; looking for the one before", style="red")
                continue
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["sift"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._compare(Facts(**about["facts"]), here)
            return Checkpoint(tensors, about)
        if files:
            raise SiftError(
                f"{self.folder}: every checkpoint is damaged; begin anew with --overwrite",
                ExitCode.WRONG_FILE,
            )
        self.console.print(
            f"{self.out} holds no checkpoint; starting from the beginning",
            highlight=False,
        )
        return None

    def remove(self) -> None:
        """Takes all of them away."""
        for path in self.files():
            path.unlink()
        if self.folder.is_dir():
            (self.folder / "partial").unlink(missing_ok=True)
            with suppress(OSError):  # someone put more into it
                self.folder.rmdir()

    def finished(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The summary of the run in the folder where it is the one to resume, and has finished.

        Raises SiftError where the folder holds a run, and neither way to deal with it is chosen, or
        where the one to resume was of another recipe.
        """
        if overwrite:
            return None
        summary, files = read_summary(self.out), self.files()
        if summary is None:
            if files and not resume:
                raise SiftError(
                    f"{self.out} holds a run that was interrupted after step {_step(files[-1]):,}; "
                    "go on with --resume, or begin anew with --overwrite"
                )
            return None
        if not resume:
            raise SiftError(
                f"{self.out} holds a finished run; choose another --out, or pass --overwrite"
            )
        there = load_recipe(self.out / RECIPE_FILE)
        dumps = [one.model_dump(mode="json", exclude=NO_RESULT) for one in (there, recipe)]
        if changes := recipe_changes(*dumps):
            raise _other_run(self.out, changes, ExitCode.USAGE)
        self.console.print(f"{self.out} holds this run, finished; nothing to do", highlight=False)
        self.remove()
        return summary

    def _compare(self, there: Facts, here: Facts) -> None:
        found = differences(there, here)
        if found.refuse:
            code = ExitCode.WRONG_FILE if found.wrong_base else ExitCode.USAGE
            raise _other_run(self.out, found.refuse, code)
        for one in found.tell:
            self.console.print(f"on resuming, results may differ in the last bits: {one}")


def space_for(parameters: SparseParameters) -> int:
    """About how many bytes the checkpoints and the delta of a run take at most."""
    return len(parameters) * (ENTRY_BYTES * (KEPT + 1) + DELTA_BYTES) + MORE_BYTES


def random_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of every generator that a run may draw from, as JSON and as tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    said = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["random/mps"] = torch.mps.get_rng_state()
    return said, states


def set_random_states(
    said: Mapping[str, Any], states: Mapping[str, Tensor], device: torch.device
) -> None:
    """The other way round."""
    version, words, gauss = said["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = said["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["random/cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["random/cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["random/mps"])


def _other_run(out: Path, changes: list[str], code: ExitCode) -> SiftError:
    shown = "\n  ".join(changes)
    return SiftError(
        f"{out}: --resume continues the same run, and this would be another one:\n  {shown}\n"
        "Undo the change, choose another --out, or begin anew with --overwrite",
        code,
    )


def _step(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _mark(path: Path) -> str:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return found[2]
