"""A finished run as one page that needs nothing else."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sift_cli import __version__
from sift_cli.analysis.charts import by_layer, charts, gradient_share
from sift_cli.errors import SiftError
from sift_cli.recipe import parse_recipe
from sift_cli.runs.folder import (
    GRADIENT_FILE,
    PLOTS,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
)
from sift_cli.runs.record import MISTAKES
from sift_cli.tasks.metrics import shown

TEMPLATE = "report.html.j2"


def report(
    run: Path, *, out: Path | None = None, probe: Path | None = None, texts: bool = True
) -> Path:
    """Writes report.html and `plots/` into `out`, the run folder itself unless given.

    `probe` is a folder of `sift probe`, whose picture of the kept gradient goes in. Without `texts`
    no row of the data does. Returns the page's path. Raises SiftError where `run` holds no finished
    run or `probe` no probe.json.
    """
    summary = _read(run / SUMMARY_FILE, "a finished run", json.loads)
    text = _read(run / RECIPE_FILE, "a finished run", str)
    recipe = parse_recipe(text, str(run / RECIPE_FILE))
    lines, weights, predictions = (
        _lines(run / name) for name in ("metrics.jsonl", WEIGHTS_FILE, PREDICTIONS_FILE)
    )
    gradient = {line["name"]: line for line in _lines(run / GRADIENT_FILE)}
    for weight in weights:
        if weight["name"] in gradient:
            weight["gradient"] = gradient[weight["name"]]
    probed = _read(probe / "probe.json", "what `sift probe` writes", json.loads) if probe else None
    folder = out or run
    plots = folder / PLOTS
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir(parents=True)
    labels = summary.get("labels")
    drawn = charts(lines, weights, predictions, labels, summary["metrics_before"], probed, plots)
    layered = by_layer(weights)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        run=run,
        shown=shown,
        base=recipe.model.path,
        summary={"labels": None, **summary},
        tiles=_tiles(summary),
        charts=drawn,
        rest=[one for one in weights if one["whole"] or not by_layer([one])] if layered else [],
        kept=gradient_share(list(gradient.values())),
        by_chance=_by_chance(weights, gradient),
        says=probed["says"] if probed else [],
        splits=Counter(line["split"] for line in predictions),
        mistakes=_worst(predictions, bool(labels)) if texts else [],
        texts=texts,
        recipe=text,
        numbers=_numbers(summary),
        version=__version__,
        plots=PLOTS,
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")
    return folder / REPORT_FILE


def _read(path: Path, what: str, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SiftError(f"{path.parent} holds no {path.name}, so it is not {what}") from None
    except ValueError as error:
        raise SiftError(f"{path} is damaged: {error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that an older or a stopped run may lack."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = _read(
        path, "", lambda text: [json.loads(line) for line in text.split("\n") if line]
    )
    return found


def _worst(predictions: list[dict[str, Any]], classes: bool) -> list[dict[str, Any]]:
    """The mistakes to show, the most confident or the largest first."""

    def size(one: Mapping[str, Any]) -> float:
        return float(one["probability"] if classes else abs(one["predicted"] - one["label"]))

    told = [one for one in predictions if "text" in one]
    return sorted(told, key=size, reverse=True)[:MISTAKES]


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


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, number and remark of what is told at the top."""
    return [
        ("delta file", f"{summary['delta_bytes'] / 1e3:,.0f} kB", "with the head"),
        ("one step", f"{summary['step_time_ms']:,.0f} ms", f"median of {summary['steps']:,}"),
        ("whole run", f"{summary['wall_time_s']:,.0f} s", f"on {summary['device']}"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB", "of the process"),
    ]


def _numbers(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """summary.json as rows."""

    def said(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {said(one)}" for key, one in value.items())
        if isinstance(value, list):
            return ", ".join(map(said, value))
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.1f}"
        return f"{value:,}" if type(value) is int else str(value)

    return [(name.replace("_", " "), said(value)) for name, value in summary.items()]
