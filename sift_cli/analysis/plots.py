"""Plots as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_probe(found: dict[str, Any], out: Path) -> None:
    """Writes `curve.png`, `kept.png` and, where there are classes, `classes.png` into `out`."""
    _curve(found, out / "curve.png")
    _kept(found, out / "kept.png")
    if found["overlap"]["between_classes"]:
        _classes(found, out / "classes.png")


def _curve(found: dict[str, Any], path: Path) -> None:
    densities = [100 * density for density in found["curve"]["densities"]]
    steps = found["curve"]["norm_share"]
    figure = Figure(figsize=(5.5 * len(steps), 4))
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)
    for axis, (step, kinds) in zip(axes[0], steps.items(), strict=True):
        for name, shares in kinds.items():
            whole = name == "overall"
            if whole or not name.endswith("bias"):
                width, colour = (2.5, "black") if whole else (1.2, None)
                axis.plot(densities, shares, label=name, lw=width, color=colour, marker=".")
        axis.set(xscale="log", ylim=(0, 1.02), xlabel="largest entries, % of each weight")
        axis.set_title(step)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the gradient's norm")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    _save(figure, path)


def _kept(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8.5, 4))
    axis = figure.subplots()
    for name, kept in found["kept_norm_share"].items():
        axis.plot(range(1, len(kept["steps"]) + 1), kept["steps"], label=name, marker=".")
    axis.set(ylim=(0, 1.02), xlabel="training step", ylabel="share of the batch's gradient norm")
    axis.set_title(f"what {found['density'] or found['budget']} of the entries keep")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def _classes(found: dict[str, Any], path: Path) -> None:
    table = found["overlap"]["between_classes"]
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


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
