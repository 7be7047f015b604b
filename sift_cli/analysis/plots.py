"""Plots as PNG files."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sift_cli.analysis.figures import WIDTH, draw_heat, heat_height, style
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


def plot_delta(
    cells: Mapping[tuple[str, str], Mapping[str, Any]], panels: Mapping[str, str], path: Path
) -> None:
    """Heat maps by layer and module beside each other, as the report draws them.

    `panels` has a title for each key of the cells that gets one; cells that lack it stay white.
    """
    found = {
        key: {place: cell for place, cell in cells.items() if cell.get(key) is not None}
        for key in panels
    }
    drawn = {key: some for key, some in found.items() if some}
    with style():
        size = WIDTH * max(1, len(drawn)), heat_height(cells) if cells else 1.0
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, max(1, len(drawn)), squeeze=False)[0]
        for axis, (key, some) in zip(axes, drawn.items(), strict=False):
            draw_heat(axis, some, key, partial(_share, key), panels[key], "{:.2%}".format)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, path)


def _share(key: str, cell: Mapping[str, Any]) -> str:
    """A share in a cell, in two digits or three."""
    return f"{cell[key]:.1%}" if cell[key] < 0.1 else f"{cell[key]:.0%}"


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
