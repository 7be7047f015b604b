"""The selected entries of a model as one flat parameter."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sift_cli.sparse.coordinates import PLAIN, Coordinates
from sift_cli.sparse.kernels import choose
from sift_cli.sparse.local import Exchange, Shards, Weights, local_of
from sift_cli.sparse.segments import (
    Segment,
    at_once,
    origin_of,
    positions_of,
    segments_of,
    writer,
)
from sift_cli.sparse.support import Support
from sift_cli.sparse.touched import Touched
from sift_cli.sparse.wiring import KernelFor, plain_linear_layers, wire

ROOM = 3  # numbers behind the gradients in a buffer that processes may sum: see `message`


@dataclass(frozen=True, eq=False)
class Move:
    """How the entries of the flat buffer moved when the support changed.

    `origin` ([K], int64) is where each entry lay before, -1 for those that came; `left` ([K
    before], bool) marks those that left; `before` are the segments as they were.
    """

    before: list[Segment]
    origin: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class Changed:
    """The entries of one weight that ever trained, and their values before and now ([K])."""

    name: str
    support: Support
    base: Tensor
    now: Tensor


class SparseParameters:
    """Masters and gradients of all selected entries, in the order of the model's parameters.

    `flat` is one parameter of shape [K] in fp32 (fp64 for an fp64 model) whose `.grad` is a buffer
    of the same shape: every backward pass adds to it. `touched` remembers the base values of all
    entries that ever trained. The model's weights hold the tuned values themselves; `write_back`
    rounds the masters into them once. Masters and gradients lie on the device of the first weight,
    or on the host where they are offloaded.

    A master stands for `centre + scale * master` (`coordinates`), its gradient is the entry's own.

    Where the weights lie in rows on several ranks (`shards`), all of it is of the entries that this
    rank owns: `segments`, K and `flat` are its own, and weights are its rows. `whole` are the
    segments of all ranks, which are those of this one where there is no other.
    """

    def __init__(
        self,
        model: nn.Module,
        supports: Mapping[str, Support],
        kernel_for: KernelFor,
        touched: Touched | None = None,
        offload: bool = False,
        coordinates: Coordinates = PLAIN,
        shards: Shards | None = None,
    ) -> None:
        self.model, self._kernel_for, self._offload = model, kernel_for, offload
        self.coordinates, self.shards = coordinates, shards
        self._undo = ExitStack()  # what gives the model back
        self._exchange: Exchange | None = None
        self._slots: list[tuple[Segment, Tensor]] = []  # where each segment's gradient arrives
        self.touched = touched or Touched()
        self._lay_out(supports)
        wide = torch.float32
        for segment in self.segments:
            wide = torch.promote_types(wide, segment.weight.dtype)
            self.touched.add(segment.name, segment.support, segment.weight)
        device = torch.device("cpu") if offload else self.segments[0].weight.device
        self._write_flat = writer(self.segments, offload)
        self.flat = nn.Parameter(torch.empty(self.segments[-1].stop, dtype=wide, device=device))
        self._place()
        self._read()
        self._make_buffer()

    def __len__(self) -> int:
        """Number of trained entries, on all ranks."""
        return self.whole[-1].stop

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @torch.no_grad()
    def values(self) -> Tensor:
        """What the masters stand for, [K] in their dtype."""
        values = self.flat.data
        if self.scale is not None:
            values = values * self.scale
        return values if self.centre is None else self.centre + values

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds what the masters stand for once into the model's weights."""
        self._write_flat(self.values())

    def norm(self) -> Tensor:
        """The 2-norm of the gradient of all entries, []."""
        norm = torch.nn.utils.get_total_norm([self.grad])
        return norm if self.shards is None else self.shards.total(norm.square()).sqrt()

    def all_of(self, values: Tensor) -> Tensor:
        """Of every entry what each rank has of its own, [K]: on the main rank; on others [0]."""
        return values if self.shards is None else self.shards.whole(values, self.whole)

    def own_of(self, values: Tensor) -> Tensor:
        """What is this rank's, [K], of one value for each entry that trains."""
        return values if self.shards is None else self.shards.own(values, self.whole)

    def own_entries(self, entries: Weights) -> Weights:
        """This rank's of some entries of whole weights."""
        return entries if self.shards is None else self.shards.own_entries(entries)

    def all_entries(self, entries: Weights) -> Iterator[tuple[str, Support, Tensor]]:
        """The entries of whole weights, of which each rank has its own: on the main rank.

        Every rank must ask; the others are told of no entry.
        """
        if self.shards is None:
            return ((name, support, values) for name, (support, values) in entries.items())
        shapes = {name: one.shape for name, one in self.model.named_parameters()}
        return self.shards.whole_entries(entries, shapes)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gathered gradient of each weight's entries, [K] in views of the buffer, by name.

        Where weights lie on several ranks: before `accept`, those that this one computed.
        """
        return ((segment.name, target) for segment, target in self._slots)

    def norms(self) -> dict[str, Tensor]:
        """The 2-norm of the gradient of each weight's entries, [], by name; after `accept`."""
        own = {one.name: torch.linalg.vector_norm(self.grad[one.span]) for one in self}
        return own if self.shards is None else self.shards.norms(own)

    def message(self) -> Tensor:
        """The gradient buffer and the ROOM behind it, [K + ROOM]: no copy.

        The room alone where weights lie on several ranks, which do not all want all gradients.
        """
        return self._buffer if self._exchange is None else self._buffer[-ROOM:]

    def accept(self, message: Tensor) -> None:
        """Brings each rank the sums of what it owns; else the message is the buffer itself."""
        if self._exchange is not None:
            self._exchange.add_to(self.grad, self._gathered)

    def zero_grad(self) -> None:
        """Clears the gradient buffer, keeping it in place."""
        self.grad.zero_()
        if self._exchange is not None:
            self._gathered.zero_()

    def state(self) -> dict[str, tuple[Support, Tensor]]:
        """The weights at every entry that ever trained: all that `load_state` needs.

        They lie where the masters do.
        """
        named, device = self._weights(), self.flat.device
        return {
            name: (support, support.to(named[name].device).gather(named[name]).to(device))
            for name, support, _ in self.touched
        }

    def left(self) -> dict[str, tuple[Support, Tensor]]:
        """What `state` has of each weight of which entries trained that train no more."""
        state, trained = self.state(), {one.name: len(one.support) for one in self.segments}
        more = [len(support) - trained.get(name, 0) for name, (support, _) in state.items()]
        if self.shards is not None:
            more = self.shards.total(torch.tensor(more, device=self.flat.device)).tolist()
        return {name: one for (name, one), count in zip(state.items(), more, strict=True) if count}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, tuple[Support, Tensor]]) -> None:
        """Brings the weights back to where `state` was taken, and the masters with them."""
        self._write(self.touched)
        self._write((name, support, values) for name, (support, values) in state.items())
        self._read()

    @torch.no_grad()
    def revert(self) -> None:
        """Brings weights and masters back to the base."""
        self._write(self.touched)
        self._read()

    @property
    def supports(self) -> dict[str, Support]:
        """The entries that train, by weight."""
        return {segment.name: segment.support for segment in self.whole}

    def changes(self) -> Iterator[Changed]:
        """All that ever trained, with what it was and is: on the main rank, as `all_entries`."""
        before = {name: (support, values) for name, support, values in self.touched}
        both = self.all_entries(before), self.all_entries(self.state())
        for (name, support, base), (_, _, now) in zip(*both, strict=True):
            yield Changed(name, support, base, now.cpu())

    def change(self, segment: Segment) -> Tensor:
        """How far each of the segment's entries is from the base, [K]."""
        base = self.touched.values(segment.name, segment.support)
        return (self.values()[segment.span] - base.to(self.flat)).abs()

    @torch.no_grad()
    def move(self, supports: Mapping[str, Support], revert: bool = False) -> Move:
        """Makes `supports` the trained entries from now on.

        Entries that stay keep their masters; entries that leave keep their value in the weights, or
        go back to the base with `revert`.
        """
        self.detach()  # hooks and leaves know the old segments
        before = self.segments
        self._lay_out(supports)
        after = self.segments
        old = {segment.name: segment for segment in before}
        origins = [origin_of(old.get(new.name), new).to(self.flat.device) for new in after]
        origin = torch.cat(origins)
        stays = origin >= 0
        left = torch.ones(self.flat.numel(), dtype=torch.bool, device=origin.device)
        left[origin[stays]] = False
        for segment in before if revert else ():
            self._revert(segment, left[segment.span])
        for segment in after:
            self.touched.add(segment.name, segment.support, segment.weight)
        kept = self.flat.data[origin[stays]]
        self.flat.grad = None
        self._write_flat = writer(after, self._offload)
        self.flat.data = self.flat.data.new_empty(after[-1].stop)
        self._place()
        self._read()
        self.flat.data[stays] = kept  # the weights hold these rounded
        self._make_buffer()
        self.wire()
        return Move(before, origin, left)

    def wire(self) -> None:
        """Makes backward passes deliver the selected gradients, and only these."""
        if self.shards is None:
            self._slots = [(segment, self.grad[segment.span]) for segment in self.segments]
        else:
            self._slots = self._shared_out(self.shards)
        wire(self.model, self._slots, self._kernel_for, self._undo)

    def detach(self) -> None:
        """Gives the model its own forward passes and `requires_grad` flags back; values stay."""
        self._undo.close()

    def _lay_out(self, supports: Mapping[str, Support]) -> None:
        """The segments of these supports."""
        self.whole = self.segments = segments_of(self.model, supports)
        if self.shards is not None:
            self.segments = self.shards.segments(self.whole)
        if not self._offload:
            self.segments = at_once(self.segments)

    def _shared_out(self, shards: Shards) -> list[tuple[Segment, Tensor]]:
        """Where the gradient of each segment goes where there are several ranks.

        That of a plain linear layer is computed here for all its entries, and summed over the ranks
        by `reduce`. The sum of any other weight's dense gradient comes as this rank's rows of it.
        """
        layers = plain_linear_layers(self.model)
        pairs = list(zip(self.whole, self.segments, strict=True))
        linear = [pair for pair in pairs if id(pair[0].weight) in layers]
        exchange = Exchange(shards, [one for one, _ in linear], [own for _, own in linear])
        self._exchange, self._gathered = exchange, exchange.buffer(self.grad)
        return [
            *((one, self._gathered[one.span]) for one in exchange.segments),
            *(
                (replace(one, support=own.support), self.grad[own.span])
                for one, own in pairs
                if id(one.weight) not in layers
            ),
        ]

    def _weights(self) -> dict[str, Tensor]:
        """The rows of each weight that lie here, by name."""
        return {name: local_of(weight) for name, weight in self.model.named_parameters()}

    def _write(self, entries: Iterable[tuple[str, Support, Tensor]]) -> None:
        named = self._weights()
        for name, support, values in entries:
            weight = named[name]
            support.to(weight.device).scatter_(weight, values.to(weight.device))

    def _make_buffer(self) -> None:
        """Gradients, and beside them room for numbers that travel with them between processes."""
        self._buffer = self.flat.data.new_zeros(self.flat.numel() + ROOM)
        self.flat.grad = self.grad = self._buffer[:-ROOM]

    def _place(self) -> None:
        """Lays out the coordinates of the entries that train."""
        flat = self.flat.data
        self.scale = self.coordinates.scale(self.segments, flat)
        self.centre = self.coordinates.centre(self.segments, flat, self.touched)

    def _read(self) -> None:
        """Makes the masters stand for what the weights hold."""
        for segment in self.segments:
            values = segment.support.gather(segment.weight)
            self.flat.data[segment.span] = values.to(self.flat)
        if self.centre is not None:
            self.flat.data.sub_(self.centre)
        if self.scale is not None:
            self.flat.data.div_(self.scale)

    def _revert(self, segment: Segment, left: Tensor) -> None:
        """Writes the base values of the entries that `left` ([n], bool) marks into the weight."""
        if not bool(left.any()):
            return
        gone = Support.of(segment.support.shape, positions_of(segment.support, left))
        base = self.touched.values(segment.name, gone).to(segment.weight.device)
        gone.scatter_(segment.weight, base)


