"""The table of tasks that sift knows by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskSpec:
    """What defines a task: text columns, label names in code order (None: regression), metrics.

    `original` tells by the names of columns how GLUE's own files call them, where they differ.
    """

    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label: str = "label"
    original: Mapping[str, str] = field(default_factory=dict)


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
TASKS: dict[str, TaskSpec] = {  # GLUE (Wang et al., ICLR 2019), with its official metrics
    "cola": TaskSpec(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": TaskSpec(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": TaskSpec(
        SENTENCES,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        original={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "qqp": TaskSpec(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        original={"label": "is_duplicate"},
    ),
    "stsb": TaskSpec(SENTENCES, None, ("pearson", "spearman"), original={"label": "score"}),
    "mnli": TaskSpec(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        original={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
    "qnli": TaskSpec(("question", "sentence"), ENTAILMENT, ("accuracy",)),
    "rte": TaskSpec(SENTENCES, ENTAILMENT, ("accuracy",)),
    "wnli": TaskSpec(SENTENCES, ("not_entailment", "entailment"), ("accuracy",)),
}

TAGGING = "tags"  # the task of words that have a tag each; headers and summaries call it so too
WORDS, TAGS = "tokens", "tags"  # its columns
MULTI_LABEL = "multi-label"  # what headers and summaries call rows that may have several labels

LANGUAGE = ("instruct", "text")  # tasks of language models: a loss on answers, or on every token

LONGEST_ANSWER = 256  # tokens that a model may answer with, where nobody says how many


def text_columns(task: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The columns that hold a row's texts: those given, else those of the task."""
    if task == TAGGING:
        return tuple(given or (WORDS,))
    spec = TASKS.get(task)
    return tuple(given or (spec.text if spec else ()))


def language_facts(stated: Mapping[str, Any]) -> dict[str, str]:
    """How rows of a language task become tokens, in words, from what a header or summary says."""
    facts = {"learnt": str(stated.get("train_on", "")).replace("-", " ")}
    template, system, stops = (stated.get(key) for key in ("template", "system", "stops"))
    if stated.get("task") != "text":
        facts["template"] = "the model's own" if template == "model" else _named(str(template))
    if system:
        facts["system"] = str(system)
    if isinstance(stops, Mapping) and stops:
        facts["stops at"] = ", ".join(map(str, stops))
    return facts


def _named(template: str) -> str:
    """A template by its name, or by its size where its text is given."""
    return f"a text of {len(template):,} letters" if "{" in template else template


def head_width(labels: Sequence[str] | None) -> int:
    """How many outputs a head for these labels has; None asks for one number."""
    return 1 if labels is None else len(labels)
