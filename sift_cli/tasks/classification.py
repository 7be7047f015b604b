"""Sequence classification and regression: rows with one label each, a head above a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from sift_cli.models.loading import UNLIMITED, LoadedModel, base_config, longest_row
from sift_cli.tasks.evaluation import collect
from sift_cli.tasks.labels import codes_in, listed, names_of
from sift_cli.tasks.language import is_causal
from sift_cli.tasks.metrics import REGRESSION, Metrics, better, compute_metrics, short
from sift_cli.tasks.table import head_width
from sift_cli.tasks.task import Loss, Published
from sift_cli.tasks.tokens import Encoded, encode, require_readable

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 32  # texts that are predicted at once
FEW = 5  # rows for each label
MISTAKES = 10  # so many rows of a split keep their text
USE = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH_OR_ID_OF_THIS_FOLDER")
classify({example})
```"""

Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class LabelKind:
    """A row of the table of what differs between a label out of several and a number.

    `problem` names transformers' loss, `target` is the dtype of labels in a batch. `predicted`
    makes what metrics see ([N]) of logits ([N, C]), `losses` each row's loss ([N]) of logits and
    labels ([N]). `lines` makes the lines of predictions.jsonl of logits, labels and label names,
    and how wrong each is ([N], 0 where it is right); `answer` what `sift predict` says of one row's
    logits ([C]).
    """

    problem: str
    target: torch.dtype
    metrics: tuple[str, ...]
    predicted: Callable[[Tensor], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    lines: Callable[[Tensor, Tensor, Sequence[str]], tuple[Lines, Tensor]]
    answer: Callable[[Tensor, Sequence[str]], dict[str, Any]]


def _lines_of_label(logits: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[Lines, Tensor]:
    probability, code = logits.softmax(-1).max(-1)
    lines = [
        {"label": names[label], "predicted": names[one], "probability": short(value)}
        for label, one, value in zip(
            labels.tolist(), code.tolist(), probability.tolist(), strict=True
        )
    ]
    return lines, probability.where(code != labels, 0.0)


def _lines_of_number(logits: Tensor, labels: Tensor, _: Sequence[str]) -> tuple[Lines, Tensor]:
    predicted = logits.squeeze(-1)
    lines = [
        {"label": short(label), "predicted": short(value)}
        for label, value in zip(labels.tolist(), predicted.tolist(), strict=True)
    ]
    return lines, (predicted - labels).abs()


def _label(logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
    probabilities = logits.softmax(-1)
    code = int(probabilities.argmax())
    return {"label": names[code], "probability": float(probabilities[code])}


LABEL = LabelKind(
    problem="single_label_classification",
    target=torch.long,
    metrics=("accuracy", "f1_macro"),
    predicted=lambda logits: logits.argmax(-1),
    losses=partial(nn.functional.cross_entropy, reduction="none"),
    lines=_lines_of_label,
    answer=_label,
)
NUMBER = LabelKind(
    problem="regression",
    target=torch.float,
    metrics=REGRESSION,
    predicted=lambda logits: logits.squeeze(-1),
    losses=lambda logits, labels: (logits.squeeze(-1) - labels).square(),
    lines=_lines_of_number,
    answer=lambda logits, _: {"score": float(logits[0])},
)


def _kind(labels: Sequence[str] | None) -> LabelKind:
    return NUMBER if labels is None else LABEL


@dataclass(frozen=True)
class Classification:
    """A task whose rows have a label each: a name out of `labels`, or a number where that is None.

    Its rows have the columns `text` (or `text` and `pair`), `label`, `row`. MNLI has two splits to
    evaluate on, "" and "_mismatched"; other tasks have one. `notes` are what to tell of the rows.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    train: Dataset | None
    evaluation: dict[str, Dataset]
    notes: tuple[str, ...] = ()

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    packs: ClassVar[bool] = False
    new_head: ClassVar[bool] = True

    @property
    def kind(self) -> LabelKind:
        """The row of what differs between labels and numbers."""
        return _kind(self.labels)

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
        if is_causal(config):
            kind = ", ".join(config.architectures or [])
            raise SiftError(
                f"data.task: {self.name} needs a model with a head for it, and the model is {kind}"
            )
        names = names_of(config)
        if self.labels is None or config.num_labels == 1 or names is None:
            if config.num_labels != self.width:
                raise SiftError(
                    f"the model has {config.num_labels} outputs, the task {self.name} needs "
                    f"{self.width}"
                )
            return self
        codes = codes_in(self.labels, names, f"data.task: {self.name}")
        if codes == list(range(len(names))):
            return replace(self, labels=names)

        def recoded(rows: Dataset) -> Dataset:
            labels = [codes[code] for code in rows["label"]]
            return rows.remove_columns("label").add_column("label", labels)

        return replace(
            self,
            labels=names,
            train=None if self.train is None else recoded(self.train),
            evaluation={suffix: recoded(rows) for suffix, rows in self.evaluation.items()},
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
        if new:
            was = f", in place of the base's of {config.num_labels}" * _is_tuned(config)
            return f"head: new, for {self._outputs()}{was}"
        names = names_of(config) if self.labels is not None else None
        if names is None or names == self.labels:
            return f"head: the base's, kept for {self._outputs()}"
        return f"head: the base's, kept, whose outputs were {listed(names)}: {self._outputs()} now"

    def _outputs(self) -> str:
        return (
            "a number"
            if self.labels is None
            else f"{len(self.labels)} labels {listed(self.labels)}"
        )

    def ready(
        self, loaded: LoadedModel, *, packs: bool, chunk_loss: int | str
    ) -> tuple[Classification, list[str]]:
        """Itself, and its notes, and which labels the rows to evaluate on say little of."""
        if self.labels is None:
            return self, list(self.notes)
        said = list(self.notes)
        for suffix, rows in self.evaluation.items():
            there = {*rows["label"]}
            lacking = [name for code, name in enumerate(self.labels) if code not in there]
            if lacking:
                said.append(f"evaluation{suffix}: no row has the label {listed(lacking)}")
            if len(rows) < FEW * len(self.labels):
                said.append(
                    f"evaluation{suffix}: {len(rows)} rows for {len(self.labels)} labels, so that "
                    f"one row moves accuracy by {1 / len(rows):.2g}"
                )
        return self, said

    def expected(
        self, config: PretrainedConfig, kind: str, *, packs: bool, chunk_loss: int | str
    ) -> Classification:
        """Itself."""
        return self

    def header(self) -> dict[str, Any]:
        """The labels, in code order; None for a regression."""
        return {"labels": None if self.labels is None else list(self.labels)}

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

    def counted(self, data: Encoded, rows: Sequence[int]) -> int:
        """The number of rows."""
        return len(rows)

    def groups(self, data: Encoded) -> dict[str, list[int]]:
        """The rows of each label that there is, in code order; empty for a regression."""
        if self.labels is None:
            return {}
        found: dict[int, list[int]] = {}
        for row, label in enumerate(data.rows["label"]):
            found.setdefault(int(label), []).append(row)
        return {self.labels[code]: found[code] for code in sorted(found)}

    def targets(self, data: Encoded) -> Tensor:
        """The labels, [N]: int64 codes, or fp64 numbers."""
        return torch.tensor(
            data.rows["label"][:], dtype=torch.float64 if self.labels is None else torch.int64
        )

    def example(self, ids: Tensor) -> dict[str, Tensor]:
        """A batch of made-up tokens (int64 [B, T]), each row with the first label, or with 0."""
        return {"input_ids": ids, "labels": torch.zeros(len(ids), dtype=self.kind.target)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over the batch's rows, by the loss of transformers for this kind of label."""
        return Loss.of_mean(model(**batch).loss, len(batch["labels"]))

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
        predicted = self.kind.predicted(outputs)
        losses = self.kind.losses(outputs.double(), labels)
        return compute_metrics(self.metrics, predicted.numpy(), labels.numpy(), losses.numpy())

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

    def predict(
        self,
        loaded: LoadedModel,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        device: torch.device,
        max_length: int | None = None,
    ) -> list[dict[str, Any]]:
        """One object per text: `label` and `probability`, or `score` for a regression.

        Texts are cut to `max_length` tokens, or to what the model has positions for. Raises
        SiftError for a text that the model cannot read.
        """
        from datasets import Dataset

        model, tokenizer = loaded.model, loaded.tokenizer
        model.to(device)  # type: ignore[arg-type]
        numbers = range(len(texts))
        columns: dict[str, Any] = {"text": texts} | ({} if pairs is None else {"pair": pairs})
        rows = Dataset.from_dict({**columns, "label": [0] * len(texts), "row": numbers})
        longest = min(max_length or UNLIMITED, longest_row(model, tokenizer))
        data = self.encode(rows, tokenizer, longest)
        require_readable(data, model.config, "predict: there are")
        collate = partial(self.collate, tokenizer=tokenizer)
        logits = collect(self.outputs, model, data, numbers, collate, batch_size=BATCH)
        out: list[dict[str, Any]] = []
        for at, text in enumerate(texts):
            one: dict[str, Any] = {"text": text} | ({"pair": pairs[at]} if pairs else {})
            out.append(one | self.kind.answer(logits[at], self.labels or ()))
        return out


def _is_tuned(config: PretrainedConfig) -> bool:
    return any("ForSequenceClassification" in one for one in config.architectures or [])


def task_of_labels(labels: Sequence[str] | None) -> Classification:
    """The task, without rows, of a delta whose header or summary holds these labels."""
    names = None if labels is None else tuple(labels)
    return Classification("custom", names, _kind(names).metrics, None, {})


def task_of_config(config: PretrainedConfig) -> Classification:
    """The task, without rows, of a head that a configuration describes."""
    names: dict[Any, str] = {**(config.id2label or {})}
    return task_of_labels(None if len(names) == 1 else [names[code] for code in sorted(names)])
