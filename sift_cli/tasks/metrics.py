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
) -> dict[str, float | None]:
    """Each named metric of `predicted` against `labels`, both of shape [N].

    Class codes for the classification metrics, real numbers for the correlations. `f1` is that of
    class 1, as GLUE defines it; `f1_macro` averages over classes. None stands for what is
    undefined: a correlation where predictions or labels are all the same, `matthews` where all
    labels are, `f1` where class 1 is neither there nor predicted. By convention `matthews` is 0
    where all predictions are the same and the labels are not.
    """
    return {name: _compute(name, predicted, labels) for name in names}


def _compute(name: str, predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    same_labels = labels.min() == labels.max()
    same_predictions = predicted.min() == predicted.max()
    if name == "matthews" and (same_labels or same_predictions):
        return None if same_labels else 0.0
    if name in REGRESSION and (same_labels or same_predictions):
        return None
    if name == "f1" and not ((labels == 1) | (predicted == 1)).any():
        return None
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
