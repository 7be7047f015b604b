"""The methods that `sift` is compared with: LoRA and SHiRA (PEFT), all weights, the head alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sift_cli.errors import SiftError
from sift_cli.recipe import usual_rate
from sift_cli.selection.policies import POLICIES
from sift_cli.selection.targets import linear_layers
from sift_cli.tasks.table import LANGUAGE

ADAPTERS = ("lora", "shira")
METHODS = {
    "lora": "LoRA: Hu et al. 2022, arXiv 2106.09685, through PEFT",
    "shira": "SHiRA, arXiv 2406.13175, through PEFT; a random mask",
    "full": "every weight",
    "head-only": "the modules that train whole",
}

WITHOUT_BUDGET = ("full", "head-only")
# The learning rate that a method bears beside that of the default policy, and of one whose rate
# does not follow the budget, the share of entries at which it is that.
PACES = {"lora": 0.25, "head-only": 0.5}
SPOKEN_PACES = {"lora": 1.0}  # of language models (docs/language-models.md)
SHARES = {"lora": 0.01, "full": 1.0, "head-only": 0.01}


def usual_rate_of(method: str, density: float, task: str) -> float:
    """The rate to begin with of a policy or one of METHODS, where that share of entries trains."""
    paces = PACES | (SPOKEN_PACES if task in LANGUAGE else {})
    pace = paces.get(method, 1.0) if method in METHODS else POLICIES[method].pace
    return usual_rate(SHARES.get(method, density), pace)


def adapt(
    model: Any,
    method: str,
    layers: Sequence[str],
    head: Sequence[str],
    rank: int = 0,
    seed: int = 0,
) -> Any:
    """The model to train: only what the method trains asks for a gradient.

    `layers` are the names of the linear layers that an adapter of `rank` goes to, `head` those of
    the parameters that train whole beside it.
    """
    whole = [weight for name, weight in model.named_parameters() if name in set(head)]
    if method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if method in ADAPTERS:
        peft = require_peft()
        linear = linear_layers(model)
        turned = any(linear[f"{layer}.weight"].transposed for layer in layers)  # GPT-2's Conv1D
        where = {"target_modules": list(layers), "r": rank, "fan_in_fan_out": turned}
        config = (
            peft.LoraConfig(lora_alpha=2 * rank, **where)
            if method == "lora"
            else peft.ShiraConfig(random_seed=seed, **where)
        )
        with next(model.parameters()).device:
            model = peft.get_peft_model(model, config)
    for weight in whole:
        weight.requires_grad_(True)
    return model


def adapted_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The linear layers of the weights called `names`: where an adapter goes in their place."""
    linear = linear_layers(model)
    layers = [name.rpartition(".")[0] for name in names if name.endswith("weight")]
    return [layer for layer in layers if f"{layer}.weight" in linear]


def rank_for(model: nn.Module, layers: Sequence[str], entries: int) -> tuple[int, int]:
    """The rank at which adapters of all `layers` come nearest to so many entries, and how many."""
    if not layers:
        raise SiftError("selection.target: no linear layer, so there is nothing to adapt")
    per_rank = sum(sum(model.get_submodule(layer).weight.shape) for layer in layers)  # type: ignore[misc, arg-type]
    rank = max(1, round(entries / per_rank))
    return rank, rank * per_rank


def require_peft() -> Any:
    """PEFT; raises SiftError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise SiftError(
            "lora and shira: the package peft is not installed; `pip install 'sift-cli[peft]'`"
        ) from None
    return peft


def trained(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """What asks for a gradient, each parameter once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
