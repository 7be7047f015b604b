"""Baselines in the same loop: torch's own AdamW behind the calls of the sparse one."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sift_cli.analysis.adapted import train_adapted
from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import load_recipe
from sift_cli.runs.folder import CHECKPOINTS, TRAINED_FILE
from sift_cli.training.dense import DenseAdamW, DenseParameters
from tests.support.interruptions import Killed, at_call, kill, signalled

METHODS = ("lora", "shira", "full", "head-only")
quiet = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of SHiRA's sparse tensors


def pair() -> tuple[DenseAdamW, nn.Module, torch.optim.AdamW]:
    """The optimizer over a small model, and torch's over a copy of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    own = DenseAdamW(DenseParameters(dict(model.named_parameters())), 0.1, weight_decay=0.2)
    return own, twin, torch.optim.AdamW(twin.parameters(), 0.1, weight_decay=0.2, fused=True)


def gradients(seed: int, *models: nn.Module) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)


def test_it_is_torch_but_for_the_steps_that_are_skipped() -> None:
    own, twin, other = pair()
    model = nn.Module()
    model.named = nn.ParameterList(own.parameters.named.values())
    for step in range(1, 9):
        gradients(step, model)
        if step in (3, 6):
            for weight in own.parameters.named.values():
                weight.grad[0] = torch.nan  # type: ignore[index]
        norm = own.clip(1.0)
        own.step(skip=(~norm.isfinite()).float())
        if step not in (3, 6):
            gradients(step, twin)
            assert torch.equal(norm, nn.utils.clip_grad_norm_(twin.parameters(), 1.0))
            other.step()
        for weight, wanted in zip(own.parameters.named.values(), twin.parameters(), strict=True):
            assert torch.equal(weight, wanted)
            assert weight.grad is None
    saved = own.state()
    assert {float(saved[key]) for key in saved if key.startswith("step/")} == {6.0}


@quiet
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_weights(
    method: str, recipe_file: Path, tmp_path: Path
) -> None:
    changes = ["checkpoint.every=2", "eval.every=2", "selection.density=0.2", "train.epochs=2"]
    recipe = load_recipe(recipe_file, changes)
    calm = train_adapted(recipe, method, tmp_path / "calm")
    for step, resume in ((4, False), (4, True)):  # after steps 2 and 4, and so twice
        with at_call(step, kill), pytest.raises(Killed):
            train_adapted(recipe, method, tmp_path / "rough", resume=resume)
    rough = train_adapted(recipe, method, tmp_path / "rough", resume=True)
    one, other = (load_file(tmp_path / name / TRAINED_FILE) for name in ("calm", "rough"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rough.resumed_at == [2, 4]
    assert rough.metrics == calm.metrics
    assert rough.kept_step == calm.kept_step
    assert rough.delta_sha256 == calm.delta_sha256
    assert not (tmp_path / "rough" / CHECKPOINTS).exists()


def test_a_signal_ends_it_with_all_saved(recipe_file: Path, tmp_path: Path) -> None:
    from signal import SIGTERM

    recipe = load_recipe(recipe_file)
    with at_call(3, signalled(SIGTERM)), pytest.raises(SiftError, match="after step 3") as caught:
        train_adapted(recipe, "full", tmp_path / "run")
    assert caught.value.code == ExitCode.INTERRUPTED
    with pytest.raises(SiftError, match="method: it was full, now it is head-only"):
        train_adapted(recipe, "head-only", tmp_path / "run", resume=True)
    train_adapted(recipe, "full", tmp_path / "run", resume=True)


def test_a_step_that_is_not_finite_is_refused_and_named(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sift_cli.training import loop, watch

    real = loop.add_gradient

    def spoilt(session: object, rows: list[list[int]], total: int | None = None) -> torch.Tensor:
        loss = real(session, rows, total)  # type: ignore[arg-type]
        session.model.classifier.bias.grad.fill_(torch.inf)  # type: ignore[attr-defined]
        return loss

    monkeypatch.setattr(loop, "add_gradient", spoilt)
    monkeypatch.setattr(watch, "add_gradient", spoilt)
    recipe = load_recipe(recipe_file)
    with pytest.raises(SiftError, match=r"step 1: .*the gradient of classifier\.bias; ") as caught:
        train_adapted(recipe, "full", tmp_path / "run")
    assert caught.value.code == ExitCode.NOT_FINITE
    with pytest.raises(SiftError, match=r"step 3: .*after 2 skipped"):
        train_adapted(
            load_recipe(recipe_file, ["train.skip_nonfinite=2"]), "full", tmp_path / "more"
        )
