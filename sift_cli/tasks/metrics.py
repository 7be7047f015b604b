"""The metrics of a task, from scikit-learn and SciPy: a table of what they are and which way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, sqrt
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.labels import codes_in

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Metrics = Mapping[str, float | None]  # by name; None where one is undefined

# What a metric may ask for, of a split of N rows. Codes of classes are the places of their names.
EVIDENCE = {
    "predicted": "what the model says of each row, [N]: codes of classes, or numbers; of several "
    "labels a row 0 or 1 for each class, [N, C]",
    "labels": "what is true of it, as `predicted`",
    "probabilities": "of each class, [N, C]; not of numbers",
    "names": "the names of the classes, in the order of their codes; not of numbers",
    "losses": "the loss of each row, [N]",
}
CLASS, SEVERAL, NUMBER = "class", "several", "number"  # what a model predicts of a row
TAG, TOKENS = "tag", "tokens"  # or of each word, or token
OWN_KINDS = (CLASS, SEVERAL, NUMBER)  # of functions in files
KINDS = {
    CLASS: "classes",
    SEVERAL: "several labels a row",
    NUMBER: "numbers to predict",
    TAG: "tags of words",
    TOKENS: "tokens of a language model",
}


@dataclass(frozen=True)
class Metric:
    """A row of the table: `of` gives the value from what its parameters name, None if undefined.

    `kinds` are those of KINDS that it is for, `rises` tells that higher is better. Beside EVIDENCE
    there are `said` and `truth`, bool [N], whether a row is said to be of one class and is; `loss`
    and `count`, the summed loss and what the mean is over; and `right`, the tokens that come out
    right.
    """

    of: Callable[..., float | None]
    kinds: tuple[str, ...]
    rises: bool = True

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """The names of `of`'s parameters."""
        return tuple(inspect.signature(self.of).parameters)


def _same(values: Array) -> bool:
    return bool(values.min() == values.max())


def _is(codes: Array, code: int) -> Array:
    """Whether rows are of a class, bool [N]: of codes [N], or of 0 and 1 for each class [N, C]."""
    of: Array = codes == code if codes.ndim == 1 else codes[:, code] == 1
    return of


def _accuracy(predicted: Array, labels: Array) -> float:
    right = (
        predicted == labels
    )  # scikit-learn would take a second to be asked before the first step
    return float((right if right.ndim == 1 else right.all(axis=1)).mean())


def _of_one_class(name: str) -> Callable[..., float | None]:
    """scikit-learn's score of that name for one class; None where it is neither there nor said."""

    def score(said: Array, truth: Array) -> float | None:
        from sklearn import metrics

        if not (said | truth).any():
            return None
        return float(getattr(metrics, f"{name}_score")(truth, said, zero_division=0))

    return score


def _mean_over_classes(name: str, average: str) -> Callable[..., float]:
    """scikit-learn's score of that name over the classes that are there or said."""

    def score(predicted: Array, labels: Array) -> float:
        from sklearn import metrics

        of = getattr(metrics, f"{name}_score")
        return float(of(labels, predicted, average=average, zero_division=0))

    return score


def _balanced_accuracy(predicted: Array, labels: Array) -> float:
    """The mean recall of the classes that are there."""
    from sklearn import metrics

    there = sorted(set(labels.tolist()))
    return float(
        metrics.recall_score(labels, predicted, labels=there, average="macro", zero_division=0)
    )


def _roc_auc(probabilities: Array, labels: Array) -> float | None:
    """Of class 1 against class 0; of more, the mean over classes, each against the rest.

    A class that all rows are of, or none, is left out.
    """
    from sklearn import metrics

    count = probabilities.shape[1]
    classes = [1] if count == 2 and labels.ndim == 1 else range(count)
    truths = {code: _is(labels, code) for code in classes}
    found = [
        metrics.roc_auc_score(truth, probabilities[:, code])
        for code, truth in truths.items()
        if not _same(truth)
    ]
    return float(sum(found) / len(found)) if found else None


def _matthews(predicted: Array, labels: Array) -> float | None:
    from sklearn import metrics

    if _same(labels):
        return None
    return 0.0 if _same(predicted) else float(metrics.matthews_corrcoef(labels, predicted))


def _pearson(predicted: Array, labels: Array) -> float | None:
    from scipy import stats

    if _same(labels) or _same(predicted):
        return None
    return float(stats.pearsonr(predicted, labels).statistic)


