"""Changes to what lies in a model folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sift_cli.models.shards import INDEX_FILE

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


def shard(folder: Path, parts: int) -> dict[str, list[str]]:
    """Splits the folder's one file into `parts`, with an index; returns the names in each."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {
        f"model-{at + 1:05}-of-{parts:05}.safetensors": names[at::parts] for at in range(parts)
    }
    for file, part in files.items():
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": {n: f for f, part in files.items() for n in part},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return files
