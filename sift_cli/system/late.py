"""Parts of packages that a command waits for until they are called, not merely imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

# What waits, by the module that imports it: for assisted decoding and for losses of detectors,
# transformers brings scikit-learn, pandas and scipy into every process that loads a model.
DETECTORS = ("deformable_detr", "for_object_detection", "grounding_dino", "lw_detr", "rf_detr")
WAITING = {
    "transformers.generation.candidate_generator": ("sklearn.metrics", "roc_curve"),
    **{
        f"transformers.loss.loss_{name}": ("scipy.optimize", "linear_sum_assignment")
        for name in (*DETECTORS, "rt_detr")
    },
}


def wait_for_calls() -> None:
    """From now on, what is WAITING in modules yet to be imported is so when first called.

    For processes of sift's own: it changes how Python imports.
    """
    if not any(isinstance(one, Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds the modules of WAITING where they are, and runs them in its own way."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, or None for all other modules."""
        if fullname not in WAITING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    """Runs a module's source beside a stand-in of the package that it would import."""

    def exec_module(self, module: ModuleType) -> None:
        """Fills the module; as ever where the package is there already, or more of it is asked."""
        package, function = WAITING[module.__name__]
        if package in sys.modules:
            return super().exec_module(module)
        stand_in: Any = ModuleType(package)
        setattr(stand_in, function, partial(_call, package, function))
        sys.modules[package] = stand_in
        try:
            super().exec_module(module)
        except ImportError:
            del sys.modules[package]
            super().exec_module(module)
        finally:
            if sys.modules.get(package) is stand_in:
                del sys.modules[package]


def _call(package: str, function: str, *args: Any, **more: Any) -> Any:
    return getattr(import_module(package), function)(*args, **more)
