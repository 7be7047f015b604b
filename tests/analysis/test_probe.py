"""The probe against dense gradients and a plain replay of its training."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from sift_cli.analysis.probe import probe
from sift_cli.cli import app
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import open_session
from sift_cli.training import train
from sift_cli.training.batches import Batches
from sift_cli.training.choosing import Chooser
from sift_cli.training.parts import rule_of
from sift_cli.training.schedule import schedule_of
from sift_cli.training.step import add_gradient

STEPS = 5


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    # without biases: those of keys have gradients of nothing but rounding, in no certain order
    changes = ["train.warmup=0.0", "train.learning_rate=0.05", "selection.exclude=[bias]"]
    return load_recipe(recipe_file, changes)


@dataclass
class Dense:
    """What one step's batch says of each weight that entries are chosen from, on a plain model."""

    gradient: dict[str, Tensor]  # flat
    weight: dict[str, Tensor]  # before the step
    inputs: dict[str, Tensor]  # of linear layers, [tokens, inputs]
    shift: dict[str, Tensor]  # of linear layers, the gradient of their bias

    def term(self, name: str) -> Tensor:
        """What is left of the gradient where all inputs are alike, flat."""
        return torch.outer(self.shift[name], self.inputs[name].mean(0)).flatten()


def looked_at(recipe: Recipe) -> list[Dense]:
    """Each step, along the training that the recipe describes."""
    session = open_session(recipe)
    session.model.train()
    batches = Batches.of(recipe.train, session.train.lengths)  # type: ignore[union-attr]
    rule = rule_of(recipe.selection)
    chooser = Chooser.of(recipe.selection, recipe.train, session, batches, rule=rule)
    optimizer = chooser.begin()
    schedule = schedule_of(recipe.train, optimizer.adamw, batches.steps)
    found = []
    for rows, _ in zip(chooser.batches, range(STEPS), strict=False):
        twin = copy.deepcopy(session.model)
        for module in twin.modules():
            vars(module).pop("forward", None)
        twin.requires_grad_(True)
        modules = {name: twin.get_submodule(name.rpartition(".")[0]) for name in chooser.sparse}
        linear = {name: one for name, one in modules.items() if isinstance(one, nn.Linear)}
        inputs: dict[str, Tensor] = {}
        for name, module in linear.items():
            module.register_forward_pre_hook(
                lambda _, given, name=name, inputs=inputs: inputs.update(
                    {name: given[0].detach().flatten(0, -2)}
                )
            )
        batch = session.collate(session.train.take(rows[0]))  # type: ignore[union-attr]
        twin(**batch).loss.backward()
        named = dict(twin.named_parameters())
        found.append(
            Dense(
                {name: named[name].grad.flatten() for name in chooser.sparse},  # type: ignore[union-attr]
                {name: named[name].detach() for name in chooser.sparse},
                inputs,
                {name: module.bias.grad for name, module in linear.items()},  # type: ignore[misc]
            )
        )
        add_gradient(session, rows)
        optimizer.clip(recipe.train.max_grad_norm)
        optimizer.step()
        schedule.step()
    return found


