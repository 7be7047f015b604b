"""What a step works on: a model and its batches, real or of a given shape."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from sift_cli.recipe import parse_recipe
from sift_cli.runs.session import open_session
from sift_cli.training.batches import Batches

SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2050,
    },
    "roberta-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2050,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "llama-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}


@dataclass(frozen=True)
class Workload:
    """`NAME:BATCHxSEQ`, a shape with random weights and tokens, or `TASK:BATCH`, real rows.

    The folders `model` and `data` hold the weights and rows of tasks.
    """

    name: str
    batch: int
    sequence: int | None = None
    model: str | None = None
    data: str | None = None
    dtype: str = "float32"
    device: str = "cpu"

    @classmethod
    def of(cls, text: str, **settings: Any) -> "Workload":
        """What the command line calls a workload."""
        name, _, size = text.partition(":")
        batch, _, sequence = size.partition("x")
        return cls(name, int(batch), int(sequence) if sequence else None, **settings)

    @property
    def real(self) -> bool:
        """Whether the rows are those of a task."""
        return self.sequence is None

    def open(self, steps: int) -> tuple[Any, list[dict[str, Tensor]], list[str]]:
        """The model on its device, `steps` batches, and the names of the parameters of its head."""
        return self._real(steps) if self.real else self._shape(steps)

    def _real(self, steps: int) -> tuple[Any, list[dict[str, Tensor]], list[str]]:
        recipe = parse_recipe(
            f"model: {{path: {self.model}, dtype: {self.dtype}}}\n"
            f"data: {{path: {self.data}/{self.name}, task: {self.name}, max_length: 128}}\n"
            f"train: {{batch_size: {self.batch}}}\n",
            "benchmark",
        )
        session = open_session(recipe, device=self.device)
        assert session.train is not None
        rows = Batches.plan(
            session.train.lengths,
            batch_size=self.batch,
            accumulate=1,
            epochs=100.0,
            max_steps=None,
            seed=0,
        )
        batches = [
            {
                key: value.to(self.device)
                for key, value in session.collate(session.train.take(part)).items()
            }
            for (part,) in islice(rows, steps)
        ]
        return session.model, batches, list(session.new)

    def _shape(self, steps: int) -> tuple[Any, list[dict[str, Tensor]], list[str]]:
        assert self.sequence is not None
        config = self._config()
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=getattr(torch, self.dtype)
            )
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(steps):
            ids = torch.randint(
                4, config.vocab_size, (self.batch, self.sequence), generator=generator
            )
            labels = torch.randint(2, (self.batch,), generator=generator)
            batches.append(
                {
                    "input_ids": ids.to(self.device),
                    "attention_mask": torch.ones_like(ids).to(self.device),
                    "labels": labels.to(self.device),
                }
            )
        head = ("classifier.", "score.")
        return model, batches, [n for n, _ in model.named_parameters() if n.startswith(head)]

    def _config(self) -> PretrainedConfig:
        shape = dict(SHAPES[self.name])
        config = AutoConfig.for_model(shape.pop("model_type"), num_labels=2, **shape)
        config.pad_token_id = 0 if config.model_type != "roberta" else 1
        config.use_cache = False
        return config
