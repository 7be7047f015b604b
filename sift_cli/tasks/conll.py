"""CoNLL files: a word and its tag to a line, a blank line between sentences.

Importing this module loads no dataset library; functions do when they need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sift_cli.errors import SiftError
from sift_cli.tasks.table import TAGS, WORDS

if TYPE_CHECKING:
    from datasets import Dataset

BREAK = "-DOCSTART-"  # the word that begins a document, in place of a sentence


def read_conll(files: Sequence[Path]) -> Dataset:
    """A row for each sentence of the files, with its WORDS and its TAGS.

    The word is the first column of a line and the tag the last; columns are apart by blanks. Raises
    SiftError for a line that has one alone, and for what is not UTF-8.
    """
    from datasets import Dataset

    rows: dict[str, list[list[str]]] = {WORDS: [], TAGS: []}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise SiftError(f"data.path: {file}: not UTF-8: {error}") from None
        new = True
        for number, line in enumerate(text.split("\n"), start=1):
            columns = line.split()
            if not columns or columns[0] == BREAK:
                new = True
                continue
            if len(columns) == 1:
                raise SiftError(f"data.path: {file}:{number}: a line has a word and its tag")
            if new:
                rows[WORDS].append([])
                rows[TAGS].append([])
                new = False
            rows[WORDS][-1].append(columns[0])
            rows[TAGS][-1].append(columns[-1])
    return Dataset.from_dict(rows)
