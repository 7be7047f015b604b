"""The run folder: the name of everything in it, and its beginning."""

import shutil
from pathlib import Path

from rich.console import Console

from sift_cli.recipe import Recipe
from sift_cli.runs.sinks import Bar, JsonLines, Sink, Sinks, TensorBoard, WandB
from sift_cli.system.files import write_text

# of every run, from its beginning
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
GRADIENT_FILE = "gradient.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
TENSORBOARD = "tensorboard"
WANDB_FILE = "wandb.id"
# of one that runs, or was interrupted
CHECKPOINTS = "checkpoint"
LOCK_FILE = ".lock"
# of one that has finished
DELTA_FILE = "delta.safetensors"
TRAINED_FILE = "trained.safetensors"  # of a method that makes no delta, in its place
WEIGHTS_FILE = "weights.jsonl"
CARD_FILE = "README.md"
SUMMARY_FILE = "summary.json"
# of its report
REPORT_FILE = "report.html"
PLOTS = "plots"

NO_RESULT = {"out", "log", "checkpoint"}  # parts of a recipe that change no result


def delta_file(path: str) -> Path:
    """The delta at `path`: the file, or the one in a run folder."""
    place = Path(path).expanduser()
    inside = place / DELTA_FILE
    return inside if inside.is_file() else place


def open_run_folder(recipe: Recipe, out: Path, console: Console, after: int = 0) -> Sinks:
    """Writes recipe.yaml and opens the sinks of a run that goes on after step `after`.

    What an earlier run finished with is removed.
    """
    sinks: list[Sink] = []  # first: a package that is missing must not cost the earlier run
    if recipe.log.tensorboard:
        sinks.append(TensorBoard(out / TENSORBOARD, after))
    if recipe.log.wandb:
        sinks.append(WandB(out / WANDB_FILE, recipe.model_dump(mode="json"), after))
    for name in (SUMMARY_FILE, DELTA_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    if not after:
        (out / GRADIENT_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / PLOTS, ignore_errors=True)
    write_text(out / RECIPE_FILE, recipe.to_yaml())
    return Sinks(JsonLines(out / METRICS_FILE, after), [*sinks, Bar(console)])
