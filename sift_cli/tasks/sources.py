"""Where rows come from: a hub id, a folder, a file or a built-in set, as splits.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.conll import read_conll

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


BUILTIN = Path(__file__).parent / "builtin"
NUMBER_COLUMN = "__row__"  # row numbers, in source splits that may have a column `row` of their own
CONLL = "conll"
BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".conll": CONLL,
}
# No hub id ends like this, so such a path is never looked for there.
FILE_ENDINGS = (*BUILDERS, ".tsv", ".txt", ".arrow", ".xlsx", ".gz", ".zip")
TOLD = 5  # files that one error names
SPLIT_NAMES = {
    "train": ("train",),
    "validation_matched": ("validation_matched", "dev_matched"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def load_splits(path: str, task: str, config: str | None) -> DatasetDict:
    """Every split of a source, each row with its number under NUMBER_COLUMN.

    Raises SiftError for a source that is not there or cannot be read.
    """
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
        name: rows.add_column(NUMBER_COLUMN, list(range(len(rows)))) for name, rows in found.items()
    }
    return datasets.DatasetDict(numbered)


def read_rows(
    path: str,
    task: str,
    config: str | None,
    *,
    split: str,
    holdout: float | None,
    inner_holdout: float | None,
    max_train_rows: int | None,
    seed: int,
) -> DatasetDict:
    """The splits of `load_splits`, some training rows held out or left out.

    Where `split` is the validation split, the share `holdout` of the training rows replaces it.
    The share `inner_holdout` of those that are then left to train on replaces whichever split it
    is. Raises SiftError where that leaves none to train on.
    """
    raw = load_splits(path, task, config)

    def hold_out(key: str, share: float) -> None:
        whole = take_split(raw, "train", path)
        if not 0 < math.ceil(share * len(whole)) < len(whole):
            raise SiftError(f"data.{key}: {share} leaves none of {len(whole)} rows to train on")
        parts = whole.train_test_split(test_size=share, seed=seed)
        raw[split], raw["train"] = parts["test"], parts["train"]

    if holdout is not None and split == "validation":
        hold_out("holdout", holdout)
    if max_train_rows is not None and "train" in raw:
        kept = min(max_train_rows, len(raw["train"]))
        raw["train"] = raw["train"].shuffle(seed=seed).select(range(kept))
    if inner_holdout is not None:
        hold_out("inner_holdout", inner_holdout)
    return raw


def _read_files(split: str, files: Sequence[Path]) -> Dataset:
    """The rows of one split's files; splits may differ in the columns that no task reads."""
    import datasets

    header = 1 if files[0].suffix == ".csv" else 0
    if files[0].suffix != ".parquet" and not any(_has_lines(file, header) for file in files):
        raise SiftError(f"data.path: {files[0]}: the split {split!r} is empty")
    if BUILDERS[files[0].suffix] == CONLL:
        return read_conll(files)
    try:
        rows: Dataset = datasets.load_dataset(
            BUILDERS[files[0].suffix],
            data_files={split: [str(file) for file in files]},
            split=split,
        )
    except datasets.exceptions.DatasetGenerationError:
        if broken := next(filter(None, map(_broken_json, files)), None):
            raise SiftError(f"data.path: {broken}") from None
        raise
    return rows


def _broken_json(file: Path) -> str | None:
    """Where a file stops being JSON, or JSON Lines, and why; None where it does not."""
    if BUILDERS[file.suffix] != "json":
        return None
    line = 1
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".json":
                text = lines.read()
                if text.lstrip().startswith("["):
                    json.loads(text)
                    return None
                lines.seek(0)
            for line, text in enumerate(lines, 1):
                if text.strip() and not isinstance(json.loads(text.strip()), dict):
                    return f"{file}:{line}: not a row: a line is a mapping of columns"
    except json.JSONDecodeError as error:
        return f"{file}:{line + error.lineno - 1}: not JSON: {error.msg}"
    except RecursionError:
        return f"{file}:{line}: nested too deeply"
    except UnicodeDecodeError as error:
        return f"{file}: not UTF-8: {error}"
    return None


def _has_lines(file: Path, header: int) -> bool:
    """Whether text follows the first `header` lines."""
    with file.open("rb") as lines:
        return any(line.strip() for line in itertools.islice(lines, header, None))


