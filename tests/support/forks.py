"""Processes forked from one that has imported all that is slow to import; on gloo, several at once.

It is started by the first test that wants it, and serves all tests of this process.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sift_cli.errors import ExitCode
from sift_cli.system.launch import THREADS
from tests.support.command import Done

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds; then a process that hangs ends, and says where it was


def server() -> ForkServerContext:
    """Where processes are forked; it runs when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where it finds that
        ensure_running()
    return context


def on_ranks(count: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` gives on each of so many processes that talk by gloo.

    Raises AssertionError with what the first to fail says.
    """
    here = Path(mkdtemp(dir=folder))
    ranks = [
        server().Process(target=_join, args=(rank, count, here, work, args))
        for rank in range(count)
    ]
    for one in ranks:
        one.start()
    left = {one.sentinel: rank for rank, one in enumerate(ranks)}
    while left:
        for sentinel in wait(list(left)):
            rank = left.pop(sentinel)  # type: ignore[call-overload]
            ranks[rank].join()
            if ranks[rank].exitcode:
                for one in ranks:
                    one.kill()
                told = here / f"error-{rank}"
                raise AssertionError(told.read_text() if told.exists() else f"rank {rank} is gone")
    return [torch.load(here / f"found-{rank}", weights_only=False) for rank in range(count)]


def _join(rank: int, count: int, here: Path, work: Callable[..., Any], args: Sequence[Any]) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # where ranks wait for each other
    torch.set_num_threads(1)
    meeting = f"file://{here}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        torch.save(work(rank, *args), here / f"found-{rank}")
    except BaseException:
        (here / f"error-{rank}").write_text(traceback.format_exc())
        sys.exit(1)
    dist.destroy_process_group()


def forked(module: str, *arguments: object) -> Done:
    """`python -m module arguments` in a process of its own."""
    with TemporaryDirectory() as folder:
        one = _started(Path(folder), module, arguments, {})
        one.join()
        return _ended(one, Path(folder))


def launch(count: int, module: str, arguments: Sequence[str]) -> int:
    """What `sift_cli.system.launch.launch` does, for a test that need not start Python for it.

    What the processes print is printed here; none is ended because another failed. The exit code
    is that of the first rank which has one.
    """
    every = forked_together(count, module, arguments)
    for done in every:
        print(done.stdout, end="")
        print(done.stderr, end="", file=sys.stderr)
    code = next((done.returncode for done in every if done.returncode), 0)
    return code if code >= 0 else int(ExitCode.BUG)


def forked_together(count: int, module: str, arguments: Sequence[object]) -> list[Done]:
    """`python -m module arguments` on ranks as launchers start them: how each ended."""
    store = dist.TCPStore("localhost", 0, is_master=True)  # as a launcher's, it outlives its ranks
    every = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        THREADS: str(torch.get_num_threads()),
    }
    with TemporaryDirectory() as name:
        ranks = []
        for rank in range(count):
            folder = Path(name) / str(rank)
            folder.mkdir()
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **every}
            ranks.append((_started(folder, module, arguments, own), folder))
        for one, _ in ranks:
            one.join()
        return [_ended(*rank) for rank in ranks]


def _started(
    folder: Path, module: str, arguments: Sequence[object], environment: Mapping[str, str]
) -> ForkServerProcess:
    words = [str(one) for one in arguments]
    one = server().Process(target=_run, args=(folder, module, words, dict(environment)))
    one.start()
    return one


def _run(folder: Path, module: str, words: Sequence[str], environment: Mapping[str, str]) -> None:
    if "RANK" in environment:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = [module, *words]
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # it was imported for others, and is to run as `__main__`
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _ended(one: ForkServerProcess, folder: Path) -> Done:
    return Done(one.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr")))
