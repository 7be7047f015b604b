"""The table of a comparison: a row for the runs that differ in their seeds alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, stdev
from typing import Any

from sift_cli.recipe import AUTO, Rate
from sift_cli.runs.summary import Summary
from sift_cli.tasks.metrics import rises, shown

SELECTION = "selection."  # keys of what belongs to a method
FEW_SEEDS = 6  # with fewer, the notes say what p is worth

Density = float | dict[str, float] | None  # as a recipe gives it


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; runs with the same method, density and `settings` make one row.

    `settings` is a name for all that may differ beside method, density and seed; None where nothing
    does. `differs` has those of its settings, by dotted key, in which others that stand in the
    table have another value.
    """

    summary: Summary
    method: str
    density: Density
    rate: Rate | None
    settings: str | None = None
    differs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diverged:
    """A run that ended where numbers were not finite; `said` is the message that it ended with."""

    method: str
    density: Density
    rate: Rate
    seed: int
    said: str

    def sentence(self) -> str:
        """Which run, and what it said."""
        where = f"seed {self.seed}, learning rate {shown_rate(self.rate)}"
        return f"{label(self.method, self.density)} diverged ({where}): {self.said}"


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: None where a value is undefined; `std` also where there is one alone."""

    mean: float | None
    std: float | None
    values: list[float | None]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """That of the values of one metric, a run each."""
        defined = [value for value in values if value is not None]
        if len(defined) < len(values):
            return cls(None, None, list(values))
        return cls(mean(defined), stdev(defined) if len(defined) > 1 else None, list(values))


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference from the reference over the `seeds` that both have, and p.

    That is of a paired t-test; None with fewer than two seeds, or where all differences are the
    same.
    """

    difference: float
    seeds: int
    p: float | None


@dataclass(frozen=True)
class TableRow:
    """The runs of one method that differ in their seeds; numbers without a spread are means.

    `run` is the name of their settings, `differs` those that other rows have otherwise. `rank` is
    that of an adapter. `diverged` counts runs beside
    the `seeds`, of which the row knows nothing.
    """

    method: str
    density: Density
    run: str | None
    rank: int | None
    learning_rate: Rate | None
    seeds: int
    metrics: dict[str, Spread]
    step_time_ms: float
    peak_memory_bytes: float
    delta_bytes: float
    trained_entries: float
    dense_entries: float
    against: PairedDifference | None = None
    diverged: int = 0
    differs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row is called: with the run, where method and density are not all of it."""
        run = f" ({self.run})" if self.differs else ""
        return label(self.method, self.density) + run

    @classmethod
    def of(cls, runs: Sequence[FinishedRun], metrics: Sequence[str]) -> "TableRow":
        """The row of `runs` with these of their metrics, not yet held against another one."""
        first, summaries = runs[0], [run.summary for run in runs]
        return cls(
            method=first.method,
            density=first.density,
            run=first.settings,
            rank=first.summary.rank,
            learning_rate=first.rate,
            seeds=len(runs),
            metrics={name: Spread.of([one.metrics[name] for one in summaries]) for name in metrics},
            step_time_ms=mean(one.step_time_ms for one in summaries),
            peak_memory_bytes=mean(one.peak_memory_bytes for one in summaries),
            delta_bytes=mean(one.delta_bytes for one in summaries),
            trained_entries=mean(one.trained_entries for one in summaries),
            dense_entries=mean(one.dense_entries for one in summaries),
            differs=dict(first.differs),
        )


@dataclass(frozen=True)
class Comparison:
    """What compare.json holds: `metric` is the one that decides, `notes` what to know of it.

    `reference` is the method that rows of others are held `against`. `diverged` are the runs that
    came to nothing; a method of which all did has no row.
    """

    task: str
    metric: str
    reference: str
    rows: list[TableRow]
    notes: list[str]
    diverged: list[Diverged] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As compare.json holds it."""
        return asdict(self)

    @property
    def falls(self) -> bool:
        """Whether a lower metric is better."""
        return not rises(self.metric)

    @property
    def best(self) -> TableRow | None:
        """The row with the best mean of the metric; None where no two can be held apart by it."""
        means = {at: row.metrics[self.metric].mean for at, row in enumerate(self.rows)}
        defined = {at: mean for at, mean in means.items() if mean is not None}
        if len(set(defined.values())) < 2:
            return None
        return self.rows[(min if self.falls else max)(defined, key=lambda at: defined[at])]


def tabulated(
    runs: Sequence[FinishedRun],
    notes: Sequence[str],
    diverged: Sequence[Diverged] = (),
    own: str | None = None,
) -> Comparison:
    """A row for each group of runs, all of one task, with its difference from the reference.

    That is the method `own` where it is among them, else the method of the first run.
    """
    reference = own if own in {run.method for run in runs} else runs[0].method
    assert reference is not None
    shared = [run.summary.metrics for run in runs]
    metrics = [name for name in shared[-1] if all(name in one for one in shared)]
    grouped: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in runs:
        grouped.setdefault((run.method, str(run.density), run.settings), []).append(run)
    groups = list(grouped.values())
    alone = [TableRow.of(group, metrics) for group in groups]
    rows = []
    for row, group in zip(alone, groups, strict=True):
        place = reference_of(row, alone, reference)
        if alone[place] is not row:
            row = replace(row, against=paired(group, groups[place], metrics[0]))
        lost = sum((one.method, one.density) == (row.method, row.density) for one in diverged)
        rows.append(replace(row, diverged=lost))
    notes = [
        *notes,
        *notes_on_settings(rows),
        *notes_on_seeds(rows),
        *(one.sentence() for one in diverged),
    ]
    return Comparison(runs[0].summary.task, metrics[0], reference, rows, notes, list(diverged))


