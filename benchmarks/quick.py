"""How quickly `sift` is ready, beside the imports that it cannot do without.

usage: python benchmarks/quick.py MODEL DATA [--task rte] [--rounds 5]

MODEL is a folder of a BERT, DATA one of rows. Predicting a sentence, `from sift_cli import Delta`
and the imports of torch, and of torch with the model's own classes, alternate, each in a process of
its own; the first round is not counted. Prints medians, in seconds by the clock and in seconds of
the processor (which other work on the machine moves less), and their ratios, as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

RECIPE = """\
model: {{path: {model}}}
data: {{path: {data}, task: {task}, max_length: 128}}
selection: {{policy: sift, density: 0.01}}
train: {{batch_size: 8, learning_rate: 1.0e-3, max_steps: 2}}
"""
TORCH = "import torch"
CLASSES = f"{TORCH}; from transformers import BertForSequenceClassification, BertTokenizerFast"
BESIDE = {"predict": "classes", "delta": "torch"}  # what each is compared with


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", default="rte")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder), given.model.resolve(), given.data.resolve(), given.task)
        sift = ["-m", "sift_cli", "predict", str(run), "A man sleeps."]
        commands = {
            "torch": ["-c", TORCH],
            "delta": ["-c", "from sift_cli import Delta"],
            "classes": ["-c", CLASSES],
            "predict": [*sift, "--pair", "A man is awake."],
        }
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(given.rounds + 1):
            for name, command in commands.items():
                spent[name].append(seconds(command))
    clock, processor = (
        {name: median(one[at] for one in some[1:]) for name, some in spent.items()} for at in (0, 1)
    )
    found = {
        kind: {name: round(value, 2) for name, value in one.items()}
        | {f"{name} / {by}": round(one[name] / one[by], 2) for name, by in BESIDE.items()}
        for kind, one in (("clock", clock), ("processor", processor))
    }
    print(json.dumps({"rounds": given.rounds, "cores": os.cpu_count(), **found}, indent=2))


def trained(folder: Path, model: Path, data: Path, task: str) -> Path:
    """A run of two steps."""
    recipe, run = folder / "recipe.yaml", folder / "run"
    recipe.write_text(RECIPE.format(model=model, data=data, task=task))
    seconds(["-m", "sift_cli", "train", str(recipe), "--out", str(run)])
    return run


def seconds(command: list[str]) -> tuple[float, float]:
    """By the clock and of the processor, of a Python process that must succeed."""
    began, before = perf_counter(), os.times()
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    took, after = perf_counter() - began, os.times()
    children = ("children_user", "children_system")
    return took, sum(getattr(after, one) - getattr(before, one) for one in children)


if __name__ == "__main__":
    main()
