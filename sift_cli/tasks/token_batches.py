"""Rows of tokens as batches: padded to the longest, or packed end to end into one row.

A row is a mapping with `input_ids` and `labels`, of one length; a label is the token itself where
it is supervised, and UNSEEN where it is not. The model predicts each token from those before it, so
the first of a row is never a target. Batches hold, beside what the model reads, `labels` and
`predicts`: int64 [P], the positions (in the batch laid out flat) whose next token is supervised.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sift_cli.models.devices import evaluating
from sift_cli.models.fingerprints import probe_inputs
from sift_cli.models.readout import apart, hidden_states, tolerance
from sift_cli.tasks.tokens import UNSEEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = Mapping[str, Any]


def padded(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels` (int64 [B, T]) and `predicts`, padded on the right.

    `pad` may be a token that rows hold, such as the end of a text: no label is told by it.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    labels = filled("labels", UNSEEN)
    return {
        "input_ids": filled("input_ids", pad),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": labels,
        "predicts": predicting(labels),
    }


def packed(rows: Sequence[Row]) -> dict[str, Tensor]:
    """`input_ids`, `position_ids`, `labels` (int64 [1, T]) and `predicts`: rows end to end.

    Positions start again with each row, by which transformers keeps rows from seeing each other;
    it looks at them only where there is neither an attention mask nor a cache. No row's first token
    is a target: the token before it is another row's.
    """
    ids = [list(row["input_ids"]) for row in rows]
    labels = torch.tensor([list(chain.from_iterable([UNSEEN, *row["labels"][1:]] for row in rows))])
    return {
        "input_ids": torch.tensor([list(chain.from_iterable(ids))]),
        "position_ids": torch.cat([torch.arange(len(one)) for one in ids])[None],
        "labels": labels,
        "predicts": predicting(labels),
    }


def rows_of(batch: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Some rows of a padded batch of any task, padded as they are."""
    own = torch.as_tensor(rows)
    taken = {key: value[own] for key, value in batch.items() if key != "predicts"}
    return taken | ({"predicts": predicting(taken["labels"])} if "predicts" in batch else {})


def predicting(labels: Tensor) -> Tensor:
    """The flat positions whose next token is supervised (int64 [P]), of labels [B, T]."""
    following = torch.full_like(labels, UNSEEN)
    following[:, :-1] = labels[:, 1:]
    return (following.flatten() != UNSEEN).nonzero().flatten()


@torch.no_grad()
def why_not_packed(model: PreTrainedModel) -> str | None:
    """In words why rows must not be packed for the model; None where they may.

    Two short rows of made-up tokens must have the hidden states packed that they have alone.
    """
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None:  # counted from the start of the pack, which short rows do not show
        return f"it attends within chunks of {chunk:,} tokens, and rows would lie across them"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no positions, so packed rows would see each other"
    ids = probe_inputs(model.config)
    rows = [{"input_ids": ids[0, :7].tolist()}, {"input_ids": ids[1, :9].tolist()}]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    with evaluating(model):
        alone = [_states(model, {"input_ids": torch.tensor([row["input_ids"]])}) for row in rows]
        difference = apart(_states(model, packed(rows)), torch.cat(alone, 1))
    if not difference < tolerance(model.dtype):
        return f"packed rows come out {difference:.1%} from the same rows alone"
    return None


def _states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    on_device = {key: value.to(model.device) for key, value in batch.items()}
    return hidden_states(model, on_device).cpu()
