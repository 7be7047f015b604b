"""Rows for language models as plain values: conversations, prompts with completions, texts.

Importing this module loads no dataset library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn, TypeAlias

from sift_cli.errors import nearest

SHOWN = 40  # letters of a value in an error


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, what, and whether it is to be learnt (None: the recipe decides).

    `more` holds what templates may read beside it, such as `tool_calls`.
    """

    role: str
    content: str
    train: bool | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that are offered; the first `given` messages are never learnt.

    That is all of them where no answer says anything: such a row is dropped and counted.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    given: int = 0

    @property
    def answers(self) -> list[int]:
        """Where the messages stand that may be learnt."""
        return [
            at
            for at, message in enumerate(self.messages)
            if message.role == "assistant" and at >= self.given and message.train is not False
        ]


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it; their boundary is kept, no template is put around them."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text of which every token is learnt."""

    text: str


Row: TypeAlias = Conversation | Completion | Text


class UnusableRow(Exception):
    """Why a row of a source cannot be used, in words."""


def line_of(row: Row) -> str:
    """A row as one line of JSON."""
    return json.dumps(asdict(row), ensure_ascii=False)


def row_of(line: str) -> Row:
    """The row that `line_of` made the line of."""
    values = json.loads(line)
    if "messages" in values:
        messages = tuple(Message(**one) for one in values["messages"])
        return Conversation(messages, tuple(values["tools"]), values["given"])
    return Completion(**values) if "prompt" in values else Text(**values)


def is_conversation(line: str) -> bool:
    """Whether the line that `line_of` made is of messages."""
    return line.startswith('{"messages"')


def until_answer(row: Conversation) -> Conversation:
    """The conversation up to its last answer; every row that a format reads has one."""
    last = max(at for at, one in enumerate(row.messages) if one.role == "assistant")
    return replace(row, messages=row.messages[: last + 1])


def asked_and_expected(row: Row) -> tuple[str, str]:
    """What a row asks and the last answer to it, as a person reads them; a text asks all of it."""
    if isinstance(row, Text):
        return row.text, ""
    if isinstance(row, Completion):
        return row.prompt, row.completion
    *before, last = until_answer(row).messages
    if len(before) == 1:
        asked = before[0].content
    else:
        asked = "\n".join(f"{one.role}: {_spoken(one)}" for one in before)
    return asked, _spoken(last)


def _spoken(message: Message) -> str:
    """What a message says; the calls of tools of one that says nothing."""
    return message.content or str(message.more.get("tool_calls", ""))


# Formats


@dataclass(frozen=True)
class Format:
    """A way to lay rows out: the columns that it needs and those that it may have.

    `keys` are the names inside each message. `read` makes a row of the values of its columns, by
    the format's own names for them, and of what the source calls each name; it raises UnusableRow.
    """

    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, str]], Row]
    may: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs, and those that it may have."""
        return (*self.needs, *self.may)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that `data.columns` may change."""
        return (*self.columns, *self.keys)


ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
SPEAKERS = {**ROLES, "human": "user", "gpt": "assistant"}  # of ShareGPT
SYSTEM = ("system", "developer")


