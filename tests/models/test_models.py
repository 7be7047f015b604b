"""Models: where they lie, what they were given anew, and what they refuse."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.devices import pick_device
from sift_cli.models.loading import (
    check_length,
    drawn,
    load_model,
    load_tokenizer,
    model_folder,
    on_meta,
)
from sift_cli.models.shards import weight_files, write_index
from sift_cli.tasks.classification import task_of_labels
from sift_cli.tasks.kinds import load_as_it_is
from tests.support.models import ARCHITECTURES, SIZE, save_base, tiny_model, tiny_tokenizer

NEW = {
    "bert": ("classifier.weight", "classifier.bias"),
    "roberta": (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ),
    "distilbert": (
        "pre_classifier.weight",
        "pre_classifier.bias",
        "classifier.weight",
        "classifier.bias",
    ),
    "deberta-v2": (
        "pooler.dense.weight",
        "pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ),
    "gpt2": ("score.weight",),
    "llama": ("score.weight",),
}
RESIZED = {  # what depends on the number of labels
    name: new[-2:] if "classifier" in new[-1] else new for name, new in NEW.items()
}


AUTO = AutoModelForSequenceClassification


def configured(folder: Path, labels: list[str] | None) -> PretrainedConfig:
    """The folder's configuration for a task with these labels."""
    return task_of_labels(labels).configure(folder)


