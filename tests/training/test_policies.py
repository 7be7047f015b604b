"""One conformance table: every policy with every structure keeps the same invariants."""

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from sift_cli.analysis.adapted import build
from sift_cli.analysis.plan import plan
from sift_cli.delta import load_delta
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, load_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.selection.policies import CHANGING, POLICIES, STRUCTURES
from sift_cli.selection.structures import Units
from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.sparse.optimizer import HISTORIES
from sift_cli.training import choosing, train
from sift_cli.training.batches import Batches
from sift_cli.training.choosing import Chooser
from sift_cli.training.parts import Parts, rule_of
from sift_cli.training.schedule import schedule_of
from sift_cli.training.step import add_gradient
from tests.support.models import tiny_batch, tiny_model

CASES = [
    (policy, structure)
    for policy, row in POLICIES.items()
    for structure in STRUCTURES
    if not (row.scope == "neuron" and structure in ("row", "column"))
]
TARGET = "selection.target=[query.weight, output.dense.weight, intermediate.dense]"


def resolved(path: Path, policy: str, structure: str, *more: str) -> Recipe:
    row = POLICIES[policy]
    changes = [
        TARGET,
        f"selection.policy={policy}",
        f"selection.structure={structure}",
        "selection.density=0.2",
        "eval.keep=last",
        "train.max_steps=5",
        "train.warmup=0.0",
    ]
    if structure == "block":
        changes.append("selection.block_size=4")
    if row.score == "low-rank":
        changes.append("selection.rank=3")
    if row.schedule == "every-n-steps":
        changes.append("selection.every=2")
    if row.schedule == "after-warmup":
        changes.append("selection.warmup_steps=2")
    return load_recipe(path, [*changes, *more])


def opened(recipe: Recipe) -> tuple[Session, Chooser]:
    session = open_session(recipe)
    session.model.double().train()
    batches = Batches.of(recipe.train, session.train.lengths)  # type: ignore[union-attr]
    rule = rule_of(recipe.selection)
    return session, Chooser.of(recipe.selection, recipe.train, session, batches, rule=rule)


