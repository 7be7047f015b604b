"""What a recipe says of where its rows come from, whatever they become."""

from typing import Any

from sift_cli.recipe import Recipe


def source_of(recipe: Recipe, split: str | None = None) -> dict[str, Any]:
    """The arguments that all that reads rows takes; `split` stands in for `eval.split`."""
    data = recipe.data
    return {
        "path": data.path,
        "task": data.task,
        "config": data.config,
        "split": split or recipe.eval.split,
        "holdout": data.holdout,
        "inner_holdout": data.inner_holdout,
        "max_train_rows": data.max_train_rows,
        "seed": recipe.train.seed,
    }
