"""Where rows come from: a hub id, a folder, a file or a built-in set, as splits.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import NotHere, SiftError
from sift_cli.tasks.cells import AS_FOUND, Cells, read_cells, with_numbers
from sift_cli.tasks.columns import NUMBER_COLUMN, TOLD
from sift_cli.tasks.conll import read_conll

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


BUILTIN = Path(__file__).parent / "builtin"
CELLS, CONLL = "cells", "conll"
BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": CELLS,
    ".tsv": CELLS,
    ".conll": CONLL,
}
# No hub id ends like this, so such a path is never looked for there.
FILE_ENDINGS = (*BUILDERS, ".txt", ".arrow", ".xlsx", ".gz", ".zip")
SAVED = ("dataset_dict.json", "state.json")  # in folders of `save_to_disk`
SPLIT_NAMES = {
    "train": ("train",),
    "validation_matched": ("validation_matched", "dev_matched"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from, and which of them are held out or left out.

    `config` is that of a hub dataset, `cells` how files of cells are read, `split` the one to
    evaluate on. Where that is the validation split, the share `holdout` of the training rows
    replaces it. The share `inner_holdout` of those that are then left to train on replaces
    whichever split it is.
    """

    path: str
    task: str
    config: str | None = None
    cells: Cells = AS_FOUND
    split: str = "validation"
    holdout: float | None = None
    inner_holdout: float | None = None
    max_train_rows: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What a path leads to on this machine: files by split, or a folder that `datasets` saved.

    It is neither for a hub id.
    """

    files: Mapping[str, list[Path]] = field(default_factory=dict)
    saved: Path | None = None

    @property
    def here(self) -> bool:
        """Whether it lies on this machine."""
        return bool(self.files) or self.saved is not None

    @property
    def whole(self) -> bool:
        """Whether it is one set of rows, which then is called the training split."""
        saved = self.saved is not None and (self.saved / SAVED[1]).is_file()
        return saved or self.files.keys() == {"train"}

    @property
    def cells(self) -> bool:
        """Whether its files hold cells with a delimiter between them."""
        return any(_builder(file) == CELLS for some in self.files.values() for file in some)


def find_rows(path: str, task: str) -> Found:
    """What the path leads to; needs no library.

    Raises NotHere where nothing is there, and SiftError for files that cannot be read or are empty.
    """
    if (folder := _saved_folder(path)) is not None:
        return Found(saved=folder)
    files = _find_files(path, task) or {}
    for split, some in files.items():
        header = 1 if _builder(some[0]) == CELLS else 0
        if some[0].suffix != ".parquet" and not any(_has_lines(file, header) for file in some):
            raise SiftError(f"data.path: {some[0]}: the split {split!r} is empty")
    return Found(files)


def _builder(file: Path) -> str | None:
    return BUILDERS.get(file.suffix.lower())


def _saved_folder(path: str) -> Path | None:
    folder = Path(path).expanduser()
    return folder if any((folder / name).is_file() for name in SAVED) else None


def load_splits(
    path: str,
    task: str,
    config: str | None,
    cells: Cells = AS_FOUND,
    numbers: Sequence[str] = (),
) -> DatasetDict:
    """Every split of a source, each row with its number under NUMBER_COLUMN.

    Of files of cells, the columns `numbers` may be numbers; all others are text. Raises NotHere for
    a source that is not there, and SiftError for one that cannot be read.
    """
    found_at = find_rows(path, task)
    _refuse_idle(path, found_at, cells)
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come as exceptions
    try:
        if found_at.saved is not None:
            saved = datasets.load_from_disk(found_at.saved)
            found = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        elif found_at.cells:
            found = {name: read_cells(some, cells, task) for name, some in found_at.files.items()}
            found = with_numbers(found, numbers)
        elif found_at.files:
            found = {split: _read_files(split, some) for split, some in found_at.files.items()}
        else:
            if config is None and task in datasets.get_dataset_config_names(path):
                config = task
            cache = _writable(str(datasets.config.HF_DATASETS_CACHE))
            found = datasets.load_dataset(path, config, cache_dir=cache)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        said = str(cause).strip().splitlines() or [type(cause).__name__]
        kind = "cannot be read" if found_at.here else "is not on this machine nor on the hub"
        lacks = not found_at.here and isinstance(error, OSError)
        raise (NotHere if lacks else SiftError)(f"data.path: {path} {kind}: {said[0]}") from error
    numbered = {
        name: rows.add_column(NUMBER_COLUMN, list(range(len(rows)))) for name, rows in found.items()
    }
    return datasets.DatasetDict(numbered)


def _refuse_idle(path: str, source: Found, cells: Cells) -> None:
    """Raises SiftError where it is said how to read cells, and the source holds none."""
    for key in ("delimiter", "encoding"):
        if getattr(cells, key) is not None and not source.cells:
            raise SiftError(f"data.{key}: it is for .csv and .tsv files, and {path} holds none")


def read_rows(source: Source, labels: Sequence[str] = (), *, several: bool = False) -> DatasetDict:
    """The splits of `load_splits`, some training rows held out or left out as the source says.

    `labels` names the columns that may hold them: their cells may be numbers, and rows are held out
    of each class in proportion, where there are classes, and not `several` columns of labels.
    Raises SiftError where that leaves none to train on.
    """
    raw = load_splits(source.path, source.task, source.config, source.cells, labels)
    split, seed = source.split, source.seed

    def hold_out(key: str, share: float) -> None:
        whole = take_split(raw, "train", source.path)
        if not 0 < math.ceil(share * len(whole)) < len(whole):
            raise SiftError(f"data.{key}: {share} leaves none of {len(whole)} rows to train on")
        there = [] if several else [one for one in labels if one in whole.column_names]
        classes = list(whole[there[0]]) if there else []
        if classes and not any(isinstance(one, float | list | dict) for one in classes):
            kept, held = held_of_each(classes, math.ceil(share * len(whole)), seed)
            raw[split], raw["train"] = whole.select(held), whole.select(kept)
            return
        parts = whole.train_test_split(test_size=share, seed=seed)
        raw[split], raw["train"] = parts["test"], parts["train"]

    if source.holdout is not None and split == "validation":
        hold_out("holdout", source.holdout)
    if source.max_train_rows is not None and "train" in raw:
        kept = min(source.max_train_rows, len(raw["train"]))
        raw["train"] = raw["train"].shuffle(seed=seed).select(range(kept))
    if source.inner_holdout is not None:
        hold_out("inner_holdout", source.inner_holdout)
    return raw


def held_of_each(classes: Sequence[Any], count: int, seed: int) -> tuple[list[int], list[int]]:
    """The rows to keep and the `count` rows to hold out of classes in proportion, in seeded order.

    Of each class a row is kept, and one held out if it has two, as far as `count` goes.
    """
    import numpy as np

    order = [int(row) for row in np.random.default_rng(seed).permutation(len(classes))]
    rows: dict[Any, list[int]] = {}
    for row in order:
        rows.setdefault(classes[row], []).append(row)
    quota = {name: min(1, len(some) - 1) for name, some in rows.items()}
    if sum(quota.values()) > count:
        quota = dict.fromkeys(rows, 0)
    share = count / len(classes)
    while sum(quota.values()) < count:  # to the class that is furthest below its share
        free = [name for name, some in rows.items() if quota[name] < len(some) - 1]
        free = free or [name for name, some in rows.items() if quota[name] < len(some)]
        most = max(free, key=lambda name: share * len(rows[name]) - quota[name])
        quota[most] += 1
    held = {row for name, some in rows.items() for row in some[: quota[name]]}
    return [row for row in order if row not in held], [row for row in order if row in held]


def _read_files(split: str, files: Sequence[Path]) -> Dataset:
    """The rows of one split's files; splits may differ in the columns that no task reads."""
    import datasets

    if _builder(files[0]) == CONLL:
        return read_conll(files)
    try:
        rows: Dataset = datasets.load_dataset(
            _builder(files[0]),
            data_files={split: [str(file) for file in files]},
            split=split,
            cache_dir=_writable(str(datasets.config.HF_DATASETS_CACHE)),
        )
    except datasets.exceptions.DatasetGenerationError:
        if broken := next(filter(None, map(_broken_json, files)), None):
            raise SiftError(f"data.path: {broken}") from None
        raise
    return rows


