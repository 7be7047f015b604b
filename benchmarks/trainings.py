"""One `sift` command of a benchmark: run once, read from disk ever after."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARED = [
    "eval.keep=last",
    "train.batch_size=32",
    "data.max_length=128",
    "train.precision=bfloat16",
]
TASKS = {  # how long each task trains
    "sst2": ["train.epochs=2", "data.max_train_rows=10000"],
    "cola": ["train.epochs=3"],
    "rte": ["train.epochs=3"],
}


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What every benchmark of trainings is told."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser


def run(
    model: str,
    data: str,
    out: Path,
    task: str,
    changes: list[str],
    command: Sequence[str] = ("train",),
    result: str = "summary.json",
) -> dict[str, Any]:
    """The JSON `result` of one `sift` command on one core, from disk where it is there already."""
    if not (out / result).is_file():
        out.mkdir(parents=True, exist_ok=True)
        recipe = out.parent / f"{out.name}.yaml"
        recipe.write_text(
            f"model: {{path: {model}}}\ndata: {{path: {data}/{task}, task: {task}}}\n"
        )
        words = [sys.executable, "-m", "sift_cli", *command, str(recipe), "--out", str(out)]
        for change in [*SHARED, *TASKS[task], *changes]:
            words += ["--set", change]
        print("running", out.name, flush=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{out}: exit {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads((out / result).read_text())
    return found
