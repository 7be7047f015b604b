"""Sign descent against steps of torch.optim.SGD on signs, and what it leaves behind."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.selection.descent import sign_descent
from sift_cli.selection.scores import SCORES
from sift_cli.selection.select import Rule, select
from sift_cli.selection.targets import linear_layers
from sift_cli.tasks.token_batches import padded
from tests.support.causal import EOS, causal_model, causal_rows
from tests.support.models import ARCHITECTURES, tiny_batch, tiny_model

RATE, BATCHES = 2e-3, 5


def passes(model: nn.Module, batches: int = BATCHES) -> list[Callable[[], object]]:
    return [
        lambda seed=seed: model(**tiny_batch(seed=seed)).loss.backward() for seed in range(batches)
    ]


def walked(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """How many steps of RATE each entry is away, by plain SGD whose gradients are signs."""
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    weights = [named[name].requires_grad_(True) for name in names]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=RATE)
    for run in passes(model):
        optimizer.zero_grad()
        run()
        for weight in weights:
            if weight.grad is not None:
                weight.grad = weight.grad.sign()
        optimizer.step()
    return {
        name: ((weight.detach() - base) / RATE).round()
        for name, weight, base in zip(names, weights, before, strict=True)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_entries_that_it_takes_farthest_are_chosen(architecture: str, scope: str) -> None:
    model = tiny_model(architecture, torch.float64).requires_grad_(False)
    names = [name for name in linear_layers(model) if model.get_parameter(name).dim() == 2]
    far = {name: steps.abs() for name, steps in walked(model, names).items()}
    rule = Rule(SCORES["sign-descent"], scope, density=0.2)
    found = select(model, names, rule, backward=passes(model), descent_rate=RATE)
    of_all = torch.cat([one.flatten() for one in far.values()])
    chosen, left = [], []
    for name, one in far.items():
        mask = torch.zeros(one.numel(), dtype=torch.bool)
        if name in found:
            mask[found[name].positions.long()] = True  # type: ignore[union-attr]
        inside, outside = one.flatten()[mask], one.flatten()[~mask]
        chosen, left = [*chosen, inside], [*left, outside]
        if scope == "tensor":
            assert len(inside) == math.ceil(0.2 * one.numel())
            assert inside.min() >= outside.max(), name
    if scope == "global":
        assert sum(map(len, chosen)) == math.ceil(0.2 * len(of_all))
        assert torch.cat(chosen).min() >= torch.cat(left).max()
    assert of_all.max() == BATCHES  # some went the same way at every batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_their_base_again_to_the_bit(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype).requires_grad_(False)
    base = copy.deepcopy(model.state_dict())
    rule = Rule(SCORES["sign-descent"], density=0.2)
    names = list(linear_layers(model))
    seen: list[bool] = []

    def look() -> None:
        seen.append(torch.equal(model.state_dict()[names[0]], base[names[0]]))

    select(model, names, rule, backward=[*passes(model), look], descent_rate=RATE)
    assert seen == [False]
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_gradient_that_is_not_finite_is_told_and_nothing_is_lost() -> None:
    weights = {"one": nn.Parameter(torch.ones(3)), "other": nn.Parameter(torch.ones(2))}
    with sign_descent(weights, 0.25) as (take, votes):
        take("one", torch.tensor([2.0, -3.0, 0.0]))
        assert weights["one"].tolist() == [0.75, 1.25, 1.0]
        assert votes["one"].tolist() == [1, -1, 0]
        with pytest.raises(SiftError, match=r"^selection: a gradient of other is not") as raised:
            take("other", torch.tensor([float("nan"), 1.0]))
    assert raised.value.code == ExitCode.NOT_FINITE
    assert all(torch.equal(one, torch.ones_like(one)) for one in weights.values())


def test_chance_decides_between_equals() -> None:
    """Without it the first of many equal entries, and the first of the weights, would win."""
    of = SCORES["sign-descent"].of
    votes = torch.tensor([3, -3, 2, -4], dtype=torch.int16).repeat(500)
    scores = of(votes=votes, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores.floor(), votes.abs().float())
    best = scores.masked_fill(votes == -4, 0.0).topk(100).indices
    assert 800 < float(best.float().mean()) < 1200


def test_what_has_no_gradient_is_not_chosen() -> None:
    """Rows of an embedding whose tokens do not occur get no vote, and chance gives them none."""
    model = causal_model("llama").requires_grad_(False)
    rows = causal_rows(6)
    batch = {key: one for key, one in padded(rows, EOS).items() if key != "predicts"}
    seen = batch["input_ids"].unique()
    names = ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"]
    rule = Rule(SCORES["sign-descent"], "global", density=0.3)
    run = [lambda: model(**batch).loss.backward()] * 2
    found = select(model, names, rule, backward=run, descent_rate=RATE)
    weight = model.get_parameter(names[0])
    positions = found[names[0]].positions
    assert positions is not None
    chosen = (positions.long() // weight.shape[1]).unique()
    assert len(chosen) > 10
    assert not set(chosen.tolist()) - set(seen.tolist())
