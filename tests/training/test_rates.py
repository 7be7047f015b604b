"""`learning_rate: auto`: what is tried, on which rows, what is taken, and how it goes on."""

import json
import math
from io import StringIO
from itertools import pairwise
from pathlib import Path
from signal import SIGKILL, SIGTERM
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from sift_cli.analysis.adapted import train_adapted
from sift_cli.analysis.plan import plan
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe, parse_recipe, usual_rate
from sift_cli.runs.folder import RATES_FILE, RECIPE_FILE, SUMMARY_FILE, TRAINED_FILE
from sift_cli.runs.session import load_rows, open_session
from sift_cli.runs.summary import Summary
from sift_cli.runs.tuned import load_tuned
from sift_cli.selection.policies import POLICIES
from sift_cli.tasks.metrics import LOSS
from sift_cli.training import rates as module
from sift_cli.training import train
from sift_cli.training.rates import (
    at_best_rate,
    search,
    steps_of_trial,
    trial_of,
    usual_rate_for,
    with_rate,
)
from tests.support.command import sift
from tests.support.forks import forked
from tests.support.rows import write_rows


@pytest.fixture
def auto(recipe_file: Path, data: Path) -> Path:
    """A recipe that leaves its rate open, with 120 rows: 15 steps of 8, trials of 10."""
    write_rows(data / "train.jsonl", 120, seed=1)
    text = recipe_file.read_text().replace("learning_rate: 1.0e-2", "learning_rate: auto")
    recipe_file.write_text(text)
    return recipe_file


@pytest.mark.parametrize("best", [1e-5, 2.4e-4, 1e-3, 2e-3, 5e-3, 1.6e-2, 1.0])
def test_the_lowest_loss_is_taken_and_the_edge_extended(best: float) -> None:
    tried = search(2e-3, lambda rate: abs(math.log(rate / best)))
    usual = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert list(tried)[:5] == usual
    low, high = [2.5e-4, 1.25e-4], [1.6e-2, 3.2e-2]
    beyond = {1e-5: low, 2.4e-4: low, 1.6e-2: high, 1.0: high}
    assert list(tried)[5:] == beyond.get(best, [])


@given(st.lists(st.floats(0, 10) | st.just(math.inf), min_size=7, max_size=7), st.floats(1e-6, 1))
def test_a_search_ends_at_its_best(losses: list[float], middle: float) -> None:
    left = iter(losses)
    tried = search(middle, lambda rate: next(left))
    assert 5 <= len(tried) <= 7
    assert list(tried.values()) == losses[: len(tried)]
    best = module.best_of(tried)
    assert tried[best] == min(losses[: len(tried)])
    ordered = sorted(tried)
    assert all(1.9 < high / low < 2.1 for low, high in pairwise(ordered))
    if len(tried) < 7:
        assert ordered[0] < best < ordered[-1]


def test_where_all_diverge_it_goes_down() -> None:
    assert sorted(search(2e-3, lambda rate: math.inf))[:2] == [1.25e-4, 2.5e-4]


def test_fewer_entries_take_larger_steps() -> None:
    assert [usual_rate(share) for share in (1.0, 0.01, 0.001)] == [1e-4, 4e-3, 0.032]
    assert usual_rate(0.1) == pytest.approx(math.sqrt(1e-4 * 4e-3), rel=0.02)
    assert usual_rate(1e-5) == 0.032  # what was not tried is not guessed
    assert usual_rate(0.01, 0.5) == 2e-3


