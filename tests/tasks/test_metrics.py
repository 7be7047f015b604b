"""Metrics against numbers worked out by hand and correlations written out."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sift_cli.errors import SiftError
from sift_cli.tasks.metrics import (
    CLASS,
    LOSS,
    METRICS,
    NUMBER,
    OF_TOKENS,
    ClassScore,
    Metric,
    better,
    compute_metrics,
    evidence_of,
    fitting,
    is_metric,
    leading,
    require_fit,
    score_tokens,
    scores_by_class,
    shown,
)
from sift_cli.tasks.own_metrics import own_metrics

# true positives 3, false positives 1, false negatives 2, true negatives 4
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
PREDICTED = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    return np.array([(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values])


def pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def one(name: str, predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> float | None:
    evidence = evidence_of(predicted, labels, np.zeros(len(labels)), names=["no", "yes", "other"])
    (found,) = compute_metrics([name], evidence | {"names": ["no", "yes", "other"]}).values()
    return found


def test_accuracy_by_hand() -> None:
    assert one("accuracy", PREDICTED, LABELS) == pytest.approx(7 / 10)


def test_f1_by_hand_is_that_of_class_1() -> None:
    assert one("f1", PREDICTED, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert one("f1", 1 - PREDICTED, 1 - LABELS) == pytest.approx(2 * 4 / (2 * 4 + 2 + 1))


def test_f1_of_class_1_among_more_classes() -> None:
    labels, predicted = np.array([0, 1, 1, 2, 2, 1]), np.array([1, 1, 2, 2, 0, 1])
    assert one("f1", predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert one("f1", np.array([0, 2]), np.array([2, 0])) is None


def test_f1_macro_by_hand_averages_over_the_classes() -> None:
    assert one("f1_macro", PREDICTED, LABELS) == pytest.approx((6 / 9 + 8 / 11) / 2)
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    assert one("f1_macro", predicted, labels) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_matthews_by_hand() -> None:
    expected = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert one("matthews", PREDICTED, LABELS) == pytest.approx(expected)
    assert one("matthews", 1 - PREDICTED, LABELS) == pytest.approx(-expected)
    assert one("matthews", LABELS, LABELS) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_correlations_written_out(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 6, 40).astype(np.float64)  # with ties
    predicted = (labels + generator.normal(0, 2, 40)).astype(np.float32).round(1)
    wide = predicted.astype(np.float64)
    found = {name: one(name, predicted, labels) for name in ("pearson", "spearman")}
    assert found["pearson"] == pytest.approx(pearson(wide, labels), abs=1e-6)
    assert found["spearman"] == pytest.approx(pearson(ranks(wide), ranks(labels)), abs=1e-9)


def test_spearman_sees_order_alone_and_pearson_the_line() -> None:
    labels = np.arange(8.0)
    curved = np.exp(labels)
    assert one("spearman", curved, labels) == pytest.approx(1)
    assert one("pearson", curved, labels) == pytest.approx(pearson(curved, labels))
    assert one("pearson", curved, labels) < 0.8
    assert one("pearson", 5 - 2 * labels, labels) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_a_constant_is_undefined(name: str) -> None:
    constant, varied = np.full(5, 2.0), np.arange(5.0)
    assert one(name, constant, varied) is None
    assert one(name, varied, constant) is None
    assert one(name, varied[:1], varied[:1]) is None


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_a_constant_prediction_scores_0_and_constant_labels_leave_it_undefined(name: str) -> None:
    assert one(name, np.zeros_like(LABELS), LABELS) == 0
    assert one(name, np.zeros_like(LABELS), np.zeros_like(LABELS)) is None
    assert shown(None) == "undefined"
    assert shown(0.25) == "0.2500"


def test_f1_without_a_true_positive_is_0_and_defined() -> None:
    assert one("f1", np.ones_like(LABELS), np.zeros_like(LABELS)) == 0


def test_metrics_come_by_name_in_the_order_asked_for() -> None:
    found = compute_metrics(["f1", "accuracy"], evidence_of(PREDICTED, LABELS, LABELS))
    assert list(found) == ["f1", "accuracy"]
    assert OF_TOKENS == (LOSS, "perplexity", "token_accuracy")
    with pytest.raises(KeyError, match="recal"):
        compute_metrics(["recal"], evidence_of(PREDICTED, LABELS, LABELS))


@pytest.mark.parametrize("kind", [CLASS, NUMBER])
def test_every_metric_of_a_kind_comes_from_the_evidence_of_that_kind(kind: str) -> None:
    classes = np.eye(2)[PREDICTED] if kind == CLASS else None
    evidence = evidence_of(PREDICTED, LABELS, LABELS * 1.0, classes, ["no", "yes"])
    found = compute_metrics(fitting(kind), evidence)
    assert list(found) == fitting(kind)
    assert all(type(value) is float for value in found.values())


def test_precision_and_recall_by_hand() -> None:
    assert one("precision", PREDICTED, LABELS) == pytest.approx(3 / 4)
    assert one("recall", PREDICTED, LABELS) == pytest.approx(3 / 5)
    assert one("precision:no", PREDICTED, LABELS) == pytest.approx(4 / 6)
    assert one("recall:no", PREDICTED, LABELS) == pytest.approx(4 / 5)
    assert one("f1:no", PREDICTED, LABELS) == pytest.approx(8 / 11)
    assert one("f1:other", PREDICTED, LABELS) is None
    assert one("balanced_accuracy", PREDICTED, LABELS) == pytest.approx((3 / 5 + 4 / 5) / 2)


def test_means_over_classes_by_hand() -> None:
    """Class 0: 1 of 1 said right, of 2; class 1: 1 of 3, of 1; class 2: never said, of 1."""
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    assert one("precision_macro", predicted, labels) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert one("recall_macro", predicted, labels) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert one("precision_weighted", predicted, labels) == pytest.approx((2 + 1 / 3 + 0) / 4)
    assert one("recall_weighted", predicted, labels) == pytest.approx((1 + 1 + 0) / 4)
    assert one("f1_weighted", predicted, labels) == pytest.approx((2 * 2 / 3 + 1 / 2 + 0) / 4)


def test_balanced_accuracy_passes_over_classes_that_no_row_is_of() -> None:
    assert one("balanced_accuracy", np.array([0, 2, 1]), np.array([0, 0, 1])) == pytest.approx(0.75)


def auc(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The share of pairs of a true and a false row in which the true one scores higher."""
    pairs = scores[truth][:, None] - scores[~truth][None]
    return float(((pairs > 0) + (pairs == 0) / 2).mean())


