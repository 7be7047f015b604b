"""Rows that may have any of several labels: lists in one column, or a column of 0 and 1 for each.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from sift_cli.errors import SiftError
from sift_cli.tasks.columns import NUMBER_COLUMN, column_values, refuse_rows, require_columns
from sift_cli.tasks.labels import coded

if TYPE_CHECKING:
    from datasets import Dataset

GATHERED = "__labels__"  # a column of lists made of several columns
MOST = 10_000  # labels: a code beyond is none


def gathered(rows: Dataset, split: str, columns: Sequence[str], names: Sequence[str]) -> Dataset:
    """The rows with the column GATHERED: of each the `names` whose columns hold 1.

    Raises SiftError for what is neither 0 nor 1.
    """
    require_columns(rows, split, columns)
    numbers = list(rows[NUMBER_COLUMN])
    found: list[list[str]] = [[] for _ in numbers]
    for name, column in zip(names, columns, strict=True):
        values = column_values(rows, split, column)
        wrong = [value not in (0, 1) for value in values]
        refuse_rows(split, f"something else than 0 and 1 in {column!r}", numbers, wrong, values)
        for labels, value in zip(found, values, strict=True):
            labels += [name] if value else []
    return rows.add_column(GATHERED, found)


def are_lists(rows: Dataset, column: str) -> bool:
    """Whether a column, if there is one of that name, holds lists."""
    import datasets

    kinds = (datasets.List, datasets.LargeList)
    return isinstance(rows.features.get(column), kinds)


def names_in(rows: Dataset, split: str, column: str) -> tuple[str, ...]:
    """The labels of a column of lists: a ClassLabel's, the sorted strings or whole numbers.

    Raises SiftError where they are neither.
    """
    import datasets

    inner = rows.features[column].feature
    if isinstance(inner, datasets.ClassLabel):
        return tuple(inner.names)
    values = [one for some in column_values(rows, split, column) for one in some or ()]
    if values and all(isinstance(one, str) for one in values):
        return tuple(sorted({*values}))
    if values and all(type(one) is int and 0 <= one < MOST for one in values):
        return tuple(map(str, sorted({*values})))
    raise SiftError(f"data.label: the lists in {column!r} hold no labels; name them in data.labels")


def held(rows: Dataset, split: str, column: str, names: Sequence[str]) -> list[list[float]]:
    """Of each row 1 for the labels in its list, and 0 for all others, in the order of `names`.

    Raises SiftError for lists that are missing, and for labels that are none of these.
    """
    require_columns(rows, split, [column])
    if not are_lists(rows, column):
        raise SiftError(f"data: the {split} split has no lists in {column!r}, and others have")
    given, numbers = column_values(rows, split, column), list(rows[NUMBER_COLUMN])
    refuse_rows(split, f"lists in {column!r} that are missing", numbers, [x is None for x in given])
    codes = codes_in_lists(rows, split, column, names)
    wrong = [
        -1 in some or any(isinstance(x, bool) for x in said)
        for some, said in zip(codes, given, strict=True)
    ]
    refuse_rows(split, f"labels outside {dict(enumerate(names))}", numbers, wrong, given)
    return [[float(code in some) for code in range(len(names))] for some in map(set, codes)]


def codes_in_lists(rows: Dataset, split: str, column: str, names: Sequence[str]) -> list[list[int]]:
    """The codes of what is in the lists of a column; see `coded`."""
    from datasets import ClassLabel

    inner = rows.features[column].feature
    own = inner.names if isinstance(inner, ClassLabel) else []
    given = column_values(rows, split, column)
    found = iter(coded(list(chain.from_iterable(given)), own, names, split))
    return [list(islice(found, len(some))) for some in given]
