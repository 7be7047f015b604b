"""Rows as a model sees them: tokens, those that are learnt from, and what a split comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.models.loading import load_tokenizer, model_folder
from sift_cli.recipe import Recipe
from sift_cli.runs.language import language_of, language_rows
from sift_cli.runs.session import load_rows
from sift_cli.tasks.coder import Coded
from sift_cli.tasks.conversations import is_conversation, row_of
from sift_cli.tasks.kinds import expected_task
from sift_cli.tasks.label_kinds import held_by
from sift_cli.tasks.supervision import code
from sift_cli.tasks.table import LANGUAGE, TAGGING
from sift_cli.tasks.token_rows import SplitCounts, fit, require_enough, tokenise
from sift_cli.tasks.tokens import UNSEEN, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN = "train"
KEPT = "kept"


@dataclass(frozen=True)
class Token:
    """A token, its text, and whether it is learnt from."""

    id: int
    text: str
    learnt: bool


@dataclass(frozen=True)
class Part:
    """The text of consecutive tokens, all of which are learnt from, or none."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it; a dropped one as it would.

    `number` is that of the source split, `layout` says what it was read as, `length` counts its
    tokens before it was cut, `fate` what becomes of it. `label` is that of a row that has one.
    """

    split: str
    number: int
    layout: str
    length: int
    fate: str
    tokens: list[Token]
    parts: list[Part]
    counts: SplitCounts
    label: str | None = None

    @property
    def learnt(self) -> int:
        """How many tokens are learnt: the first is predicted from nothing."""
        return sum(token.learnt for token in self.tokens[1:])

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "learnt": self.learnt}


def show_row(recipe: Recipe, row: int | None = None, split: str = TRAIN) -> ShownRow:
    """The row of that number in its source split, or the first; no weights are read.

    Raises SiftError where the split has no such row, and for rows that cannot be used.
    """
    folder = model_folder(recipe.model.path, recipe.model.revision, weights=False)
    expected_task(*recipe.data.expected).configure(folder)  # or it raises
    tokenizer = load_tokenizer(folder)
    kind = _language if recipe.data.task in LANGUAGE else _labelled
    return kind(recipe, tokenizer, row, split)


def _language(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, row: int | None, split: str
) -> ShownRow:
    train, task = split == TRAIN, language_of(recipe)
    chosen = None if train else split
    found = language_rows(recipe, train=train, evaluate=not train, split=chosen)
    rows = found.train if train else found.evaluation
    assert rows is not None
    at = _place(rows["row"], row, split)
    coder, limit = task.coder(tokenizer), task.limit(recipe.data.max_length)
    data = tokenise(rows, coder, limit, split)
    line = rows["value"][at]
    (coded,) = code(coder, [row_of(line)])
    assert isinstance(coded, Coded)  # or tokenise would have refused it
    fitted = fit(coded.ids, coded.labels, limit)
    ids, labels, fate = coded.ids, coded.labels, KEPT
    if fitted.dropped:
        fate = f"dropped: {fitted.dropped}"
    elif len(fitted.parts) > 1:
        fate = f"split into {len(fitted.parts)} parts of {limit.length:,} tokens"
    elif fitted.cut:
        ((ids, labels),) = fitted.parts
        fate = f"cut to {limit.length:,} tokens"
    template = coder.template.name if coder.template and is_conversation(line) else None
    layout = found.layout.name + (f", template {template}" if template else "")
    learnt = [label != UNSEEN for label in labels]
    refused = None
    try:
        require_enough(data, limit, split)
    except SiftError as error:
        refused = str(error)
    counts = SplitCounts.of(data, refused)
    shown = _spelt(tokenizer, ids, learnt)
    return ShownRow(split, rows["row"][at], layout, len(coded.ids), fate, *shown, counts)


def _labelled(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, row: int | None, split: str
) -> ShownRow:
    train = split == TRAIN
    task = load_rows(recipe, train=train, split=None if train else split)
    rows = task.train if train else task.evaluation[""]
    assert rows is not None
    at = _place(rows["row"], row, split)
    limit = recipe.data.max_length
    data = task.encode(rows, tokenizer, limit)
    (whole,) = task.encode(rows.select([at]), tokenizer, 2**30).lengths
    ids = data.rows["input_ids"][at]
    fate = KEPT if whole <= len(ids) else f"cut to {len(ids):,} tokens"
    names, value = task.header()["labels"], rows["label"][at]
    shown = _spelt(tokenizer, ids, [False] * len(ids))
    if isinstance(value, list) and task.name == TAGGING:
        label = " ".join(names[code] for code in value)
    elif isinstance(value, list):
        label = ", ".join(held_by(names, value)) or "none"
    else:
        label = str(value) if names is None else names[value]
    return ShownRow(
        split, rows["row"][at], task.name, whole, fate, *shown, SplitCounts.of(data), label
    )


def _place(numbers: Sequence[int], row: int | None, split: str) -> int:
    """Where the row of that number stands; the first where none is asked for."""
    found = numbers[:]
    if row is None:
        return 0
    if row not in found:
        raise SiftError(
            f"--row {row}: none of the {len(found):,} rows of the {split} split, whose numbers go "
            f"from {min(found)} to {max(found)}; what is held out is in --split validation"
        )
    return found.index(row)


def _spelt(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], learnt: Sequence[bool]
) -> tuple[list[Token], list[Part]]:
    """Each token, and each run of tokens, with the text that it adds to one before it."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    before = decoded(tokenizer, [anchor])

    def added(some: Sequence[int]) -> str:
        both = decoded(tokenizer, [anchor, *some])
        return both[len(before) :] if both.startswith(before) else decoded(tokenizer, some)

    texts = {one: added([one]) for one in dict.fromkeys(ids)}
    tokens = [Token(one, texts[one], flag) for one, flag in zip(ids, learnt, strict=True)]
    runs = [
        (flag, [token.id for token in some])
        for flag, some in groupby(tokens, key=lambda token: token.learnt)
    ]
    parts = [Part(added(some), flag) for flag, some in runs]
    if runs:  # nothing stands before the first one
        parts[0] = Part(decoded(tokenizer, runs[0][1]), runs[0][0])
    return tokens, parts
