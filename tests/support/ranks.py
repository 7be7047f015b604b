"""A few steps of a run, on one process or on several, and what travels meanwhile."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import load_recipe
from sift_cli.runs.ranks import ALONE, Ranks
from sift_cli.runs.session import open_session
from sift_cli.training import loop
from sift_cli.training.batches import steps_of
from sift_cli.training.choosing import selecting
from sift_cli.training.step import take_step
from sift_cli.training.watch import Watch
from tests.support.causal import Exactly
from tests.support.chats import save_chat_recipe
from tests.support.rows import rows_recipe, write_rows

BF16 = ["model.dtype=bfloat16", "train.packing=false", "train.gradient_checkpointing=false"]


def recipes(folder: Path) -> Path:
    """`chat.yaml` of a tiny Llama with a tied head, `rows.yaml` of a BERT, with dropout or not."""
    save_chat_recipe(folder)
    config = LlamaConfig.from_pretrained(folder / "base")
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    text = (folder / "chat.yaml").read_text()
    packs = text.replace("batch_size: 4", "tokens: 160, max_tokens: 80")
    (folder / "packs.yaml").write_text(packs)
    for name, share in (("rows", 0.0), ("dropping", 0.1)):
        rows_recipe(folder, name, share)
    (folder / "more").mkdir()
    write_rows(folder / "more/train.jsonl", 64, seed=3)
    write_rows(folder / "more/validation.jsonl", 17, seed=2)
    return folder


@contextmanager
def exact_steps() -> Iterator[None]:
    """Within it, the steps of runs compute in fp64, and weights of bf16 alone are rounded."""
    real = loop.add_gradient

    def exactly(*args: Any) -> torch.Tensor:
        with Exactly():
            return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "add_gradient", exactly)
        yield


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives within it, and the bytes of those that sum."""
    calls: list[tuple[str, int]] = []
    names = ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object", "barrier")

    def watching(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(first: Any = None, *args: Any, **more: Any) -> Any:
            calls.append((name, first.nbytes if isinstance(first, torch.Tensor) else 0))
            return real(first, *args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, watching(name))
        yield calls


def stepped(
    recipe: Path, changes: Sequence[str], ranks: Ranks = ALONE, steps: int = 4
) -> Mapping[str, Any]:
    """A few steps of a recipe on an fp64 model: what trains, to where, and what travelled."""
    resolved = load_recipe(recipe, changes)
    session = open_session(resolved, device="cpu", ranks=ranks)
    session.model.double()
    assert session.train is not None
    base = {name: one.detach().clone() for name, one in session.model.named_parameters()}
    batches = steps_of(resolved.train, session.train.lengths, session.task.packs)
    method = selecting(resolved)(session, batches)
    undo = prepare_model(session.model, session.device, resolved.train.gradient_checkpointing)
    optimizer = method.begin()
    parameters, watch, numbers = optimizer.parameters, Watch(session, optimizer.parameters), []
    with counted() as calls:
        for step, rows in enumerate(islice(batches.since(1), steps), 1):
            take_step(session, optimizer, step, rows, watch.broken, max_grad_norm=1.0)
            numbers.append(watch.read())
    parameters.detach()  # type: ignore[attr-defined]
    undo()
    return {
        "masters": parameters.flat.detach().clone(),  # type: ignore[attr-defined]
        "supports": {one.name: one.support.positions for one in parameters},  # type: ignore
        "weights": {name: one.detach().clone() for name, one in session.model.named_parameters()},
        "base": base,
        "numbers": numbers,
        "calls": calls,
        "metrics": session.evaluate(),
    }
