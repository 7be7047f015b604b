"""Instruction tuning beside TRL's SFTTrainer with PEFT's LoRA: its steps, and the whole job.

usage: python benchmarks/beside_trl.py steps|whole MODEL DATA --out OUT [--rounds 7] [--rows 400]

It needs TRL (`pip install trl`). DATA holds train.jsonl and validation.jsonl of the format
`messages`. `sift` trains 1 % of the linear layers' entries by the policy `sift`, the adapter is of
the smallest rank that has as many; the learnt tokens are the same. What TRL does unless told
otherwise, and the same with activations kept as sift keeps them; steps of 8 rows, or packed, of
1,024 tokens.

steps  Processes take turns, a step each per round, as in benchmarks/steps.py: median times, and
       the most memory of a step above the loaded model, trainer and rows.
whole  Processes from start to end, in turn, as in benchmarks/whole.py: same rows, epochs and
       evaluation after each, and none before training.

Writes OUT/STAGE.json and prints a table as Markdown.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import steps
import whole

HERE = Path(__file__).parent
DENSITY = 0.01
PACK = 1024  # tokens, TRL's usual


@dataclass(frozen=True)
class Way:
    """A tool with its options; `sift` has settings of the recipe, TRL those of trainer_sft.py."""

    tool: str
    options: tuple[str, ...] = ()


TRL = "TRL + LoRA"
WAYS = {
    "sift entry": Way("sift", ("train.batch_size=8",)),
    TRL: Way("trl"),
    f"{TRL}, activations kept": Way("trl", ("--keep-activations",)),
    "sift entry, packed": Way("sift", (f"train.tokens={PACK}",)),
    f"{TRL}, packed": Way("trl", ("--packing",)),
    f"{TRL}, packed, activations kept": Way("trl", ("--packing", "--keep-activations")),
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="?", choices=("steps", "whole"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rows", type=int, help="of the training split; all if not given")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(json.loads(given.worker))
    if not (given.stage and given.model and given.data and given.out):
        parser.error("give a stage, a model, its data and --out")
    given.out.mkdir(parents=True, exist_ok=True)
    measure = take_steps if given.stage == "steps" else do_jobs
    found, shown = measure(given)
    report = {"machine": steps.machine(), "found": found}
    (given.out / f"{given.stage}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(shown)


def recipe_of(given: argparse.Namespace) -> Path:
    """Writes the recipe of all that sift does here."""
    rows = f", max_train_rows: {given.rows}" if given.rows else ""
    path: Path = given.out / "sift.yaml"
    path.write_text(
        f"model: {{path: {given.model}}}\n"
        f"data: {{path: {given.data}, task: instruct{rows}}}\n"
        f"selection: {{policy: sift, density: {DENSITY}}}\n"
        f"train: {{epochs: {given.epochs:g}, learning_rate: 1.0e-3}}\n"
        "eval: {keep: last, before: false}\n"
    )
    return path


def trl_words(given: argparse.Namespace, rank: int) -> list[str]:
    """The words that trainer_sft.py takes, but for a way's own and --out."""
    rows = ["--rows", str(given.rows)] if given.rows else []
    return [given.model, given.data, "--rank", str(rank), "--epochs", f"{given.epochs:g}", *rows]


def rank_of(model: str) -> int:
    """The smallest rank at which a LoRA has the entries that sift trains."""
    import torch
    from methods import lora_rank
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return lora_rank(shape, (), DENSITY)


def do_jobs(given: argparse.Namespace) -> tuple[Any, str]:
    """Whole processes in turn."""
    sift = [sys.executable, "-m", "sift_cli", "train", str(recipe_of(given))]
    trl = [sys.executable, str(HERE / "trainer_sft.py"), *trl_words(given, rank_of(given.model))]
    commands = {}
    for name in given.ways:
        way = WAYS[name]
        changes = [word for one in way.options for word in ("--set", one)]
        commands[name] = [*sift, *changes] if way.tool == "sift" else [*trl, *way.options]
    runs = whole.in_turn(commands, given.rounds or 3, given.out / "job")
    task, shape = Path(given.data).name, Path(given.model).name
    found = [{"task": task, "shape": shape, "runs": runs}]
    return found, whole.table(found, TRL if TRL in runs else given.ways[0])


