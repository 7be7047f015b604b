"""Several deltas as one: rules against brute force, exactness, heads, what is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import Tensor

from sift_cli.convert import compose as composing
from sift_cli.convert.compose import RULES, Mix, compose_
from sift_cli.convert.merge import merge
from sift_cli.delta import Delta, load_delta, save_delta
from sift_cli.delta.file import WeightDelta, weight_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.recipe import load_recipe
from sift_cli.runs.tuned import load_tuned
from sift_cli.sparse import Support
from sift_cli.training import train
from tests.support.command import sift
from tests.support.models import save_base

SHAPE = (6, 7)


def make(base: Tensor, seed: int, count: int) -> WeightDelta:
    """Random changes at `count` random entries."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(base.numel(), generator=generator)[:count]
    support = Support.of(base.shape, chosen)
    before = support.gather(base)
    after = before + torch.randn(count, generator=generator).to(base.dtype)
    whole = base.clone()
    support.scatter_(whole, after)
    return weight_delta(support, before, after, fingerprint(base), whole)


def dense_changes(base: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    """Change of every entry by every delta, [deltas, size] in fp64; 0 where it changes none."""
    rows = []
    for delta in deltas:
        weight = base.clone()
        delta.toggle_(weight)
        rows.append((weight.double() - base.double()).flatten())
    return torch.stack(rows)


def brute_ties(changes: Tensor, shares: Tensor) -> Tensor:
    """Entry by entry, as the paper says it."""
    out = torch.zeros(changes.shape[1], dtype=torch.float64)
    for at in range(changes.shape[1]):
        pulls = [float(w * c) for w, c in zip(shares, changes[:, at], strict=True)]
        sign = 1 if sum(pulls) > 0 else -1 if sum(pulls) < 0 else 0
        side = [(p, abs(float(w))) for p, w in zip(pulls, shares, strict=True) if p * sign > 0]
        if side:
            out[at] = sum(p for p, _ in side) / sum(w for _, w in side)
    return out


deltas_of = st.lists(st.integers(1, 42), min_size=1, max_size=5)
shares_of = st.floats(-2, 2).filter(lambda value: abs(value) > 0.01)


@settings(deadline=None)
@given(
    counts=deltas_of,
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    rule=st.sampled_from(["sum", "ties"]),
    block=st.sampled_from([1, 5, 1000]),
)
def test_rules_against_brute_force(
    counts: list[int], data: st.DataObject, dtype: torch.dtype, rule: str, block: int
) -> None:
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)).to(dtype)
    deltas = [make(base, seed, count) for seed, count in enumerate(counts)]
    shares = tuple(data.draw(shares_of) for _ in counts)
    scale = data.draw(shares_of)
    weight = base.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composing, "ENTRIES_AT_ONCE", block)
        mix = Mix(shares, rule, scale)
        change, overlap = compose_("w", weight, dict(enumerate(deltas)), mix, fingerprint(base))
    changes = dense_changes(base, deltas)
    weights = torch.tensor(shares, dtype=torch.float64)
    total = weights @ changes if rule == "sum" else brute_ties(changes, weights)
    wanted = base.double().flatten() + scale * total
    spacing = torch.finfo(dtype).eps * torch.maximum(wanted.abs(), base.double().flatten().abs())
    assert bool(
        (
            (weight.double().flatten() - wanted).abs() <= spacing + 1e-6 * (dtype != torch.float64)
        ).all()
    )
    held = torch.stack([positions_of(delta) for delta in deltas])
    pulls = weights[:, None] * changes
    assert overlap.entries == int(held.any(0).sum())
    assert overlap.collisions == int((held.sum(0) > 1).sum())
    assert overlap.sign_conflicts == int(((pulls > 0).any(0) & (pulls < 0).any(0)).sum())
    assert overlap.changed == int((weight != base).sum())
    assert bool((weight == base).flatten()[~held.any(0)].all())
    if change is not None:  # the composition is a delta like any other
        assert change.trained == fingerprint(weight)
        change.toggle_(weight)
    assert torch.equal(weight, base)


