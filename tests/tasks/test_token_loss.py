"""The chunked loss of language models against transformers' own logits, loss and gradients."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sift_cli.models.attention import leave_masks_unread
from sift_cli.models.dropout import quicken_dropout
from sift_cli.models.prepare import Recompute, recompute_activations, recompute_of
from sift_cli.models.readout import Readout, hidden_states, inputs_of, readout_of
from sift_cli.selection.evidence import OF_TOKENS, observed_inputs
from sift_cli.selection.scores import SCORES
from sift_cli.selection.select import Rule, select
from sift_cli.selection.targets import choose_weights
from sift_cli.sparse import Support, attach
from sift_cli.tasks.metrics import score_tokens
from sift_cli.tasks.task import Loss
from sift_cli.tasks.token_batches import (
    UNSEEN,
    packed,
    padded,
    why_not_packed,
)
from sift_cli.tasks.token_loss import Chunks, chunks_of, token_loss, token_outputs
from sift_cli.tasks.token_rows import count_targets
from tests.support.causal import (
    CHUNKED,
    EOS,
    SIZE,
    Exactly,
    causal_model,
    causal_rows,
)
from tests.support.models import tiny_model

Rows = Sequence[Mapping[str, list[int]]]
Batch = Mapping[str, Tensor]

ROWS = causal_rows()
LAYOUTS: dict[str, Callable[[Rows], dict[str, Tensor]]] = {
    "padded": lambda rows: padded(rows, EOS),
    "packed": packed,
}


def chunks(model: PreTrainedModel, positions: int = 3) -> Chunks:
    found, said = chunks_of(model, positions)
    assert found is not None
    assert said is None
    return found


def own_loss(model: PreTrainedModel, rows: Rows) -> Tensor:
    """Each row alone, the model's own logits, and the sum over tokens written out."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        for at, label in enumerate(row["labels"][1:]):
            if label != UNSEEN:
                total = total - logits[at].log_softmax(-1)[label]
    return total


@pytest.fixture
def exactly() -> Iterator[None]:
    with Exactly():
        yield


def number(tensor: Tensor) -> float:
    return float(tensor.detach())


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], most: float) -> None:
    assert set(found) == set(wanted)
    for name, one in wanted.items():
        scale = number(one.norm()) + 1e-6
        assert number((found[name] - one).norm()) / scale < most, name
    assert any(number(one.norm()) > 1e-3 for one in wanted.values())


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", CHUNKED)
def test_chunked_equals_the_models_own_logits_row_by_row(architecture: str, layout: str) -> None:
    model = causal_model(architecture)
    wanted = own_loss(model, ROWS)
    found = token_loss(model, LAYOUTS[layout](ROWS), chunks(model))
    assert found.count == sum(count_targets(row["labels"]) for row in ROWS) > 6
    assert abs(number(found.sum - wanted)) < 1e-12 * number(wanted)
    assert_equal(gradients(model, found.sum), gradients(model, wanted), 1e-12)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("architecture", CHUNKED)
def test_chunked_equals_the_loss_of_transformers_in_fp64(architecture: str) -> None:
    model = causal_model(architecture)
    batch = padded(ROWS, EOS)
    own = model(**inputs_of(batch), labels=batch["labels"]).loss
    found = token_loss(model, batch, chunks(model))
    assert own.dtype == torch.float64
    assert number(found.sum) / found.count == pytest.approx(number(own), rel=1e-12)
    wanted = gradients(model, own * found.count)
    assert_equal(gradients(model, found.sum), wanted, 1e-12)


def test_nothing_is_rounded_to_fp32_on_the_way() -> None:
    """GPT-2 has no fp32 of its own, so this holds as it runs."""
    model = causal_model("gpt2")
    wanted = own_loss(model, ROWS)
    for layout in LAYOUTS.values():
        found = token_loss(model, layout(ROWS), chunks(model)).sum
        assert number(found) == pytest.approx(number(wanted), rel=1e-13)
        assert_equal(gradients(model, found), gradients(model, own_loss(model, ROWS)), 1e-12)


