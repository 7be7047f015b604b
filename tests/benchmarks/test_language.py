"""benchmarks/language.py: runs of language models, their answers, what they forget, tables."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from sift_cli.analysis.adapted import train_adapted
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.training import train
from tests.support.chats import save_chat_model

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("language", "language_scores", "language_tables", "study", "quality_tables", "plots")
SHORT = ["data.max_length=128", "train.batch_size=4"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Gives a script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The options of a study of a tiny Llama on equations and choices."""
    torch.manual_seed(0)
    base = save_chat_model(tmp_path / "base")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    sums = [
        {
            "messages": [
                {"role": "user", "content": f"{at} and {at + 1}?"},
                {"role": "assistant", "content": f"{at}+{at + 1} = {2 * at + 1}"},
            ]
        }
        for at in range(20)
    ]
    choices = [
        {"instruction": f"{at}: odd or even?", "input": "", "output": ("even", "odd")[at % 2]}
        for at in range(20)
    ]
    for task, rows in (("mawps", sums), ("openbookqa", choices)):
        write(tmp_path / f"data/{task}/train.jsonl", rows)
        write(tmp_path / f"data/{task}/validation.jsonl", rows[:9])
    solved = [{"prompt": f"{at} and {at}?", "completion": f" {2 * at}"} for at in range(5)]
    write(tmp_path / "data/gsm8k/test200.jsonl", solved)
    places = ["--model", str(base), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "o")]
    sizes = ["--steps", "2", "--tried-steps", "1", "--tries", "1", "--rows", "6", "--answers", "2"]
    return [*places, *sizes, "--densities", ".1", "--set", *SHORT]


def write(file: Path, rows: list[Any]) -> None:
    """Rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def made_up(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs and scores that only write what real ones leave; the loss is the rate. What was run."""
    study, language, ran = scripts("study"), scripts("language"), list[list[str]]()
    train = (
        "import json, sys, pathlib, yaml\n"
        "recipe = yaml.safe_load(open(sys.argv[1])); out = pathlib.Path(sys.argv[2])\n"
        "rate = recipe['train']['learning_rate']; out.mkdir()\n"
        "(out / 'metrics.jsonl').write_text(json.dumps({'step': 1, 'loss': rate}))\n"
        "(out / 'trained.safetensors').write_text('large')\n"
        "(out / 'summary.json').write_text(json.dumps({'metrics': {'loss': rate},\n"
        "    'wall_time_s': 1, 'step_time_ms': 2000, 'trained_entries': 3, 'rank': None}))\n"
    )
    score = (
        "import json, sys, pathlib\n"
        "out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)\n"
        "scores = {'exact': .25, 'ended': .5, 'unseen': 1.5, 'loss': 2,\n"
        "    'peak': 3e6, 'bytes': 4e6}\n"
        "(out / 'scores.json').write_text(json.dumps(scores))\n"
    )

    def command(run: Any, recipe: Path, folder: Path) -> list[str]:
        ran.append([run.stage, run.method, run.task])
        return [sys.executable, "-c", train, str(recipe), str(folder)]

    def scoring(given: Any, method: str, recipe: Path, folder: Path) -> list[str]:
        ran.append(["score", method, recipe.parent.name])
        return [sys.executable, "-c", score, str(folder)]

    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(language, "scoring", scoring)
    return ran


def test_a_study_from_rates_to_tables(
    scripts: Any, words: list[str], made_up: list[list[str]], tmp_path: Path
) -> None:
    language, study = scripts("language"), scripts("study")
    methods = ["--methods", "sift", "lora", "full", "--seeds", "3", "4", "--against", "sift"]
    language.main(["rates", *words, *methods, "--tries", "3", "--tasks", "mawps"])
    assert [one[0] for one in made_up] == ["rates"] * 9  # rates are chosen by the loss alone
    recipe = yaml.safe_load(next((tmp_path / "o/rates").glob("*.yaml")).read_text())
    assert (recipe["data"]["holdout"], recipe["train"]["max_steps"]) == (0.1, 1)
    made_up.clear()
    language.main(["runs", *words, *methods, "--tries", "3"])
    assert made_up.count(["score", "base", "base"]) == 2
    for method in ("delta", "lora", "full"):
        assert made_up.count(["score", method, "runs"]) == 4
    lines = (tmp_path / "o/results.jsonl").read_text().splitlines()
    rows = [study.Run(**json.loads(line)) for line in lines]
    for method in ("sift", "lora", "full"):
        tried = {row.rate for row in rows if (row.stage, row.method) == ("rates", method)}
        ran = [row for row in rows if (row.stage, row.method) == ("runs", method)]
        assert len(tried) == 3
        assert {row.rate for row in ran} == {min(tried)}  # where the loss is lowest
        assert all(row.more["exact"] == 0.25 for row in ran)
        kept = [path.parent.name for path in tmp_path.glob("o/runs/*/trained.safetensors")]
        assert any(f"-{method}-" in name for name in kept) == (method != "full")
    made_up.clear()
    language.main(["runs", *words, *methods, "--tries", "3"])
    assert made_up == []  # all of them are there
    language.main(["table", *words, *methods])
    text = (tmp_path / "o/language.md").read_text()
    assert "| before training |  |  | 2.0000 | 0.2500 | 0.5000 | 1.5000 |" in text
    (rate,) = {row.rate for row in rows if (row.stage, row.method) == ("runs", "lora")}
    assert (
        f"| lora | 3 | {rate:g} | {rate:.4f} ± 0.0000 | 0.2500 ± 0.0000 | 0.5000 ± 0.0000 | "
        "1.5000 ± 0.0000 | 1.0 | 2.0 | 3.0 | 4.0 |" in text
    )
    assert f"| lora | **{rate:g}** | {rate:.4f} |" in text
    assert "exact match:\n\n| to sift |" in text
    assert (tmp_path / "o/rates.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="made of other rows"):
        language.main(["runs", *words, *methods, "--rows", "5"])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # SHiRA's, from torch
@pytest.mark.parametrize("method", ["sift", "lora", "shira", "full"])
def test_what_is_scored_is_the_model_that_the_run_left(
    scripts: Any, words: list[str], tmp_path: Path, method: str
) -> None:
    scores, study, language = (scripts(one) for one in ("language_scores", "study", "language"))
    design = study.Design(language.SHARED, language.TASKS, language.middle)
    more = {"train.max_steps": 3, "data.max_length": 128}
    density = 0.1 if study.find(method).budget else None
    run, out = study.Run("runs", "mawps", method, density, 1e-2, 3), tmp_path / "run"
    path = study.Study(design, words[1], words[3], tmp_path / "o", 1, more).recipe(run)
    recipe = load_recipe(path)
    baseline = study.find(method).baseline
    summary = train_adapted(recipe, baseline, out) if baseline else train(recipe, out)
    unseen = str(tmp_path / "data/gsm8k/test200.jsonl")
    kind = language.method_of(method)
    scores.main([kind, str(path), str(out), "--unseen", unseen, "--answers", "2"])
    found = json.loads((out / "scores.json").read_text())
    assert (found["peak"], found["bytes"]) == (summary.peak_memory_bytes, summary.delta_bytes)
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["expected"] for line in lines] == ["0+1 = 1", "1+2 = 3"]
    again = open_session(recipe, train=False, tuned=scores.trained(kind, recipe, out)).evaluate()
    assert again["loss"] == pytest.approx(summary.metrics["loss"], rel=1e-6)
    assert abs(again["loss"] - summary.metrics_before["loss"]) > 1e-4  # type: ignore[operator]
    scores.main(["base", str(path), str(tmp_path / "b"), "--unseen", unseen, "--answers", "2"])
    base = json.loads((tmp_path / "b/scores.json").read_text())
    assert base["loss"] == pytest.approx(summary.metrics_before["loss"], rel=1e-6)
    assert base["unseen"] != found["unseen"]


