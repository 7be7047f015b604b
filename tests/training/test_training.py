"""A whole run against a plain re-implementation, and what the run folder holds."""

import json
import math
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import given
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sift_cli.delta import load_delta
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.attention import leave_masks_unread
from sift_cli.models.devices import without_idle_mask
from sift_cli.recipe import Recipe, load_recipe, parse_recipe
from sift_cli.runs.session import open_session
from sift_cli.runs.tuned import load_tuned
from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.tasks.metrics import Metrics, better
from sift_cli.training import train
from sift_cli.training.batches import Batches, bucketed
from sift_cli.training.loop import evaluates
from sift_cli.training.state import Kept
from sift_cli.training.step import add_gradient
from sift_cli.training.watch import Watch
from tests.support.models import save_base
from tests.support.rows import write_rows


def weights_of(run: Path) -> dict[str, Tensor]:
    loaded, _ = load_tuned(str(run))
    return loaded.model.state_dict()


def reference_run(recipe: Recipe, accumulate: int) -> dict[str, Tensor]:
    """Dense autograd, dense AdamW, a mask from the first batch's gradient, a linear schedule."""
    session = open_session(recipe)
    model, chosen, rows = session.model, recipe.selection, session.train
    assert rows is not None
    batches = list(
        Batches.plan(
            rows.lengths,
            batch_size=recipe.train.batch_size,
            accumulate=accumulate,
            epochs=recipe.train.epochs,
            max_steps=recipe.train.max_steps,
            seed=recipe.train.seed,
        )
    )
    model.eval()  # the tiny model has no dropout
    named = dict(model.named_parameters())

    def gradient(step: list[list[int]]) -> None:
        batch = session.collate(rows.take([row for part in step for row in part]))
        model.zero_grad()
        model(**batch).loss.backward()

    gradient(batches[0])
    masks = {}
    for name, weight in named.items():
        masks[name] = torch.zeros_like(weight, dtype=torch.bool)
        if name.startswith("classifier"):
            masks[name][:] = True
        elif name.endswith("query.weight") or name.endswith("output.dense.weight"):
            assert weight.grad is not None
            assert chosen.density is not None
            count = math.ceil(round(chosen.density * weight.numel(), 6))
            top = weight.grad.abs().flatten().topk(count).indices
            masks[name].view(-1)[top] = True
    adamw = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=0.0)
    total, warmup = len(batches), math.ceil(recipe.train.warmup * len(batches))
    for number, step in enumerate(batches):
        gradient(step)
        for name, weight in named.items():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad *= masks[name]
        nn.utils.clip_grad_norm_(named.values(), recipe.train.max_grad_norm or math.inf)
        rising = (number / warmup) if warmup else 1.0
        share = rising if number < warmup else (total - number) / max(1, total - warmup)
        for group in adamw.param_groups:
            group["lr"] = recipe.train.learning_rate * share
        adamw.step()
    return model.state_dict()


PINNED = [
    "selection.target=[query.weight, output.dense.weight]",
    "eval.keep=last",
    "train.warmup=0.2",
    "train.epochs=2",
]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_equals_a_plain_masked_adamw_loop(
    recipe_file: Path, tmp_path: Path, accumulate: int
) -> None:
    recipe = load_recipe(
        recipe_file,
        [*PINNED, f"train.batch_size={8 // accumulate}", f"train.accumulate={accumulate}"],
    )
    train(recipe, tmp_path / "run")
    base = open_session(recipe).model.state_dict()
    wanted = reference_run(recipe, accumulate)
    got = weights_of(tmp_path / "run")
    moved = 0
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-4, atol=2e-5, msg=name)
        unmoved = wanted[name] == base[name]
        assert torch.equal(value[unmoved], base[name][unmoved]), name
        moved += int((~unmoved).sum())
    assert (
        moved
        == sum(len(w.bits) for w in load_delta(tmp_path / "run/delta.safetensors").weights.values())
        + 34
    )