@pytest.mark.parametrize("architecture", CHUNKED)
def test_chunked_equals_the_loss_of_transformers_in_fp32(architecture: str) -> None:
    model = causal_model(architecture, torch.float32)
    batch = padded(ROWS, EOS)
    own = model(**inputs_of(batch), labels=batch["labels"]).loss
    found = token_loss(model, batch, chunks(model))
    assert number(found.sum) / found.count == pytest.approx(number(own), rel=1e-5)
    wanted = gradients(model, own * found.count)
    assert_equal(gradients(model, found.sum), wanted, 1e-5)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("architecture", ["llama-tied", "gemma2"])
@pytest.mark.parametrize("positions", [1, 4, 1000])
def test_the_size_of_a_chunk_changes_nothing(architecture: str, positions: int) -> None:
    model = causal_model(architecture)
    batch = packed(ROWS)
    whole = token_loss(model, batch, None)
    found = token_loss(model, batch, chunks(model, positions))
    torch.testing.assert_close(found.sum, whole.sum, rtol=1e-13, atol=0)
    wanted = gradients(model, whole.sum)
    assert_equal(gradients(model, found.sum), wanted, 1e-12)


def test_a_batch_without_a_target_has_no_loss_and_no_gradient() -> None:
    model = causal_model("llama")
    rows = [{"input_ids": [3, 4, 5], "labels": [UNSEEN] * 3}]
    for how in (chunks(model), None):
        for lay in LAYOUTS.values():
            found = token_loss(model, lay(rows), how)
            assert (number(found.sum), found.count) == (0.0, 0)
            assert not any(one.any() for one in gradients(model, found.sum).values())


