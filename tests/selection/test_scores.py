"""Scores that look at tokens, rows and columns, or several batches, against loops and autograd."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sift_cli.selection.evidence import Tokens, observed_tokens
from sift_cli.selection.scores import SCORES, by_rows, score_entries
from sift_cli.selection.select import Rule, select
from sift_cli.selection.targets import linear_layers
from tests.selection.test_selection import brute_force, gradients, positions
from tests.support.models import tiny_batch, tiny_model


def centred(architecture: str, batches: int) -> dict[str, Tensor]:
    """The score of each matrix of a linear layer, from every token's gradient; as stored."""
    model = tiny_model(architecture)
    model.requires_grad_(True)
    layers = {
        name: layer
        for name, layer in linear_layers(model).items()
        if model.get_parameter(name).dim() == 2
    }
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            outputs.retain_grad()
            seen[name].append((inputs[0].detach(), outputs))

        return hook

    for name, layer in layers.items():
        layer.module.register_forward_hook(keep(name))
    for seed in range(batches):
        model(**tiny_batch(seed=seed)).loss.backward()
    scores = {}
    for name, calls in seen.items():
        inputs = torch.cat([one.flatten(0, -2) for one, _ in calls])
        outputs = torch.cat([one.grad.flatten(0, -2) for _, one in calls])  # type: ignore[union-attr]
        mean, deviation = inputs.mean(0), inputs.std(0, correction=0)
        dense = sum(torch.outer(out, one - mean) for one, out in zip(inputs, outputs, strict=True))
        score = dense.abs() / deviation  # type: ignore[union-attr]
        scores[name] = score.t() if layers[name].transposed else score
    return scores


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_the_centred_gradient_is_that_of_centred_inputs(
    architecture: str, batches: int, checkpointing: bool
) -> None:
    model = tiny_model(architecture)
    if checkpointing:
        model.train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(False)
    wanted = centred(architecture, batches)
    backward = [
        lambda seed=seed: model(**tiny_batch(seed=seed)).loss.backward() for seed in range(batches)
    ]
    names = [name for name, _ in model.named_parameters()]
    rule = Rule(SCORES["centred-gradient"], density=0.05)
    found = select(model, names, rule, backward=backward)
    plain = gradients(model, [tiny_batch(seed=seed) for seed in range(batches)])
    differ = 0
    for name, scores in wanted.items():
        count = len(found[name])
        assert positions(found[name]) == brute_force(scores, count), name
        differ += positions(found[name]) != brute_force(plain[name].abs(), count)
    assert differ > len(wanted) / 2
    for name in set(found) - set(wanted):  # no inputs to centre
        top = plain[name].abs().flatten()[positions(found[name])].min()
        assert top >= plain[name].abs().flatten().sort().values[-len(found[name])] * (1 - 1e-6)


