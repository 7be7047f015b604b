"""A model folder's tensors, one at a time, by the names that the loaded model gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sift_cli.models.fingerprints import TensorKind
from sift_cli.models.keys import Joined, match
from sift_cli.models.shards import places_in
from sift_cli.models.tensors import Place


class Source(Protocol):
    """Where a tensor comes from, with its dtype and shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in the files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in memory."""

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""

    def rows(self, first: int, last: int) -> Tensor:
        """Its rows [first, last) alone."""


@dataclass(frozen=True)
class Parts:
    """One tensor in memory that lies in the files as several, or as a part of one."""

    name: str
    joined: Joined
    places: dict[str, Place]

    @property
    def dtype(self) -> torch.dtype:
        """That of the first part."""
        return self.places[self.joined.keys[0]].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in memory."""
        empty = {
            key: torch.empty(self.places[key].shape, device="meta") for key in self.joined.keys
        }
        return tuple(self.joined.load(empty)[self.name].shape)

    def read(self) -> Tensor:
        """The tensor, put together."""
        parts = {key: self.places[key].read() for key in self.joined.keys}
        return self.joined.load(parts)[self.name]

    def rows(self, first: int, last: int) -> Tensor:
        """Its rows [first, last), of the whole put together."""
        return self.read()[first:last].clone()


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that no file has and memory does, such as of a new head."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Its own."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own."""
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        """A copy."""
        return self.tensor.clone()

    def rows(self, first: int, last: int) -> Tensor:
        """A copy of its rows [first, last) alone."""
        return self.tensor[first:last].clone()


class Stored:
    """The safetensors files of `folder`, read tensor by tensor, for `model`.

    `places` tells where each tensor lies that is there, by the model's name for it; `strange` are
    the keys that the model has no use for, `wrapped` tells whether the keys are those of a model
    inside of another module. `in_files` are all tensors by their keys, `joined` the groups of them
    that become others. Raises SiftError (exit code 3) for damaged files.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self.in_files = places = places_in(folder)
        matched = match(model, places)
        self.strange, self.wrapped = matched.strange, matched.wrapped
        self.places: dict[str, Source] = {name: places[key] for key, name in matched.names.items()}
        self.joined = [*{id(one): one for one in matched.joined.values()}.values()]
        for joined in self.joined:
            self.places |= {name: Parts(name, joined, places) for name in joined.names}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes these as if they lay in the files, by the model's names."""
        self.places |= {name: Held(tensor) for name, tensor in tensors.items()}

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
        for name, place in places_in(folder).items()
        if place.dtype.is_floating_point
    }
