"""The loss of causal language models, a sum over supervised tokens, and what evaluations keep.

Logits are the largest tensor of a step: a row of the vocabulary for each token. So only positions
whose next token is supervised meet the output head, some at a time, and the logits of all but the
last of these chunks are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sift_cli.models.names import architecture_of
from sift_cli.models.readout import Readout, readout_of, states_of, whole_logits, within_forward
from sift_cli.tasks.task import Loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CHUNK_BYTES = {"cpu": 1 << 25}  # of a chunk's logits in fp32, by the kind of device
ELSEWHERE = 1 << 28  # a GPU is fast at large products only
MOST = 1024  # positions at a time


@dataclass(frozen=True)
class Chunks:
    """So many positions at a time through the head, whose output becomes logits by `readout`."""

    positions: int
    readout: Readout


def chunks_of(model: PreTrainedModel, asked: int | str) -> tuple[Chunks | None, str | None]:
    """How to chunk the loss of a model, None for not at all; and what to say where that is forced.

    `asked` is a number of positions, `off`, or `auto`: 32 MiB of fp32 logits, 256 MiB on a
    GPU, and at most 1,024 positions.
    """
    if asked == "off":
        return None, None
    readout = readout_of(model)
    if isinstance(readout, str):
        return None, f"train.chunk_loss: off for {architecture_of(model)}: {readout}"
    found = expected_chunks(model.config, model.device.type, asked)
    return found and replace(found, readout=readout), None


def expected_chunks(config: PretrainedConfig, kind: str, asked: int | str) -> Chunks | None:
    """What `chunks_of` gives for a model that is not there, on such a kind of device.

    As if its head's output were its logits.
    """
    if asked == "off":
        return None
    if isinstance(asked, int):
        return Chunks(asked, Readout())
    width = config.get_text_config().vocab_size
    most = CHUNK_BYTES.get(kind, ELSEWHERE) // (4 * width)
    return Chunks(max(1, min(MOST, most)), Readout())


def token_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], chunks: Chunks | None) -> Loss:
    """The summed loss of the supervised tokens of a batch, padded or packed, with its graph.

    Cross-entropy is of fp32 or wider for each token, the sum of fp64 where the device has it.
    """
    predicts, targets = batch["predicts"], _targets(batch)
    if chunks is None:
        logits = _at(whole_logits(model, batch), predicts)
        return Loss(_losses(logits, targets).sum(dtype=_widest(logits)), len(predicts))
    return Loss(within_forward(model, partial(_by_chunks, model, batch, chunks)), len(predicts))


def _by_chunks(model: PreTrainedModel, batch: Mapping[str, Tensor], chunks: Chunks) -> Tensor:
    """The summed loss of a batch, [], so many positions at a time."""
    logits_of = partial(chunks.readout, model.get_output_embeddings())

    def summed(hidden: Tensor, targets: Tensor) -> Tensor:
        return _losses(logits_of(hidden), targets).sum(dtype=_widest(hidden))

    parts = _chunked(model, batch, chunks)
    recomputed = parts[:-1] if torch.is_grad_enabled() else []
    sums = [checkpoint(summed, *part, use_reentrant=False) for part in recomputed]
    # Backward begins with the last chunk, so its logits are held for no longer than there.
    sums += [summed(*part) for part in parts[len(recomputed) :]]
    return torch.stack(sums).sum()


@torch.no_grad()
def token_outputs(
    model: PreTrainedModel, batch: Mapping[str, Tensor], chunks: Chunks | None
) -> Tensor:
    """Of each row of a batch: its summed loss, its targets, and how many of them come out right.

    [B, 3], in the order of the rows, be they padded or packed: what `score_tokens` takes.
    """
    predicts, targets = batch["predicts"], _targets(batch)
    if chunks is None:
        each = _judged(_at(whole_logits(model, batch), predicts), targets)
    else:
        each = within_forward(model, partial(_judged_by_chunks, model, batch, chunks))
    row, count = _rows(batch)
    return each.new_zeros(count, 3).index_add_(0, row[predicts], each)


def _judged_by_chunks(
    model: PreTrainedModel, batch: Mapping[str, Tensor], chunks: Chunks
) -> Tensor:
    """What `_judged` gives of a batch, so many positions at a time."""
    logits_of = partial(chunks.readout, model.get_output_embeddings())
    parts = _chunked(model, batch, chunks)
    return torch.cat([_judged(logits_of(some), wanted) for some, wanted in parts])


def _chunked(
    model: PreTrainedModel, batch: Mapping[str, Tensor], chunks: Chunks
) -> list[tuple[Tensor, Tensor]]:
    """The last hidden states that meet the head and what they are to give, so many at a time."""
    hidden = _at(states_of(model, batch), batch["predicts"])
    size = chunks.positions
    return list(zip(hidden.split(size), _targets(batch).split(size), strict=True))


def _judged(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss, 1, and whether it is right, of each position: [P, 3]."""
    losses = _losses(logits, targets).to(_widest(logits))
    right = (logits.argmax(-1) == targets).to(losses)
    return torch.stack([losses, torch.ones_like(losses), right], -1)


def _rows(batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """To which row each flat position belongs (int64 [B * T]), and how many rows there are."""
    starts = batch.get("position_ids")
    if starts is not None:
        row = (starts.flatten() == 0).cumsum(0) - 1
        return row, int(row[-1]) + 1
    high, wide = batch["input_ids"].shape
    return torch.arange(high, device=batch["input_ids"].device).repeat_interleave(wide), high


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """The token that each of `predicts` is to predict, int64 [P]."""
    return batch["labels"].flatten()[batch["predicts"] + 1]


def _at(states: Tensor, predicts: Tensor) -> Tensor:
    """The states ([B, T, ...]) at flat positions: [P, ...]."""
    return states.flatten(0, 1).index_select(0, predicts)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each position, [P], in fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none")


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
