"""Datasets and tasks: from a hub id, folder, file or built-in set to checked, tokenised rows.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.models.loading import LoadedModel
from sift_cli.tasks.metrics import CLASSIFICATION, REGRESSION, compute_metrics
from sift_cli.tasks.sources import (
    NUMBER,
    by_suffix,
    column_values,
    evaluation_splits,
    load_splits,
    refuse_rows,
    require_columns,
    take_split,
)
from sift_cli.tasks.table import TASKS
from sift_cli.tasks.task import Task
from sift_cli.tasks.tokens import Encoded

if TYPE_CHECKING:
    from datasets import Dataset


def load_task(
    path: str,
    task: str,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    config: str | None = None,
    split: str = "validation",
    holdout: float | None = None,
    max_train_rows: int | None = None,
    seed: int = 0,
    train: bool = True,
) -> Task:
    """Loads and checks the training rows (unless `train` is false) and those of the split `split`.

    Raises SiftError for a source that is not there, a missing split or column, an empty split,
    labels outside the range, all-equal training labels, missing text, targets that are not finite
    and metrics of classes for a regression.
    """
    spec = TASKS.get(task)
    raw = load_splits(path, task, config)
    if holdout is not None and split == "validation":
        whole = take_split(raw, "train", path)
        if not 0 < math.ceil(holdout * len(whole)) < len(whole):
            raise SiftError(f"data.holdout: {holdout} leaves none of {len(whole)} rows to train on")
        parts = whole.train_test_split(test_size=holdout, seed=seed)
        numbered = {"train": parts["train"], "validation": parts["test"]}
        raw = type(raw)({**raw, **numbered})
    if max_train_rows is not None and "train" in raw:
        kept = min(max_train_rows, len(raw["train"]))
        raw["train"] = raw["train"].shuffle(seed=seed).select(range(kept))
    columns = tuple(text or (spec.text if spec else ()))
    column = label or (spec.label if spec else "label")
    wanted = {name: take_split(raw, name, path) for name in evaluation_splits(raw, split)}
    source = take_split(raw, "train", path) if train or spec is None else None
    names: tuple[str, ...] | None
    if labels is not None:
        names = tuple(labels)
    elif spec is not None:
        names = spec.labels
    else:
        assert source is not None
        names = _infer_labels(source, column)
    checked = {
        suffix: _check_rows(rows, where, columns, column, names)
        for where, (suffix, rows) in zip(wanted, by_suffix(wanted).items(), strict=True)
    }
    rows = None
    if train:
        assert source is not None
        rows = _check_rows(source, "train", columns, column, names)
        if names is not None and len(set(rows["label"])) == 1:
            raise SiftError(
                f"{path}: all {len(rows):,} training rows have the label {rows['label'][0]}; "
                "nothing can be learnt from them"
            )
    default = ("accuracy", "f1_macro") if names is not None else REGRESSION
    chosen = tuple(metrics or (spec.metrics if spec else default))
    if names is None and (wrong := [name for name in chosen if name in CLASSIFICATION]):
        raise SiftError(
            f"data.metrics: {', '.join(wrong)} needs classes, and {column!r} holds numbers "
            f"to predict; use {', '.join(REGRESSION)}"
        )
    return Task(task, names, chosen, rows, checked)


def _infer_labels(rows: Dataset, column: str) -> tuple[str, ...] | None:
    """Label names from the data: a ClassLabel's, the sorted strings, or codes up to the largest."""
    import datasets

    require_columns(rows, "train", [column])
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = [value for value in column_values(rows, "train", column) if value is not None]
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(values)))
    if all(isinstance(value, bool | int) for value in values):
        count = int(max(values)) + 1
        if count > max(len(values), 100):
            raise SiftError(
                f"data.label: {column!r} goes up to {count - 1:,} in {len(values):,} rows, so it "
                "holds no codes of classes; name them in data.labels, or use real numbers"
            )
        return tuple(str(code) for code in range(count))
    return None


def _check_rows(
    rows: Dataset,
    split: str,
    text: Sequence[str],
    label: str,
    names: tuple[str, ...] | None,
) -> Dataset:
    """The same rows with the columns text, pair, label and row alone, every value checked."""
    from datasets import ClassLabel, Dataset

    require_columns(rows, split, [*text, label])
    numbers = list(rows[NUMBER])
    out: dict[str, list[Any]] = {}
    for key, column in zip(("text", "pair"), text, strict=False):
        values = column_values(rows, split, column)
        refuse_rows(split, f"text in {column!r} is missing", numbers, [v is None for v in values])
        out[key] = [str(value) for value in values]
    given = column_values(rows, split, label)
    if names is None:
        numeric = [isinstance(value, int | float) for value in given]
        refuse_rows(split, "targets that are no numbers", numbers, [not one for one in numeric])
        finite = [math.isfinite(value) for value in given]
        refuse_rows(split, "targets that are not finite", numbers, [not one for one in finite])
        out["label"] = [float(value) for value in given]
    else:
        feature = rows.features[label]
        own = feature.names if isinstance(feature, ClassLabel) else []
        if set(own) == set(names):  # the source's own codes, which may be in another order
            given = [own[code] if code in range(len(own)) else code for code in given]
        codes = {name: code for code, name in enumerate(names)}
        coded = [codes.get(value, -1) if isinstance(value, str) else value for value in given]
        valid = [isinstance(code, int) and 0 <= code < len(names) for code in coded]
        said = f"labels outside {dict(enumerate(names))}"
        refuse_rows(split, said, numbers, [not one for one in valid], given)
        out["label"] = [int(code) for code in coded]
    out["row"] = numbers
    return Dataset.from_dict(out)


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
