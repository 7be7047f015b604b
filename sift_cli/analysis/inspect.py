"""What a delta file holds: where it changes a model, by how much, where it comes from."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import hypot, sqrt
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sift_cli.delta.file import CODING, FORMAT, SIGNED, Delta, WeightDelta, load_delta
from sift_cli.errors import ExitCode, SiftError, in_lines
from sift_cli.models.fingerprints import fingerprint
from sift_cli.models.loading import model_folder, skeleton
from sift_cli.models.stored import Stored
from sift_cli.tasks.kinds import task_of

BOUNDS = (8, 6, 4, 2, 0)  # negative powers of two
# How far an entry moved, as bits alone tell it; each entry is in the first class that fits.
MOVES = (
    "nothing",
    "one rounding step",
    *(f"less than 1/{2**power} of itself" for power in BOUNDS[:-1]),
    "less than itself",
    "more: another power of two",
    "more: another sign",
)
PANELS = {  # of the picture, by key of a report
    "density": "density",
    "moved_far": "entries that moved far",
    "relative": "size of the change",
    "half_in_rows": "rows with half of it",
    "half_in_columns": "columns with half of it",
}
OUTSIDE = "outside"  # stands for the layer of weights that are in none


@dataclass
class Change:
    """The change of one weight or of several together: changes add up.

    `entries` of `size` are in the delta; `moves` counts them by `MOVES`. `halves` has the entries
    in matrices, and their sums of the shares of rows and of columns that hold half of a matrix's.
    `square` and `base_square` are the squared 2-norms of the change and of the whole base weight,
    None without a base.
    """

    weights: int
    entries: int
    size: int
    moves: npt.NDArray[np.int64]
    halves: npt.NDArray[np.float64]
    square: float | None = None
    base_square: float | None = None

    def __add__(self, other: "Change") -> "Change":
        return Change(
            self.weights + other.weights,
            self.entries + other.entries,
            self.size + other.size,
            self.moves + other.moves,
            self.halves + other.halves,
            None if self.square is None else self.square + (other.square or 0.0),
            None if self.base_square is None else self.base_square + (other.base_square or 0.0),
        )

    def report(self) -> dict[str, Any]:
        """As JSON: counts, density, the share of entries that differ from the base, norms.

        `moved_far` is the share of entries whose power of two or sign is another, `new_sign` that
        of another sign: the further entries move, the more of them. `half_in_rows` and
        `half_in_columns` are means over the entries in matrices.
        """
        placed, rows, columns = self.halves
        values: dict[str, Any] = {
            "weights": self.weights,
            "entries": self.entries,
            "size": self.size,
            "density": self.entries / max(1, self.size),
            "survived": 1 - int(self.moves[0]) / max(1, self.entries),
            "moved_far": int(self.moves[-2:].sum()) / max(1, self.entries),
            "new_sign": int(self.moves[-1]) / max(1, self.entries),
            "half_in_rows": float(rows / placed) if placed else None,
            "half_in_columns": float(columns / placed) if placed else None,
            "moves": {name: int(n) for name, n in zip(MOVES, self.moves, strict=True)},
        }
        if self.square is not None and self.base_square is not None:
            norm, base = sqrt(self.square), sqrt(self.base_square)
            values |= {"norm": norm, "base_norm": base, "relative": norm / base if base else None}
        return values


NO_CHANGE = Change(0, 0, 0, np.zeros(len(MOVES), dtype=np.int64), np.zeros(3))


def inspect(path: Path, *, base: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """Reads a delta, checks it, and tells what it holds; no model is loaded.

    How far entries moved is told from the XOR bits as far as they tell it: with the same sign and
    exponent, a highest changed bit h of m mantissa bits means a change below 2**(h + 1 - m) of the
    value (of a normal number). `base`, a model folder or hub id, adds exact norms, and is checked.
    `out` is a PNG to write: what is uneven by layer and module.

    Raises SiftError: exit code 2 where there is no delta, 3 for a damaged one or a wrong base.
    """
    delta = load_delta(path)
    if base:
        changes = _with_base(delta, base)
    else:
        changes = {name: change_of(weight) for name, weight in delta.weights.items()}
    places = layers_and_kinds(delta.weights)
    by_layer = _summed(changes, lambda name: places[name][0])
    by_kind = _summed(changes, lambda name: (places[name][0] == OUTSIDE, places[name][1]))
    total = _summed(changes, lambda _: 0).get(0, NO_CHANGE)
    result: dict[str, Any] = {
        "file": str(path),
        **_file_facts(path),
        "integrity": "the digest matches; every position is in range",
        "base_checked": base,
        **_stated(delta),
        **total.report(),
        "density_even": evenly_dense(changes.values()),
        "dense": {name: list(tensor.shape) for name, tensor in delta.dense.items()},
        "dense_entries": sum(tensor.numel() for tensor in delta.dense.values()),
        "layers": {str(layer): change.report() for layer, change in by_layer.items()},
        "kinds": {kind: change.report() for (_, kind), change in by_kind.items()},
        "tensors": {
            name: {
                "layer": places[name][0],
                "kind": places[name][1],
                "shape": list(delta.weights[name].shape),
                "dtype": str(delta.weights[name].dtype).removeprefix("torch."),
                **change.report(),
            }
            for name, change in changes.items()
        },
    }
    if out is not None:
        from sift_cli.analysis.plots import plot_delta

        even = result["density_even"]
        shown = {k: title for k, title in PANELS.items() if k != "density" or not even}
        plot_delta(_cells(result), shown, out)
    return result


def _cells(inspected: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The tensors by band of layers and module, in their order: a weight and its bias as one."""
    labels = {one: label for label, part in bands(inspected["layers"]) for one in part}
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {
        (label, kind.removesuffix(".bias")): []
        for label in dict.fromkeys(labels.values())
        for kind in inspected["kinds"]
    }
    for one in inspected["tensors"].values():
        found[labels[str(one["layer"])], one["kind"].removesuffix(".bias")].append(one)
    return {place: together(rows) for place, rows in found.items() if rows}


