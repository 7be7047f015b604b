"""Rows of texts with a label each: from a source to a task, every value checked.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from numbers import Number
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.classification import Classification, task_of_labels
from sift_cli.tasks.labels import listed, plain
from sift_cli.tasks.metrics import CLASSIFICATION, METRICS, REGRESSION
from sift_cli.tasks.sources import (
    NUMBER_COLUMN,
    Source,
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

TEXTS = (str, Number, date, time)  # what stands for itself as text


def load_task(
    source: Source,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    train: bool = True,
) -> Classification:
    """Loads and checks the training rows (unless `train` is false) and those to evaluate on.

    `labels` are names in code order; an empty list asks for numbers.

    Raises SiftError for a source that is not there, a missing split or column, an empty split,
    labels outside the range, all-equal training labels, missing text, targets that are not finite
    and metrics of classes for a regression.
    """
    path, task, spec = source.path, source.task, TASKS.get(source.task)
    columns, column = text_columns(task, text), label or (spec.label if spec else "label")
    original = spec.original if spec else {}
    raw = read_rows(source, (column, original.get(column, column)))
    for name, some in raw.items():
        raw[name] = _usual_names(some, original)
    wanted = {name: take_split(raw, name, path) for name in evaluation_splits(raw, source.split)}
    inferred = spec is None and labels is None
    given = take_split(raw, "train", path) if train or inferred else None
    notes: tuple[str, ...] = ()
    if inferred and given is not None and set(metrics or ()).isdisjoint(REGRESSION):
        labels, notes = _whole_floats(given, column)
    names = _labels(labels, spec, given, column)
    checked = {
        suffix: _check_rows(rows, where, columns, column, names)
        for where, (suffix, rows) in zip(wanted, by_suffix(wanted).items(), strict=True)
    }
    rows = None
    if train and given is not None:
        rows = _check_rows(given, "train", columns, column, names)
        _refuse_one_label(rows, names, path)
    chosen = tuple(metrics or (spec.metrics if spec else task_of_labels(names).metrics))
    _refuse_other_metrics(chosen, names, column)
    return Classification(task, names, chosen, rows, checked, notes)


def _usual_names(rows: Dataset, original: Mapping[str, str]) -> Dataset:
    """The rows of GLUE's own files under the names that its columns have elsewhere."""
    there = set(rows.column_names)
    renamed = {old: name for name, old in original.items() if old in there and name not in there}
    return rows.rename_columns(renamed) if renamed else rows


def _whole_floats(rows: Dataset, column: str) -> tuple[list[str] | None, tuple[str, ...]]:
    """Labels where a column holds 0.0 and 1.0 alone, and what to tell of whole numbers in it.

    So whole columns look that others made floats of: most often for a missing value.
    """
    require_columns(rows, "train", [column])
    values = column_values(rows, "train", column)
    known = [one for one in values if one is not None and one == one]
    if not known or not all(isinstance(one, float) and one.is_integer() for one in known):
        return None, ()
    if set(known) == {0.0, 1.0}:
        said = "is 0.0 or 1.0: two classes; for a number to predict set data.metrics: [pearson]"
        return ["0", "1"], (f"data.label: {column!r} {said}",)
    said = "holds whole numbers with a point, so it is a number to predict; classes have none"
    return None, (f"data.label: {column!r} {said}",)


def _labels(
    given: Sequence[str] | None, spec: TaskSpec | None, source: Dataset | None, column: str
) -> tuple[str, ...] | None:
    """Label names in code order, None for a regression: as given, the task's, or the data's."""
    if given is not None:
        return tuple(given) or None
    if spec is not None:
        return spec.labels
    assert source is not None
    return _infer_labels(source, column)


def _refuse_one_label(rows: Dataset, names: Sequence[str] | None, path: str) -> None:
    if names is not None and len(set(rows["label"])) == 1:
        raise SiftError(
            f"{path}: all {len(rows):,} training rows have the label {names[rows['label'][0]]}; "
            "nothing can be learnt from them"
        )


