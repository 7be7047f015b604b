"""Selection against brute force on the model's own gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sift_cli.errors import ExitCode, SiftError
from sift_cli.selection.parts import Retained
from sift_cli.selection.policies import POLICIES, SCOPES
from sift_cli.selection.policies import SCORES as SCORE_NAMES
from sift_cli.selection.scores import SCORES, find_score
from sift_cli.selection.select import Rule, beside, planned, select
from sift_cli.selection.structures import Units
from sift_cli.selection.targets import choose_vectors, choose_weights
from sift_cli.sparse import Support
from tests.support.models import ARCHITECTURES, tiny_batch, tiny_model


def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    reference = copy.deepcopy(model)
    reference.requires_grad_(True)
    for batch in batches:
        reference(**batch).loss.backward()
    return {name: weight.grad for name, weight in reference.named_parameters()}


def brute_force(scores: Tensor, count: int) -> list[int]:
    flat = scores.flatten().tolist()
    return sorted(sorted(range(len(flat)), key=lambda at: (-flat[at], at))[:count])


def positions(support: Support) -> list[int]:
    if support.positions is None:
        return list(range(support.size))
    return support.positions.tolist()


def run(
    model: nn.Module, batches: int = 1, score: str = "gradient", **how: Any
) -> dict[str, Support]:
    model.requires_grad_(False)
    backward = [
        lambda seed=seed: model(**tiny_batch(seed=seed)).loss.backward() for seed in range(batches)
    ]
    rule = Rule(SCORES[score], **how)
    names = [name for name, _ in model.named_parameters()]
    if rule.structure == "block":
        names.remove("score.weight")  # 3 x 16
    return select(model, names, rule, backward=backward)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_scope_takes_the_largest_gradients_of_each_weight(architecture: str) -> None:
    model = tiny_model(architecture)
    wanted = gradients(model, [tiny_batch()])
    supports = run(model, score="gradient", scope="tensor", density=0.03)
    assert set(supports) == {name for name, gradient in wanted.items() if gradient is not None}
    for name, support in supports.items():
        count = -(-wanted[name].numel() * 3 // 100)
        assert positions(support) == brute_force(wanted[name].abs(), count), name
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_global_scope_takes_the_largest_gradients_of_all() -> None:
    model = tiny_model("bert")
    wanted = gradients(model, [tiny_batch()])
    supports = run(model, score="gradient", scope="global", budget=200)
    everything = torch.cat([wanted[name].abs().flatten() for name in wanted])
    threshold = everything.sort(descending=True).values[199]
    assert sum(map(len, supports.values())) == 200
    for name, support in supports.items():
        assert wanted[name].abs().flatten()[positions(support)].min() >= threshold
    assert len({len(support) for support in supports.values()}) > 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_several_batches_are_ranked_by_the_gradient_of_their_sum(scope: str) -> None:
    model = tiny_model("bert", torch.float32)
    wanted = gradients(model, [tiny_batch(seed=seed) for seed in range(3)])
    supports = run(model, batches=3, score="gradient", scope=scope, density=0.05)
    if scope == "tensor":
        name = "bert.encoder.layer.1.output.dense.weight"
        count = len(supports[name])
        assert positions(supports[name]) == brute_force(wanted[name].abs(), count)
    else:
        everything = torch.cat([gradient.abs().flatten() for gradient in wanted.values()])
        total = sum(map(len, supports.values()))
        threshold = everything.sort(descending=True).values[total - 1]
        for name, support in supports.items():
            assert wanted[name].abs().flatten()[positions(support)].min() >= threshold * 0.999


LOOKS_AT_GRADIENTS = [name for name, score in SCORES.items() if "gradient" in score.needs]


@pytest.mark.parametrize("score", LOOKS_AT_GRADIENTS)
@pytest.mark.parametrize("batches", [1, 2])
def test_no_two_dense_gradients_are_held(score: str, batches: int) -> None:
    model = tiny_model("bert")
    weights = dict(model.named_parameters())
    alive = []

    def count(_: Tensor) -> None:
        alive.append(sum(weight.grad is not None for weight in weights.values()))

    for weight in weights.values():
        weight.register_post_accumulate_grad_hook(count)
    run(model, batches=batches, score=score, scope="global", density=0.01)
    assert len(alive) == batches * len(weights)
    assert max(alive) == 1


def test_magnitude_needs_no_backward_pass() -> None:
    model = tiny_model("bert")
    weights = dict(model.named_parameters())
    supports = select(model, list(weights), Rule(SCORES["magnitude"], density=0.1))
    for name, weight in weights.items():
        count = -(-weight.numel() // 10)
        assert positions(supports[name]) == brute_force(weight.detach().abs(), count)


def test_random_depends_on_seed_and_name_alone() -> None:
    model = tiny_model("bert")
    names = [name for name, _ in model.named_parameters()]
    rule = Rule(SCORES["random"], density=0.1)
    first = select(model, names, rule, seed=1)
    name = "bert.encoder.layer.0.output.dense.weight"
    alone = select(model, [name], rule, seed=1)
    assert positions(alone[name]) == positions(first[name])
    assert positions(select(model, names, rule, seed=2)[name]) != positions(first[name])
    other = "bert.encoder.layer.1.output.dense.weight"
    assert positions(first[other]) != positions(first[name])


EVERY = [score for score in SCORES if score != "change"]


@pytest.mark.parametrize("score", EVERY)
@pytest.mark.parametrize("scope", SCOPES)
def test_budgets_are_met_exactly(score: str, scope: str) -> None:
    supports = run(tiny_model("bert"), score=score, scope=scope, budget=777)
    assert sum(map(len, supports.values())) == 777


@pytest.mark.parametrize("score", EVERY)
def test_density_one_selects_everything(score: str) -> None:
    model = tiny_model("bert")
    supports = run(model, score=score, scope="tensor", density=1.0)
    assert all(support.positions is None for support in supports.values())
    assert len(supports) == len(dict(model.named_parameters()))


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = tiny_model("bert")
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(SiftError, match=r"the scores of .* are not finite") as caught:
        run(model, score="gradient", scope="tensor", density=0.01)
    assert caught.value.code == ExitCode.NOT_FINITE


def test_every_policy_names_rows_that_exist_and_its_source() -> None:
    assert set(SCORE_NAMES) == set(SCORES)
    for name, policy in POLICIES.items():
        assert policy.score in SCORES, name
        assert policy.scope in SCOPES, name
        assert any(character.isdigit() for character in policy.paper), name


WEIGHT = "bert.encoder.layer.0.attention.self.key.weight"


def test_scores_by_hand() -> None:
    model = tiny_model("bert")
    weight = dict(model.named_parameters())[WEIGHT].detach()
    batches = [tiny_batch(seed=seed) for seed in range(2)]
    apart = [gradients(model, [batch])[WEIGHT] for batch in batches]
    seen: list[Tensor] = []
    layer = model.bert.encoder.layer[0].attention.self.key
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 16)))
    for batch in batches:
        model(**batch)
    tokens = torch.cat(seen)
    norm = tokens.float().square().sum(0).sqrt().double()
    summed = apart[0] + apart[1]
    bias = WEIGHT.replace("weight", "bias")  # its gradient is the sum of output gradients
    shift = sum(gradients(model, [batch])[bias] for batch in batches)
    together = summed.abs() / (apart[0].square() + apart[1].square()).sqrt()
    rows, columns = (summed.square().mean(dim, keepdim=True).sqrt() for dim in (1, 0))
    wanted = {
        "gradient": summed.abs(),
        "absolute-gradient": apart[0].abs() + apart[1].abs(),
        "fisher": apart[0].square() + apart[1].square(),
        "snip": (weight * summed).abs(),
        "magnitude": weight.abs(),
        "smallest-magnitude": -weight.abs(),
        "activation-magnitude": weight.abs() * norm,
        "large-gradient-small-weight": summed.abs() / (weight.abs() + 1e-8),
        "gradient-per-input": summed.abs() / norm,
        "balanced-gradient": summed.abs() / (rows * columns),
        "centred-gradient": (summed - torch.outer(shift, tokens.mean(0))).abs()  # type: ignore[arg-type]
        / tokens.std(0, correction=0),
        "agreement": together,
        "agreed-gradient": summed.abs() * together,
    }
    for score, dense in wanted.items():
        found = positions(run(tiny_model("bert"), batches=2, score=score, density=0.1)[WEIGHT])
        assert found == brute_force(dense, 26), score
    assert set(wanted) == set(EVERY) - {"random", "low-rank", "sign-descent"}


def test_low_rank_is_the_truncated_svd() -> None:
    model = tiny_model("bert")
    weight = dict(model.named_parameters())[WEIGHT].detach().double()
    left, values, right = torch.linalg.svd(weight)
    near = (left[:, :3] * values[:3] @ right[:3]).abs()
    found = positions(run(model, score="low-rank", density=0.1, rank=3)[WEIGHT])
    assert len(set(found) & set(brute_force(near, 26))) >= 25  # fp32 may swap the last


@pytest.mark.parametrize("structure", ["row", "column", "block"])
def test_structures_rank_by_mean_score_also_in_transposed_layers(structure: str) -> None:
    model = tiny_model("gpt2")
    wanted = gradients(model, [tiny_batch()])
    supports = run(model, density=0.1, structure=structure, block=4)
    for name, transposed in (("transformer.h.0.attn.c_attn.weight", True), ("score.weight", False)):
        if structure == "block" and name == "score.weight":
            continue
        stored = wanted[name].abs()
        dense = stored.t() if transposed else stored
        numbers = torch.arange(stored.numel()).view(stored.shape)
        numbers = numbers.t() if transposed else numbers
        high, wide = {"row": (1, dense.shape[1]), "column": (dense.shape[0], 1), "block": (4, 4)}[
            structure
        ]
        cells = [
            (slice(r, r + high), slice(c, c + wide))
            for r in range(0, dense.shape[0], high)
            for c in range(0, dense.shape[1], wide)
        ]
        means = torch.stack([dense[cell].mean() for cell in cells])
        best = brute_force(means, -(-len(cells) // 10))
        places = sorted(at for cell in best for at in numbers[cells[cell]].flatten().tolist())
        assert positions(supports[name]) == places, name


def test_patterns_give_weights_their_own_density() -> None:
    model = tiny_model("bert")
    supports = run(model, density={"default": 0.01, "*.query": 0.5, "layer.1": 0.25})
    at = "bert.encoder.layer.{}.attention.self.{}.weight"
    counts = [len(supports[at.format(*one)]) for one in ((0, "key"), (0, "query"), (1, "query"))]
    assert counts == [3, 128, 64]
    with pytest.raises(SiftError, match=r"no targeted parameter .* '\*.qeury'.* such as query"):
        run(model, density={"default": 0.01, "*.qeury": 0.5})


def test_a_score_that_needs_batches_says_so() -> None:
    model = tiny_model("bert")
    with pytest.raises(SiftError, match="it looks at batches, and there are none"):
        select(model, [WEIGHT], Rule(SCORES["gradient"], density=0.1))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("structure", ["entry", "block"])
def test_retained_units_stay_but_for_those_that_changed_least(scope: str, structure: str) -> None:
    model = tiny_model("bert")
    names = [WEIGHT, "bert.encoder.layer.1.output.dense.weight"]
    rule = Rule(SCORES["random"], scope, structure, density=0.25, block=2)
    first = select(model, names, rule, seed=1)
    generator = torch.Generator().manual_seed(0)
    change = {name: torch.rand(len(one), generator=generator) for name, one in first.items()}
    retained = {name: Retained(one, change[name], 0.3) for name, one in first.items()}
    second = select(model, names, rule, seed=2, retained=retained)
    assert sum(map(len, second.values())) == sum(map(len, first.values()))
    for name, before in first.items():
        named = dict(model.named_parameters())
        units = Units.of(name, named[name], structure, 2, transposed=False)
        moved: dict[int, float] = {}
        owners = units.holding(torch.tensor(positions(before))).tolist()
        for owner, one in zip(owners, change[name].tolist(), strict=True):
            moved[owner] = moved.get(owner, 0.0) + one
        drop = -(-len(moved) * 3 // 10)
        stay = sorted(moved, key=lambda unit: moved[unit])[drop:]
        now = set(units.holding(torch.tensor(positions(second[name]))).tolist())
        assert set(stay) <= now
        assert now - set(moved)  # and some are new


OWN = """
import torch
def upper(weight, gradient):
    return gradient.abs() * torch.ones_like(weight).triu()