def notes_on_seeds(rows: Sequence[TableRow]) -> list[str]:
    """How far a difference can be trusted, given the row with the fewest seeds."""
    fewest = min(row.seeds for row in rows)
    if fewest == 1:
        return ["One seed: differences may be chance alone."]
    if fewest < FEW_SEEDS:
        return [
            f"p: paired t-test over {fewest} seeds, which shows large and steady differences only; "
            "not corrected for the number of methods."
        ]
    return []


def notes_on_settings(rows: Sequence[TableRow]) -> list[str]:
    """In what the rows differ beside what the table shows of them."""
    return [
        f"{row.run}: " + ", ".join(f"{key} {_told(value)}" for key, value in row.differs.items())
        for row in rows
        if row.differs
    ]


def _told(value: Any) -> str:
    return "unset" if value is None else str(value)


def reference_of(row: TableRow, rows: Sequence[TableRow], method: str) -> int:
    """The place of the row of `method` that `row` is held against: at its density, else the one
    with the most entries. Of several, the first, or for another method the one trained under its
    conditions."""

    def conditions(one: TableRow) -> list[tuple[str, Any]]:
        return [item for item in one.differs.items() if not item[0].startswith(SELECTION)]

    own = [place for place, one in enumerate(rows) if one.method == method]
    if row.method != method:
        own.sort(key=lambda place: conditions(rows[place]) != conditions(row))
    same = [place for place in own if rows[place].density == row.density]
    return (same or sorted(own, key=lambda place: -rows[place].trained_entries))[0]


def paired(
    runs: Sequence[FinishedRun], reference: Sequence[FinishedRun], metric: str
) -> PairedDifference | None:
    """The difference of `runs` from `reference` by seed; None where they share none."""
    return paired_scores(scores_by_seed(runs, metric), scores_by_seed(reference, metric))


def paired_scores(own: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference | None:
    """The difference of `own` from `other`, scores by seed; None where they share no seed."""
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    pairs = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
    differences = [one - two for one, two in zip(*pairs, strict=True)]
    p = None
    if len(seeds) > 1 and max(differences) > min(differences):  # else the test divides by zero
        from scipy import stats

        p = float(stats.ttest_rel(*pairs).pvalue)
    return PairedDifference(mean(differences), len(seeds), p)


def scores_by_seed(runs: Sequence[FinishedRun], metric: str) -> dict[int, float]:
    """The metric of each run in which it is defined."""
    scores = {run.summary.seed: run.summary.metrics[metric] for run in runs}
    return {seed: score for seed, score in scores.items() if score is not None}


def label(method: str, density: Density) -> str:
    """What a row is called."""
    return method if density is None else f"{method} at {density}"


def shown_rate(rate: Rate) -> str:
    """A rate as names and tables have it."""
    return rate if rate == AUTO else f"{rate:g}"


HEADINGS = ("method", "entries", "rate", "metric", "to reference", "p", "ms", "MB", "kB")
LEGEND = (
    "entries: trained, without the head; to {}: mean difference from it; ms: median step; MB: "
    "peak memory of the process (on a GPU: of the device); kB: the file with what was trained."
)


def cells(row: TableRow, metric: str) -> list[str]:
    """The cells of one row under HEADINGS."""
    score, against = row.metrics[metric], row.against
    spread = "" if score.std is None else f" ± {score.std:.4f}"
    rank = "" if row.rank is None else f", r {row.rank}"
    lost = f", {row.diverged} of {row.seeds + row.diverged} diverged" if row.diverged else ""
    return [
        row.name + rank + lost,
        f"{row.trained_entries:,.0f}",
        "" if row.learning_rate is None else shown_rate(row.learning_rate),
        f"{shown(score.mean)}{spread}",
        "" if against is None else f"{against.difference:+.4f}",
        "" if against is None or against.p is None else f"{against.p:.2g}",
        f"{row.step_time_ms:,.0f}",
        f"{row.peak_memory_bytes / 1e6:,.0f}",
        f"{row.delta_bytes / 1e3:,.0f}",
    ]


def headings(comparison: Comparison) -> list[str]:
    """HEADINGS with the names of the metric and the reference, and the number of seeds."""
    seeds = sorted({row.seeds for row in comparison.rows})
    counted = "-".join(str(count) for count in (seeds[0], seeds[-1])[: len(seeds)])
    own = {
        "metric": f"{comparison.metric} (n={counted})",
        "to reference": f"to {comparison.reference}",
    }
    return [own.get(one, one) for one in HEADINGS]


def legend(comparison: Comparison) -> str:
    """What the columns are, and which way is better where that is down."""
    said = LEGEND.format(comparison.reference)
    return said + (f" A lower {comparison.metric} is better." if comparison.falls else "")


def markdown(comparison: Comparison) -> str:
    """The table and its notes."""
    lines = [f"# {comparison.task}", "", "| " + " | ".join(headings(comparison)) + " |"]
    lines.append("|" + " --- |" * len(HEADINGS))
    for row in comparison.rows:
        found = cells(row, comparison.metric)
        if row is comparison.best:
            found[HEADINGS.index("metric")] = f"**{found[HEADINGS.index('metric')]}**"
        lines.append("| " + " | ".join(found) + " |")
    notes = [f"- {note}" for note in comparison.notes]
    return "\n".join([*lines, "", legend(comparison), "", *notes]) + "\n"
