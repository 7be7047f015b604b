"""What a run keeps for its report: predictions, what became of each weight, what its mask keeps."""

import json
from collections.abc import Collection, Iterable, Mapping
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.runs.folder import GRADIENT_FILE, PREDICTIONS_FILE, WEIGHTS_FILE
from sift_cli.runs.session import Session
from sift_cli.selection.targets import linear_layers
from sift_cli.sparse import SparseParameters, Support
from sift_cli.system.files import write_text

MISTAKES = 10  # so many rows of a split keep their text


def write_predictions(
    out: Path, session: Session, logits: Mapping[str, Tensor], split: str
) -> None:
    """Writes predictions.jsonl: a line for each row, in order, of each split's logits.

    A line holds the row's number in its source split, label and prediction (with its probability,
    where there are classes). The ten worst mistakes of a split also hold their text.
    """
    _write_lines(
        out / PREDICTIONS_FILE,
        (
            {"split": split + suffix, **line}
            for suffix, outputs in logits.items()
            for line in _predictions(session, suffix, outputs)
        ),
    )


def _predictions(session: Session, suffix: str, logits: Tensor) -> list[dict[str, Any]]:
    rows, names = session.task.evaluation[suffix], session.task.labels
    labels = torch.tensor(rows["label"][:])
    if names is None:
        predicted = logits.squeeze(-1)
        error = (predicted - labels).abs()
        said: list[dict[str, Any]] = [
            {"label": _short(label), "predicted": _short(value)}
            for label, value in zip(labels.tolist(), predicted.tolist(), strict=True)
        ]
    else:
        probability, code = logits.softmax(-1).max(-1)
        error = probability.where(code != labels, 0.0)
        said = [
            {"label": names[label], "predicted": names[one], "probability": _short(value)}
            for label, one, value in zip(
                labels.tolist(), code.tolist(), probability.tolist(), strict=True
            )
        ]
    lines = [{"row": row, **one} for row, one in zip(rows["row"][:], said, strict=True)]
    worst = error.sort(descending=True, stable=True).indices[:MISTAKES].tolist()
    for at in worst:
        if float(error[at]) > 0:
            one = rows[at]
            lines[at] |= {key: one[key] for key in ("text", "pair") if key in one}
    return lines


def write_gradient(out: Path, gathered: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
    """Writes gradient.jsonl: a line for each weight in `norms`, of the first batch's gradient.

    `norm` is that 2-norm, `kept` the one of what the weight's trained entries have `gathered`.
    Weights whose norm is too large for fp32 are left out.
    """
    pairs = ((name, float(norm), _norm(gathered.get(name))) for name, norm in norms.items())
    _write_lines(
        out / GRADIENT_FILE,
        (
            {"name": name, "norm": _short(norm), "kept": _short(kept)}
            for name, norm, kept in pairs
            if isfinite(norm) and isfinite(kept)
        ),
    )


def write_weights(
    out: Path, model: nn.Module, parameters: SparseParameters, whole: Collection[str]
) -> None:
    """Writes weights.jsonl: a line for each weight of which entries trained.

    `entries` is the size of its support at the end, `touched` counts all that ever trained; `rms`
    and `largest` tell how far these are from the base, `base_rms` how large they were there.
    `half_in_inputs` is the share of a linear layer's inputs that hold half of its entries. Weights
    in `whole` train whole.
    """
    named = dict(model.named_parameters())
    supports = {segment.name: segment.support for segment in parameters}
    layers = linear_layers(model)

    def line(name: str, touched: Support, base: Tensor) -> dict[str, Any]:
        weight = named[name]
        before = base.double()
        change = touched.to(weight.device).gather(weight).cpu().double() - before
        support = supports.get(name)
        found = {
            "name": name,
            "shape": list(weight.shape),
            "entries": 0 if support is None else len(support),
            "touched": len(touched),
            "whole": name in whole,
            "rms": _short(_rms(change)),
            "largest": _short(float(change.abs().max())),
            "base_rms": _short(_rms(before)),
        }
        if name in layers and weight.dim() == 2 and support is not None and name not in whole:
            held = support.positions
            if held is not None:
                width = weight.shape[1]
                inputs = held // width if layers[name].transposed else held % width
                size = weight.shape[0 if layers[name].transposed else 1]
                found["half_in_inputs"] = _short(_half(inputs, size))
        return found

    _write_lines(out / WEIGHTS_FILE, (line(*one) for one in parameters.touched))


def _half(places: Tensor, size: int) -> float:
    """The smallest share of `size` places that holds half of `places` ([K], integers)."""
    counts = torch.bincount(places.long().cpu(), minlength=size).sort(descending=True).values
    enough = counts.cumsum(0) >= len(places) / 2
    return (int(enough.int().argmax()) + 1) / size


def _norm(values: Tensor | None) -> float:
    return 0.0 if values is None else float(torch.linalg.vector_norm(values))


def _rms(values: Tensor) -> float:
    return sqrt(float(values.square().mean()))


def _short(value: float) -> float:
    """Six digits: what a report shows, and no rounding noise."""
    return float(f"{value:.6g}")


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(path, text)
