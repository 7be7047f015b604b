"""Bases stored in dtypes of every kind, and configurations with values of every form."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig

from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.models.fingerprints import holds, probe_inputs, token_codes
from sift_cli.models.loading import read_config
from sift_cli.models.tensors import DTYPE_NAMES
from sift_cli.runs.tuned import load_tuned
from tests.support.command import Run
from tests.support.folders import edit
from tests.support.models import save_base

HALF, EIGHT = torch.float16, torch.float8_e4m3fn
FLOATS = [dtype for dtype in DTYPE_NAMES if dtype.is_floating_point]


def stored_in(folder: Path, *dtypes: torch.dtype) -> Path:
    """The folder's tensors in these dtypes, in turn."""
    return edit(
        folder,
        lambda weights: {
            key: (one * 0.25).to(dtypes[at % len(dtypes)])
            for at, (key, one) in enumerate(sorted(weights.items()))
        },
    )


@pytest.mark.parametrize(
    "dtypes",
    [(HALF,), (EIGHT,), (torch.float8_e5m2,), (HALF, torch.float32, torch.bfloat16), (EIGHT, HALF)],
    ids=["fp16", "fp8", "fp8-e5m2", "mixed", "fp8 and fp16"],
)
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_bases_of_every_dtype_come_back(
    run: Run, base: Path, tmp_path: Path, dtypes: tuple[torch.dtype, ...], held: str
) -> None:
    stored_in(base, *dtypes)
    delta = run(f"model.dtype={held}", "train.max_steps=1")
    merged = merge(delta, tmp_path / "merged")
    assert merged.proof.verified == ["files", "logits"]
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {one.dtype for one in after.values()} == {getattr(torch, held)}
    load_tuned(str(tmp_path / "merged"))
    back = merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    before = load_file(base / "model.safetensors")
    rounded = {key for key, one in before.items() if not holds(getattr(torch, held), one.dtype)}
    assert {*back.rounded} == rounded
    again = load_file(tmp_path / "back" / "model.safetensors")
    for key, one in before.items():
        if key not in rounded:
            assert again[key].dtype == one.dtype
            assert torch.equal(again[key].view(torch.uint8), one.view(torch.uint8)), key
    if not rounded:
        name = "model.safetensors"
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()


@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(0, 2**16 - 1))
def test_a_dtype_that_holds_another_gives_its_numbers_back(
    wide: torch.dtype, narrow: torch.dtype, bits: int
) -> None:
    raw = torch.tensor([bits] * 4, dtype=torch.int64).to(torch.uint16).view(torch.uint8)
    value = raw[: narrow.itemsize * (len(raw) // narrow.itemsize)].view(narrow)[:1]
    exact = torch.equal(
        value.double().nan_to_num(1), value.to(wide).to(narrow).double().nan_to_num(1)
    )
    assert exact or not holds(wide, narrow)


def test_which_dtypes_hold_which() -> None:
    assert holds(torch.float32, HALF)
    assert holds(torch.bfloat16, EIGHT)
    assert not holds(torch.bfloat16, HALF)
    assert not holds(HALF, torch.bfloat16)
    assert not holds(torch.float32, torch.float64)
    assert not holds(torch.float32, torch.int8)
    assert holds(torch.int8, torch.int8)


@pytest.mark.parametrize("eos", [3, [3, 2], [3], None, []])
@pytest.mark.parametrize("pad", [0, None])
def test_tokens_of_a_configuration_in_every_form(
    run: Run, tmp_path: Path, eos: object, pad: int | None
) -> None:
    folder = save_base(tmp_path / "llama", "llama")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"eos_token_id": eos, "pad_token_id": pad}
    file.write_text(json.dumps(config))
    delta = run(f"model.path={folder}", "train.max_steps=1")
    assert merge(delta, tmp_path / "merged").proof.verified == ["files", "logits"]
    assert load_tuned(str(tmp_path / "merged"))[0].model.config.eos_token_id == eos
    again = AutoConfig.from_pretrained(folder)
    codes = token_codes(again, "eos_token_id")
    ids = probe_inputs(again)
    assert not {*ids[:, :-1].flatten().tolist()} & {*codes, 0 if pad == 0 else 2}
    if codes:
        assert ids[:, -1].tolist() == [codes[0]] * 4


def test_a_value_of_a_wrong_kind_is_told_with_its_key(base: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_cache": None}))
    with pytest.raises(SiftError, match="'use_cache': TypeError: Field 'use_cache' expected bool"):
        read_config(base)


@pytest.mark.parametrize(
    "values",
    [
        {"torch_dtype": "float16"},
        {"dtype": None},
        {"id2label": {"0": "a", "1": "b"}, "label2id": None},
        {"architectures": []},
        {"problem_type": "multi_label_classification"},
        {"tie_word_embeddings": False, "chunk_size_feed_forward": 0, "made_up": [None, "a"]},
    ],
    ids=lambda values: ",".join(values),
)
def test_other_values_of_a_configuration(
    run: Run, base: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    delta = run("train.max_steps=1")
    assert merge(delta, tmp_path / "merged").proof.verified == ["files", "logits"]
    merge(delta, tmp_path / "back", base=str(tmp_path / "merged"), undo=True)
    assert (tmp_path / "back" / "config.json").read_bytes() == file.read_bytes()
    load_tuned(str(delta.parent))
