"""What holds exactly for language models of each shape: one step however cut, and every delta."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sift_cli.convert.difference import difference
from sift_cli.convert.merge import merge
from sift_cli.delta import load_delta
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.training import train
from sift_cli.training.step import add_gradient
from tests.support.causal import PACKED, SHAPES, Exactly, chats_recipe
from tests.support.interruptions import delta, killed_at


@pytest.mark.parametrize("architecture", SHAPES)
def test_one_step_of_8_rows_equals_4_of_2_and_packed_ones(
    architecture: str, tmp_path: Path
) -> None:
    recipe = load_recipe(chats_recipe(tmp_path, architecture))
    found = []
    for rows, packs in (
        ([[0, 1, 2, 3, 4, 5, 6, 7]], False),
        ([[0, 1], [2, 3], [4, 5], [6, 7]], False),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], True),
    ):
        train = recipe.train.model_copy(update={"tokens": 1024} if packs else {})
        session = open_session(recipe.model_copy(update={"train": train}), device="cpu")
        assert session.task.reading.packs is packs  # type: ignore[attr-defined]
        session.model.double().eval().requires_grad_(True)
        with Exactly():
            loss = add_gradient(session, rows)
        found.append([loss, *(weight.grad for weight in session.model.parameters())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("architecture", SHAPES)
def test_merge_undo_and_diff_are_exact_to_the_bit(architecture: str, tmp_path: Path) -> None:
    run, merged, back = tmp_path / "run", tmp_path / "merged", tmp_path / "back"
    summary = train(load_recipe(chats_recipe(tmp_path, architecture, **PACKED)), run)
    made = run / "delta.safetensors"
    report = merge(made, merged)
    assert report.proof.logits_difference == 0.0
    trained = load_tuned(str(run))[0].model.state_dict()
    held, base = (load_file(one / "model.safetensors") for one in (merged, tmp_path / "base"))
    assert held.keys() == base.keys()
    assert all(torch.equal(value, trained[name]) for name, value in held.items())
    changed = {name: int((value != base[name]).sum()) for name, value in held.items()}
    assert 0 < sum(changed.values()) == summary.changed_entries

    difference(str(tmp_path / "base"), str(merged), tmp_path / "diff.safetensors")
    found = load_delta(tmp_path / "diff.safetensors").weights
    assert {name: len(one.bits) for name, one in found.items()} == {
        name: count for name, count in changed.items() if count
    }
    merge(tmp_path / "diff.safetensors", tmp_path / "again")
    merge(made, back, base=str(merged), undo=True)
    for folder, wanted in ((tmp_path / "again", held), (back, base)):
        got = load_file(folder / "model.safetensors")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in got.items())


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_packed_run_that_was_killed_goes_on_to_the_same_bytes(step: int, tmp_path: Path) -> None:
    path = chats_recipe(tmp_path, "llama-tied", **PACKED)
    recipe = load_recipe(path, ["checkpoint.every=2"])
    train(recipe, tmp_path / "calm")
    killed_at(step, recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True)
    assert delta(tmp_path / "run") == delta(tmp_path / "calm")
