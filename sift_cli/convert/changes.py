"""What a merge does to each tensor that passes, and the fingerprints that it sees on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sift_cli.convert.compose import Mix, Overlap, compose_
from sift_cli.delta.file import Delta, WeightDelta, save_delta
from sift_cli.delta.header import Header
from sift_cli.delta.identity import NOT_TRAINED, check_base, rest_fingerprints
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import TensorKind, fingerprint


@dataclass(frozen=True)
class Composition:
    """How deltas were composed: the mix, what they have in common in each weight, whose head."""

    mix: Mix
    overlaps: dict[str, Overlap]
    head: str | None

    @property
    def total(self) -> Overlap:
        """The overlap in all weights together."""
        rows = list(self.overlaps.values())
        return Overlap(
            deltas=len(self.mix.weights),
            entries=sum(row.entries for row in rows),
            collisions=sum(row.collisions for row in rows),
            sign_conflicts=sum(row.sign_conflicts for row in rows),
            changed=sum(row.changed for row in rows),
        )

    def to_json(self) -> dict[str, Any]:
        """The keys of `sift merge --json` about it."""
        total = asdict(self.total)
        del total["deltas"]
        return {
            "composed": asdict(self.mix),
            "overlap": total,
            "overlaps": {name: asdict(one) for name, one in self.overlaps.items()},
            "head": self.head,
        }


class Exact:
    """One delta as it is: base to trained, or with `undo` trained to base, bit for bit."""

    def __init__(self, delta: Delta, undo: bool) -> None:
        self.delta, self.undo = delta, undo
        self.changed: set[str] = set()  # names of the weights that came out changed
        self._before: dict[str, str] = {}  # fingerprints of the base's tensors

    def apply(self, name: str, tensor: Tensor) -> tuple[Tensor, str]:
        """The tensor as it is to be written, changed in place, and its fingerprint.

        A tensor that is not what the delta changes stays as it is: `check` will name it.
        """
        mark = self._before[name] = fingerprint(tensor)
        weight = self.delta.weights.get(name)
        if weight is None or mark != (weight.trained if self.undo else weight.base):
            if weight is not None and self.undo:
                self._before[name] = NOT_TRAINED  # were it the base's, `check` would let it pass
            return tensor, mark
        weight.toggle_(tensor)
        after = fingerprint(tensor)
        if after != (weight.base if self.undo else weight.trained):
            raise SiftError(f"{name} differs from the trained weight", ExitCode.NOT_VERIFIED)
        self.changed.add(name)
        if self.undo:
            self._before[name] = after
        return tensor, after

    def replace(self, name: str, tensor: Tensor) -> None:
        """Passes over a tensor of the source that the delta brings anew: it is not the base's."""

    def check(self, source: str, kinds: Mapping[str, TensorKind]) -> None:
        """Raises SiftError (exit code 3) where a tensor that passed was not the base's."""
        check_base(self.delta, self._before, source, merged=self.undo, kinds=kinds)


class Composed:
    """Several deltas of one base, or a scaled delta; the head is that of the delta at `owner`."""

    undo = False  # a composition is turned back by the delta that it saves

    def __init__(self, deltas: Sequence[Delta], owner: int, mix: Mix) -> None:
        self.deltas, self.delta, self.mix = deltas, deltas[owner], mix
        self.weights: dict[str, WeightDelta] = {}
        self.overlaps: dict[str, Overlap] = {}
        self._before: dict[str, str] = {}

    @property
    def changed(self) -> set[str]:
        """Names of the weights that came out changed."""
        return set(self.weights)

    def apply(self, name: str, tensor: Tensor) -> tuple[Tensor, str]:
        """The tensor as it is to be written, changed in place, and its fingerprint.

        A tensor that is not the one that each delta changes stays as it is: `check` will name it.
        """
        mark = self._before[name] = fingerprint(tensor)
        here = {at: one.weights[name] for at, one in enumerate(self.deltas) if name in one.weights}
        if not here or any(weight.base != mark for weight in here.values()):
            return tensor, mark
        change, self.overlaps[name] = compose_(name, tensor, here, self.mix, mark)
        if change is None:
            return tensor, mark
        self.weights[name] = change
        return tensor, change.trained

    def replace(self, name: str, tensor: Tensor) -> None:
        """Notes a tensor that the head replaces: deltas without a head know it as the base's."""
        self._before[name] = fingerprint(tensor)

    def check(self, source: str, kinds: Mapping[str, TensorKind]) -> None:
        """Raises SiftError (exit code 3) where a tensor that passed was not each delta's base's."""
        for delta in self.deltas:
            marks = {name: mark for name, mark in self._before.items() if name not in delta.dense}
            check_base(delta, marks, source, kinds=kinds)

    def describe(self, head: str | None) -> Composition:
        """The composition for the report; `head` is the path of the delta whose head it has."""
        return Composition(self.mix, dict(sorted(self.overlaps.items())), head)

    def save(self, path: Path, logits: Tensor | None) -> None:
        """Writes the composition as a delta of its own: exact, with an exact way back."""
        marks = {n: mark for n, mark in self._before.items() if n not in self.delta.dense}
        rest = rest_fingerprints(marks, self.weights)
        path.parent.mkdir(exist_ok=True)
        save_delta(path, Delta(self.weights, self.delta.dense, rest, self._header(logits)))

    def _header(self, logits: Tensor | None) -> Header:
        """The header of the delta that gives the head, without the numbers measured with it."""
        headers = [delta.header for delta in self.deltas]
        parts = [{"task": header.task, "policy": header.policy} for header in headers]
        changes = {
            "metrics": {},
            "logits": None if logits is None else logits.tolist(),
            "composed": {**asdict(self.mix), "deltas": parts},
        }
        return self.delta.header.model_copy(update=changes)
