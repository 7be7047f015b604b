"""A model folder's tensors, one at a time, by the names that the loaded model gives them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sift_cli.models.fingerprints import TensorKind
from sift_cli.models.loading import weight_files
from sift_cli.models.names import owner
from sift_cli.models.tensors import Place, list_file


class Stored:
    """The safetensors files of `folder`, read tensor by tensor.

    `names` maps every name of the model to the one that counts (another one where tied). `places`
    tells where each tensor lies that is there, by the name that counts; `strange` are the keys that
    the model has no use for. Raises SiftError (exit code 3) for damaged files.
    """

    def __init__(self, folder: Path, names: Mapping[str, str]) -> None:
        self.places: dict[str, Place] = {}
        self.strange: list[str] = []
        for file in weight_files(folder):
            for key, place in list_file(file).places.items():
                name = owner(key, names)
                if name is None:
                    self.strange.append(key)
                else:
                    self.places[names[name]] = place

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the host."""
        return self.places[name].read()

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, without reading it."""
        return list(self.places[name].shape)


def stored_kinds(folder: Path) -> dict[str, TensorKind]:
    """Dtype and shape of each floating-point tensor of a model folder, as its files hold it."""
    return {
        name: (place.dtype, place.shape)
        for path in weight_files(folder)
        for name, place in list_file(path).places.items()
        if place.dtype.is_floating_point
    }
