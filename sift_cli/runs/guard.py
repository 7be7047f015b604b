"""What may go wrong around a run: its folder, the disk, the memory."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sift_cli.errors import SiftError
from sift_cli.runs.folder import LOCK_FILE
from sift_cli.system.faults import FREE_SPACE, fault_of


@contextmanager
def guarded(out: Path, main: bool = True) -> Iterator[None]:
    """Holds the folder `out` for one run, and explains faults of the disk and of memory.

    The folder is made if need be, and removed again where nothing was written into it. Raises
    SiftError where it cannot be written, or where another process trains into it. Of the processes
    of one run only the `main` one holds it.
    """
    with explained_faults(out):
        if not main:
            yield
            return
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        try:
            with locked(out):
                yield
        finally:
            if made:
                with suppress(OSError):  # it holds something, and stays
                    out.rmdir()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from training into `out`, until this one ends at the latest.

    Raises SiftError where another one trains into it.
    """
    path = out / LOCK_FILE
    descriptor = _lock(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        os.fsync(descriptor)  # a disk that is full says so here
        yield
    finally:
        with suppress(OSError):  # without its lock the file means nothing
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    """The open lock file; the system unlocks it when the process ends, so that none is stale."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            raise SiftError(
                f"{path.parent}: process {owner or 'of another run'} trains into it; wait for its "
                "end, or choose another --out"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # a run that ended just now took the file away: make one anew


def require_space(out: Path, needed: int) -> None:
    """Raises SiftError where the disk of `out` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise SiftError(
            f"{out}: {free / 1e6:,.1f} MB are free on its disk, and the run needs about "
            f"{needed / 1e6:,.1f} MB for its checkpoints and the delta; {FREE_SPACE}"
        )


@contextmanager
def explained_faults(out: Path) -> Iterator[None]:
    """Turns a fault of the disk or of memory into a SiftError that says what to change."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        fault = fault_of(error, out)
        if fault is None:
            raise
        raise fault from error