def _refuse_other_metrics(metrics: Sequence[str], names: Sequence[str] | None, column: str) -> None:
    fitting = REGRESSION if names is None else CLASSIFICATION
    if wrong := [name for name in metrics if METRICS[name].compute is None]:
        raise SiftError(
            f"data.metrics: {', '.join(wrong)} is of language models; use {', '.join(fitting)}"
        )
    if names is None and (wrong := [name for name in metrics if name in CLASSIFICATION]):
        raise SiftError(
            f"data.metrics: {', '.join(wrong)} needs classes, and {column!r} holds numbers "
            f"to predict; use {', '.join(REGRESSION)}"
        )


def _infer_labels(rows: Dataset, column: str) -> tuple[str, ...] | None:
    """Label names from the data: a ClassLabel's, the sorted strings or whole numbers."""
    import datasets

    require_columns(rows, "train", [column])
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = [value for value in column_values(rows, "train", column) if value is not None]
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(values)))
    if all(isinstance(value, bool | int) for value in values):
        count = int(max(values, default=0)) + 1
        if count > max(len(values), 100):
            raise SiftError(
                f"data.label: {column!r} goes up to {count - 1:,} in {len(values):,} rows, so it "
                "holds no codes of classes; name them in data.labels, or write 3.0 for 3 where "
                "numbers are to be predicted"
            )
        return tuple(map(str, sorted({int(value) for value in values})))
    return None


def _named(given: list[Any], own: Sequence[str], names: Sequence[str], split: str) -> list[Any]:
    """The labels of a column by name, where its codes have names (`own`), or are names themselves.

    Raises SiftError where the source has names, and none of them is one of `names`.
    """
    if not own or all(name.isdigit() for name in own):
        if all(re.fullmatch(r"-?\d+", name) for name in names):
            return [str(int(value)) if isinstance(value, int) else value for value in given]
        return given
    alike = {plain(name): name for name in names}
    here = [alike.get(plain(name), name) for name in own]
    if {*here}.isdisjoint(names):
        raise SiftError(
            f"data: the labels of the {split} split are called {listed(own)}, and those of the "
            f"task {listed(names)}; name them alike in data.labels"
        )
    return [here[code] if code in range(len(here)) else code for code in given]


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
    numbers = list(rows[NUMBER_COLUMN])
    out: dict[str, list[Any]] = {}
    for key, column in zip(("text", "pair"), text, strict=False):
        values = column_values(rows, split, column)
        missing = [value is None or value != value for value in values]
        refuse_rows(split, f"text in {column!r} is missing", numbers, missing)
        other = [not isinstance(value, TEXTS) for value in values]
        refuse_rows(split, f"lists or objects in {column!r} where text belongs", numbers, other)
        out[key] = [str(value) for value in values]
    given = column_values(rows, split, label)
    several = [isinstance(value, list | dict) for value in given]
    said = f"several labels at once in {label!r} (sift learns one a row, or a number)"
    refuse_rows(split, said, numbers, several)
    if names is None:
        numeric = [isinstance(value, int | float) for value in given]
        refuse_rows(split, "targets that are no numbers", numbers, [not one for one in numeric])
        finite = [math.isfinite(value) for value in given]
        refuse_rows(split, "targets that are not finite", numbers, [not one for one in finite])
        out["label"] = [float(value) for value in given]
    else:
        feature = rows.features[label]
        own = feature.names if isinstance(feature, ClassLabel) else []
        given = _named(given, own, names, split)
        codes = {name: code for code, name in enumerate(names)}
        coded = [
            codes.get(value, -1) if isinstance(value, str) else _whole(value) for value in given
        ]
        valid = [isinstance(code, int) and 0 <= code < len(names) for code in coded]
        said = f"labels outside {dict(enumerate(names))}"
        if all(name.isdigit() for name in names):
            said += " (whole numbers are codes of classes; 3.0 is a number to predict)"
        refuse_rows(split, said, numbers, [not one for one in valid], given)
        out["label"] = [int(code) for code in coded]
    out["row"] = numbers
    return Dataset.from_dict(out)


def _whole(value: Any) -> Any:
    """A float without a fraction as a whole number: libraries make such of codes."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
