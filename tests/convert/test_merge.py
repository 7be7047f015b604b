"""Merged folders: equal to the trained model, ordinary, and turned back."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from sift_cli.convert import merge as merging
from sift_cli.convert.merge import merge
from sift_cli.convert.proof import reloaded_logits
from sift_cli.delta import Delta, load_delta, save_delta
from sift_cli.delta.file import weight_delta
from sift_cli.delta.identity import rest_fingerprints
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint, state_fingerprints
from sift_cli.models.shards import INDEX_FILE
from sift_cli.runs.tuned import load_tuned
from sift_cli.sparse import Support
from tests.support.command import Run
from tests.support.folders import shard
from tests.support.models import SIZE, save_base, tiny_model, tiny_tokenizer

# of a merge's report, in their order; others follow where more was asked for
KEYS = ["out", "base", "tensors", "changed", "bytes", "dropped", "lost", "rounded", "verified"]


def loads_clean(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def test_a_regression_scores_as_it_did_after_training(run: Run, data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        scored = [one | {"label": one["label"] + len(one["sentence"]) / 8} for one in rows]
        file.write_text("\n".join(map(json.dumps, scored)))
    changes = ["data.task=custom", "data.text=sentence", "data.label=label"]
    merged = merge(run(*changes), tmp_path / "merged", evaluate=True).proof
    assert "metrics" in merged.verified
    assert merged.metrics.keys() == {"pearson", "spearman", "loss"}
    # the weights are equal; where they lie in memory is not, nor then are the last bits of scores
    assert merged.metrics == pytest.approx(merged.metrics_trained, rel=1e-4)


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def same_files(base: Path, back: Path) -> None:
    assert names_in(base) == names_in(back)
    for name in names_in(base):
        assert (base / name).read_bytes() == (back / name).read_bytes(), name


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
    assert report.proof.verified == ["files", "logits"]
    assert report.proof.logits_difference == 0.0
    trained = load_tuned(str(delta))[0].model.state_dict()
    merged = loads_clean(tmp_path / "merged")
    assert {v.dtype for v in merged.parameters()} == {getattr(torch, dtype)}
    assert all(torch.equal(value, trained[name]) for name, value in merged.state_dict().items())
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names_in(tmp_path / "back")
    if dtype == "float32":
        same_files(base, tmp_path / "back")
        return
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "back"))
    assert list(before) == list(after)
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


def test_sharded_bases_stay_sharded_and_come_back(run: Run, base: Path, tmp_path: Path) -> None:
    whole = run()
    merge(whole, tmp_path / "merged")
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    files = shard(sharded, 3)
    # what lies beside the index is no part of the model
    shutil.copy(sharded / next(iter(files)), sharded / "model.fp16.safetensors")
    merge(whole, tmp_path / "again", base=str(sharded))
    written = {f.name: load_file(f) for f in (tmp_path / "again").glob("*.safetensors")}
    assert written.keys() == files.keys()
    for file, names in files.items():
        assert {f"bert.{name}" for name in names} == {*written[file]} - {
            "classifier.weight",
            "classifier.bias",
        }
    index = json.loads((tmp_path / "again" / INDEX_FILE).read_text())
    assert index["weight_map"] == {n: f for f, part in written.items() for n in part}
    sizes = [w.nbytes for part in written.values() for w in part.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    one, other = loads_clean(tmp_path / "merged"), loads_clean(tmp_path / "again")
    other_state = other.state_dict()
    assert all(torch.equal(v, other_state[n]) for n, v in one.state_dict().items())
    merge(whole, tmp_path / "back", base=str(tmp_path / "again"), undo=True)
    (sharded / "model.fp16.safetensors").unlink()
    same_files(sharded, tmp_path / "back")


def test_an_index_that_names_what_is_not_there(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run()
    files = shard(base, 2)
    index = json.loads((base / INDEX_FILE).read_text())
    for bad, said in (("gone.safetensors", "which is not there"), ("../x", "no plain file name")):
        broken = index | {"weight_map": {**index["weight_map"], "x": bad}}
        (base / INDEX_FILE).write_text(json.dumps(broken))
        with pytest.raises(SiftError, match=said) as caught:
            merge(delta, tmp_path / "merged")
        assert caught.value.code == ExitCode.WRONG_FILE
    (base / INDEX_FILE).write_text(json.dumps(index))
    last = base / [*files][1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(SiftError, match=r"damaged: .* bytes, and its header tells") as caught:
        merge(delta, tmp_path / "merged")
    assert caught.value.code == ExitCode.WRONG_FILE


def test_what_travels_with_the_model(run: Run, base: Path, tmp_path: Path) -> None:
    extra = {
        "generation_config.json": '{"max_length": 20}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "LICENSE": "as you like",
    }
    (base / "additional_chat_templates").mkdir()
    for name, text in extra.items():
        (base / name).write_text(text)
    (base / "modules.json").write_text("[]")  # of another library, for other files
    delta = run()
    merge(delta, tmp_path / "merged")
    for name, text in extra.items():
        assert (tmp_path / "merged" / name).read_text() == text
    for name in names_in(base) - {"config.json", "model.safetensors", "modules.json"}:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "merged/modules.json").exists()
    (base / "modules.json").unlink()
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    same_files(base, tmp_path / "back")


def test_a_tokenizer_without_padding_learns_it_and_forgets_it(run: Run, tmp_path: Path) -> None:
    base = save_base(tmp_path / "gpt", "gpt2")
    config = json.loads((base / "tokenizer_config.json").read_text())
    text = json.dumps(
        {k: v for k, v in config.items() if k != "pad_token"} | {"eos_token": "[SEP]"}
    )
    (base / "tokenizer_config.json").write_text(text)
    model = json.loads((base / "config.json").read_text())
    model["pad_token_id"] = None
    (base / "config.json").write_text(json.dumps(model))
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    delta = run(f"model.path={base}")
    merge(delta, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "[SEP]"
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    same_files(base, tmp_path / "back")


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
    report = merge(delta, tmp_path / "merged", base=str(old))
    assert report.dropped == ["cls.predictions.bias"]
    assert "cls.predictions.bias" not in load_file(tmp_path / "merged/model.safetensors")
    loads_clean(tmp_path / "merged")
    report = merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert not report.lost
    same_files(old, tmp_path / "back")
    aside = tmp_path / "merged/sift/dropped.safetensors"
    aside.write_bytes(aside.read_bytes()[:-1] + b"?")
    with pytest.raises(SiftError, match=r"damaged: cls.predictions.bias, aside in sift/"):
        merge(delta, tmp_path / "again", base=str(tmp_path / "merged"), undo=True)


def test_a_large_head_that_the_model_has_not_is_lost(run: Run, base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    extra = {"lm_head.weight": torch.ones(80_000, 16)}  # above 4 MiB
    save_file(weights | extra, base / "model.safetensors", metadata={"format": "pt"})
    delta = run()
    report = merge(delta, tmp_path / "merged")
    assert report.dropped == report.lost == ["lm_head.weight"]
    report = merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert report.lost == ["lm_head.weight"]
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in back.items())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_base_stored_narrower_than_trained_comes_back_as_it_was(
    stored: torch.dtype, run: Run, base: Path, tmp_path: Path
) -> None:
    weights = load_file(base / "model.safetensors")
    weights = {n: v.to(stored) if v.is_floating_point() else v for n, v in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    delta = run("model.dtype=float32")
    merge(delta, tmp_path / "merged")
    assert {v.dtype for v in loads_clean(tmp_path / "merged").parameters()} == {torch.float32}
    report = merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert not report.rounded
    same_files(base, tmp_path / "back")


def test_undo_of_a_folder_that_others_saved_anew(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run()
    merge(delta, tmp_path / "merged")
    anew = tmp_path / "anew"
    loads_clean(tmp_path / "merged").save_pretrained(anew)
    AutoTokenizer.from_pretrained(tmp_path / "merged").save_pretrained(anew)
    merge(delta, tmp_path / "back", base=str(anew), undo=True)
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "back"))
    assert after.keys() == {f"bert.{name}" for name in before}
    assert all(torch.equal(after[f"bert.{name}"], value) for name, value in before.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"format": 2},
        lambda record: record | {"headers": {"../x.safetensors": "{}"}},
        lambda record: record | {"texts": {"../x": "y"}},
        lambda record: record | {"headers": {"model.safetensors": "{"}},
        lambda record: record | {"names": {}},
        lambda record: [],
    ],
)
def test_a_damaged_record_is_refused(
    change: Callable[[dict[str, object]], object], run: Run, tmp_path: Path
) -> None:
    delta = run()
    merge(delta, tmp_path / "merged")
    file = tmp_path / "merged/sift/merge.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(SiftError) as caught:
        merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert caught.value.code == ExitCode.WRONG_FILE
    assert not list(tmp_path.glob("back*"))


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
    assert "the delta that this model has on it" in str(caught.value)
    assert "trained on." not in str(caught.value)
    gpt = save_base(tmp_path / "gpt", "gpt2")
    said = "is the base of a GPT2For.*, and the delta is of a BertFor.*; give the model that it was"
    with pytest.raises(SiftError, match=said) as caught:
        merge(delta, tmp_path / "merged", base=str(gpt))
    assert caught.value.code == ExitCode.WRONG_FILE


def test_a_base_whose_tensors_were_renamed_on_disk(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run()
    other = tmp_path / "other"
    shutil.copytree(base, other)
    held = load_file(base / "model.safetensors")
    renamed = {name.replace(".query.", ".q_proj."): one for name, one in held.items()}
    save_file(renamed, other / "model.safetensors")
    said = r"layer.0.attention.self.q_proj.weight for bert.\S*query.weight: rename them back"
    with pytest.raises(SiftError, match=said) as caught:
        merge(delta, tmp_path / "merged", base=str(other))
    assert caught.value.code == ExitCode.WRONG_FILE


def test_applying_twice_is_refused_and_undoing_the_base(
    run: Run, base: Path, tmp_path: Path
) -> None:
    delta = run()
    tiny_model("bert", torch.float32, outputs=2).save_pretrained(base)
    other = run(name="other")  # with a head in the base, all is there but the change
    with pytest.raises(SiftError, match="is not the merged model") as caught:
        merge(other, tmp_path / "back", base=str(base), undo=True)
    assert caught.value.code == ExitCode.WRONG_FILE
    save_base(base)
    merge(delta, tmp_path / "merged")
    with pytest.raises(SiftError, match="is not the base"):
        merge(delta, tmp_path / "twice", base=str(tmp_path / "merged"))


def test_existing_folders_and_missing_bases(run: Run, base: Path, tmp_path: Path) -> None:
    delta = run()
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").touch()
    for taken in (there, there / "mine"):
        with pytest.raises(SiftError, match="exists already"):
            merge(delta, taken)
    (there / "mine").unlink()
    merge(delta, there)  # an empty folder is as good as none
    loads_clean(there)
    with pytest.raises(SiftError, match="--undo needs --base"):
        merge(delta, tmp_path / "merged", undo=True)
    shutil.rmtree(base)
    with pytest.raises(SiftError, match="give the base with --base"):
        merge(delta, tmp_path / "merged")


def test_logits_that_differ_fail_verification(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    monkeypatch.setattr(merging, "reloaded_logits", lambda folder: reloaded_logits(folder) + 1.0)
    with pytest.raises(SiftError, match="logits differ") as caught:
        merge(delta, tmp_path / "merged")
    assert caught.value.code == ExitCode.NOT_VERIFIED
    assert not list(tmp_path.glob("merged*"))
    report = merge(delta, tmp_path / "merged", verify=False)
    assert report.proof.verified == []
    assert [*report.to_json()] == KEYS


def test_a_byte_that_the_disk_got_wrong(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    copy = merging.copy_side_files

    def flip(folder: Path, out: Path) -> None:
        copy(folder, out)
        file = out / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)

    monkeypatch.setattr(merging, "copy_side_files", flip)
    with pytest.raises(SiftError, match="1 tensor is not as written") as caught:
        merge(delta, tmp_path / "merged")
    assert caught.value.code == ExitCode.NOT_VERIFIED
    assert not list(tmp_path.glob("merged*"))


def test_a_full_disk_is_told_of_first(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    size = (base / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=size))
    monkeypatch.setattr(merging, "_write_weights", None)
    with pytest.raises(SiftError, match=r"needs 0.02 GB, and .* has 0.00 GB free; make room"):
        merge(delta, tmp_path / "deep/er/merged")
    assert not (tmp_path / "deep").exists()


def test_evaluate_scores_as_training_did(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run()
    report = merge(delta, tmp_path / "merged", evaluate=True)
    assert report.proof.verified == ["files", "logits", "metrics"]
    assert report.proof.metrics == report.proof.metrics_trained == load_delta(delta).header.metrics
    assert [*report.to_json()] == [*KEYS, "logits_difference", "metrics", "metrics_trained"]
    monkeypatch.setattr(merging, "score", lambda *args: {"accuracy": 2.0})
    with pytest.raises(SiftError, match=r"accuracy is 2.0000, and 0.\d+ after training") as caught:
        merge(delta, tmp_path / "again", evaluate=True)
    assert caught.value.code == ExitCode.NOT_VERIFIED


PEAK = """
import json, re, sys
from pathlib import Path
from transformers import BertForSequenceClassification
from sift_cli.convert.merge import merge

