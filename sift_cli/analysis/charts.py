"""Charts of a run, each as a PNG file and as an SVG that takes the colours of the page it is in."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sift_cli.analysis.figures import (
    BLUE,
    INK,
    ORANGE,
    SHADES,
    WIDTH,
    Cell,
    Cells,
    axes_of,
    colour,
    draw_heat,
    heat_height,
    style,
    svg_of,
)
from sift_cli.tasks.metrics import LOSS, Metrics

Line = Mapping[str, Any]  # of metrics.jsonl, weights.jsonl, gradient.jsonl or predictions.jsonl
LABELS = 24  # letters of a label
NAMED = 25  # classes, at most, whose names and counts fit a confusion matrix
POINTS = 2000  # of a scatter plot
WIDE = 100  # times the least value, from which on a perplexity is shown by its logarithm


def charts(
    lines: Sequence[Line],
    weights: Sequence[Line],
    predictions: Sequence[Line],
    labels: Sequence[str] | None,
    before: Metrics,
    probe: Mapping[str, Any] | None,
    out: Path,
    *,
    language: bool = False,
) -> dict[str, str]:
    """Draws what there is data for; writes `out`/NAME.png and returns NAME -> SVG.

    `lines` are those of metrics.jsonl, `weights` and `predictions` what the run recorded, `probe`
    what probe.json holds; `before` are the metrics before training, of a language task or another.
    """
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "metrics" in line]
    layered = by_layer(weights)
    drawn: dict[str, Callable[[], Figure]] = {}
    if steps:
        progress = _language_progress if language else _progress
        drawn["progress"] = lambda: progress(steps, scores, before)
        drawn["rate"] = lambda: _rate(steps)
    if layered:
        drawn["entries"] = lambda: _entries(layered)
        drawn["change"] = lambda: _change(layered)
        if any("gradient_share" in cell for cell in layered.values()):
            title = "share of the gradient's norm"
            drawn["gradient"] = lambda: _share(layered, "gradient_share", title)
        if any("half_in_inputs" in cell for cell in layered.values()):
            drawn["inputs"] = lambda: _share(layered, "half_in_inputs", "share of the inputs")
    if probe:
        drawn["kept"] = lambda: _kept(probe)
    for split in dict.fromkeys(line["split"] for line in predictions):
        rows = [line for line in predictions if line["split"] == split]
        drawn[f"predictions-{split}"] = lambda rows=rows: (  # type: ignore[misc]
            _confusion(rows, labels) if labels else _scatter(rows)
        )
    pictures = {}
    with style():
        for name, draw in drawn.items():
            figure = draw()
            figure.savefig(out / f"{_file(name)}.png", dpi=130)
            pictures[name] = svg_of(figure, name)
    return pictures


def by_layer(weights: Sequence[Line]) -> dict[tuple[str, str], dict[str, Any]]:
    """The weights that lie in numbered layers, added up by layer and module.

    A weight's `gradient` is its line of gradient.jsonl: the norm of the first batch's gradient, and
    what the trained entries keep of it.
    """
    lines: dict[tuple[str, str], list[Line]] = {}
    for weight in weights:
        place = re.match(r"(.*?)\.(\d+)\.(.*)\.\w+$", weight["name"])
        if place and not weight["whole"]:
            where = f"{place[1]} {place[2]}", place[3]
            lines.setdefault(where, []).append(weight)
    stacks = {layer.rpartition(" ")[0] for layer, _ in lines}
    cells = {}
    for (layer, module), some in lines.items():
        row = layer if len(stacks) > 1 else layer.rpartition(" ")[2]
        cells[row, module] = _added_up(some)
    return cells


def _added_up(weights: Sequence[Line]) -> dict[str, Any]:
    """The cell of several weights: a module's weight and its bias."""
    touched = sum(one["touched"] for one in weights)
    squares = sum(one["touched"] * one["rms"] ** 2 for one in weights)
    sizes = [prod(one["shape"]) for one in weights]
    crowded = [one["half_in_inputs"] for one in weights if "half_in_inputs" in one]
    share = gradient_share([one["gradient"] for one in weights if "gradient" in one])
    return {
        "entries": sum(one["entries"] for one in weights),
        "share": sum(one["entries"] for one in weights) / sum(sizes),
        "rms": (squares / touched) ** 0.5,
        **({"half_in_inputs": crowded[0]} if crowded else {}),
        **({} if share is None else {"gradient_share": share}),
    }


