"""Tiny chat models: tokenizers of bytes, templates with every trait, and a recipe to train one."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

START, END, BEGIN = "<|im_start|>", "<|im_end|>", "<|begin|>"
SPECIAL = ("<|endoftext|>", START, END, BEGIN)

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{{- message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def marked(generated: str, after: str = "'\\n'") -> str:
    """ChatML that marks `generated` (Jinja) of each answer, and puts `after` behind it."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['role'] == 'assistant' %}"
        "{%- generation %}{{ " + generated + " }}{% endgeneration %}{{ " + after + " }}"
        "{%- else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


MARKED = marked("message['content'] + '<|im_end|>'")
MARKS_LINE_END = marked("message['content'] + '<|im_end|>\\n'", "''")
MARKS_NO_END = marked("message['content']", "'<|im_end|>\\n'")
MARKS_NOTHING = marked("''", "message['content'] + '<|im_end|>\\n'")
MARKS_TWICE = marked(
    "message['content'][:1]",
    "'~' }}{% generation %}{{ message['content'][1:] + '<|im_end|>' }}{% endgeneration %}{{ '\\n'",
)
# As Qwen3 and its kin: what was thought before an answer stays in the last one only.
DROPS_THINKING = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{%- if message['role'] == 'assistant' and not loop.last -%}\
{{ message['content'].split('</think>')[-1] }}\
{%- else -%}{{ message['content'] }}{%- endif -%}\
{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As some of Mistral's: the system turn stands before the last question.
MOVES_SYSTEM = """{% for message in messages %}{% if message['role'] != 'system' %}\
{%- if message['role'] == 'user' and messages[loop.index0:] | selectattr('role', 'equalto', 'user')\
 | list | length == 1 -%}{{ messages[0]['content'] }}{%- endif -%}\
{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"""
SHOWS_NO_ANSWER = """{% for message in messages %}{% if message['role'] != 'assistant' %}\
{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"""
ENDS_NO_TURN = """{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}\
{{- '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + CHATML
)
WITH_TOOLS = "{% if tools %}{{ '<|im_start|>' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
WITH_TOOLS += CHATML.replace(
    "message['content'] +", "(message.tool_calls or message.content) | string +"
)
TWO_BEGINNINGS = "{{ bos_token + bos_token }}" + CHATML


def byte_tokenizer(
    template: str | None = CHATML, *, begins: bool = False, lacks: tuple[str, ...] = (), **more: Any
) -> PreTrainedTokenizerFast:
    """One token per byte, but for two line ends, which are one, and special tokens.

    It pads with what ends a turn. With `begins` it puts a token before every text.
    """
    vocabulary = {one: at for at, one in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary["\u010a\u010a"] = len(vocabulary)
    inner = Tokenizer(BPE(vocabulary, [("\u010a", "\u010a")]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = ByteLevelDecoder()
    held = [one for one in SPECIAL if one not in lacks]
    inner.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in held])
    if begins:
        first = (BEGIN, inner.token_to_id(BEGIN))
        inner.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[first])
    named = {"bos_token": BEGIN, "eos_token": END, "pad_token": END} | more
    named = {key: one for key, one in named.items() if one in held}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(
    folder: Path, template: str | None = CHATML, *, stops: Any = None, **more: Any
) -> Path:
    """A folder with configuration and tokenizer, and no weights."""
    tokenizer = byte_tokenizer(template, **more)
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    if stops is not None:
        GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    return folder


CHATS = [
    [("user", f"what is {at} and {at + 1}?"), ("assistant", f"{2 * at + 1}, of course")]
    for at in range(24)
]


def write_chats(path: Path, rows: list[list[tuple[str, str]]]) -> None:
    """Rows of the format `messages`."""
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in row]})
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")


def save_chat_recipe(folder: Path) -> Path:
    """The file of a recipe of a tiny Llama with an untied head, and chats to learn from."""
    torch.manual_seed(0)
    base = save_chat_model(folder / "base")
    config = LlamaConfig.from_pretrained(base)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    data = folder / "chats"
    data.mkdir()
    write_chats(data / "train.jsonl", CHATS)
    write_chats(data / "validation.jsonl", CHATS[::3])
    path = folder / "chat.yaml"
    path.write_text(
        f"model: {{path: {base}}}\n"
        f"data: {{path: {data}, task: instruct, max_length: 128}}\n"
        "selection: {density: 0.2, batches: 4}\n"
        "train: {max_steps: 6, batch_size: 4, learning_rate: 1.0e-2, seed: 3}\n"
        "log: {report: false}\n"
    )
    return path
