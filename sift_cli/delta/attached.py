"""The delta of a model that trains in a loop of the caller's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sift_cli.delta.build import build_delta, versions
from sift_cli.delta.file import Delta
from sift_cli.delta.header import Base, Header
from sift_cli.errors import ExitCode, SiftError, counted, in_lines
from sift_cli.models.fingerprints import fingerprint, state_fingerprints, state_tensors
from sift_cli.sparse import SparseParameters

PLACE = "_sift_attached"  # of the record on its model, with which it goes


@dataclass(frozen=True, eq=False)
class Attached:
    """What trains of a model, and what that was before.

    `new` names the parameters that the base lacks, `marks` are the fingerprints of all other
    tensors before training.
    """

    parameters: SparseParameters
    new: tuple[str, ...]
    marks: Mapping[str, str]
    base: Base
    policy: str

    def keep(self) -> None:
        """Notes it with its model."""
        self.parameters.model.__dict__[PLACE] = self


def attached_to(model: nn.Module) -> Attached | None:
    """What `sparsify` noted with the model."""
    found: Attached | None = model.__dict__.get(PLACE)
    return found


def delta_of(model: nn.Module) -> Delta:
    """The change that training has made to a model since `sparsify`.

    Raises SiftError where the model has not been through that, and (exit code 3) where something
    else has changed it as well.
    """
    attached = attached_to(model)
    if attached is None:
        raise SiftError("Delta.of: the model has not been through sift.sparsify: no base is known")
    header = Header(
        base=attached.base,
        architecture=type(model).__name__,
        policy=attached.policy,
        metrics={},
        versions=versions(),
        **_stated(model),
    )
    delta = build_delta(attached.parameters, attached.new, attached.marks, header)
    _require_no_other_change(model, delta, attached.marks)
    return delta


def _stated(model: nn.Module) -> dict[str, Any]:
    """What the header says of the task, and the logits; nothing of a model of no known task."""
    from transformers import PreTrainedModel

    from sift_cli.tasks.evaluation import probe
    from sift_cli.tasks.kinds import task_of_tuned

    if not isinstance(model, PreTrainedModel):
        return {}
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]  # not those of the checkpoint
    try:
        task = task_of_tuned(config, "the model")
    except SiftError:
        return {}
    return {**task.header(), "logits": probe(task, model, model.config).tolist()}


@torch.no_grad()
def _require_no_other_change(model: nn.Module, delta: Delta, marks: Mapping[str, str]) -> None:
    """Raises SiftError where the model without the delta is not what it was before."""
    state = state_tensors(model)
    found = state_fingerprints(model, [*delta.dense, *delta.weights])
    for name, change in delta.weights.items():
        before = state[name].detach().clone()
        change.toggle_(before)
        found[name] = fingerprint(before)
    wrong = sorted(name for name, mark in marks.items() if found.get(name) != mark)
    if wrong:
        raise SiftError(
            "Delta.of: something else than the entries that sparsify chose has changed: "
            f"{counted(len(wrong), 'tensor', 'tensors')}:\n  {in_lines(wrong)}",
            ExitCode.WRONG_FILE,
        )
