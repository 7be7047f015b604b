"""The base values of the entries that trained."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sift_cli.sparse.segments import find, merged
from sift_cli.sparse.support import Support


class Touched:
    """The base values of every entry that ever trained, by weight, on the host.

    Under a fixed support these are the trained entries; under a changing one their union grows.
    """

    def __init__(self) -> None:
        self._base: dict[str, tuple[Support, Tensor]] = {}

    def add(self, name: str, support: Support, weight: Tensor) -> None:
        """Remembers what `weight` now holds at those entries of `support` that are new.

        It must come before they train, while that is their base value.
        """
        new_values = support.gather(weight).cpu()
        support = support.to(torch.device("cpu"))
        if name not in self._base:
            self._base[name] = support, new_values
            return
        old, values = self._base[name]
        if old.positions is None:
            return
        if support.positions is None:
            new_values[old.positions] = values
            self._base[name] = support, new_values
            return
        fresh = find(support.positions, old.positions) < 0
        positions, values = merged(
            old.positions, support.positions[fresh], values, new_values[fresh]
        )
        every = len(positions) == support.size
        self._base[name] = Support(support.shape, None if every else positions), values

    def __iter__(self) -> Iterator[tuple[str, Support, Tensor]]:
        """Name, support and base values ([K], in the weight's dtype) of each weight."""
        return iter((name, support, values) for name, (support, values) in self._base.items())

    def values(self, name: str, support: Support) -> Tensor:
        """The base values at `support`, all of whose entries must have been added, [K]."""
        old, values = self._base[name]
        if old.positions is None or support.positions is None:
            return values if support.positions is None else values[support.positions.cpu()]
        return values[torch.searchsorted(old.positions, support.positions.cpu())]
