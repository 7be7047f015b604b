"""What a step holds, counted without data, against the same step on real numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from transformers import AutoModelForSequenceClassification

from sift_cli.analysis.memory import (
    Batch,
    Ledger,
    Plan,
    sparse,
)
from sift_cli.dropout import quicken_dropout
from sift_cli.selection.budget import share
from sift_cli.sparse import SparseAdamW, Support, attach

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


def really(architecture: str, prepare: Callable[[Any], Any]) -> int:
    """The peak of a second step with numbers, above the weights, by the same ledger."""
    model = builder(architecture, "cpu")()
    model.train()
    quicken_dropout(model)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor)
    with ledger:
        model, update = prepare(model)
        batch = BATCH.make()
        update()
        start = ledger.now()
        model(**batch).loss.backward()
        update()
    return ledger.peak(start)[0] - weights


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

    found = Plan(builder(architecture), BATCH).step(sparse(counts, []))
    counted = sum(found.values()) - found["weights"]
    assert counted == pytest.approx(really(architecture, prepare), rel=0.1)
    assert found["masters"] == found["gradients"] == 4 * sum(counts.values())
