"""`sift compare`: equal conditions, kept runs, an honest table."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from scipy import stats

from sift_cli.analysis.adapted import train_adapted
from sift_cli.analysis.compare import (
    best_rate,
    compare,
    compare_runs,
    notes_on_rates,
    usual_methods,
)
from sift_cli.analysis.jobs import Job, Runner, rates_of
from sift_cli.analysis.methods import adapted_layers, rank_for
from sift_cli.analysis.table import (
    Diverged,
    FinishedRun,
    PairedDifference,
    Spread,
    markdown,
    tabulated,
)
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe, parse_recipe
from sift_cli.runs.folder import TRAINED_FILE
from sift_cli.runs.summary import Summary
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.metrics import METRICS, Metric
from sift_cli.training import train
from tests.support.command import ENV, job_here, sift, until
from tests.support.models import tiny_model
from tests.support.rows import write_rows


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the processes of a comparison in this one; the names of those that ran."""
    ran: list[str] = []

    def run(runner: Runner, command: list[str]) -> tuple[int, str]:
        _, _, module, *args = command
        ran.append(Path(args[-1] if module != "sift_cli" else args[3]).name)
        return job_here(runner, command)

    monkeypatch.setattr(Runner, "_process", run)
    return ran


def test_full_is_training_at_density_1(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["selection.density=1.0", "selection.target=all", "train.learning_rate=0.001"]
    recipe = load_recipe(recipe_file, [*changes, "eval.keep=last"])
    own = train(recipe, tmp_path / "own")
    other = train_adapted(recipe, "full", tmp_path / "other")
    model = load_tuned(str(tmp_path / "own"), None)[0].model
    weights = load_file(tmp_path / "other" / TRAINED_FILE)
    for name, weight in model.named_parameters():
        if name.endswith("key.bias"):  # its gradient is 0, so Adam follows rounding errors
            continue
        assert torch.allclose(weight, weights[name], atol=1e-5), name
    assert other.metrics == pytest.approx(own.metrics, rel=1e-6)
    assert other.metrics_before == own.metrics_before
    assert other.steps == own.steps
    only = {"changed_entries", "truncated", "delta_sha256", "labels", "resumed_at", "skipped_steps"}
    assert own.to_json().keys() - other.to_json().keys() <= only


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors
@pytest.mark.parametrize("method", ["lora", "shira", "head-only"])
def test_what_a_method_trains(method: str, recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["selection.density=0.3", "train.max_steps=2"])
    own = train(recipe, tmp_path / "own")
    found = train_adapted(recipe, method, tmp_path / method)
    again = train_adapted(recipe, method, tmp_path / "again")
    assert found.metrics == again.metrics
    saved = load_file(tmp_path / method / TRAINED_FILE)
    assert found.dense_entries == own.dense_entries
    assert any(name.endswith("classifier.weight") for name in saved)
    if method == "head-only":
        assert found.trained_entries == 0
    else:
        across = 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 + 16  # and the pooler
        assert found.trained_entries == found.rank * across
        assert abs(found.trained_entries - own.trained_entries) <= across / 2


def test_the_rank_comes_nearest() -> None:
    model = tiny_model("bert")
    names = [name for name, weight in model.named_parameters() if "layer" in name]
    layers = adapted_layers(model, names)
    assert all(not layer.endswith("LayerNorm") for layer in layers)
    per_rank = 2 * (4 * 32 + 2 * 48)
    assert rank_for(model, layers, 3 * per_rank + 5) == (3, 3 * per_rank)
    assert rank_for(model, layers, 1) == (1, per_rank)
    with pytest.raises(SiftError, match="nothing to adapt"):
        rank_for(model, [], 5)


def test_methods_that_find_their_rates(
    recipe_file: Path, data: Path, tmp_path: Path, here: list[str]
) -> None:
    write_rows(data / "train.jsonl", 64, seed=1)
    recipe = load_recipe(recipe_file, ["train.max_steps=2"])
    rates = {"sift": "auto", "head-only": "auto"}
    methods = ["sift", "random", "head-only"]
    found = compare(recipe, tmp_path / "out", methods=methods, seeds=2, rates=rates)
    assert [row.learning_rate for row in found.rows if row.method != "random"] == ["auto"] * 2
    assert found.rows[1].learning_rate == pytest.approx(0.04, rel=0.03)
    assert found.notes[0].startswith("auto (sift, head-only): ")
    assert any("none was tuned" in note for note in found.notes)
    assert "| auto |" in markdown(found)
    folders = sorted((tmp_path / "out/runs").glob("sift-rauto-s*"))
    assert len(folders) == 2
    taken = [json.loads((one / "rates.json").read_text())["taken"] for one in folders]
    alone = compare_runs(folders)
    assert [(row.learning_rate, row.seeds) for row in alone.rows] == [("auto", 2)]
    assert all(load_recipe(one / "recipe.yaml").train.rate in taken for one in folders)
    open_rate = load_recipe(recipe_file, ["train.learning_rate=auto"])
    assert notes_on_rates([Job.of(open_rate, "full", None, "auto", 1)])[-1].startswith(
        "auto (full)"
    )
    assert rates_of(open_rate, "full", None, {}, 1) == ["auto"]
    with pytest.raises(SiftError, match="--lr-sweep 3: full has auto"):
        rates_of(open_rate, "full", None, {}, 3)


def test_a_comparison(recipe_file: Path, tmp_path: Path, here: list[str]) -> None:
    recipe, out = load_recipe(recipe_file, ["train.max_steps=2"]), tmp_path / "out"
    methods = ["sift", "random", "lora", "full"]
    found = compare(recipe, out, methods=methods, seeds=2, densities=[0.02, 0.1])
    assert len(here) == 2 * (3 * 2 + 1)
    assert json.loads((out / "compare.json").read_text()) == found.to_json()
    assert (out / "compare.png").stat().st_size > 5000
    table = (out / "compare.md").read_text()
    assert all(f"| {method}" in table for method in ("sift at 0.1", "lora at 0.02", "full |"))
    rows = {(row.method, row.density): row for row in found.rows}
    assert rows["full", None].learning_rate == pytest.approx(4e-2 * 0.05**0.8, rel=0.02)
    assert rows["random", 0.1].learning_rate == pytest.approx(0.04 * 2**-0.8, rel=0.03)
    other, own = rows["random", 0.1], rows["sift", 0.1]
    assert other.trained_entries == own.trained_entries
    scores = [row.metrics["accuracy"].values for row in (other, own)]
    against = other.against
    assert against.difference == pytest.approx(sum(scores[0]) / 2 - sum(scores[1]) / 2)
    if against.p is not None:
        assert against.p == pytest.approx(stats.ttest_rel(*scores).pvalue)
    assert own.against is None
    alone = load_recipe(recipe_file, ["train.max_steps=2", "selection.density=0.1"])
    single = train(alone, tmp_path / "single")
    assert own.metrics["accuracy"].values[0] == single.metrics["accuracy"]
    here.clear()
    more = compare(recipe, out, methods=[*methods, "head-only"], seeds=2, densities=[0.02, 0.1])
    assert len(here) == 2
    assert more.rows[:-1] == found.rows
    unfinished = next((out / "runs").glob("random-*"))
    (unfinished / "summary.json").unlink()
    here.clear()
    compare(recipe, out, methods=methods, seeds=2, densities=[0.02, 0.1])
    assert here == [unfinished.name]


def test_a_sweep_takes_the_best_rate(recipe_file: Path, tmp_path: Path, here: list[str]) -> None:
    recipe = load_recipe(recipe_file, ["train.max_steps=3", "eval.every=1"])
    found = compare(recipe, tmp_path, methods=["sift", "random"], seeds=2, sweep=3)
    assert len(here) == 2 * 3 + 2
    scores: dict[str, dict[float, float]] = {"sift": {}, "random": {}}
    for summary in tmp_path.glob("runs/*-s3-*/summary.json"):
        method, rate = summary.parent.name.split("-r")[0], summary.parent.name.split("-r")[-1]
        value = json.loads(summary.read_text())["metrics"]["accuracy"]
        scores[method][float(rate.rpartition("-s")[0])] = value
    for row in found.rows:
        own = scores[row.method]
        assert own[row.learning_rate] == max(own.values())
    assert any("evaluation split" in note for note in found.notes)


@pytest.mark.parametrize("rises", [True, False])
def test_the_best_rate_follows_the_metric_and_passes_over_what_is_undefined(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, rises: bool
) -> None:
    monkeypatch.setitem(METRICS, "made-up", Metric(lambda: None, (), rises=rises))
    recipe = load_recipe(recipe_file)

    def best(*scores: float | None) -> float | None:
        jobs = [Job.of(recipe, "sift", None, 10.0**at, 0) for at in range(len(scores))]
        found = {
            job: SimpleNamespace(metrics={"made-up": score, "accuracy": 0.5})
            for job, score in zip(jobs, scores, strict=True)
        }
        job, _ = best_rate(jobs, found)
        return scores[jobs.index(job)]

    assert best(None, 0.25, 0.75, None, 0.5) == (0.75 if rises else 0.25)
    jobs = [Job.of(recipe, "sift", None, rate, 0) for rate in (1.0, 2.0, 3.0)]
    same = {job: SimpleNamespace(metrics={"made-up": None}) for job in jobs}
    assert best_rate(jobs, same)[0] is jobs[0]
    diverged = {jobs[1]: SimpleNamespace(metrics={"made-up": None})}
    assert best_rate(jobs, diverged)[0] is jobs[1]


def test_rates_lie_around_the_recipe_s() -> None:
    text = "model: {path: m}\ndata: {path: d, task: rte}\ntrain: {learning_rate: 1e-3}\n"
    recipe = parse_recipe(text, "r.yaml")
    assert rates_of(recipe, "sign-descent", None, {}, 1) == [1e-3]
    assert rates_of(recipe, "sign-descent", 0.01, {}, 3) == [0.00032, 0.001, 0.0032]
    assert rates_of(recipe, "random", 0.001, {}, 1) == [0.008]
    assert rates_of(recipe, "sift", None, {}, 1) == [2.5e-4]
    assert rates_of(recipe, "lora", None, {}, 1) == [2.5e-4]
    assert rates_of(recipe, "lora", 0.001, {}, 1) == [2.5e-4]  # whatever its rank
    assert rates_of(recipe, "full", None, {}, 1) == [2.5e-5]
    assert rates_of(recipe, "full", None, {"full": 1e-4}, 1) == [1e-4]
    published = parse_recipe(text, "r.yaml", ["selection.policy=sift"])
    assert rates_of(published, "sift", None, {}, 1) == [1e-3]
    assert rates_of(published, "sign-descent", None, {}, 1) == [4e-3]


def test_a_budget_is_a_share_for_the_rates_of_others(recipe_file: Path) -> None:
    same = ["selection.budget=218", "train.learning_rate=1e-3"]  # 5 % of 4,352
    budget = load_recipe(recipe_file, same)
    density = load_recipe(recipe_file, same[1:])
    for method in ("sift", "random", "lora", "full"):
        rates = [rates_of(recipe, method, None, {}, 1) for recipe in (budget, density)]
        assert rates[0] == pytest.approx(rates[1], rel=0.06)  # of two digits each


def test_a_method_that_diverges_is_told(recipe_file: Path, tmp_path: Path, here: list[str]) -> None:
    recipe = load_recipe(recipe_file, ["train.lr_schedule=constant", "train.warmup=0"])
    said = r"sift diverged \(seed 3, learning rate 1e\+30\): step 2: the .* is nan"
    with pytest.raises(SiftError, match=said) as raised:
        compare(recipe, tmp_path, methods=["sift"], seeds=1, rates={"sift": 1e30})
    assert raised.value.code == 4
    assert "--lr sift=RATE" in str(raised.value)


@pytest.mark.parametrize("sweep", [1, 2])
def test_others_go_on_where_a_method_diverges(
    sweep: int, recipe_file: Path, tmp_path: Path, here: list[str]
) -> None:
    args = ["--methods", "sift,random", "--seeds", "1", "--lr", "sift=1e30", "--out", tmp_path]
    args += ["--set", "train.lr_schedule=constant", "--set", "train.warmup=0"]
    done = sift("compare", recipe_file, *args, "--lr-sweep", sweep, "--json")
    assert done.returncode == 4
    assert done.stderr.count("sift diverged (seed 3, learning rate") == sweep
    found = json.loads(done.stdout)
    assert [row["method"] for row in found["rows"]] == ["random"]
    assert [one["method"] for one in found["diverged"]] == ["sift"] * sweep
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    assert "- sift diverged (seed 3, learning rate" in (tmp_path / "compare.md").read_text()


def test_a_row_tells_which_of_its_runs_diverged() -> None:
    lost = Diverged("sift", 0.1, 1e-3, 2, "no number")
    found = tabulated([run("sift", 1, f1=0.5), run("random", 1, f1=0.5)], [], [lost])
    assert [row.diverged for row in found.rows] == [1, 0]
    assert "| sift at 0.1, 1 of 2 diverged |" in markdown(found)


def test_an_evaluation_that_is_not_finite_is_placed(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(tmp_path, 1, None, False, Console(quiet=True))
    job = Job.of(parse_recipe(recipe_file.read_text(), "recipe"), "sift", None, 1e-3, 4)
    log = tmp_path / "runs" / job.name / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 10}\n{"step": 20}\n{"st')
    for said in ("evaluation: the outputs are not finite", "step 21: the loss is nan"):
        monkeypatch.setattr(Runner, "_process", lambda *_, said=said: (4, f"told before\n{said}\n"))
        placed = "; the last step it logged is 20" if said.startswith("evaluation") else ""
        assert runner.run([job], "run")[job].said == said + placed


def test_emulated_bfloat16_is_told(
    recipe_file: Path, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    recipe = load_recipe(recipe_file, ["train.precision=bfloat16", "train.max_steps=1"])
    said = StringIO()
    console = Console(file=said, width=200)
    compare(recipe, tmp_path, methods=["sift"], seeds=1, console=console)
    assert said.getvalue().count("train.precision: this CPU emulates bfloat16") == 1


def test_a_failing_run_is_named(recipe_file: Path, tmp_path: Path, here: list[str]) -> None:
    recipe = load_recipe(recipe_file, ["data.text=nope"])
    with pytest.raises(SiftError, match=r"sift-r0.01-s3-\w+: .*no column 'nope'"):
        compare(recipe, tmp_path, methods=["sift"], seeds=1)


def test_a_job_is_its_recipe(recipe_file: Path) -> None:
    base = load_recipe(recipe_file, ["selection.structure=row"])
    own = Job.of(base, "sift", None, 1e-3, 4)
    assert own.recipe.selection.structure == "row"
    other = Job.of(base, "fisher", 0.2, 1e-3, 4)
    assert (other.recipe.selection.scope, other.recipe.selection.structure) == ("global", "entry")
    assert other.recipe.selection.density == 0.2
    assert own.name != Job.of(base, "sift", None, 1e-3, 5).name
    longer = load_recipe(recipe_file, ["selection.structure=row", "train.epochs=2"])
    assert own.name != Job.of(longer, "sift", None, 1e-3, 4).name
    full = [Job.of(base, "full", density, 1e-3, 4).name for density in (None, 0.1)]
    assert full[0].rpartition("-")[2] == full[1].rpartition("-")[2]


def test_finished_runs_side_by_side(recipe_file: Path, tmp_path: Path) -> None:
    for policy in ("sift", "random"):
        for seed in (1, 2):
            changes = [f"selection.policy={policy}", f"train.seed={seed}", "train.max_steps=2"]
            train(load_recipe(recipe_file, changes), tmp_path / f"{policy}-{seed}")
    folders = [tmp_path / f"{policy}-{seed}" for policy in ("sift", "random") for seed in (1, 2)]
    found = compare_runs(folders)
    assert [(row.method, row.seeds) for row in found.rows] == [("sift", 2), ("random", 2)]
    done = sift("compare", *folders)
    assert done.returncode == 0, done.stderr
    assert "random at 0.05" in done.stdout
    train_adapted(load_recipe(recipe_file, changes), "head-only", tmp_path / "head")
    head = compare_runs([*folders, tmp_path / "head"]).rows[-1]
    assert (head.method, head.density) == ("head-only", None)  # whatever the recipe says
    assert head.against.seeds == 1
    assert compare_runs([folders[2], folders[0]]).reference == "random"  # the first
    own = finished(tmp_path / "own", run("sign-descent", 1, task="sst2", accuracy=0.5))
    assert compare_runs([*folders, own]).reference == "sign-descent"  # the default
    wrong = sift("compare", folders[0], tmp_path / "none")
    assert wrong.returncode == 2
    assert "no such run folder" in wrong.stderr
    (tmp_path / "empty").mkdir()
    assert "no finished run" in sift("compare", tmp_path / "empty").stderr


def run(
    method: str, seed: int, density: float = 0.1, task: str = "rte", **metrics: float | None
) -> FinishedRun:
    """A run of which no more is known than its scores."""
    measured = {"step_time_ms": 1.0, "train_time_s": 1.0, "wall_time_s": 1.0}
    measured |= {"peak_memory_bytes": 1, "delta_bytes": 1, "device": "cpu", "bf16_autocast": False}
    counts = {"trained_entries": round(1000 * density), "dense_entries": 2, "total_entries": 1000}
    summary = Summary(
        task=task,
        policy=method,
        seed=seed,
        metrics=metrics,
        metrics_before=metrics,
        steps=1,
        kept_step=1,
        train_rows=1,
        **measured,
        **counts,
    )
    return FinishedRun(summary, method, density, 1e-3)


def test_rows_are_held_against_sift_at_their_density_by_seed() -> None:
    runs = [run("sift", seed, f1=0.5, loss=None) for seed in (1, 2)]
    runs += [run("sift", seed, density=0.2, f1=0.7, loss=1.0) for seed in (1, 2)]
    scores = {("rows", 0.1): (0.6, 0.8), ("rows", 0.3): (0.9, 0.9), ("random", 0.1): (None, 0.4)}
    for (method, density), values in scores.items():
        for seed, score in enumerate(values, start=1):
            runs.append(run(method, seed, density=density, f1=score, loss=1.0))
    found = tabulated(runs, ["a note"])
    assert found.metric == "f1"
    small, large, same, other, undefined = found.rows
    assert small.metrics == {
        "f1": Spread(0.5, 0.0, [0.5, 0.5]),
        "loss": Spread(None, None, [None] * 2),
    }
    assert small.against is large.against is None
    assert same.against.difference == pytest.approx(0.2)
    assert other.against == PairedDifference(pytest.approx(0.2), 2, None)  # from sift at 0.2
    assert undefined.metrics["f1"] == Spread(None, None, [None, 0.4])
    assert undefined.against == PairedDifference(pytest.approx(-0.1), 1, None)
    assert found.notes[0] == "a note"
    assert found.notes[1].startswith("p: paired t-test over 2 seeds")
    assert "| random at 0.1 | 100 | 0.001 | undefined | -0.1000 |  | 1 | 0 | 0 |" in markdown(found)


def test_rows_are_held_against_the_own_policy_or_the_first_method() -> None:
    scores = {"random": 0.5, "sign-descent": 0.75, "lora": 0.25}
    runs = [run(method, 1, f1=score) for method, score in scores.items()]

    def differences(own: str | None) -> tuple[str, list[float | None]]:
        found = tabulated(runs, [], own=own)
        return found.reference, [row.against and row.against.difference for row in found.rows]

    assert differences("sign-descent") == ("sign-descent", [-0.25, None, -0.5])
    assert differences("sift") == differences(None) == ("random", [None, 0.25, -0.25])
    table = markdown(tabulated(runs, [], own="sign-descent"))
    assert "| f1 (n=1) | to sign-descent | p |" in table
    assert "to sign-descent: mean difference from it" in table
    assert tabulated(runs, [], own="lora").to_json()["reference"] == "lora"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors
def test_the_usual_methods(recipe_file: Path, tmp_path: Path, here: list[str]) -> None:
    changes = ["--set", "selection.policy=sign-descent", "--set", "train.max_steps=1"]
    args = ["--seeds", "1", "--out", tmp_path / "out", "--json", *changes]
    done = sift("compare", recipe_file, *args)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    methods = ["sign-descent", "random", "lora", "shira", "full", "head-only"]
    assert [row["method"] for row in found["rows"]] == methods
    assert found["reference"] == "sign-descent"
    random = load_recipe(recipe_file, ["selection.policy=random"])
    assert usual_methods(random) == methods[1:]
    text = "model: {path: m}\ndata: {path: d, task: instruct}\n"
    assert usual_methods(parse_recipe(text, "r")) == methods[:-1]  # there is no head


def finished(folder: Path, one: FinishedRun, recipe: str = "") -> Path:
    """A run folder of which no more is known than its scores, and its recipe where one is given."""
    folder.mkdir()
    one.summary.write(folder)
    if recipe:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


CUSTOM = "model: {path: base}\ndata: {path: %s, task: custom, text: text, label: %s%s}\n"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"task": "cola", "matthews": 1.0}, "task is custom in the one and cola in the other"),
        ({"task": "custom", "pearson": 0.5}, "metrics is accuracy in the one and pearson in the"),
        (CUSTOM % ("b.csv", "label", ""), "data.path is a.csv in the one and b.csv in the other"),
        (CUSTOM % ("a.csv", "stars", ""), "data.label is label in the one and stars in the other"),
        (CUSTOM % ("a.csv", "label", ", holdout: 0.1"), "data.holdout is None in the one and 0.1"),
    ],
)
def test_runs_scored_otherwise_are_refused(
    other: str | dict[str, Any], said: str, tmp_path: Path
) -> None:
    recipe, known = (other, {}) if isinstance(other, str) else ("", other)
    one = run("sift", 1, task="custom", accuracy=1.0)
    two = run("sift", 2, **({"task": "custom", "accuracy": 1.0} if recipe else known))
    folders = [
        finished(tmp_path / "a", one, CUSTOM % ("a.csv", "label", "")),
        finished(tmp_path / "b", two, recipe),
    ]
    done = sift("compare", *folders)
    assert done.returncode == 2
    assert said in done.stderr
    assert "compare runs of one task, scored on the same rows by the same metrics" in done.stderr


