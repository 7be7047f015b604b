"""A model made ready to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from sift_cli.models.attention import leave_masks_unread
from sift_cli.models.dropout import quicken_dropout


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing: activations are computed again in the backward pass, not kept."""
    model.config.use_cache = False
    older = model.gradient_checkpointing_enable
    enable = getattr(
        model, "activation_checkpointing_enable", older
    )  # newer transformers rename it
    enable({"use_reentrant": False})


def prepare_model(
    model: PreTrainedModel, device: torch.device, gradient_checkpointing: bool
) -> Callable[[], None]:
    """Training mode, with activations recomputed in the backward pass where that is asked for.

    Returns what gives the model its own dropout and attention back.
    """
    model.train()
    on_gpu = device.type == "cuda"
    undo = (leave_masks_unread if on_gpu else quicken_dropout)(model)
    if gradient_checkpointing:
        recompute_activations(model)
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
