"""The answers that a run keeps: which prompts, when, against a plain loop; and what stays still."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import load_recipe
from sift_cli.runs.samples import answered, draw_samples, write_samples
from sift_cli.runs.session import open_session
from sift_cli.training import train
from tests.support.chats import CHATS, END, byte_tokenizer, save_chat_recipe, write_chats
from tests.support.command import sift
from tests.support.interruptions import at_call, delta, killed_at, signalled

ASKED = ["eval.samples=3", "eval.generate.max_new_tokens=5", "eval.every=2"]
LONGEST = 5


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A recipe of a tiny Llama, and chats to learn from."""
    return save_chat_recipe(tmp_path)


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]


def plainly(folder: Path, prompt: str) -> tuple[str, bool]:
    """The likeliest token again and again, from whole forward passes; and whether it ended."""
    tokenizer, model = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    asked = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    start, end = len(ids), tokenizer.convert_tokens_to_ids(END)
    while (len(ids) < start + LONGEST and ids[-1] != end) or len(ids) == start:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True), ids[-1] == end


def test_answers_of_a_run_are_those_of_a_plain_loop(chat: Path, tmp_path: Path) -> None:
    # rule 3.8
    write_chats(tmp_path / "chats/train.jsonl", [[row[0], ("assistant", "y")] for row in CHATS])
    changes = ["train.max_steps=18", "train.learning_rate=0.05", "eval.every=9", "eval.keep=last"]
    train(load_recipe(chat, [*ASKED, *changes, "selection.density=1.0"]), tmp_path / "run")
    merge([tmp_path / "run/delta.safetensors"], tmp_path / "merged", verify=False)
    lines = samples(tmp_path / "run")
    keys = ["step", "row", "prompt", "expected", "answer", "ended"]
    assert all(list(line) == keys for line in lines)
    rows = [line["row"] for line in lines[:3]]
    assert rows == sorted(set(rows))
    assert [(line["step"], line["row"]) for line in lines] == [
        (step, row) for step in (0, 9, 18) for row in rows
    ]
    for line in lines:
        (_, asked), (_, expected) = CHATS[3 * line["row"]]
        assert (line["prompt"], line["expected"]) == (asked, expected)
    for some, folder in ((lines[:3], chat.parent / "base"), (lines[-3:], tmp_path / "merged")):
        for line in some:
            assert (line["answer"], line["ended"]) == plainly(folder, line["prompt"])
    assert not any(line["ended"] for line in lines[:3])
    assert any(line["ended"] for line in lines[-3:])


@pytest.mark.parametrize("how", ["padded", "packed", "checkpointing", "current-batch"])
def test_samples_move_nothing_of_training(chat: Path, tmp_path: Path, how: str) -> None:
    changes = {
        "padded": ["train.chunk_loss=3"],
        "packed": ["train.tokens=256"],
        "checkpointing": ["train.gradient_checkpointing=true"],
        "current-batch": ["selection.policy=current-batch", "selection.batches=1"],
    }[how]
    if how == "packed":
        chat.write_text(chat.read_text().replace("batch_size: 4, ", ""))
    with_samples, without = tmp_path / "with", tmp_path / "without"
    train(load_recipe(chat, [*changes, *ASKED]), with_samples)
    train(load_recipe(chat, [*changes, "eval.every=2"]), without)
    assert len(samples(with_samples)) == 12
    assert not (without / "samples.jsonl").exists()
    assert delta(with_samples) == delta(without)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_and_random_states_are_left_as_they_were(chat: Path, checkpointing: bool) -> None:
    session = open_session(load_recipe(chat), device="cpu")
    prepare_model(session.model, session.device, checkpointing)
    samples = draw_samples(session, 2)
    model = session.model
    model.generation_config.temperature = 0.3
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    before = model.config.to_dict(), model.generation_config.to_dict(), model.training
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(answered(session, samples, 4)) == 2
    assert (model.config.to_dict(), model.generation_config.to_dict(), model.training) == before
    assert model.training
    assert model.config.use_cache == (not checkpointing)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_resumed_run_has_each_step_once(chat: Path, tmp_path: Path) -> None:
    recipe = load_recipe(chat, [*ASKED, "checkpoint.every=3"])
    train(recipe, tmp_path / "whole")
    run = tmp_path / "run"
    killed_at(6, recipe, run)  # answers of step 4 are there, the checkpoint is of step 3
    assert {line["step"] for line in samples(run)} == {0, 2, 4}
    train(recipe, run, resume=True)
    whole = (tmp_path / "whole/samples.jsonl").read_bytes()
    assert (run / "samples.jsonl").read_bytes() == whole


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_that_a_signal_stops_misses_no_step(chat: Path, tmp_path: Path, number: int) -> None:
    recipe, run = load_recipe(chat, ASKED), tmp_path / "run"
    train(recipe, tmp_path / "whole")
    with (
        at_call(number, signalled(signal.SIGTERM)),
        pytest.raises(SiftError, match="interrupted after step"),
    ):
        train(recipe, run)
    train(recipe, run, resume=True)
    whole = (tmp_path / "whole/samples.jsonl").read_bytes()
    assert (run / "samples.jsonl").read_bytes() == whole


