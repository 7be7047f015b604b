"""What a model is asked: texts, and files of rows whose last answer is left for it to give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sift_cli.errors import SiftError
from sift_cli.tasks.columns import NUMBER_COLUMN
from sift_cli.tasks.conversations import (
    FORMATS,
    Completion,
    Conversation,
    Message,
    Row,
    Text,
    UnusableRow,
)
from sift_cli.tasks.instructions import AUTO, Layout, columns_of, recognise
from sift_cli.tasks.sources import BUILDERS, load_splits

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
ANSWERS = {"alpaca": "output", "prompt": "completion"}  # the columns that hold them
PLAIN = ("prompt", "text")  # columns of texts to ask with, where nothing else is there
ASKING = ("user", "human", "tool")  # who is answered
UNTOLD = "?"  # stands in for an answer that a row lacks, so that its format can read it


@dataclass(frozen=True)
class Prompt:
    """A row without its last answer; `expected` is that answer, where the row had one.

    `number` is the row's in its file (of a text file the line's) or among texts, from 0; `place`
    says in errors where it comes from.
    """

    row: Row
    number: int
    place: str
    expected: str | None = None

    def shown(self) -> str | list[dict[str, Any]]:
        """The prompt as results say it: a text, or messages where there are several."""
        if isinstance(self.row, Conversation):
            messages = self.row.messages
            alone = len(messages) == 1 and messages[0].role == "user"
            return messages[0].content if alone else [one.shown() for one in messages]
        return self.row.prompt if isinstance(self.row, Completion) else self.row.text


def prompts_of(texts: Sequence[str], plain: bool) -> list[Prompt]:
    """Texts to go on from where `plain`, else a user's questions."""
    return [Prompt(_ask(text, plain), at, f"text {at}") for at, text in enumerate(texts)]


def _ask(text: str, plain: bool) -> Row:
    return Text(text) if plain else Conversation((Message("user", text),))


def read_prompts(
    path: Path,
    task: str,
    *,
    plain: bool = False,
    format: str = AUTO,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """The prompts of a file, in order: rows of a format that the task learns from, or texts.

    Texts are the lines of a .txt file and the values of a column `prompt` or `text` that stands
    alone; `plain` is as for `prompts_of`. Raises SiftError for a file that is not there, cannot be
    read, holds nothing, has columns that fit no format, or rows that cannot be used.
    """
    if path.suffix not in ENDINGS:
        raise SiftError(f"--input {path}: use one of {', '.join(ENDINGS)}")
    if not path.is_file():
        raise SiftError(f"--input {path}: no such file")
    if path.suffix not in BUILDERS:
        found = [
            Prompt(_ask(text, plain), number, _place(path, number)) for number, text in _lines(path)
        ]
    else:
        try:
            found = list(_rows(path, task, plain, format, columns or {}))
        except SiftError as error:
            said = str(error).removeprefix("data.path: ").removeprefix("data: ")
            placed = said if said.startswith(f"{path}:") else f"{path}: {said}"
            raise SiftError(f"--input {placed}", error.code) from None
    if not found:
        raise SiftError(f"--input {path}: it holds no prompt")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SiftError(f"--input {path}: not UTF-8") from None
    return ((at, line) for at, line in enumerate(text.split("\n")) if line.strip())


def _rows(
    path: Path, task: str, plain: bool, format: str, given: Mapping[str, str]
) -> Iterator[Prompt]:
    rows = load_splits(str(path), task, None)["train"]
    there = [one for one in rows.column_names if one != NUMBER_COLUMN]
    alone = _plain_column(there, given) if format in (AUTO, "text") else None
    layout = None if alone else recognise(_with_answers(there, given), task, format, given)
    for row in rows:
        number = row[NUMBER_COLUMN]
        try:
            if layout is not None:
                asked, expected = _prompt(row, layout, there, given)
            elif isinstance(row[alone], str) and row[alone].strip():
                asked, expected = _ask(row[alone], plain), None
            else:
                raise UnusableRow(f"{alone!r} holds no text")
        except UnusableRow as error:
            raise SiftError(f"row {number}: {error}; rows are counted from 0") from None
        yield Prompt(asked, number, _place(path, number), expected)


def _place(path: Path, number: int) -> str:
    return f"--input {path}: row {number}"


def _plain_column(there: Sequence[str], given: Mapping[str, str]) -> str | None:
    """The column of texts to ask with, where no other column that a format needs is there."""
    needed = {name for form in FORMATS.values() for name in form.needs} - set(PLAIN)
    if any(given.get(name, name) in there for name in needed):
        return None
    return next((given.get(one, one) for one in PLAIN if given.get(one, one) in there), None)


def _with_answers(there: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """The columns, with that of the answers where a format lacks nothing else."""
    added = []
    for name, answer in ANSWERS.items():
        needed = [given.get(one, one) for one in FORMATS[name].needs if one != answer]
        if all(one in there for one in needed):
            added.append(given.get(answer, answer))
    return [*there, *(one for one in added if one not in there)]


def _prompt(
    row: Mapping[str, Any], layout: Layout, there: Sequence[str], given: Mapping[str, str]
) -> tuple[Row, str | None]:
    """The row as its format reads it without its last answer, and that answer if it has one."""
    held = columns_of(layout, there, given)
    values = {name: row.get(column) for name, column in held.items()}
    answered = _answer_in(values, layout)
    read = layout.format.read(values, layout.names)
    if isinstance(read, Text):
        return read, None
    if isinstance(read, Completion):
        return replace(read, completion=""), read.completion if answered else None
    *before, last = read.messages
    if last.role != "assistant":
        raise UnusableRow(f"it ends with a message of {last.role!r}, after which nobody answers")
    return replace(read, messages=tuple(before)), last.content if answered else None


def _answer_in(values: dict[str, Any], layout: Layout) -> bool:
    """Whether the values hold a last answer; puts one in where they do not."""
    column = ANSWERS.get(layout.name)
    if column is not None:
        value = values[column]
        if value and str(value).strip():
            return True
        values[column] = [_turn(layout)] if isinstance(values.get("prompt"), list) else UNTOLD
        return False
    turns = values.get(layout.format.needs[0])
    if layout.name == "text" or not isinstance(turns, list) or not turns:
        return True
    own = _turn(layout)
    speaker = next(iter(own))
    if isinstance(turns[-1], Mapping) and turns[-1].get(speaker) in ASKING:
        turns.append(own)
        return False
    return True


def _turn(layout: Layout) -> dict[str, str]:
    """An answer that stands in, as messages of the format are written; the speaker comes first."""
    speaker, said = ("from", "value") if layout.name == "sharegpt" else ("role", "content")
    return {layout.names[speaker]: "assistant", layout.names[said]: UNTOLD}