def attach(
    model: nn.Module,
    supports: Mapping[str, Support],
    kernel_for: KernelFor = choose,
    touched: Touched | None = None,
    offload: bool = False,
    coordinates: Coordinates = PLAIN,
    shards: Shards | None = None,
) -> SparseParameters:
    """Makes the entries in `supports` (parameter name -> support) the only ones that train.

    Linear layers with a weight of their own compute only the selected gradient; every other weight
    (embeddings, norms, biases, Conv1D, tied weights) is gathered from its dense gradient, which
    lives no longer than one hook. `kernel_for` overrides the choice of kernel; `touched` carries
    the base values of entries that trained earlier. With `offload`, masters and gradients lie
    on the host, and so do the moments of an optimizer over them: each backward pass sends K numbers
    there, and each step gets K back. `coordinates` say what a master stands for. `shards` tells how
    the weights lie on several ranks, where they do: `supports` are of the whole weights.

    Raises KeyError for a name that the model lacks, ValueError for a support of another shape.
    """
    parameters = SparseParameters(
        model, supports, kernel_for, touched, offload, coordinates, shards
    )
    parameters.wire()
    return parameters


def whole_supports(model: nn.Module, names: Sequence[str]) -> dict[str, Support]:
    """Supports that hold every entry of the parameters called `names`."""
    named = dict(model.named_parameters())
    return {name: Support(tuple(named[name].shape)) for name in names}
