"""Rows as token ids, with the tokens that are learnt from; nothing is cut here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.conversations import SYSTEM, Completion, Conversation, Message, Row, Text
from sift_cli.tasks.templates import (
    OWN,
    UNRENDERABLE,
    Template,
    choose_template,
    opening,
    require_template,
    stop_tokens,
    vocabulary_size,
)
from sift_cli.tasks.tokens import UNSEEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL_ANSWERS, LAST_ANSWER, ALL_TOKENS = TRAIN_ON = ("all-answers", "last-answer", "all-tokens")
QUIET: dict[str, Any] = {"return_attention_mask": False, "verbose": False}  # lengths are ours
PROBE = Conversation(
    (
        Message("user", "What is one and one?"),
        Message("assistant", "It is two."),
        Message("user", "And two and two?"),
        Message("assistant", "That is four."),
    )
)

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
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


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


def code(coder: Coder, rows: Sequence[Row]) -> list[Coded | Refused]:
    """Tokens and spans of each row, in order, or why there are none.

    Raises SiftError where there are conversations and no template.
    """
    chats = {at: row for at, row in enumerate(rows) if isinstance(row, Conversation)}
    plain = {at: row for at, row in enumerate(rows) if not isinstance(row, Conversation)}
    out: dict[int, Coded | Refused] = {}
    out.update(zip(chats, _code_chats(coder, list(chats.values())), strict=True))
    out.update(zip(plain, _code_plain(coder, list(plain.values())), strict=True))
    return [_sound(coder, out[at]) for at in range(len(rows))]


def prompt_ids(coder: Coder, row: Row) -> list[int]:
    """What a model reads before the answer that ends a row, or that is to end it.

    Raises SiftError where the template refuses the row, and where there is none.
    """
    if not isinstance(row, Conversation):
        asked = row.prompt if isinstance(row, Completion) else row.text
        return opening(coder.tokenizer) + _pieces(coder, [asked])[0]
    ends = row.messages[-1].role == "assistant"
    chat = replace(_with_system(coder, row), messages=row.messages[:-1] if ends else row.messages)
    (found,) = _render(coder, [_with_system(coder, chat)], True)
    if isinstance(found, Refused):
        raise SiftError(found.why)
    return found.ids


def probe(coder: Coder) -> None:
    """Raises SiftError where the template supervises nothing, or ends answers with no stop token.

    Asked once of a template, by a made-up conversation of two questions and answers. One that takes
    no such conversation is judged by the rows alone.
    """
    template = require_template(coder.template)
    for train_on in (ALL_ANSWERS, LAST_ANSWER):
        (found,) = code(replace(coder, train_on=train_on), [PROBE])
        if isinstance(found, Refused) and found.unended:
            raise SiftError(f"data.template: {template.name}: {found.why}")
        if isinstance(found, Coded):
            if not found.spans:
                raise SiftError(
                    f"data.template: {template.name} supervises nothing: it shows no answer, or "
                    "marks none as generated"
                )
            return


# Conversations


def _code_chats(coder: Coder, given: Sequence[Conversation]) -> list[Coded | Refused]:
    if not given:
        return []
    template = require_template(coder.template)
    rows = [_with_system(coder, row) for row in given]
    every = coder.train_on == ALL_TOKENS
    learnt = [row.answers[-1:] if coder.train_on == LAST_ANSWER else row.answers for row in rows]
    # What comes after the last message to learn from changes nothing, and may change its form.
    ends = [None if every or not answers else answers[-1] + 1 for answers in learnt]
    chats = [replace(row, messages=row.messages[:end]) for row, end in zip(rows, ends, strict=True)]
    marked = template.marks_answers and coder.tokenizer.is_fast and not every
    rendered = _render(coder, chats, False, marked)
    if every:
        return [_all(row, one) for row, one in zip(rows, rendered, strict=True)]
    if marked:
        return [_by_marks(coder, *one) for one in zip(chats, rendered, learnt, strict=True)]
    return _by_prefixes(coder, chats, rendered, learnt)


def _with_system(coder: Coder, row: Conversation) -> Conversation:
    """The row, begun with the recipe's system turn where it has none."""
    if coder.system is None or any(one.role in SYSTEM for one in row.messages):
        return row
    messages = (Message("system", coder.system), *row.messages)
    return Conversation(messages, row.tools, row.given + 1 if row.given else 0)


def _all(row: Conversation, one: Coded | Refused) -> Coded | Refused:
    if isinstance(one, Refused):
        return one
    if any(message.train is False for message in row.messages):
        return Refused("a message has train: false, and data.train_on: all-tokens leaves none out")
    return Coded(one.ids, [(0, len(one.ids))])


def _by_marks(
    coder: Coder, chat: Conversation, one: Coded | Refused, learnt: Sequence[int]
) -> Coded | Refused:
    """The spans that the template marks, without those of answers that are not learnt from."""
    if isinstance(one, Refused) or not one.spans:
        return one
    answers = [at for at, message in enumerate(chat.messages) if message.role == "assistant"]
    counts = list(range(1, len(answers) + 1))  # spans up to each answer
    if len(one.spans) > len(answers):
        shorter = [replace(chat, messages=chat.messages[: at + 1]) for at in answers]
        found = _render(coder, shorter, False, True)
        counts = [len(part.spans) if isinstance(part, Coded) else 0 for part in found]
    starts = [0, *counts[:-1]]
    if counts[-1] != len(one.spans) or any(a >= b for a, b in zip(starts, counts, strict=True)):
        return Refused(
            f"the template marks {len(one.spans)} parts as generated, which are not its "
            f"{len(answers)} answers"
        )
    spans: list[Span] = []
    for at, start, end in zip(answers, starts, counts, strict=True):
        if at in learnt:
            last = _ended(coder, one.ids, one.spans[end - 1])
            if isinstance(last, Refused):
                return last
            spans += [*one.spans[start : end - 1], last]
    return Coded(one.ids, spans)


