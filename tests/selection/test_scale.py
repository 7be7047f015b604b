"""How loud an input is, and what follows for the steps of its entries."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sift_cli.errors import ExitCode, SiftError
from sift_cli.selection.scale import MOST, input_scale, input_scales


def squares(rms: list[float], tokens: int = 7) -> Tensor:
    return tokens * torch.tensor(rms).square()


def test_the_median_input_keeps_its_rate_and_loud_ones_get_less() -> None:
    assert input_scale(squares([0.5, 1.0, 2.0, 1.0, 8.0])).tolist() == [2.0, 1.0, 0.5, 1.0, 0.125]


def test_one_input_72_times_as_loud_changes_no_other_scale() -> None:
    """SmolLM2's last `down_proj`: a reference by the mean would multiply all other rates by 5."""
    rms = [1.0] * 99 + [72.0]
    assert input_scale(squares(rms)).tolist() == [1.0] * 99 + [2.0**-6]


def test_silent_inputs_keep_their_rate_and_quiet_ones_get_no_more_than_most() -> None:
    assert input_scale(squares([0.0, 1e-6, 1.0, 1.0, 1.0])).tolist() == [1.0, MOST, 1.0, 1.0, 1.0]
    assert input_scale(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.01, 100))
def test_scales_are_powers_of_two_that_go_down_with_loudness(
    rms: list[float], all_of: float
) -> None:
    scale = input_scale(squares(rms))
    assert torch.equal(scale.log2(), scale.log2().round())
    order = torch.tensor(rms).argsort()
    assert bool((scale[order].diff() <= 0).all())
    equal_steps = (scale * torch.tensor(rms) / torch.tensor(rms).median())[scale < MOST]
    assert bool(((equal_steps > 0.70) & (equal_steps < 1.42)).all())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = Conv1D(3, 6)
        self.unused = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(self.linear(self.embedding(ids))))
        return out


def test_only_matrices_that_read_inputs_have_scales() -> None:
    torch.manual_seed(0)
    model, batches = Net(), [torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3]])]
    names = [name for name, _ in model.named_parameters()]
    runs = [lambda ids=ids: model(ids) for ids in batches]
    found = input_scales(model, names, runs)
    assert set(found) == {"linear.weight", "conv.weight"}
    assert found["conv.weight"].transposed
    assert not found["linear.weight"].transposed
    inputs = torch.cat([model.embedding(ids)[0] for ids in batches]).detach()
    assert torch.equal(found["linear.weight"].values, input_scale(inputs.square().sum(0)))
    assert len(found["conv.weight"].values) == 6


def test_an_input_that_is_not_finite_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SiftError, match=r"train\.step_scale: the inputs of 0\.weight") as caught:
        input_scales(model, ["0.weight"], [lambda: model(torch.tensor([[1.0, float("inf")]]))])
    assert caught.value.code == ExitCode.NOT_FINITE
