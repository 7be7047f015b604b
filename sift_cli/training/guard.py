"""What may go wrong around a run: its folder, the disk, the memory."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from sift_cli.errors import SiftError

LOCK_FILE = ".lock"
FREE_SPACE = "free some space, or choose another --out"
OTHER_PLACE = "make it writable, or choose another --out"
FAULTS = {
    errno.ENOSPC: ("no space is left on the disk", FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", FREE_SPACE),
    errno.EFBIG: ("the file is larger than this process may write", FREE_SPACE),
    errno.EROFS: ("the disk is read-only", OTHER_PLACE),
    errno.EACCES: ("permission denied", OTHER_PLACE),
    errno.EPERM: ("not permitted", OTHER_PLACE),
    errno.EIO: ("the disk fails to read or write", "see to the disk"),
    errno.ESTALE: ("the network folder is gone", "mount it again"),
    errno.ENOENT: ("it vanished while it was needed", "bring it back"),
    errno.ENOTDIR: ("a folder is needed here, and this is a file", "choose another --out"),
    errno.EEXIST: ("a folder is needed here, and this is a file", "choose another --out"),
}
LESS_MEMORY = (
    "halve train.batch_size and double train.accumulate, which changes no result; or set "
    "train.gradient_checkpointing: true, a smaller data.max_length or eval.batch_size"
)


@contextmanager
def guarded(out: Path) -> Iterator[None]:
    """Holds the folder `out` for one run, and tells faults of the disk and of memory in one line.

    The folder is made if need be, and goes again where nothing was written into it. Raises
    SiftError where it cannot be written, or where another process trains into it.
    """
    with told(out):
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
    """Keeps other processes from training into `out`; ends with the process, however that ends.

    Raises SiftError where another one does.
    """
    path = out / LOCK_FILE
    descriptor = _lock(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        os.fsync(descriptor)  # a disk that is full says so here
        yield
    finally:
        path.unlink(missing_ok=True)
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
def told(out: Path) -> Iterator[None]:
    """Turns what disks and memories do into a SiftError that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        said = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise SiftError(f"out of memory: {said or 'on the host'}; {LESS_MEMORY}") from error
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        raise _fault(error.errno, error.filename or out) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None or int(number[1]) not in FAULTS:
            raise
        raise _fault(int(number[1]), out) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise SiftError(f"out of memory on the host; {LESS_MEMORY}") from error


def _fault(number: int, where: object) -> SiftError:
    said, way_out = FAULTS[number]
    return SiftError(f"{where}: {said}; {way_out}")