def test_one_file_under_two_names_is_one_task(tmp_path: Path) -> None:
    recipes = [CUSTOM % (path, "label", "") for path in ("a.csv", Path("a.csv").resolve())]
    folders = [
        finished(tmp_path / f"{seed}", run("sift", seed, task="custom", f1=0.5), recipe)
        for seed, recipe in enumerate(recipes)
    ]
    assert compare_runs(folders).metric == "f1"


def test_the_table_tells_in_what_rows_differ(recipe_text: str, tmp_path: Path) -> None:
    steps = "\n  max_steps: 2\n".join(recipe_text.rsplit("\n", 1))
    random = [text.replace("policy: sift", "policy: random") for text in (recipe_text, steps)]
    folders = [
        finished(tmp_path / name, run(method, 1, accuracy=score), text)
        for name, method, score, text in (
            ("plain", "sift", 0.5, recipe_text),
            ("short", "sift", 0.25, steps),
            ("other", "random", 0.5, random[0]),
            ("other-short", "random", 0.5, random[1]),
        )
    ]
    found = compare_runs(folders[:3:2])
    assert [row.differs for row in found.rows] == [{}, {}]  # the policy's own choices are its name
    assert "(plain)" not in markdown(found)
    found = compare_runs(folders)
    assert [row.differs["train.max_steps"] for row in found.rows] == [None, 2, None, 2]
    table = markdown(found)
    assert "| sift at 0.05 (plain) |" in table
    assert "| sift at 0.05 (short) |" in table
    assert "- plain: train.max_steps unset" in table
    assert "- short: train.max_steps 2" in table
    differences = [row.against and row.against.difference for row in found.rows]
    assert differences == [None, -0.25, 0.0, 0.25]  # each from what was trained as long


