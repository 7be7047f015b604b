"""Metrics against numbers worked out by hand and correlations written out."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sift_cli.tasks.metrics import (
    CLASSIFICATION,
    LOSS,
    METRICS,
    OF_TOKENS,
    REGRESSION,
    Metric,
    better,
    compute_metrics,
    score_tokens,
    shown,
)

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
    (found,) = compute_metrics([name], predicted, labels).values()
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
    found = compute_metrics(["pearson", "spearman"], predicted, labels)
    assert found["pearson"] == pytest.approx(pearson(wide, labels), abs=1e-6)
    assert found["spearman"] == pytest.approx(pearson(ranks(wide), ranks(labels)), abs=1e-9)


def test_spearman_sees_order_alone_and_pearson_the_line() -> None:
    labels = np.arange(8.0)
    curved = np.exp(labels)
    assert one("spearman", curved, labels) == pytest.approx(1)
    assert one("pearson", curved, labels) == pytest.approx(pearson(curved, labels))
    assert one("pearson", curved, labels) < 0.8
    assert one("pearson", 5 - 2 * labels, labels) == pytest.approx(-1)


@pytest.mark.parametrize("name", REGRESSION)
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
    found = compute_metrics(["f1", "accuracy"], PREDICTED, LABELS)
    assert list(found) == ["f1", "accuracy"]
    assert all(type(value) is float for value in found.values())
    assert (*CLASSIFICATION, *REGRESSION, *OF_TOKENS) == tuple(METRICS)
    assert OF_TOKENS == (LOSS, "perplexity", "token_accuracy")
    with pytest.raises(KeyError, match="recall"):
        compute_metrics(["recall"], PREDICTED, LABELS)


def test_every_metric_is_known_to_both_lists() -> None:
    assert list(compute_metrics(CLASSIFICATION, PREDICTED, LABELS)) == list(CLASSIFICATION)
    assert list(compute_metrics(REGRESSION, PREDICTED * 1.0, LABELS * 1.0)) == list(REGRESSION)


@pytest.mark.parametrize("rises", [True, False])
def test_the_table_says_which_way_is_better(monkeypatch: pytest.MonkeyPatch, rises: bool) -> None:
    metric = Metric(lambda predicted, labels: None, classes=True, rises=rises)
    monkeypatch.setitem(METRICS, "made-up", metric)
    assert better("made-up", 0.5, 0.25) is rises
    assert better("made-up", 0.25, 0.5) is not rises
    assert not better("made-up", 0.5, 0.5)
    assert better("made-up", 0.5, None)
    assert better("made-up", None, None)
    assert not better("made-up", None, 0.5)


def test_every_metric_but_loss_and_perplexity_rises() -> None:
    for name in METRICS:
        higher, lower = better(name, 0.75, 0.5), better(name, 0.5, 0.75)
        falls = name in (LOSS, "perplexity")
        assert (higher, lower) == ((False, True) if falls else (True, False))


def test_the_loss_is_the_mean_of_the_rows() -> None:
    found = compute_metrics([LOSS, "accuracy"], PREDICTED, LABELS, np.array([0.5, 1.0, 3.0]))
    assert found == {LOSS: 1.5, "accuracy": 0.7}


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
