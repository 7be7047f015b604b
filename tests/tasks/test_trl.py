"""The same rows through TRL's SFTTrainer: equal tokens, equal labels, equal losses step by step."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from sift_cli.recipe import load_recipe
from sift_cli.runs.session import Session, open_session
from sift_cli.sparse import SparseAdamW, Support, attach
from sift_cli.tasks.tokens import Encoded
from sift_cli.training.batches import steps_of
from sift_cli.training.dense import DenseAdamW, DenseParameters
from sift_cli.training.method import Optimizer
from sift_cli.training.step import add_gradient, take_step
from tests.support.chats import MARKED, save_chat_model

trl = pytest.importorskip("trl", reason="pip install trl: it is the judge here")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

STEPS, BATCH, RATE = 4, 3, 3e-3
TURNS = ("user", "assistant") * 3


def told(*said: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": role, "content": one} for role, one in zip(TURNS, said, strict=False)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": first + turns}


ROWS = [  # 32: without those held out, every step is full
    told("what is one?", "it is one"),
    told("q", "a", "and two?", "b, of course", "three", "c"),
    told("why? " * 9, "so", system="be short"),
    told("é ☃\n\nq", "two\n\nlines", system="you know all"),
    *[told(f"what is {at} and {at + 1}?", f"{2 * at + 1}" * (1 + at % 4)) for at in range(28)],
]


@dataclass(frozen=True)
class Case:
    """A session, and the rows of each step by micro-batch."""

    session: Session
    batches: list[list[list[int]]]

    @property
    def micro(self) -> int:
        return len(self.batches[0])

    @property
    def train(self) -> Encoded:
        assert self.session.train is not None
        return self.session.train

    def source(self) -> list[Any]:
        """The source's rows in the order of the steps."""
        order = [row for step in self.batches for part in step for row in part]
        return [ROWS[number] for number in self.train.numbers(order)]

    def twin(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.session.tokenizer.name_or_path)
        assert isinstance(model, PreTrainedModel)
        return model


@pytest.fixture(params=[1, 2])
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    """A tiny Llama, steps of three rows or of two batches of three, its logits in chunks."""
    base, data = save_chat_model(tmp_path / "base", MARKED), tmp_path / "rows.jsonl"
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(base, num_hidden_layers=2, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {base}}}\n"
        f"data: {{path: {data}, task: instruct, holdout: 0.06}}\n"
        f"train: {{max_steps: {STEPS}, batch_size: {BATCH}, accumulate: {request.param}, "
        "chunk_loss: 5}\n"
    )
    read = load_recipe(recipe)
    session = open_session(read, device="cpu")
    assert session.train is not None
    session.model.train()
    batches = list(steps_of(read.train, session.train.lengths))
    assert {len(part) for step in batches for part in step} == {BATCH}
    return Case(session, batches)


class Judge(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which notes the loss of each step as it is, not rounded for a log."""

    def training_step(self, *args: Any, **more: Any) -> Tensor:
        found: Tensor = super().training_step(*args, **more)
        self.seen = [*getattr(self, "seen", []), float(found)]
        return found


def judge(case: Case, model: PreTrainedModel, out: Path, rows: list[Any]) -> Judge:
    """A trainer for those source rows, in that order."""
    settings = trl.SFTConfig(
        output_dir=str(out),
        assistant_only_loss=True,
        packing=False,
        max_length=None,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=case.micro,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Judge(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case.session.tokenizer.name_or_path),
    )


def losses(case: Case, optimizer: Optimizer) -> list[float]:
    """Of each step, as training takes it."""
    found: list[float] = []

    def note(step: int, rows: Any, loss: Tensor, norm: Tensor) -> Tensor:
        found.append(float(loss))
        return torch.zeros(())

    for step, rows in enumerate(case.batches, start=1):
        take_step(case.session, optimizer, step, rows, note, max_grad_norm=1.0)
    return found


def supports_of(model: PreTrainedModel) -> Iterator[tuple[str, Support]]:
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            chosen = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 5]
            yield name, Support.of(tuple(weight.shape), chosen.sort().values)


def masked(model: PreTrainedModel, supports: dict[str, Support]) -> None:
    """Lets a model learn in its supports alone, by ordinary autograd."""
    for name, weight in model.named_parameters():
        mask = torch.zeros(weight.numel())
        if name in supports:
            mask[supports[name].positions.long()] = 1  # type: ignore[union-attr]
        weight.register_hook(lambda gradient, mask=mask: gradient * mask.view(gradient.shape))


@pytest.mark.parametrize("how", ["dense", "masked"])
def test_losses_of_the_first_steps_are_those_of_trl(how: str, case: Case, tmp_path: Path) -> None:
    model, twin = case.session.model, case.twin()
    untrained = float(add_gradient(case.session, case.batches[-1]))
    model.zero_grad()
    optimizer: Optimizer = DenseAdamW(DenseParameters(dict(model.named_parameters())), RATE)
    if how == "masked":
        supports = dict(supports_of(twin))
        masked(twin, supports)
        model.requires_grad_(False)
        optimizer = SparseAdamW(attach(model, supports), RATE)
    trainer = judge(case, twin, tmp_path / "trl", case.source())
    trainer.train()
    parts = [trainer.seen[at : at + case.micro] for at in range(0, len(trainer.seen), case.micro)]
    found = losses(case, optimizer)
    assert len(found) == STEPS
    assert found == pytest.approx(list(map(sum, parts)), abs=1e-5)
    assert abs(found[-1] - untrained) > 1e-3  # the steps before it were taken


def test_tokens_and_labels_are_those_of_trl(case: Case, tmp_path: Path) -> None:
    """One row of several turns, and of a system turn, among them."""
    trainer = judge(case, case.twin(), tmp_path / "trl", ROWS)
    theirs, every = list(trainer.train_dataset), range(len(case.train))
    numbers = case.train.numbers(every)
    for ours, number in zip(case.train.take(every), numbers, strict=True):
        batch = trainer.data_collator([theirs[number]])
        assert ours["input_ids"] == batch["input_ids"][0].tolist()
        assert ours["labels"] == batch["labels"][0].tolist()
    assert {1, 2} <= set(numbers)
