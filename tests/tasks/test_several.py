"""Rows that may have several labels: how they are read, learnt, scored, kept and told."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sklearn import metrics
from torch.nn.functional import binary_cross_entropy_with_logits

from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.kinds import task_of, task_of_config
from sift_cli.tasks.labelled import load_task
from sift_cli.tasks.sources import Source
from sift_cli.training.head import Readout, prior
from sift_cli.training.step import add_gradient
from tests.support.command import sift

WORDS = ("good", "slow", "cold")  # what the labels say: that the word is in the text
NAMES = ("cold", "good", "slow")  # sorted


def rows_of(count: int) -> list[tuple[str, list[str]]]:
    """Texts with each of the words or not, and which."""
    found = []
    for at in range(count):
        held = [word for bit, word in enumerate(WORDS) if at >> bit & 1]
        found.append((" ".join([*held, "film", "was"][:: -1 if at & 8 else 1]), held))
    return found


def as_lists(count: int) -> list[dict[str, Any]]:
    return [{"words": text, "tags": held} for text, held in rows_of(count)]


def as_columns(count: int) -> list[dict[str, Any]]:
    return [
        {"words": text, **{word: int(word in held) for word in NAMES}}
        for text, held in rows_of(count)
    ]


def write(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def loaded(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Classification:
    for split in ("train", "validation"):
        write(folder, rows, split)
    source = Source(str(folder), "custom")
    return load_task(source, text=["words"], **{"label": "tags", **more})


@pytest.fixture
def recipe(recipe_file: Path, data: Path) -> Path:
    """The recipe with 32 rows of three labels."""
    for split in ("train", "validation"):
        write(data, as_lists(32), split)
    custom = "task: custom\n  text: words\n  label: tags"
    recipe_file.write_text(recipe_file.read_text().replace("task: sst2", custom))
    return recipe_file


def test_lists_and_columns_are_the_same_rows(tmp_path: Path) -> None:
    lists = loaded(tmp_path / "a", as_lists(8))
    columns = loaded(tmp_path / "b", as_columns(8), label=list(NAMES))
    assert lists.labels == columns.labels == NAMES
    assert lists.train is not None
    assert columns.train is not None
    assert lists.train.to_dict() == columns.train.to_dict()
    assert lists.train["label"][:3] == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert lists.metrics == ("f1_micro", "f1_macro", "subset_accuracy", "roc_auc", "loss")
    renamed = loaded(tmp_path / "b", as_columns(8), label=list(NAMES), labels=["c", "g", "s"])
    assert renamed.labels == ("c", "g", "s")
    ordered = loaded(tmp_path / "a", as_lists(8), labels=list(WORDS))
    assert ordered.train is not None
    assert ordered.train["label"][1] == [1, 0, 0]


def test_codes_and_class_labels_name_them(tmp_path: Path) -> None:
    codes = [
        {"words": row["words"], "tags": [NAMES.index(tag) for tag in row["tags"]]}
        for row in as_lists(8)
    ]
    plain = loaded(tmp_path / "a", codes)
    assert plain.labels == ("0", "1", "2")
    features = datasets.Features(
        words=datasets.Value("string"), tags=datasets.List(datasets.ClassLabel(names=list(NAMES)))
    )
    (tmp_path / "b").mkdir()
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_list(codes, features=features)
        rows.to_parquet(tmp_path / f"b/{split}.parquet")
    source = Source(str(tmp_path / "b"), "custom")
    named = load_task(source, text=["words"], label="tags")
    assert named.labels == NAMES
    assert named.train is not None
    assert plain.train is not None
    assert named.train.to_dict() == plain.train.to_dict()
    other = load_task(source, text=["words"], label="tags", labels=list(WORDS))
    assert other.train is not None
    assert other.train["label"][1] == [1, 0, 0], "by name, not by code"
    gaps = [{"words": "x", "tags": [7, 2]}, {"words": "y", "tags": [7]}]
    assert loaded(tmp_path / "a", gaps).labels == ("2", "7")


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ({"words": "x", "tags": ["cold", "mild"]}, {"labels": NAMES}, "labels outside {0: 'cold'"),
        (
            {"words": "x", "tags": None},
            {},
            "lists in 'tags' that are missing: 1 rows, such as",
        ),
        ({"words": "x", "tags": []}, {"metrics": ["accuracy"]}, "accuracy is a metric of classes,"),
        (
            {"words": "x", "tags": []},
            {"first": "f1"},
            "eval.metric: f1 is a metric of classes, and",
        ),
        ({"words": "x", "tags": []}, {"first": "f1:mild"}, "no class 'mild'; there is cold, good"),
        (
            {"words": "x", "tags": []},
            {"class_weights": "balanced"},
            "it is for one label a row, and",
        ),
        ({"words": "x", "tags": []}, {"label": ["lost", "tags"]}, "has no column 'lost'"),
    ],
)
def test_mistakes_are_located(
    tmp_path: Path, row: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(SiftError) as caught:
        loaded(tmp_path / "a", [*as_lists(8), row], **more)
    assert said in str(caught.value)


def test_cells_of_columns_are_numbers_and_rows_may_be_held_out_of_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [",".join(map(str, row.values())) for row in as_columns(8)]
    file.write_text("\n".join([f"words,{','.join(NAMES)}", *lines]))
    task = load_task(Source(str(file), "custom", holdout=0.25), text=["words"], label=list(NAMES))
    assert task.train is not None
    held = {row["row"]: row["label"] for rows in (task.train, task.evaluation[""]) for row in rows}
    assert (len(task.train), len(task.evaluation[""])) == (6, 2)
    assert [held[at] for at in range(8)] == [
        [float(name in tags) for name in NAMES] for _, tags in rows_of(8)
    ]


def test_columns_hold_0_and_1(tmp_path: Path) -> None:
    row = {"words": "x", "cold": 2, "good": 0, "slow": 1}
    with pytest.raises(SiftError, match=r"than 0 and 1 in 'cold': 1 rows, such as row 8 \(2\)"):
        loaded(tmp_path / "a", [*as_columns(8), row], label=list(NAMES))


def test_a_recipe_names_at_least_two_columns_and_a_name_for_each(recipe: Path) -> None:
    for changes, said in (
        (["label=[good]"], "data.label: give a column, or at least two, got ['good']"),
        (["label=[a, b]", "labels=[a, b, c]"], "data.labels: 2 columns of labels need as many"),
    ):
        sets = [part for change in changes for part in ("--set", f"data.{change}")]
        done = sift("train", recipe, *sets)
        assert done.returncode == 2
        assert said in done.stderr


def test_loss_and_metrics_are_those_of_torch_and_scikit_learn(recipe: Path) -> None:
    names = ["f1_micro", "f1_macro", "f1_weighted", "recall_micro", "precision_macro"]
    more = ["subset_accuracy", "roc_auc", "'f1:slow'"]
    session = open_session(load_recipe(recipe, [f"data.metrics=[{', '.join([*names, *more])}]"]))
    assert session.train is not None
    session.model.eval()
    batch = session.collate(session.train.take(range(32)))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits, truth = session.model(**inputs).logits, batch["labels"]
    wanted = binary_cross_entropy_with_logits(logits, truth)
    assert float(add_gradient(session, [[*range(20)], [*range(20, 32)]])) == pytest.approx(
        wanted.item(), rel=1e-5
    )
    found = session.evaluate()
    said, labels = (logits > 0).int().numpy(), truth.int().numpy()
    scores = logits.sigmoid().detach().numpy()
    f1 = {name: metrics.f1_score(labels, said, average=name) for name in ("micro", "macro")}
    assert found == pytest.approx(
        {
            "f1_micro": f1["micro"],
            "f1_macro": f1["macro"],
            "f1_weighted": metrics.f1_score(labels, said, average="weighted"),
            "recall_micro": metrics.recall_score(labels, said, average="micro"),
            "precision_macro": metrics.precision_score(
                labels, said, average="macro", zero_division=0
            ),
            "subset_accuracy": (said == labels).all(1).mean(),
            "roc_auc": metrics.roc_auc_score(labels, scores),
            "f1:slow": metrics.f1_score(labels[:, 2], said[:, 2]),
            "loss": wanted.item(),
        },
        rel=1e-5,
    )


def test_a_run_learns_and_all_that_comes_after_knows_of_it(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["train.epochs=12", "selection.density=0.2", "train.head_start=probe"]
    changes += ["train.learning_rate=0.02"]
    sets = [part for change in changes for part in ("--set", change)]
    done = sift("train", recipe, "--out", out, *sets)
    assert done.returncode == 0, done.stderr
    assert "head: a probe of 32 rows" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kind"], summary["labels"]) == ("multi-label", [*NAMES])
    assert summary["metrics"]["f1_micro"] > 0.9 > summary["metrics_before"]["f1_micro"]
    delta = out / "delta.safetensors"
    model, _ = load_tuned(str(out))
    task = task_of_config(model.model.config)
    assert isinstance(task, Classification)
    assert task.several
    scored = json.loads(sift("eval", out, "--json").stdout)
    assert scored["metrics"] == pytest.approx(summary["metrics"])
    assert [one["name"] for one in scored["classes"]] == [*NAMES]
    asked = json.loads(sift("predict", out, "slow cold film was", "film was", "--json").stdout)
    said = [set(one["labels"]) for one in asked["predictions"]]
    assert said == [{"slow", "cold"}, set()]
    assert asked["predictions"][0]["probabilities"].keys() == {*NAMES}
    assert "cold, slow" in sift("predict", out, "slow cold film was").stdout
    merged = sift("merge", delta, "--out", tmp_path / "merged", "--verify", "--json")
    assert merged.returncode == 0, merged.stderr
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    again = sift("eval", tmp_path / "merged", "--recipe", recipe, "--json")
    assert json.loads(again.stdout)["metrics"] == pytest.approx(summary["metrics"])
    assert "any of `cold`, `good`, `slow`" in (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    assert "<tr><td>slow</td>" in page
    planned = sift("plan", recipe, *sets)
    assert planned.returncode == 0, planned.stderr
    assert "A new head starts from a probe of 32 rows." in planned.stdout
    shown = sift("data", "show", recipe, "--row", "5").stdout
    assert "label cold, good" in shown
    base = load_recipe(recipe).model.path
    diffed = sift("diff", base, tmp_path / "merged", "--out", tmp_path / "d.safetensors")
    assert diffed.returncode == 0, diffed.stderr


def test_what_says_a_kind_says_the_task() -> None:
    class Stated:
        labels = NAMES
        language = None
        kind: str | None = "multi-label"

    several = task_of(Stated())
    assert isinstance(several, Classification)
    assert several.several
    assert several.header() == {"labels": [*NAMES], "kind": "multi-label"}
    assert list(several.example(torch.ones(2, 3).long())["labels"].shape) == [2, 3]


def test_the_prior_of_each_label_and_its_probe_are_its_own() -> None:
    """As good as a logistic regression, and log odds, of each label alone."""
    torch.manual_seed(0)
    features = torch.randn(40, 4)
    held = (features[:, :3] + 0.5 * torch.randn(40, 3) > torch.tensor([0.0, 0.5, 9.0])).double()
    share = held.mean(0)
    torch.testing.assert_close(prior(held, 3)[:2], (share / (1 - share)).log()[:2])
    found = Readout.fit(features, held, 3, 1.0, True)(features)
    for at in (0, 1):
        alone = Readout.fit(features, held[:, at].long(), 2, 1.0, True)(features)
        torch.testing.assert_close(found[:, at], alone[:, 1] - alone[:, 0], rtol=1e-2, atol=1e-2)
    assert float(found[:, 2].exp()[0]) == pytest.approx(0.5 / 39.5), "no row holds it"
