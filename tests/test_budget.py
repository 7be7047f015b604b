"""How many entries, and exactly which: against brute force."""

from fractions import Fraction
from math import ceil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from sift_cli.errors import SiftError
from sift_cli.selection.budget import Global, PerTensor, allot, largest, share
from sift_cli.sparse import Support

# few different values, so that ties are the rule
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=24)
HALVES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.lists(st.integers(0, 500), min_size=1, max_size=8).map(
    lambda sizes: {f"w{at}": size for at, size in enumerate(sizes)}
)


def best(scores: list[float], count: int) -> list[int]:
    """The `count` largest, among equals the first, by a sort."""
    order = sorted(range(len(scores)), key=lambda at: (-scores[at], at))
    return sorted(order[:count])


def positions(support: Support) -> list[int]:
    if support.positions is None:
        return list(range(support.size))
    return support.positions.tolist()


# share


@given(st.integers(1, 10**6), st.integers(1, 6), st.integers(1, 10**9))
def test_share_is_exact_for_decimal_fractions(digits: int, places: int, size: int) -> None:
    exact = Fraction(digits, 10**places)
    assume(exact <= 1)
    density = float(f"{digits}e-{places}")
    count = share(density, size)
    assert count == ceil(exact * size)
    assert 1 <= count <= size


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [
        (0.07, 100, 7),  # .07 * 100 is 7.000000000000001
        (0.01, 768 * 768, 5899),
        (0.01, 768, 8),
        (0.29, 100, 29),
        (1e-5, 3, 1),
        (1e-5, 200_000, 2),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.5, 0, 0),
    ],
)
def test_share_by_hand(density: float, size: int, count: int) -> None:
    assert share(density, size) == count


# allot


@given(SIZES, st.data())
def test_allot_sums_exactly_and_no_weight_gets_more_than_it_has(
    sizes: dict[str, int], data: st.DataObject
) -> None:
    total = sum(sizes.values())
    assume(total > 0)
    budget = data.draw(st.integers(0, total))
    counts = allot(budget, sizes)
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == budget
    for name, size in sizes.items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - Fraction(budget * size, total)) < 1


def test_allot_gives_what_is_left_to_the_largest_remainders_then_the_first() -> None:
    assert allot(10, {"a": 15, "b": 25, "c": 60}) == {"a": 2, "b": 2, "c": 6}
    assert allot(5, {"a": 19, "b": 21, "c": 60}) == {"a": 1, "b": 1, "c": 3}
    assert allot(2, {"a": 10, "b": 10, "c": 10}) == {"a": 1, "b": 1, "c": 0}
    assert allot(1, {"a": 1, "b": 2}) == {"a": 0, "b": 1}


def test_a_budget_beyond_the_weights_is_refused() -> None:
    said = "^selection.budget: 1,501 entries asked for, the targeted weights hold 1,500$"
    with pytest.raises(SiftError, match=said):
        allot(1501, {"a": 1000, "b": 500})
    assert allot(1500, {"a": 1000, "b": 500}) == {"a": 1000, "b": 500}


# largest


@given(SCORES, st.integers(0, 30), HALVES)
def test_largest_is_the_head_of_a_sort(scores: list[float], count: int, dtype: torch.dtype) -> None:
    found = largest(torch.tensor(scores, dtype=dtype), count)
    assert found.tolist() == best(scores, count)


@given(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=30), st.integers(0, 30)
)
def test_largest_of_any_numbers(scores: list[float], count: int) -> None:
    assert largest(torch.tensor(scores), count).tolist() == best(scores, count)


def test_largest_among_equals_takes_the_first() -> None:
    assert largest(torch.ones(10), 4).tolist() == [0, 1, 2, 3]
    assert largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert largest(torch.tensor([]), 0).tolist() == []


# the two scopes


def flat(weights: list[list[float]]) -> list[tuple[int, int, float]]:
    return [(owner, at, score) for owner, one in enumerate(weights) for at, score in enumerate(one)]


def global_supports(
    weights: list[list[float]], budget: int, dtype: torch.dtype = torch.float32
) -> dict[str, list[int]]:
    chooser = Global(budget)
    for owner, scores in enumerate(weights):
        chooser.add(f"w{owner}", (len(scores),), torch.tensor(scores, dtype=dtype))
    return {name: positions(support) for name, support in chooser.supports().items()}


