"""The table of tasks that sift knows by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSpec:
    """What defines a task: text columns, label names in code order (None: regression), metrics."""

    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    label: str = "label"


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
TASKS: dict[str, TaskSpec] = {  # GLUE (Wang et al., ICLR 2019), with its official metrics
    "cola": TaskSpec(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": TaskSpec(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": TaskSpec(SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": TaskSpec(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": TaskSpec(SENTENCES, None, ("pearson", "spearman")),
    "mnli": TaskSpec(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)
    ),
    "qnli": TaskSpec(("question", "sentence"), ENTAILMENT, ("accuracy",)),
    "rte": TaskSpec(SENTENCES, ENTAILMENT, ("accuracy",)),
    "wnli": TaskSpec(SENTENCES, ("not_entailment", "entailment"), ("accuracy",)),
}
