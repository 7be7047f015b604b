"""Memory that this process has freed and the C library keeps."""

import ctypes
import sys


def trim_heap() -> None:
    """Gives it back to the system, where the C library is glibc, which keeps much."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
