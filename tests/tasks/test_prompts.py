"""Files of prompts: rows of every format without their last answer, and texts."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from sift_cli.errors import SiftError
from sift_cli.tasks.conversations import Completion, Conversation, Message, Text
from sift_cli.tasks.prompts import Prompt, prompts_of, read_prompts

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
ASKED = (Message("user", "q"),)


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(folder: Path, rows: list[dict[str, Any]], task: str = "instruct", **more: Any) -> Any:
    return [(one.row, one.expected) for one in read_prompts(rows_file(folder, rows), task, **more)]


@pytest.mark.parametrize(
    ("answered", "open_"),
    [
        ({"messages": [USER, ANSWER]}, {"messages": [USER]}),
        ({"conversations": [HUMAN, GPT]}, {"conversations": [HUMAN]}),
        ({"instruction": "q", "output": "a"}, {"instruction": "q"}),
        ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": " "}),
        (
            {"prompt": [USER], "completion": [ANSWER]},
            {"prompt": [USER], "completion": None},
        ),
    ],
)
def test_the_last_answer_is_taken_off_where_there_is_one(
    tmp_path: Path, answered: dict[str, Any], open_: dict[str, Any]
) -> None:
    found = read(tmp_path, [answered])
    assert [(row.messages, expected) for row, expected in found] == [(ASKED, "a")]
    found = read(tmp_path, [open_])
    assert [(row.messages, expected) for row, expected in found] == [(ASKED, None)]
    if set(answered) == set(open_):
        found = read(tmp_path, [open_, answered, open_])
        assert [(row.messages, expected) for row, expected in found] == [
            (ASKED, None),
            (ASKED, "a"),
            (ASKED, None),
        ]


def test_earlier_answers_stay(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, USER, ANSWER, USER]
    for asked, expected in ((turns, None), ([*turns, ANSWER], "a")):
        ((row, said),) = read(tmp_path, [{"messages": asked}])
        assert [one.role for one in row.messages] == ["system", "user", "assistant", "user"]
        assert said == expected


def test_a_prompt_with_a_completion_takes_no_template(tmp_path: Path) -> None:
    found = read(tmp_path, [{"prompt": "q", "completion": " a"}])
    assert found == [(Completion("q", ""), " a")]
    assert read(tmp_path, [{"prompt": "q"}], format="prompt") == [(Completion("q", ""), None)]


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_a_column_that_stands_alone_is_asked_as_an_argument_is(tmp_path: Path, column: str) -> None:
    rows = [{column: "one", "id": 1}, {column: "two", "id": 2}]
    for plain in (False, True):
        (one, two) = read(tmp_path, rows, plain=plain)
        assert [one, two] == [(row.row, None) for row in prompts_of(["one", "two"], plain)]
    assert prompts_of(["a"], True)[0].row == Text("a")
    assert prompts_of(["a"], False)[0].row == Conversation((Message("user", "a"),))


def test_names_of_the_recipe_are_those_of_the_file(tmp_path: Path) -> None:
    columns = {"instruction": "question", "output": "reply"}
    rows = [{"question": "q", "reply": "a"}]
    for told in ("auto", "alpaca"):
        ((row, expected),) = read(tmp_path, rows, format=told, columns=columns)
        assert (row.messages, expected) == (ASKED, "a")
        ((row, expected),) = read(tmp_path, [{"question": "q"}], format=told, columns=columns)
        assert (row.messages, expected) == (ASKED, None)


def test_lines_of_a_text_file_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\n\n  \u2028two\n", encoding="utf-8")
    found = read_prompts(path, "instruct")
    assert [(one.number, one.shown()) for one in found] == [(0, "one"), (2, "  \u2028two")]
    assert found[1].place == f"--input {path}: row 2"


def test_csv_and_json(tmp_path: Path) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["instruction", "input"], ["q", "x, y"], ["7", ""]])
    found = read_prompts(tmp_path / "in.csv", "instruct")
    assert [one.shown() for one in found] == ["q\n\nx, y", "7"]
    (tmp_path / "in.json").write_text(json.dumps([{"prompt": "q"}, {"prompt": "r"}]))
    assert [one.shown() for one in read_prompts(tmp_path / "in.json", "instruct")] == ["q", "r"]


def test_what_is_shown_of_a_prompt() -> None:
    turns = (Message("system", "s"), Message("user", "q"))
    assert Prompt(Conversation(turns), 0, "").shown() == [one.shown() for one in turns]
    assert Prompt(Conversation(turns[1:]), 0, "").shown() == "q"
    assert Prompt(Completion("p", "c"), 0, "").shown() == "p"
    assert Prompt(Text("t"), 0, "").shown() == "t"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": [USER]}, {"messages": []}], "row 1: an empty conversation"),
        ([{"messages": [{"role": "judge", "content": "q"}]}], "row 0: message 1 has the unknown"),
        ([{"messages": [{"role": "system", "content": "q"}]}], "row 0: no answer"),
        ([{"prompt": "q"}, {"prompt": " "}], "row 1: 'prompt' holds no text"),
        ([{"question": "q"}], "the columns question fit no format of task instruct"),
        ([{"messages": [USER], "instruction": "q"}], "fit messages and alpaca"),
        ([], "the split 'train' is empty"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    path = rows_file(tmp_path, rows)
    with pytest.raises(SiftError, match=said) as error:
        read_prompts(path, "instruct")
    assert str(error.value).startswith(f"--input {path}: ")


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, content, said in (
        ("in.xlsx", b"", r"use one of \.jsonl, "),
        ("in.jsonl", None, "no such file"),
        ("in.txt", b"\n \n", "it holds no prompt"),
        ("latin.txt", b"\xe9\n", "not UTF-8"),
        ("broken.jsonl", b'{"prompt": ', "not JSON"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SiftError, match=f"--input .*{name}:.*{said}"):
            read_prompts(path, "instruct")
