"""What a head starts from: against scikit-learn, plain forward passes and runs that were killed."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from rich.console import Console
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sift_cli.analysis.adapted import build, train_adapted
from sift_cli.analysis.plan import plan
from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs import session as sessions
from sift_cli.runs.folder import TRAINED_FILE
from sift_cli.runs.session import Session, open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.evaluation import collect_outputs
from sift_cli.training import head as heads
from sift_cli.training import train
from sift_cli.training.batches import Batches
from sift_cli.training.choosing import Chooser
from sift_cli.training.head import (
    PENALTIES,
    Readout,
    choose_penalty,
    features_of,
    head_layer,
    losses,
    prior,
    sample,
    start_head,
    start_of,
)
from sift_cli.training.parts import rule_of
from tests.support.completions import Completions
from tests.support.interruptions import Killed, at_call, delta, kill, killed_at
from tests.support.models import ARCHITECTURES, save_base, tiny_model, tiny_tokenizer

PROBE = "train.head_start=probe"
AUTO = "train.head_start=auto"
KINDS = ("two", "three", "numbers")


def written(folder: Path, kind: str, count: int = 60) -> list[str]:
    """Rows of a kind, and what the recipe says of them."""
    words = ["good film", "bad meal again", "dull song and room", "warm book"]
    rows = []
    for at in range(count):
        label = {"two": at % 7 < 2, "three": at % 5 % 3, "numbers": 2.0 + at % 4 / 3}[kind]
        texts = f"{words[at % 4]} {words[at // 4 % 4]} {'very ' * (at % 6)}"
        rows.append({"sentence": texts, "label": label if kind == "numbers" else f"l{int(label)}"})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.path={path}",
        "data.task=custom",
        "data.text=sentence",
        "data.label=label",
        "data.holdout=0.2",
    ]


def opened(recipe_file: Path, *changes: str) -> tuple[Recipe, Session]:
    recipe = load_recipe(recipe_file, [*changes])
    return recipe, open_session(recipe)


def begun(recipe: Recipe, session: Session) -> Chooser:
    assert session.train is not None
    batches = Batches.of(recipe.train, session.train.lengths)
    rule = rule_of(recipe.selection)
    return Chooser.of(recipe.selection, recipe.train, session, batches, rule=rule)


def heads_of(session: Session) -> dict[str, Tensor]:
    named = dict(session.model.named_parameters())
    return {name: named[name].detach().clone() for name in session.new}


# features


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_what_the_logits_are_made_of(
    architecture: str, recipe_file: Path, tmp_path: Path
) -> None:
    """In batches with padding, against the logits and against a hook on each row alone."""
    base = save_base(tmp_path / architecture, architecture)
    _, session = opened(recipe_file, f"model.path={base}", "eval.batch_size=5")
    assert session.train is not None
    layer = session.model.get_submodule(head_layer("probe", session.model))
    rows = [5, 2, 41, 17, 30, 8, 11]
    session.model.train()
    found = features_of(layer, session, rows)
    assert session.model.training
    assert not layer._forward_hooks
    logits = collect_outputs(
        session.task, session.model, session.train, session.collate, batch_size=9
    )
    with torch.no_grad():
        torch.testing.assert_close(layer(found), logits[rows], rtol=1e-4, atol=1e-5)
    session.model.eval()
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, given, made: seen.append(given[0].detach()))
    for at, row in enumerate(rows):
        seen.clear()
        with torch.no_grad():
            session.task.outputs(session.model, session.collate(session.train.take([row])))
        alone = seen[0].reshape(-1, seen[0].shape[-1])[-1]  # a row alone has no padding
        torch.testing.assert_close(found[at], alone, rtol=1e-4, atol=1e-5)
    hook.remove()


def test_outputs_that_are_not_the_layer_s_are_refused(recipe_file: Path) -> None:
    recipe, session = opened(recipe_file, PROBE)

    def halved(_: object, given: object, made: dict[str, Tensor]) -> None:
        made["logits"] = made["logits"] / 2 + 0.25

    hook = session.model.register_forward_hook(halved)
    with pytest.raises(SiftError, match=r"^train\.head_start: what the model puts out is not"):
        start_head(recipe.train, session, Console(quiet=True))
    assert len(session.model.classifier._forward_hooks) == 0
    recipe, _ = opened(recipe_file, AUTO)
    before, said = heads_of(session), StringIO()
    assert start_head(recipe.train, session, Console(file=said, width=300)) is None
    hook.remove()
    assert said.getvalue().startswith("head: stays as it is (train.head_start: what the model puts")
    assert all(torch.equal(value, before[name]) for name, value in heads_of(session).items())


# fits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_scikit_learn_s(kind: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 30.0, 0.1, 2.0, 0.0])  # one feature says nothing
    features = torch.randn(90, 5, generator=generator) * spread + torch.tensor([3.0, 0, 1, 0, 2])
    codes = (features[:, 0] + features[:, 2] * 5 > 8).long() + (kind == "three") * (
        features[:, 1] > 20
    ).long()
    targets = features[:, 1].double() / 9 + 4 if kind == "numbers" else codes
    outputs = {"two": 2, "three": 3, "numbers": 1}[kind]
    x = features.double().numpy()
    for penalty in (0.5, 50.0):
        found = Readout.fit(features, targets, outputs, penalty, bias)
        assert (found.bias is None) != bias
        if bias:
            scaler = StandardScaler()
        else:  # without a bias, nothing can make up for a mean taken out
            scaler = StandardScaler(with_mean=False)
            scaler.fit(np.concatenate([x, -x]))
        same = scaler.transform(x) if not bias else scaler.fit_transform(x)
        if kind == "numbers":
            model = Ridge(alpha=penalty, fit_intercept=bias).fit(same, targets)
            wanted, got = model.predict(same), found(features)[:, 0].numpy()
        else:
            model = LogisticRegression(C=1 / penalty, fit_intercept=bias, max_iter=1000)
            wanted = model.fit(same, targets).predict_proba(same)
            got = found(features).softmax(1).numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_a_class_without_rows_is_as_likely_as_half_a_row() -> None:
    features = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    codes = torch.tensor([0, 3] * 40)
    found = Readout.fit(features, codes, 5, 10.0, bias=True)
    chances = found(features).softmax(1)
    for absent in (1, 2, 4):
        assert not bool(found.weight[absent].any())
        assert 0.25 / 80 < float(chances[:, absent].mean()) < 1 / 80
    two = Readout.fit(features, codes // 3, 2, 10.0, bias=True)(features).softmax(1)
    among = chances[:, [0, 3]] / chances[:, [0, 3]].sum(1, keepdim=True)
    torch.testing.assert_close(among, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_the_best_of_a_cross_validation(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    chosen = set()
    for signal in (0.0, 1.0, 8.0):
        features = torch.randn(200, 12, generator=generator)
        noisy = signal * features[:, 0] + torch.randn(200, generator=generator)
        if kind == "numbers":
            targets = noisy.double()
        else:
            targets = (noisy > 0).long() + (noisy > 1).long() * (kind == "three")
        rows = sample(targets, seed=1)
        features, targets = features[rows], targets[rows]
        outputs = {"two": 2, "three": 3, "numbers": 1}[kind]
        found = choose_penalty(features, targets, outputs, bias=True)
        chosen.add(found)
        folds = np.arange(200) % 5
        if kind != "numbers":
            folds[:outputs] = -1
        scores = {}
        for penalty in PENALTIES:
            if kind == "numbers":
                model, rule = Ridge(alpha=penalty), "neg_mean_squared_error"
            else:
                model, rule = LogisticRegression(C=1 / penalty, max_iter=1000), "neg_log_loss"
            pipeline = make_pipeline(StandardScaler(), model)
            split = PredefinedSplit(folds)
            each = cross_val_score(
                pipeline, features.double(), targets.numpy(), cv=split, scoring=rule
            )
            scores[penalty] = np.average(each, weights=np.bincount(folds[folds >= 0]))
        assert scores[found] == pytest.approx(max(scores.values()), rel=1e-4)
    assert len(chosen) > 1  # noise asks for more than a clear sign does


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 2**31)
)
def test_a_sample_has_every_class(codes: list[int], most: int, seed: int) -> None:
    targets = torch.tensor(codes)
    rows = sample(targets, seed, most)
    classes = set(codes)
    assert len(rows) == len(set(rows)) == min(max(most, len(classes)), len(codes))
    assert {codes[row] for row in rows[: len(classes)]} == classes
    assert rows == sample(targets, seed, most)
    numbers = sample(targets.double(), seed, most)
    assert len(numbers) == len(set(numbers)) == min(most, len(codes))


def test_a_seed_draws_the_rows() -> None:
    targets = torch.arange(5000) % 2
    assert len(sample(targets, 1)) == heads.ROWS
    assert sample(targets, 1) != sample(targets, 2)


# heads of models


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_probed_model_says_what_scikit_learn_does(
    kind: str, architecture: str, recipe_file: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / architecture, architecture)
    data = written(tmp_path, kind)
    recipe, session = opened(recipe_file, *data, PROBE, f"model.path={base}")
    assert session.train is not None
    targets = session.task.targets(session.train)
    assert targets is not None
    layer = session.model.get_submodule(head_layer("probe", session.model))
    rows = sample(targets, recipe.train.seed)
    features, wanted = features_of(layer, session, rows), targets[rows]
    before = heads_of(session)
    bias, said = layer.bias is not None, StringIO()
    penalty = choose_penalty(features, wanted, layer.out_features, bias)
    touched = start_head(recipe.train, session, Console(file=said, width=200))
    x = features.double().numpy()
    deviation = np.sqrt(((x - x.mean(0) * bias) ** 2).mean(0))
    deviation[deviation < 1e-6 * deviation.max()] = 1  # roberta's padding-free constants
    x = (x - x.mean(0) * bias) / deviation
    outputs = collect_outputs(
        session.task, session.model, session.train, session.collate, batch_size=8
    )[rows].double()
    if kind == "numbers":
        model = Ridge(alpha=penalty, fit_intercept=bias).fit(x, wanted)
        np.testing.assert_allclose(outputs[:, 0], model.predict(x), rtol=1e-3, atol=1e-3)
    else:
        model = LogisticRegression(C=1 / penalty, fit_intercept=bias, max_iter=1000)
        chances = model.fit(x, wanted).predict_proba(x)
        np.testing.assert_allclose(outputs.softmax(1), chances, rtol=1e-3, atol=1e-4)
    loss = float(losses(outputs, wanted).mean())
    assert f"a probe of {len(rows)} rows (penalty {penalty:g}); loss on them" in said.getvalue()
    assert float(said.getvalue().split()[-1]) == pytest.approx(loss, abs=2e-4)
    own = f"{head_layer('probe', session.model)}."
    assert touched is not None
    kept = {name: values for name, _, values in touched}
    assert kept.keys() == {name for name in before if name.startswith(own)}
    assert all(torch.equal(values, before[name].flatten()) for name, values in kept.items())
    after = heads_of(session)
    assert {n for n in after if not torch.equal(after[n], before[n])} == kept.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_is_the_best_that_a_bias_can_do(
    kind: str, recipe_file: Path, tmp_path: Path
) -> None:
    recipe, session = opened(recipe_file, *written(tmp_path, kind), "train.head_start=prior")
    said = StringIO()
    assert session.train is not None
    labels = session.train.rows["label"][:]
    weight = session.model.classifier.weight.detach().clone()
    start_head(recipe.train, session, Console(file=said, width=200))
    bias = session.model.classifier.bias.detach()
    if kind == "numbers":
        assert float(bias) == pytest.approx(np.mean(labels))
    else:
        shares = np.bincount(labels) / len(labels)
        np.testing.assert_allclose(bias.exp(), shares, rtol=1e-6)
        entropy = -(shares * np.log(shares)).sum()
        first = f"{np.log(len(shares)):.4f} -> {entropy:.4f}"
        assert f"prior of {len(labels)} rows; its loss alone {first}" in said.getvalue()
    assert torch.equal(session.model.classifier.weight, weight)


def test_a_prior_of_a_class_without_rows_is_finite() -> None:
    found = prior(torch.tensor([0, 0, 2, 2]), 4).exp()
    assert found.tolist() == pytest.approx([0.5, 0.125, 0.5, 0.125])


def test_a_head_in_bfloat16_stays_there(recipe_file: Path) -> None:
    recipe, session = opened(recipe_file, PROBE, "model.dtype=bfloat16")
    start_head(recipe.train, session, Console(quiet=True))
    found = session.model.classifier.weight.detach().clone()
    assert found.dtype == torch.bfloat16
    _, wide = opened(recipe_file, PROBE)
    start_head(recipe.train, wide, Console(quiet=True))
    torch.testing.assert_close(found.float(), wide.model.classifier.weight, rtol=0.3, atol=0.1)


def test_random_is_the_default_and_does_nothing(recipe_file: Path) -> None:
    recipe, session = opened(recipe_file)
    assert recipe.train.head_start == "random"
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    assert start_head(recipe.train, session, Console(quiet=True)) is None
    assert all(torch.equal(v, before[n]) for n, v in session.model.state_dict().items())


@pytest.mark.parametrize("start", ["probe", "prior"])
def test_a_trained_head_stays_as_it_is(start: str, recipe_file: Path, tmp_path: Path) -> None:
    model = tiny_model("bert", torch.float32, outputs=2)
    model.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    changes = [f"model.path={tmp_path / 'whole'}", f"train.head_start={start}"]
    recipe, session = opened(recipe_file, *changes)
    said = StringIO()
    assert start_head(recipe.train, session, Console(file=said, width=200)) is None
    assert said.getvalue() == "head: classifier is trained already and stays as it is\n"
    assert torch.equal(session.model.classifier.weight, model.classifier.weight)


def test_what_cannot_be(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = f"model.path={save_base(tmp_path / 'llama', 'llama')}"
    recipe = load_recipe(recipe_file, [base, "train.head_start=prior"])
    for refused in (
        lambda: train(recipe, tmp_path / "run"),
        lambda: train_adapted(recipe, "full", tmp_path / "run"),
        lambda: plan(recipe, device="cpu"),
    ):
        with pytest.raises(SiftError, match=r"^train\.head_start: prior is a bias, and score of"):
            refused()
    monkeypatch.setattr(sessions, "load_task", lambda *args, **more: Completions())
    recipe, session = opened(recipe_file, base, PROBE, "selection.dense=[]")
    with pytest.raises(SiftError, match=r"^train\.head_start: .*completions has none; set it to"):
        start_head(recipe.train, session, Console(quiet=True))
    recipe, session = opened(recipe_file, base, AUTO, "selection.dense=[]")
    said = StringIO()
    assert start_head(recipe.train, session, Console(file=said, width=300)) is None
    assert "head: stays as it is (train.head_start: probe needs a head that" in said.getvalue()
    said, whole = StringIO(), replace(session, new=())  # a language model brings its head
    assert start_head(recipe.train, whole, Console(file=said)) is None
    assert said.getvalue() == ""


def test_auto_is_a_probe_where_that_can_be(recipe_file: Path) -> None:
    heads = []
    for start in (PROBE, AUTO):
        recipe, session = opened(recipe_file, start)
        assert start_head(recipe.train, session, Console(quiet=True)) is not None
        heads.append(heads_of(session))
    assert all(torch.equal(heads[0][name], value) for name, value in heads[1].items())
    assert start_of(recipe.train, session.task, session.model) == "probe"
    session.model.classifier = torch.nn.Identity()
    assert start_of(recipe.train, session.task, session.model) == "random"


# runs


@pytest.mark.parametrize(
    ("start", "selection"),
    [
        ("probe", "{density: 0.05}"),
        ("prior", "{density: 0.05}"),
        ("probe", "{density: 0.05, schedule: after-warmup, warmup_steps: 3}"),
        ("probe", "{policy: lottery, warmup_steps: 3, density: 0.05}"),
        ("probe", "{policy: drop-grow, every: 3, vectors: true, density: 0.3}"),
    ],
)
def test_a_killed_run_gives_the_same_delta(
    start: str, selection: str, recipe_file: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "narrow", dtype=torch.bfloat16)
    changes = [f"selection={selection}", "checkpoint.every=2", "eval.every=3"]
    changes += [f"model.path={base}", "model.dtype=bfloat16"]
    recipe = load_recipe(recipe_file, [*changes, f"train.head_start={start}"])
    calm = train(recipe, tmp_path / "calm")
    out = tmp_path / "rough"
    killed_at(4, recipe, out)
    killed_at(3, recipe, out, resume=True)
    rough = train(recipe, out, resume=True)
    assert rough.resumed_at == [2, 4]
    assert delta(out) == delta(tmp_path / "calm")
    assert rough.metrics == calm.metrics
    other = train(load_recipe(recipe_file, changes), tmp_path / "other")
    assert calm.metrics_before == other.metrics_before == rough.metrics_before
    assert calm.delta_sha256 != other.delta_sha256
    lines = [
        {one["name"]: one for one in map(json.loads, path.read_text().splitlines())}
        for path in (run / "weights.jsonl" for run in (out, tmp_path / "calm", tmp_path / "other"))
    ]
    assert lines[0] == lines[1]
    for name in ("classifier.weight", "classifier.bias"):  # both are told from the random head
        assert lines[0][name]["base_rms"] == lines[2][name]["base_rms"]
    session = open_session(recipe, train=False, tuned=load_tuned(str(out))[0])
    assert session.evaluate() == rough.metrics
    merge(out / "delta.safetensors", tmp_path / "merged")
    merge(out / "delta.safetensors", tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    files = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[1][name], one) for name, one in files[0].items())


def test_a_warm_up_of_all_goes_back_to_the_head_that_was_started(recipe_file: Path) -> None:
    recipe, session = opened(
        recipe_file, PROBE, "selection.policy=lottery", "selection.warmup_steps=2"
    )
    random = heads_of(session)
    start_head(recipe.train, session, Console(quiet=True))
    started = heads_of(session)
    _, session = opened(recipe_file, PROBE)
    parameters = begun(recipe, session).begin().parameters
    after = heads_of(session)
    bases = {name: values for name, _, values in parameters.touched}
    for name in session.new:
        assert torch.equal(after[name], started[name])
        assert not torch.equal(after[name], random[name])
        assert torch.equal(bases[name], random[name].flatten())


def test_entries_are_chosen_by_the_gradient_of_the_head_that_was_started(
    recipe_file: Path,
) -> None:
    recipe, session = opened(recipe_file, PROBE)
    own = begun(recipe, session)
    own.begin().parameters.detach()
    plain, other = opened(recipe_file)
    other.model.load_state_dict(session.model.state_dict())
    norms = begun(plain, other)
    norms.begin()
    assert own.norms == norms.norms


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors
@pytest.mark.parametrize("method", ["lora", "shira", "full", "head-only"])
def test_baselines_start_from_the_same_head(method: str, recipe_file: Path, tmp_path: Path) -> None:
    recipe, session = opened(recipe_file, PROBE)
    start_head(recipe.train, session, Console(quiet=True))
    started = heads_of(session)
    _, session = opened(recipe_file, PROBE)
    assert session.train is not None
    method_of = build(method, recipe, session, Batches.of(recipe.train, session.train.lengths))
    named = method_of.begin().parameters.named
    for name, value in started.items():
        (own,) = [weight for key, weight in named.items() if key.endswith(name)]
        assert torch.equal(own, value)
        assert own.requires_grad


def test_a_baseline_that_was_killed_goes_on_without_a_new_probe(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file, [PROBE, "checkpoint.every=2"])
    train_adapted(recipe, "full", tmp_path / "calm")
    with at_call(4, kill), pytest.raises(Killed):
        train_adapted(recipe, "full", tmp_path / "rough")
    monkeypatch.setattr("sift_cli.training.dense.start_head", None)
    train_adapted(recipe, "full", tmp_path / "rough", resume=True)
    one, other = (load_file(tmp_path / name / TRAINED_FILE) for name in ("calm", "rough"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_tells_of_it(recipe_file: Path) -> None:
    found = plan(load_recipe(recipe_file, [PROBE]), device="cpu")
    assert found["head_start"] == {"kind": "probe", "rows": 48}
    assert plan(load_recipe(recipe_file, [AUTO]), device="cpu")["head_start"] == found["head_start"]
    assert plan(load_recipe(recipe_file), device="cpu")["head_start"]["kind"] == "random"
