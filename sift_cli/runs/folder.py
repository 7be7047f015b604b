"""The run folder: the name of everything in it."""

from pathlib import Path

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
# of one whose learning rate was left open
RATES = "rates"  # a run for each that was tried
RATES_FILE = "rates.json"
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
