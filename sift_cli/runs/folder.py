"""The run folder: the name of each of its files, and its beginning."""

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from sift_cli.errors import ExitCode, SiftError
from sift_cli.recipe import Recipe
from sift_cli.runs.sinks import Bar, JsonLines, Sink, Sinks, TensorBoard, WandB
from sift_cli.system.files import write_text

SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
NO_RESULT = {"out", "log", "checkpoint"}  # parts of a recipe that change no result
PREDICTIONS_FILE = "predictions.jsonl"
WEIGHTS_FILE = "weights.jsonl"
GRADIENT_FILE = "gradient.jsonl"
TRAINED_FILE = "trained.safetensors"  # of a method that is not sift's, in place of a delta
REPORT_FILE = "report.html"
PLOTS = "plots"
DELTA_FILE = "delta.safetensors"
RECIPE_FILE = "recipe.yaml"


def delta_file(path: str) -> Path:
    """The delta at `path`: the file, or the one in a run folder."""
    place = Path(path).expanduser()
    inside = place / DELTA_FILE
    return inside if inside.is_file() else place


CARD_FILE = "README.md"


def open_run_folder(recipe: Recipe, out: Path, console: Console, after: int = 0) -> Sinks:
    """metrics.jsonl and the other sinks, which go on after step `after`.

    What a finished run left in the folder is cleared away.
    """
    sinks: list[Sink] = []  # first: a package that is missing must not cost the earlier run
    if recipe.log.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard", after))
    if recipe.log.wandb:
        sinks.append(WandB(out, recipe.model_dump(mode="json"), after))
    for name in (SUMMARY_FILE, DELTA_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    if not after:
        (out / GRADIENT_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / PLOTS, ignore_errors=True)
    write_text(out / RECIPE_FILE, recipe.to_yaml())
    return Sinks(JsonLines(out / METRICS_FILE, after), [*sinks, Bar(console)])


def read_summary(out: Path) -> dict[str, Any] | None:
    """What the finished run in `out` says of itself; None where none has finished there.

    Raises SiftError (exit code 3) where it cannot be understood.
    """
    path = out / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise SiftError(f"{path}: damaged: {error}", ExitCode.WRONG_FILE) from None
    return summary
