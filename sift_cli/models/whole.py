"""Whether a folder's files fill a model: all but a classification head must be there."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sift_cli.errors import SiftError, counted, in_lines
from sift_cli.models.names import all_names
from sift_cli.models.stored import Stored

# Parts of the names of what stands beside quantised weights, by the kinds that there are.
SCALES = {
    *("qweight", "qzeros", "scales", "g_idx"),  # GPTQ, AWQ
    *("weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "input_scale"),  # fp8
    *("SCB", "absmax", "quant_map", "quant_state", "nested_absmax"),  # bitsandbytes
}


@dataclass(frozen=True)
class Lack:
    """The parameters of a model that its files do not give.

    `missing` are not there, `mismatched` have another shape: that in the files, that in the model.
    """

    missing: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of_loading(cls, info: Mapping[str, Any]) -> Lack:
        """What from_pretrained says that it drew at random."""
        others = {name: (tuple(here), tuple(own)) for name, here, own in info["mismatched_keys"]}
        return cls(frozenset(info["missing_keys"]) - {*others}, others)

    @classmethod
    def of_files(cls, model: Any, stored: Stored) -> Lack:
        """What loading would draw at random, by the listings of the files alone."""
        shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
        there = {name: tuple(source.shape) for name, source in stored.places.items()}
        others = {
            name: (there[name], shape)
            for name, shape in shapes.items()
            if name in there and there[name] != shape
        }
        return cls(frozenset({*all_names(model).values()} - {*there}), others)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return {*self.missing, *self.mismatched}


def require_whole(
    model: Any, lack: Lack, stored: Stored, folder: Path, new_head: bool
) -> tuple[str, ...]:
    """The parameters of a new head, in order: those that are random, and may be with `new_head`.

    Raises SiftError where anything else is lacking, of another shape, or quantised.
    """
    _refuse_quantised(model, stored, folder)
    _refuse_one_way(stored, folder)
    lacking = [name for name in all_names(model) if name in lack.names]
    if not new_head and lacking:
        raise _random(model, lack, lacking, stored, folder)
    head = _head(model)
    if wrong := [n for n in lacking if not n.startswith(head) or not _all_of_it(model, lack, n)]:
        raise _random(model, lack, wrong, stored, folder)
    return tuple(name for name, _ in model.named_parameters() if name in lack.names)


def _all_of_it(model: Any, lack: Lack, name: str) -> bool:
    """Whether the module that has this parameter lacks all others as well; a pooler, all of it."""
    pooler = f"{model.base_model_prefix}.pooler."
    module = pooler if name.startswith(pooler) else name.rpartition(".")[0] + "."
    others = {one for one in all_names(model) if one.startswith(module)}
    return others <= (lack.missing if module == pooler else lack.names)


def _head(model: Any) -> tuple[str, ...]:
    """What the names of a head's parameters begin with.

    It is all that stands beside the base model, and the pooler in it, which masked language models
    go without.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name for name in all_names(model) if not name.startswith(prefix)}
    return (*names, f"{prefix}pooler.")


def _random(
    model: Any, lack: Lack, names: Sequence[str], stored: Stored, folder: Path
) -> SiftError:
    lines = [
        f"{name}: {list(lack.mismatched[name][0])} in the files, {list(lack.mismatched[name][1])} "
        "by config.json"
        if name in lack.mismatched
        else f"{name}: not there"
        for name in names
    ]
    told = counted(len(names), "tensor", "tensors")
    return SiftError(
        f"{folder} does not fill the model {type(model).__name__}: {told} would be random:\n"
        f"  {in_lines(lines)}\n{_cause(model, lack, names, stored)}"
    )


