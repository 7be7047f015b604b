"""The Python interface: what the command line does, and training in a loop of one's own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

import sift_cli as sift
from sift_cli.delta import load_delta
from sift_cli.models.loading import DTYPES
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.training.batches import steps_of
from tests.support.causal import save_talker
from tests.support.command import sift as command
from tests.support.models import SIZE, tiny_batch, tiny_model

STEPS = 6  # of the tiny recipe


class Seen:
    """A callback that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, Any]] = []
        self.evaluations: list[Mapping[str, Any]] = []

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.steps.append(record)

    def on_evaluate(self, record: Mapping[str, Any]) -> None:
        self.evaluations.append(record)


def own_model(base: Path, **more: Any) -> PreTrainedModel:
    """The base with a new head, as a user loads it."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **more)


def test_import_is_light_and_names_are_there() -> None:
    code = """
import sys, sift_cli
light = {"torch", "pydantic", "rich"} & set(sys.modules)
from sift_cli import Delta, Callback, SiftError
heavy = {"transformers", "datasets", "sklearn", "matplotlib"} & set(sys.modules)
print(light, heavy, sorted(sift_cli.__all__) == sorted(dir(sift_cli)), Delta.of, Delta.load)
from sift_cli import train, Run, Recipe
print({"transformers", "torch"} & set(sys.modules) <= {"torch"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("set() set() True ")
    assert done.stdout.endswith("True\n")
    for name in sift.__all__:
        assert getattr(sift, name)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sift.trian


def test_a_run_from_python_is_the_commands(recipe_file: Path, tmp_path: Path) -> None:
    done = command("train", recipe_file, "--out", tmp_path / "cli", "--json")
    summary = json.loads(done.stdout)
    seen = Seen()
    keys = yaml.safe_load(recipe_file.read_text())
    keys["model"]["path"] = Path(keys["model"]["path"])  # as one writes it in Python
    run = sift.train(keys, tmp_path / "api", callbacks=[seen], overrides=["log.every=2"])
    ours = (tmp_path / "api/delta.safetensors").read_bytes()
    assert ours == (tmp_path / "cli/delta.safetensors").read_bytes()
    assert run.metrics == summary["metrics"]
    assert (run.folder / "report.html").is_file()
    assert run.delta.entries == load_delta(tmp_path / "cli/delta.safetensors").entries
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert seen.steps == [line for line in lines if "loss" in line]
    assert [one["step"] for one in seen.steps] == [2, 4, 6]
    assert seen.evaluations == [line for line in lines if "metrics" in line]
    assert sift.evaluate(run) == summary["metrics"]
    train_split = command("eval", tmp_path / "cli", "--split", "train", "--json")
    assert sift.evaluate(run, split="train") == json.loads(train_split.stdout)["metrics"]
    told = command("predict", tmp_path / "cli", "good film", "bad film", "--json")
    again = sift.Run.load(run.folder)
    assert again == run
    assert again.predict(["good film", "bad film"]) == json.loads(told.stdout)["predictions"]
    assert again.predict([]) == []
    merged = sift.merge(run, tmp_path / "merged")
    assert {"files", "logits"} <= set(merged.proof.verified)
    assert sift.evaluate(str(tmp_path / "merged")) == summary["metrics"]


def test_a_recipe_object_and_a_probe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert isinstance(recipe, sift.Recipe)
    found = sift.probe(recipe, tmp_path / "probe", steps=2, quiet=True)
    assert found == json.loads((tmp_path / "probe/probe.json").read_text())
    with pytest.raises(sift.SiftError, match="out: name a folder"):
        sift.train(recipe)
    named = recipe.model_copy(update={"out": str(tmp_path / "own")})
    run = sift.train(named, overrides=["train.max_steps=1", "selection.policy=magnitude"])
    assert run.folder == tmp_path / "own"
    assert run.summary.policy == "magnitude"


def test_mistakes_are_told(recipe_file: Path, tmp_path: Path) -> None:
    keys = yaml.safe_load(recipe_file.read_text())
    keys["selection"]["policy"], keys["train"]["epoch"] = "shift", 1
    with pytest.raises(sift.SiftError) as caught:
        sift.train(keys, tmp_path / "run")
    assert "recipe: selection.policy: unknown: 'shift'; did you mean sift?" in str(caught.value)
    assert "recipe: train.epoch: unknown key; did you mean train.epochs?" in str(caught.value)
    for wrong, said in (
        (3, "recipe: give a file, the name of a shipped recipe, a dict or a Recipe, got int"),
        ("nowhere.yaml", "no such recipe"),
        ({}, "recipe: model: missing"),
    ):
        with pytest.raises(sift.SiftError, match=said):
            sift.train(wrong, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(sift.SiftError, match="give one of them"):
        sift.train(recipe_file, tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(sift.SiftError, match="on_step and on_evaluate, got the class Seen"):
        sift.train(recipe_file, tmp_path / "run", callbacks=[Seen])  # type: ignore[list-item]
    with pytest.raises(sift.SiftError, match="on_step and on_evaluate, got function"):
        sift.train(recipe_file, tmp_path / "run", callbacks=[lambda: 0])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()
    with pytest.raises(sift.SiftError, match="no finished run"):
        sift.Run.load(tmp_path)


def test_what_predict_takes(recipe_file: Path, tmp_path: Path) -> None:
    run = sift.train(recipe_file, tmp_path / "run", overrides=["train.max_steps=1"], quiet=True)
    for wrong in ("good film", 3, [3], ["good", ("a", "b")], [("a", "b", "c")]):
        with pytest.raises(sift.SiftError, match="a list of texts, or of pairs of texts"):
            run.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(sift.SiftError, match="was trained on sentence; give texts"):
        run.predict([("good film", "bad film")])


def test_a_callback_that_fails_is_named(recipe_file: Path, tmp_path: Path) -> None:
    class Broken(Seen):
        def on_evaluate(self, record: Mapping[str, Any]) -> None:
            raise KeyError("accuracy of mine")

    with pytest.raises(sift.SiftError) as caught:
        sift.train(recipe_file, tmp_path / "run", callbacks=[Broken()], quiet=True)
    said = str(caught.value)
    assert "Broken.on_evaluate failed at step 6: KeyError: 'accuracy of mine'" in said
    assert isinstance(caught.value.__cause__, KeyError)
    assert '"metrics"' in (tmp_path / "run/metrics.jsonl").read_text()  # written before


def test_ctrl_c_saves_and_resume_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    import signal

    class Stopper(Seen):
        def on_step(self, record: Mapping[str, Any]) -> None:
            if record["step"] == 2:
                signal.raise_signal(signal.SIGINT)

    short = ["log.every=1"]
    whole = sift.train(recipe_file, tmp_path / "whole", overrides=short, quiet=True)
    with pytest.raises(sift.SiftError, match="interrupted after step 2 of 6") as caught:
        sift.train(
            recipe_file, tmp_path / "run", overrides=short, callbacks=[Stopper()], quiet=True
        )
    assert caught.value.code == sift.ExitCode.INTERRUPTED
    seen = Seen()
    run = sift.train(
        recipe_file, tmp_path / "run", overrides=short, resume=True, callbacks=[seen], quiet=True
    )
    assert [one["step"] for one in seen.steps] == [3, 4, 5, 6]
    assert (run.folder / "delta.safetensors").read_bytes() == (
        whole.folder / "delta.safetensors"
    ).read_bytes()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes train in fp64."""
    monkeypatch.setitem(DTYPES, "float32", torch.float64)


def rows_in_order(session: Session, recipe: sift.Recipe) -> list[Any]:
    """The training rows, as the steps of a run take them."""
    assert session.train is not None
    steps = steps_of(recipe.train, session.train.lengths)
    return session.train.take([row for step in steps for part in step for row in part])


def with_trainer(session: Session, rows: list[Any], optimizer: Any, out: Path, **more: Any) -> None:
    """Trains by transformers' Trainer."""
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        warmup_steps=ceil(0.06 * STEPS),
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **more},
    )
    trainer = Trainer(
        session.model,
        arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=session.collate,  # type: ignore[arg-type]
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=more.get("max_steps") is None and "save_steps" in more)


def with_loop(session: Session, rows: list[Any], optimizer: Any, out: Path) -> None:
    """Trains by a plain loop."""
    session.model.train()
    schedule = get_scheduler("linear", optimizer, ceil(0.06 * STEPS), STEPS)
    for at in range(0, len(rows), 8):
        optimizer.zero_grad()
        session.model(**session.collate(rows[at : at + 8])).loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("policy", ["sift", "sign-descent", "scaled-sift"])
@pytest.mark.parametrize("loop", [with_trainer, with_loop])
@pytest.mark.usefixtures("double")
def test_ones_own_loop_gives_the_delta_of_sift_train(
    loop: Any, policy: str, recipe_file: Path, tmp_path: Path
) -> None:
    changes = ["eval.keep=last", f"selection.policy={policy}", "train.head_start=random"]
    recipe = load_recipe(recipe_file, changes)
    theirs = sift.train(recipe, tmp_path / "run", quiet=True).delta
    session = open_session(recipe)
    rows = rows_in_order(session, recipe)
    batches = [session.collate(rows[at : at + 8]) for at in range(0, len(rows), 8)]
    found = sift.sparsify(
        session.model.train(),
        batches[0] if policy == "sift" else batches,
        density=0.05,
        policy=policy,
        lr=recipe.train.rate,
        seed=recipe.train.seed,
    )
    loop(session, rows, found.optimizer, tmp_path / "trainer")
    ours = sift.Delta.of(session.model)
    assert ours.weights.keys() == theirs.weights.keys()
    assert ours.rest == theirs.rest
    for name, change in theirs.weights.items():
        assert ours.weights[name].base == change.base
        assert torch.equal(
            ours.weights[name].support.positions, change.support.positions
        )  # the same entries
    base = open_session(recipe).model
    trained = {}
    for delta in (ours, theirs):
        delta.apply_(base)
        trained[delta] = {name: one.clone() for name, one in base.state_dict().items()}
        delta.undo_(base)
    assert ours.dense.keys() == theirs.dense.keys()
    for name, value in trained[theirs].items():
        torch.testing.assert_close(trained[ours][name], value, rtol=0, atol=1e-10)
        torch.testing.assert_close(session.model.state_dict()[name], value, rtol=0, atol=1e-10)
    assert ours.header.logits is not None
    torch.testing.assert_close(
        torch.tensor(ours.header.logits), torch.tensor(theirs.header.logits), rtol=0, atol=1e-6
    )


def test_a_trainer_resumes_to_the_same_bits(recipe_file: Path, tmp_path: Path) -> None:
    """Also in bfloat16, where the weights alone would have lost what the masters hold."""
    recipe = load_recipe(recipe_file, ["model.dtype=bfloat16"])
    deltas = []
    for halves in ([{}], [{"max_steps": 3}, {}]):
        for more in halves:
            session = open_session(recipe)
            rows = rows_in_order(session, recipe)
            found = sift.sparsify(session.model, session.collate(rows[:8]), density=0.05, lr=1e-3)
            saves = {"save_strategy": "steps", "save_steps": 3} if len(halves) > 1 else {}
            saves |= {"lr_scheduler_type": "constant"}
            with_trainer(session, rows, found.optimizer, tmp_path / "trainer", **saves, **more)
        deltas.append(sift.Delta.of(session.model))
    marks = [{name: one.trained for name, one in delta.weights.items()} for delta in deltas]
    assert marks[0] == marks[1]


def test_a_delta_of_ones_own_loop_is_merged(base: Path, data: Path, tmp_path: Path) -> None:
    model = own_model(base)
    _, optimizer = sift.sparsify(model, tiny_batch(outputs=2), density=0.02, policy="snip")
    for seed in range(3):
        model(**tiny_batch(outputs=2, seed=seed)).loss.backward()
        optimizer.step()
    delta = sift.Delta.of(model)
    delta.save(tmp_path / "delta.safetensors")
    assert set(delta.dense) == {"classifier.weight", "classifier.bias"}
    assert delta.header.labels == ["LABEL_0", "LABEL_1"]
    assert delta.header.policy == "snip"
    sift.merge(tmp_path / "delta.safetensors", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    scored = sift.evaluate(
        tmp_path / "delta.safetensors",
        {"model": {"path": base}, "data": {"path": data, "task": "sst2", "max_length": 16}},
    )
    assert 0 <= (scored["accuracy"] or 0) <= 1


def test_a_language_model_trains_and_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_talker(tmp_path / "talker")
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    batch = {"input_ids": ids, "labels": ids}
    _, optimizer = sift.sparsify(model, batch, density=0.05, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert sift.Delta.of(model).header.language is not None


def test_gradients_choose_as_the_batch_does(base: Path) -> None:
    batch = tiny_batch(outputs=2)
    by_batch = sift.sparsify(own_model(base), batch, density=0.03).parameters
    model = own_model(base)
    model(**batch).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    by_gradients = sift.sparsify(model, gradients, density=0.03).parameters
    for one, other in zip(by_batch, by_gradients, strict=True):
        assert one.name == other.name
        assert torch.equal(
            one.support.gather(torch.arange(one.support.size)),
            other.support.gather(torch.arange(one.support.size)),
        )


def test_nothing_is_left_of_what_was_there(base: Path) -> None:
    """Gradients that someone left would be added to those that choose, and that train."""
    batch = tiny_batch(outputs=2)
    model = own_model(base)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    one = sift.sparsify(model, batch, target="all", density=0.03).parameters
    other = sift.sparsify(own_model(base), batch, target="all", density=0.03).parameters
    for each in (one, other):
        each.model(**batch).loss.backward()
    assert torch.equal(one.grad, other.grad)


def test_a_model_of_any_kind(tmp_path: Path) -> None:
    """Its own loss gives the gradients; its delta goes on and off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    inputs, labels = torch.randn(32, 8), torch.randint(2, (32,))
    loss = nn.functional.cross_entropy
    loss(model(inputs), labels).backward()
    gradients = {name: one.grad for name, one in model.named_parameters()}
    parameters, optimizer = sift.sparsify(model, gradients, density=0.25, lr=0.05)
    assert len(parameters) == 32 + 4 + 8 + 1  # a quarter of each, an entry at least
    for _ in range(5):
        loss(model(inputs), labels).backward()
        optimizer.step()
    delta = sift.Delta.of(model)
    after = {name: one.clone() for name, one in model.state_dict().items()}
    changed = sum(int((after[name] != before[name]).sum()) for name in before)
    assert 0 < changed <= len(parameters)
    parameters.detach()
    delta.undo_(model)
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())


def test_the_optimizer_clips_and_clears(base: Path) -> None:
    batch = tiny_batch(outputs=2)
    free = sift.sparsify(own_model(base), batch, policy="random", max_grad_norm=None, lr=1e-3)
    tight = sift.sparsify(own_model(base), batch, policy="random", max_grad_norm=1e-12, lr=1e-3)
    moved = []
    for parameters, optimizer in (free, tight):
        start = parameters.flat.detach().clone()
        optimizer.zero_grad(set_to_none=True)
        parameters.model(**batch).loss.backward()
        assert parameters.grad.abs().sum() > 0
        optimizer.step()
        assert not parameters.grad.any()
        moved.append(float((parameters.flat.detach() - start).abs().mean()))
        parameters.model(**batch).loss.backward()
        optimizer.zero_grad()
        assert not parameters.grad.any()
    assert moved[1] < 0.01 * moved[0]


def test_what_sparsify_refuses(base: Path) -> None:
    model, batch = own_model(base), tiny_batch(outputs=2)
    unlabelled = {key: one for key, one in batch.items() if key != "labels"}
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("roberta-base", batch), {}, "give a torch.nn.Module, got str"),
        ((model, batch), {"policy": "shift"}, "selection.policy: unknown: 'shift'; did you mean"),
        ((model, batch), {"density": 2}, "selection.density"),
        ((model, batch), {"densty": 0.1}, "selection.densty: unknown key; did you mean"),
        ((model, batch), {"target": "nothing"}, "no parameter of the model matches 'nothing'"),
        ((model, batch), {"policy": "drop-grow"}, "by the schedule every-n-steps"),
        ((model, batch), {"policy": "agreement"}, "compares batches; give at least 2"),
        ((model,), {}, "there are none to look at"),
        ((model, 3), {}, "got int"),
        ((model, [3]), {}, "got int"),
        ((model, unlabelled), {}, "gives no loss"),
        ((model, {"classifier.bias": torch.ones(3)}), {}, r"of shape \[2\]; its .* of \[3\]"),
        ((model, {"classifier.bias": 3}), {}, "its gradient is int"),
        ((model, {"classifier.bias": None, "x.y": None}), {}, "no parameter x.y"),
        ((model, {"classifier.bias": None}), {"policy": "sign-descent"}, "more than that"),
        ((model, {"classifier.bias": None}), {"policy": "gradient-per-input"}, "more than that"),
        ((model, batch), {"base": "no/such/folder/there"}, "no such folder"),
    ]
    for given, more, said in cases:
        with pytest.raises(sift.SiftError, match=said):
            sift.sparsify(*given, **more)
    with pytest.raises(sift.SiftError, match=r"has not been through sift\.sparsify"):
        sift.Delta.of(model)
    flags = [weight.requires_grad for weight in model.parameters()]
    assert all(flags), "a refusal leaves the model as it was"
    sift.sparsify(model, batch)
    with pytest.raises(sift.SiftError, match="through it already"):
        sift.sparsify(model, batch)


def test_a_delta_says_when_something_else_has_changed() -> None:
    model = tiny_model("bert", torch.float32, outputs=2)
    _, optimizer = sift.sparsify(model, tiny_batch(outputs=2))
    optimizer.step()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[SIZE - 1] += 1
    with pytest.raises(sift.SiftError, match="word_embeddings") as caught:
        sift.Delta.of(model)
    assert caught.value.code == sift.ExitCode.WRONG_FILE


def test_another_state_is_refused(base: Path) -> None:
    one = sift.sparsify(own_model(base), tiny_batch(outputs=2), density=0.02).optimizer
    other = sift.sparsify(own_model(base), tiny_batch(outputs=2), density=0.05).optimizer
    with pytest.raises(sift.SiftError, match="of another optimizer"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(sift.SiftError, match="of another optimizer"):
        one.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict())
