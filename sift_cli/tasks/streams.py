"""Files of rows that are read a row at a time, so that memory does not grow with them.

Importing this module loads no library of files; functions do when they need it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sift_cli.errors import SiftError
from sift_cli.tasks.cells import AS_FOUND, Cells, open_cells

STREAMED = (".csv", ".tsv", ".jsonl", ".parquet")
READ_AHEAD = 1024  # rows of a Parquet file

Row = dict[str, Any]  # values by column


def stream_rows(path: Path, cells: Cells = AS_FOUND, task: str = "custom") -> Iterator[Row]:
    """The rows of a file, in order, as what is written there.

    Cells are texts, None where they are empty; rows of JSON have the keys that they have. Raises
    SiftError, then or while reading, with the place that cannot be read.
    """
    ending = path.suffix.lower()
    if ending not in STREAMED:
        raise SiftError(f"{path}: use one of {', '.join(STREAMED)}")
    if ending == ".jsonl":
        return _json_lines(path)
    if ending == ".parquet":
        return _parquet(path)
    names, rows = open_cells(path, cells, task)
    return (dict(zip(names, row, strict=True)) for row in rows)


@contextmanager
def stdin_kept() -> Iterator[Path]:
    """A file that holds the JSON lines of stdin while the context lasts: it can be read twice.

    A SiftError says `-` for it.
    """
    with tempfile.TemporaryDirectory(prefix="sift-") as folder:
        path = Path(folder) / "stdin.jsonl"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield path
        except SiftError as error:
            raise SiftError(str(error).replace(str(path), "-"), error.code) from None


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
                if "\\u" in text:
                    json.dumps(row, ensure_ascii=False).encode()  # half a pair of surrogates
            except json.JSONDecodeError as error:
                raise SiftError(f"{path}:{number}: not JSON: {error.msg}") from None
            except UnicodeError:
                raise SiftError(f"{path}:{number}: not UTF-8; save it as UTF-8") from None
            except RecursionError:
                raise SiftError(f"{path}:{number}: nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise SiftError(f"{path}:{number}: {error}") from None
            if not isinstance(row, dict):
                raise SiftError(f"{path}:{number}: not a row: a line is a mapping of columns")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(READ_AHEAD):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SiftError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
