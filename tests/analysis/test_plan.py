"""`sift plan` against the counts and the accounting that the paper publishes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from sift_cli.analysis.memory import Batch, PeakMemory, sparse
from sift_cli.analysis.plan import HOST_IF_OFFLOADED, Outline, memory_of, plan, with_peak
from sift_cli.analysis.sizes import accounting, delta_bytes, layer_and_kind
from sift_cli.cli.options import parse_size
from sift_cli.cli.tables import together
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe, parse_recipe, trace_recipe
from sift_cli.selection.scores import find_score
from sift_cli.selection.select import Rule, planned
from sift_cli.training import rates, step, train
from tests.support.command import sift
from tests.support.models import roberta_large
from tests.support.rows import write_rows

GIB = 2**30


def test_the_paper_s_entries_of_roberta_large(tmp_path: Path) -> None:
    roberta_large(architectures=["RobertaForMaskedLM"]).save_pretrained(tmp_path / "roberta-large")
    path = tmp_path / "mrpc.yaml"
    path.write_text(
        f"model: {{path: {tmp_path / 'roberta-large'}}}\n"
        f"data: {{path: {tmp_path / 'none'}, task: mrpc, max_length: 512}}\n"
        "selection: {policy: sift, density: 0.008, "
        "target: [query, key, value, attention.output.dense]}\n"
    )
    found = Outline.of(load_recipe(path)).counted()
    assert found["trained_entries"] == 806_208
    assert found["dense_entries"] == 1024 * 1024 + 1024 + 2 * 1024 + 2
    assert {name: one["trained"] for name, one in found["by_kind"].items()} == {
        "attention.self.query": 201_552,
        "attention.self.key": 201_552,
        "attention.self.value": 201_552,
        "attention.output.dense": 201_552,
    }
    assert {one["trained"] for one in found["by_layer"].values()} == {806_208 // 24}
    assert "no such folder" in found["data"]["missing"]


def test_table_1_of_the_paper(tmp_path: Path) -> None:
    """Llama-7B, bf16, 5 %: weights 12.55, gradients .626 and Adam 2.51, which are GiB: 5 % of all
    parameters, gradients in bf16, two fp32 moments. (.626 is .3 % below 5 % of 12.55.)"""
    LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32
    ).save_pretrained(tmp_path)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    entries = sum(planned(model, names, Rule(find_score("gradient"), density=0.05)).values())
    found = accounting(model, entries)
    assert round(found["weights"] / GIB, 2) == 12.55
    assert found["gradients"] / GIB == pytest.approx(0.626, rel=0.003)
    assert round(found["moments"] / GIB, 2) == 2.51


def test_llama_7b_in_16_5_gb_with_offloaded_moments(tmp_path: Path) -> None:
    """5 %, bf16, 1 x 2,048 tokens, checkpointing: all that lies on a GPU, as counted."""
    LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32
    ).save_pretrained(tmp_path)
    recipe = parse_recipe(
        f"model: {{path: {tmp_path}, dtype: bfloat16}}\n"
        f"data: {{path: {tmp_path / 'none'}, task: rte, max_length: 2048}}\n"
        "selection: {density: 0.05}\n",
        "llama.yaml",
    )
    one = Outline.of(recipe)
    step = PeakMemory(one.build, Batch(1, 2048), checkpointing=True, gpu=True)
    parts = step.step(sparse(one.counts, one.dense, gpu=True))
    memory = with_peak(parts, torch.device("cuda"), HOST_IF_OFFLOADED)
    assert memory["weights"] > 13.2e9
    assert memory["positions"] >= 4 * one.entries
    assert memory["peak"] < 16.5e9 < sum(parts.values())


def test_a_plan_is_what_training_does(recipe_file: Path, tmp_path: Path) -> None:
    done = sift("plan", recipe_file, "--json", "--measure", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    summary = train(load_recipe(recipe_file), tmp_path / "run")
    for key in ("trained_entries", "dense_entries", "total_entries"):
        assert found[key] == getattr(summary, key)
    assert found["data"]["steps"] == summary.steps
    assert found["data"]["truncated"] == summary.truncated
    assert found["delta_bytes"] == pytest.approx(summary.delta_bytes, rel=0.5)
    assert found["measured"]["steps"] == 3
    timed = found["measured"]
    assert timed["epoch_s"] > 0
    assert timed["run_s"] == pytest.approx(timed["begin_s"] + timed["epoch_s"])  # one epoch
    memory = found["memory_bytes"]
    assert memory["peak"] == sum(size for part, size in memory.items() if part != "peak")
    assert memory["masters"] == 4 * (summary.trained_entries + summary.dense_entries)
    assert found["memory_of_methods"]["full"]["moments"] > 7 * summary.total_entries
    assert {"sift", "lora", "full", "lora, checkpointing"} <= set(found["memory_of_methods"])
    assert found["device"]["fits"]


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        (["train.step_scale=input"], 1),
        (["train.decay_toward=base"], 0),  # nothing decays
        (["train.step_scale=input", "train.decay_toward=base", "train.weight_decay=0.1"], 2),
    ],
)
def test_step_scale_and_base_are_counted(
    recipe_file: Path, settings: list[str], numbers: int
) -> None:
    def masters(changes: list[str]) -> int:
        outline = Outline.of(load_recipe(recipe_file, changes))
        found = memory_of(outline, torch.device("cpu"), Console(quiet=True))
        return int(found["memory_bytes"]["masters"])

    assert masters(settings) == (1 + numbers) * masters([])


def test_what_is_offloaded_is_not_counted_for_a_gpu(recipe_file: Path) -> None:
    outline = Outline.of(load_recipe(recipe_file, ["train.offload_optimizer=true"]))
    found = memory_of(outline, torch.device("cuda"), Console(quiet=True))["memory_of_methods"]
    on_host = {"masters", "gradients", "moments", "base_values"}
    assert on_host.isdisjoint(found["sift"])
    assert on_host.isdisjoint(found["sift, checkpointing"])
    assert {"gradients", "moments"} <= set(found["full"])


PASSES = {
    "sift": ["selection.policy=sift"],
    "sign-descent": ["selection.policy=sign-descent"],
    "random": ["selection.policy=random"],
    "current-batch": ["selection.policy=current-batch"],
    "drop-grow": ["selection.policy=drop-grow", "selection.every=4", "selection.batches=3"],
    "lottery": ["selection.policy=lottery", "selection.warmup_steps=5"],
    "whole": ["selection.policy=sign-descent", "selection.density=1.0"],
    "auto": ["selection.policy=sign-descent", "train.learning_rate=auto"],
    "warm-auto": ["selection.schedule=after-warmup", "train.learning_rate=auto"],
}


@pytest.mark.parametrize("changes", PASSES.values(), ids=PASSES)
def test_every_pass_of_a_run_is_counted(
    changes: list[str],
    recipe_file: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_rows(data / "train.jsonl", 96, seed=1)
    recipe = load_recipe(recipe_file, [*changes, "eval.keep=last"])
    planned = plan(recipe)["data"]
    ran, loss = [], step._loss

    def counted(*args: Any) -> Any:
        ran.append(args)
        return loss(*args)

    monkeypatch.setattr(step, "_loss", counted)
    monkeypatch.setattr(rates, "MORE", 0)  # trials beyond the edge are told of, not counted
    train(recipe, tmp_path / "run")
    assert planned["passes"] == len(ran)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["selection.policy=sign-descent"],
            "Entries are chosen by 6 batches (selection.batches is 128: the run has no more), "
            "each run forward and backward. In all 12 batches run forward and backward.",
        ),
        (
            ["selection.policy=drop-grow", "selection.every=2", "selection.batches=3"],
            "Entries are chosen by 3 batches, and anew by 5 along the run, each run",
        ),
        (["selection.policy=lottery"], "200 steps warm up before entries are chosen. In all 206"),
    ],
)
def test_what_runs_beside_the_steps_is_told(
    changes: list[str], said: str, recipe_file: Path
) -> None:
    args = [word for change in changes for word in ("--set", change)]
    assert said in " ".join(sift("plan", recipe_file, *args).stdout.split())


def test_where_all_entries_train_nothing_is_chosen(recipe_file: Path) -> None:
    changes = ["--set", "selection.policy=sign-descent", "--set", "selection.density=1.0"]
    shown = " ".join(sift("plan", recipe_file, *changes).stdout.split())
    assert "All of the targeted entries train: none is chosen." in shown
    assert "one budget" not in shown
    assert "selection.score" not in shown
    assert "trained of share" in shown


def test_what_a_common_budget_gives_each_layer_is_not_foretold(recipe_file: Path) -> None:
    shown = sift("plan", recipe_file, "--set", "selection.policy=sign-descent").stdout
    assert "All weights compete for one budget: how many entries of each train shows" in shown
    assert "kind of module\ttargeted entries" in shown
    assert "layer 0-1, each" in shown
    assert "share" not in shown
    assert "kind of module\ttrained\tof\tshare" in sift("plan", recipe_file).stdout


def test_what_it_prints(recipe_file: Path) -> None:
    args = ["plan", recipe_file, "--set", "train.epochs=2", "--memory", "300kB", "--device", "cpu"]
    shown = " ".join(sift(*args).stdout.split())
    assert "train.epochs 2.0 --set" in shown
    assert "selection.density 0.05 tiny.yaml:9" in shown
    assert "selection.score gradient policy sift" in shown
    assert "checkpoint.every" not in shown
    assert "layer 0-1, each" in shown
    assert "It does not fit: " in shown
    assert "48 train, 16 evaluation rows, 0 of them cut to 16 tokens; 12 steps, 6 to an" in shown
    assert sift(*args[:2], "--memory", "much").returncode == 2


def test_every_value_has_an_origin(recipe_file: Path) -> None:
    changes = ["selection.policy=drop-grow", "train.max_steps=null"]
    recipe, origins = trace_recipe(recipe_file, changes)
    keys = {f"{section}.{key}" for section, one in recipe if section != "out" for key in dict(one)}
    assert set(origins) == keys
    assert origins["selection.drop"] == origins["selection.scope"] == "policy drop-grow"
    assert origins["selection.history"] == origins["train.max_steps"] == "default"
    assert origins["model.path"] == f"{recipe_file}:2:3"
    assert origins["selection.policy"] == "--set selection.policy=drop-grow"
    _, scaled = trace_recipe(recipe_file, ["selection.policy=scaled-sift"])
    assert scaled["train.step_scale"] == scaled["train.head_start"] == "policy scaled-sift"


def test_a_token_budget_bounds_the_batch_that_is_planned(recipe_file: Path) -> None:
    whole, cut = (
        plan(load_recipe(recipe_file, changes), device="cpu")
        for changes in ([], ["train.max_tokens=30", "eval.max_tokens=30"])
    )
    assert whole["batch"]["rows"] * whole["batch"]["tokens"] > 30
    assert cut["batch"]["rows"] * cut["batch"]["tokens"] <= 30
    for key in ("step", "evaluation"):
        passes = [
            found["memory_bytes"] if key == "step" else found["memory_of_passes"][key]
            for found in (whole, cut)
        ]
        assert passes[1]["activations"] < passes[0]["activations"]


def test_several_devices_share_a_batch_and_send_what_trains(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    alone, four = (plan(recipe, device="cpu", devices=count) for count in (1, 4))
    trained = four["trained_entries"] + four["dense_entries"]
    assert four["sent_bytes"] == {
        "sift": 6 * (trained + 3),  # 2 x 3/4 x 4 bytes
        "lora": 6 * trained,
        "full": 6 * four["total_entries"],
    }
    assert "sent_bytes" not in alone
    assert four["batch"] == alone["batch"]  # each process looks at whole calibration batches
    rows = [
        memory_of(Outline.of(recipe), torch.device("cuda"), Console(quiet=True), count)["batch"]
        for count in (1, 4)
    ]
    assert rows[1]["rows"] == -(-rows[0]["rows"] // 4)
    done = sift("plan", recipe_file, "--devices", 4)
    assert "On 4 devices, of which memory is that of each" in " ".join(done.stdout.split())


def test_small_parts() -> None:
    assert layer_and_kind("bert.encoder.layer.3.output.dense.bias") == ("layer 3", "output.dense")
    assert layer_and_kind("bert.pooler.dense.weight") == ("outside", "bert.pooler.dense")
    assert parse_size("24GB") == 24 * 10**9
    assert parse_size("1.5 gib") == 3 * 2**29
    with pytest.raises(SiftError, match="24GB"):
        parse_size("24")
    alike = {"trained": 1, "of": 2}
    assert together({"layer 0": alike, "layer 1": alike, "layer 2": {"trained": 2, "of": 2}}) == {
        "layer 0-1, each": alike,
        "layer 2": {"trained": 2, "of": 2},
    }
    million = delta_bytes({"w": 10_000}, {"w": 1_000_000}, [], "float32") - 2_130
    assert million == pytest.approx(10_000 * (8.08 / 8 + 3.25), rel=0.01)  # entropy at 1 %