def _by_prefixes(
    coder: Coder,
    chats: Sequence[Conversation],
    rendered: Sequence[Coded | Refused],
    learnt: Sequence[Sequence[int]],
) -> list[Coded | Refused]:
    """Spans from the ids before each answer to those with it, which must both begin the row's."""
    wanted = [(at, answer) for at, answers in enumerate(learnt) for answer in answers]
    before = [replace(chats[at], messages=chats[at].messages[:answer]) for at, answer in wanted]
    inner = [(at, answer) for at, answer in wanted if answer + 1 < len(chats[at].messages)]
    upto = [replace(chats[at], messages=chats[at].messages[: answer + 1]) for at, answer in inner]
    asked = dict(zip(wanted, _render(coder, before, True), strict=True))
    answered = dict(zip(inner, _render(coder, upto, False), strict=True))
    out: list[Coded | Refused] = list(rendered)
    for at, answer in wanted:
        whole, prompt = out[at], asked[at, answer]
        if isinstance(whole, Coded):
            span = _between(coder, whole, prompt, answered.get((at, answer), whole))
            out[at] = span if isinstance(span, Refused) else _and(whole, span)
    return out


def _and(one: Coded, span: Span) -> Coded:
    return Coded(one.ids, [*one.spans, span] if span[0] < span[1] else one.spans)


def _between(
    coder: Coder, whole: Coded, prompt: Coded | Refused, answered: Coded | Refused
) -> Span | Refused:
    """The span of one answer in a row: after its prompt, with the token that ends its turn.

    A token that holds the end of the prompt and the beginning of the answer is left out.
    """
    if isinstance(prompt, Refused):
        return prompt
    if isinstance(answered, Refused):
        return answered
    start, ids = len(prompt.ids), answered.ids
    if ids == prompt.ids[: len(ids)]:  # the answer is not shown
        return len(ids), len(ids)
    shared = start > 0 and len(ids) >= start and ids[: start - 1] == prompt.ids[:-1]
    if shared and ids[start - 1] != prompt.ids[-1]:
        held, last = (coder.word(one[start - 1 : start]) for one in (ids, prompt.ids))
        shared = held != last and held.startswith(last)
    span = _ended(coder, ids, (start, len(ids))) if shared else None
    if isinstance(span, Refused):
        return span
    if span is None or whole.ids[: span[1]] != ids[: span[1]]:
        return Refused(
            "the template rewrites what came before an answer once the conversation goes on, so "
            "that answers cannot be told apart in the whole row; set data.train_on: last-answer, "
            "or make a row of each answer"
        )
    return span


def _ended(coder: Coder, ids: Sequence[int], span: Span) -> Span | Refused:
    """The span up to the token that ends the turn; templates put line ends after that one."""
    start, end = span
    if start >= end:
        return start, start
    last = next((at for at in range(end - 1, start - 1, -1) if ids[at] in coder.stops), start - 1)
    if coder.word(ids[last + 1 : end]).strip() or last < start:
        tokens = [coder.word([one]) for one in ids[start:end]]
        ending = next((one for one in reversed(tokens) if one.strip()), tokens[-1])
        stops = ", ".join(repr(coder.word([one])) for one in coder.stops)
        return Refused(
            f"answers end with {ending!r}, and generation stops at {stops}: a tuned model would "
            "not stop. Choose a template that ends them so, or name the token in eos_token_id of "
            "the model's generation_config.json",
            unended=True,
        )
    return start, last + 1


def _render(
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
    )
    ids: list[list[int]] = encoded["input_ids"]  # type: ignore[index,call-overload,assignment]
    masks = encoded["assistant_masks"] if marked else [[] for _ in ids]  # type: ignore[index,call-overload]
    return [Coded(list(one), _runs(mask)) for one, mask in zip(ids, masks, strict=True)]


def _runs(mask: Sequence[int]) -> list[Span]:
    """The spans of ones."""
    edges = [at for at, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


# Rows without a template


def _code_plain(coder: Coder, rows: Sequence[Completion | Text]) -> list[Coded | Refused]:
    """Each row between the tokenizer's opening and the token that ends a text."""
    if not rows:
        return []
    texts = [one.text if isinstance(one, Text) else one.prompt + one.completion for one in rows]
    prompts = ["" if isinstance(one, Text) else one.prompt for one in rows]
    first, joint, asked = opening(coder.tokenizer), _pieces(coder, texts), _pieces(coder, prompts)
    out: list[Coded | Refused] = []
    for row, ids, before in zip(rows, joint, asked, strict=True):
        if isinstance(row, Completion) and ids[: len(before)] != before:
            ids = before + _continued(coder, row.completion)  # a token lay across the boundary
        ended = ids if ids[-1:] == [coder.end] else [*ids, coder.end]
        every = isinstance(row, Text) or coder.train_on == ALL_TOKENS
        start = 0 if every else len(first) + len(before)
        out.append(Coded(first + ended, [(start, len(first) + len(ended))]))
    return out


def _pieces(coder: Coder, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, without anything around them."""
    found: list[list[int]] = coder.tokenizer(list(texts), add_special_tokens=False, **QUIET)[
        "input_ids"
    ]
    return [list(one) for one in found]


def _continued(coder: Coder, text: str) -> list[int]:
    """The ids of a text that follows another: after a line end no tokenizer puts a space first."""
    line, both, alone = _pieces(coder, ["\n", f"\n{text}", text])
    return both[len(line) :] if line and both[: len(line)] == line else alone


def _sound(coder: Coder, one: Coded | Refused) -> Coded | Refused:
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
