"""The weight files of a model folder: which they are, and where each tensor lies in them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.tensors import Listing, Place, list_file

INDEX_FILE = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-0*(\d+)\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order: those that transformers would load.

    Raises SiftError where there are none, and (exit code 3) where the index names one that is not
    there, or shards have no index.
    """
    whole, index = folder / "model.safetensors", folder / INDEX_FILE
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(_indexed(index))]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise SiftError(f"{folder}: no model*.safetensors; sift reads no pickled weights")
    shards = [found for file in files if (found := SHARD.fullmatch(file.name))]
    if shards:
        raise SiftError(
            f"{folder} holds {len(shards)} of {shards[0][1]} shards and no {INDEX_FILE}; copy the "
            "whole folder",
            ExitCode.WRONG_FILE,
        )
    return files


def list_weights(folder: Path) -> dict[str, Listing]:
    """The listing of each weight file by its name.

    Raises SiftError (exit code 3) for damaged files, and where two files hold a tensor with other
    values: index and transformers do not agree on which of them counts.
    """
    listings = {file.name: list_file(file) for file in weight_files(folder)}
    seen: dict[str, Place] = {}
    for listing in listings.values():
        for key, place in listing.places.items():
            first = seen.setdefault(key, place)
            if first is not place and fingerprint(first.read()) != fingerprint(place.read()):
                raise SiftError(
                    f"{folder} holds {key} twice, with other values in {first.file.name} than in "
                    f"{place.file.name}; save the model anew",
                    ExitCode.WRONG_FILE,
                )
    return listings


def places_in(folder: Path) -> dict[str, Place]:
    """Where each tensor of a model folder lies, by its key; see `list_weights`."""
    return first_places(list_weights(folder).values())


def first_places(listings: Iterable[Listing]) -> dict[str, Place]:
    """Where each tensor lies, by its key: in the first file that has it."""
    places: dict[str, Place] = {}
    for listing in listings:
        places = listing.places | places
    return places


def write_index(out: Path, sizes: Mapping[str, tuple[str, int]]) -> None:
    """The index of a sharded model; `sizes` has file and bytes of each tensor."""
    index = {
        "metadata": {"total_size": sum(size for _, size in sizes.values())},
        "weight_map": {name: file for name, (file, _) in sorted(sizes.items())},
    }
    (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _indexed(index: Path) -> set[str]:
    """The names of the files that an index lists, each beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        bad = sorted(name for name in names if Path(name).name != name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SiftError(f"{index}: damaged: {error}", ExitCode.WRONG_FILE) from error
    if bad:
        raise SiftError(f"{index}: {bad[0]} is no plain file name", ExitCode.WRONG_FILE)
    lacking = sorted(name for name in names if not (index.parent / name).is_file())
    if lacking:
        raise SiftError(f"{index} names {lacking[0]}, which is not there", ExitCode.WRONG_FILE)
    return names
