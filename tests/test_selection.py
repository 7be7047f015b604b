"""Selection against brute force on the model's own gradients."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, tiny_batch, tiny_model
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.selection.policies import POLICIES
from sift_cli.selection.scores import SCORES
from sift_cli.selection.select import select
from sift_cli.sparse import Support


def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    reference = copy.deepcopy(model)
    reference.requires_grad_(True)
    for batch in batches:
        reference(**batch).loss.backward()
    return {name: weight.grad for name, weight in reference.named_parameters()}


def brute_force(scores: Tensor, count: int) -> list[int]:
    flat = scores.flatten().tolist()
    return sorted(sorted(range(len(flat)), key=lambda at: (-flat[at], at))[:count])


def positions(support: Support) -> list[int]:
    if support.positions is None:
        return list(range(support.size))
    return support.positions.tolist()


def run(model: nn.Module, batches: int = 1, **how: object) -> dict[str, Support]:
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(False)
    backward = [
        lambda seed=seed: model(**tiny_batch(seed=seed)).loss.backward() for seed in range(batches)
    ]
    return select(weights, backward=backward, **how)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_scope_takes_the_largest_gradients_of_each_weight(architecture: str) -> None:
    model = tiny_model(architecture)
    wanted = gradients(model, [tiny_batch()])
    supports = run(model, score="gradient", scope="tensor", density=0.03)
    assert set(supports) == {name for name, gradient in wanted.items() if gradient is not None}
    for name, support in supports.items():
        count = -(-wanted[name].numel() * 3 // 100)
        assert positions(support) == brute_force(wanted[name].abs(), count), name
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_global_scope_takes_the_largest_gradients_of_all() -> None:
    model = tiny_model("bert")
    wanted = gradients(model, [tiny_batch()])
    supports = run(model, score="gradient", scope="global", budget=200)
    everything = torch.cat([wanted[name].abs().flatten() for name in wanted])
    threshold = everything.sort(descending=True).values[199]
    assert sum(map(len, supports.values())) == 200
    for name, support in supports.items():
        assert wanted[name].abs().flatten()[positions(support)].min() >= threshold
    assert len({len(support) for support in supports.values()}) > 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_several_batches_are_ranked_by_the_gradient_of_their_sum(scope: str) -> None:
    model = tiny_model("bert", torch.float32)
    wanted = gradients(model, [tiny_batch(seed=seed) for seed in range(3)])
    supports = run(model, batches=3, score="gradient", scope=scope, density=0.05)
    if scope == "tensor":
        name = "bert.encoder.layer.1.output.dense.weight"
        count = len(supports[name])
        assert positions(supports[name]) == brute_force(wanted[name].abs(), count)
    else:
        everything = torch.cat([gradient.abs().flatten() for gradient in wanted.values()])
        total = sum(map(len, supports.values()))
        threshold = everything.sort(descending=True).values[total - 1]
        for name, support in supports.items():
            assert wanted[name].abs().flatten()[positions(support)].min() >= threshold * 0.999


def test_one_batch_never_holds_two_dense_gradients() -> None:
    model = tiny_model("bert")
    weights = dict(model.named_parameters())
    alive = []

    def count(_: Tensor) -> None:
        alive.append(sum(weight.grad is not None for weight in weights.values()))

    for weight in weights.values():
        weight.register_post_accumulate_grad_hook(count)
    run(model, score="gradient", scope="global", density=0.01)
    assert len(alive) == len(weights)
    assert max(alive) == 1


def test_magnitude_needs_no_backward_pass() -> None:
    model = tiny_model("bert")
    weights = dict(model.named_parameters())
    supports = select(weights, score="magnitude", scope="tensor", density=0.1)
    for name, weight in weights.items():
        count = -(-weight.numel() // 10)
        assert positions(supports[name]) == brute_force(weight.detach().abs(), count)


def test_random_depends_on_seed_and_name_alone() -> None:
    weights = dict(tiny_model("bert").named_parameters())
    how = {"score": "random", "scope": "tensor", "density": 0.1}
    first = select(weights, seed=1, **how)
    name = "bert.encoder.layer.0.output.dense.weight"
    alone = select({name: weights[name]}, seed=1, **how)
    assert positions(alone[name]) == positions(first[name])
    assert positions(select(weights, seed=2, **how)[name]) != positions(first[name])
    other = "bert.encoder.layer.1.output.dense.weight"
    assert positions(first[other]) != positions(first[name])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_budgets_are_met_exactly(score: str, scope: str) -> None:
    supports = run(tiny_model("bert"), score=score, scope=scope, budget=777)
    assert sum(map(len, supports.values())) == 777


@pytest.mark.parametrize("score", SCORES)
def test_density_one_selects_everything(score: str) -> None:
    model = tiny_model("bert")
    supports = run(model, score=score, scope="tensor", density=1.0)
    assert all(support.positions is None for support in supports.values())
    assert len(supports) == len(dict(model.named_parameters()))


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = tiny_model("bert")
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(SiftError, match=r"the scores of .* are not finite") as caught:
        run(model, score="gradient", scope="tensor", density=0.01)
    assert caught.value.code == ExitCode.NOT_FINITE


def test_every_policy_names_rows_that_exist_and_its_paper() -> None:
    for name, policy in POLICIES.items():
        assert policy.score in SCORES, name
        assert policy.scope in ("tensor", "global"), name
        assert any(character.isdigit() for character in policy.paper), name
