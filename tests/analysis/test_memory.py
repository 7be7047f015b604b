"""What a step holds, counted without data, against the same step on real numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sift_cli.analysis.ledger import Ledger
from sift_cli.analysis.memory import PARTS, Batch, PeakMemory, hit, ordinary, sparse
from sift_cli.analysis.methods import adapt, adapted_layers, trained
from sift_cli.models.dropout import quicken_dropout
from sift_cli.models.prepare import Recompute, recompute_activations
from sift_cli.selection.budget import share
from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.sparse.parameters import ROOM
from sift_cli.tasks.language import Language
from sift_cli.tasks.token_batches import packed, padded
from sift_cli.tasks.tokens import UNSEEN
from tests.support.causal import CONFIGS as CAUSAL_CONFIGS
from tests.support.models import CONFIGS

BATCH = Batch(4, 24)


def builder(architecture: str, device: str = "meta") -> Callable[[], Any]:
    """A tiny model with dropout and transformers' own attention."""

    def build() -> Any:
        config = CONFIGS[architecture]()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if hasattr(config, name):
                setattr(config, name, 0.1)
        with torch.device(device):
            return AutoModelForSequenceClassification.from_config(config)

    return build


def chosen(model: Any, density: float) -> dict[str, int]:
    return {
        name: share(density, weight.numel())
        for name, weight in model.named_parameters()
        if "layer" in name and weight.dim() == 2
    }


def really(architecture: str, prepare: Callable[[Any], Any], checkpointing: bool = False) -> int:
    """The peak of a second step with numbers, weights included, by the same ledger."""
    model = builder(architecture, "cpu")()
    model.train()
    quicken_dropout(model)
    if checkpointing:
        recompute_activations(model)
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor)
    with ledger:
        model, update = prepare(model)
        for _ in range(2):
            start = ledger.now()
            batch = BATCH.make()
            batch["attention_mask"][0, -2:] = 0  # else transformers leaves the mask out
            model(**batch).loss.backward()
            update()
    return ledger.peak(start)[0]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama"])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_sparse_step_holds_what_was_counted(architecture: str, density: float) -> None:
    counts = chosen(builder(architecture)(), density)

    def prepare(model: Any) -> Any:
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        supports = {
            name: Support.of(
                shapes[name], torch.randperm(shapes[name][0] * shapes[name][1])[:count]
            )
            for name, count in counts.items()
        }
        optimizer = SparseAdamW(attach(model, supports), 1e-3)
        return model, optimizer.step

    found = PeakMemory(builder(architecture), BATCH).step(sparse(counts, []))
    assert sum(found.values()) == pytest.approx(really(architecture, prepare), rel=0.05)
    assert found["masters"] == 4 * sum(counts.values())
    assert found["gradients"] == found["masters"] + 4 * ROOM


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk_loss", ["off", 16])
@pytest.mark.parametrize("recompute", [False, "wide"])
def test_a_step_of_a_language_model_holds_what_was_counted(
    recompute: Recompute, chunk_loss: int | str, layout: str
) -> None:
    """Its logits are the largest of all; some of the tokens are learnt."""
    config = CAUSAL_CONFIGS["llama-tied"]()
    config.vocab_size = 4096
    config.pad_token_id = None
    task = Language("instruct").expected(
        config, "cpu", packs=layout == "packed", chunk_loss=chunk_loss
    )

    def build(device: str = "meta") -> Any:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config)

    counts = {n: w.numel() // 20 for n, w in build().named_parameters() if "proj" in n}
    rows = [{"input_ids": [3] * 24, "labels": [UNSEEN] * 14 + [3] * 10} for _ in range(4)]
    rows[0] = {key: values[:-2] for key, values in rows[0].items()}  # else there is no mask
    model = build("cpu").train()
    recompute_activations(model, recompute)
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor)
    with ledger:
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        supports = {
            name: Support.of(shapes[name], torch.randperm(shapes[name][0] * shapes[name][1])[:k])
            for name, k in counts.items()
        }
        optimizer = SparseAdamW(attach(model, supports), 1e-3)
        for _ in range(2):
            start = ledger.now()
            real = packed(rows) if layout == "packed" else padded(rows, 0)
            task.loss(model, real).sum.backward()
            optimizer.step()
    learnt = len(real["predicts"])
    assert learnt == 38
    high, wide = real["input_ids"].shape
    batch = Batch(high, wide, task=task, learnt=learnt, packed=layout == "packed")
    found = sum(PeakMemory(build, batch, recompute).step(sparse(counts, [])).values())
    assert found == pytest.approx(ledger.peak(start)[0], rel=0.05)


