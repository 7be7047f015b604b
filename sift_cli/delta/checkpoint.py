"""A model folder's tensors, one at a time, by the names that the loaded model gives them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sift_cli.delta.merging import _owner as owner
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models import weight_files


class Checkpoint:
    """The safetensors files of `folder`, read tensor by tensor.

    `names` maps every name of the model to the one that counts (another one where tied). `places`
    has the file and key of each tensor that is there, by the name that counts; `strange` are the
    keys that the model has no use for. Raises SiftError (exit code 3) for damaged files.
    """

    def __init__(self, folder: Path, names: Mapping[str, str]) -> None:
        self.places: dict[str, tuple[Path, str]] = {}
        self.strange: list[str] = []
        self._names = dict(names)
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        self._place(file, key)
            except SafetensorError as error:
                raise SiftError(f"{file}: damaged: {error}", ExitCode.WRONG_FILE) from error

    def _place(self, file: Path, key: str) -> None:
        name = owner(key, self._names)
        if name is None:
            self.strange.append(key)
        else:
            self.places[self._names[name]] = (file, key)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the host."""
        file, key = self.places[name]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, without reading it."""
        file, key = self.places[name]
        with safe_open(file, framework="pt") as opened:
            shape: list[int] = opened.get_slice(key).get_shape()
        return shape


def float_dtypes(folder: Path) -> set[str]:
    """The floating-point dtypes in which a folder's tensors are stored, such as `float32`."""
    found = set()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise SiftError(f"{file}: damaged: {error}", ExitCode.WRONG_FILE) from error
    words = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    return {words[one] for one in found if one in words}


def all_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name in the model's state, and the first name of the same storage where it is tied."""
    first: dict[int, str] = {}
    names = {name: name for name in model.state_dict()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(weight), name)
    return names
