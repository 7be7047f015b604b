"""What a merge writes: for each file its tensors, where they come from, how they are held."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sift_cli.convert.undo import MergeRecord, dropped_places, side_files
from sift_cli.delta.file import Delta
from sift_cli.delta.identity import renamed
from sift_cli.errors import ExitCode, SiftError, counted
from sift_cli.models.fingerprints import fingerprint, holds
from sift_cli.models.keys import Joined, Matched, match
from sift_cli.models.loading import DTYPES
from sift_cli.models.names import all_names
from sift_cli.models.shards import INDEX_FILE, first_places, list_weights, places_in
from sift_cli.models.tensors import Listing, Place, listed

ASIDE = 0.05  # tensors that the model has not are kept for undo up to this share of its size,
SMALL = 4 << 20  # or up to so many bytes
SPARE = 1 << 24  # bytes for configuration and tokenizer


@dataclass(frozen=True)
class Planned:
    """A tensor to write: read from `place`, or `value` where it comes from the delta.

    `name` is the model's name for it, empty for a tensor that the model has not, and for one that
    becomes others in memory: `group` has those. `held` is the dtype in which the trained model held
    it and in which deltas and fingerprints see it, `written` the dtype of the file.
    """

    name: str
    shape: tuple[int, ...]
    held: torch.dtype
    written: torch.dtype
    place: Place | None = None
    value: Tensor | None = None
    group: "Group | None" = None
    key: str = ""  # in the group

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return prod(self.shape) * self.written.itemsize

    def read(self) -> Tensor:
        """The tensor, in the dtype `held`."""
        if self.place is None:
            assert self.value is not None
            return self.value
        return self.place.read().to(self.held)


@dataclass(frozen=True)
class Group:
    """Tensors of the source, at `places` by key, that become others in memory, held as `held`."""

    joined: Joined
    places: Mapping[str, Place]
    held: torch.dtype

    def read(self) -> dict[str, Tensor]:
        """The tensors in memory, by the model's names."""
        parts = {key: self.places[key].read().to(self.held) for key in self.joined.keys}
        return self.joined.load(parts)


@dataclass
class Shard:
    """One file to write, and its tensors by key.

    `header` is given where the file's header must be word for word that of the base's file.
    """

    file: str
    metadata: Mapping[str, str]
    tensors: dict[str, Planned] = field(default_factory=dict)
    header: str | None = None


