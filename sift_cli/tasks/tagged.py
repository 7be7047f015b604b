"""Rows of words with a tag each: from a source to a task, every value checked.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sift_cli.errors import SiftError
from sift_cli.tasks.columns import NUMBER_COLUMN, column_values, refuse_rows, require_columns
from sift_cli.tasks.entities import has_entities
from sift_cli.tasks.metrics import TAG, leading, require_fit
from sift_cli.tasks.several import are_lists, codes_in_lists, names_in
from sift_cli.tasks.sources import Source, by_suffix, evaluation_splits, read_rows, take_split
from sift_cli.tasks.table import TAGS, text_columns
from sift_cli.tasks.tagging import Tagging

if TYPE_CHECKING:
    from datasets import Dataset

ENTITY = ("entity_f1", "entity_precision", "entity_recall", "token_accuracy")
PLAIN = ("token_accuracy", "f1_macro")  # of tags that are of no entities


def load_tagging(
    source: Source,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    first: str | None = None,
    train: bool = True,
) -> Tagging:
    """Loads and checks the training rows (unless `train` is false) and those to evaluate on.

    `text` is the column of words and `label` that of tags, `tokens` and `tags` unless given. Tags
    are named by `labels`, by the source, or as they stand in the training rows. Raises SiftError
    for a source, split or column that is not there, rows without words, words without a tag,
    unknown tags, and metrics of other tasks.
    """
    raw, path = read_rows(source), source.path
    columns = text_columns(source.task, text)[0], label or TAGS
    wanted = {name: take_split(raw, name, path) for name in evaluation_splits(raw, source.split)}
    rows = take_split(raw, "train", path) if train or labels is None else None
    names = tuple(labels or _names(rows, columns[1]))
    entity = has_entities(names)
    chosen = tuple(metrics or (ENTITY if entity else PLAIN))
    for key, some in (("data.metrics", chosen), ("eval.metric", [first] if first else [])):
        require_fit(key, some, TAG, f"{columns[1]!r} holds")
        if not entity and (wrong := [name for name in some if name in ENTITY[:3]]):
            raise SiftError(
                f"{key}: {wrong[0]} is of entities, such as B-PER and I-PER, and {columns[1]!r} "
                f"holds {', '.join(names[:5])}; use {', '.join(PLAIN)}"
            )
    return Tagging(
        names,
        leading(chosen, first),
        _checked(rows, "train", columns, names) if train and rows is not None else None,
        {
            suffix: _checked(some, where, columns, names)
            for where, (suffix, some) in zip(wanted, by_suffix(wanted).items(), strict=True)
        },
    )


def _names(rows: Dataset | None, column: str) -> tuple[str, ...]:
    assert rows is not None
    require_columns(rows, "train", [column])
    if not are_lists(rows, column):
        raise SiftError(f"data.label: {column!r} holds no lists of tags, one for each word")
    return names_in(rows, "train", column)


def _checked(
    rows: Dataset, split: str, columns: tuple[str, str], names: tuple[str, ...]
) -> Dataset:
    """The same rows with the columns words, label (codes) and row alone, every value checked."""
    from datasets import Dataset

    require_columns(rows, split, columns)
    for column in columns:
        if not are_lists(rows, column):
            raise SiftError(f"data: the {split} split: {column!r} holds no lists")
    numbers = list(rows[NUMBER_COLUMN])
    words, tags = (column_values(rows, split, column) for column in columns)
    refuse_rows(split, f"no words in {columns[0]!r}", numbers, [not some for some in words])
    blank = [any(one is None or not str(one).strip() for one in some) for some in words]
    refuse_rows(split, f"words in {columns[0]!r} that are missing", numbers, blank)
    unlike = [len(some) != len(one or ()) for some, one in zip(words, tags, strict=True)]
    counts = [f"{len(some)} and {len(one or ())}" for some, one in zip(words, tags, strict=True)]
    refuse_rows(split, "not as many tags as words", numbers, unlike, counts)
    codes = codes_in_lists(rows, split, columns[1], names)
    unknown = [-1 in some for some in codes]
    refuse_rows(split, f"tags outside {dict(enumerate(names))}", numbers, unknown, tags)
    texts = [[str(word) for word in some] for some in words]
    return Dataset.from_dict({"words": texts, "label": codes, "row": numbers})
