"""The recipe: what it may hold, and how it is read. Imports no torch."""

from sift_cli.recipe.reading import load_recipe, parse_recipe, trace_recipe
from sift_cli.recipe.schema import (
    CheckpointSection,
    EvalSection,
    ModelSection,
    Recipe,
    TrainSection,
)
from sift_cli.recipe.selection import AXES, OPTIONS, SelectionSection

__all__ = [
    "AXES",
    "OPTIONS",
    "CheckpointSection",
    "EvalSection",
    "ModelSection",
    "Recipe",
    "SelectionSection",
    "TrainSection",
    "load_recipe",
    "parse_recipe",
    "trace_recipe",
]