def _find_files(path: str, task: str) -> dict[str, list[Path]] | None:
    """Data files by split; None for a hub id."""
    if path.startswith("builtin:"):
        folder = BUILTIN / path.removeprefix("builtin:")
        if not folder.is_dir():
            folders = sorted(one.name for one in BUILTIN.iterdir() if one.is_dir())
            known = ", ".join(f"builtin:{name}" for name in folders)
            raise SiftError(f"data.path: no such built-in dataset {path}; there is {known}")
    else:
        folder = Path(path).expanduser()
    if folder.is_file():
        if folder.suffix not in BUILDERS:
            raise SiftError(f"data.path: {path} is not one of {', '.join(BUILDERS)}")
        return {"train": [folder]}
    if not folder.is_dir():
        hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith(".")
        if hub_id and not path.lower().endswith(FILE_ENDINGS):
            return None
        within = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise SiftError(f"data.path: {path}: no such folder or file{within}")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in BUILDERS]
    if not files and (folder / task).is_dir():
        return _find_files(str(folder / task), task)
    found = _by_split(files, r"\d.*") | _by_split(files, r"([-_.].*)?")  # test200 if no test
    if not found:
        there = "; it holds " + ", ".join(file.name for file in files[:TOLD]) if files else ""
        raise SiftError(
            f"data.path: {path} holds no train or validation file ({', '.join(BUILDERS)}){there}"
        )
    if len({file.suffix for some in found.values() for file in some}) > 1:
        raise SiftError(f"data.path: {path} holds files of several formats; keep one")
    return found


def _by_split(files: Sequence[Path], after: str) -> dict[str, list[Path]]:
    """The files whose names begin with that of a split, and go on as the pattern `after`."""
    found: dict[str, list[Path]] = {}
    for file in files:
        for split, starts in SPLIT_NAMES.items():
            if re.match(rf"({'|'.join(starts)}){after}$", file.stem):
                found.setdefault(split, []).append(file)
                break
    return found


def evaluation_splits(raw: DatasetDict, split: str) -> list[str]:
    """MNLI has two validation splits; both count when `validation` is asked for."""
    pair = [f"{split}_matched", f"{split}_mismatched"]
    return pair if split not in raw and all(name in raw for name in pair) else [split]


def by_suffix(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The splits to evaluate on by the suffix of their metrics' names."""
    suffixes = ("", "_mismatched")
    return dict(zip(suffixes, splits.values(), strict=False))


def take_split(raw: DatasetDict, name: str, path: str) -> Dataset:
    """The split called `name`; raises SiftError where it is not there or empty."""
    if name not in raw:
        way_out = (
            "; set data.holdout: 0.1 to hold out training rows" if name == "validation" else ""
        )
        raise SiftError(f"{path}: no split {name!r}; there is {', '.join(raw)}{way_out}")
    if len(raw[name]) == 0:
        raise SiftError(f"{path}: the split {name!r} is empty")
    rows: Dataset = raw[name]
    return rows


def require_columns(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    """Raises SiftError where a column is not there."""
    for column in columns:
        if column not in rows.column_names:
            there = ", ".join(name for name in rows.column_names if name != NUMBER_COLUMN)
            raise SiftError(f"data: the {split} split has no column {column!r}; it has {there}")


def column_values(rows: Dataset, split: str, column: str) -> list[Any]:
    """A column, whole; raises SiftError where it is no text that can be read."""
    try:
        return list(rows[column])
    except UnicodeDecodeError as error:  # found by no one before: JSON is read without a look
        raise SiftError(f"data: the {split} split: {column!r} is not UTF-8: {error}") from None


def refuse_rows(
    split: str,
    what: str,
    numbers: Sequence[int],
    wrong: Sequence[bool],
    values: Sequence[Any] | None = None,
) -> None:
    """Raises SiftError naming the rows that are `wrong`, with their `values`."""
    rows = [index for index, one in enumerate(wrong) if one]
    if not rows:
        return
    shown = ", ".join(
        f"{numbers[index]}" + (f" ({values[index]!r})" if values is not None else "")
        for index in rows[:5]
    )
    raise SiftError(f"data: the {split} split has {what}: {len(rows):,} rows, such as row {shown}")
