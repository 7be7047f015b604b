"""How many entries, and exactly which: against brute force."""

from fractions import Fraction
from math import ceil
from random import Random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from sift_cli.errors import SiftError
from sift_cli.selection.budget import Global, PerWeight, allot, largest, pooled, share
from sift_cli.selection.structures import Units
from sift_cli.sparse.local import rows_of

# few different values, so that ties are the rule
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=24)
HALVES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.lists(st.integers(0, 500), min_size=1, max_size=8).map(
    lambda sizes: {f"w{at}": size for at, size in enumerate(sizes)}
)


def entries(sizes: dict[str, int]) -> dict[str, Units]:
    return {name: Units((size,)) for name, size in sizes.items()}


def best(scores: list[float], count: int) -> list[int]:
    """The `count` largest, among equals the first, by a sort."""
    order = sorted(range(len(scores)), key=lambda at: (-scores[at], at))
    return sorted(order[:count])


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
    budget = data.draw(st.integers(1, total))
    counts = allot(budget, entries(sizes))
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == budget
    for name, size in sizes.items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - Fraction(budget * size, total)) < 1


def test_allot_gives_what_is_left_to_the_largest_remainders_then_the_first() -> None:
    assert allot(10, entries({"a": 15, "b": 25, "c": 60})) == {"a": 2, "b": 2, "c": 6}
    assert allot(5, entries({"a": 19, "b": 21, "c": 60})) == {"a": 1, "b": 1, "c": 3}
    assert allot(2, entries({"a": 10, "b": 10, "c": 10})) == {"a": 1, "b": 1, "c": 0}
    assert allot(1, entries({"a": 1, "b": 2})) == {"a": 0, "b": 1}


@given(SIZES, st.data())
def test_allot_follows_densities(sizes: dict[str, int], data: st.DataObject) -> None:
    shares = {name: data.draw(st.sampled_from([0.01, 0.1, 0.35, 1.0])) for name in sizes}
    exact = {name: Fraction(str(shares[name])) * size for name, size in sizes.items()}
    assume(sum(exact.values()) >= 1)
    budget = data.draw(st.integers(1, int(sum(exact.values()))))
    counts = allot(budget, entries(sizes), shares)
    assert sum(counts.values()) == budget
    for name, size in sizes.items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - budget * exact[name] / sum(exact.values())) < 1
    assert allot(budget, entries(sizes), dict.fromkeys(sizes, 0.5)) == allot(budget, entries(sizes))


def test_a_budget_beyond_the_weights_is_refused() -> None:
    said = "^selection.budget: 1,501 entries asked for, the targeted weights hold 1,500$"
    with pytest.raises(SiftError, match=said):
        allot(1501, entries({"a": 1000, "b": 500}))
    assert allot(1500, entries({"a": 1000, "b": 500})) == {"a": 1000, "b": 500}


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


@given(st.data())
def test_allot_in_whole_units_fills_the_budget_as_far_as_they_go(data: st.DataObject) -> None:
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    cut = st.sampled_from(["entry", "row", "column", "block"])
    units = {
        f"w{at}": Units(shape, structure, 1 if structure != "block" else min(2, *shape))
        for at, (shape, structure) in enumerate(
            data.draw(st.lists(st.tuples(shapes, cut), min_size=1, max_size=5))
        )
    }
    total = sum(one.count * one.size for one in units.values())
    budget = data.draw(st.integers(1, total))
    assume(any(one.size <= budget for one in units.values()))
    try:
        counts = allot(budget, units)
    except SiftError:
        assume(False)
    spent = sum(counts[name] * one.size for name, one in units.items())
    assert budget - max(one.size for one in units.values()) * len(units) < spent <= budget
    for name, one in units.items():
        assert 0 <= counts[name] <= one.count
        ideal = Fraction(budget * one.count, total)
        assert abs(counts[name] - ideal) <= 1


def test_a_budget_below_any_unit_is_refused() -> None:
    with pytest.raises(SiftError, match="3 entries are less than any whole unit"):
        allot(3, {"a": Units((5, 8), "row")})


# the scopes


