"""`sift data show`: a row as the model sees it, in plain lines, in colour and as JSON."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sift_cli.system.terminal import visible
from tests.support.chats import CHATML, END, MARKS_NO_END, save_chat_model
from tests.support.command import ENV, sift

ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def told(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {
        "messages": [
            {"role": role, "content": one} for role, one in zip(roles, turns, strict=False)
        ]
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Ten rows, one of them long, beside a tiny chat model without weights."""
    rows = [told(f"q{at}", f"a{at} ☃\nb") for at in range(9)]
    rows.append(told("long " * 20, "yes", "no?", ESCAPE + "no"))
    folder = tmp_path / "data"
    folder.mkdir()
    for name, some in (("train", rows), ("validation", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    base = save_chat_model(tmp_path / "base", CHATML)
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{path: {base}}}\ndata: {{path: {folder}, task: instruct}}\n")
    return file


def shown(*args: object) -> str:
    done = sift("data", "show", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_row_in_plain_lines(recipe: Path) -> None:
    assert shown(recipe, "--row", 3) == (
        "train row 3 (messages, template model), 31 tokens, 9 learnt (29.0%), in [[ ]]\n"
        "<|im_start|>user\\n\n"
        "q3<|im_end|>\\n\n"
        "<|im_start|>assistant\\n\n"
        "[[a3 ☃\\n\n"
        "b<|im_end|>]]\\n\n"
        "\n"
        "Of 10 rows, 0 are dropped and 0 cut; tokens of a row: p50 31, p95 165, max 165.\n"
        "103 of 444 tokens are learnt (23.2%).\n"
    )


def test_a_row_as_json_adds_up(recipe: Path) -> None:
    found = json.loads(shown(recipe, "--row", 3, "--json"))
    assert (found["number"], found["split"], found["fate"]) == (3, "train", "kept")
    assert found["length"] == len(found["tokens"]) == 31
    assert found["learnt"] == sum(one["learnt"] for one in found["tokens"])
    text = "".join(part["text"] for part in found["parts"])
    assert text == f"<|im_start|>user\nq3{END}\n<|im_start|>assistant\na3 ☃\nb{END}\n"
    learnt = [part["text"] for part in found["parts"] if part["learnt"]]
    assert learnt == [f"a3 ☃\nb{END}"]
    assert found["counts"]["lengths"] == {"p50": 31, "p95": 165, "max": 165}
    assert found["counts"]["refused"] is None


def test_a_token_on_each_line(recipe: Path) -> None:
    lines = shown(recipe, "--row", 3, "--tokens").splitlines()
    assert lines[1] == "at\tid\ttoken\tlearnt"
    assert re.fullmatch(r"0\t\d+\t<\|im_start\|>\t", lines[2])
    assert [line for line in lines if line.endswith("\tyes")][-1].split("\t")[2] == END
    assert sum(line.endswith("\tyes") for line in lines) == 9


def test_the_first_row_of_a_split(recipe: Path) -> None:
    assert shown(recipe).startswith("train row 0 (")
    found = shown(recipe, "--split", "validation", "--row", 1)
    assert found.startswith("validation row 1 (")
    assert "Of 2 rows," in found
    held = shown(recipe, "--split", "validation", "--set", "data.holdout=0.3")
    assert "Of 3 rows," in held
    done = sift("data", "show", recipe, "--row", 77)
    assert done.returncode == 2
    assert done.stderr.startswith("--row 77: none of the 10 rows of the train split, whose numbers")
    done = sift("data", "show", recipe, "--split", "test")
    assert done.returncode == 2
    assert "no split 'test'" in done.stderr


def test_a_dropped_row_is_shown_with_why(recipe: Path) -> None:
    found = shown(recipe, "--row", 9, "--set", "data.max_length=60")
    assert "165 tokens, " in found
    assert "in [[ ]], dropped: too long" in found
    assert "Of 10 rows, 1 are dropped (too long: 1) and 0 cut" in found
    assert "[[yes<|im_end|>]]" in found


def test_a_cut_row_is_shown_as_it_is_cut(recipe: Path) -> None:
    changes = ["--set", "data.max_length=150", "--set", "data.too_long=cut-end"]
    found = shown(recipe, "--row", 9, *changes)
    assert "165 tokens" in found
    assert "cut to 150 tokens" in found
    assert "Of 10 rows, 0 are dropped and 1 cut" in found
    row = json.loads(shown(recipe, "--row", 9, *changes, "--json"))
    assert len(row["tokens"]) == 150


def test_a_split_that_would_not_be_trained_on_is_shown_nevertheless(recipe: Path) -> None:
    found = shown(recipe, "--row", 0, "--set", "data.max_length=30")
    assert "Training would stop: data: all rows of the train split are dropped (10 too " in found


def test_a_text_is_learnt_whole(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"body": "abcd"}) + "\n")
    changes = [f"data.path={tmp_path / 't.jsonl'}", "data.task=text", "data.columns={text: body}"]
    options = [part for one in [*changes, "data.max_length=3"] for part in ("--set", one)]
    found = shown(recipe, *options)
    assert found.splitlines()[0] == (
        "train row 0 (text), 5 tokens, 4 learnt (80.0%), in [[ ]], split into 2 parts of 3 tokens"
    )
    assert "[[abcd<|im_end|>]]" in found


