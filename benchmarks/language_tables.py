"""The tables of a study of language models, as Markdown, from one row for each run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from quality_tables import (
    Run,
    Scores,
    by_seed,
    densities_of,
    difference_table,
    in_order,
    markdown,
    rate_tables,
    spread,
)

BESIDE = {"exact": "exact match", "ended": "ends by itself", "unseen": "unseen loss"}
NUMBERS: dict[str, Callable[[Run], float]] = {
    "seconds": lambda row: row.seconds,
    "s a step": lambda row: row.step_ms / 1e3,
    "peak, MB": lambda row: row.more["peak"] / 1e6,
    "file, MB": lambda row: row.more["bytes"] / 1e6,
}


def write_language_tables(
    rows: Sequence[Run], base: Mapping[str, Mapping[str, float]], out: Path, against: str
) -> str:
    """Writes language.md and rates.png to `out`; gives the former.

    `base` holds the scores of the model before any training, by task.
    """
    runs = [row for row in rows if row.stage == "runs" and row.score is not None]
    tried = [row for row in rows if row.stage == "rates"]
    parts = []
    for density in densities_of(runs):
        own = [row for row in runs if row.density in (density, None)]
        for task in in_order(row.task for row in own):
            of_task = [row for row in own if row.task == task]
            parts.append(score_table(of_task, base.get(task, {}), density))
        parts.append(difference_table(own, against))
        for key, name in BESIDE.items():
            other = [replace(row, score=row.more[key]) for row in own]
            parts.append(f"{name}:\n\n{difference_table(other, against)}")
    text = "\n\n".join([*parts, *rate_tables(tried, out)]) + "\n"
    (out / "language.md").write_text(text)
    return text


def score_table(rows: Sequence[Run], base: Mapping[str, float], density: float) -> str:
    """What came of each method on one task, the base first where that is known."""
    task, methods = rows[0].task, in_order(row.method for row in rows)
    most = max(len(by_seed(rows, method, task)) for method in methods)
    heads = [f"{task} at {density:g} (n={most})", "entries", "rate", "loss"]
    heads += [*BESIDE.values(), *NUMBERS]
    lines = []
    if base:
        known = [f"{base[key]:.4f}" for key in ("loss", *BESIDE)]
        lines.append(["before training", "", "", *known, *[""] * len(NUMBERS)])
    for method in methods:
        own = [row for row in rows if row.method == method]
        rank = "" if own[0].rank is None else f", r {own[0].rank}"
        rates = ", ".join(in_order(f"{row.rate:g}" for row in own))
        losses = spread(by_seed(own, method, task), most)
        beside = [spread(found_of(own, key), most) for key in BESIDE]
        numbers = [f"{mean(number(row) for row in own):,.1f}" for number in NUMBERS.values()]
        lines.append([method + rank, f"{own[0].entries:,}", rates, losses, *beside, *numbers])
    return markdown(heads, lines)


def found_of(rows: Sequence[Run], key: str) -> Scores:
    """What a study has found out of runs that differ in their seed alone."""
    return {row.seed: row.more[key] for row in rows}