def peak():  # of this process alone: getrusage also counts the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
report = merge(Path(sys.argv[1]), Path(sys.argv[2]), base=sys.argv[3])
print(json.dumps({"imports": before, "peak": peak(), "verified": report.proof.verified}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's peak")
def test_memory_stays_near_the_largest_tensor(run: Run, tmp_path: Path) -> None:
    """A model of 300 MB in several files, whose largest tensor has 17 MB."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=SIZE,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    model = model.to_empty(device="cpu")
    weights, dense = {}, {}
    for name, weight in model.named_parameters():
        weight.data = (
            torch.randn(1024)
            .repeat(weight.numel() // 1024 + 1)[: weight.numel()]
            .view(weight.shape)
        )
        weight.data *= 0.02
        if name.startswith("classifier"):
            dense[name] = weight.data
        elif weight.numel() > 1e6:
            support = Support.of(weight.shape, torch.randint(weight.numel(), (20_000,)).unique())
            before = weight.data.clone()
            support.scatter_(before, support.gather(before) + 0.001)
            values = [support.gather(one) for one in (weight, before)]
            weights[name] = weight_delta(support, *values, fingerprint(weight), before)
    base = tmp_path / "large"
    model.base_model.save_pretrained(base, max_shard_size="80MB")
    tiny_tokenizer().save_pretrained(base)
    total = sum(weight.nbytes for weight in model.parameters())
    largest = max(weight.nbytes for weight in model.parameters())
    rest = rest_fingerprints(state_fingerprints(model, dense), weights)
    del model
    assert len(list(base.glob("*.safetensors"))) >= 4
    header = load_delta(run()).header.model_copy(update={"logits": None})
    delta = tmp_path / "large.safetensors"
    save_delta(delta, Delta(weights, dense, rest, header))
    args = [sys.executable, "-c", PEAK, delta, tmp_path / "merged", base]
    done = subprocess.run([*map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert total > 300e6
    grown = found["peak"] - found["imports"]
    assert 0 < grown < 3 * largest + 100e6, found
    assert grown < total / 2, found
    assert found["verified"] == ["files"]  # no logits were made
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "merged")
