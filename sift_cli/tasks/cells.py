"""Files of cells with a delimiter between them, CSV and TSV: a cell is the text that stands there.

No library guesses at it: `None`, `N/A` and `007` are texts, and an empty cell is a missing value.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError

if TYPE_CHECKING:
    from datasets import Dataset

TAB = "\t"
DELIMITERS = ",;\t|"
LONGEST_CELL = 1 << 30  # letters
COLA = ("source", "label", "mark", "sentence")  # whose original files do not name their columns
MARKS = {  # at the beginning of a file
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WHOLE = re.compile(r"-?(0|[1-9]\d*)")
NUMBER = re.compile(r"-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")

Rows = list[tuple[int, list[str]]]  # each with the number of its last line


@dataclass(frozen=True)
class Cells:
    """How cells are read: what stands between them and the file's encoding; None: as is found."""

    delimiter: str | None = None
    encoding: str | None = None


AS_FOUND = Cells()


def read_cells(files: Sequence[Path], cells: Cells, task: str) -> Dataset:
    """The rows of files with the same columns; all values are texts, or None for empty cells.

    Raises SiftError with the file and line that cannot be read. A GLUE task's original files
    (.tsv), which quote nothing, are read as they are.
    """
    from datasets import Dataset, Features, Value

    columns: dict[str, list[str | None]] = {}
    for file in files:
        names, rows = _table(file, cells, task)
        if columns and set(names) != set(columns):
            raise SiftError(
                f"data.path: {file} has the columns {', '.join(names)}, and {files[0]} has "
                f"{', '.join(columns)}; the files of a split have the same"
            )
        for at, name in enumerate(names):
            values = [row[at] if at < len(row) and row[at] else None for _, row in rows]
            columns.setdefault(name, []).extend(values)
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))


def _table(file: Path, cells: Cells, task: str) -> tuple[list[str], Rows]:
    """The names of the columns, and the rows."""
    text = _text(file, cells.encoding)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = cells.delimiter or _delimiter(first, file.suffix.lower())
    original = delimiter == TAB and task != "custom"
    rows = _rows(file, text, delimiter, literal=original)
    if original and task == "cola" and len(rows[0][1]) == len(COLA) and rows[0][1][1] in "01":
        names = list(COLA)
    else:
        names = [name or f"Unnamed: {at}" for at, name in enumerate(rows.pop(0)[1])]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SiftError(f"data.path: {file}: two columns are called {twice[0]!r}")
    for line, row in rows:
        if len(row) > len(names):
            raise SiftError(
                f"data.path: {file}:{line}: {len(row)} cells, but {len(names)} columns; quote a "
                f"cell that holds {delimiter!r}, or say what stands between cells with "
                "data.delimiter"
            )
    return names, rows


def _text(file: Path, encoding: str | None) -> str:
    """The file's text, by its encoding; UTF-8 where neither the file nor anyone says another."""
    data = file.read_bytes()
    found = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    chosen = encoding or found
    try:
        return data.decode(chosen)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SiftError(
            f"data.path: {file}:{line}: not {chosen.upper()} (byte 0x{data[error.start]:02x}); say "
            "the file's encoding with data.encoding, such as cp1252"
        ) from None


def _delimiter(line: str, ending: str) -> str:
    """What parts the first line into most cells; of several, what the file's ending promises."""
    first = TAB if ending == ".tsv" else ","
    found = {one: len(next(csv.reader([line], delimiter=one), [])) for one in DELIMITERS}
    return max(DELIMITERS, key=lambda one: (found[one], one == first))


def _rows(file: Path, text: str, delimiter: str, literal: bool) -> Rows:
    """The rows that hold something; where `literal`, quotes are letters like any other.

    They are as well where they fit no rule and cells are parted by tabs, which need none.
    """
    csv.field_size_limit(LONGEST_CELL)
    quoting: Any = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        if delimiter == TAB and not literal:
            return _rows(file, text, delimiter, literal=True)
        raise SiftError(f"data.path: {file}:{reader.line_num}: {error}") from None


def with_numbers(splits: Mapping[str, Dataset], columns: Sequence[str]) -> dict[str, Dataset]:
    """The splits, `columns` as numbers where every cell of theirs is one as numbers are written."""
    from datasets import Value

    found = dict(splits)
    for column in dict.fromkeys(columns):
        having = [name for name, rows in found.items() if column in rows.column_names]
        cells = [one for name in having for one in found[name][column] if one is not None]
        for pattern, kind in ((WHOLE, "int64"), (NUMBER, "float64")):
            if cells and all(pattern.fullmatch(one) for one in cells):
                found |= {name: found[name].cast_column(column, Value(kind)) for name in having}
                break
    return found
