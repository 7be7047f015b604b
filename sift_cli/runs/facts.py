"""What a run must find again as it left it, to go on."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from sift_cli.delta.build import versions
from sift_cli.errors import counted
from sift_cli.recipe import Recipe
from sift_cli.runs.folder import NO_RESULT
from sift_cli.runs.session import Session

CHECKPOINT_FORMAT = 1  # of checkpoints
LONGEST_SHOWN = 200  # letters of a value in an error
ROWS_AT_ONCE = 10_000  # rows hashed at a time


@dataclass(frozen=True)
class Facts:
    """A run's recipe, rows, base and device, and the setting that its last bits depend on.

    `data` maps each split to its count of rows and their hash, `base` each tensor of the model
    before training to its fingerprint. `method` is what trains, where that is not what the recipe
    selects.
    """

    format: int
    recipe: dict[str, Any]
    data: dict[str, str]
    base: dict[str, str]
    device: str
    setting: dict[str, str]
    method: str | None = None

    @classmethod
    def of(cls, settings: dict[str, Any], method: str, session: Session) -> "Facts":
        """Those of a session before it trains; `settings` are of `settings_of`."""
        task = session.task
        splits = {"training": task.train}
        splits |= {f"evaluation{suffix}": rows for suffix, rows in task.evaluation.items()}
        encoded = {"training": session.train}
        encoded |= {f"evaluation{suffix}": rows for suffix, rows in session.evaluation.items()}
        data = {}
        for name, rows in splits.items():
            tokens = encoded[name]
            assert rows is not None
            assert tokens is not None
            data[name] = f"{len(rows):,} rows, {_hash_rows(rows, tokens.lengths)}"
        selection, metrics = settings["selection"], settings["data"]["metrics"] or ()
        for name in (selection["score"], *metrics, settings["eval"]["metric"]):
            file, _, _ = (name or "").rpartition(".py:")
            if file:
                data[f"{file}.py"] = _hash(Path(f"{file}.py").expanduser().read_bytes())
        device = session.device.type
        card = torch.cuda.get_device_name(session.device) if device == "cuda" else ""
        return cls(
            format=CHECKPOINT_FORMAT,
            recipe=settings,
            data=data,
            base=session.fingerprints(),
            device=device,
            setting=versions()
            | {
                "python": platform.python_version(),
                "machine": f"{platform.machine()} {card}".strip(),
                "threads": str(torch.get_num_threads()),
                "processors": str(os.cpu_count()),
            },
            method=None if method == selection["policy"] else method,
        )


@dataclass(frozen=True)
class Differences:
    """`refuse` are reasons not to go on, `tell` those to expect other last bits."""

    refuse: list[str]
    tell: list[str]
    wrong_base: bool


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every value of a resolved recipe on which a result may depend, as JSON."""
    return recipe.model_dump(mode="json", exclude=NO_RESULT)


def differences(there: Facts, here: Facts) -> Differences:
    """What differs between a checkpoint's facts and those of now, one line each."""
    found = []
    if there.format != here.format:
        found.append(f"format of the checkpoint: {there.format}, this sift has {here.format}")
    found += _changes({"method": there.method}, {"method": here.method})
    found += recipe_changes(_with_later_keys(there.recipe), here.recipe)
    found += _changes(there.data, here.data, " of the data")
    if there.device != here.device:
        found.append(f"device: it was {there.device}, now it is {here.device}")
    wrong = sorted(
        name
        for name in there.base.keys() | here.base.keys()
        if there.base.get(name) != here.base.get(name)
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        told = counted(len(wrong), "tensor differs", "tensors differ")
        found.append(f"the base: {told}: {', '.join(wrong[:3])}{more}")
    tell = _changes(there.setting, here.setting)
    return Differences(found, tell, wrong_base=bool(wrong) and len(found) == 1)


def recipe_changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line for each value in which two resolved recipes differ."""
    return _changes(flat(there), flat(here))


def _with_later_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe of an earlier version: keys that it did not know have their defaults."""
    filled = dict(recipe)
    for section, values in recipe.items():
        kind = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
        if isinstance(values, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
            without = NO_RESULT.get(section, {})
            usual = {
                key: one.get_default()
                for key, one in kind.model_fields.items()
                if key not in without
            }
            filled[section] = {**usual, **values}
    return filled


def _changes(there: Mapping[str, Any], here: Mapping[str, Any], of: str = "") -> list[str]:
    names = list(dict.fromkeys([*there, *here]))
    return [
        f"{name}{of}: it was {_shown(there.get(name))}, now it is {_shown(here.get(name))}"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _shown(value: Any) -> str:
    """A value in a line; of a long text, such as a template, what tells it from others."""
    if not isinstance(value, str) or len(value) <= LONGEST_SHOWN:
        return str(value)
    return f"a text of {len(value):,} letters, {_hash(value.encode())}"


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inside = isinstance(value, Mapping)
        found |= flat(value, f"{before}{key}.") if inside else {f"{before}{key}": value}
    return found


def _hash_rows(rows: Any, lengths: list[int]) -> str:
    """Over every value of every row, and how many tokens the tokenizer made of it."""
    found = hashlib.sha256(json.dumps(lengths).encode())
    for block in rows.iter(ROWS_AT_ONCE):
        found.update(json.dumps(block).encode())
    return found.hexdigest()[:16]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
