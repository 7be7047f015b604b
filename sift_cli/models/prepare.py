"""A model made ready to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from sift_cli.models.attention import leave_masks_unread
from sift_cli.models.dropout import quicken_dropout

Recompute = bool | Literal["wide"]


def recompute_of(model: PreTrainedModel, asked: bool | str) -> Recompute:
    """What `train.gradient_checkpointing` means for a model.

    `auto` is `wide` for a causal language model that can do it, and nothing for any other.
    """
    if asked == "auto":
        able = getattr(model, "supports_gradient_checkpointing", False)
        return "wide" if able and model.get_output_embeddings() is not None else False
    return "wide" if asked == "wide" else bool(asked)


def recompute_activations(model: PreTrainedModel, how: Recompute = True) -> None:
    """Gradient checkpointing: activations are computed again in the backward pass, not kept.

    Of a layer nothing is kept but its input; where `how` is `wide`, what `_worth_keeping` names.
    """
    if not how:
        return
    model.config.use_cache = False
    older = model.gradient_checkpointing_enable
    enable = getattr(
        model, "activation_checkpointing_enable", older
    )  # newer transformers rename it
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "wide":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _worth_keeping)
    enable(settings)


def _worth_keeping(context: Any, operation: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether what an operation made is kept: a product or attention, no wider than its input."""
    packet = getattr(operation, "_overloadpacket", operation)
    if packet not in flop_registry and "scaled_dot_product" not in str(packet):
        return False
    made = context.op_output
    made = made if isinstance(made, Tensor) else made[0]
    inputs = [one for one in args if isinstance(one, Tensor) and one.shape[:1] == made.shape[:1]]
    return any(made.numel() <= one.numel() for one in inputs)


def prepare_model(
    model: PreTrainedModel, device: torch.device, gradient_checkpointing: bool | str
) -> Callable[[], None]:
    """Training mode, with activations recomputed in the backward pass as the recipe says.

    Returns what gives the model its own dropout and attention back.
    """
    model.train()
    on_gpu = device.type == "cuda"
    undo = (leave_masks_unread if on_gpu else quicken_dropout)(model)
    recompute_activations(model, recompute_of(model, gradient_checkpointing))
    return undo


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient, but for those that ask for one meanwhile."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    for weight, _ in flags:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
