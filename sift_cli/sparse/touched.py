"""What trained entries were before."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sift_cli.sparse.segments import find, merged
from sift_cli.sparse.support import Support


class Touched:
    """The base values of every entry that ever trained, by weight, on the host.

    Under a fixed support these are the trained entries; under a changing one they gather.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Support, Tensor]] = {}

    def add(self, name: str, support: Support, weight: Tensor) -> None:
        """Remembers the entries of `support` that are new, as they are in `weight` now."""
        found = support.gather(weight).cpu()
        support = support.to(torch.device("cpu"))
        if name not in self._held:
            self._held[name] = support, found
            return
        old, values = self._held[name]
        if old.positions is None:
            return
        if support.positions is None:
            found[old.positions] = values
            self._held[name] = support, found
            return
        fresh = find(support.positions, old.positions) < 0
        positions, values = merged(old.positions, support.positions[fresh], values, found[fresh])
        every = len(positions) == support.size
        self._held[name] = Support(support.shape, None if every else positions), values

    def __iter__(self) -> Iterator[tuple[str, Support, Tensor]]:
        """Name, support and base values ([K], in the weight's dtype) of each weight."""
        return iter((name, support, values) for name, (support, values) in self._held.items())

    def values(self, name: str, support: Support) -> Tensor:
        """The base values at `support`, all of whose entries must have been added, [K]."""
        old, values = self._held[name]
        if old.positions is None or support.positions is None:
            return values if support.positions is None else values[support.positions.cpu()]
        return values[torch.searchsorted(old.positions, support.positions.cpu())]
