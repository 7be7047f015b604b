"""Rows of texts with a label each: from a source to a task, every value checked.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date, time
from numbers import Number
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.columns import NUMBER_COLUMN, column_values, refuse_rows, require_columns
from sift_cli.tasks.label_kinds import ONE_LABEL, LabelKind, held_by, kind_of
from sift_cli.tasks.labels import coded
from sift_cli.tasks.metrics import KINDS, NUMBER, Metric, called, leading, only_for, require_fit
from sift_cli.tasks.several import GATHERED, are_lists, gathered, held, names_in
from sift_cli.tasks.sources import Source, by_suffix, evaluation_splits, read_rows, take_split
from sift_cli.tasks.table import TASKS, TaskSpec, text_columns

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

TEXTS = (str, Number, date, time)  # what stands for itself as text


def load_task(
    source: Source,
    *,
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    first: str | None = None,
    own: Mapping[str, Metric] | None = None,
    class_weights: str | Mapping[str, float] | None = None,
    label_smoothing: float = 0.0,
    train: bool = True,
) -> Classification:
    """Loads and checks the training rows (unless `train` is false) and those to evaluate on.

    `labels` are names in code order; an empty list asks for numbers.

    `label` is a column, of lists where rows may have several labels, or a column for each of these.
    `first` is the metric that decides, if not the first of `metrics` (the task's unless given);
    `own` are those that are code. `class_weights` are by name, or `balanced`: such that each class
    counts alike over the training rows; without these, evaluation needs none.

    Raises SiftError for a source that is not there, a missing split or column, an empty split,
    labels outside the range, all-equal training labels, missing text, targets that are not finite
    and metrics of classes for a regression.
    """
    path, task, spec = source.path, source.task, TASKS.get(source.task)
    columns, asked = text_columns(task, text), label or (spec.label if spec else "label")
    column, each = (asked, []) if isinstance(asked, str) else (GATHERED, list(asked))
    if each:
        labels = labels or each
    raw = _read(source, spec, each or [column])
    wanted = {name: take_split(raw, name, path) for name in evaluation_splits(raw, source.split)}
    inferred = spec is None and labels is None
    given = take_split(raw, "train", path) if train or inferred else None
    if each:
        wanted = {key: gathered(rows, key, each, labels or ()) for key, rows in wanted.items()}
        given = given and gathered(given, "train", each, labels or ())
    notes: tuple[str, ...] = ()
    if inferred and given is not None and {first, *(metrics or ())}.isdisjoint(only_for(NUMBER)):
        labels, notes = _whole_floats(given, column)
    several = are_lists(given or next(iter(wanted.values())), column)
    names = _labels(labels, spec, given, column, several)
    checked = {
        suffix: _check_rows(rows, where, columns, column, names, several)
        for where, (suffix, rows) in zip(wanted, by_suffix(wanted).items(), strict=True)
    }
    rows = None
    if train and given is not None:
        rows = _check_rows(given, "train", columns, column, names, several)
        _refuse_one_label(rows, names, path)
    kind = kind_of(names, several)
    chosen = metrics or (spec.metrics if spec and not several else kind.metrics)
    asked_of = {"data.metrics": chosen, "eval.metric": [first] if first else []}
    weighted = {"class_weights": class_weights is not None, "label_smoothing": label_smoothing > 0}
    _require_kind(kind, column, names, asked_of, [key for key, given in weighted.items() if given])
    return Classification(
        task,
        names,
        tuple(map(called, leading(chosen, first))),
        rows,
        checked,
        notes,
        own=own or {},
        class_weights=_class_weights(class_weights, names or (), rows),
        label_smoothing=label_smoothing,
        several=several,
    )


def _require_kind(
    kind: LabelKind,
    column: str,
    names: Sequence[str] | None,
    metrics: Mapping[str, Sequence[str]],
    one_label: Sequence[str],
) -> None:
    """Refuses metrics (by the key that asks for them) and keys of `train` for other labels."""
    said = "there are" if column == GATHERED else f"{column!r} holds"
    for key, some in metrics.items():
        require_fit(key, some, kind.holds, said, names or ())
    if kind is not ONE_LABEL and one_label:
        raise SiftError(
            f"train.{one_label[0]}: it is for one label a row, and {said} {KINDS[kind.holds]}"
        )


def _read(source: Source, spec: TaskSpec | None, columns: Sequence[str]) -> DatasetDict:
    """The splits, whose labels are in `columns`."""
    original = spec.original if spec else {}
    asked = [*columns, *(original[one] for one in columns if one in original)]
    raw = read_rows(source, asked, several=len(columns) > 1)
    for name, some in raw.items():
        raw[name] = _usual_names(some, original)
    return raw


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
        return tuple(given) or None
    if spec is not None:
        return spec.labels
    assert source is not None
    return names_in(source, "train", column) if several else _infer_labels(source, column)


def _refuse_one_label(rows: Dataset, names: Sequence[str] | None, path: str) -> None:
    first = rows["label"][0]
    if names is not None and all(label == first for label in rows["label"]):
        some = [names[first]] if isinstance(first, int) else held_by(names, first)
        raise SiftError(
            f"{path}: all {len(rows):,} training rows have the label {', '.join(some) or 'none'}; "
            "nothing can be learnt from them"
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
        missing = [value is None or value != value for value in values]
        refuse_rows(split, f"text in {column!r} is missing", numbers, missing)
        other = [not isinstance(value, TEXTS) for value in values]
        refuse_rows(split, f"lists or objects in {column!r} where text belongs", numbers, other)
        out[key] = [str(value) for value in values]
    if several:
        out["label"] = held(rows, split, label, names or ())
        return Dataset.from_dict(out | {"row": numbers})
    given = column_values(rows, split, label)
    nested = [isinstance(value, list | dict) for value in given]
    refuse_rows(split, f"lists or objects in {label!r} where a label belongs", numbers, nested)
    if names is None:
        numeric = [isinstance(value, int | float) for value in given]
        refuse_rows(split, "targets that are no numbers", numbers, [not one for one in numeric])
        finite = [math.isfinite(value) for value in given]
        refuse_rows(split, "targets that are not finite", numbers, [not one for one in finite])
        out["label"] = [float(value) for value in given]
    else:
        feature = rows.features[label]
        own = feature.names if isinstance(feature, ClassLabel) else []
        codes = coded(given, own, names, split)
        said = f"labels outside {dict(enumerate(names))}"
        if all(name.isdigit() for name in names):
            said += " (whole numbers are codes of classes; 3.0 is a number to predict)"
        refuse_rows(split, said, numbers, [code < 0 for code in codes], given)
        out["label"] = codes
    out["row"] = numbers
    return Dataset.from_dict(out)
