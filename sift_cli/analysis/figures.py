"""What the charts share: their style, the chart of layers and modules, and an SVG for a page."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Cell = Mapping[str, Any]  # the weights of one layer and module, added up
Cells = Mapping[tuple[str, str], Cell]  # by layer and module

INK = "#010203"  # text and lines; in a page they take the page's colour
BLUE, ORANGE = "#3b82f6", "#e07b39"
SHADES = LinearSegmentedColormap.from_list("shades", [(0.23, 0.51, 0.96, a) for a in (0.04, 1)])
WIDTH = 4.8  # inches: on a phone, letters come out as large as they are set
STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # labels are the user's
}


def colour(at: int) -> str:
    """The colour of a chart's line number `at`."""
    return (BLUE, ORANGE, "#10a37f", "#a855f7", "#dc2f6b", "#8a8f98")[at % 6]


def axes_of(height: float) -> tuple[Figure, Axes]:
    """A new figure of so many inches with one chart in it."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


@contextmanager
def style() -> Iterator[None]:
    """In this context figures look like those of the report."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that no font has is no reason to stop
        yield


def svg_of(figure: Figure, name: str) -> str:
    """The figure as SVG for a page: transparent, in the page's colour, with ids of its own."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    used = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]+"', text)
    assert size
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {size[0]}>'
    return re.sub(r"<svg[^>]*>", head, text, count=1)


def heat_height(cells: Cells) -> float:
    """The inches that such a chart needs."""
    names = _apart(list(dict.fromkeys(module for _, module in cells)))
    return 1.5 + 0.24 * len({layer for layer, _ in cells}) + 0.055 * max(map(len, names))


def draw_heat(
    axis: Axes,
    cells: Cells,
    key: str,
    text: Callable[[Cell], str],
    title: str,
    form: Callable[[float], str],
) -> None:
    """Layers down, modules across; colour is `key`, `text` stands in each cell.

    `form` writes the ends of the scale in the title.
    """
    rows = list(dict.fromkeys(layer for layer, _ in cells))
    columns = list(dict.fromkeys(module for _, module in cells))
    names = _apart(columns)
    values = [cell[key] for cell in cells.values()]
    low, high = min(values), max(values)
    logs = low > 0 and high > 10 * low
    norm = LogNorm(low, high) if logs else Normalize(0, high or 1)
    for (layer, module), cell in cells.items():
        x, y = columns.index(module), rows.index(layer)
        shade = SHADES(norm(cell[key]))
        axis.add_patch(Rectangle((x, y), 0.96, 0.96, color=shade, lw=0))
        if len(columns) <= 8:
            ink = "white" if norm(cell[key]) > 0.6 else INK
            at = x + 0.48, y + 0.48
            axis.text(*at, text(cell), ha="center", va="center", size=7.5, color=ink)
    axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0), ylabel="layer")
    axis.set_xticks([x + 0.48 for x in range(len(columns))], names, rotation=35, ha="right")
    axis.set_yticks([y + 0.48 for y in range(len(rows))], rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    ends = dict.fromkeys([form(low), form(high)])
    axis.set_title(f"{title}: {' to '.join(ends)}")


def _apart(modules: Sequence[str]) -> list[str]:
    """The shortest endings of the modules' names that differ from one another."""
    for parts in range(1, 1 + max(module.count(".") + 1 for module in modules)):
        names = [".".join(module.split(".")[-parts:]) for module in modules]
        if len(set(names)) == len(names):
            return names
    return list(modules)