def test_equations_are_right_by_their_value(scripts: Any) -> None:
    scores = scripts("language_scores")
    assert scores.value_of("((22-14)/4) = 2") == 2
    assert scores.value_of(" -1+2*.5") == 0
    for text in ("", "= 3", "x = 3", "2**9", "1/0", "[1]", "'a'", "True", "1+", "abs(1)", "1e999"):
        assert scores.value_of(text) is None, text
    assert scores.value_of("(" * 5000) is None
    assert scores.value_of("-" * 100_000 + "1") is None
    assert scores.right("27+43 = 70", "43+27 = 70")
    assert scores.right("0.1+0.2", "0.3 = 0.3")
    assert not scores.right("43-27 = 70", "43+27 = 70")  # what follows `=` proves nothing
    assert not scores.right("seventy", "43+27 = 70")
    assert scores.right("the correct answer is answer1\n", "the correct answer is answer1")
    assert not scores.right("the correct answer is answer2", "the correct answer is answer1")


def test_of_losses_the_lowest_is_best(scripts: Any) -> None:
    tables = scripts("quality_tables")
    rows = [
        tables.Run("rates", "mawps", "sift", 0.01, rate, 1, metric="loss", score=score)
        for rate, score in ((1e-3, 0.6), (2e-3, 0.5), (4e-3, 0.7))
    ]
    assert tables.best_rate(rows) == 2e-3


def test_a_line_of_a_study_without_more_is_what_it_was(scripts: Any) -> None:
    tables = scripts("quality_tables")
    row = tables.Run("runs", "cola", "sift", 0.01, 1e-3, 1)
    assert "more" not in row.to_json()
    assert tables.Run(**row.to_json()) == row


def test_what_a_stage_takes_is_told_and_nothing_begun(
    scripts: Any, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language = scripts("language")
    asked = [*words, "--methods", "sift", "full", "--seeds", "3", "4", "--dry-run"]
    language.main(["runs", *asked])
    said = capsys.readouterr().out
    assert "sift: 4 runs, " in said
    assert "all: 8 runs, " in said
    language.main(["rates", *asked, "--tries", "3"])
    assert "all: 12 runs, " in capsys.readouterr().out
    assert not (tmp_path / "o").exists()
    evidence = [*words, "--methods", "sign-descent", "sign-descent+few", "--dry-run"]
    language.main(["runs", *evidence])
    most, few, _ = (float(line.split()[-2]) for line in capsys.readouterr().out.splitlines())
    assert most - few == pytest.approx(96 * language.STEP * 6 / 3600, abs=0.02)


def test_both_tasks_are_recipes(scripts: Any, words: list[str], tmp_path: Path) -> None:
    language, study = scripts("language"), scripts("study")
    design = study.Design(language.SHARED, language.TASKS, language.middle)
    own = study.Study(design, words[1], words[3], tmp_path / "o")
    for task in language.TASKS:
        for stage in ("rates", "runs"):
            path = own.recipe(study.Run(stage, task, "sift", 0.01, 1e-3, 3))
            assert load_recipe(path).data.task == "instruct"
            assert ("holdout" in yaml.safe_load(path.read_text())["data"]) == (stage == "rates")
    assert language.middle("sift", 0.01) == pytest.approx(5e-4)  # a quarter of sign-descent's
    assert language.middle("full", None) == pytest.approx(5e-5)