@pytest.mark.parametrize("method", ["full", "lora", "head-only"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_methods_hold_what_was_counted(method: str, checkpointing: bool) -> None:
    build = builder("bert")
    head = [name for name, _ in build().named_parameters() if name.startswith("classifier")]
    layers = adapted_layers(build(), list(chosen(build(), 0.1)))

    def adapted(model: Any) -> Any:
        return adapt(model, method, layers, head, rank=2)

    def prepare(model: Any) -> Any:
        model = adapted(model)
        weights = list(trained(model).values())
        optimizer = torch.optim.AdamW(weights, 1e-3, fused=True)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return model, update

    found = PeakMemory(lambda: adapted(build()), BATCH, checkpointing).step(ordinary)
    counted = really("bert", prepare, checkpointing)
    assert sum(found.values()) == pytest.approx(counted, rel=0.05)
    entries = sum(weight.numel() for weight in trained(adapted(build())).values())
    assert found["moments"] == pytest.approx(8 * entries, rel=0.05)


def test_checkpointing_and_a_gpu_s_attention_hold_less() -> None:
    counts = chosen(builder("bert")(), 0.05)
    batch = Batch(8, 128)
    plain = PeakMemory(builder("bert"), batch).step(sparse(counts, []))
    again = PeakMemory(builder("bert"), batch, checkpointing=True).step(sparse(counts, []))
    assert again["activations"] < plain["activations"] / 2
    gpu = PeakMemory(builder("bert"), batch, gpu=True).step(sparse(counts, [], gpu=True))
    probabilities = 2 * 8 * 2 * 128 * 128 * 4  # layers x rows x heads x tokens^2, fp32
    assert plain["activations"] - gpu["activations"] > probabilities / 2
    assert set(plain) == set(PARTS)


def test_other_passes() -> None:
    plan = PeakMemory(builder("bert"), BATCH)
    names = list(chosen(builder("bert")(), 0.05))
    one, several = plan.selection(names), plan.selection(names, batches=3)
    dense = sum(4 * builder("bert")().get_parameter(name).numel() for name in names)
    assert sum(several.values()) - sum(one.values()) == pytest.approx(dense, rel=0.3)
    squared = plan.selection(names, batches=3, squares=True)
    descended = plan.selection(names, batches=3, descends=True)
    assert sum(squared.values()) - sum(several.values()) == pytest.approx(dense, rel=0.3)
    assert sum(descended.values()) - sum(one.values()) == pytest.approx(1.5 * dense, rel=0.3)
    assert sum(plan.evaluation().values()) < sum(one.values())


def test_a_ledger_knows_what_is_alive_at_the_peak() -> None:
    with Ledger() as ledger:
        ledger.phase = "first"
        held = torch.zeros(100)
        ledger.phase = "second"
        big = torch.zeros(1000) + 1  # two at a time
        del big
        nbytes, alive = ledger.peak()
    assert nbytes == 4 * (100 + 2 * 1000)
    assert sorted(one.nbytes for one in alive) == [400, 4000, 4000]
    assert {one.phase for one in alive} == {"first", "second"}
    assert held.shape == (100,)


@given(st.integers(1, 200), st.integers(0, 400))
def test_how_many_places_are_hit(places: int, throws: int) -> None:
    found = hit(places, throws)
    assert min(places, throws, 1) <= found <= min(places, max(throws, 1))
    if places > 50 and throws > 50:
        drawn = [
            len(
                torch.randint(
                    places, (throws,), generator=torch.Generator().manual_seed(s)
                ).unique()
            )
            for s in range(20)
        ]
        assert found == pytest.approx(sum(drawn) / 20, rel=0.1)


def test_what_autograd_adds_in_place_is_counted_once() -> None:
    """For tensors that are watched it adds out of place; torch's profiler sees none of that."""
    x = torch.randn(100, 1000, requires_grad=True)
    with Ledger() as ledger:
        x.index_select(0, torch.arange(50)).sum().backward()
    made = [one.made_by for one in ledger.peak()[1] if one.nbytes == x.nbytes]
    assert len(made) == 1
