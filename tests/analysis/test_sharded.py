"""What a rank holds and sends of a model in rows, against figures worked out by hand."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from sift_cli.analysis.plan import Outline, memory_of_passes, plan
from sift_cli.analysis.sharded import Rows, ranks_of
from sift_cli.errors import SiftError
from sift_cli.recipe import load_recipe
from sift_cli.training import train
from tests.support.causal import chats_recipe
from tests.support.command import sift
from tests.support.rows import rows_recipe
from tests.support.sharded import FULL

LLAMAS = {"7B": (6_738_415_616, 64_760_054), "70B": (68_976_648_192, 684_510_413)}
PARTS = ("weights", "positions", "base_values", "masters", "gradients", "moments")
LOW_RANK = ["selection.policy=low-rank", "selection.schedule=first-batch"]
TIED = "selection.dense=[norm, embed_tokens]"


@pytest.mark.parametrize(
    ("name", "devices", "full", "weights", "gradients"),
    [
        ("7B", 8, 35.4, 23.6, 0.23),
        ("7B", 64, 39.8, 26.5, 0.26),
        ("70B", 8, 362, 241, 2.4),
        ("70B", 64, 407, 272, 2.7),
    ],
)
def test_bytes_by_rings(
    name: str, devices: int, full: float, weights: float, gradients: float
) -> None:
    total, entries = LLAMAS[name]
    sent = Rows(devices, 1, 2 * total, 0, 0).sent(entries, 0, 0, "bfloat16")
    assert sum(sent["full"].values()) == pytest.approx(full * 1e9, rel=3e-3)
    assert sent["sift"] == sent["lora"]
    assert sent["sift"]["weights"] == pytest.approx(weights * 1e9, rel=3e-3)
    assert sent["sift"]["gradients"] == pytest.approx(gradients * 1e9, rel=2e-2)
    assert sent["sift"]["between_copies"] == 0


@pytest.mark.parametrize(("name", "full", "sparse"), [("7B", 2.95, 0.057), ("70B", 30.2, 0.60)])
def test_bytes_between_copies(name: str, full: float, sparse: float) -> None:
    total, entries = LLAMAS[name]
    sent = Rows(8, 8, 2 * total, 0, 0).sent(entries, 0, 0, "bfloat16")
    assert sent["full"]["between_copies"] == pytest.approx(full * 1e9, rel=3e-3)
    assert sent["sift"]["between_copies"] == pytest.approx(sparse * 1e9, rel=6e-3)


def test_micro_batches_gather_again_and_exchange_once() -> None:
    rows = Rows(2, 2, 4000, 0, 0)
    one, three = (rows.sent(100, 7, 50, "float32", batches) for batches in (1, 3))
    assert one["sift"] == {"weights": 4000, "gradients": 300, "between_copies": 300}
    assert one["lora"] == {"weights": 4000, "gradients": 214, "between_copies": 214}
    # 50 entries of weights whose gradients FSDP2 sums densely, each time
    assert three["sift"] == {"weights": 12000, "gradients": 500, "between_copies": 500}
    assert three["full"] == {"weights": 12000, "gradients": 6000, "between_copies": 2000}


def test_a_rank_holds_the_larger_of_pass_and_exchange() -> None:
    parts = dict.fromkeys(PARTS, 100) | {"activations": 30, "transient": 20}
    rows = Rows(4, 1, 100, 8, 5)
    assert rows.hold(parts, 60, 40, exchanges=True) == {
        "weights": 25,
        "gathered": 0,  # in a pass 8 + 2 x 5, which with 30 and 20 is less than 75
        "positions": 110,
        "base_values": 25,
        "masters": 25,
        "gradients": 85,
        "moments": 25,
        "activations": 0,
        "transient": 75,
    }
    passing = rows.hold(parts, 50, exchanges=True)
    assert [passing[part] for part in ("gathered", "activations", "transient")] == [18, 30, 20]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_tiny_llama_in_rows(copies: int, tmp_path: Path) -> None:
    changes = [TIED]
    recipe = chats_recipe(tmp_path, "llama-tied")
    in_rows = [*changes, FULL, f"distributed.replicas={copies}"]
    alone = plan(load_recipe(recipe, changes), device="cpu")
    rank = plan(load_recipe(recipe, in_rows), device="cpu", devices=2 * copies)
    one, own = alone["memory_bytes"], rank["memory_bytes"]
    model = Outline.of(load_recipe(recipe, changes)).model
    layers = list(model.model.layers)
    block = 4 * sum(weight.numel() for weight in layers[0].parameters())
    root = 4 * sum(weight.numel() for weight in model.parameters()) - len(layers) * block
    assert own["gathered"] == root + 2 * block
    assert own["activations"] == one["activations"]
    for part in ("weights", "base_values", "masters", "moments"):
        assert own[part] == -(-one[part] // 2)
    entries = alone["trained_entries"]  # of linear layers; what is dense comes summed
    assert own["gradients"] == pytest.approx(one["gradients"] / 2 + 4 * entries, abs=20)
    assert own["positions"] == one["positions"] + 2 * entries
    assert own["peak"] == sum(size for part, size in own.items() if part != "peak")
    dense = 4 * alone["dense_entries"]
    total = 4 * alone["total_entries"]
    assert rank["sent_by_part"]["sift"] == {
        "weights": total,
        "gradients": (4 * entries + dense) // 2,
        "between_copies": (4 * entries + dense) // 2 if copies > 1 else 0,
    }
    assert rank["sent_bytes"]["full"] == total * 3 // 2 + (total // 2 if copies > 1 else 0)


def test_each_rank_gathers_the_gradients_of_its_rows_alone(tmp_path: Path) -> None:
    path = chats_recipe(tmp_path, "llama-tied")
    cpu, quiet = torch.device("cpu"), Console(quiet=True)
    outline = Outline.of(load_recipe(path, [FULL, "selection.policy=sift"]), devices=2)
    alone = Outline.of(load_recipe(path, ["selection.policy=sift"]))
    batch = alone.rows.largest(alone.recipe, alone.task_on(cpu))
    both = (memory_of_passes(one, batch, cpu, quiet)["selection"] for one in (outline, alone))
    own, one = both
    assert outline.in_rows is not None
    assert one["gradients"] == 4 * sum(outline.model.get_parameter(n).numel() for n in alone.counts)
    assert own["gradients"] == one["gradients"] // 2 + 2 * outline.in_rows.block


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("llama-tied", LOW_RANK, "more than the rows"),
        ("gpt2", [], r"stored as \[inputs, outputs\]"),
        ("llama-tied", ["distributed.replicas=3"], "3 copies of the model do not fit on 4"),
    ],
)
def test_a_plan_refuses_what_training_does(
    architecture: str, changes: list[str], told: str, tmp_path: Path
) -> None:
    recipe = load_recipe(chats_recipe(tmp_path, architecture), [FULL, *changes])
    with pytest.raises(SiftError, match=told) as caught:
        Outline.of(recipe, devices=4)
    if "rows" in told:
        with pytest.raises(SiftError) as trained:
            train(recipe, tmp_path / "run", device="cpu")
        assert str(trained.value) == str(caught.value)


def test_a_plan_in_rows_has_the_head_that_training_draws(tmp_path: Path) -> None:
    recipe = load_recipe(rows_recipe(tmp_path, "labels", 0.0), [FULL])
    alone, several = Outline.of(recipe), Outline.of(recipe, devices=2)
    assert several.in_rows is not None
    assert several.dense == alone.dense == ["classifier.weight", "classifier.bias"]


def test_one_process_holds_all(tmp_path: Path) -> None:
    recipe = load_recipe(chats_recipe(tmp_path, "llama-tied"), [FULL])
    assert Outline.of(recipe).in_rows is None
    assert not ranks_of(recipe, 1).even


def test_rows_from_the_command_line(tmp_path: Path) -> None:
    recipe = chats_recipe(tmp_path, "llama-tied")
    refused = sift("plan", recipe, "--shard", "full")
    assert refused.returncode == 2
    assert "--shard full: rows lie on several devices; give --devices N" in refused.stderr
    options = ("--device", "cpu", "--devices", 4, "--shard", "full", "--replicas", 2)
    told = " ".join(sift("plan", recipe, *options).stdout.split())
    assert "In rows on 4 devices as 2 copies" in told
    assert "gathered" in told