def test_the_usual_rate_is_that_of_the_policy_at_the_share_that_trains(recipe_file: Path) -> None:
    def rate(*changes: str) -> float:
        return with_rate(
            load_recipe(recipe_file, ["train.learning_rate=null", *changes])
        ).train.rate

    def at(share: float) -> float:
        return usual_rate(share, POLICIES["sift"].pace)

    session = open_session(load_recipe(recipe_file))
    linear = {
        name: module.weight.numel()
        for name, module in session.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "classifier"
    }
    total = sum(linear.values())
    query = sum(size for name, size in linear.items() if name.endswith("query"))
    assert rate() == at(0.05) != rate("selection.policy=random") == usual_rate(0.05)
    assert rate("selection.density=1.0") == at(1.0)
    assert rate(f"selection.budget={total // 20}") == pytest.approx(at(0.05), rel=0.05)
    assert rate(f"selection.budget={total // 2}") == pytest.approx(at(0.5), rel=0.05)
    vectors = [f"selection.budget={total // 2}", "selection.vectors=true"]
    assert rate(*vectors) == pytest.approx(at(0.5), rel=0.05)
    mixed = "selection.density={default: 0.01, query: 1.0}"
    share = (query + 0.01 * (total - query)) / total
    assert rate(mixed) == pytest.approx(at(share), rel=0.05)
    with pytest.raises(SiftError, match=r"^selection.budget: 9,999,999 entries asked for"):
        rate("selection.budget=9999999")


