"""Packed steps: which rows make which, against brute force and sums."""

from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sift_cli.recipe import TrainSection
from sift_cli.training.batches import Batches, Packs, first_fit, packs_of_epoch, steps_of

lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=200)


def brute_force(rows: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """First-fit decreasing as it is told, every pack looked at for every row."""
    packs: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        for pack in packs:
            if sum(lengths[one] for one in pack) + lengths[row] <= tokens:
                pack.append(row)
                break
        else:
            packs.append([row])
    return packs


def random_lengths(count: int, most: int = 100) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(3, most, (count,), generator=generator).tolist()
    return drawn


@given(lengths_of_rows, st.integers(1, 200))
def test_first_fit_decreasing(lengths: list[int], tokens: int) -> None:
    rows = list(range(len(lengths)))
    assert first_fit(rows, lengths, tokens) == brute_force(rows, lengths, tokens)
    assert first_fit([], lengths, tokens) == []


@given(
    lengths_of_rows,
    st.integers(1, 200),
    st.integers(1, 100) | st.none(),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_row_is_in_each_epoch_once_and_no_pack_is_too_long(
    lengths: list[int], tokens: int, most: int | None, epochs: int, seed: int
) -> None:
    plan = Packs.plan(
        lengths, tokens=tokens, epochs=epochs, max_steps=None, seed=seed, max_tokens=most
    )
    steps = list(plan)
    assert len(steps) == plan.steps == epochs * plan.steps_per_epoch
    for at in range(epochs):
        epoch = steps[at * plan.steps_per_epoch : (at + 1) * plan.steps_per_epoch]
        assert sorted(chain(*chain(*epoch))) == list(range(len(lengths)))
    for step in steps:
        assert sum(lengths[row] for row in chain(*step)) <= tokens or sum(map(len, step)) == 1
        for pack in step:
            assert pack
            assert sum(lengths[row] for row in pack) <= (most or tokens) or len(pack) == 1
    assert steps == list(plan)


@given(lengths_of_rows, st.integers(60, 200), st.integers(1, 3))
def test_going_on_from_any_step_equals_going_through(
    lengths: list[int], tokens: int, epochs: int
) -> None:
    plan = Packs.plan(lengths, tokens=tokens, epochs=epochs + 0.5, max_steps=None, seed=1)
    steps = list(plan)
    for step in {1, 2, plan.steps_per_epoch + 1, plan.steps - 1, plan.steps, plan.steps + 1}:
        if step >= 1:
            assert list(plan.since(step)) == steps[step - 1 :]


def test_going_on_packs_one_epoch_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from sift_cli.training import batches

    plan = Packs.plan(random_lengths(300), tokens=500, epochs=9, max_steps=None, seed=1)
    packed: list[int] = []

    def counted(lengths: list[int], tokens: int, seed: int) -> list[list[int]]:
        packed.append(seed)
        return packs_of_epoch(lengths, tokens, seed)

    monkeypatch.setattr(batches, "packs_of_epoch", counted)
    next(plan.since(7 * plan.steps_per_epoch + 3))
    assert packed == [1_000_003 + 7]


def test_a_plan_packs_no_epoch_that_it_will_not_reach() -> None:
    lengths = random_lengths(300)
    plan = Packs.plan(lengths, tokens=500, epochs=1000, max_steps=50, seed=1)
    assert plan.steps == 50
    assert plan.epochs == 2
    assert len(list(plan)) == 50


def test_packs_are_full_and_epochs_differ() -> None:
    lengths = random_lengths(2000)
    plan = Packs.plan(lengths, tokens=1024, epochs=3, max_steps=None, seed=1)
    assert plan.steps_per_epoch <= 1.03 * sum(lengths) / 1024 + 1
    steps = [frozenset(chain(*step)) for step in plan]
    each = plan.steps_per_epoch
    assert not set(steps[:each]) & set(steps[each : 2 * each])


def test_after_all_planned_orders_the_first_comes_again() -> None:
    lengths = random_lengths(200)
    plan = Packs.plan(lengths, tokens=300, epochs=2, max_steps=None, seed=1)
    each = plan.steps_per_epoch
    steps = list(islice(plan.endless(), 4 * each))
    assert steps[: 2 * each] == list(plan) == steps[2 * each :]
    assert steps[:each] != steps[each : 2 * each]


def test_an_epoch_that_needs_fewer_steps_has_as_many_as_the_others() -> None:
    lengths = random_lengths(120, 60)
    orders = [len(packs_of_epoch(lengths, 61, 3 * 1_000_003 + at)) for at in range(40)]
    plan = Packs.plan(lengths, tokens=61, epochs=40, max_steps=None, seed=3)
    assert min(orders) < max(orders) == plan.steps_per_epoch


def test_what_is_computed_at_once_makes_no_other_steps() -> None:
    given = {"tokens": 400, "epochs": 2.0, "max_steps": None, "seed": 5}
    lengths = random_lengths(150)
    whole = list(Packs.plan(lengths, **given))
    parts = list(Packs.plan(lengths, **given, max_tokens=128))
    assert [len(step) for step in whole] == [1] * len(whole)
    assert max(len(step) for step in parts) > 2
    assert [set(chain(*step)) for step in parts] == [set(chain(*step)) for step in whole]


def test_a_recipe_says_which_steps() -> None:
    lengths = random_lengths(100)
    padded = steps_of(TrainSection(batch_size=4), lengths)
    assert padded == Batches.of(TrainSection(batch_size=4), lengths)
    section = TrainSection(tokens=300, max_tokens=150, epochs=2, max_steps=9, seed=7)
    packed = steps_of(section, lengths)
    assert packed == Packs.plan(lengths, tokens=300, epochs=2, max_steps=9, seed=7, max_tokens=150)
    assert packed.steps == 9
    for longest in (100, 3000):
        some = steps_of(TrainSection(tokens=4096), [*random_lengths(400), longest])
        assert isinstance(some, Packs)
        assert some.max_tokens == max(1024, longest)


def test_a_model_that_takes_no_packs_makes_the_same_steps_of_padded_rows() -> None:
    lengths = random_lengths(400)
    section = TrainSection(tokens=1200, max_tokens=300, seed=7)
    packs = list(steps_of(section, lengths))
    packs_per_epoch = steps_of(section, lengths).steps_per_epoch
    padded = list(steps_of(section, lengths, packs=False))
    assert [set(chain(*step)) for step in padded] == [set(chain(*step)) for step in packs]
    for step in padded:
        for part in step:
            assert len(part) * max(lengths[row] for row in part) <= 300
    held = sum(len(part) * max(lengths[row] for row in part) for step in padded for part in step)
    steps = len(packs) / packs_per_epoch
    assert held < 1.2 * steps * sum(lengths)  # little of it is padding
    assert steps_of(TrainSection(batch_size=4), lengths, packs=False) == Batches.of(
        TrainSection(batch_size=4), lengths
    )
