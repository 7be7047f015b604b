"""Losses and gradients that are not finite: what is told, what reaches the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sift_cli.delta.file import load_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import open_session
from sift_cli.training import train
from sift_cli.training.batches import Batches
from tests.support.command import sift
from tests.support.interruptions import delta, killed_at
from tests.support.models import VOCABULARY

POISON = "[UNK]"  # a word in one training row alone, whose embedding is infinite


def batches_of(recipe: Recipe) -> list[list[list[int]]]:
    session = open_session(recipe)
    assert session.train is not None
    return list(
        Batches.plan(
            session.train.lengths,
            batch_size=recipe.train.batch_size,
            accumulate=recipe.train.accumulate,
            epochs=recipe.train.epochs,
            max_steps=recipe.train.max_steps,
            seed=recipe.train.seed,
        )
    )


@pytest.fixture
def poisoned(recipe_file: Path, base: Path, data: Path) -> tuple[Path, int]:
    """A recipe whose third step has a row that makes the loss infinite, and that row."""
    row = batches_of(load_recipe(recipe_file))[2][0][5]
    lines = (data / "train.jsonl").read_text().splitlines()
    values = json.loads(lines[row])
    values["sentence"] = " ".join(["unheardof", *values["sentence"].split()[1:]])
    lines[row] = json.dumps(values)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    weights = load_file(base / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][VOCABULARY[POISON]] = torch.inf
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return recipe_file, row


def test_the_row_and_the_weights_at_fault_are_named(
    poisoned: tuple[Path, int], tmp_path: Path
) -> None:
    recipe_file, row = poisoned
    with pytest.raises(SiftError, match=r"^step 3: the loss is nan; not finite: ") as caught:
        train(load_recipe(recipe_file), tmp_path / "run")
    assert caught.value.code == ExitCode.NOT_FINITE
    said = str(caught.value)
    assert f"training rows [{row}], counted from 0. The weights are those of step 2" in said
    assert "the gradient of bert.encoder.layer.0.attention.self.query.weight, " in said
    assert "more weights" in said
    assert not (tmp_path / "run/summary.json").exists()


def test_a_single_gradient_that_is_not_finite_is_named_alone(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sift_cli.training import loop, watch

    real, calls, wanted = loop.add_gradient, iter(range(1, 100)), "classifier.weight"

    def spoilt(session: object, rows: list[list[int]], total: int | None = None) -> Tensor:
        loss = real(session, rows, total)  # type: ignore[arg-type]
        if next(calls) >= 2:
            (grad,) = (one for one in seen if one is not None)
            grad[-1] = torch.inf
        return loss

    seen: list[Tensor] = []
    attached = loop.Watch.__init__

    def note(self: watch.Watch, session: object, parameters: object, skips: int) -> None:
        (segment,) = (one for one in parameters if one.name == wanted)  # type: ignore[attr-defined]
        seen.append(parameters.grad[segment.span])  # type: ignore[attr-defined]
        attached(self, session, parameters, skips)  # type: ignore[arg-type]

    monkeypatch.setattr(watch.Watch, "__init__", note)
    monkeypatch.setattr(loop, "add_gradient", spoilt)
    monkeypatch.setattr(watch, "add_gradient", spoilt)
    with pytest.raises(SiftError, match=r"^step 2: the gradient's norm is inf; ") as caught:
        train(load_recipe(recipe_file), tmp_path / "run")
    assert f"not finite: the gradient of {wanted}; training rows [" in str(caught.value)


def test_skipped_steps_are_counted_and_leave_the_weights_alone(
    poisoned: tuple[Path, int], tmp_path: Path
) -> None:
    recipe_file, _ = poisoned
    changes = ["train.skip_nonfinite=1", "train.max_steps=3", "eval.keep=last", "log.every=1"]
    summary = train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert summary.skipped_steps == 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [one for one in map(json.loads, lines) if "loss" in one]
    assert steps[-1]["loss"] is None
    # the third step, at the last of three rates, is what differs from a run that stops before it
    short = [*changes, "train.lr_schedule=constant", "train.warmup=0"]
    train(load_recipe(recipe_file, short), tmp_path / "three")
    train(load_recipe(recipe_file, [*short, "train.max_steps=2"]), tmp_path / "two")
    three, two = (load_delta(tmp_path / name / "delta.safetensors") for name in ("three", "two"))
    assert {n: w.trained for n, w in three.weights.items()} == {
        n: w.trained for n, w in two.weights.items()
    }


def test_one_more_than_may_be_skipped_stops(poisoned: tuple[Path, int], tmp_path: Path) -> None:
    recipe_file, _ = poisoned
    changes = ["train.skip_nonfinite=1", "train.epochs=3"]
    with pytest.raises(SiftError, match=r"after 1 skipped\. .* pass over 2 such steps") as caught:
        train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert caught.value.code == ExitCode.NOT_FINITE


def test_the_count_of_skipped_steps_survives_an_interruption(
    poisoned: tuple[Path, int], tmp_path: Path
) -> None:
    recipe_file, _ = poisoned
    changes = ["train.skip_nonfinite=1", "train.epochs=3", "checkpoint.every=1"]
    recipe = load_recipe(recipe_file, changes)
    killed_at(5, recipe, tmp_path / "run")
    with pytest.raises(SiftError, match=r"after 1 skipped"):
        train(recipe, tmp_path / "run", resume=True)
    enough = load_recipe(recipe_file, ["train.skip_nonfinite=3", *changes[1:]])
    train(enough, tmp_path / "calm")
    killed_at(5, enough, tmp_path / "rough")
    summary = train(enough, tmp_path / "rough", resume=True)
    assert summary.skipped_steps == 3
    assert delta(tmp_path / "rough") == delta(tmp_path / "calm")


def test_an_undefined_metric_is_told_and_null(
    recipe_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (data / "validation.jsonl").read_text().replace('"label": 1', '"label": 0')
    (data / "validation.jsonl").write_text(lines)
    args = ["--set", "data.metrics=[matthews, accuracy]", "--set", "train.epochs=2"]
    done = sift("train", recipe_file, *args, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["metrics"]["matthews"] is None
    assert summary["metrics_before"]["matthews"] is None
    assert summary["kept_step"] == 12  # no evaluation is better than another: the last one stays
    assert "matthews: undefined before training" in done.stderr
    assert "step 6: matthews undefined  accuracy" in done.stderr
    assert "| matthews | undefined | undefined |" in (tmp_path / "run/README.md").read_text()
    again = sift("eval", tmp_path / "run")
    assert "undefined" in again.stdout
