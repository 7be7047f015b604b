"""Whole parameters in the same loop: torch's own AdamW behind the calls of SparseAdamW.

LoRA, SHiRA, full fine-tuning and the head alone differ in what `adapt` makes of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from sift_cli.delta.header import Header
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, TrainSection
from sift_cli.runs.checkpoint import Checkpoint
from sift_cli.runs.folder import TRAINED_FILE
from sift_cli.runs.session import Session
from sift_cli.runs.summary import EntryCounts, Summary, Written
from sift_cli.sparse import Support
from sift_cli.sparse.parameters import ROOM
from sift_cli.system.files import sha256_of
from sift_cli.training.head import start_head
from sift_cli.training.method import Weights
from sift_cli.training.packing import Packed, entries_in

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch's names of what AdamW keeps of a parameter


class DenseParameters:
    """Parameters that train whole, by name; gradients are autograd's own."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = dict(named)

    def __len__(self) -> int:
        """Number of trained entries."""
        return sum(weight.numel() for weight in self.named.values())

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradient of each weight that has one, by name."""
        for name, weight in self.named.items():
            if weight.grad is not None:
                yield name, weight.grad

    def norms(self) -> dict[str, Tensor]:
        """The 2-norm of each weight's gradient, [], by name."""
        return {name: torch.linalg.vector_norm(one) for name, one in self.gradients()}

    def message(self) -> Tensor:
        """The gradients of all weights that have one, end to end, and ROOM numbers behind them."""
        flat = [gradient.flatten() for _, gradient in self.gradients()]
        return torch.cat([*flat, flat[0].new_zeros(ROOM)])

    @torch.no_grad()
    def accept(self, message: Tensor) -> None:
        """Takes the gradients from such a message."""
        at = 0
        for _, gradient in self.gradients():
            gradient.copy_(message[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()

    def zero_grad(self) -> None:
        """Lets go of all gradients."""
        for weight in self.named.values():
            weight.grad = None

    def state(self) -> dict[str, tuple[Support, Tensor]]:
        """A copy of every weight, flat and on the host."""
        return {
            name: (Support(tuple(weight.shape)), weight.detach().flatten().to("cpu", copy=True))
            for name, weight in self.named.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, tuple[Support, Tensor]]) -> None:
        """Brings the weights back to where `state` was taken."""
        for name, (support, values) in state.items():
            self.named[name].copy_(values.view(support.shape))

    def own_entries(self, entries: Weights) -> Weights:
        """All of them."""
        return entries

    def all_entries(self, entries: Weights) -> Iterator[tuple[str, Support, Tensor]]:
        """The same: every rank has all."""
        return ((name, support, values) for name, (support, values) in entries.items())

    def detach(self) -> None:
        """Nothing to do: the model's forward passes are its own."""


class DenseAdamW:
    """torch.optim.AdamW with the calls of SparseAdamW."""

    def __init__(self, parameters: DenseParameters, lr: float, weight_decay: float = 0.0) -> None:
        self.parameters = parameters
        self.adamw = torch.optim.AdamW(
            parameters.named.values(), lr, weight_decay=weight_decay, fused=True
        )

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales the gradients to a 2-norm of at most `max_norm`; returns their norm before."""
        limit = float("inf") if max_norm is None else max_norm
        return nn.utils.clip_grad_norm_(self.parameters.named.values(), limit)

    def step(self, skip: Tensor | None = None) -> None:
        """One update, then clears the gradients; where `skip` ([]) is not 0, it only clears."""
        self.adamw.found_inf = skip  # type: ignore[attr-defined]
        self.adamw.step()
        self.parameters.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Both moments and the number of steps of each weight that took one; no copies."""
        return {
            f"{key}/{name}": self.adamw.state[weight][key]
            for name, weight in self.parameters.named.items()
            if weight in self.adamw.state
            for key in MOMENTS
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from where `state` was taken."""
        for name, weight in self.parameters.named.items():
            if f"step/{name}" in state:
                kept = {key: state[f"{key}/{name}"].to(weight.device) for key in MOMENTS}
                self.adamw.state[weight].update(kept)


@dataclass(frozen=True)
class Adapted:
    """A model made ready: what trains, by name; `save` gives the tensors to write in the end."""

    weights: Mapping[str, nn.Parameter]
    save: Callable[[], Mapping[str, Tensor]]
    rank: int | None = None


class Dense:
    """The `Method` of whole parameters: `adapt` makes the session's model ready when it is asked.

    `head` names the parameters that train whole under any method.
    """

    def __init__(
        self,
        name: str,
        settings: TrainSection,
        session: Session,
        head: Sequence[str],
        adapt: Callable[[], Adapted],
        console: Console | None = None,
    ) -> None:
        self.name, self.settings, self.session, self._adapt = name, settings, session, adapt
        self.console = console or Console(stderr=True, quiet=True)
        self.norms: Mapping[str, Tensor] = {}
        weights = dict(session.model.named_parameters())
        self.total = sum(weight.numel() for weight in weights.values())  # before any adapter
        self.dense = sum(weights[one].numel() for one in head)
        self._adapted: Adapted | None = None

    def begin(self) -> DenseAdamW:
        """Starts the head, adapts the model, and trains what it then says."""
        start_head(self.settings, self.session, self.console)
        return self._optimizer()

    def _optimizer(self) -> DenseAdamW:
        self._adapted = self._adapt()
        if not self._adapted.weights:
            raise SiftError(f"{self.name}: no module trains whole; name one in selection.dense")
        parameters = DenseParameters(self._adapted.weights)
        return DenseAdamW(parameters, self.settings.rate, self.settings.weight_decay)

    def restore(self, saved: Checkpoint) -> DenseAdamW:
        """Adapts the model, and gives its weights the values that the checkpoint has."""
        optimizer = self._optimizer()
        optimizer.parameters.load_state(entries_in(saved, "weights"))
        return optimizer

    def due(self, step: int) -> bool:
        """Never: what trains is settled at the beginning."""
        return False

    def change(self, step: int, optimizer: DenseAdamW) -> None:
        """Nothing changes."""

    def pack(self, optimizer: DenseAdamW, own: bool = False) -> Packed:
        """Every weight that trains, whole."""
        packed = Packed()
        for name, weight in optimizer.parameters.named.items():
            packed.put("weights", name, Support(tuple(weight.shape)), weight.detach().flatten())
        return packed

    def write(
        self,
        out: Path,
        optimizer: DenseAdamW,
        marks: Mapping[str, str],
        header: Callable[[], Header],
    ) -> Written:
        """Writes what trained as a safetensors file."""
        return self.session.ranks.on_main(partial(self._write, out / TRAINED_FILE, optimizer))

    def _write(self, file: Path, optimizer: DenseAdamW) -> Written:
        assert self._adapted is not None
        tensors = self._adapted.save()
        save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, file)
        trained = len(optimizer.parameters) - self.dense
        entries = EntryCounts(trained=trained, dense=self.dense, total=self.total)
        return Written(file.stat().st_size, sha256_of(file), entries, self._adapted.rank)

    def describe(self, out: Path, recipe: Recipe, summary: Summary) -> None:
        """Writes nothing: a card describes a delta."""
