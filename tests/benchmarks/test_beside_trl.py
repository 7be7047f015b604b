"""benchmarks/beside_trl.py: what takes turns, what sift's side of it does; TRL is not needed."""

import importlib
import io
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sift_cli.recipe import load_recipe
from tests.support.chats import save_chat_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("beside_trl")
    for name in ("beside_trl", "trainer_sft", "steps", "whole", "methods"):
        sys.modules.pop(name, None)


@pytest.fixture
def given(tmp_path: Path) -> Namespace:
    """Options with a tiny Llama and chats."""
    torch.manual_seed(0)
    base = save_chat_model(tmp_path / "base")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    data = tmp_path / "chats"
    data.mkdir()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{at}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for at in range(20)
    ]
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Namespace(
        model=str(base),
        data=str(data),
        out=tmp_path,
        rows=None,
        epochs=1,
        rounds=None,
        ways=["sift entry", "TRL + LoRA", "sift entry, packed", "TRL + LoRA, packed"],
    )


@pytest.mark.parametrize("way", ["sift entry", "sift entry, packed"])
def test_a_worker_takes_a_step_of_sift_for_each_line(
    beside: Any, given: Namespace, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    settings = {"recipe": str(beside.recipe_of(given)), "options": beside.WAYS[way].options}
    recipe = load_recipe(Path(settings["recipe"]), list(settings["options"]))
    assert recipe.train.packs == way.endswith("packed")
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("step\nstep\n"))
    beside.sift_steps(settings, said.append)
    linear = sum(
        module.weight.numel()
        for name, module in AutoModelForCausalLM.from_pretrained(given.model).named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    assert said[0]["entries"] == pytest.approx(linear / 100, abs=7)  # of as many weights
    assert [set(one) for one in said[1:]] == [{"step", "peak", "reserved"}] * 2
    assert all(one["step"] > 0 for one in said[1:])


def test_the_adapter_is_the_smallest_that_has_as_many(beside: Any, given: Namespace) -> None:
    shapes = [
        module.weight.shape
        for name, module in AutoModelForCausalLM.from_pretrained(given.model).named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    rank, wanted = beside.rank_of(given.model), sum(a * b for a, b in shapes) / 100
    assert rank * sum(a + b for a, b in shapes) >= wanted
    assert (rank - 1) * sum(a + b for a, b in shapes) < wanted


def test_the_jobs_are_of_the_same_rows(
    beside: Any, given: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.rows, seen = 12, {}

    def in_turn(commands: dict[str, list[str]], rounds: int, out: Path) -> Any:
        seen.update(commands)
        return {
            name: [{"wall_s": at + 1.0, "peak": 1e6, "metrics": {"loss": 0.5}}] * rounds
            for at, name in enumerate(commands)
        }

    monkeypatch.setattr(beside.whole, "in_turn", in_turn)
    found, shown = beside.do_jobs(given)
    assert list(seen) == given.ways
    sift, packed = seen["sift entry"], seen["sift entry, packed"]
    for words in (sift, packed):
        changes = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
        recipe = load_recipe(Path(words[4]), changes)
        assert (recipe.data.max_train_rows, recipe.train.epochs) == (12, 1)
    trainer = importlib.import_module("trainer_sft")
    for name in ("TRL + LoRA", "TRL + LoRA, packed"):
        asked = trainer.options().parse_args([*seen[name][2:], "--out", "o"])
        assert (asked.rows, asked.epochs, asked.packing) == (12, 1, name.endswith("packed"))
    assert len(found[0]["runs"]["sift entry"]) == 3
    assert "| sift entry | 1.0 (1.0, 1.0) | 0.50 | 1 | loss 0.500 |" in shown


def test_turns_change_their_order(beside: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    class Made:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self) -> dict[str, float]:
            asked.append(self.name)
            return {"step": len(asked)}

        def close(self) -> None:
            asked.append(f"{self.name} closed")

    found = beside.steps.in_turn({name: Made(name) for name in "ab"}, 2)
    assert asked == [*"baabbaab", "a closed", "b closed"]
    assert found == {"a": [{"step": 6}, {"step": 7}], "b": [{"step": 5}, {"step": 8}]}
    leaves = (
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[3]); out.mkdir()\n"
        "log = out.parent / 'order'; log.open('a').write(sys.argv[1] + ' ')\n"
        "(out / 'summary.json').write_text(json.dumps({'metrics': {'loss': 1}}))\n"
    )
    commands = {name: [sys.executable, "-c", leaves, name] for name in "ab"}
    runs = beside.whole.in_turn(commands, 2, tmp_path / "job")
    assert (tmp_path / "order").read_text() == "a b b a "
    assert all(one["wall_s"] > 0 for some in runs.values() for one in some)


def test_ratios_are_of_the_same_rounds(beside: Any) -> None:
    found = {
        "sift entry": {"entries": 5, "step_s": [1.0, 4.0, 3.0], "peak": 2e6},
        "TRL + LoRA": {"entries": 6, "step_s": [2.0, 4.0, 6.0], "peak": 4e6},
    }
    shown = beside.step_table(found)
    assert "| sift entry | 5 | 3.00 (1.00, 4.00) | 0.50 | 2 | 0.50 |" in shown
