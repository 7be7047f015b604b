"""A model on a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.devices import autocast, place
from sift_cli.tasks.tokens import Encoded, cut

if TYPE_CHECKING:
    pass

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    data: Encoded,
    collate: Collate,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    bf16: bool = False,
) -> Tensor:
    """Logits of every row, in the order of the rows, fp32 [N, outputs] on the host.

    Batches go from long rows to short ones, so that memory runs out at once or not at all.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    order = sorted(range(len(data)), key=lambda at: -data.lengths[at])
    parts = []
    for rows in cut(order, data.lengths, batch_size, max_tokens):
        batch = collate(data.take(rows))
        inputs = place({key: value for key, value in batch.items() if key != "labels"}, device)
        with autocast(device, bf16):
            parts.append(model(**inputs).logits.float().cpu())
    model.train(training)
    logits = torch.cat(parts)
    restored = torch.empty_like(logits)
    restored[torch.tensor(order)] = logits
    return restored


def predict_splits(
    model: nn.Module,
    splits: Mapping[str, Encoded],
    collate: Collate,
    *,
    batch_size: int = 64,
    max_tokens: int | None = None,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """The logits of each split, as `predict_logits` gives them, by the split's suffix.

    Raises SiftError (exit code 4) where the model's outputs are not finite.
    """
    found = {}
    for suffix, data in splits.items():
        logits = predict_logits(
            model, data, collate, batch_size=batch_size, max_tokens=max_tokens, bf16=bf16
        )
        if not bool(torch.isfinite(logits).all()):
            rows = data.numbers((~logits.isfinite().all(-1)).nonzero().flatten().tolist()[:5])
            raise SiftError(
                f"evaluation: the model's outputs are not finite, such as for rows {rows}",
                ExitCode.NOT_FINITE,
            )
        found[suffix] = logits
    return found
