"""What a recipe says of rows for language models, as the task that reads them."""

from __future__ import annotations

from dataclasses import replace

from sift_cli.recipe import Recipe
from sift_cli.runs.sources import source_of
from sift_cli.tasks.coder import ALL_TOKENS
from sift_cli.tasks.instructions import LanguageRows, load_language_rows
from sift_cli.tasks.language import Language, Wording
from sift_cli.tasks.metrics import OF_TOKENS, TOKENS, leading, require_fit
from sift_cli.tasks.templates import BUILTIN, OWN, template_text
from sift_cli.tasks.token_rows import DROP


def language_rows(
    recipe: Recipe, *, train: bool = True, evaluate: bool = True, split: str | None = None
) -> LanguageRows:
    """The rows of a recipe for `instruct` or `text`, checked; see `load_language_rows`."""
    data = recipe.data
    assert data.format is not None
    return load_language_rows(
        source_of(recipe, split),
        format=data.format,
        columns=data.columns,
        train=train,
        evaluate=evaluate,
    )


def language_of(recipe: Recipe) -> Language:
    """The task of a recipe for `instruct` or `text`, without rows.

    Raises SiftError for metrics of other tasks.
    """
    data, first = recipe.data, recipe.eval.metric
    names = data.metrics or OF_TOKENS
    for key, some in (("data.metrics", names), ("eval.metric", [first] if first else [])):
        require_fit(key, some, TOKENS, f"rows of task: {data.task} hold")
    wording = Wording(
        template=data.template or OWN,
        system=data.system,
        train_on=data.train_on or ALL_TOKENS,
        too_long=data.too_long or DROP,
    )
    return Language(data.task, leading(names, first), wording=wording)


def with_template(recipe: Recipe) -> Recipe:
    """The recipe with the text of its template in place of the file: so it travels everywhere.

    Raises what `template_text` raises.
    """
    asked = recipe.data.template
    if asked is None or asked in (OWN, *BUILTIN):
        return recipe
    data = recipe.data.model_copy(update={"template": template_text(asked)})
    return recipe.model_copy(update={"data": data})


def language_task(recipe: Recipe, *, train: bool = True, split: str | None = None) -> Language:
    """The task of a recipe for `instruct` or `text`, with its rows, checked."""
    found = language_rows(recipe, train=train, split=split)
    assert found.evaluation is not None
    return replace(
        language_of(recipe),
        train=found.train,
        evaluation={"": found.evaluation},
        format=found.layout.name,
    )
