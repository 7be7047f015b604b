"""The report of a run: what it records, says and draws, and how a real browser shows it."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageStat

from sift_cli.analysis.charts import by_layer
from sift_cli.analysis.report import report
from sift_cli.delta import load_delta
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.training import train
from sift_cli.training.batches import Batches
from tests.support.browser import CHROMIUM, CUT_OFF, LOADED, UNLOADED, browser
from tests.support.command import sift
from tests.support.models import WORDS

NASTY = '<script>alert("x")</script> & $5$ {{ 7 * 7 }} \u2028'


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Path:
    """A run of two epochs, without its report."""
    train(load_recipe(recipe_file, ["train.epochs=2", "log.every=1"]), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def nasty(base: Path, tmp_path: Path) -> Path:
    """A run on labels and texts that would break a page that trusts them."""
    folder = tmp_path / "nasty"
    folder.mkdir()
    labels = [NASTY, "a label of forty letters, all of them shown", "日本語"]
    for split, rows in (("train", 24), ("validation", 12)):
        said = [
            json.dumps({"a": f"good {NASTY} {WORDS[at]}", "b": "x" * 300, "c": labels[at % 3]})
            for at in range(rows)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(said) + "\n")
    recipe = {
        "model": {"path": str(base)},
        "data": {
            "path": str(folder),
            "task": "custom",
            "text": ["a", "b"],
            "label": "c",
            "max_length": 16,
        },
        "train": {"epochs": 1, "batch_size": 8},
    }
    path = tmp_path / "nasty.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True))
    train(load_recipe(path), tmp_path / "nasty-run")
    return tmp_path / "nasty-run"


def test_recorded_predictions_are_those_of_the_kept_weights(run: Path, recipe_file: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = lines(run / "predictions.jsonl")
    right = [one["label"] == one["predicted"] for one in found]
    assert sum(right) / len(right) == summary["metrics"]["accuracy"]
    assert [one["row"] for one in found] == list(range(16))
    assert {one["label"] for one in found} == {"negative", "positive"}
    assert all(0.5 <= one["probability"] <= 1 for one in found)
    wrong = [one for one in found if one["label"] != one["predicted"]]
    told = [one for one in found if "text" in one]
    assert len(told) == min(10, len(wrong))
    limit = min(one["probability"] for one in told)
    assert all(one["probability"] <= limit for one in wrong if "text" not in one)
    assert all(one["label"] != one["predicted"] for one in told)
    texts = [json.loads(row)["sentence"] for row in _rows(recipe_file)]
    assert all(one["text"] == texts[one["row"]] for one in told)


def _rows(recipe_file: Path) -> list[str]:
    folder = yaml.safe_load(recipe_file.read_text())["data"]["path"]
    return (Path(folder) / "validation.jsonl").read_text().splitlines()


def test_recorded_weights_against_the_delta_and_the_base(run: Path, recipe_file: Path) -> None:
    delta = load_delta(run / "delta.safetensors")
    model = open_session(load_recipe(recipe_file)).model
    named = dict(model.named_parameters())
    found = {one["name"]: one for one in lines(run / "weights.jsonl")}
    summary = json.loads((run / "summary.json").read_text())
    chosen = [one["entries"] for one in found.values() if not one["whole"]]
    assert sum(chosen) == summary["trained_entries"]
    assert {name for name, one in found.items() if one["whole"]} == set(delta.dense)
    for name, weight in delta.weights.items():
        tuned = named[name].detach().clone()
        before = weight.support.gather(tuned)
        weight.toggle_(tuned)
        moved = (weight.support.gather(tuned) - before).double()
        assert found[name]["rms"] == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-4)
        assert found[name]["largest"] == pytest.approx(float(moved.abs().max()), rel=1e-4)
        if len(weight.shape) == 2:
            assert weight.support.positions is not None
            inputs = Counter((weight.support.positions % weight.shape[1]).tolist())
            taken, held = 0, 0
            for _, count in inputs.most_common():
                taken, held = taken + 1, held + count
                if held >= weight.count / 2:
                    break
            assert found[name]["half_in_inputs"] == pytest.approx(taken / weight.shape[1], rel=1e-4)


@pytest.mark.parametrize(
    "change",
    ["selection.scope=global", "selection.structure=row", "train.accumulate=2", "log.every=5"],
)
def test_the_kept_gradient_against_a_dense_one(
    recipe_file: Path, tmp_path: Path, change: str
) -> None:
    recipe = load_recipe(recipe_file, [change])
    train(recipe, tmp_path / "run")
    recorded = {line["name"]: line for line in lines(tmp_path / "run/gradient.jsonl")}
    session = open_session(recipe)
    session.model.train()  # the tiny model has no dropout
    assert session.train is not None
    rows = next(Batches.of(recipe.train, session.train.lengths).since(1))
    for part in rows:
        (session.model(**session.collate(session.train.take(part))).loss / len(rows)).backward()
    delta = load_delta(tmp_path / "run/delta.safetensors")
    named = dict(session.model.named_parameters())
    sums = {"norm": 0.0, "kept": 0.0}
    assert set(recorded) >= set(delta.weights) - set(delta.dense)
    for name, found in recorded.items():
        gradient = named[name].grad
        assert gradient is not None
        held = torch.zeros(0)
        if name in delta.weights:
            held = delta.weights[name].support.gather(gradient)
        for key, values in (("norm", gradient), ("kept", held)):
            assert found[key] == pytest.approx(float(values.norm()), rel=1e-4, abs=1e-7)
            sums[key] += float(values.norm()) ** 2
    share = (sums["kept"] / sums["norm"]) ** 0.5
    assert f"hold {share:.0%} of the norm" in report(tmp_path / "run").read_text()


def test_a_run_that_looked_at_no_gradient_says_so(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(load_recipe(recipe_file), out)
    assert (out / "gradient.jsonl").is_file()
    for policy in ("random", "fisher"):
        train(load_recipe(recipe_file, [f"selection.policy={policy}"]), out, overwrite=True)
        assert not (out / "gradient.jsonl").exists()
        page = report(out).read_text()
        assert "Training computes no more of a gradient than it needs." in page
        assert not (out / "plots/gradient.png").exists()


def test_the_same_run_records_the_same_bytes(run: Path, recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file, ["train.epochs=2", "log.every=1"]), tmp_path / "again")
    for name in ("predictions.jsonl", "weights.jsonl", "gradient.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_cells_add_up_weights_and_biases_by_layer_and_module() -> None:
    def weight(name: str, shape: list[int], entries: int, rms: float) -> dict[str, Any]:
        said = {"name": name, "shape": shape, "entries": entries, "touched": entries}
        return {**said, "rms": rms, "whole": False}

    cells = by_layer(
        [
            weight("m.layer.0.query.weight", [4, 4], 3, 1.0),
            weight("m.layer.0.query.bias", [4], 1, 3.0),
            weight("m.pooler.weight", [4, 4], 2, 1.0),
        ]
    )
    assert cells == {("0", "query"): {"entries": 4, "share": 0.2, "rms": 3**0.5}}
    both = by_layer([weight(f"{one}.0.q.weight", [2], 1, 1.0) for one in ("encoder", "decoder")])
    assert set(both) == {("encoder 0", "q"), ("decoder 0", "q")}


def test_the_page_holds_what_the_run_came_to(run: Path) -> None:
    page = report(run).read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['metrics']['accuracy']:.4f}" in page
    assert summary["delta_sha256"] in page
    assert "density: 0.05" in page
    assert f"sift probe {run}/recipe.yaml" in page
    names = {
        "progress",
        "rate",
        "entries",
        "change",
        "inputs",
        "predictions-validation",
        "gradient",
    }
    assert {path.stem for path in (run / "plots").iterdir()} == names
    assert page.count("<svg") == len(names)
    assert page.count('aria-label="') == len(names)
    for path in (run / "plots").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    for count in Counter(
        (one["label"], one["predicted"]) for one in lines(run / "predictions.jsonl")
    ).values():
        assert f">{count}</text>" in page
    told = [one for one in lines(run / "predictions.jsonl") if "text" in one]
    assert all(one["text"] in page for one in told)
    addresses = set(re.findall(r"https?://[^\"'<> )]+", page))
    assert addresses <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link rel=.stylesheet|img src=.http)", page)


def test_what_users_wrote_is_escaped(nasty: Path) -> None:
    page = report(nasty).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "x" * 300 in page
    assert report(nasty, texts=False).read_text().count("x" * 300) == 0


def test_a_regression_has_a_scatter_plot_and_its_largest_errors(
    base: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "numbers"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = lines(data / f"{split}.jsonl")
        said = [
            json.dumps({"sentence1": row["sentence"], "sentence2": "good", "label": at / 4})
            for at, row in enumerate(rows)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(said) + "\n")
    path = tmp_path / "numbers.yaml"
    path.write_text(
        f"model: {{path: {base}}}\ndata: {{path: {folder}, task: stsb, max_length: 16}}\n"
        "train: {epochs: 1, batch_size: 8}\n"
    )
    train(load_recipe(path), tmp_path / "run")
    found = lines(tmp_path / "run/predictions.jsonl")
    errors = torch.tensor([abs(one["predicted"] - one["label"]) for one in found])
    told = {one["row"] for one in found if "text" in one}
    assert told == set(errors.topk(10).indices.tolist())
    page = report(tmp_path / "run").read_text()
    assert "The largest errors" in page
    assert "predictions-validation.png" in {p.name for p in (tmp_path / "run/plots").iterdir()}


def test_two_evaluation_splits(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mnli"
    folder.mkdir()
    for split, rows in (("train", 24), ("validation_matched", 9), ("validation_mismatched", 6)):
        said = [
            json.dumps({"premise": WORDS[at], "hypothesis": WORDS[-at], "label": at % 3})
            for at in range(rows)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(said) + "\n")
    path = tmp_path / "mnli.yaml"
    path.write_text(
        f"model: {{path: {base}}}\ndata: {{path: {folder}, task: mnli, max_length: 16}}\n"
        "train: {epochs: 1, batch_size: 8}\n"
    )
    train(load_recipe(path), tmp_path / "run")
    page = report(tmp_path / "run").read_text()
    assert "9 rows" in page
    assert "6 rows" in page
    assert "validation_mismatched)" in page


def test_an_undefined_metric_is_said_and_not_drawn(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["metrics_before"]["accuracy"] = None
    (run / "summary.json").write_text(json.dumps(summary))
    assert "undefined before training" in report(run).read_text()
    drop = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": null', drop))
    assert "Loss and metrics" in report(run).read_text()


def test_the_probe_s_picture_goes_in(run: Path, tmp_path: Path) -> None:
    kept = {"sift": {"steps": [0.9, 0.8]}, "random": {"steps": [0.1, 0.1]}}
    probed = tmp_path / "probe"
    probed.mkdir()
    said = {"kept_norm_share": kept, "says": ["It keeps 80 %."]}
    (probed / "probe.json").write_text(json.dumps(said))
    page = report(run, probe=probed).read_text()
    assert "It keeps 80 %." in page
    assert (run / "plots/kept.png").is_file()


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SiftError, match=r"holds no summary\.json, so it is not a finished run"):
        report(tmp_path)
    with pytest.raises(SiftError, match=r"holds no probe\.json"):
        report(run, probe=tmp_path)
    (run / "summary.json").write_text("{")
    with pytest.raises(SiftError, match=r"summary\.json is damaged"):
        report(run)


def test_a_run_of_an_older_version_has_a_shorter_report(run: Path) -> None:
    for name in ("predictions.jsonl", "weights.jsonl"):
        (run / name).unlink()
    page = report(run).read_text()
    assert "Loss and metrics" in page
    assert "The trained entries" not in page
    assert "at random" not in page


def test_train_writes_it_and_no_plot_costs_the_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = sift("train", recipe_file, "--out", tmp_path / "one")
    assert f"Report: {tmp_path}/one/report.html" in done.stdout
    assert (tmp_path / "one/report.html").is_file()

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no [b]ink[/b]")

    monkeypatch.setattr(sys.modules["sift_cli.analysis.report"], "charts", fails)
    done = sift("train", recipe_file, "--out", tmp_path / "two")
    assert done.returncode == 0
    assert "no report (RuntimeError: no [b]ink[/b]); `sift report" in done.stderr.replace("\n", " ")
    assert (tmp_path / "two/summary.json").is_file()

    done = sift("train", recipe_file, "--out", tmp_path / "one", "--overwrite", "--set",
                "log.report=false")  # fmt: skip
    assert "Report" not in done.stdout
    assert not (tmp_path / "one/report.html").exists()
    assert not (tmp_path / "one/plots").exists()


def test_sift_report_makes_it_anew(run: Path) -> None:
    done = sift("report", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")
    assert sift("report", run.parent).returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_all_of_it(run: Path, nasty: Path, tmp_path: Path) -> None:
    pages = [report(run), report(nasty)]
    with browser() as one:
        for page in pages:
            shots = []
            for width in (1280, 390):
                for dark in (False, True):
                    one.open(page, width, dark)
                    assert one.evaluate("innerWidth") == width
                    assert one.evaluate(CUT_OFF) == []
                    assert one.evaluate(UNLOADED) == []
                    assert one.evaluate(LOADED) == []
                    one.screenshot(tmp_path / "shot.png")
                    with Image.open(tmp_path / "shot.png") as shot:
                        shots.append(ImageStat.Stat(shot.convert("L")).mean[0])
            assert one.said == []
            assert shots[0] > 200 > 80 > shots[1]
            assert shots[2] > 200 > 80 > shots[3]
