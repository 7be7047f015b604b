"""Datasets and tasks: from a hub id, folder, file or built-in set to checked, tokenised rows.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.metrics import CLASSIFICATION, REGRESSION

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUILTIN = Path(__file__).parent / "builtin"
NUMBER = "__row__"  # row numbers, in source splits that may have a column `row` of their own
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SPLIT_NAMES = {
    "train": ("train",),
    "validation_matched": ("validation_matched", "dev_matched"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class TaskSpec:
    """What defines a task: text columns, label names in code order (None: regression), metrics."""

    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label: str = "label"


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")

TASKS: dict[str, TaskSpec] = {  # GLUE (Wang et al., ICLR 2019), with its official metrics
    "cola": TaskSpec(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": TaskSpec(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": TaskSpec(SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": TaskSpec(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": TaskSpec(SENTENCES, None, ("pearson", "spearman")),
    "mnli": TaskSpec(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)
    ),
    "qnli": TaskSpec(("question", "sentence"), ENTAILMENT, ("accuracy",)),
    "rte": TaskSpec(SENTENCES, ENTAILMENT, ("accuracy",)),
    "wnli": TaskSpec(SENTENCES, ("not_entailment", "entailment"), ("accuracy",)),
}


@dataclass(frozen=True)
class Task:
    """A task with its rows, each checked: columns `text` (or `text` and `pair`), `label`, `row`.

    `row` is the row's number in its source split. `evaluation` maps the suffix of a metric's name
    to rows: one entry with the suffix "" in general; MNLI adds "_mismatched". `labels` is None for
    regression.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train: Dataset | None
    evaluation: dict[str, Dataset]

    @property
    def outputs(self) -> int:
        """Width of the model's head."""
        return 1 if self.labels is None else len(self.labels)


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
    raw = _load_splits(path, task, config)
    if holdout is not None and split == "validation":
        whole = _split(raw, "train", path)
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
    wanted = {name: _split(raw, name, path) for name in _evaluation_splits(raw, split)}
    source = _split(raw, "train", path) if train or spec is None else None
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
        for where, (suffix, rows) in zip(wanted, _suffixes(wanted).items(), strict=True)
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


def _load_splits(path: str, task: str, config: str | None) -> DatasetDict:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come as exceptions
    files = _find_files(path, task)
    try:
        if files is not None:
            found = {split: _read_files(split, some) for split, some in files.items()}
        else:
            if config is None and task in datasets.get_dataset_config_names(path):
                config = task
            found = datasets.load_dataset(path, config)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        said = str(cause).strip().splitlines() or [type(cause).__name__]
        kind = "cannot be read" if files is not None else "is not on this machine nor on the hub"
        raise SiftError(f"data.path: {path} {kind}: {said[0]}") from error
    numbered = {
        name: rows.add_column(NUMBER, list(range(len(rows)))) for name, rows in found.items()
    }
    return datasets.DatasetDict(numbered)


def _read_files(split: str, files: Sequence[Path]) -> Dataset:
    """The rows of one split's files; splits may differ in the columns that no task reads."""
    import datasets

    header = 1 if files[0].suffix == ".csv" else 0
    if files[0].suffix != ".parquet" and not any(_has_lines(file, header) for file in files):
        raise SiftError(f"data.path: {files[0]}: the split {split!r} is empty")
    rows: Dataset = datasets.load_dataset(
        BUILDERS[files[0].suffix], data_files={split: [str(file) for file in files]}, split=split
    )
    return rows


def _has_lines(file: Path, header: int) -> bool:
    """Whether text follows the first `header` lines."""
    with file.open("rb") as lines:
        return any(line.strip() for line in itertools.islice(lines, header, None))


