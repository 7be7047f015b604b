"""Rows for language models: formats, names, and everything that can be wrong with a row."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pytest
from hypothesis import given

from sift_cli.errors import ExitCode, SiftError
from sift_cli.tasks.conversations import (
    FORMATS,
    Completion,
    Conversation,
    Message,
    Row,
    Text,
    line_of,
    row_of,
)
from sift_cli.tasks.instructions import load_language_rows, recognise
from sift_cli.tasks.sources import Source
from tests.tasks.test_data import FORMATS as ENDINGS
from tests.tasks.test_data import folder, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def read(
    path: Path,
    *rows: dict[str, Any],
    task: str = "instruct",
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Row]:
    """The rows as values, from a file of JSON lines."""
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_language_rows(
        Source(str(file), task, **(source or {})), evaluate=False, **options
    ).train
    assert found is not None
    assert found["row"][:] == list(range(len(rows)))
    return [row_of(line) for line in found["value"]]


def refusal(path: Path, *rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(SiftError) as caught:
        read(path, *rows, **options)
    assert caught.value.code == ExitCode.USAGE
    return str(caught.value)


def chat(*said: str, **more: Any) -> Conversation:
    """Turns of `role: content`."""
    turns = (one.partition(": ") for one in said)
    return Conversation(tuple(Message(role, content) for role, _, content in turns), **more)


ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
TURN = chat("user: q", "assistant: a")
EQUAL = {  # rows of each format, and what they become
    "messages": ({"messages": [ASKED, ANSWERED]}, TURN),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        TURN,
    ),
    "alpaca": ({"instruction": "q", "output": "a"}, TURN),
    "prompt": ({"prompt": "q", "completion": "a"}, Completion("q", "a")),
    "text": ({"text": "t"}, Text("t")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_by_its_columns(name: str, tmp_path: Path) -> None:
    row, value = EQUAL[name]
    task = "text" if name == "text" else "instruct"
    assert read(tmp_path, row | {"id": 3, "source": "x"}, task=task) == [value]
    assert read(tmp_path, row, task=task, format=name) == [value]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b"}]
    if ending == "json":
        (tmp_path / "train.json").write_text(json.dumps(rows))
    else:
        write(tmp_path / f"train.{ending}", rows)
    write(tmp_path / f"validation.{ending}", rows[1:])
    found = load_language_rows(Source(str(tmp_path), "instruct"))
    assert found.train is not None
    assert found.evaluation is not None
    assert [row_of(line) for line in found.train["value"]] == [
        TURN,
        chat("user: r", "assistant: b"),
    ]
    assert found.evaluation["row"][:] == [0]
    assert found.layout.name == "alpaca"


def test_mapping_one_name_leaves_the_others_alone(tmp_path: Path) -> None:
    """LLaMA-Factory#5294: one mapped column wiped the others."""
    row = {"question": "q", "input": "i", "output": "a", "system": "s"}
    (found,) = read(tmp_path, row, columns={"instruction": "question"})
    assert found == Conversation(
        (
            Message("system", "s"),
            Message("user", "q\n\ni", more={"instruction": "q", "input": "i"}),
            Message("assistant", "a"),
        )
    )


def test_names_inside_messages_can_be_changed_one_at_a_time(tmp_path: Path) -> None:
    turns = [{"speaker": "user", "content": "q"}, {"speaker": "assistant", "content": "a"}]
    assert read(tmp_path, {"messages": turns}, columns={"role": "speaker"}) == [TURN]
    turns = [{"from": "human", "text": "q"}, {"from": "gpt", "text": "a"}]
    assert read(tmp_path, {"talk": turns}, columns={"value": "text", "conversations": "talk"}) == [
        TURN
    ]


def test_names_can_change_places(tmp_path: Path) -> None:
    swapped = {"instruction": "output", "output": "instruction"}
    assert read(tmp_path, {"instruction": "a", "output": "q"}, columns=swapped) == [TURN]
    said = refusal(tmp_path, EQUAL["alpaca"][0], columns={"instruction": "output"})
    assert said == "data.columns: alpaca has two names for the column 'output'"


