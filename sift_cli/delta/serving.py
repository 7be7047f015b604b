"""Deltas put on a model in memory, taken off and swapped, bit for bit.

The first delta on a model reads the whole model: every tensor must have the fingerprint of the
delta's base. From then on the model is watched: each tensor's address, dtype and PyTorch's own
count of in-place writes are noted after every change. A later call compares those notes and reads
only the tensors whose notes differ, so that a swap costs two writes of the changed entries, both to
one weight while it is at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sift_cli.delta.file import SIGNED, Delta
from sift_cli.delta.identity import NOT_TRAINED, check_base
from sift_cli.errors import ExitCode, SiftError, counted
from sift_cli.models.fingerprints import (
    TensorKind,
    fingerprint,
    kinds_of,
    state_fingerprints,
    state_tensors,
    tied_names,
)
from sift_cli.tasks.table import head_width

SOURCE = "the model"
Note = tuple[object, ...]


@dataclass(frozen=True)
class Entries:
    """The entries that a delta changes in one weight: positions, and values before and after.

    `positions` is int64 [K] on the weight's device, or None for every entry; the values are
    integers of the weight's width.
    """

    positions: Tensor | None
    base: Tensor
    trained: Tensor

    def write_(self, flat: Tensor, values: Tensor) -> None:
        """Puts `values` ([K], one of the two) into a weight, flat and as integers of its width."""
        if self.positions is None:
            flat.copy_(values)
        elif torch.are_deterministic_algorithms_enabled():
            flat.index_copy_(0, self.positions, values)
        else:  # the fastest, and as sure: no position occurs twice
            flat.put_(self.positions, values)


@dataclass
class Watched:
    """A model whose base is known: fingerprints of the base's tensors, what is applied, the notes.

    `entries` are those of each delta seen so far, `heads` what stood where the applied delta's
    dense tensors are now.
    """

    base: dict[str, str]
    notes: dict[str, Note]
    applied: Delta | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    entries: WeakKeyDictionary[Delta, dict[str, Entries]] = field(default_factory=WeakKeyDictionary)


_watched: WeakKeyDictionary[nn.Module, Watched] = WeakKeyDictionary()


def apply_(delta: Delta, model: nn.Module) -> None:
    """Puts a delta on a model that is its base, in place.

    Raises SiftError (exit code 3) where the model is not the delta's base: another model, one that
    a delta is on already, or one that something else has changed since.
    """
    state = state_tensors(model)
    watched = _watch(model, state, delta)
    if watched.applied is not None:
        raise SiftError(
            f"a delta is on the model already ({_name(watched.applied)}); undo it first, or swap",
            ExitCode.WRONG_FILE,
        )
    _exchange(model, state, watched, delta)


def undo_(delta: Delta, model: nn.Module) -> None:
    """Takes a delta off a model, in place; a head that the base lacks is again what it was before.

    Raises SiftError (exit code 3) where `delta` is not what is on the model.
    """
    state = state_tensors(model)
    watch = _watch if model in _watched else _watch_trained
    watched = watch(model, state, delta)
    if watched.applied is None or not _same(watched.applied, delta):
        there = "no delta is" if watched.applied is None else f"{_name(watched.applied)} is"
        raise SiftError(f"cannot undo {_name(delta)}: {there} on the model", ExitCode.WRONG_FILE)
    _exchange(model, state, watched, None)


def swap_(delta: Delta, model: nn.Module) -> None:
    """Puts `delta` on a model in place of the delta that is on it, if one is.

    Raises SiftError (exit code 3) where the model without that delta is not the base of this one,
    and then leaves the model as it is.
    """
    state = state_tensors(model)
    watched = _watch(model, state, delta)
    if watched.applied is None or not _same(watched.applied, delta):
        _exchange(model, state, watched, delta)


@torch.no_grad()
def _exchange(
    model: nn.Module, state: dict[str, Tensor], watched: Watched, delta: Delta | None
) -> None:
    """Takes off what is applied and puts `delta` on; after an interruption the model is unknown."""
    if delta is not None:
        _check_dense(state, delta)
    del _watched[model]
    on = {} if watched.applied is None else watched.entries[watched.applied]
    writes = {name: [(entries, entries.base)] for name, entries in on.items()}
    if delta is not None:
        if delta not in watched.entries:
            _write_(state, writes)
            writes = {}
            watched.entries[delta] = _entries(state, delta)
        for name, entries in watched.entries[delta].items():
            writes.setdefault(name, []).append((entries, entries.trained))
    _write_(state, writes)
    for name, head in watched.heads.items():
        state[name].copy_(head)
    written = {*on, *watched.heads}
    watched.applied, watched.heads = delta, {}
    if delta is not None:
        watched.heads = {name: state[name].detach().clone() for name in delta.dense}
        for name, tensor in delta.dense.items():
            state[name].copy_(tensor)
        written |= {*delta.weights, *delta.dense}
    watched.notes |= {name: _note(state[name]) for name in written}
    _watched[model] = watched


def _write_(
    state: Mapping[str, Tensor], writes: Mapping[str, Sequence[tuple[Entries, Tensor]]]
) -> None:
    """Puts into each weight the values given for it, in order."""
    for name, given in writes.items():
        flat = state[name].detach().view(-1).view(given[0][1].dtype)
        for entries, values in given:
            entries.write_(flat, values)


def _entries(
    state: Mapping[str, Tensor], delta: Delta, trained: bool = False
) -> dict[str, Entries]:
    """Positions and values, on the weights' devices; the weights hold the base's (or trained)."""
    entries = {}
    for name, change in delta.weights.items():
        weight = state[name]
        support = change.support.to(weight.device)
        signed = SIGNED[weight.element_size()]
        here = support.gather(weight).view(signed)
        there = here ^ change.bits.contiguous().view(signed).to(weight.device)
        positions = None if support.positions is None else support.positions.long()
        entries[name] = Entries(positions, *((there, here) if trained else (here, there)))
    return entries


def _check_dense(state: Mapping[str, Tensor], delta: Delta) -> None:
    """Raises SiftError where the model has no place for the tensors that the base lacks."""
    for name, tensor in delta.dense.items():
        shape = tuple(state[name].shape) if name in state else None
        if shape != tuple(tensor.shape):
            has = "lacks it" if shape is None else f"has shape {shape}"
            raise SiftError(
                f"{name}: the delta brings one of shape {tuple(tensor.shape)}, the model {has}; "
                f"load the base for {head_width(delta.header.labels)} labels",
                ExitCode.WRONG_FILE,
            )


def _watch(model: nn.Module, state: dict[str, Tensor], delta: Delta) -> Watched:
    """What is known of the model; SiftError where it is not the base, or was changed by others.

    All tensors are read the first time, and then those that were written to in between.
    """
    watched = _watched.get(model)
    if watched is None:
        base = state_fingerprints(model, ())
        check_base(delta, _without(base, delta), SOURCE)
        return _remember(model, Watched(base, _notes(state)))
    notes = _notes(state)
    if notes != watched.notes:
        _read_again(state, watched, notes)
    if delta not in watched.entries:
        check_base(delta, _without(watched.base, delta), SOURCE)
    return watched


def _watch_trained(model: nn.Module, state: dict[str, Tensor], delta: Delta) -> Watched:
    """The record of a model that nobody watched and that should have `delta` on it."""
    base = state_fingerprints(model, ())
    for name, weight in delta.weights.items():
        if name in base:
            base[name] = weight.base if base[name] == weight.trained else NOT_TRAINED
    check_base(delta, _without(base, delta), SOURCE, merged=True)
    watched = Watched(base, _notes(state), applied=delta)
    watched.entries[delta] = _entries(state, delta, trained=True)
    return _remember(model, watched)


def _remember(model: nn.Module, watched: Watched) -> Watched:
    _watched[model] = watched
    return watched


def _read_again(state: Mapping[str, Tensor], watched: Watched, notes: dict[str, Note]) -> None:
    """Reads the tensors whose notes differ; SiftError (exit code 3) where the values do."""
    now = watched.base if watched.applied is None else _trained(watched.base, watched.applied)
    heads = {} if watched.applied is None else watched.applied.dense
    wrong = sorted(notes.keys() ^ watched.notes.keys())
    for name in notes.keys() & watched.notes.keys():
        if notes[name] == watched.notes[name]:
            continue
        wanted = now[name]
        if name in heads:
            wanted = fingerprint(heads[name].to(state[name].dtype))
        if fingerprint(state[name]) != wanted:
            wrong.append(name)
    if wrong:
        raise SiftError(
            f"something else has changed the model since a delta was put on or taken off: "
            f"{counted(len(wrong), 'tensor', 'tensors')}, such as {min(wrong)}; load the base anew",
            ExitCode.WRONG_FILE,
        )
    watched.notes = notes
    watched.heads = {name: head.to(state[name].device) for name, head in watched.heads.items()}
    moved = {
        delta: {name: _to(entries, state[name].device) for name, entries in by_name.items()}
        for delta, by_name in watched.entries.items()
    }
    watched.entries = WeakKeyDictionary(moved)


def _to(entries: Entries, device: torch.device) -> Entries:
    positions = entries.positions
    return Entries(
        None if positions is None else positions.to(device),
        entries.base.to(device),
        entries.trained.to(device),
    )


def _trained(base: Mapping[str, str], delta: Delta) -> dict[str, str]:
    """The fingerprints of the base's tensors once the delta is applied."""
    return {**base, **{name: weight.trained for name, weight in delta.weights.items()}}


