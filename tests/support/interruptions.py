"""Runs that are interrupted: at which step, by what, under which selections, and what is left."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from sift_cli.recipe import Recipe
from sift_cli.runs.folder import CHECKPOINTS
from sift_cli.runs.guard import locked
from sift_cli.training import loop, train

SELECTIONS = {
    "first-batch": "{density: 0.05}",
    "every-batch": "{policy: current-batch, density: 0.05}",
    "reset": "{policy: current-batch, density: 0.05, history: reset}",
    "park": "{policy: current-batch, density: 0.05, history: park}",
    "drop-grow": "{policy: drop-grow, density: 0.05, every: 3}",
    "park-revert": "{policy: sift, schedule: every-n-steps, every: 2, history: park, revert: true}",
    "warmed-up": "{schedule: after-warmup, warmup_steps: 3, density: 0.05}",
    "lottery": "{policy: lottery, warmup_steps: 3, density: 0.05}",
    "blocks": "{policy: blocks, block_size: 4, density: 0.2}",
    "fisher": "{policy: fisher, density: 0.05}",
    "vectors": "{policy: drop-grow, density: 0.3, every: 3, vectors: true}",
    "everything": "{density: 1.0, target: all, schedule: every-n-steps, every: 3}",
}


class Killed(BaseException):
    """What stands in for SIGKILL: no one catches it."""


@contextmanager
def at_call(number: int, action: Callable[[], None]) -> Iterator[None]:
    """Does `action` in the loop's forward pass of that number."""
    real, calls = loop.add_gradient, iter(range(1, 10**6))

    def counted(*args: object) -> Tensor:
        if next(calls) == number:
            action()
        return real(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "add_gradient", counted)
        yield


def signalled(*numbers: int) -> Callable[[], None]:
    """Sends these signals to this process."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


def kill() -> None:
    """Ends what runs as SIGKILL would."""
    raise Killed


def killed_at(step: int, recipe: Recipe, out: Path, resume: bool = False) -> None:
    """Runs until the forward pass of the step of that number, counted from where it begins."""
    with at_call(step, kill), pytest.raises(Killed):
        train(recipe, out, resume=resume)


def names(run: Path) -> list[str]:
    """The checkpoints in the folder of a run."""
    return [path.name for path in (run / CHECKPOINTS).iterdir()]


def delta(run: Path) -> bytes:
    """The bytes of the delta that a run wrote."""
    return (run / "delta.safetensors").read_bytes()


def hold(folder: Path, ready: object, done: object) -> None:
    """Holds the lock of the folder until `done`; for a process of its own."""
    with locked(folder):
        ready.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]