def odd(flavour):
    return flavour
def short(weight):
    return weight[0]
"""


def test_an_own_score_needs_permission_and_the_right_shape(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(SiftError, match="is code; pass --allow-code to run it"):
        find_score(f"{path}:upper")
    model = tiny_model("bert")
    model.requires_grad_(False)
    rule = Rule(find_score(f"{path}:upper", allow_code=True), density=0.1)
    backward = [lambda: model(**tiny_batch()).loss.backward()]
    found = positions(select(model, [WEIGHT], rule, backward=backward)[WEIGHT])
    assert found == brute_force(gradients(model, [tiny_batch()])[WEIGHT].abs().triu(), 26)
    for name, said in (
        (f"{path}:odd", "asks for flavour; a score may ask for weight, gradient"),
        (f"{path}:none", "holds no function 'none'"),
        (f"{tmp_path}/no.py:none", "no such file"),
    ):
        with pytest.raises(SiftError, match=said):
            find_score(name, allow_code=True)
    wrong = Rule(find_score(f"{path}:short", allow_code=True), density=0.1)
    with pytest.raises(SiftError, match=r"of shape \[16, 16\] it gave \[16\]"):
        select(model, [WEIGHT], wrong)


# beside vectors


def divided(rule: Rule, exclude: list[str] | None = None) -> tuple[list[str], Rule, int, int]:
    """What is left of a tiny BERT's weights beside its vectors, the entries of both, and before."""
    model = tiny_model("bert")
    names, head = choose_weights(model, "all-linear", [], ["classifier"], [])
    vectors = choose_vectors(model, exclude or [], head)
    left, own = beside(model, names, vectors, rule)
    assert left == [name for name in names if name not in vectors]
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    spent = sum(sizes[name] for name in vectors)
    return left, own, spent, sum(planned(model, names, rule).values())


