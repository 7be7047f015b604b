"""What a merge starts from: its deltas, checked against each other, and the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sift_cli.convert.undo import MergeRecord, read_record
from sift_cli.delta.file import Delta, WeightDelta, load_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import model_folder
from sift_cli.runs.folder import delta_file
from sift_cli.tasks.kinds import task_of
from sift_cli.tasks.task import Task


@dataclass(frozen=True)
class Inputs:
    """What a merge starts from: deltas, and the model in `folder`, which messages call `source`.

    `owner` is the place of the delta that head and labels come from. `record` is what the merge
    left in the folder that `undo` turns back, None where others have saved that folder anew.
    """

    paths: list[Path]
    deltas: list[Delta]
    owner: int
    source: str
    folder: Path
    undo: bool
    record: MergeRecord | None

    @property
    def delta(self) -> Delta:
        """The delta that head and labels come from."""
        return self.deltas[self.owner]

    @property
    def task(self) -> Task:
        """What that delta's model is for."""
        return task_of(self.delta.header)


def weight_of_each(weights: Sequence[float], paths: Sequence[Path]) -> tuple[float, ...]:
    """A weight for each delta at `paths`, 1 where none is given; SiftError for another number."""
    if weights and len(weights) != len(paths):
        raise SiftError(f"{len(paths)} deltas, but {len(weights)} --weight; give one for each")
    return tuple(weights) or (1.0,) * len(paths)


def open_inputs(paths: list[Path], head: Path | None, base: str | None, undo: bool) -> Inputs:
    """Reads the deltas, checks that they go together, and finds the model to start from.

    Raises SiftError: exit code 2 where deltas or model are not there or each delta has a head of
    its own and `head` names none, 3 for damaged deltas or such of different bases.
    """
    deltas = [load_delta(path) for path in paths]
    _check_one_base(paths, deltas)
    owner = _head_owner(paths, deltas, delta_file(str(head)) if head else None)
    named = deltas[owner].header.base
    source = base or named.path
    try:
        folder = model_folder(source, None if base else named.revision)
    except SiftError as error:
        hint = "" if base else "; give the base with --base"
        raise SiftError(f"{error}{hint}", error.code) from None
    record = read_record(folder) if undo else None
    return Inputs(paths, deltas, owner, source, folder, undo, record)


def _check_one_base(paths: Sequence[Path], deltas: Sequence[Delta]) -> None:
    """Raises SiftError where two deltas disagree on a weight that both change."""
    seen: dict[str, tuple[int, WeightDelta]] = {}
    for at, delta in enumerate(deltas):
        for name, weight in delta.weights.items():
            first, other = seen.setdefault(name, (at, weight))
            if (other.base, other.dtype, other.shape) != (weight.base, weight.dtype, weight.shape):
                bases = [deltas[place].header.base for place in (first, at)]
                both = " and ".join(f"{base.path} ({base.dtype})" for base in bases)
                raise SiftError(
                    f"{paths[first]} and {paths[at]} are of different bases: {both} differ in "
                    f"{name}",
                    ExitCode.WRONG_FILE,
                )


def _head_owner(paths: Sequence[Path], deltas: Sequence[Delta], head: Path | None) -> int:
    """Which delta the head and the labels come from."""
    if head is not None:
        if head not in paths:
            raise SiftError(f"--head {head} is none of the deltas to merge")
        return paths.index(head)
    owners = [at for at, delta in enumerate(deltas) if delta.dense] or list(range(len(deltas)))
    first = deltas[owners[0]]
    for at in owners[1:]:
        other = deltas[at]
        if _wording(other) != _wording(first):
            raise SiftError(
                f"{paths[owners[0]]} and {paths[at]} were trained with different chat templates or "
                "system prompts; name the delta whose own the merged model gets with --head"
            )
        same = other.header.labels == first.header.labels
        same = same and other.dense.keys() == first.dense.keys()
        if not same or any(not torch.equal(one, first.dense[n]) for n, one in other.dense.items()):
            raise SiftError(
                f"{paths[owners[0]]} (labels {first.header.labels}) and {paths[at]} (labels "
                f"{other.header.labels}) each have a head of their own, and heads do not add; "
                "name the delta whose head the merged model gets with --head"
            )
    return owners[0]


def _wording(delta: Delta) -> tuple[Any, ...]:
    """What a language model is asked with."""
    stated = delta.header.language or {}
    return stated.get("template"), stated.get("system")
