"""Wrong bases: each kind has its own words."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sift_cli.delta import Delta, apply_delta
from sift_cli.delta.build import build_delta
from sift_cli.delta.header import Header
from sift_cli.delta.identity import check_base
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.fingerprints import state_fingerprints, tied_names
from sift_cli.models.stored import stored_kinds
from sift_cli.sparse import Support, attach
from tests.support.models import save_base, tiny_model

WORDS = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def trained_on(
    model: nn.Module, *names: str, dtype: str = "float32", **base: object
) -> tuple[Delta, nn.Module]:
    """A delta that changes two entries of each weight of `names`, and the model as trained."""
    marks = state_fingerprints(model, [])
    shapes = {name: one.shape for name, one in model.named_parameters() if name in names}
    supports = {n: Support.of(shape, torch.tensor([1, 5])) for n, shape in shapes.items()}
    parameters = attach(model, supports)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names:
                weight.view(-1)[[1, 5]] += 1.0
    header = Header.model_validate(
        {
            "base": {"path": "a/base", "dtype": dtype, **base},
            "versions": {"transformers": "5.17.0"},
        }
    )
    delta = build_delta(parameters, [], marks, header)
    parameters.detach()
    return delta, model


def refusal(delta: Delta, model: nn.Module) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SiftError) as caught:
        apply_delta(model, delta)
    assert caught.value.code == ExitCode.WRONG_FILE
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    return str(caught.value)


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    return tiny_model("llama", dtype, seed=seed)


def test_number_and_names_and_the_revision() -> None:
    delta, _ = trained_on(llama(), QUERY, revision="v2")
    other = llama()
    for name in (QUERY, "model.norm.weight"):
        dict(other.named_parameters())[name].data.view(-1)[0] += 1
    said = refusal(delta, other)
    assert "the model is not the base of this delta, which was trained on a/base (float32)" in said
    assert "2 tensors differ:\n  model.layers.0.self_attn.q_proj.weight\n  model.norm" in said
    assert "revision v2" in said
    said = refusal(delta, llama(seed=1))
    assert "tensors differ" in said
    assert "and 6 more" in said


def test_a_delta_that_is_in_it_already() -> None:
    delta, trained = trained_on(llama(), QUERY)
    assert "in it already" in refusal(delta, trained)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (torch.bfloat16, torch.float32, ["bfloat16", "float32", "lost", "float32 checkpoint"]),
        (torch.float32, torch.bfloat16, ["rounded to bfloat16", "dtype=torch.bfloat16"]),
    ],
)
def test_another_dtype(ours: torch.dtype, theirs: torch.dtype, words: list[str]) -> None:
    delta, _ = trained_on(llama(theirs), QUERY, dtype=str(theirs).removeprefix("torch."))
    said = refusal(delta, llama(ours))
    assert all(word in said for word in words), said


def test_a_base_stored_with_fewer_bits(tmp_path: Path) -> None:
    """Loaded in the delta's dtype, as the commands do: the files say what was lost."""
    delta, _ = trained_on(llama(), QUERY)
    folder = save_base(tmp_path / "short", "llama")
    weights = {n: v.bfloat16() for n, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = llama().bfloat16().float()
    with pytest.raises(SiftError, match="bfloat16 has lost"):
        apply_delta(model, delta, kinds=stored_kinds(folder))
    model = llama()
    model.model.norm.weight.data[0] += 1  # one other tensor is no matter of rounding
    with pytest.raises(SiftError, match="Give the model that it was trained on"):
        apply_delta(model, delta, kinds=stored_kinds(folder))


@pytest.mark.parametrize("name", [WORDS, QUERY])
def test_a_resized_vocabulary(name: str) -> None:
    """Whether the delta changes the embedding or leaves it alone."""
    rows = llama().model.embed_tokens.num_embeddings
    delta, _ = trained_on(llama(), name, vocabulary=rows)
    other = llama()
    other.resize_token_embeddings(rows + 8, mean_resizing=False)
    said = refusal(delta, other)
    assert f"{WORDS} has {rows + 8} rows, and {rows} in the base" in said
    assert "before tokens were added" in said


def rename(model: nn.Module) -> nn.Module:
    """As another version of a library might call its modules."""
    model.backbone = model.model
    del model.model
    return model


@pytest.mark.parametrize("change", [rename, lambda model: nn.ModuleDict({"inner": model})])
def test_renamed_modules(change: Callable[[nn.Module], nn.Module]) -> None:
    second = QUERY.replace("q_proj", "k_proj")
    delta, _ = trained_on(llama(), QUERY, second)
    said = refusal(delta, change(llama()))
    assert "2 of 2 weights that are lacking are here under other names" in said
    assert QUERY in said
    assert "transformers 5.17.0" in said


class Tied(nn.Module):
    """An embedding and a head, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.last = nn.Linear(6, 6)
        with torch.no_grad():
            self.head.weight.copy_(self.embed.weight)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("touched", ["embed.weight", "head.weight", "last.weight"])
def test_tied_weights(touched: str) -> None:
    assert tied_names(Tied(True)) == {"head.weight": "embed.weight"}
    delta, _ = trained_on(Tied(False), touched, tied={})
    said = refusal(delta, Tied(True))
    assert "head.weight is tied to embed.weight here, and a tensor of its own" in said
    if touched != "head.weight":
        delta, _ = trained_on(Tied(True), touched, tied=tied_names(Tied(True)))
        said = refusal(delta, Tied(False))
        assert "head.weight is tied to embed.weight in the base, and not here" in said


def test_nothing_and_little_that_fits_are_errors() -> None:
    delta, _ = trained_on(llama(), QUERY)
    marks = state_fingerprints(llama(), [])
    check_base(delta, marks, "it")
    for wrong in ({}, {QUERY: marks[QUERY]}, marks | {"extra": "0" * 16}):
        with pytest.raises(SiftError, match="is not the base") as caught:
            check_base(delta, wrong, "it")
        assert caught.value.code == ExitCode.WRONG_FILE
    assert "extra" in str(caught.value)
    swapped = dict(marks)
    one, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    swapped[one], swapped[other] = swapped[other], swapped[one]
    with pytest.raises(SiftError, match="2 tensors differ"):
        check_base(delta, swapped, "it")


def test_a_wrong_merged_model_is_told_from_the_base() -> None:
    delta, _ = trained_on(llama(), QUERY)
    marks = state_fingerprints(llama(seed=1), [])
    with pytest.raises(SiftError, match="is not the merged model of this delta"):
        check_base(delta, marks, "it", merged=True)