@pytest.mark.parametrize("scope", ["tensor", "neuron", "global"])
@pytest.mark.parametrize(("structure", "unit"), [("entry", 1), ("block", 16), ("row", 16)])
def test_vectors_and_entries_share_one_budget(scope: str, structure: str, unit: int) -> None:
    if scope == "neuron" and structure == "row":
        return
    model = tiny_model("bert")
    for size in ({"density": 0.2}, {"budget": 700}, {"density": 1.0}):
        rule = Rule(find_score("magnitude"), scope, structure, block=4, **size)  # type: ignore[arg-type]
        left, own, spent, total = divided(rule)
        total = rule.budget or total
        counts = planned(model, left, own)
        assert own.density is None
        assert total - 2 * unit < sum(counts.values()) + spent <= total
        if structure == "entry":
            assert sum(counts.values()) + spent == total
        chosen = select(model, left, own)
        if scope != "global":
            assert {name: len(one) for name, one in chosen.items()} == counts
        elif structure == "entry":
            assert sum(map(len, chosen.values())) == total - spent


def test_densities_by_pattern_go_on_in_proportion() -> None:
    model = tiny_model("bert")
    rule = Rule(find_score("magnitude"), density={"default": 0.1, "query": 0.8})
    left, own, spent, total = divided(rule)
    counts = planned(model, left, own)
    assert sum(counts.values()) + spent == total
    named = dict(model.named_parameters())
    shares = {name: count / named[name].numel() for name, count in counts.items()}
    query, other = (
        [share for name, share in shares.items() if ("query" in name) == wanted]
        for wanted in (True, False)
    )
    assert min(query) == pytest.approx(8 * max(other), rel=0.15)
    assert {name: len(one) for name, one in select(model, left, own).items()} == counts


def test_without_vectors_nothing_changes() -> None:
    rule = Rule(find_score("magnitude"), density=0.1)
    assert beside(tiny_model("bert"), ["a", "b"], [], rule) == (["a", "b"], rule)


def test_a_budget_that_vectors_use_up_is_refused() -> None:
    said = r"^selection\.vectors: biases and norms hold 400 entries and the budget is {}, so "
    for size, total in (({"density": 0.05}, "236"), ({"budget": 400}, "400")):
        with pytest.raises(SiftError, match=said.format(total)):
            divided(Rule(find_score("magnitude"), **size))  # type: ignore[arg-type]
    with pytest.raises(SiftError, match=said.format(415)):
        divided(Rule(find_score("magnitude"), structure="row", budget=415))
    assert divided(Rule(find_score("magnitude"), budget=401))[1].budget == 1
    assert divided(Rule(find_score("magnitude"), density=0.05), ["all-linear"])[1].budget == 76
