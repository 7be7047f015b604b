"""transformers' sdpa attention, exchanged for another of the same kind."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

UNREAD = "sift_unread"


def leave_masks_unread(model: nn.Module) -> Callable[[], None]:
    """Makes sdpa attention take a padding mask without looking into it; returns what undoes it.

    transformers looks whether the mask hides anything, for which a GPU's host has to wait at every
    step. Leave the mask out of batches that need none: these then take the quickest path.
    """
    if not _uses(model, "sdpa"):
        return _nothing
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(**kwargs: Any) -> Tensor | None:
        if kwargs.get("attention_mask") is not None:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made: Tensor | None = sdpa_mask(**kwargs)
        return made

    return replace_sdpa(model, UNREAD, sdpa_attention_forward, mask)


def replace_sdpa(
    model: nn.Module, name: str, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Callable[[], None]:
    """Registers an attention as `name` and gives it to a model that uses sdpa.

    Returns what gives the model sdpa back.
    """
    if not _uses(model, "sdpa"):
        return _nothing
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)  # type: ignore[operator]

    def undo() -> None:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]

    return undo


def _uses(model: nn.Module, name: str) -> bool:
    config = getattr(model, "config", None)
    return config is not None and getattr(config, "_attn_implementation", None) == name


def _nothing() -> None:
    pass
