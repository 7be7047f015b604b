"""Rows of texts with a label each: from a source to a task, every value checked.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.label_kinds import ONE_LABEL, kind_of
from sift_cli.tasks.metrics import KINDS, Metric, called, leading, require_fit
from sift_cli.tasks.several import GATHERED, are_lists, gathered, held, names_in
from sift_cli.tasks.sources import (
    NUMBER_COLUMN,
    by_suffix,
    column_values,
    evaluation_splits,
    read_rows,
    refuse_rows,
    require_columns,
    take_split,
)
from sift_cli.tasks.table import TASKS, TaskSpec, text_columns

if TYPE_CHECKING:
    from datasets import Dataset


def load_task(
    path: str,
    task: str,
    *,
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    first: str | None = None,
    own: Mapping[str, Metric] | None = None,
    class_weights: str | Mapping[str, float] | None = None,
    label_smoothing: float = 0.0,
    config: str | None = None,
    split: str = "validation",
    holdout: float | None = None,
    inner_holdout: float | None = None,
    max_train_rows: int | None = None,
    seed: int = 0,
    train: bool = True,
) -> Classification:
    """Loads and checks the training rows (unless `train` is false) and those of the split `split`.

    `label` is a column, of lists where rows may have several labels, or a column for each of these.
    `first` is the metric that decides, if not the first of `metrics` (the task's unless given);
    `own` are those that are code. `class_weights` are by name, or `balanced`: such that each class
    counts alike over the training rows; without these, evaluation needs none.

    Raises SiftError for a source that is not there, a missing split or column, an empty split,
    labels outside the range, all-equal training labels, missing text, targets that are not finite
    and metrics of classes for a regression.
    """
    spec = TASKS.get(task)
    raw = read_rows(
        path,
        task,
        config,
        split=split,
        holdout=holdout,
        inner_holdout=inner_holdout,
        max_train_rows=max_train_rows,
        seed=seed,
    )
    columns, column = text_columns(task, text), label or (spec.label if spec else "label")
    wanted = {name: take_split(raw, name, path) for name in evaluation_splits(raw, split)}
    source = take_split(raw, "train", path) if train or spec is None else None
    if not isinstance(column, str):
        given, labels, column = column, labels or column, GATHERED
        wanted = {key: gathered(rows, key, given, labels) for key, rows in wanted.items()}
        source = source and gathered(source, "train", given, labels)
    known = source or next(iter(wanted.values()))
    several = are_lists(known, column)
    names = _labels(labels, spec, source, column, several)
    checked = {
        suffix: _check_rows(rows, where, columns, column, names, several)
        for where, (suffix, rows) in zip(wanted, by_suffix(wanted).items(), strict=True)
    }
    rows = None
    if train and source is not None:
        rows = _check_rows(source, "train", columns, column, names, several)
        _refuse_one_label(rows, names, path)
    kind = kind_of(names, several)
    chosen = metrics or (spec.metrics if spec and not several else kind.metrics)
    said = "there are" if column == GATHERED else f"{column!r} holds"
    for key, some in (("data.metrics", chosen), ("eval.metric", [first] if first else [])):
        require_fit(key, some, kind.holds, said, names or ())
    wanted_metrics = tuple(map(called, leading(chosen, first)))
    if kind is not ONE_LABEL and (class_weights is not None or label_smoothing):
        key = "label_smoothing" if class_weights is None else "class_weights"
        raise SiftError(f"train.{key}: it is for one label a row, and {said} {KINDS[kind.holds]}")
    return Classification(
        task,
        names,
        wanted_metrics,
        rows,
        checked,
        own or {},
        _class_weights(class_weights, names or (), rows),
        label_smoothing,
        several,
    )


def _class_weights(
    given: str | Mapping[str, float] | None, names: Sequence[str], rows: Dataset | None
) -> tuple[float, ...] | None:
    """What a row of each class counts, in code order; None where all count alike.

    Balanced, a class counts N / (classes that have rows) over all of its rows, as in scikit-learn.
    """
    if given is None or (rows is None and isinstance(given, str)):
        return None
    if not isinstance(given, str):
        if unknown := sorted(set(given) - set(names)):
            raise SiftError(
                f"train.class_weights: no class {unknown[0]!r}; there is {', '.join(names)}"
            )
        return tuple(float(given.get(name, 1.0)) for name in names)
    assert rows is not None
    counts = Counter(rows["label"][:])
    return tuple(
        len(rows) / (len(counts) * counts[code]) if counts[code] else 0.0
        for code in range(len(names))
    )


def _labels(
    given: Sequence[str] | None,
    spec: TaskSpec | None,
    source: Dataset | None,
    column: str,
    several: bool,
) -> tuple[str, ...] | None:
    """Label names in code order, None for a regression: as given, the task's, or the data's."""
    if given is not None:
        return tuple(given)
    if spec is not None:
        return spec.labels
    assert source is not None
    return names_in(source, "train", column) if several else _infer_labels(source, column)


def _refuse_one_label(rows: Dataset, names: Sequence[str] | None, path: str) -> None:
    first = rows["label"][0]
    if names is not None and all(label == first for label in rows["label"]):
        raise SiftError(
            f"{path}: all {len(rows):,} training rows have the label {first}; "
            "nothing can be learnt from them"
        )


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
                "holds no codes of classes; name them in data.labels, or write 3.0 for 3 where "
                "numbers are to be predicted"
            )
        return tuple(str(code) for code in range(count))
    return None


def _check_rows(
    rows: Dataset,
    split: str,
    text: Sequence[str],
    label: str,
    names: tuple[str, ...] | None,
    several: bool = False,
) -> Dataset:
    """The same rows with the columns text, pair, label and row alone, every value checked."""
    from datasets import ClassLabel, Dataset

    require_columns(rows, split, [*text, label])
    numbers = list(rows[NUMBER_COLUMN])
    out: dict[str, list[Any]] = {}
    for key, column in zip(("text", "pair"), text, strict=False):
        values = column_values(rows, split, column)
        refuse_rows(split, f"text in {column!r} is missing", numbers, [v is None for v in values])
        out[key] = [str(value) for value in values]
    if several:
        out["label"] = held(rows, split, label, names or ())
        return Dataset.from_dict(out | {"row": numbers})
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
        if all(name.isdigit() for name in names):
            said += " (whole numbers are codes of classes; 3.0 is a number to predict)"
        refuse_rows(split, said, numbers, [not one for one in valid], given)
        out["label"] = [int(code) for code in coded]
    out["row"] = numbers
    return Dataset.from_dict(out)