@pytest.mark.parametrize("classes", [2, 4])
def test_roc_auc_is_the_share_of_pairs_in_order(classes: int) -> None:
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, min(classes, 3), 60)  # of four classes, one has no rows
    shares = generator.dirichlet([1.0] * classes, 60).round(1)
    found = compute_metrics(["roc_auc"], evidence_of(labels, labels, labels, shares))["roc_auc"]
    told = [1] if classes == 2 else [0, 1, 2]
    assert found == pytest.approx(np.mean([auc(shares[:, at], labels == at) for at in told]))


def test_roc_auc_of_rows_of_one_class_is_undefined() -> None:
    labels = np.zeros(4, dtype=int)
    evidence = evidence_of(labels, labels, labels, np.full((4, 2), 0.5))
    assert compute_metrics(["roc_auc"], evidence) == {"roc_auc": None}


def test_errors_of_numbers_by_hand() -> None:
    labels, predicted = np.array([1.0, 2.0, 3.0, 6.0]), np.array([1.0, 3.0, 3.0, 4.0])
    assert one("mae", predicted, labels) == pytest.approx(3 / 4)
    assert one("rmse", predicted, labels) == pytest.approx(math.sqrt(5 / 4))
    assert one("r2", predicted, labels) == pytest.approx(1 - 5 / 14)
    assert one("r2", predicted, np.full(4, 2.0)) is None


def test_the_table_of_classes_agrees_with_the_metrics() -> None:
    names = ["no", "yes", "other"]
    found = scores_by_class(
        names, [names[code] for code in LABELS], [names[code] for code in PREDICTED]
    )
    values = {
        f"{key}:{row.name}": getattr(row, key)
        for row in found
        for key in ("precision", "recall", "f1")
    }
    for name, value in values.items():
        assert value == pytest.approx(one(name, PREDICTED, LABELS) or 0.0)
    assert [row.rows for row in found] == [5, 5, 0]
    assert found[2] == ClassScore("other", 0.0, 0.0, 0.0, 0)


OWN = """
def cost(predicted, labels):
    return -((predicted != labels) * (1 + 9 * labels)).mean()
def sure(probabilities, names):
    return probabilities.max(-1).mean() * len(names)
def odd(flavour): ...
def word(losses):
    return "many"
def none(losses):
    return float("nan")
f1 = cost
"""


