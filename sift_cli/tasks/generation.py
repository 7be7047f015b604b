"""Answers of a language model: greedy, one row at a time, in one place for all who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sift_cli.errors import SiftError
from sift_cli.models.devices import evaluating
from sift_cli.models.loading import positions_of
from sift_cli.tasks.coder import Coder
from sift_cli.tasks.conversations import Row
from sift_cli.tasks.supervision import prompt_ids
from sift_cli.tasks.table import LONGEST_ANSWER

BROKEN = "\ufffd"  # what stands for a letter of which some bytes are still to come

Said = Callable[[str], object]  # takes the next piece of a text


@dataclass(frozen=True)
class Answer:
    """What a model says, how many tokens it made, and whether the last of them ended it.

    `text` is without the special tokens; one that is not `ended` ran out of room.
    """

    text: str
    tokens: int
    ended: bool

    def to_json(self) -> dict[str, Any]:
        """As commands tell it."""
        return {"answer": self.text, "tokens": self.tokens, "ended": self.ended}


def answer(
    model: PreTrainedModel,
    coder: Coder,
    row: Row,
    *,
    longest: int = LONGEST_ANSWER,
    said: Said | None = None,
) -> Answer:
    """What the model says after a row, whose last answer is left away: the likeliest token always.

    It stops at the coder's stop tokens, after `longest` tokens, or where the model's positions end.
    `said` gets the text piece by piece as it comes. Nothing is drawn at random, and the model is
    left as it was. Raises what `asked_ids` raises.
    """
    return answer_to(model, coder, asked_ids(model, coder, row), longest=longest, said=said)


def answer_to(
    model: PreTrainedModel,
    coder: Coder,
    asked: list[int],
    *,
    longest: int = LONGEST_ANSWER,
    said: Said | None = None,
) -> Answer:
    """As `answer`, to the tokens that `asked_ids` gave."""
    most = _most(model, asked, longest)
    stream = None if said is None else _Stream(coder, said)
    ids = torch.tensor([asked], device=model.device)
    with evaluating(model), _greedy(model, coder, most) as settings:
        found = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=stream,
        )
    made = found[0, len(asked) :].tolist()
    return Answer(_text(coder, made), len(made), made[-1] in coder.stops)


def asked_ids(model: PreTrainedModel, coder: Coder, row: Row) -> list[int]:
    """The tokens of a prompt that the model has room to answer.

    Raises SiftError where there is none, and what `prompt_ids` raises.
    """
    asked = prompt_ids(coder, row)
    if not asked:
        raise SiftError("an empty prompt; a model needs a token to go on from")
    positions = positions_of(model)
    if positions is not None and len(asked) >= positions:
        raise SiftError(
            f"the prompt has {len(asked):,} tokens and the model takes {positions:,}, which leaves "
            "no room for an answer; ask with a shorter one"
        )
    return asked


def _most(model: PreTrainedModel, asked: list[int], longest: int) -> int:
    """The most tokens that an answer may have."""
    positions = positions_of(model)
    return longest if positions is None else min(longest, positions - len(asked))


@contextmanager
def _greedy(model: PreTrainedModel, coder: Coder, most: int) -> Iterator[GenerationConfig]:
    """Settings of a greedy answer; those that the model ships are out of the way within.

    transformers fills up from them: temperatures, penalties, banned tokens.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=list(coder.stops),
        pad_token_id=coder.tokenizer.pad_token_id,
        use_cache=True,
    )
    own, cached = model.generation_config, getattr(model.config, "use_cache", True)
    model.generation_config = settings
    model.config.use_cache = True
    try:
        yield settings
    finally:
        model.generation_config = own
        model.config.use_cache = cached


def _text(coder: Coder, made: list[int]) -> str:
    """The text of tokens, without one that stops."""
    kept = made[:-1] if made[-1:] and made[-1] in coder.stops else made
    text = coder.tokenizer.decode(
        kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


@dataclass
class _Stream:
    """What transformers gives its tokens to; the pieces put together are the answer's text."""

    coder: Coder
    said: Said
    made: list[int] | None = None  # None until the prompt has come
    shown: str = field(default="", init=False)

    def put(self, ids: Tensor) -> None:
        """The prompt first, then each token."""
        if self.made is None:
            self.made = []
            return
        self.made += ids.flatten().tolist()
        text = _text(self.coder, self.made)
        if not text.endswith(BROKEN):
            self._show(text)

    def end(self) -> None:
        """Shows what was held back."""
        self._show(_text(self.coder, self.made or []))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.said(text[len(self.shown) :])
            self.shown = text