def _without(marks: Mapping[str, str], delta: Delta) -> dict[str, str]:
    """The fingerprints of those tensors that the delta's base has."""
    return {name: mark for name, mark in marks.items() if name not in delta.dense}


def _notes(state: Mapping[str, Tensor]) -> dict[str, Note]:
    """What shows that a tensor was written to or replaced, without reading it."""
    return {name: _note(tensor) for name, tensor in state.items()}


def _note(tensor: Tensor) -> Note:
    # tensors made in inference mode count no writes: they are read each time
    writes = object() if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device, writes


def _same(one: Delta, other: Delta) -> bool:
    """Whether two deltas, such as a file loaded twice, make the same change."""
    if one is other:
        return True
    marks = [{n: (w.base, w.trained) for n, w in d.weights.items()} for d in (one, other)]
    return (
        marks[0] == marks[1]
        and one.dense.keys() == other.dense.keys()
        and all(torch.equal(head, other.dense[name]) for name, head in one.dense.items())
    )


def _name(delta: Delta) -> str:
    """What a message calls a delta."""
    named = [str(word) for word in (delta.header.task, delta.header.policy) if word]
    return f"the {' '.join(named)} delta" if named else "a delta"


@torch.no_grad()
def apply_delta(
    model: nn.Module,
    delta: Delta,
    source: str = "the model",
    kinds: Mapping[str, TensorKind] | None = None,
) -> None:
    """Turns the base into the trained model, in place and bit for bit.

    `kinds` are those of the files that `model` was loaded from, where it was loaded in another
    dtype. Raises SiftError (exit code 3) where `model` is not the base that the delta was trained
    on.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    marks = state_fingerprints(model, delta.dense)
    check_base(delta, marks, source, kinds=kinds or kinds_of(model), tied=tied_names(model))
    for name, weight in delta.weights.items():
        weight.toggle_(named[name])
    for name, tensor in delta.dense.items():
        named[name].copy_(tensor)