def _cause(model: Any, lack: Lack, names: Sequence[str], stored: Stored) -> str:
    """The likely cause of what is lacking, and the way out."""
    head = _head(model)
    whole = all(name.startswith(head) and _all_of_it(model, lack, name) for name in names)
    if whole:
        sizes = {tuple(one.shape) for key, one in model.state_dict().items() if key in names}
        alike = [key for key in stored.strange if stored.in_files[key].shape in sizes]
        or_else = f" If {alike[0]} is one of them, rename it." if alike else ""
        return (
            "These are its head, so it has not been trained for this task: train it first, or give "
            f"the run or the tuned model.{or_else}"
        )
    shapes = {name: lack.mismatched[name] for name in names if name in lack.mismatched}
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    for name, (there, own) in shapes.items():
        if len(shapes) <= 2 and there[1:] == own[1:] and own[0] == vocabulary:
            return (
                f"The vocabulary was resized, and config.json was not: set its vocab_size to "
                f"{there[0]} (of {name})."
            )
    if len(shapes) > len(names) / 2:
        return (
            "config.json is not that of these weights: give its sizes (such as hidden_size) as the "
            "weights have them."
        )
    if before := _before(model, names, stored.strange):
        return (
            f"They are there with {before!r} before their names: save the model without it "
            "(the state of what is inside), or rename the keys."
        )
    if stored.strange:
        told = counted(len(stored.strange), "tensor", "tensors")
        return (
            f"The files hold {told} that the model has no use for, such as "
            f"{stored.strange[0]}: they have other names, or are of another architecture than "
            "config.json says."
        )
    return "The files are not complete: save or download the model anew."


def _before(model: Any, names: Collection[str], strange: Sequence[str]) -> str:
    """What stands before the names of most that lack, in the keys that have no use; or ""."""
    prefix = f"{model.base_model_prefix}."
    found: dict[str, int] = {}
    for name in names:
        for wanted in {name, name.removeprefix(prefix)}:
            for key in strange:
                if key.endswith(f".{wanted}"):
                    start = key.removesuffix(wanted)
                    found[start] = found.get(start, 0) + 1
    most = max(found, key=lambda start: found[start], default="")
    return most if found.get(most, 0) > len(names) / 2 else ""


def left_out(model: Any, stored: Stored) -> tuple[str, ...]:
    """What to say of layers that the files hold beyond those that config.json asks for."""
    digits = re.compile(r"\.\d+\.")
    prefix = f"{model.base_model_prefix}."
    kinds = {digits.sub(".#.", name) for name in all_names(model)}
    kinds |= {name.removeprefix(prefix) for name in kinds}
    more = [key for key in stored.strange if digits.sub(".#.", key) in kinds]
    if not more:
        return ()
    told = counted(len(more), "tensor", "tensors")
    return (f"config.json asks for fewer layers than the files hold: {told} left out ({more[0]})",)


def _refuse_one_way(stored: Stored, folder: Path) -> None:
    """Raises SiftError where tensors that loading puts together do not come apart again."""
    for one in stored.joined:
        shapes = {key: stored.in_files[key].shape for key in one.keys}
        try:
            made = one.load({k: torch.empty(s, device="meta") for k, s in shapes.items()})
            back = {key: tuple(part.shape) for key, part in one.store(made).items()}
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            back = {}
            cause: Exception | None = error
        else:
            cause = None
        if back != shapes:
            raise SiftError(
                f"{folder}: transformers makes {one.names[0]} of {one.keys[0]} and others, and "
                "there is no way back, so nothing trained could be merged"
            ) from cause


def _refuse_quantised(model: Any, stored: Stored, folder: Path) -> None:
    prefix = f"{model.base_model_prefix}."
    modules = {name.rpartition(".")[0] for name in all_names(model)}
    modules |= {name.removeprefix(prefix) for name in modules}

    def scales(key: str) -> bool:
        parts = key.split(".")
        owned = (at for at in range(1, len(parts)) if ".".join(parts[:at]) in modules)
        return any(not SCALES.isdisjoint(parts[at:]) for at in owned)

    found = [key for key in stored.strange if scales(key)]
    if found:
        raise SiftError(
            f"{folder} holds quantised weights: {counted(len(found), 'tensor', 'tensors')} such "
            f"as {found[0]} scale them; give the model that they were made from, in float"
        )
