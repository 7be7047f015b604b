"""samples.jsonl: the same held-out prompts, answered again at every evaluation of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sift_cli.errors import SiftError
from sift_cli.models.devices import autocast
from sift_cli.runs.folder import SAMPLES_FILE
from sift_cli.runs.session import Session
from sift_cli.runs.sinks import lines_until
from sift_cli.system.files import write_text
from sift_cli.tasks.coder import Coder, pieces
from sift_cli.tasks.conversations import (
    Conversation,
    Row,
    Text,
    asked_and_expected,
    row_of,
    until_answer,
)
from sift_cli.tasks.generation import answer
from sift_cli.tasks.language import Language
from sift_cli.tasks.supervision import prompt_ids
from sift_cli.tasks.tokens import decoded

OPENING = 32  # tokens of a text that a model goes on from; half of a shorter one


@dataclass(frozen=True)
class Sample:
    """A held-out row by its number, up to the answer; what it asks and the answer expected."""

    number: int
    row: Row
    asked: str
    expected: str


def draw_samples(session: Session, count: int) -> list[Sample]:
    """So many rows of the split to evaluate on, drawn alike for every run; fewer where it has less.

    Rows whose prompt fills what a row may have, or that begin with the answer, are passed over.
    """
    if not count:
        return []
    coder = _coder(session)
    data = session.evaluation[""]
    kept, most = set(data.rows["row"]), max(data.lengths)
    rows = session.task.evaluation[""]
    found: list[Sample] = []
    for at in Random(0).sample(range(len(rows)), len(rows)):
        if len(found) == count:
            break
        line = rows[at]
        if line["row"] in kept and (
            sample := _sample(coder, line["row"], row_of(line["value"]), most)
        ):
            found.append(sample)
    return sorted(found, key=lambda one: one.number)


def _sample(coder: Coder, number: int, whole: Row, most: int) -> Sample | None:
    """The row with a prompt of fewer than `most` tokens; None where it is none."""
    if isinstance(whole, Text):
        ids = pieces(coder, [whole.text])[0]
        first = max(1, min(OPENING, len(ids) // 2))
        asked, expected = (decoded(coder.tokenizer, some) for some in (ids[:first], ids[first:]))
        return Sample(number, Text(asked), asked, expected)
    row = until_answer(whole) if isinstance(whole, Conversation) else whole
    try:
        fits = len(prompt_ids(coder, row)) < most
    except SiftError:
        return None
    return Sample(number, row, *asked_and_expected(row)) if fits else None


def answered(session: Session, samples: Sequence[Sample], longest: int) -> list[dict[str, Any]]:
    """What the model as it is now answers to each: the lines of samples.jsonl, without a step."""
    if not samples:
        return []
    coder, lines = _coder(session), []
    for one in samples:
        with autocast(session.device, session.bf16):
            found = answer(session.model, coder, one.row, longest=longest)
        said = {"prompt": one.asked, "expected": one.expected, "answer": found.text}
        lines.append({"row": one.number, **said, "ended": found.ended})
    return lines


def write_samples(out: Path, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds the lines of a step to samples.jsonl, in place of those of this step and later ones.

    So a run that goes on from before them has each step once.
    """
    path = out / SAMPLES_FILE
    new = (json.dumps({"step": step, **line}) + "\n" for line in lines)
    write_text(path, "".join([*lines_until(path, step - 1), *new]))


def _coder(session: Session) -> Coder:
    assert isinstance(session.task, Language)  # a recipe of another task asks for no samples
    return session.task.coder(session.tokenizer)