def _spearman(predicted: Array, labels: Array) -> float | None:
    from scipy import stats

    if _same(labels) or _same(predicted):
        return None
    return float(stats.spearmanr(predicted, labels).statistic)


def _mae(predicted: Array, labels: Array) -> float:
    from sklearn import metrics

    return float(metrics.mean_absolute_error(labels, predicted))


def _rmse(predicted: Array, labels: Array) -> float:
    from sklearn import metrics

    return sqrt(metrics.mean_squared_error(labels, predicted))


def _r2(predicted: Array, labels: Array) -> float | None:
    from sklearn import metrics

    return None if _same(labels) else float(metrics.r2_score(labels, predicted))


def _loss(loss: float, count: float) -> float | None:
    return loss / count if count else None


def _perplexity(loss: float, count: float) -> float | None:
    try:
        return exp(loss / count) if count else None
    except OverflowError:
        return None


def _token_accuracy(right: float, count: float) -> float | None:
    return right / count if count else None


LOSS = "loss"
ONE_CLASS = ("precision", "recall", "f1")  # of class 1, or as NAME:CLASS of another
METRICS = {
    "accuracy": Metric(_accuracy, (CLASS,)),
    "balanced_accuracy": Metric(_balanced_accuracy, (CLASS,)),
    **{name: Metric(_of_one_class(name), (CLASS,)) for name in ONE_CLASS},
    **{
        f"{name}_{average}": Metric(_mean_over_classes(name, average), (CLASS, SEVERAL, TAG))
        for name in ONE_CLASS
        for average in ("macro", "weighted")
    },
    **{
        f"{name}_micro": Metric(_mean_over_classes(name, "micro"), (SEVERAL,)) for name in ONE_CLASS
    },
    "subset_accuracy": Metric(_accuracy, (SEVERAL,)),
    "roc_auc": Metric(_roc_auc, (CLASS, SEVERAL)),
    "matthews": Metric(_matthews, (CLASS,)),
    "pearson": Metric(_pearson, (NUMBER,)),
    "spearman": Metric(_spearman, (NUMBER,)),
    "mae": Metric(_mae, (NUMBER,), rises=False),
    "rmse": Metric(_rmse, (NUMBER,), rises=False),
    "r2": Metric(_r2, (NUMBER,)),
    LOSS: Metric(_loss, tuple(KINDS), rises=False),
    "perplexity": Metric(_perplexity, (TOKENS,), rises=False),
    "token_accuracy": Metric(_token_accuracy, (TAG, TOKENS)),
    "entity_f1": Metric(lambda entity_f1: entity_f1, (TAG,)),
    "entity_precision": Metric(lambda entity_precision: entity_precision, (TAG,)),
    "entity_recall": Metric(lambda entity_recall: entity_recall, (TAG,)),
}
OF_TOKENS = tuple(name for name, metric in METRICS.items() if TOKENS in metric.kinds)


def fitting(kind: str) -> list[str]:
    """The names of the metrics of such a kind."""
    return [name for name, metric in METRICS.items() if kind in metric.kinds]


def only_for(kind: str) -> list[str]:
    """The names of the metrics of such a kind and no other."""
    return [name for name, metric in METRICS.items() if metric.kinds == (kind,)]


def is_code(name: str) -> bool:
    """Whether a metric is named as FILE.py:FUNCTION."""
    file, _, function = name.rpartition(":")
    return file.endswith(".py") and function.isidentifier()


def is_metric(name: str) -> bool:
    """Whether it may be a metric's name: of the table, of one class, or code."""
    base, colon, label = name.partition(":")
    return name in METRICS or is_code(name) or (base in ONE_CLASS and bool(colon and label))


def called(name: str) -> str:
    """What results call a metric: its name, or that of the function."""
    return name.rpartition(":")[2] if is_code(name) else name


def require_fit(
    key: str, names: Sequence[str], kind: str, what: str, classes: Sequence[str] = ()
) -> None:
    """Raises SiftError where a metric that `key` names is of another kind, or of no class there is.

    `what` is the beginning of what an error says of the rows, such as "they hold".
    """
    for name in names:
        base, colon, label = name.partition(":")
        kinds = OWN_KINDS if is_code(name) else METRICS[base].kinds
        if base in ONE_CLASS and colon:
            kinds = (CLASS, SEVERAL)
        if kind not in kinds:
            of = " or ".join(KINDS[one] for one in kinds)
            raise SiftError(
                f"{key}: {name} is a metric of {of}, and {what} {KINDS[kind]}; use "
                + ", ".join(fitting(kind))
            )
        if base in ONE_CLASS and colon and label not in classes:
            raise SiftError(f"{key}: {name}: no class {label!r}; there is {', '.join(classes)}")


