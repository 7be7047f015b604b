"""sift: sparse fine-tuning of pre-trained models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sift_cli.api import Run, evaluate, probe, train
    from sift_cli.convert.merge import merge
    from sift_cli.delta import Delta
    from sift_cli.errors import ExitCode, SiftError
    from sift_cli.recipe import Recipe
    from sift_cli.runs.callbacks import Callback
    from sift_cli.training.sparsify import Sparse, sparsify

__version__ = "0.1.0"
# Where each public name lives: it is imported when it is asked for.
_HOMES = {
    "Callback": "runs.callbacks",
    "Delta": "delta",
    "ExitCode": "errors",
    "Recipe": "recipe",
    "Run": "api",
    "SiftError": "errors",
    "Sparse": "training.sparsify",
    "evaluate": "api",
    "merge": "convert.merge",
    "probe": "api",
    "sparsify": "training.sparsify",
    "train": "api",
}
__all__ = [
    "Callback",
    "Delta",
    "ExitCode",
    "Recipe",
    "Run",
    "SiftError",
    "Sparse",
    "__version__",
    "evaluate",
    "merge",
    "probe",
    "sparsify",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