@dataclass
class Layout:
    """All files to write, and what they are made from.

    `listings` are the source's files and `names` the model's name for each key in them. `dropped`
    are the source's tensors that the written model has no place for, by key; `replaced`, by the
    model's name, those of them that the delta brings anew. `indexed`: the files get an index.

    An undo alone has `rounded`, keys that cannot come back in the dtype that the base was stored
    in, and `aside`, the fingerprint of each tensor that comes from what a merge set aside.
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
        """What all tensors take on disk."""
        return sum(planned.bytes for shard in self.shards for planned in shard.tensors.values())

    @property
    def sizes(self) -> dict[str, tuple[str, int]]:
        """File and bytes of each tensor, by key."""
        return {
            key: (shard.file, planned.bytes)
            for shard in self.shards
            for key, planned in shard.tensors.items()
        }

    @property
    def most_aside(self) -> int:
        """The bytes that a merge may keep of tensors that it drops."""
        return max(SMALL, int(ASIDE * self.bytes))


def lay_out(
    folder: Path,
    model: Any,
    delta: Delta,
    source: str,
    *,
    undo: bool,
    record: MergeRecord | None,
) -> Layout:
    """The files that a merge of the model in `folder`, called `source`, writes, or that undo does.

    `model` is the model's, on the meta device. Without the `record` of its merge, a folder is
    turned back under the names that it has. Raises SiftError (exit code 3) where the folder holds
    another architecture than the delta's, or lacks a tensor.
    """
    kind, wanted = type(model).__name__, delta.header.architecture
    if not undo and wanted not in (None, kind):
        raise SiftError(
            f"{source} is the base of a {kind}, and the delta is of a {wanted}; give the model "
            f"that it was trained on, {delta.header.base.path}",
            ExitCode.WRONG_FILE,
        )
    if record is not None:
        layout = layout_of_undo(folder, model, record)
    else:
        layout = layout_of_merge(folder, model, delta)
    require_whole(layout, {*all_names(model).values()}, delta, source)
    if not undo:
        add_dense(layout, delta)
    return layout


def layout_of_merge(folder: Path, model: Any, delta: Delta) -> Layout:
    """The model's tensors in files called as those in `folder`, under the model's own names.

    What transformers renames or puts together on loading keeps the names of the folder, which it
    and others know. A tensor that is in two files is written to the first.
    """
    layout = Layout(indexed=(folder / INDEX_FILE).is_file(), listings=list_weights(folder))
    places = first_places(layout.listings.values())
    matched = match(model, places)
    groups = _groups(matched, places, delta)
    for file, listing in layout.listings.items():
        shard = Shard(file, {"format": "pt", **listing.metadata})
        layout.shards.append(shard)
        for key, place in listing.places.items():
            if places[key] is not place:
                continue
            written = matched.written.get(key, "")
            if group := groups.get(key):
                planned = Planned(
                    "", place.shape, group.held, group.held, place, group=group, key=key
                )
            elif key in matched.names:
                name = matched.names[key]
                held = _held(delta, name, place.dtype)
                planned = Planned(name, place.shape, held, held, place)
                if name in delta.dense:
                    layout.dropped[key] = place
                    layout.replaced[written] = planned
                    continue
            else:
                layout.dropped[key] = place
                continue
            layout.names[key] = written
            shard.tensors[written] = planned
    layout.indexed |= len(layout.shards) > 1
    return layout


def _groups(matched: Matched, places: Mapping[str, Place], delta: Delta) -> dict[str, Group]:
    """The group of each key that becomes one tensor with others, or several."""
    made: dict[int, Group] = {}
    for key, joined in matched.joined.items():
        if id(joined) not in made:
            held = _held(delta, joined.names[0], places[key].dtype)
            made[id(joined)] = Group(joined, places, held)
    return {key: made[id(joined)] for key, joined in matched.joined.items()}


def add_dense(layout: Layout, delta: Delta) -> None:
    """Puts the tensors that the base lacks at the end of the last file."""
    for name, tensor in delta.dense.items():
        dtype = tensor.dtype
        planned = Planned(name, tuple(tensor.shape), dtype, dtype, value=tensor)
        layout.shards[-1].tensors[name] = planned


def layout_of_undo(folder: Path, model: Any, record: MergeRecord) -> Layout:
    """The base's files as they were, as far as the merged folder `folder` holds their tensors."""
    places = places_in(folder)
    matched, aside = match(model, places), dropped_places(folder)
    groups = {
        key: Group(joined, places, places[key].dtype) for key, joined in matched.joined.items()
    }
    shared = {id(one.joined): one for one in groups.values()}
    layout = Layout()
    for file, text in record.headers.items():
        rows, metadata = listed(text)
        shard = Shard(file, metadata)
        for key, (stored, shape) in rows.items():
            if key in record.dropped:
                if key in aside:
                    shard.tensors[key] = Planned("", shape, stored, stored, aside[key])
                    layout.aside[key] = record.dropped[key]
                continue
            name = record.names.get(key, "")
            place = places.get(name)
            known = name in matched.names or name in groups
            if place is None or place.shape != shape or not known:
                raise SiftError(f"{folder} lacks {name or key}, or its shape", ExitCode.WRONG_FILE)
            written = stored
            if not holds(place.dtype, stored):
                written = place.dtype  # the base's is wider, and training rounded it
                layout.rounded.append(key)
            shard.tensors[key] = Planned(
                matched.names.get(name, ""),
                shape,
                place.dtype,
                written,
                place,
                group=shared[id(groups[name].joined)] if name in groups else None,
                key=name,
            )
        if all(key in shard.tensors and key not in layout.rounded for key in rows):
            shard.header = text
        layout.shards.append(shard)
    layout.indexed = len(layout.shards) > 1 or INDEX_FILE in record.texts
    return layout


def require_whole(layout: Layout, names: Collection[str], delta: Delta, source: str) -> None:
    """Raises SiftError (exit code 3) where the source lacks a tensor of the model.

    The message says so where one that it drops is the lacking one under another name.
    """
    held: set[str] = set()
    for planned in (one for shard in layout.shards for one in shard.tensors.values()):
        held |= {*planned.group.joined.names} if planned.group else {planned.name}
    lacking = sorted({*names} - held - {*delta.dense})
    if not lacking:
        return
    changed = [name for name in lacking if name in delta.weights]
    dtypes = {delta.weights[name].shape: delta.weights[name].dtype for name in changed}
    here = {
        key: fingerprint(place.read().to(dtypes[place.shape]))
        for key, place in layout.dropped.items()
        if place.shape in dtypes
    }
    hint = renamed(delta, here, changed)
    told = counted(len(lacking), "tensor", "tensors")
    raise SiftError(
        f"{source} lacks {told} of the model, such as {lacking[0]}\n{hint}".strip(),
        ExitCode.WRONG_FILE,
    )


def _held(delta: Delta, name: str, stored: torch.dtype) -> torch.dtype:
    """The dtype in which the trained model held this tensor."""
    if name in delta.weights:
        return delta.weights[name].dtype
    base = delta.header.base
    if name in base.kept_dtypes:
        kept: torch.dtype = getattr(torch, base.kept_dtypes[name])
        return kept
    return DTYPES[base.dtype] if stored.is_floating_point else stored


def require_space(layout: Layout, out: Path, folder: Path) -> None:
    """Raises SiftError where the disk of `out` has no room for the files made from `folder`."""
    needed = (
        layout.bytes
        + layout.most_aside * bool(layout.dropped)
        + sum((folder / name).stat().st_size for name in side_files(folder))
        + SPARE
    )
    there = next(place for place in out.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise SiftError(
            f"{out} needs {needed / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB free; make "
            "room or choose another --out"
        )
