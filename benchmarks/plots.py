"""Plots of benchmarks as PNG files."""

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
