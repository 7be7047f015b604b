"""The methods of a benchmark, each made ready to take steps with one model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from sift_cli.analysis.methods import adapt, adapted_layers
from sift_cli.models.dropout import quicken_dropout
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import Rule, select
from sift_cli.selection.targets import choose_weights
from sift_cli.sparse import SparseAdamW, Support, attach

RATE = 1e-4
CLIP = 1.0


@dataclass(frozen=True)
class Ready:
    """A model about to train: `entries` train, and `update` clips, steps and clears gradients."""

    model: nn.Module
    entries: int
    update: Callable[[], None]


Method = Callable[[Any, dict[str, Tensor], Sequence[str], float], Ready]


def sift(
    structure: str,
    block: int = 1,
    quick: bool = True,
    score: str = "gradient",
    offload: bool = False,
    scope: str = "tensor",
    batches: int = 1,
) -> Method:
    """Entries chosen by a score, usually the gradient of one batch, in the given structure.

    The one batch there is stands in for several.

    `quick` is sift's own dropout, as in `sift train`; without it, torch's. `offload` is
    `train.offload_optimizer`; on a CPU it changes nothing.
    """

    def prepare(model: Any, batch: dict[str, Tensor], head: Sequence[str], density: float) -> Ready:
        if quick:
            quicken_dropout(model)
        names, whole = choose_weights(model, "all-linear", [], [], head)
        names = [name for name in names if name.endswith("weight")]
        model.requires_grad_(False)  # selection asks for what it needs
        rule = Rule(
            find_score(score), scope=scope, structure=structure, density=density, block=block
        )
        backward = [lambda: model(**batch).loss.backward()] * batches
        supports = select(model, names, rule, backward=backward, descent_rate=RATE)
        named = dict(model.named_parameters())
        supports |= {name: Support(tuple(named[name].shape)) for name in whole}
        parameters = attach(model, supports, offload=offload)
        optimizer = SparseAdamW(parameters, RATE)

        def update() -> None:
            optimizer.clip(CLIP)
            optimizer.step()

        return Ready(model, len(parameters), update)

    return prepare


def full(model: Any, batch: dict[str, Tensor], head: Sequence[str], density: float) -> Ready:
    """Every parameter."""
    return _dense(model)


def lora(model: Any, batch: dict[str, Tensor], head: Sequence[str], density: float) -> Ready:
    """PEFT's LoRA on every linear layer, of the smallest rank that has as many entries."""
    rank = lora_rank(model, head, density)
    return _dense(adapt(model, "lora", layers_of(model, head), head, rank))


def quick_lora(model: Any, batch: dict[str, Tensor], head: Sequence[str], density: float) -> Ready:
    """The same with sift's dropout: tells how much of a difference is dropout alone."""
    quicken_dropout(model)
    return lora(model, batch, head, density)


def shira(model: Any, batch: dict[str, Tensor], head: Sequence[str], density: float) -> Ready:
    """PEFT's SHiRA on every linear layer, with the entries of a LoRA of that rank."""
    rank = lora_rank(model, head, density)
    return _dense(adapt(model, "shira", layers_of(model, head), head, rank))


def super_tuning(
    model: Any, batch: dict[str, Tensor], head: Sequence[str], density: float
) -> Ready:
    """PEFT's Super-Tuning on every linear layer."""
    from peft import SupertuningConfig, get_peft_model

    whole = sorted({name.partition(".")[0] for name in head})
    config = SupertuningConfig(
        sparsity=1 - density, target_modules=layers_of(model, head), modules_to_save=whole
    )
    return _dense(get_peft_model(model, config))


METHODS: dict[str, Method] = {
    "sift entry": sift("entry"),
    "sift row": sift("row"),
    "sift column": sift("column"),
    "sift block": sift("block", 16),
    "sift entry, torch's dropout": sift("entry", quick=False),
    "sift entry, random mask": sift("entry", score="random"),
    "LoRA": lora,
    "LoRA, sift's dropout": quick_lora,
    "SHiRA": shira,
    "Super-Tuning": super_tuning,
    "full": full,
}
ON_REQUEST: dict[str, Method] = {
    "sift entry, offloaded": sift("entry", offload=True),
    "sift entry, sign descent": sift("entry", score="sign-descent", scope="global", batches=16),
}


def lora_rank(model: nn.Module, head: Sequence[str], density: float) -> int:
    """The smallest rank at which a LoRA has that share of the entries of the linear layers."""
    shapes = [model.get_submodule(name).weight.shape for name in layers_of(model, head)]
    return ceil(density * sum(map(prod, shapes)) / sum(map(sum, shapes)))


def layers_of(model: nn.Module, head: Sequence[str]) -> list[str]:
    """The linear layers beside the head."""
    return adapted_layers(model, choose_weights(model, "all-linear", [], [], head)[0])


def _dense(model: Any) -> Ready:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return Ready(model, sum(weight.numel() for weight in trained), update)
