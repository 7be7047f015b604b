"""Columns against a dictionary: what each entry has, by its weight and its position there."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from sift_cli.sparse import SparseAdamW, Support, attach, optimizer
from sift_cli.sparse.optimizer import COLUMNS, HISTORIES
from sift_cli.sparse.segments import Segment

SHAPES = {"weight": (3, 4), "bias": (3,)}
Entry = tuple[str, int]
Numbers = dict[str, float]


def layer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3).to(torch.bfloat16)


def begun(name: str, position: int) -> float:
    """What an entry's step scale begins with."""
    return {"weight": 1.5, "bias": -0.25}[name] + position


def scale(segment: Segment) -> Tensor:
    positions = segment.support.positions
    if positions is None:
        positions = torch.arange(len(segment.support))
    return positions + begun(segment.name, 0)


SCALED = {**COLUMNS, "scale": scale}  # a column that no code knows of


def positions_of(support: Support) -> list[int]:
    return list(range(support.size)) if support.positions is None else support.positions.tolist()


class ByEntry:
    """The reference: numbers, weights and parked numbers, each a dictionary."""

    def __init__(self, model: nn.Module, history: str, revert: bool) -> None:
        self.history, self.revert = history, revert
        self.weights: dict[Entry, float] = {
            (name, position): value
            for name, weight in model.named_parameters()
            for position, value in enumerate(weight.detach().float().flatten().tolist())
        }
        self.base = dict(self.weights)
        self.live: dict[Entry, Numbers] = {}
        self.parked: dict[Entry, Numbers] = {}

    def begin(self, entry: Entry) -> Numbers:
        fresh = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "ages": 0.0, "scale": begun(*entry)}
        return {**fresh, "masters": self.weights[entry]}

    def take(self, supports: dict[str, Support]) -> None:
        new = {(name, at) for name, support in supports.items() for at in positions_of(support)}
        for entry in set(self.live) - new:
            if self.history == "park":
                self.parked[entry] = self.live[entry]
            if self.revert:
                self.weights[entry] = self.base[entry]
        live = {}
        for entry in new:
            live[entry] = self.begin(entry)
            if entry in self.live:
                kept = self.live[entry]
                reset = self.history == "reset" and supports[entry[0]].positions is not None
                live[entry] = live[entry] | {"masters": kept["masters"]} if reset else kept
            elif entry in self.parked:
                back = self.parked.pop(entry)
                live[entry] = back | ({"masters": self.weights[entry]} if self.revert else {})
        self.live = live


def write(adam: SparseAdamW, reference: ByEntry, generator: torch.Generator) -> None:
    """Another number for everything, as steps would give."""
    flat = adam.parameters.flat.data
    columns = {name: adam.columns.named[name] for name in SCALED} | {"masters": flat}
    for name, column in columns.items():
        column.copy_(torch.rand(len(flat), generator=generator))
        for segment in adam.parameters:
            for at, value in zip(
                positions_of(segment.support), column[segment.span].tolist(), strict=True
            ):
                reference.live[segment.name, at][name] = value
    adam.parameters.write_back()
    for entry, numbers in reference.live.items():
        reference.weights[entry] = float(torch.tensor(numbers["masters"]).to(torch.bfloat16))


def numbers_of(adam: SparseAdamW) -> dict[Entry, Numbers]:
    columns = {name: adam.columns.named[name] for name in SCALED}
    columns["masters"] = adam.parameters.flat.detach()
    return {
        (segment.name, at): {
            name: float(column[segment.start + place]) for name, column in columns.items()
        }
        for segment in adam.parameters
        for place, at in enumerate(positions_of(segment.support))
    }


def weights_of(model: nn.Module) -> dict[Entry, float]:
    return ByEntry(model, "keep", False).weights


@st.composite
def supports(draw: st.DrawFn) -> dict[str, Support]:
    """Some entries or all of the weight, and of the bias some, all or none."""
    chosen = {}
    for name, shape in SHAPES.items():
        size = Support(shape).size
        least = 1 if name == "weight" else 0
        places = draw(st.sets(st.integers(0, size - 1), min_size=least) | st.just(range(size)))
        chosen[name] = Support.of(shape, torch.tensor(sorted(places), dtype=torch.int64))
    return chosen