def test_a_budget_runs_no_code_of_a_file(recipe_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef own(weight): return weight")
    changes = ["train.learning_rate=null", f"selection.score={own}:own", "selection.budget=99"]
    with pytest.raises(SiftError, match="--allow-code"):
        train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "source"), [("0.01", "recipe"), ("null", "usual"), ("auto", "auto")]
)
def test_where_the_rate_comes_from_is_told(
    given: str, source: str, auto: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(auto, [f"train.learning_rate={given}", "train.max_steps=2"])
    said = StringIO()
    found = train(recipe, tmp_path / "run", console=Console(file=said, width=200))
    stored = json.loads((tmp_path / "run" / SUMMARY_FILE).read_text())
    rate = load_recipe(tmp_path / "run" / RECIPE_FILE).train.rate
    assert (stored["learning_rate"], stored["learning_rate_from"]) == (rate, source)
    assert (found.learning_rate, found.learning_rate_from) == (rate, source)
    usual = (
        "learning rate 0.00028: the usual one of sift at 5 % of the entries of a model 16 wide\n"
    )
    assert (usual in said.getvalue()) is (source == "usual")


@pytest.mark.parametrize(("rows", "few"), [(120, True), (1990, True), (2000, False)])
def test_few_rows_to_compare_rates_on_are_told(
    rows: int, few: bool, auto: Path, data: Path, tmp_path: Path
) -> None:
    write_rows(data / "train.jsonl", rows, seed=1)
    (tmp_path / "run").mkdir()
    said = StringIO()
    at_best_rate(
        load_recipe(auto),
        tmp_path / "run",
        lambda recipe, folder: SimpleNamespace(metrics={LOSS: 1.0}),
        1e-3,
        Console(file=said, width=300),
    )
    warned = f"auto has {rows // 10} rows to compare rates on; with fewer than 200 chance"
    assert (warned in said.getvalue()) is few


@pytest.mark.parametrize(
    ("sizes", "rate"),
    [
        ({"hidden_size": 384}, 4e-3),
        ({"hidden_size": 4096}, 3.75e-4),
        ({"hidden_size": 32}, 4e-3),  # narrower ones were not tried
        ({"model_type": "gpt2", "n_embd": 768}, 2e-3),
        ({"model_type": "t5", "d_model": 1024}, 1.5e-3),
    ],
)
def test_wider_models_take_smaller_steps(
    tmp_path: Path, sizes: dict[str, Any], rate: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    text = f"model: {{path: {tmp_path}}}\ndata: {{path: d, task: rte}}\n"
    assert with_rate(parse_recipe(text, "r")).train.learning_rate == pytest.approx(rate)
    assert with_rate(parse_recipe(text, "r"), 0.5).train.rate == pytest.approx(125 * rate, rel=0.01)
    given = parse_recipe(text + "train: {learning_rate: 0.1}", "r")
    assert with_rate(given) is given


@pytest.mark.parametrize(("steps", "trial"), [(1, 1), (9, 9), (50, 10), (100, 10), (1234, 124)])
def test_steps_of_a_trial(steps: int, trial: int) -> None:
    assert steps_of_trial(steps) == trial


@pytest.mark.parametrize("change", ["data.holdout=0.2", "data.max_train_rows=60", "eval.every=3"])
def test_a_trial_sees_training_rows_alone(auto: Path, change: str) -> None:
    recipe = load_recipe(auto, [change])
    run, trial = load_rows(recipe), load_rows(trial_of(recipe, 1e-3, 10))
    trains = set(run.train["row"])
    inner, held_out = set(trial.train["row"]), set(trial.evaluation[""]["row"])
    assert inner | held_out == trains
    assert not inner & held_out
    assert len(held_out) == math.ceil(len(trains) / 10)
    texts = dict(zip(run.train["row"], run.train["text"], strict=True))
    for rows in (trial.train, trial.evaluation[""]):
        assert all(texts[row] == text for row, text in zip(rows["row"], rows["text"], strict=True))


def test_a_trial_predicts_what_the_run_does(auto: Path, data: Path) -> None:
    for file in data.glob("*.jsonl"):  # 0.0 and 1.0: two classes, unless a metric is of numbers
        text = file.read_text()
        file.write_text(text.replace('"label": 0', '"label": 0.0').replace(": 1}", ": 1.0}"))
    custom = ["data.task=custom", "data.text=sentence", "data.label=label"]
    for metric, numbers in (("pearson", True), ("accuracy", False)):
        recipe = load_recipe(auto, [*custom, f"data.metrics=[{metric}]"])
        for one in (recipe, trial_of(recipe, 1e-3, 10)):
            assert (load_rows(one).labels is None) == numbers


def test_the_validation_rows_are_not_looked_at(auto: Path, data: Path, tmp_path: Path) -> None:
    train(load_recipe(auto), tmp_path / "one")
    write_rows(data / "validation.jsonl", 30, seed=9)
    train(load_recipe(auto), tmp_path / "other")
    found = [(tmp_path / name / RATES_FILE).read_text() for name in ("one", "other")]
    assert found[0] == found[1]


@pytest.mark.parametrize("numbers", [False, True])
def test_the_loss_of_a_split_is_that_of_the_model(numbers: bool, auto: Path, data: Path) -> None:
    changes = [f"data.metrics=[{LOSS}]", "data.task=custom", "data.text=sentence"]
    for file in data.glob("*.jsonl") if numbers else ():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        changed = [{**row, "label": row["label"] + at / 100} for at, row in enumerate(rows)]
        file.write_text("\n".join(map(json.dumps, changed)))
    session = open_session(load_recipe(auto, [*changes, "data.label=label"]))
    assert (session.model.config.num_labels == 1) is numbers
    found = session.evaluate()[LOSS]
    total, count = 0.0, 0
    session.model.eval()
    rows = session.evaluation[""]
    with torch.no_grad():
        for at in range(len(rows)):
            loss = session.task.loss(session.model, session.collate(rows.take([at])))
            total, count = total + float(loss.sum), count + loss.count
    assert found == pytest.approx(total / count, rel=1e-5)


def test_the_run_is_that_of_the_number_taken(auto: Path, tmp_path: Path) -> None:
    console = Console(file=(tmp_path / "said").open("w"), width=200)
    summary = train(load_recipe(auto), tmp_path / "auto", console=console)
    found = json.loads((tmp_path / "auto" / RATES_FILE).read_text())
    losses = {one["learning_rate"]: one["loss"] for one in found["tried"]}
    assert len(losses) >= 5
    assert losses[found["taken"]] == min(losses.values())
    assert found["steps"] == 10
    for rate, loss in losses.items():
        own = tmp_path / "auto/rates" / f"{rate:g}"
        assert json.loads((own / SUMMARY_FILE).read_text())["metrics"] == {LOSS: loss}
        assert not list(own.glob("*.safetensors"))
        alone = train(trial_of(load_recipe(auto), rate, 10), tmp_path / f"alone-{rate:g}")
        assert alone.metrics[LOSS] == loss
    fixed = load_recipe(auto, [f"train.learning_rate={found['taken']}"])
    assert train(fixed, tmp_path / "fixed").metrics == summary.metrics
    one, other = (load_tuned(str(tmp_path / name), None) for name in ("auto", "fixed"))
    for (name, weight), same in zip(
        one[0].model.named_parameters(), other[0].model.parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
    settings = one[1].train
    assert (settings.learning_rate, settings.learning_rate_from) == (found["taken"], "auto")
    assert load_recipe(tmp_path / "auto" / RECIPE_FILE).train == settings
    console.file.close()
    said = (tmp_path / "said").read_text()
    assert f"learning rate {found['taken']:g} taken, of {len(losses)}" in said
    for rate, loss in losses.items():
        assert f"learning rate {rate:g}: held-out loss {loss:.4f}" in said


def test_another_rate_takes_the_note_away(auto: Path, tmp_path: Path) -> None:
    train(load_recipe(auto, ["train.max_steps=2"]), tmp_path / "run")
    again = load_recipe(tmp_path / "run" / RECIPE_FILE, ["train.learning_rate=0.5"])
    assert (again.train.learning_rate, again.train.learning_rate_from) == (0.5, None)


def counted(monkeypatch: pytest.MonkeyPatch, diverges: Any = lambda rate: False) -> list[float]:
    """The rates that trials really train at, as they begin; some diverge."""
    ran: list[float] = []
    from sift_cli.training import loop

    inner = loop.take_steps

    def take_steps(run: Any, *rest: Any) -> None:
        ran.append(run.settings.rate)
        if diverges(run.settings.rate):
            with torch.no_grad():
                next(run.session.model.parameters()).fill_(math.nan)
        inner(run, *rest)

    monkeypatch.setattr(loop, "take_steps", take_steps)
    return ran


def test_finished_trials_are_kept(
    auto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = load_recipe(auto), tmp_path / "run"
    train(recipe, tmp_path / "whole")
    ran = counted(monkeypatch)
    inner = module.search

    def cut(middle: float, loss_at: Any) -> dict[float, float]:
        left = iter(range(2))

        def until_two(rate: float) -> float:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return loss_at(rate)

        return inner(middle, until_two)

    monkeypatch.setattr(module, "search", cut)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out)
    assert len(ran) == 2
    monkeypatch.setattr(module, "search", inner)
    with pytest.raises(SiftError, match=r"interrupted amid its trials .*--resume.*--overwrite"):
        train(recipe, out)
    found = train(recipe, out, resume=True)
    assert len(ran) == len(set(ran)) + 1  # the run itself has the rate of a trial
    assert (
        found.delta_sha256
        == json.loads((tmp_path / "whole/summary.json").read_text())["delta_sha256"]
    )
    ran.clear()
    assert train(recipe, out, resume=True).to_json() == found.to_json()
    assert ran == []
    train(recipe, out, overwrite=True)
    assert len(ran) >= 6
    with pytest.raises(SiftError, match="finished run"):
        train(recipe, out)
    train(load_recipe(auto, ["train.learning_rate=0.01"]), out, overwrite=True)
    assert not (out / RATES_FILE).exists()
    assert not (out / "rates").exists()


def test_a_rate_that_diverges_is_the_worst(
    auto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(auto)
    middle = usual_rate_for(recipe)
    counted(monkeypatch, lambda rate: rate > middle / 3)
    train(recipe, tmp_path / "run")
    found = json.loads((tmp_path / "run" / RATES_FILE).read_text())
    assert found["taken"] < middle / 3
    diverged = [one["learning_rate"] for one in found["tried"] if one["loss"] is None]
    assert diverged == [one for one in sorted(diverged) if one > middle / 3] != []


def test_where_all_diverge_it_is_one_error(
    auto: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = counted(monkeypatch, lambda rate: True)
    done = sift("train", auto, "--out", tmp_path / "run", "--quiet")
    assert done.returncode == 4
    assert "train.learning_rate: auto: all of " in done.stderr
    assert len(ran) == 7
    assert not (tmp_path / "run" / SUMMARY_FILE).exists()


def test_too_few_rows_are_one_located_error(auto: Path, data: Path, tmp_path: Path) -> None:
    write_rows(data / "train.jsonl", 49, seed=1)
    done = sift("train", auto, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "train.learning_rate: auto" in done.stderr
    assert "49 are too few" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0", "-1", "soon", ".nan", "[auto]"])
def test_neither_a_rate_nor_auto(value: str) -> None:
    text = "model: {path: m}\ndata: {path: d, task: rte}\n"
    with pytest.raises(SiftError, match=r"^--set train.learning_rate=.*: train.learning_rate: "):
        parse_recipe(text, "r.yaml", [f"train.learning_rate={value}"])


@pytest.mark.parametrize("method", ["lora", "full", "head-only"])
def test_a_baseline_finds_its_own(method: str, auto: Path, tmp_path: Path) -> None:
    recipe = load_recipe(auto)
    own = train_adapted(recipe, method, tmp_path / "auto")
    found = json.loads((tmp_path / "auto" / RATES_FILE).read_text())
    middle = {"full": 2e-4, "head-only": 2e-3}.get(method, 2e-3)
    assert middle in [one["learning_rate"] for one in found["tried"]]
    fixed: Recipe = load_recipe(auto, [f"train.learning_rate={found['taken']}"])
    other = train_adapted(fixed, method, tmp_path / "fixed")
    assert own.metrics == other.metrics
    files = [load_file(tmp_path / name / TRAINED_FILE) for name in ("auto", "fixed")]
    assert all(torch.equal(weight, files[1][name]) for name, weight in files[0].items())


def test_plan_counts_the_trials_and_no_command_needs_a_number(auto: Path, tmp_path: Path) -> None:
    found = plan(load_recipe(auto), measure=True)
    assert found["data"]["trial_steps"] == 50
    assert found["data"]["trial_passes"] == 55  # each trial chooses by one batch
    assert plan(load_recipe(auto, ["train.learning_rate=1"]))["data"]["trial_steps"] == 0
    done = sift("plan", auto)
    assert "50 more steps, and 5 batches ahead of them, try rates" in done.stdout
    assert sift("probe", auto, "--steps", 2, "--out", tmp_path / "probe").returncode == 0
    late = ["--set", "selection.policy=sift", "--set", "selection.schedule=after-warmup"]
    out = ["--out", tmp_path / "run", "--set", "train.max_steps=2", "--quiet"]
    done = sift("train", auto, *late, "--set", "selection.warmup_steps=2", *out)
    assert done.returncode == 0, done.stderr


def test_a_search_that_is_killed_goes_on(auto: Path, tmp_path: Path) -> None:
    """Amid its second trial, of ten steps, and when it has gone on amid its third."""
    changes = ["train.epochs=3", "train.max_steps=40", "checkpoint.every=4"]
    train(load_recipe(auto, changes), tmp_path / "whole")
    out = tmp_path / "killed"
    words = ["train", auto, "--out", out, *(one for change in changes for one in ("--set", change))]
    killed = forked("tests.support.dying", 16, int(SIGKILL), *words)
    assert killed.returncode == -SIGKILL
    assert len(list(out.glob("rates/*/checkpoint/*.safetensors"))) > 1
    assert len(list(out.glob("rates/*/summary.json"))) == 1
    assert not (out / RATES_FILE).exists()
    asked = forked("tests.support.dying", 12, int(SIGTERM), *words, "--resume")
    assert asked.returncode == 130
    assert "--resume" in asked.stderr.splitlines()[-1]
    assert len(list(out.glob("rates/*/summary.json"))) == 2
    done = sift(*words, "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    digests = [Summary.read(where).delta_sha256 for where in (tmp_path / "whole", out)]
    assert digests[0] == digests[1]
    assert (out / RATES_FILE).read_text() == (tmp_path / "whole" / RATES_FILE).read_text()