def _messages(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    turns = _turns(values["messages"], names["messages"], names)
    return _answered(Conversation(turns, _tools(values.get("tools"), names["tools"])))


def _sharegpt(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    inside = {"role": names["from"], "content": names["value"], "train": names["train"]}
    turns = _turns(values["conversations"], names["conversations"], inside, SPEAKERS)
    turns = tuple(Message(one.role, one.content, one.train) for one in turns)
    turns = (*_system(values, names, turns), *turns)
    return _answered(Conversation(turns, _tools(values.get("tools"), names["tools"])))


def _alpaca(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """One turn, those of `history` before it. `alpaca` templates tell instruction and input apart.

    Others read both as one text, a blank line between.
    """
    instruction = _filled(values["instruction"], names["instruction"])
    beside = values.get("input")
    more = "" if beside is None else _text(beside, names["input"])
    asked, parts = instruction, {}
    if more.strip():
        asked, parts = f"{instruction}\n\n{more}", {"instruction": instruction, "input": more}
    turns = [
        *_history(values.get("history"), names["history"]),
        Message("user", asked, more=parts),
        Message("assistant", _answer(values["output"], names["output"])),
    ]
    messages = (*_system(values, names, turns), *turns)
    return Conversation(messages, given=0 if turns[-1].content.strip() else len(messages))


def _prompt(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if not isinstance(prompt, list | tuple) and not isinstance(completion, list | tuple):
        asked = _text(prompt, names["prompt"])
        return Completion(asked, _answer(completion, names["completion"]))
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list | tuple):
            _refuse(
                f"{names[name]!r} is {_shown(value)} and the other is a list of messages; both are "
                "text, or both messages"
            )
    before = _turns(prompt, names["prompt"], names)
    after = _turns(completion, names["completion"], names)
    tools = _tools(values.get("tools"), names["tools"])
    return _answered(Conversation((*before, *after), tools, given=len(before)))


def _plain(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    return Text(_filled(values["text"], names["text"]))


_KEYS = ("role", "content", "train")
FORMATS = {
    "messages": Format(("messages",), _messages, ("tools",), _KEYS),
    "sharegpt": Format(
        ("conversations",), _sharegpt, ("system", "tools"), ("from", "value", "train")
    ),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "prompt": Format(("prompt", "completion"), _prompt, ("tools",), _KEYS),
    "text": Format(("text",), _plain),
}
NAMES = tuple(dict.fromkeys(name for one in FORMATS.values() for name in one.names))


# What rows are made of


def _turns(
    value: Any, column: str, names: Mapping[str, str], roles: Mapping[str, str] = ROLES
) -> tuple[Message, ...]:
    """The messages of a column."""
    if value is None:
        _refuse(f"{column!r} is missing")
    if not isinstance(value, list | tuple):
        _refuse(f"{column!r} is {_shown(value)}, not a list of messages")
    if not value:
        _refuse(f"an empty conversation in {column!r}")
    return tuple(_turn(one, at, names, roles) for at, one in enumerate(value, 1))


def _turn(value: Any, at: int, names: Mapping[str, str], roles: Mapping[str, str]) -> Message:
    """The message that is the `at`-th of its row."""
    where, speaker = f"message {at}", names["role"]
    if not isinstance(value, Mapping):
        _refuse(f"{where} is {_shown(value)}, not a mapping with {speaker!r}, {names['content']!r}")
    given = {str(key): one for key, one in value.items() if one is not None}
    role = given.pop(speaker, None)
    if role is None:
        _refuse(f"{where} has no {speaker!r}")
    if not isinstance(role, str) or role not in roles:
        _refuse(f"{where} has the unknown role {_shown(role)}{nearest(str(role), [*roles])}")
    who = roles[role]
    train = _flag(given, names["train"], who, where)
    if train and who != "assistant":
        _refuse(f"{where} asks to learn what {role!r} says; only answers can be learnt")
    content = given.pop(names["content"], None)
    more = {key: _without_none(one) for key, one in given.items()}
    if content is None and not (who == "assistant" and more.get("tool_calls")):
        _refuse(f"{where} has no {names['content']!r}")
    said = "" if content is None else _said(content, where)
    if who == "user" and not said.strip():
        _refuse(f"{where} is empty")
    return Message(who, said, train, more)


def _flag(given: dict[str, Any], name: str, who: str, where: str) -> bool | None:
    """Whether a message is to be learnt, by its own flag or OpenAI's; takes both out of it."""
    train = given.pop(name, None)
    weight = given.pop("weight", None) if who == "assistant" else None
    if train is None and weight is not None:
        train = bool(weight) if weight in (0, 1) else weight
    if train is not None and not isinstance(train, bool):
        _refuse(
            f"{where}: {name if weight is None else 'weight'!r} is {_shown(train)}, no yes or no"
        )
    return train


def _said(content: Any, where: str) -> str:
    """The text of a message; text that lies in parts, as multimodal data has it, in one."""
    if not isinstance(content, list | tuple):
        return _text(content, f"the content of {where}", quoted=False)
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            _refuse(f"{where} holds {_shown(part)}; sift reads text")
    return "".join(part["text"] for part in content)


def _answered(row: Conversation) -> Conversation:
    """The same conversation, where someone answers in it; with nothing to learn if all is empty."""
    answers = [one for one in row.messages[row.given :] if one.role == "assistant"]
    if not answers:
        _refuse("no answer: no message of the assistant")
    if not any(one.content.strip() or one.more.get("tool_calls") for one in answers):
        return replace(row, given=len(row.messages))
    return row


def _system(
    values: Mapping[str, Any], names: Mapping[str, str], turns: Sequence[Message]
) -> tuple[Message, ...]:
    """The turn of a column `system`, where it holds one and the messages have none."""
    value = values.get("system")
    text = "" if value is None else _text(value, names["system"])
    has = any(one.role in SYSTEM for one in turns)
    return () if has or not text.strip() else (Message("system", text),)


def _history(value: Any, column: str) -> list[Message]:
    """Earlier questions and answers, given as pairs."""
    turns: list[Message] = []
    if value is not None and not isinstance(value, list | tuple):
        _refuse(f"{column!r} is {_shown(value)}, not a list of pairs")
    for pair in value or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            _refuse(f"{column!r} holds {_shown(pair)}, not a question and its answer")
        asked, answered = (_text(one, column) for one in pair)
        turns += [Message("user", asked), Message("assistant", answered)]
    return turns


def _tools(value: Any, column: str) -> tuple[Mapping[str, Any], ...]:
    """The tools that are offered; often they lie in their column as JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            _refuse(f"{column!r} is {_shown(value)}, which is no JSON")
    if not value:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        _refuse(f"{column!r} is {_shown(value)}, not a list of tools")
    return tuple(_without_none(one) for one in value)


def _answer(value: Any, column: str) -> str:
    if value is None:
        _refuse(f"no answer: {column!r} is missing")
    return _text(value, column)


def _filled(value: Any, column: str) -> str:
    text = _text(value, column)
    if not text.strip():
        _refuse(f"{column!r} is empty")
    return text


def _text(value: Any, where: str, quoted: bool = True) -> str:
    """A text, or a whole number that a reader of CSV took one for."""
    name = repr(where) if quoted else where
    if value is None:
        _refuse(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        _refuse(f"{name} is {_shown(value)}, not text")
    return str(value)


def _without_none(value: Any) -> Any:
    """The value without keys that hold nothing: tables fill in what only other rows have."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_without_none(one) for one in value]
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refuse(why: str) -> NoReturn:
    raise UnusableRow(why)
