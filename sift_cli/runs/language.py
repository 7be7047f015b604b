"""What a recipe says of rows for language models, as the arguments of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sift_cli.recipe import Recipe
from sift_cli.tasks.coder import ALL_TOKENS, Coder, open_coder
from sift_cli.tasks.instructions import LanguageRows, load_language_rows
from sift_cli.tasks.language import METRICS, Language, Wording
from sift_cli.tasks.templates import OWN
from sift_cli.tasks.token_rows import DROP, Limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def language_rows(
    recipe: Recipe, *, train: bool = True, evaluate: bool = True, split: str | None = None
) -> LanguageRows:
    """The rows of a recipe for `instruct` or `text`, checked; see `load_language_rows`."""
    data = recipe.data
    assert data.format is not None
    return load_language_rows(
        data.path,
        data.task,
        format=data.format,
        columns=data.columns,
        config=data.config,
        split=split or recipe.eval.split,
        holdout=data.holdout,
        inner_holdout=data.inner_holdout,
        max_train_rows=data.max_train_rows,
        seed=recipe.train.seed,
        train=train,
        evaluate=evaluate,
    )


def language_task(recipe: Recipe, *, train: bool = True, split: str | None = None) -> Language:
    """The task of a recipe for `instruct` or `text`, with its rows, checked."""
    data = recipe.data
    found = language_rows(recipe, train=train, split=split)
    assert found.evaluation is not None
    wording = Wording(
        template=data.template or OWN,
        system=data.system,
        train_on=data.train_on or ALL_TOKENS,
        too_long=data.too_long or DROP,
    )
    metrics = tuple(data.metrics or METRICS)
    return Language(data.task, metrics, found.train, {"": found.evaluation}, wording)


def recipe_coder(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Coder:
    """What makes tokens of a recipe's rows, for the model in `folder`; see `open_coder`."""
    data = recipe.data
    if data.task == "text":
        return open_coder(folder, tokenizer)
    assert data.template is not None
    assert data.train_on is not None
    return open_coder(
        folder, tokenizer, template=data.template, system=data.system, train_on=data.train_on
    )


def recipe_limit(recipe: Recipe) -> Limit:
    """The most tokens of a row, and what becomes of a longer one."""
    assert recipe.data.too_long is not None
    return Limit(recipe.data.max_length, recipe.data.too_long)