def save_whole(folder: Path, architecture: str = "bert") -> Path:
    """A folder whose model has a head of three outputs."""
    tiny_model(architecture, torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def set_tokenizer(folder: Path, **special: str) -> Path:
    """Replaces the tokenizer by one with these special tokens alone."""
    for file in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        file.unlink()
    inner = tiny_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


def set_config(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


# Where they lie


def test_a_local_folder_and_one_inside_a_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_folder(str(base)) == base
    package = tmp_path / "packed_model"
    save_base(package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert model_folder("pkg:packed_model/model") == package / "model"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./none", "./none: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        ("/none", "/none: no such folder"),
        ("pkg:json/none", "pkg:json/none: no such folder"),
        ("pkg:json", "pkg:json holds no config.json"),
        ("pkg:nope/model", "pkg:nope/model: no installed package nope; `pip install 'sift-cli["),
        ("pkg:nope.sub/model", "pkg:nope.sub/model: no installed package nope; `pip install"),
        ("pkg:json.decoder/x", "pkg:json.decoder/x: no such folder"),
        ("pkg:", "pkg:: no installed package ; `pip"),
        ("pkg:.x/y", "pkg:.x/y: no installed package ; `pip"),
        ("pkg:json/../email", "pkg:json/../email lies outside the package json"),
        ("pkg:json//etc", "pkg:json//etc lies outside the package json"),
        ("no-such-model", "no-such-model is no local folder, and the hub said: Cannot find"),
        ("nobody/no-such", "nobody/no-such is no local folder, and the hub said: Cannot find"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, said: str) -> None:
    with pytest.raises(SiftError) as caught:
        model_folder(path)
    assert str(caught.value).startswith(f"model.path: {said}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(SiftError, match=f"^model.path: {tmp_path} holds no config.json$"):
        model_folder(str(tmp_path))


def test_weight_files_come_in_order(tmp_path: Path) -> None:
    names = [f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    for name in [*reversed(names), "other.safetensors", "pytorch_model.bin"]:
        (tmp_path / name).touch()
    write_index(tmp_path, {"a": (names[1], 1), "b": (names[0], 1), "c": (names[2], 1)})
    assert [file.name for file in weight_files(tmp_path)] == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_is_drawn_alone_as_it_is_in_loading(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", architecture)
    config = AutoConfig.from_pretrained(base, num_labels=3)
    torch.manual_seed(5)
    loaded = load_model(base, AUTO, config, dtype, new_head=True)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    alone = drawn(on_meta(base, AUTO, config, dtype), loaded.new)
    assert tuple(alone) == loaded.new
    for name, weight in alone.items():
        assert torch.equal(weight, loaded.model.get_parameter(name))
    assert any(bool(weight.any()) for weight in alone.values())
    assert torch.equal(torch.get_rng_state(), after)


def test_shards_without_their_index_are_no_model(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-00002-of-00003.safetensors")
    said = f"^{base} holds 1 of 3 shards and no model.safetensors.index.json; copy the whole folder"
    with pytest.raises(SiftError, match=said) as caught:
        load_as_it_is(base)
    assert caught.value.code == ExitCode.WRONG_FILE


def test_pickled_weights_are_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    said = f"^{base}: no model\\*.safetensors; sift reads no pickled weights$"
    with pytest.raises(SiftError, match=said):
        load_as_it_is(base)


@pytest.mark.parametrize("kept", [slice(100), slice(-100)], ids=["header", "data"])
def test_cut_weights_are_a_damaged_file(base: Path, kept: slice) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(SiftError, match=f"^{base}: damaged weights: ") as caught:
        load_as_it_is(base)
    assert caught.value.code == ExitCode.WRONG_FILE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a valid JSON file"),
        ("{}", "Should have a `model_type` key"),
        (
            '{"model_type": "bert", "hidden_size": "wide"}',
            "Validation error for field 'hidden_size'",
        ),
    ],
)
def test_an_unusable_configuration_is_one_line(base: Path, content: str, said: str) -> None:
    (base / "config.json").write_text(content)
    for load in (load_as_it_is, load_tokenizer, lambda folder: configured(folder, None)):
        with pytest.raises(SiftError, match=said) as caught:
            load(base)
        assert str(caught.value).startswith(f"{base}: ")
        assert "\n" not in str(caught.value)


def test_an_architecture_without_a_classification_head(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(SiftError, match=r"CLIPConfig.* for this kind of AutoModel"):
        load_as_it_is(base)


# What they were given anew


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_that_a_backbone_lacks_is_new(tmp_path: Path, architecture: str) -> None:
    folder = save_base(tmp_path / "base", architecture)
    loaded = load_model(folder, AUTO, configured(folder, ["a", "b"]), torch.float32, new_head=True)
    assert loaded.new == NEW[architecture]
    saved = tiny_model(architecture, torch.float32).base_model.state_dict()
    held = loaded.model.base_model.state_dict()
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[name], held[name]) for name in saved)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_of_the_right_size_is_not_new(tmp_path: Path, architecture: str) -> None:
    folder = save_whole(tmp_path / "whole", architecture)
    loaded = load_model(folder, AUTO, configured(folder, ["a", "b", "c"]))
    assert loaded.new == ()
    saved = tiny_model(architecture, torch.float32).state_dict()
    held = loaded.model.state_dict()
    assert all(torch.equal(saved[name], held[name]) for name in saved)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_of_another_size_is_new(tmp_path: Path, architecture: str) -> None:
    folder = save_whole(tmp_path / "whole", architecture)
    loaded = load_model(folder, AUTO, configured(folder, ["a", "b"]), new_head=True)
    assert loaded.new == RESIZED[architecture]
    weights = dict(loaded.model.named_parameters())
    assert len(weights[loaded.new[0]]) == 2


def test_the_head_fits_the_task(base: Path) -> None:
    config = configured(base, ["bad", "fine", "good"])
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")
    assert config.id2label == {0: "bad", 1: "fine", 2: "good"}
    assert config.label2id == {"bad": 0, "fine": 1, "good": 2}
    regression = configured(base, None)
    assert (regression.num_labels, regression.problem_type) == (1, "regression")


def test_the_dtype_is_that_of_the_folder_unless_given(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "half", dtype=torch.bfloat16)
    assert load_model(folder, AUTO, new_head=True).model.dtype == torch.bfloat16
    assert load_model(folder, AUTO, dtype=torch.float32, new_head=True).model.dtype == torch.float32


def test_loading_says_nothing(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even of a head of three labels that makes way for one of two."""
    folder = save_whole(tmp_path / "whole")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    capfd.readouterr()
    load_model(folder, AUTO, configured(folder, ["a", "b"]), new_head=True)
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


# Tokenizers


def test_a_folder_without_a_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SiftError, match=f"^{base} holds no tokenizer; copy its files beside"):
        load_as_it_is(base)


@pytest.mark.parametrize("special", [{"eos_token": "[SEP]"}, {"unk_token": "[UNK]"}])
def test_a_tokenizer_without_a_padding_token_gets_one(
    tmp_path: Path, special: dict[str, str]
) -> None:
    folder = set_tokenizer(save_base(tmp_path / "gpt2", "gpt2"), **special)
    set_config(folder, pad_token_id=None)
    loaded = load_model(folder, AUTO, new_head=True)
    (token,) = special.values()
    assert loaded.tokenizer.pad_token == token
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    folder = set_tokenizer(save_base(tmp_path / "gpt2", "gpt2"))
    set_config(folder, pad_token_id=None)
    with pytest.raises(SiftError, match=f"^{folder}: the tokenizer has no token to pad with"):
        load_tokenizer(folder)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("special", "code"),
    [
        ({"eos_token": "[SEP]"}, 0),
        ({"eos_token": "[SEP]"}, None),
        ({"pad_token": "[PAD]", "eos_token": "[SEP]"}, 1),
        ({"pad_token": "[PAD]", "eos_token": "[SEP]"}, None),
    ],
)
def test_padding_changes_no_logits(
    tmp_path: Path, architecture: str, special: dict[str, str], code: int | None
) -> None:
    """These heads find the last token of a row by the padding that the configuration names."""
    folder = set_tokenizer(save_base(tmp_path / "base", architecture), **special)
    set_config(folder, pad_token_id=code)
    loaded = load_model(folder, AUTO, configured(folder, ["a", "b"]), torch.float64, new_head=True)
    model = loaded.model.eval()
    rows = [[5, 6, 7], [5, 6, 7, 8, 9, 10]]
    collate = DataCollatorWithPadding(loaded.tokenizer)
    with torch.no_grad():
        together = model(**collate([{"input_ids": row} for row in rows])).logits
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(together, alone)


def test_a_padding_code_outside_the_vocabulary_is_not_taken(base: Path) -> None:
    set_config(base, pad_token_id=SIZE + 7)
    assert load_tokenizer(base).pad_token == "[PAD]"


# Lengths and devices


@pytest.mark.parametrize(
    ("architecture", "longest"),
    [("bert", 512), ("roberta", 39), ("distilbert", 512), ("deberta-v2", 512), ("gpt2", 64)],
)
def test_the_longest_row_is_what_the_model_has_positions_for(
    architecture: str, longest: int
) -> None:
    model, tokenizer = tiny_model(architecture, torch.float32), tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    check_length(longest, model, tokenizer)
    said = f"^data.max_length: {longest + 1}, but the model takes {longest} tokens$"
    with pytest.raises(SiftError, match=said):
        check_length(longest + 1, model, tokenizer)
    ids = torch.full((1, longest), 5)
    with torch.no_grad():
        model(input_ids=ids)
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=torch.full((1, longest + 1), 5))


def test_the_tokenizer_may_allow_less_than_the_model() -> None:
    model, tokenizer = tiny_model("bert", torch.float32), tiny_tokenizer()
    check_length(32, model, tokenizer)
    with pytest.raises(SiftError, match=r"^data.max_length: 33, but the model takes 32 tokens$"):
        check_length(33, model, tokenizer)


def test_a_model_without_positions_takes_any_length() -> None:
    config = XLNetConfig(vocab_size=SIZE, d_model=16, n_layer=1, n_head=2, d_inner=16)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    check_length(100_000, XLNetForSequenceClassification(config), tokenizer)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that so many GPUs are there."""

    def pretend(gpus: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_the_best_device_is_taken(machine: Any) -> None:
    for gpus, mps, kind in ((1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        machine(gpus, mps)
        assert pick_device(None) == torch.device(kind)


def test_a_device_by_name(machine: Any) -> None:
    machine(2)
    for name in ("cpu", "cuda", "cuda:1"):
        assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("gpus", "name", "said"),
    [
        (0, "gpu", "--device gpu: no such device; use cuda, mps or cpu"),
        (0, "cuda:x", "--device cuda:x: no such device; use cuda, mps or cpu"),
        (0, "cuda", "--device cuda: not on this machine; there is cpu"),
        (0, "mps", "--device mps: not on this machine; there is cpu"),
        (0, "meta", "--device meta: not on this machine; there is cpu"),
        (2, "cuda:2", "--device cuda:2: not on this machine; there is cuda, cpu"),
    ],
)
def test_a_device_that_is_not_there(machine: Any, gpus: int, name: str, said: str) -> None:
    machine(gpus)
    with pytest.raises(SiftError) as caught:
        pick_device(name)
    assert str(caught.value) == said
