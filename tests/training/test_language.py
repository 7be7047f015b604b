"""Language models through the same loop: a tiny one trains, is scored, merged, and answers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sift_cli.analysis.plan import plan
from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import open_session
from sift_cli.selection.targets import choose_weights
from sift_cli.training import train
from sift_cli.training.batches import steps_of
from sift_cli.training.step import add_gradient
from tests.support.chats import CHATS, save_chat_recipe, write_chats
from tests.support.command import sift
from tests.support.models import save_base


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A recipe of a tiny Llama with an untied head, and chats to learn from."""
    return save_chat_recipe(tmp_path)


def packed(path: Path) -> Recipe:
    """The recipe with packed rows in place of padded ones."""
    text = path.read_text().replace("batch_size: 4", "tokens: 256")
    path = path.with_name("packed.yaml")
    path.write_text(text)
    return load_recipe(path)


def test_a_run_learns_and_merges_and_answers(chat: Path, tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    found = train(load_recipe(chat, ["train.max_steps=30", "log.report=true"]), run)
    assert list(found.metrics) == ["loss", "perplexity", "token_accuracy"]
    assert found.metrics["loss"] < found.metrics_before["loss"] - 0.05  # type: ignore[operator]
    assert found.dense_entries == 0
    merge([run / "delta.safetensors"], merged)
    again = sift("eval", merged, "--recipe", run / "recipe.yaml", "--json")
    assert json.loads(again.stdout)["metrics"] == found.metrics
    asked = json.loads(sift("predict", run, "what is 1 and 2?", "--json").stdout)["predictions"]
    assert [set(one) for one in asked] == [{"text", "answer", "tokens", "ended"}]
    changed = {
        name
        for name, tensor in load_file(merged / "model.safetensors").items()
        if not torch.equal(tensor, load_file(chat.parent / "base/model.safetensors")[name])
    }
    assert changed
    assert not any("lm_head" in name or "embed" in name for name in changed)


def test_packed_rows_make_the_loss_and_gradient_of_padded_ones(chat: Path) -> None:
    sums = []
    for recipe in (load_recipe(chat), packed(chat)):
        session = open_session(recipe, device="cpu")
        session.model.double().eval().requires_grad_(True)
        mean = add_gradient(session, [list(range(8))])
        sums.append((mean, [weight.grad.clone() for weight in session.model.parameters()]))
    (mean, gradients), (other, others) = sums
    torch.testing.assert_close(mean, other, rtol=1e-7, atol=0)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


def test_a_packed_run(chat: Path, tmp_path: Path) -> None:
    found = train(packed(chat), tmp_path / "run")
    assert found.metrics["loss"] < found.metrics_before["loss"]  # type: ignore[operator]


def test_the_head_is_no_target_and_nothing_of_it_is_new(chat: Path) -> None:
    recipe = load_recipe(chat)
    session = open_session(recipe, device="cpu")
    assert session.new == ()
    sparse, whole = choose_weights(session.model, "all-linear", [], [], ())
    assert whole == []
    assert not any(name.startswith("lm_head") for name in sparse)
    named, _ = choose_weights(session.model, ["lm_head"], [], [], ())
    assert named == ["lm_head.weight"]  # who asks for it gets it
    said = plan(recipe)
    assert said["dense_entries"] == 0
    assert said["head_start"]["kind"] == "random"


def test_rows_that_are_dropped_are_told(chat: Path, tmp_path: Path) -> None:
    long = [[("user", "why? " * 60), ("assistant", "so")]]
    write_chats(tmp_path / "chats/train.jsonl", CHATS + long)
    done = sift("train", chat, "--out", tmp_path / "run")
    assert done.returncode == 0
    assert "train: 1 rows dropped: too long\n" in done.stderr
    lines = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(8))


def test_another_kind_of_model_is_refused(chat: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "bert", "bert")
    with pytest.raises(SiftError, match="needs a causal language model, and the model is BertM"):
        open_session(load_recipe(chat, [f"model.path={base}"]), device="cpu")


def test_without_packs_the_steps_are_the_same(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that takes none, as GPT-2-like ones: the rows, the loss, and what is computed."""
    from sift_cli.tasks import language

    recipe = packed(chat)
    taken = open_session(recipe, device="cpu")
    monkeypatch.setattr(language, "why_not_packed", lambda model: "it takes none")
    session = open_session(recipe, device="cpu")
    assert session.notes == ("train.packing: off for LlamaForCausalLM: it takes none",)
    losses = []
    for one, key in ((taken, "position_ids"), (session, "attention_mask")):
        assert one.train is not None
        one.model.double().eval()
        rows = next(iter(steps_of(recipe.train, one.train.lengths, one.task.packs)))
        assert key in one.collate(one.train.take(rows[0]))
        losses.append(add_gradient(one, rows))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=0)


def test_evaluation_pads(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of like length: end to end attention would cost the square of the batch."""
    session = open_session(packed(chat), device="cpu")
    monkeypatch.setattr(
        "sift_cli.tasks.language.packed", lambda rows: pytest.fail("an evaluation packs")
    )
    assert session.task.packs
    assert session.evaluate()["loss"]
