"""Runs whose model lies in rows on several processes, against runs of one."""

import json
import shutil
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.shards import places_in
from sift_cli.recipe import load_recipe
from sift_cli.runs.folder import DELTA_FILE, GRADIENT_FILE, METRICS_FILE, WEIGHTS_FILE
from sift_cli.training import train
from tests.support.causal import chats_recipe
from tests.support.forks import on_ranks
from tests.support.interruptions import at_call, delta, signalled
from tests.support.ranks import BF16
from tests.support.rows import rows_recipe
from tests.support.sharded import FULL, exact_run_of_rank, runs_of_rank

RANKS = 2
SIFT = ["selection.policy=sift"]
ONE = [*SIFT, "selection.batches=1"]
DESCENT = ["selection.policy=sign-descent"]
SOON = ["selection.schedule=every-n-steps", "selection.every=2"]
PARKING = [*SOON, "selection.policy=drop-grow", "selection.drop=0.4", "selection.history=park"]
BEST_ROWS = ["selection.policy=rows", "selection.score=snip", "selection.scope=global"]
SCORES = ["data.task=custom", "data.text=[sentence]", "data.label=score"]
# what is changed in the recipe of each run: of a language model with a tied head
TALKING = {
    "sift": ONE,
    "sign-descent": [*DESCENT, "train.chunk_loss=16"],
    "packed": SIFT,
    "copies": [*ONE, f"distributed.replicas={RANKS}"],  # whole ones: only gradients travel
    "neurons": ["selection.policy=neuron-gradient"],
    "rows": ["selection.policy=rows"],
    "drop-grow": PARKING,
    "copies anew": [*PARKING, f"distributed.replicas={RANKS}"],
    "rows anew": [*BEST_ROWS, *SOON, "selection.drop=0.5"],
    "lottery": ["selection.policy=lottery", "selection.warmup_steps=2"],
}
# and of a classifier with dropout whose base has no head
JUDGING = {
    "random head": SIFT,
    "prior": [*SIFT, "train.head_start=prior"],
    "probe": [*DESCENT, "selection.batches=4"],
    "warm head": [*SIFT, "selection.schedule=after-warmup", "selection.warmup_steps=2"],
    # one output: a rank has no row of the head
    "number": [*DESCENT, "selection.batches=4", *SCORES],
}
RUNS = [*TALKING, *JUDGING]
ONE_BATCH = [name for name, changes in TALKING.items() if "selection.batches=1" in changes]
STOPPED_IN = 3  # the step in which a run is asked to stop, and which it still takes
NORMS = "selection.dense=[norm, layernorm, embed_tokens]"  # norms and a tied embedding train whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, runs of several, and runs that each of them left to the other."""
    folder = tmp_path_factory.mktemp("runs")
    recipe, labels = chats_recipe(folder, "llama-tied"), rows_recipe(folder, "labels", 0.1)
    packs = folder / "packs.yaml"
    packed = '"tokens": 256, "max_tokens": 128'
    packs.write_text(recipe.read_text().replace('"batch_size": 8', packed))
    settings = {
        **{name: (recipe, [*changes, NORMS, FULL]) for name, changes in TALKING.items()},
        **{name: (labels, [*changes, FULL]) for name, changes in JUDGING.items()},
    }
    settings["packed"] = packs, settings["packed"][1]
    for name, (path, changes) in settings.items():
        train(load_recipe(path, changes), folder / "one" / name, device="cpu")
    changing, stopped = load_recipe(recipe, [*PARKING, NORMS]), folder / "one" / "stopped"
    with at_call(STOPPED_IN, signalled(SIGTERM)), pytest.raises(SiftError):
        train(changing, stopped, device="cpu")
    shutil.copytree(stopped, folder / "several" / "resumed")
    on_ranks(RANKS, folder, runs_of_rank, folder, settings, STOPPED_IN)
    shutil.copytree(folder / "several" / "stopped", folder / "one" / "resumed")
    train(changing, folder / "one" / "resumed", device="cpu", resume=True)
    return folder


def tuned(run: Path) -> dict[str, Tensor]:
    """The weights that a run's delta makes of the base; checked against what it says of them."""
    from sift_cli.delta.file import load_delta

    base = "labels-base" if run.name in JUDGING else "base"
    delta, places = load_delta(run / DELTA_FILE), places_in(run.parents[1] / base)
    found = dict(delta.dense)
    assert bool(found) == (run.name in JUDGING)
    for name, one in delta.weights.items():
        found[name] = places[name.removeprefix("bert.")].read()
        assert fingerprint(found[name]) == one.base
        one.toggle_(found[name])
        assert fingerprint(found[name]) == one.trained
    return found


