"""What a run keeps for its report: predictions, what became of each weight, what its mask keeps."""

import json
from collections.abc import Collection, Iterable, Mapping
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sift_cli.runs.folder import GRADIENT_FILE, PREDICTIONS_FILE, WEIGHTS_FILE
from sift_cli.runs.session import Session
from sift_cli.selection.targets import linear_layers
from sift_cli.sparse import SparseParameters
from sift_cli.sparse.parameters import Changed
from sift_cli.system.files import write_text
from sift_cli.tasks.metrics import short


def write_predictions(
    out: Path, session: Session, outputs: Mapping[str, Tensor], split: str
) -> None:
    """Writes predictions.jsonl: a line for each row, in order, of each split's outputs.

    A line holds the split, the row's number there, and what the task says of the row.
    """
    _write_lines(
        out / PREDICTIONS_FILE,
        (
            {"split": split + suffix, **line}
            for suffix, lines in session.lines(outputs).items()
            for line in lines
        ),
    )


def write_gradient(out: Path, kept: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
    """Writes gradient.jsonl: a line for each weight in `norms`, of the first batch's gradient.

    `norm` is that 2-norm ([]), `kept` the one of the weight's trained entries alone, 0 for none.
    Weights whose norm is too large for fp32 are left out.
    """
    pairs = ((name, float(norm), float(kept.get(name, 0.0))) for name, norm in norms.items())
    _write_lines(
        out / GRADIENT_FILE,
        (
            {"name": name, "norm": short(norm), "kept": short(own)}
            for name, norm, own in pairs
            if isfinite(norm) and isfinite(own)
        ),
    )


def write_weights(
    out: Path,
    model: nn.Module,
    parameters: SparseParameters,
    whole: Collection[str],
    changes: Iterable[Changed],
) -> None:
    """Writes weights.jsonl: a line for each weight of which entries trained.

    `entries` is the size of its support at the end, `touched` counts all that ever trained; `rms`
    and `largest` tell how far these are from the base, `base_rms` how large they were there.
    `half_in_inputs` is the share of a linear layer's inputs that hold half of its entries. Those in
    `whole` are no part of the budget.
    """
    named = dict(model.named_parameters())
    supports = parameters.supports
    layers = linear_layers(model)

    def line(one: Changed) -> dict[str, Any]:
        name, weight = one.name, named[one.name]
        before = one.base.double()
        change = one.now.double() - before
        support = supports.get(name)
        found = {
            "name": name,
            "shape": list(weight.shape),
            "entries": 0 if support is None else len(support),
            "touched": len(one.support),
            "whole": name in whole,
            "rms": short(_rms(change)),
            "largest": short(float(change.abs().max())),
            "base_rms": short(_rms(before)),
        }
        chosen = support is not None and support.positions is not None and name not in whole
        if chosen and name in layers and weight.dim() == 2:
            inputs = 0 if layers[name].transposed else 1
            found["half_in_inputs"] = short(supports[name].half_in(inputs))
        return found

    _write_lines(out / WEIGHTS_FILE, map(line, changes))


def _rms(values: Tensor) -> float:
    return sqrt(float(values.square().mean()))


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(path, text)
