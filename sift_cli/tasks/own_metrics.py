"""Metrics of the user's own, in files that a recipe names: rows beside those of METRICS."""

from collections.abc import Callable, Sequence
from functools import wraps
from math import isfinite
from typing import Any

from sift_cli.errors import SiftError
from sift_cli.system.code import function_in
from sift_cli.tasks.metrics import EVIDENCE, METRICS, OWN_KINDS, Metric, called, is_code


def own_metrics(names: Sequence[str], allow_code: bool) -> dict[str, Metric]:
    """Those of `names` that are code, by what results call them.

    Raises SiftError where code is not allowed, or where there is no such function.
    """
    own: dict[str, Metric] = {}
    for name in dict.fromkeys(filter(is_code, names)):
        function = called(name)
        if function in METRICS or function in own:
            raise SiftError(f"data.metrics: {name}: another metric is called {function}; rename it")
        found = function_in(name, "data.metrics", allow_code)
        metric = Metric(_guarded(function, found), OWN_KINDS)
        if unknown := sorted(set(metric.needs) - set(EVIDENCE)):
            raise SiftError(
                f"data.metrics: {name} asks for {', '.join(unknown)}; a metric may ask for "
                + ", ".join(EVIDENCE)
            )
        own[function] = metric
    return own


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., float | None]:
    """The function, whose faults are SiftErrors; None for what it gives that is not finite."""

    @wraps(function)
    def guarded(**evidence: Any) -> float | None:
        try:
            value = function(**evidence)
            found = None if value is None else float(value) + 0.0  # no -0
        except Exception as error:  # whatever it does
            raise SiftError(f"data.metrics: {name}: {type(error).__name__}: {error}") from error
        return None if found is None or not isfinite(found) else found

    return guarded
