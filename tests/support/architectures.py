"""Tiny checkpoints of many architectures, each in the form in which they are published."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LongformerConfig,
    LongformerModel,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from tests.support.models import SIZE, tiny_tokenizer

TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WIDE = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ENCODER = {**WIDE, **DROP, **TOKENS}
DECODER = {**WIDE, **TOKENS, "num_key_value_heads": 2}
POSITIONS = {"max_position_embeddings": 66}

MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "albert": lambda: AlbertForMaskedLM(
        AlbertConfig(**ENCODER, embedding_size=8, classifier_dropout_prob=0.0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **TOKENS,
            vocab_size=SIZE,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            dropout=0.0,
            decoder_start_token_id=3,
            forced_eos_token_id=3,
            max_position_embeddings=64,
        )
    ),
    "deberta-v2": lambda: DebertaV2ForMaskedLM(
        DebertaV2Config(
            **ENCODER,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
            pooler_hidden_size=16,
            legacy=False,
        )
    ),
    "electra": lambda: ElectraForPreTraining(ElectraConfig(**ENCODER, embedding_size=8)),
    "gemma3": lambda: Gemma3TextModel(Gemma3TextConfig(**DECODER, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            **TOKENS,
            vocab_size=SIZE,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, **TOKENS)),
    "longformer": lambda: LongformerModel(
        LongformerConfig(**ENCODER, **POSITIONS, attention_window=8, sep_token_id=3)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**WIDE, **TOKENS, cls_token_id=2, sep_token_id=3)
    ),
    "mpnet": lambda: MPNetModel(MPNetConfig(**ENCODER)),
    "qwen2-moe": lambda: Qwen2MoeModel(
        Qwen2MoeConfig(
            **DECODER,
            num_experts=4,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, tie_word_embeddings=True)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=SIZE,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            eos_token_id=3,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
    "xlm-roberta": lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(**ENCODER, **POSITIONS)),
}
EXPERTS = ("mixtral", "qwen2-moe")


def save_checkpoint(folder: Path, name: str) -> Path:
    """The architecture's checkpoint, random but with large enough weights, and a tokenizer."""
    torch.manual_seed(0)
    model = MAKERS[name]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
