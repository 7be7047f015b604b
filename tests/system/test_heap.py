"""What goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest

from sift_cli.system.heap import trim_heap

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@pytest.mark.skipif(not GLIBC, reason="other C libraries keep less")
def test_freed_memory_below_what_is_in_use_goes_back() -> None:
    blocks = [bytearray(b"x" * 50_000) for _ in range(2000)]
    last = bytearray(b"x" * 50_000)  # above the others, so that the heap does not shrink by itself
    del blocks
    before = resident()
    trim_heap()
    assert before - resident() > 50_000_000
    assert last