def gradient_share(gradients: Sequence[Line]) -> float | None:
    """The share of the norm of several weights' gradients that is kept; None without any."""
    whole = sum(one["norm"] ** 2 for one in gradients)
    return (sum(one["kept"] ** 2 for one in gradients) / whole) ** 0.5 if whole else None


def _progress(steps: Sequence[Line], scores: Sequence[Line], before: Metrics) -> Figure:
    """Losses of rows, trained on and held out, on one axis; all other metrics on another."""
    names = list(scores[0]["metrics"]) if scores else []
    others = [name for name in names if not name.startswith(LOSS)]
    figure = Figure(figsize=(WIDTH, 4.2 if others else 2.3), layout="constrained")
    axes = figure.subplots(2 if others else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(*_series(steps, LOSS), color=BLUE, lw=1.2, marker=_marker(steps), label="training")
    axes[0].set_ylabel("loss")
    for at, name in enumerate((name for name in names if name not in others), start=1):
        told = name.replace(LOSS, "held out", 1)
        points = _defined(name, scores, before)
        axes[0].plot(*points, marker=".", label=told, color=colour(at))
    if len(others) < len(names):
        axes[0].legend(fontsize=8.5)
    for at, name in enumerate(others):
        points = _defined(name, scores, before)
        axes[1].plot(*points, marker=".", label=name, color=colour(at))
    if scores:
        _mark_best(axes[-1], scores)
        axes[-1].legend(fontsize=8.5)
    _count_steps(axes)
    return figure


def _language_progress(steps: Sequence[Line], scores: Sequence[Line], before: Metrics) -> Figure:
    """Losses over tokens, trained on and held out, on one axis; each other metric on its own."""
    names = list(scores[0]["metrics"]) if scores else []
    others = [name for name in names if name != LOSS]
    heights = [2.3, *[1.4] * len(others)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    axes[0].plot(*_series(steps, LOSS), color=BLUE, lw=1.2, marker=_marker(steps), label="training")
    axes[0].set_ylabel("loss per token")
    if LOSS in names:
        points = _defined(LOSS, scores, before)
        axes[0].plot(*points, color=ORANGE, marker=".", label="held out")
    for axis, name in zip(axes[1:], others, strict=True):
        at, values = _defined(name, scores, before)
        axis.plot(at, values, color=ORANGE, marker=".")
        axis.set_ylabel(name.replace("_", " "))
        if name == "perplexity" and max(values) > WIDE * min(values):
            axis.set_yscale("log")
    for axis in axes:
        _mark_best(axis, scores)
    axes[0].legend(fontsize=8.5)
    _count_steps(axes)
    return figure


def _defined(
    name: str, scores: Sequence[Line], before: Metrics
) -> tuple[Sequence[int], Sequence[float]]:
    """The steps at which a metric is defined, 0 before training, and its values there."""
    line = [(0, before.get(name))] + [(one["step"], one["metrics"][name]) for one in scores]
    defined = [(step, value) for step, value in line if value is not None]
    return [step for step, _ in defined], [value for _, value in defined]


def _mark_best(axis: Axes, scores: Sequence[Line]) -> None:
    best = [one["step"] for one in scores if one.get("best")]
    if best:
        axis.axvline(best[-1], color=INK, lw=0.8, ls=":", label="best")


def _count_steps(axes: Any) -> None:
    for axis in axes:
        axis.grid(alpha=0.2)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def _rate(steps: Sequence[Line]) -> Figure:
    figure, axis = axes_of(1.9)
    axis.plot(*_series(steps, "learning_rate"), color=ORANGE, marker=_marker(steps))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.set(xlabel="step", ylabel="learning rate")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.2)
    return figure


def _entries(layered: Cells) -> Figure:
    return _heat(
        layered,
        "share",
        lambda cell: _thousands(cell["entries"]),
        "share of the entries",
        "{:.2%}".format,
    )


def _change(layered: Cells) -> Figure:
    return _heat(layered, "rms", lambda one: _small(one["rms"]), "root mean square change", _small)


def _share(layered: Cells, key: str, title: str) -> Figure:
    """The cells that hold `key`, in whole per cent."""
    held = {place: cell for place, cell in layered.items() if key in cell}
    return _heat(held, key, lambda cell: f"{cell[key]:.0%}", title, "{:.0%}".format)


def _heat(
    cells: Cells,
    key: str,
    text: Callable[[Cell], str],
    title: str,
    form: Callable[[float], str],
) -> Figure:
    figure, axis = axes_of(heat_height(cells))
    draw_heat(axis, cells, key, text, title, form)
    return figure


def _kept(probe: Mapping[str, Any]) -> Figure:
    figure, axis = axes_of(3)
    for at, (name, kept) in enumerate(probe["kept_norm_share"].items()):
        steps = range(1, len(kept["steps"]) + 1)
        axis.plot(steps, kept["steps"], label=name, marker=".", color=colour(at))
    axis.set(ylim=(0, 1.02), xlabel="training step", ylabel="share of the gradient's norm")
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8.5)
    return figure