def _find_files(path: str, task: str) -> dict[str, list[Path]] | None:
    """Data files by split; None for a hub id."""
    if path.startswith("builtin:"):
        folder = BUILTIN / path.removeprefix("builtin:")
        if not folder.is_dir():
            known = ", ".join(f"builtin:{one.name}" for one in BUILTIN.iterdir() if one.is_dir())
            raise SiftError(f"data.path: no such built-in dataset {path}; there is {known}")
    else:
        folder = Path(path).expanduser()
    if folder.is_file():
        if folder.suffix not in BUILDERS:
            raise SiftError(f"data.path: {path} is not one of {', '.join(BUILDERS)}")
        return {"train": [folder]}
    if not folder.is_dir():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith("."):
            return None
        raise SiftError(f"data.path: {path}: no such folder or file")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in BUILDERS]
    if not files and (folder / task).is_dir():
        return _find_files(str(folder / task), task)
    found: dict[str, list[Path]] = {}
    for file in files:
        for split, starts in SPLIT_NAMES.items():
            if re.match(rf"({'|'.join(starts)})([-_.].*)?$", file.stem):
                found.setdefault(split, []).append(file)
                break
    if not found:
        raise SiftError(
            f"data.path: {path} holds no train or validation file ({', '.join(BUILDERS)})"
        )
    if len({file.suffix for some in found.values() for file in some}) > 1:
        raise SiftError(f"data.path: {path} holds files of several formats; keep one")
    return found


def _evaluation_splits(raw: DatasetDict, split: str) -> list[str]:
    """MNLI has two validation splits; both count when `validation` is asked for."""
    pair = [f"{split}_matched", f"{split}_mismatched"]
    return pair if split not in raw and all(name in raw for name in pair) else [split]


def _suffixes(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    suffixes = ("", "_mismatched")
    return dict(zip(suffixes, splits.values(), strict=False))


def _split(raw: DatasetDict, name: str, path: str) -> Dataset:
    if name not in raw:
        way_out = (
            "; set data.holdout: 0.1 to hold out training rows" if name == "validation" else ""
        )
        raise SiftError(f"{path}: no split {name!r}; there is {', '.join(raw)}{way_out}")
    if len(raw[name]) == 0:
        raise SiftError(f"{path}: the split {name!r} is empty")
    rows: Dataset = raw[name]
    return rows


def _infer_labels(rows: Dataset, column: str) -> tuple[str, ...] | None:
    """Label names from the data: a ClassLabel's, the sorted strings, or codes up to the largest."""
    import datasets

    _require(rows, "train", [column])
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = [value for value in _values(rows, "train", column) if value is not None]
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


def _require(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in rows.column_names:
            there = ", ".join(name for name in rows.column_names if name != NUMBER)
            raise SiftError(f"data: the {split} split has no column {column!r}; it has {there}")


def _check_rows(
    rows: Dataset,
    split: str,
    text: Sequence[str],
    label: str,
    names: tuple[str, ...] | None,
) -> Dataset:
    """The same rows with the columns text, pair, label and row alone, every value checked."""
    from datasets import ClassLabel, Dataset

    _require(rows, split, [*text, label])
    numbers = list(rows[NUMBER])
    out: dict[str, list[Any]] = {}
    for key, column in zip(("text", "pair"), text, strict=False):
        values = _values(rows, split, column)
        _refuse(split, f"text in {column!r} is missing", numbers, [v is None for v in values])
        out[key] = [str(value) for value in values]
    given = _values(rows, split, label)
    if names is None:
        numeric = [isinstance(value, int | float) for value in given]
        _refuse(split, "targets that are no numbers", numbers, [not one for one in numeric])
        finite = [math.isfinite(value) for value in given]
        _refuse(split, "targets that are not finite", numbers, [not one for one in finite])
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
        _refuse(split, said, numbers, [not one for one in valid], given)
        out["label"] = [int(code) for code in coded]
    out["row"] = numbers
    return Dataset.from_dict(out)


def _values(rows: Dataset, split: str, column: str) -> list[Any]:
    try:
        return list(rows[column])
    except UnicodeDecodeError as error:  # found by no one before: JSON is read without a look
        raise SiftError(f"data: the {split} split: {column!r} is not UTF-8: {error}") from None


def _refuse(
    split: str,
    what: str,
    numbers: Sequence[int],
    wrong: Sequence[bool],
    values: Sequence[Any] | None = None,
) -> None:
    rows = [index for index, one in enumerate(wrong) if one]
    if not rows:
        return
    shown = ", ".join(
        f"{numbers[index]}" + (f" ({values[index]!r})" if values is not None else "")
        for index in rows[:5]
    )
    raise SiftError(f"data: the {split} split has {what}: {len(rows):,} rows, such as row {shown}")
