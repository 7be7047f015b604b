"""Evaluations of a run: the loss of each, the metric that decides, stopping early."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from rich.console import Console
from torch.nn.functional import cross_entropy

from sift_cli.analysis.report import report
from sift_cli.delta import load_delta
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe, parse_recipe
from sift_cli.runs.language import language_of
from sift_cli.runs.session import open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.training import train
from sift_cli.training.state import Kept
from tests.support.command import sift
from tests.support.interruptions import delta, killed_at

LONG = ["train.epochs=5", "train.learning_rate=0.05", "eval.every=2", "eval.metric=loss"]


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "metrics" in line]


def stop_of(losses: Sequence[float], patience: int) -> tuple[int, int]:
    """Which evaluation ends training, and which is the best until then, of the lowest loss."""
    for last in range(len(losses)):
        best = losses.index(min(losses[: last + 1]))
        if last - best >= patience:
            return last, best
    return len(losses) - 1, losses.index(min(losses))


def test_each_evaluation_has_the_loss_of_the_held_out_rows(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, ["train.class_weights=balanced", "train.label_smoothing=0.1"])
    summary = train(recipe, tmp_path / "run")
    assert list(summary.metrics) == list(summary.metrics_before) == ["accuracy", "loss"]
    assert [list(line["metrics"]) for line in evaluations(tmp_path / "run")] == [
        ["accuracy", "loss"]
    ]
    loaded, _ = load_tuned(str(tmp_path / "run"))
    session = open_session(recipe, train=False, tuned=loaded)
    data = session.evaluation[""]
    batch = session.collate(data.take(range(len(data))))
    with torch.no_grad():
        logits = session.model.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    plain = float(cross_entropy(logits, batch["labels"]))
    assert summary.metrics["loss"] == pytest.approx(plain, rel=1e-4)


def test_a_run_without_an_evaluation_before_it_is_the_same(
    recipe_file: Path, tmp_path: Path
) -> None:
    wanted = train(load_recipe(recipe_file), tmp_path / "usual")
    done = sift("train", recipe_file, "--out", tmp_path / "run", "--set", "eval.before=false")
    assert " before" not in done.stdout
    assert "accuracy" in done.stdout
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["metrics_before"] == {}
    assert found["metrics"] == wanted.metrics
    deltas = (load_delta(tmp_path / name / "delta.safetensors") for name in ("usual", "run"))
    marks = [{name: one.trained for name, one in own.weights.items()} for own in deltas]
    assert marks[0] == marks[1] != {}
    assert (
        "| metric (validation) | after |\n| --- | --- |\n"
        in (tmp_path / "run" / "README.md").read_text()
    )
    for name, told in (("usual", True), ("run", False)):
        assert ("before training" in report(tmp_path / name).read_text()) is told


def test_a_run_that_ends_no_better_than_it_began_says_so(recipe_file: Path, tmp_path: Path) -> None:
    said = StringIO()
    frozen = load_recipe(recipe_file, ["train.learning_rate=1e-12", "train.head_start=random"])
    found = train(frozen, tmp_path / "run", console=Console(file=said, width=200))
    value = f"{found.metrics['accuracy']:.4f}"
    assert f"accuracy is no better than before training: {value}, and {value} then" in (
        said.getvalue()
    )
    assert "evaluating 16 rows before training\n" in said.getvalue()
    calm = StringIO()
    better = load_recipe(recipe_file, [*LONG, "eval.every=epoch"])
    train(better, tmp_path / "better", console=Console(file=calm, width=200))
    assert "no better" not in calm.getvalue()


def test_early_stopping_ends_with_the_best_evaluation_of_the_whole_run(
    recipe_file: Path, tmp_path: Path
) -> None:
    whole = train(load_recipe(recipe_file, LONG), tmp_path / "whole")
    found = evaluations(tmp_path / "whole")
    losses = [line["metrics"]["loss"] for line in found]
    assert [line["best"] for line in found] == [
        loss < min(losses[:at], default=9.0) for at, loss in enumerate(losses)
    ]
    stops = {}
    for patience in (1, 2, len(losses)):
        out = tmp_path / f"{patience}"
        summary = train(load_recipe(recipe_file, [*LONG, f"eval.patience={patience}"]), out)
        last, best = stop_of(losses, patience)
        assert evaluations(out) == found[: last + 1]
        assert (summary.steps, summary.kept_step) == (found[last]["step"], found[best]["step"])
        assert summary.metrics == found[best]["metrics"]
        stops[patience] = summary.steps
        if summary.kept_step == whole.kept_step:
            ours, theirs = (
                load_delta(run / "delta.safetensors") for run in (out, tmp_path / "whole")
            )
            assert ours.weights.keys() == theirs.weights.keys()
            for name, change in ours.weights.items():
                assert torch.equal(change.bits, theirs.weights[name].bits)
    assert stops[1] < stops[len(losses)] == whole.steps, "the run is one that stops early"


def test_patience_survives_an_interruption(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [*LONG, "eval.patience=2", "checkpoint.every=1"])
    whole = train(recipe, tmp_path / "whole")
    out = tmp_path / "again"
    killed_at(whole.steps, recipe, out)
    assert train(recipe, out, resume=True).steps == whole.steps
    assert delta(out) == delta(tmp_path / "whole")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_stale_counts_the_evaluations_since_the_best(values: list[int]) -> None:
    class Nothing:
        def state(self) -> dict[str, Any]:
            return {}

    kept = Kept(
        Nothing(),  # type: ignore[arg-type]
        "best",
        lambda new, old: old is None or float(new["x"] or 0) > float(old["x"] or 0),
    )
    for step, value in enumerate(values):
        kept.offer(step, {"x": value})
        assert kept.step == values.index(max(values[: step + 1]))
        assert kept.stale == step - kept.step


def test_the_metric_that_decides_comes_first_and_keeps_its_best(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ["eval.metric='recall:negative'", "eval.every=2", "train.epochs=3"]
    changes.append("train.learning_rate=0.05")
    summary = train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert list(summary.metrics) == ["recall:negative", "accuracy", "loss"]
    values = [line["metrics"]["recall:negative"] for line in evaluations(tmp_path / "run")]
    assert summary.metrics["recall:negative"] == max(values)


OWN = """
def cost(predicted, labels):
    return -float((predicted != labels).sum())
