"""What a report says of a language run: its tokens, what it answered, its easy and hard rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sift_cli.runs.summary import Summary
from sift_cli.tasks.language import EXTREMES
from sift_cli.tasks.token_rows import SplitCounts

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Spoken:
    """Sentences on each split, `(before, after)` lines of samples, and rows by their loss.

    `after` are the answers of the weights that were kept, those of `step`.
    """

    splits: list[str]
    samples: list[tuple[Line, Line]]
    step: int
    hardest: list[Line]
    easiest: list[Line]

    @classmethod
    def of(cls, summary: Summary, predictions: Sequence[Line], samples: Sequence[Line]) -> Spoken:
        """From the run's summary and the lines of predictions.jsonl and samples.jsonl."""
        told = sorted((one for one in predictions if "prompt" in one), key=lambda one: one["loss"])
        half = min(EXTREMES, (len(told) + 1) // 2)
        before = {one["row"]: one for one in samples if one["step"] == 0}
        after = [one for one in samples if one["step"] == summary.kept_step]
        return cls(
            splits=[
                " ".join([f"{name.capitalize()}:", *SplitCounts(**one).sentences()])
                for name, one in (summary.splits or {}).items()
            ],
            samples=[(before[one["row"]], one) for one in after if one["row"] in before],
            step=summary.kept_step,
            hardest=told[::-1][:half],
            easiest=told[: len(told) - half][:EXTREMES],
        )
