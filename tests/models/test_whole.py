"""What of a model may be new, and what the files must hold; on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sift_cli.analysis.plan import plan
from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.models.loading import load_model
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.classification import task_of_labels
from tests.support.command import Run
from tests.support.folders import Weights, configure, edit
from tests.support.models import SIZE, save_base

AUTO = AutoModelForSequenceClassification
QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    """A change: the prefix before each key."""
    return lambda weights: {prefix + key: one for key, one in weights.items()}


def refused(recipe_file: Path) -> str:
    """What both the plan and the start of training say against the recipe."""
    recipe = load_recipe(recipe_file, [])
    said = []
    for ask in (lambda: plan(recipe), lambda: open_session(recipe)):
        with pytest.raises(SiftError) as caught:
            ask()
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


def test_a_tensor_that_is_not_there(base: Path, recipe_file: Path) -> None:
    edit(base, lambda w: {key: one for key, one in w.items() if key != QUERY})
    said = refused(recipe_file)
    assert f"1 tensor would be random:\n  bert.{QUERY}: not there\n" in said
    assert said.endswith("save or download the model anew.")


def test_a_tensor_of_another_name(base: Path, recipe_file: Path) -> None:
    edit(base, lambda w: w.update({"encoder.layer.0.q.weight": w.pop(QUERY)}))
    said = refused(recipe_file)
    assert f"bert.{QUERY}: not there" in said
    assert "no use for, such as encoder.layer.0.q.weight: they have other names" in said


@pytest.mark.parametrize("size", [None, 8])
def test_a_configuration_of_other_sizes(base: Path, recipe_file: Path, size: int | None) -> None:
    configure(base, hidden_size=size, num_attention_heads=2)
    said = refused(recipe_file)
    assert f"{WORDS}: [{SIZE}, 16] in the files, [{SIZE}, {size or 768}] by config.json" in said
    assert "config.json is not that of these weights" in said


def test_a_vocabulary_that_the_configuration_does_not_know(base: Path, recipe_file: Path) -> None:
    edit(base, lambda w: w.update({WORDS: torch.cat([w[WORDS], torch.zeros(3, 16)])}))
    assert f"set its vocab_size to {SIZE + 3}" in refused(recipe_file)
    configure(base, vocab_size=SIZE + 3)
    open_session(load_recipe(recipe_file, []))


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "model.",
        "_orig_mod.module.",
        "base_model.model.",
        "module.bert.",
        "0.auto_model.",
    ],
)
def test_what_trainers_put_before_the_names(
    base: Path, tmp_path: Path, run: Run, prefix: str
) -> None:
    wrapped = edit(save_base(tmp_path / "wrapped"), prefixed(prefix))
    plain, other = run(name="plain"), run(f"model.path={wrapped}", name="other")
    weights = [merge(one, tmp_path / f"m-{one.parent.name}") and one for one in (plain, other)]
    one, two = (
        load_file(tmp_path / f"m-{delta.parent.name}" / "model.safetensors") for delta in weights
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    AUTO.from_pretrained(tmp_path / "m-other")
    merge(other, tmp_path / "back", base=str(tmp_path / "m-other"), undo=True)
    for file in wrapped.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_trainers_put_between_the_names(base: Path) -> None:
    plain = load_file(base / "model.safetensors")
    edit(
        base,
        lambda w: {
            "module."
            + key.replace("layer.0.", "layer.0._fsdp_wrapped_module.").replace(
                "attention.self.", "attention._checkpoint_wrapped_module.self."
            ): one
            for key, one in w.items()
        },
    )
    state = load_model(base, AUTO, new_head=True).model.base_model.state_dict()
    assert all(torch.equal(state[key], one) for key, one in plain.items())


def test_a_prefix_that_nobody_knows(base: Path, recipe_file: Path) -> None:
    edit(base, prefixed("teacher."))
    assert "They are there with 'teacher.' before their names" in refused(recipe_file)


def test_a_base_without_a_head_is_not_evaluated(base: Path) -> None:
    with pytest.raises(SiftError, match=r"not there\nThese are its head, so it has not been tr"):
        load_tuned(str(base))


def test_a_head_of_another_name_is_not_taken_for_none(tmp_path: Path, run: Run) -> None:
    merge(run("train.max_steps=1"), tmp_path / "merged")
    edit(tmp_path / "merged", lambda w: w.update({"cls.weight": w.pop("classifier.weight")}))
    edit(tmp_path / "merged", lambda w: w.update({"cls.bias": w.pop("classifier.bias")}))
    with pytest.raises(SiftError, match=r"If cls\.\w+ is one of them, rename it"):
        load_tuned(str(tmp_path / "merged"))


def test_a_wrapped_model_is_evaluated_as_it_is(tmp_path: Path, run: Run) -> None:
    merge(run(), tmp_path / "merged")
    before = load_tuned(str(tmp_path / "merged"))[0].model.state_dict()
    edit(tmp_path / "merged", prefixed("_orig_mod."))
    after = load_tuned(str(tmp_path / "merged"))[0].model.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_a_pooler_is_part_of_the_head(base: Path, recipe_file: Path) -> None:
    edit(base, lambda w: {key: one for key, one in w.items() if "pooler" not in key})
    assert open_session(load_recipe(recipe_file, [])).new == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )


def test_the_head_of_a_language_model_is_never_new(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "llama", "llama")
    with pytest.raises(SiftError, match=r"lm_head.weight: not there"):
        load_model(folder, AutoModelForCausalLM)


def test_layers_that_the_configuration_leaves_out_are_told(base: Path) -> None:
    assert load_model(base, AUTO, new_head=True).notes == ()
    configure(base, num_hidden_layers=1)
    (note,) = load_model(base, AUTO, new_head=True).notes
    assert "fewer layers than the files hold: 16 tensors left out (encoder.layer.1." in note


def test_quantised_bases_are_refused(base: Path, recipe_file: Path) -> None:
    edit(base, lambda w: w.update({QUERY + "_scale_inv": torch.ones(1, 1)}))
    assert "holds quantised weights: 1 tensor such as encoder.layer.0" in refused(recipe_file)
    configure(base, quantization_config={"quant_method": "fp8"})
    assert "is quantised (fp8)" in refused(recipe_file)
    with pytest.raises(SiftError, match="is quantised"):
        task_of_labels(("a", "b")).configure(base)


def test_a_tensor_in_two_files(base: Path, tmp_path: Path, recipe_file: Path, run: Run) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    files = [f"model-0000{at}-of-00002.safetensors" for at in (1, 2)]
    halves = [{n: weights[n] for n in names[::2]}, {n: weights[n] for n in names[1::2]}]
    halves[1][names[0]] = weights[names[0]]  # as savers of shared tensors write it
    for file, half in zip(files, halves, strict=True):
        save_file(half, base / file, {"format": "pt"})
    index = {name: files[at % 2] for at, name in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    delta = run()
    merge(delta, tmp_path / "merged")
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    for file in base.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    halves[1][names[0]] = weights[names[0]] + 1
    save_file(halves[1], base / files[1], {"format": "pt"})
    assert f"holds {names[0]} twice, with other values in {files[0]}" in refused(recipe_file)


def test_an_adapter_beside_the_model(base: Path, recipe_file: Path) -> None:
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds a PEFT adapter (adapter_config.json)" in refused(recipe_file)
    with pytest.raises(SiftError, match="holds a PEFT adapter"):
        load_tuned(str(base))


@pytest.mark.parametrize("hole", ["pooler.dense.bias", "classifier.bias"])
def test_a_hole_in_a_head_is_refused(
    run: Run, tmp_path: Path, recipe_file: Path, hole: str
) -> None:
    merge(run("train.max_steps=1"), tmp_path / "merged")
    edit(tmp_path / "merged", lambda w: {k: one for k, one in w.items() if not k.endswith(hole)})
    for ask in (plan, open_session):
        with pytest.raises(SiftError, match=rf"1 tensor would be random:\n.*{hole}: not there"):
            ask(load_recipe(recipe_file, [f"model.path={tmp_path / 'merged'}"]))
