"""Which kind of task a delta, a summary, a configuration or a recipe is of: tasks without rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sift_cli.errors import SiftError
from sift_cli.models.loading import load_model, read_config
from sift_cli.tasks import classification
from sift_cli.tasks.classification import task_of_labels
from sift_cli.tasks.language import Language, is_causal, task_of_language
from sift_cli.tasks.table import LANGUAGE, MULTI_LABEL, TAGGING, TASKS
from sift_cli.tasks.tagging import Tagging, is_tagging

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sift_cli.models.loading import LoadedModel
    from sift_cli.tasks.task import Task


class Stated(Protocol):
    """What the header of a delta and the summary of a run both say of their task."""

    @property
    def labels(self) -> Sequence[str] | None:
        """Label names in code order, None for a regression."""

    @property
    def kind(self) -> str | None:
        """What else the rows have than one label each; None where they have that."""

    @property
    def language(self) -> Mapping[str, Any] | None:
        """What a language task says of itself; None for others."""


def task_of(stated: Stated) -> Task:
    """The task of a delta whose header, or of a run whose summary, says this."""
    if stated.language is not None:
        return task_of_language(stated.language)
    if stated.kind == TAGGING:
        return Tagging(tuple(stated.labels or ()))
    return task_of_labels(stated.labels, stated.kind == MULTI_LABEL)


def task_of_config(config: PretrainedConfig) -> Task:
    """The task that a model with this configuration does."""
    if is_causal(config):
        return Language("instruct")
    if is_tagging(config):
        names: dict[Any, str] = {**(config.id2label or {})}
        return Tagging(tuple(names[code] for code in sorted(names)))
    return classification.task_of_config(config)


def task_of_tuned(config: PretrainedConfig, source: str) -> Task:
    """The task of a model tuned elsewhere, which is at `source`.

    Raises SiftError where it is none that sift knows.
    """
    named = ", ".join(config.architectures or ["no model"])
    if "ForSequenceClassification" not in named and not is_causal(config) | is_tagging(config):
        raise SiftError(
            f"{source} is {named}; a delta turns a base into a model for sequence classification "
            "or regression, token classification, or a causal language model"
        )
    return task_of_config(config)


def expected_task(name: str, labels: Sequence[str] | None, several: bool = False) -> Task:
    """What a recipe's task will be: labels as given, else the task's, else two."""
    if name in LANGUAGE:
        return Language(name)
    if name == TAGGING:
        return Tagging(tuple(labels or ("O", "B-")))
    spec = TASKS.get(name)
    return task_of_labels(labels or (spec.labels if spec else ("0", "1")), several)


def load_as_it_is(folder: Path) -> LoadedModel:
    """The model of a folder, tuned already, by its own configuration; see `load_model`."""
    config = read_config(folder)
    return load_model(folder, task_of_config(config).auto, config)
