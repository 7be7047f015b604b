"""What makes token ids of rows: a tokenizer, a chat template, and the choices of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.tasks.conversations import Conversation
from sift_cli.tasks.templates import (
    OWN,
    UNRENDERABLE,
    Template,
    choose_template,
    require_template,
    stop_tokens,
    vocabulary_size,
)
from sift_cli.tasks.tokens import UNSEEN, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL_ANSWERS, LAST_ANSWER, ALL_TOKENS = TRAIN_ON = ("all-answers", "last-answer", "all-tokens")
QUIET: dict[str, Any] = {"return_attention_mask": False, "verbose": False}  # lengths are ours

# The day that templates are told, always: tokens of a row must not change while a run goes on, nor
# until it is scored again. It is the one that Llama 3.x templates name where nobody tells them.
DAY = date(2024, 7, 26)

Span = tuple[int, int]  # of tokens: the first, and the one after the last


@dataclass(frozen=True)
class Coded:
    """A row as tokens; those in `spans`, which are in order and apart, are learnt from."""

    ids: list[int]
    spans: list[Span]

    @property
    def labels(self) -> list[int]:
        """The token itself where it is learnt from, else UNSEEN, whatever token pads."""
        labels = [UNSEEN] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass(frozen=True)
class Refused:
    """Why a row has no tokens, in words; `unended` where no token ends one of its answers."""

    why: str
    unended: bool = False


@dataclass(frozen=True)
class Coder:
    """What makes tokens of rows: tokenizer, template, and the choices of a recipe.

    Generation stops at `stops`; the model has embeddings for `vocabulary` tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    stops: tuple[int, ...]
    vocabulary: int | None = None
    system: str | None = None
    train_on: str = ALL_ANSWERS

    @property
    def end(self) -> int:
        """The token that ends a row without a template."""
        own = self.tokenizer.eos_token_id
        return own if own in self.stops else self.stops[0]

    def word(self, ids: Sequence[int]) -> str:
        """What tokens stand for, the special ones among them."""
        return decoded(self.tokenizer, ids)


def open_coder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = OWN,
    system: str | None = None,
    train_on: str = ALL_ANSWERS,
) -> Coder:
    """The coder for the model in `folder`, of which no weight is read.

    Raises what `choose_template` and `stop_tokens` raise.
    """
    return Coder(
        tokenizer,
        choose_template(template, tokenizer),
        stop_tokens(folder, tokenizer),
        vocabulary_size(folder),
        system,
        train_on,
    )


def render(
    coder: Coder, chats: Sequence[Conversation], asking: bool, marked: bool = False
) -> list[Coded | Refused]:
    """The ids of conversations, begun answers to them where `asking`, and the spans that it marks.

    Each comes from one call of `apply_chat_template`, never from text that was rendered before.
    """
    template = require_template(coder.template)
    if (
        chats
        and all(one.messages and not one.tools for one in chats)
        and not any(_not_shown(template, one) for one in chats)
    ):
        try:
            return _applied(coder, template, chats, None, asking, marked)
        except UNRENDERABLE:  # one by one, to tell which
            pass
    out: list[Coded | Refused] = []
    for chat in chats:
        if not chat.messages:
            out.append(Refused("it begins with an answer; give that message train: false"))
            continue
        if lost := _not_shown(template, chat):
            out.append(Refused(f"it has {lost}, which the template does not show"))
            continue
        try:
            tools = [dict(one) for one in chat.tools] or None
            out += _applied(coder, template, [chat], tools, asking, marked)
        except UNRENDERABLE as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            out.append(Refused(f"the template refuses it: {said}"))
    return out


def _not_shown(template: Template, chat: Conversation) -> str | None:
    """What of a conversation would be lost without a word."""
    called = any(one.more.get("tool_calls") for one in chat.messages)
    held = {"tools": bool(chat.tools), "tool_calls": called}
    return next((name for name, one in held.items() if one and not template.mentions(name)), None)


def _applied(
    coder: Coder,
    template: Template,
    chats: Sequence[Conversation],
    tools: list[dict[str, Any]] | None,
    asking: bool,
    marked: bool,
) -> list[Coded | Refused]:
    encoded = coder.tokenizer.apply_chat_template(
        [[message.shown() for message in chat.messages] for chat in chats],
        tools=tools,  # type: ignore[arg-type]
        chat_template=template.text,
        add_generation_prompt=asking,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=marked,
        tokenizer_kwargs=QUIET,
        strftime_now=DAY.strftime,
    )
    ids: list[list[int]] = encoded["input_ids"]  # type: ignore[index,call-overload,assignment]
    masks = encoded["assistant_masks"] if marked else [[] for _ in ids]  # type: ignore[index,call-overload]
    return [Coded(list(one), _runs(mask)) for one, mask in zip(ids, masks, strict=True)]


def _runs(mask: Sequence[int]) -> list[Span]:
    """The spans of ones."""
    edges = [at for at, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def pieces(coder: Coder, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, without anything around them."""
    found: list[list[int]] = coder.tokenizer(list(texts), add_special_tokens=False, **QUIET)[
        "input_ids"
    ]
    return [list(one) for one in found]


def sound(coder: Coder, one: Coded | Refused) -> Coded | Refused:
    """Refuses what begins twice, and tokens that the model has no embedding for."""
    if isinstance(one, Refused):
        return one
    bos = coder.tokenizer.bos_token_id
    if bos is not None and one.ids[:2] == [bos, bos]:
        return Refused(f"it begins with two {coder.tokenizer.bos_token!r}; one is put there anyway")
    largest = max(one.ids, default=0)
    if coder.vocabulary is not None and largest >= coder.vocabulary:
        token = coder.word([largest])
        return Refused(f"it holds {token!r}, a token that the model has no embedding for")
    return one
