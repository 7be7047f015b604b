"""Which weights take part: patterns, and the choice over every architecture."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sift_cli.errors import SiftError
from sift_cli.selection.targets import choose_vectors, choose_weights, linear_layers, matches
from tests.support.models import ARCHITECTURES, tiny_model

DENSE = ["classifier", "score"]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    "pattern",
    [
        "query",
        "query.weight",
        "self.query",
        "attention.self.query.weight",
        "bert",
        "layer.0",
        "layer.[0-5].attention",
        "layer.?.attention",
        "layer.*.attention",
        "q*y",
        "*.weight",
        QUERY,
    ],
)
def test_a_pattern_matches_neighbouring_parts(pattern: str) -> None:
    assert matches(pattern, QUERY)


@pytest.mark.parametrize(
    "pattern",
    [
        "quer",  # a part is matched whole
        "uery",
        "attention.query",  # not next to each other
        "query.self",  # another order
        "layer.attention",
        "layer.[1-5].attention",
        "layer.*.self",  # a wildcard stands for one part
        "Query",
        f"{QUERY}.more",
        f"model.{QUERY}",
        "",
    ],
)
def test_a_pattern_matches_nothing_less(pattern: str) -> None:
    assert not matches(pattern, QUERY)


def test_a_number_is_a_part_and_not_a_prefix() -> None:
    assert matches("layer.1", "bert.layer.1.output")
    assert not matches("layer.1", "bert.layer.11.output")
    assert matches("layer.1*", "bert.layer.11.output")


def linear_names(model: nn.Module) -> set[str]:
    """Found from the modules' side: what nn.Linear and Conv1D own."""
    owners = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    owned = {id(p) for m in owners for p in (m.weight, m.bias) if p is not None}
    return {name for name, weight in model.named_parameters() if id(weight) in owned}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_takes_weights_and_biases_of_linear_layers(architecture: str) -> None:
    model = tiny_model(architecture, torch.float32)
    chosen, whole = choose_weights(model, "all-linear", [], DENSE, [])
    heads = {name for name, _ in model.named_parameters() if name.split(".")[0] in DENSE}
    assert heads
    assert set(whole) == heads
    assert set(chosen) == linear_names(model) - heads
    names = [name for name, _ in model.named_parameters()]
    assert chosen == [name for name in names if name in chosen]
    assert not any("norm" in name.lower() or "embedding" in name for name in chosen)


EXAMPLES = {
    "bert": "bert.encoder.layer.0.attention.self.query.bias",
    "roberta": "roberta.encoder.layer.1.output.dense.weight",
    "distilbert": "distilbert.transformer.layer.0.ffn.lin1.bias",
    "deberta-v2": "deberta.encoder.layer.0.attention.self.query_proj.weight",
    "gpt2": "transformer.h.0.attn.c_attn.weight",
    "llama": "model.layers.1.mlp.down_proj.weight",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_parameters_train_whole_and_not_sparsely(architecture: str) -> None:
    model = tiny_model(architecture, torch.float32)
    new = EXAMPLES[architecture]
    chosen, whole = choose_weights(model, "all-linear", [], [], [new])
    assert whole == [new]
    assert set(chosen) == linear_names(model) - {new}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_takes_every_parameter_that_is_not_whole(architecture: str) -> None:
    model = tiny_model(architecture, torch.float32)
    names = [name for name, _ in model.named_parameters()]
    assert choose_weights(model, "all", [], [], []) == (names, [])
    chosen, whole = choose_weights(model, "all", [], DENSE, [names[0]])
    assert sorted([*chosen, *whole]) == sorted(names)
    assert whole[0] == names[0]
    assert set(whole[1:]) == {name for name in names if name.split(".")[0] in DENSE}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exclude_leaves_out_what_it_matches(architecture: str) -> None:
    model = tiny_model(architecture, torch.float32)
    excluded = EXAMPLES[architecture]
    every, _ = choose_weights(model, "all-linear", [], DENSE, [])
    chosen, whole = choose_weights(model, "all-linear", [excluded], DENSE, [])
    assert excluded in every
    assert chosen == [name for name in every if name != excluded]
    assert excluded not in whole


def test_exclude_does_not_touch_what_trains_whole() -> None:
    model = tiny_model("bert", torch.float32)
    _, whole = choose_weights(model, "all-linear", ["classifier"], DENSE, [])
    assert whole == ["classifier.weight", "classifier.bias"]


def test_exclude_takes_keywords_too() -> None:
    model = tiny_model("bert", torch.float32)
    chosen, _ = choose_weights(model, "all", ["all-linear"], DENSE, [])
    names = {name for name, _ in model.named_parameters()}
    assert set(chosen) == names - linear_names(model)
    assert "bert.embeddings.word_embeddings.weight" in chosen


def test_name_patterns_are_joined() -> None:
    model = tiny_model("bert", torch.float32)
    chosen, _ = choose_weights(model, ["layer.0.*.self.query", "LayerNorm.bias"], [], DENSE, [])
    assert chosen == [
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.query.bias",
        "bert.encoder.layer.0.attention.output.LayerNorm.bias",
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.encoder.layer.1.attention.output.LayerNorm.bias",
        "bert.encoder.layer.1.output.LayerNorm.bias",
    ]
    assert choose_weights(model, "pooler", [], DENSE, [])[0] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    ]


