"""Tiny random causal language models of many architectures, and rows for them; no network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from sift_cli.tasks.tokens import UNSEEN
from tests.support.chats import CHATML, END, byte_tokenizer

KINDS = ("bos", "eos", "pad")
SIZE = 61  # of the vocabulary: no width of any layer
EOS = 2

_IDS = {"vocab_size": SIZE, "pad_token_id": EOS, "bos_token_id": 1, "eos_token_id": EOS}
_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    **_IDS,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 1}
_HEADED = {**_GROUPED, "head_dim": 8}


def _small(kind: Callable[..., PreTrainedConfig], **more: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: kind(**more)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _small(LlamaConfig, **_GROUPED, tie_word_embeddings=False),
    "llama-tied": _small(LlamaConfig, **_GROUPED, tie_word_embeddings=True),
    "gpt2": _small(
        GPT2Config,
        **_IDS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "qwen2": _small(Qwen2Config, **_GROUPED),
    "qwen3": _small(Qwen3Config, **_HEADED),
    "gemma2": _small(Gemma2Config, **_HEADED, sliding_window=6, final_logit_softcapping=3.0),
    "gemma3": _small(Gemma3TextConfig, **_HEADED, sliding_window=6),
    "gemma3-capped": _small(
        Gemma3TextConfig, **_HEADED, sliding_window=6, final_logit_softcapping=3.0
    ),
    "mistral": _small(MistralConfig, **_HEADED, sliding_window=5),
    "phi": _small(
        PhiConfig,
        **_SHAPE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
    ),
    "granite": _small(GraniteConfig, **_GROUPED, logits_scaling=4.0, residual_multiplier=0.5),
    "cohere": _small(CohereConfig, **_GROUPED, logit_scale=0.25),
    "cohere2": _small(Cohere2Config, **_HEADED, logit_scale=0.25, sliding_window=6),
    "neox": _small(GPTNeoXConfig, **_SHAPE),
}
CHUNKED = tuple(CONFIGS)
# a tied head, layers that are transposed, biases, norms of heads, windows
SHAPES = ("llama-tied", "gpt2", "qwen2", "qwen3", "gemma3", "mistral")
PACKED = {"tokens": 256, "max_tokens": 128}  # of the rows of `chats_recipe`
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": _small(
        OPTConfig,
        **_IDS,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        dropout=0.0,
    ),
    "bloom": _small(BloomConfig, **_IDS, hidden_size=16, n_layer=2, n_head=2),
    "mamba": _small(
        MambaConfig, **_IDS, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=24
    ),
    "recurrent-gemma": _small(
        RecurrentGemmaConfig, **_HEADED, lru_width=16, logits_soft_cap=3.0, attention_window_size=8
    ),
    "hyperclovax": _small(HyperCLOVAXConfig, **_GROUPED, logits_scaling=3.0),
    "falcon-h1": _small(
        FalconH1Config,
        **_GROUPED,
        lm_head_multiplier=0.25,
        mamba_d_ssm=16,
        mamba_n_heads=4,
        mamba_d_head=4,
        mamba_d_state=4,
        mamba_chunk_size=8,
    ),
    "bert": _small(
        BertConfig,
        **_SHAPE,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
}


def causal_model(
    architecture: str,
    dtype: torch.dtype = torch.float64,
    *,
    attention: str = "sdpa",
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """A random two-layer model without dropout, whose logits are far from flat."""
    torch.manual_seed(seed)
    config = {**CONFIGS, **OTHERS}[architecture]()
    config.initializer_range = 0.3
    for key, value in changes.items():
        setattr(config, key, value)
    if architecture in ("bloom", "mamba"):
        attention = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def save_causal(folder: Path, architecture: str, template: str | None = CHATML) -> Path:
    """A folder with a random model of fp32 weights, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer(template)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in KINDS}
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **ids}
    model = causal_model(architecture, torch.float32, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chats_recipe(tmp_path: Path, architecture: str, **settings: object) -> Path:
    """A recipe of a tiny model of that shape, and conversations of one to three turns."""
    save_causal(tmp_path / "base", architecture)
    asked, said = {"role": "user", "content": "and {}?"}, {"role": "assistant", "content": "{}."}
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 16), ("validation", 4)):
        lines = [
            json.dumps({"messages": [asked, said] * (1 + at % 2)}).replace("{}", str(at * 37))
            for at in range(count)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    steps = {"max_steps": 5, "learning_rate": 1e-2, **(settings or {"batch_size": 8})}
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}/base}}\n"
        f"data: {{path: {data}, task: instruct, max_length: 128}}\n"
        "selection: {density: 0.05, batches: 3}\n"
        f"train: {json.dumps(steps)}\n"
        "log: {report: false}\n"
    )
    return path


class Exactly(TorchFunctionMode):
    """Within, nothing is rounded to fp32: transformers' norms, softmaxes and losses are of fp64.

    For fp64 models, so that what is equal but for the order of sums is so to 1e-12. Models of bf16
    compute in fp64 from their embeddings on: of bf16 are their weights alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        def widened(value: Any) -> Any:
            return value.double() if getattr(value, "dtype", None) is torch.bfloat16 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if func in (nn.functional.embedding, nn.functional.linear):
            args = [widened(value) for value in args]
        named = {key: wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(wide, args), **named)


def causal_rows(count: int = 5, seed: int = 0, longest: int = 12) -> list[dict[str, list[int]]]:
    """Rows of 3 tokens and more: a question that is not supervised, an answer that ends in EOS.

    The first row is supervised from its first token on, and holds EOS within.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for at in range(count):
        length = int(torch.randint(3, longest, (), generator=generator))
        ids = [*torch.randint(3, SIZE, (length - 1,), generator=generator).tolist(), EOS]
        asked = int(torch.randint(1, length, (), generator=generator))
        labels = [UNSEEN] * asked + ids[asked:]
        if at == 0:
            ids[1] = EOS
            labels = list(ids)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def save_talker(folder: Path, template: str | None = CHATML, *, begins: bool = False) -> Path:
    """A random model that says one thing or another, and its tokenizer; it ships sampling."""
    tokenizer = byte_tokenizer(template, begins=begins)
    stop = tokenizer.convert_tokens_to_ids(END)
    model = causal_model(
        "llama",
        torch.float32,
        vocab_size=len(tokenizer),
        eos_token_id=stop,
        pad_token_id=stop,
        max_position_embeddings=256,
    )
    model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.9, eos_token_id=stop)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