def test_a_column_that_has_a_name_already_is_no_optional_one(tmp_path: Path) -> None:
    rows = {"input": "q", "output": "a"}
    assert read(tmp_path, rows, columns={"instruction": "input"}) == [TURN]


def test_an_ambiguous_file_lists_columns_and_candidates(tmp_path: Path) -> None:
    both = EQUAL["messages"][0] | EQUAL["alpaca"][0]
    assert refusal(tmp_path, both) == (
        "data: the columns messages, instruction, output fit messages and alpaca; say which with "
        "data.format"
    )
    assert read(tmp_path, both, format="alpaca") == [TURN]
    assert read(tmp_path, both, columns={"instruction": "instruction"}) == [TURN]


def test_unknown_columns_are_listed_beside_what_is_known(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"question": "q", "answer": "a"})
    assert said.startswith("data: the columns question, answer fit no format of task instruct: ")
    assert "alpaca (instruction, output)" in said
    assert said.endswith("say with data.columns what yours are called")
    named = {"instruction": "question", "output": "answer"}
    assert read(tmp_path, {"question": "q", "answer": "a"}, columns=named) == [TURN]
    named["output"] = "reply"
    assert refusal(tmp_path, {"question": "q", "answer": "a"}, columns=named) == (
        "data.columns: output: no column 'reply'; there is question, answer"
    )
    assert refusal(tmp_path, {"text": "t"}).endswith("; task: text would take them")
    assert refusal(tmp_path, EQUAL["messages"][0], task="text").endswith(
        "; task: instruct would take them"
    )


def test_names_of_two_formats_at_once(tmp_path: Path) -> None:
    named = {"instruction": "a", "from": "b"}
    said = refusal(tmp_path, EQUAL["alpaca"][0], columns=named)
    assert said.startswith("data.columns: instruction, from are not all names of messages (")
    said = refusal(tmp_path, EQUAL["alpaca"][0], columns={"from": "b"}, format="alpaca")
    assert "are not all names of alpaca (instruction, output" in said


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    said = refusal(tmp_path, EQUAL["alpaca"][0], columns={"system": "setting"})
    assert said.startswith("data: the train split has no column 'setting'; it has instruction")
    said = refusal(tmp_path, EQUAL["alpaca"][0], format="sharegpt")
    assert said.startswith("data: the train split has no column 'conversations'")


def test_splits_must_be_of_one_format(tmp_path: Path) -> None:
    path = folder(tmp_path, train=[EQUAL["alpaca"][0]], validation=[EQUAL["messages"][0]])
    with pytest.raises(SiftError, match=r"^data: the validation split has no column 'instruction'"):
        load_language_rows(Source(path, "instruct"))


# What rows become


def test_messages_keep_flags_tools_and_what_templates_read(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "system", "content": "s"},
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call], "train": None},
        {"role": "tool", "name": "f", "content": ""},
        {**ANSWERED, "train": False},
        ASKED,
        {**ANSWERED, "reasoning_content": "because"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for held in (tools, json.dumps(tools)):
        (row,) = read(tmp_path, {"messages": turns, "tools": held})
        assert isinstance(row, Conversation)
        assert row.tools == tuple(tools)
        assert row.messages[2] == Message("assistant", "", more={"tool_calls": [call]})
        assert row.messages[3].shown() == {"role": "tool", "content": "", "name": "f"}
        assert [one.train for one in row.messages] == [None] * 4 + [False, None, None]
        assert row.answers == [2, 6]
        assert row.messages[6].more == {"reasoning_content": "because"}


def test_openai_weights_are_flags(tmp_path: Path) -> None:
    turns = [ASKED, {**ANSWERED, "weight": 0}, ASKED, {**ANSWERED, "weight": 1}]
    (row,) = read(tmp_path, {"messages": turns})
    assert isinstance(row, Conversation)
    assert row.answers == [3]


def test_what_a_table_fills_in_is_taken_out_again(tmp_path: Path) -> None:
    """Arrow gives every mapping of a column the keys of all of them."""
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    turns = [ASKED, {**ANSWERED, "tool_calls": [call]}]
    path = tmp_path / "train.parquet"
    write(path, [{"messages": turns}])
    found = load_language_rows(Source(str(path), "instruct"), evaluate=False).train
    assert found is not None
    row = row_of(found["value"][0])
    assert isinstance(row, Conversation)
    assert row.messages[0].shown() == ASKED
    assert row.messages[1].more["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_text_in_parts_is_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2"}]
    (row,) = read(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWERED]})
    assert row == chat("user: q1 q2", "assistant: a")
    image = [{"type": "image", "url": "x"}]
    said = refusal(tmp_path, {"messages": [{"role": "user", "content": image}, ANSWERED]})
    assert "row 0: message 1 holds {'type': 'image'" in said


