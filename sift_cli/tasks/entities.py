"""Entities in a row of tags, and how many a model finds: as conlleval and seqeval count them.

An entity is right where its kind, its first word and its last one are. Tags are `O`, or a prefix
and a kind: B- begins an entity, I- goes on with it, E- (or L-) ends it, S- (or U-) is all of it. A
tag that goes on with nothing begins an entity.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from sift_cli.tasks.metrics import ClassScore

OUTSIDE = "O"
SCHEME = re.compile(r"[BIELSU]-.+")
GOES_ON = {"I", "E", "L"}  # with an entity that is open
OPEN = {"B", "I"}  # leave one open
Entity = tuple[str, int, int]  # kind, first word, the one after the last
Tags = Sequence[Sequence[str]]  # of each row, a tag for each word


def has_entities(names: Sequence[str]) -> bool:
    """Whether these tags are of entities."""
    return any(map(SCHEME.fullmatch, names)) and all(
        name == OUTSIDE or SCHEME.fullmatch(name) for name in names
    )


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a row, in order."""
    found: list[Entity] = []
    kind_before, prefix_before = "", ""
    for at, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix in GOES_ON and prefix_before in OPEN and kind == kind_before:
            found[-1] = (kind, found[-1][1], at + 1)
        elif tag != OUTSIDE:
            found.append((kind, at, at + 1))
        kind_before, prefix_before = kind, prefix
    return found


def entity_counts(labels: Tags, predicted: Tags) -> dict[str, tuple[int, int, int]]:
    """By kind, sorted: how many entities there are, are said, and are said right."""
    there, said, right = Counter[str](), Counter[str](), Counter[str]()
    for one, other in zip(labels, predicted, strict=True):
        truth, guess = set(entities(one)), set(entities(other))
        for counter, some in ((there, truth), (said, guess), (right, truth & guess)):
            counter.update(kind for kind, _, _ in some)
    return {kind: (there[kind], said[kind], right[kind]) for kind in sorted({*there, *said})}


def entity_scores(labels: Tags, predicted: Tags) -> list[ClassScore]:
    """The score of each kind of entity; `rows` counts those that there are."""
    return [
        ClassScore(kind, *_scores(*counts), counts[0])
        for kind, counts in entity_counts(labels, predicted).items()
    ]


def entity_metrics(labels: Tags, predicted: Tags) -> dict[str, float | None]:
    """Precision, recall and F1 over the entities of all kinds; None where there are none."""
    counts = entity_counts(labels, predicted).values()
    names = ("entity_precision", "entity_recall", "entity_f1")
    if not counts:
        return dict.fromkeys(names)
    there, said, right = (sum(some) for some in zip(*counts, strict=True))
    return dict(zip(names, _scores(there, said, right), strict=True))


def _scores(there: int, said: int, right: int) -> tuple[float, float, float]:
    return (
        right / said if said else 0.0,
        right / there if there else 0.0,
        2 * right / (there + said) if there + said else 0.0,
    )
