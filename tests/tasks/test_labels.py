"""Labels by name: a tuned model whose outputs stand in another order than a recipe's."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sift_cli.api import evaluate
from sift_cli.convert.difference import difference
from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.labels import codes_in
from tests.support.command import Run, sift
from tests.support.rows import write_rows

CUSTOM = ("data.task=custom", "data.text=[sentence]", "data.label=label")


@pytest.fixture
def merged(run: Run, tmp_path: Path) -> Path:
    """A tuned model whose outputs are negative and positive."""
    merge(run("train.max_steps=6"), tmp_path / "merged")
    return tmp_path / "merged"


def turned(folder: Path, *names: str) -> Path:
    """Its outputs in the other order, called as given, or by the names that they had."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for key in ("classifier.weight", "classifier.bias"):
        weights[key] = weights[key].flip(0).contiguous()
    save_file(weights, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = names or tuple(reversed(config["id2label"].values()))
    config["id2label"] = {str(code): name for code, name in enumerate(names)}
    config["label2id"] = {name: code for code, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def score(what: Path, recipe: Recipe) -> dict[str, float | None]:
    return open_session(recipe, train=False, tuned=load_tuned(str(what))[0]).evaluate()


def test_scores_follow_the_names_of_the_outputs(
    merged: Path, base: Path, tmp_path: Path, recipe_file: Path
) -> None:
    recipe = load_recipe(recipe_file, ["data.metrics=[accuracy, f1, 'f1:negative', roc_auc]"])
    right = score(merged, recipe)
    assert right["f1"] != right["f1:negative"]
    assert score(turned(merged), recipe) == pytest.approx(right)
    difference(str(base), str(merged), tmp_path / "delta.safetensors")
    assert score(tmp_path / "delta.safetensors", recipe) == pytest.approx(right)
    asked = load_recipe(recipe_file, ["data.labels=[negative, positive]", *CUSTOM])
    assert score(merged, asked)["accuracy"] == right["accuracy"]


FILMS = [("good film", "good"), ("bad film", "bad"), ("bad song", "bad"), ("good bad", "good bad")]
OTHER_ROWS = {
    "lists": (
        ["task=custom", "text=[words]", "label=tags"],
        [{"words": text, "tags": held.split()} for text, held in FILMS],
    ),
    "columns": (
        ["task=custom", "text=[words]", "label=[good, bad]"],
        [{"words": text, **{x: int(x in held) for x in ("good", "bad")}} for text, held in FILMS],
    ),
    "tags": (
        ["task=tags"],
        [
            {"tokens": text.split(), "tags": [x if x in held else "O" for x in text.split()]}
            for text, held in FILMS
        ],
    ),
}


@pytest.mark.parametrize("kind", OTHER_ROWS)
def test_labels_go_by_name_whatever_rows_hold(
    kind: str, run: Run, data: Path, recipe_file: Path, tmp_path: Path
) -> None:
    given, rows = OTHER_ROWS[kind]
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.{one}" for one in given]
    folder, recipe = tmp_path / "merged", load_recipe(recipe_file, changes)
    merge(run(*changes, "train.max_steps=4", "train.learning_rate=0.02"), folder)
    right = pytest.approx(score(folder, recipe), rel=1e-6)
    again = load_recipe(recipe_file, [*changes, f"model.path={folder}"])
    labels = open_session(again).task.header()["labels"]
    turned(folder)
    assert score(folder, recipe) == right
    assert evaluate(folder, recipe, data=data / "validation.jsonl") == right
    session = open_session(again)
    assert session.task.header()["labels"] == labels[::-1]
    assert session.evaluate() == right
    assert ", kept for" in session.notes[0]


def test_names_that_are_written_otherwise(merged: Path, recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.metrics=[f1, 'f1:negative']"])
    right = score(merged, recipe)
    assert score(turned(merged, "POSITIVE", "NEGATIVE"), recipe) == pytest.approx(right)


def test_names_that_do_not_match_show_both_lists(merged: Path, recipe_file: Path) -> None:
    turned(merged, "ham", "spam")
    with pytest.raises(SiftError, match=r"\[negative, positive\], and .* called \[ham, spam\]"):
        score(merged, load_recipe(recipe_file, []))


def test_a_base_that_is_tuned_keeps_the_order_of_its_outputs(
    merged: Path, recipe_file: Path, run: Run
) -> None:
    recipe = load_recipe(recipe_file, [f"model.path={merged}"])
    first = open_session(recipe)
    assert first.notes[0] == "head: the base's, kept for 2 labels [negative, positive]"
    right = first.evaluate()
    turned(merged)
    session = open_session(recipe)
    assert session.notes[0] == "head: the base's, kept for 2 labels [positive, negative]"
    assert session.evaluate() == right
    weighed = ["train.class_weights={positive: 3}", "train.label_smoothing=0.1"]
    task = open_session(load_recipe(recipe_file, [f"model.path={merged}", *weighed])).task
    assert isinstance(task, Classification)
    assert task.class_weights == (3.0, 1.0)
    delta = run(f"model.path={merged}", name="again")
    summary = json.loads((delta.parent / "summary.json").read_text())
    assert summary["labels"] == ["positive", "negative"]
    assert score(delta.parent, recipe) == summary["metrics"]


def test_what_becomes_of_the_head_is_told(merged: Path, base: Path, recipe_file: Path) -> None:
    def told(*changes: str) -> str:
        return open_session(load_recipe(recipe_file, [*changes])).notes[0]

    assert told() == "head: new, for 2 labels [negative, positive]"
    three = [*CUSTOM, "data.labels=[a, b, c]"]
    at = f"model.path={merged}"
    assert told(at, *three).endswith("[a, b, c], in place of the base's of 2")
    other = [*CUSTOM, "data.labels=[nah, yep]"]
    assert told(at, *other).endswith("were [negative, positive]: 2 labels [nah, yep] now")


@pytest.mark.parametrize(
    ("names", "model", "codes"),
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["Not-Entailment", "entailment"], ["entailment", "not_entailment"], [1, 0]),
        (["1", "0"], ["neg", "pos"], [1, 0]),
        (["neg", "pos"], ["0", "1"], [0, 1]),
        (["b"], ["a", "b", "c"], [1]),
        (["3", "1"], ["1", "3", "5"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["5"], ["neg", "pos"], None),
        (["a", "c"], ["a", "b"], None),
    ],
)
def test_which_output_a_name_is(
    names: list[str], model: list[str], codes: list[int] | None
) -> None:
    if codes is not None:
        assert codes_in(names, model, "it") == codes
        return
    with pytest.raises(SiftError, match=r"^it has the labels .* name them alike"):
        codes_in(names, model, "it")


def test_a_model_of_pairs_is_not_scored_on_single_texts(
    run: Run, data: Path, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        write_rows(data / f"{split}.jsonl", 16, seed=1, pair=True)
    pairs = ("data.task=custom", "data.text=[sentence, other]", "data.label=label")
    delta = run(*pairs, "train.max_steps=1")
    done = sift("eval", delta, "--recipe", tmp_path / "tiny.yaml")
    assert done.returncode == 2
    assert "was trained on pairs of texts (sentence, other)" in done.stderr