def test_rows_with_labels_are_shown_too(recipe_file: Path) -> None:
    found = shown(recipe_file, "--row", 1)
    assert re.match(r"train row 1 \(sst2\), \d+ tokens, label positive\n\[CLS\]", found)
    assert "Of 48 rows, 0 are dropped and 0 cut" in found
    assert "learnt" not in found
    assert "cut to 4 tokens" in shown(recipe_file, "--set", "data.max_length=4")


def test_no_weights_are_needed(recipe: Path) -> None:
    assert not list((recipe.parent / "base").glob("*.safetensors"))
    shown(recipe)


# What data may do to a terminal


def test_escape_sequences_of_data_never_reach_the_terminal(recipe: Path) -> None:
    for options in ([], ["--tokens"], ["--json"]):
        found = shown(recipe, "--row", 9, *options)
        assert "\x1b" not in found
        assert "\x07" not in found
    assert "[[\\x1b]0;owned\\x07\\x1b[31mno<|im_end|>]]" in shown(recipe, "--row", 9)


def test_nor_do_those_of_wrong_rows_and_columns(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    odd = {"role": ESCAPE, "content": "x"}
    for row in ({"messages": [odd]}, {ESCAPE: "x"}, {"messages": ESCAPE}, {"prompt": ESCAPE}):
        file.write_text(json.dumps(row) + "\n")
        done = sift("data", "show", recipe, "--set", f"data.path={file}")
        assert done.returncode == 2
        assert done.stderr.startswith("data: ")
        assert "\x1b" not in done.stderr


def test_a_terminal_shows_learnt_tokens_in_colour(recipe: Path) -> None:
    """And nothing of the data moves its cursor."""
    main_end, end = pty.openpty()
    command = [sys.executable, "-m", "sift_cli", "data", "show", str(recipe), "--row", "9"]
    plain = {key: value for key, value in ENV.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        command, stdout=end, stderr=end, env={**plain, "TERM": "xterm", "COLUMNS": "500"}
    )
    os.close(end)
    out = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:
            break
        if not part:
            break
        out += part
    os.close(main_end)
    assert process.wait() == 0
    text = out.decode()
    assert "\x1b[1;32myes<|im_end|>\x1b[0m" in text
    assert "\x1b[1;32m\\x1b]0;owned\\x07\\x1b[31mno<|im_end|>\x1b[0m" in text
    assert "in green" in text
    assert set(re.findall(r"\x1b\[?[^m]*m?", text)) <= {"\x1b[1;32m", "\x1b[0m"}


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("plain é☃\n\t", "plain é☃\n\t"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\x9b31m\r\x00", "\\x9b31m\\r\\x00"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_cannot_be_seen_is_spelt_out(text: str, spelt: str) -> None:
    assert visible(text) == spelt


# Recipes for these tasks elsewhere


def test_a_template_that_ends_no_answer_is_one_error(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "open.jinja").write_text(MARKS_NO_END)
    done = sift("data", "show", recipe, "--set", f"data.template={tmp_path / 'open.jinja'}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "open.jinja: answers end with" in done.stderr
