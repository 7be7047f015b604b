"""Files of cells with a delimiter between them, CSV and TSV: a cell is the text that stands there.

No library guesses at it: `None`, `N/A` and `007` are texts, and an empty cell is a missing value.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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

Row = list[str | None]
Numbered = Iterator[tuple[int, list[str]]]  # rows, each with the number of its last line


@dataclass(frozen=True)
class Cells:
    """How cells are read: what stands between them and the file's encoding; None: as is found."""

    delimiter: str | None = None
    encoding: str | None = None


AS_FOUND = Cells()


def read_cells(files: Sequence[Path], cells: Cells, task: str) -> Dataset:
    """The rows of files with the same columns; all values are texts, or None for empty cells.

    Raises SiftError with the file and line that cannot be read.
    """
    from datasets import Dataset, Features, Value

    columns: dict[str, list[str | None]] = {}
    for file in files:
        names, rows = open_cells(file, cells, task)
        if columns and set(names) != set(columns):
            raise SiftError(
                f"data.path: {file} has the columns {', '.join(names)}, and {files[0]} has "
                f"{', '.join(columns)}; the files of a split have the same"
            )
        table = list(rows)
        for at, name in enumerate(names):
            columns.setdefault(name, []).extend(row[at] for row in table)
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))


def open_cells(file: Path, cells: Cells, task: str) -> tuple[list[str], Iterator[Row]]:
    """The names of a file's columns, and its rows as they are read, a value for each column.

    Raises SiftError, then or while reading, with the file and line that cannot be read. A GLUE
    task's original files (.tsv), which quote nothing, are read as they are.
    """
    encoding = cells.encoding or _encoding(file)
    first = next((line for line in _lines(file, encoding) if line.strip()), "")
    delimiter = cells.delimiter or _delimiter(first, file.suffix.lower())
    original = delimiter == TAB and task != "custom"
    literal = original or (delimiter == TAB and not _quotes_fit(file, encoding))
    rows = _rows(file, encoding, delimiter, literal)
    line, header = next(rows, (0, []))
    if original and task == "cola" and len(header) == len(COLA) and header[1] in "01":
        names, rows = list(COLA), chain([(line, header)], rows)
    else:
        names = [name or f"Unnamed: {at}" for at, name in enumerate(header)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SiftError(f"data.path: {file}: two columns are called {twice[0]!r}")
    return names, _values(file, names, rows, delimiter)


def _values(file: Path, names: Sequence[str], rows: Numbered, delimiter: str) -> Iterator[Row]:
    """The rows, each as long as `names`, with None for cells that are empty or not there."""
    for line, row in rows:
        if len(row) > len(names):
            raise SiftError(
                f"data.path: {file}:{line}: {len(row)} cells, but {len(names)} columns; quote a "
                f"cell that holds {delimiter!r}, or say what stands between cells with "
                "data.delimiter"
            )
        yield [cell or None for cell in row] + [None] * (len(names) - len(row))


def _encoding(file: Path) -> str:
    """What the file's first bytes say; UTF-8 where they say nothing."""
    with file.open("rb") as data:
        begins = data.read(max(map(len, MARKS)))
    return next((name for mark, name in MARKS.items() if begins.startswith(mark)), "utf-8")


def _lines(file: Path, encoding: str) -> Iterator[str]:
    """The file's lines with what ends them; raises SiftError where they are not in `encoding`."""
    try:
        with file.open(encoding=encoding, newline="") as lines:
            yield from lines
    except UnicodeDecodeError:
        line, byte = _undecodable(file, encoding)
        raise SiftError(
            f"data.path: {file}:{line}: not {encoding.upper()} (byte 0x{byte:02x}); say "
            "the file's encoding with data.encoding, such as cp1252"
        ) from None


def _undecodable(file: Path, encoding: str) -> tuple[int, int]:
    """The line and the byte at which a file stops being in `encoding`."""
    decoder, number = codecs.getincrementaldecoder(encoding)(), 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                number += 1
                decoder.decode(line)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return number, error.object[error.start]
    raise AssertionError(f"{file} is in {encoding}")


def _delimiter(line: str, ending: str) -> str:
    """What parts the first line into most cells; of several, what the file's ending promises."""
    first = TAB if ending == ".tsv" else ","
    found = {one: len(next(csv.reader([line], delimiter=one), [])) for one in DELIMITERS}
    return max(DELIMITERS, key=lambda one: (found[one], one == first))


def _quotes_fit(file: Path, encoding: str) -> bool:
    """Whether cells between tabs, which need no quotes, have them by the rules all the same."""
    try:
        for _ in _parsed(file, encoding, TAB, literal=False):
            pass
    except csv.Error:
        return False
    return True


def _rows(file: Path, encoding: str, delimiter: str, literal: bool) -> Numbered:
    """The rows that hold something; where `literal`, quotes are letters like any other."""
    try:
        yield from (one for one in _parsed(file, encoding, delimiter, literal) if one[1])
    except csv.Error as error:
        raise SiftError(f"data.path: {file}:{error.args[1]}: {error.args[0]}") from None


def _parsed(file: Path, encoding: str, delimiter: str, literal: bool) -> Numbered:
    """All rows; a csv.Error says its line as well."""
    csv.field_size_limit(LONGEST_CELL)
    quoting: Any = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    lines = _lines(file, encoding)
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise csv.Error(str(error), reader.line_num) from None


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
