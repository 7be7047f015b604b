"""How far outputs move, and what a bias could do, against loops over tokens and least squares."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from sift_cli.analysis.masks import BiasShare, BiasTerm
from sift_cli.analysis.movement import Change, evaluating, relative_moves
from sift_cli.selection.evidence import Tokens
from sift_cli.selection.structures import Units
from sift_cli.selection.targets import LinearLayer, linear_layers
from sift_cli.sparse import Support
from tests.support.models import tiny_batch, tiny_model


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_moves_are_those_of_a_changed_weight(architecture: str, scaled: bool) -> None:
    model = tiny_model(architecture)
    layers = {
        name: layer
        for name, layer in linear_layers(model).items()
        if model.get_parameter(name).dim() == 2
    }
    generator = torch.Generator().manual_seed(0)
    changes, scales, seen = {}, {}, {}
    for name, layer in layers.items():
        weight = model.get_parameter(name)
        support = Support.of(weight.shape, torch.randperm(weight.numel(), generator=generator)[:9])
        changes[name] = Change.against(support, torch.randn(9, generator=generator))
        width = weight.shape[0 if layer.transposed else 1]
        scales[name] = torch.rand(width, generator=generator, dtype=torch.float64)
        layer.module.register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: (given[0], out)})
        )
    left_out = changes.pop(next(iter(changes)))
    assert len(left_out.values) == 9
    batch = tiny_batch()
    found = relative_moves(
        layers, {"a": changes, "none": {}}, lambda: model(**batch), scales if scaled else None
    )
    assert set(found) == {"a", "none"}
    assert not any(found["none"].values())
    assert set(found["a"]) == set(layers)
    for name, layer in layers.items():
        inputs, outputs = (one.detach() for one in seen[name])
        if name not in changes:
            assert found["a"][name] == 0
            continue
        weight = model.get_parameter(name).detach().clone()
        step = torch.zeros_like(weight)
        change = changes[name]
        places = change.support.positions.long()  # type: ignore[union-attr]
        step.view(-1)[places] = change.values.double()
        if scaled:
            step = step * (scales[name][:, None] if layer.transposed else scales[name])
        model.get_parameter(name).data += step
        after = layer.module(inputs).detach()
        model.get_parameter(name).data.copy_(weight)
        plain = outputs if layer.module.bias is None else outputs - layer.module.bias.detach()
        wanted = (after - outputs).norm() / plain.norm()
        assert found["a"][name] == pytest.approx(float(wanted), rel=1e-6)
    assert float(changes[name].values.abs().max()) == 1


def test_a_layer_called_twice_counts_the_tokens_of_both() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0]])
    change = Change(Support.of((1, 2), torch.tensor([1])), torch.tensor([1.0]))

    def forward() -> None:
        layer(torch.tensor([[1.0, 3.0]]))
        layer(torch.tensor([[[2.0, 1.0]]]))

    found = relative_moves({"w": LinearLayer(layer, False)}, {"m": {"w": change}}, forward)
    assert found["m"]["w"] == pytest.approx(((9 + 1) / (1 + 4)) ** 0.5)


def test_evaluating_leaves_the_mode_as_it_was() -> None:
    model = nn.Dropout(0.5)
    modes: list[bool] = []
    for training in (True, False):
        model.train(training)
        evaluating(model, lambda: modes.append(model.training))()
        assert model.training == training
    assert modes == [False, False]


@given(st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_the_share_of_a_bias_is_what_its_best_multiple_takes_out(
    weights: int, seed: int, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    share = BiasShare()
    left = energy = 0.0
    for _ in range(weights):
        x, out = (torch.randn(5, n, generator=generator).double() + 1 for n in (3, 4))
        tokens = Tokens.of(x, out.sum(0))
        gradient = out.T @ x
        stored = gradient.t().contiguous() if transposed else gradient
        units = Units.of("w", stored, "entry", 1, transposed)
        term = torch.outer(out.sum(0), x.mean(0))
        places = torch.randperm(12, generator=generator)[:6]
        kept: Tensor = stored.reshape(-1)[places]
        alike = (term.t() if transposed else term).reshape(-1)
        assert torch.allclose(BiasTerm(units, tokens).at(None), alike)
        share.see(kept, BiasTerm(units, tokens).at(places))
        best = torch.linalg.lstsq(alike[places][:, None], kept[:, None]).solution[0, 0]
        left += float((kept - best * alike[places]).square().sum())
        energy += float(kept.square().sum())
    share.settle()
    assert share.steps == pytest.approx([1 - left / energy], abs=1e-9)
    assert 0 <= share.steps[0] <= 1


def test_alike_inputs_leave_nothing_but_a_bias() -> None:
    share = BiasShare()
    share.see(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -2.0]))
    share.settle()
    share.see(torch.tensor([0.0]), torch.tensor([0.0]))
    share.settle()
    assert share.steps == [pytest.approx(1.0), 0.0]
