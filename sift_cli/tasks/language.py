"""Language models: rows of tokens, some of which are to be learnt, and a loss over these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sift_cli.errors import SiftError
from sift_cli.models.loading import LoadedModel, base_config, load_tokenizer
from sift_cli.models.names import architecture_of
from sift_cli.models.readout import whole_logits
from sift_cli.tasks.coder import ALL_ANSWERS, Coder, open_coder
from sift_cli.tasks.conversations import asked_and_expected, row_of
from sift_cli.tasks.generation import Answer, answer_to, asked_ids
from sift_cli.tasks.metrics import OF_TOKENS, ClassScore, Metrics, better, score_tokens, short
from sift_cli.tasks.prompts import Prompt
from sift_cli.tasks.table import LONGEST_ANSWER
from sift_cli.tasks.task import Loss, Published
from sift_cli.tasks.templates import OWN, stop_tokens, stops_texts, template_texts
from sift_cli.tasks.token_batches import packed, padded, why_not_packed
from sift_cli.tasks.token_loss import Chunks, chunks_of, expected_chunks, token_loss, token_outputs
from sift_cli.tasks.token_rows import DROP, Limit, encode_rows
from sift_cli.tasks.tokens import Encoded, decoded

if TYPE_CHECKING:
    from datasets import Dataset

CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # names of architectures
MARKED = 16  # tokens whose logits are a model's mark
EXTREMES = 10  # rows with the highest loss, and with the lowest, whose text a run keeps
USE = """```python
from transformers import pipeline

answer = pipeline("text-generation", model="PATH_OR_ID_OF_THIS_FOLDER")
answer({})
```"""
QUESTION, BEGINNING = '[{"role": "user", "content": "A question."}]', '"A text begins"'


@dataclass(frozen=True)
class Wording:
    """How rows become tokens: what a recipe's section `data` says of it."""

    template: str = OWN
    system: str | None = None
    train_on: str = ALL_ANSWERS
    too_long: str = DROP


@dataclass(frozen=True)
class Reading:
    """How a model reads a batch: rows packed or padded, and how many positions meet its head."""

    packs: bool = False
    chunks: Chunks | None = None


