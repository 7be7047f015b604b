"""Deltas of two dense models: exact, or the largest changes within the budget."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sift_cli.convert import pair as opening
from sift_cli.convert.difference import difference
from sift_cli.convert.merge import merge
from sift_cli.delta import load_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import LoadedModel, load_model
from sift_cli.runs.tuned import load_tuned
from sift_cli.selection.budget import share
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.kinds import load_as_it_is, task_of_config
from tests.support.command import sift
from tests.support.models import save_base, tiny_model, tiny_tokenizer

Change = Callable[[str, Tensor], Tensor]


def save_tuned(
    folder: Path,
    base: Path,
    architecture: str = "bert",
    dtype: torch.dtype = torch.float32,
    change: Change | None = None,
    seed: int = 5,
) -> Path:
    """The base with a new head and every backbone tensor changed as `change` says."""
    model = tiny_model(architecture, dtype, seed=seed)
    own = model.base_model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, value in load_file(base / "model.safetensors").items():
        moved = value + 0.1 * torch.randn(value.shape, generator=generator).to(value)
        own[name].copy_(change(name, value) if change else moved)
    model.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
    model.config.label2id = {"no": 0, "perhaps": 1, "yes": 2}
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return save_tuned(tmp_path / "tuned", base)


def backbone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("bert."): v for n, v in weights.items() if n.startswith("bert.")}


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder with other tensors."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def config_edited(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama"])
def test_an_exact_delta_merges_to_the_tuned_model_and_back(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", architecture, dtype)
    tuned = save_tuned(tmp_path / "tuned", base, architecture, dtype)
    out = tmp_path / "delta.safetensors"
    made = difference(str(base), str(tuned), out)
    assert made.origin.exact
    assert made.origin.norm_share == 1.0
    assert made.notes == []
    assert " ".join(made.to_json()) == (
        "out base tuned density scope exact changed norm norm_share dtype kept total_entries "
        "dense_entries dense delta_bytes delta_sha256 notes"
    )
    report = merge(out, tmp_path / "merged")
    assert report.proof.logits_difference == 0.0
    wanted, got = (load_file(f / "model.safetensors") for f in (tuned, tmp_path / "merged"))
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert list(config["id2label"].values()) == ["no", "perhaps", "yes"]
    merge(out, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "back/model.safetensors")
    plain = {n if n in before else n.partition(".")[2]: v for n, v in after.items()}
    assert plain.keys() == before.keys()
    assert all(torch.equal(plain[name], value) for name, value in before.items())


def test_few_changes_fit_any_density_and_stay_exact(base: Path, tmp_path: Path) -> None:
    def change(name: str, value: Tensor) -> Tensor:
        moved = value.clone()
        moved.view(-1)[-1] *= -1  # -0 of a bias that is 0: a change of bits, not of value
        return moved

    tuned = save_tuned(tmp_path / "tuned", base, change=change)
    out = tmp_path / "delta.safetensors"
    made = difference(str(base), str(tuned), out, density=0.001)
    assert made.origin.exact
    assert made.origin.changed == made.kept == len(load_file(base / "model.safetensors"))
    merge(out, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, value in load_file(tuned / "model.safetensors").items():
        assert torch.equal(merged[name].view(torch.int32), value.view(torch.int32)), name


@settings(deadline=None, max_examples=8)
@given(density=st.floats(0.0005, 1.0), scope=st.sampled_from(["tensor", "global"]))
def test_the_largest_changes_are_kept_in_exact_number(
    density: float, scope: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp = tmp_path_factory.mktemp("largest")
    base = save_base(tmp / "base")
    tuned = save_tuned(tmp / "tuned", base)
    made = difference(str(base), str(tuned), tmp / "d", density=density, scope=scope)
    before = load_file(base / "model.safetensors")
    after = backbone(load_file(tuned / "model.safetensors"))
    change = {name: (after[name] - value).abs().flatten() for name, value in before.items()}
    total = sum(len(one) for one in change.values())
    delta = load_delta(tmp / "d")
    kept = {name.removeprefix("bert."): w.support for name, w in delta.weights.items()}
    held = {name: s.gather(change[name].view(s.shape)) for name, s in kept.items()}
    if scope == "global":
        assert made.kept == delta.entries == share(density, total)
        floor = torch.cat(list(change.values())).sort(descending=True).values[made.kept - 1]
        assert all(float(one.min()) >= float(floor) for one in held.values())
    else:
        assert {n: len(one) for n, one in held.items()} == {
            n: share(density, len(one)) for n, one in change.items()
        }
        for name, one in held.items():
            best = change[name].sort(descending=True).values[: len(one)]
            assert torch.equal(one.sort(descending=True).values, best)
    squares = [sum(float((v.double() ** 2).sum()) for v in d.values()) for d in (held, change)]
    assert made.origin.norm_share == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)
    assert made.origin.exact == (made.kept == made.origin.changed)


def test_a_cut_delta_stands_for_base_plus_delta(base: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "delta.safetensors"
    made = difference(str(base), str(tuned), out, density=0.01)
    assert not made.origin.exact
    assert 0.01 < made.origin.norm_share < 0.5
    report = merge(out, tmp_path / "merged")
    assert report.proof.logits_difference == 0.0
    merged = load_as_it_is(tmp_path / "merged").model
    dense = load_as_it_is(tuned).model
    task = task_of_config(dense.config)
    assert not torch.allclose(probe(task, merged, merged.config), probe(task, dense, dense.config))
    assert torch.equal(merged.classifier.weight, dense.classifier.weight)  # new, so whole
    model, recipe = load_tuned(str(out))
    assert recipe is None
    assert model.model.config.id2label[2] == "yes"


def test_the_same_models_give_the_same_bytes(base: Path, tuned: Path, tmp_path: Path) -> None:
    one = difference(str(base), str(tuned), tmp_path / "one", density=0.02, scope="global")
    other = difference(str(base), str(tuned), tmp_path / "other", density=0.02, scope="global")
    assert one.delta_sha256 == other.delta_sha256


def test_a_recipe_beside_the_tuned_weights_travels(
    base: Path, tuned: Path, recipe_text: str, tmp_path: Path
) -> None:
    (tuned / "recipe.yaml").write_text(recipe_text)
    difference(str(base), str(tuned), tmp_path / "delta")
    recipe = load_tuned(str(tmp_path / "delta"))[1]
    assert recipe is not None
    assert recipe.data.task == load_delta(tmp_path / "delta").header.task == "sst2"


def test_dtypes_must_be_named_where_they_differ(base: Path, tmp_path: Path) -> None:
    tuned = save_tuned(tmp_path / "tuned", base)
    half = edited(
        tuned, tmp_path / "half", lambda w: w.update({n: v.bfloat16() for n, v in w.items()})
    )
    with pytest.raises(SiftError, match=r"float32, .* in bfloat16; .*--dtype float32"):
        difference(str(base), str(half), tmp_path / "delta")
    made = difference(str(base), str(half), tmp_path / "delta", dtype="float32")
    assert made.origin.exact
    merge(tmp_path / "delta", tmp_path / "merged")
    wanted = load_file(half / "model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(merged[n], v.float()) for n, v in wanted.items())
    rounded = difference(str(base), str(tuned), tmp_path / "rounded", dtype="bfloat16")
    assert rounded.kept == rounded.origin.changed
    assert not rounded.origin.exact  # float32 values were rounded


def test_what_no_delta_can_join_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    def refuses(message: str, other: Path | str, code: int = ExitCode.USAGE, **more: str) -> None:
        with pytest.raises(SiftError, match=message) as caught:
            difference(str(base), str(other), tmp_path / "delta", **more)  # type: ignore[arg-type]
        assert caught.value.code == code
        assert not (tmp_path / "delta").exists()

    one = "bert.encoder.layer.0.output.dense.weight"
    refuses(
        f"lacks 1 tensor:\n  {one}",
        edited(tuned, tmp_path / "lacks", lambda w: w.pop(one)),
    )
    words = "bert.embeddings.word_embeddings.weight"
    refuses(
        "word_embeddings.*\n.*resized vocabulary",
        edited(tuned, tmp_path / "resized", lambda w: w.update({words: torch.zeros(99, 16)})),
    )
    refuses(
        "not finite",
        edited(tuned, tmp_path / "nan", lambda w: w[one].fill_(float("nan"))),
        ExitCode.NOT_FINITE,
    )
    llama = save_base(tmp_path / "llama", "llama")
    refuses("is LlamaModel; a delta turns", llama)
    refuses("is of the kind llama", save_tuned(tmp_path / "other", llama, "llama"))
    refuses("no such folder", tmp_path / "nowhere")
    refuses("use tensor or global", tuned, scope="row")
    refuses("use float32 or bfloat16", tuned, dtype="float16")


def base_with_head(base: Path, to: Path) -> Path:
    return save_tuned(to, base, change=lambda _, value: value)


def test_equal_models_have_no_difference(base: Path, tmp_path: Path) -> None:
    same = base_with_head(base, tmp_path / "same")
    with pytest.raises(SiftError, match="no difference to hold"):
        difference(str(same), str(same), tmp_path / "delta")
    made = difference(str(base), str(same), tmp_path / "delta")  # the head alone
    assert made.origin.changed == 0
    assert made.dense == ["classifier.bias", "classifier.weight"]
    assert merge(tmp_path / "delta", tmp_path / "merged").proof.logits_difference == 0.0


def test_what_the_delta_leaves_behind_is_said(base: Path, tuned: Path, tmp_path: Path) -> None:
    edit = edited(tuned, tmp_path / "edit", lambda w: w.update({"adapter.x": torch.zeros(2)}))
    config_edited(edit, hidden_act="relu")
    tokenizer = json.loads((edit / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].pop("return")
    (edit / "tokenizer.json").write_text(json.dumps(tokenizer))
    notes = "\n".join(difference(str(base), str(edit), tmp_path / "delta").notes)
    assert "hidden_act is relu, but gelu in the base" in notes
    assert "adapter.x" in notes
    assert "vocabulary" in notes


def test_a_sharded_tuned_model(base: Path, tuned: Path, tmp_path: Path) -> None:
    whole = difference(str(base), str(tuned), tmp_path / "whole")
    weights = load_file(tuned / "model.safetensors")
    (tuned / "model.safetensors").unlink()
    names = sorted(weights)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({n: weights[n] for n in part}, tuned / file, metadata={"format": "pt"})
    places = {n: files[at % 2] for at, n in enumerate(names)}
    index = tuned / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    parts = difference(str(base), str(tuned), tmp_path / "parts")
    assert parts.delta_sha256 == whole.delta_sha256


def test_a_changed_buffer_is_refused(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_buffer(*args: object, **more: object) -> LoadedModel:
        loaded = load_model(*args, **more)  # type: ignore[arg-type]
        loaded.model.register_buffer("steps", torch.tensor(3))
        return loaded

    monkeypatch.setattr(opening, "load_model", with_buffer)
    same = edited(tuned, tmp_path / "same", lambda w: w.update({"steps": torch.tensor(3)}))
    assert difference(str(base), str(same), tmp_path / "delta").origin.exact
    other = edited(tuned, tmp_path / "other", lambda w: w.update({"steps": torch.tensor(4)}))
    with pytest.raises(SiftError, match=r"no parameter, which no delta holds: .*\n  steps"):
        difference(str(base), str(other), tmp_path / "refused")


def test_an_existing_file_is_kept(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "delta").write_text("mine")
    with pytest.raises(SiftError, match="exists already"):
        difference(str(base), str(tuned), tmp_path / "delta")
    assert (tmp_path / "delta").read_text() == "mine"
    with pytest.raises(SiftError, match="a share above 0"):
        difference(str(base), str(tuned), tmp_path / "other", density=1.5)


def test_diff_merge_eval_undo_as_typed(
    base: Path, data: Path, recipe_file: Path, tmp_path: Path
) -> None:
    tuned = save_tuned(tmp_path / "tuned", base)
    weights = load_file(tuned / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):  # two labels, as the recipe's task
        weights[name] = weights[name][:2].clone()
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0}}
    config_edited(tuned, **labels)
    out = tmp_path / "deltas/delta.safetensors"
    done = sift("diff", base, tuned, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "new, stored whole: classifier.bias, classifier.weight" in done.stdout
    assert "all kept: base + delta is the tuned model, bit for bit" in done.stdout
    metrics = [
        json.loads(sift("eval", what, "--recipe", recipe_file, "--json").stdout)
        for what in (out, tuned)
    ]
    assert metrics[0] == metrics[1]
    alone = sift("eval", out)
    assert alone.returncode == 2
    assert "carries no recipe; name the data with --recipe" in alone.stderr
    assert sift("merge", out, "--out", tmp_path / "merged").returncode == 0
    assert not (tmp_path / "merged/recipe.yaml").exists()
    assert sift("eval", tmp_path / "merged", "--recipe", recipe_file).returncode == 0
    back = ["--base", tmp_path / "merged", "--undo", "--out", tmp_path / "back"]
    assert sift("merge", out, *back).returncode == 0
    cut = sift("diff", base, tuned, "--density", 0.1, "--out", tmp_path / "cut")
    assert "of the change's norm: not exact" in cut.stdout
    done = sift("diff", base, tuned, "--density", 0.1, "--out", tmp_path / "json", "--json")
    assert json.loads(done.stdout)["density"] == 0.1
