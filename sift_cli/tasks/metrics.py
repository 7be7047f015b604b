"""The metrics of a task, from scikit-learn and SciPy: a table of what they are and which way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

Metrics = Mapping[str, float | None]  # by name; None where one is undefined


@dataclass(frozen=True)
class Metric:
    """A row of the table: `compute` takes predictions and labels, both of shape [N].

    They are class codes where `classes`, else real numbers. `rises` tells that higher is better.
    One `of_losses` takes each row's loss, and is for either kind of label. `of_tokens` is for
    language models: it takes the summed loss of all rows, their targets and how many of these come
    out right.
    """

    compute: Callable[[NDArray[Any], NDArray[Any]], float | None] | None
    classes: bool
    rises: bool = True
    of_losses: bool = False
    of_tokens: Callable[[float, float, float], float | None] | None = None


def _same(values: NDArray[Any]) -> bool:
    return bool(values.min() == values.max())


def _accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    from sklearn import metrics

    return float(metrics.accuracy_score(labels, predicted))


def _f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    from sklearn import metrics

    if not ((labels == 1) | (predicted == 1)).any():
        return None
    return float(metrics.f1_score(labels == 1, predicted == 1, zero_division=0))


def _f1_macro(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    from sklearn import metrics

    return float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))


def _matthews(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    from sklearn import metrics

    if _same(labels):
        return None
    return 0.0 if _same(predicted) else float(metrics.matthews_corrcoef(labels, predicted))


def _pearson(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    from scipy import stats

    if _same(labels) or _same(predicted):
        return None
    return float(stats.pearsonr(predicted, labels).statistic)


def _spearman(predicted: NDArray[Any], labels: NDArray[Any]) -> float | None:
    from scipy import stats

    if _same(labels) or _same(predicted):
        return None
    return float(stats.spearmanr(predicted, labels).statistic)


def _mean(losses: NDArray[Any], _: NDArray[Any]) -> float | None:
    return float(losses.mean())


def _token_loss(loss: float, targets: float, _: float) -> float:
    return loss / targets


def _perplexity(loss: float, targets: float, _: float) -> float | None:
    try:
        return exp(loss / targets)
    except OverflowError:
        return None


def _token_accuracy(_: float, targets: float, right: float) -> float:
    return right / targets


LOSS = "loss"
METRICS = {
    "accuracy": Metric(_accuracy, classes=True),
    "f1": Metric(_f1, classes=True),
    "f1_macro": Metric(_f1_macro, classes=True),
    "matthews": Metric(_matthews, classes=True),
    "pearson": Metric(_pearson, classes=False),
    "spearman": Metric(_spearman, classes=False),
    LOSS: Metric(_mean, classes=False, rises=False, of_losses=True, of_tokens=_token_loss),
    "perplexity": Metric(None, classes=False, rises=False, of_tokens=_perplexity),
    "token_accuracy": Metric(None, classes=False, of_tokens=_token_accuracy),
}
CLASSIFICATION = tuple(name for name, metric in METRICS.items() if metric.classes)
OF_TOKENS = tuple(name for name, metric in METRICS.items() if metric.of_tokens)
REGRESSION = tuple(
    name for name, metric in METRICS.items() if name not in (*CLASSIFICATION, *OF_TOKENS)
)


def compute_metrics(
    names: Sequence[str],
    predicted: NDArray[Any],
    labels: NDArray[Any],
    losses: NDArray[Any] | None = None,
) -> dict[str, float | None]:
    """Each named metric of `predicted` against `labels`, both of shape [N], as are `losses`.

    Class codes for the classification metrics, real numbers for the correlations. `f1` is that of
    class 1, as GLUE defines it; `f1_macro` averages over classes. None stands for what is
    undefined: a correlation where predictions or labels are all the same, `matthews` where all
    labels are, `f1` where class 1 is neither there nor predicted. By convention `matthews` is 0
    where all predictions are the same and the labels are not.
    """
    found = {}
    for name in names:
        metric = METRICS[name]
        sees = losses if metric.of_losses else predicted
        assert metric.compute is not None  # a task takes no names of others'
        assert sees is not None  # who asks for the loss gives it
        found[name] = metric.compute(sees, labels)
    return found


def score_tokens(names: Sequence[str], rows: NDArray[Any]) -> dict[str, float | None]:
    """Each named metric of OF_TOKENS, from what `token_outputs` gives of each row, [N, 3].

    Tokens count alike, whatever rows they stand in: `loss` is the mean over all targets, and
    `perplexity` its exponential, None where no number holds it. All are None without targets.
    """
    loss, targets, right = rows.astype("float64").sum(0).tolist()
    found: dict[str, float | None] = {}
    for name in names:
        compute = METRICS[name].of_tokens
        assert compute is not None  # a task takes no names of others'
        found[name] = compute(loss, targets, right) if targets else None
    return found


def better(name: str, new: float | None, old: float | None) -> bool:
    """Whether a value of the metric `name` is to be preferred to an earlier one.

    An undefined one (None) gives way to any later one, and is never better than a defined one.
    """
    if old is None or new is None:
        return old is None
    return new > old if METRICS[name].rises else new < old


def shown(value: float | None) -> str:
    """A metric as a person reads it."""
    return "undefined" if value is None else f"{value:.4f}"


def short(value: float) -> float:
    """The value to six digits: what a report shows, and no rounding noise."""
    return float(f"{value:.6g}")
