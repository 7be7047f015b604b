"""The run folder: the name of everything in it."""

import re
import shlex
from pathlib import Path
from typing import Any

from sift_cli.errors import SiftError

# of every run, from its beginning
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
GRADIENT_FILE = "gradient.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD = "tensorboard"
WANDB_FILE = "wandb.id"
# of one that runs, or was interrupted
CHECKPOINTS = "checkpoint"
CHECKPOINT_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.safetensors")  # step, hash
LOCK_FILE = ".lock"
# of one whose learning rate was left open
RATES = "rates"  # a run for each that was tried
RATES_FILE = "rates.json"
# of one that has finished
DELTA_FILE = "delta.safetensors"
TRAINED_FILE = "trained.safetensors"  # of a method that makes no delta, in its place
WEIGHTS_FILE = "weights.jsonl"
CARD_FILE = "README.md"
SUMMARY_FILE = "summary.json"
EVALUATIONS = "evaluations"  # results of benchmarks
# of its report
REPORT_FILE = "report.html"
PLOTS = "plots"

# Parts of a recipe that change no result.
NO_RESULT: dict[str, Any] = {
    "out": True,
    "log": True,
    "checkpoint": True,
    "distributed": True,
    "eval": {"samples": True, "generate": True},
}


def delta_file(path: str) -> Path:
    """The delta at `path`: the file, or the one in a run folder.

    Raises SiftError for a run that was interrupted before it wrote one.
    """
    place = Path(path).expanduser()
    inside = place / DELTA_FILE
    if inside.is_file():
        return inside
    folder = place.parent if place.name == DELTA_FILE else place
    if not place.is_file() and (steps := saved_steps(folder)):
        again = ["sift", "train", str(folder / RECIPE_FILE), "--out", str(folder), "--resume"]
        raise SiftError(
            f"{folder}: a run that has not finished, of which step {max(steps):,} is saved; go on "
            f"with {shlex.join(again)}"
        )
    return place


def finished_run(path: str) -> Path | None:
    """The folder of the finished run that `path` is, or is the delta of; None for others."""
    delta = delta_file(path)
    folder = delta.parent if delta.name == DELTA_FILE else delta
    return folder if (folder / SUMMARY_FILE).is_file() else None


def saved_steps(folder: Path) -> list[int]:
    """The steps after which the run in `folder` has checkpoints."""
    names = (CHECKPOINT_NAME.fullmatch(path.name) for path in (folder / CHECKPOINTS).glob("*"))
    return [int(name[1]) for name in names if name]
