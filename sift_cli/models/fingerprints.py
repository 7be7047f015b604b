"""What tells one model from another: fingerprints of its tensors, and inputs to try it on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def fingerprint(tensor: Tensor) -> str:
    """Sixteen hex digits of SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(kind_of(tensor).encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it lies so on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape in words, as in `float32[2, 4]`."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without torch's prefix, as in `float32`."""
    return str(dtype).removeprefix("torch.")


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of the dtype `narrow` is one of `wide` as well."""
    if wide == narrow or not (wide.is_floating_point and narrow.is_floating_point):
        return wide == narrow
    one, other = torch.finfo(wide), torch.finfo(narrow)
    return one.eps <= other.eps and one.max >= other.max and one.tiny <= other.tiny


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer of `model`; tied weights once, under their first name."""
    first: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter) or first.setdefault(id(tensor), name) == name
    }


def state_fingerprints(model: nn.Module, skip: Iterable[str]) -> dict[str, str]:
    """The fingerprint of each of `state_tensors` but those in `skip`."""
    left_out = set(skip)
    state = state_tensors(model)
    return {name: fingerprint(one) for name, one in state.items() if name not in left_out}


TensorKind = tuple[torch.dtype, tuple[int, ...]]


def kinds_of(model: nn.Module) -> dict[str, TensorKind]:
    """Dtype and shape of each parameter and saved buffer of a model."""
    return {name: (one.dtype, tuple(one.shape)) for name, one in model.state_dict().items()}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, each with the first name of its tensor."""
    first = {id(weight): name for name, weight in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(weight)] for name, weight in every if name != first[id(weight)]}


def probe_inputs(config: PretrainedConfig) -> Tensor:
    """Token ids of four made-up inputs (int64 [4, 16]), on the host; none is a special token.

    But for the last one, which is the end-of-text token where the model has one.
    """
    text = config.get_text_config()
    kinds = ("pad", "eos", "bos", "sep")
    special = {code for kind in kinds for code in token_codes(text, f"{kind}_token_id")}
    plain = [token for token in range(text.vocab_size) if token not in special]
    spread = (torch.arange(4 * 16) * 7919 + 104729) % len(plain)
    ids = torch.tensor(plain)[spread].view(4, 16)
    for code in token_codes(text, "eos_token_id")[:1]:
        ids[:, -1] = code  # some heads read the state at the end-of-text token
    return ids


def token_codes(config: PretrainedConfig, key: str) -> list[int]:
    """The tokens that a configuration has under `key`: none, one, or several in a list."""
    value = getattr(config, key, None)
    values = value if isinstance(value, list | tuple) else [value]
    return [code for code in values if isinstance(code, int)]
