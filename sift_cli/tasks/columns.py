"""Columns of rows as they were read: those that a task needs, and values that it can use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError

if TYPE_CHECKING:
    from datasets import Dataset

NUMBER_COLUMN = "__row__"  # row numbers, in source splits that may have a column `row` of their own
TOLD = 5  # files or rows that one error names


def require_columns(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    """Raises SiftError where a column is not there."""
    for column in columns:
        if column not in rows.column_names:
            there = [name for name in rows.column_names if name != NUMBER_COLUMN]
            hint = "; if that is several, say what parts them with data.delimiter"
            raise SiftError(
                f"data: the {split} split has no column {column!r}; it has {', '.join(there)}"
                + (hint if len(there) == 1 else "")
            )


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
    """Raises SiftError naming the rows of a split that are `wrong`, with their `values`."""
    refuse(f"data: the {split} split has {what}", numbers, wrong, values)


def refuse(
    said: str,
    numbers: Sequence[int],
    wrong: Sequence[bool],
    values: Sequence[Any] | None = None,
) -> None:
    """Raises SiftError where rows are `wrong`: what is `said`, their numbers and `values`."""
    rows = [index for index, one in enumerate(wrong) if one]
    if not rows:
        return
    shown = ", ".join(
        f"{numbers[index]}" + (f" ({values[index]!r})" if values is not None else "")
        for index in rows[:TOLD]
    )
    raise SiftError(f"{said}: {len(rows):,} rows, such as row {shown}, counted from 0")