def _confusion(rows: Sequence[Line], labels: Sequence[str]) -> Figure:
    counts = Counter((row["label"], row["predicted"]) for row in rows)
    truths = Counter(row["label"] for row in rows)
    size = min(4.6, 1.6 + 0.5 * len(labels))
    figure, axis = axes_of(size + 0.6)
    named = len(labels) <= NAMED
    for y, truth in enumerate(labels):
        for x, predicted in enumerate(labels):
            count = counts[truth, predicted]
            share = count / max(truths[truth], 1)
            box = Rectangle((x, y), 0.98, 0.98, color=SHADES(share), lw=0)
            axis.add_patch(box)
            if named and (count or len(labels) <= 12):
                ink = "white" if share > 0.6 else INK
                small = 9.5 if len(labels) <= 8 else 6.5
                at = x + 0.49, y + 0.49
                axis.text(*at, f"{count:,}", ha="center", va="center", color=ink, size=small)
    ends = len(labels)
    axis.set(xlim=(0, ends), ylim=(ends, 0), xlabel="predicted", ylabel="label", aspect="equal")
    names = [_short(label) for label in labels] if named else []
    ticks = [at + 0.49 for at in range(len(names))]
    axis.set_xticks(ticks, names, rotation=35, ha="right")
    axis.set_yticks(ticks, names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def _scatter(rows: Sequence[Line]) -> Figure:
    shown = rows[:: 1 + len(rows) // POINTS]
    figure, axis = axes_of(4.4)
    x, y = [row["label"] for row in shown], [row["predicted"] for row in shown]
    axis.scatter(x, y, s=7, alpha=0.45, color=BLUE, lw=0)
    ends = min(*x, *y), max(*x, *y)
    axis.plot(ends, ends, color=INK, lw=0.8, ls=":")
    axis.set(xlabel="label", ylabel="predicted")
    axis.grid(alpha=0.2)
    return figure


def _series(lines: Sequence[Line], key: str) -> tuple[list[float], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def _marker(lines: Sequence[Line]) -> str:
    return "." if len(lines) < 30 else ""


def _file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _short(label: str) -> str:
    return label if len(label) <= LABELS else label[: LABELS - 1] + "…"


def _thousands(count: int) -> str:
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.3g}k" if count < 1e6 else f"{count / 1e6:.3g}M"


def _small(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")