def test_the_sum_is_fp64_of_fp32_tokens_and_under_autocast_too() -> None:
    model = causal_model("llama", torch.bfloat16)
    found = token_loss(model, packed(ROWS), chunks(model))
    assert found.sum.dtype == torch.float64
    model = causal_model("llama", torch.float32)
    exact = token_loss(model, packed(ROWS), chunks(model)).sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = token_loss(model, packed(ROWS), chunks(model)).sum
        whole = token_loss(model, packed(ROWS), None).sum
    torch.testing.assert_close(rounded, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
    assert rounded != exact


# ---- what is held ----


class Largest(TorchDispatchMode):
    """The most positions of any tensor made within whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and one.dim() and one.shape[-1] == SIZE:
                self.positions = max(self.positions, one.numel() // SIZE)
        return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [True, False])
def test_logits_of_more_than_a_chunk_never_exist(layout: str, trained: bool) -> None:
    """The head's weight has 16 rows seen from its other side, so chunks are of 17 and more."""
    model = causal_model("llama")
    model.lm_head.weight.requires_grad_(trained)
    batch = LAYOUTS[layout](causal_rows(20, longest=30))
    assert len(batch["predicts"]) > 100
    for how, most in ((chunks(model, 20), 20), (None, batch["input_ids"].numel())):
        with Largest() as seen:
            token_loss(model, batch, how).sum.backward()
            token_outputs(model, batch, how)
        assert seen.positions == most


def test_logits_of_one_chunk_at_most_are_held_for_the_backward_pass() -> None:
    """But for that of the last chunk, with which it begins, nothing as wide as the vocabulary."""
    model = causal_model("llama")
    batch = packed(causal_rows(20, longest=30))
    held: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and tensor.shape[-1] == SIZE:
            held.append(len(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_loss(model, batch, chunks(model, 20))
    last = loss.count % 20
    assert 0 < last < 16  # 16 is the head's weight
    assert set(held) <= {last, 16}
    assert last in held


def test_unsupervised_positions_never_meet_the_head() -> None:
    model = causal_model("gpt2")
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    how = Chunks(1000, Readout())
    batch = padded(ROWS, EOS)
    found = token_loss(model, batch, how)
    assert seen == [found.count]
    assert found.count < batch["attention_mask"].sum()


# ---- what architectures do to logits ----


@pytest.mark.parametrize("architecture", [*CHUNKED, "recurrent-gemma", "falcon-h1"])
def test_the_readout_is_found_by_looking(architecture: str) -> None:
    steps = {
        "gemma2": (("final_logit_softcapping", 3.0),),
        "gemma3-capped": (("final_logit_softcapping", 3.0),),
        "granite": (("logits_scaling", 4.0),),
        "cohere": (("logit_scale", 0.25),),
        "cohere2": (("logit_scale", 0.25),),
        "recurrent-gemma": (("logits_soft_cap", 3.0),),
        "falcon-h1": (("lm_head_multiplier", 0.25),),
    }
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for training in (True, False):
            model = causal_model(architecture, dtype).train(training)
            assert readout_of(model) == Readout(steps.get(architecture, ()))
            assert model.training is training
            assert not model.lm_head._forward_hooks


def test_a_key_that_a_model_does_not_heed_is_no_part_of_the_readout() -> None:
    model = causal_model("llama", logit_scale=0.25, final_logit_softcapping=5.0)
    assert readout_of(model) == Readout()


def test_a_cap_far_above_the_logits_at_hand_is_found() -> None:
    model = causal_model("gemma2", final_logit_softcapping=30.0)
    assert readout_of(model) == Readout((("final_logit_softcapping", 30.0),))


def unknown(name: str) -> PreTrainedModel:
    """A model that sift cannot chunk.

    HyperCLOVAX multiplies by the number that Granite, under the same key, divides by; BERT's head
    has layers of its own before the last.
    """
    model = causal_model("llama" if name == "patched" else name)
    if name == "patched":
        inner = model.forward

        def forward(*args: Any, **more: Any) -> Any:
            out = inner(*args, **more)
            out.logits = out.logits.clamp(max=2)
            return out

        model.forward = forward  # type: ignore[method-assign]
    return model


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("name", ["hyperclovax", "bert", "patched"])
def test_a_model_of_unknown_logits_keeps_its_own_and_says_so(name: str) -> None:
    model = unknown(name)
    how, said = chunks_of(model, "auto")
    assert how is None
    assert said is not None
    assert said.startswith(f"train.chunk_loss: off for {type(model).__name__}: it")
    assert said == chunks_of(model, 8)[1]
    wanted = own_loss(model, ROWS)
    found = token_loss(model, padded(ROWS, EOS), how)
    torch.testing.assert_close(found.sum, wanted, rtol=1e-12, atol=0)
    wrong = token_loss(model, padded(ROWS, EOS), Chunks(8, Readout()))
    assert abs(number(wrong.sum - wanted)) > 1e-2


def test_what_a_recipe_asks_for() -> None:
    model = causal_model("llama")
    assert chunks_of(model, "off") == (None, None)
    assert chunks_of(model, 7) == (Chunks(7, Readout()), None)
    assert chunks_of(model, "auto") == (Chunks(1024, Readout()), None)
    large = causal_model("llama", vocab_size=1 << 17)
    assert chunks_of(large, "auto") == (Chunks(64, Readout()), None)


# ---- pads and packs ----


def test_pad_equals_eos_and_no_label_is_lost() -> None:
    """Labels come from spans: EOS within a row, and at its end, stays a target."""
    # rule 3.4
    batch = padded(ROWS, EOS)
    shifted = batch["labels"][:, 1:]
    assert int((shifted != UNSEEN).sum()) == sum(count_targets(row["labels"]) for row in ROWS)
    for at, row in enumerate(ROWS):
        length = len(row["input_ids"])
        assert batch["labels"][at, :length].tolist() == row["labels"]
        assert (batch["labels"][at, length:] == UNSEEN).all()
        assert batch["labels"][at, length - 1] == EOS
        assert batch["attention_mask"][at].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
    assert batch["labels"][0, 1] == EOS


def test_any_pad_token_gives_the_same_loss() -> None:
    model = causal_model("llama")
    sums = [number(token_loss(model, padded(ROWS, pad), None).sum) for pad in (0, EOS, 17)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-13) == pytest.approx(sums[2], rel=1e-13)


def test_a_packed_batch_holds_what_transformers_looks_for_and_no_more() -> None:
    batch = packed(ROWS)
    lengths = [len(row["input_ids"]) for row in ROWS]
    assert set(batch) == {"input_ids", "position_ids", "labels", "predicts"}
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"][0].tolist() == [at for length in lengths for at in range(length)]
    assert inputs_of(batch)["use_cache"] is False


def changed(batch: Batch, trap: str) -> dict[str, Any]:
    """What the model is called with when one of the conditions of packing is missing."""
    inputs = inputs_of(batch)
    if trap == "positions":
        del inputs["position_ids"]
    if trap == "mask":
        inputs["attention_mask"] = torch.ones_like(batch["input_ids"])
    if trap == "cache":
        del inputs["use_cache"]
    return inputs


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("trap", ["positions", "mask", "cache"])
def test_packing_needs_positions_and_neither_mask_nor_cache(trap: str, attention: str) -> None:
    """Each of the three alone lets rows see each other, and nothing but the loss tells."""
    model = causal_model("llama", attention=attention)
    batch = packed(ROWS)
    wanted = number(own_loss(model, ROWS))

    def loss(inputs: dict[str, Any]) -> float:
        logits = model(**inputs).logits[0][batch["predicts"]]
        targets = batch["labels"][0][batch["predicts"] + 1]
        return number(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    assert loss(inputs_of(batch)) == pytest.approx(wanted, rel=1e-12)
    assert abs(loss(changed(batch, trap)) - wanted) > 1e-2 * wanted


@pytest.mark.usefixtures("exactly")
def test_packing_leaves_no_first_token_to_the_row_before() -> None:
    """All rows are supervised from their first token on; it is no target, alone or packed."""
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    model = causal_model("llama")
    found = token_loss(model, packed(rows), chunks(model))
    assert found.count == sum(len(row["input_ids"]) - 1 for row in rows)
    torch.testing.assert_close(found.sum, own_loss(model, rows), rtol=1e-12, atol=0)
    joined = {key: [one for row in rows for one in row[key]] for key in ("input_ids", "labels")}
    assert count_targets(joined["labels"]) == found.count + len(rows) - 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", CHUNKED)
def test_packed_equals_alone_in_fp32(architecture: str, attention: str) -> None:
    model = causal_model(architecture, torch.float32, attention=attention)
    assert why_not_packed(model) is None
    alone = sum(number(token_loss(model, packed([row]), chunks(model)).sum) for row in ROWS)
    found = token_loss(model, packed(ROWS), chunks(model)).sum
    assert number(found) == pytest.approx(alone, rel=1e-5)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("exchange", [quicken_dropout, leave_masks_unread])
def test_packing_holds_under_the_attention_that_training_uses(exchange: Any) -> None:
    model = causal_model("mistral", attention="sdpa", attention_dropout=0.3)
    wanted = own_loss(model, ROWS)
    undo = exchange(model)
    assert model.config._attn_implementation != "sdpa"
    assert why_not_packed(model) is None
    torch.testing.assert_close(token_loss(model, packed(ROWS), None).sum, wanted)
    undo()


@pytest.mark.parametrize("name", ["opt", "bloom", "mamba", "recurrent-gemma", "falcon-h1", "bert"])
def test_the_probe_turns_packing_off_where_positions_are_not_honoured(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = causal_model(name, dtype).train()
        said = why_not_packed(model)
        assert said is not None
        assert model.training
    model = causal_model(name, torch.float32)
    how, _ = chunks_of(model, 4)
    wanted = number(own_loss(model, ROWS))
    assert number(token_loss(model, padded(ROWS, EOS), how).sum) == pytest.approx(wanted, rel=1e-4)
    if name in ("opt", "recurrent-gemma"):
        together = number(token_loss(model, packed(ROWS), how).sum)
        assert abs(together - wanted) > 1e-5 * wanted
        assert said.startswith("packed rows come out ")


def test_the_probe_knows_chunks_of_attention_which_short_rows_do_not_show() -> None:
    model = causal_model("llama", attention_chunk_size=8192)
    assert why_not_packed(model) == (
        "it attends within chunks of 8,192 tokens, and rows would lie across them"
    )


# ---- steps, the sparse gradient, selection ----


def step(model: PreTrainedModel, micro: Sequence[Batch], how: Chunks | None) -> Tensor:
    """The mean loss of a step as `add_gradient` makes it."""
    found: list[Loss] = [token_loss(model, batch, how) for batch in micro]
    total = sum(one.count for one in found)
    return torch.stack([one.sum / total for one in found]).sum()


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma2", "qwen3"])
def test_one_of_eight_equals_four_of_two_equals_packed(architecture: str) -> None:
    # rule 3.6
    model = causal_model(architecture)
    rows = causal_rows(8, seed=3)
    wanted = own_loss(model, rows) / sum(count_targets(row["labels"]) for row in rows)
    exact = gradients(model, wanted)
    twos = [rows[at : at + 2] for at in range(0, 8, 2)]
    for micro in (
        [padded(rows, EOS)],
        [padded(two, EOS) for two in twos],
        [padded([row], EOS) for row in rows],
        [packed(rows)],
        [packed(rows[:5]), packed(rows[5:])],
    ):
        for how in (chunks(model), None):
            loss = step(model, micro, how)
            assert number(loss) == pytest.approx(number(wanted), rel=1e-12)
            assert_equal(gradients(model, loss), exact, 1e-12)
    means = [own_loss(model, [row]) / count_targets(row["labels"]) for row in rows]
    assert abs(number(torch.stack(means).mean() - wanted)) > 1e-2  # the trap: a mean of means


def random_supports(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Support]:
    generator = torch.Generator().manual_seed(0)
    named = dict(model.named_parameters())
    return {
        name: Support.of(
            tuple(named[name].shape),
            torch.randperm(named[name].numel(), generator=generator)[:9].sort().values,
        )
        for name in names
    }


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", CHUNKED)
def test_the_sparse_gradient_is_the_masked_dense_one(architecture: str, layout: str) -> None:
    """Of every weight, the head among them, tied or not."""
    model = causal_model(architecture)
    batch = LAYOUTS[layout](ROWS)
    dense = gradients(model, own_loss(model, ROWS))
    model.zero_grad()
    names = [name for name, weight in model.named_parameters() if weight.numel() >= 9]
    head = model.get_output_embeddings().weight
    assert any(dict(model.named_parameters())[name] is head for name in names)
    parameters = attach(model, random_supports(model, names))
    for _ in range(2):
        parameters.grad.zero_()
        token_loss(model, batch, chunks(model)).sum.backward()
        for segment in parameters:
            wanted = segment.support.gather(dense[segment.name])
            found = parameters.grad[segment.span]
            assert number((found - wanted).norm()) < 1e-12 * (1 + number(wanted.norm()))
    assert all(weight.grad is None for weight in model.parameters())
    assert number(parameters.grad.norm()) > 1e-2


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_the_dense_gradient_of_a_trained_head_arrives_once_however_many_chunks(
    architecture: str,
) -> None:
    model = causal_model(architecture)
    arrived: list[Tensor] = []
    weight = model.get_output_embeddings().weight
    weight.register_post_accumulate_grad_hook(lambda one: arrived.append(one.grad.clone()))
    token_loss(model, packed(ROWS), chunks(model, 2)).sum.backward()
    (found,) = arrived
    wanted = torch.autograd.grad(own_loss(model, ROWS), weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def selected(
    architecture: str, score: str, layout: str, chunked: bool, exclude: Sequence[str] = ()
) -> dict[str, list[int]]:
    model = causal_model(architecture)
    how = chunks(model, 3) if chunked else None
    model.requires_grad_(False)
    names, _ = choose_weights(model, "all", exclude, (), ())

    def run(rows: Rows) -> None:
        token_loss(model, LAYOUTS[layout](rows), how).sum.backward()

    backward = [partial(run, rows) for rows in (ROWS[:3], ROWS[3:])]
    rule = Rule(SCORES[score], density=0.05)
    chosen = select(model, names, rule, backward=backward, descent_rate=1e-3)
    return {
        name: [] if one.positions is None else one.positions.tolist()
        for name, one in chosen.items()
    }


OF_INPUTS = {"input_norm", *OF_TOKENS}  # what scores see of padding, too


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "score", [name for name, one in SCORES.items() if one.needs_data and not one.needs & OF_INPUTS]
)
def test_packed_padded_and_chunked_choose_the_same_entries(score: str, architecture: str) -> None:
    """But for biases of keys, whose gradient is rounding alone: they move all scores alike."""
    exclude = ["*.c_attn.bias"] if architecture == "gpt2" else []
    found = selected(architecture, score, "packed", True, exclude)
    assert sum(map(len, found.values())) > 100
    assert found != selected(architecture, "magnitude", "packed", True, exclude)
    for layout in LAYOUTS:
        for chunked in (True, False):
            assert selected(architecture, score, layout, chunked, exclude) == found


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("score", [name for name, one in SCORES.items() if one.needs & OF_INPUTS])
def test_chunks_change_nothing_for_scores_of_inputs_but_at_the_head(score: str) -> None:
    """The head sees supervised tokens alone when chunked, all of them when not."""
    found = selected("llama", score, "packed", True, ["lm_head.weight"])
    assert found == selected("llama", score, "packed", False, ["lm_head.weight"])
    assert sum(map(len, found.values())) > 100


@pytest.mark.parametrize("recompute", [True, "wide"])
@pytest.mark.parametrize("how", ["chunked", "whole"])
@pytest.mark.parametrize("architecture", CHUNKED)
def test_recomputed_activations_change_nothing(
    architecture: str, how: str, recompute: Recompute
) -> None:
    model = causal_model(architecture).train()
    chosen = chunks(model) if how == "chunked" else None
    wanted = gradients(model, token_loss(model, padded(ROWS, EOS), chosen).sum)
    recompute_activations(model, recompute)
    found = gradients(model, token_loss(model, padded(ROWS, EOS), chosen).sum)
    assert_equal(found, wanted, 1e-12)


def test_wide_activations_are_computed_again_and_narrow_products_are_not() -> None:
    """Of a layer of Llama, gate and up are wider than the states; all else is made once."""
    model = causal_model("llama").train()
    batch = packed(ROWS)
    layers = len(model.base_model.layers)
    counts = {}
    for how in (False, "wide", True):
        recompute_activations(model, how)
        with Counted() as forward:
            loss = token_loss(model, batch, chunks(model, 10_000)).sum
        with Counted() as both:
            loss.backward()
        counts[how] = forward.products, both.products
    assert counts[False][0] == counts["wide"][0] == counts[True][0]
    assert counts["wide"][1] - counts[False][1] == 2 * layers
    assert counts[True][1] - counts[False][1] > 5 * layers


class Counted(TorchDispatchMode):
    """Counts the products of matrices within."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model", "meant"),
    [(causal_model("llama"), "wide"), (tiny_model("llama"), False), (tiny_model("bert"), False)],
    ids=["causal", "classifier", "encoder"],
)
def test_causal_models_recompute_what_is_wide_unless_told_otherwise(
    model: PreTrainedModel, meant: Recompute
) -> None:
    assert recompute_of(model, "auto") == meant
    assert [recompute_of(model, asked) for asked in (True, False, "wide")] == [True, False, "wide"]


@pytest.mark.parametrize("how", ["chunked", "whole"])
def test_inputs_of_a_pass_that_is_computed_again_count_once(how: str) -> None:
    """By what is seen forward alone; chunks at the head are computed again, all else if asked."""
    model = causal_model("llama-tied").train()
    chosen = chunks(model, 2) if how == "chunked" else None
    layers = {n: one for n, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    with torch.no_grad(), observed_inputs(layers) as wanted:
        token_loss(model, packed(ROWS), chosen)
    for again in (False, True):
        if again:
            recompute_activations(model)
        with observed_inputs(layers) as found:
            token_loss(model, packed(ROWS), chosen).sum.backward()
        assert set(found) == set(wanted) == set(layers)
        for name, one in wanted.items():
            torch.testing.assert_close(found[name], one, rtol=1e-5, atol=0)


# ---- evaluation ----


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["chunked", "whole"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_each_row_has_its_loss_its_targets_and_those_that_come_out_right(
    architecture: str, how: str, layout: str
) -> None:
    model = causal_model(architecture)
    nothing = {"input_ids": [5, 6], "labels": [5, UNSEEN]}
    one = {"input_ids": [7], "labels": [7]}
    rows = [*ROWS[:2], nothing, one, *ROWS[2:]]
    chosen = chunks(model) if how == "chunked" else None
    with torch.inference_mode():
        found = token_outputs(model, LAYOUTS[layout](rows), chosen)
    assert found.shape == (len(rows), 3)
    assert not found.requires_grad
    for at, row in enumerate(rows):
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        wanted = [
            int(logits[place].argmax()) == label
            for place, label in enumerate(row["labels"][1:])
            if label != UNSEEN
        ]
        assert found[at, 1:].tolist() == [len(wanted), sum(wanted)]
        assert number(found[at, 0]) == pytest.approx(number(own_loss(model, [row])), rel=1e-12)
    assert found[2:4].tolist() == [[0, 0, 0]] * 2


def test_right_tokens_are_counted() -> None:
    """Rows that a model writes itself, greedily, are right to the last token."""
    model = causal_model("llama")
    ids = [5, 9]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    row = {"input_ids": ids, "labels": [UNSEEN, UNSEEN, *ids[2:]]}
    wrong = {"input_ids": [*ids[:-1], (ids[-1] + 1) % SIZE], "labels": row["labels"]}
    wrong["labels"] = [*wrong["labels"][:-1], wrong["input_ids"][-1]]
    for lay in LAYOUTS.values():
        found = token_outputs(model, lay([row, wrong]), chunks(model))
        assert found[:, 1:].tolist() == [[6, 6], [6, 5]]


def test_perplexity_is_that_of_all_targets_and_no_mean_over_rows() -> None:
    # rule 3.7
    model = causal_model("llama")
    outputs = torch.cat([token_outputs(model, packed([row]), chunks(model)) for row in ROWS])
    found = score_tokens(["loss", "perplexity"], outputs.float().numpy())
    mean = number(own_loss(model, ROWS)) / sum(count_targets(row["labels"]) for row in ROWS)
    assert found["loss"] == pytest.approx(mean, rel=1e-6)
    assert found["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)
    by_row = number((outputs[:, 0] / outputs[:, 1]).mean())
    assert abs(by_row - mean) > 1e-2


row = st.lists(st.tuples(st.integers(3, SIZE - 1), st.booleans()), min_size=1, max_size=9)


@given(st.lists(row, min_size=1, max_size=6))
def test_both_layouts_hold_the_same_targets(rows: list[list[tuple[int, bool]]]) -> None:
    made = [
        {
            "input_ids": [token for token, _ in one],
            "labels": [token if seen else UNSEEN for token, seen in one],
        }
        for one in rows
    ]
    pairs = []
    for lay in LAYOUTS.values():
        batch = lay(made)
        at, ids = batch["predicts"], batch["input_ids"].flatten()
        targets = batch["labels"].flatten()[at + 1]
        assert (ids[at + 1] == targets).all()
        pairs.append(list(zip(ids[at].tolist(), targets.tolist(), strict=True)))
    wanted = [
        (one[at][0], one[at + 1][0]) for one in rows for at in range(len(one) - 1) if one[at + 1][1]
    ]
    assert pairs == [wanted, wanted]
    assert len(wanted) == sum(count_targets(one["labels"]) for one in made)


def test_the_models_own_call_is_left_as_it_was() -> None:
    """A cache is there again for generation: none of the above changes the configuration."""
    model = causal_model("llama")
    before = copy.deepcopy(model.config.to_dict())
    token_loss(model, packed(ROWS), chunks(model)).sum.backward()
    hidden_states(model, packed(ROWS))
    assert model.config.to_dict() == before
    assert model(torch.tensor([[5, 6]])).past_key_values is not None