class Reference:
    """Dense autograd and dense moments; what a mask says is all that moves.

    Where weights have scales, it is torch.optim.AdamW with a group for each input: `factors`
    ([inputs]) multiply the learning rate of each column.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        recipe: Recipe,
        factors: Mapping[str, Tensor] | None = None,
        new: Collection[str] = (),
    ) -> None:
        self.model, self.recipe = model, recipe
        self.factors, self.new = factors or {}, new
        self.weights = dict(model.named_parameters())
        self.base = {name: weight.detach() for name, weight in base.named_parameters()}
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = copy.deepcopy(self.first)
        self.age = copy.deepcopy(self.first)
        self.mask = {
            name: torch.zeros_like(w, dtype=torch.bool) for name, w in self.weights.items()
        }

    def take(self, masks: dict[str, Tensor], sparse: list[str]) -> None:
        """A new mask; what it does to moments and weights."""
        for name, mask in masks.items():
            gone = self.mask[name] & ~mask
            history = self.recipe.selection.history
            lost = gone if history == "keep" else torch.zeros_like(gone)
            if history == "reset" and name in sparse:
                lost = torch.ones_like(gone)
            for held in (self.first, self.second, self.age):
                held[name][lost] = 0
            if self.recipe.selection.revert:
                self.weights[name].data[gone] = self.base[name][gone]
            self.mask[name] = mask

    def step(self, session: Session, rows: list[list[int]], rate: float) -> None:
        batch = session.collate(session.train.take([row for part in rows for row in part]))  # type: ignore[union-attr]
        self.model.zero_grad()
        self.model(**batch).loss.backward()
        for name, weight in self.weights.items():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad *= self.mask[name]
        nn.utils.clip_grad_norm_(self.weights.values(), self.recipe.train.max_grad_norm or 1e9)
        for name, weight in self.weights.items():
            mask, grad = self.mask[name], weight.grad
            self.age[name] += mask
            self.first[name] = torch.where(
                mask, 0.9 * self.first[name] + 0.1 * grad, self.first[name]
            )
            self.second[name] = torch.where(
                mask, 0.999 * self.second[name] + 0.001 * grad**2, self.second[name]
            )
            mean = self.first[name] / (1 - 0.9 ** self.age[name])
            square = self.second[name] / (1 - 0.999 ** self.age[name])
            towards = self.base[name] if self.based(name) else torch.zeros_like(weight)
            decay = rate * self.recipe.train.weight_decay * (weight.data - towards)
            own_rate = rate * self.factors.get(name, 1.0)
            moved = weight.data - decay - own_rate * mean / (square.sqrt() + 1e-8)
            weight.data = torch.where(mask, moved, weight.data)

    def based(self, name: str) -> bool:
        return self.recipe.train.decay_toward == "base" and name not in self.new


def factors_of(session: Session, chooser: Chooser) -> dict[str, Tensor]:
    """By hand: the median input's root mean square over each input's, as a power of two."""
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in session.model.named_modules():
        if f"{name}.weight" in chooser.sparse and isinstance(module, nn.Linear):
            seen = inputs.setdefault(f"{name}.weight", [])
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, given, seen=seen: seen.append(given[0].flatten(0, -2).detach())
                )
            )
    for step, rows in enumerate(chooser.batches, start=1):
        if step <= chooser.selection.batches:
            session.model(**session.collate(session.train.take([r for part in rows for r in part])))  # type: ignore[union-attr]
    for handle in handles:
        handle.remove()
    factors = {}
    for name, seen in inputs.items():
        rms = torch.cat(seen).square().mean(0).sqrt()
        factors[name] = 2.0 ** torch.log2(rms.median() / rms).round().clamp(max=3)
    return factors


def masks_of(model: nn.Module, supports: dict[str, Support]) -> dict[str, Tensor]:
    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in model.named_parameters()}
    for name, support in supports.items():
        where = slice(None) if support.positions is None else support.positions.long()
        masks[name].view(-1)[where] = True
    return masks


SCALED = ["train.step_scale=input", "train.weight_decay=0.3", "train.decay_toward=base"]


@pytest.mark.parametrize("more", [[], SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize(("policy", "structure"), CASES)
def test_every_step_equals_a_dense_optimizer_under_the_mask(
    recipe_file: Path, policy: str, structure: str, more: list[str]
) -> None:
    follow(resolved(recipe_file, policy, structure, *more), check_sizes)


@pytest.mark.parametrize(("policy", "structure"), CASES)
def test_vectors_train_whole_within_the_budget(
    recipe_file: Path, policy: str, structure: str
) -> None:
    def check(
        recipe: Recipe, model: nn.Module, names: list[str], supports: dict[str, Support]
    ) -> int:
        weights = dict(model.named_parameters())
        head = {name for name in weights if name.startswith("classifier")}
        vectors = {name for name, one in weights.items() if one.dim() == 1} - head
        assert supports.keys() <= {*names, *vectors, *head}
        for name in {*vectors, *head}:
            assert supports[name].positions is None
        spent = sum(weights[name].numel() for name in vectors)
        trained = {name: len(supports[name]) for name in names if name in supports}
        without = resolved(recipe_file, policy, structure)
        total = sum(
            Parts.of(without.selection, model, head, rule_of(without.selection))
            .planned(model)
            .values()
        )
        assert total - 64 < sum(trained.values()) + spent <= total
        if structure == "entry":
            assert sum(trained.values()) + spent == total
        parts = Parts.of(recipe.selection, model, head, rule_of(recipe.selection))
        counts = parts.planned(model)
        assert {name: counts[name] for name in vectors} == {
            name: weights[name].numel() for name in vectors
        }
        if recipe.selection.scope != "global":
            assert {name: counts[name] for name in trained} == trained
        return 0

    follow(resolved(recipe_file, policy, structure, "selection.vectors=true", *SCALED), check)


def follow(
    recipe: Recipe,
    check: Callable[[Recipe, nn.Module, list[str], dict[str, Support]], int],
) -> None:
    """Takes five steps beside the reference; `check` sees the supports of each."""
    session, chooser = opened(recipe)
    base = copy.deepcopy(session.model)
    scaled = recipe.train.step_scale != "none"
    factors = factors_of(session, chooser) if scaled else {}
    alive: list[int] = []
    for weight in session.model.parameters():
        weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(w.grad is not None for w in session.model.parameters()))
        )
    optimizer = chooser.begin()
    if chooser.rule.score.needs_data:
        assert max(alive) == 1  # one dense gradient at a time
    parameters, schedule = optimizer.parameters, schedule_of(recipe.train, optimizer.adamw, 5)
    reference = Reference(copy.deepcopy(base), base, recipe, factors, session.new)
    assert not scaled or any(len(own.unique()) > 1 for own in factors.values())
    head = session.model.classifier.state_dict()  # a head-only warm-up may have moved it
    reference.model.classifier.load_state_dict(head)
    counts = set()
    for step, rows in enumerate(chooser.batches, start=1):
        if chooser.due(step):
            chooser.change(step, optimizer)
        supports = {segment.name: segment.support for segment in parameters}
        counts.add(check(recipe, session.model, list(chooser.sparse), supports))
        reference.take(masks_of(session.model, supports), list(chooser.sparse))
        add_gradient(session, rows)
        optimizer.clip(recipe.train.max_grad_norm)
        reference.step(session, rows, float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        for name, weight in session.model.named_parameters():
            torch.testing.assert_close(
                weight, reference.weights[name], rtol=1e-7, atol=1e-9, msg=f"{name}, step {step}"
            )
    assert len(counts) == 1


def check_sizes(
    recipe: Recipe, model: nn.Module, names: list[str], supports: dict[str, Support]
) -> int:
    """Sorted, unique, in range, whole units, and as many as the density says."""
    chosen, total, available = recipe.selection, 0, 0
    for name in names:
        weight = dict(model.named_parameters())[name]
        units = Units.of(name, weight, str(chosen.structure), chosen.block_size or 1, False)
        available += weight.numel()
        if name not in supports:
            assert chosen.scope == "global"
            continue
        support = supports[name]
        positions = support.positions
        if positions is None:
            positions = torch.arange(support.size)
        assert bool((positions[1:] > positions[:-1]).all())
        assert 0 <= int(positions[0]) <= int(positions[-1]) < weight.numel()
        _, filled = units.holding(positions.long()).unique(return_counts=True)
        assert set(filled.tolist()) == {units.size}
        if chosen.scope != "global":
            assert len(filled) == -(-units.count // 5)
        total += len(positions)
    if chosen.scope == "global":
        budget = -(-available // 5)
        assert budget - 32 < total <= budget
        if chosen.structure == "entry":
            assert total == budget
        return 0
    return total


@pytest.mark.parametrize(("policy", "structure"), CASES)
def test_a_run_repeats_to_the_byte_and_its_delta_is_the_trained_model(
    recipe_file: Path, tmp_path: Path, policy: str, structure: str
) -> None:
    recipe = resolved(recipe_file, policy, structure)
    runs = [train(recipe, tmp_path / name) for name in "ab"]
    assert runs[0].delta_sha256 == runs[1].delta_sha256
    delta = load_delta(tmp_path / "a/delta.safetensors")
    assert delta.entries == runs[0].changed_entries >= runs[0].trained_entries
    if recipe.selection.schedule not in CHANGING or recipe.selection.score in (
        "random",
        "magnitude",
    ):
        assert delta.entries == runs[0].trained_entries
    loaded, _ = load_tuned(str(tmp_path / "a"))  # checks the fingerprint of every trained weight
    session = open_session(recipe, train=False, tuned=loaded)
    assert session.evaluate() == runs[0].metrics


@pytest.mark.parametrize(
    "policy", [name for name, row in POLICIES.items() if row.scope == "neuron"]
)
@pytest.mark.parametrize("structure", ["row", "column"])
def test_a_neuron_has_no_rows_and_columns(recipe_file: Path, policy: str, structure: str) -> None:
    with pytest.raises(SiftError, match=f"a {structure} is no part of one neuron"):
        resolved(recipe_file, policy, structure)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("more", [[], SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("policy", ["current-batch", "drop-grow"])
def test_histories_against_dense_moments(
    recipe_file: Path, policy: str, more: list[str], history: str
) -> None:
    recipe = resolved(
        recipe_file,
        policy,
        "entry",
        f"selection.history={history}",
        "train.max_steps=12",
        "train.epochs=3",
        "train.lr_schedule=constant",
        *more,
    )
    session, chooser = opened(recipe)
    base = copy.deepcopy(session.model)
    factors = factors_of(session, chooser) if more else {}
    optimizer = chooser.begin()
    schedule_of(recipe.train, optimizer.adamw, 12)
    parameters = optimizer.parameters
    reference = Reference(copy.deepcopy(base), base, recipe, factors, session.new)
    replaced = []
    for step, rows in enumerate(chooser.batches, start=1):
        before = {segment.name: segment.support for segment in parameters}
        if chooser.due(step):
            chooser.change(step, optimizer)
            now = masks_of(base, {segment.name: segment.support for segment in parameters})
            then = masks_of(base, before)
            replaced.append(sum(int((then[name] & ~now[name]).sum()) for name in now))
        if chooser.due(step) or step == 1:
            supports = {segment.name: segment.support for segment in parameters}
            reference.take(masks_of(base, supports), list(chooser.sparse))
        add_gradient(session, rows)
        optimizer.clip(1.0)
        reference.step(session, rows, 1e-2)
        optimizer.step()
    assert min(replaced) > 0
    if history == "park":  # some entry came back with more than the steps since it came back
        assert optimizer.ages is not None
        assert len(set(optimizer.ages.tolist())) > 2
    for name, weight in session.model.named_parameters():
        torch.testing.assert_close(weight, reference.weights[name], rtol=1e-7, atol=1e-9, msg=name)


def test_every_batch_chooses_the_top_of_that_batch(recipe_file: Path) -> None:
    recipe = resolved(recipe_file, "current-batch", "entry")
    session, chooser = opened(recipe)
    optimizer = chooser.begin()
    schedule_of(recipe.train, optimizer.adamw, 5)
    parameters = optimizer.parameters
    for step, rows in enumerate(chooser.batches, start=1):
        if chooser.due(step):
            chooser.change(step, optimizer)
        dense = copy.deepcopy(session.model)
        for module in dense.modules():
            vars(module).pop("forward", None)
        dense.requires_grad_(True)
        batch = session.collate(session.train.take([row for part in rows for row in part]))  # type: ignore[union-attr]
        dense(**batch).loss.backward()
        gradients = {name: weight.grad for name, weight in dense.named_parameters()}
        for segment in parameters:
            if segment.support.positions is not None:
                top = gradients[segment.name].abs().flatten().topk(len(segment.support)).indices
                assert torch.equal(top.sort().values, segment.support.positions.long())
        add_gradient(session, rows)
        optimizer.step()


def test_a_warm_up_of_all_goes_back_and_one_of_the_head_stays(recipe_file: Path) -> None:
    for trains, score in (("all", "change"), ("head", "gradient")):
        recipe = resolved(
            recipe_file,
            "lottery",
            "entry",
            f"selection.warmup_trains={trains}",
            f"selection.score={score}",
        )
        session, chooser = opened(recipe)
        base = copy.deepcopy(session.model.state_dict())
        chooser.begin().parameters.detach()
        for name, weight in session.model.state_dict().items():
            head = trains == "head" and name.startswith("classifier")
            assert torch.equal(weight, base[name]) != head, name


def test_the_lottery_takes_what_moved_most(recipe_file: Path) -> None:
    recipe = resolved(recipe_file, "lottery", "entry", "selection.warmup_learning_rate=0.01")
    session, chooser = opened(recipe)
    dense = copy.deepcopy(session.model)
    trained = {n: w for n, w in dense.named_parameters() if n in {*chooser.sparse, *chooser.dense}}
    adamw = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    for rows, _ in zip(chooser.batches, range(2), strict=False):
        adamw.zero_grad()
        dense(**session.collate(session.train.take(rows[0]))).loss.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adamw.step()
    start = dict(session.model.named_parameters())
    moved = torch.cat([(trained[n] - start[n]).abs().flatten() for n in chooser.sparse]).detach()
    parameters = chooser.begin().parameters
    chosen = masks_of(session.model, {s.name: s.support for s in parameters})
    flags = torch.cat([chosen[name].flatten() for name in chooser.sparse])
    assert float(moved[flags].min()) >= float(moved[~flags].max()) * (1 - 1e-4)


def test_parked_masters_come_back_with_what_rounding_hid() -> None:
    layer = nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    both = [Support.of((1, 4), torch.tensor([at, 3])) for at in (0, 1)]
    for history, wanted in (("park", 1 - 2e-3), ("keep", 1 - 1e-3)):
        model = copy.deepcopy(layer)
        optimizer = SparseAdamW(attach(model, {"weight": both[0]}), lr=5e-4, history=history)
        for number in (0, 0, 1, 1, 0, 0):
            if optimizer.parameters.segments[0].support.positions[0] != number:  # type: ignore[index]
                optimizer.move({"weight": both[number]})
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        found = float(optimizer.parameters.flat.detach()[0])
        assert found == pytest.approx(wanted, abs=1e-5)


def test_touched_entries_can_all_be_brought_back() -> None:
    model = tiny_model("bert")
    base = copy.deepcopy(model.state_dict())
    name = "bert.encoder.layer.0.output.dense.weight"
    shape = tuple(base[name].shape)
    generator = torch.Generator().manual_seed(0)
    chosen = [Support.of(shape, torch.randperm(512, generator=generator)[:40]) for _ in range(4)]
    parameters = attach(model, {name: chosen[0]})
    optimizer = SparseAdamW(parameters, lr=1e-2)
    for number, support in enumerate(chosen):
        if number:
            optimizer.move({name: support})
        model(**tiny_batch(seed=number)).loss.backward()
        optimizer.step()
    union = {at for one in chosen for at in one.positions.tolist()}  # type: ignore[union-attr]
    ((_, support, values),) = parameters.touched
    assert support.positions.tolist() == sorted(union)  # type: ignore[union-attr]
    assert torch.equal(values, support.gather(base[name]))
    saved = parameters.state()
    trained = copy.deepcopy(model.state_dict())
    parameters.revert()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    parameters.load_state(saved)
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_how_far_to_balance_reaches_the_score(recipe_file: Path) -> None:
    chosen = {}
    for policy, balance in (("sift", None), ("balanced-gradient", 0.0), ("balanced-gradient", 1.0)):
        more = [] if balance is None else [f"selection.balance={balance}"]
        recipe = resolved(recipe_file, policy, "entry", *more)
        _, chooser = opened(recipe)
        chosen[balance] = chooser.supports(1)
    assert resolved(recipe_file, "balanced-gradient", "entry").selection.balance == 1.0
    same = {
        balance: all(
            torch.equal(support.positions, chosen[None][name].positions)  # type: ignore[arg-type]
            for name, support in chosen[balance].items()
            if support.positions is not None
        )
        for balance in (0.0, 1.0)
    }
    assert same == {0.0: True, 1.0: False}


def test_one_batch_alone_cannot_agree(recipe_file: Path) -> None:
    assert resolved(recipe_file, "agreement", "entry").selection.batches == 8
    with pytest.raises(SiftError, match="batches: score agreement compares batches; give at least"):
        resolved(recipe_file, "sift", "entry", "selection.score=agreement", "selection.batches=1")


@pytest.mark.parametrize(("steps", "looks"), [(3, 3), (9, 5)])
def test_how_many_batches_are_looked_at_is_told(
    recipe_file: Path, tmp_path: Path, steps: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are asked for, and no more than the run has steps."""
    changes = [f"train.max_steps={steps}", "train.epochs=9", "selection.batches=5"]
    recipe = load_recipe(recipe_file, ["selection.policy=sign-descent", *changes])
    said, before = StringIO(), []
    choose = choosing.select

    def select(*args: Any, **more: Any) -> Any:
        before.append(said.getvalue())
        return choose(*args, **more)

    monkeypatch.setattr(choosing, "select", select)
    train(recipe, tmp_path / "run", console=Console(file=said))
    assert f"entries: chosen by {looks} batches\n" in said.getvalue()
    assert len(before) == 1
    assert "entries: chosen" not in before[0]  # told when it is so


