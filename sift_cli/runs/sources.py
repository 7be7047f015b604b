"""What a recipe says of where its rows come from, whatever they become."""

from sift_cli.recipe import Recipe
from sift_cli.tasks.cells import Cells
from sift_cli.tasks.sources import Source


def source_of(recipe: Recipe, split: str | None = None) -> Source:
    """The source of a recipe's rows; `split` stands in for `eval.split`."""
    data = recipe.data
    return Source(
        path=data.path,
        task=data.task,
        config=data.config,
        cells=Cells(data.delimiter, data.encoding),
        split=split or recipe.eval.split,
        holdout=data.holdout,
        inner_holdout=data.inner_holdout,
        max_train_rows=data.max_train_rows,
        seed=recipe.train.seed,
    )