def test_own_metrics(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(SiftError, match="is code; pass --allow-code to run it"):
        own_metrics([f"{path}:cost"], allow_code=False)
    names = ["accuracy", *(f"{path}:{one}" for one in ("cost", "sure", "none", "word"))]
    own = own_metrics(names, allow_code=True)
    assert list(own) == ["cost", "sure", "none", "word"]
    evidence = evidence_of(
        PREDICTED, LABELS, LABELS, np.eye(2)[PREDICTED] * 0.8 + 0.1, ["no", "yes"]
    )
    found = compute_metrics(["cost", "accuracy", "sure", "none"], evidence, own)
    assert found == pytest.approx({"cost": -2.1, "accuracy": 0.7, "sure": 1.8, "none": None})
    with pytest.raises(SiftError, match="word: ValueError: could not convert"):
        compute_metrics(["word"], evidence, own)
    numbers = evidence_of(PREDICTED * 1.0, LABELS * 1.0, LABELS)
    with pytest.raises(SiftError, match="sure asks for probabilities, and there are no classes"):
        compute_metrics(["sure"], numbers, own)
    for function, said in (
        ("odd", "asks for flavour; a metric may ask for predicted, labels"),
        ("f1", "another metric is called f1; rename it"),
        ("lost", "holds no function 'lost'"),
    ):
        with pytest.raises(SiftError, match=said):
            own_metrics([f"{path}:{function}"], allow_code=True)


def test_names_of_metrics() -> None:
    assert all(map(is_metric, ["accuracy", "f1:some class", "own.py:cost", "a/b.py:f"]))
    assert not any(map(is_metric, ["acuracy", "accuracy:yes", "f1:", "own.py", "own.py:2", "f:x"]))
    assert leading(["f1", "accuracy"], "accuracy") == ("accuracy", "f1", "loss")
    assert leading(["loss", "perplexity"], None) == ("loss", "perplexity")
    require_fit("eval.metric", ["f1:yes", "own.py:f"], CLASS, "rows hold", ["no", "yes"])
    with pytest.raises(
        SiftError, match=r"^eval\.metric: f1:maybe: no class 'maybe'; there is no, "
    ):
        require_fit("eval.metric", ["f1:maybe"], CLASS, "rows hold", ["no", "yes"])


@pytest.mark.parametrize("rises", [True, False])
def test_the_table_says_which_way_is_better(monkeypatch: pytest.MonkeyPatch, rises: bool) -> None:
    metric = Metric(lambda: None, (), rises=rises)
    monkeypatch.setitem(METRICS, "made-up", metric)
    assert better("made-up", 0.5, 0.25) is rises
    assert better("made-up", 0.25, 0.5) is not rises
    assert not better("made-up", 0.5, 0.5)
    assert better("made-up", 0.5, None)
    assert better("made-up", None, None)
    assert not better("made-up", None, 0.5)


def test_every_metric_but_losses_and_errors_rises_and_so_does_what_is_no_row() -> None:
    for name in (*METRICS, "f1:some class", "of_ones_own"):
        higher, lower = better(name, 0.75, 0.5), better(name, 0.5, 0.75)
        falls = name in (LOSS, "perplexity", "mae", "rmse")
        assert (higher, lower) == ((False, True) if falls else (True, False))


def test_the_loss_is_the_mean_of_the_rows() -> None:
    rows = np.array([0, 1, 1])
    found = compute_metrics([LOSS, "accuracy"], evidence_of(rows, rows, np.array([0.5, 1.0, 3.0])))
    assert found == {LOSS: 1.5, "accuracy": 1.0}


def test_metrics_of_tokens_by_hand_weigh_tokens_alike() -> None:
    """A row of one target and one of nine; the mean over rows would be 5.5 and .61."""
    rows = np.array([[10.0, 1, 1], [9.0, 9, 2], [0, 0, 0]], dtype=np.float32)
    found = score_tokens(OF_TOKENS, rows)
    assert found == {
        LOSS: pytest.approx(1.9),
        "perplexity": pytest.approx(math.exp(1.9)),
        "token_accuracy": pytest.approx(0.3),
    }
    assert list(score_tokens(["token_accuracy"], rows)) == ["token_accuracy"]


def test_metrics_of_no_target_are_undefined_and_so_is_a_perplexity_beyond_numbers() -> None:
    assert set(score_tokens(OF_TOKENS, np.zeros((2, 3))).values()) == {None}
    found = score_tokens(OF_TOKENS, np.array([[1000.0, 1, 0]]))
    assert found == {LOSS: 1000, "perplexity": None, "token_accuracy": 0}


def test_sums_of_many_rows_lose_no_token() -> None:
    rows = np.full((300_000, 3), (0.25, 100, 33), dtype=np.float32)
    assert score_tokens(OF_TOKENS, rows)["token_accuracy"] == 0.33
    assert score_tokens([LOSS], rows)[LOSS] == 0.0025
