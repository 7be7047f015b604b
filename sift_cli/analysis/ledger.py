"""A ledger of tensors: when each storage comes, what made it, and when it goes."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Allocation:
    """One storage: its bytes, the numbers of the events at which it came and went (None: it is
    still there), the phase in which it came, and the operation that made it."""

    nbytes: int
    born: int
    phase: str
    made_by: str
    died: int | None = None


class Ledger(TorchDispatchMode):
    """Notes every storage that operations make within, real or fake, and when it is freed.

    `note` adds a storage that was there before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocations: list[Allocation] = []
        self.phase = ""
        self._clock = 0
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes what it made."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_add.default:
            self._replaced(args[0])
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.note(leaf, func.name())
        return out

    def note(self, tensor: Tensor, made_by: str = "") -> None:
        """Adds the storage of a tensor, unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live:
            return
        self._clock += 1
        made = Allocation(storage.nbytes(), self._clock, self.phase, made_by)
        self.allocations.append(made)
        self._live[key] = weakref.ref(storage, lambda _: self._gone(key)), made

    def name(self, phase: str, tensors: Iterable[Tensor]) -> None:
        """Moves the allocations of tensors to another phase than that in which they came."""
        for tensor in tensors:
            self._live[id(tensor.untyped_storage())][1].phase = phase

    def _replaced(self, sum: Tensor) -> None:
        """Frees zeros to which was added out of place: unwatched, autograd adds in place."""
        live = self._live.get(id(sum.untyped_storage()))
        if live is not None and "zeros" in live[1].made_by:
            self._gone(id(sum.untyped_storage()))

    def now(self) -> int:
        """The number of the last event: a storage that came or went."""
        return self._clock

    def peak(self, since: int = 0) -> tuple[int, list[Allocation]]:
        """The most bytes alive at one time after event `since`, and what was alive then."""
        changes = [(one.born, one.nbytes) for one in self.allocations]
        changes += [(one.died, -one.nbytes) for one in self.allocations if one.died is not None]
        most = now = at = 0
        for when, nbytes in sorted(changes):
            now += nbytes
            if now > most and when > since:
                most, at = now, when
        return most, [
            one
            for one in self.allocations
            if one.born <= at and (one.died is None or one.died > at)
        ]

    def _gone(self, key: int) -> None:
        if key in self._live:
            self._clock += 1
            self._live.pop(key)[1].died = self._clock