def test_the_first_choice_moves_a_bar_on_a_terminal(recipe_file: Path) -> None:
    _, chooser = opened(resolved(recipe_file, "drop-grow", "entry", "selection.batches=3"))

    def shown(step: int, **console: Any) -> str:
        said = StringIO()
        replace(chooser, console=Console(file=said, width=100, **console)).supports(step)
        return said.getvalue()

    assert "choosing entries" in shown(1, force_terminal=True)
    assert "3/3" in shown(1, force_terminal=True)
    assert shown(3, force_terminal=True) == ""  # the bar of the training is there
    assert shown(1) == "choosing entries: 3 passes forward and backward\n"
    assert shown(1, force_terminal=True, quiet=True) == ""


def test_the_rate_of_a_sign_descent_follows_the_training_s(recipe_file: Path) -> None:
    recipe = resolved(recipe_file, "sign-descent", "entry", "train.learning_rate=4e-3")
    _, chooser = opened(recipe)
    assert chooser.descent_rate == pytest.approx(1e-3 * 0.2**0.5, rel=0.02)  # density 0.2
    at = resolved(recipe_file, "sign-descent", "entry", "selection.descent_rate=3e-5")
    assert opened(at)[1].descent_rate == 3e-5
    with pytest.raises(SiftError, match="descent_rate: it belongs to score: sign-descent"):
        resolved(recipe_file, "sift", "entry", "selection.descent_rate=3e-5")


