"""Labels by name: which of two lists means which, whatever their order, and what rows hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.table import head_width

if TYPE_CHECKING:
    from datasets import Dataset
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


def outputs_for(
    labels: Sequence[str] | None, config: PretrainedConfig, task: str
) -> tuple[tuple[str, ...], list[int]] | None:
    """The names of a model's outputs, and which of them each label is; None without such names.

    Raises SiftError where a label is no output, or where there are more or fewer outputs.
    """
    names = names_of(config)
    if labels is not None and config.num_labels != 1 and names is not None:
        return names, codes_in(labels, names, f"data.task: {task}")
    if config.num_labels != head_width(labels):
        raise SiftError(
            f"the model has {config.num_labels} outputs, the task {task} needs {head_width(labels)}"
        )
    return None


def relabelled(
    train: Dataset | None, evaluation: Mapping[str, Dataset], change: Callable[[Any], Any]
) -> dict[str, Any]:
    """Both with the label of each row as `change` makes it of the one that it has."""

    def of(rows: Dataset) -> Dataset:
        return rows.remove_columns("label").add_column("label", list(map(change, rows["label"])))

    return {
        "train": None if train is None else of(train),
        "evaluation": {suffix: of(rows) for suffix, rows in evaluation.items()},
    }


def told_head(
    labels: Sequence[str] | None, config: PretrainedConfig, *, new: bool, tuned: bool
) -> str:
    """What to say of the head for `labels`, of which something is `new`, on a base of `config`."""
    outputs = "a number" if labels is None else f"{len(labels)} labels {listed(labels)}"
    if new:
        was = f", in place of the base's of {config.num_labels}" * tuned
        return f"head: new, for {outputs}{was}"
    names = names_of(config) if labels is not None else None
    if names is None or names == labels:
        return f"head: the base's, kept for {outputs}"
    return f"head: the base's, kept, whose outputs were {listed(names)}: {outputs} now"


def coded(given: Sequence[Any], own: Sequence[str], names: Sequence[str], split: str) -> list[int]:
    """The codes of labels among `names`, -1 for what is none of them.

    They are names, or codes: of their source's own names, where it has some (`own`). Raises
    SiftError where none of these is one of `names`.
    """
    codes = {name: code for code, name in enumerate(names)}
    found = []
    for value in _named(given, own, names, split):
        code = codes.get(value, -1) if isinstance(value, str) else _whole(value)
        found.append(code if isinstance(code, int) and 0 <= code < len(names) else -1)
    return found


def _named(given: Sequence[Any], own: Sequence[str], names: Sequence[str], split: str) -> list[Any]:
    if not own or all(name.isdigit() for name in own):
        if all(re.fullmatch(r"-?\d+", name) for name in names):
            return [str(int(value)) if isinstance(value, int) else value for value in given]
        return list(given)
    alike = {plain(name): name for name in names}
    here = [alike.get(plain(name), name) for name in own]
    if {*here}.isdisjoint(names):
        raise SiftError(
            f"data: the labels of the {split} split are called {listed(own)}, and those of the "
            f"task {listed(names)}; name them alike in data.labels"
        )
    return [
        here[value] if isinstance(value, int) and value in range(len(here)) else value
        for value in given
    ]


def _whole(value: Any) -> Any:
    """A float without a fraction as a whole number: libraries make such of codes."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