def test_sharegpt_speakers(tmp_path: Path) -> None:
    spoken = ["system", "user", "assistant", "human", "gpt", "tool", "gpt"]
    turns = [{"from": who, "value": who, "id": 1} for who in spoken]
    (row,) = read(tmp_path, {"conversations": turns, "system": "kept out"})
    assert isinstance(row, Conversation)
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert [one.role for one in row.messages] == roles
    assert all(not one.more for one in row.messages)
    (row,) = read(tmp_path, {"conversations": turns[1:], "system": "s"})
    assert isinstance(row, Conversation)
    assert row.messages[0] == Message("system", "s")


def test_alpaca_with_history_system_and_no_input(tmp_path: Path) -> None:
    row = {**EQUAL["alpaca"][0], "input": " ", "system": "", "history": [["q0", "a0"]]}
    assert read(tmp_path, row) == [chat("user: q0", "assistant: a0", "user: q", "assistant: a")]


def test_a_prompt_of_messages_is_given_and_not_learnt(tmp_path: Path) -> None:
    row = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]}
    (found,) = read(tmp_path, row)
    assert isinstance(found, Conversation)
    assert (len(found.messages), found.given, found.answers) == (4, 3, [3])


def test_whole_numbers_are_read_as_text(tmp_path: Path) -> None:
    write(
        tmp_path / "rows.csv",
        [{"instruction": "q", "output": 7}, {"instruction": "r", "output": 8}],
    )
    source = Source(str(tmp_path / "rows.csv"), "instruct")
    found = load_language_rows(source, evaluate=False).train
    assert found is not None
    assert row_of(found["value"][1]) == chat("user: r", "assistant: 8")
    said = refusal(tmp_path, {"instruction": "q", "output": 7.5})
    assert said.endswith("row 0: 'output' is 7.5, not text; rows are counted from 0")


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
MESSAGES = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    TEXT,
    st.sampled_from([None, True, False]),
    st.dictionaries(TEXT, st.lists(TEXT, max_size=2), max_size=2),
)
ROWS = st.one_of(
    st.builds(Completion, TEXT, TEXT),
    st.builds(Text, TEXT),
    st.builds(
        Conversation,
        st.lists(MESSAGES, max_size=4).map(tuple),
        st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2).map(tuple),
        st.integers(0, 4),
    ),
)


@given(ROWS)
def test_a_row_comes_back_from_its_line(row: Row) -> None:
    assert row_of(line_of(row)) == row


# What is wrong with rows


