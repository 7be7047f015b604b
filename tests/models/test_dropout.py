"""Quick dropout: the distribution of nn.Dropout, the numbers of torch's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_cli.models import dropout as module
from sift_cli.models.dropout import (
    LEVELS,
    _sdpa,
    attention,
    dropout,
    masks_of,
    quicken_dropout,
)
from tests.support.models import tiny_batch, tiny_model


def test_dropout_keeps_its_share_and_scales_it() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1000, requires_grad=True)
    out = dropout(x, 0.1)
    kept = LEVELS / (LEVELS - round(0.1 * LEVELS))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, kept]))
    assert abs(float((out == 0).float().mean()) - 0.1) < 1e-3
    assert abs(float(out.mean().detach()) - 1) < 1e-3
    assert (out == 0).float().mean(0).std() < 0.012  # binomial: .0095
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    zero = (dropout(torch.ones(1_000_000), 0.25) == 0).float()
    for apart in (1, 2, 3, 4, 8):
        both = float((zero[apart:] * zero[:-apart]).mean())
        assert abs(both - 0.0625) < 2e-3


def test_a_seed_fixes_the_mask() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout(torch.ones(99), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def tensors(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, 2, rows, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for rows in (5, 6, 6)
    )
    return query, key, value


def masks() -> list[Tensor | None]:
    allowed = torch.ones(3, 1, 5, 6, dtype=torch.bool)
    allowed[0, :, :, 4:] = False
    return [None, allowed, torch.randn(1, 1, 5, 6, dtype=torch.float64)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_without_dropout_is_torchs(which: int) -> None:
    mask = masks()[which]
    found, wanted = [], []
    for function, into in (
        (lambda q, k, v: attention(q, k, v, mask, 0.0, 0.7), found),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.7), wanted),
    ):
        inputs = tensors()
        out = function(*inputs)
        out.square().sum().backward()
        into += [out.detach(), *(one.grad for one in inputs)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("in_cache", [1, 1 << 19])
def test_gradients_of_attention_under_a_fixed_mask(
    in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sift_cli.models.dropout.IN_CACHE", in_cache)

    def seeded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(query, key, value, masks()[1], 0.4, 0.5)

    torch.autograd.gradcheck(seeded, tensors())


def test_attention_averages_to_that_without_dropout() -> None:
    torch.manual_seed(0)
    query, key, value = (one.detach().float() for one in tensors())
    many = torch.stack([attention(query, key, value, None, 0.3, 1.0) for _ in range(4000)])
    plain = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    torch.testing.assert_close(many.mean(0), plain, atol=0.06, rtol=0)


def test_a_model_uses_it_in_training_only_and_can_be_given_back() -> None:
    model = tiny_model("bert", torch.float32)
    model.set_attn_implementation("sdpa")
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.3
    batch = tiny_batch()
    model.eval()
    before = model(**batch).logits
    undo = quicken_dropout(model)
    assert torch.equal(model(**batch).logits, before)
    model.train()
    nodes = graph(model(**batch).logits)
    assert {"_DropoutBackward", "_AttentionBackward"} <= nodes
    undo()
    model.eval()
    assert torch.equal(model(**batch).logits, before)
    model.train()
    assert not {"_DropoutBackward", "_AttentionBackward"} & graph(model(**batch).logits)
    assert model.config._attn_implementation == "sdpa"


def graph(out: Tensor) -> set[str]:
    """The names of all operations that made a tensor."""
    names: set[str] = set()
    seen, open_nodes = set(), [out.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(type(node).__name__)
        open_nodes += [next_node for next_node, _ in node.next_functions]
    return names


def test_attention_that_is_causal_or_grouped_is_left_to_transformers() -> None:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key = torch.randn(2, 4, 5, 8)
    torch.manual_seed(0)
    out, _ = _sdpa(module, query, key, key, None, dropout=0.2, scaling=0.5)
    torch.manual_seed(0)
    wanted = F.scaled_dot_product_attention(query, key, key, None, 0.2, is_causal=True, scale=0.5)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_rows_of_a_batch_have_the_masks_that_they_have_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a layer, in one that folds heads into the batch, and in attention by parts; and what is
    drawn afterwards is the same."""
    monkeypatch.setattr(module, "IN_CACHE", 2 * 3 * 5 * 5)  # two rows at a time
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(7, 6, generator=generator) + 1
    folded = torch.rand(7 * 3, 5, generator=generator) + 1
    query, key, value = (torch.rand(7, 3, 5, 4, generator=generator) for _ in range(3))

    def drawn(rows: list[int]) -> list[torch.Tensor]:
        torch.manual_seed(5)
        heads = [3 * row + head for row in rows for head in range(3)]
        picked = [one[rows] for one in (query, key, value)]
        return [
            dropout(x[rows], 0.4),
            dropout(folded[heads], 0.4).view(len(rows), 3, 5),
            attention(*picked, None, 0.4, 0.5),
            torch.rand(3),
        ]

    whole = drawn(list(range(7)))
    for rows in ([0, 2, 5], [1, 3, 4, 6], [6], [2, 3]):
        with masks_of(rows, 7):
            *parts, after = drawn(rows)
        for part, of in zip(parts, whole, strict=False):
            torch.testing.assert_close(part, of[rows], rtol=0, atol=1e-6)
        assert torch.equal(after, whole[-1])
    assert not torch.equal(drawn([0, 2, 5])[0], whole[0][[0, 2, 5]])  # without being told
