"""Mistakes in a recipe: their places, and what may have been meant. Imports no torch."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sift_cli.recipe.schema import LABEL_KEYS, ROW_OPTIONS, Recipe, keys_of_others
from sift_cli.recipe.selection import AXES, OPTIONS, policy_row
from sift_cli.tasks.table import LANGUAGE

KeyPlace = tuple[str | int, ...]


def describe(
    error: Any, places: dict[KeyPlace, str], nowhere: str, idle: set[str]
) -> tuple[str, str]:
    """The place of a validation error of pydantic, and its message in the terms of recipes.

    `nowhere` is the place of what stands in no line.
    """
    kind, message = error["type"], str(error["msg"])
    place = error["loc"]
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        if _fields(place):  # raised for a whole section: the message begins with the key
            key, _, message = message.partition(": ")
            place = (*place, *key.split("."))
    elif kind == "extra_forbidden":
        message = "unknown key" + _nearest_key(place, idle)
    elif kind == "missing":
        message = "missing" + _hint(place)
    elif kind == "model_type":
        message = f"a section holds keys, got {error['input']!r}"
    else:
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r}"
    starts = (place[:length] for length in range(len(place), -1, -1))
    where = next((places[start] for start in starts if start in places), nowhere)
    return where, f"{dotted(place)}: {message}"


def dotted(place: KeyPlace) -> str:
    """A place as recipes write it: `section.key`."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" if index else str(part)
        for index, part in enumerate(place)
    )


def _fields(place: KeyPlace) -> dict[str, Any]:
    """The fields of the section at `place`; none where it is no section."""
    section: Any = Recipe
    for key in place:
        field = section.model_fields.get(key)
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return {}
    return dict(section.model_fields)


def _nearest_key(place: KeyPlace, idle: set[str]) -> str:
    """The valid key nearest to an unknown one, none of `idle`.

    One of the same name in another section comes first, then siblings, then any.
    """
    key, parent = str(place[-1]), place[:-1]
    siblings = {dotted((*parent, name)): name for name in _fields(parent)}
    everywhere = {f"{top}.{name}": name for top in Recipe.model_fields for name in _fields((top,))}
    for known, cutoff in ((everywhere, 1.0), (siblings, 0.6), (everywhere, 0.6)):
        useful = {dotted: name for dotted, name in known.items() if dotted not in idle}
        near = difflib.get_close_matches(key, list(useful.values()), n=1, cutoff=cutoff)
        if near:
            full = next(dotted for dotted, name in useful.items() if name == near[0])
            return f"; did you mean {full}?"
    return f"; known here: {', '.join(siblings.values())}"


def idle_keys(values: Mapping[str, Any]) -> set[str]:
    """The keys that would do nothing in a recipe with these values, by section.key."""
    data, selection = (
        one if isinstance(one := values.get(name), dict) else {} for name in ("data", "selection")
    )
    row = policy_row(selection)
    axes = {axis: selection.get(axis) or getattr(row, axis) for axis in AXES}
    idle = {f"selection.{key}" for key, option in OPTIONS.items() if not option.applies(axes)}
    task = str(data.get("task"))
    idle |= {f"data.{key}" for key, usual in ROW_OPTIONS.items() if task not in usual}
    idle |= {*keys_of_others(task)}
    return idle | {f"data.{key}" for key in LABEL_KEYS} if task in LANGUAGE else idle


def _hint(place: KeyPlace) -> str:
    field = _fields(place[:-1]).get(str(place[-1]))
    return f" ({field.description})" if field is not None and field.description else ""
