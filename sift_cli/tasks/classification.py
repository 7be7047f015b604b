"""Sequence classification and regression: rows with one label each, a head above a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from sift_cli.errors import SiftError
from sift_cli.models.loading import LoadedModel, base_config
from sift_cli.tasks.evaluation import Asked, Asking, collect_asked
from sift_cli.tasks.label_kinds import A_NUMBER, ANY_LABELS, LabelKind, held_by, kind_of
from sift_cli.tasks.labels import listed, outputs_for, relabelled, told_head
from sift_cli.tasks.language import is_causal
from sift_cli.tasks.metrics import (
    ClassScore,
    Metric,
    Metrics,
    better,
    compute_metrics,
    evidence_of,
    scores_by_class,
)
from sift_cli.tasks.table import MULTI_LABEL, head_width
from sift_cli.tasks.tagging import is_tagging
from sift_cli.tasks.task import Loss, Published
from sift_cli.tasks.tokens import Encoded, encode

if TYPE_CHECKING:
    from datasets import Dataset

FEW = 5  # rows for each label
MISTAKES = 10  # so many rows of a split keep their text
USE = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH_OR_ID_OF_THIS_FOLDER")
classify({example})
```"""


@dataclass(frozen=True)
class Classification:
    """A task whose rows have a label each: a name out of `labels`, or a number where that is None.

    Where they may have `several`, a row's label is a 0 or 1 for each name.

    Its rows have the columns `text` (or `text` and `pair`), `label`, `row`. MNLI has two splits to
    evaluate on, "" and "_mismatched"; other tasks have one. `notes` are what to tell of the rows.
    `own` are metrics that are no rows of METRICS. `class_weights` are what a row of each class
    counts in the loss that trains, 1 unless given, and `label_smoothing` what of each label goes to
    all classes alike. Metrics of one class are of `positive`, a code.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train: Dataset | None
    evaluation: dict[str, Dataset]
    notes: tuple[str, ...] = ()
    own: Mapping[str, Metric] = field(default_factory=dict)
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    several: bool = False
    positive: int = 1

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    packs: ClassVar[bool] = False
    new_head: ClassVar[bool] = True
    row_head: ClassVar[bool] = True

    @property
    def kind(self) -> LabelKind:
        """The row of what differs between kinds of labels."""
        return kind_of(self.labels, self.several)

    @property
    def width(self) -> int:
        """How many outputs the model's head has."""
        return head_width(self.labels)

    @property
    def published(self) -> Published:
        """What cards and exported adapters say."""
        if self.labels is None:
            predicts, names = "a number", ""
        else:
            predicts = ", ".join(f"`{label}`" for label in self.labels)
            names = f", id2label={dict(enumerate(self.labels))!r}"
        if self.several:
            predicts, names = f"any of {predicts}", f"{names}, problem_type={self.kind.problem!r}"
        return Published(
            pipeline_tag="text-classification",
            peft_type="SEQ_CLS",
            peft_heads=("classifier", "score"),
            predicts=predicts,
            arguments=f"num_labels={self.width}{names}",
        )

    def configure(self, folder: Path) -> PretrainedConfig:
        """The configuration of the base in `folder`, with a head for the labels.

        Raises SiftError where there is no usable one.
        """
        names = dict(enumerate(self.labels if self.labels is not None else ["score"]))
        return base_config(
            folder,
            num_labels=len(names),
            id2label=names,
            label2id={name: code for code, name in names.items()},
            problem_type=self.kind.problem,
        )

    def unconfigure(self, config: PretrainedConfig) -> None:
        """Takes labels and loss out of `config`, in place: it says what one without them does."""
        config.num_labels = 2
        config.problem_type = None

    def fitted(self, config: PretrainedConfig) -> Classification:
        """The task with its labels as a tuned model has them: by name, in the order of its outputs.

        Raises SiftError where the model has no head for this task, or where a label is no output.
        """
        if is_causal(config) or is_tagging(config):
            kind = ", ".join(config.architectures or [])
            raise SiftError(
                f"data.task: {self.name} needs a model with a head for it, and the model is {kind}"
            )
        found = outputs_for(self.labels, config, self.name)
        if found is None or found[1] == list(range(len(found[0]))):
            return self if found is None else replace(self, labels=found[0])
        names, codes = found
        positive = codes[self.positive] if self.positive < len(codes) else self.positive

        def moved(values: Sequence[float], missing: float) -> list[float]:
            given = dict(zip(codes, values, strict=True))
            return [given.get(code, missing) for code in range(len(names))]

        def change(label: Any) -> Any:
            return moved(label, 0.0) if self.several else codes[label]

        weights = self.class_weights
        return replace(
            self,
            labels=names,
            class_weights=None if weights is None else tuple(moved(weights, 1.0)),
            positive=positive,
            **relabelled(self.train, self.evaluation, change),
        )

    def on_head(self, config: PretrainedConfig) -> Classification:
        """The task on a base of this configuration, whose head may be tuned already.

        Where its outputs have the names of the labels in another order, theirs is taken.
        """
        if self.labels is None or not _is_tuned(config) or config.num_labels != self.width:
            return self
        try:
            return self.fitted(config)
        except SiftError:
            return self  # of another task

    def told_head(self, config: PretrainedConfig, new: bool) -> str:
        """What to say of the head, of which something is `new`, on a base of this configuration."""
        return told_head(self.labels, config, new=new, tuned=_is_tuned(config))

    def ready(
        self, loaded: LoadedModel, *, packs: bool, chunk_loss: int | str
    ) -> tuple[Classification, list[str]]:
        """Itself, and its notes, and which labels the rows to evaluate on say little of."""
        if self.labels is None:
            return self, list(self.notes)
        said = list(self.notes)
        for suffix, rows in self.evaluation.items():
            there = self._held(rows)
            lacking = [name for name in self.labels if name not in there]
            if lacking:
                said.append(f"evaluation{suffix}: no row has the label {listed(lacking)}")
            if len(rows) < FEW * len(self.labels):
                said.append(
                    f"evaluation{suffix}: {len(rows)} rows for {len(self.labels)} labels, so that "
                    f"one row moves accuracy by {1 / len(rows):.2g}"
                )
        return self, said

    def _held(self, rows: Dataset) -> set[str]:
        """The labels that some of the rows have."""
        assert self.labels is not None
        if self.several:
            return {name for label in rows["label"] for name in held_by(self.labels, label)}
        return {self.labels[code] for code in {*rows["label"]}}

    def expected(
        self, config: PretrainedConfig, kind: str, *, packs: bool, chunk_loss: int | str
    ) -> Classification:
        """Itself."""
        return self

    def header(self) -> dict[str, Any]:
        """The labels, in code order (None for a regression), and whether rows may have several."""
        kind = {"kind": MULTI_LABEL} if self.several else {}
        return {"labels": None if self.labels is None else list(self.labels), **kind}

    def side_texts(self, folder: Path) -> dict[str, str]:
        """Nothing: labels stand in the configuration."""
        return {}

    def usage(self, paired: bool) -> str:
        """Markdown that shows transformers' pipeline on a text, or on two where `paired`."""
        pair = '{"text": "First text.", "text_pair": "Second text."}'
        return USE.replace("{example}", pair if paired else '"A text."')

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        """The rows as tokens, cut to `max_length`; raises SiftError where that holds nothing."""
        return encode(rows, tokenizer, max_length)

    def collate(
        self,
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        packs: bool = False,
    ) -> Mapping[str, Tensor]:
        """One batch, padded to its longest row, with `labels` ([B])."""
        batch: Mapping[str, Tensor] = DataCollatorWithPadding(tokenizer)(list(features))  # type: ignore[arg-type]
        return batch

    def counted(self, data: Encoded, rows: Sequence[int]) -> float:
        """The number of rows, or what they count together by their classes."""
        if self.class_weights is None:
            return len(rows)
        codes: list[int] = data.rows.select_columns("label")[list(rows)]["label"]
        return sum(self.class_weights[code] for code in codes)

    def row_weights(self, data: Encoded) -> Tensor | None:
        """What each row counts by its class, [N]; None without class weights."""
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights, dtype=torch.float64)[self.targets(data)]

    def groups(self, data: Encoded) -> dict[str, list[int]]:
        """The rows of each label that there is, in code order; empty where they have no one."""
        if self.labels is None or self.several:
            return {}
        found: dict[int, list[int]] = {}
        for row, label in enumerate(data.rows["label"]):
            found.setdefault(int(label), []).append(row)
        return {self.labels[code]: found[code] for code in sorted(found)}

    def targets(self, data: Encoded) -> Tensor:
        """The labels: int64 codes [N], fp64 numbers [N], or fp64 0 and 1 [N, C]."""
        coded = self.kind.target == torch.long
        return torch.tensor(data.rows["label"][:], dtype=torch.int64 if coded else torch.float64)

    def example(self, ids: Tensor) -> dict[str, Tensor]:
        """A batch of made-up tokens (int64 [B, T]), each row with the first label, or with 0."""
        shape = (len(ids), self.width) if self.several else (len(ids),)
        return {"input_ids": ids, "labels": torch.zeros(shape, dtype=self.kind.target)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over the batch's rows, by the loss of transformers for this kind of label.

        With class weights or label smoothing it is torch's cross-entropy with these.
        """
        labels = batch["labels"]
        if self.class_weights is None and not self.label_smoothing:
            return Loss.of_mean(model(**batch).loss, len(labels))
        logits = self.outputs(model, batch)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = wide.new_tensor(self.class_weights or [1.0] * self.width)
        mean = nn.functional.cross_entropy(
            wide, labels, weights, label_smoothing=self.label_smoothing
        )
        return Loss.of_mean(mean, weights[labels].sum())

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits, [B, C]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits

    def mark(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits, [B, C]."""
        return self.outputs(model, batch)

    def score(self, outputs: Tensor, data: Encoded) -> Metrics:
        """The task's metrics of a split, of which all logits are there (fp32 [N, C])."""
        labels = torch.tensor(data.rows["label"][:])
        wide, kind = outputs.double(), self.kind
        evidence = evidence_of(
            kind.predicted(outputs).numpy(),
            (labels if kind is A_NUMBER else labels.long()).numpy(),
            kind.losses(wide, labels).numpy(),
            None if kind.probabilities is None else kind.probabilities(wide).numpy(),
            self.labels or (),
            self.positive,
        )
        return compute_metrics(self.metrics, evidence, self.own)

    def better(self, new: Metrics, old: Metrics | None) -> bool:
        """Whether the first metric is better; an undefined one gives way to any later one."""
        first = self.metrics[0]
        return better(first, new[first], (old or {}).get(first))

    def lines(self, outputs: Tensor, rows: Dataset, data: Encoded) -> list[dict[str, Any]]:
        """A row's number, label and prediction, with its probability where it is one of several.

        The worst mistakes also hold their text.
        """
        labels = torch.tensor(rows["label"][:])
        answers, error = self.kind.lines(outputs, labels, self.labels or ())
        lines = [{"row": row, **one} for row, one in zip(rows["row"][:], answers, strict=True)]
        worst = error.sort(descending=True, stable=True).indices[:MISTAKES].tolist()
        for at in worst:
            if float(error[at]) > 0:
                one = rows[at]
                lines[at] |= {key: one[key] for key in ("text", "pair") if key in one}
        return lines

    def by_class(self, lines: Sequence[Mapping[str, Any]]) -> list[ClassScore]:
        """The score of each label, from the `lines` of a split; none for a regression."""
        if self.labels is None:
            return []
        labels, predicted = ([line[key] for line in lines] for key in ("label", "predicted"))
        return scores_by_class(self.labels, labels, predicted)

    def predict(
        self,
        loaded: LoadedModel,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        asking: Asking,
        first: int = 0,
    ) -> Asked:
        """Of each text `label`, `probability` and the `probabilities` of all labels.

        Where a row may have several they are `labels` and `probabilities`, for a regression it is
        `score`. `first` is the number of the first text in errors. Raises SiftError for a text that
        the model cannot read.
        """
        columns: dict[str, Sequence[Any]] = {"text": texts}
        columns |= {} if pairs is None else {"pair": pairs}
        numbers = range(first, first + len(texts))
        rows = columns | {"label": [0] * len(texts), "row": numbers}
        data, logits, longest = collect_asked(self, loaded, rows, asking)
        answers = self.kind.answers(logits, self.labels or ())
        asked = (
            dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)
        )
        both = [text | answer for text, answer in zip(asked, answers, strict=True)]
        return Asked(both, data.truncated, longest)


def _is_tuned(config: PretrainedConfig) -> bool:
    return any("ForSequenceClassification" in one for one in config.architectures or [])


def task_of_labels(labels: Sequence[str] | None, several: bool = False) -> Classification:
    """The task, without rows, of a delta whose header or summary holds these labels."""
    names = None if labels is None else tuple(labels)
    metrics = kind_of(names, several).metrics
    return Classification("custom", names, metrics, None, {}, several=several)


def task_of_config(config: PretrainedConfig) -> Classification:
    """The task, without rows, of a head that a configuration describes."""
    names: dict[Any, str] = {**(config.id2label or {})}
    several = config.problem_type == ANY_LABELS.problem
    if len(names) == 1 and not several:
        return task_of_labels(None)
    return task_of_labels([names[code] for code in sorted(names)], several)
