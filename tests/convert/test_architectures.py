"""Every architecture through the whole pipeline: train, merge, plain transformers, undo."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sift_cli.analysis.plan import plan
from sift_cli.convert.difference import difference
from sift_cli.convert.merge import merge
from sift_cli.delta.file import load_delta
from sift_cli.models.devices import pick_device
from sift_cli.models.keys import match
from sift_cli.models.loading import skeleton
from sift_cli.recipe import load_recipe
from sift_cli.runs.tuned import load_tuned, task_of_loaded
from sift_cli.tasks.evaluation import Asking
from tests.support.architectures import EXPERTS, MAKERS, save_checkpoint
from tests.support.command import Run, sift
from tests.support.folders import shard

TEXTS = ["good film", "the room was cold and we never liked it", "bad"]
BOTH = "selection.target=[all-linear, experts]"


def probabilities(folder: Path) -> list[float]:
    """What sift predicts with what is in the folder, a text at a time."""
    loaded, recipe = load_tuned(str(folder))
    task, device = task_of_loaded(loaded, recipe), pick_device("cpu")
    asked = [task.predict(loaded, [text], asking=Asking(device)) for text in TEXTS]
    return [one.answers[0]["probability"] for one in asked]


@torch.no_grad()
def by_transformers(folder: Path) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    return [float(model(**row).logits[0].softmax(-1).max()) for row in rows]


@pytest.mark.parametrize("name", MAKERS)
def test_exact_from_training_to_undo(run: Run, base: Path, tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path / name, name)
    more = [BOTH] if name in EXPERTS else []
    delta = run(f"model.path={folder}", "train.max_steps=2", "train.warmup=0", *more)
    merged = merge(delta, tmp_path / "merged")
    assert merged.proof.verified == ["files", "logits"]
    assert merged.proof.logits_difference == 0
    changed = load_delta(delta).weights
    assert merged.changed == len(changed)
    assert any("expert" in one for one in changed) == (name in EXPERTS)
    trained = probabilities(delta.parent)
    assert trained == pytest.approx(probabilities(tmp_path / "merged"), abs=1e-6)
    assert trained == pytest.approx(by_transformers(tmp_path / "merged"), abs=1e-6)
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert merged.lost == []
    for file in folder.iterdir():
        if file.name != "generation_config.json":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", EXPERTS)
def test_merged_experts_have_the_names_of_the_base(run: Run, tmp_path: Path, name: str) -> None:
    """Each in a tensor of its own, as other programs read them."""
    folder = save_checkpoint(tmp_path / name, name)
    before = load_file(folder / "model.safetensors")
    assert sum(".experts.1." in key for key in before) == 6
    merge(run(f"model.path={folder}", BOTH), tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    prefix = "" if name == "mixtral" else "model."
    kept = {prefix + key for key in before} - {"lm_head.weight"}
    assert {*after} == kept | {"score.weight"}
    moved = [key for key in kept if not torch.equal(after[key], before[key.removeprefix(prefix)])]
    assert sum(".experts." in key for key in moved) > 4


def test_experts_in_several_files_and_as_a_difference(run: Run, base: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "moe", "mixtral")
    delta = run(f"model.path={folder}", BOTH, "train.warmup=0")
    merge(delta, tmp_path / "whole")
    shard(folder, 3)
    merge(delta, tmp_path / "merged")
    names = [file.name for file in sorted((tmp_path / "merged").glob("*.safetensors"))]
    assert len(names) == 3
    parts = {k: one for name in names for k, one in load_file(tmp_path / "merged" / name).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], one) for key, one in whole.items())
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    found = difference(str(folder), str(tmp_path / "merged"), tmp_path / "x.safetensors")
    assert found.origin.exact
    again = load_delta(tmp_path / "x.safetensors").weights
    assert again.keys() <= load_delta(delta).weights.keys()
    assert any("experts" in name for name in again)


def test_tensors_put_together_come_apart_as_they_were(tmp_path: Path) -> None:
    for name in EXPERTS:
        folder = save_checkpoint(tmp_path / name, name)
        tensors = load_file(folder / "model.safetensors")
        loaded, _ = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        state = loaded.state_dict()
        matched = match(skeleton(loaded.config, AutoModelForSequenceClassification), tensors)
        assert len({*map(id, matched.joined.values())}) == 4
        for joined in matched.joined.values():
            parts = {key: tensors[key] for key in joined.keys}
            made = joined.load(parts)
            assert all(torch.equal(one, state[key]) for key, one in made.items())
            back = joined.store(made)
            assert all(torch.equal(back[key], one) for key, one in parts.items())


def test_what_all_linear_leaves_out_is_told(recipe_file: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "moe", "mixtral")
    recipe = load_recipe(recipe_file, [f"model.path={folder}", "train.max_steps=1"])
    left = plan(recipe)["left_out"]
    assert left["mlp.experts.gate_up_proj"]["of"] == 2 * 4 * 2 * 32 * 16
    assert left["mlp.experts.down_proj"]["of"] == 2 * 4 * 16 * 32
    done = sift(
        "train",
        recipe_file,
        "--out",
        tmp_path / "run",
        "--set",
        f"model.path={folder}",
        "--set",
        "train.max_steps=1",
    )
    assert "all-linear leaves out" in done.stderr
    assert "selection.target: [all-linear, " in done.stderr
    assert "mlp.experts.gate_up_proj" in done.stderr
    named = load_recipe(recipe_file, [f"model.path={folder}", BOTH])
    assert not any("experts" in kind for kind in plan(named)["left_out"])
    bert = plan(load_recipe(recipe_file, []))
    assert bert["left_out"] == {}
    assert json.dumps(bert)
