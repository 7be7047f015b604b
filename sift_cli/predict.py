"""A tuned model on a few texts."""

from collections.abc import Sequence
from typing import Any

import torch

from sift_cli.models.loading import LoadedModel


@torch.no_grad()
def predict(
    loaded: LoadedModel,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    device: torch.device,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """One object per text: `label` and `probability`, or `score` for a regression."""
    model, tokenizer = loaded.model, loaded.tokenizer
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    inputs = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    batch = tokenizer(
        *inputs, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    ).to(device)
    logits = model(**batch).logits.float().cpu()
    out: list[dict[str, Any]] = []
    for at, text in enumerate(texts):
        one: dict[str, Any] = {"text": text} | ({"pair": pairs[at]} if pairs else {})
        if model.config.num_labels == 1:
            one["score"] = float(logits[at, 0])
        else:
            probabilities = logits[at].softmax(-1)
            code = int(probabilities.argmax())
            one["label"] = model.config.id2label[code]  # type: ignore[index]
            one["probability"] = float(probabilities[code])
        out.append(one)
    return out
