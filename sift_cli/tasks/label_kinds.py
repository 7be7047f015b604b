"""What a row's label may be: one out of several, any of several, or a number; a row for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.tasks.metrics import CLASS, NUMBER, SEVERAL, short

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class LabelKind:
    """A row of the table of what differs between kinds of labels.

    `holds` is the kind of its metrics, `metrics` are those that it has unless others are asked for.
    `problem` names transformers' loss, `target` is the dtype of labels in a batch. `predicted`
    makes what metrics see ([N], or [N, C] where there are several) of logits ([N, C]),
    `probabilities` those of each class, and `losses` each row's loss ([N]) of logits and labels.
    `lines` makes the lines of predictions.jsonl of logits, labels and label names, and how wrong
    each is ([N], 0 where it is right); `answers` what `sift predict` says of each row of logits.
    """

    holds: str
    problem: str
    target: torch.dtype
    metrics: tuple[str, ...]
    predicted: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None
    losses: Callable[[Tensor, Tensor], Tensor]
    lines: Callable[[Tensor, Tensor, Sequence[str]], tuple[Lines, Tensor]]
    answers: Callable[[Tensor, Sequence[str]], Lines]


def _lines_of_label(logits: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[Lines, Tensor]:
    probability, code = logits.softmax(-1).max(-1)
    lines = [
        {"label": names[label], "predicted": names[one], "probability": short(value)}
        for label, one, value in zip(
            labels.tolist(), code.tolist(), probability.tolist(), strict=True
        )
    ]
    return lines, probability.where(code != labels, 0.0)


def _lines_of_several(logits: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[Lines, Tensor]:
    """`probability` is how sure the surest mistake is; without one, the least sure label."""
    said, truth = logits > 0, labels > 0
    sure = logits.abs().sigmoid()
    wrong = sure.where(said != truth, 0.0).amax(-1)
    told = wrong.where(wrong > 0, sure.amin(-1)).tolist()
    names_of = [[held_by(names, held) for held in some.tolist()] for some in (truth, said)]
    lines = [
        {"label": label, "predicted": one, "probability": short(value)}
        for label, one, value in zip(*names_of, told, strict=True)
    ]
    return lines, wrong


def _lines_of_number(logits: Tensor, labels: Tensor, _: Sequence[str]) -> tuple[Lines, Tensor]:
    predicted = logits.squeeze(-1)
    lines = [
        {"label": short(label), "predicted": short(value)}
        for label, value in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    return lines, (predicted - labels).abs()


def held_by(names: Sequence[str], held: Sequence[float]) -> list[str]:
    """The names of those labels that a row has: one number each, 0 where it has not."""
    return [name for name, one in zip(names, held, strict=True) if one]


def _label(logits: Tensor, names: Sequence[str]) -> Lines:
    codes, probabilities = logits.argmax(-1).tolist(), logits.softmax(-1).tolist()
    return [
        {"label": names[code], "probability": some[code], "probabilities": _named(names, some)}
        for code, some in zip(codes, probabilities, strict=True)
    ]


def _several(logits: Tensor, names: Sequence[str]) -> Lines:
    said, probabilities = (logits > 0).tolist(), logits.sigmoid().tolist()
    return [
        {"labels": held_by(names, held), "probabilities": _named(names, some)}
        for held, some in zip(said, probabilities, strict=True)
    ]


def _named(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, float]:
    return dict(zip(names, probabilities, strict=True))


def _losses_of_several(logits: Tensor, labels: Tensor) -> Tensor:
    each = nn.functional.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), reduction="none"
    )
    return each.mean(-1)


ONE_LABEL = LabelKind(
    holds=CLASS,
    problem="single_label_classification",
    target=torch.long,
    metrics=("accuracy", "f1_macro"),
    predicted=lambda logits: logits.argmax(-1),
    probabilities=lambda logits: logits.softmax(-1),
    losses=partial(nn.functional.cross_entropy, reduction="none"),
    lines=_lines_of_label,
    answers=_label,
)
ANY_LABELS = LabelKind(
    holds=SEVERAL,
    problem="multi_label_classification",
    target=torch.float,
    metrics=("f1_micro", "f1_macro", "subset_accuracy", "roc_auc"),
    predicted=lambda logits: (logits > 0).long(),
    probabilities=torch.sigmoid,
    losses=_losses_of_several,
    lines=_lines_of_several,
    answers=_several,
)
A_NUMBER = LabelKind(
    holds=NUMBER,
    problem="regression",
    target=torch.float,
    metrics=("pearson", "spearman"),
    predicted=lambda logits: logits.squeeze(-1),
    probabilities=None,
    losses=lambda logits, labels: (logits.squeeze(-1) - labels).square(),
    lines=_lines_of_number,
    answers=lambda logits, _: [{"score": one} for one in logits.squeeze(-1).tolist()],
)


def kind_of(labels: Sequence[str] | None, several: bool) -> LabelKind:
    """The row for these label names; None are numbers."""
    if labels is None:
        return A_NUMBER
    return ANY_LABELS if several else ONE_LABEL
