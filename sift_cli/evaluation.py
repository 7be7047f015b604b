"""A model on a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.metrics import compute_metrics
from sift_cli.tokens import Encoded, cut

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """bfloat16 autocast on `device`, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def place(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on `device`; for a GPU in a way that the host need not wait for.

    There, an attention mask that hides nothing is left out, since it is read here and now.
    """
    if device.type != "cuda":
        return {key: value.to(device) for key, value in batch.items()}
    return {
        key: value.pin_memory().to(device, non_blocking=True)
        for key, value in without_idle_mask(batch).items()
    }


def without_idle_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch, without its attention mask where that hides nothing."""
    mask = batch.get("attention_mask")
    idle = mask is not None and bool(mask.all())
    return {key: value for key, value in batch.items() if not (idle and key == "attention_mask")}


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


def score_splits(
    logits: Mapping[str, Tensor],
    splits: Mapping[str, Encoded],
    metrics: Sequence[str],
    regression: bool = False,
) -> dict[str, float | None]:
    """Each metric of each split's logits; a split's key is the suffix of its metrics' names."""
    found: dict[str, float | None] = {}
    for suffix, data in splits.items():
        outputs = logits[suffix]
        predicted = outputs.squeeze(-1) if regression else outputs.argmax(-1)
        labels = torch.tensor(data.rows["label"][:])
        for name, value in compute_metrics(metrics, predicted.numpy(), labels.numpy()).items():
            found[name + suffix] = value
    return found


@torch.no_grad()
def probe_logits(model: nn.Module, config: PretrainedConfig) -> Tensor:
    """Logits of four made-up inputs, fp32 [4, outputs]: the model's mark, and no one's data."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    text = config.get_text_config()
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "sep")}
    plain = [token for token in range(text.vocab_size) if token not in special]
    spread = (torch.arange(4 * 16) * 7919 + 104729) % len(plain)
    ids = torch.tensor(plain)[spread].view(4, 16)
    if isinstance(text.eos_token_id, int):
        ids[:, -1] = text.eos_token_id  # some heads read the state at the end-of-text token
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    logits: Tensor = model(**inputs).logits.float().cpu()
    model.train(training)
    return logits
