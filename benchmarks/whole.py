"""The whole job side by side: `sift train` against Trainer + LoRA, from start to end of process.

usage: python benchmarks/whole.py MODEL DATA --out OUT [--tasks rte cola] [--shape roberta-base]

Same rows, epochs, batch size and evaluations (sift makes one more, before training); the adapter
has as many entries as sift trains. The two take turns; wall time is that of the process, with
imports, tokenisation and writing, and peak memory its largest resident size. `--shape` trains a
model of that shape with random weights and MODEL's tokenizer instead of MODEL. Writes
OUT/whole.json and prints a table as Markdown.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from methods import lora_rank
from steps import machine

HERE = Path(__file__).parent
STRUCTURES = {
    "sift entry": [],
    "sift column": ["selection.structure=column"],
}


def main() -> None:
    """Runs every task in turn and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["rte", "cola"])
    parser.add_argument("--shape", choices=["roberta-base"])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = random_model(given) if given.shape else given.model
    found = []
    for task in given.tasks:
        runs = in_turn(commands_of(given, str(model), task), given.rounds, given.out / task)
        found.append({"task": task, "shape": Path(model).name, "runs": runs})
    report = {"machine": machine(), "epochs": given.epochs, "found": found}
    (given.out / "whole.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(found, "Trainer + LoRA"))


def in_turn(
    commands: dict[str, list[str]], rounds: int, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """What `timed` says of each command; they take turns, in an order that changes each round."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in commands if turn % 2 == 0 else reversed(commands):
            own = out.with_name(f"{out.name}-{name.replace(' ', '-')}-{turn}")
            shutil.rmtree(own, ignore_errors=True)
            runs[name].append(timed([*commands[name], "--out", str(own)], own))
            print(own.name, f"{runs[name][-1]['wall_s']:.1f} s", file=sys.stderr, flush=True)
    return runs


def commands_of(given: argparse.Namespace, model: str, task: str) -> dict[str, list[str]]:
    """What is run for each method, but for --out."""
    data = f"{given.data}/{task}"
    lora = [sys.executable, str(HERE / "trainer_lora.py"), model, data, "--task", task]
    lora += ["--rank", str(rank_of(model)), "--epochs", str(given.epochs)]
    recipe = given.out / f"{task}.yaml"
    recipe.write_text(
        f"model: {{path: {model}}}\n"
        f"data: {{path: {data}, task: {task}, max_length: 128}}\n"
        f"train: {{epochs: {given.epochs:g}, batch_size: 32, learning_rate: 2e-3}}\n"
        "eval: {keep: last}\n"
    )
    sift = [sys.executable, "-m", "sift_cli", "train", str(recipe)]
    if given.rows:
        lora += ["--rows", str(given.rows)]
        sift += ["--set", f"data.max_train_rows={given.rows}"]
    changes = {name: [["--set", one] for one in more] for name, more in STRUCTURES.items()}
    return {"Trainer + LoRA": lora} | {
        name: [*sift, *(word for pair in more for word in pair)] for name, more in changes.items()
    }


def rank_of(model: str) -> int:
    """The rank of a LoRA with 1 % of the entries of the model's linear layers, the head aside."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model, num_labels=2)
    with torch.device("meta"):
        shape = AutoModelForSequenceClassification.from_config(config)
    head = [name for name, _ in shape.named_parameters() if name.startswith("classifier.")]
    return lora_rank(shape, head, 0.01)


def timed(command: list[str], out: Path) -> dict[str, Any]:
    """Wall time, largest resident size and result of one process."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    started = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it does not see it for itself
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)}: status {status}\n{log.read_text()[-2000:]}")
    summary = json.loads((out / "summary.json").read_text())
    return {"wall_s": wall, "peak": usage.ru_maxrss * 1024, "metrics": summary["metrics"]}


def random_model(given: argparse.Namespace) -> Path:
    """A folder with a model of the shape, random weights, and the tokenizer of the given one."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from workloads import SHAPES

    folder: Path = given.out / given.shape
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    shape = {**SHAPES[given.shape], "vocab_size": len(tokenizer)}
    shape["pad_token_id"] = tokenizer.pad_token_id
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def table(found: list[dict[str, Any]], against: str) -> str:
    """Markdown: medians, and the ratio to one of the methods."""
    lines = [
        f"| model | task | method | wall, s (min, max) | to {against} "
        "| peak resident, MB | metric |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        base = median(run["wall_s"] for run in one["runs"][against])
        for name, runs in one["runs"].items():
            walls = [run["wall_s"] for run in runs]
            scored = {k: v for k, v in runs[0]["metrics"].items() if k in METRICS}
            metric = ", ".join(f"{key} {value:.3f}" for key, value in scored.items())
            lines.append(
                f"| {one['shape']} | {one['task']} | {name} | {median(walls):.1f} "
                f"({min(walls):.1f}, {max(walls):.1f}) | {median(walls) / base:.2f} | "
                f"{median(run['peak'] for run in runs) / 1e6:,.0f} | {metric} |"
            )
    return "\n".join(lines)


METRICS = ("accuracy", "matthews", "matthews_correlation", "loss")

if __name__ == "__main__":
    main()
