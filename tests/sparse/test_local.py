"""Supports in rows on several ranks, alone and in training, against one process."""

from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sift_cli.sparse import Support
from sift_cli.sparse.local import local, owned, rows_of
from tests.support.forks import on_ranks
from tests.support.sharded import Case, told, trained, work_of_rank

CASES = {  # by ranks
    2: [
        Case(),
        Case(recompute=True),
        Case(chunk=3),
        Case(chunk=3, recompute=True, frozen=True),
        Case(chunk=3, kind="llama"),
    ],
    4: [Case(), Case(replicas=2, recompute=True, chunk=3)],
}


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_dealt_as_torch_cuts(count: int, ranks: int) -> None:
    parts = [part.tolist() for part in torch.arange(count).chunk(ranks)] if count else []
    wanted = parts + [[]] * (ranks - len(parts))
    assert [list(rows) for rows in rows_of(count, ranks)] == wanted


@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 9),
    st.lists(st.integers(0, 34), unique=True),
    st.booleans(),
)
def test_the_parts_of_a_support_are_the_support(
    high: int, wide: int, ranks: int, places: list[int], whole: bool
) -> None:
    shape = (high, wide)
    places = sorted({place % (high * wide) for place in places})
    support = Support(shape) if whole else Support.of(shape, torch.tensor(places))
    weight = torch.arange(high * wide).view(shape)
    at = 0
    for rows in rows_of(high, ranks):
        run, own = owned(support, rows), local(support, rows)
        assert run.start == at
        assert len(own) == run.stop - run.start
        mine = weight[rows.start : rows.stop]
        assert torch.equal(own.gather(mine), support.gather(weight)[run])
        at = run.stop
    assert at == len(support)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Case], list[Any]]:
    """What each rank tells of each case, by the number of ranks and the case."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for ranks, cases in CASES.items():
        by_rank = on_ranks(ranks, folder, work_of_rank, cases)
        for at, case in enumerate(cases):
            found[ranks, case] = [one[at] for one in by_rank]
    return found


@cache
def alone_in(case: Case) -> dict[str, Any]:
    """The same in one process."""
    return told(*trained(case.model(), case))


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases]
)
def test_rows_on_ranks_train_as_one_process(
    ranks: int, case: Case, runs: dict[tuple[int, Case], list[Any]]
) -> None:
    base, alone = dict(case.model().named_parameters()), alone_in(case.alone)
    supports, by_rank = case.supports(case.model()), runs[ranks, case]
    main = by_rank[0]
    torch.testing.assert_close(main["masters"], alone["masters"], rtol=0, atol=1e-12)
    torch.testing.assert_close(main["gradient"], alone["gradient"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(main["changes"], alone["changes"], rtol=0, atol=1e-12)
    for one in by_rank:
        torch.testing.assert_close(one["norm"], alone["norm"], rtol=1e-12, atol=1e-12)
        assert one["left"] == []
        assert one["weights"].keys() == base.keys()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=1e-12)
            outside = torch.ones(weight.numel(), dtype=torch.bool)
            if name in supports:
                positions = supports[name].positions
                outside[slice(None) if positions is None else positions] = False
            assert torch.equal(weight.flatten()[outside], base[name].flatten()[outside])
    moved = [(alone["weights"][name] - base[name]).abs().max().item() for name in supports]
    assert min(moved) > 1e-3  # all of these train: matrices, norms and heads


def test_each_rank_holds_its_own_masters_alone(runs: dict[tuple[int, Case], list[Any]]) -> None:
    for (ranks, case), told_by in runs.items():
        alone = alone_in(case.alone)
        for other in told_by[1:]:  # what is put together is so on the main rank
            whole = [other["masters"], *other["gradient"], *sum(other["changes"].values(), ())]
            assert {one.numel() for one in whole} == {0}
        owned = [one["owned"] for one in told_by]
        assert sum(owned) == alone["owned"] * case.replicas
        assert max(owned) < 1.2 * alone["owned"] * case.replicas / ranks
