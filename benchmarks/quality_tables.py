"""The tables of a study of methods, as Markdown, from one row for each run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from plots import plot_rates

from sift_cli.analysis.table import paired_scores
from sift_cli.tasks.metrics import METRICS

Scores = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Run:
    """One training, and what came of it once it has finished: then a line of results.jsonl.

    `density` is None for a method without a budget. A finished one without a score diverged; `more`
    is what a study has found out of it beside its score.
    """

    stage: str
    task: str
    method: str
    density: float | None
    rate: float
    seed: int
    model: str = ""
    metric: str = ""
    score: float | None = None
    train_loss: float | None = None
    seconds: float = 0.0
    step_ms: float = 0.0
    entries: int = 0
    rank: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder under that of the stage."""
        density = "" if self.density is None else f"-d{self.density:g}"
        return f"{self.task}-{self.method}{density}-r{self.rate:g}-s{self.seed}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others, finished or not."""
        return self.stage, self.task, self.method, self.density, self.rate, self.seed

    def to_json(self) -> dict[str, Any]:
        """What results.jsonl holds of it."""
        return {key: value for key, value in asdict(self).items() if key != "more" or value}


def best_rate(tried: Sequence[Run]) -> float | None:
    """The rate with the best mean score over tasks, then the lowest mean training loss.

    The highest is best, of a loss the lowest. Only rates that gave every task a score count; None
    where no rate did. Ties are not rare: at many rates a model may give every row one class.
    """
    tasks = {row.task for row in tried}
    means = {}
    for rate in sorted({row.rate for row in tried}):
        own = [row for row in tried if row.rate == rate and row.score is not None]
        if {row.task for row in own} == tasks:
            score, loss = (
                mean(upward(row) for row in own),
                mean(row.train_loss or 0 for row in own),
            )
            means[rate] = (score, -loss)
    return max(means, key=means.__getitem__, default=None)


def upward(row: Run) -> float:
    """The score of a run that has one, or its negative where lower is better."""
    assert row.score is not None
    falls = row.metric in METRICS and not METRICS[row.metric].rises
    return -row.score if falls else row.score


def write_tables(rows: Sequence[Run], out: Path, against: str) -> str:
    """Writes quality.md and rates.png to `out`; gives the former."""
    runs = [row for row in rows if row.stage == "runs" and row.score is not None]
    tried = [row for row in rows if row.stage == "rates"]
    parts = []
    for density in densities_of(rows):
        own = [row for row in runs if row.density in (density, None)]
        if own:
            parts += [score_table(own, density), difference_table(own, against)]
            parts.append(time_table(own))
    parts += rate_tables(tried, out)
    text = "\n\n".join(parts) + "\n"
    (out / "quality.md").write_text(text)
    return text


def rate_tables(tried: Sequence[Run], out: Path) -> list[str]:
    """A table of each density; writes rates.png to `out`."""
    if tried:
        plot_rates(tried, out / "rates.png")
    return [
        rate_table([row for row in tried if row.density == density], density)
        for density in [*densities_of(tried), None]
        if any(row.density == density for row in tried)
    ]


def densities_of(rows: Iterable[Run]) -> list[float]:
    """The largest first."""
    return sorted({row.density for row in rows if row.density is not None}, reverse=True)


def in_order(names: Iterable[str]) -> list[str]:
    """Each once, as they first come."""
    return list(dict.fromkeys(names))


def by_seed(rows: Iterable[Run], method: str, task: str) -> dict[int, float]:
    """The scores of a method on a task."""
    return {
        row.seed: row.score
        for row in rows
        if (row.method, row.task) == (method, task) and row.score is not None
    }


def averaged(rows: Sequence[Run], method: str, tasks: Sequence[str]) -> dict[int, float]:
    """The mean over tasks by seed, of the seeds that every task has."""
    each = [by_seed(rows, method, task) for task in tasks]
    shared = set.intersection(*(set(one) for one in each))
    return {seed: mean(one[seed] for one in each) for seed in sorted(shared)}


