"""The processes of one run (ranks), and all that travels between them.

A run of one process goes the same ways: everything here then returns what it was given, and
nothing travels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sift_cli.errors import ExitCode, SiftError
from sift_cli.models.devices import pick_device
from sift_cli.system.launch import THREADS, launched

Value = TypeVar("Value")
PATIENCE = timedelta(hours=2)  # of a collective: the others may load, write or answer meanwhile
TELLING_S = 1.0  # for one process to tell an error; launchers end all as soon as one is gone
_openings = count()


class Sent(Protocol):
    """What a step's message is made of: the parameters that train."""

    def message(self) -> Tensor:
        """The gradients, flat, and room for a few numbers behind them: [n + ROOM]."""

    def accept(self, message: Tensor) -> None:
        """Takes gradients from such a message."""


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`, from 0) among the `world` of a run.

    With `exact`, what one process alone would choose is what many choose, bit for bit: each looks
    at whole calibration batches. Otherwise they share these as they share the steps. With `even`,
    every rank makes as many passes through the model as any other: each holds a part of it.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    exact: bool = True
    even: bool = False

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    @property
    def main(self) -> bool:
        """Whether this is the one that locks, writes, logs and prints."""
        return self.rank == 0

    def in_rows(self, replicas: int, of_recipe: bool) -> Ranks:
        """The same that each hold some rows of every weight, of so many copies of the model.

        Raises SiftError where they do not come out even, and for methods that are no recipe's own.
        """
        if self.alone:
            return self
        if not of_recipe:
            raise SiftError("distributed.shard: full: it is for what a recipe selects; set none")
        if self.world % replicas:
            raise SiftError(
                f"distributed.replicas: {replicas} copies of the model do not fit on {self.world} "
                "processes; give a number that divides them"
            )
        return replace(self, even=True)

    def place(self, device: torch.device) -> torch.device:
        """The device of this one: on GPUs, its own."""
        if self.alone or device.type != "cuda":
            return device
        return torch.device("cuda", self.local)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Makes the tensor the sum of all ranks' ones, to the same bits on each."""
        if not self.alone:
            with _reaching():
                dist.all_reduce(tensor)
        return tensor

    def agree(self, value: Value) -> Value:
        """The value that the main one has."""
        if self.alone:
            return value
        values = [value if self.main else None]
        with _reaching():
            dist.broadcast_object_list(values, 0)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Each rank's value, in their order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world
        with _reaching():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Value]) -> Value:
        """What `work` returns on the main one, which alone does it; its SiftError is everyone's."""
        if self.alone:
            return work()
        found: Any = None
        if self.main:
            try:
                found = work()
            except SiftError as error:
                found = error
        found = self.agree(found)
        if isinstance(found, SiftError):
            raise found
        return found  # type: ignore[no-any-return]

    def as_one(self, work: Callable[[], Value]) -> Value:
        """As `on_main`, with the threads of a run of one process while the others wait.

        So sums come in the order that they have there, to the bit.
        """
        threads = torch.get_num_threads()

        def with_threads() -> Value:
            torch.set_num_threads(int(os.environ.get(THREADS) or threads))
            try:
                return work()
            finally:
                torch.set_num_threads(threads)

        return self.on_main(work if self.alone else with_threads)

    def each(
        self, run: Callable[[list[int]], Tensor], batches: Sequence[list[int]]
    ) -> list[Tensor]:
        """What `run` makes of each batch, in their order; each rank runs some of them."""
        own = [run(one) for one in batches[self.rank :: self.world]]
        if self.even and len(own) < -(-len(batches) // self.world):
            run(batches[-1])  # the shortest, for the others' sake
        parts = self.gather(own)
        return [parts[at % self.world][at // self.world] for at in range(len(batches))]

    def require_same(self, what: str, digest: Callable[[], str], parts: int = 1) -> None:
        """Raises SiftError where ranks differ in `what`, of which `digest` makes a digest.

        The first `parts` ranks each have another part of it, and those that follow the same again.
        """
        if self.alone:
            return
        found = self.gather(digest())
        wrong = [rank for rank, one in enumerate(found) if one != found[rank % parts]]
        if wrong:
            raise SiftError(
                f"rank {wrong[0]} has other {what} than rank {wrong[0] % parts}; see that all "
                "nodes hold the same files, versions and devices"
            )

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """Within it, the first process of each node goes before the others: caches are written."""
        if self.local:
            self.gather(None)
        yield
        if not self.local:
            self.gather(None)

    def exchange(self, parameters: Sent, loss: Tensor, flags: Sequence[bool]) -> list[Tensor]:
        """Sums loss ([]) and gradients over the ranks, and counts who raised each flag: [flags].

        One message: all that travels in a step.
        """
        message = parameters.message()
        room = message[-1 - len(flags) :]
        room[0] = loss
        for at, flag in enumerate(flags, 1):
            room[at].fill_(float(flag))
        self.sum_(message)
        parameters.accept(message)
        return [room[0].to(loss, copy=True), room[1:].clone()]


ALONE = Ranks()


@contextmanager
def opened(device: str | None) -> Iterator[Ranks]:
    """The ranks that a launcher started this process among; `ALONE` where none did.

    An error is told once: it goes on from here on the rank that has it first; the others end
    without a word, with its exit code. Raises SiftError for a device on which there is one process.
    """
    here = launched()
    joined = dist.is_available() and dist.is_initialized()
    if here.world == 1 and not joined:
        yield ALONE
        return
    where = pick_device(device)
    if where.type == "mps":
        raise SiftError("--device mps: one process alone can use it; use --device cpu")
    if where.type == "cuda":
        torch.cuda.set_device(here.local)
    if not joined:
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        with _reaching():
            dist.init_process_group(backend, timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), here.local, where.type == "cpu")
    key = f"sift/failed/{next(_openings)}"
    try:
        with _torch_reaching():
            yield ranks
    except (Exception, KeyboardInterrupt) as error:
        if _first(key):
            if isinstance(error, SiftError):
                error.first = True
            raise
        time.sleep(TELLING_S)
        raise SystemExit(_code(error)) from None
    if not joined:
        dist.destroy_process_group()


def _first(key: str) -> bool:
    """Whether no other rank has an error to tell yet; no, where none can be asked any more."""
    try:
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:
        return False


def _code(error: BaseException) -> int:
    if isinstance(error, SiftError):
        return int(error.code)
    return int(ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.BUG)


@contextmanager
def _reaching() -> Iterator[None]:
    """Says in the project's words that another process could not be reached."""
    try:
        yield
    except RuntimeError as error:
        raise _gone(error) from error


@contextmanager
def _torch_reaching() -> Iterator[None]:
    """The same of messages that torch sends by itself, amid a pass of a model in rows."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):  # gloo's have no class
            raise _gone(error) from error
        raise


def _gone(error: BaseException) -> SiftError:
    why = str(error).strip().partition("\n")[0][:200]
    return SiftError(
        f"rank {launched().rank}: another process of the run is gone ({why}); what it said, if "
        "anything, stands above. --resume goes on from the last checkpoint",
        ExitCode.BUG,
    )
