"""Names of labels: which of two lists means which, whatever their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sift_cli.errors import SiftError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHOWN = 12  # names in a message


def names_of(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The names that a configuration gives its outputs, in their order; None for made-up ones."""
    named = {int(code): str(name) for code, name in (config.id2label or {}).items()}
    names = tuple(named[code] for code in sorted(named))
    made_up = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return None if made_up else names


def listed(names: Sequence[str]) -> str:
    """Names in a message, in their order."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"[{', '.join(names[:SHOWN])}{more}]"


def codes_in(names: Sequence[str], model: Sequence[str], what: str) -> list[int]:
    """Which of the outputs called `model` each of `names` is, the labels of `what`.

    Where one side has plain numbers for names, 0 and so on, they are the numbers of outputs. Raises
    SiftError where a name is none of the model's.
    """
    exact = {name: code for code, name in enumerate(model)}
    alike = {plain(name): code for code, name in enumerate(model)}
    found = [exact.get(name, alike.get(plain(name))) for name in names]
    if all(code is None for code in found):
        numbers = [str(code) for code in range(len(model))]
        if list(model) == numbers and len(names) == len(model):
            found = list(range(len(model)))
        elif {*names} <= {*numbers}:
            found = [int(name) for name in names]
    if None in found:
        raise SiftError(
            f"{what} has the labels {listed(names)}, and the outputs of the model are called "
            f"{listed(model)}; name them alike, in data.labels or in id2label of config.json"
        )
    return [code for code in found if code is not None]


def plain(name: str) -> str:
    """A name as it is compared: without case, `-` and blanks as `_`."""
    return re.sub(r"[\s_-]+", "_", name.strip()).casefold()