@pytest.mark.parametrize("policy", ["sift", "lottery", "current-batch", "drop-grow", "columns"])
def test_a_run_with_vectors_counts_them_as_entries(
    recipe_file: Path, tmp_path: Path, policy: str
) -> None:
    structure = POLICIES[policy].structure
    recipe = resolved(recipe_file, policy, structure, "selection.vectors=true")
    summary = train(recipe, tmp_path / "run")
    planned = plan(recipe, device="cpu")
    session, chooser = opened(recipe)
    sizes = {name: one.numel() for name, one in session.model.named_parameters()}
    vectors = sum(sizes[name] for name in chooser.vectors)
    assert planned["vector_entries"] == vectors == 400
    for key in ("trained_entries", "dense_entries"):
        assert planned[key] == getattr(summary, key)
    assert summary.dense_entries == 34
    found = load_delta(tmp_path / "run/delta.safetensors")
    assert set(found.dense) == {"classifier.weight", "classifier.bias"}
    assert all(len(found.weights[name].support) == sizes[name] for name in chooser.vectors)
    assert found.entries == summary.changed_entries >= summary.trained_entries
    lines = [json.loads(one) for one in (tmp_path / "run/weights.jsonl").read_text().splitlines()]
    assert {one["name"] for one in lines if one["whole"]} == set(found.dense)
    entries = sum(one["entries"] for one in lines if not one["whole"])
    assert entries == summary.trained_entries
    loaded, _ = load_tuned(str(tmp_path / "run"))
    assert open_session(recipe, train=False, tuned=loaded).evaluate() == summary.metrics


def test_adapters_get_the_budget_that_vectors_share(recipe_file: Path) -> None:
    ranks = []
    for vectors in ("true", "false"):
        recipe = load_recipe(recipe_file, ["selection.density=0.3", f"selection.vectors={vectors}"])
        session, chooser = opened(recipe)
        assert sum(chooser.parts.planned(session.model).values()) == 1384
        method = build("lora", recipe, session, chooser.batches)
        total = len(method.begin().parameters) - method.dense
        ranks.append(total)
    assert ranks[0] == ranks[1]


def test_scales_need_few_batches(recipe_file: Path) -> None:
    scales = []
    for batches in (8, 10):
        more = ["train.step_scale=input", "train.batch_size=4", f"selection.batches={batches}"]
        _, chooser = opened(
            resolved(recipe_file, "agreement", "entry", *more, "train.max_steps=12")
        )
        scales.append(chooser.scales())
    assert scales[0].keys() == scales[1].keys() != set()
    assert all(torch.equal(one.values, scales[1][name].values) for name, one in scales[0].items())
