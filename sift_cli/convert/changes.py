"""What a merge does to each tensor that passes, and the fingerprints that it sees on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sift_cli.convert.compose import Mix, Overlap, compose_
from sift_cli.delta.file import Delta, WeightDelta, save_delta
from sift_cli.delta.identity import NOT_TRAINED, check_base, rest_fingerprints
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import Kind, fingerprint

LOST = {"logits", "metrics"}  # of a delta, once it is mixed with others


class Toggle:
    """One delta, whole: base to trained, or with `undo` trained to base, bit for bit."""

    def __init__(self, delta: Delta, undo: bool) -> None:
        self.delta, self.undo = delta, undo
        self.changed: set[str] = set()
        self._before: dict[str, str] = {}  # fingerprints of the base's tensors

    def apply(self, name: str, tensor: Tensor) -> tuple[Tensor, str]:
        """The tensor as it is to be, made in place, and its fingerprint.

        One that the delta does not fit stays for `check`.
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
        """Takes note of a tensor of the source that the delta holds anew."""

    def check(self, source: str, kinds: Mapping[str, Kind]) -> None:
        """Raises SiftError (exit code 3) where a tensor was not the base's."""
        check_base(self.delta, self._before, source, merged=self.undo, kinds=kinds)


class Composed:
    """Several deltas of one base, or one scaled; `owner` is the one that the head comes from."""

    def __init__(self, deltas: Sequence[Delta], owner: int, mix: Mix) -> None:
        self.deltas, self.owner, self.mix = deltas, owner, mix
        self.weights: dict[str, WeightDelta] = {}
        self.overlaps: dict[str, Overlap] = {}
        self._before: dict[str, str] = {}

    @property
    def changed(self) -> set[str]:
        """Names of the weights that came out changed."""
        return set(self.weights)

    def apply(self, name: str, tensor: Tensor) -> tuple[Tensor, str]:
        """As `Toggle.apply`."""
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
        """As `Toggle.replace`."""
        self._before[name] = fingerprint(tensor)

    def check(self, source: str, kinds: Mapping[str, Kind]) -> None:
        """Raises SiftError (exit code 3) where a tensor was not the base's of each delta."""
        for delta in self.deltas:
            marks = {name: mark for name, mark in self._before.items() if name not in delta.dense}
            check_base(delta, marks, source, kinds=kinds)

    def describe(self) -> dict[str, Any]:
        """Rule, weights and what the deltas have in common, for the report."""
        overlaps = {name: asdict(one) for name, one in sorted(self.overlaps.items())}
        keys = ("entries", "collisions", "sign_conflicts", "changed")
        return {
            "composed": asdict(self.mix),
            "overlap": {key: sum(one[key] for one in overlaps.values()) for key in keys},
            "overlaps": overlaps,
        }

    def save(self, path: Path, logits: Tensor | None) -> None:
        """Writes the composition as a delta of its own: exact, with an exact way back."""
        owner = self.deltas[self.owner]
        about = {key: value for key, value in owner.about.items() if key not in LOST}
        about["metrics"] = {}
        about["logits"] = None if logits is None else logits.tolist()
        about["composed"] = {
            **asdict(self.mix),
            "deltas": [
                {key: one.about.get(key) for key in ("task", "policy")} for one in self.deltas
            ],
        }
        marks = {name: mark for name, mark in self._before.items() if name not in owner.dense}
        rest = rest_fingerprints(marks, self.weights)
        path.parent.mkdir(exist_ok=True)
        save_delta(path, Delta(self.weights, owner.dense, rest, about))
