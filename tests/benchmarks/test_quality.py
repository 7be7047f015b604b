"""benchmarks/quality.py: rates chosen on held-out rows, runs kept and taken up, tables."""

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from sift_cli.recipe import parse_recipe
from sift_cli.selection.policies import POLICIES
from tests.support.command import ENV, until

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["train.max_steps=2", "data.max_length=16", "train.batch_size=8"]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("quality")
    for name in ("quality", "study", "quality_tables", "plots"):
        sys.modules.pop(name, None)


@pytest.fixture
def glue(data: Path, tmp_path: Path) -> Path:
    """A folder of tasks with one in it."""
    (tmp_path / "glue").mkdir()
    data.rename(tmp_path / "glue/sst2")
    return tmp_path / "glue"


@pytest.fixture
def words(base: Path, glue: Path, tmp_path: Path) -> list[str]:
    """The options of a study of tiny runs."""
    study = ["--model", str(base), "--data", str(glue), "--out", str(tmp_path / "out")]
    return [*study, "--densities", ".05", "--seeds", "3", "4", "--jobs", "2", "--set", *SHORT]


@pytest.fixture
def made_up(quality: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs that only write what a run leaves behind: the score is 1 - rate. Their commands."""
    study, ran = importlib.import_module("study"), list[list[str]]()
    script = (
        "import json, sys, pathlib, yaml\n"
        "recipe = yaml.safe_load(open(sys.argv[1])); out = pathlib.Path(sys.argv[2])\n"
        "rate = recipe['train']['learning_rate']; out.mkdir()\n"
        "(out / 'metrics.jsonl').write_text(json.dumps({'step': 1, 'loss': rate}))\n"
        "if rate > .004: sys.exit(4)\n"
        "(out / 'summary.json').write_text(json.dumps({'metrics': {'accuracy': 1 - rate},\n"
        "    'wall_time_s': 1, 'step_time_ms': 2, 'trained_entries': 3, 'rank': None}))\n"
    )

    def command(run: Any, recipe: Path, folder: Path) -> list[str]:
        ran.append([run.stage, run.method, str(recipe)])
        return [sys.executable, "-c", script, str(recipe), str(folder)]

    monkeypatch.setattr(study, "command", command)
    return ran


def test_stages(quality: Any, words: list[str], made_up: list[Any], tmp_path: Path) -> None:
    methods = ["--methods", "sift", "random", "full", "--tries", "5"]
    with pytest.raises(SystemExit, match="full: 0 rates tried; run the stage rates first"):
        quality.main(["runs", *words, *methods])
    quality.main(["rates", *words, *methods])
    assert len(made_up) == 15  # as many tries for each
    rates = {
        method: sorted(row.rate for row in rows(quality, tmp_path) if row.method == method)
        for method in ("sift", "random", "full")
    }
    for tried in rates.values():
        assert tried[-1] / tried[0] == pytest.approx(16, rel=0.01)
    recipes = [yaml.safe_load(Path(path).read_text()) for _, _, path in made_up]
    assert all(recipe["data"]["holdout"] == 0.1 for recipe in recipes)
    assert {recipe["train"]["seed"] for recipe in recipes} == {3}
    made_up.clear()
    quality.main(["rates", *words, *methods])
    assert made_up == []  # all of them are there
    quality.main(["runs", *words, *methods])
    recipes = [yaml.safe_load(Path(path).read_text()) for _, _, path in made_up]
    assert len(recipes) == 6
    assert all("holdout" not in recipe["data"] for recipe in recipes)
    for method in rates:
        chosen = [row for row in rows(quality, tmp_path) if row.stage == "runs"]
        chosen = [row for row in chosen if row.method == method]
        assert [row.rate for row in chosen] == [rates[method][0]] * 2
        assert {row.seed for row in chosen} == {3, 4}
    quality.main(["table", *words])
    text = (tmp_path / "out/quality.md").read_text()
    least = rates["random"][0]
    assert f"| random | **{least:g}** | {1 - least:.4f} | {1 - least:.4f} |" in text
    assert "| diverged |" in text  # of the largest rates
    assert (tmp_path / "out/rates.png").stat().st_size > 5000


def rows(quality: Any, tmp_path: Path) -> list[Any]:
    """What a study has finished."""
    study = importlib.import_module("study")
    return list(study.Study(quality.DESIGN, "", "", tmp_path / "out").finished())


def test_what_goes_wrong_is_told_and_the_rest_runs(
    quality: Any, words: list[str], made_up: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = importlib.import_module("study")
    whole = study.command

    def command(run: Any, recipe: Path, folder: Path) -> list[str]:
        words = whole(run, recipe, folder)
        return [*words[:2], "raise SystemExit('no such key')"] if run.rate == 5e-4 else words

    monkeypatch.setattr(study, "command", command)
    with pytest.raises(SystemExit, match=r"sift.*: no such key"):
        quality.main(["rates", *words, "--methods", "sift", "--densities", ".01"])
    assert len(made_up) == 3


def test_the_budget_begins_no_more(quality: Any, words: list[str], made_up: list[Any]) -> None:
    quality.main(["rates", *words, "--budget-hours", "0"])
    assert made_up == []


def test_tables_are_those_of_scipy(quality: Any, tmp_path: Path) -> None:
    tables = importlib.import_module("quality_tables")
    scores = {
        ("sift", "cola"): [0.1, 0.2, 0.15],
        ("sift", "rte"): [0.5, 0.52, 0.6],
        ("lora", "cola"): [0.3, 0.31, 0.2],
        ("lora", "rte"): [0.5, 0.56, 0.55],
    }
    rows = [
        tables.Run("runs", task, method, 0.01, 1e-3, seed, "m", "accuracy", score, 0.5)
        for (method, task), values in scores.items()
        for seed, score in enumerate(values)
    ]
    text = tables.write_tables(rows, tmp_path, "sift")
    own, other = (
        [sum(pair) / 2 for pair in zip(scores[one, "cola"], scores[one, "rte"], strict=True)]
        for one in ("lora", "sift")
    )
    p = stats.ttest_rel(own, other).pvalue
    difference = sum(own) / 3 - sum(other) / 3
    assert f"| {difference:+.4f} (p {p:.2g}) |" in text
    assert "| 0.1500 ± 0.0500 |" in text


def test_one_rate_for_all_tasks(quality: Any) -> None:
    tables = importlib.import_module("quality_tables")
    row = tables.Run("rates", "cola", "sift", 0.01, 1e-3, 1, score=0.0, train_loss=0.6)
    lower = dataclasses.replace(row, rate=2e-3, train_loss=0.5)
    diverged = dataclasses.replace(row, rate=4e-3, score=None)
    assert tables.best_rate([row, lower, diverged]) == 2e-3  # a tie goes to the lower loss
    assert tables.best_rate([diverged]) is None
    others = [dataclasses.replace(one, task="rte", score=0.5) for one in (row, lower, diverged)]
    better = dataclasses.replace(others[0], score=0.6)
    assert tables.best_rate([row, lower, diverged, better, *others[1:]]) == 1e-3
    assert tables.best_rate([row, lower, others[0]]) == 1e-3  # the other one lacks a task


def test_every_method_is_a_recipe(quality: Any) -> None:
    study = importlib.import_module("study")
    added = [f"sift+{one}" for one in study.ADDED if one != "half"]
    for name in (
        *POLICIES,
        *study.BASELINES,
        *added,
        "balanced-gradient+half+step",
        "lora+probe",
    ):
        density = 0.01 if study.find(name).budget else None
        run = study.Run("rates", "cola", name, density, 1e-3, 1)
        settings = quality.DESIGN.settings(run)
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        recipe = parse_recipe("model: {path: m}\ndata: {path: d, task: rte}\n", "study", given)
        assert recipe.train.learning_rate == 1e-3
    found = study.find("random+step+probe").settings
    assert found["selection.policy"] == "random"
    assert (found["train.step_scale"], found["train.head_start"]) == ("input", "probe")
    for wrong in ("randm", "sift+stp", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="known: lora"):
            study.method_name(wrong)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from quality import DESIGN
from study import Run, Study
model, data, out = sys.argv[2:]
more = {"train.epochs": 500, "train.max_steps": 600, "data.max_length": 16, "train.batch_size": 8}
runs = [Run("rates", "sst2", method, density, 1e-3, 3) for method, density in
        (("sift", .05), ("lora-r1", None))]
print(Study(DESIGN, model, data, Path(out), 2, more).carry_out(runs))
"""


@pytest.mark.slow
def test_real_runs_are_interrupted_and_go_on(base: Path, glue: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    places = [ROOT / "benchmarks", base, glue, out]
    words = [sys.executable, "-c", DRIVER, *map(str, places)]

    def begun(lines: int) -> bool:
        files = list(out.glob("rates/*/metrics.jsonl"))
        return len(files) == 2 and all(file.read_text().count("\n") > lines for file in files)

    process = subprocess.Popen(
        words, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    until(lambda: begun(10) or process.poll() is not None)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode
    assert "the same command goes on from here" in said
    assert len(list(out.glob("rates/*/checkpoint/*.safetensors"))) >= 2
    assert not (out / "results.jsonl").exists()
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {(one["method"], one["rank"]) for one in lines} == {("sift", None), ("lora-r1", 1)}
    for summary in out.glob("rates/*/summary.json"):
        assert json.loads(summary.read_text())["resumed_at"]
