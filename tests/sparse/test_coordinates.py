"""Scaled and centred masters against torch.optim.AdamW, and what they leave as it was."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.sparse.coordinates import Coordinates, InputScale

LR, DECAY = 3e-3, 0.3


def scaled(values: list[float], transposed: bool = False) -> Coordinates:
    return Coordinates({"weight": InputScale(torch.tensor(values), transposed)})


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_scale_is_adamw_with_one_group_a_column(max_norm: float | None) -> None:
    torch.manual_seed(0)
    scales = [0.25, 1.0, 4.0, 0.5]
    model = nn.Linear(4, 3).double()
    columns = [nn.Parameter(model.weight.detach()[:, at].clone()) for at in range(4)]
    bias = nn.Parameter(model.bias.detach().clone())
    groups = [
        {"params": [column], "lr": LR * scale, "weight_decay": DECAY / scale}
        for column, scale in zip(columns, scales, strict=True)
    ]
    reference = torch.optim.AdamW([*groups, {"params": [bias], "lr": LR, "weight_decay": DECAY}])
    supports = {"weight": Support((3, 4)), "bias": Support((3,))}
    parameters = attach(model, supports, coordinates=scaled(scales))
    optimizer = SparseAdamW(parameters, LR, weight_decay=DECAY)
    for step in range(20):
        x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        norm = optimizer.clip(max_norm)
        optimizer.step()
        reference.zero_grad()
        nn.functional.linear(x, torch.stack(columns, 1), bias).square().sum().backward()
        wanted = nn.utils.clip_grad_norm_([*columns, bias], max_norm or float("inf"))
        reference.step()
        torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(model.weight, torch.stack(columns, 1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.bias, bias, rtol=1e-12, atol=1e-12)


def test_decay_toward_the_base_leaves_the_base_alone_and_shrinks_the_change() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    base = model.weight.detach().clone()
    coordinates = Coordinates(centred=["weight"])
    parameters = attach(model, {"weight": Support((3, 4))}, coordinates=coordinates)
    optimizer = SparseAdamW(parameters, LR, weight_decay=DECAY)
    optimizer.step()  # the gradient is 0: nothing but decay
    assert torch.equal(model.weight, base)
    parameters.flat.data += 0.5
    optimizer.step()
    torch.testing.assert_close(model.weight, base + 0.5 * (1 - LR * DECAY))


@given(
    st.lists(st.integers(-20, 3), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_what_does_not_move_stays_bit_for_bit(
    powers: list[int], transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4).to(dtype)
    base = model.weight.detach().clone()
    supports = {"weight": Support.of((4, 4), torch.randperm(16)[:9])}
    coordinates = scaled([2.0**power for power in powers], transposed)
    parameters = attach(model, supports, coordinates=coordinates)
    SparseAdamW(parameters, LR).step()
    assert torch.equal(model.weight, base)
    for segment in parameters:
        assert torch.equal(parameters.values()[segment.span], segment.support.gather(base).float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_each_entry_has_the_scale_of_its_input(transposed: bool, some: bool) -> None:
    shape, values = (3, 2), torch.tensor([2.0, 4.0, 8.0] if transposed else [2.0, 4.0])
    dense = values[:, None].expand(shape) if transposed else values.expand(shape)
    support = Support.of(shape, torch.tensor([1, 2, 5])) if some else Support(shape)
    assert torch.equal(InputScale(values, transposed).of(support), support.gather(dense))


def test_moved_entries_keep_their_value_and_take_the_scale_of_their_input() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reference = copy.deepcopy(model)
    first, second = (Support.of((3, 4), torch.tensor(at)) for at in ([0, 1, 6], [1, 3, 6]))
    parameters = attach(model, {"weight": first}, coordinates=scaled([0.25, 1.0, 4.0, 0.5]))
    optimizer = SparseAdamW(parameters, LR, history="park")
    parameters.flat.data += 1.0
    parameters.write_back()
    optimizer.move({"weight": second}, revert=True)
    base = reference.weight.detach().flatten()
    wanted = base.clone()
    wanted[[1, 6]] += torch.tensor([1.0, 4.0])
    torch.testing.assert_close(model.weight.detach().flatten(), wanted)
    assert parameters.scale is not None
    assert parameters.scale.tolist() == [1.0, 0.5, 4.0]
    change = parameters.change(parameters.segments[0])
    torch.testing.assert_close(change, torch.tensor([1.0, 0.0, 4.0]))
