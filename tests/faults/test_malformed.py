"""Wrong recipes and wrong datasets: exit code 2, a message that says where, and no traceback."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.command import Done, sift
from tests.support.malformed import malformed_dataset, malformed_recipe

LONG = 500


def check(done: Done, kind: str, seed: int) -> None:
    case = f"seed {seed}, {kind}: {done.returncode} {done.stderr[-2000:]}"
    assert done.returncode == 2, case
    assert done.stdout == "", case
    assert "Traceback" not in done.stderr, case
    assert "should not have" not in done.stderr, case
    assert done.stderr.strip(), case


def recipes(count: int, folder: Path) -> None:
    seen: Counter[str] = Counter()
    path = folder / "wrong.yaml"
    for seed in range(count):
        kind, raw = malformed_recipe(seed)
        path.write_bytes(raw)
        done = sift("train", path, "--out", folder / "run")
        check(done, f"{kind}\n{raw!r}\n", seed)
        for line in done.stderr.splitlines():
            located = rf"{re.escape(str(path))}(:\d+:\d+ |: not a text file .* at byte \d+)"
            assert re.match(located, line), (seed, kind, line)
        assert not (folder / "run").exists()
        seen[kind] += 1
    print(f"\n{count} malformed recipes, each exit 2 and located: {dict(seen)}")


def datasets(count: int, folder: Path, recipe: Path) -> None:
    seen: Counter[str] = Counter()
    for seed in range(count):
        kind, path = malformed_dataset(seed, folder / f"data-{seed}")
        done = sift("train", recipe, "--set", f"data.path={path}", "--out", folder / "run")
        check(done, kind, seed)
        assert len(done.stderr.splitlines()) == 1, (seed, kind, done.stderr)
        assert not (folder / "run").exists()
        seen[kind] += 1
    print(f"\n{count} malformed datasets, each exit 2 and one line: {len(seen)} kinds")
    print(", ".join(f"{kind} {number}" for kind, number in sorted(seen.items())))


def test_some_malformed_recipes(tmp_path: Path) -> None:
    recipes(60, tmp_path)


def test_some_malformed_datasets(tmp_path: Path, recipe_file: Path) -> None:
    datasets(30, tmp_path, recipe_file)


@pytest.mark.slow
def test_500_malformed_recipes(tmp_path: Path) -> None:
    recipes(LONG, tmp_path)


@pytest.mark.slow
def test_500_malformed_datasets(tmp_path: Path, recipe_file: Path) -> None:
    datasets(LONG, tmp_path, recipe_file)
