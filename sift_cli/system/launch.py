"""Processes of one run: which one this is, and how they are started on a node."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from sift_cli.errors import ExitCode

GRACE_S = 45  # for the others to end, once one has or a signal came; then they are killed
THREADS = "SIFT_THREADS"  # those that a run of one process would have, for its processes
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of what every launcher sets


@dataclass(frozen=True)
class Launched:
    """Which process this is of how many, and which one on its own node; both from 0."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0


def launched() -> Launched:
    """What torchrun, accelerate or `--devices` says of this process; one alone if none did."""
    if not all(os.environ.get(name) for name in NAMES):
        return Launched()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Launched(rank, world, int(os.environ.get("LOCAL_RANK") or 0))


def launch(count: int, module: str, arguments: Sequence[str]) -> int:
    """Runs `python -m module arguments` in `count` processes on this node; the exit code.

    It is torchrun's own launcher: where one process fails, the others are ended, and its code is
    returned. SIGINT and SIGTERM reach every process once.
    """
    import logging
    from uuid import uuid4

    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[THREADS] = str(torch.get_num_threads())
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=GRACE_S,
    )
    run = partial(elastic_launch(config, sys.executable), "-m", module, *arguments)
    try:
        run()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode < 0:
            print(f"a process of the run was ended by signal {-first.exitcode}", file=sys.stderr)
            return int(ExitCode.BUG)
        return int(first.exitcode)
    except SignalException:
        return int(ExitCode.INTERRUPTED)
    return 0
