"""Files of rows with what a model said of each: written as the answers come, and gone on with.

Importing this module loads no library of files; functions do when they need it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sift_cli.errors import SiftError
from sift_cli.system.files import replacing
from sift_cli.tasks.streams import STREAMED, Row

if TYPE_CHECKING:
    import pyarrow

STANDARD = "-"  # stdin, or stdout
PARQUET = ".parquet"
DELIMITERS = {".csv": ",", ".tsv": "\t"}

Write = Callable[[Sequence[Row]], None]


def require_output(output: str, resume: bool, endings: Sequence[str] = STREAMED) -> None:
    """Raises SiftError where no rows can be written to `output`, or gone on with there."""
    path = Path(output)
    if output != STANDARD and path.suffix.lower() not in endings:
        raise SiftError(f"--output {output}: its name must end in {' or '.join(endings)}")
    if resume and (output == STANDARD or path.suffix.lower() == PARQUET):
        kind = "what stdout got is not known" if output == STANDARD else "Parquet is written whole"
        raise SiftError(f"--resume: {kind}; it is for files of {', '.join(STREAMED[:3])}")
    if output != STANDARD and path.exists() and not resume:
        way_out = "" if path.suffix.lower() == PARQUET else ", or go on with it by --resume"
        raise SiftError(f"--output {output}: exists already; choose another{way_out}")


@dataclass(frozen=True)
class Lines:
    """How rows become lines: JSON objects, or cells of `columns` with a delimiter between them.

    The `own` columns of a row come first, and what was said of it after them.
    """

    own: tuple[str, ...]
    new: tuple[str, ...]
    delimiter: str | None = None

    def header(self) -> str:
        """The line that names the columns; none of JSON."""
        return "" if self.delimiter is None else self._cells([*self.own, *self.new])

    def line(self, row: Row, ascii: bool = False) -> str:
        """A row with what was said of it."""
        if self.delimiter is None:
            return json.dumps(row, ensure_ascii=ascii, default=_plain) + "\n"
        return self._cells([_cell(row.get(one)) for one in (*self.own, *self.new)])

    def beginning(self, row: Row) -> str:
        """How the line of a row begins, whatever is said of it."""
        if self.delimiter is None:
            return json.dumps(row, ensure_ascii=False, default=_plain)[:-1] + ", " * bool(row)
        return self._cells([*(_cell(row.get(one)) for one in self.own), "x"])[:-2]

    def _cells(self, cells: Sequence[str]) -> str:
        line: list[str] = []
        sink: Any = SimpleNamespace(write=line.append)
        csv.writer(sink, delimiter=self.delimiter or ",").writerow(cells)
        return line[0].removesuffix("\r\n") + "\n"  # of \n alone, writers would not quote an \r


def held_rows(path: Path, lines: Lines, rows: Iterable[Row]) -> int:
    """How many of the `rows` a file holds whole; a line that was broken off is cut away.

    Raises SiftError where it holds other rows than these, in their order.
    """
    header, count = lines.header().encode(), 0
    with path.open("r+b") as file:
        if not header.startswith(file.read(len(header))):
            raise SiftError(f"--resume: {path}: its columns are others than would be written")
        if file.tell() < len(header):
            file.truncate(0)
            return 0
        for count, row in enumerate(rows):
            start, beginning = file.tell(), lines.beginning(row).encode()
            found, rest = file.read(len(beginning)), file.readline()
            if not rest.endswith(b"\n") and beginning.startswith(found):
                file.truncate(start)
                return count
            if found != beginning:
                raise SiftError(
                    f"--resume: {path}: row {count}, counted from 0, is not that of the input"
                )
        if file.read(1):
            raise SiftError(f"--resume: {path} holds more than the {count + 1:,} rows of the input")
    return count + 1


@contextmanager
def writing(output: str, lines: Lines, schema: pyarrow.Schema | None) -> Iterator[Write]:
    """A function that writes some rows, whole lines at once, to the end of `output`.

    Parquet, which has a `schema`, is there at the end of the context, or not at all.
    """
    path = Path(output)
    if output != STANDARD:
        path.parent.mkdir(parents=True, exist_ok=True)
    if schema is not None:
        with _parquet(path, schema) as write:
            yield write
    elif output == STANDARD:
        yield lambda rows: _print("".join(lines.line(row, ascii=True) for row in rows))
    else:
        with path.open("ab") as file:

            def append(rows: Sequence[Row]) -> None:
                begun = "" if file.tell() else lines.header()
                file.write("".join([begun, *map(lines.line, rows)]).encode())
                file.flush()

            yield append


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _parquet(path: Path, schema: pyarrow.Schema) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    try:
        with replacing(path) as partial, parquet.ParquetWriter(partial, schema) as file:
            yield lambda rows: file.write_table(pyarrow.Table.from_pylist(list(rows), schema))
    except (pyarrow.ArrowException, OverflowError) as error:
        raise unfit(path, error) from None


def schema_of(
    path: Path, windows: Iterable[Sequence[Row]], new: Mapping[str, Any]
) -> pyarrow.Schema:
    """The columns of a Parquet file: those of the rows of `path`, then those of `new`, an example.

    Raises SiftError for rows whose values are of no one kind.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        if path.suffix.lower() == PARQUET:
            own = parquet.read_schema(path).remove_metadata()
        else:  # a struct has the keys of every row
            kinds = (pyarrow.schema(list(pyarrow.array(some).type)) for some in windows)
            own = pyarrow.schema([])
            for kind in kinds:
                own = pyarrow.unify_schemas([own, kind], promote_options="permissive")
        return pyarrow.schema([*own, *pyarrow.array([new]).type])
    except (pyarrow.ArrowException, OverflowError) as error:
        raise unfit(path, error) from None


def unfit(path: Path, error: Exception) -> SiftError:
    """What to say where rows cannot stand in a Parquet file."""
    said = str(error).splitlines()[0]
    return SiftError(f"{path}: the rows fit no Parquet file: {said}; write .jsonl instead")


def _cell(value: Any) -> str:
    """A value as the text of a cell: a text as it is, what is missing as nothing, else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool | int | float | list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return _plain(value)


def _plain(value: Any) -> str:
    """A value of Parquet that JSON has no kind for, as text."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal | UUID):
        return str(value)
    kind = type(value).__name__
    raise SiftError(f"--output: a value of the input is {kind}, which is no text; write .parquet")
