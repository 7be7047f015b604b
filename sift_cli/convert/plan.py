"""What a merge writes: for each file its tensors, where they come from and how they are held."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sift_cli.convert.undo import Record, dropped_places
from sift_cli.delta.file import Delta
from sift_cli.delta.identity import renamed
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.loading import DTYPES, INDEX_FILE, weight_files
from sift_cli.models.names import owner
from sift_cli.models.tensors import Listing, Place, list_file, listed


@dataclass(frozen=True)
class Planned:
    """A tensor to write: read from `place`, else `value`.

    `name` is the model's (empty for what it has not), `held` the dtype in which the trained model
    held it and in which deltas and fingerprints see it, `written` the dtype it is written in.
    """

    name: str
    shape: tuple[int, ...]
    held: torch.dtype
    written: torch.dtype
    place: Place | None = None
    value: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return prod(self.shape) * self.written.itemsize

    def read(self) -> Tensor:
        """The tensor as held."""
        if self.place is None:
            assert self.value is not None
            return self.value
        return self.place.read().to(self.held)


@dataclass
class Shard:
    """One file to write; `header` is its header where that is known word for word."""

    file: str
    metadata: Mapping[str, str]
    tensors: dict[str, Planned] = field(default_factory=dict)
    header: str | None = None


@dataclass
class Plan:
    """All files to write, and what they are made from.

    `listings` are the source's files and `names` the model's name for each of their keys; `dropped`
    are those that the written folder has no place for, `replaced` those of them whose tensor the
    delta holds anew, by the model's name. `rounded` are keys that cannot come back in the dtype
    that the base is stored in.
    """

    shards: list[Shard] = field(default_factory=list)
    listings: dict[str, Listing] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Place] = field(default_factory=dict)
    replaced: dict[str, Planned] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    indexed: bool = False

    @property
    def bytes(self) -> int:
        """The size of all tensors on disk."""
        return sum(one.bytes for shard in self.shards for one in shard.tensors.values())


def plan_merge(folder: Path, names: Mapping[str, str], delta: Delta) -> Plan:
    """The trained model's tensors in the base's files, under the model's own names.

    Also the base's tensors in the merged model's files. `names` is of `tensor_names`.
    """
    plan = Plan(indexed=(folder / INDEX_FILE).is_file())
    for file in weight_files(folder):
        listing = plan.listings[file.name] = list_file(file)
        shard = Shard(file.name, {"format": "pt", **listing.metadata})
        plan.shards.append(shard)
        for key, place in listing.places.items():
            name = owner(key, names)
            if name is None:
                plan.dropped[key] = place
                continue
            held = _held(delta, names[name], place.dtype)
            planned = Planned(names[name], place.shape, held, held, place)
            if names[name] in delta.dense:
                plan.dropped[key] = place
                plan.replaced[name] = planned
            elif name in plan.names.values():
                raise SiftError(f"{folder} holds {name} twice", ExitCode.WRONG_FILE)
            else:
                plan.names[key] = name
                shard.tensors[name] = planned
    plan.indexed |= len(plan.shards) > 1
    return plan


def add_dense(plan: Plan, delta: Delta) -> None:
    """The tensors that the base lacks, at the end of the last file."""
    for name, tensor in delta.dense.items():
        dtype = tensor.dtype
        plan.shards[-1].tensors[name] = Planned(
            name, tuple(tensor.shape), dtype, dtype, value=tensor
        )


def plan_undo(folder: Path, names: Mapping[str, str], record: Record) -> Plan:
    """The base's files as they were, as far as the merged folder holds what was in them."""
    places = {
        name: place
        for file in weight_files(folder)
        for name, place in list_file(file).places.items()
    }
    aside = dropped_places(folder)
    plan = Plan()
    for file, text in record.headers.items():
        rows, metadata = listed(text)
        shard = Shard(file, metadata)
        for key, (stored, shape) in rows.items():
            if key in record.dropped:
                if key in aside:
                    shard.tensors[key] = Planned("", shape, stored, stored, aside[key])
                    plan.aside[key] = record.dropped[key]
                continue
            name = record.names.get(key, "")
            place = places.get(name)
            if place is None or place.shape != shape or name not in names:
                raise SiftError(f"{folder} lacks {name or key}, or its shape", ExitCode.WRONG_FILE)
            exact = torch.promote_types(stored, place.dtype) == place.dtype
            written = stored if exact else place.dtype
            if not exact:
                plan.rounded.append(key)
            shard.tensors[key] = Planned(names[name], shape, place.dtype, written, place)
        if all(key in shard.tensors and key not in plan.rounded for key in rows):
            shard.header = text
        plan.shards.append(shard)
    plan.indexed = len(plan.shards) > 1 or INDEX_FILE in record.texts
    return plan


def require_whole(plan: Plan, names: Mapping[str, str], delta: Delta, source: str) -> None:
    """Raises SiftError (exit code 3) where the source lacks a tensor of the model."""
    held = {one.name for shard in plan.shards for one in shard.tensors.values()}
    lacking = sorted({*names.values()} - held - {*delta.dense})
    if not lacking:
        return
    changed = [name for name in lacking if name in delta.weights]
    dtypes = {delta.weights[name].shape: delta.weights[name].dtype for name in changed}
    here = {
        key: fingerprint(place.read().to(dtypes[place.shape]))
        for key, place in plan.dropped.items()
        if place.shape in dtypes
    }
    hint = renamed(delta, here, changed)
    raise SiftError(
        f"{source} lacks {len(lacking)} tensors of the model, such as {lacking[0]}\n{hint}".strip(),
        ExitCode.WRONG_FILE,
    )


def _held(delta: Delta, name: str, stored: torch.dtype) -> torch.dtype:
    """The dtype in which the trained model held this tensor."""
    if name in delta.weights:
        return delta.weights[name].dtype
    base = delta.about["base"]
    if name in base["kept_dtypes"]:
        kept: torch.dtype = getattr(torch, base["kept_dtypes"][name])
        return kept
    return DTYPES[base["dtype"]] if stored.is_floating_point else stored