def test_accumulation_changes_nothing_but_memory(recipe_file: Path, tmp_path: Path) -> None:
    found = []
    for size, accumulate, tokens in ((16, 1, "null"), (4, 4, "null"), (16, 1, "20")):
        changes = [*PINNED, f"train.batch_size={size}", f"train.accumulate={accumulate}"]
        found.append(tmp_path / f"{size}-{tokens}")
        train(load_recipe(recipe_file, [*changes, f"train.max_tokens={tokens}"]), found[-1])
    one, *others = (
        {n: w.support for n, w in load_delta(run / "delta.safetensors").weights.items()}
        for run in found
    )
    first = weights_of(found[0])
    for other, run in zip(others, found[1:], strict=True):
        assert {n: s.positions.tolist() for n, s in one.items()} == {
            n: s.positions.tolist() for n, s in other.items()
        }
        for name, value in weights_of(run).items():
            torch.testing.assert_close(value, first[name], rtol=2e-4, atol=2e-5, msg=name)


def test_the_first_batch_trains_and_the_last_step_is_in_the_weights(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = [*PINNED, "train.max_steps=1", "train.warmup=0", "selection.exclude=[key]"]
    recipe = load_recipe(recipe_file, changes)
    train(recipe, tmp_path / "run")
    delta = load_delta(tmp_path / "run/delta.safetensors")
    base = open_session(recipe).model.state_dict()
    got = weights_of(tmp_path / "run")
    for name, weight in delta.weights.items():
        step = (got[name] - base[name]).abs().flatten()[weight.support.positions.long()]
        # the first step of AdamW moves every entry by the learning rate
        torch.testing.assert_close(step, torch.full_like(step, 1e-2), rtol=1e-2, atol=1e-5)


def test_run_folder_and_summary(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = train(load_recipe(recipe_file, ["log.every=2", "train.epochs=2"]), out)
    written = json.loads((out / "summary.json").read_text())
    assert written == summary.to_json()
    assert {
        "task", "policy", "seed", "metrics", "metrics_before", "trained_entries", "dense_entries",
        "total_entries", "steps", "step_time_ms", "train_time_s", "wall_time_s",
        "peak_memory_bytes", "delta_bytes", "delta_sha256",
    } <= written.keys()  # fmt: skip
    assert summary.dense_entries == 2 * 16 + 2
    delta = load_delta(out / "delta.safetensors")
    assert summary.trained_entries == delta.entries
    assert summary.steps == 12
    assert summary.delta_bytes == (out / "delta.safetensors").stat().st_size
    saved = parse_recipe((out / "recipe.yaml").read_text(), "saved")
    assert saved.selection.score == "gradient"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "metrics" in line] == [6, 12]
    card = (out / "README.md").read_text()
    assert f"{summary.trained_entries:,} entries" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["train"]["seed"] == 3


def test_a_finished_run_is_not_overwritten(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.max_steps=1"])
    train(recipe, tmp_path / "run")
    before = (tmp_path / "run/delta.safetensors").read_bytes()
    with pytest.raises(SiftError, match="holds a finished run"):
        train(recipe, tmp_path / "run")
    assert (tmp_path / "run/delta.safetensors").read_bytes() == before
    wrong = load_recipe(recipe_file, ["data.text=[nope]"])
    with pytest.raises(SiftError, match="no column"):
        train(wrong, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/delta.safetensors").read_bytes() == before
    train(recipe, tmp_path / "run", overwrite=True)


def test_runs_are_deterministic_and_seeds_differ(recipe_file: Path, tmp_path: Path) -> None:
    hashes = [
        train(load_recipe(recipe_file, [f"train.seed={seed}"]), tmp_path / name).delta_sha256
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_training_learns_what_can_be_learnt(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["train.epochs=20", "selection.density=0.2", "train.learning_rate=0.01"]
    summary = train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert summary.metrics["accuracy"] == 1.0
    assert summary.metrics_before["accuracy"] < 0.8


def test_summary_metrics_are_those_of_the_kept_weights(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["train.epochs=6", "train.learning_rate=0.05", "eval.every=3"]
    summary = train(load_recipe(recipe_file, changes), tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines if '"metrics"' in line]
    best = max(one["metrics"]["accuracy"] for one in scores)
    assert summary.metrics["accuracy"] == best
    loaded, recipe = load_tuned(str(tmp_path / "run"))
    assert recipe is not None
    again = open_session(recipe, train=False, tuned=loaded).evaluate()
    assert again == summary.metrics


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_decoders_train_too(
    architecture: str, recipe_file: Path, tmp_path: Path, data: Path
) -> None:
    save_base(tmp_path / architecture, architecture)
    changes = [f"model.path={tmp_path / architecture}", "train.gradient_checkpointing=true"]
    summary = train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert summary.dense_entries == 2 * 16


def test_bfloat16_base_and_autocast(recipe_file: Path, tmp_path: Path) -> None:
    half = train(load_recipe(recipe_file, ["model.dtype=bfloat16"]), tmp_path / "half")
    assert {w.dtype for w in load_delta(tmp_path / "half/delta.safetensors").weights.values()} == {
        torch.bfloat16
    }
    assert not half.bf16_autocast
    cast = train(load_recipe(recipe_file, ["train.precision=bfloat16"]), tmp_path / "cast")
    assert cast.bf16_autocast


@pytest.mark.parametrize("key", ["model.dtype", "train.precision"])
@pytest.mark.parametrize("has_it", [True, False])
def test_emulated_bfloat16_is_told(
    key: str, has_it: bool, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it)
    said = StringIO()
    console = Console(file=said, width=200)
    for value in ("float32", "bfloat16"):
        recipe = load_recipe(recipe_file, [f"{key}={value}", "train.max_steps=1"])
        train(recipe, tmp_path / value, console=console)
    told = f"{key}: this CPU emulates bfloat16"
    assert said.getvalue().count(told) == (not has_it)


@pytest.mark.parametrize("policy", ["sift", "drop-grow"])
def test_an_offloaded_optimizer_takes_the_same_steps(
    recipe_file: Path, tmp_path: Path, policy: str
) -> None:
    for offload in ("false", "true"):
        changes = [f"selection.policy={policy}", f"train.offload_optimizer={offload}"]
        train(load_recipe(recipe_file, changes), tmp_path / offload)
    found, wanted = weights_of(tmp_path / "true"), weights_of(tmp_path / "false")
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_regression_and_pairs(tmp_path: Path, recipe_text: str) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, seed in (("train", 1), ("validation", 2)):
        write_rows(folder / f"{split}.jsonl", 24, seed, pair=True)
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["label"] = row["label"] * 2.5 + 0.5
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = parse_recipe(
        recipe_text,
        "r",
        [
            f"data.path={folder}",
            "data.task=custom",
            "data.text=[sentence, other]",
            "data.label=label",
        ],
    )
    summary = train(recipe, tmp_path / "run")
    assert set(summary.metrics) == {"pearson", "spearman", "loss"}
    assert summary.dense_entries == 16 + 1


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sift_cli.training import loop, step

    real, calls = loop.add_gradient, []

    def poisoned(session: object, rows: list[list[int]], total: int | None = None) -> Tensor:
        calls.append([row for part in rows for row in part])
        loss = real(session, rows, total)  # type: ignore[arg-type]
        return loss * math.nan if len(calls) == 4 else loss  # selection, then steps 1, 2, 3

    monkeypatch.setattr(loop, "add_gradient", poisoned)
    monkeypatch.setattr(step, "add_gradient", poisoned)
    with pytest.raises(SiftError, match=r"step 3: the loss is nan") as caught:
        train(load_recipe(recipe_file), tmp_path / "run")
    assert caught.value.code == ExitCode.NOT_FINITE
    assert str(sorted(calls[3])[0]) in str(caught.value)
    assert not (tmp_path / "run/summary.json").exists()


def test_a_step_takes_nothing_back_to_the_host(recipe_file: Path) -> None:
    session = open_session(load_recipe(recipe_file))
    assert session.train is not None
    undo = leave_masks_unread(session.model)
    named = dict(session.model.named_parameters())
    parameters = attach(
        session.model,
        {
            name: Support.of(weight.shape, torch.arange(0, weight.numel(), 7))
            for name, weight in named.items()
        },
    )
    optimizer, watch = SparseAdamW(parameters, 1e-3), Watch(session)
    rows = [[0, 1, 2], [3, 4, 5]]
    assert len({session.train.lengths[row] for row in rows[0]}) > 1  # the mask hides something

    def take(step: int) -> None:
        loss = add_gradient(session, rows)
        norm = optimizer.clip(1.0)
        optimizer.step(skip=watch.broken(step, rows, loss, norm))

    take(1)  # makes the optimizer's state
    with Reads() as reads:
        take(2)
    assert reads.seen == []
    undo()
    with Reads() as reads:
        add_gradient(session, rows)
    assert set(reads.seen) == {"aten::_local_scalar_dense"}  # transformers looks into the mask


def test_masks_left_unread_give_the_same_logits(recipe_file: Path) -> None:
    session = open_session(load_recipe(recipe_file))
    assert session.train is not None
    session.model.eval()
    for rows in ([0, 1, 2, 3], [0]):
        batch = session.collate(session.train.take(rows))
        before = session.model(**batch).logits
        undo = leave_masks_unread(session.model)
        after = session.model(**without_idle_mask(batch)).logits
        undo()
        torch.testing.assert_close(after, before)
        assert ("attention_mask" in without_idle_mask(batch)) == (len(rows) > 1)


class Reads(TorchDispatchMode):
    """Notes every operation for which a GPU's host would wait."""

    WAITING: ClassVar = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        by_mask = name.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if by_mask or name.removeprefix("aten::") in self.WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_every_row_is_in_exactly_one_batch(lengths: list[int], size: int, seed: int) -> None:
    batches = bucketed(lengths, size, seed)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in batches) <= 1
    assert batches == bucketed(lengths, size, seed)


def test_buckets_waste_little_padding_and_epochs_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 100, (2000,), generator=generator).tolist()
    plan = Batches.plan(lengths, batch_size=10, accumulate=1, epochs=2, max_steps=None, seed=1)
    steps = [step[0] for step in plan]
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in steps)
    assert padded < 1.1 * 2 * sum(lengths)
    assert len(steps) == 400
    assert steps[:200] != steps[200:]


def test_micro_batches_split_the_rows_of_one_step() -> None:
    plan = Batches.plan([5] * 22, batch_size=4, accumulate=2, epochs=1.5, max_steps=None, seed=0)
    assert plan.steps == 5
    sizes = [[len(part) for part in step] for step in plan]
    assert sorted(sizes[:3], reverse=True) == [[4, 4], [4, 4], [4, 2]]


def test_a_token_budget_splits_what_is_computed_and_not_what_makes_a_step() -> None:
    lengths = torch.randint(3, 100, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    given = {"batch_size": 10, "accumulate": 2, "epochs": 2, "max_steps": None, "seed": 1}
    whole = [list(chain(*step)) for step in Batches.plan(lengths, **given)]
    parts = list(Batches.plan(lengths, **given, max_tokens=150))
    assert [list(chain(*step)) for step in parts] == whole
    assert max(len(part) for step in parts for part in step) > 1
    assert all(
        len(part) <= 10 and len(part) * max(lengths[row] for row in part) <= 150
        for step in parts
        for part in step
    )


def test_evaluation_steps() -> None:
    plan = Batches.plan([5] * 20, batch_size=4, accumulate=1, epochs=2, max_steps=7, seed=0)
    assert [s for s in range(1, 8) if evaluates(s, "epoch", plan)] == [5, 7]
    assert [s for s in range(1, 8) if evaluates(s, 3, plan)] == [3, 6, 7]


def test_kept_weights_follow_the_first_best_or_the_last() -> None:
    from sift_cli.sparse import Support, attach

    def higher(new: Metrics, old: Metrics | None) -> bool:
        return better("accuracy", new["accuracy"], (old or {}).get("accuracy"))

    for keep, wanted in (("best", 2), ("last", 4)):
        parameters = attach(nn.Linear(2, 1), {"weight": Support((1, 2))})
        kept = Kept(parameters, keep, higher)
        for step, score in enumerate([0.1, 0.9, 0.9, 0.3], start=1):
            parameters.flat.data.fill_(float(step))
            parameters.write_back()
            kept.offer(step, {"accuracy": score})
        kept.restore()
        assert kept.step == wanted
        assert parameters.segments[0].weight.detach().tolist() == [[float(wanted)] * 2]


@pytest.mark.gpu
def test_a_run_on_a_gpu_and_its_evaluation_agree(recipe_file: Path, tmp_path: Path) -> None:
    summary = train(load_recipe(recipe_file), tmp_path / "run", device="cuda")
    assert summary.device == "cuda"
    assert summary.bf16_autocast == torch.cuda.is_bf16_supported()
    loaded, recipe = load_tuned(str(tmp_path / "run"))
    assert recipe is not None
    again = open_session(recipe, device="cuda", train=False, tuned=loaded).evaluate()
    assert again == summary.metrics
