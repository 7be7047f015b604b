"""The delta file: coding, format, refusal, apply and undo."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sift_cli.delta import Delta, apply_delta, load_delta, save_delta
from sift_cli.delta.build import build_delta
from sift_cli.delta.coding import RUN
from sift_cli.delta.file import SIGNED, weight_delta
from sift_cli.delta.header import Base, Header
from sift_cli.delta.planes import encode_bits
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import fingerprint, state_fingerprints
from sift_cli.sparse import SparseAdamW, Support, attach
from tests.support.models import ARCHITECTURES, tiny_batch, tiny_model

HEADER = Header(base=Base(path="somewhere", dtype="float32"))


def train_a_little(model: nn.Module, density: float, steps: int = 3) -> tuple[Delta, Support]:
    marks = state_fingerprints(model, ["score.weight"])
    generator = torch.Generator().manual_seed(0)
    supports = {}
    for name, weight in model.named_parameters():
        count = max(1, round(density * weight.numel()))
        chosen = torch.randperm(weight.numel(), generator=generator)[:count]
        supports[name] = Support.of(weight.shape, chosen)
    for name in ("score.weight",):
        if name in supports:
            supports[name] = Support(supports[name].shape)
    parameters = attach(model, supports)
    optimizer = SparseAdamW(parameters, lr=1e-2)
    for step in range(steps):
        model(**tiny_batch(seed=step)).loss.backward()
        optimizer.step()
    parameters.detach()
    return build_delta(parameters, ["score.weight"], marks, HEADER), supports


def bits_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_file_applied_to_the_base_gives_the_trained_weights_and_back(
    architecture: str, density: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    trained = tiny_model(architecture, dtype)
    delta, _ = train_a_little(trained, density)
    path = tmp_path / "delta.safetensors"
    save_delta(path, delta)
    again = load_delta(path)
    model = tiny_model(architecture, dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    apply_delta(model, again)
    wanted = trained.state_dict()
    changed = [n for n, v in model.state_dict().items() if not bits_equal(v, base[n])]
    assert len(changed) >= len(again.weights) * 0.7
    assert all(bits_equal(v, wanted[name]) for name, v in model.state_dict().items())
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in again.weights.items():
            weight.toggle_(named[name])
    left = [n for n, v in model.state_dict().items() if not bits_equal(v, base[n])]
    assert left == list(again.dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_stored_once_and_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(12, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embed.weight
            self.to(dtype)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    trained, model, base = Tied(), Tied(), Tied()
    marks = state_fingerprints(trained, [])
    assert list(marks) == ["embed.weight"]
    support = Support.of((12, 6), torch.arange(0, 72, 3))
    parameters = attach(trained, {"embed.weight": support})
    trained(torch.tensor([1, 2, 3])).square().sum().backward()
    SparseAdamW(parameters, lr=0.1).step()
    save_delta(tmp_path / "d", build_delta(parameters, [], marks, HEADER))
    delta = load_delta(tmp_path / "d")
    apply_delta(model, delta)
    assert bits_equal(model.head.weight, trained.embed.weight)
    assert not bits_equal(model.head.weight, base.head.weight)
    with torch.no_grad():
        delta.weights["embed.weight"].toggle_(model.embed.weight)
    assert bits_equal(model.head.weight, base.head.weight)


def test_a_full_support_stores_no_positions(tmp_path: Path) -> None:
    delta, _ = train_a_little(tiny_model("bert", torch.float32), 1.0)
    save_delta(tmp_path / "d.safetensors", delta)
    streams = load_file(tmp_path / "d.safetensors")["weights"]
    coded = [encode_bits(one.bits, one.dtype) for _, one in sorted(delta.weights.items())]
    assert torch.equal(streams, torch.cat(coded))


def test_the_same_delta_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        delta, _ = train_a_little(tiny_model("bert", torch.float32), 0.05)
        hashes.add(save_delta(tmp_path / name, delta))
    assert len(hashes) == 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    delta, _ = train_a_little(tiny_model("bert", torch.float32), 0.05)
    save_delta(path, delta)
    return path


def test_every_flipped_byte_and_every_cut_is_refused(saved: Path, tmp_path: Path) -> None:
    raw = saved.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for at in range(0, len(raw), max(1, len(raw) // 150)):
        damaged.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        with pytest.raises(SiftError) as caught:
            load_delta(damaged)
        assert caught.value.code == ExitCode.WRONG_FILE
    for length in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        damaged.write_bytes(raw[:length])
        with pytest.raises(SiftError, match="damaged") as caught:
            load_delta(damaged)
        assert caught.value.code == ExitCode.WRONG_FILE


def rewrite(source: Path, target: Path, change: dict[str, object]) -> None:
    with safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["sift"])
    save_file(load_file(source), target, metadata={"sift": json.dumps(header | change)})


def test_newer_formats_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.safetensors"
    for change in ({"format": 2}, {"coding": "something-else"}):
        rewrite(saved, newer, change)
        with pytest.raises(SiftError, match="this sift reads") as caught:
            load_delta(newer)
        assert caught.value.code == ExitCode.WRONG_FILE


def test_an_altered_header_and_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    rewrite(saved, path, {"task": "another"})
    with pytest.raises(SiftError, match="do not match its digest"):
        load_delta(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(SiftError, match="no sift delta"):
        load_delta(path)
    with pytest.raises(SiftError, match="no such delta file"):
        load_delta(tmp_path / "nothing")


def test_a_wrong_base_is_named_tensor_by_tensor(saved: Path) -> None:
    delta = load_delta(saved)
    model = tiny_model("bert", torch.float32)
    touched = "bert.encoder.layer.1.attention.self.query.weight"
    dict(model.named_parameters())[touched].data[0, 0] += 1e-4
    with pytest.raises(SiftError, match="; 1 tensor differs:") as caught:
        apply_delta(model, delta, "that model")
    assert touched in str(caught.value)
    assert "that model" in str(caught.value)
    assert caught.value.code == ExitCode.WRONG_FILE


def test_a_change_outside_the_delta_is_noticed_too() -> None:
    model = tiny_model("bert", torch.float32)
    marks = state_fingerprints(model, [])
    name = "classifier.weight"
    parameters = attach(model, {name: Support.of(model.classifier.weight.shape, torch.tensor([1]))})
    delta = build_delta(parameters, [], marks, HEADER)
    other = tiny_model("bert", torch.float32)
    other.bert.embeddings.word_embeddings.weight.data[3, 3] += 1.0
    with pytest.raises(SiftError) as caught:
        apply_delta(other, delta)
    assert "bert.embeddings.word_embeddings.weight" in str(caught.value)
    with pytest.raises(SiftError, match=r"classifier\.weight"):
        apply_delta(tiny_model("bert", torch.float32, outputs=2), delta)
    with pytest.raises(SiftError, match="another set of tensors"):
        apply_delta(nn.ModuleDict({"classifier": model.classifier}), delta)


def golden_delta() -> Delta:
    """The example of docs/delta-format.md: entries 1 and 6 of eight grow by .5."""
    base = torch.arange(8, dtype=torch.float32).view(2, 4)
    trained = base.clone()
    trained.view(-1)[[1, 6]] += 0.5
    support = Support.of((2, 4), torch.tensor([1, 6]))
    change = weight_delta(
        support, support.gather(base), support.gather(trained), fingerprint(base), trained
    )
    return Delta({"w": change}, {"head.bias": torch.tensor([0.25])}, "", HEADER)


def test_golden_bytes(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden/delta-v1.safetensors"
    save_delta(tmp_path / "d.safetensors", golden_delta())
    assert (tmp_path / "d.safetensors").read_bytes() == golden.read_bytes()
    raw = golden.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    page = (Path(__file__).parents[2] / "docs/delta-format.md").read_text()
    assert data.hex(" ") in page.replace("\n", " ")
    with safe_open(golden, framework="pt") as file:
        assert file.metadata()["sift"] in page.replace("\n", "")
    again = load_delta(golden)
    assert again.weights["w"].support.positions.tolist() == [1, 6]
    assert again.dense["head.bias"].tolist() == [0.25]


def patterned_delta() -> Delta:
    """Runs, blocks, both orders and deflated planes, from formulas that need no random numbers."""
    long, wide = torch.arange(330 * 400), torch.arange(300 * 500)
    half = long[(long * long * 7 + long // 3) % 4 < 2]
    few = wide[((wide // 500 * 37 + wide % 500) % 11 == 0) & (wide % 500 % 50 < 3)]
    changes = {}
    for name, shape, positions, kind in (
        ("long.weight", (330, 400), half, torch.bfloat16),
        ("wide.weight", (300, 500), few, torch.float32),
    ):
        bits = 1 << positions % 3 * 6
        signed = SIGNED[kind.itemsize]
        base = torch.zeros(shape, dtype=kind)
        trained = base.clone()
        support = Support.of(shape, positions)
        support.scatter_(trained, bits.to(signed).view(kind))
        change = (support, support.gather(base), support.gather(trained), fingerprint(base))
        changes[name] = weight_delta(*change, trained)
    return Delta(changes, {}, "0123abcd", HEADER)


def test_patterned_golden_file_reads_as_ever() -> None:
    """Its bytes are not compared: another zlib may deflate the same planes to others."""
    golden = load_delta(Path(__file__).parent / "golden/delta-v1-patterned.safetensors")
    wanted = patterned_delta()
    assert [int(one.coded[0]) for one in golden.weights.values()] == [0, 1]
    assert golden.weights["long.weight"].count > RUN
    for name, weight in wanted.weights.items():
        again = golden.weights[name]
        assert torch.equal(again.support.positions, weight.support.positions)
        assert torch.equal(again.coded, weight.coded)
        assert bits_equal(again.bits, weight.bits)
        assert (again.base, again.trained) == (weight.base, weight.trained)
        assert len(encode_bits(again.bits, again.dtype)) < weight.count * again.dtype.itemsize
