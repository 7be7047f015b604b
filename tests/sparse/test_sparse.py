"""The sparse core against torch.optim.AdamW on the dense model."""

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sift_cli.models.prepare import recompute_activations
from sift_cli.sparse import SparseAdamW, SparseParameters, Support, attach, segments
from sift_cli.sparse.kernels import dense, sampled
from sift_cli.tasks.token_batches import padded
from sift_cli.training.watch import Watch
from tests.support.causal import EOS, SHAPES, causal_model, causal_rows
from tests.support.models import ARCHITECTURES, tiny_batch, tiny_model

SETTINGS = {"lr": 3e-3, "weight_decay": 0.1}


def supports_of(model: nn.Module, density: float, seed: int = 0) -> dict[str, Support]:
    generator = torch.Generator().manual_seed(seed)
    supports = {}
    for name, weight in model.named_parameters():
        count = max(1, round(density * weight.numel()))
        chosen = torch.randperm(weight.numel(), generator=generator)[:count]
        supports[name] = Support.of(weight.shape, chosen)
    return supports


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.lists(st.integers(0, 48), min_size=1, unique=True),
    st.integers(0, 1),
)
def test_half_in_is_the_fewest_rows_or_columns(
    high: int, wide: int, places: list[int], dim: int
) -> None:
    places = sorted({place % (high * wide) for place in places})
    support = Support.of((high, wide), torch.tensor(places))
    lines = [place // wide if dim == 0 else place % wide for place in places]
    size = (high, wide)[dim]
    fewest = next(
        count
        for count in range(1, size + 1)
        if any(
            2 * sum(line in some for line in lines) >= len(lines)
            for some in itertools.combinations(range(size), count)
        )
    )
    assert support.half_in(dim) == fewest / size


def masks_of(model: nn.Module, supports: dict[str, Support]) -> dict[str, torch.Tensor]:
    masks = {}
    for name, weight in model.named_parameters():
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        if name in supports:
            chosen = supports[name].positions
            mask[slice(None) if chosen is None else chosen.long()] = True
        masks[name] = mask.view(weight.shape)
    return masks


class MaskedAdamW:
    """The reference: dense gradients, dense moments, and a mask on both ends of the step."""

    def __init__(self, model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
        self.model, self.masks = model, masks
        self.adamw = torch.optim.AdamW(model.parameters(), **SETTINGS)

    def step(self, batches: list[dict[str, torch.Tensor]], max_norm: float) -> None:
        self.adamw.zero_grad()
        rows = sum(len(batch["labels"]) for batch in batches)
        for batch in batches:
            (self.model(**batch).loss * len(batch["labels"]) / rows).backward()
        before = {}
        for name, weight in self.model.named_parameters():
            before[name] = weight.detach().clone()
            if weight.grad is not None:
                weight.grad *= self.masks[name]
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.adamw.step()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(torch.where(self.masks[name], weight, before[name]))


def sparse_step(
    model: nn.Module,
    parameters: SparseParameters,
    optimizer: SparseAdamW,
    batches: list[dict[str, torch.Tensor]],
    max_norm: float,
) -> None:
    rows = sum(len(batch["labels"]) for batch in batches)
    for batch in batches:
        (model(**batch).loss * len(batch["labels"]) / rows).backward()
    optimizer.clip(max_norm)
    optimizer.step()


def assert_equal_models(got: nn.Module, wanted: nn.Module) -> None:
    reference = dict(wanted.named_parameters())
    for name, weight in got.named_parameters():
        torch.testing.assert_close(weight, reference[name], rtol=1e-9, atol=1e-10, msg=name)


def causal_batch(seed: int) -> dict[str, torch.Tensor]:
    batch = padded(causal_rows(seed=seed), EOS)
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("density", [1.0, 0.01, 0.3])
@pytest.mark.parametrize(
    ("architecture", "causal"),
    [*((name, False) for name in ARCHITECTURES), *((name, True) for name in SHAPES)],
)
def test_every_step_equals_dense_adamw_under_the_mask(
    architecture: str, causal: bool, density: float
) -> None:
    model = causal_model(architecture) if causal else tiny_model(architecture)
    start = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    supports = supports_of(model, density)
    masks = masks_of(reference, supports)
    dense = MaskedAdamW(reference, masks)
    parameters = attach(model, supports)
    optimizer = SparseAdamW(parameters, **SETTINGS)
    for step in range(20):
        batch = [causal_batch(step) if causal else tiny_batch(seed=step)]
        sparse_step(model, parameters, optimizer, batch, max_norm=0.5)
        dense.step(batch, max_norm=0.5)
        assert_equal_models(model, reference)
    moved = [
        name for name, weight in model.named_parameters() if not torch.equal(weight, start[name])
    ]
    assert len(moved) > 0.9 * len(supports)
    for name, weight in model.named_parameters():
        untouched = ~masks[name]
        assert torch.equal(weight[untouched], start[name][untouched]), name


def test_density_one_is_plain_adamw_with_no_mask_at_all() -> None:
    model = tiny_model("bert")
    reference = copy.deepcopy(model)
    adamw = torch.optim.AdamW(reference.parameters(), **SETTINGS)
    supports = {name: Support(tuple(w.shape)) for name, w in model.named_parameters()}
    parameters = attach(model, supports)
    optimizer = SparseAdamW(parameters, **SETTINGS)
    for step in range(20):
        batch = tiny_batch(seed=step)
        adamw.zero_grad()
        reference(**batch).loss.backward()
        adamw.step()
        sparse_step(model, parameters, optimizer, [batch], max_norm=float("inf"))
        assert_equal_models(model, reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_batch_of_16_equals_four_of_4(checkpointing: bool) -> None:
    batch = tiny_batch(rows=16)
    parts = [{key: value[at : at + 4] for key, value in batch.items()} for at in range(0, 16, 4)]
    models = []
    for batches in ([batch], parts):
        model = tiny_model("bert")
        model.train()
        if checkpointing:
            recompute_activations(model)
        parameters = attach(model, supports_of(model, 0.1))
        optimizer = SparseAdamW(parameters, **SETTINGS)
        for _ in range(3):
            sparse_step(model, parameters, optimizer, batches, max_norm=0.5)
        models.append(model)
    assert_equal_models(*models)


def test_nothing_is_held_or_computed_below_the_lowest_trained_layer() -> None:
    model, batch = tiny_model("bert"), tiny_batch()
    model.train()
    lowest = "bert.encoder.layer.1.attention.self.value"
    weight = model.get_submodule(lowest).weight
    attach(model, {f"{lowest}.weight": Support.of(weight.shape, torch.tensor([0, 17, 200]))})
    held: dict[str, int] = {}
    needs: dict[str, bool] = {}
    inside: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*seen: Any) -> None:
        out = seen[-1] if isinstance(seen[-1], torch.Tensor) else seen[-1][0]
        needs[inside.pop()] = out.requires_grad

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[inside[-1]] = held.get(inside[-1], 0) + (tensor.data_ptr() not in weights)
        return tensor

    weights = {one.data_ptr() for one in model.parameters()}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    below = [name for name in needs if "embeddings" in name or "layer.0" in name]
    assert len(below) > 10
    assert not any(needs[name] or name in held for name in below)
    assert not needs["bert.encoder.layer.1.attention.self.query"]
    assert needs[lowest]
    assert held[lowest] > 0
    frozen = "bert.encoder.layer.1.output.dense"  # above: a gradient passes, no input is held
    assert needs[frozen]
    assert not held.get(frozen)
    loss.backward()


def test_tied_weights_are_one_storage_with_the_gradient_of_both_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model = Tied().double()
    support = Support.of((12, 6), torch.arange(0, 72, 5))
    ids = torch.tensor([1, 2, 3])
    model(ids).square().sum().backward()
    wanted = support.gather(model.embed.weight.grad)
    model.embed.weight.grad = None
    parameters = attach(model, {"embed.weight": support})
    model(ids).square().sum().backward()
    torch.testing.assert_close(parameters.grad, wanted)
    assert model.embed.weight.grad is None
    parameters.flat.data += 1.0
    parameters.write_back()
    assert model.head.weight is model.embed.weight


def test_both_kernels_train_alike() -> None:
    models = []
    for kernel in (dense, sampled):
        model = tiny_model("llama")
        supports = supports_of(model, 0.05)
        linear = {n for n, m in model.named_modules() if type(m) is nn.Linear}
        kept = {n: s for n, s in supports.items() if n.rpartition(".")[0] in linear}
        parameters = attach(model, kept, lambda support, _device, kernel=kernel: kernel(support))
        optimizer = SparseAdamW(parameters, **SETTINGS)
        for step in range(3):
            sparse_step(model, parameters, optimizer, [tiny_batch(seed=step)], 1.0)
        models.append(model)
    assert_equal_models(*models)


def test_a_frozen_linear_layer_keeps_no_dense_gradient() -> None:
    model = tiny_model("bert", torch.float32)
    name = "bert.encoder.layer.0.output.dense.weight"
    weight = dict(model.named_parameters())[name]
    parameters = attach(model, {name: Support.of(weight.shape, torch.tensor([3, 7]))})
    model(**tiny_batch()).loss.backward()
    assert all(one.grad is None and not one.requires_grad for one in model.parameters())
    assert parameters.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_of_a_layer_may_be_changed_in_place(shape: tuple[int, ...], bias: bool) -> None:
    """As models do that add a residual, or take an activation, in place."""

    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.relu_(self.layer(x * 1).add_(x))

    torch.manual_seed(0)
    x, model = torch.randn(shape, requires_grad=True), Changes()
    model(x).square().sum().backward()
    expected, expected_x = model.layer.weight.grad.clone(), x.grad.clone()
    x.grad = None
    chosen = Support.of((4, 4), torch.tensor([1, 6, 11]))
    parameters = attach(model, {"layer.weight": chosen})
    model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x)
    found = dict(parameters.gradients())["layer.weight"]
    torch.testing.assert_close(found, chosen.gather(expected))


def test_masters_keep_updates_that_a_bfloat16_weight_would_swallow() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.fill_(1.0)
    layer.to(torch.bfloat16)
    parameters = attach(layer, {"weight": Support.of((1, 4), torch.tensor([1, 2]))})
    optimizer = SparseAdamW(parameters, lr=1e-3)
    for _ in range(10):
        layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert parameters.flat.dtype == torch.float32
    torch.testing.assert_close(parameters.flat.detach(), torch.full((2,), 0.99), atol=1e-5, rtol=0)
    wanted = torch.tensor([1.0, 0.99, 0.99, 1.0]).to(torch.bfloat16)
    assert torch.equal(layer.weight.data[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_masters_never_meet_a_tensor_of_the_device(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data refuse to meet those of another device; `meta` stands in for a GPU."""
    device = torch.device("meta")  # which knows no autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with FakeTensorMode():
        kind = {"device": device, "dtype": dtype}
        model = nn.Sequential(
            nn.Embedding(7, 6, **kind), nn.Linear(6, 5, **kind), nn.LayerNorm(5, **kind)
        )
        supports = {
            "0.weight": Support((7, 6), torch.arange(0, 42, 5)),
            "1.weight": Support((5, 6), torch.arange(0, 30, 7)),
            "2.bias": Support((5,)),
        }
        parameters = attach(model, supports, lambda support, _: dense(support), offload=True)
        optimizer = SparseAdamW(parameters, **SETTINGS)
        watch = Watch(SimpleNamespace(device=device))
        for step in range(2):
            loss = model(torch.zeros(3, dtype=torch.long, device=device)).sum()
            loss.backward()
            norm = optimizer.clip(1.0)
            optimizer.step(skip=watch.broken(step, [], loss.detach(), norm))
        held = [parameters.flat, parameters.grad, *optimizer.state().values()]
        held += [values for _, values in parameters.state().values()]
        assert {one.device.type for one in held} == {"cpu"}
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
        parameters.load_state(parameters.state())
        parameters.change(parameters.segments[0])


def test_autocast_gradient_is_that_of_the_dense_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    reference = copy.deepcopy(layer)
    support = Support.of((8, 16), torch.arange(0, 128, 9))
    parameters = attach(layer, {"weight": support, "bias": Support((8,))})
    x = torch.randn(5, 16)
    for module in (layer, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    bias, weight = parameters.grad[-8:], parameters.grad[:-8]
    torch.testing.assert_close(weight, support.gather(reference.weight.grad), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bias, reference.bias.grad, rtol=2e-2, atol=2e-2)


def test_detach_gives_the_model_back() -> None:
    model = tiny_model("bert")
    batch = tiny_batch()
    parameters = attach(model, supports_of(model, 0.1))
    parameters.flat.data += 0.01
    parameters.write_back()
    tuned = model(**batch).logits
    parameters.detach()
    assert torch.equal(model(**batch).logits, tuned)
    assert all("forward" not in vars(module) for module in model.modules())
    model(**batch).loss.backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in [model.classifier.weight])
    assert model.bert.embeddings.word_embeddings.weight.grad is not None


@pytest.mark.parametrize("aged", [False, True])
def test_a_skipped_step_changes_nothing_and_the_next_goes_on(aged: bool) -> None:
    def trained(skips: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(6, 5)
        support = Support.of((5, 6), torch.arange(0, 30, 3))
        optimizer = SparseAdamW(attach(layer, {"weight": support}), 0.1, weight_decay=0.1)
        if aged:
            optimizer.move({"weight": support})
        for skip in skips:
            layer(torch.ones(2, 6)).square().sum().backward()
            if skip:
                optimizer.parameters.grad.fill_(torch.nan)
            optimizer.step(skip=torch.tensor(float(skip)))
        return layer.weight.detach(), optimizer.parameters.flat.detach()

    for skips in ([True, False, False], [False, True, False], [False, False, True]):
        for found, wanted in zip(trained(skips), trained([False, False]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_state_and_load_state_come_back_to_the_same_weights() -> None:
    model = tiny_model("bert", torch.bfloat16)
    parameters = attach(model, supports_of(model, 0.1))
    before = copy.deepcopy(model.state_dict())
    saved = parameters.state()
    parameters.flat.data += 0.5
    parameters.write_back()
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    parameters.load_state(saved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parked_entries_of_a_weight_that_trained_in_part_and_in_full() -> None:
    """Positions are int32 in a support of some entries, and counted (int64) in one of all."""
    some = [Support.of((2, 3), torch.tensor(places)) for places in ([0, 4], [1], [0, 4, 5])]
    for order in ([some[0], Support((2, 3)), some[1]], [Support((2, 3)), some[0], some[1]]):
        optimizer = SparseAdamW(attach(nn.Linear(3, 2), {"weight": order[0]}), 0.1, history="park")
        for support in [*order[1:], some[2]]:
            optimizer.step()
            optimizer.move({"weight": support})
        assert optimizer.state()["parked/weight/positions"].tolist() == [1, 2, 3]
        assert optimizer.state()["ages"].tolist() == [2, 2, 1]


def test_attach_refuses_names_and_shapes_that_do_not_fit() -> None:
    model = tiny_model("bert")
    with pytest.raises(KeyError, match="no parameter nowhere"):
        attach(model, {"nowhere": Support((3,))})
    with pytest.raises(ValueError, match="is of shape"):
        attach(model, {"classifier.weight": Support((2, 2))})
    with pytest.raises(ValueError, match="no entry is selected"):
        attach(model, {})


@given(st.data())
def test_gather_after_scatter_is_the_identity(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    size = shape[0] * shape[1]
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    support = Support.of(shape, torch.tensor(chosen, dtype=torch.int64))
    weight = torch.zeros(shape)
    values = torch.arange(1.0, len(chosen) + 1)
    support.scatter_(weight, values)
    assert torch.equal(support.gather(weight), values)
    assert int((weight != 0).sum()) == len(chosen) == len(support)
    for position, value in zip(sorted(chosen), values.tolist(), strict=True):
        assert weight.flatten()[position] == value


@pytest.mark.parametrize(
    ("positions", "said"), [([0, 6], "must lie in"), ([-1], "must lie in"), ([2, 2], "twice")]
)
def test_support_refuses_bad_positions(positions: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Support.of((2, 3), torch.tensor(positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_writes_what_a_loop_writes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")

    def trained() -> nn.Module:
        model = tiny_model("roberta").to(dtype)
        model.classifier.out_proj.float()
        supports = supports_of(model, 0.1)
        name = "classifier.dense.weight"
        supports[name] = Support(supports[name].shape)
        parameters = attach(model, supports)
        optimizer = SparseAdamW(parameters, 0.1)
        for seed in (0, 1):
            parameters.grad.normal_(generator=torch.Generator().manual_seed(seed))
            optimizer.step()
            fewer = supports_of(model, 0.05) if seed else supports
            optimizer.move(fewer)
        parameters.grad.fill_(1.0)
        optimizer.step()
        return model

    looped = trained()
    launches: list[int] = []
    monkeypatch.setattr(segments, "writes_at_once", lambda some: launches.append(1) or True)
    assert_equal_models(trained(), looped)
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_step_on_a_gpu_equals_dense_adamw_under_the_mask(architecture: str) -> None:
    model = tiny_model(architecture).cuda()
    reference = copy.deepcopy(model)
    supports = supports_of(model, 0.1)
    masks = {name: mask.cuda() for name, mask in masks_of(reference, supports).items()}
    dense = MaskedAdamW(reference, masks)
    parameters = attach(model, supports)
    optimizer = SparseAdamW(parameters, **SETTINGS)
    for step in range(20):
        batch = {key: value.cuda() for key, value in tiny_batch(seed=step).items()}
        sparse_step(model, parameters, optimizer, [batch], max_norm=0.5)
        dense.step([batch], max_norm=0.5)
        assert_equal_models(model, reference)