def test_rows_of_folders_with_one_name_are_told_apart(recipe_text: str, tmp_path: Path) -> None:
    folders = []
    for at, text in enumerate([recipe_text, recipe_text + "eval: {every: 2}\n"]):
        (tmp_path / f"{at}").mkdir()
        folders.append(finished(tmp_path / f"{at}/run", run("sift", 1, accuracy=0.5), text))
    assert [row.run for row in compare_runs(folders).rows] == ["run", str(folders[1])]


def test_a_table_of_runs_says_what_it_wrote(tmp_path: Path) -> None:
    done = sift(
        "compare", finished(tmp_path / "a", run("sift", 1, f1=0.5)), "--out", tmp_path / "t"
    )
    assert done.stdout.splitlines()[-1] == f"Table and plot: {tmp_path / 't'}"


def test_what_changes_no_result_makes_no_row(recipe_text: str, tmp_path: Path) -> None:
    more = ["", "checkpoint: {every: 7}\n", "log: {every: 3}\n", "out: elsewhere\n"]
    folders = [
        finished(tmp_path / f"{seed}", run("sift", seed, accuracy=0.5), recipe_text + line)
        for seed, line in enumerate(more)
    ]
    (row,) = compare_runs(folders).rows
    assert row.seeds == 4
    base = parse_recipe(recipe_text, "recipe")
    often = parse_recipe(recipe_text + more[1], "recipe")
    assert Job.of(base, "sift", None, 1e-3, 4).name == Job.of(often, "sift", None, 1e-3, 4).name


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--methods", "sift,lorra"], "unknown: 'lorra'; did you mean lora?"),
        (["--methods", ""], "--methods: name one at least"),
        (["--methods", "sift,full", "--lr", "lora=1"], "--lr lora=RATE: it is none of --methods"),
        (["--lr", "lora"], "it reads METHOD=RATE"),
        (["--lr", "lora=-1"], "a learning rate is above 0"),
        (["--densities", "0.1,x"], "give numbers"),
        (["--densities", "2"], "above 0 and up to 1"),
    ],
)
def test_mistakes(args: list[str], said: str, recipe_file: Path) -> None:
    done = sift("compare", recipe_file, *args)
    assert done.returncode == 2
    assert said in done.stderr


