"""Token classification: rows of words with a tag each, told from the first piece of each word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from sift_cli.errors import SiftError
from sift_cli.models.loading import LoadedModel, base_config
from sift_cli.tasks.entities import (
    entities,
    entity_metrics,
    entity_scores,
    has_entities,
)
from sift_cli.tasks.evaluation import Asked, Asking, collect_asked
from sift_cli.tasks.labels import outputs_for, relabelled, told_head
from sift_cli.tasks.metrics import ClassScore, Metrics, better, compute_metrics, short
from sift_cli.tasks.table import TAGGING
from sift_cli.tasks.task import Loss, Published
from sift_cli.tasks.tokens import UNSEEN, Encoded, encode_words

if TYPE_CHECKING:
    from datasets import Dataset

ARCHITECTURE = "ForTokenClassification"  # how the names of its models end
WORST = 10  # rows of a split that keep their text
WORD = re.compile(r"\w+|[^\w\s]")  # of a text that no one has cut into words
USE = """```python
from transformers import pipeline

tag = pipeline("token-classification", model="PATH_OR_ID_OF_THIS_FOLDER")
tag("A text .")
```"""


@dataclass(frozen=True)
class Tagging:
    """A task whose rows are words, each with a tag out of `labels`.

    Its rows have the columns `words`, `label` (a code for each word) and `row`.
    """

    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    train: Dataset | None = None
    evaluation: dict[str, Dataset] = field(default_factory=dict)

    name: ClassVar[str] = TAGGING
    auto: ClassVar[Any] = AutoModelForTokenClassification
    packs: ClassVar[bool] = False
    new_head: ClassVar[bool] = True
    row_head: ClassVar[bool] = False

    @property
    def published(self) -> Published:
        """What cards and exported adapters say."""
        named = dict(enumerate(self.labels))
        return Published(
            pipeline_tag="token-classification",
            peft_type="TOKEN_CLS",
            peft_heads=("classifier", "score"),
            predicts="of each word " + ", ".join(f"`{label}`" for label in self.labels),
            arguments=f"num_labels={len(named)}, id2label={named!r}",
        )

    def configure(self, folder: Path) -> PretrainedConfig:
        """The configuration of the base in `folder`, with a head for the tags.

        Raises SiftError where there is no usable one.
        """
        names = dict(enumerate(self.labels))
        codes = {name: code for code, name in names.items()}
        return base_config(folder, num_labels=len(names), id2label=names, label2id=codes)

    def unconfigure(self, config: PretrainedConfig) -> None:
        """Takes the tags out of `config`, in place."""
        config.num_labels = 2

    def fitted(self, config: PretrainedConfig) -> Tagging:
        """The task with its tags as a tuned model has them: by name, in the order of its outputs.

        Raises SiftError where the model gives no tags, or where a tag is no output.
        """
        named = ", ".join(config.architectures or ["no model"])
        if ARCHITECTURE not in named:
            raise SiftError(
                f"data.task: {self.name} needs a model for token classification, and the model "
                f"is {named}"
            )
        found = outputs_for(self.labels, config, self.name)
        if found is None or found[1] == list(range(len(found[0]))):
            return self if found is None else replace(self, labels=found[0])
        names, codes = found

        def change(tags: list[int]) -> list[int]:
            return [codes[tag] for tag in tags]

        return replace(self, labels=names, **relabelled(self.train, self.evaluation, change))

    def on_head(self, config: PretrainedConfig) -> Tagging:
        """The task on a base of this configuration, in the order of a head that has its tags."""
        if not is_tagging(config) or config.num_labels != len(self.labels):
            return self
        try:
            return self.fitted(config)
        except SiftError:
            return self  # of another task

    def told_head(self, config: PretrainedConfig, new: bool) -> str:
        """What to say of the head, of which something is `new`, on a base of this configuration."""
        return told_head(self.labels, config, new=new, tuned=is_tagging(config))

    def ready(
        self, loaded: LoadedModel, *, packs: bool, chunk_loss: int | str
    ) -> tuple[Tagging, list[str]]:
        """Itself."""
        return self, []

    def expected(
        self, config: PretrainedConfig, kind: str, *, packs: bool, chunk_loss: int | str
    ) -> Tagging:
        """Itself."""
        return self

    def header(self) -> dict[str, Any]:
        """The tags, in code order, and that words have them."""
        return {"labels": list(self.labels), "kind": TAGGING}

    def side_texts(self, folder: Path) -> dict[str, str]:
        """Nothing: tags stand in the configuration."""
        return {}

    def usage(self, paired: bool) -> str:
        """Markdown that shows transformers' pipeline on a text."""
        return USE

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        """The rows as tokens, cut to `max_length`; raises what `encode_words` raises."""
        return encode_words(rows, tokenizer, max_length)

    def collate(
        self,
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        packs: bool = False,
    ) -> Mapping[str, Tensor]:
        """One batch, padded to its longest row, with `labels` ([B, T]), UNSEEN but at words."""
        told = ("firsts", "label")
        inputs = [{k: v for k, v in one.items() if k not in told} for one in features]
        batch: dict[str, Tensor] = dict(tokenizer.pad(inputs, return_tensors="pt"))
        labels = torch.full_like(batch["input_ids"], UNSEEN)
        longest = labels.shape[1]
        for row, one in zip(labels, features, strict=True):
            left = tokenizer.padding_side == "left"
            shift = longest - len(one["input_ids"]) if left else 0
            row[torch.tensor(one["firsts"]) + shift] = torch.tensor(one["label"])
        return {**batch, "labels": labels}

    def counted(self, data: Encoded, rows: Sequence[int]) -> int:
        """The number of words."""
        tags: list[list[int]] = data.rows.select_columns("label")[list(rows)]["label"]
        return sum(map(len, tags))

    def row_weights(self, data: Encoded) -> None:
        """None: words count alike."""

    def groups(self, data: Encoded) -> dict[str, list[int]]:
        """None: rows are of no classes."""
        return {}

    def targets(self, data: Encoded) -> None:
        """None: the head gives many outputs a row."""

    def example(self, ids: Tensor) -> dict[str, Tensor]:
        """A batch of made-up tokens (int64 [B, T]), each a word with the first tag."""
        return {"input_ids": ids, "labels": torch.zeros_like(ids)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over the words of the batch."""
        losses = _losses(self._logits(model, batch), batch["labels"])
        wide = torch.float32 if losses.device.type == "mps" else torch.float64
        return Loss(losses.to(wide).sum(), (batch["labels"] != UNSEEN).sum())

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of each word, in order, its tag (a code) and loss; then all other tokens. [B, T, 2]."""
        logits, labels = self._logits(model, batch), batch["labels"]
        words = labels != UNSEEN
        found = torch.stack([logits.argmax(-1).float(), _losses(logits, labels).float()], -1)
        order = words.int().argsort(dim=1, descending=True, stable=True)  # words come first
        return found.gather(1, order[..., None].expand_as(found))

    def mark(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of the last token, [B, C]."""
        return self._logits(model, batch)[:, -1]

    def score(self, outputs: Tensor, data: Encoded) -> Metrics:
        """The task's metrics of a split, over the words that the model sees (fp32 [N, T, 2])."""
        codes, predicted = self._codes(outputs, data)
        truth, said = (torch.tensor(list(chain.from_iterable(x))) for x in (codes, predicted))
        evidence = {
            "labels": truth.numpy(),
            "predicted": said.numpy(),
            "right": int((truth == said).sum()),
            "count": len(truth),
            "loss": float(outputs[..., 1].double().sum()),
            **entity_metrics(self._named(codes), self._named(predicted)),
        }
        return compute_metrics(self.metrics, evidence)

    def better(self, new: Metrics, old: Metrics | None) -> bool:
        """Whether the first metric is better; an undefined one gives way to any later one."""
        first = self.metrics[0]
        return better(first, new[first], (old or {}).get(first))

    def lines(self, outputs: Tensor, rows: Dataset, data: Encoded) -> list[dict[str, Any]]:
        """A row's number, its tags and those predicted, and its mean loss over words.

        The rows with the highest loss and a mistake also hold their text.
        """
        labels, predicted = map(self._named, self._codes(outputs, data))
        totals = outputs[..., 1].double().sum(1).tolist()
        lines = [
            {"row": row, "label": one, "predicted": other, "loss": short(total / len(one))}
            for row, one, other, total in zip(
                data.rows["row"][:], labels, predicted, totals, strict=True
            )
        ]
        wrong = [at for at, line in enumerate(lines) if line["label"] != line["predicted"]]
        for at in sorted(wrong, key=lambda at: -lines[at]["loss"])[:WORST]:
            lines[at]["text"] = " ".join(rows[at]["words"])
        return lines

    def by_class(self, lines: Sequence[Mapping[str, Any]]) -> list[ClassScore]:
        """The score of each kind of entity, from the `lines` of a split; none of other tags."""
        if not has_entities(self.labels):
            return []
        return entity_scores(*([line[key] for line in lines] for key in ("label", "predicted")))

    def predict(
        self,
        loaded: LoadedModel,
        texts: Sequence[str | list[str]],
        pairs: Sequence[str] | None = None,
        *,
        asking: Asking,
        first: int = 0,
    ) -> Asked:
        """The words of each text, or list of words, with their tags, and the entities these are.

        `first` is the number of the first text in errors. Raises SiftError for pairs, and for a
        text that the model cannot read.
        """
        if pairs:
            raise SiftError("--pair: words have tags in one text at a time")
        words = [WORD.findall(text) if isinstance(text, str) else text for text in texts]
        codes = [[0] * len(some) for some in words]
        numbers = range(first, first + len(texts))
        rows: dict[str, Sequence[Any]] = {"words": words, "label": codes, "row": numbers}
        data, outputs, longest = collect_asked(self, loaded, rows, asking)
        tags = self._named(self._codes(outputs, data)[1])
        answers = [
            {
                "text": text,
                "words": some,
                "tags": own,
                "entities": [
                    {"kind": kind, "words": " ".join(some[first:last])}
                    for kind, first, last in (entities(own) if has_entities(self.labels) else [])
                ],
            }
            for text, some, own in zip(texts, words, tags, strict=True)
        ]
        return Asked(answers, data.truncated, longest)

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, T, C]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits

    def _codes(self, outputs: Tensor, data: Encoded) -> tuple[list[list[int]], list[list[int]]]:
        """The codes of each row's tags, and those predicted."""
        codes = data.rows["label"][:]
        predicted = outputs[..., 0].long().tolist()
        return codes, [said[: len(one)] for said, one in zip(predicted, codes, strict=True)]

    def _named(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.labels[code] for code in row] for row in rows]


def is_tagging(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a model that gives tags."""
    return any(name.endswith(ARCHITECTURE) for name in config.architectures or [])


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, [B, T]; 0 where it is UNSEEN."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(
        wide.transpose(1, 2), labels, ignore_index=UNSEEN, reduction="none"
    )
