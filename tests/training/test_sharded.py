"""Runs whose model lies in rows on several processes, against runs of one."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.shards import places_in
from sift_cli.recipe import load_recipe
from sift_cli.runs.folder import DELTA_FILE, METRICS_FILE, WEIGHTS_FILE
from sift_cli.training import train
from tests.support.causal import chats_recipe
from tests.support.forks import on_ranks
from tests.support.interruptions import at_call, delta, signalled
from tests.support.ranks import BF16
from tests.support.sharded import FULL, exact_run_of_rank, runs_of_rank

RANKS = 2
# sift once more in two whole copies, so that only gradients travel
POLICIES = {"sift": 1, "sign-descent": 1, "copies": RANKS}
STOPPED_IN = 3  # the step in which a run is asked to stop, and which it still takes
NORMS = "selection.dense=[norm, layernorm, embed_tokens]"


def changes_of(policy: str) -> list[str]:
    """Of a recipe: norms and the tied embedding train whole."""
    policy = "sift" if policy == "copies" else policy
    return [f"selection.policy={policy}", "selection.density=0.05", NORMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, runs of several, and runs that each of them left to the other."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = chats_recipe(folder, "llama-tied")
    settings = {policy: changes_of(policy) for policy in POLICIES}
    for policy, changes in settings.items():
        if policy == "copies":
            shutil.copytree(folder / "one" / "sift", folder / "one" / policy)
            continue
        train(load_recipe(recipe, changes), folder / "one" / policy, device="cpu")
    sift, stopped = load_recipe(recipe, settings["sift"]), folder / "one" / "stopped"
    with at_call(STOPPED_IN, signalled(SIGTERM)), pytest.raises(SiftError):
        train(sift, stopped, device="cpu")
    shutil.copytree(stopped, folder / "several" / "resumed")
    in_rows = {
        policy: [*changes, FULL, f"distributed.replicas={POLICIES[policy]}"]
        for policy, changes in settings.items()
    }
    on_ranks(RANKS, folder, runs_of_rank, recipe, in_rows, STOPPED_IN)
    shutil.copytree(folder / "several" / "stopped", folder / "one" / "resumed")
    train(sift, folder / "one" / "resumed", device="cpu", resume=True)
    return folder


def tuned(run: Path) -> dict[str, Tensor]:
    """The weights that a run's delta makes of the base; checked against what it says of them."""
    from sift_cli.delta.file import load_delta

    delta, places = load_delta(run / DELTA_FILE), places_in(run.parents[1] / "base")
    found = {}
    for name, one in delta.weights.items():
        found[name] = places[name].read()
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


def require_same_run(there: Path, here: Path) -> None:
    wanted, found = tuned(there), tuned(here)
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_the_run_of_one_process(policy: str, folder: Path) -> None:
    from sift_cli.delta.file import load_delta

    one, several = folder / "one" / policy, folder / "several" / policy
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
    assert sorted(path.name for path in several.iterdir() if path.name != "gradient.jsonl") == [
        path.name for path in sorted(one.iterdir()) if path.name != "gradient.jsonl"
    ]
    counts = []
    for file in (several / WEIGHTS_FILE, one / WEIGHTS_FILE):
        rows = map(json.loads, file.read_text().splitlines())
        counts.append([(row["name"], row["entries"], row["whole"]) for row in rows])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("runs", ["one", "several"])
def test_a_run_goes_on_where_the_other_kind_left_it(runs: str, folder: Path) -> None:
    require_same_run(folder / "one" / "sift", folder / runs / "resumed")
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
        (["selection.policy=drop-grow"], "selection.schedule: first-batch, and it is every-n-st"),
        (["selection.policy=blocks"], "selection.structure: entry, and it is block"),
        (["train.step_scale=input"], "train.step_scale: none, and it is input"),
        (["selection.policy=low-rank", "selection.schedule=first-batch"], "more than the rows"),
        (["selection.policy=neuron-gradient"], "by neuron"),
    ],
)
def test_what_no_rank_can_choose_of_its_rows_is_refused(
    changes: list[str], told: str, tmp_path: Path
) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied")
    with pytest.raises(SiftError, match=told) as caught:
        train(load_recipe(recipe, [*changes, FULL]), tmp_path / "run", device="cpu")
    assert "distributed.shard: full" in str(caught.value)


def test_copies_are_of_rows(tmp_path: Path) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied")
    with pytest.raises(SiftError, match="give shard: full"):
        load_recipe(recipe, ["distributed.replicas=2"])