def test_the_command_with_processes(recipe_file: Path, tmp_path: Path) -> None:
    done = sift("compare", recipe_file, "--methods", "lora,sift", "--seeds", "1", "--out",
                tmp_path / "out", "--json", "--jobs", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["method"] for row in found["rows"]] == ["lora", "sift"]
    assert "run 2/2: " in done.stderr
    assert any("One seed" in note for note in found["notes"])


def test_sigterm_ends_what_runs_and_keeps_it(recipe_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sift_cli", "compare", str(recipe_file), "--methods", "sift"]
    command += ["--seeds", "1", "--out", str(tmp_path), "--set", "train.epochs=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV) as comparison:
        until(lambda: written(tmp_path.glob("runs/*/metrics.jsonl")))
        comparison.terminate()
        _, said = comparison.communicate(timeout=60)
    assert comparison.returncode == 130
    assert said == "interrupted; the same command goes on from here\n"
    assert written(tmp_path.glob("runs/*/checkpoint/step-*"))


def test_sigterm_amid_the_start_of_a_process_ends_that_too(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    start = subprocess.Popen

    def starting(*args: Any, **more: Any) -> subprocess.Popen[str]:
        started.append(start(*args, **more))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # the signal is heard before the process is noted
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", starting)
    slow = [sys.executable, "-c", "import time; time.sleep(30)"]
    monkeypatch.setattr(Runner, "_command", lambda *of: slow)
    runner = Runner(tmp_path, 1, None, False, Console(quiet=True))
    base = parse_recipe(recipe_file.read_text(), "recipe")
    with pytest.raises(SiftError, match="interrupted") as raised:
        runner.run([Job.of(base, "sift", 0.1, 1e-3, seed) for seed in (1, 2)], "run")
    assert raised.value.code == 130
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_a_comparison_started_deaf_to_sigterm_stays_so(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 1, None, False, Console(quiet=True))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with runner._passing_on():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not runner.ended.is_set()


def written(paths: Iterable[Path]) -> bool:
    return any(path.stat().st_size for path in paths)
