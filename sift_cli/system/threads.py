"""Threads of one process that share their cores with other work."""

import os

SPINS = "GOMP_SPINCOUNT"  # of GNU's OpenMP, which torch computes with on a CPU
FEW = "1000"


def spin_briefly() -> None:
    """From now on, threads that wait for each other sleep soon, in place of holding their core.

    It counts where torch is yet to be imported; what the environment says already stays. Unless
    told otherwise a thread turns some milliseconds over, at each product of a pass; where other
    processes keep the cores busy, the one that it waits for cannot run meanwhile.
    """
    os.environ.setdefault(SPINS, FEW)
