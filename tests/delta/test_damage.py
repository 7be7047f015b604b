"""Delta files that were damaged, or that lie: refused with exit code 3, or what they were."""

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sift_cli.cli import main
from sift_cli.delta import Delta, load_delta, save_delta
from sift_cli.delta.file import _canonical, _digest, weight_delta
from sift_cli.delta.header import Base
from sift_cli.delta.header import Header as DeltaHeader
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint
from sift_cli.sparse import Support

Header = dict[str, Any]
FIELDS = ("shape", "dtype", "count", "positions", "bits", "base", "trained")
KINDS = ("flip", "set", "cut", "end", "double", "move", "add", "digits")


def small_delta() -> Delta:
    """Two changed weights, one in full, and a head."""
    random = torch.Generator().manual_seed(0)
    changes = {}
    for name, shape, count in (("a.weight", (12, 40), 60), ("b.bias", (9,), 9)):
        dtype = torch.bfloat16 if name == "a.weight" else torch.float32
        base = torch.randn(shape, generator=random).to(dtype)
        chosen = torch.randperm(base.numel(), generator=random)[:count]
        support, trained = Support.of(shape, chosen), base.clone()
        support.scatter_(trained, support.gather(base) + torch.randn(count, generator=random))
        before, after = support.gather(base), support.gather(trained)
        changes[name] = weight_delta(support, before, after, fingerprint(base), trained)
    header = DeltaHeader(base=Base(path="somewhere", dtype="float32"), labels=["no", "yes"])
    return Delta(changes, {"head.weight": torch.ones(2, 3)}, "0123456789abcdef", header)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "good.safetensors"
    save_delta(path, small_delta())
    return path


def content(delta: Delta) -> object:
    """All that a delta says, to compare."""

    def raw(tensor: Tensor) -> tuple[str, list[int], bytes]:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        return str(tensor.dtype), list(tensor.shape), flat.numpy().tobytes()

    weights = {
        name: (one.shape, one.dtype, one.count, one.base, one.trained, raw(one.bits))
        for name, one in delta.weights.items()
    }
    positions = {name: one.support.positions for name, one in delta.weights.items()}
    places = {name: None if one is None else raw(one) for name, one in positions.items()}
    dense = {name: raw(one) for name, one in delta.dense.items()}
    return weights, places, dense, delta.rest, _canonical(delta.header.to_json())


def damage(raw: bytes, random: Random) -> bytes:
    """Bytes flipped, cut, doubled, moved or added; most often a few, most often in the header."""
    data = bytearray(raw)

    def place() -> int:
        start = 8 + int.from_bytes(raw[:8], "little")
        ends = random.choice([(0, 8), (8, start), (start, len(raw)), (0, len(raw))])
        return random.randrange(*ends)

    for _ in range(random.choice([1, 1, 1, 2, 5])):
        at, to, size = place(), place(), random.choice([1, 1, 2, 8, 64])
        at, to = min(at, len(data)), min(to, len(data))
        match random.choice(KINDS):
            case "flip" if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case "set" if at < len(data):
                data[at] = random.choice([0, 32, 34, 92, 123, 125, 127, 255, random.randrange(256)])
            case "cut":
                del data[at : at + size]
            case "end":
                del data[at:]
            case "double":
                data[at:at] = data[at : at + size]
            case "move":
                piece = data[at : at + size]
                del data[at : at + size]
                data[to:to] = piece
            case "add":
                data[at:at] = random.randbytes(size)
            case "digits":  # where a number stands, another one
                digits = [i for i, byte in enumerate(data) if 48 <= byte < 58] or [0]
                if data:
                    data[random.choice(digits)] = random.choice(b"0123456789-.e")
    return bytes(data)