def said(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


WRONG = {
    "no messages at all": (said(), "an empty conversation in 'messages'"),
    "nothing": ({"messages": None}, "'messages' is missing"),
    "no list": ({"messages": "q"}, "'messages' is 'q', not a list of messages"),
    "no mappings": (said("q", "a"), "message 1 is 'q', not a mapping with 'role', 'content'"),
    "pairs": (said(["q", "a"]), "message 1 is ['q', 'a'], not a mapping"),
    "no role": (said({"content": "q"}, ANSWERED), "message 1 has no 'role'"),
    "no content": (said({"role": "user"}, ANSWERED), "message 1 has no 'content'"),
    "content that is no text": (
        said({**ASKED, "content": 1.5}),
        "the content of message 1 is 1.5, not",
    ),
    "an unknown role": (
        said(ASKED, {**ANSWERED, "role": "bot"}),
        "message 2 has the unknown role 'bot'; known: system, developer, user, assistant, tool",
    ),
    "a role that is spelt wrong": (
        said(ASKED, {**ANSWERED, "role": "asistant"}),
        "message 2 has the unknown role 'asistant'; did you mean assistant?",
    ),
    "an empty question": (said({**ASKED, "content": " "}, ANSWERED), "message 1 is empty"),
    "no answer": (said(ASKED), "no answer: no message of the assistant"),
    "a flag that is none": (
        said(ASKED, {**ANSWERED, "train": "yes"}),
        "message 2: 'train' is 'yes', no yes or no",
    ),
    "a weight between": (
        said(ASKED, {**ANSWERED, "weight": 0.5}),
        "message 2: 'weight' is 0.5, no yes or no",
    ),
    "a question to learn": (
        said({**ASKED, "train": True}, ANSWERED),
        "message 1 asks to learn what 'user' says; only answers can be learnt",
    ),
    "tools that are none": (
        {**said(ASKED, ANSWERED), "tools": "not json"},
        "'tools' is 'not json', which is no JSON",
    ),
    "an answer that is not there": ({"instruction": "q", "output": None}, "no answer: 'output' is"),
    "no instruction": ({"instruction": None, "output": "a"}, "'instruction' is missing"),
    "an empty instruction": ({"instruction": "", "output": "a"}, "'instruction' is empty"),
    "history of no pairs": (
        {"instruction": "q", "output": "a", "history": [["q"]]},
        "'history' holds ['q'], not a question and its answer",
    ),
    "no completion": ({"prompt": "q", "completion": None}, "no answer: 'completion' is missing"),
    "no prompt": ({"prompt": None, "completion": "a"}, "'prompt' is missing"),
    "text and messages": (
        {"prompt": "q", "completion": [ANSWERED]},
        "'prompt' is 'q' and the other is a list of messages; both are text, or both messages",
    ),
    "only given answers": (
        {"prompt": [ASKED, ANSWERED], "completion": [ASKED]},
        "no answer: no message of the assistant",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_row_that_cannot_be_used_is_located(what: str, tmp_path: Path) -> None:
    row, why = WRONG[what]
    name = recognise(list(row), "instruct").name
    assert f"data: the train split, {name} rows: row 0: {why}" in refusal(tmp_path, row)


@pytest.mark.parametrize("said", ["", " \n"])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt"])
def test_an_answer_that_says_nothing_is_left_to_be_dropped(
    name: str, said: str, tmp_path: Path
) -> None:
    """Alpaca's own file holds some."""
    row = json.loads(json.dumps(EQUAL[name][0]).replace('"a"', json.dumps(said)))
    (found,) = read(tmp_path, row)
    if isinstance(found, Completion):
        assert found == Completion("q", said)
    else:
        assert isinstance(found, Conversation)
        assert found.messages[1].content == said
        assert found.answers == []
    history = {"instruction": "q", "output": said, "history": [["q", "a"]]}
    (found,) = read(tmp_path, history)
    assert isinstance(found, Conversation)
    assert found.answers == []


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_an_empty_text_is_located(value: str | None, tmp_path: Path) -> None:
    text = refusal(tmp_path, {"text": "t"}, {"text": value}, task="text")
    assert text.startswith("data: the train split, text rows: row 1: 'text' is ")


def test_many_wrong_rows_are_counted_and_named_by_their_source_numbers(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": None if at % 2 else "a"} for at in range(40)]
    text = refusal(tmp_path, *rows)
    assert "row 1: no answer" in text
    assert text.endswith("; and 15 more; rows are counted from 0")
    text = refusal(tmp_path, *rows, source={"max_train_rows": 39, "seed": 1})
    assert all(int(part.split(":")[0]) % 2 for part in text.split("row ")[1:])
