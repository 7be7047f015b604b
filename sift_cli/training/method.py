"""What a run trains, as the loop sees it: the recipe's selection, or whole parameters."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sift_cli.delta.header import Header
from sift_cli.models.fingerprints import tensor_bytes
from sift_cli.recipe import Recipe
from sift_cli.runs.checkpoint import Checkpoint
from sift_cli.runs.session import Session
from sift_cli.runs.summary import Summary, Written
from sift_cli.sparse import Support
from sift_cli.training.batches import Steps
from sift_cli.training.packing import Packed

Weights = Mapping[str, tuple[Support, Tensor]]  # by name: which entries, and their values [K]


class Trained(Protocol):
    """The numbers that train: SparseParameters, or DenseParameters."""

    def __len__(self) -> int:
        """How many there are."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What the last backward passes gathered, by the weight's name."""

    def norms(self) -> Mapping[str, Tensor]:
        """The 2-norm of the gradient of what trains of each weight, []; every rank must ask."""

    def message(self) -> Tensor:
        """The gradients, flat, and ROOM for a few numbers behind them: what ranks exchange."""

    def accept(self, message: Tensor) -> None:
        """Takes gradients from such a message, which has become the sum of all ranks'."""

    def zero_grad(self) -> None:
        """Clears it."""

    def state(self) -> Weights:
        """The weights at every entry that ever trained: all that `load_state` needs."""

    def load_state(self, state: Weights) -> None:
        """Brings the weights back to where `state` was taken."""

    def own_entries(self, entries: Weights) -> Weights:
        """Those of some entries of whole weights that this rank has."""

    def all_entries(self, entries: Weights) -> Iterator[tuple[str, Support, Tensor]]:
        """The entries of whole weights, of which each rank has its own; every rank must ask.

        The main one is told of all of them.
        """

    def detach(self) -> None:
        """Gives the model its own forward passes back; values stay."""


class Optimizer(Protocol):
    """SparseAdamW, or torch's own behind the same calls."""

    @property
    def parameters(self) -> Trained:
        """What it moves."""

    @property
    def adamw(self) -> torch.optim.AdamW:
        """The one whose learning rate a schedule sets."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales the gradient to a 2-norm of at most `max_norm`; returns its norm before, []."""

    def step(self, skip: Tensor | None = None) -> None:
        """One update, then clears the gradient; where `skip` ([]) is not 0, it only clears."""

    def state(self) -> dict[str, Tensor]:
        """All that `load_state` needs, and no copies."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where `state` was taken."""


class Method(Protocol):
    """What trains at which step, and what is written of it."""

    @property
    def name(self) -> str:
        """What a table calls it: the policy, or `lora` and the like."""

    @property
    def norms(self) -> Mapping[str, Tensor]:
        """2-norms of the first batch's gradient by weight; empty where none was looked at."""

    def begin(self) -> Optimizer:
        """Makes the model ready, and chooses what trains."""

    def restore(self, saved: Checkpoint) -> Optimizer:
        """Makes the model ready, which is the base, and trains what the checkpoint says."""

    def due(self, step: int) -> bool:
        """Whether what trains changes before this step."""

    def change(self, step: int, optimizer: Any) -> None:
        """Changes it."""

    def pack(self, optimizer: Any, own: bool = False) -> Packed:
        """What trains and its values, as a checkpoint holds them; every rank must ask.

        The main one has all values, or each rank its `own`.
        """

    def write(
        self,
        out: Path,
        optimizer: Any,
        marks: Mapping[str, str],
        header: Callable[[], Header],
    ) -> Written:
        """Writes what was trained into the run folder `out`; every rank asks, and one writes.

        `marks` are fingerprints of the base's tensors, `header` makes what a delta says of itself.
        """

    def describe(self, out: Path, recipe: Recipe, summary: Summary) -> None:
        """Writes the README.md of the run folder, where it has one."""


def require_alike(session: Session, method: Method, optimizer: Optimizer) -> None:
    """Raises SiftError where ranks differ in what trains or in its values, down to the bit.

    Where each holds some rows, all have the same supports, and other copies the same values.
    """
    if session.ranks.alone:
        return
    tensors, parts = method.pack(optimizer, own=True).tensors, 1
    if session.shards is not None:
        supports = {key: one for key, one in tensors.items() if key.startswith("support/")}
        session.ranks.require_same("entries to train", partial(digest_of, supports))
        parts = session.shards.count
    session.ranks.require_same("entries to train", partial(digest_of, tensors), parts)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors and their names, down to the bit."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


Build = Callable[[Session, Steps], Method]
