"""What only a GPU can show: the kernels as compiled, and a step for which the host never waits."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sift_cli.models.attention import leave_masks_unread
from sift_cli.recipe import load_recipe
from sift_cli.runs.session import open_session
from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.sparse.kernels import KERNELS, Kernel, choose
from sift_cli.training import train
from sift_cli.training.loop import Watch
from sift_cli.training.step import add_gradient

pytestmark = pytest.mark.gpu


def by(kernel: Kernel, grad_out: Tensor, inputs: Tensor) -> Tensor:
    kept = inputs if kernel.columns is None else inputs[:, kernel.columns]
    return kernel.gradient(grad_out, kept)


@pytest.mark.parametrize("tokens", [1, 77, 512])
@pytest.mark.parametrize("shape", [(7, 5), (256, 320)])
@pytest.mark.parametrize("density", [0.003, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_gives_the_dense_gradient(
    tokens: int, shape: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    rows, columns = shape
    count = max(1, round(density * rows * columns))
    support = Support.of(shape, torch.randperm(rows * columns)[:count].cuda())
    grad_out = torch.randn(tokens, rows, device="cuda", dtype=dtype)
    inputs = torch.randn(tokens, columns, device="cuda", dtype=dtype)
    wanted = support.gather(grad_out.double().t() @ inputs.double())
    loose = dtype in (torch.bfloat16, torch.float16)
    rtol, atol = (2e-2, 0.2) if loose else (1e-4, 1e-3)
    for name, kernel in {**KERNELS, "choose": lambda s: choose(s, s.positions.device)}.items():
        if name == "triton" and find_spec("triton") is None:
            continue
        found = by(kernel(support), grad_out, inputs)
        torch.testing.assert_close(
            found.double(), wanted, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_host_never_waits_in_a_step(recipe_file: Path) -> None:
    session = open_session(load_recipe(recipe_file), device="cuda")
    leave_masks_unread(session.model)
    named = dict(session.model.named_parameters())
    parameters = attach(
        session.model,
        {
            name: Support.of(weight.shape, torch.arange(0, weight.numel(), 7))
            for name, weight in named.items()
        },
    )
    optimizer, watch = SparseAdamW(parameters, 1e-3), Watch(session)
    rows = [[0, 1, 2], [3, 4, 5]]
    for step in range(1, 4):
        torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
        try:
            loss = add_gradient(session, rows)
            norm = optimizer.clip(1.0)
            optimizer.step(skip=watch.broken(step, rows, loss, norm))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert watch.read()[0] > 0


def test_a_run_on_a_gpu_is_that_on_a_cpu(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    there = train(recipe, tmp_path / "gpu", device="cuda")
    here = train(recipe, tmp_path / "cpu", device="cpu")
    assert there.trained_entries == here.trained_entries
    assert there.steps == here.steps
    assert there.step_time_ms > 0


@pytest.mark.parametrize("policy", ["sift", "current-batch"])
def test_offloading_changes_the_place_and_not_the_step(
    recipe_file: Path, tmp_path: Path, policy: str
) -> None:
    changes = [f"selection.policy={policy}", "model.dtype=bfloat16", "train.precision=float32"]
    runs = []
    for offload in ("false", "true"):
        recipe = load_recipe(recipe_file, [*changes, f"train.offload_optimizer={offload}"])
        out = tmp_path / offload
        train(recipe, out, device="cuda")
        runs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    losses = [[line["loss"] for line in run if "loss" in line] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
