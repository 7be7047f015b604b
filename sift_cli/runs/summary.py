"""summary.json: what a finished run came to, as a value that writes and reads itself."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from sift_cli.delta.build import describe_base, versions
from sift_cli.delta.header import Header
from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.names import architecture_of
from sift_cli.recipe import Recipe
from sift_cli.runs.facts import settings_of
from sift_cli.runs.folder import SUMMARY_FILE
from sift_cli.runs.session import Session
from sift_cli.runs.timing import Timing
from sift_cli.system.files import write_text
from sift_cli.tasks.evaluation import probe
from sift_cli.tasks.metrics import Metrics

LEFT_OUT = (
    "rank",
    "devices",
    "learning_rate",
    "learning_rate_from",
    "language",
    "kind",
    "splits",
    "changed_entries",
    "delta_sha256",
)  # of the file, where they are None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run came to, by the keys of summary.json and in their order.

    `policy` is the policy, or the method that is no policy (`lora`), with its `rank`. `labels` are
    None for a regression; `kind` says what rows have where that is not one label each. Of the
    entries, `trained` are those of the supports at the end, `changed` those that are not equal to
    the base, `dense` those of the modules that train whole, which the other two leave out.
    `learning_rate_from` is `recipe`, `usual` or `auto`. `truncated` counts the rows cut to
    `data.max_length` by split, `resumed_at` lists the steps after which the run was resumed,
    `step_time_ms` is the median. `splits` are what the rows of a language task come to.
    `devices` shared the steps, where there were several; times and memory are the first one's.

    Fields with a default are those that baselines or the runs of older versions lack.
    """

    task: str
    policy: str
    rank: int | None = None
    seed: int
    learning_rate: float | None = None
    learning_rate_from: str | None = None
    labels: list[str] | None = None
    kind: str | None = None
    language: dict[str, Any] | None = None
    metrics: Metrics
    metrics_before: Metrics
    trained_entries: int
    dense_entries: int
    changed_entries: int | None = None
    total_entries: int
    steps: int
    skipped_steps: int = 0
    kept_step: int
    train_rows: int
    truncated: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, Mapping[str, Any]] | None = None
    step_time_ms: float
    train_time_s: float
    wall_time_s: float
    peak_memory_bytes: int
    resumed_at: list[int] = field(default_factory=list)
    delta_bytes: int
    delta_sha256: str | None = None
    device: str
    devices: int | None = None
    bf16_autocast: bool

    @property
    def scores(self) -> dict[str, Metrics]:
        """The metrics `after` training, and `before` it where that was evaluated."""
        before = {"before": self.metrics_before} if self.metrics_before else {}
        return before | {"after": self.metrics}

    @classmethod
    def of(cls, values: Any) -> "Summary":
        """From what summary.json holds; keys that this version does not know are passed over.

        Raises ValueError where `values` is no mapping or lacks a key.
        """
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        known = [one.name for one in fields(cls)]
        lacking = [name for name in _required() if name not in values]
        if lacking:
            raise ValueError(f"it lacks {lacking[0]}")
        return cls(**{name: values[name] for name in known if name in values})

    @classmethod
    def read(cls, folder: Path) -> "Summary | None":
        """The summary of the run in `folder`; None where none has finished there.

        Raises SiftError (exit code 3) where it cannot be understood.
        """
        path = folder / SUMMARY_FILE
        if not path.is_file():
            return None
        try:
            return cls.of(json.loads(path.read_bytes()))
        except ValueError as error:
            raise SiftError(f"{path}: damaged: {error}", ExitCode.WRONG_FILE) from None

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds."""
        values = asdict(self)
        return {k: v for k, v in values.items() if v is not None or k not in LEFT_OUT}

    def write(self, folder: Path) -> None:
        """Writes summary.json, whole or not at all."""
        write_text(folder / SUMMARY_FILE, json.dumps(self.to_json(), indent=2) + "\n")


def _required() -> list[str]:
    """The keys that every version wrote for every method."""
    return [
        one.name
        for one in fields(Summary)
        if one.default is MISSING and one.default_factory is MISSING
    ]


@dataclass(frozen=True)
class EntryCounts:
    """Counts of entries, as in `Summary`; `changed` is None where no delta tells it."""

    trained: int
    dense: int
    total: int
    changed: int | None = None


@dataclass(frozen=True)
class Written:
    """What a run wrote of what it trained: its size, its hash, the entries, an adapter's rank."""

    nbytes: int
    sha256: str
    entries: EntryCounts
    rank: int | None = None


def summarize(
    session: Session,
    written: Written,
    timing: Timing,
    *,
    policy: str,
    seed: int,
    learning_rate: float,
    learning_rate_from: str,
    metrics_before: Metrics,
    metrics: Metrics,
    kept_step: int,
    steps: int,
    skipped: int,
) -> Summary:
    """The summary of a run of any method that has just ended; its wall time ends here.

    `metrics` are those of the weights that were kept, which `kept_step` ended with.
    """
    assert session.train is not None
    task, entries, used = session.task, written.entries, timing.used(session.device)
    return Summary(
        task=task.name,
        policy=policy,
        rank=written.rank,
        seed=seed,
        learning_rate=learning_rate,
        learning_rate_from=learning_rate_from,
        **task.header(),
        metrics=dict(metrics),
        metrics_before=dict(metrics_before),
        trained_entries=entries.trained,
        dense_entries=entries.dense,
        changed_entries=entries.changed,
        total_entries=entries.total,
        steps=steps,
        skipped_steps=skipped,
        kept_step=kept_step,
        train_rows=len(session.train),
        truncated=session.truncated(),
        splits=session.counts(),
        step_time_ms=median(timing.step_ms),
        train_time_s=sum(timing.step_ms) / 1e3,
        wall_time_s=used.wall_time_s,
        peak_memory_bytes=used.peak_memory_bytes,
        resumed_at=used.resumed_at,
        delta_bytes=written.nbytes,
        delta_sha256=written.sha256,
        device=str(session.device),
        devices=None if session.ranks.alone else session.ranks.world,
        bf16_autocast=session.bf16,
    )


def describe(recipe: Recipe, session: Session, metrics: Metrics) -> Header:
    """What a delta says of itself; nothing that changes from one run of the recipe to the next."""
    base = recipe.model
    return Header(
        base=describe_base(session.model, base.path, base.revision, base.dtype),
        architecture=architecture_of(session.model),
        task=session.task.name,
        **session.task.header(),
        policy=recipe.selection.policy,
        recipe=settings_of(recipe),
        metrics=dict(metrics),
        logits=probe(session.task, session.model, session.model.config).tolist(),
        versions=versions(),
    )
