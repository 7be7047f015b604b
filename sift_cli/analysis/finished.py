"""Finished runs by their folders: what each is, and whether they may stand in one table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sift_cli.analysis.methods import WITHOUT_BUDGET
from sift_cli.analysis.table import SELECTION, Density
from sift_cli.errors import SiftError
from sift_cli.recipe import Rate, load_recipe
from sift_cli.runs.facts import flat, settings_of
from sift_cli.runs.folder import RECIPE_FILE, SUMMARY_FILE
from sift_cli.runs.summary import Summary
from sift_cli.tasks.metrics import LOSS
from sift_cli.tasks.table import LANGUAGE, TAGGING

# what the table has columns for
SHOWN = ("train.seed", "train.learning_rate", "selection.policy", "selection.density")
# what tells, beside the name of a task, which rows and which of their tokens are scored
ROWS_OF = {
    **dict.fromkeys(("custom", TAGGING), ("path", "config", "label")),
    **dict.fromkeys(
        LANGUAGE,
        ("path", "config", "columns", "max_length", "template", "system", "train_on", "too_long"),
    ),
}


@dataclass(frozen=True)
class Finished:
    """The run in `folder`; `settings` are of `settings_of`, empty where it holds no recipe."""

    folder: Path
    summary: Summary
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Finished":
        """Raises SiftError where none has finished there, or its recipe cannot be read."""
        summary = Summary.read(folder)
        if summary is None:
            raise SiftError(f"{folder}: no finished run; it holds no {SUMMARY_FILE}")
        recipe = folder / RECIPE_FILE
        settings = settings_of(load_recipe(recipe)) if recipe.is_file() else {}
        if settings and summary.language is not None:
            del settings["train"]["head_start"]  # policies differ in it, and there is no new head
        return cls(folder, summary, settings)

    @property
    def density(self) -> Density:
        """As its recipe gives it; None where the method has none, or where that is not known."""
        if self.summary.policy in WITHOUT_BUDGET or not self.settings:
            return None
        density: Density = self.settings["selection"]["density"]
        return density

    @property
    def rate(self) -> Rate | None:
        """The learning rate, where it is known; `auto` where each seed may have found another."""
        if not self.settings:
            return None
        train = self.settings["train"]
        rate: Rate = train["learning_rate_from"] or train["learning_rate"]
        return rate

    @property
    def row(self) -> str:
        """What runs that differ in their seed alone have in common."""
        method, settings = self.summary.policy, dict(self.settings)
        if settings:
            settings["train"] = {**settings["train"], "learning_rate": self.rate, "seed": None}
        return json.dumps([method, settings], sort_keys=True)

    def scored(self) -> dict[str, Any]:
        """What its score is of, by what a message calls it; as far as it is known."""
        found: dict[str, Any] = {"task": self.summary.task}
        if self.settings:
            data = self.settings["data"]
            keys = ROWS_OF.get(self.summary.task, ())
            found |= {f"data.{key}": data[key] for key in keys}
            found["data.holdout"] = data["holdout"]
            found["eval.split"] = self.settings["eval"]["split"]
        first, *more = self.summary.metrics
        told = [first, *(name for name in more if not name.startswith(LOSS))]  # older runs lack it
        return found | {"metrics": ", ".join(told)}


def require_one_task(runs: Sequence[Finished]) -> None:
    """Raises SiftError where runs were not scored on the same rows by the same metrics."""
    first = runs[0]
    for other in runs[1:]:
        before, after = first.scored(), other.scored()
        for key in before:
            if key in after and not _same(key, before[key], after[key]):
                raise SiftError(
                    f"{first.folder} and {other.folder} cannot stand in one table: {key} is "
                    f"{before[key]} in the one and {after[key]} in the other; compare runs of one "
                    "task, scored on the same rows by the same metrics"
                )


def differing(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """Of each run, the settings in which not all runs agree, by dotted key.

    What the table shows by itself is left out. What a policy chooses (`selection`) counts among the
    runs of one method alone; a run without a recipe differs in nothing that is known.
    """
    known = [flat(run.settings) for run in runs]
    methods = [run.summary.policy for run in runs]

    def differs(key: str, value: Any, method: str) -> bool:
        return any(
            key in other and other[key] != value
            for other, one in zip(known, methods, strict=True)
            if one == method or not key.startswith(SELECTION)
        )

    return [
        {
            key: value
            for key, value in own.items()
            if not key.startswith(SHOWN) and differs(key, value, method)
        }
        for own, method in zip(known, methods, strict=True)
    ]


def _same(key: str, one: Any, other: Any) -> bool:
    if key == "data.path":
        return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    return bool(one == other)
