"""What a delta holds, told without a model, against brute force on the values."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from safetensors.torch import load_file

from sift_cli.analysis.inspect import (
    MOVES,
    bands,
    inspect,
    layers_and_kinds,
    moves,
)
from sift_cli.convert.merge import merge
from sift_cli.delta import load_delta, save_delta
from sift_cli.delta.file import SIGNED, Delta, weight_delta
from sift_cli.delta.header import Base, Header
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.recipe import load_recipe
from sift_cli.sparse import Support
from sift_cli.training import train
from tests.support.command import sift
from tests.support.models import save_base

HEADER = Header(base=Base(path="base", revision=None, dtype="float32"), metrics={})


@pytest.fixture
def delta(recipe_file: Path, tmp_path: Path) -> Path:
    changes = ["train.max_steps=3", "selection.scope=global"]
    train(load_recipe(recipe_file, changes), tmp_path / "run")
    return tmp_path / "run/delta.safetensors"


def test_sums_agree_with_the_delta(delta: Path, base: Path) -> None:
    found, held = inspect(delta), load_delta(delta)
    assert found["entries"] == held.entries
    for key in ("layers", "kinds", "tensors"):
        assert sum(row["entries"] for row in found[key].values()) == held.entries
        assert sum(sum(row["moves"].values()) for row in found[key].values()) == held.entries
    touched = [math.prod(weight.shape) for weight in held.weights.values()]
    assert found["size"] == sum(touched)
    assert found["density"] == held.entries / sum(touched)
    assert list(found["layers"]) == ["0", "1", "outside"]
    assert found["dense"] == {"classifier.bias": [2], "classifier.weight": [2, 16]}
    summary = json.loads((delta.parent / "summary.json").read_text())
    assert found["sha256"] == summary["delta_sha256"]
    assert found["bytes"] == summary["delta_bytes"]
    assert found["metrics"] == summary["metrics"]
    assert found["base"]["path"] == str(base)
    assert found["recipe"]["selection"]["scope"] == "global"
    assert "norm" not in found


def test_no_model_is_loaded(delta: Path, base: Path) -> None:
    alone = inspect(delta)
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    assert inspect(delta) == alone


def test_a_base_adds_exact_norms(delta: Path, base: Path, tmp_path: Path) -> None:
    found = inspect(delta, base=str(base))
    merge(delta, tmp_path / "merged")
    before = {f"bert.{n}": v for n, v in load_file(base / "model.safetensors").items()}
    after = load_file(tmp_path / "merged/model.safetensors")
    square, whole = 0.0, 0.0
    for name, row in found["tensors"].items():
        change = (after[name].double() - before[name].double()).square().sum()
        assert row["norm"] == pytest.approx(float(change) ** 0.5, rel=1e-5)
        square, whole = square + float(change), whole + float(before[name].double().square().sum())
    assert found["norm"] == pytest.approx(square**0.5, rel=1e-5)
    assert found["relative"] == pytest.approx((square / whole) ** 0.5, rel=1e-5)


def test_a_wrong_base_and_a_damaged_file(delta: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(
        SiftError, match="is not the base of this delta; of its 17 weights, 11 are"
    ) as caught:
        inspect(delta, base=str(other))
    assert caught.value.code == ExitCode.WRONG_FILE
    assert "encoder.layer.0.attention.self.query.weight" in str(caught.value)
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    with pytest.raises(SiftError, match="damaged") as caught:
        inspect(delta)
    assert caught.value.code == ExitCode.WRONG_FILE


finite = st.floats(width=16, allow_nan=False, allow_infinity=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20), st.sampled_from(DTYPES))
def test_bounds_from_bits_hold_for_the_values(
    pairs: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    for one, other in pairs:
        near = one * (1 + other / 1e6)
        for tuned in (other, near, one, math.nextafter(one, 9e9)):
            base = torch.tensor([one]).to(dtype)
            trained = torch.tensor([tuned]).to(dtype)
            signed = SIGNED[dtype.itemsize]
            counts = moves(base.view(signed) ^ trained.view(signed), dtype)
            assert counts.sum() == 1
            check(MOVES[int(counts.argmax())], base, trained)


def check(move: str, base: torch.Tensor, trained: torch.Tensor) -> None:
    b, t = float(base), float(trained)
    normal = min(abs(b), abs(t)) >= torch.finfo(base.dtype).tiny
    if move == "nothing":
        assert b == t
        assert math.copysign(1, b) == math.copysign(1, t)
    elif move == "one rounding step":
        steps = [np.nextafter(np.float32(b), np.float32(s)) for s in (-np.inf, np.inf)]
        if base.dtype == torch.float32:
            assert np.float32(t) in steps
        assert b != t
    elif "sign" in move:
        assert math.copysign(1, b) != math.copysign(1, t)
    elif "power of two" in move:
        assert math.frexp(b)[1] != math.frexp(t)[1] or not normal
    elif normal:
        limit = 1 if move == "less than itself" else 1 / int(move.split("/")[1].split()[0])
        assert 0 < abs(t - b) < limit * abs(b)


def test_moves_of_known_changes() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.5])
    after = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-5, 1.5, 2.0, -1.5])
    counts = moves(base.view(torch.int32) ^ after.view(torch.int32), torch.float32)
    assert {name: int(n) for name, n in zip(MOVES, counts, strict=True) if n} == {
        "nothing": 1,
        "one rounding step": 1,
        "less than 1/16 of itself": 1,
        "less than itself": 1,
        "more: another power of two": 1,
        "more: another sign": 1,
    }


def save_changes(path: Path, changes: dict[str, tuple[list[int], float]], size: int = 8) -> Path:
    """A delta of square weights: positions that change, and the share by which they do."""
    weights = {}
    for name, (positions, share) in changes.items():
        base = torch.full((size, size), 1.5)
        support, trained = Support.of((size, size), torch.tensor(positions)), base.clone()
        support.scatter_(trained, support.gather(base) * (1 + share))
        entries = support.gather(base), support.gather(trained)
        weights[name] = weight_delta(support, *entries, fingerprint(base), trained)
    save_delta(path, Delta(weights, {}, "", HEADER))
    return path


def test_rows_and_columns_tell_where_entries_crowd(tmp_path: Path) -> None:
    row, column, spread = list(range(8)), list(range(0, 64, 8)), list(range(0, 64, 9))
    names = ["model.layers.0.up.weight", "model.layers.1.up.weight", "model.layers.2.up.weight"]
    places = zip(names, (row, column, spread), strict=True)
    path = save_changes(tmp_path / "delta", {name: (one, 0.05) for name, one in places})
    found = inspect(path)
    halves = {name: (one["half_in_rows"], one["half_in_columns"]) for name, one in
              found["layers"].items()}  # fmt: skip
    assert halves == {"0": (1 / 8, 4 / 8), "1": (4 / 8, 1 / 8), "2": (4 / 8, 4 / 8)}
    assert found["half_in_rows"] == pytest.approx((1 + 4 + 4) / 3 / 8)
    assert found["density_even"]


def table(said: str, head: str) -> list[dict[str, str]]:
    """The rows of a table of plain lines, by column."""
    lines = [line.split("\t") for line in said.splitlines()]
    at = next(at for at, line in enumerate(lines) if line[0] == head)
    rows = itertools.takewhile(lambda line: len(line) == len(lines[at]), lines[at + 1 :])
    return [dict(zip(lines[at], row, strict=True)) for row in rows]


def test_one_density_everywhere_gives_way_to_the_change(tmp_path: Path) -> None:
    even = {f"model.layers.{at}.up.weight": (list(range(6)), 0.05 + at) for at in range(2)}
    said = sift("inspect", save_changes(tmp_path / "even", even)).stdout
    assert ", of each alike" in said
    layers = table(said, "layer")
    assert list(layers[0]) == ["layer", "weights", "entries", "moved far"]  # the rest is the same
    assert [row["moved far"] for row in layers] == ["0.00%", "100.0%"]
    assert table(said, "kind of module")[0]["moved far"] == "50.0%"
    uneven = {f"model.layers.{at}.up.weight": (list(range(6 + 3 * at)), 0.05) for at in range(2)}
    said = sift("inspect", save_changes(tmp_path / "uneven", uneven)).stdout
    assert "of each alike" not in said
    assert [row["density"] for row in table(said, "layer")] == ["9.38%", "14.1%"]


def test_what_moved_far_is_counted(tmp_path: Path) -> None:
    names = {"a.0.up.weight": 1.0, "a.1.up.weight": -2.0, "a.2.up.weight": 0.25}
    path = save_changes(
        tmp_path / "delta", {n: (list(range(8)), share) for n, share in names.items()}
    )
    found = inspect(path)["layers"]
    assert [one["moved_far"] for one in found.values()] == [1, 1, 0]  # 3, -1.5, 1.875 from 1.5
    assert [one["new_sign"] for one in found.values()] == [0, 1, 0]


def test_what_rounding_swallowed_shows(tmp_path: Path) -> None:
    base = torch.ones(10).bfloat16()
    trained = (base.float() + torch.tensor([1e-4] * 7 + [0.5] * 3)).bfloat16()
    whole = Support((10,))
    weight = weight_delta(whole, base, trained, fingerprint(base), trained)
    save_delta(tmp_path / "delta", Delta({"w": weight}, {}, "", HEADER))
    found = inspect(tmp_path / "delta")
    assert found["survived"] == pytest.approx(0.3)
    assert found["tensors"]["w"]["moves"]["nothing"] == 7


def test_layers_and_kinds_of_many_architectures() -> None:
    assert layers_and_kinds(
        ["bert.encoder.layer.11.attention.self.query.weight", "bert.embeddings.LayerNorm.bias"]
    ) == {
        "bert.encoder.layer.11.attention.self.query.weight": (11, "attention.self.query"),
        "bert.embeddings.LayerNorm.bias": ("outside", "bert.embeddings.LayerNorm.bias"),
    }
    experts = layers_and_kinds([f"model.layers.0.mlp.experts.{e}.up.weight" for e in range(9)])
    assert set(experts.values()) == {(0, "mlp.experts.*.up")}
    two = layers_and_kinds(["encoder.block.1.wi.weight", "decoder.block.1.wi.weight"])
    assert list(two.values()) == [(1, "encoder.block.*.wi"), (1, "decoder.block.*.wi")]


@given(st.integers(0, 400), st.booleans())
def test_bands_hold_every_layer_once(count: int, outside: bool) -> None:
    layers = dict.fromkeys([*map(str, range(count)), *(["outside"] if outside else [])])
    found = bands(layers)
    assert [one for _, part in found for one in part] == list(layers)
    assert len(found) <= 25


def test_the_heat_map_of_hundreds_of_layers_stays_a_picture(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(300):
        for kind in ("attn.q", "mlp.up"):
            base = torch.randn(8, 8, generator=generator)
            count = int(torch.randint(1, 9, (), generator=generator))
            support = Support.of((8, 8), torch.randperm(64, generator=generator)[:count])
            trained = base.clone()
            support.scatter_(trained, support.gather(base) + 1)
            entries = support.gather(base), support.gather(trained)
            name = f"model.layers.{layer}.{kind}.weight"
            weights[name] = weight_delta(support, *entries, fingerprint(base), trained)
    save_delta(tmp_path / "delta", Delta(weights, {}, "", HEADER))
    found = inspect(tmp_path / "delta", out=tmp_path / "maps/heat.png")
    assert len(found["layers"]) == 300
    height, width = imread(tmp_path / "maps/heat.png").shape[:2]
    assert height < width < 3000


def test_what_inspect_prints(delta: Path, base: Path, tmp_path: Path) -> None:
    done = sift("inspect", delta.parent, "--base", base, "--out", tmp_path / "heat.png")
    assert done.returncode == 0, done.stderr
    for said in ("the digest matches", str(base), "task sst2", "negative, positive", "accuracy"):
        assert said in done.stdout
    for said in ("attention.self.query", "outside", "survived", "of the weights' norm", "change"):
        assert said in done.stdout
    assert (tmp_path / "heat.png").is_file()
    done = sift("inspect", delta, "--json")
    assert json.loads(done.stdout)["policy"] == "sift"
    done = sift("inspect", delta.parent / "recipe.yaml")
    assert done.returncode == 3
    assert "damaged, or no delta file" in done.stderr


def test_a_delta_that_says_little_is_shown(delta: Path, tmp_path: Path) -> None:
    held = load_delta(delta)
    few = Header(base=Base(path="base", dtype="float32"))
    save_delta(tmp_path / "few.safetensors", Delta(held.weights, held.dense, held.rest, few))
    done = sift("inspect", tmp_path / "few.safetensors")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["base"].strip() == "base, float32"
    assert (lines["model"].strip(), lines["made by"].strip()) == ("not told", "policy not told")
