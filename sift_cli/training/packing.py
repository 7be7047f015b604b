"""Supports and their values as a checkpoint holds them: coded positions, and a table as JSON."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sift_cli.delta.coding import decode_positions, encode_positions
from sift_cli.runs.checkpoint import Checkpoint
from sift_cli.sparse import Support


@dataclass(frozen=True)
class Packed:
    """`table` has shape and count of each support by kind and name; `tensors` has all the rest."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    table: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, kind: str, name: str, support: Support, values: Tensor | None = None) -> None:
        """Adds a support, and what its entries hold ([K])."""
        self.table.setdefault(kind, {})[name] = [list(support.shape), len(support)]
        if support.positions is not None:
            coded = encode_positions(support.positions, support.shape)
            self.tensors[f"{kind}/{name}/positions"] = coded
        if values is not None:
            self.tensors[f"{kind}/{name}/values"] = values


def supports_in(saved: Checkpoint, kind: str) -> dict[str, Support]:
    """The supports of that kind, by name."""
    return {name: _support(saved, kind, name) for name in saved.supports.get(kind, {})}


def entries_in(saved: Checkpoint, kind: str) -> dict[str, tuple[Support, Tensor]]:
    """The supports of that kind with the values of their entries ([K]), by name."""
    return {
        name: (support, saved.tensors[f"{kind}/{name}/values"])
        for name, support in supports_in(saved, kind).items()
    }


def _support(saved: Checkpoint, kind: str, name: str) -> Support:
    shape, count = saved.supports[kind][name]
    coded = saved.tensors.get(f"{kind}/{name}/positions")
    if coded is None:
        return Support(tuple(shape))
    return Support.of(shape, decode_positions(coded, count, shape))
