"""What a language run shows: its report, and the plan, probe and table of its recipe."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sift_cli.analysis.compare import compare_runs
from sift_cli.analysis.plan import plan
from sift_cli.analysis.probe import probe
from sift_cli.analysis.push import push
from sift_cli.analysis.report import report
from sift_cli.analysis.table import Comparison, FinishedRun, markdown, tabulated
from sift_cli.cli.tables import sentences
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.summary import Summary
from sift_cli.training import train
from tests.support.chats import CHATS, save_chat_recipe, write_chats
from tests.support.command import sift

SAMPLES = ["eval.samples=2", "eval.generate.max_new_tokens=4", "eval.every=2", "log.every=1"]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A recipe of a tiny Llama; one row of its chats is too long, one would be a script."""
    path = save_chat_recipe(tmp_path)
    rows = [*CHATS, [("user", "why? " * 60), ("assistant", "so")]]
    write_chats(tmp_path / "chats/train.jsonl", rows)
    script = [("user", "<script>alert(1)</script>"), ("assistant", "{{ 7 * 7 }}")]
    write_chats(tmp_path / "chats/validation.jsonl", [*CHATS[::2], script])
    return path


@pytest.fixture
def run(chat: Path, tmp_path: Path) -> Path:
    """A finished run of it."""
    train(load_recipe(chat, SAMPLES), tmp_path / "run")
    return tmp_path / "run"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def text_of(page: str) -> str:
    """What a page says, without its pictures and without the recipe and numbers at its end."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", page.partition("<h2>The recipe</h2>")[0])


def test_the_page_of_a_language_run(run: Path) -> None:
    page = report(run).read_text()
    summary = json.loads((run / "summary.json").read_text())
    for name, value in summary["metrics"].items():
        assert f"<span>{name}</span><b>{value:.4f}</b>" in page
    assert "Train: Of 25 rows, 1 are dropped (too long: 1) and 0 cut" in page
    counts = summary["splits"]["train"]
    assert f"{counts['learnt']:,} of {counts['tokens']:,} tokens are learnt" in page
    assert not re.search(r"\b(class|label|confus|mistake|head\b|whole\.)", text_of(page))
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page
    with Image.open(run / "plots/progress.png") as picture:
        assert min(picture.size) > 200
    shown = re.search(r"<h3>Loss and metrics</h3>.*?</svg>", page, flags=re.DOTALL)
    assert shown
    for axis in ("loss per token", "training", "held out", "perplexity", "token accuracy", "step"):
        assert f">{axis}</text>" in shown[0]
    assert "predictions-validation.png" not in {path.name for path in (run / "plots").iterdir()}


def test_answers_before_training_stand_beside_those_of_the_weights_that_are_kept(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["kept_step"] = 4
    (run / "summary.json").write_text(json.dumps(summary))
    samples = lines(run / "samples.jsonl")
    for at, one in enumerate(samples):
        one |= {"answer": f"answer {at} of step {one['step']}", "ended": at % 2 == 0}
    (run / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    page = report(run).read_text()
    told = re.findall(r'data-name="(before|after)">(answer [^<]*)<', page)
    assert told == [
        ("before", "answer 0 of step 0"),
        ("after", "answer 4 of step 4"),
        ("before", "answer 1 of step 0&hellip;"),
        ("after", "answer 5 of step 4&hellip;"),
    ]


def test_the_hardest_and_the_easiest_rows_are_shown(chat: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats/validation.jsonl", CHATS * 2)
    train(load_recipe(chat), tmp_path / "run")
    found = lines(tmp_path / "run/predictions.jsonl")
    ranked = sorted(found, key=lambda one: one["loss"])
    ends = {one["row"] for one in (*ranked[:10], *ranked[-10:])}
    told = {one["row"] for one in found if "prompt" in one}
    assert len(told) == 20
    assert {found[row]["loss"] for row in told} == {found[row]["loss"] for row in ends}
    for row in told:
        (_, asked), (_, expected) = CHATS[row % 24]
        assert (found[row]["prompt"], found[row]["expected"]) == (asked, expected)
    page = report(tmp_path / "run").read_text()
    high = page.partition("The rows with the highest loss")[2].partition("</table>")[0]
    low = page.partition("The rows with the lowest loss")[2].partition("</table>")[0]
    for part, some in ((high, ranked[::-1][:10]), (low, ranked[:10])):
        shown = re.findall(r'data-name="loss per token">([\d.]+)<', part)
        assert shown == [f"{one['loss']:.4f}" for one in some]
    assert "Answers before and after" not in page


def test_parts_of_a_split_text_are_one_row(chat: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        texts = ["ab" * 40, "one", "two", "three"]
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"chats/{split}.jsonl").write_text("".join(rows))
    train(load_recipe(chat, ["data.task=text", "data.max_length=16"]), tmp_path / "run")
    found = lines(tmp_path / "run/predictions.jsonl")
    assert [one["row"] for one in found] == [0, 1, 2, 3]
    assert [one["tokens"] for one in found] == [80, 3, 3, 5]  # all but the first, and the end
    loss = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["loss"]
    summed = sum(one["loss"] * one["tokens"] for one in found)
    assert summed / 91 == pytest.approx(loss, rel=1e-5)


def test_push_takes_no_row_along(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: dict[str, bytes] = {}

    class Api:
        endpoint = "https://hub"

        def create_repo(self, repo: str, **_: object) -> Any:
            class At(str):
                repo_id = repo

            return At("https://hub/a/b")

        def create_commit(self, _: str, adding: Any, **__: object) -> None:
            for one in adding:
                sent[one.path_in_repo] = Path(one.path_or_fileobj).read_bytes()

    monkeypatch.setattr("sift_cli.analysis.push.HfApi", Api)
    monkeypatch.setattr("sift_cli.analysis.push.get_token", lambda: "token")
    push(run, "a/b")
    assert {"README.md", "delta.safetensors", "report.html", "plots/progress.png"} <= set(sent)
    assert not {"samples.jsonl", "predictions.jsonl"} & set(sent)
    for content in sent.values():
        assert b"of course" not in content
        assert b"what is " not in content
    assert b"Prompts and answers are left out of this copy." in sent["report.html"]


def test_the_command_tells_held_out_loss_and_tokens(chat: Path, tmp_path: Path) -> None:
    done = sift("train", chat, "--out", tmp_path / "run", "--set", "log.every=1")
    said = done.stderr.replace("\n", " ")
    assert re.search(r"step 6: held-out loss \d\.\d{4}  perplexity", said)
    assert re.search(r"step 6 of 6: loss .*? [\d,]+ tokens/s", said)
    assert "head" not in done.stdout
    records = [one for one in lines(tmp_path / "run/metrics.jsonl") if "loss" in one]
    for one in records:
        assert one["tokens_per_second"] > one["rows_per_second"]


def test_a_plan_of_a_language_recipe(chat: Path) -> None:
    found = plan(load_recipe(chat))
    said = " ".join(sentences(found))
    assert "head" not in said
    assert "Rows are messages; learnt: all answers; template: the model's own." in said
    assert "Train: Of 25 rows, 1 are dropped (too long: 1) and 0 cut; tokens of a row: p50" in said
    counts = found["data"]["splits"]["train"]
    assert found["data"]["tokens_per_step"] == pytest.approx(counts["tokens"] / 6)
    assert f"a step has about {counts['tokens'] / 6:,.0f} tokens." in said


def test_a_probe_of_a_language_recipe(chat: Path, tmp_path: Path) -> None:
    found = probe(load_recipe(chat), tmp_path / "probe", steps=3)
    assert found["overlap"]["between_classes"] == {}
    assert not any("class" in one for one in found["says"])
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {
        "curve.png",
        "kept.png",
        "probe.json",
    }


def test_a_lower_loss_is_the_better_row(run: Path, tmp_path: Path) -> None:
    summary = Summary.read(run)
    assert summary is not None
    found = tabulated(
        [
            FinishedRun(
                Summary.of({**summary.to_json(), "metrics": {"loss": loss}}), name, 0.1, 1.0
            )
            for name, loss in (("random", 2.0), ("sift", 1.5), ("lora", 1.75))
        ],
        [],
    )
    assert found.best is not None
    assert found.best.method == "sift"
    text = markdown(found)
    assert "**1.5000**" in text
    assert text.count("**") == 2
    assert "A lower loss is better." in text
    assert Comparison("cola", "matthews", "sift", found.rows, []).falls is False


def test_runs_on_other_rows_stand_in_no_table(run: Path, chat: Path, tmp_path: Path) -> None:
    train(load_recipe(chat, ["selection.policy=random"]), tmp_path / "other")
    assert [row.differs for row in compare_runs([run, tmp_path / "other"]).rows] == [
        {"eval.every": 2},
        {"eval.every": "epoch"},
    ]
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "other", moved)
    for old, new, said in (
        ("train_on: all-answers", "train_on: last-answer", "data.train_on is all-answers in the"),
        (f"path: {tmp_path}/chats", "path: elsewhere", "data.path is"),
        ("template: model", "template: chatml", "data.template is model in the one"),
    ):
        text = (tmp_path / "other/recipe.yaml").read_text()
        assert old in text
        (moved / "recipe.yaml").write_text(text.replace(old, new))
        with pytest.raises(SiftError, match=said):
            compare_runs([run, moved])
