"""`sift eval RUN --data`: every row of other data, by the names of the model's own labels."""

import json
from pathlib import Path

import pytest

from sift_cli.recipe import load_recipe
from sift_cli.training import train
from tests.support.command import sift
from tests.support.models import WORDS

NAMES = ("cold", "mild", "warm")


def write(path: Path, labels: list[str], text: str = "text,mark") -> Path:
    rows = [f"{WORDS[at % 9]} {WORDS[at % 5]},{label}" for at, label in enumerate(labels)]
    path.write_text("\n".join([text, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three classes that holds some of its rows out."""
    from tests.support.models import save_base

    place = tmp_path_factory.mktemp("tuned")
    write(place / "rows.csv", [NAMES[at % 3] for at in range(30)])
    recipe = place / "r.yaml"
    recipe.write_text(
        f"model: {{path: {save_base(place / 'base')}}}\n"
        f"data: {{path: {place / 'rows.csv'}, task: custom, text: text, label: mark, "
        "holdout: 0.2, max_train_rows: 20, max_length: 16}\n"
        "train: {max_steps: 3, learning_rate: 0.01}\n"
    )
    train(load_recipe(recipe), place / "run")
    return place / "run"


def scored(tuned: Path, data: Path, *more: str) -> dict[str, object]:
    done = sift("eval", tuned, "--data", data, *more, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def right(tuned: Path, labels: list[str], texts: list[str]) -> float:
    """The accuracy by what `sift predict` says of each text."""
    said = json.loads(sift("predict", tuned, *texts, "--json").stdout)["predictions"]
    return sum(one["label"] == label for one, label in zip(said, labels, strict=True)) / len(labels)


@pytest.mark.parametrize("labels", [NAMES, ("warm", "mild"), ("warm",)])
def test_all_rows_are_scored_by_the_names_of_labels(
    tuned: Path, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    every = [labels[at % len(labels)] for at in range(25)]
    data = write(tmp_path / "new.csv", every)
    found = scored(tuned, data)
    texts = [line.partition(",")[0] for line in data.read_text().splitlines()[1:]]
    assert found["rows"] == 25
    assert found["metrics"]["accuracy"] == pytest.approx(right(tuned, every, texts))  # type: ignore[index]


def test_a_label_that_the_model_does_not_know_is_named(tuned: Path, tmp_path: Path) -> None:
    done = sift("eval", tuned, "--data", write(tmp_path / "new.csv", ["warm", "hot"]))
    assert done.returncode == 2
    assert "labels outside {0: 'cold', 1: 'mild', 2: 'warm'}: 1 rows, such as row 1 ('hot')" in (
        done.stderr
    )


def test_a_folder_has_splits(tuned: Path, tmp_path: Path) -> None:
    write(tmp_path / "validation.csv", ["warm"] * 4)
    write(tmp_path / "test.csv", ["warm"] * 7)
    assert scored(tuned, tmp_path)["rows"] == 4
    assert scored(tuned, tmp_path, "--split", "test")["rows"] == 7