@dataclass(frozen=True)
class Language:
    """A task whose rows are conversations, prompts with completions, or texts.

    Its rows have the columns `value` (what `conversations.row_of` reads) and `row`. `stops` are the
    tokens at which generation stops, once it is `ready` for a model; `format` is what its rows were
    read as.
    """

    name: str
    metrics: tuple[str, ...] = OF_TOKENS
    train: Dataset | None = None
    evaluation: dict[str, Dataset] = field(default_factory=dict)
    wording: Wording = Wording()
    reading: Reading = Reading()
    stops: Mapping[str, int] = field(default_factory=dict)
    format: str | None = None

    auto: ClassVar[Any] = AutoModelForCausalLM
    new_head: ClassVar[bool] = False
    row_head: ClassVar[bool] = False
    published: ClassVar[Published] = Published(
        pipeline_tag="text-generation",
        peft_type="CAUSAL_LM",
        peft_heads=(),
        predicts="text",
        arguments="",
    )

    def configure(self, folder: Path) -> PretrainedConfig:
        """The configuration of the base in `folder`; SiftError where it is no language model's."""
        config = base_config(folder)
        self.fitted(config)
        return config

    def unconfigure(self, config: PretrainedConfig) -> None:
        """Nothing: the base is a language model as well."""

    def on_head(self, config: PretrainedConfig) -> Language:
        """Itself."""
        return self

    def told_head(self, config: PretrainedConfig, new: bool) -> None:
        """Nothing."""
        return None

    def fitted(self, config: PretrainedConfig) -> Language:
        """Itself; SiftError where a configuration is that of another kind of model."""
        if not is_causal(config):
            named = ", ".join(config.architectures or ["no model"])
            raise SiftError(
                f"data.task: {self.name} needs a causal language model, and the model is {named}"
            )
        return self

    def ready(
        self, loaded: LoadedModel, *, packs: bool, chunk_loss: int | str
    ) -> tuple[Language, list[str]]:
        """The task as it reads a model: packed where it may, and in chunks; and what to say."""
        said = []
        reason = why_not_packed(loaded.model) if packs else None
        if reason is not None:
            said.append(f"train.packing: off for {architecture_of(loaded.model)}: {reason}")
        chunks, why = chunks_of(loaded.model, chunk_loss)
        if why is not None:
            said.append(why)
        reading = Reading(packs and reason is None, chunks)
        tokenizer = loaded.tokenizer
        ends = stop_tokens(Path(tokenizer.name_or_path), tokenizer)
        stops = {decoded(tokenizer, [one]): one for one in ends}
        return replace(self, reading=reading, stops=stops), said

    def expected(
        self, config: PretrainedConfig, kind: str, *, packs: bool, chunk_loss: int | str
    ) -> Language:
        """As `ready` makes it, where the model takes packed rows and its logits are known."""
        return replace(self, reading=Reading(packs, expected_chunks(config, kind, chunk_loss)))

    @property
    def packs(self) -> bool:
        """Whether rows to train on lie end to end."""
        return self.reading.packs

    def coder(self, tokenizer: PreTrainedTokenizerBase) -> Coder:
        """What makes tokens of rows for the model beside which the tokenizer lies."""
        wording = self.wording
        return open_coder(
            Path(tokenizer.name_or_path),
            tokenizer,
            template=wording.template,
            system=wording.system,
            train_on=wording.train_on,
        )

    def limit(self, max_length: int) -> Limit:
        """The most tokens of a row, and what becomes of a longer one."""
        return Limit(max_length, self.wording.too_long)

    def header(self) -> dict[str, Any]:
        """That it is a language task, and how its rows become tokens."""
        wording = self.wording
        return {
            "labels": None,
            "language": {
                "task": self.name,
                "template": wording.template,
                "system": wording.system,
                "train_on": wording.train_on,
                **({"stops": dict(self.stops)} if self.stops else {}),
            },
        }

    def side_texts(self, folder: Path) -> dict[str, str]:
        """Its chat template, if that is not the model's own, and the tokens that end an answer."""
        texts = stops_texts(folder)
        if self.wording.template != OWN:
            template = self.coder(load_tokenizer(folder)).template
            assert template is not None
            texts |= template_texts(folder, template)
        return texts

    def usage(self, paired: bool) -> str:
        """Markdown that shows transformers' pipeline on a question, or the beginning of a text."""
        return USE.format(BEGINNING if self.name == "text" else QUESTION)

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        """The rows as tokens with those to learn from; raises what `encode_rows` raises."""
        split = "train" if rows is self.train else "evaluation"
        return encode_rows(rows, self.coder(tokenizer), self.limit(max_length), split)

    def collate(
        self,
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        packs: bool = False,
    ) -> Mapping[str, Tensor]:
        """One batch: rows end to end, or padded to the longest."""
        if packs:
            return packed(features)
        return padded(features, tokenizer.pad_token_id)

    def counted(self, data: Encoded, rows: Sequence[int]) -> int:
        """The number of tokens that are learnt."""
        return sum(data.targets[row] for row in rows)

    def row_weights(self, data: Encoded) -> None:
        """None: tokens count alike."""

    def groups(self, data: Encoded) -> dict[str, list[int]]:
        """None: rows are of no classes."""
        return {}

    def targets(self, data: Encoded) -> None:
        """None: the outputs are no single layer's."""

    def example(self, ids: Tensor) -> dict[str, Tensor]:
        """A batch of made-up tokens (int64 [B, T]), each of them to be learnt."""
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return {"input_ids": ids, "labels": ids, "predicts": places[:, :-1].flatten()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over the tokens that are learnt."""
        return token_loss(model, batch, self.reading.chunks)  # type: ignore[arg-type]

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of each row its summed loss, its targets, and how many come out right, [B, 3]."""
        return token_outputs(model, batch, self.reading.chunks)  # type: ignore[arg-type]

    def mark(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the last position for a few tokens spread over the vocabulary, [B, 16]."""
        logits = whole_logits(model, batch)[:, -1]  # type: ignore[arg-type]
        width = logits.shape[-1]
        spread = torch.linspace(0, width - 1, min(MARKED, width)).long()
        return logits[:, spread.to(logits.device)]

    def score(self, outputs: Tensor, data: Encoded) -> Metrics:
        """The task's metrics of a split, over all its targets."""
        return score_tokens(self.metrics, outputs.numpy())

    def better(self, new: Metrics, old: Metrics | None) -> bool:
        """Whether the first metric is better; an undefined one gives way to any later one."""
        first = self.metrics[0]
        return better(first, new[first], (old or {}).get(first))

    def lines(self, outputs: Tensor, rows: Dataset, data: Encoded) -> list[dict[str, Any]]:
        """Of each row its number, its mean loss, its targets and how many come out right.

        Those that were split are one again. The rows with the highest and the lowest loss also have
        what they ask and the answer expected.
        """
        sums: dict[int, list[float]] = {}
        for row, one in zip(data.rows["row"][:], outputs.tolist(), strict=True):
            sums[row] = [a + b for a, b in zip(sums.get(row, [0.0] * 3), one, strict=True)]
        ranked = sorted(sums, key=lambda row: sums[row][0] / sums[row][1])
        told = {*ranked[:EXTREMES], *ranked[-EXTREMES:]}
        places = {row: at for at, row in enumerate(rows["row"]) if row in told}

        def line(row: int) -> dict[str, Any]:
            total, count, right = sums[row]
            said = {"loss": short(total / count), "tokens": int(count), "right": int(right)}
            if row not in told:
                return {"row": row, **said}
            asked, expected = asked_and_expected(row_of(rows[places[row]]["value"]))
            return {"row": row, **said, "prompt": asked, "expected": expected}

        return [line(row) for row in sums]

    def by_class(self, lines: Sequence[Mapping[str, Any]]) -> list[ClassScore]:
        """None: rows are of no classes."""
        return []

    def takes_text(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether its models go on from a text as it is, since none puts a template around it."""
        return self.name == "text" or self.coder(tokenizer).template is None

    def answers(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Prompt],
        *,
        device: torch.device,
        longest: int = LONGEST_ANSWER,
    ) -> Iterator[tuple[Prompt, Answer]]:
        """Each prompt with what the model answers, as it comes.

        Raises SiftError, before the first one, for a prompt that the model cannot take.
        """
        coder, model = self.coder(loaded.tokenizer), loaded.model
        model.to(device)  # type: ignore[arg-type]
        asked = []
        for prompt in prompts:
            try:
                asked.append(asked_ids(model, coder, prompt.row))
            except SiftError as error:
                raise SiftError(f"{prompt.place}: {error}") from None
        for prompt, ids in zip(prompts, asked, strict=True):
            yield prompt, answer_to(model, coder, ids, longest=longest)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a causal language model."""
    return not CAUSAL.isdisjoint(config.architectures or [])


def task_of_language(stated: Mapping[str, Any]) -> Language:
    """The task, without rows, of a delta or a run that says this of it."""
    known = {key: stated[key] for key in ("template", "system", "train_on") if key in stated}
    return Language(str(stated.get("task", "instruct")), wording=Wording(**known))
