"""Runs in several processes on gloo: a group that is spawned once does many of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from sift_cli.models.prepare import prepare_model
from sift_cli.recipe import load_recipe
from sift_cli.runs.ranks import ALONE, Ranks
from sift_cli.runs.session import open_session
from sift_cli.training.batches import steps_of
from sift_cli.training.choosing import selecting
from sift_cli.training.step import take_step
from sift_cli.training.watch import Watch

Work = Callable[[Ranks, Path], Any]


def together(world: int, work: Work, folder: Path) -> list[Any]:
    """What `work`, a function of a module, returns on each of `world` ranks."""
    multiprocessing.spawn(_member, (world, work, folder), nprocs=world)
    return [
        torch.load(folder / f"found-{world}-{rank}", weights_only=False) for rank in range(world)
    ]


def _member(rank: int, world: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{world}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    found = work(Ranks(rank, world, rank), folder)
    torch.save(found, folder / f"found-{world}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


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
