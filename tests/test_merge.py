"""Merged folders: equal to the trained model, ordinary, and turned back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_base, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sift_cli.delta import merge, merging
from sift_cli.delta.tuned import load_tuned
from sift_cli.errors import ExitCode, SiftError
from sift_cli.evaluation import probe_logits
from sift_cli.recipe import load_recipe
from sift_cli.training import train

Run = Callable[..., Path]


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Run:
    def go(*changes: str, name: str = "run") -> Path:
        short = ["train.max_steps=3", *changes]
        train(load_recipe(recipe_file, short), tmp_path / name, overwrite=True)
        return tmp_path / name / "delta.safetensors"

    return go


def loads_clean(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama"]
)
def test_merged_folder_is_the_trained_model_and_undo_the_base(
    architecture: str, dtype: str, run: Run, tmp_path: Path
) -> None:
    base = save_base(tmp_path / architecture, architecture)
    delta = run(f"model.path={base}", f"model.dtype={dtype}", "selection.target=all")
    report = merge(delta, tmp_path / "merged")
    assert report["verified"] == "logits"
    assert report["logits_difference"] == 0.0
    trained = load_tuned(str(delta))[0].model.state_dict()
    merged = loads_clean(tmp_path / "merged")
    assert {v.dtype for v in merged.parameters()} == {getattr(torch, dtype)}
    assert all(torch.equal(value, trained[name]) for name, value in merged.state_dict().items())
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    before = load_file(base / "model.safetensors")
    after = {}
    for name, value in load_file(tmp_path / "back/model.safetensors").items():
        after[name.split(".", 1)[1] if name not in before else name] = value
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.to(getattr(torch, dtype)), after[name]), name


def test_the_folder_is_ordinary(run: Run, tmp_path: Path) -> None:
    merge(run(), tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["problem_type"] == "single_label_classification"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("good film")["input_ids"][0] == 2
    assert not list(tmp_path.glob("merged.partial"))


def test_sharded_bases_stay_sharded(run: Run, base: Path, tmp_path: Path) -> None:
    whole = run()
    merge(whole, tmp_path / "merged")
    weights = load_file(base / "model.safetensors")
    names = sorted(weights)
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in parts.items():
        save_file({n: weights[n] for n in part}, sharded / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(whole, tmp_path / "again", base=str(sharded))
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == 2
    one, other = loads_clean(tmp_path / "merged"), loads_clean(tmp_path / "again")
    other_state = other.state_dict()
    assert all(torch.equal(v, other_state[n]) for n, v in one.state_dict().items())


def test_old_layer_norm_names_and_prefixed_checkpoints(
    run: Run, base: Path, tmp_path: Path
) -> None:
    delta = run()
    old = tmp_path / "old"
    shutil.copytree(base, old)
    weights = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in load_file(base / "model.safetensors").items()
    }
    weights["cls.predictions.bias"] = torch.zeros(3)
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    merge(delta, tmp_path / "merged", base=str(old))
    assert "cls.predictions.bias" not in load_file(tmp_path / "merged/model.safetensors")
    loads_clean(tmp_path / "merged")


def test_a_head_in_the_base_is_changed_not_replaced(run: Run, base: Path, tmp_path: Path) -> None:
    tiny_model("bert", torch.float32, outputs=2).save_pretrained(base)
    delta = run()
    merge(delta, tmp_path / "merged")
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "back"))
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert not torch.equal(merged["classifier.weight"], before["classifier.weight"])
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_wrong_base_is_refused_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    delta = run()
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(SiftError, match="is not the base of this delta") as caught:
        merge(delta, tmp_path / "merged", base=str(other))
    assert caught.value.code == ExitCode.WRONG_FILE
    assert "bert.encoder.layer.0.attention.self.query.weight" in str(caught.value)
    assert not list(tmp_path.glob("merged*"))
    with pytest.raises(SiftError, match="is not the merged model of this delta") as caught:
        merge(delta, tmp_path / "back", base=str(other), undo=True)
    assert caught.value.code == ExitCode.WRONG_FILE
    with pytest.raises(SiftError, match="lacks"):
        merge(delta, tmp_path / "merged", base=str(save_base(tmp_path / "gpt", "gpt2")))


def test_applying_twice_is_refused(run: Run, tmp_path: Path) -> None:
    delta = run()
    merge(delta, tmp_path / "merged")
    with pytest.raises(SiftError, match="is not the base"):
        merge(delta, tmp_path / "twice", base=str(tmp_path / "merged"))


def test_existing_folders_and_missing_bases(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run()
    (tmp_path / "there").mkdir()
    with pytest.raises(SiftError, match="exists already"):
        merge(delta, tmp_path / "there")
    with pytest.raises(SiftError, match="--undo needs --base"):
        merge(delta, tmp_path / "merged", undo=True)
    shutil.rmtree(base)
    with pytest.raises(SiftError, match="give the base with --base"):
        merge(delta, tmp_path / "merged")


def test_logits_that_differ_fail_verification(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    monkeypatch.setattr(merging, "probe_logits", lambda *args: probe_logits(*args) + 1.0)
    with pytest.raises(SiftError, match="logits differ") as caught:
        merge(delta, tmp_path / "merged")
    assert caught.value.code == ExitCode.NOT_VERIFIED
    assert not list(tmp_path.glob("merged*"))
    assert "verified" not in merge(delta, tmp_path / "merged", verify=False)
