"""The recipe: what it may hold, and how it is read. Imports no torch."""

from sift_cli.recipe.evaluation import EvalSection
from sift_cli.recipe.reading import (
    RecipeLike,
    load_recipe,
    parse_recipe,
    recipe_of,
    selection_of,
    trace_recipe,
)
from sift_cli.recipe.schema import ROW_OPTIONS, CheckpointSection, ModelSection, Recipe
from sift_cli.recipe.selection import (
    AXES,
    DEFAULT_POLICY,
    OPTIONS,
    SelectionSection,
    usual_rate,
)
from sift_cli.recipe.training import AUTO, Rate, TrainSection

__all__ = [
    "AUTO",
    "AXES",
    "DEFAULT_POLICY",
    "OPTIONS",
    "ROW_OPTIONS",
    "CheckpointSection",
    "EvalSection",
    "ModelSection",
    "Rate",
    "Recipe",
    "RecipeLike",
    "SelectionSection",
    "TrainSection",
    "load_recipe",
    "parse_recipe",
    "recipe_of",
    "selection_of",
    "trace_recipe",
    "usual_rate",
]
