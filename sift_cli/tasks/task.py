"""A task: all that training, selection, evaluation, planning, merging, cards and export ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sift_cli.tasks.metrics import ClassScore, Metrics
from sift_cli.tasks.tokens import Encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from sift_cli.models.loading import LoadedModel


@dataclass(frozen=True)
class Loss:
    """The summed loss of a batch, of shape [], and how many rows (or tokens) it is the sum of.

    Where rows count more or less by their class, that is what they count together.

    `sum` is of fp64 where the device has it, so that a mean made a sum and divided again is the
    same to the last bit.
    """

    sum: Tensor
    count: float | Tensor

    @classmethod
    def of_mean(cls, mean: Tensor, count: float | Tensor) -> Loss:
        """From the mean over `count`, as models of transformers give it."""
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        own = mean.to(torch.promote_types(mean.dtype, torch.float32))
        return cls(own.to(wide) * count, count)


@dataclass(frozen=True)
class Published:
    """What readers and other tools are told of a task: on cards, and in adapters for PEFT.

    `pipeline_tag` is the hub's name for what its models do, `peft_type` PEFT's, under which PEFT
    stores the modules `peft_heads` whole, asked or not. `predicts` says in words what comes out,
    `arguments` what `from_pretrained` needs to make the head.
    """

    pipeline_tag: str
    peft_type: str
    peft_heads: tuple[str, ...]
    predicts: str
    arguments: str


class Task(Protocol):
    """What every task answers; only its own module knows what its rows and outputs are.

    Rows are checked, each with its number in its source split in the column `row`. A task made from
    what a delta or a model's configuration says has none: `train` is None, `evaluation` is empty.
    """

    @property
    def name(self) -> str:
        """What it is called in recipes and reports."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What evaluations give, by name; the first one decides which weights are kept."""

    @property
    def train(self) -> Dataset | None:
        """The rows to train on."""

    @property
    def evaluation(self) -> Mapping[str, Dataset]:
        """The rows to evaluate on, by the suffix of their metrics' names: "" for the first."""

    @property
    def auto(self) -> Any:
        """The Auto class of transformers that loads its models."""

    @property
    def packs(self) -> bool:
        """Whether rows to train on lie end to end in a batch."""

    @property
    def new_head(self) -> bool:
        """Whether a base lacks the head that its models have."""

    @property
    def row_head(self) -> bool:
        """Whether that head gives outputs a row: what a probe or a prior can start."""

    @property
    def published(self) -> Published:
        """What cards and exported adapters say."""

    def configure(self, folder: Path) -> PretrainedConfig:
        """The configuration of the base in `folder`, with what this task's head needs.

        Raises SiftError where there is no usable one.
        """

    def unconfigure(self, config: PretrainedConfig) -> None:
        """Takes what `configure` put in out of `config`, in place."""

    def fitted(self, config: PretrainedConfig) -> Task:
        """The task on a tuned model of this configuration; SiftError where it is none for it."""

    def on_head(self, config: PretrainedConfig) -> Task:
        """The task on a base of this configuration, in the order of a head that is tuned."""

    def told_head(self, config: PretrainedConfig, new: bool) -> str | None:
        """What to say of the head on such a base, of which something is new."""

    def ready(
        self, loaded: LoadedModel, *, packs: bool, chunk_loss: int | str
    ) -> tuple[Task, list[str]]:
        """The task as it reads the batches of a model that is loaded, and what to say of that."""

    def expected(
        self, config: PretrainedConfig, kind: str, *, packs: bool, chunk_loss: int | str
    ) -> Task:
        """What `ready` will give for a model that is not loaded, on such a kind of device.

        Where nothing of the model stands against it.
        """

    def header(self) -> dict[str, Any]:
        """What delta files and summary.json hold of it, beside its name."""

    def side_texts(self, folder: Path) -> dict[str, str]:
        """What files beside the weights of its model must say where those of `folder` do not."""

    def usage(self, paired: bool) -> str:
        """Markdown that shows how to call its model, with two texts a row where `paired`."""

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        """The rows as tokens, cut to `max_length`; raises SiftError where that holds nothing."""

    def collate(
        self,
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        packs: bool = False,
    ) -> Mapping[str, Tensor]:
        """One batch with what the loss needs: padded to its longest row, or packed."""

    def counted(self, data: Encoded, rows: Sequence[int]) -> float:
        """What the mean loss over these rows is over: the `count` of their `loss`, without it."""

    def row_weights(self, data: Encoded) -> Tensor | None:
        """What each row counts in the loss, fp64 [N]; None where all count alike."""

    def groups(self, data: Encoded) -> dict[str, list[int]]:
        """Rows that are of one kind, such as a class, by its name; empty where there are none."""

    def targets(self, data: Encoded) -> Tensor | None:
        """What a linear layer that makes the outputs is to give: codes of classes, or numbers.

        int64 or fp64 [N], of each row, or fp64 0 and 1 of each class [N, C]; None where outputs are
        no such layer's.
        """

    def example(self, ids: Tensor) -> dict[str, Tensor]:
        """A batch of made-up tokens (int64 [B, T]) with what the loss needs, and no mask."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The summed loss of a batch that lies on the model's device, with its graph."""

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What an evaluation keeps of a batch, [B, ...]: few numbers for each row."""

    def mark(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What a model is known by from a batch of made-up tokens: few numbers a row, [B, ...]."""

    def score(self, outputs: Tensor, data: Encoded) -> Metrics:
        """The task's metrics of a split, of which all `outputs` are there (fp32 [N, ...])."""

    def better(self, new: Metrics, old: Metrics | None) -> bool:
        """Whether an evaluation is to be preferred to an earlier one, by the first metric."""

    def lines(self, outputs: Tensor, rows: Dataset, data: Encoded) -> list[dict[str, Any]]:
        """What predictions.jsonl says of each row that was encoded; begins with its number."""

    def by_class(self, lines: Sequence[Mapping[str, Any]]) -> list[ClassScore]:
        """How well each class is told, from such `lines` of a split; empty where there are none."""
