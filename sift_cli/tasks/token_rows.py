"""Rows for language models as tokens to train on: what is too long, what is left out, and counts.

Masks come first (`supervision`), cuts afterwards, so that no mask breaks off where a row is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sift_cli.errors import SiftError
from sift_cli.tasks.coder import Coded, Coder, Refused
from sift_cli.tasks.columns import TOLD
from sift_cli.tasks.conversations import is_conversation, row_of
from sift_cli.tasks.supervision import code, probe
from sift_cli.tasks.templates import OWN
from sift_cli.tasks.tokens import UNSEEN, Encoded, cached

if TYPE_CHECKING:
    from datasets import Dataset

DROP, CUT_END, ERROR, SPLIT = TOO_LONG = ("drop", "cut-end", "error", "split")
LONG, CUT_AWAY, NOTHING = "too long", "answer cut away", "nothing to learn"  # why rows are dropped
MOST_DROPPED = 0.2  # of the rows of a split
VERSION = 2  # of what is cached


@dataclass(frozen=True)
class Limit:
    """The most tokens of a row, and what becomes of a longer one: a value of TOO_LONG."""

    length: int
    too_long: str = DROP


@dataclass(frozen=True)
class SplitCounts:
    """What a split comes to: rows, those `dropped` by why, and tokens of those that are left.

    `lengths` are of all rows, before any was cut or dropped; `refused` says why the split would
    not be trained or scored on.
    """

    rows: int
    dropped: Mapping[str, int]
    cut: int
    tokens: int
    learnt: int
    lengths: Mapping[str, int]
    refused: str | None = None

    @classmethod
    def of(cls, data: Encoded, refused: str | None = None) -> SplitCounts:
        """Those of encoded rows, of any task."""
        lengths = data.uncut or data.lengths
        return cls(
            rows=len(lengths),
            dropped={why: len(rows) for why, rows in data.dropped.items()},
            cut=data.truncated,
            tokens=sum(data.lengths),
            learnt=sum(data.targets),
            lengths=spread_of(lengths),
            refused=refused,
        )

    def to_json(self) -> dict[str, Any]:
        """As summary.json holds them, of a split that was not refused."""
        return {key: value for key, value in asdict(self).items() if key != "refused"}

    def sentences(self) -> list[str]:
        """What became of the rows, and how many of their tokens are learnt, if any are."""
        dropped = sum(self.dropped.values())
        whys = "".join(f" ({why}: {count:,})" for why, count in self.dropped.items())
        spread = ", ".join(f"{name} {value:,}" for name, value in self.lengths.items())
        lines = [
            f"Of {self.rows:,} rows, {dropped:,} are dropped{whys} and {self.cut:,} cut; tokens of "
            f"a row: {spread}."
        ]
        if self.learnt:
            share = self.learnt / self.tokens
            lines.append(f"{self.learnt:,} of {self.tokens:,} tokens are learnt ({share:.1%}).")
        return lines


@dataclass(frozen=True)
class Fitted:
    """What becomes of a row: `parts` as ids and labels of one length, or `dropped`, and why."""

    parts: list[tuple[list[int], list[int]]]
    cut: bool = False
    dropped: str | None = None


def count_targets(labels: Sequence[int]) -> int:
    """How many tokens of a row are learnt: the first one is predicted from nothing."""
    return sum(label != UNSEEN for label in labels[1:])


def fit(ids: list[int], labels: list[int], limit: Limit) -> Fitted:
    """The row, or its parts, within the limit.

    Parts of a split row overlap by one token, so that each token but the first is learnt once.
    """
    if not count_targets(labels):
        return Fitted([], dropped=NOTHING)
    if len(ids) <= limit.length:
        return Fitted([(ids, labels)])
    if limit.too_long in (DROP, ERROR):
        return Fitted([], dropped=LONG)
    if limit.too_long == CUT_END:
        kept = labels[: limit.length]
        if not count_targets(kept):
            return Fitted([], dropped=CUT_AWAY)
        return Fitted([(ids[: limit.length], kept)], cut=True)
    parts = [
        (ids[start : start + limit.length], labels[start : start + limit.length])
        for start in range(0, len(ids) - 1, max(limit.length - 1, 1))
    ]
    parts = [one for one in parts if count_targets(one[1])]
    return Fitted(parts, cut=True) if parts else Fitted([], dropped=LONG)


def encode_rows(rows: Dataset, coder: Coder, limit: Limit, split: str) -> Encoded:
    """Checked rows (columns `value`, `row`) as tokens within the limit.

    Columns are `input_ids`, `labels`, `row`. Raises SiftError for a template that supervises
    nothing or ends no answer, for rows that it refuses, and what `require_enough` raises.
    """
    encoded = tokenise(rows, coder, limit, split)
    require_enough(encoded, limit, split)
    return encoded


def tokenise(rows: Dataset, coder: Coder, limit: Limit, split: str) -> Encoded:
    """As `encode_rows`, however few rows are left."""
    from datasets import Features, List, Value

    if any(map(is_conversation, rows["value"][:])):
        probe(coder)
    elif coder.system is not None or (coder.template and coder.template.name != OWN):
        key = "template" if coder.system is None else "system"
        raise SiftError(f"data.{key}: rows of text take no template; it would do nothing here")

    def batch(given: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return _coded(coder, limit, split, given["value"], given["row"])

    options = _options(coder, limit)
    features = {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        **dict.fromkeys(("row", "length", "targets", "uncut"), Value("int64")),
        "cut": Value("bool"),
        "dropped": Value("string"),
    }

    def run(cache: Path | None) -> Dataset:
        return rows.map(
            batch,
            batched=True,
            remove_columns=rows.column_names,
            features=Features(features),
            keep_in_memory=cache is None,
            load_from_cache_file=cache is not None,
            cache_file_name=None if cache is None else str(cache),
            new_fingerprint=f"sift-{rows._fingerprint}-{options[:16]}",
        )

    return _encoded(cached(run, rows, coder.tokenizer, options))


def _coded(
    coder: Coder, limit: Limit, split: str, lines: Sequence[str], numbers: Sequence[int]
) -> dict[str, list[Any]]:
    """A line of columns for each part of each row; one without tokens for a row that is dropped."""
    found = code(coder, [row_of(line) for line in lines])
    refuse(split, dict(zip(numbers, found, strict=True)))
    columns: dict[str, list[Any]] = {
        key: []
        for key in ("input_ids", "labels", "row", "length", "targets", "uncut", "cut", "dropped")
    }
    for number, one in zip(numbers, found, strict=True):
        assert isinstance(one, Coded)
        fitted = fit(one.ids, one.labels, limit)
        for at, (ids, labels) in enumerate(fitted.parts or [([], [])]):
            first = at == 0  # counts of the whole row stand once
            uncut = len(one.ids) if first else -1
            line = (ids, labels, number, len(ids), count_targets(labels), uncut)
            for key, value in zip(
                columns, (*line, fitted.cut and first, fitted.dropped), strict=True
            ):
                columns[key].append(value)
    return columns


def refuse(split: str, found: Mapping[int, Coded | Refused]) -> None:
    """Raises SiftError naming rows that have no tokens, by number."""
    wrong = [(number, one.why) for number, one in found.items() if isinstance(one, Refused)]
    if wrong:
        number, why = wrong[0]
        same = [str(n) for n, reason in wrong[1:] if reason == why][: TOLD - 1]
        also = f" (so with row {', '.join(same)})" if same else ""
        raise SiftError(f"data: the {split} split, row {number}: {why}{also}")


def _encoded(table: Dataset) -> Encoded:
    """The rows that are kept, and counts of all, which are read whole: one by one takes longer."""
    reasons, cuts, numbers = table["dropped"][:], table["cut"][:], table["row"][:]
    dropped: dict[str, list[int]] = {}
    for number, reason in zip(numbers, reasons, strict=True):
        if reason is not None:
            dropped.setdefault(reason, []).append(number)
    kept = table
    if dropped:
        kept = table.select([at for at, reason in enumerate(reasons) if reason is None])
    return Encoded(
        kept.select_columns(["input_ids", "labels", "row"]),
        kept["length"][:],
        sum(cuts),
        targets=kept["targets"][:],
        uncut=[length for length in table["uncut"][:] if length >= 0],
        dropped=dropped,
    )


def require_enough(data: Encoded, limit: Limit, split: str) -> None:
    """Raises SiftError where no row is left, or where more than a fifth are dropped.

    With `error`, where any row is too long.
    """
    rows, where = len(data.uncut), f"of the {split} split"
    long = data.dropped.get(LONG, [])
    if limit.too_long == ERROR and long:
        shown = ", ".join(map(str, long[:TOLD]))
        raise SiftError(
            f"data.too_long: {len(long):,} of {rows:,} rows {where} are longer than "
            f"data.max_length, {limit.length} tokens, such as row {shown}; the longest has "
            f"{max(data.uncut):,}"
        )
    gone = sum(map(len, data.dropped.values()))
    if gone <= MOST_DROPPED * rows:
        return
    whys = ", ".join(f"{len(some):,} {why}" for why, some in data.dropped.items())
    what = "all" if gone == rows else f"{gone:,} of {rows:,}"
    spread = ", ".join(f"{name} {value:,}" for name, value in spread_of(data.uncut).items())
    way_out = f"; their tokens are {spread}, and data.max_length is {limit.length}"
    raise SiftError(
        f"data: {what} rows {where} are dropped ({whys}){way_out if NOTHING not in whys else ''}; "
        "`sift data show` shows one"
    )


def spread_of(lengths: Sequence[int]) -> dict[str, int]:
    """The median, the 95th percentile (nearest rank) and the largest."""
    ordered = sorted(lengths)
    ranks = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in ranks.items()}


def _options(coder: Coder, limit: Limit) -> str:
    """A digest of all that a row's tokens depend on, beside row and tokenizer."""
    held = (VERSION, coder.template, coder.stops, coder.vocabulary, coder.system, coder.train_on)
    special = sorted(map(str, coder.tokenizer.special_tokens_map.items()))
    return sha256(repr((*held, limit, special)).encode()).hexdigest()