def positions_of(delta: WeightDelta) -> Tensor:
    """[size] bool: the entries that a delta names."""
    held = torch.zeros(SHAPE, dtype=torch.bool)
    delta.support.scatter_(held, torch.ones(delta.count, dtype=torch.bool))
    return held.flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_one_delta_changes_comes_out_as_trained(dtype: torch.dtype) -> None:
    base = torch.randn(200, 200, generator=torch.Generator().manual_seed(9)).to(dtype)
    deltas = [make(base, seed, 4000) for seed in (1, 2)]
    weight = base.clone()
    compose_("w", weight, dict(enumerate(deltas)), Mix((1.0, 1.0)), fingerprint(base))
    trained = [base.clone(), base.clone()]
    for delta, one in zip(deltas, trained, strict=True):
        delta.toggle_(one)
    first, second = (one != base for one in trained)
    assert torch.equal(weight[first & ~second], trained[0][first & ~second])
    assert torch.equal(weight[second & ~first], trained[1][second & ~first])


def test_ties_keeps_the_largest_of_each() -> None:
    base = torch.zeros(10)
    support = Support.of((10,), torch.tensor([1, 3, 5, 7]))
    after = torch.tensor([0.1, -4.0, 0.2, 3.0])
    whole = base.clone()
    support.scatter_(whole, after)
    delta = weight_delta(support, support.gather(base), after, fingerprint(base), whole)
    mix = Mix((0.5,), "ties", scale=2.0, keep=0.5)
    compose_("w", base, {0: delta}, mix, "")
    assert base.tolist() == [0, 0, 0, -8.0, 0, 0, 0, 6.0, 0, 0]


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    base = torch.zeros(100_000)
    support = Support.of(base.shape, torch.arange(0, 100_000, 2))
    after = torch.ones(50_000)
    whole = base.clone()
    support.scatter_(whole, after)
    delta = weight_delta(support, support.gather(base), after, fingerprint(base), whole)
    found = {}
    for seed in (0, 1):
        for deltas in ({0: delta}, {1: delta}):
            weight = base.clone()
            shares = (1.0, 1.0)
            compose_("w", weight, deltas, Mix(shares, "dare", keep=0.25, seed=seed), "")
            found[seed, next(iter(deltas))] = weight
    one = found[0, 0]
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert abs(float(one.mean()) - 0.5) < 0.01
    assert not one[1::2].any()
    assert torch.equal(found[0, 0], found[0, 1])  # the order of deltas does not matter
    assert not torch.equal(found[0, 0], found[1, 0])


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"rule": "tie"}, "--rule tie: unknown; there is sum, ties, dare"),
        ({"scale": 0.0}, "must be finite and not 0"),
        ({"weights": (1.0, float("nan"))}, "must be finite and not 0"),
        ({"rule": "ties", "keep": 0.0}, "--keep 0 must be above 0"),
        ({"rule": "ties", "keep": 1.5}, "--keep 1.5 must be above 0 and at most 1"),
        ({"keep": 0.5}, "--keep goes with --rule ties or dare"),
        ({"rule": "dare"}, "--rule dare needs --keep"),
    ],
)
def test_options_that_make_no_sense(mix: dict[str, object], said: str) -> None:
    with pytest.raises(SiftError, match=said):
        Mix(**{"weights": (1.0, 1.0), **mix})  # type: ignore[arg-type]


def test_every_rule_cites_its_paper() -> None:
    cited = {"sum": "2212.04089", "ties": "2306.01708", "dare": "2311.03099"}
    for name, row in RULES.items():
        pages = [row.join.__doc__, row.thin.__doc__ if row.thin else ""]
        assert cited[name] in "".join(str(page) for page in pages)


