"""A text comes out the same alone, in a batch and from a merged folder, however it was padded."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    ConvBertConfig,
    PretrainedConfig,
    T5Config,
    XLNetConfig,
)

from sift_cli.convert.merge import merge
from sift_cli.errors import SiftError
from sift_cli.models.loading import LoadedModel
from sift_cli.recipe import load_recipe
from sift_cli.runs.tuned import load_tuned
from sift_cli.tasks.evaluation import Asking
from sift_cli.tasks.kinds import load_as_it_is, task_of_config
from sift_cli.training import train
from tests.support.models import CONFIGS, SIZE, WORDS, save_base, tiny_tokenizer

_ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 0}
MORE: dict[str, Any] = {
    "t5": lambda: T5Config(
        vocab_size=SIZE, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **_ENDS
    ),
    "bart": lambda: BartConfig(
        vocab_size=SIZE,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        **_ENDS,
    ),
    "convbert": lambda: ConvBertConfig(
        vocab_size=SIZE,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ),
    "xlnet": lambda: XLNetConfig(vocab_size=SIZE, d_model=16, n_layer=2, n_head=2, d_inner=32),
}
NAMED = {  # what a folder says of padding
    "usual": {},
    "minus one": {"pad_token_id": -1},
    "beyond the vocabulary": {"pad_token_id": SIZE + 3},
    "nothing": {"pad_token_id": None},
    "the end": {"pad_token_id": 3},
    "on the left": {"padding_side": "left"},
}
LEARNS_POSITIONS_FROM_IT = ("roberta",)  # whose padding is no convention
CASES = [
    (architecture, named)
    for architecture in (*CONFIGS, *MORE)
    for named in NAMED
    if architecture not in LEARNS_POSITIONS_FROM_IT or named in ("usual", "on the left")
]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)


def saved(folder: Path, architecture: str) -> Path:
    """A folder whose model has a head of three labels."""
    torch.manual_seed(0)
    config: PretrainedConfig = {**CONFIGS, **MORE}[architecture]()
    config.initializer_range, config.num_labels = 0.3, 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def say(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def scores(loaded: LoadedModel, texts: list[str]) -> list[tuple[str, float]]:
    task = task_of_config(loaded.model.config)
    asked = task.predict(loaded, texts, asking=Asking(torch.device("cpu")))
    return [(one["label"], one["probability"]) for one in asked.answers]


def plain(folder: Path, texts: list[str]) -> list[tuple[str, float]]:
    """By transformers, each text by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            value, code = model(input_ids=ids).logits[0].softmax(-1).max(-1)
            found.append((model.config.id2label[int(code)], float(value)))
    return found


@pytest.mark.parametrize(("architecture", "named"), CASES)
def test_a_text_is_read_alike_alone_and_in_a_batch(
    tmp_path: Path, architecture: str, named: str
) -> None:
    folder = saved(tmp_path / "model", architecture)
    changes = NAMED[named]
    file = "tokenizer_config.json" if "padding_side" in changes else "config.json"
    other = say(saved(tmp_path / "other", architecture), file, **changes)
    loaded = load_as_it_is(other)

    @settings(max_examples=4, deadline=None)
    @given(st.lists(TEXT, min_size=2, max_size=4))
    def same(texts: list[str]) -> None:
        right = plain(other if named == "the end" else folder, texts)
        alone = [scores(loaded, [text])[0] for text in texts]
        for found in (scores(loaded, texts), alone):
            assert [label for label, _ in found] == [label for label, _ in right]
            assert [p for _, p in found] == pytest.approx([p for _, p in right], abs=1e-5)

    same()


@pytest.mark.parametrize("named", ["minus one", "beyond the vocabulary"])
def test_a_merged_folder_names_padding_that_its_model_has(
    tmp_path: Path, recipe_file: Path, named: str
) -> None:
    base = say(save_base(tmp_path / "llama", "llama"), "config.json", **NAMED[named])
    recipe = load_recipe(recipe_file, [f"model.path={base}", "train.max_steps=3"])
    train(recipe, tmp_path / "run")
    merge([tmp_path / "run"], tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").pad_token_id == 0
    texts = ["good", "a film I would buy again and again", "bad room"]
    found = scores(load_tuned(str(tmp_path / "run"))[0], texts)
    right = plain(tmp_path / "merged", texts)
    assert [p for _, p in found] == pytest.approx([p for _, p in right], abs=1e-5)
    merge([tmp_path / "run"], tmp_path / "undone", base=str(tmp_path / "merged"), undo=True)
    assert (tmp_path / "undone/config.json").read_text() == (base / "config.json").read_text()


# What the model cannot read


def test_a_text_of_no_token_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "gpt2")
    file = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(file | {"post_processor": None}))
    loaded = load_as_it_is(folder)
    for texts in ([""], ["good", ""]):
        with pytest.raises(
            SiftError, match=f"^predict: .* no token: 1 rows, such as row {len(texts) - 1}, "
        ):
            scores(loaded, texts)


def test_a_long_text_is_cut_to_the_positions_there_are(tmp_path: Path) -> None:
    folder = say(
        saved(tmp_path / "model", "gpt2"), "tokenizer_config.json", model_max_length=10**30
    )
    loaded = load_as_it_is(folder)
    long = "good bad " * 500
    inside = " ".join(long.split()[:62])  # and two special tokens
    assert scores(loaded, [long]) == scores(loaded, [inside])


def test_an_end_within_a_text_is_refused_by_heads_that_look_for_it(tmp_path: Path) -> None:
    loaded = load_as_it_is(saved(tmp_path / "model", "bart"))
    with pytest.raises(
        SiftError, match=r"texts with no end token \(3\), or several: 1 rows, .* 1,"
    ):
        scores(loaded, ["good", "bad [SEP] film"])