def compute_metrics(
    names: Sequence[str], evidence: Mapping[str, Any], own: Mapping[str, Metric] | None = None
) -> dict[str, float | None]:
    """Each named metric, of METRICS or of `own`, from the evidence; see `evidence_of`.

    `f1` is that of class 1, as GLUE defines it, unless another is `positive`, and `f1:NAME` of the
    class of that name; `f1_macro` averages over classes. None stands for what is undefined: a
    correlation where predictions or labels are all the same, `matthews` where all labels are, `f1`
    where the class is neither there nor predicted. By convention `matthews` is 0 where all
    predictions are the same and the labels are not.
    """
    found = {}
    for name in names:
        base, colon, label = name.partition(":")
        given = dict(evidence)
        if base in ONE_CLASS:
            code = evidence.get("positive", 1)
            if colon:
                (code,) = codes_in([label], evidence["names"], name)
            given |= {"said": _is(given["predicted"], code), "truth": _is(given["labels"], code)}
        metric = own[name] if own and name in own else METRICS[base]
        if lacking := [key for key in metric.needs if key not in given]:
            raise SiftError(f"data.metrics: {name} asks for {lacking[0]}, and there are no classes")
        found[name] = metric.of(**{key: given[key] for key in metric.needs})
    return found


def evidence_of(
    predicted: Array,
    labels: Array,
    losses: Array,
    probabilities: Array | None = None,
    names: Sequence[str] = (),
    positive: int = 1,
) -> dict[str, Any]:
    """What the metrics of a split with a label a row may ask for; shapes as in EVIDENCE.

    `positive` is the code of the class that metrics of one class are of.
    """
    classes = {} if probabilities is None else {"probabilities": probabilities, "names": names}
    rows = {"predicted": predicted, "labels": labels, "losses": losses, **classes}
    return {**rows, "positive": positive, LOSS: float(losses.sum()), "count": len(labels)}


def score_tokens(names: Sequence[str], rows: Array) -> dict[str, float | None]:
    """Each named metric of OF_TOKENS, from what `token_outputs` gives of each row, [N, 3].

    Tokens count alike, whatever rows they stand in: `loss` is the mean over all targets, and
    `perplexity` its exponential, None where no number holds it. All are None without targets.
    """
    loss, targets, right = rows.astype("float64").sum(0).tolist()
    return compute_metrics(names, {LOSS: loss, "count": targets, "right": right})


def leading(names: Sequence[str], first: str | None) -> tuple[str, ...]:
    """The names, each once, with `first` before all others, and the loss among them."""
    return tuple(dict.fromkeys([*([first] if first else []), *names, LOSS]))


def rises(name: str) -> bool:
    """Whether higher is better; it is for all that is no row of the table."""
    return name not in METRICS or METRICS[name].rises


def better(name: str, new: float | None, old: float | None) -> bool:
    """Whether a value of the metric `name` is to be preferred to an earlier one.

    An undefined one (None) gives way to any later one, and is never better than a defined one.
    """
    if old is None or new is None:
        return old is None
    return new > old if rises(name) else new < old


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from all others; `rows` counts those that are of it."""

    name: str
    precision: float
    recall: float
    f1: float
    rows: int


def scores_by_class(
    names: Sequence[str], labels: Sequence[Any], predicted: Sequence[Any]
) -> list[ClassScore]:
    """The score of each class, from the names of each row's label and prediction ([N]).

    Where a row may have several, it has a list of names.
    """
    import numpy as np
    from sklearn import metrics

    def held(rows: Sequence[Any]) -> Array:
        sets = [{row} if isinstance(row, str) else set(row) for row in rows]
        return np.array([[int(name in one) for name in names] for one in sets])

    columns = metrics.precision_recall_fscore_support(
        held(labels), held(predicted), average=None, zero_division=0
    )
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [ClassScore(name, *one) for name, one in zip(names, values, strict=True)]


LARGE = 1e5  # from which on a metric, such as the perplexity of a broken model, is in powers of ten


def shown(value: float | None) -> str:
    """A metric as a person reads it."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if abs(value) < LARGE else f"{value:.3e}"


def short(value: float) -> float:
    """The value to six digits: what a report shows, and no rounding noise."""
    return float(f"{value:.6g}")
