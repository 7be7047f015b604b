"""Bad rows and files through the command line: one located error each, and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.support.chats import SHOWS_NO_ANSWER, TWO_BEGINNINGS, save_chat_model
from tests.support.command import sift
from tests.support.models import save_base

ASKED, ANSWERED = ({"role": role, "content": "x"} for role in ("user", "assistant"))
LONG = {"messages": [{**ASKED, "content": "q" * 200}, ANSWERED]}
GOOD = {"messages": [ASKED, ANSWERED]}
SHORT = ("data.max_length=60",)
CUT = (*SHORT, "data.too_long=cut-end")


def said(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


ROWS: dict[str, tuple[list[Any], tuple[str, ...], str]] = {  # rows, overrides, what is told
    "no answer": ([said(ASKED)], (), "row 10: no answer: no message of the assistant"),
    "an answer that is not there": (
        [{"instruction": "q", "output": "a"}, {"instruction": "q"}],
        (),
        "data: the train split, alpaca rows: row 1: no answer: 'output' is missing",
    ),
    "an unknown role": (
        [said(ASKED, {**ANSWERED, "role": "bot"})],
        (),
        "row 10: message 2 has the unknown role 'bot'",
    ),
    "an empty conversation": ([said()], (), "row 10: an empty conversation in 'messages'"),
    "a fifth dropped": ([LONG] * 3, SHORT, "3 of 13 rows of the train split are dropped (3 too"),
    "answers cut away": ([LONG] * 3, CUT, "are dropped (3 answer cut away)"),
    "two formats": (
        [{"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}],
        (),
        "the columns prompt, completion, instruction, output fit alpaca and prompt; say which with",
    ),
}


def refusal(recipe: Path, *options: str) -> str:
    """The last line of training, which is that of a plan."""
    said = set()
    for command in (("train", recipe, "--out", recipe.parent / "run"), ("plan", recipe)):
        done = sift(*command, *options)
        assert done.returncode == 2, done.stdout
        line = done.stderr.splitlines()[-1]  # after what training tells of the run
        said.add(line)
    (only,) = said
    return only


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """What training and a plan say of files, which both refuse in the same line."""
    folder = tmp_path / "data"
    folder.mkdir()

    def run(base: Path, *changes: str, task: str = "instruct", **files: str | bytes) -> str:
        for name, text in files.items():
            data = text if isinstance(text, bytes) else text.encode()
            (folder / name.replace("_", ".")).write_bytes(data)
        recipe = tmp_path / "r.yaml"
        recipe.write_text(f"model: {{path: {base}}}\ndata: {{path: {folder}, task: {task}}}\n")
        options = [part for one in changes for part in ("--set", one)]
        return refusal(recipe, *options).replace(str(tmp_path), "")

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return with_weights(save_chat_model(tmp_path / "base"))


def with_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("what", ROWS)
def test_rows(what: str, base: Path, refused: Callable[..., str]) -> None:
    rows, changes, told = ROWS[what]
    before = [GOOD] * 10 if "messages" in rows[0] else []
    files = {"train_jsonl": lines(*before, *rows), "validation_jsonl": lines(*before, rows[0])}
    assert told in refused(base, *changes, **files)


LINES = lines(*[GOOD] * 3)
FILES: dict[str, tuple[str, str | bytes, str]] = {
    "an empty file": ("train_jsonl", "", "/data/train.jsonl: the split 'train' is empty"),
    "a broken line": (
        "train_jsonl",
        LINES + '{"messages": [\n' + LINES,
        "data.path: /data/train.jsonl:4: not JSON: Expecting value",
    ),
    "a broken last line": ("train_jsonl", LINES + '{"messages": [', "/data/train.jsonl:4: not"),
    "a line of text": ("train_jsonl", LINES + "hello\n", "/data/train.jsonl:4: not JSON: "),
    "a line that is a list": ("train_jsonl", LINES + "[1]\n", "/data/train.jsonl:4: not a row"),
    "a broken array": ("train_json", '[{"text": "a"},\n{"text" "b"}]', "/data/train.json:2: not"),
    "UTF-16": ("train_jsonl", LINES.encode("utf-16"), "/data/train.jsonl: not UTF-8: "),
    "Latin-1": (
        "train_jsonl",
        LINES.encode() + LINES.splitlines()[0].replace('"x"', '"é"').encode("latin-1"),
        "data: the train split, row 3: not UTF-8: ",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_files(what: str, base: Path, refused: Callable[..., str]) -> None:
    name, content, told = FILES[what]
    other = name.replace("train", "validation")
    assert told in refused(base, **{name: content, other: LINES})


def test_tokens_that_the_model_has_no_embedding_of(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    """A tokenizer that was made longer than its model."""
    folder = save_base(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<product>"])
    tokenizer.save_pretrained(folder)
    rows = lines(*({"sentence": f"good {at}", "label": at % 2} for at in range(4)))
    files = {"train_jsonl": rows.replace("good 1", "<product>"), "validation_jsonl": rows}
    changes = ("data.max_length=16", "train.learning_rate=0.01")
    told = refused(folder, *changes, task="sst2", **files)
    assert told.startswith("data: the train split has tokens beyond the ")
    assert told.endswith("1 rows, such as row 1, counted from 0")


def test_templates(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    files = {"train_jsonl": LINES, "validation_jsonl": LINES}
    (tmp_path / "silent.jinja").write_text(SHOWS_NO_ANSWER)
    change = f"data.template={tmp_path / 'silent.jinja'}"
    assert "data.template: the one in the recipe supervises nothing" in refused(
        base, change, **files
    )
    poor = with_weights(save_chat_model(tmp_path / "poor", lacks=("<|im_start|>",)))
    told = refused(poor, "data.template=chatml", **files)
    assert told.startswith("data.template: chatml needs the token <|im_start|>, which the model's")
    twice = with_weights(save_chat_model(tmp_path / "twice", TWO_BEGINNINGS))
    assert "row 0: it begins with two '<|begin|>'" in refused(twice, **files)


def test_another_kind_of_model(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    """For the rows alone as well, whose template a model of another kind may lack."""
    files = {"train_jsonl": LINES, "validation_jsonl": LINES}
    config = AutoConfig.from_pretrained(base)
    labelled = save_chat_model(tmp_path / "labelled")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(labelled)
    for folder, name in (
        (labelled, "LlamaForSequenceClassification"),
        (save_base(tmp_path / "bert", "bert"), "BertModel"),
    ):
        told = refused(folder, **files)
        assert told == f"data.task: instruct needs a causal language model, and the model is {name}"
        done = sift("data", "show", tmp_path / "r.yaml")
        assert (done.returncode, done.stderr) == (2, told + "\n")


WITHOUT_STEPS: dict[str, tuple[tuple[str, ...], str]] = {  # overrides, what is told
    "a template that is not there": (("data.template=none.jinja",), "'none.jinja' is none of"),
    "too few rows to try rates": (("train.learning_rate=auto",), "and 3 are too few for that"),
    "more tokens than positions": (("data.max_length=4096",), "the model takes 2048 tokens"),
    "a warm-up of no head": (("selection.schedule=after-warmup",), "no module trains whole"),
    "a probe without labels": (("train.head_start=probe",), "and the task instruct has none"),
    "a split that is not there": (("eval.split=test",), "no split 'test'"),
    "a column that is not there": (("data.format=alpaca",), "no column 'instruction'"),
}


@pytest.mark.parametrize("what", WITHOUT_STEPS)
def test_settings(what: str, base: Path, refused: Callable[..., str]) -> None:
    changes, told = WITHOUT_STEPS[what]
    assert told in refused(base, *changes, train_jsonl=LINES, validation_jsonl=LINES)


LABELLED: dict[str, tuple[list[dict[str, Any]], str]] = {  # rows, what is told
    "one label": (
        [{"sentence": "a", "label": 1}],
        "rows have the label positive; nothing can be learnt",
    ),
    "an unknown label": ([{"sentence": "a", "label": 7}], "labels outside"),
    "no text": ([{"sentence": None, "label": 0}], "text in 'sentence' is missing"),
    "another column": ([{"words": "a", "label": 0}], "no column 'sentence'"),
    "a rate to find": ([{"sentence": "a", "label": 0}], "and 4 are too few for that"),
}


@pytest.mark.parametrize("what", LABELLED)
def test_labelled_rows(what: str, recipe_file: Path, tmp_path: Path) -> None:
    rows, told = LABELLED[what]
    more = [] if "words" in rows[0] else [{"sentence": "b", "label": 1}] * 3
    path = tmp_path / "few"
    path.mkdir()
    for split in ("train", "validation"):
        (path / f"{split}.jsonl").write_text(lines(*rows, *more))
    changes = [f"data.path={path}", "train.learning_rate=auto"]
    assert told in refusal(recipe_file, *(part for one in changes for part in ("--set", one)))


def test_a_model_without_such_a_head(recipe_file: Path, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "clip", "bert")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    assert "CLIPConfig" in refusal(recipe_file, "--set", f"model.path={folder}")


def test_a_plan_does_without_rows_and_tokenizer(
    base: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """But not without what it can tell from the rest."""
    done = sift("plan", recipe_file, "--set", f"data.path={tmp_path / 'none'}")
    assert (done.returncode, "no such folder or file" in done.stdout) == (0, True)
    for file in base.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "train.jsonl").write_text(LINES)
    recipe = tmp_path / "r.yaml"
    data = f"{{path: {tmp_path}/train.jsonl, task: instruct, holdout: 0.4}}"
    recipe.write_text(f"model: {{path: {base}}}\ndata: {data}\n")
    done = sift("plan", recipe)
    assert (done.returncode, "holds no tokenizer" in done.stdout) == (0, True), done.stderr
    (tmp_path / "train.jsonl").write_text(lines(*[said(ASKED)] * 3))
    assert "no answer" in refusal(recipe)


def test_a_tuned_language_model_does_not_classify(tmp_path: Path, base: Path) -> None:
    rows = lines(*({"sentence": f"t {at}", "label": at % 2} for at in range(6)))
    (tmp_path / "validation.jsonl").write_text(rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: {base}}}\ndata: {{path: {tmp_path}, task: sst2}}\n")
    done = sift("eval", base, "--recipe", recipe)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "LlamaForCausalLM" in line