def _file_facts(path: Path) -> dict[str, Any]:
    """Bytes and hash of a file."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _stated(delta: Delta) -> dict[str, Any]:
    """What the file says of the delta, keys sorted, but for the logits: no one reads them."""
    stated = {**delta.about, "coding": CODING, "format": FORMAT}
    return {key: stated[key] for key in sorted(stated) if key != "logits"}


def _summed(changes: Mapping[str, Change], key: Callable[[str], Any]) -> dict[Any, Change]:
    """Sums of the changes of weights with the same key, by order of keys: numbers first."""
    sums: dict[Any, Change] = {}
    for name, change in changes.items():
        sums[key(name)] = sums[key(name)] + change if key(name) in sums else change
    return {one: sums[one] for one in sorted(sums, key=lambda k: (isinstance(k, str), k))}


def layers_and_kinds(names: Iterable[str]) -> dict[str, tuple[int | str, str]]:
    """The layer and the kind of module of each parameter name.

    `bert.encoder.layer.3.output.dense.weight` is `output.dense` of layer 3; a name without a number
    is a kind of its own, outside. Further numbers (of experts) become `*`; where a model has
    several stacks of layers, kinds begin with the stack.
    """
    split = {}
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        split[name] = parts, at
    stacks = {tuple(parts[:at]) for parts, at in split.values() if at is not None}
    places: dict[str, tuple[int | str, str]] = {}
    for name, (parts, at) in split.items():
        if at is None:
            places[name] = OUTSIDE, ".".join(parts)
            continue
        start = at + 1 if len(stacks) == 1 else 0
        kind = ["*" if part.isdigit() else part for part in parts[start:]]
        places[name] = int(parts[at]), ".".join(kind) or "weight"
    return places


def moves(bits: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[np.int64]:
    """Counts by `MOVES` of the XOR of two values, [K] integers as wide as `dtype`."""
    width = 8 * dtype.itemsize
    mantissa = round(-np.log2(torch.finfo(dtype).eps))
    # The exponent of a float is its highest bit, exact up to 53 bits.
    words = bits.contiguous().view(SIGNED[dtype.itemsize]).numpy().view(f"u{dtype.itemsize}")
    highest = np.frexp(words.astype(np.float64))[1] - 1  # -1: no bit
    by_bit = np.bincount(highest + 1, minlength=width + 1)
    counts = np.zeros(len(MOVES), dtype=np.int64)
    for bit, count in enumerate(by_bit, start=-1):
        counts[_class_of(bit, mantissa, width)] += count
    return counts


def evenly_dense(changes: Iterable[Change]) -> bool:
    """Whether one density, rounded to whole entries, explains the counts of all weights."""
    low, high = 0.0, 1.0
    for one in changes:
        low = max(low, (one.entries - 1) / one.size)
        high = min(high, (one.entries + 1) / one.size)
    return low <= high


def _class_of(bit: int, mantissa: int, width: int) -> int:
    """The place in `MOVES` of a highest changed bit, -1 for none."""
    if bit <= 0:
        return bit + 1
    if bit == width - 1:
        return len(MOVES) - 1
    if bit >= mantissa:
        return len(MOVES) - 2
    power = mantissa - 1 - bit  # the change is below 2**-power
    return 2 + next(at for at, bound in enumerate(BOUNDS) if power >= bound)


def change_of(weight: WeightDelta) -> Change:
    """The change of one weight, without norms."""
    support, halves = weight.support, [0.0, 0.0, 0.0]
    if len(weight.shape) == 2:
        halves = [one * weight.count for one in (1.0, support.half_in(0), support.half_in(1))]
    return Change(
        1,
        weight.count,
        support.size,
        moves(weight.bits, weight.dtype),
        np.array(halves),
    )


def _with_base(delta: Delta, base: str) -> dict[str, Change]:
    """The change of each weight with its norms, from the base's tensors one at a time.

    Raises SiftError (exit code 3) where these are not the weights that the delta was made from.
    """
    folder, task = model_folder(base), task_of(delta.header)
    stored = Stored(folder, skeleton(task.configure(folder), task.auto))
    changes, wrong = {}, []
    for name, weight in delta.weights.items():
        if name not in stored.places:
            wrong.append(name)
            continue
        before = stored.tensor(name).to(weight.dtype)
        if fingerprint(before) != weight.base:
            wrong.append(name)
            continue
        after = before.clone()
        weight.toggle_(after)
        change = change_of(weight)
        change.square = float((after.float() - before.float()).square_().sum(dtype=torch.float64))
        change.base_square = float(before.float().square_().sum(dtype=torch.float64))
        changes[name] = change
    if wrong:
        raise SiftError(
            f"{base} is not the base of this delta; of its {len(delta.weights)} weights, "
            f"{len(wrong)} are others or missing:\n  {in_lines(wrong)}",
            ExitCode.WRONG_FILE,
        )
    return changes


def together(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The reports of several changes as one, with means over their entries."""
    rows = list(rows)
    sums: dict[str, Any] = {k: sum(row[k] for row in rows) for k in ("weights", "entries", "size")}
    sums["density"] = sums["entries"] / max(1, sums["size"])
    for key in ("survived", "moved_far", "new_sign", "half_in_rows", "half_in_columns"):
        told = [row for row in rows if row[key] is not None]
        count = sum(row["entries"] for row in told)
        sums[key] = sum(row[key] * row["entries"] for row in told) / count if count else None
    if all("norm" in row for row in rows):
        norm, base = (hypot(*(row[key] for row in rows)) for key in ("norm", "base_norm"))
        sums |= {"relative": norm / base if base else None}
    return sums


def bands(layers: Mapping[str, Any], most: int = 12) -> list[tuple[str, list[str]]]:
    """Layers as a table shows them: each by itself, or in at most about `most` even bands."""
    numbers = [layer for layer in layers if layer != OUTSIDE]
    wide = -(-len(numbers) // most) if len(numbers) > 2 * most else 1
    groups = []
    for start in range(0, len(numbers), wide):
        part = numbers[start : start + wide]
        groups.append((part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}", part))
    if OUTSIDE in layers:
        groups.append((OUTSIDE, [OUTSIDE]))
    return groups