Run = Callable[..., Path]


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> Run:
    def go(name: str, *changes: str) -> Path:
        short = ["train.max_steps=3", "selection.density=0.2", *changes]
        train(load_recipe(recipe_file, short), tmp_path / name, overwrite=True)
        return tmp_path / name / "delta.safetensors"

    return go


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_two_runs_as_one_folder_and_back(run: Run, base: Path, tmp_path: Path) -> None:
    paths = [run("one", "train.seed=1"), run("two", "train.seed=2")]
    out = tmp_path / "both"
    report = merge(paths, out, weights=[0.5, 0.25], scale=2.0, head=paths[1])
    assert report.proof.verified == ["files"]
    assert report.composition.total.collisions > 0
    assert report.composition.overlaps.keys() == {n for p in paths for n in load_delta(p).weights}
    merged = weights_in(out)
    start = weights_in(base)
    trained = [load_tuned(str(path))[0].model.state_dict() for path in paths]
    for name in report.composition.overlaps:
        before = start[name.removeprefix("bert.")].double()
        change = [one[name].double() - before for one in trained]
        wanted = (before + 2 * (0.5 * change[0] + 0.25 * change[1])).float()
        assert torch.equal(merged[name], wanted), name
    for name, head in load_delta(paths[1]).dense.items():
        assert torch.equal(merged[name], head)
    # the composition is a delta of its own
    composed = out / "sift/composed.safetensors"
    merge(composed, tmp_path / "again")
    assert all(torch.equal(merged[n], v) for n, v in weights_in(tmp_path / "again").items())
    merge(composed, tmp_path / "back", base=str(out), undo=True)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    with pytest.raises(SiftError, match="is not the merged model") as caught:
        merge(paths[0], tmp_path / "no", base=str(out), undo=True)
    assert str(caught.value).endswith(f"the one that turns it back is {composed}")
    assert caught.value.code == ExitCode.WRONG_FILE


def test_one_delta_whole_is_the_exact_path(run: Run, tmp_path: Path) -> None:
    path = run("one")
    report = merge([path], tmp_path / "a", weights=[1.0], scale=1.0)
    assert report.composition is None
    assert not {"composed", "overlap", "overlaps", "head"} & report.to_json().keys()
    assert report.proof.verified == ["files", "logits"]
    half = merge([path], tmp_path / "b", scale=0.5)
    assert half.composition.total.collisions == half.composition.total.sign_conflicts == 0
    whole, part = weights_in(tmp_path / "a"), weights_in(tmp_path / "b")
    assert any(not torch.equal(whole[name], value) for name, value in part.items())


def test_the_same_mix_writes_the_same_bytes(run: Run, tmp_path: Path) -> None:
    paths = [run("one", "train.seed=1"), run("two", "train.seed=2")]
    for name, order in (("a", paths), ("b", paths), ("c", paths[::-1])):
        merge(order, tmp_path / name, rule="dare", keep=0.5, head=paths[0])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    one, other = weights_in(tmp_path / "a"), weights_in(tmp_path / "c")
    assert all(torch.equal(one[name], value) for name, value in other.items())
    both = [(tmp_path / name / "sift/composed.safetensors").read_bytes() for name in "ab"]
    assert both[0] == both[1]


def test_heads_are_chosen_not_added(run: Run, data: Path, tmp_path: Path) -> None:
    one, two = run("one", "train.seed=1"), run("two", "train.seed=2")
    custom = ["data.task=custom", "data.text=sentence", "data.label=label"]
    three = run("three", *custom, "data.labels=[low, high]", "train.seed=1")
    with pytest.raises(SiftError, match="each have a head of their own, and heads do not add"):
        merge([one, two], tmp_path / "x")
    with pytest.raises(SiftError, match=r"labels \['low', 'high'\]"):
        merge([one, three], tmp_path / "x")
    with pytest.raises(SiftError, match="none of the deltas"):
        merge([one, two], tmp_path / "x", head=three)
    report = merge([one, three], tmp_path / "x", head=three.parent)
    assert report.composition.head == str(three)
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["id2label"] == {"0": "low", "1": "high"}
    merge([one, one], tmp_path / "twice")  # one head


