"""A task that is no classification: a language model learns to answer, scored by perplexity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from sift_cli.tasks.metrics import Metric, Metrics, better
from sift_cli.tasks.task import Loss, Published
from sift_cli.tasks.tokens import Encoded
from tests.support.models import WORDS

PERPLEXITY = Metric(lambda predicted, labels: None, ("tokens",), rises=False)
UNSEEN = -100  # a token that no loss is taken of


def questions(count: int, seed: int) -> Dataset:
    """Rows whose answers, of one to six words, are the question's first word again and again."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Any]] = {"text": [], "answer": [], "row": list(range(count))}
    for row in range(count):
        length = int(torch.randint(1, 5, (), generator=generator))
        codes = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        rows["text"].append(" ".join(WORDS[code] for code in codes))
        rows["answer"].append(" ".join([WORDS[codes[0]]] * (1 + row % 6)))
    return Dataset.from_dict(rows)


@dataclass(frozen=True)
class Completions:
    """Answers `WORD WORD ...` to questions; the loss is over the tokens of answers alone."""

    train: Dataset | None = field(default_factory=lambda: questions(24, seed=1))
    evaluation: dict[str, Dataset] = field(default_factory=lambda: {"": questions(9, seed=2)})
    name: str = "completions"
    metrics: tuple[str, ...] = ("perplexity",)

    auto: ClassVar[Any] = AutoModelForCausalLM
    packs: ClassVar[bool] = False
    new_head: ClassVar[bool] = True
    row_head: ClassVar[bool] = False
    published: ClassVar[Published] = Published("text-generation", "CAUSAL_LM", (), "text", "")

    def configure(self, folder: Path) -> PretrainedConfig:
        return AutoConfig.from_pretrained(folder)

    def unconfigure(self, config: PretrainedConfig) -> None: ...

    def fitted(self, config: PretrainedConfig) -> "Completions":
        return self

    def on_head(self, config: PretrainedConfig) -> "Completions":
        return self

    def told_head(self, config: PretrainedConfig, new: bool) -> None:
        return None

    def ready(self, loaded: Any, **asked: Any) -> tuple["Completions", list[str]]:
        return self, []

    def expected(self, config: PretrainedConfig, kind: str, **asked: Any) -> "Completions":
        return self

    def header(self) -> dict[str, Any]:
        return {"labels": None}

    def side_texts(self, folder: Path) -> dict[str, str]:
        return {}

    def usage(self, paired: bool) -> str:
        return ""

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        def tokens(row: dict[str, str]) -> dict[str, list[int]]:
            asked = tokenizer(row["text"])["input_ids"]
            answered = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
            return {
                "input_ids": asked + answered,
                "labels": [UNSEEN] * len(asked) + answered,
            }

        encoded = rows.map(tokens, remove_columns=["text", "answer"])
        return Encoded(encoded, [len(ids) for ids in encoded["input_ids"]], 0)

    def collate(
        self,
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        packs: bool = False,
    ) -> Mapping[str, Tensor]:
        def padded(key: str, value: int) -> Tensor:
            rows = [torch.tensor(one[key]) for one in features]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        mask = [torch.ones(len(one["input_ids"]), dtype=torch.long) for one in features]
        return {
            "input_ids": padded("input_ids", tokenizer.pad_token_id),
            "labels": padded("labels", UNSEEN),
            "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }

    def counted(self, data: Encoded, rows: Sequence[int]) -> int:
        return sum(len(one) - one.count(UNSEEN) for one in data.rows[list(rows)]["labels"])

    def row_weights(self, data: Encoded) -> None: ...

    def groups(self, data: Encoded) -> dict[str, list[int]]:
        return {}

    def targets(self, data: Encoded) -> None:
        return None

    def example(self, ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        sums, counts = self.outputs(model, batch).unbind(-1)
        return Loss(sums.sum(), int(counts.sum()))

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed loss and count of each row's answer, [B, 2]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=UNSEEN
        )
        return torch.stack([losses.sum(-1), (targets != UNSEEN).sum(-1).to(losses.dtype)], -1)

    def mark(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(model, batch)

    def score(self, outputs: Tensor, data: Encoded) -> Metrics:
        total, count = outputs.double().sum(0).tolist()
        return {"perplexity": exp(total / count)}

    def better(self, new: Metrics, old: Metrics | None) -> bool:
        return better("perplexity", new["perplexity"], (old or {}).get("perplexity"))

    def lines(self, outputs: Tensor, rows: Dataset, data: Encoded) -> list[dict[str, Any]]:
        return [
            {"row": row, "loss": total, "tokens": int(count)}
            for row, (total, count) in zip(rows["row"][:], outputs.tolist(), strict=True)
        ]

    def by_class(self, lines: Sequence[Mapping[str, Any]]) -> list[Any]:
        return []