def losses(run: Path) -> list[Mapping[str, Any]]:
    lines = map(json.loads, (run / METRICS_FILE).read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k in ("step", "loss", "grad_norm", "metrics")}
        for line in lines
    ]


def by_name(file: Path) -> dict[str, Mapping[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["name"]: row for row in rows}


def require_same_run(there: Path, here: Path) -> None:
    wanted, found = tuned(there), tuned(here)
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_run_of_one_process(name: str, folder: Path) -> None:
    from sift_cli.delta.file import load_delta

    one, several = folder / "one" / name, folder / "several" / name
    wanted, found = load_delta(one / DELTA_FILE), load_delta(several / DELTA_FILE)
    assert found.rest == wanted.rest
    for name, weight in wanted.weights.items():
        own, others = weight.support.positions, found.weights[name].support.positions
        assert (own is None) == (others is None)
        assert own is None or torch.equal(own, others)
    require_same_run(one, several)
    pairs = zip(losses(several), losses(one), strict=True)
    for here, there in pairs:
        assert here.keys() == there.keys()
        for key, value in there.items():
            assert here[key] == pytest.approx(value, rel=1e-4)
    assert sorted(path.name for path in several.iterdir()) == [
        path.name for path in sorted(one.iterdir())
    ]
    here, there = (by_name(run / WEIGHTS_FILE) for run in (several, one))
    assert [*here] == [*there]
    for name, row in here.items():
        assert all(row[key] == there[name][key] for key in ("entries", "touched", "whole"))


@pytest.mark.parametrize("name", ONE_BATCH)
def test_what_its_mask_keeps_of_the_gradient_is_told(name: str, folder: Path) -> None:
    one, several = (by_name(folder / run / name / GRADIENT_FILE) for run in ("one", "several"))
    assert one
    assert several.keys() == one.keys()
    for weight, line in several.items():
        assert 0 < line["kept"] < line["norm"]
        for key in ("norm", "kept"):
            assert line[key] == pytest.approx(one[weight][key], rel=1e-4)


@pytest.mark.parametrize("runs", ["one", "several"])
def test_a_run_goes_on_where_the_other_kind_left_it(runs: str, folder: Path) -> None:
    require_same_run(folder / "one" / "drop-grow", folder / runs / "resumed")
    steps = [line["step"] for line in losses(folder / runs / "resumed") if "loss" in line]
    assert steps == sorted(set(steps))


def test_the_file_is_that_of_one_process(tmp_path: Path) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied")
    # Gradients of bf16, which others choose by, are rounded before they are summed.
    changes = [FULL, *BF16, "selection.policy=magnitude"]
    exact_run_of_rank(0, recipe, changes, tmp_path / "one")
    on_ranks(RANKS, tmp_path, exact_run_of_rank, recipe, changes, tmp_path / "several")
    assert delta(tmp_path / "one") == delta(tmp_path / "several")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["selection.policy=blocks"], "selection.structure: entry or row, and it is b"),
        (["train.step_scale=input"], "train.step_scale: none, and it is input"),
        (["selection.policy=low-rank", "selection.schedule=first-batch"], "more than the rows"),
    ],
)
def test_what_no_rank_can_choose_of_its_rows_is_refused(
    changes: list[str], told: str, tmp_path: Path
) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied")
    with pytest.raises(SiftError, match=told) as caught:
        train(load_recipe(recipe, [*changes, FULL]), tmp_path / "run", device="cpu")
    assert "distributed.shard: full" in str(caught.value)


def test_one_process_says_that_it_holds_all_rows(tmp_path: Path) -> None:
    said = StringIO()
    recipe = load_recipe(chats_recipe(tmp_path, "llama-tied"), [FULL, "train.max_steps=1"])
    train(recipe, tmp_path / "run", device="cpu", console=Console(file=said, width=200))
    assert "distributed.shard: full: one process holds all rows" in said.getvalue()


def test_copies_are_of_rows(tmp_path: Path) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied")
    with pytest.raises(SiftError, match="give shard: full"):
        load_recipe(recipe, ["distributed.replicas=2"])