class Twice(nn.Module):
    """One layer, called inside a checkpoint, twice, and outside it, and once for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        inside = lambda x: self.layer(self.layer(x).tanh()).tanh()  # noqa: E731
        hidden = checkpoint(inside, x, use_reentrant=False) if recompute else inside(x)
        self.layer(x + 5)  # nothing depends on it
        out: Tensor = self.layer(hidden[:, :2]).square().sum()
        return out


@pytest.mark.parametrize("recompute", [False, True])
def test_every_call_counts_once_also_where_activations_are_computed_again(recompute: bool) -> None:
    torch.manual_seed(0)
    model = Twice()
    x = torch.rand(2, 4, 3).double()
    given: list[Tensor] = []
    with observed_tokens({"layer": model.layer}) as seen:
        model(x, recompute).backward()
        with torch.no_grad():
            model(x, recompute)
    handle = model.layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(x, recompute=False)
    handle.remove()
    flat = torch.cat([given[at].reshape(-1, 3) for at in (0, 1, 3)]).detach()
    tokens = seen["layer"]
    assert tokens.count == len(flat) == 8 + 8 + 4
    torch.testing.assert_close(tokens.output_gradient, model.layer.bias.grad)
    torch.testing.assert_close(tokens.mean, flat.mean(0))
    torch.testing.assert_close(tokens.deviation, flat.std(0, correction=0))
    assert not model.layer._forward_hooks


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.0, 1e4]))
def test_tokens_add_up_however_they_are_cut(sizes: list[int], offset: float) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    whole = torch.randn(sum(sizes), 4, generator=generator) + offset
    gradient = torch.randn(len(sizes), 2, generator=generator)
    parts = [Tokens.of(part, one) for part, one in zip(whole.split(sizes), gradient, strict=True)]
    summed = sum(parts[1:], parts[0])
    assert summed.count == len(whole)
    exact = whole.double()
    torch.testing.assert_close(summed.mean.double(), exact.mean(0), rtol=1e-5, atol=1e-5)
    deviation = exact.std(0, correction=0)
    torch.testing.assert_close(summed.deviation.double(), deviation, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(summed.output_gradient, gradient.sum(0))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_balanced_gradient_by_loops(balance: float) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(4, 6).double() * torch.rand(4, 1) * torch.rand(6)
    found = SCORES["balanced-gradient"].of(gradient=gradient, balance=balance)
    rms = lambda one: (sum(float(x) ** 2 for x in one) / len(one)) ** 0.5  # noqa: E731
    for i in range(4):
        for j in range(6):
            expected = rms(gradient[i]) * rms(gradient[:, j]) / rms(gradient.flatten())
            wanted = abs(float(gradient[i, j])) / expected**balance
            assert float(found[i, j]) == pytest.approx(wanted, rel=1e-9)


@given(st.integers(0, 2**12 - 1), st.floats(0, 1), st.sampled_from([1e-12, 1.0, 1e12]))
def test_rows_and_columns_of_zeros_score_zero(on: int, balance: float, size: float) -> None:
    mask = torch.tensor([on >> at & 1 for at in range(12)]).view(3, 4)
    gradient = torch.linspace(0.5, 2, 12).view(3, 4) * mask * size
    found = SCORES["balanced-gradient"].of(gradient=gradient, balance=balance)
    assert bool(found.isfinite().all())
    assert torch.equal(found > 0, mask > 0)
    if balance == 0:
        assert torch.equal(found, gradient)


def test_a_nearly_silent_row_does_not_win_by_division_alone() -> None:
    gradient = torch.ones(3, 4)
    gradient[0] = 1e-6
    found = SCORES["balanced-gradient"].of(gradient=gradient, balance=1.0)
    assert float(found[0].max()) < 0.01 * float(found[1].min())


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8))
def test_agreement_lies_between_none_and_all(values: list[float]) -> None:
    batches = torch.tensor(values)
    summed, squares = batches.sum()[None], batches.square().sum()[None]
    found = float(SCORES["agreement"].of(gradient=summed, gradient_squares=squares))
    assert 0 <= found <= len(values) ** 0.5 * (1 + 1e-5)
    if float(squares) > 1e-30 and len(set(values)) == 1:
        assert found == pytest.approx(len(values) ** 0.5, rel=1e-4)
    weighted = SCORES["agreed-gradient"].of(gradient=summed, gradient_squares=squares)
    assert float(weighted) == pytest.approx(found * float(summed.abs()), rel=1e-5)


def test_of_one_batch_what_is_agreed_is_its_gradient() -> None:
    model = tiny_model("bert", torch.float32)
    model.requires_grad_(False)
    backward = [lambda: model(**tiny_batch()).loss.backward()]
    name = "bert.encoder.layer.0.output.dense.weight"
    plain, agreed = (
        select(model, [name], Rule(SCORES[score], density=0.1), backward=backward)[name]
        for score in ("gradient", "agreed-gradient")
    )
    assert positions(plain) == positions(agreed)


# by rows


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if by_rows(score)])
def test_some_rows_score_as_they_do_in_the_whole_weight(name: str) -> None:
    torch.manual_seed(0)
    shape, rows = (7, 5), slice(2, 6)
    whole = {
        "weight": torch.randn(shape),
        "gradient": torch.randn(shape),
        "gradient_squares": torch.rand(shape),
        "votes": torch.randint(-2, 3, shape, dtype=torch.int16),
        "change": torch.rand(shape),
    }
    some = {key: one[rows] for key, one in whole.items()}
    scores = score_entries(SCORES[name], "w", whole, 3)
    assert torch.equal(score_entries(SCORES[name], "w", some, 3, rows.start * 5), scores[rows])


def test_what_looks_at_more_than_rows_is_not_by_rows() -> None:
    others = {name for name, score in SCORES.items() if not by_rows(score)}
    assert others == {
        *("low-rank", "activation-magnitude", "gradient-per-input", "balanced-gradient"),
        "centred-gradient",
    }
