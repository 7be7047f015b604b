"""The rows of a recipe before anything is trained: counts, steps, and the largest batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from math import ceil
from pathlib import Path
from typing import Any

from sift_cli.analysis.memory import Batch
from sift_cli.errors import NotHere
from sift_cli.models.loading import check_length, load_tokenizer
from sift_cli.recipe import AUTO, EvalSection, Recipe, TrainSection
from sift_cli.runs.session import by_split, encoded, load_rows
from sift_cli.selection.select import Rule
from sift_cli.tasks.kinds import expected_task
from sift_cli.tasks.language import Language
from sift_cli.tasks.task import Task
from sift_cli.tasks.token_rows import SplitCounts
from sift_cli.tasks.tokens import Encoded
from sift_cli.training.batches import PACK, Steps, steps_of
from sift_cli.training.head import ROWS
from sift_cli.training.parts import choices_of
from sift_cli.training.rates import require_enough_rows, steps_of_trial, trials_of


def read_task(recipe: Recipe) -> tuple[Task, str | None]:
    """The recipe's task with its rows, checked as for training.

    Where they are not on this machine, what the recipe says of it alone, and why.
    """
    try:
        task = load_rows(recipe)
    except NotHere as error:
        return expected_task(*recipe.data.expected), str(error).splitlines()[0]
    assert task.train is not None
    if recipe.train.learning_rate == AUTO:
        require_enough_rows(len(task.train))
    return task, None


@dataclass(frozen=True)
class PlannedRows:
    """The tokenised rows of a recipe; where they cannot be read, `missing` says why."""

    task: Task
    train: Encoded | None
    evaluation: dict[str, Encoded]
    missing: str | None

    @classmethod
    def of(
        cls, recipe: Recipe, task: Task, missing: str | None, folder: Path, model: Any
    ) -> PlannedRows:
        """Tokenises what `read_task` gave, where the tokenizer is in the folder of the model."""
        try:
            tokenizer = load_tokenizer(folder)
        except NotHere as error:
            return cls(task, None, {}, missing or str(error).splitlines()[0])
        check_length(recipe.data.max_length, model, tokenizer)
        most, split = recipe.data.max_length, recipe.eval.split
        return cls(task, *encoded(task, tokenizer, model.config, most, split), missing)

    def batches(self, recipe: Recipe) -> Steps | None:
        """The training batches of the run; None without rows."""
        if self.train is None:
            return None
        return steps_of(recipe.train, self.train.lengths)

    def largest(self, recipe: Recipe, task: Task, devices: int = 1) -> Batch:
        """The largest batch of the first epoch, where so many devices share each step.

        Without rows, a full one.
        """
        batches, packs = self.batches(recipe), task.packs
        if batches is None or self.train is None:
            rows, tokens = full(recipe.train, recipe.data.max_length)
            if packs:
                assert recipe.train.tokens is not None
                most = recipe.train.max_tokens or max(PACK, tokens)
                rows, tokens = 1, min(recipe.train.tokens, most)
            elif recipe.train.tokens is None:
                rows = min(rows, ceil(recipe.train.batch_size * recipe.train.accumulate / devices))
            return Batch(rows, tokens, task=task, packed=packs)
        lengths, targets = self.train.lengths, self.train.targets

        def batch(part: Sequence[int], step: Sequence[Sequence[int]]) -> Batch:
            if packs:
                share = ceil(sum(lengths[row] for one in step for row in one) / devices)
                before = accumulate((lengths[row] for row in part), initial=0)
                part = [row for row, held in zip(part, before, strict=False) if held < share]
            else:
                part = part[: ceil(sum(map(len, step)) / devices)]
            each = [lengths[row] for row in part]
            learnt = sum(targets[row] for row in part) if targets else None
            shape = (1, sum(each)) if packs else (len(part), max(each))
            return Batch(*shape, task=task, learnt=learnt, packed=packs)

        steps = islice(batches.endless(), batches.steps_per_epoch)
        every = (batch(part, rows) for rows in steps for part in rows)
        return max(every, key=lambda one: (one.rows * one.tokens, one.tokens, one.learnt or 0))

    def micro_batches(self, recipe: Recipe, task: Task, devices: int = 1) -> int:
        """The most micro-batches of a step of the first epoch that each of so many devices has."""
        settings, batches = recipe.train, self.batches(recipe)
        if batches is not None:
            steps = islice(batches.endless(), batches.steps_per_epoch)
            most = max(map(len, steps))
        elif settings.tokens is None:
            most = settings.accumulate
        else:
            batch = self.largest(recipe, task, devices)
            most = ceil(settings.tokens / (batch.rows * batch.tokens))
        return ceil(most / devices)

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

    def about(self, recipe: Recipe, rule: Rule) -> dict[str, Any]:
        """Counts of rows, of rows cut to `data.max_length`, and of steps; of a language task more.

        That is the format of its rows, how they become tokens, and how many these are.
        """
        batches = self.batches(recipe)
        if batches is None or self.train is None:
            return {"missing": self.missing}
        splits = by_split(self.train, self.evaluation)
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
            "steps_per_epoch": batches.steps_per_epoch,
            **Passes.of(recipe, rule, batches.steps).to_json(),
        }


@dataclass(frozen=True)
class Passes:
    """What a run of `steps` runs forward and backward beside them, in batches as large as a step's.

    `choices` are the batches that each choice of entries looks at, of those `asked` for as many as
    there are steps left, `warmup` the steps before the first. Each of the `trials` of learning
    rates warms up too, and looks at `trial_choices` in `trial_steps`.
    """

    steps: int
    warmup: int
    asked: int
    choices: Sequence[int]
    trials: int
    trial_steps: int
    trial_choices: Sequence[int]

    @classmethod
    def of(cls, recipe: Recipe, rule: Rule, steps: int) -> Passes:
        """Those of a recipe whose run has so many steps."""
        selection, short = recipe.selection, steps_of_trial(steps)
        return cls(
            steps=steps,
            warmup=selection.warmup_steps or 0,
            asked=selection.batches,
            choices=choices_of(selection, rule, steps),
            trials=trials_of(recipe),
            trial_steps=short,
            trial_choices=choices_of(selection, rule, short),
        )

    @property
    def in_trials(self) -> int:
        """All that the trials take beside their steps."""
        return self.trials * (self.warmup + sum(self.trial_choices))

    def to_json(self) -> dict[str, Any]:
        """As a plan holds it; `passes` is all of it together."""
        trial_steps = self.trials * self.trial_steps
        chosen, more = sum(self.choices), self.warmup + self.in_trials
        return {
            "warmup_steps": self.warmup,
            "selection_batches": {
                "asked": self.asked,
                "first": next(iter(self.choices), 0),
                "all": chosen,
            },
            "trial_steps": trial_steps,
            "trial_passes": trial_steps + self.in_trials,
            "passes": self.steps + chosen + trial_steps + more,
        }

    def seconds(self, begin_s: float, step_s: float) -> float:
        """The time of the run and its trials, where what comes before the first step takes
        `begin_s`, and a step with what is chosen anew in it `step_s`."""
        first, in_trial = (next(iter(one), 0) for one in (self.choices, self.trial_choices))
        begins = self.trials * (in_trial + self.warmup) / max(first + self.warmup, 1)
        return (1 + begins) * begin_s + (self.steps + self.trials * self.trial_steps) * step_s


def full(settings: TrainSection | EvalSection, tokens: int) -> tuple[int, int]:
    """Rows and tokens of the largest batch, where each row has so many tokens."""
    fit = settings.batch_size
    if settings.max_tokens is not None:
        fit = min(fit, max(1, settings.max_tokens // tokens))
    return fit, tokens


def computed(rows: Sequence[Sequence[int]], lengths: Sequence[int], packs: bool) -> int:
    """Tokens of a step's batches, each padded to its longest row unless they are packs."""
    if packs:
        return sum(lengths[row] for part in rows for row in part)
    return sum(len(part) * max(lengths[row] for row in part) for part in rows)