def spread(scores: Scores, most: int) -> str:
    """Mean and standard deviation; how many seeds, where others have more."""
    if not scores:
        return ""
    values = list(scores.values())
    wide = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{wide}" + (f" (n={len(values)})" if len(values) < most else "")


def score_table(rows: Sequence[Run], density: float) -> str:
    """Score of each method on each task, at which rate, and the mean over tasks."""
    tasks, methods = in_order(row.task for row in rows), in_order(row.method for row in rows)
    most = max(len(by_seed(rows, method, task)) for method in methods for task in tasks)
    metrics = {row.task: row.metric for row in rows}
    heads = [f"at {density:g} (n={most})", "entries"]
    for task in tasks:
        heads += [f"{task}: {metrics[task]}", "rate"]
    lines = []
    for method in methods:
        own = [row for row in rows if row.method == method]
        rank = "" if own[0].rank is None else f", r {own[0].rank}"
        line = [method + rank, f"{own[0].entries:,}"]
        for task in tasks:
            rates = in_order(f"{row.rate:g}" for row in own if row.task == task)
            line += [spread(by_seed(rows, method, task), most), ", ".join(rates)]
        lines.append([*line, spread(averaged(rows, method, tasks), most)])
    return markdown([*heads, "mean"], lines)


def difference_table(rows: Sequence[Run], against: str) -> str:
    """Mean difference from one method on each task and over them, with a paired t-test's p."""
    tasks, methods = in_order(row.task for row in rows), in_order(row.method for row in rows)

    def cell(own: Scores, other: Scores) -> str:
        found = paired_scores(own, other)
        if found is None:
            return ""
        return f"{found.difference:+.4f}" + ("" if found.p is None else f" (p {found.p:.2g})")

    lines = []
    for method in methods:
        if method != against:
            pairs = [[by_seed(rows, one, task) for one in (method, against)] for task in tasks]
            pairs.append([averaged(rows, one, tasks) for one in (method, against)])
            lines.append([method, *(cell(*pair) for pair in pairs)])
    return markdown([f"to {against}", *tasks, "mean"], lines)


def time_table(rows: Sequence[Run]) -> str:
    """Seconds from start to end, the median step's milliseconds, and the last loss."""
    tasks, methods = in_order(row.task for row in rows), in_order(row.method for row in rows)
    heads, lines = ["seconds, ms a step, last loss", *tasks], []
    for method in methods:
        line = [method]
        for task in tasks:
            own = [row for row in rows if (row.method, row.task) == (method, task)]
            losses = [row.train_loss for row in own if row.train_loss is not None]
            line.append(
                f"{mean(row.seconds for row in own):,.0f}, "
                f"{mean(row.step_ms for row in own):,.0f}, {mean(losses):.3f}"
                if losses
                else ""
            )
        lines.append(line)
    return markdown(heads, lines)


def rate_table(rows: Sequence[Run], density: float | None) -> str:
    """Held-out score of each method at each rate, by task; the chosen rate in bold."""
    tasks = in_order(row.task for row in rows)
    heads = ["held out" if density is None else f"held out, at {density:g}", "rate", *tasks, "mean"]
    lines = []
    for method in in_order(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        best = best_rate(own)
        for rate in sorted({row.rate for row in own}):
            at = {row.task: row for row in own if row.rate == rate}
            scores = [at[task].score if task in at else None for task in tasks]
            shown = [
                "" if task not in at else "diverged" if score is None else f"{score:.4f}"
                for task, score in zip(tasks, scores, strict=True)
            ]
            known = [score for score in scores if score is not None]
            whole = f"{mean(known):.4f}" if len(known) == len(tasks) else ""
            lines.append([method, f"**{rate:g}**" if rate == best else f"{rate:g}", *shown, whole])
    return markdown(heads, lines)


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
