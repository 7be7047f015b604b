"""A tuned model from whatever holds it: a run folder, a delta file, or a model folder."""

from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from sift_cli.delta.file import load_delta
from sift_cli.delta.serving import apply_delta
from sift_cli.errors import SiftError
from sift_cli.models import gguf
from sift_cli.models.loading import DTYPES, LoadedModel, load_model, model_folder
from sift_cli.models.stored import stored_kinds
from sift_cli.recipe import Recipe, load_recipe, parse_recipe
from sift_cli.runs.folder import DELTA_FILE, RECIPE_FILE, delta_file
from sift_cli.runs.language import language_of
from sift_cli.tasks.classification import Classification
from sift_cli.tasks.kinds import load_as_it_is, task_of, task_of_config
from sift_cli.tasks.sources import find_rows
from sift_cli.tasks.table import LANGUAGE, text_columns
from sift_cli.tasks.tagging import Tagging
from sift_cli.tasks.task import Task
from sift_cli.tasks.templates import TEMPLATE_FILE


def load_tuned(path: str, base: str | None = None) -> tuple[LoadedModel, Recipe | None]:
    """The model, and the recipe that travels with it if one does.

    A delta goes onto the base that it names, or onto `base`. Raises SiftError where there is
    nothing to load (exit code 2), or where the delta is damaged or the base a wrong one (3).
    """
    place = delta_file(path)
    if place.is_file() and place.suffix != gguf.SUFFIX:
        return _from_delta(place, base)
    if place.is_dir() and not (place / "config.json").is_file():
        raise SiftError(f"{path}: neither a run (no {DELTA_FILE}) nor a model (no config.json)")
    folder = model_folder(path)
    recipe = folder / RECIPE_FILE
    return load_as_it_is(folder), load_recipe(recipe) if recipe.is_file() else None


def task_of_loaded(loaded: LoadedModel, recipe: Recipe | None) -> Task:
    """The task of what `load_tuned` gives, without rows: worded as in its training, if any says."""
    if recipe is not None and recipe.data.task in LANGUAGE:
        return language_of(recipe)
    return task_of_config(loaded.model.config)


def with_rows(
    recipe: Recipe, path: str, split: str | None, config: PretrainedConfig
) -> tuple[Recipe, str | None]:
    """The recipe with other rows to score a model of `config` on, and their split.

    All of a file's rows count, and nothing is held out of them. Labels are those of the model, by
    their names: a file need not hold each of them. Columns of labels name their own.
    """
    source, task = find_rows(path, recipe.data.task), task_of_config(config)
    gone = ["config", "holdout", "inner_holdout", "max_train_rows"]
    gone += [] if source.cells else ["delimiter", "encoding"]
    changes: dict[str, Any] = {"path": path, **dict.fromkeys(gone)}
    if isinstance(task, Classification | Tagging) and not isinstance(recipe.data.label, list):
        changes["labels"] = list(task.labels or ())
    data = recipe.data.model_copy(update=changes)
    return recipe.model_copy(update={"data": data}), split or ("train" if source.whole else None)


def require_texts(tuned: str, recipe: Recipe, texts: int) -> None:
    """Raises SiftError where a row of its training had one text and here has two, or otherwise."""
    columns = text_columns(recipe.data.task, recipe.data.text)
    if texts == 2 and len(columns) == 1:
        raise SiftError(
            f"{tuned} was trained on one text ({columns[0]}); leave --pair out, or a column"
        )
    if texts == 1 and len(columns) == 2:
        raise SiftError(
            f"{tuned} was trained on pairs of texts ({', '.join(columns)}); give the second of "
            "each with --pair, or in data.text"
        )


def _from_delta(path: Path, base: str | None) -> tuple[LoadedModel, Recipe | None]:
    delta = load_delta(path)
    header = delta.header
    source = base or header.base.path
    folder = model_folder(source, None if base else header.base.revision)
    task = task_of(header)
    dtype, new_head = DTYPES[header.base.dtype], bool(delta.dense)
    loaded = load_model(folder, task.auto, task.configure(folder), dtype, new_head=new_head)
    apply_delta(loaded.model, delta, source, stored_kinds(folder))
    loaded.model.config.architectures = [type(loaded.model).__name__]  # not the base's any more
    if template := task.side_texts(folder).get(TEMPLATE_FILE):  # as a merged folder has it
        loaded.tokenizer.chat_template = template
    recipe = header.recipe  # a difference of two models may have none
    return loaded, parse_recipe(yaml.safe_dump(recipe), str(path)) if recipe else None