def test_10_000_damaged_files_are_refused_or_read_as_the_original(
    good: Path, tmp_path: Path
) -> None:
    raw, wanted, random = good.read_bytes(), content(load_delta(good)), Random(0)
    path, refusals, equal = tmp_path / "damaged.safetensors", [], 0
    for _ in range(10_000):
        path.write_bytes(damage(raw, random))
        try:
            found = load_delta(path)
        except SiftError as error:
            refusals.append(error)
        else:
            assert content(found) == wanted
            equal += 1
    assert {error.code for error in refusals} == {ExitCode.WRONG_FILE}
    assert all(str(path) in str(error) and len(str(error)) < 1000 for error in refusals)
    assert len(refusals) > 8_000
    assert equal > 100  # a bit of white space, a move to the same place


def forge(good: Path, path: Path, change: Callable[[Header, dict[str, Tensor]], object]) -> None:
    """The file with something altered and a digest that fits."""
    with safe_open(good, framework="pt") as file:
        header = json.loads(file.metadata()["sift"])
    tensors = load_file(good)
    change(header, tensors)
    header.pop("digest", None)
    try:
        header["digest"] = _digest(header, tensors)
    except UnicodeEncodeError:
        header["digest"] = ""
    save_file(tensors, path, metadata={"sift": _canonical(header)})


def put(value: object, *keys: str) -> Callable[[Header, dict[str, Tensor]], object]:
    """Sets header[keys] to `value`."""

    def change(header: Header, _: dict[str, Tensor]) -> None:
        at: Any = header
        for key in keys[:-1]:
            at = at[key]
        at[FIELDS.index(keys[-1]) if isinstance(at, list) else keys[-1]] = value

    return change


def rename(old: str, new: str) -> Callable[[Header, dict[str, Tensor]], object]:
    def change(header: Header, tensors: dict[str, Tensor]) -> None:
        if old in header["weights"]:
            header["weights"][new] = header["weights"].pop(old)
        for name in list(tensors):
            if old in name:
                tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def stream(name: str, data: bytes) -> Callable[[Header, dict[str, Tensor]], object]:
    return lambda _, tensors: tensors.update({name: torch.tensor(list(data), dtype=torch.uint8)})


