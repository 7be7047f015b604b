"""Changes to what lies in a model folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def edit(folder: Path, change: Callable[[Weights], Mapping[str, Tensor] | None]) -> Path:
    """Changes the folder's weights in place, or replaces them by what `change` returns."""
    weights = load_file(folder / "model.safetensors")
    weights = dict(change(weights) or weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def configure(folder: Path, **values: object) -> None:
    """Sets keys of config.json; None takes one out."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
