"""Numbers of the trained entries, by name, that follow their entries when the support changes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sift_cli.sparse.local import local_of
from sift_cli.sparse.parameters import Move, SparseParameters
from sift_cli.sparse.segments import Segment, find, merged, positions_of
from sift_cli.sparse.support import Support

# What entries begin with: one number, or a function that gives those of a segment's entries: [n] or
# [], on any device.
Start = float | Callable[[Segment], Tensor]


class Columns:
    """One number per name for each entry that trains: tensors [K], in the order of the masters.

    They have the dtype of the masters and lie where these do. `starts` names the columns and says
    what entries begin with. `named` is the dict that holds them; who gives one shares the tensors,
    and may keep other keys in it.

    What entries left with can be parked on the host until they come back: by weight, positions [P]
    and rows [R, P], one row for each name in the order of `starts`, then the masters. Checkpoints
    hold these rows, so a name that is added to `starts` comes last.
    """

    def __init__(
        self,
        parameters: SparseParameters,
        starts: Mapping[str, Start],
        named: dict[str, Any] | None = None,
    ) -> None:
        self.parameters, self.starts = parameters, dict(starts)
        self.named: dict[str, Any] = {} if named is None else named
        self._parked: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self, name: str) -> None:
        """Gives every entry what it begins with."""
        self.named[name] = self._started(name)

    def move(self, origin: Tensor, reset: Collection[str] = ()) -> None:
        """Follows the entries to where they lie after the parameters have moved.

        `origin` ([K], int64) is where each lay before, -1 for those that came. These begin anew,
        and so do all entries of the weights that `reset` names.
        """
        stays = origin >= 0
        for segment in self.parameters:
            if segment.name in reset:
                stays[segment.span] = False
        # As indices: a mask would make the host wait for a GPU at every column.
        places = stays.nonzero().flatten()
        source = origin[places]
        for name in self._present():
            moved = self._started(name)
            moved[places] = self.named[name][source]
            self.named[name] = moved

    def park(self, move: Move, masters: Tensor) -> None:
        """Lays what the entries that left had on the host; to be called before `move`.

        `masters` ([K before]) are those of the entries before the parameters moved.
        """
        columns = [*(self.named[name] for name in self.starts), masters]
        for segment in move.before:
            left = move.left[segment.span]
            places = left.nonzero().flatten() + segment.start
            positions = positions_of(segment.support, left).cpu()
            rows = torch.stack([column[places] for column in columns]).cpu()
            if segment.name in self._parked:
                earlier, their_rows = self._parked[segment.name]
                positions, rows = merged(earlier, positions, their_rows, rows)
            self._parked[segment.name] = positions, rows

    def give_back(self, origin: Tensor, masters: bool) -> None:
        """Gives entries that came back what they left with; to be called after `move`.

        Their masters too where `masters` says so; they keep what the weights hold otherwise.
        """
        flat = self.parameters.flat.data
        columns = [self.named[name] for name in self.starts] + ([flat] if masters else [])
        for segment in self.parameters:
            if segment.name not in self._parked:
                continue
            came = origin[segment.span] < 0
            parked, rows = self._parked[segment.name]
            at = find(positions_of(segment.support, came).cpu().to(parked.dtype), parked)
            known = at >= 0
            places = came.nonzero().flatten()[known.to(came.device)] + segment.start
            back = rows[: len(columns), at[known]].to(flat)  # the masters' row is the last
            for column, row in zip(columns, back, strict=True):
                column[places] = row
            stays = torch.ones(len(parked), dtype=torch.bool)
            stays[at[known]] = False
            self._parked[segment.name] = parked[stays], rows[:, stays]

    def state(self) -> dict[str, Tensor]:
        """The columns that are there and what is parked, by the keys of a checkpoint; no copies."""
        every = self.parameters.all_of
        state = {name: every(self.named[name]) for name in self._present()}
        for name, support, columns in self.parameters.all_entries(self._entries(self._parked)):
            positions, rows = support.positions, columns.T
            if positions is None:
                positions = torch.arange(support.size)
            state[f"parked/{name}/positions"], state[f"parked/{name}/columns"] = positions, rows
        return state

    def load_state(self, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Brings back the columns called `names` (no others are there then) and what was parked.

        Raises KeyError where `state` lacks one of them, ValueError where the rows of what is parked
        are not those of these columns.
        """
        device = self.parameters.flat.device
        loaded = {name: self.parameters.own_of(state[name]).to(device) for name in names}
        parked = {
            key.removeprefix("parked/").removesuffix("/positions"): (
                state[key],
                state[key.removesuffix("positions") + "columns"],
            )
            for key in state
            if key.startswith("parked/") and key.endswith("/positions")
        }
        wanted = len(self.starts) + 1
        for name, (_, rows) in parked.items():
            if len(rows) != wanted:
                raise ValueError(f"parked/{name}: {len(rows)} rows where {wanted} are kept")
        for name in self._present():
            del self.named[name]
        self.named.update(loaded)
        own = self.parameters.own_entries(self._entries(parked, whole=True))
        self._parked = {
            name: (support.positions, columns.T)
            for name, (support, columns) in own.items()
            if support.positions is not None
        }

    def _entries(
        self, parked: Mapping[str, tuple[Tensor, Tensor]], whole: bool = False
    ) -> dict[str, tuple[Support, Tensor]]:
        """What is parked as entries of `whole` weights, or of the rows that lie here; [P, R]."""
        named = dict(self.parameters.model.named_parameters())
        shapes = {n: named[n].shape if whole else local_of(named[n]).shape for n in parked}
        return {
            name: (Support(tuple(shapes[name]), positions), rows.T)
            for name, (positions, rows) in parked.items()
        }

    def _present(self) -> list[str]:
        return [name for name in self.starts if name in self.named]

    def _started(self, name: str) -> Tensor:
        start, flat = self.starts[name], self.parameters.flat.data
        if not callable(start):
            return torch.full_like(flat, start)
        column = torch.empty_like(flat)
        for segment in self.parameters:
            column[segment.span] = start(segment).to(column)
        return column
