"""Plots of benchmarks as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"forward": "#4c72b0", "backward": "#dd8452", "optimizer": "#55a868"}


def plot_steps(found: list[dict[str, Any]], path: Path) -> None:
    """Step times stacked by part, and peak memory, one row of axes per workload."""
    figure = Figure(figsize=(11, 1.2 + 2.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (times, memory), one in zip(axes, found, strict=True):
        names = list(one["results"])[::-1]
        results = [one["results"][name] for name in names]
        start = [0.0] * len(names)
        for part, colour in COLOURS.items():
            widths = [result[part]["median"] for result in results]
            times.barh(names, widths, left=start, label=part, color=colour)
            start = [before + width for before, width in zip(start, widths, strict=True)]
        times.set(xlabel="ms a step", title=one["workload"])
        memory.barh(names, [result["peak"] / 1e6 for result in results], color="#8172b3")
        memory.set(xlabel="peak memory above the model, MB")
        memory.set_yticklabels([])
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_rates(tried: Sequence[Any], path: Path) -> None:
    """Held-out score against rate: a row of axes for each density, one of them for each task.

    A method without a budget is drawn at every density.
    """
    densities = sorted({row.density for row in tried if row.density}, reverse=True) or [None]
    tasks = list(dict.fromkeys(row.task for row in tried))
    methods = list(dict.fromkeys(row.method for row in tried))
    figure = Figure(figsize=(1.6 + 3.6 * len(tasks), 3.2 * len(densities)), layout="constrained")
    axes = figure.subplots(len(densities), len(tasks), squeeze=False)
    for line, density in zip(axes, densities, strict=True):
        for axis, task in zip(line, tasks, strict=True):
            for method in methods:
                own = [row for row in tried if (row.method, row.task) == (method, task)]
                own = [row for row in own if row.density in (density, None)]
                own.sort(key=lambda row: row.rate)
                scores = [float("nan") if row.score is None else row.score for row in own]
                colour = f"C{methods.index(method) % 10}"
                axis.plot([row.rate for row in own], scores, marker=".", label=method, color=colour)
            axis.set(xscale="log", xlabel="learning rate", title=f"{task}, {density or 'whole'}")
            axis.grid(alpha=0.3)
        line[0].set_ylabel("score on held-out rows")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=110)