def take_steps(given: argparse.Namespace) -> tuple[Any, str]:
    """One step of each way per round."""
    rounds, recipe = given.rounds or 7, str(recipe_of(given))
    words, workers = trl_words(given, rank_of(given.model)), {}
    for name in given.ways:
        way, out = WAYS[name], str(given.out / f"steps-{name.replace(' ', '-')}")
        settings: dict[str, Any] = {"tool": way.tool, "rounds": rounds}
        if way.tool == "sift":
            settings |= {"recipe": recipe, "options": way.options}
        else:
            settings |= {"options": [*words, *way.options, "--out", out]}
        workers[name] = steps.Worker(settings, __file__)
    entries = {name: worker.read()["entries"] for name, worker in workers.items()}
    found = {
        name: {
            "entries": entries[name],
            "step_s": [one["step"] for one in taken],
            "peak": max(one["peak"] for one in taken),
        }
        for name, taken in steps.in_turn(workers, rounds).items()
    }
    return found, step_table(found)


def step_table(found: dict[str, dict[str, Any]]) -> str:
    """One line a way: median step (min, max), peak, and the ratios of both to TRL's own way."""
    base = found[TRL if TRL in found else next(iter(found))]
    lines = [
        f"| way | entries | step, s (min, max) | to {TRL} | peak above the model, MB | to {TRL} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        times = one["step_s"]
        ratio = median(a / b for a, b in zip(times, base["step_s"], strict=True))
        lines.append(
            f"| {name} | {one['entries']:,} | {median(times):.2f} ({min(times):.2f}, "
            f"{max(times):.2f}) | {ratio:.2f} | {one['peak'] / 1e6:,.0f} "
            f"| {one['peak'] / base['peak']:.2f} |"
        )
    return "\n".join(lines)


def work(settings: dict[str, Any]) -> None:
    """A worker: a step for each line that comes in."""
    (sift_steps if settings["tool"] == "sift" else trl_steps)(settings, steps.answering())


def sift_steps(settings: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """The steps of `sift train`."""
    from sift_cli.models.prepare import prepare_model
    from sift_cli.recipe import load_recipe
    from sift_cli.runs.session import open_session
    from sift_cli.training.batches import steps_of
    from sift_cli.training.choosing import selecting
    from sift_cli.training.step import take_step
    from sift_cli.training.watch import Watch

    recipe = load_recipe(Path(settings["recipe"]), list(settings["options"]))
    session = open_session(recipe)
    assert session.train is not None
    memory = steps.Memory(session.device)
    batches = steps_of(recipe.train, session.train.lengths)
    method = selecting(recipe)(session, batches)
    prepare_model(session.model, session.device, recipe.train.gradient_checkpointing)
    optimizer = method.begin()
    watch = Watch(session, optimizer.parameters)
    answer({"entries": len(optimizer.parameters)})
    for step, rows in enumerate(batches.endless(), start=1):
        if not sys.stdin.readline():
            return
        memory.restart()
        began = steps.now(session.device)
        limit = recipe.train.max_grad_norm
        take_step(session, optimizer, step, rows, watch.broken, max_grad_norm=limit)
        answer({"step": steps.now(session.device) - began, **memory.read()})


def trl_steps(settings: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """The steps of TRL's own loop, which waits before each."""
    from trainer_sft import options, trainer_of
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            memory.restart()
            self.began = steps.now(device)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            answer({"step": steps.now(device) - self.began, **memory.read()})

    endless = ["--max-steps", str(settings["rounds"] + steps.WARM_UP + 1)]
    trainer = trainer_of(options().parse_args([*settings["options"], *endless]), [InTurn()])
    device = trainer.args.device
    memory = steps.Memory(device)
    answer({"entries": sum(w.numel() for w in trainer.model.parameters() if w.requires_grad)})
    trainer.train()


if __name__ == "__main__":
    main()
