"""Predictions in bulk: a file of rows in, the same rows with what the model says of each out.

The rows are read twice: once to check every one of them, so that nothing is scored in vain, and
once to score them, a window at a time. Memory holds one window, however long the file is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.runs.written import (
    DELIMITERS,
    PARQUET,
    STANDARD,
    Lines,
    held_rows,
    require_output,
    schema_of,
    writing,
)
from sift_cli.tasks.cells import Cells
from sift_cli.tasks.streams import STREAMED, Row, stdin_kept, stream_rows
from sift_cli.tasks.table import LONGEST_ANSWER

if TYPE_CHECKING:
    from rich.console import Console

    from sift_cli.runs.predictor import Predictor

WINDOW = 2048  # rows that are sorted by their length together, and written at once
PROMPTS = (".json", ".txt")  # files of prompts alone
TOLD = 5  # rows that one error names


@dataclass(frozen=True)
class Job:
    """What there is to do with a file of `count` rows.

    `rows` gives them from the first one on, their columns are `own`; `answered` gives windows of
    rows from one on with what is said of them, whose columns are those of the example `new`.
    """

    count: int
    own: tuple[str, ...]
    new: dict[str, Any]
    rows: Callable[[], Iterator[Row]]
    answered: Callable[[int], Iterator[list[Row]]]


def require_files(source: str, output: str, resume: bool) -> None:
    """Raises SiftError where there is no file of rows, or none can be written. Loads no library."""
    path = Path(source)
    if source != STANDARD:
        known = (*STREAMED, *PROMPTS)
        if path.suffix.lower() not in known:
            raise SiftError(f"--input {source}: use one of {', '.join(known)}, or - for stdin")
        if not path.is_file():
            raise SiftError(f"--input {source}: no such file")
        if output != STANDARD and Path(output).exists() and path.samefile(output):
            raise SiftError(f"--output {output}: it is the input; choose another")
    require_output(output, resume)


def predict_file(
    predictor: Predictor,
    source: str,
    output: str,
    *,
    resume: bool = False,
    longest: int = LONGEST_ANSWER,
    console: Console,
) -> None:
    """Writes the rows of `source` with what the model says of each to `output`; `-` is standard.

    Where `resume`, the rows that a broken-off output holds are not asked about again. Raises
    SiftError for files that cannot be read or written, and rows that cannot be used, all before
    the first row is scored but for rows of no token.
    """
    require_files(source, output, resume)
    with stdin_kept() if source == STANDARD else nullcontext(Path(source)) as path, located(path):
        if predictor.speaks:
            require_output(output, resume, [".jsonl"])
            job = _job_of_prompts(predictor, path, longest)
        else:
            job = _job_of_rows(predictor, path, console)
        _carry_out(job, path, output, resume, console)


def _carry_out(job: Job, path: Path, output: str, resume: bool, console: Console) -> None:
    """Writes the rows that `output` does not hold yet."""
    ending = "" if output == STANDARD else Path(output).suffix.lower()
    lines = Lines(job.own, tuple(job.new), DELIMITERS.get(ending))
    schema = schema_of(path, windows(job.rows()), job.new) if ending == PARQUET else None
    there = resume and Path(output).exists()
    done = begun = held_rows(Path(output), lines, job.rows()) if there else 0
    try:
        with _bar(console, output, begun, job.count) as advance:
            answered = job.answered(begun)
            first = list(islice(answered, 1))  # no file is begun where the first rows fail
            with writing(output, lines, schema) as write:
                for window in chain(first, answered):
                    write(window)
                    done += len(window)
                    advance(len(window))
        if ending and console.is_terminal:
            console.print(f"{done:,} rows in {output}", highlight=False)
    finally:
        if 0 < done < job.count and ending not in ("", PARQUET):
            rows = f"{done:,} of {job.count:,} rows"
            console.print(f"{output} holds {rows}; --resume goes on with it", highlight=False)


def windows(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows, WINDOW of them at a time."""
    while window := list(islice(rows, WINDOW)):
        yield window


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Lets an error that is of the file say which option names it."""
    try:
        yield
    except SiftError as error:
        said = str(error).removeprefix("data.path: ")
        said = f"--input {said}" if said.startswith(str(path)) else str(error)
        raise SiftError(said, error.code) from None


def _job_of_prompts(predictor: Predictor, path: Path, longest: int) -> Job:
    from sift_cli.runs.predictor import row_of_prompt, told_of_prompt

    prompts = predictor.prompts(path)

    def answered(begun: int) -> Iterator[list[Row]]:
        for prompt, answer in predictor.answers(prompts[begun:], longest):
            yield [told_of_prompt(prompt, answer)]

    def rows() -> Iterator[Row]:
        return map(row_of_prompt, prompts)

    return Job(len(prompts), (), {}, rows, answered)


def _job_of_rows(predictor: Predictor, path: Path, console: Console) -> Job:
    from sift_cli.runs.predictor import told_of

    data = predictor.recipe.data if predictor.recipe else None
    cells = Cells(data.delimiter, data.encoding) if data else Cells()

    def rows() -> Iterator[Row]:
        return stream_rows(path, cells, data.task if data else "custom")

    count, own, texts, listed = _survey(predictor, path, rows())

    def answered(begun: int) -> Iterator[list[Row]]:
        at, cut = begun, 0
        for window in windows(islice(rows(), begun, None)):
            asked = [[predictor.text(row[name]) for row in window] for name in texts]
            found = predictor.ask(*asked, first=at)
            told = (told_of(one, worded=not listed) for one in found.answers)
            yield [row | said for row, said in zip(window, told, strict=True)]
            at, cut, longest = at + len(window), cut + found.cut, found.longest
        if at > begun:
            tell_cut(cut, at - begun, longest, console)

    new = predictor.example(worded=not listed)
    if clash := [name for name in new if name in own]:
        raise SiftError(
            f"{path}: it has a column {clash[0]!r}, as what is predicted will have; rename it"
        )
    return Job(count, own, new, rows, answered)


def _survey(
    predictor: Predictor, path: Path, rows: Iterator[Row]
) -> tuple[int, tuple[str, ...], list[str], bool]:
    """How many rows there are, their columns, which hold texts, and whether as lists of words.

    Raises SiftError where a column of texts is not there, or a row has no text in it.
    """
    columns: dict[str, None] = {}
    texts: list[str] = []
    wrong: dict[tuple[str, str], list[int]] = {}
    kinds: set[bool] = set()
    count = 0
    for at, row in enumerate(rows):
        columns.update(dict.fromkeys(row))
        if not texts:
            called = predictor.original
            texts = [one if one in row else called.get(one, one) for one in predictor.columns]
        for name in texts:
            value = row.get(name)
            if fault := predictor.fault(value):
                wrong.setdefault((name, fault), []).append(at)
            kinds.add(isinstance(value, list))
        count += 1
    if not count:
        raise SiftError(f"{path}: it holds no rows")
    for name in texts:
        if name not in columns:
            there = ", ".join(columns)
            raise SiftError(f"{path}: no column {name!r}; it has {there}")
    for (name, fault), numbers in wrong.items():
        shown = ", ".join(map(str, numbers[:TOLD]))
        raise SiftError(
            f"{path}: {fault.format(repr(name))}: {len(numbers):,} rows, such as row {shown}, "
            "counted from 0"
        )
    if len(kinds) > 1:
        raise SiftError(f"{path}: {texts[0]!r} holds texts and lists of words; keep to one")
    return count, tuple(columns), texts, True in kinds


def tell_cut(cut: int, count: int, longest: int, console: Console) -> None:
    """Says of how many rows, if any, the model saw a part alone."""
    if cut:
        told = f"{cut:,} of {count:,} rows were cut to {longest:,} tokens"
        console.print(told, highlight=False)


@contextmanager
def _bar(
    console: Console, output: str, begun: int, count: int
) -> Iterator[Callable[[float], object]]:
    """A bar of rows on a terminal, and the function that moves it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    shown = console.is_terminal and not (output == STANDARD and sys.stdout.isatty())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,  # answers may go there
        disable=not shown,
    )
    with bar:
        task = bar.add_task("rows", total=count, completed=begun)
        yield lambda rows: bar.advance(task, rows)
