"""Several processes make the run of one: gloo, two and four of them, models of fp64 and of fp32."""

import json
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.folder import CHECKPOINTS, RATES_FILE
from sift_cli.runs.ranks import Ranks
from sift_cli.runs.summary import Summary
from sift_cli.runs.tuned import load_tuned
from sift_cli.training import loop, train
from sift_cli.training.shares import deal
from tests.support.command import sift
from tests.support.forks import on_ranks
from tests.support.interruptions import at_call, delta, names, signalled
from tests.support.ranks import BF16, exact_steps, recipes, stepped

PADDED = ["train.packing=false", "selection.target=all", "train.batch_size=4", "train.accumulate=2"]
# name -> recipe, changes, whether calibration batches are looked at in full by every rank
CASES: dict[str, tuple[str, list[str], bool]] = {
    "padded": ("chat", PADDED, True),
    "shared descent": ("chat", PADDED, False),
    "packed": ("packs", ["selection.target=all"], False),
    "dropout": ("rows", ["train.batch_size=10"], True),  # the last of 48 rows make a batch of 8
    "few rows": ("rows", ["train.batch_size=3", "selection.policy=fisher"], True),
    "warm-up": ("rows", ["selection.policy=lottery", "selection.warmup_steps=2"], False),
    "step scale": ("rows", ["train.step_scale=input", "train.batch_size=3"], False),
    "input norms": ("rows", ["selection.score=gradient-per-input", "train.batch_size=3"], False),
    "centred": ("rows", ["selection.score=centred-gradient", "selection.batches=3"], False),
    "squares": ("rows", ["selection.score=agreed-gradient", "selection.batches=3"], False),
}
LONG = ["train.max_steps=12", "train.learning_rate=0.03"]
WHOLE = {  # name -> recipe, changes: runs from their beginning to their end
    "auto": ("rows", ["data.path={folder}/more", "train.learning_rate=auto", "train.max_steps=2"]),
    "patience": ("rows", ["eval.every=1", "eval.metric=loss", "eval.patience=2", *LONG]),
}
SPLIT = ["selection.policy=magnitude", "train.packing=false"]
EIGHT = [*SPLIT, "train.batch_size=8", "train.accumulate=1"]
FOUR_TWO = [*SPLIT, "train.batch_size=2", "train.accumulate=4"]


FOUR = ("padded", "shared descent", "few rows", "input norms")


def cases_of(world: int) -> tuple[str, ...]:
    """Those that so many processes run."""
    return tuple(CASES) if world == 2 else FOUR


def recipe_of(folder: Path, case: str) -> tuple[Path, list[str], bool]:
    name, changes, exact = CASES[case]
    name = "dropping" if name == "rows" and exact else name
    return folder / f"{name}.yaml", changes, exact


def whole_run(folder: Path, name: str) -> Recipe:
    """The recipe of one of WHOLE."""
    recipe, changes = WHOLE[name]
    return load_recipe(folder / f"{recipe}.yaml", [one.format(folder=folder) for one in changes])


def work(rank: int, folder: Path) -> dict[str, Any]:
    """All that one group of processes does."""
    ranks, found = Ranks(rank, dist.get_world_size(), rank), dict[str, Any]()
    for case in cases_of(ranks.world):
        recipe, changes, exact = recipe_of(folder, case)
        found[case] = stepped(recipe, changes, replace(ranks, exact=exact))
    found["split"] = stepped(folder / "chat.yaml", EIGHT, ranks)
    with exact_steps():
        train(load_recipe(folder / "chat.yaml", BF16), folder / f"bf16-{ranks.world}", ranks=ranks)
    if ranks.world == 2:
        for name in WHOLE:
            train(whole_run(folder, name), folder / f"{name}-2", ranks=ranks)
        found |= interrupted(ranks, folder)
        found |= poisoned(ranks, folder)
    return found


