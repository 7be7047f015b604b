"""SIGKILL at random moments: the run that is resumed each time writes the bytes of a calm one."""

import json
from pathlib import Path

import pytest

from tests.support.causal import PACKED, chats_recipe
from tests.support.forks import forked
from tests.support.interruptions import SELECTIONS


def killed(recipe: Path, out: Path, kills: int, seed: int, *changes: str) -> dict[str, object]:
    done = forked("tests.faults.nursery", recipe, out, kills, seed, *changes)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    print(f"\n{out.name}: {found}")
    assert found["equal"], found
    assert set(found["exit_codes"]) == {0}, found  # type: ignore[call-overload]
    assert found["kills"] == kills
    assert "should not have" not in out.with_name(f"{out.name}.log").read_text()
    return found


def test_a_few_kills(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["train.epochs=10", "checkpoint.every=3", "log.every=1", "log.report=false"]
    found = killed(recipe_file, tmp_path / "run", 3, 0, *changes)
    assert found["steps"] == 60


def test_a_packed_run_that_is_killed(tmp_path: Path) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied", **PACKED, max_steps=40)
    changes = ["train.epochs=5", "checkpoint.every=5", "eval.every=10"]
    assert killed(recipe, tmp_path / "run", 2, 1, *changes)["steps"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "dtype", "every"),
    [
        ("first-batch", "float32", "10"),
        ("first-batch", "bfloat16", "1s"),
        ("drop-grow", "bfloat16", "10"),
        ("park-revert", "float32", "7"),
    ],
)
def test_30_kills(
    selection: str, dtype: str, every: str, recipe_file: Path, tmp_path: Path
) -> None:
    changes = [
        f"selection={SELECTIONS[selection]}",
        f"model.dtype={dtype}",
        f"checkpoint.every={every}",
        "train.epochs=100",
        "train.batch_size=4",
        "train.accumulate=2",
        "eval.every=50",
    ]
    killed(recipe_file, tmp_path / f"{selection}-{dtype}", 30, 1, *changes)
