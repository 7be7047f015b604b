"""A finished run as one page that needs nothing else."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from sift_cli import __version__
from sift_cli.analysis.charts import by_layer, charts, gradient_share
from sift_cli.analysis.probe import PROBE_FILE
from sift_cli.analysis.spoken import Spoken
from sift_cli.errors import SiftError
from sift_cli.recipe import Recipe, parse_recipe
from sift_cli.runs.cards import dataset_name
from sift_cli.runs.folder import (
    GRADIENT_FILE,
    METRICS_FILE,
    PLOTS,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
)
from sift_cli.runs.summary import Summary
from sift_cli.tasks.classification import MISTAKES
from sift_cli.tasks.kinds import task_of
from sift_cli.tasks.metrics import ClassScore, shown

TEMPLATE = "report.html.j2"


def report(
    run: Path, *, out: Path | None = None, probe: Path | None = None, texts: bool = True
) -> Path:
    """Writes report.html and `plots/` into `out`, the run folder itself unless given.

    `probe` is a folder of `sift probe`, whose picture of the kept gradient goes in. Without `texts`
    no row of the data does. Returns the page's path. Raises SiftError where `run` holds no finished
    run or `probe` no probe.json.
    """
    recorded = Recorded.read(run)
    probed = _read(probe / PROBE_FILE, "what `sift probe` writes", json.loads) if probe else None
    folder = out or run
    plots = folder / PLOTS
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir(parents=True)
    summary, weights = recorded.summary, recorded.weights
    language = summary.language is not None
    predictions = [] if language else recorded.predictions
    drawn = charts(
        recorded.metrics,
        weights,
        [] if summary.kind else predictions,
        summary.labels,
        summary.metrics_before,
        probed,
        plots,
        language=language,
    )
    layered = by_layer(weights)
    page = _template().render(
        run=run,
        shown=shown,
        named=lambda said: (", ".join(said) or "none") if isinstance(said, list) else said,
        base=recorded.recipe.model.path,
        rows=dataset_name(recorded.recipe.data.model_dump()),
        summary=summary,
        tiles=_tiles(summary),
        charts=drawn,
        rest=[one for one in weights if one["whole"] or not by_layer([one])] if layered else [],
        kept=gradient_share(list(recorded.gradient.values())),
        by_chance=_by_chance(weights, recorded.gradient),
        says=probed["says"] if probed else [],
        splits=Counter(line["split"] for line in predictions),
        classes=_classes(summary, predictions),
        mistakes=_worst(predictions, bool(summary.labels)) if texts else [],
        spoken=Spoken.of(summary, recorded.predictions, recorded.samples) if language else None,
        texts=texts,
        recipe=recorded.text,
        numbers=_numbers(recorded.numbers),
        version=__version__,
        plots=PLOTS,
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")
    return folder / REPORT_FILE


@dataclass(frozen=True)
class Recorded:
    """What a run folder holds of its run.

    `numbers` is summary.json as it stands there, `text` the recipe's. `metrics`, `weights`,
    `predictions` and `samples` are the lines of the files of these names; a weight's line also
    holds its `gradient`, which maps a weight's name to its line of gradient.jsonl.
    """

    summary: Summary
    numbers: dict[str, Any]
    recipe: Recipe
    text: str
    metrics: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    gradient: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> "Recorded":
        """Reads the folder `run`. Raises SiftError where it holds no finished run."""
        what = "a finished run"
        summary, numbers = _read(run / SUMMARY_FILE, what, _parse_summary)
        text = _read(run / RECIPE_FILE, what, str)
        recipe = parse_recipe(text, str(run / RECIPE_FILE))
        files = (METRICS_FILE, WEIGHTS_FILE, PREDICTIONS_FILE, SAMPLES_FILE, GRADIENT_FILE)
        metrics, weights, predictions, samples, gradients = (_lines(run / one) for one in files)
        gradient = {line["name"]: line for line in gradients}
        for weight in weights:
            if weight["name"] in gradient:
                weight["gradient"] = gradient[weight["name"]]
        return cls(summary, numbers, recipe, text, metrics, weights, predictions, samples, gradient)


def _parse_summary(text: str) -> tuple[Summary, dict[str, Any]]:
    numbers = json.loads(text)
    return Summary.of(numbers), numbers


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE)


def _read(path: Path, what: str, parse: Callable[[str], Any]) -> Any:
    """A file of a folder that should be `what`, parsed. Raises SiftError where it is not."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SiftError(f"{path.parent} holds no {path.name}, so it is not {what}") from None
    except ValueError as error:
        raise SiftError(f"{path} is damaged: {error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where a run of an older version lacks it."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = _read(
        path, "", lambda text: [json.loads(line) for line in text.split("\n") if line]
    )
    return lines


def _worst(predictions: list[dict[str, Any]], classes: bool) -> list[dict[str, Any]]:
    """The mistakes to show, the most confident or the largest first."""

    def size(row: Mapping[str, Any]) -> float:
        if classes:
            return float(row.get("probability", row.get("loss")))
        return float(abs(row["predicted"] - row["label"]))

    mistakes = [row for row in predictions if "text" in row]  # a run keeps no other row's text
    return sorted(mistakes, key=size, reverse=True)[:MISTAKES]


def _classes(
    summary: Summary, predictions: Sequence[Mapping[str, Any]]
) -> dict[str, list[ClassScore]]:
    """How well each class is told, by split."""
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for line in predictions:
        splits.setdefault(line["split"], []).append(line)
    task = task_of(summary)
    return {split: rows for split, some in splits.items() if (rows := task.by_class(some))}


def _by_chance(
    weights: Sequence[Mapping[str, Any]], gradient: Mapping[str, Mapping[str, float]]
) -> float | None:
    """The share of the gradient's norm that as many random entries of each weight would keep.

    None of a run that recorded no weights, or no gradient.
    """
    shares = {one["name"]: one["entries"] / prod(one["shape"]) for one in weights}
    by_chance = [
        {"norm": one["norm"], "kept": one["norm"] * shares.get(name, 0.0) ** 0.5}
        for name, one in gradient.items()
    ]
    return gradient_share(by_chance) if weights else None


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Name, number and remark of what is told at the top."""
    head = "with the head" if summary.dense_entries else "bit for bit, and back"
    return [
        ("delta file", f"{summary.delta_bytes / 1e3:,.0f} kB", head),
        ("one step", f"{summary.step_time_ms:,.0f} ms", f"median of {summary.steps:,}"),
        ("whole run", f"{summary.wall_time_s:,.0f} s", f"on {summary.device}"),
        ("peak memory", f"{summary.peak_memory_bytes / 1e6:,.0f} MB", "of the process"),
    ]


def _numbers(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every key of summary.json, those of other versions included, and its value as text.

    Of a language run without those that its page tells of, or that it has no use for.
    """

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {text(part)}" for key, part in value.items())
        if isinstance(value, list):
            return ", ".join(map(text, value))
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.1f}"
        return f"{value:,}" if type(value) is int else str(value)

    elsewhere = ("labels", "truncated", "splits") if "language" in summary else ()
    told = {name: value for name, value in summary.items() if name not in elsewhere}
    return [(name.replace("_", " "), text(value)) for name, value in told.items()]