@given(
    history=st.sampled_from(HISTORIES),
    revert=st.booleans(),
    moves=st.lists(st.tuples(supports(), st.booleans()), min_size=2, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_an_added_column_follows_the_entries_like_the_others(
    history: str, revert: bool, moves: list[tuple[dict[str, Support], bool]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = layer(seed)
    reference = ByEntry(model, history, revert)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "COLUMNS", SCALED)
        adam = SparseAdamW(attach(model, moves[0][0]), lr=0.1, history=history)
        reference.take(moves[0][0])
        for chosen, saves in moves:
            adam.move(chosen, revert)
            reference.take(chosen)
            assert numbers_of(adam) == reference.live
            assert weights_of(model) == reference.weights
            write(adam, reference, generator)
            if saves:
                state = {key: value.clone() for key, value in adam.state().items()}
                adam = SparseAdamW(adam.parameters, lr=0.1, history=history)
                adam.load_state(state)
                assert numbers_of(adam) == reference.live


def test_an_added_column_is_there_under_a_fixed_support_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "COLUMNS", {**COLUMNS, "scale": 0.5})
    adam = SparseAdamW(attach(layer(), {"bias": Support((3,))}), lr=0.1)
    adam.step()
    assert adam.ages is None
    assert adam.state()["scale"].tolist() == [0.5] * 3
    assert set(adam.state()) == {"step", "exp_avg", "exp_avg_sq", "scale"}


# As every checkpoint so far holds them: entries 1 and 5 of twelve train, 0 and 7 are parked.
STATE = {
    "step": torch.tensor(3.0),
    "exp_avg": torch.tensor([0.1, 0.5]),
    "exp_avg_sq": torch.tensor([0.01, 0.05]),
    "ages": torch.tensor([4.0, 2.0]),
    "parked/weight/positions": torch.tensor([0, 7], dtype=torch.int32),
    "parked/weight/columns": torch.tensor([[0.2, 0.7], [0.02, 0.07], [1.0, 5.0], [9.0, 8.0]]),
}


def loaded(state: dict[str, Tensor]) -> SparseAdamW:
    parameters = attach(layer(), {"weight": Support.of((3, 4), torch.tensor([1, 5]))})
    parameters.flat.data.copy_(torch.tensor([3.0, 4.0]))
    adam = SparseAdamW(parameters, lr=0.1, history="park")
    adam.load_state(copy.deepcopy(state))
    return adam


def test_the_layout_of_checkpoints_is_read_and_written() -> None:
    again = loaded(STATE).state()
    assert list(again) == list(STATE)
    assert all(torch.equal(again[key], value) for key, value in STATE.items())
    adam = loaded(STATE)
    adam.move({"weight": Support.of((3, 4), torch.tensor([5, 7, 9]))})
    state = adam.state()
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.5, 0.7, 0.0]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([0.05, 0.07, 0.0]))
    assert state["ages"].tolist() == [2, 5, 0]
    assert adam.parameters.flat[:2].tolist() == [4, 8]
    assert state["parked/weight/positions"].tolist() == [0, 1]
    wanted = torch.tensor([[0.2, 0.1], [0.02, 0.01], [1.0, 4.0], [9.0, 3.0]])
    torch.testing.assert_close(state["parked/weight/columns"], wanted)


def test_a_state_of_other_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="exp_avg_sq"):
        loaded({key: value for key, value in STATE.items() if key != "exp_avg_sq"})
    monkeypatch.setattr(optimizer, "COLUMNS", {**COLUMNS, "scale": 0.5})
    with pytest.raises(KeyError, match="scale"):
        loaded(STATE)
    with pytest.raises(ValueError, match="parked/weight: 4 rows where 5 are kept"):
        loaded({**STATE, "scale": torch.ones(2)})
