"""Rows for language models: from a source to checked values, whatever its columns are called.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.columns import NUMBER_COLUMN, TOLD, require_columns
from sift_cli.tasks.conversations import FORMATS, Format, UnusableRow, line_of
from sift_cli.tasks.sources import Source, read_rows, take_split

if TYPE_CHECKING:
    from datasets import Dataset

AUTO = "auto"
BATCH = 1000


@dataclass(frozen=True)
class Layout:
    """A format, and the source's word for each of its names."""

    name: str
    names: Mapping[str, str]

    @property
    def format(self) -> Format:
        """The row of the table of formats."""
        return FORMATS[self.name]


@dataclass(frozen=True)
class LanguageRows:
    """Checked rows to train and to evaluate on, each None where it was not asked for.

    They have the columns `value` (what `conversations.row_of` reads) and `row`, the number in the
    source split.
    """

    layout: Layout
    train: Dataset | None
    evaluation: Dataset | None


def formats_of(task: str) -> tuple[str, ...]:
    """The formats whose rows a task can learn from: of a text alone, nobody can tell the answer."""
    return tuple(name for name in FORMATS if (name == "text") == (task == "text"))


def recognise(
    columns: Sequence[str], task: str, asked: str = AUTO, given: Mapping[str, str] | None = None
) -> Layout:
    """The format of rows with these columns; `given` are the source's words for some names.

    One that is `asked` for is not looked for. Raises SiftError where no format fits, or several do.
    """
    given = given or {}
    among = formats_of(task) if asked == AUTO else (asked,)
    known = {name: _layout(name, given) for name in among if set(given) <= set(FORMATS[name].names)}
    if not known:
        lacking = " or ".join(f"{name} ({', '.join(FORMATS[name].names)})" for name in among)
        raise SiftError(f"data.columns: {', '.join(given)} are not all names of {lacking}")
    for name, one in known.items():
        used = [
            one.names[key] for key in one.format.columns if key in given or key in one.format.needs
        ]
        if twice := sorted({column for column in used if used.count(column) > 1}):
            raise SiftError(f"data.columns: {name} has two names for the column {twice[0]!r}")
    if asked != AUTO:
        return known[asked]
    fit = {
        name: one
        for name, one in known.items()
        if all(one.names[needed] in columns for needed in one.format.needs)
    }
    if len(fit) == 1:
        return next(iter(fit.values()))
    there = ", ".join(one for one in columns if one != NUMBER_COLUMN)
    if fit:
        raise SiftError(
            f"data: the columns {there} fit {' and '.join(fit)}; say which with data.format"
        )
    for name, column in given.items():
        if column not in columns:
            raise SiftError(f"data.columns: {name}: no column {column!r}; there is {there}")
    wanted = ", ".join(f"{name} ({_needed(one)})" for name, one in known.items())
    other = "instruct" if task == "text" else "text"
    way_out = (
        f"; task: {other} would take them"
        if any(set(FORMATS[one].needs) <= set(columns) for one in formats_of(other))
        else ""
    )
    raise SiftError(
        f"data: the columns {there} fit no format of task {task}: {wanted}; say with data.columns "
        f"what yours are called{way_out}"
    )


def _layout(name: str, given: Mapping[str, str]) -> Layout:
    return Layout(name, {one: given.get(one, one) for one in FORMATS[name].names})


def _needed(layout: Layout) -> str:
    return ", ".join(layout.names[name] for name in layout.format.needs)


def load_language_rows(
    source: Source,
    *,
    format: str = AUTO,
    columns: Mapping[str, str] | None = None,
    train: bool = True,
    evaluate: bool = True,
) -> LanguageRows:
    """Loads and checks the training rows and those to evaluate on, or one of the two.

    Raises SiftError for a source that is not there, a missing or empty split, columns that fit no
    format or several, and rows that cannot be used, with their numbers.
    """
    raw, split = read_rows(source), source.split
    names = [name for name, wanted in (("train", train), (split, evaluate)) if wanted]
    taken = {name: take_split(raw, name, source.path) for name in names}
    layout = recognise(next(iter(taken.values())).column_names, source.task, format, columns)
    read = {name: read_split(rows, name, layout, columns or {}) for name, rows in taken.items()}
    return LanguageRows(layout, read["train"] if train else None, read[split] if evaluate else None)


def read_split(rows: Dataset, split: str, layout: Layout, given: Mapping[str, str]) -> Dataset:
    """The rows of a source split as `value` and `row`; raises SiftError naming unusable ones."""
    from datasets import Dataset

    form = layout.format
    columns = columns_of(layout, rows.column_names, given)
    require_columns(rows, split, list(columns.values()))
    numbers, values, wrong = rows[NUMBER_COLUMN][:], [], []
    held = rows.select_columns(list(set(columns.values())))
    for at, row in enumerate(_each(held, split, numbers)):
        try:
            value = form.read({name: row[one] for name, one in columns.items()}, layout.names)
            values.append(line_of(value))
        except UnusableRow as error:
            wrong.append((numbers[at], str(error)))
    if wrong:
        shown = "; ".join(f"row {number}: {why}" for number, why in wrong[:TOLD])
        more = f"; and {len(wrong) - TOLD:,} more" if len(wrong) > TOLD else ""
        said = f"data: the {split} split, {layout.name} rows: {shown}{more}"
        raise SiftError(f"{said}; rows are counted from 0")
    return Dataset.from_dict({"value": values, "row": numbers})


def columns_of(layout: Layout, there: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The columns to read by the format's names: those needed or `given`, and others that it may
    have and that are `there`."""
    form, names = layout.format, layout.names
    sure = {name: names[name] for name in form.columns if name in form.needs or name in given}
    free = set(there) - set(sure.values())
    return sure | {name: names[name] for name in form.may if names[name] in free}


def _each(rows: Dataset, split: str, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows one by one; raises SiftError for text that is not UTF-8."""
    at, size = 0, BATCH
    while at < len(rows):
        try:
            batch = rows[at : at + size]
        except UnicodeDecodeError as error:
            if size == 1:
                where = f"the {split} split, row {numbers[at]}"
                raise SiftError(f"data: {where}: not UTF-8: {error}") from None
            size = 1
            continue
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))
        at += size
