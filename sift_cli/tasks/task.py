"""A task with its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """A task with its rows, each checked: columns `text` (or `text` and `pair`), `label`, `row`.

    `row` is the row's number in its source split. `evaluation` maps the suffix of a metric's name
    to rows: one entry with the suffix "" in general; MNLI adds "_mismatched". `labels` is None for
    regression.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train: Dataset | None
    evaluation: dict[str, Dataset]

    @property
    def outputs(self) -> int:
        """Width of the model's head."""
        return 1 if self.labels is None else len(self.labels)