"""


def test_an_own_metric_decides_where_code_is_allowed(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    out, change = tmp_path / "run", f"eval.metric={tmp_path}/own.py:cost"
    train_it = ["train", recipe_file, "--out", out, "--set", change, "--quiet"]
    refused = sift(*train_it)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "own.py:cost is code; pass --allow-code to run it" in refused.stderr
    assert sift(*train_it, "--allow-code").returncode == 0
    scored = sift("eval", out, "--json", "--allow-code")
    found = json.loads(scored.stdout)
    assert list(found["metrics"]) == ["cost", "accuracy", "loss"]
    assert found["metrics"]["cost"] == -16 * (1 - found["metrics"]["accuracy"])
    assert sift("eval", out).returncode == 2
    merged = sift("merge", out / "delta.safetensors", "--out", tmp_path / "merged", "--json")
    assert merged.returncode == 0, merged.stderr


def test_eval_and_report_show_each_class(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert sift("train", recipe_file, "--out", out, "--quiet").returncode == 0
    found = json.loads(sift("eval", out, "--json").stdout)["classes"]
    assert [(one["name"], one["rows"]) for one in found] == [("negative", 8), ("positive", 8)]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    right = [line["predicted"] == line["label"] for line in lines]
    for one in found:
        of_it = [line["label"] == one["name"] for line in lines]
        assert one["recall"] == sum(map(min, right, of_it)) / 8
    table = sift("eval", out).stdout
    page = (out / "report.html").read_text()
    for one in found:
        assert f"{one['name']}\t{one['precision']:.4f}\t{one['recall']:.4f}" in table
        assert f"<tr><td>{one['name']}</td>" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eval.metric=acuracy", "eval.metric: unknown: 'acuracy'; did you mean accuracy?"),
        ("data.metrics=[f1, rouge]", "data.metrics[1]: unknown: 'rouge'"),
        ("eval.patience=0", "eval.patience: input should be greater than 0"),
        ("eval={patience: 2, keep: last}", "eval.patience: it stops some evaluations after the"),
        ("eval.metric='f1:good'", "eval.metric: f1:good: no class 'good'; there is negative, pos"),
        ("eval.metric=mae", "eval.metric: mae is a metric of numbers to predict, and 'label' hol"),
        ("eval.metric=no.py:cost", "data.metrics: no.py:cost is code; pass --allow-code"),
    ],
)
def test_mistakes_about_metrics(recipe_file: Path, tmp_path: Path, change: str, said: str) -> None:
    done = sift("train", recipe_file, "--out", tmp_path / "run", "--set", change)
    assert done.returncode == 2
    assert said in done.stderr


def test_metrics_of_labels_are_none_of_a_language_task() -> None:
    text = "model: {path: x}\ndata: {path: y, task: instruct, metrics: f1}\n"
    with pytest.raises(SiftError, match="f1 is a metric of classes, and rows of task: instruct"):
        language_of(parse_recipe(text, "r.yaml"))