def replaced(which: int, data: bytes) -> Callable[[Header, dict[str, Tensor]], object]:
    """Puts `data` where a.weight's positions (0) or bits (1), or b.bias's bits (3) are."""

    def change(header: Header, tensors: dict[str, Tensor]) -> None:
        rows = [header["weights"][name] for name in ("a.weight", "b.bias")]
        parts = list(tensors["weights"].split([size for row in rows for size in row[3:5]]))
        parts[which] = torch.tensor(list(data), dtype=torch.uint8)
        tensors["weights"] = torch.cat(parts)
        rows[which // 2][3 + which % 2] = len(data)

    return change


def both(*changes: Callable[[Header, dict[str, Tensor]], object]) -> Any:
    return lambda header, tensors: [change(header, tensors) for change in changes]


A = ("weights", "a.weight")
LIES = {
    "a count of all": put(480, *A, "count"),
    "a large count": put(2**40, *A, "count"),
    "no count": put(None, *A, "count"),
    "a negative count": put(-1, *A, "count"),
    "a count of zero": put(0, *A, "count"),
    "a true count": put(True, *A, "count"),
    "a broken count": put(60.0, *A, "count"),
    "a large shape and count": both(
        put([2**40], "weights", "b.bias", "shape"), put(2**40, "weights", "b.bias", "count")
    ),
    "a small shape": put([2, 40], *A, "shape"),
    "a negative shape": put([-12, -40], *A, "shape"),
    "a shape beyond all": put([2**61, 2**61], *A, "shape"),
    "a shape of too many axes": put([1] * 5000, *A, "shape"),
    "a shape in words": put("12x40", *A, "shape"),
    "a dtype of no number": put("nn", *A, "dtype"),
    "another width": put("float64", *A, "dtype"),
    "a short fingerprint": put("0123", *A, "base"),
    "a fingerprint in words": put("g" * 16, *A, "trained"),
    "no fingerprint": put(None, *A, "base"),
    "a row of nothing": put([], *A),
    "a row with names": put({"shape": [12, 40]}, *A),
    "a row too long": lambda header, _: header["weights"]["a.weight"].append(0),
    "weights in a list": put([], "weights"),
    "a weight without streams": put(
        [[4], "float32", 4, 0, 40, "0" * 16, "0" * 16], "weights", "c.weight"
    ),
    "no weights": lambda header, _: header.pop("weights"),
    "no base": lambda header, _: header.pop("base"),
    "a base of no kind": put("somewhere", "base"),
    "a base's dtype of no kind": put("load", "base", "dtype"),
    "kept dtypes of no kind": put({"x": "hub"}, "base", "kept_dtypes"),
    "labels in words": put("yes", "labels"),
    "a recipe in words": put("yes", "recipe"),
    "logits in words": put(["yes"], "logits"),
    "versions in words": put("1", "versions"),
    "half a rest": put("0123", "rest"),
    "format in words": put("1", "format"),
    "no coding": lambda header, _: header.pop("coding"),
    "a path up": rename("a.weight", "../../a.weight"),
    "a path from the root": rename("a.weight", "/etc/passwd"),
    "a path of Windows": rename("a.weight", "..\\a"),
    "an empty word": rename("a.weight", "a..weight"),
    "an empty name": rename("a.weight", ""),
    "a name with a zero": rename("a.weight", "a\0.weight"),
    "a name of half a letter": put({}, "weights", "\ud800"),
    "a head's path": rename("head.weight", "../head"),
    "a tensor of nobody": stream("extra", b"abc"),
    "positions of a full weight": put(9, "weights", "b.bias", "positions"),
    "no positions": put(0, *A, "positions"),
    "positions to the end": lambda header, t: header["weights"]["a.weight"].__setitem__(
        3, len(t["weights"])
    ),
    "positions beyond the end": put(2**40, *A, "positions"),
    "negative positions": put(-1, *A, "positions"),
    "another length": put(7, *A, "positions"),
    "bits beyond the end": put(2**40, "weights", "b.bias", "bits"),
    "negative bits": put(-1, *A, "bits"),
    "fewer bits": put(7, "weights", "b.bias", "bits"),
    "a byte too many": lambda _, t: t.update(
        weights=torch.cat([t["weights"], torch.zeros(1, dtype=torch.uint8)])
    ),
    "no stream": lambda _, tensors: tensors.pop("weights"),
    "a stream of another kind": lambda _, t: t.update(weights=torch.zeros(300)),
    "a stream in rows": lambda _, t: t.update(weights=torch.zeros(2, 60, dtype=torch.uint8)),
    "an empty stream": stream("weights", b""),
    "a plane without end": replaced(3, b"\xff" * 200),
    "positions in no order": replaced(0, b"\x07" + bytes(99)),
    "positions without ones": replaced(0, bytes(99)),
    "a run without end": replaced(0, b"\0\xff\xff\xff\xff" + bytes(99)),
    "a parameter of 255": replaced(0, b"\0\x01\0\0\0\xff" + bytes(999)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_before_memory_is_taken(lie: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    forge(good, path, LIES[lie])
    tracemalloc.start()
    try:
        with pytest.raises(SiftError, match=r"damaged|is not what this sift reads") as caught:
            load_delta(path)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == ExitCode.WRONG_FILE
    assert taken < 2_000_000
    assert len(str(caught.value)) < 1000


def test_forging_nothing_changes_nothing(good: Path, tmp_path: Path) -> None:
    forge(good, tmp_path / "same", lambda _header, _tensors: None)
    assert content(load_delta(tmp_path / "same")) == content(load_delta(good))


def test_brackets_without_end_are_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"sift": "[" * 200_000})
    with pytest.raises(SiftError, match="damaged") as caught:
        load_delta(path)
    assert caught.value.code == ExitCode.WRONG_FILE


def test_the_command_line_ends_with_3(
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(good.read_bytes()[:-1])
    monkeypatch.setattr(sys, "argv", ["sift", "merge", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == ExitCode.WRONG_FILE
    assert "damaged" in capsys.readouterr().err
