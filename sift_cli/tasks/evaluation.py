"""A model's outputs on a split, and on made-up inputs: what is kept of them, the task says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.devices import autocast, evaluating, place, ungraded
from sift_cli.models.fingerprints import probe_inputs
from sift_cli.models.loading import UNLIMITED, LoadedModel, longest_row
from sift_cli.tasks.task import Task
from sift_cli.tasks.tokens import Encoded, PlainRows, cut, require_readable

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BATCH = 32  # rows that are asked about at once
# Architectures that mix tokens past their mask: a row comes out as it does alone where it is alone.
READ_PADDING = ("canine", "convbert", "fnet", "funnel", "yoso")
Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]
# What a function makes of each batch, in their order; processes may share them
Each = Callable[[Callable[[list[int]], Tensor], Sequence[list[int]]], list[Tensor]]
Outputs = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]  # of a batch, [B, ...]


def every(run: Callable[[list[int]], Tensor], batches: Sequence[list[int]]) -> list[Tensor]:
    """All of them, one after the other."""
    return [run(one) for one in batches]


@dataclass(frozen=True)
class Asking:
    """How a model is asked about texts: where, of how many tokens each, in which batches.

    Texts are cut to `max_length` tokens, or to what the model has positions for.
    """

    device: torch.device
    max_length: int | None = None
    batch_size: int = BATCH
    max_tokens: int | None = None
    bf16: bool = False


@dataclass(frozen=True)
class Asked:
    """What a task says of each text that someone asks about, and how many `longest` tokens cut."""

    answers: list[dict[str, Any]]
    cut: int
    longest: int


def collect_outputs(
    task: Task,
    model: nn.Module,
    data: Encoded,
    collate: Collate,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    bf16: bool = False,
    each: Each = every,
) -> Tensor:
    """The task's outputs of every row, in the order of the rows, fp32 [N, ...] on the host.

    Raises what `collect` raises.
    """
    return collect(
        task.outputs,
        model,
        data,
        range(len(data)),
        collate,
        batch_size=batch_size,
        max_tokens=max_tokens,
        bf16=bf16,
        each=each,
    )


def collect_asked(
    task: Task, loaded: LoadedModel, rows: Mapping[str, Sequence[Any]], asking: Asking
) -> tuple[Encoded, Tensor, int]:
    """Rows that someone asks about as tokens, their outputs, and the most tokens that a row keeps.

    `rows` are their columns; outputs are as `collect_outputs` gives them. Raises SiftError for a
    row that the model cannot read.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    model.to(asking.device)  # type: ignore[arg-type]
    longest = min(asking.max_length or UNLIMITED, longest_row(model, tokenizer))
    data = task.encode(PlainRows(rows), tokenizer, longest)
    require_readable(data, model.config, "predict: there are")
    outputs = collect_outputs(
        task,
        model,
        data,
        partial(task.collate, tokenizer=tokenizer),
        batch_size=asking.batch_size,
        max_tokens=asking.max_tokens,
        bf16=asking.bf16,
    )
    return data, outputs, longest


def collect(
    outputs: Outputs,
    model: nn.Module,
    data: Encoded,
    rows: Sequence[int],
    collate: Collate,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    bf16: bool = False,
    each: Each = every,
) -> Tensor:
    """What `outputs` makes of each of `rows`, in their order, fp32 [N, ...] on the host.

    Batches go from long rows to short ones, so that memory runs out at once or not at all; `each`
    runs them. Raises SiftError (exit code 4) where outputs are not finite, naming rows.
    """
    device = next(model.parameters()).device
    if getattr(getattr(model, "config", None), "model_type", None) in READ_PADDING:
        batch_size = 1
    order = sorted(range(len(rows)), key=lambda at: -data.lengths[rows[at]])

    def run(some: list[int]) -> Tensor:
        batch = place(collate(data.take(some)), device)
        with autocast(device, bf16):
            return outputs(model, batch).float().cpu()

    with evaluating(model), ungraded(model):
        parts = each(run, cut([rows[at] for at in order], data.lengths, batch_size, max_tokens))
    found = torch.cat(_as_wide(parts))
    restored = torch.empty_like(found)
    restored[torch.tensor(order)] = found
    wrong = ~restored.isfinite().flatten(1).all(-1)
    if bool(wrong.any()):
        numbers = data.numbers([rows[at] for at in wrong.nonzero().flatten().tolist()[:5]])
        raise SiftError(
            f"evaluation: the model's outputs are not finite, such as for rows {numbers}, "
            "counted from 0",
            ExitCode.NOT_FINITE,
        )
    return restored


def _as_wide(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts of [B, W, ...] with zeros up to the largest W; others as they are."""
    if parts[0].dim() < 3:
        return list(parts)
    widest = max(part.shape[1] for part in parts)
    return [
        torch.cat([part, part.new_zeros(len(part), widest - part.shape[1], *part.shape[2:])], 1)
        for part in parts
    ]


@torch.no_grad()
def probe(task: Task, model: nn.Module, config: PretrainedConfig) -> Tensor:
    """The task's mark of a model by four made-up inputs, fp32 [4, ...]: no one's data."""
    device = next(model.parameters()).device
    ids = probe_inputs(config)
    batch = {**task.example(ids), "attention_mask": torch.ones_like(ids)}
    on_device = {key: value.to(device) for key, value in batch.items()}
    with evaluating(model):
        return task.mark(model, on_device).float().cpu()
