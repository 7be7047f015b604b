"""Plots as PNG files."""

from math import hypot
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sift_cli.analysis.table import Comparison, TableRow

MARKERS = "osD^vP*X"


def plot_probe(probe: dict[str, Any], out: Path) -> None:
    """Writes `curve.png`, `kept.png` and, where there are classes, `classes.png` into `out`.

    `probe` is what probe.json holds.
    """
    _curve(probe, out / "curve.png")
    _kept(probe, out / "kept.png")
    if probe["overlap"]["between_classes"]:
        _classes(probe, out / "classes.png")


def _curve(probe: dict[str, Any], path: Path) -> None:
    densities = [100 * density for density in probe["curve"]["densities"]]
    steps = probe["curve"]["norm_share"]
    figure = Figure(figsize=(5.5 * len(steps), 4))
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)
    for axis, (step, kinds) in zip(axes[0], steps.items(), strict=True):
        for name, shares in kinds.items():
            overall = name == "overall"
            if overall or not name.endswith("bias"):
                width, colour = (2.5, "black") if overall else (1.2, None)
                axis.plot(densities, shares, label=name, lw=width, color=colour, marker=".")
        axis.set(xscale="log", ylim=(0, 1.02), xlabel="largest entries, % of each weight")
        axis.set_title(step)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the gradient's norm")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    _save(figure, path)


def _kept(probe: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8.5, 4))
    axis = figure.subplots()
    for name, kept in probe["kept_norm_share"].items():
        axis.plot(range(1, len(kept["steps"]) + 1), kept["steps"], label=name, marker=".")
    axis.set(ylim=(0, 1.02), xlabel="training step", ylabel="share of the batch's gradient norm")
    axis.set_title(f"what {probe['density'] or probe['budget']} of the entries keep")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def _classes(probe: dict[str, Any], path: Path) -> None:
    table = probe["overlap"]["between_classes"]
    names = list(table)
    figure = Figure(figsize=(2.5 + 0.9 * len(names), 2 + 0.8 * len(names)))
    axis = figure.subplots()
    values = [[table[one][other] for other in names] for one in names]
    axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if value > 0.6 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axis.set_title("overlap of the masks of single classes")
    _save(figure, path)


def plot_delta(inspected: dict[str, Any], path: Path) -> None:
    """Density of a delta by layer and kind of module; with a base, the relative change too.

    `inspected` is what `inspect` returns. White is what the delta does not touch.
    """
    panels = {"density": "density of the change"}
    if inspected["base_checked"]:
        panels["relative"] = "size of the change, of the weight's norm"
    numbers = [int(layer) for layer in inspected["layers"] if layer.isdigit()]
    layers = [str(layer) for layer in range(max(numbers, default=-1) + 1)]
    layers += [layer for layer in inspected["layers"] if not layer.isdigit()]
    kinds = list(inspected["kinds"])
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in inspected["tensors"].values():
        cells.setdefault((one["kind"], str(one["layer"])), []).append(one)
    width, height = min(16, 2 + 0.35 * len(layers)), min(20, 1 + 0.28 * len(kinds))
    figure = Figure(figsize=((width + 3) * len(panels), height + 1))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        grid = [[_cell(cells.get((kind, layer), []), key) for layer in layers] for kind in kinds]
        image = axis.imshow(grid, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        every = -(-len(layers) // 32)
        axis.set_xticks(range(0, len(layers), every), layers[::every], rotation=90, fontsize=8)
        axis.set(title=title, xlabel="layer")
        figure.colorbar(image, ax=axis, format=PercentFormatter(1, decimals=None))
    every = -(-len(kinds) // 60)
    axes[0].set_yticks(range(0, len(kinds), every), kinds[::every], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)


def _cell(weights: list[dict[str, Any]], key: str) -> float:
    """Density or relative change of the weights of one layer and kind; NaN where there are none."""
    if key == "density":
        size = sum(one["size"] for one in weights)
        return sum(one["entries"] for one in weights) / size if size else float("nan")
    base = hypot(*(one["base_norm"] for one in weights))
    return hypot(*(one["norm"] for one in weights)) / base if base else float("nan")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def plot_compare(comparison: Comparison, path: Path) -> None:
    """The metric against the number of trained entries; whiskers are standard deviations."""
    metric = comparison.metric
    lines: dict[str, list[TableRow]] = {}
    for row in comparison.rows:
        lines.setdefault(row.method, []).append(row)
    figure = Figure(figsize=(7.5, 4.5))
    axis = figure.subplots()
    for number, (method, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: row.trained_entries)
        points = [
            (row.trained_entries, score.mean, score.std or 0.0)
            for row in rows
            if (score := row.metrics[metric]).mean is not None
        ]
        if not points:
            continue
        entries, means, spreads = zip(*points, strict=True)
        if not all(entries):  # the head alone: no place on a logarithmic axis
            axis.axhline(means[0], label=method, color="grey", ls="--", lw=1)
            continue
        marker = MARKERS[number % len(MARKERS)]
        axis.errorbar(entries, means, yerr=spreads, label=method, marker=marker, capsize=3, lw=1.3)
    better = " (lower is better)" if comparison.falls else ""
    axis.set(xscale="log", xlabel="trained entries, without the head", ylabel=metric + better)
    axis.set_title(comparison.task)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)
