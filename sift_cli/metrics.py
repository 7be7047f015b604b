"""The metrics of a task, from scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSIFICATION = ("accuracy", "f1", "f1_macro", "matthews")
REGRESSION = ("pearson", "spearman")
METRICS = (*CLASSIFICATION, *REGRESSION)


Metrics = Mapping[str, float | None]  # by name; None where one is undefined


def shown(value: float | None) -> str:
    """A metric as a person reads it."""
    return "undefined" if value is None else f"{value:.4f}"


def compute_metrics(
    names: Sequence[str], predicted: NDArray[Any], labels: NDArray[Any]
) -> dict[str, float]:
    """Each named metric of `predicted` against `labels`, both of shape [N].

    Class codes for the classification metrics, real numbers for the correlations. `f1` is that of
    class 1, as GLUE defines it; `f1_macro` averages over classes. A correlation with a constant is
    undefined and counts as 0.
    """
    return {name: _compute(name, predicted, labels) for name in names}


def _compute(name: str, predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    constant = predicted.min() == predicted.max() or labels.min() == labels.max()
    if constant and name in (*REGRESSION, "matthews"):
        return 0.0
    if name in REGRESSION:
        from scipy import stats

        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        return float(correlate(predicted, labels).statistic)
    from sklearn import metrics

    match name:
        case "accuracy":
            return float(metrics.accuracy_score(labels, predicted))
        case "f1":
            return float(metrics.f1_score(labels == 1, predicted == 1, zero_division=0))
        case "f1_macro":
            return float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
        case "matthews":
            return float(metrics.matthews_corrcoef(labels, predicted))
    raise KeyError(name)