def top(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {}
    for name, one in gradient.items():
        order = one.abs().sort(descending=True, stable=True).indices
        masks[name] = torch.zeros_like(one, dtype=torch.bool)
        masks[name][order[: -(-len(one) // 20)]] = True
    return masks


def kept(gradient: dict[str, Tensor], mask: dict[str, Tensor]) -> float:
    inside = sum(float(one[mask[name]].square().sum()) for name, one in gradient.items())
    whole = sum(float(one.square().sum()) for one in gradient.values())
    return float((inside / whole) ** 0.5)


def test_every_number_against_dense_gradients(recipe: Recipe, tmp_path: Path) -> None:
    found = probe(recipe, tmp_path / "probe", steps=STEPS)
    gradients = [one.gradient for one in looked_at(recipe)]
    shares = found["kept_norm_share"]
    first = top(gradients[0])
    assert shares["sift"]["steps"] == pytest.approx([kept(g, first) for g in gradients], rel=1e-4)
    current = [kept(gradient, top(gradient)) for gradient in gradients]
    assert shares["current-batch"]["steps"] == pytest.approx(current, rel=1e-4)
    assert shares["random"]["mean"] < shares["sift"]["mean"]

    lost, replaced, with_first, with_last = [], [], [], []
    before: dict[str, Tensor] = {}
    second = {name: torch.zeros_like(one) for name, one in gradients[0].items()}
    for gradient in gradients:
        mask = top(gradient)
        if before:
            total = sum(float(one.sum()) for one in second.values())
            gone = sum(float(second[name][before[name] & ~mask[name]].sum()) for name in mask)
            lost.append(gone / total)
            size = sum(int(one.sum()) for one in mask.values())
            stays = sum(int((mask[name] & before[name]).sum()) for name in mask)
            replaced.append(1 - stays / size)
            with_last.append(stays / size)
            with_first.append(sum(int((mask[n] & first[n]).sum()) for n in mask) / size)
        for name, one in gradient.items():
            grown = 0.999 * second[name] * before.get(name, mask[name]) + 0.001 * one**2
            second[name] = torch.where(mask[name], grown, 0.0)
        before = mask
    said = shares["current-batch"]
    assert said["second_moment_lost_per_step"] == pytest.approx(sum(lost) / len(lost), rel=1e-3)
    assert said["replaced_per_step"] == pytest.approx(sum(replaced) / len(replaced), rel=1e-6)
    assert found["overlap"]["with_first_batch"] == pytest.approx(with_first, rel=1e-6)
    assert found["overlap"]["with_batch_before"] == pytest.approx(with_last, rel=1e-6)
    assert min(replaced) > 0
    assert shares["sift"]["replaced_per_step"] == shares["sift"]["second_moment_lost_per_step"] == 0

    place = found["curve"]["densities"].index(0.1)
    energy = whole = 0.0
    for one in gradients[0].values():
        squares = one.square().sort(descending=True).values
        energy += float(squares[: -(-len(one) // 10)].sum())
        whole += float(squares.sum())
    overall = found["curve"]["norm_share"]["step 1"]["overall"][place]
    assert overall == pytest.approx((energy / whole) ** 0.5, rel=1e-4)
    assert set(found["curve"]["norm_share"]) == {"step 1", f"step {STEPS}"}


def biased(one: Dense, mask: dict[str, Tensor] | None = None) -> float:
    """The share of the kept energy that the best multiple of each weight's bias term takes out."""
    gone = energy = 0.0
    for name in one.inputs:
        inside = slice(None) if mask is None else mask[name]
        gradient, term = one.gradient[name][inside].double(), one.term(name)[inside].double()
        fitted = torch.linalg.lstsq(term[:, None], gradient[:, None]).solution
        left = gradient - term * fitted[0, 0]
        gone += float(gradient.square().sum() - left.square().sum())
        energy += float(gradient.square().sum())
    return gone / energy


def moved(one: Dense, mask: dict[str, Tensor], rate: float) -> list[float]:
    """How far each linear layer's outputs are from what they were, once its entries have moved."""
    far = []
    for name, inputs in one.inputs.items():
        weight = one.weight[name].double()
        step = rate * one.gradient[name].sign() * mask[name]
        before = F.linear(inputs.double(), weight)
        after = F.linear(inputs.double(), weight - step.view(weight.shape))
        far.append(float((after - before).square().mean().sqrt() / before.square().mean().sqrt()))
    return far


def test_what_a_bias_could_do_and_how_far_a_step_goes(recipe: Recipe, tmp_path: Path) -> None:
    found = probe(recipe, tmp_path / "probe", steps=STEPS)
    steps = looked_at(recipe)
    first = top(steps[0].gradient)
    shares = found["kept_norm_share"]
    whole = [biased(one) for one in steps]
    assert found["bias_energy_share"]["steps"] == pytest.approx(whole, rel=1e-3)
    fixed = shares["sift"]["bias_energy_share"]
    assert fixed["steps"] == pytest.approx([biased(one, first) for one in steps], rel=1e-3)
    assert fixed["first"] == fixed["steps"][0]
    assert fixed["mean"] == pytest.approx(sum(fixed["steps"][1:]) / (STEPS - 1))
    current = [biased(one, top(one.gradient)) for one in steps]
    assert shares["current-batch"]["bias_energy_share"]["steps"] == pytest.approx(current, rel=1e-3)
    assert 0 < min(whole) < max(whole) < 1

    far = moved(steps[0], first, 0.05)
    said = shares["sift"]["output_step"]
    assert list(said["layers"]) == list(steps[0].inputs)
    assert list(said["layers"].values()) == pytest.approx(far, rel=1e-4)
    assert said["mean"] == pytest.approx(sum(far) / len(far), rel=1e-4)
    assert shares["current-batch"]["output_step"] == said  # one batch, one mask
    assert 0 < shares["random"]["output_step"]["mean"] != said["mean"]


def test_micro_batches_move_outputs_as_their_sum_does(recipe_file: Path, tmp_path: Path) -> None:
    moves = []
    for size, parts in ((8, 1), (4, 2)):
        changes = [
            f"train.batch_size={size}",
            f"train.accumulate={parts}",
            "selection.exclude=[bias]",
            "data.max_length=4",  # no padding, which counts like any token
        ]
        found = probe(load_recipe(recipe_file, changes), tmp_path / str(parts), steps=2)
        moves.append(found["kept_norm_share"]["sift"]["output_step"]["layers"])
        shares = [one["bias_energy_share"]["steps"] for one in found["kept_norm_share"].values()]
        assert all(0 < share < 1 for steps in shares for share in steps)
    assert moves[0] == pytest.approx(moves[1], rel=1e-4)


def test_a_step_scale_counts_in_how_far_a_step_goes(recipe_file: Path, tmp_path: Path) -> None:
    far = {}
    for scale in ("none", "input"):
        recipe = load_recipe(recipe_file, [f"train.step_scale={scale}", "selection.density=1.0"])
        found = probe(recipe, tmp_path / scale, steps=1)
        far[scale] = found["kept_norm_share"]["sift"]["output_step"]["layers"]
    assert far["none"].keys() == far["input"].keys()
    assert all(far["none"][name] != far["input"][name] for name in far["none"])


def test_what_it_writes_and_says(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    found = probe(recipe, out, steps=3, policies=["columns", "low-rank", "fisher", "drop-grow"])
    assert json.loads((out / "probe.json").read_text()) == found
    assert {path.name for path in out.iterdir()} == {
        "probe.json", "curve.png", "kept.png", "classes.png",
    }  # fmt: skip
    assert len(found["says"]) == 4
    assert (
        f"a layer by {found['kept_norm_share']['sift']['output_step']['mean']:.1%}"
        in found["says"][3]
    )
    assert f"{found['kept_norm_share']['sift']['mean']:.0%}" in found["says"][1]
    between = found["overlap"]["between_classes"]
    assert set(between) == {"negative", "positive"}
    for one, row in between.items():
        assert row[one] == 1.0
        assert all(0 <= share <= 1 for share in row.values())
    assert set(found["kept_norm_share"]) == {
        "sift", "current-batch", "random", "columns", "low-rank", "fisher", "drop-grow",
    }  # fmt: skip


def test_a_later_run_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    before = train(recipe, tmp_path / "a").delta_sha256
    probe(recipe, tmp_path / "probe", steps=3)
    assert train(recipe, tmp_path / "b").delta_sha256 == before


@pytest.mark.parametrize(
    ("policies", "said"),
    [(["sfit"], "unknown: 'sfit'; known: sift"), (["lottery"], "lottery .* cannot be probed")],
)
def test_policies_that_it_cannot_look_at(
    recipe: Recipe, tmp_path: Path, policies: list[str], said: str
) -> None:
    with pytest.raises(SiftError, match=said):
        probe(recipe, tmp_path / "probe", steps=2, policies=policies)
    assert not (tmp_path / "probe").exists()


def test_a_changing_policy_and_accumulation_can_be_probed(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ["selection.policy=current-batch", "selection.history=park", "train.accumulate=2"]
    found = probe(load_recipe(recipe_file, changes), tmp_path / "one", steps=3)
    assert found["policy"] == "current-batch"


def test_the_command(recipe_file: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    command: list[Any] = ["probe", str(recipe_file), "--out", str(tmp_path / "p"), "--steps", "3"]
    done = runner.invoke(app, [*command, "--json", "--policies", "rows, snip"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"rows", "snip"} <= set(found["kept_norm_share"])
    shown = runner.invoke(app, command).stdout
    assert found["says"][0] in shown.replace("\n", " ")
    for value in ("bias_energy_share", "first"), ("output_step", "mean"):
        assert f"{found['kept_norm_share']['sift'][value[0]][value[1]]:.3f}" in shown


def test_policies_are_listed() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["recipes", "policies"]).stdout
    rows = json.loads(runner.invoke(app, ["recipes", "policies", "--json"]).stdout)
    assert list(rows)[:2] == ["sift", "current-batch"]
    assert all(name in shown for name in rows)
    assert rows["drop-grow"]["defaults"] == {"drop": 0.2, "revert": True}
