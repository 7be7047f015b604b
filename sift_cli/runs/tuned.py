"""A tuned model from whatever holds it: a run folder, a delta file, or a model folder."""

from pathlib import Path

import yaml

from sift_cli.delta.file import load_delta
from sift_cli.delta.serving import apply_delta
from sift_cli.errors import SiftError
from sift_cli.models import gguf
from sift_cli.models.loading import DTYPES, LoadedModel, load_model, model_folder
from sift_cli.models.stored import stored_kinds
from sift_cli.recipe import Recipe, load_recipe, parse_recipe
from sift_cli.runs.folder import DELTA_FILE, RECIPE_FILE, delta_file
from sift_cli.runs.language import language_of
from sift_cli.tasks.kinds import load_as_it_is, task_of, task_of_config
from sift_cli.tasks.table import LANGUAGE
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


def _from_delta(path: Path, base: str | None) -> tuple[LoadedModel, Recipe | None]:
    delta = load_delta(path)
    header = delta.header
    source = base or header.base.path
    folder = model_folder(source, None if base else header.base.revision)
    task = task_of(header)
    loaded = load_model(folder, task.auto, task.configure(folder), DTYPES[header.base.dtype])
    apply_delta(loaded.model, delta, source, stored_kinds(folder))
    loaded.model.config.architectures = [type(loaded.model).__name__]  # no longer the base's
    if template := task.side_texts(folder).get(TEMPLATE_FILE):  # as a merged folder has it
        loaded.tokenizer.chat_template = template
    recipe = header.recipe  # a difference of two models may have none
    return loaded, parse_recipe(yaml.safe_dump(recipe), str(path)) if recipe else None
