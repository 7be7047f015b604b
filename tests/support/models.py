"""Tiny random models, their tokenizer and inputs; no network."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

WORDS = re.findall(
    r"\w+",
    """good bad fine dull bright slow kind rude warm cold film book meal room song very not never
    but the a it was is and I we they liked hated would again stay leave buy return""",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = {word: code for code, word in enumerate([*SPECIAL, *WORDS])}
SIZE = len(VOCABULARY)

_ROBERTA = {"max_position_embeddings": 40, "type_vocab_size": 1, "pad_token_id": 0}
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": lambda: BertConfig(vocab_size=SIZE, intermediate_size=32, **_BERT, **_DROP),
    "roberta": lambda: RobertaConfig(
        vocab_size=SIZE, intermediate_size=32, **_BERT, **_DROP, **_ROBERTA
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=SIZE,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "deberta-v2": lambda: DebertaV2Config(
        vocab_size=SIZE,
        intermediate_size=32,
        **_BERT,
        **_DROP,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pooler_hidden_size=16,
        pooler_dropout=0.0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=SIZE,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    ),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float64, outputs: int = 3, seed: int = 0
) -> PreTrainedModel:
    """A random two-layer classification model without dropout."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.initializer_range = 0.3  # so that two layers of 16 pass gradients on
    config.num_labels = outputs
    config._attn_implementation = "eager"
    return AutoModelForSequenceClassification.from_config(config).to(dtype)


def tiny_batch(
    rows: int = 4, length: int = 7, outputs: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs with some padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, SIZE, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, -2:], mask[0, -2:] = 0, 0
    labels = torch.randint(0, outputs, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per known word."""
    inner = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_base(
    folder: Path, architecture: str = "bert", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A pre-trained-looking folder: the backbone without a head, and a tokenizer."""
    model = tiny_model(architecture, dtype, seed=seed)
    model.base_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def roberta_large(**more: object) -> RobertaConfig:
    """The paper's model."""
    return RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        **more,
    )
