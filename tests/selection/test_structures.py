"""Units of a weight against plain loops over its entries."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sift_cli.errors import SiftError
from sift_cli.selection.structures import Units


def by_hand(shape: tuple[int, int], structure: str, block: int) -> list[list[tuple[int, int]]]:
    """The (output, input) pairs of each unit, units in order."""
    rows, columns = shape
    if structure == "entry":
        return [[(r, c)] for r in range(rows) for c in range(columns)]
    if structure == "row":
        return [[(r, c) for c in range(columns)] for r in range(rows)]
    if structure == "column":
        return [[(r, c) for r in range(rows)] for c in range(columns)]
    return [
        [(r * block + i, c * block + j) for i in range(block) for j in range(block)]
        for r in range(rows // block)
        for c in range(columns // block)
    ]


@given(
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    st.sampled_from(["entry", "row", "column", "block"]),
    st.integers(1, 2),
    st.booleans(),
)
def test_units_hold_what_they_say(
    shape: tuple[int, int], structure: str, block: int, transposed: bool
) -> None:
    stored = torch.rand(shape[::-1] if transposed else shape)
    units = Units.of("w", stored, structure, block, transposed)
    wanted = by_hand(shape, structure, block)
    assert units.count == len(wanted)
    assert {units.size} == {len(one) for one in wanted}
    means = units.mean(units.turned(stored)).reshape(-1)
    for number, pairs in enumerate(wanted):
        places = [c * shape[0] + r if transposed else r * shape[1] + c for r, c in pairs]
        assert sorted(units.positions(torch.tensor([number])).tolist()) == sorted(places)
        assert units.holding(torch.tensor(places)).tolist() == [number] * len(places)
        torch.testing.assert_close(means[number], stored.reshape(-1)[places].mean())


def test_what_is_no_matrix_consists_of_entries() -> None:
    units = Units.of("bias", torch.rand(5), "row", 4, transposed=False)
    assert (units.count, units.size, units.grid) == (5, 1, (1, 5))
    assert units.positions(torch.tensor([3])).tolist() == [3]


def test_a_block_that_does_not_fit_is_refused() -> None:
    said = r"a block of 9 x 9 does not fit into layer.weight of 16 x 8; take at most 8"
    with pytest.raises(SiftError, match=said):
        Units.of("layer.weight", torch.rand(16, 8), "block", 9, transposed=False)
