"""The rows of a recipe before anything is trained: counts, steps, and the largest batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from sift_cli.analysis.memory import Batch
from sift_cli.errors import SiftError
from sift_cli.models.loading import load_tokenizer
from sift_cli.recipe import EvalSection, Recipe, TrainSection
from sift_cli.runs.session import load_rows
from sift_cli.tasks.kinds import expected_task
from sift_cli.tasks.language import Language
from sift_cli.tasks.task import Task
from sift_cli.tasks.token_rows import SplitCounts
from sift_cli.tasks.tokens import Encoded
from sift_cli.training.batches import PACK, Steps, steps_of
from sift_cli.training.head import ROWS
from sift_cli.training.rates import trial_steps


@dataclass(frozen=True)
class PlannedRows:
    """The tokenised rows of a recipe; where they cannot be read, `missing` says why."""

    task: Task
    train: Encoded | None
    evaluation: dict[str, Encoded]
    missing: str | None

    @classmethod
    def of(cls, recipe: Recipe, folder: Any) -> PlannedRows:
        """Reads and tokenises; without rows, the task is what the recipe says of it."""
        data = recipe.data
        try:
            task = load_rows(recipe)
            tokenizer = load_tokenizer(folder)
        except SiftError as error:
            return cls(expected_task(*data.expected), None, {}, str(error).splitlines()[0])
        assert task.train is not None
        return cls(
            task,
            task.encode(task.train, tokenizer, data.max_length),
            {
                key: task.encode(rows, tokenizer, data.max_length)
                for key, rows in task.evaluation.items()
            },
            None,
        )

    def batches(self, recipe: Recipe) -> Steps | None:
        """The training batches of the run; None without rows."""
        if self.train is None:
            return None
        return steps_of(recipe.train, self.train.lengths)

    def largest(self, recipe: Recipe, task: Task) -> Batch:
        """The largest batch of the first epoch; without rows, a full one."""
        batches, packs = self.batches(recipe), task.packs
        if batches is None or self.train is None:
            rows, tokens = full(recipe.train, recipe.data.max_length)
            if packs:
                assert recipe.train.tokens is not None
                most = recipe.train.max_tokens or max(PACK, tokens)
                rows, tokens = 1, min(recipe.train.tokens, most)
            return Batch(rows, tokens, task=task, packed=packs)
        lengths, targets = self.train.lengths, self.train.targets

        def batch(part: Sequence[int]) -> Batch:
            each = [lengths[row] for row in part]
            learnt = sum(targets[row] for row in part) if targets else None
            shape = (1, sum(each)) if packs else (len(part), max(each))
            return Batch(*shape, task=task, learnt=learnt, packed=packs)

        steps = islice(batches.endless(), batches.steps_per_epoch)
        every = (batch(part) for rows in steps for part in rows)
        return max(every, key=lambda one: (one.rows * one.tokens, one.tokens, one.learnt or 0))

    def widest(self, recipe: Recipe, task: Task, also: Sequence[Encoded]) -> Batch:
        """The largest batch that an evaluation may have, of its rows and those that are read so."""
        read = [*self.evaluation.values(), *also]
        longest = max(chain.from_iterable(rows.lengths for rows in read), default=None)
        rows, tokens = full(recipe.eval, longest or recipe.data.max_length)
        learnt = max(chain.from_iterable(some.targets for some in read), default=None)
        return Batch(rows, tokens, task=task, learnt=learnt and rows * learnt)

    def head(self, start: str) -> dict[str, Any]:
        """What the head starts from; for a probe the rows that it is fitted to, where known."""
        rows = None
        if start == "probe" and self.train is not None:
            rows = min(ROWS, len(self.train))
        return {"kind": start, "rows": rows}

    def about(self, recipe: Recipe) -> dict[str, Any]:
        """Counts of rows, of rows cut to `data.max_length`, and of steps; of a language task more.

        That is the format of its rows, how they become tokens, and how many these are.
        """
        batches = self.batches(recipe)
        if batches is None or self.train is None:
            return {"missing": self.missing}
        splits = {"train": self.train} | {
            "evaluation" + suffix: rows for suffix, rows in self.evaluation.items()
        }
        language: dict[str, Any] = {}
        if isinstance(self.task, Language):
            language = {
                "format": self.task.format,
                "language": self.task.header()["language"],
                "tokens_per_step": sum(self.train.lengths) / batches.steps_per_epoch,
                "splits": {name: SplitCounts.of(rows).to_json() for name, rows in splits.items()},
            }
        return language | {
            "rows": {name: len(rows) for name, rows in splits.items()},
            "truncated": {name: rows.truncated for name, rows in splits.items()},
            "max_length": recipe.data.max_length,
            "steps": batches.steps,
            "trial_steps": trial_steps(recipe, batches.steps),
            "steps_per_epoch": batches.steps_per_epoch,
        }


def full(settings: TrainSection | EvalSection, tokens: int) -> tuple[int, int]:
    """Rows and tokens of the largest batch, where each row has so many tokens."""
    fit = settings.batch_size
    if settings.max_tokens is not None:
        fit = min(fit, max(1, settings.max_tokens // tokens))
    return fit, tokens
