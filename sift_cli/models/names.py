"""The names of a model's tensors in memory, and where they are tied."""

from typing import Any

from torch import nn


def all_names(model: nn.Module) -> dict[str, str]:
    """Each name in the model's state, and the first name of the same storage where it is tied."""
    first: dict[int, str] = {}
    names = {name: name for name in model.state_dict()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(weight), name)
    return names


def architecture_of(model: nn.Module) -> str:
    """The name of a model's class; FSDP2 gives a model whose weights lie in rows one of its own."""
    kinds = type(model).__mro__
    return next(one.__name__ for one in kinds if not one.__module__.startswith("torch.distributed"))


def head_of(model: Any) -> list[str]:
    """Parameters beside the base model: those that a checkpoint of the base does not hold."""
    prefix = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