@given(st.lists(SCORES, min_size=1, max_size=30), st.integers(1, 60), HALVES)
def test_global_is_the_head_of_a_sort_over_all_weights(
    weights: list[list[float]], budget: int, dtype: torch.dtype
) -> None:
    every = flat(weights)
    chosen = [every[at] for at in best([score for _, _, score in every], budget)]
    expected: dict[str, list[int]] = {}
    for owner, at, _ in chosen:
        expected.setdefault(f"w{owner}", []).append(at)
    found = global_supports(weights, budget, dtype)
    assert found == expected
    assert sum(map(len, found.values())) == min(budget, len(every))


@pytest.mark.parametrize("seed", range(3))
def test_global_over_many_small_weights_without_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(300, 7, generator=generator)
    order = scores.flatten().argsort(descending=True)[:50].tolist()
    expected: dict[str, list[int]] = {}
    for at in sorted(order):
        expected.setdefault(f"w{at // 7}", []).append(at % 7)
    assert global_supports(scores.tolist(), 50) == expected


def test_global_among_equals_takes_the_weight_added_first() -> None:
    tied = [[1.0] * 4] * 50
    assert global_supports(tied, 6) == {"w0": [0, 1, 2, 3], "w1": [0, 1]}
    late = [*tied, [2.0, 0.0, 2.0]]
    assert global_supports(late, 6) == {"w0": [0, 1, 2, 3], "w50": [0, 2]}


def test_global_keeps_no_more_candidates_than_thrice_the_budget() -> None:
    """It drops what can no longer win, whatever the number and order of the weights."""
    chooser = Global(10)
    for owner in range(200):
        rising = torch.arange(5.0) + owner
        chooser.add(f"w{owner}", (5,), rising)
        assert sum(len(scores) for scores, _, _ in chooser._parts) <= 30
    found = {name: positions(support) for name, support in chooser.supports().items()}
    assert sum(map(len, found.values())) == 10
    assert set(found) == {"w196", "w197", "w198", "w199"}


def test_global_without_weights_has_no_supports() -> None:
    assert Global(5).supports() == {}


def test_global_with_a_budget_beyond_the_weights_takes_every_entry() -> None:
    chooser = Global(100)
    chooser.add("a", (2, 3), torch.zeros(6))
    chooser.add("b", (4,), torch.rand(4))
    supports = chooser.supports()
    assert list(supports) == ["a", "b"]
    assert supports["a"].shape == (2, 3)
    assert all(support.positions is None for support in supports.values())
    assert [len(support) for support in supports.values()] == [6, 4]


@given(st.lists(st.tuples(SCORES, st.integers(0, 30)), min_size=1, max_size=5))
def test_per_tensor_takes_the_best_of_each(given_: list[tuple[list[float], int]]) -> None:
    counts = {f"w{at}": count for at, (_, count) in enumerate(given_)}
    chooser = PerTensor(counts)
    for at, (scores, _) in enumerate(given_):
        chooser.add(f"w{at}", (len(scores),), torch.tensor(scores))
    found = {name: positions(support) for name, support in chooser.supports().items()}
    assert found == {f"w{at}": best(scores, count) for at, (scores, count) in enumerate(given_)}


def test_per_tensor_with_a_budget_beyond_the_weight_takes_every_entry() -> None:
    chooser = PerTensor({"a": 100})
    chooser.add("a", (2, 3), torch.rand(6))
    support = chooser.supports()["a"]
    assert (support.shape, support.positions, len(support)) == ((2, 3), None, 6)


@pytest.mark.parametrize("make", [lambda: Global(3), lambda: PerTensor({"a": 3})])
def test_supports_are_positions_in_the_flattened_weight(make: object) -> None:
    chooser = make()  # type: ignore[operator]
    weight: Tensor = torch.tensor([[0.0, 5.0, 1.0], [4.0, 0.0, 3.0]])
    chooser.add("a", tuple(weight.shape), weight.reshape(-1))
    support = chooser.supports()["a"]
    assert support.gather(weight).tolist() == [5.0, 4.0, 3.0]
    assert positions(support) == [1, 3, 5]
