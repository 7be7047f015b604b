"""Which tokens of a row are learnt from: by the template's marks, or by prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sift_cli.errors import SiftError
from sift_cli.tasks.coder import (
    ALL_ANSWERS,
    ALL_TOKENS,
    LAST_ANSWER,
    Coded,
    Coder,
    Refused,
    Span,
    pieces,
    render,
    sound,
)
from sift_cli.tasks.conversations import SYSTEM, Completion, Conversation, Message, Row, Text
from sift_cli.tasks.templates import opening, require_template

PROBE = Conversation(
    (
        Message("user", "What is one and one?"),
        Message("assistant", "It is two."),
        Message("user", "And two and two?"),
        Message("assistant", "That is four."),
    )
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
    return [sound(coder, out[at]) for at in range(len(rows))]


def prompt_ids(coder: Coder, row: Row) -> list[int]:
    """What a model reads before the answer that ends a row, or that is to end it.

    Raises SiftError where the template refuses the row, and where there is none.
    """
    if not isinstance(row, Conversation):
        asked = row.prompt if isinstance(row, Completion) else row.text
        ids = opening(coder.tokenizer) + pieces(coder, [asked])[0]
        return _taken(sound(coder, Coded(ids, [])))
    ends = row.messages[-1].role == "assistant"
    chat = replace(row, messages=row.messages[:-1]) if ends else row
    (found,) = render(coder, [_with_system(coder, chat)], True)
    return _taken(sound(coder, found))


def _taken(found: Coded | Refused) -> list[int]:
    if isinstance(found, Refused):
        raise SiftError(f"the prompt: {found.why}")
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
    rendered = render(coder, chats, False, marked)
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
    if row.given == len(row.messages):
        return Coded(one.ids, [])
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
        found = render(coder, shorter, False, True)
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
    asked = dict(zip(wanted, render(coder, before, True), strict=True))
    answered = dict(zip(inner, render(coder, upto, False), strict=True))
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


# Rows without a template


def _code_plain(coder: Coder, rows: Sequence[Completion | Text]) -> list[Coded | Refused]:
    """Each row between the tokenizer's opening and the token that ends a text."""
    if not rows:
        return []
    texts = [one.text if isinstance(one, Text) else one.prompt + one.completion for one in rows]
    prompts = ["" if isinstance(one, Text) else one.prompt for one in rows]
    first, joint, asked = opening(coder.tokenizer), pieces(coder, texts), pieces(coder, prompts)
    out: list[Coded | Refused] = []
    for row, ids, before in zip(rows, joint, asked, strict=True):
        if isinstance(row, Completion) and ids[: len(before)] != before:
            ids = before + _continued(coder, row.completion)  # a token lay across the boundary
        ended = ids if ids[-1:] == [coder.end] else [*ids, coder.end]
        every = isinstance(row, Text) or coder.train_on == ALL_TOKENS
        start = 0 if every else len(first) + len(before)
        silent = isinstance(row, Completion) and not row.completion.strip()
        out.append(Coded(first + ended, [] if silent else [(start, len(first) + len(ended))]))
    return out


def _continued(coder: Coder, text: str) -> list[int]:
    """The ids of a text that follows another: after a line end no tokenizer puts a space first."""
    line, both, alone = pieces(coder, ["\n", f"\n{text}", text])
    return both[len(line) :] if line and both[: len(line)] == line else alone
