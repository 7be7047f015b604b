"""What the keys of a model's files are called in memory: renamed, put together, taken apart.

transformers does all of it on loading, by its own table; a merge does it again, and back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.names import all_names

# What trainers put around a model, whose attribute each stands in the keys of what they save:
# around any part of it, and around the whole.
AROUND = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
BEFORE = (*AROUND, "module", "model", "base_model", "_forward_module", "0", "auto_model")
_INSIDE = r"(?:\.(?:" + "|".join(AROUND) + r"))+(?=\.)"
UNWRAP = {  # regular expressions, as from_pretrained takes them in `key_mapping`
    r"^(?:(?:" + "|".join(BEFORE) + r")\.)+": "",
    _INSIDE: "",
    f"(?:){_INSIDE}": "",  # transformers replaces once
}


@dataclass(frozen=True)
class Joined:
    """Tensors of files that become others in memory: each expert's become one of all experts.

    `keys` are those of the files, `names` those in memory.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    converter: WeightConverter
    patterns: tuple[str, ...]  # of the converter, for each key
    model: Any

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in memory by name, of those in the files by key."""
        converter: Any = deepcopy(self.converter)
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            converter.add_tensor(self.names[0], key, pattern, tensors[key])
        return _converted(converter, self.names[0], self.model)

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the files by key, of those in memory by name: the way back."""
        converter: Any = deepcopy(self.converter).reverse_transform()
        first = ""
        for name in sorted(self.names, key=dot_natural_key):
            renamed, pattern = converter.rename_source_key(name)
            first = first or renamed
            converter.add_tensor(first, name, pattern, tensors[name])
        found = _converted(converter, first, self.model)
        named = zip(self.keys, sorted(found, key=dot_natural_key), strict=True)
        return {key: found[one].contiguous() for key, one in named}


def _converted(converter: Any, first: str, model: Any) -> dict[str, Tensor]:
    made = converter.convert(first, model=model, config=model.config)
    return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


@dataclass
class Matched:
    """What becomes of the keys of a model's files.

    `names` has the model's name of each key that is a tensor of it (the first where tied), `joined`
    the group of each that becomes one together with others, `written` what either is called in a
    model that is saved, and `strange` are the keys that the model has no use for. `wrapped`: the
    keys are those of a model inside of another module.
    """

    names: dict[str, str] = field(default_factory=dict)
    joined: dict[str, Joined] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    wrapped: bool = False

    @property
    def found(self) -> set[str]:
        """The model's names of all that the files hold."""
        return {*self.names.values()} | {n for one in self.joined.values() for n in one.names}


def match(model: Any, keys: Iterable[str]) -> Matched:
    """What becomes of these keys in `model`, which may lie on the meta device.

    Where what a trainer put around the model stands in them, they are taken without. Raises
    SiftError (exit code 3) where two of them are one tensor.
    """
    keys = sorted(keys, key=dot_natural_key)
    matched = _match(model, {key: key for key in keys})
    bare = {key: unwrapped(key) for key in keys}
    if matched.strange and list(bare.values()) != keys:
        inside = _match(model, bare)
        matched = inside if len(inside.found) > len(matched.found) else matched
    once: dict[str, str] = {}
    for key, written in matched.written.items():
        if once.setdefault(written, key) != key:
            raise SiftError(
                f"the files hold {written} twice, as {once[written]} and as {key}; leave one",
                ExitCode.WRONG_FILE,
            )
    return matched


def unwrapped(key: str) -> str:
    """The key without the names of what trainers put around a model."""
    for pattern, new in UNWRAP.items():
        key = re.sub(pattern, new, key)
    return key


def _match(model: Any, keys: Mapping[str, str]) -> Matched:
    """`keys` maps each key of the files to what it is without what is around the model."""
    every, prefix = all_names(model), model.base_model_prefix
    table = get_model_conversion_mapping(model)
    renamings = [one for one in table if isinstance(one, WeightRenaming)]
    converters = [one for one in table if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}

    def named(key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(key, renamings, converters, prefix, every)
        return found

    matched = Matched(wrapped=any(key != bare for key, bare in keys.items()))
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, bare in keys.items():
        plain, _ = named(_modern(bare), [], [])
        name, pattern = named(bare, renamings, converters)
        if name not in every:
            name, pattern = plain, None
        if name not in every:
            matched.strange.append(key)
        elif pattern is not None:
            groups.setdefault(name, []).append((key, pattern))
        else:
            matched.names[key] = every[name]
            matched.written[key] = name if plain == name else _with_prefix(bare, name, prefix)
    for name, some in groups.items():
        parts, patterns = zip(*some, strict=True)
        converter = by_pattern[patterns[0]]
        targets = converter.target_patterns
        names = [name.replace(targets[0], one) for one in targets]
        one = Joined(parts, tuple(every.get(one, one) for one in names), converter, patterns, model)
        matched.joined |= dict.fromkeys(parts, one)
        matched.written |= {key: _with_prefix(keys[key], name, prefix) for key in parts}
    return matched


def _modern(key: str) -> str:
    """The key with the names that layer norms have had since 2019."""
    key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)


def _with_prefix(key: str, name: str, prefix: str) -> str:
    """What a key of the files is called beside a head: it begins with the backbone's name."""
    inside = name.startswith(f"{prefix}.") and not key.startswith(f"{prefix}.")
    return f"{prefix}.{key}" if inside else key