def flat(weights: list[list[float]]) -> list[tuple[int, int, float]]:
    return [(owner, at, score) for owner, one in enumerate(weights) for at, score in enumerate(one)]


def winners(chooser: Global | PerWeight) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in chooser.chosen().items()}


def global_choice(
    weights: list[list[float]],
    budget: int,
    dtype: torch.dtype = torch.float32,
    order: list[int] | None = None,
) -> dict[str, list[int]]:
    chooser = Global(budget, [f"w{owner}" for owner in range(len(weights))])
    for owner in order or range(len(weights)):
        chooser.add(f"w{owner}", torch.tensor(weights[owner], dtype=dtype))
    return winners(chooser)


@given(st.lists(SCORES, min_size=1, max_size=30), st.integers(1, 60), HALVES, st.randoms())
def test_global_is_the_head_of_a_sort_over_all_weights_in_any_order(
    weights: list[list[float]], budget: int, dtype: torch.dtype, random: Random
) -> None:
    every = flat(weights)
    chosen = [every[at] for at in best([score for _, _, score in every], budget)]
    expected: dict[str, list[int]] = {}
    for owner, at, _ in chosen:
        expected.setdefault(f"w{owner}", []).append(at)
    order = list(range(len(weights)))
    random.shuffle(order)
    found = global_choice(weights, budget, dtype, order)
    assert found == expected
    assert sum(map(len, found.values())) == min(budget, len(every))


@given(
    st.lists(st.tuples(SCORES, st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(1, 60),
    st.randoms(),
)
def test_global_over_units_of_many_sizes_is_the_longest_head_that_fits(
    weights: list[tuple[list[float], int]], budget: int, random: Random
) -> None:
    every = flat([scores for scores, _ in weights])
    ranked = sorted(range(len(every)), key=lambda at: (-every[at][2], at))
    expected: dict[str, list[int]] = {}
    spent = 0
    for at in ranked:
        owner, unit, _ = every[at]
        scores, size = weights[owner]
        if unit not in best(scores, budget // size):  # more of one weight than could ever fit
            continue
        spent += weights[owner][1]
        if spent > budget:
            break
        expected.setdefault(f"w{owner}", []).append(unit)
    chooser = Global(budget, [f"w{owner}" for owner in range(len(weights))])
    order = list(range(len(weights)))
    random.shuffle(order)
    for owner in order:
        scores, size = weights[owner]
        chooser.add(f"w{owner}", torch.tensor(scores), size)
    assert winners(chooser) == {
        name: sorted(units)
        for name, units in sorted(expected.items(), key=lambda item: int(item[0][1:]))
    }


@pytest.mark.parametrize("seed", range(3))
def test_global_over_many_small_weights_without_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(300, 7, generator=generator)
    order = scores.flatten().argsort(descending=True)[:50].tolist()
    expected: dict[str, list[int]] = {}
    for at in sorted(order):
        expected.setdefault(f"w{at // 7}", []).append(at % 7)
    assert global_choice(scores.tolist(), 50) == expected


def test_global_among_equals_takes_the_weight_that_is_named_first() -> None:
    tied = [[1.0] * 4] * 50
    assert global_choice(tied, 6) == {"w0": [0, 1, 2, 3], "w1": [0, 1]}
    assert global_choice(tied, 6, order=list(range(49, -1, -1))) == global_choice(tied, 6)
    late = [*tied, [2.0, 0.0, 2.0]]
    assert global_choice(late, 6) == {"w0": [0, 1, 2, 3], "w50": [0, 2]}


def test_global_keeps_no_more_candidates_than_thrice_the_budget() -> None:
    """It drops what can no longer win, whatever the number and order of the weights."""
    chooser = Global(10, [f"w{owner}" for owner in range(200)])
    for owner in range(200):
        chooser.add(f"w{owner}", torch.arange(5.0) + owner)
        assert sum(len(scores) for scores, _ in chooser._parts.values()) <= 30
    found = winners(chooser)
    assert sum(map(len, found.values())) == 10
    assert set(found) == {"w196", "w197", "w198", "w199"}


def test_global_without_weights_chooses_nothing() -> None:
    assert Global(5, []).chosen() == {}


def test_global_with_a_budget_beyond_the_weights_takes_every_unit() -> None:
    chooser = Global(100, ["a", "b"])
    chooser.add("a", torch.zeros(6))
    chooser.add("b", torch.rand(4))
    assert winners(chooser) == {"a": list(range(6)), "b": list(range(4))}


@given(st.lists(st.tuples(SCORES, st.integers(0, 30)), min_size=1, max_size=5))
def test_per_tensor_takes_the_best_of_each(given_: list[tuple[list[float], int]]) -> None:
    counts = {f"w{at}": count for at, (_, count) in enumerate(given_)}
    chooser = PerWeight(counts)
    for at, (scores, _) in enumerate(given_):
        chooser.add(f"w{at}", torch.tensor(scores))
    assert winners(chooser) == {
        f"w{at}": best(scores, count) for at, (scores, count) in enumerate(given_)
    }


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_per_neuron_gives_each_neuron_its_best_and_meets_the_count(
    neurons: int, across: int, data: st.DataObject
) -> None:
    value = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    row = st.lists(value, min_size=across, max_size=across)
    scores = data.draw(st.lists(row, min_size=neurons, max_size=neurons))
    count = data.draw(st.integers(1, neurons * across))
    chooser = PerWeight({"w": count}, {"w": neurons})
    chooser.add("w", torch.tensor(scores))
    each, more = divmod(count, neurons)
    ranked = [sorted(range(across), key=lambda at, one=one: (-one[at], at)) for one in scores]
    expected = [n * across + at for n, order in enumerate(ranked) for at in order[:each]]
    if more:
        nexts = [scores[n][ranked[n][each]] for n in range(neurons)]
        expected += [n * across + ranked[n][each] for n in best(nexts, more)]
    assert winners(chooser) == {"w": sorted(expected)}


# pooled


@st.composite
def grids(draw: st.DrawFn) -> torch.Tensor:
    """Scores of the units of a weight, [down, across]."""
    across = draw(st.integers(1, 3))
    row = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=across, max_size=across)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=6)))


