"""Masks along a run: what each keeps of every gradient, and what its changes cost Adam.

How much of what is kept a bias could do: the gradient of a linear layer's weight is G = sum over
tokens of (output gradient) x (input), and P = (sum of output gradients) x (mean input) is what is
left of it where all inputs are alike, as those of a bias are. Of each weight's kept entries M, the
energy of G along P, <G_M, P_M>^2 / |P_M|^2: the most that any multiple of P takes out of G there.
These energies over all weights of linear layers, divided by the sum of |G_M|^2, are a share that
lies between 0 and 1, also where G_M is smaller than P_M.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.selection.budget import largest, share
from sift_cli.selection.evidence import Tokens
from sift_cli.selection.structures import Units
from sift_cli.sparse import Support
from sift_cli.sparse.segments import find
from sift_cli.training.choosing import Chooser

CURVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BETA2 = 0.999  # decay of Adam's second moment


@dataclass(frozen=True, eq=False)
class BiasTerm:
    """P, of the weight of a linear layer that has seen `tokens`."""

    units: Units
    tokens: Tokens

    def at(self, positions: Tensor | None) -> Tensor:
        """Its entries at `positions` of the stored weight, flat; all of them for None."""
        shift, mean = self.tokens.output_gradient, self.tokens.mean
        if positions is None:
            return self.units.turned(torch.outer(shift, mean)).reshape(-1)
        row, column = self.units.cells(positions.long().to(shift.device))
        return shift[row] * mean[column]


@dataclass
class BiasShare:
    """The share of a step's energy that a bias could do, gathered weight by weight."""

    steps: list[float] = field(default_factory=list)
    _along: float = 0.0
    _energy: float = 0.0

    def see(self, gradient: Tensor, term: Tensor) -> None:
        """Adds one weight's entries of G and P, [K] each."""
        size = float(term.square().sum())
        self._along += float((gradient * term).sum()) ** 2 / size if size else 0.0
        self._energy += float(gradient.square().sum())

    def settle(self) -> None:
        """Ends a step."""
        self.steps.append(self._along / self._energy if self._energy else 0.0)
        self._along = self._energy = 0.0


@dataclass
class TrackedMask:
    """One policy's mask along the run, and what a second moment on it alone would be.

    `bias` is the share of what is kept that a bias could do. `first` is the first step's gradient
    at the mask's entries, [K] by weight, `moves` how far a step at rate 1 moves layers' outputs.
    The mask of `every-batch` is that of the gradient being looked at. Policies that drop by their
    own training's changes keep their first mask, as another policy trains here.
    """

    policy: str
    chooser: Chooser
    supports: dict[str, Support] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)  # share of each gradient's norm
    lost: list[float] = field(default_factory=list)  # share of second moment, per change
    replaced: list[float] = field(default_factory=list)  # share of entries, per change
    bias: BiasShare = field(default_factory=BiasShare)
    first: dict[str, Tensor] = field(default_factory=dict)
    moves: dict[str, float] = field(default_factory=dict)
    _energy: float = 0.0
    _lost: float = 0.0
    _held: float = 0.0
    _gone: int = 0
    _entries: int = 0
    _second: dict[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    @property
    def follows(self) -> bool:
        """Whether the mask is chosen from the gradient being looked at."""
        return self.chooser.selection.schedule == "every-batch"

    def renew(self, step: int) -> None:
        """Chooses where the policy's schedule says so."""
        selection = self.chooser.selection
        changes = selection.schedule == "every-n-steps" and selection.drop == 1.0
        if step > 1 and not (changes and self.chooser.due(step)):
            return
        if selection.score == "change":
            raise SiftError(
                f"--policies: {self.policy} chooses by a whole training run; it cannot be probed"
            )
        self.supports = self.chooser.supports(step)

    def see(self, name: str, gradient: Tensor, term: BiasTerm | None = None) -> Tensor | None:
        """Adds one weight's flat gradient; returns the positions that the mask has there."""
        support = self.supports.get(name)
        positions: Tensor | None
        if support is None:
            count, positions = 0, torch.zeros(0, dtype=torch.int64)
        elif self.follows:
            count, positions = len(support), largest(gradient.abs(), len(support))
        else:
            count, positions = len(support), support.positions
        kept = gradient if positions is None else gradient[positions.long()]
        if term is not None:
            self.bias.see(kept, term.at(positions))
        if support is not None and not self.kept:
            own = support.gather(gradient)
            self.first[name] = self.first[name] + own if name in self.first else own
        inside = kept.square()
        self._energy += float(inside.sum())
        self._age(name, positions, inside)
        self._entries += count
        return positions

    def settle(self, step: int, whole: float) -> None:
        """Ends a step whose gradient had the energy `whole`."""
        self.kept.append(sqrt(self._energy / whole) if whole else 0.0)
        self.bias.settle()
        if step > 1:
            self.lost.append(self._lost / self._held if self._held else 0.0)
            self.replaced.append(self._gone / max(self._entries, 1))
        self._energy = self._lost = self._held = 0.0
        self._gone = self._entries = 0

    def _age(self, name: str, positions: Tensor | None, squares: Tensor) -> None:
        """Carries the second moment of entries that stay, and counts what the others had."""
        second = torch.zeros_like(squares)
        if name in self._second:
            before, old = self._second[name]
            if before is positions or before is None or positions is None:
                second = old.clone()
            else:
                place = find(positions, before.to(positions.dtype))
                stays = place >= 0
                second[stays] = old[place[stays]]
                self._gone += len(old) - int(stays.sum())
            self._held += float(old.sum())
            self._lost += float(old.sum() - second.sum())
        self._second[name] = positions, BETA2 * second + (1 - BETA2) * squares


@dataclass
class TrackedGradient:
    """What is seen of each step's gradient beside the masks."""

    sizes: dict[str, int]
    curve: dict[int, dict[str, list[float]]] = field(default_factory=dict)  # step, name -> energy
    whole: dict[int, dict[str, float]] = field(default_factory=dict)
    energy: dict[int, float] = field(default_factory=dict)  # squared norm of each step's gradient
    alike: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    bias: BiasShare = field(default_factory=BiasShare)
    _first: dict[str, Tensor] = field(default_factory=dict)

    def see(
        self,
        step: int,
        name: str,
        gradient: Tensor,
        masks: Any,
        *,
        curve: bool,
        term: BiasTerm | None = None,
    ) -> None:
        """Adds one weight's gradient; `term` is P, where it is that of a linear layer."""
        flat = gradient.reshape(-1).float()
        squares = flat.square()
        self.energy[step] = self.energy.get(step, 0.0) + float(squares.sum())
        if term is not None:
            self.bias.see(flat, term.at(None))
        for mask in masks:
            positions = mask.see(name, flat, term)
            if mask.policy == "current-batch" and positions is not None:
                self._compare(step, name, positions)
        if curve:
            counts = [share(density, len(squares)) for density in CURVE]
            top = squares.topk(counts[-1]).values.cpu().double().cumsum(0)
            at = self.curve.setdefault(step, {})
            at[name] = [float(top[count - 1]) for count in counts]
            self.whole.setdefault(step, {})[name] = float(squares.cpu().double().sum())

    def _compare(self, step: int, name: str, positions: Tensor) -> None:
        common = torch.isin(positions, self._first.setdefault(name, positions)).sum()
        self.alike.setdefault(step, []).append((len(positions), int(common)))