def test_deltas_of_different_bases(run: Run, base: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    one, two = run("one"), run("two", f"model.path={other}")
    with pytest.raises(SiftError, match="are of different bases: ") as caught:
        merge([one, two], tmp_path / "x", head=one)
    assert caught.value.code == ExitCode.WRONG_FILE
    three = run("three", "model.dtype=bfloat16")
    with pytest.raises(SiftError, match="bfloat16"):
        merge([one, three], tmp_path / "x", head=one)
    with pytest.raises(SiftError, match="is not the base of this delta"):
        merge([one, one], tmp_path / "x", base=str(other))


def test_a_hundred_deltas(run: Run, base: Path, tmp_path: Path) -> None:
    path = run("one")
    report = merge([path] * 100, tmp_path / "x", weights=[0.01] * 100)
    one = merge([path], tmp_path / "y", verify=False)
    assert report.changed == one.changed
    many, single = weights_in(tmp_path / "x"), weights_in(tmp_path / "y")
    assert all(torch.allclose(single[n], value, atol=1e-7) for n, value in many.items())
    assert report.composition.total.collisions == report.composition.total.entries


def test_nothing_finite_is_refused(run: Run, tmp_path: Path) -> None:
    path = run("one")
    with pytest.raises(SiftError, match="logits are not finite; take a smaller --scale") as caught:
        merge([path], tmp_path / "x", scale=1e38)
    assert caught.value.code == ExitCode.NOT_FINITE
    assert not (tmp_path / "x").exists()


def test_the_command_shows_where_deltas_meet(run: Run, tmp_path: Path) -> None:
    paths = [run("one", "train.seed=1").parent, run("two", "train.seed=2").parent]
    args = ["merge", *paths, "--weight", "0.5", "--weight", "0.5", "--rule", "ties"]
    args += ["--keep", "0.5", "--head", paths[0], "--base", tmp_path / "base"]
    done = sift(*args, "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    for word in ("collisions", "sign conflicts", "query.weight", "The head is that of"):
        assert word in done.stdout
    alone = sift("merge", paths[0], "--scale", "0.5", "--out", tmp_path / "half")
    assert "tensors changed" in alone.stdout
    assert "collisions" not in alone.stdout  # one delta meets no other
    done = sift(*args, "--out", tmp_path / "y", "--json")
    report = json.loads(done.stdout)
    assert [*report][-5:] == ["verified", "composed", "overlap", "overlaps", "head"]
    assert [*report["composed"]] == ["weights", "rule", "scale", "keep", "seed"]
    assert [*report["overlap"]] == ["entries", "collisions", "sign_conflicts", "changed"]
    assert report["composed"]["rule"] == "ties"
    assert report["overlap"]["entries"] == sum(
        one["entries"] for one in report["overlaps"].values()
    )
    done = sift("merge", *paths, "--weight", "0.5", "--out", tmp_path / "z")
    assert done.returncode == ExitCode.USAGE
    assert "2 deltas, but 1 --weight" in done.stderr


def test_a_composition_keeps_weights_that_none_of_its_owner_changes(
    run: Run, tmp_path: Path
) -> None:
    one = run("one", "selection.target=[query]")
    two = run("two", "selection.target=[value]", "train.seed=2")
    report = merge([one, two], tmp_path / "x", head=one)
    assert report.composition.total.collisions == 0
    names = [*load_delta(one).weights, *load_delta(two).weights]
    assert [*report.composition.overlaps] == sorted(names)
    delta = load_delta(tmp_path / "x/sift/composed.safetensors")
    assert isinstance(delta, Delta)
    assert sorted(delta.weights) == sorted(names)
    save_delta(tmp_path / "copy", delta)