def interrupted(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A run that rank 1 alone is told to end, taken up by as many ranks and left for one."""
    recipe, ends = load_recipe(folder / "dropping.yaml"), []
    train(recipe, folder / "calm", ranks=ranks)
    for out in ("rough", "other"):
        call = 3 if ranks.rank == 1 else 10**6
        with at_call(call, signalled(SIGTERM)), pytest.raises(SiftError) as caught:
            train(recipe, folder / out, ranks=ranks)
        ends.append((int(caught.value.code), str(caught.value)))
    before = names(folder / "rough")
    ranks.gather(None)  # all have looked
    train(recipe, folder / "rough", resume=True, ranks=ranks)
    return {"ends": ends, "saved": before}


def poisoned(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A gradient that is not finite on rank 1 alone: passed over, and then one too many."""
    real, ends = loop.add_gradient, []

    def spoilt(session: Any, rows: Any) -> Tensor:
        calls.append(rows)
        loss = real(session, rows)
        return loss * float("nan") if ranks.rank == 1 and len(calls) == 2 else loss

    skipped = []
    for most in (1, 0):
        calls: list[Any] = []
        recipe = load_recipe(folder / "rows.yaml", [f"train.skip_nonfinite={most}"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "add_gradient", spoilt)
            try:
                skipped.append(train(recipe, folder / f"skips-{most}", ranks=ranks).skipped_steps)
            except SiftError as error:
                ends.append((int(error.code), str(error)))
    return {"skipped": skipped, "failed": ends}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipes(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def groups(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank of two and of four found."""

    class Groups(dict[int, list[dict[str, Any]]]):
        def __missing__(self, world: int) -> list[dict[str, Any]]:
            self[world] = on_ranks(world, folder, work, folder)
            return self[world]

    return Groups()


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process finds, with no process group."""
    found = {case: stepped(*recipe_of(folder, case)[:2]) for case in CASES}
    return found | {"split": stepped(folder / "chat.yaml", FOUR_TWO)}


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run of a model of bf16 on one process."""
    with exact_steps():
        train(load_recipe(folder / "chat.yaml", BF16), folder / "bf16-1")
    return folder / "bf16-1"


def same(one: Any, other: Any) -> None:
    assert one["supports"].keys() == other["supports"].keys()
    for name, positions in one["supports"].items():
        there = other["supports"][name]
        assert (positions is None) == (there is None)
        assert positions is None or torch.equal(positions, there), name
    torch.testing.assert_close(one["masters"], other["masters"], rtol=0, atol=1e-12)
    torch.testing.assert_close(one["numbers"], other["numbers"], rtol=0, atol=1e-6)  # read as fp32


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world in (2, 4) for case in cases_of(world)]
)
def test_many_make_the_run_of_one(
    groups: dict[int, list[dict[str, Any]]], one: dict[str, Any], world: int, case: str
) -> None:
    assert (one[case]["masters"] - _start(one[case])).abs().max() > 1e-3
    for found in groups[world]:
        same(found[case], one[case])
        assert found[case]["metrics"] == groups[world][0][case]["metrics"]
        assert torch.equal(found[case]["masters"], groups[world][0][case]["masters"])


def _start(found: dict[str, Any]) -> Tensor:
    """The base's values where the masters are."""
    parts = [
        weight.flatten() if (at := found["supports"][name]) is None else weight.flatten()[at.long()]
        for name, weight in ((name, found["base"][name]) for name in found["supports"])
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("world", [2, 4])
def test_nothing_but_the_entries_that_train_has_moved(
    groups: dict[int, list[dict[str, Any]]], world: int
) -> None:
    for found in (rank["padded"] for rank in groups[world]):
        for name, weight in found["weights"].items():
            moved = (weight != found["base"][name]).flatten()
            if name in found["supports"] and (at := found["supports"][name]) is not None:
                moved[at.long()] = False
            assert name in found["supports"] or not moved.any()
            assert found["supports"].get(name, 0) is None or not moved.any()


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_sends_one_message_of_its_gradients_and_three_numbers(
    groups: dict[int, list[dict[str, Any]]], world: int
) -> None:
    for rank in groups[world]:
        for case in cases_of(world):
            nbytes = (len(rank[case]["masters"]) + 3) * 8
            assert rank[case]["calls"] == [("all_reduce", nbytes)] * 4


@pytest.mark.parametrize("world", [2, 4])
def test_one_micro_batch_of_eight_is_four_of_two(
    groups: dict[int, list[dict[str, Any]]], one: dict[str, Any], world: int
) -> None:
    for found in groups[world]:
        same(found["split"], one["split"])


@pytest.mark.parametrize(
    ("digests", "parts", "told"),
    [
        (["a", "b"], 1, "rank 1 has other rows than rank 0"),
        (["a", "b", "a", "c"], 2, "rank 3 has other rows than rank 1"),
        (["a", "b", "a", "b"], 2, None),
    ],
)
def test_ranks_that_hold_the_same_part_are_compared(
    digests: list[str], parts: int, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda ranks, own: digests)
    ranks = Ranks(world=len(digests))
    if told is None:
        ranks.require_same("rows", str, parts)
        return
    with pytest.raises(SiftError, match=told):
        ranks.require_same("rows", str, parts)


def test_one_process_sends_nothing(one: dict[str, Any]) -> None:
    assert all(found["calls"] == [] for found in one.values())


def test_a_signal_to_one_ends_all_after_the_same_step(
    groups: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    first, second = groups[2]
    assert first["ends"] == second["ends"]
    assert all(code == 130 and "after step 3 of 6" in said for code, said in first["ends"])
    assert [name[:13] for name in sorted(first["saved"])] == ["step-00000000", "step-00000003"]
    assert delta(folder / "rough") == delta(folder / "calm")


def test_another_number_of_processes_goes_on(
    groups: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    assert names(folder / "other")
    train(load_recipe(folder / "dropping.yaml"), folder / "other", resume=True)
    ends = {}
    for name in ("other", "calm"):
        assert sift("merge", folder / name, "--out", folder / f"{name}-merged").returncode == 0
        ends[name] = load_file(folder / f"{name}-merged/model.safetensors")
    for name, weight in ends["calm"].items():
        torch.testing.assert_close(weight, ends["other"][name], rtol=0, atol=1e-5)
    assert not list((folder / "other").glob(f"{CHECKPOINTS}/*"))


def test_what_is_not_finite_on_one_is_so_on_all(
    groups: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    first, second = groups[2]
    assert first["skipped"] == second["skipped"] == [1]
    assert first["failed"] == second["failed"]
    ((code, said),) = first["failed"]
    assert code == 4
    assert said.startswith("step 2: the loss is nan")
    lines = (folder / "skips-1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"metrics"' in line] == [3, 6]


@pytest.mark.parametrize("world", [2, 4])
def test_the_file_is_that_of_one_process(
    groups: dict[int, list[dict[str, Any]]], alone: Path, world: int
) -> None:
    assert groups[world]
    assert delta(alone.with_name(f"bf16-{world}")) == delta(alone)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_runs_end_as_that_of_one_process(
    groups: dict[int, list[dict[str, Any]]], folder: Path, name: str
) -> None:
    one = train(whole_run(folder, name), folder / f"{name}-1")
    assert groups[2]
    two = Summary.read(folder / f"{name}-2")
    assert two is not None
    for key in ("steps", "kept_step", "learning_rate", "learning_rate_from"):
        assert getattr(one, key) == getattr(two, key)
    assert one.metrics == pytest.approx(two.metrics, rel=1e-5)
    models = [load_tuned(str(folder / f"{name}-{world}"), None)[0].model for world in (1, 2)]
    own, others = (dict(model.named_parameters()) for model in models)
    for key, weight in own.items():
        torch.testing.assert_close(weight, others[key], rtol=0, atol=1e-5)
    if name == "patience":
        assert 1 < one.kept_step < one.steps < 12
    else:
        texts = [(folder / f"{name}-{world}" / RATES_FILE).read_text() for world in (1, 2)]
        found = [json.loads(text) for text in texts]
        losses = [[one["loss"] for one in rates.pop("tried")] for rates in found]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert found[0] == found[1]


def test_rows_are_dealt_by_tokens() -> None:
    hands = deal([9, 1, 5, 4, 8, 3], 2)
    assert sorted(hands[0] + hands[1]) == list(range(6))
    assert sorted(sum([9, 1, 5, 4, 8, 3][at] for at in hand) for hand in hands) == [14, 16]
    assert deal([7], 3) == [[0], [], []]
