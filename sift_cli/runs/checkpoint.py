"""Checkpoints: all that a run needs to go on bit for bit, of what it trains alone.

A checkpoint is one safetensors file, `step-STEP-HASH.safetensors`: it is damaged where its bytes do
not have the hash. What is no tensor stands as JSON in its metadata. The rest of the model is the
base, whose fingerprints are in there too.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import CheckpointSection, load_recipe
from sift_cli.runs.facts import Facts, differences, recipe_changes, settings_of
from sift_cli.runs.folder import CHECKPOINT_NAME, CHECKPOINTS, RATES, RECIPE_FILE
from sift_cli.runs.summary import Summary
from sift_cli.runs.timing import Used
from sift_cli.system.files import sha256_of, sync

KEPT = 2  # files


@dataclass(frozen=True)
class Best:
    """The step of the weights kept so far, what they score, and the step evaluated last.

    `stale` counts the evaluations since the best one.
    """

    step: int
    metrics: dict[str, float | None] | None
    seen: int
    stale: int = 0  # of the checkpoints of older versions


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All of a run after `step`: `tensors` by name, and what stands as JSON beside them.

    `supports` has shape and count of each support by kind and name; `schedule` and `random` are for
    those who gave them: the learning rate and the generators.
    """

    tensors: Mapping[str, Tensor]
    step: int
    supports: Mapping[str, Mapping[str, Any]]
    schedule: Mapping[str, Any]
    kept: Best
    skipped: int
    random: Mapping[str, Any]
    used: Used
    facts: Facts
    metrics_before: dict[str, float | None]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> "Checkpoint":
        """From the tensors of a file and the JSON in it."""
        own = {
            "kept": Best(**values["kept"]),
            "used": Used(**values["used"]),
            "facts": Facts(**values["facts"]),
        }
        return cls(tensors=tensors, **{**values, **own})

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        del values["tensors"]
        return values | {
            "kept": asdict(self.kept),
            "used": asdict(self.used),
            "facts": asdict(self.facts),
        }


class Checkpoints:
    """The checkpoints of the run in `out`: when one is due, the files, the newest that is whole."""

    def __init__(self, out: Path, section: CheckpointSection, console: Console) -> None:
        self.out, self.folder = out, out / CHECKPOINTS
        self.section, self.console = section, console
        self._saved_at = time.monotonic()

    @property
    def by_clock(self) -> bool:
        """Whether time says when one is due, and not the number of the step."""
        return self.section.seconds is not None

    def due(self, step: int) -> bool:
        """Whether to save after this step; and before the first, once what trains is chosen."""
        seconds, every = self.section.seconds, self.section.every
        if seconds is not None:
            return step == 0 or time.monotonic() - self._saved_at >= seconds
        return isinstance(every, int) and step % every == 0

    def save(self, saved: Checkpoint) -> None:
        """Writes one; keeps the one before it."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / "partial"
        text = json.dumps(saved.to_json())
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
        return sorted(
            path for path in self.folder.glob("*") if CHECKPOINT_NAME.fullmatch(path.name)
        )

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
                values = json.loads(file.metadata()["sift"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._compare(Facts(**values["facts"]), here)  # first: of another format, all differs
            return Checkpoint.of(tensors, values)
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

    def require_none(self) -> None:
        """Raises SiftError where the folder holds a run, whole or not."""
        if Summary.read(self.out) is not None:
            raise SiftError(
                f"{self.out} holds a finished run; choose another --out, or pass --overwrite"
            )
        files = self.files()
        where = f"after step {_step(files[-1]):,}" if files else "amid its trials of learning rates"
        if files or (self.out / RATES).is_dir():
            raise SiftError(
                f"{self.out} holds a run that was interrupted {where}; "
                "go on with --resume, or begin anew with --overwrite"
            )

    def finished(self, settings: Mapping[str, Any], *, policy: str | None) -> Summary | None:
        """The summary of the run in the folder, which is to be resumed, where it has finished.

        Raises SiftError where it was of another recipe.
        """
        summary = Summary.read(self.out)
        if summary is None:
            return None
        there = settings_of(load_recipe(self.out / RECIPE_FILE))
        changes = recipe_changes(there, settings)
        if policy not in (None, summary.policy):
            changes.append(f"method: it was {summary.policy}, now it is {policy}")
        if changes:
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


def _other_run(out: Path, changes: list[str], code: ExitCode) -> SiftError:
    shown = "\n  ".join(changes)
    return SiftError(
        f"{out}: --resume continues the same run, and this would be another one:\n  {shown}\n"
        "Undo the change, choose another --out, or begin anew with --overwrite",
        code,
    )


def _step(path: Path) -> int:
    found = CHECKPOINT_NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _mark(path: Path) -> str:
    found = CHECKPOINT_NAME.fullmatch(path.name)
    assert found is not None
    return found[2]