@given(
    st.lists(grids(), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(["tensor", "neuron", "global"]),
    st.data(),
)
def test_the_best_of_every_ranks_best_are_the_best(
    weights: list[torch.Tensor], ranks: int, scope: str, data: st.DataObject
) -> None:
    """Each weight's rows lie one after the other on the ranks."""
    named = {f"w{at}": scores for at, scores in enumerate(weights)}
    names, sizes = [*named], {name: data.draw(st.integers(1, 3)) for name in named}
    total = sum(scores.numel() * sizes[name] for name, scores in named.items())
    budget = data.draw(st.integers(1, total))
    counts = {name: data.draw(st.integers(0, one.numel())) for name, one in named.items()}
    neurons = {name: len(scores) for name, scores in named.items()} if scope == "neuron" else None

    def chooser(partial: bool) -> Global | PerWeight:
        if scope == "global":
            return Global(budget, names)
        return PerWeight(counts, neurons, partial)

    here, alone = [chooser(partial=True) for _ in range(ranks)], chooser(partial=False)
    before: list[dict[str, int]] = [{} for _ in range(ranks)]
    for name, scores in reversed(named.items()):
        size, across = sizes[name], scores.shape[1]
        alone.add(name, scores, size)
        for rank, rows in enumerate(rows_of(len(scores), ranks)):
            here[rank].add(name, scores[rows.start : rows.stop], size)
            before[rank][name] = rows.start * across * size
    sent = [
        [part for name, (scores, units) in sorted(one.best().items()) for part in (units, scores)]
        for one in here
    ]
    # What each sends in its turn: the numbers of units in the whole weight, then their scores.
    for name, at in zip(sorted(names), range(0, 2 * len(names), 2), strict=True):
        for rank in range(ranks):
            sent[rank][at] = sent[rank][at] + before[rank][name] // sizes[name]
    turns = iter([torch.cat(parts) for parts in zip(*sent, strict=True)])
    found = pooled(here[0], chooser(False), sizes, lambda _: next(turns), before[0])
    wanted = alone.chosen()
    assert {n: u.tolist() for n, u in found.items() if len(u)} == {
        n: u.tolist() for n, u in wanted.items() if len(u)
    }