def test_a_keyword_joins_a_pattern() -> None:
    model = tiny_model("bert", torch.float32)
    linear, _ = choose_weights(model, "all-linear", [], DENSE, [])
    chosen, _ = choose_weights(model, ["all-linear", "word_embeddings"], [], DENSE, [])
    assert set(chosen) - set(linear) == {"bert.embeddings.word_embeddings.weight"}


@pytest.mark.parametrize("key", ["target", "exclude"])
def test_a_pattern_that_matches_nothing_lists_names(key: str) -> None:
    model = tiny_model("bert", torch.float32)
    patterns = {"target": ["query"], "exclude": ["value"]}
    patterns[key].append("self.qurey")
    with pytest.raises(SiftError) as caught:
        choose_weights(model, patterns["target"], patterns["exclude"], DENSE, [])
    assert str(caught.value) == (
        f"selection.{key}: no parameter of the model matches 'self.qurey'; its names hold parts "
        "such as query (keywords: all-linear, all)"
    )


def test_a_pattern_like_no_name_lists_some() -> None:
    model = tiny_model("llama", torch.float32)
    with pytest.raises(SiftError) as caught:
        choose_weights(model, "zzz", [], DENSE, [])
    assert str(caught.value) == (
        "selection.target: no parameter of the model matches 'zzz'; its names hold parts such as "
        "down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, layers, mlp, model, norm, "
        "o_proj, post_attention_layernorm, q_proj (keywords: all-linear, all)"
    )


def test_dense_patterns_may_match_nothing() -> None:
    model = tiny_model("bert", torch.float32)
    assert choose_weights(model, "pooler", [], ["no_such_head"], [])[1] == []


def test_a_tied_weight_is_one_parameter() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "out": nn.Linear(4, 8, bias=False)})
    model["out"].weight = model["table"].weight
    assert choose_weights(model, "all", [], [], []) == (["table.weight"], [])


def test_a_model_that_is_one_linear_layer() -> None:
    assert choose_weights(nn.Linear(2, 3), "all-linear", [], [], []) == (["weight", "bias"], [])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_are_the_biases_and_norms_of_the_base(architecture: str) -> None:
    model = tiny_model(architecture)
    _, head = choose_weights(model, "all-linear", [], DENSE, [])
    found = choose_vectors(model, [], head)
    assert found == [
        name for name, one in model.named_parameters() if one.dim() == 1 and name not in head
    ]
    assert any("norm" in name.lower() or ".ln_" in name for name in found)
    excluded = choose_vectors(model, ["layer.0", "h.0", "layers.0"], head)
    assert excluded == [name for name in found if ".0." not in name]
    assert (
        set(choose_vectors(model, ["all-linear"], head)) == set(found) - linear_layers(model).keys()
    )
    assert choose_vectors(model, ["all"], head) == []
