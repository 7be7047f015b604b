"""A tuned model that is asked about texts, in the way that its recipe evaluates it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sift_cli.models.loading import LoadedModel
from sift_cli.recipe import Recipe
from sift_cli.runs.session import autocasts
from sift_cli.runs.tuned import task_of_loaded
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.evaluation import Asked, Asking
from sift_cli.tasks.generation import Answer
from sift_cli.tasks.labelled import TEXTS
from sift_cli.tasks.language import Language
from sift_cli.tasks.prompts import Prompt, prompts_of, read_prompts
from sift_cli.tasks.table import LONGEST_ANSWER, TAGGING, TASKS, text_columns
from sift_cli.tasks.tagging import Tagging
from sift_cli.tasks.task import Task

TOLD = {  # what is told of a row of a file, by what is told of a text
    "words": "words",
    "label": "prediction",
    "labels": "prediction",
    "tags": "prediction",
    "score": "value",
    "probabilities": "probabilities",
    "entities": "entities",
}


@dataclass(frozen=True)
class Predictor:
    """A tuned model with the recipe that travels with it, if one does."""

    loaded: LoadedModel
    recipe: Recipe | None
    device: torch.device

    @cached_property
    def task(self) -> Task:
        """The task, without rows."""
        return task_of_loaded(self.loaded, self.recipe)

    @property
    def speaks(self) -> bool:
        """Whether the model answers in words."""
        return isinstance(self.task, Language)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row's texts, as in its training; `text` where nobody tells."""
        if self.recipe is not None:
            return text_columns(self.recipe.data.task, self.recipe.data.text)
        return text_columns(TAGGING, None) if isinstance(self.task, Tagging) else ("text",)

    @property
    def original(self) -> Mapping[str, str]:
        """How GLUE's own files call columns of the task, where they call them otherwise."""
        spec = TASKS.get(self.recipe.data.task) if self.recipe else None
        return spec.original if spec else {}

    def ask(
        self, texts: Sequence[Any], pairs: Sequence[str] | None = None, *, first: int = 0
    ) -> Asked:
        """What a model that does not speak says of texts; raises SiftError for one it cannot read.

        `first` is the number of the first text in errors.
        """
        task, recipe, asking = self.task, self.recipe, Asking(self.device)
        assert isinstance(task, Classification | Tagging)
        if recipe is not None:
            asking = Asking(
                self.device,
                recipe.data.max_length,
                recipe.eval.batch_size,
                recipe.eval.max_tokens,
                autocasts(recipe.model, recipe.train, self.device),
            )
        return task.predict(self.loaded, texts, pairs, asking=asking, first=first)

    def prompts(self, path: Path) -> list[Prompt]:
        """The prompts of a file, whose rows are laid out as those that a speaking model learnt."""
        task, told = self.task, dict[str, Any]()
        assert isinstance(task, Language)
        if self.recipe is not None and self.recipe.data.format is not None:
            told = {"format": self.recipe.data.format, "columns": self.recipe.data.columns}
        plain = task.takes_text(self.loaded.tokenizer)
        return read_prompts(path, task.name, plain=plain, **told)

    def answers(
        self, prompts: Sequence[Prompt], longest: int = LONGEST_ANSWER
    ) -> Iterator[tuple[Prompt, Answer]]:
        """Each prompt with what a model that speaks answers, as it comes."""
        assert isinstance(self.task, Language)
        return self.task.answers(self.loaded, prompts, device=self.device, longest=longest)

    def speak(self, texts: Sequence[str], longest: int = LONGEST_ANSWER) -> list[dict[str, Any]]:
        """What a model that speaks answers to each text."""
        assert isinstance(self.task, Language)
        prompts = prompts_of(texts, self.task.takes_text(self.loaded.tokenizer))
        answers = self.answers(prompts, longest)
        return [{"text": one.shown(), **answer.to_json()} for one, answer in answers]

    def fault(self, value: Any) -> str | None:
        """Why a value in a column `{}` is no text to ask about; None where it is one."""
        if isinstance(self.task, Tagging) and isinstance(value, list):
            blank = [one is None or not str(one).strip() for one in value]
            return "words in {} are missing" if any(blank) or not value else None
        if value is None or value != value:
            return "text in {} is missing"
        return None if isinstance(value, TEXTS) else "lists or objects in {} where text belongs"

    def text(self, value: Any) -> Any:
        """A value of a file as training reads it: a text, or a list of words."""
        return [str(one) for one in value] if isinstance(value, list) else str(value)

    def example(self, worded: bool) -> dict[str, Any]:
        """What is told of some row of a file; `worded` where rows to tag are texts, not words."""
        task = self.task
        if isinstance(task, Tagging):
            told = {"words": [""], "tags": [""], "entities": [{"kind": "", "words": ""}]}
            return told_of(told, worded)
        assert isinstance(task, Classification)
        return told_of(task.kind.answers(torch.ones(1, task.width), task.labels or ())[0])


def told_of(answer: Mapping[str, Any], worded: bool = True) -> dict[str, Any]:
    """What is told of a row of a file: its columns say the rest."""
    told = {TOLD[key]: value for key, value in answer.items() if key in TOLD}
    return told if worded else {key: told[key] for key in told if key != "words"}


def told_of_prompt(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """What is told of the answer to a prompt of a file, and what was expected if the row says."""
    line = {**row_of_prompt(prompt), **answer.to_json()}
    return line if prompt.expected is None else {**line, "expected": prompt.expected}


def row_of_prompt(prompt: Prompt) -> dict[str, Any]:
    """How what is told of a prompt of a file begins."""
    return {"row": prompt.number, "prompt": prompt.shown()}