def test_a_signal_before_the_first_answers_makes_them_up_on_resuming(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = load_recipe(chat, ASKED), tmp_path / "run"
    train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("sift_cli.training.loop.answered", lambda *_: signalled(signal.SIGTERM)())
        with pytest.raises(SiftError, match="interrupted after step 0"):
            train(recipe, run)
    assert not (run / "samples.jsonl").exists()
    train(recipe, run, resume=True)
    whole = (tmp_path / "whole/samples.jsonl").read_bytes()
    assert (run / "samples.jsonl").read_bytes() == whole


def test_a_run_goes_on_with_more_or_longer_answers(chat: Path, tmp_path: Path) -> None:
    killed_at(4, load_recipe(chat, [*ASKED, "checkpoint.every=3"]), tmp_path / "run")
    more = load_recipe(chat, [*ASKED, "eval.samples=5", "checkpoint.every=3"])
    train(more, tmp_path / "run", resume=True)
    steps = [line["step"] for line in samples(tmp_path / "run")]
    assert steps == [0] * 3 + [2] * 3 + [4] * 5 + [6] * 5


def test_another_run_in_the_folder_leaves_no_answers(chat: Path, tmp_path: Path) -> None:
    train(load_recipe(chat, ASKED), tmp_path / "run")
    train(load_recipe(chat), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/samples.jsonl").exists()


def test_prompts_end_before_the_last_answer(chat: Path, tmp_path: Path) -> None:
    rows = [
        [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "and?"),
         ("assistant", "no\u2028more"), ("user", "thanks")],
        [("assistant", "an answer to nothing")],
    ]  # fmt: skip
    write_chats(tmp_path / "chats/validation.jsonl", rows)
    session = open_session(load_recipe(chat, ["data.train_on=all-tokens"]), device="cpu")
    (one,) = draw_samples(session, 4)
    assert (one.number, one.expected) == (0, "no\u2028more")
    assert one.asked == "system: be brief\nuser: hi\nassistant: hello\nuser: and?"
    lines = answered(session, [one], 2)
    write_samples(tmp_path, 0, lines)
    write_samples(tmp_path, 5, lines)
    assert [line["step"] for line in samples(tmp_path)] == [0, 5]


def test_a_text_is_gone_on_from_its_beginning(chat: Path, tmp_path: Path) -> None:
    texts = ["once upon a time there was a number, and it was one", "abcd", "x"]
    for split in ("train", "validation"):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"chats/{split}.jsonl").write_text("".join(lines))
    session = open_session(load_recipe(chat, ["data.task=text"]), device="cpu")
    found = draw_samples(session, 9)
    assert [one.asked for one in found] == [texts[0][:25], "ab", "x"]
    assert [one.asked + one.expected for one in found] == texts
    assert len(answered(session, found, 2)) == 3


def test_trials_of_learning_rates_answer_nothing(chat: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats/train.jsonl", CHATS * 3)
    train(load_recipe(chat, [*ASKED, "train.learning_rate=auto"]), tmp_path / "run")
    found = [path.parent.name for path in tmp_path.rglob("samples.jsonl")]
    assert found == ["run"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eval.samples=2", "eval.samples: it belongs to task: instruct or text"),
        ("eval.generate.max_new_tokens=9", "eval.generate: it belongs to task: instruct or text"),
        ("eval.samples=-1", "eval.samples: input should be greater than or equal to 0"),
        ("eval.generate.max_new_tokens=0", "eval.generate.max_new_tokens: input should be greater"),
        ("eval.generate.top_p=0.9", "eval.generate.top_p: unknown key"),
    ],
)
def test_refusals_say_where(recipe_file: Path, tmp_path: Path, change: str, said: str) -> None:
    done = sift("train", recipe_file, "--out", tmp_path / "run", "--set", change)
    assert done.returncode == 2
    assert f"--set {change}: {said}" in done.stderr.replace("\n", " ")