@functools.cache
def _writable(cache: str) -> str:
    """The cache's folder; where nothing can be written there, one for this process alone."""
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError:
        own = tempfile.mkdtemp(prefix="sift-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return own


def _broken_json(file: Path) -> str | None:
    """Where a file stops being JSON, or JSON Lines, and why; None where it does not."""
    if _builder(file) != "json":
        return None
    line = 1
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix.lower() == ".json":
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
        return f"{file}: not UTF-8: {error}; save it as UTF-8"
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
        if _builder(folder) is None:
            raise SiftError(f"data.path: {path} is not one of {', '.join(BUILDERS)}")
        return {"train": [folder]}
    if not folder.is_dir():
        hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith(".")
        if hub_id and not path.lower().endswith(FILE_ENDINGS):
            return None
        within = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise NotHere(f"data.path: {path}: no such folder or file{within}")
    files = [file for file in sorted(folder.iterdir()) if _builder(file)]
    if not files and (inner := _folder_of_task(folder, task)):
        return _find_files(str(inner), task)
    found = _by_split(files, r"\d.*") | _by_split(files, r"([-_.].*)?")  # test200 if no test
    found |= _by_split([file for file in files if file.suffix == ".tsv"], "")  # beside dev_ids.tsv
    if not found:
        there = "; it holds " + ", ".join(file.name for file in files[:TOLD]) if files else ""
        raise SiftError(
            f"data.path: {path} holds no train or validation file ({', '.join(BUILDERS)}){there}"
        )
    if len({file.suffix.lower() for some in found.values() for file in some}) > 1:
        raise SiftError(f"data.path: {path} holds files of several formats; keep one")
    return found


def _folder_of_task(folder: Path, task: str) -> Path | None:
    """The folder within that is called like the task: `sst2`, or `SST-2` as GLUE has it."""
    called = (one for one in folder.iterdir() if one.name.lower().replace("-", "") == task)
    return next((one for one in called if one.is_dir()), None)


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
