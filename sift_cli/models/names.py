"""The names of a model's tensors: in memory, in its files, and where they are tied."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.loading import UNLOADABLE, quiet

RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def tensor_names(config: PretrainedConfig, auto: Any) -> dict[str, str]:
    """Everything that the Auto class's model saves, with the name of the storage where it is tied.

    Raises SiftError (exit code 3) where the configuration makes no model.
    """
    try:
        with torch.device("meta"), quiet():
            model = auto.from_config(config, trust_remote_code=False)
    except UNLOADABLE as error:
        said = str(error).partition("\n")[0]
        raise SiftError(f"config.json makes no model: {said}", ExitCode.WRONG_FILE) from error
    return all_names(model)


def all_names(model: nn.Module) -> dict[str, str]:
    """Each name in the model's state, and the first name of the same storage where it is tied."""
    first: dict[int, str] = {}
    names = {name: name for name in model.state_dict()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(weight), name)
    return names


def owner(key: str, names: Mapping[str, str]) -> str | None:
    """The model's name for a tensor of a checkpoint; None for what the model has not.

    A checkpoint may hold the bare backbone (`encoder...` for `bert.encoder...`) or old layer norm
    names.
    """
    for pattern, new in RENAMED:
        key = re.sub(pattern, new, key)
    backbones = sorted({name.split(".")[0] for name in names})
    candidates = [key, *(f"{one}.{key}" for one in backbones)]
    return next((name for name in candidates if name in names), None)


def head_of(model: Any) -> list[str]:
    """Parameters beside the base model: those that a checkpoint of the base does not hold."""
    prefix = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
